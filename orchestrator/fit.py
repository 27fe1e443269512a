"""The training loop: plain torch, any number of ranks, no Ray, no method, no log.

On CPU with fixed seeds a run that is interrupted after any epoch and resumed from its last checkpoint ends with
the weights and metrics of an uninterrupted one, bit for bit: the state holds the task without its frozen modules,
the optimiser, the random generators of all ranks and the history; rates and draws are functions of where training
stands.
"""

import collections
import copy
import math
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from orchestrator import distributed, shards
from orchestrator.method import Batch, Evaluation, Experiment, Losses, Progress, Task

State = dict[str, Any]
# Epoch, metrics, and at the end of an epoch with a checkpoint a function that makes the state, else None.
OnEpoch = Callable[[int, dict[str, float], Callable[[], State] | None], None]

_LOST_SECONDS = 300.0  # what a kill may cost where the recipe does not say when a checkpoint is due


class NonFiniteLoss(ArithmeticError):
    """A loss that is NaN or infinite; trying again would give the same, so nobody should."""


def fit(
    experiment: Experiment,
    device: torch.device,
    resume: Mapping[str, Any] | None = None,
    on_epoch: OnEpoch | None = None,
) -> tuple[list[dict[str, float]], Evaluation]:
    """Trains to the last epoch; returns the metrics of every epoch, and the last evaluation.

    Args:
        experiment: task, optimiser, batches; see :class:`orchestrator.method.Experiment`.
        device: where the task is already.
        resume: a state that ``on_epoch`` was once given; the epochs before it are in the returned metrics too.
        on_epoch: called on every rank after every epoch. Only one rank needs to make the state.

    Raises:
        NonFiniteLoss: with the step, the terms and the images of the batch. The last state handed out is good.
    """
    task = experiment.task
    task.to(memory_format=torch.channels_last)  # on a CPU twice as fast for depthwise convolutions
    forward = _forward(task, experiment, device)
    history: list[dict[str, float]] = []
    if resume is not None:
        history = [dict(h) for h in resume["history"]]
        load_state(experiment, resume, device)
    evaluation, stored_at = Evaluation({}), time.monotonic()
    for epoch in range(len(history) + 1, experiment.epochs + 1):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        metrics = _before(experiment, epoch)
        trained_from = time.perf_counter()
        means, steps = _train_epoch(experiment, epoch, forward, device)
        distributed.share_statistics(task)
        distributed.check_equal_buffers(task)
        seconds = time.perf_counter() - trained_from
        metrics = {**means, **metrics}
        if epoch % experiment.evaluate_every == 0 or epoch == experiment.epochs:
            evaluation = _evaluated(experiment)
            metrics |= evaluation.metrics
        metrics["perf/images_per_s"] = steps * experiment.items_per_step / seconds
        metrics["perf/epoch_s"] = time.perf_counter() - start
        metrics["perf/peak_memory_mib"] = distributed.largest(_peak_memory(device))
        history.append(metrics)
        if on_epoch is not None:
            state = None
            if _checkpoint_is_due(experiment, epoch, stored_at, metrics["perf/epoch_s"]):
                stored_at = time.monotonic()
                state = partial(training_state, experiment, history, _generators(device), shards.gathered(experiment))
            on_epoch(epoch, metrics, state)
    if len(history) == experiment.epochs and not evaluation.metrics:  # resumed after the last epoch
        evaluation = _evaluated(experiment)
    shards.join(experiment.task)
    return history, evaluation


def training_state(
    experiment: Experiment, history: list[dict[str, float]], generators: Tensor, whole: shards.Whole | None = None
) -> State:
    """Everything a resume needs, on the CPU; a snapshot, not a view of what trains on.

    ``whole`` is what :func:`orchestrator.shards.gathered` found of parameters that are spread over ranks.
    """
    optimizer = _on_host(experiment.optimizer.state_dict())
    task = {k: v.detach().cpu().clone() for k, v in experiment.task.stored().items()}
    if whole is not None:
        task |= whole.parameters
        for number, values in whole.moments.items():
            optimizer["state"][number] |= values
    return {
        "epoch": len(history),
        "task": task,
        "optimizer": optimizer,
        "generators": generators,
        "history": [dict(h) for h in history],
    }


