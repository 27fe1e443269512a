"""What is good, doubtful or bad about what the nodes of a cluster answered: plain functions of plain values, no Ray.

Every threshold of ``python -m orchestrator.doctor`` is here, with its reason.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

_GIB = 2**30

CLOCK_SECONDS = 2.0  # nothing depends on clocks; logs of several nodes cannot be read together beyond this
SHARED_MEMORY = 2 * _GIB  # loaders hand batches over in it; containers have 64 MiB unless told otherwise
OPEN_FILES = 4096  # sockets of Ray's processes and file handles of loaders, of one process
TEMPORARY_SPACE = 5 * _GIB  # 3 MiB of logs a trial, and Ray stops placing tasks on a full disk
STORAGE_RATE = 20.0  # MiB/s: a checkpoint of 200 MB in ten seconds
STORAGE_LATENCY = 100.0  # ms a small file: an epoch writes a handful
STORAGE_LITTLE, STORAGE_LEAST = 20 * _GIB, _GIB  # checkpoints of a night; below the least nothing can be prepared
HEAD_BASE = 2.0 * _GIB  # Ray's own processes on the head, and the driver

# How many leading numbers of a version must agree: what exchanges data or checks versions itself is stricter.
_SAME_NUMBERS = {"python": 2, "ray": 3, "torch": 2, "numpy": 1, "pyarrow": 1, "mlflow": 1, "optuna": 1, "project": 3}

State = Literal["ok", "warn", "bad"]


@dataclass(frozen=True)
class Finding:
    """One line about one thing that was looked at.

    Attributes:
        what: the thing, a word or two.
        state: "bad" will cost a night, "warn" may, "ok" will not.
        text: what was found, with figures and units.
        remedy: what to do; empty where there is nothing to do.
    """

    what: str
    state: State
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.state:5} {self.what:14} {self.text}" + (f" → {self.remedy}" if self.remedy else "")


@dataclass(frozen=True)
class Gpus:
    """GPUs of one node."""

    offered: float  # by Ray
    seen: int  # by torch, and a tensor was put on each
    drivers: Sequence[str]  # versions, one a GPU, from nvidia-smi; empty where there is no such command
    error: str = ""  # why torch could not look


@dataclass(frozen=True)
class Used:
    """What one node could do with the storage."""

    visible: bool  # it sees what the driver wrote
    seen: bool = True  # the driver sees what it wrote
    write: float = 0.0  # MiB/s, one file, forced to the disk
    read: float = 0.0  # MiB/s, the same file
    latency: float = 0.0  # ms to write, force out and read a small file
    free: int | None = None  # bytes; None where the file system does not say


def silent(nodes: Mapping[str, str]) -> list[Finding]:
    """Nodes that did not answer at all; no later check asks them. ``nodes``: name -> why."""
    remedy = "look at the raylet's log there, or take the node away; install the same wheel and Ray as here"
    return [Finding("node", "bad", f"{name} does not answer: {why}", remedy) for name, why in nodes.items()]


def versions(here: Mapping[str, str], nodes: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """Python and packages of every node beside those of the driver.

    Args:
        here: the driver's; package -> version, empty where it is not installed; "commit" is the project's.
        nodes: name of the node -> the same.
    """
    found = []
    for package, own in here.items():
        other: dict[str, list[str]] = {}
        for node, theirs in nodes.items():
            if theirs[package] != own:
                other.setdefault(theirs[package], []).append(node)
        for version, where in other.items():
            text = f"{package} {version or 'is missing'} on {_named(where)}, {own or 'none'} here"
            found.append(Finding("versions", _difference(package, own, version), text, _same(package)))
    told = ", ".join(f"{name} {version or 'none'}" for name, version in here.items())
    return found or [Finding("versions", "ok", f"{len(nodes)} node(s) as here: {told}")]


def _difference(package: str, own: str, other: str) -> State:
    if package == "commit":
        return "warn" if "unknown" in (own, other) else "bad"
    numbers = _SAME_NUMBERS[package]
    cut = [version.partition("+")[0].split(".")[:numbers] for version in (own, other)]
    return "warn" if own and other and cut[0] == cut[1] else "bad"


def _same(package: str) -> str:
    if package in ("commit", "project"):
        return "install one wheel everywhere, or start with ray job submit --working-dir ."
    return "install the lock file's versions on every node: one image for all"


def gpus(nodes: Mapping[str, Gpus]) -> list[Finding]:
    """GPUs that Ray offers must be usable by torch, with one driver in the whole cluster."""
    blind = [
        f"{node} offers {own.offered:g}, torch can use {own.seen}" + (f" ({own.error})" if own.error else "")
        for node, own in nodes.items()
        if own.seen < own.offered
    ]
    idle = [f"{len(own.drivers)} on {node}" for node, own in nodes.items() if own.drivers and not own.offered]
    drivers: dict[str, list[str]] = {}
    for node, own in nodes.items():
        for driver in dict.fromkeys(own.drivers):
            drivers.setdefault(driver, []).append(node)
    found = []
    if blind:
        remedy = "install torch's CUDA build for that node's driver, or start the node with --num-gpus=0"
        found.append(Finding("GPUs", "bad", _list(blind), remedy))
    if len(drivers) > 1:
        text = ", ".join(f"driver {driver} on {_named(where)}" for driver, where in drivers.items())
        found.append(Finding("GPUs", "bad", text, "install one driver on every node"))
    if idle:
        found.append(Finding("GPUs", "warn", f"Ray offers none of {_list(idle)}", "start the node with --num-gpus"))
    total = sum(own.offered for own in nodes.values())
    usual = f"{total:g} usable" + "".join(f", driver {driver}" for driver in drivers)
    return found or [Finding("GPUs", "ok", usual if total else "none; networks run on CPUs")]


def fitting(trial: str, possible: int, wished: int | None) -> Finding:
    """Trials that the cluster's CPUs and GPUs can hold at once; ``trial`` says what one needs."""
    if wished and possible < wished:
        text = f"{possible} of {wished} trials of {trial} fit at once"
        return Finding("resources", "warn", text, f"--concurrent {possible}, or more nodes")
    return Finding("resources", "ok", f"{possible} trial(s) of {trial} at once")


