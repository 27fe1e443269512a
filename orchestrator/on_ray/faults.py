"""What may fail around a trial, told apart from what its own code does wrong.

Every process of a trial loads this file, so it imports next to nothing.
"""

from collections.abc import Iterator
from typing import Any

from orchestrator.patience import disk_is_away, patiently

# How torch's process groups say that the other side has gone; they know no class of errors for it.
_PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "ncclRemoteError", "Broken pipe")
_DISK = (
    "No space left on device",
    "Disk quota exceeded",
    "Stale file handle",
    "connect to the endpoint URL",
)  # some libraries keep no error number
_WANTED = "killed by `ray.kill`"  # the janitor's, when a trial is stopped early
_NODE_GONE = ("its node has died", "node has been marked dead", "node was preempted", "Node failure")


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and everything it wraps: Ray does so several times, for every worker."""
    waiting, seen = [error], set()
    while waiting:
        found = waiting.pop(0)
        if id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        wrapped = [getattr(found, name, None) for name in ("cause", "controller_failure", "health_check_failure")]
        wrapped += [getattr(found, "_base_exc", None), found.__cause__, *getattr(found, "worker_failures", {}).values()]
        waiting += [inner for inner in wrapped if isinstance(inner, BaseException)]


def is_around(error: BaseException, storage: str = "") -> bool:
    """Whether a process, a node, a disk or a network failed, and not the trial's own code.

    ``storage`` is where checkpoints go: a file that is missing there was there a moment ago.
    """
    import ray.exceptions as gone
    from ray.train.v2._internal import exceptions as train

    kinds = (
        gone.RayActorError, gone.NodeDiedError, gone.WorkerCrashedError, gone.ActorUnavailableError,
        gone.OutOfMemoryError, gone.ActorPlacementGroupRemoved, gone.RuntimeEnvSetupError,
        train.WorkerHealthCheckTimeoutError, train.WorkerHealthCheckFailedError,
        train.WorkerGroupStartupTimeoutError, train.WorkerGroupStartupFailedError,
    )  # fmt: skip
    if any(_WANTED in str(found) for found in causes(error)):
        return False
    # Of several workers, one that fails for itself takes the others with it: they lose their peer.
    return all(
        any(
            isinstance(found, kinds) or _disk_failed(found, storage) or any(text in str(found) for text in _PEER_GONE)
            for found in causes(each)
        )
        for each in getattr(error, "worker_failures", {}).values() or [error]
    )


def _disk_failed(error: BaseException, storage: str) -> bool:
    if disk_is_away(error) or any(text in str(error) for text in _DISK):
        return True
    return isinstance(error, OSError) and bool(storage) and storage in str(error)


def said(error: BaseException, storage: str = "") -> str:
    """What failed around a trial, in a few words."""
    import ray.exceptions as gone

    found = list(causes(error))
    failed = [each for each in found if _disk_failed(each, storage)]
    if failed:  # the error itself rather than what it is wrapped in
        inner = next((each for each in failed if isinstance(each, OSError)), failed[-1])
        return f"the disk or network failed ({(str(inner).strip().splitlines() or [''])[-1]})"
    text = " ".join(str(each) for each in found)
    if any(isinstance(each, gone.NodeDiedError) for each in found) or any(words in text for words in _NODE_GONE):
        return "lost a node"
    if any(isinstance(each, gone.OutOfMemoryError) for each in found):
        return "a node ran out of memory"
    if isinstance(error, gone.WorkerCrashedError):
        return "lost its process"
    if hasattr(error, "worker_failures"):
        return "lost a worker"
    return "lost its controller"


def away(job: dict[str, Any]) -> bool:
    """Whether the storage is not there: whatever a trial has raised, it is no fault of its code."""
    from orchestrator import mirror
    from orchestrator.needs import Place

    try:
        mirror.check(Place(**job["place"]))
    except OSError:
        return True
    return False


def cleared(job: dict[str, Any]) -> None:
    """Before another attempt: what the last one held is given back, and its storage is there and takes files.

    Raises:
        OSError: the storage is away for longer than anybody waits.
    """
    from orchestrator import mirror
    from orchestrator.needs import Place
    from orchestrator.on_ray import internals

    internals.give_back(job["claim"])
    patiently("the storage", mirror.probe, Place(**job["place"]), away=lambda error: isinstance(error, OSError))


def reason(error: BaseException) -> str:
    """The innermost message in one line."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        error = next(iter(failures.values()))
    while getattr(error, "cause", None) is not None or error.__cause__ is not None:
        error = getattr(error, "cause", None) or error.__cause__
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[-1] if text else ''}"[:2000]