def _on_host(state: Any) -> Any:
    """A copy of nested dicts and lists whose tensors are on the CPU."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: _on_host(value) for key, value in state.items()}
    return [_on_host(value) for value in state] if isinstance(state, list) else copy.deepcopy(state)


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
    expected, stored = experiment.task.stored(), dict(state["task"])
    stored.setdefault("steps", expected["steps"])  # 0.3 did not count them
    if expected.keys() != stored.keys():
        wrong = sorted(expected.keys() ^ stored.keys())
        raise ValueError(f"the checkpoint is of another network: {len(wrong)} tensors do not fit, first {wrong[0]}")
    stored, optimizer = shards.own_rows(experiment, stored, state["optimizer"])
    experiment.task.load_state_dict(stored, strict=False)
    experiment.optimizer.load_state_dict(optimizer)
    _set_generators(state["generators"][distributed.rank()], device)


def to_device(batch: Any, device: torch.device) -> Any:
    """Tensors of nested dicts and lists moved, everything else left alone."""
    if isinstance(batch, Tensor):
        if batch.device.type != "cpu":
            return batch.to(device)
        if device.type == "cuda":
            return batch.pin_memory().to(device, non_blocking=True)
        return batch.to(device)
    if isinstance(batch, dict):
        return {k: to_device(v, device) for k, v in batch.items()}
    return [to_device(v, device) for v in batch] if isinstance(batch, list | tuple) else batch


def sent_ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches on the device. To a GPU each is sent while the step before it is computed.

    It travels on a stream of its own, out of page-locked memory, which torch hands out again when a copy from it is
    over: two batches' worth in turn. The step waits for the copy on the device; the host waits for neither.
    """
    if device.type != "cuda":
        for batch in batches:
            yield to_device(batch, device)
        return
    own, sent = torch.cuda.Stream(device), collections.deque[tuple[Batch, torch.cuda.Event]]()
    for batch in batches:
        with torch.cuda.stream(own):
            sent.append((to_device(batch, device), own.record_event()))
        if len(sent) > 1:
            yield _received(*sent.popleft(), device)
    for batch, arrived in sent:
        yield _received(batch, arrived, device)


def _received(batch: Batch, arrived: torch.cuda.Event, device: torch.device) -> Batch:
    """A batch whose copy the following operations wait for, and whose memory is not given away before they are over."""
    step = torch.cuda.current_stream(device)
    step.wait_event(arrived)
    for tensor in _tensors(batch):
        tensor.record_stream(step)
    return batch


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, dict | list):
        for value in batch.values() if isinstance(batch, dict) else batch:
            yield from _tensors(value)


def _forward(task: Task, experiment: Experiment, device: torch.device) -> Callable[[Batch], Losses]:
    module: torch.nn.Module = task
    if distributed.world_size() > 1:
        # Buffers are left alone: every update is gathered, so they are equal, and a bank of half a gigabyte is not
        # sent in every step. Frozen modules have no gradient to share and nothing that changes; of sharded ones every
        # rank has its own rows.
        alone = tuple(f"{name}." for name in task.frozen | task.sharded)
        states = [key for key in task.state_dict() if key.startswith(alone)] if alone else []
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(task, states)
        module = DistributedDataParallel(
            task,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,
            find_unused_parameters=experiment.unused_parameters,
        )
    if experiment.compile:
        module = torch.compile(module)

    def forward(batch: Batch) -> Losses:
        with torch.autocast(device.type, torch.bfloat16, enabled=experiment.precision == "bfloat16"):
            return module(batch)

    return forward


@torch.no_grad()
def _before(experiment: Experiment, epoch: int) -> dict[str, float]:
    """The work of the experiment's ``start_epoch``, and how long it took."""
    if experiment.start_epoch is None:
        return {}
    experiment.task.eval()
    start = time.perf_counter()
    told = dict(experiment.start_epoch(experiment.task, epoch))
    return {**told, "perf/start_epoch_s": time.perf_counter() - start}


@torch.no_grad()
def _evaluated(experiment: Experiment) -> Evaluation:
    experiment.task.eval()
    return experiment.evaluate(experiment.task)


