"""A network as an ONNX file that runs without this project."""

import logging
import os
import warnings
from pathlib import Path

import torch

from models.network import Network

_TOLERANCE = 1e-4  # largest difference between torch and ONNX Runtime, as the network measures it


def export_onnx(network: Network, path: Path) -> float:
    """Writes an ONNX graph of the deployed network with a free batch size, and compares it with torch.

    Its inputs and outputs are named by the network: "images", and "camera" where it is told the camera.

    Returns:
        The largest difference on eight random images: of numbers of L2-normalised embeddings, or what the network
        says is the same.

    Raises:
        ValueError: the network has no ONNX graph, or the difference is above 1e-4; there is no file then.
    """
    import onnxruntime

    if reason := network.exportable():
        raise ValueError(f"{network.kind} has no ONNX file: {reason}")
    deployed, inputs = network.deployed().cpu(), network.example(8)
    batch = torch.export.Dim("batch", min=1)
    partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                deployed, inputs, str(partial), input_names=list(network.input_names),
                output_names=list(network.outputs), dynamic_shapes=tuple({0: batch} for _ in inputs), dynamo=True,
                external_data=False, verbose=False,
            )  # fmt: skip
        session = onnxruntime.InferenceSession(str(partial), providers=["CPUExecutionProvider"])
        names = dict(zip(network.input_names, (value.numpy() for value in inputs), strict=True))
        exported = [torch.from_numpy(value) for value in session.run(list(network.outputs), names)]
        with torch.no_grad():
            ours = deployed(*inputs)
        difference = network.same([ours] if isinstance(ours, torch.Tensor) else list(ours), exported)
        if not difference <= _TOLERANCE:
            raise ValueError(f"the ONNX file differs from the student by {difference:.1e}, more than {_TOLERANCE:.0e}")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return difference
