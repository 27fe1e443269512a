"""A network as ONNX files that run without this project."""

import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from models.network import Graph, Network

_TOLERANCE = 1e-4  # largest difference between torch and ONNX Runtime, as the network measures it


def export_onnx(network: Network, path: Path) -> float:
    """Writes every ONNX graph of the deployed network (:func:`onnx_files`), and compares each with torch.

    Their inputs and outputs are named by the network: "images", and "camera" where it is told the camera.

    Returns:
        The largest difference on the random images of the network: of numbers of L2-normalised embeddings, or what
        the network says is the same.

    Raises:
        ValueError: the network has no ONNX graph, or a difference is above 1e-4; nothing is written then.
    """
    if reason := network.exportable():
        raise ValueError(f"{network.kind} has no ONNX file: {reason}")
    graphs = network.graphs()
    files = onnx_files(network, path)
    partial = {key: file.with_name(f"{file.name}.tmp-{os.getpid()}") for key, file in files.items()}
    try:
        differences = []
        for key, graph in graphs.items():
            _write(graph, partial[key])
            difference = _difference(graph, partial[key], network.same)
            if not difference <= _TOLERANCE:
                raise ValueError(
                    f"the ONNX file {files[key].name} differs from the student by {difference:.1e}, "
                    f"more than {_TOLERANCE:.0e}"
                )
            differences.append(difference)
        for key, file in files.items():
            os.replace(partial[key], file)
    finally:
        for file in partial.values():
            file.unlink(missing_ok=True)
    return max(differences)


def onnx_files(network: Network, path: Path) -> dict[str, Path]:
    """The file of each graph, beside the main one, which is ``path``."""
    return {key: path.with_suffix(f".{key}.onnx") if key else path for key in network.graphs()}


def _write(graph: Graph, file: Path) -> None:
    for library in ("torch.onnx", "onnx_ir", "onnxscript"):
        logging.getLogger(library).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            graph.module.cpu(), graph.inputs, str(file), input_names=list(graph.input_names),
            output_names=list(graph.outputs), dynamic_shapes=graph.dynamic_shapes, dynamo=True,
            external_data=False, verbose=False,
        )  # fmt: skip


def _difference(graph: Graph, file: Path, same: Callable[[list[Tensor], list[Tensor]], float]) -> float:
    """The largest one of all inputs; not a number where any is not."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    reference = (graph.reference or graph.module).cpu()
    found = []
    for inputs in (graph.inputs, *graph.checks):
        named = dict(zip(graph.input_names, (value.numpy() for value in inputs), strict=True))
        exported = [torch.from_numpy(value) for value in session.run(list(graph.outputs), named)]
        with torch.no_grad():
            ours = reference(*inputs)
        found.append(same([ours] if isinstance(ours, Tensor) else list(ours), exported))
    return torch.tensor(found).max().item()