def _set_rate(experiment: Experiment, progress: Progress) -> float:
    rate = experiment.rate(progress)
    for group in experiment.optimizer.param_groups:
        frozen = progress.epoch <= group.get("frozen_epochs", 0)
        group["lr"] = 0.0 if frozen else rate * group.get("rate_scale", 1.0)
    return rate


class _Means:
    """Sums on the device, divided once by how often each name came: a term may be absent in some steps."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value.detach() if name in self.sums else value.detach().clone()
        self.counts[name] = self.counts.get(name, 0) + 1

    def result(self) -> dict[str, float]:
        return {name: float(value) / self.counts[name] for name, value in self.sums.items()}


def _train_epoch(
    experiment: Experiment, epoch: int, forward: Callable[[Batch], Losses], device: torch.device
) -> tuple[dict[str, float], int]:
    """Mean total, raw and weighted terms of the epoch over the steps that have them, and its number of steps."""
    task = experiment.task
    task.train()
    means, rates = _Means(), []
    waiting: tuple[int, Losses, list[str]] | None = None
    steps, total_steps = 0, experiment.steps_per_epoch
    before = (epoch - 1) * total_steps
    for batch in sent_ahead(experiment.batches(epoch), device):
        within = steps / total_steps if total_steps else 0.0
        rates.append(_set_rate(experiment, Progress(epoch, before + steps, within)))
        losses = forward(batch)
        norm = _step(experiment, losses)
        # Looked at one step late, so that a GPU never waits for the host in the middle of a step.
        if waiting is not None:
            _check_finite(epoch, *waiting)
        detached = Losses({k: t.detach() for k, t in losses.terms.items()}, losses.weights)
        steps += 1
        waiting = steps, detached, _names(batch)
        for name, term in detached.terms.items():
            means.add(f"loss/{name}", term)
            means.add(f"loss_weighted/{name}", term * losses.weights[name])
        for name, value in {"loss": detached.total, "gradient_norm": norm, **losses.observed}.items():
            means.add(f"train/{name}", value)
    if waiting is None:
        raise ValueError(f"epoch {epoch} has no batch; is the training set smaller than one batch?")
    _check_finite(epoch, *waiting)
    return {"train/learning_rate": sum(rates) / len(rates), **means.result()}, steps


def _step(experiment: Experiment, losses: Losses) -> Tensor:
    """Backward pass, optimiser, and the state that follows; returns the norm of the gradient."""
    task = experiment.task
    experiment.optimizer.zero_grad(set_to_none=True)
    losses.total.backward()
    norm = shards.gradient_norm(task)
    if experiment.clip_norm:
        torch.nn.utils.clip_grads_with_norm_(task.parameters(), experiment.clip_norm, norm)
    experiment.optimizer.step()
    with torch.no_grad():
        task.after_step(losses.kept)
        task.steps += 1
    return norm


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


def _checkpoint_is_due(experiment: Experiment, epoch: int, stored_at: float, epoch_seconds: float) -> bool:
    """Equal on all ranks: by the epoch, or by the slowest rank's clock where another such epoch would lose too much."""
    if epoch == experiment.epochs:
        return True
    if experiment.checkpoint_every:
        return epoch % experiment.checkpoint_every == 0
    return distributed.largest(time.monotonic() - stored_at + epoch_seconds) >= _LOST_SECONDS


def _generators(device: torch.device) -> Tensor:
    """States of the random generators, of the CPU and of the device, of every rank: (ranks, bytes)."""
    own = torch.get_rng_state()
    if device.type == "cuda":
        own = torch.cat([own, torch.cuda.get_rng_state(device)])
    return distributed.gather_without_gradient(own[None].to(device)).cpu()


def _set_generators(stored: Tensor, device: torch.device) -> None:
    size = len(torch.get_rng_state())
    # Clones: torch ignores the storage offset of a row and would read another rank's state, or crash.
    if device.type == "cuda":
        on_device = stored[size:] if len(stored) > size else stored  # 0.3 kept the device's alone
        torch.cuda.set_rng_state(on_device.clone(), device)
        if len(stored) <= size:
            return
    torch.set_rng_state(stored[:size].clone())


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
