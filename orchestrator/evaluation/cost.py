"""What a network costs: multiply-accumulates, parameters, images per second."""

import math
import time

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def macs(net: nn.Module, image_size: tuple[int, int]) -> int:
    """Multiply-accumulates of convolutions and matrix products for one image in eval mode.

    Papers of this field call this number FLOPs; it is half of torch's count of floating-point operations.
    """
    was_training = net.training
    net.eval()
    device = next(net.parameters()).device
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, 3, *image_size, device=device))
    net.train(was_training)
    return counter.get_total_flops() // 2


def parameters(net: nn.Module) -> int:
    """Number of trainable and frozen parameters, each counted once; buffers are not counted."""
    return sum(p.numel() for p in net.parameters())


@torch.no_grad()
def images_per_second(net: nn.Module, images_BCHW: Tensor, seconds: float = 1.0, warmup: int = 2) -> float:
    """Throughput of the forward pass in eval mode: of the fastest batch within ``seconds``, after the warm-up.

    Whatever else runs on the machine only ever slows a batch, so the fastest one says most about the network.
    """
    was_training = net.training
    net.eval()
    for _ in range(warmup):
        net(images_BCHW)
    start, fastest = time.perf_counter(), math.inf
    while fastest == math.inf or time.perf_counter() - start < seconds:
        _synchronise(images_BCHW)
        began = time.perf_counter()
        net(images_BCHW)
        _synchronise(images_BCHW)
        fastest = min(fastest, time.perf_counter() - began)
    net.train(was_training)
    return len(images_BCHW) / fastest


def _synchronise(like: Tensor) -> None:
    if like.is_cuda:
        torch.cuda.synchronize()
