"""Small files of a storage by address: a folder that hosts share, or object storage of any kind that fsspec knows.

Five verbs that both have, so that ledgers, plans and leases need not know which one it is. An address is a path or a
URI such as ``s3://bucket/prefix``; credentials and endpoints come from the environment (``AWS_ENDPOINT_URL``, …).
"""

import contextlib
import functools
import hashlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def is_remote(address: str) -> bool:
    """Whether an address is a URI."""
    return "://" in address


def joined(address: str, *parts: str) -> str:
    """An address below another one."""
    return "/".join([address.rstrip("/"), *parts]) if is_remote(address) else str(Path(address, *parts))


@functools.cache
def file_system(scheme: str) -> Any:
    """The fsspec file system of a URI's scheme; what it lists is never remembered: other hosts write, too.

    Raises:
        ValueError: nobody knows the scheme, or its package is not installed.
    """
    import fsspec

    try:
        folders = {"auto_mkdir": True} if scheme == "file" else {}  # others have none
        return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True, **folders)
    except (ValueError, ImportError) as error:
        remedy = "use a folder, or s3://BUCKET/PREFIX"
        raise ValueError(f"storage of kind {scheme}:// cannot be used: {error}; {remedy}") from error


def opened(address: str) -> tuple[Any, str]:
    """File system and path of a URI."""
    scheme, _, path = address.partition("://")
    return file_system(scheme), path if scheme != "file" else f"/{path.lstrip('/')}"


def for_ray(address: str) -> tuple[Any, str]:
    """File system and path as Ray takes them; None for a folder."""
    if not is_remote(address):
        return None, address
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    files, path = opened(address)
    return PyFileSystem(FSSpecHandler(files)), path


@contextlib.contextmanager
def answering(address: str) -> Iterator[None]:
    """Turns what clients of object storages raise while it is away into the OSError that everybody waits for."""
    try:
        yield
    except (OSError, ValueError, TypeError, NotImplementedError):
        raise
    except Exception as error:  # botocore's and others' have no class in common
        scheme, remedy = address.partition("://")[0], "look at ORCHESTRATOR_STORAGE and AWS_ENDPOINT_URL"
        raise ConnectionError(f"{scheme}:// does not answer: {error}; {remedy}") from error


def read(address: str) -> bytes | None:
    """What a file holds; None where there is none.

    Raises:
        OSError: the storage does not answer.
    """
    try:
        if not is_remote(address):
            return Path(address).read_bytes()
        with answering(address):
            files, path = opened(address)
            return files.cat_file(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def write(address: str, data: bytes) -> None:
    """Replaces a file as a whole: nobody ever reads half of it."""
    if is_remote(address):
        with answering(address):
            files, path = opened(address)
            files.pipe_file(path, data)
        return
    with _aside(address, data) as aside:
        os.replace(aside, address)


def create(address: str, data: bytes) -> bool:
    """Makes a file that must not exist yet; of several who try, one succeeds."""
    try:
        if is_remote(address):
            with answering(address):
                files, path = opened(address)
                files.pipe_file(path, data, mode="create")
        else:
            with _aside(address, data) as aside:
                os.link(aside, address)  # fails where the name exists, on NFS too
    except FileExistsError:
        return False
    except OSError as error:
        if is_remote(address) and "PreconditionFailed" in repr(error):
            return False
        raise
    return True


def remove(address: str) -> None:
    """Removes a file; one that is gone already is no error."""
    with contextlib.suppress(FileNotFoundError):
        if is_remote(address):
            with answering(address):
                files, path = opened(address)
                files.rm_file(path)
        else:
            os.unlink(address)


def names(address: str, beginning: str = "") -> list[str]:
    """Names of what lies directly below a folder, in order."""
    try:
        if not is_remote(address):
            return sorted(name for name in os.listdir(address) if name.startswith(beginning))
        with answering(address):
            files, path = opened(address)
            found = [Path(entry.rstrip("/")).name for entry in files.ls(path, detail=False)]
        return sorted(name for name in found if name.startswith(beginning))
    except FileNotFoundError:
        return []


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextlib.contextmanager
def _aside(address: str, data: bytes) -> Any:
    """The data in a file of another name beside it, on the disk; gone afterwards."""
    path = Path(address)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")
    try:
        with open(aside, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        yield aside
    finally:
        aside.unlink(missing_ok=True)
