"""Which errors are of a trial's surroundings, and which of its own code; no cluster is needed to tell."""

import errno
import pickle

import pytest
from ray import exceptions as gone
from ray.train.v2._internal import exceptions as train
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from orchestrator.on_ray import faults


def of_user(error: Exception) -> train.UserExceptionWithTraceback:
    return train.UserExceptionWithTraceback(error, f"Traceback …\n{type(error).__name__}: {error}")


def group(*errors: Exception) -> WorkerGroupError:
    return WorkerGroupError("…", dict(enumerate(errors)))


DIED = gone.RayActorError(error_msg="The actor is dead because its worker process has died. Worker exit type: SYSTEM")
NODE = gone.RayActorError(error_msg="The actor died because its node has died. Node Id: 12")
KILLED = gone.RayActorError(error_msg="The actor is dead because it was killed by `ray.kill`.")
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (DIED, "lost its controller"),
        (NODE, "lost a node"),
        (group(train.WorkerHealthCheckFailedError("unhealthy", DIED)), "lost a worker"),
        (group(train.WorkerHealthCheckFailedError("unhealthy", NODE)), "lost a node"),
        (group(of_user(RuntimeError("gloo: Connection closed by peer [10.0.0.1]:123"))), "lost a worker"),
        (group(of_user(FULL)), "the disk or network failed ([Errno 28] No space left on device)"),
        (ControllerError(FULL), "the disk or network failed ([Errno 28] No space left on device)"),
        (group(train.WorkerGroupStartupTimeoutError(2)), "lost a worker"),
        (gone.WorkerCrashedError(), "lost its process"),
        (gone.OutOfMemoryError("the node ran low"), "a node ran out of memory"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_surroundings(error, said):
    assert faults.is_around(error) and faults.said(error) == said
    sent = pickle.loads(pickle.dumps(error)) if not isinstance(error, gone.RayActorError) else error
    assert faults.is_around(sent)


@pytest.mark.parametrize(
    "error",
    [
        group(of_user(ValueError("the loss needs two classes"))),
        group(of_user(FileNotFoundError(2, "No such file", "teacher.safetensors"))),
        group(of_user(RuntimeError("CUDA out of memory"))),
        ControllerError(ValueError("no such field")),
        group(of_user(RuntimeError("gloo: Connection closed by peer")), of_user(ValueError("the first to fail"))),
        KILLED,  # the janitor ends the controller of a trial that is stopped early: it must not begin again
    ],
)
def test_its_own(error):
    assert not faults.is_around(error)


def test_a_file_that_is_missing_in_the_storage_was_there_a_moment_ago():
    missing = ControllerError(
        FileNotFoundError(2, "Failed to open local file '/runs/sweeps/a-1/train/t000/snapshot.json'")
    )
    assert faults.is_around(missing, "/runs/sweeps/a-1/train") and not faults.is_around(missing, "/elsewhere")
    assert faults.said(missing, "/runs/sweeps/a-1/train").startswith("the disk or network failed ([Errno 2]")
    assert faults.is_around(group(of_user(RuntimeError("writer failed: No space left on device"))))


def test_the_innermost_message_is_the_reason():
    assert faults.reason(group(of_user(ValueError("no")))) == "UserExceptionWithTraceback: ValueError: no"
    wrapped = RuntimeError("outer")
    wrapped.__cause__ = ValueError("first line\nlast line")
    assert faults.reason(wrapped) == "ValueError: last line"
