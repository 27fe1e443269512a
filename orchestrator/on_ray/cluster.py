"""The connection to a cluster, what it has, and calls of preparation on its nodes."""

import contextlib
import json
import math
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from orchestrator.launch.runner import Capacity, resolved
from orchestrator.needs import Report

_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # also the rate at which epochs are reported
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # epochs without an evaluation have no metric
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_RESULT_BUFFER_LENGTH": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}
_PASSED_ON = ("RAY_TRAIN_", "MLFLOW_", "ORCHESTRATOR_", "TORCHINDUCTOR_")
_CONTROL_BYTES = 0.6 * 2**30  # of the processes that watch over one trial


@contextlib.contextmanager
def cluster(dashboard: bool = True) -> Iterator[None]:
    """A Ray connection: the cluster of ``RAY_ADDRESS`` if set, else a local one that ends with the block.

    What somebody's ``ray start`` has noted on this machine is no address: a local cluster is started beside it.

    Raises:
        OSError: Ray cannot write where it must, in one line that says what to set.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    passed_on = {k: v for k, v in os.environ.items() if k.startswith(_PASSED_ON)}
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": "ERROR",
        "runtime_env": {"env_vars": passed_on},
    }
    if not os.environ.get("RAY_ADDRESS"):
        _home_for_tokens()
        options |= {"address": "local", "object_store_memory": 256 * 2**20, "include_dashboard": dashboard}
    ray.init(**options)
    try:
        yield
    finally:
        ray.shutdown()


def _home_for_tokens() -> None:
    """Ray stores the token of a local cluster in the home folder; where that cannot be written, it is given one."""
    folder = Path("~/.ray").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def capacity() -> Capacity:
    """What the connected cluster has."""
    import ray

    total = ray.cluster_resources()
    cpus, gpus = total.get("CPU", 0.0), total.get("GPU", 0.0)
    return Capacity(cpus, gpus, max(1, int(gpus) if gpus else int(cpus) // 2))


def check_resources(workers: int, gpus_per_worker: float, concurrent: int | None) -> int:
    """How many trials may run at once.

    Raises:
        ValueError: one trial alone needs more than the cluster has; Ray itself would wait for ever.
    """
    import ray

    total = ray.cluster_resources()
    cpus, gpus = total.get("CPU", 0), total.get("GPU", 0)
    if workers > cpus or workers * gpus_per_worker > gpus:
        need = f"{workers} CPUs" + (f" and {workers * gpus_per_worker:g} GPUs" if gpus_per_worker else "")
        raise ValueError(f"a trial of {workers} workers needs {need}, the cluster has {cpus:g} CPUs and {gpus:g} GPUs")
    fitting = int(cpus // workers)
    if gpus_per_worker:
        fitting = min(fitting, int(gpus / (workers * gpus_per_worker) + 1e-6))
    if concurrent is None:
        fitting = min(fitting, max(1, int(total.get("memory", math.inf) // _CONTROL_BYTES)))
    return min(concurrent or fitting, fitting)


def threads(workers: int) -> int:
    """The most CPUs a worker can have when so many run at once; a worker does not span nodes."""
    import ray

    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    fitting = (t for t in range(max(nodes, default=1), 1, -1) if sum(cpus // t for cpus in nodes) >= workers)
    return next(fitting, 1)


def call(function: str, values: Mapping[str, Any], network: bool, progress: Report) -> Any:
    """Runs a function of preparation on a node of the cluster, with its progress shown here.

    Raises:
        ValueError, OSError: as the function.
    """
    import ray

    gpus = 1.0 if network and capacity().gpus >= 1 else 0.0
    storage = values["place"]["storage"]
    note = Path(storage) / "ready" / f"progress-{os.getpid()}-{time.monotonic_ns()}.json"
    note.parent.mkdir(parents=True, exist_ok=True)
    task = ray.remote(_call).options(num_cpus=1, num_gpus=gpus, max_retries=0)
    waiting = task.remote(function, dict(values), "cuda:0" if gpus else "cpu", str(note))
    try:
        while not ray.wait([waiting], timeout=0.3)[0]:
            with contextlib.suppress(OSError, ValueError):
                progress(*json.loads(note.read_text()))
        return ray.get(waiting)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, ValueError | OSError) else error from None
    except KeyboardInterrupt:
        ray.cancel(waiting, force=True)
        raise
    finally:
        note.unlink(missing_ok=True)


def _call(function: str, values: Mapping[str, Any], device: str, note: str) -> Any:
    import torch

    torch.set_num_threads(_free_cpus())
    last = 0.0

    def progress(what: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 0.3 or done == total:
            last = time.monotonic()
            partial = f"{note}.tmp"
            Path(partial).write_text(json.dumps([what, done, total]))
            os.replace(partial, note)

    return resolved(function)(values, device=device, progress=progress)


def _free_cpus() -> int:
    """CPUs of this node that no task has asked for, and the one that this task has."""
    import ray

    free = ray.available_resources().get("CPU", 0.0)
    return max(1, min(os.cpu_count() or 1, int(free) + 1))
