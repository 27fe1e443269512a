"""Starting weights from a local file: of timm, of torchvision, or of somebody's training with either.

Read are .safetensors files, and state dicts of ``torch.save`` without any code in them; also where the state dict
lies under "state_dict" or "model", and where its names begin with what wrappers put there, such as "module.".
"""

import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

_PREFIXES = ("module.", "_orig_mod.", "student.", "backbone.", "model.")
_HEADS = ("fc", "head", "head_dist", "heads", "classifier")
_COUNTER = "num_batches_tracked"  # of batch norms; files of old torch have none, and nothing depends on it


def read(file: str | Path) -> dict[str, Tensor]:
    """The tensors of a weights file by their names in it.

    Raises:
        ValueError: the file is missing, damaged, needs code to be read, or holds no tensors; in one line.
    """
    try:
        if Path(file).suffix == ".safetensors":
            stored: Any = load_file(file)
        else:
            stored = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"weights {file} cannot be read: it is no file of torch, or holds more than tensors, which would need its "
            f"code; store the network's state_dict() alone"
        ) from error
    except Exception as error:  # zip, safetensors and OS errors alike mean there are no weights
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ValueError(f"weights {file} cannot be read: {type(error).__name__}: {reason}") from error
    while isinstance(stored, Mapping) and (inner := [k for k in ("state_dict", "model") if _holds(stored, k)]):
        stored = stored[inner[0]]
    found = {k: v for k, v in stored.items() if isinstance(v, Tensor)} if isinstance(stored, Mapping) else {}
    if not found:
        raise ValueError(f"weights {file} hold no tensors by name; expected a state dict")
    return found


def stamp_of(file: str | Path) -> tuple[int, int]:
    """Size and time of change of a weights file; raises ValueError where there is none."""
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"weights: there is no file {file}")
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def start(net: nn.Module, file: str | Path, rename: Callable[[str], str] | None = None) -> str:
    """Puts the weights of a file into a network.

    ResNets of torchvision have timm's names; those of its MobileNetV2 and V3 are translated. A classifier that the
    network does not have, or has in another size, is left out.

    Args:
        net: receives the weights.
        file: as :func:`read` takes it.
        rename: name in the file (without a prefix) -> name in the network, for other origins.

    Returns:
        Empty, or one line that says what of the file was not used and what of the network was not found.

    Raises:
        ValueError: the file cannot be read; less than half of the network's tensors fit; or one, but of the
            classifier, has another shape, as a ResNet-50's have, most of whose names are a ResNet-18's too.
    """
    wanted = net.state_dict()
    stored = without_prefixes(read(file), wanted, file)
    names = torchvision_names(net, stored) if rename is None else {name: rename(name) for name in stored}
    stored = {names.get(name, name): tensor for name, tensor in stored.items()}
    stored = {n: _as_convolution(t, wanted.get(n)) for n, t in stored.items()}
    stored = {n: t for n, t in stored.items() if n.partition(".")[0] not in _HEADS or _fits(t, wanted.get(n))}
    fit = {n: stored[n] for n in wanted if _fits(stored.get(n), wanted[n])}
    if 2 * len(fit) < len(wanted) or any(n in stored and n not in fit for n in wanted):
        raise ValueError(f"{file} holds another network: {misfit(stored, wanted)}")
    net.load_state_dict(fit, strict=False)
    unused = sorted(n for n in stored if n not in wanted and not n.endswith(_COUNTER))
    lacking = [n for n in wanted if n not in fit and not n.endswith(_COUNTER)]
    told = []
    if unused:
        told.append(f"{len(unused)} of its tensors are not used, such as {unused[0]}")
    if lacking:
        told.append(f"{len(lacking)} of the network's {len(wanted)} are not in it, such as {lacking[0]}")
    if rename is None and any(".block." in n for n in names):
        told.append("torchvision's MobileNetV3 adds 0.001 to the variance in its batch norms, timm's 0.00001")
    return f"weights {file}: {'; '.join(told)}" if told else ""


