"""The training loop: plain torch, any number of ranks, no Ray, no method, no log.

On CPU with fixed seeds a run that is interrupted after any epoch and resumed ends with the weights and metrics
of an uninterrupted one, bit for bit: the state holds the task without its teacher, the optimiser, the random
generators of all ranks and the history; rates and draws are functions of the epoch.
"""

import copy
import math
import resource
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from orchestrator import distributed
from orchestrator.method import Batch, Experiment, Losses, Task

OnEpoch = Callable[[int, dict[str, float], Callable[[], dict[str, Any]]], None]  # epoch, metrics, state


class NonFiniteLoss(ArithmeticError):
    """A loss that is NaN or infinite; trying again would give the same, so nobody should."""


def fit(
    experiment: Experiment,
    device: torch.device,
    resume: Mapping[str, Any] | None = None,
    on_epoch: OnEpoch | None = None,
) -> list[dict[str, float]]:
    """Trains to the last epoch and returns the metrics of every epoch, those before a resume included.

    Args:
        experiment: task, optimiser, batches; see :class:`orchestrator.method.Experiment`.
        device: where the task is already.
        resume: a state that ``on_epoch`` was once given.
        on_epoch: called on every rank after every epoch with the metrics and a function that makes the state.

    Raises:
        NonFiniteLoss: with the step, the terms and the images of the batch. The state of the epoch before is
            the last one handed out.
    """
    task = experiment.task
    if device.type == "cuda":
        task.to(memory_format=torch.channels_last)
    step_of = _stepper(task, experiment, device)
    history: list[dict[str, float]] = []
    if resume is not None:
        history = [dict(h) for h in resume["history"]]
        load_state(experiment, resume, device)
    for epoch in range(len(history) + 1, experiment.epochs + 1):
        rate = experiment.learning_rate(epoch)
        for group in experiment.optimizer.param_groups:
            frozen = epoch <= group.get("frozen_epochs", 0)
            group["lr"] = 0.0 if frozen else rate * group.get("rate_scale", 1.0)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        task.train()
        with torch.no_grad():
            task.start_epoch(epoch)
        start = time.perf_counter()
        means, steps = _train_epoch(experiment, epoch, step_of, device)
        distributed.share_buffers(task)  # so that all ranks evaluate, and store, one network
        seconds = time.perf_counter() - start
        metrics = {"train/learning_rate": rate, **means}
        if epoch % experiment.evaluate_every == 0 or epoch == experiment.epochs:
            task.eval()
            with torch.no_grad():
                metrics |= experiment.evaluate(task)
        metrics["perf/images_per_s"] = steps * experiment.images_per_step / seconds
        metrics["perf/epoch_s"] = time.perf_counter() - start
        metrics["perf/peak_memory_mib"] = distributed.largest(_peak_memory(device))
        history.append(metrics)
        if on_epoch is not None:
            on_epoch(epoch, metrics, lambda: training_state(experiment, history, device))
    return history


def training_state(experiment: Experiment, history: list[dict[str, float]], device: torch.device) -> dict[str, Any]:
    """Everything a resume needs, on the CPU. Collective: every rank must call it."""
    own = torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)
    generators = distributed.gather_without_gradient(own[None].to(device)).cpu()
    return {
        "epoch": len(history),
        "task": {k: v.detach().cpu().clone() for k, v in experiment.task.state_dict().items() if not _is_teacher(k)},
        "optimizer": copy.deepcopy(experiment.optimizer.state_dict()),  # a snapshot, not a view of what trains on
        "generators": generators,
        "history": [dict(h) for h in history],
    }


