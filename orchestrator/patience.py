"""Servers and disks that are away for a while: calls are made again, and one line says since when.

Ten minutes outlast a restart of a server, a remounted folder and somebody who makes room on a disk;
``ORCHESTRATOR_PATIENCE_S`` is another number of seconds.
"""

import errno
import os
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

_AWAY = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EIO", "ESTALE", "ENOTCONN", "EHOSTDOWN", "ENODEV", "EROFS", "ETIMEDOUT",
                 "ECONNREFUSED", "ECONNRESET", "EHOSTUNREACH", "ENETUNREACH", "EPIPE")
}  # fmt: skip
_since: dict[str, float] = {}  # what is away -> since when; one line for all threads
_heard: list[str] = []  # what came back, for whoever can tell people; a worker's warnings stay in its log
_lock = threading.Lock()


def seconds() -> float:
    """How long a caller waits.

    Raises:
        ValueError: ``ORCHESTRATOR_PATIENCE_S`` is no number from 0 on.
    """
    text = os.environ.get("ORCHESTRATOR_PATIENCE_S", "600")
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not found >= 0:  # nan, too
        raise ValueError(f"ORCHESTRATOR_PATIENCE_S={text} is no number of seconds, such as 600")
    return found


def disk_is_away(error: BaseException) -> bool:
    """Whether an error is of a disk that is full or gone, or of a network: waiting may help."""
    return isinstance(error, ConnectionError) or (isinstance(error, OSError) and error.errno in _AWAY)


def patiently(
    what: str, call: Callable[..., Any], *arguments: Any, away: Callable[[BaseException], bool] = disk_is_away,
    **named: Any,
) -> Any:  # fmt: skip
    """The call's result, made again while what it needs is away.

    Args:
        what: for people, such as "the MLflow server http://…".
        call: may be made twice: it must not matter that a first one went through unnoticed.
        away: which errors mean that waiting may help; others are raised at once.

    Raises:
        Exception: the last error, once the patience is at its end.
    """
    end = time.monotonic() + seconds()
    for attempt in range(1_000_000):
        try:
            result = call(*arguments, **named)
        except Exception as error:
            if not away(error) or time.monotonic() > end:
                with _lock:
                    _since.pop(what, None)  # the next time is announced again
                raise
            _left(what, error)
            time.sleep(min(0.2 * 2 ** min(attempt, 10), 5.0))
        else:
            if attempt:
                _came_back(what)
            return result


def first_line(error: BaseException) -> str:
    """What an error says, for a message of one line; its class where it says nothing.

    >>> first_line(ValueError("no\\nmore")), first_line(ValueError())
    ('no', 'ValueError')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _left(what: str, error: BaseException) -> None:
    with _lock:
        if what in _since:
            return
        _since[what] = time.monotonic()
    first = first_line(error)
    warnings.warn(f"{what} is away ({first}); trying again for {seconds():.0f} s", stacklevel=3)


def _came_back(what: str) -> None:
    with _lock:
        since = _since.pop(what, None)
    if since is not None:
        line = f"{what} is back after {time.monotonic() - since:.0f} s"
        _heard.append(line)
        warnings.warn(line, stacklevel=3)


def heard() -> str:
    """What this process has waited for since it was asked last, in one line."""
    with _lock:
        lines, _heard[:] = list(_heard), []
    return "; ".join(lines)