def misfit(stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """Empty where names and shapes are the same; else how many tensors fit, and the first that does not."""
    wrong = [n for n in wanted if not _fits(stored.get(n), wanted[n])]
    more = [n for n in stored if n not in wanted]
    if not wrong and not more:
        return ""
    first = (wrong or more)[0]
    if first not in stored:
        what = "is missing"
    elif first not in wanted:
        what = "is not the network's"
    else:
        what = f"is {tuple(stored[first].shape)}, expected {tuple(wanted[first].shape)}"
    return f"{len(wanted) - len(wrong)} of {len(wanted)} tensors fit, the first that does not: {first} {what}"


def without_prefixes(stored: Mapping[str, Tensor], wanted: Mapping[str, Any], file: str | Path) -> dict[str, Tensor]:
    """The tensors of a file under names without what a wrapper put before them.

    Raises:
        ValueError: two tensors would have one name.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        plain = name
        while plain not in wanted and plain.startswith(_PREFIXES):
            plain = plain.partition(".")[2]
        if plain in found:
            raise ValueError(f"weights {file} hold two tensors {plain}; expected one network in the file")
        found[plain] = tensor
    return found


def torchvision_names(net: nn.Module, stored: Mapping[str, Any]) -> dict[str, str]:
    """torchvision's names of a MobileNetV2's or V3's tensors -> the names in timm's network; else empty."""
    inner = next((kind for kind in ("conv", "block") if f"features.1.{kind}.0.0.weight" in stored), None)
    if inner is None or not hasattr(net, "conv_stem") or not hasattr(net, "blocks"):
        return {}
    modules = dict(_torchvision_modules(net, inner))
    parts = ((name, *name.rpartition(".")) for name in stored)
    return {name: f"{modules[module]}.{tensor}" for name, module, _, tensor in parts if module in modules}


def _torchvision_modules(net: nn.Module, inner: str) -> Iterator[tuple[str, str]]:
    """(module of torchvision, module of timm); ``inner`` is "conv" in a block of MobileNetV2, "block" in one of V3."""
    yield from (("features.0.0", "conv_stem"), ("features.0.1", "bn1"))
    blocks = [(f"blocks.{s}.{b}", block) for s, stage in enumerate(net.blocks) for b, block in enumerate(stage)]
    for number, (own, block) in enumerate(blocks, 1):
        if hasattr(block, "conv"):  # the last stage of V3: a convolution alone
            yield from ((f"features.{number}.0", f"{own}.conv"), (f"features.{number}.1", f"{own}.bn1"))
        else:
            layers = _torchvision_layers(block, inner)
            yield from ((f"features.{number}.{inner}.{theirs}", f"{own}.{ours}") for theirs, ours in layers)
    if inner == "block":
        yield "classifier.0", "conv_head"  # a linear layer there, a 1×1 convolution here
    else:
        yield from ((f"features.{len(blocks) + 1}.0", "conv_head"), (f"features.{len(blocks) + 1}.1", "bn2"))


def _torchvision_layers(block: nn.Module, inner: str) -> list[tuple[str, str]]:
    """(layer of torchvision's block, layer of timm's): widening, by channel, [squeeze and excitation,] narrowing."""
    widens = hasattr(block, "conv_pwl")
    *first, last = ("conv_pw", "conv_dw", "conv_pwl") if widens else ("conv_dw", "conv_pw")
    pairs = []
    for at, layer in enumerate(first):
        pairs += [(f"{at}.0", layer), (f"{at}.1", f"bn{at + 1}")]
    at = len(first)
    if hasattr(block.se, "conv_reduce"):
        pairs += [(f"{at}.fc1", "se.conv_reduce"), (f"{at}.fc2", "se.conv_expand")]
        at += 1
    # V2 has its last convolution and its norm beside each other, V3 one inside the other.
    theirs = (f"{at}", f"{at + 1}") if inner == "conv" else (f"{at}.0", f"{at}.1")
    return [*pairs, (theirs[0], last), (theirs[1], f"bn{len(first) + 1}")]


def _fits(tensor: Tensor | None, wanted: Tensor | None) -> bool:
    return tensor is not None and wanted is not None and tensor.shape == wanted.shape


def _as_convolution(tensor: Tensor, wanted: Tensor | None) -> Tensor:
    """The matrix of a linear layer as the kernel of a 1×1 convolution, where the network has that instead."""
    if wanted is not None and tensor.ndim == 2 and wanted.shape == (*tensor.shape, 1, 1):
        return tensor.reshape(wanted.shape)
    return tensor


def _holds(stored: Mapping, key: str) -> bool:
    return isinstance(stored.get(key), Mapping)