def load_state(experiment: Experiment, state: Mapping[str, Any], device: torch.device) -> None:
    """Puts a training state back.

    Raises:
        ValueError: the state belongs to another network, or to another number of workers.
    """
    if len(state["generators"]) != distributed.world_size():
        raise ValueError(
            f"the checkpoint is of {len(state['generators'])} workers, this run has {distributed.world_size()}; "
            f"resume with the same number"
        )
    expected = {k for k in experiment.task.state_dict() if not _is_teacher(k)}
    if expected != set(state["task"]):
        wrong = sorted(expected ^ set(state["task"]))
        raise ValueError(f"the checkpoint is of another network: {len(wrong)} tensors do not fit, first {wrong[0]}")
    experiment.task.load_state_dict(state["task"], strict=False)
    experiment.optimizer.load_state_dict(state["optimizer"])
    # A clone: torch ignores the storage offset of a row and would read another rank's state, or crash.
    own = state["generators"][distributed.rank()].clone()
    torch.set_rng_state(own) if device.type == "cpu" else torch.cuda.set_rng_state(own, device)


def to_device(batch: Any, device: torch.device) -> Any:
    """Tensors of nested dicts and lists moved, everything else left alone."""
    if isinstance(batch, Tensor):
        if device.type == "cuda":
            return batch.pin_memory().to(device, non_blocking=True)
        return batch.to(device)
    if isinstance(batch, dict):
        return {k: to_device(v, device) for k, v in batch.items()}
    return [to_device(v, device) for v in batch] if isinstance(batch, list | tuple) else batch


def _stepper(task: Task, experiment: Experiment, device: torch.device) -> Callable[[Batch], Losses]:
    module: torch.nn.Module = task
    if distributed.world_size() > 1:
        module = DistributedDataParallel(task, device_ids=[device] if device.type == "cuda" else None)
    if experiment.compile:
        module = torch.compile(module)

    def forward(batch: Batch) -> Losses:
        with torch.autocast(device.type, torch.bfloat16, enabled=experiment.precision == "bfloat16"):
            return module(batch)

    return forward


def _train_epoch(
    experiment: Experiment, epoch: int, forward: Callable[[Batch], Losses], device: torch.device
) -> tuple[dict[str, float], int]:
    """Mean total, raw and weighted terms of the epoch, and its number of steps."""
    sums: dict[str, Tensor] = {}
    waiting: tuple[int, Losses, list[str]] | None = None
    steps = 0
    for raw in experiment.batches(epoch):
        names = _names(raw)
        losses = forward(to_device(raw, device))
        total = losses.total
        experiment.optimizer.zero_grad(set_to_none=True)
        total.backward()
        gradients = [p.grad for p in experiment.task.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if experiment.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(experiment.task.parameters(), experiment.clip_norm, norm)
        experiment.optimizer.step()
        with torch.no_grad():
            experiment.task.after_step()
        # Looked at one step late, so that a GPU never waits for the host in the middle of a step.
        if waiting is not None:
            _check_finite(epoch, *waiting)
        detached = Losses({k: t.detach() for k, t in losses.terms.items()}, losses.weights)
        waiting = steps + 1, detached, names
        for name, term in detached.terms.items():
            sums[f"loss/{name}"] = sums.get(f"loss/{name}", 0) + term
            sums[f"loss_weighted/{name}"] = sums.get(f"loss_weighted/{name}", 0) + term * losses.weights[name]
        seen = {"loss": total, "gradient_norm": norm, **losses.observed}
        for name, value in seen.items():
            sums[f"train/{name}"] = sums.get(f"train/{name}", 0) + value.detach()
        steps += 1
    if waiting is None:
        raise ValueError(f"epoch {epoch} has no batch; is the training set smaller than one batch?")
    _check_finite(epoch, *waiting)
    return {name: float(value) / steps for name, value in sums.items()}, steps


def _check_finite(epoch: int, step: int, losses: Losses, names: list[str]) -> None:
    values = {name: float(term) for name, term in losses.terms.items()}
    if all(math.isfinite(v) for v in values.values()):
        return
    terms = ", ".join(f"{name} = {value:g}" for name, value in values.items())
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    raise NonFiniteLoss(f"the loss is not finite in epoch {epoch}, step {step}: {terms}; images: {shown}")


def _names(batch: Any) -> list[str]:
    if not isinstance(batch, dict):
        return []
    return [str(n) for n in batch.get("names", ())] + [n for part in batch.values() for n in _names(part)]


def _is_teacher(key: str) -> bool:
    return key.startswith("teacher")


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
