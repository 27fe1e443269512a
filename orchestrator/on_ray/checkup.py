"""What a node of a cluster is asked by ``python -m orchestrator.doctor``: functions that run there as Ray tasks.

They return plain values and are sent by value: a node with another version of this project, or none, answers too.
So nothing of the project is imported when this file is, and what a function needs it imports itself.
"""

import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("ray", "torch", "numpy", "pyarrow", "mlflow", "optuna")
LARGE_BYTES = 32 * 2**20  # as a small checkpoint
SMALL_FILES, SMALL_BYTES = 20, 4096

# A tensor on each GPU: counting alone succeeds where the driver is too old for this torch.
_GPUS_OF_TORCH = """
import torch
count = torch.cuda.device_count()
for i in range(count):
    torch.ones(1, device=f"cuda:{i}").item()
print(count)
"""


def about(offered_gpus: float) -> dict[str, Any]:
    """Versions, GPUs, memory and limits of this node.

    Args:
        offered_gpus: by Ray, of this node.
    """
    return {
        "versions": versions(),
        "gpus": gpus(offered_gpus),
        "memory": available_memory(),
        "shared_memory": shared_memory(),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "temporary": shutil.disk_usage(tempfile.gettempdir()).free,
    }


def versions() -> dict[str, str]:
    """Python, packages and this project, with its commit; empty where something is not installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = ""
    try:
        from orchestrator.launch.plan import code_facts
    except ImportError:
        return found | {"project": "", "commit": "unknown"}
    facts = code_facts()
    commit, dash, dirty = facts["commit"].partition("-")
    return found | {"project": facts["version"], "commit": commit[:12] + dash + dirty}


def gpus(offered: float) -> dict[str, Any]:
    """GPUs that torch can use here, and the driver of each; torch is asked only where there may be any."""
    drivers, broken = "", ""
    if shutil.which("nvidia-smi"):
        drivers, broken = _said(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], 15)
    seen, blind = "", ""
    if offered or drivers:
        # In a process of its own: Ray hides the GPUs from a task that asks for none.
        seen, blind = _said([sys.executable, "-c", _GPUS_OF_TORCH], 35)
    return {"offered": offered, "seen": int(seen or 0), "drivers": drivers.split(), "error": blind or broken}


def _said(command: list[str], seconds: float) -> tuple[str, str]:
    """What a command prints, and why it failed; one of them is empty. A driver that hangs must not hang the node."""
    visible = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=visible)
    except subprocess.TimeoutExpired:
        return "", f"{Path(command[0]).name} does not end within {seconds:.0f} s"
    if done.returncode == 0:
        return done.stdout, ""
    said = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return "", said[-1] if said else f"{Path(command[0]).name} ended with exit code {done.returncode}"


def available_memory() -> int | None:
    """Bytes that new processes can have here, also within a container's limit; None where Linux is not the system."""
    try:
        entries = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        available = next(int(words[1]) * 1024 for words in entries if words[0] == "MemAvailable:")
    except OSError:
        return None
    control = Path("/sys/fs/cgroup")
    try:
        limit = int((control / "memory.max").read_text())  # "max" where there is none
        used = int((control / "memory.current").read_text())
        lines = (line.split() for line in (control / "memory.stat").read_text().splitlines())
        cached = next(int(words[1]) for words in lines if words[0] == "inactive_file")
    except (OSError, ValueError):
        return available
    return min(available, limit - used + cached)


def shared_memory(folder: str = "/dev/shm") -> tuple[int, int] | None:
    """Size and free bytes of the shared memory; None where there is none."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.total, usage.free


def clock() -> float:
    """Seconds since 1970, by this node."""
    return time.time()


def files_of(storage: str) -> tuple[Any, str]:
    """The file system of a folder or an address such as s3://bucket/prefix, and the path in it."""
    import fsspec

    if "://" in storage:
        return fsspec.core.url_to_fs(storage)
    return fsspec.filesystem("file"), storage


def is_local(files: Any) -> bool:
    """Whether these are files of the operating system, on a disk or mounted."""
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(files, LocalFileSystem)


def write(files: Any, path: str, data: bytes) -> None:
    """Writes a file and waits until it is safe, where the file system can say so."""
    with files.open(path, "wb") as file:
        file.write(data)
        file.flush()
        if is_local(files):
            os.fsync(file.fileno())


def read(files: Any, path: str) -> bytes:
    """Reads a file from where it lies: what this machine remembers of a local or mounted file is dropped first."""
    files.invalidate_cache()
    with files.open(path, "rb") as file:
        if is_local(files) and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file.read()


def use_storage(storage: str, folder: str, secret: bytes, own: str) -> dict[str, Any]:
    """What this node can do with the storage; nothing is written where the driver's file is not seen.

    Args:
        storage: folder or address.
        folder: in it, made by the driver, which removes it.
        secret: what the driver has written.
        own: name of the file that the driver will look for.

    Raises:
        Exception: whatever the file system raises.
    """
    files, root = files_of(storage)
    files.invalidate_cache()
    here = f"{root}/{folder}"
    if not files.exists(f"{here}/driver") or read(files, f"{here}/driver") != secret:
        return {"visible": False}
    write(files, f"{here}/{own}", secret)
    data, large = os.urandom(LARGE_BYTES), f"{here}/{own}-large"
    writing = _seconds(write, files, large, data)
    reading = _seconds(read, files, large)
    files.rm(large)
    small = [f"{here}/{own}-{i}" for i in range(SMALL_FILES)]
    taken = [_seconds(write, files, path, data[:SMALL_BYTES]) + _seconds(read, files, path) for path in small]
    return {
        "visible": True,
        "write": LARGE_BYTES / 2**20 / writing,
        "read": LARGE_BYTES / 2**20 / reading,
        "latency": 1000 * statistics.median(taken),
        "free": shutil.disk_usage(here).free if is_local(files) else None,
    }


def _seconds(function: Any, *arguments: Any) -> float:
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


def reach_tracking(uri: str) -> None:
    """Raises ValueError when this node cannot use the MLflow store."""
    from orchestrator import tracking

    tracking.check(uri)


def load_weights(names: list[str]) -> dict[str, str]:
    """Name of a network -> why its pretrained weights are not here; empty where they are.

    Needs HF_HUB_OFFLINE=1 since the start of the process.
    """
    # Weights that do not lie on Hugging Face's hub are asked for through a proxy that nobody is.
    os.environ.update(
        {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    )
    from models.backbone import check_weights

    found = {}
    for name in names:
        try:
            check_weights(name)
            found[name] = ""
        except ValueError as error:
            found[name] = str(error)
    return found
