"""Who is making what: a small file with a heartbeat, which works on storage that several hosts share.

A lease of this host is free as soon as its process has ended. Whether a process on another host lives nobody here
can know: a heartbeat that has stopped is reported, with who, since when and how to break the lease, and left alone.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

_BEAT_SECONDS = 5.0
_SILENT_SECONDS = 60.0  # a holder on another host that has not been heard for so long may be gone
_LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Holder:
    """The process that holds a lease."""

    host: str
    pid: int
    began: str  # start of the process as the system counts it: a process id is used again
    since: float

    @classmethod
    def here(cls) -> "Holder":
        return cls(socket.gethostname(), os.getpid(), _began(os.getpid()), time.time())

    @property
    def is_gone(self) -> bool:
        """Known only of processes of this host."""
        return self.host == socket.gethostname() and _began(self.pid) != self.began

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.since).strftime("%Y-%m-%d %H:%M:%S")
        return f"process {self.pid} on {self.host}, since {since}"


class Taken(ValueError):
    """Somebody else holds the lease."""


@contextlib.contextmanager
def held(path: str | Path, waiting: Callable[[Holder], None] | None = None, what: str = "") -> Iterator[None]:
    """Holds the lease of a file while the block runs.

    Args:
        path: the lease file.
        waiting: told once of every holder that is waited for; without it nobody is waited for.
        what: for people; by default the name of the file.

    Raises:
        Taken: somebody holds it and nobody waits, or a holder on another host is silent.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    told: Holder | None = None
    unreadable = False
    while (own := _take(path)) is None:
        holder = read(path)
        if holder is None:
            if unreadable and path.exists():
                raise Taken(f"the lease {path} cannot be read; if nobody is at work on it, remove it")
            unreadable = path.exists()  # else it was given back a moment ago
            time.sleep(_LOOK_SECONDS)
            continue
        if holder.is_gone:
            _break(path)
            continue
        if waiting is None:
            raise Taken(f"{what or path.stem} is being run by {holder}{_remedy(holder, path)}")
        if holder.host != socket.gethostname() and _silence(path) > _SILENT_SECONDS:
            raise Taken(
                f"{what or path.stem} is held by {holder}, which has not been heard for {_silence(path):.0f} s"
                f"{_remedy(holder, path)}"
            )
        if told != holder:
            told = holder
            waiting(holder)
        time.sleep(_LOOK_SECONDS)
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, stop), daemon=True)
    beat.start()
    try:
        yield
    finally:
        stop.set()
        beat.join()
        if read(path) == own:  # else somebody broke it and holds it now
            path.unlink(missing_ok=True)


def _remedy(holder: Holder, path: Path) -> str:
    if holder.host == socket.gethostname():
        return ""
    return f"; if that process has ended, remove {path}"


def read(path: str | Path) -> Holder | None:
    """Who holds a lease, or None."""
    try:
        holder = Holder(**json.loads(Path(path).read_text()))
        str(holder)  # a time that is none
    except (OSError, ValueError, TypeError, OverflowError):
        return None
    plain = isinstance(holder.host, str) and isinstance(holder.pid, int) and isinstance(holder.began, str)
    return holder if plain else None


def _take(path: Path) -> Holder | None:
    # Written aside and linked, so that nobody ever reads half of it; a link fails where the name exists.
    holder, aside = Holder.here(), path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    aside.write_text(json.dumps(asdict(holder)))
    try:
        os.link(aside, path)
        return holder
    except FileExistsError:
        return None
    finally:
        aside.unlink()


def _break(path: Path) -> None:
    """Removes a lease whose holder is gone.

    Only who holds a second file looks and removes; else a lease that was taken anew in between would go too.
    """
    guard = path.with_name(f"{path.name}.breaking")
    if _take(guard) is not None:
        holder = read(path)
        if holder is not None and holder.is_gone:
            path.unlink(missing_ok=True)
        guard.unlink(missing_ok=True)
    else:
        breaking = read(guard)
        if breaking is not None and breaking.is_gone:  # killed between the two lines above
            guard.unlink(missing_ok=True)


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(_BEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(path)


def _silence(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _began(pid: int) -> str:
    """When a process started, in the system's clock ticks; empty where none runs."""
    try:
        state, *others = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return "" if state in "ZX" else others[18]  # a zombie has ended, and nobody has asked how
    except (OSError, IndexError):
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):
            return ""
        except PermissionError:
            return "alive"
        return "alive"
