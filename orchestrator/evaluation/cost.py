"""What a network costs: multiply-accumulates, parameters, images per second; the whole of it, or one of its parts."""

import math
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.network import Network

_MACS_AT_ONCE = 10**12  # of the batch whose time is logged: 32 images of most embedders, few of a detector


@torch.no_grad()
def macs(network: Network, part: str = "total") -> int:
    """Multiply-accumulates of convolutions and matrix products for one image, as deployed.

    Papers of this field call this number FLOPs; it is half of torch's count of floating-point operations.
    """
    net, inputs = _as_deployed(network, part, 1)
    with FlopCounterMode(display=False) as counter:
        net(*inputs)
    return counter.get_total_flops() // 2


def parameters(network: Network, part: str = "total") -> int:
    """Number of trainable and frozen parameters, each counted once, as deployed; buffers are not counted."""
    return sum(p.numel() for p in _part(network, part).parameters())


@torch.no_grad()
def images_per_second(
    network: Network, count: int = 32, seconds: float = 1.0, warmup: int = 2, part: str = "total"
) -> float:
    """Throughput of the forward pass as deployed: of the fastest batch within ``seconds``, after the warm-up.

    Whatever else runs on the machine only ever slows a batch, so the fastest one says most about the network.
    """
    net, inputs = _as_deployed(network, part, count)
    for _ in range(warmup):
        net(*inputs)
    start, fastest = time.perf_counter(), math.inf
    while fastest == math.inf or time.perf_counter() - start < seconds:
        _synchronise(net)
        began = time.perf_counter()
        net(*inputs)
        _synchronise(net)
        fastest = min(fastest, time.perf_counter() - began)
    return count / fastest


def logged(network: Network) -> dict[str, float]:
    """What the record says of a trained network: the whole, and its other parts under their names."""
    found: dict[str, float] = {}
    for part in network.parts():
        name = "cost" if part == "total" else f"cost/{part}"
        found |= {f"{name}/macs": macs(network, part), f"{name}/parameters": parameters(network, part)}
    count = min(32, max(1, _MACS_AT_ONCE // max(1, found["cost/macs"])))
    return found | {"cost/cpu_images_per_s": images_per_second(network, count, seconds=0.3)}


def _part(network: Network, part: str) -> nn.Module:
    parts = network.parts()
    if part not in parts:
        raise ValueError(f"a network of kind {network.kind} has the parts {', '.join(parts)}, not {part!r}")
    return parts[part]


def _as_deployed(network: Network, part: str, count: int) -> tuple[nn.Module, tuple[Any, ...]]:
    """One part and its inputs, on the device where the part is."""
    net = _part(network, part)
    return net, tuple(_moved(value, next(net.parameters()).device) for value in network.example(count))


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else [_moved(part, device) for part in value]


def _synchronise(net: nn.Module) -> None:
    if next(net.parameters()).is_cuda:
        torch.cuda.synchronize()
