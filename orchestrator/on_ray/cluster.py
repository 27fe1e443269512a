"""The connection to a cluster, what it has, and calls of preparation on its nodes."""

import contextlib
import json
import math
import os
import secrets
import socket
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestrator import mirror, store
from orchestrator.launch.runner import Capacity, resolved
from orchestrator.needs import Place, Report
from orchestrator.on_ray import environment, faults
from orchestrator.patience import patiently

_CLOCK_SECONDS = 2.0
_CALL_ATTEMPTS = 5  # of a preparation whose node or process dies
CONTROL_BYTES = 0.25 * 2**30  # of the process that watches over one trial; 0.13 of it are its own


@contextlib.contextmanager
def cluster(dashboard: bool = True) -> Iterator[None]:
    """A Ray connection: the cluster of ``RAY_ADDRESS`` if set, else a local one that ends with the block.

    What somebody's ``ray start`` has noted on this machine is no address: a local cluster is started beside it.

    Raises:
        OSError: Ray cannot write where it must, or nobody answers at the address; in one line that says what to set.
    """
    for name, value in environment.RAY.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    passed_on = environment.passed_on_of(os.environ)
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": "ERROR",
        "runtime_env": {"env_vars": passed_on},
    }
    if not os.environ.get("RAY_ADDRESS"):
        _home_for_tokens()
        options |= {"address": "local", "object_store_memory": 256 * 2**20, "include_dashboard": dashboard}
    else:
        _check_address(os.environ["RAY_ADDRESS"])
    ray.init(**options)
    try:
        yield
    finally:
        ray.shutdown()


def admit(place: Place, tracking_uri: str) -> None:
    """Looks whether every node has what it needs, before anything runs.

    Raises:
        ValueError: several nodes would write one SQLite file, or a node does not see the storage or the data.
    """
    mirror.mark(place)
    nodes = [node for node in _nodes() if node["Resources"].get("CPU") or node["Resources"].get("GPU")]
    hosts = {node["NodeManagerAddress"] for node in _nodes()}
    if len(hosts) < 2:
        return
    if tracking_uri.startswith("sqlite"):
        raise ValueError(
            f"MLFLOW_TRACKING_URI={tracking_uri} is a file that {len(hosts)} nodes would write at once, which "
            f"SQLite cannot; run an MLflow server and set MLFLOW_TRACKING_URI=http://HOST:PORT"
        )
    expected = None if place.remote else store.read(place.folder(mirror.FILE))
    asked = time.time()
    looking = {_look_on(node, place): node for node in nodes}
    for task, node in looking.items():
        name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        found, has_data, clock = _answer(task, name)
        apart = min(clock - asked, 0.0) + max(clock - time.time(), 0.0)
        if abs(apart) > _CLOCK_SECONDS:
            said = f"the clock of node {name} is {abs(apart):.0f} s {'behind' if apart < 0 else 'ahead'}"
            warnings.warn(f"{said}; nothing is decided by it, but logs and MLflow show it", stacklevel=2)
        if expected is not None and found != expected:
            raise ValueError(
                f"the storage {place.storage} of this process is not there on node {name}; mount one shared folder at "
                f"that path on every node, or set ORCHESTRATOR_STORAGE to object storage such as s3://BUCKET/PREFIX"
            )
        if not has_data:
            raise ValueError(
                f"--data-root {place.data_root} is a folder here and not on node {name}; mount it at that path on "
                f"every node, or copy it there"
            )


def _nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _look_on(node: Mapping[str, Any], place: Place) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return ray.remote(_seen).options(num_cpus=0, scheduling_strategy=there, max_retries=1).remote(asdict(place))


def _answer(task: Any, name: str) -> Any:
    import ray

    try:
        return ray.get(task, timeout=60)
    except (ray.exceptions.RayError, TimeoutError) as error:
        raise ValueError(f"node {name} does not answer: {(str(error).splitlines() or [''])[0]}; restart it") from None


def _seen(values: Mapping[str, str]) -> tuple[bytes | None, bool, float]:
    """What a node sees of a place: the storage's mark, whether the data are there; and its clock."""
    place = Place(**values)
    mark = None if place.remote else store.read(place.folder(mirror.FILE))
    return mark, not place.data_root or Path(place.data_root).is_dir(), time.time()


def _check_address(address: str) -> None:
    # Ray itself would try again for ten minutes.
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        return  # "auto" and other words of Ray
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise ConnectionError(f"RAY_ADDRESS={address} does not answer: {error}; start the head, or unset it") from error


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
    return Capacity(cpus, gpus, max(1, int(gpus or cpus)))


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
        fitting = min(fitting, max(1, int(total.get("memory", math.inf) // CONTROL_BYTES)))
    return min(concurrent or fitting, fitting)


def threads(workers: int) -> int:
    """The most CPUs a worker can have when so many run at once; a worker does not span nodes."""
    import ray

    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    fitting = (t for t in range(max(nodes, default=1), 1, -1) if sum(cpus // t for cpus in nodes) >= workers)
    return next(fitting, 1)


def call(function: str, values: Mapping[str, Any], network: bool, progress: Report) -> Any:
    """Runs a function of preparation on a node of the cluster, with its progress shown here.

    A network on a CPU has one thread, for the CPU that it asks for; other calls also use what is free.

    Raises:
        ValueError, OSError: as the function.
    """
    import ray

    gpus = 1.0 if network and capacity().gpus >= 1 else 0.0
    note = Place(**values["place"]).address("ready", f"progress-{os.getpid()}-{time.monotonic_ns()}.json")
    task = ray.remote(_call).options(num_cpus=1, num_gpus=gpus, max_retries=0)
    for attempt in range(1, _CALL_ATTEMPTS + 1):
        waiting = task.remote(function, dict(values), "cuda:0" if gpus else "cpu", network and not gpus, note)
        try:
            while not ray.wait([waiting], timeout=0.3)[0]:
                with contextlib.suppress(OSError, ValueError, TypeError):
                    progress(*json.loads(store.read(note) or b"null"))
            return ray.get(waiting)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, ValueError | OSError) else error
            if attempt == _CALL_ATTEMPTS or not faults.is_around(cause):
                raise cause from None
            _again(faults.said(cause), values)
        except ray.exceptions.RayError as error:  # its process or its node
            if attempt == _CALL_ATTEMPTS or not faults.is_around(error):
                raise
            _again(faults.said(error), values)
        except KeyboardInterrupt:
            ray.cancel(waiting, force=True)
            raise
        finally:
            store.remove(note)


def _again(said: str, values: Mapping[str, Any]) -> None:
    """Before a preparation is made again: the disk is there. What it had finished is kept."""
    warnings.warn(f"a preparation {said}; made again", stacklevel=3)
    patiently("the storage", mirror.probe, Place(**values["place"]))


def _call(function: str, values: Mapping[str, Any], device: str, one_thread: bool, note: str) -> Any:
    import torch

    # Sums of few images are in another order with more threads: what is free must not decide the bits of a table.
    torch.set_num_threads(1 if one_thread else _free_cpus())
    last, apart = 0.0, 5.0 if store.is_remote(note) else 0.3

    def progress(what: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > apart:
            last = time.monotonic()
            store.write(note, json.dumps([what, done, total]).encode())

    return resolved(function)(values, device=device, progress=progress)


def _free_cpus() -> int:
    """CPUs of this node that no task has asked for, and the one that this task has."""
    import ray

    free = ray.available_resources().get("CPU", 0.0)
    return max(1, min(os.cpu_count() or 1, int(free) + 1))
