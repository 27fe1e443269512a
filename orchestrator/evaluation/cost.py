"""What a network costs: multiply-accumulates, parameters, images per second; the whole of it, or one of its parts."""

import math
import time

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.network import Network


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
        _synchronise(inputs)
        began = time.perf_counter()
        net(*inputs)
        _synchronise(inputs)
        fastest = min(fastest, time.perf_counter() - began)
    return count / fastest


def _part(network: Network, part: str) -> nn.Module:
    parts = network.parts()
    if part not in parts:
        raise ValueError(f"a network of kind {network.kind} has the parts {', '.join(parts)}, not {part!r}")
    return parts[part]


def _as_deployed(network: Network, part: str, count: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """One part and its inputs, on the device where the part is."""
    net = _part(network, part)
    device = next(net.parameters()).device
    return net, tuple(tensor.to(device) for tensor in network.example(count))


def _synchronise(inputs: tuple[Tensor, ...]) -> None:
    if any(tensor.is_cuda for tensor in inputs):
        torch.cuda.synchronize()
