"""What a network costs: multiply-accumulates, parameters, images per second."""

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
    """Throughput of the forward pass in eval mode: whole batches for at least ``seconds`` after the warm-up."""
    was_training = net.training
    net.eval()
    cuda = images_BCHW.is_cuda
    for _ in range(warmup):
        net(images_BCHW)
    if cuda:
        torch.cuda.synchronize()
    start, batches = time.perf_counter(), 0
    while batches == 0 or time.perf_counter() - start < seconds:
        net(images_BCHW)
        if cuda:
            torch.cuda.synchronize()
        batches += 1
    elapsed = time.perf_counter() - start
    net.train(was_training)
    return batches * len(images_BCHW) / elapsed
