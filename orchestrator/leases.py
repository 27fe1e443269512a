"""Who is making what: leases with a heartbeat, on storage that several hosts share.

Departs from ``flock``, which NFS does not keep and object storage does not have. A lease is a file
``<name>-<generation>``, and the highest generation counts. It is taken by making the next one, which one of several
succeeds in, and given back by emptying the own one, which stays: numbers only rise, so nobody who was slow takes an
old one for free. The holder writes into its own file every few seconds.

A holder of this host is gone as soon as its process has ended. One elsewhere is gone when its file has not changed
for ``SILENT_SECONDS`` on the watcher's own clock that only runs forward: clocks of hosts are never compared. Who was
taken for gone and comes back learns it from :meth:`Lease.check`.
"""

import contextlib
import functools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

from orchestrator import store

BEAT_SECONDS = 5.0
SILENT_SECONDS = 45.0  # nine missed beats: an overloaded server of files is not a dead host
_LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Holder:
    """The process that holds a lease."""

    host: str
    pid: int
    began: str  # start of the process as the system counts it: a process id is used again
    since: float  # seconds since 1970, for people
    space: str = ""  # within which the process id means something: containers may share a host's name

    @classmethod
    def here(cls) -> "Holder":
        return cls(socket.gethostname(), os.getpid(), _began(os.getpid()), time.time(), _space())

    @property
    def is_here(self) -> bool:
        """Whether it runs where this process could see it."""
        return (self.host, self.space) == (socket.gethostname(), _space())

    @property
    def is_gone(self) -> bool:
        """Known only of processes that would be seen here."""
        return self.is_here and _began(self.pid) != self.began

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.since).strftime("%Y-%m-%d %H:%M:%S")
        return f"process {self.pid} on {self.host}, since {since}"


class Taken(ValueError):
    """Somebody else holds the lease."""


@dataclass
class Lease:
    """What a holder has in its hand."""

    address: str
    generation: int
    what: str
    beats: int = 0
    holder: Holder = field(default_factory=Holder.here)
    lost: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Raises :class:`Taken` once somebody has taken over, because this host was silent for too long."""
        if self.lost.is_set():
            raise Taken(f"{self.what} was taken over by {read(self.address) or 'another process'}; this one stops")

    @property
    def own(self) -> str:
        return f"{self.address}-{self.generation}"

    @property
    def content(self) -> bytes:
        return json.dumps({**asdict(self.holder), "beats": self.beats}).encode()

    def beat(self) -> None:
        """Writes the next beat, unless somebody has taken over: there is a higher generation.

        Where there is none at all the storage is away, perhaps not mounted, and nothing must be written there.
        """
        generations = _generations(self.address)
        if generations and generations[-1] > self.generation:
            self.lost.set()
        if self.generation in generations and not self.lost.is_set():
            self.beats += 1
            store.write(self.own, self.content)


@contextlib.contextmanager
def held(
    path: str | Path, waiting: Callable[[Holder], None] | None = None, what: str = "",
    took_over: Callable[[str], None] | None = None,
) -> Iterator[Lease]:  # fmt: skip
    """Holds a lease while the block runs.

    Args:
        path: of the lease, or its URI.
        waiting: told once of every holder that is waited for; without it nobody is waited for.
        what: for people; by default the name of the lease.
        took_over: told in one line of a holder elsewhere that was silent and whose lease this one took.

    Raises:
        Taken: somebody holds it and nobody waits, or its file cannot be read.
    """
    path = str(path)
    what = what or Path(path).stem
    lease = _take(path, what, waiting, took_over or (lambda line: None))
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(lease, stop), daemon=True)
    beat.start()
    try:
        yield lease
    finally:
        stop.set()
        beat.join()
        with contextlib.suppress(OSError):  # else it falls silent, which is as good
            if _generations(path)[-1:] == [lease.generation]:
                store.write(lease.own, b"")


def read(path: str | Path) -> Holder | None:
    """Who holds a lease, or None."""
    generations = _generations(str(path))
    return _parsed(store.read(f"{path}-{generations[-1]}")) if generations else None


def _take(path: str, what: str, waiting: Callable[[Holder], None] | None, took_over: Callable[[str], None]) -> Lease:
    told: Holder | None = None
    seen: bytes | None = None  # what the holder's file had when it was looked at
    seen_at, changed, unreadable = 0.0, False, 0
    while True:
        generations = _generations(path)
        top = generations[-1] if generations else 0
        content = store.read(f"{path}-{top}") if top else None
        if not content:  # free, or removed because there is a higher one
            lease = _claim(path, what, top)
            if lease is not None:
                return lease
            time.sleep(_LOOK_SECONDS / 10)
            continue
        holder = _parsed(content)
        if holder is None:
            unreadable += 1
            if unreadable > 2:
                raise Taken(f"the lease {path}-{top} cannot be read; if nobody is at work on it, remove it")
            time.sleep(_LOOK_SECONDS)
            continue
        if content != seen:
            changed = seen is not None
            seen, seen_at = content, time.monotonic()
        silent = time.monotonic() - seen_at
        if holder.is_gone or (not holder.is_here and silent > SILENT_SECONDS):
            lease = _claim(path, what, top)
            if lease is not None:
                if not holder.is_gone:
                    took_over(f"{what} was held by {holder}, not heard for {silent:.0f} s: taken over")
                return lease
            continue
        if waiting is None and (holder.is_here or changed):
            raise Taken(f"{what} is being run by {holder}; wait for its end, or end that process")
        if waiting is not None and told != holder:
            told = holder
            if holder.pid != os.getpid() or not holder.is_here:
                waiting(holder)
        time.sleep(_LOOK_SECONDS)


def _claim(path: str, what: str, top: int) -> Lease | None:
    """The next generation, if nobody else has made it or a higher one."""
    lease = Lease(path, top + 1, what)
    if not store.create(lease.own, lease.content):
        return None
    generations = _generations(path)
    if generations[-1] != lease.generation:  # the own one had been there, and was removed
        store.remove(lease.own)
        return None
    for generation in generations[:-1]:
        store.remove(f"{path}-{generation}")
    return lease


def _beat(lease: Lease, stop: threading.Event) -> None:
    while not stop.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):  # a storage that is away for a while is no reason to give up
            lease.beat()


def _generations(path: str) -> list[int]:
    """Numbers of the generations that are there, in order."""
    folder, _, name = path.rpartition("/")
    endings = (found.removeprefix(f"{name}-") for found in store.names(folder or ".", f"{name}-"))
    return sorted(int(ending) for ending in endings if ending.isdigit())


def _parsed(content: bytes | None) -> Holder | None:
    try:
        values = json.loads(content or b"")
        values.pop("beats", None)
        holder = Holder(**values)
        str(holder)  # a time that is none
    except (ValueError, TypeError, AttributeError, OverflowError):
        return None
    plain = isinstance(holder.host, str) and isinstance(holder.pid, int) and isinstance(holder.began, str)
    return holder if plain else None


@functools.cache
def _space() -> str:
    try:  # hosts may have one name, too
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


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
