"""Parameters that are spread over ranks, such as a million class centres: checkpoints, their end, gradient norms.

Every rank has other rows, in rank order (:attr:`orchestrator.method.Task.sharded`). With one rank, or without such
parameters, nothing here does anything.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from orchestrator import distributed
from orchestrator.method import Experiment, Task


@dataclass(frozen=True)
class Whole:
    """The rows of all ranks, on the CPU of rank 0; empty on the others."""

    parameters: Mapping[str, Tensor]  # by their name in the task
    moments: Mapping[int, Mapping[str, Tensor]]  # of the optimiser, by the parameter's number there


def gathered(experiment: Experiment) -> Whole | None:
    """What a checkpoint holds of sharded parameters; None where nothing is spread. All ranks take part."""
    spread = _spread(experiment.task)
    if not spread:
        return None
    parameters, moments = {}, {}
    for name, (parameter, rows) in spread.items():
        parameters[name] = _of_all_ranks(parameter.detach(), rows)
        number = _number(experiment, parameter)
        state = experiment.optimizer.state.get(parameter, {})
        by_row = {key: _of_all_ranks(value, rows) for key, value in state.items() if _is_by_row(value, parameter)}
        moments |= {number: by_row} if by_row else {}  # plain SGD remembers nothing
    if distributed.rank():
        return Whole({}, {})
    return Whole(parameters, moments)


def own_rows(
    experiment: Experiment, stored: Mapping[str, Tensor], optimizer: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A stored task and optimiser with this rank's rows of what is spread."""
    stored, optimizer = dict(stored), dict(optimizer)
    for name, (parameter, rows) in _spread(experiment.task).items():
        whole = stored[name]
        own = slice(rows.start, rows.stop)
        stored[name] = whole[own]
        number = _number(experiment, parameter)
        if number in optimizer["state"]:
            moments = optimizer["state"][number]
            own_moments = {k: v[own] if _is_by_row(v, whole) else v for k, v in moments.items()}
            optimizer["state"] = {**optimizer["state"], number: own_moments}
    return stored, optimizer


def join(task: Task) -> None:
    """Gives rank 0 the rows of all ranks, on the CPU, so that what is stored of the network is whole."""
    for name, (parameter, rows) in _spread(task).items():
        whole = _of_all_ranks(parameter.detach(), rows)
        if not distributed.rank():
            owner, _, key = name.rpartition(".")
            setattr(task.get_submodule(owner), key, nn.Parameter(whole, parameter.requires_grad))


def gradient_norm(task: Task) -> Tensor:
    """Norm of the gradient of everything that trains, the same on all ranks."""
    own = {id(parameter) for parameter, _ in _spread(task).values()}
    gradients = [p.grad for p in task.parameters() if p.grad is not None]
    if not own:
        return nn.utils.get_total_norm(gradients)
    shared = nn.utils.get_total_norm([p.grad for p in task.parameters() if p.grad is not None and id(p) not in own])
    spread = nn.utils.get_total_norm([p.grad for p in task.parameters() if p.grad is not None and id(p) in own])
    squares = distributed.gather_without_gradient(spread.square()[None]).sum()
    return (shared.square() + squares).sqrt()


def _spread(task: Task) -> dict[str, tuple[nn.Parameter, range]]:
    return task.sharded_parameters() if distributed.world_size() > 1 else {}


def _is_by_row(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _number(experiment: Experiment, parameter: Tensor) -> int:
    """Of a parameter in the optimiser's state, which counts through all groups."""
    everything = [p for group in experiment.optimizer.param_groups for p in group["params"]]
    return next(number for number, p in enumerate(everything) if p is parameter)


@torch.no_grad()
def _of_all_ranks(own: Tensor, rows: range) -> Tensor:
    """Rows of all ranks on the CPU of rank 0, one rank's after the other's, so that no device holds them all."""
    counts = distributed.gather_without_gradient(torch.tensor([len(rows)], device=own.device)).tolist()
    parts = [own.cpu()]
    for rank in range(1, len(counts)):
        if distributed.rank() == rank:
            dist.send(own.contiguous(), 0)
        elif not distributed.rank():
            part = torch.empty((counts[rank], *own.shape[1:]), dtype=own.dtype, device=own.device)
            dist.recv(part, rank)
            parts.append(part.cpu())
    return torch.cat(parts) if not distributed.rank() else own.cpu()