def head_memory(available: int | None, concurrent: int, a_trial: float) -> Finding:
    """Memory of the head for the control processes of all trials.

    Args:
        available: bytes; None where the system does not say.
        concurrent: trials at once.
        a_trial: bytes of one trial's control processes.
    """
    need = HEAD_BASE + concurrent * a_trial
    if available is None:
        return Finding(
            "head memory",
            "warn",
            f"the head does not say what is free; {concurrent} trial(s) at once need {_gib(need)}",
            "compare by hand",
        )
    text = f"{_gib(available)} free, {concurrent} trial(s) at once need {_gib(need)}"
    if available >= need:
        return Finding("head memory", "ok", text)
    room = int((available - HEAD_BASE) // a_trial)
    return Finding(
        "head memory", "bad", text, f"--concurrent {room}, or a larger head" if room > 0 else "a larger head"
    )


def dashboard(error: str) -> Finding:
    """Whether the State API answers; ``error`` is empty when it does."""
    if not error:
        return Finding("dashboard", "ok", "its State API answers")
    remedy = 'pip install "ray[default]" on the head, start it without --include-dashboard=false'
    return Finding("dashboard", "warn", f"no ray job submit and no page of the cluster: {error}", remedy)


def clocks(offsets: Mapping[str, tuple[float, float]], silent: Mapping[str, str]) -> Finding:
    """Clocks of the nodes against the driver's.

    Args:
        offsets: name -> seconds ahead, and how uncertain that is: half of the time the question took.
        silent: name -> why it did not say.
    """
    off = [f"{node} {ahead:+.1f} s" for node, (ahead, doubt) in offsets.items() if abs(ahead) - doubt > CLOCK_SECONDS]
    if off:
        return Finding("clocks", "warn", f"{_list(off)} against here", "start chrony or ntpd on every node")
    if silent:
        text = "; ".join(f"{node}: {why}" for node, why in silent.items())
        return Finding("clocks", "warn", text, "ask again when the node is less busy")
    ahead, doubt = max(offsets.values(), key=lambda one: abs(one[0]), default=(0.0, 0.0))
    return Finding("clocks", "ok", f"at most {abs(ahead):.2f} s apart, ± {doubt:.2f} s")


def shared_memory(nodes: Mapping[str, tuple[int, int] | None]) -> Finding:
    """``/dev/shm``: name of the node -> size and what is free, bytes; None where there is none."""
    little = [
        f"{node} {_gib(own[1])} free of {_gib(own[0])}" if own else f"{node} has none"
        for node, own in nodes.items()
        if own is None or own[1] < SHARED_MEMORY
    ]
    if little:
        remedy = "--shm-size=8g for a container, an emptyDir of medium Memory in a pod; or --set loader_workers=0"
        return Finding("shared memory", "warn", f"{_list(little)}; loaders like {_gib(SHARED_MEMORY)}", remedy)
    return Finding("shared memory", "ok", f"{_gib(min(own[1] for own in nodes.values() if own))} free at least")


def open_files(nodes: Mapping[str, int]) -> Finding:
    """Name of the node -> files that one process may have open."""
    few = [f"{limit} on {node}" for node, limit in nodes.items() if limit < OPEN_FILES]
    if few:
        remedy = "ulimit -n 65536 before ray start, LimitNOFILE= in a unit, --ulimit nofile=65536 for a container"
        return Finding("open files", "warn", f"{_list(few)}; a process may need {OPEN_FILES}", remedy)
    return Finding("open files", "ok", f"{min(nodes.values())} a process at least")


def temporary_space(nodes: Mapping[str, int]) -> Finding:
    """Name of the node -> free bytes of the disk with its temporary folder, where Ray keeps its logs."""
    full = [f"{_gib(free)} on {node}" for node, free in nodes.items() if free < TEMPORARY_SPACE]
    if full:
        remedy = "remove old session_* folders of Ray there, or ray start --temp-dir on a larger disk"
        return Finding("local disk", "warn", f"free for temporary files: {_list(full)}", remedy)
    return Finding("local disk", "ok", f"{_gib(min(nodes.values()))} free for temporary files at least")


_SHARE = "mount one file system at this path on every node, or set ORCHESTRATOR_STORAGE to what all nodes can reach"


def storage(where: str, nodes: Mapping[str, Used], failed: Mapping[str, str]) -> list[Finding]:
    """Whether all nodes and the driver see one storage, how fast it is and what is free.

    Args:
        where: folder or address, without passwords.
        nodes: name -> what it could do.
        failed: name -> why it could do nothing.
    """
    found = [Finding("storage", "bad", f"{where} on {node}: {why}", _SHARE) for node, why in failed.items()]
    blind = [node for node, used in nodes.items() if not used.visible]
    if blind:
        text = f"{where} is another folder on {_named(blind)}: what is written here is not there"
        found.append(Finding("storage", "bad", text, _SHARE))
    unseen = [node for node, used in nodes.items() if used.visible and not used.seen]
    if unseen:
        text = f"what {_named(unseen)} writes to {where} is not seen here"
        found.append(Finding("storage", "bad", text, _SHARE))
    usable = {node: used for node, used in nodes.items() if used.visible and used.seen}
    if not found:
        found.append(Finding("storage", "ok", f"{where} is one folder for here and {len(usable)} node(s)"))
    return found + ([_speed(usable), *_space(usable)] if usable else [])


def _speed(nodes: Mapping[str, Used]) -> Finding:
    slow = [
        f"{node} writes {used.write:.0f} MiB/s, reads {used.read:.0f} MiB/s, {used.latency:.0f} ms a small file"
        for node, used in nodes.items()
        if min(used.write, used.read) < STORAGE_RATE or used.latency > STORAGE_LATENCY
    ]
    if slow:
        usual = f"{STORAGE_RATE:.0f} MiB/s and {STORAGE_LATENCY:.0f} ms are enough"
        remedy = "a faster file system or link, or fewer trials at once"
        return Finding("storage speed", "warn", f"{_list(slow)}; {usual}", remedy)
    write, read = min(used.write for used in nodes.values()), min(used.read for used in nodes.values())
    latency = statistics.median(used.latency for used in nodes.values())
    return Finding(
        "storage speed",
        "ok",
        f"writes {write:.0f} MiB/s, reads {read:.0f} MiB/s from the slowest node, {latency:.0f} ms a small file",
    )


def _space(nodes: Mapping[str, Used]) -> list[Finding]:
    known = [used.free for used in nodes.values() if used.free is not None]
    if not known:
        return []  # object storage has no end
    free = min(known)
    if free >= STORAGE_LITTLE:
        return [Finding("storage space", "ok", f"{_gib(free)} free")]
    state: State = "warn" if free >= STORAGE_LEAST else "bad"
    return [Finding("storage space", state, f"{_gib(free)} free", "remove old sweeps, or a larger disk")]


_SERVER = "start one (mlflow server) and set MLFLOW_TRACKING_URI to its address"


def tracking(uri: str, nodes: int, failed: Mapping[str, str] | None) -> Finding:
    """Where runs are recorded.

    Args:
        uri: without password; empty where there is neither a server nor a folder that SQLite could lie in.
        nodes: in the cluster.
        failed: name of the node -> why it cannot reach it; None when it is a file that is still to be made.
    """
    if not uri:
        return Finding("tracking", "bad", "SQLite cannot lie on object storage, and no server is named", _SERVER)
    if uri.startswith("sqlite:") and nodes > 1:
        text = f"{nodes} nodes would write one SQLite file, which file systems across nodes destroy"
        return Finding("tracking", "bad", text, _SERVER)
    if failed is None:
        return Finding("tracking", "ok", f"{uri} will be made by the first sweep; one node")
    if failed:
        reasons: dict[str, list[str]] = {}
        for node, why in failed.items():
            reasons.setdefault(why, []).append(node)
        text = "; ".join(f"from {_named(where)}: {why}" for why, where in reasons.items())
        return Finding(
            "tracking", "bad", text, "start the server, or set MLFLOW_TRACKING_URI to what every node reaches"
        )
    return Finding("tracking", "ok", f"{uri} answers from {nodes} node(s)")


def study(url: str, error: str) -> Finding:
    """The database of ``OPTUNA_STORAGE``, asked by the driver; ``url`` without its password."""
    if error:
        remedy = "start the database, install its driver, set OPTUNA_STORAGE to its address and PGPASSWORD"
        return Finding("study", "bad", f"{url}: {error}", remedy)
    return Finding("study", "ok", f"{url} answers" if url else "SQLite beside each sweep; OPTUNA_STORAGE is not set")


def weights(name: str, nodes: int, failed: Mapping[str, str]) -> Finding:
    """Whether pretrained weights are on every node; ``failed``: name of the node -> why they are not."""
    if not failed:
        return Finding("weights", "ok", f"{name} on {nodes} node(s) without the internet")
    why = next(iter(failed.values()))
    remedy = "load them once on each node with internet, copy HF_HOME there, or --set student.weights=FILE"
    return Finding("weights", "bad", f"{name} is not on {_named(failed)}: {why}", remedy)


def _gib(count: float) -> str:
    return f"{count / _GIB:.1f} GiB"


def _named(nodes: Iterable[str]) -> str:
    return _list(nodes, ", ")


def _list(items: Iterable[str], between: str = "; ", most: int = 4) -> str:
    """A list that stays one line on a cluster of hundreds."""
    all_items = list(items)
    more = [f"{len(all_items) - most} more"] if len(all_items) > most else []
    return between.join(all_items[:most] + more)
