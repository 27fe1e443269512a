"""The few things a method or the loop needs to know about other ranks. Everything works without any."""

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather(local: Tensor) -> Tensor:
    """Rows of all ranks in rank order; the gradient flows to this rank's own rows.

    Every rank has as many: where images have different numbers of boxes, pad them and gather which rows are real.
    Asking the others for their number would make every step wait for the device.

    Every rank must compute the same loss from the result, and gradients must then be *averaged* over ranks
    (as DistributedDataParallel does): the loss of the whole batch is exact, not a mean of per-rank losses.

    With one process the tensor itself is returned.
    """
    if world_size() == 1:
        return local
    return _Gather.apply(local) if local.requires_grad else _all_rows(local)


def gather_without_gradient(local: Tensor) -> Tensor:
    """Rows of all ranks in rank order, detached."""
    return local.detach() if world_size() == 1 else _all_rows(local.detach())


@torch.no_grad()
def share_statistics(module: torch.nn.Module) -> None:
    """Gives every rank the batch-norm statistics of rank 0: they are of each rank's own rows and drift apart."""
    if world_size() > 1:
        for norm in _batch_norms(module):
            for buffer in norm.buffers(recurse=False):
                dist.broadcast(buffer, 0)


@torch.no_grad()
def check_equal_buffers(module: torch.nn.Module) -> None:
    """Raises RuntimeError, with the buffer's name, where ranks disagree: an update was not gathered."""
    if world_size() == 1:
        return
    buffers = [(name, buffer) for name, buffer in module.named_buffers() if buffer.numel()]
    if not buffers:
        return
    sums_N2 = torch.stack([_checksum(buffer) for _, buffer in buffers])
    of_ranks_RN2 = _all_rows(sums_N2[None])
    same_N = ((of_ranks_RN2 == of_ranks_RN2[:1]) | of_ranks_RN2.isnan()).all(dim=2).all(dim=0).tolist()
    for (name, _), same in zip(buffers, same_N, strict=True):
        if not same:
            raise RuntimeError(
                f"the buffer {name} differs between ranks: its update must be made from rows gathered of all ranks"
            )


def _batch_norms(module: torch.nn.Module) -> list[torch.nn.Module]:
    return [m for m in module.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]


def _checksum(buffer: Tensor) -> Tensor:
    """Sum, and sum weighted by position, so that rows in another order differ too."""
    values = buffer.detach().flatten().double()
    place = torch.arange(len(values), device=values.device, dtype=torch.float64).remainder_(1009)
    return torch.stack([values.sum(), values @ place])


def largest(value: float) -> float:
    """Maximum of a number over all ranks."""
    if world_size() == 1:
        return value
    return float(_all_rows(torch.tensor([value], dtype=torch.float64, device=_device())).max())


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, local: Tensor) -> Tensor:
        ctx.rows = len(local)
        return _all_rows(local)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        # Each rank holds the gradient of the same total loss; averaging over ranks divides by the world size,
        # which is put back here. No communication is needed.
        start = rank() * ctx.rows
        return gradient[start : start + ctx.rows] * world_size()


def _all_rows(local: Tensor) -> Tensor:
    parts = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, local.contiguous())
    return torch.cat(parts)


def _device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
