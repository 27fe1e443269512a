"""Files of an object storage on this host: fetched once, verified, evicted by size.

Everything that is prepared is written below a local folder (``Place.storage``). Where the storage itself is a URI
(``Place.remote``), the maker publishes what it has made, and who needs it on another host fetches it. A list of
files with their SHA-256 is published last: what has one is whole.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from orchestrator import leases, store
from orchestrator.needs import Place, digest
from orchestrator.patience import first_line

FILE = "storage.json"  # in every storage folder: where it is missing, the folder is not mounted
_KEPT_SECONDS = 3600.0  # what was asked for so recently is in use
_DEFAULT_SHARE = 0.5  # of the disk


def place(data_root: str = "", address: str = "") -> Place:
    """Where this process reads and writes: ``ORCHESTRATOR_STORAGE``, or ./runs.

    Args:
        data_root: where the images are.
        address: of another storage than the environment's.

    Raises:
        ValueError: a path that addresses of databases read otherwise, a URI with credentials in it or of a kind that
            nobody knows, or ./runs in a folder that ``ray job submit`` has made for the job.
    """
    address = address or os.environ.get("ORCHESTRATOR_STORAGE", "")
    if not address and "working_dir_files" in Path.cwd().parts:
        raise ValueError(
            f"./runs would be in {Path.cwd()}, which Ray removes after the job; set ORCHESTRATOR_STORAGE to a folder "
            f"that all nodes share, or to object storage such as s3://BUCKET/PREFIX"
        )
    address = address or "runs"
    remote = ""
    if store.is_remote(address):
        remote = address.rstrip("/")
        if "@" in remote or "?" in remote:
            shown = re.sub(r"//[^@]*@", "//***@", remote).partition("?")[0]
            raise ValueError(
                f"ORCHESTRATOR_STORAGE={shown} holds more than scheme, bucket and path; put keys and endpoint into "
                f"variables such as AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL"
            )
        store.opened(remote)  # knows what kind it is
        own = Path(os.environ.get("ORCHESTRATOR_CACHE") or f"{tempfile.gettempdir()}/orchestrator-{os.getuid()}")
        folder = str(own.expanduser().absolute() / digest(remote)[:12])
        Path(folder).mkdir(parents=True, exist_ok=True)
    else:
        folder = str(Path(address).expanduser().absolute())
    if odd := re.search(r"\?|%[0-9A-Fa-f]{2}", folder):
        raise ValueError(
            f"the storage {folder} has {odd[0]!r} in its path, which addresses of databases take for something else; "
            f"set ORCHESTRATOR_STORAGE to another folder"
        )
    return Place(folder, str(Path(data_root).absolute()) if data_root else "", remote)


def mark(place: Place) -> None:
    """Says that a folder is a storage: whoever does not find it later knows that the folder is not mounted.

    Raises:
        ValueError: an object storage does not answer, or takes nothing from this user.
    """
    if place.remote:
        try:
            probe(place)
        except Exception as error:  # whatever a file system raises, the address matters
            first = first_line(error)
            remedy = "look at the bucket, AWS_ENDPOINT_URL and the keys in the environment"
            raise ValueError(f"ORCHESTRATOR_STORAGE={place.remote} cannot be used: {first}; {remedy}") from error
    else:
        store.create(place.folder(FILE), json.dumps({"storage": uuid.uuid4().hex}).encode())


def check(place: Place) -> None:
    """Raises OSError where a storage folder is not there, such as one that is not mounted."""
    if not place.remote and not Path(place.folder(FILE)).is_file():
        raise OSError(errno.ENODEV, f"the storage {place.storage} is not there; mount it again")


def probe(place: Place) -> None:
    """Raises OSError where the storage is not there, or nothing can be written to it."""
    check(place)
    own = place.address(f"probe-{uuid.uuid4().hex}")
    try:
        store.write(own, b"0" * 2**20)
    finally:
        store.remove(own)


def publish(place: Place, path: str) -> None:
    """Sends a folder, or a file and what lies beside it under the same stem, to the storage; nothing where it is local.

    Raises:
        OSError: the storage does not answer or is full.
    """
    if not place.remote or not path or store.read(_list(place, path)) is not None:
        return
    files = {str(file.relative_to(place.storage)): file for file in _files(Path(place.folder(path)))}
    for name, file in files.items():
        with store.answering(place.remote):
            there, target = store.opened(store.joined(place.remote, "files", name))
            there.put_file(str(file), target)
    stored = {name: {"sha256": store.file_hash(file), "bytes": file.stat().st_size} for name, file in files.items()}
    listed = json.dumps(stored, indent=1).encode()
    store.write(_list(place, path), listed)
    store.write(place.folder("fetched", f"{_name(path)}.json"), listed)
    for part in _parts(Path(place.folder(path))):
        publish(place, part)


def published(place: Place, path: str) -> bool:
    """Whether something is whole in an object storage."""
    return not path or store.read(_list(place, path)) is not None


def fetch(place: Place, path: str) -> None:
    """Makes a local copy of what was published, unless there is one; nothing where the storage is local.

    Raises:
        FileNotFoundError: nobody has published it.
        ValueError: what arrived is not what was sent, twice.
    """
    if not place.remote or not path:
        return
    mark = place.folder("fetched", f"{_name(path)}.json")
    if not _whole(place, mark):
        with leases.held(f"{mark}.lease", lambda holder: None, f"fetching {path}"):  # once on this host
            if not _whole(place, mark):
                _make_room(place)
                _fetch(place, path, mark)
    os.utime(mark)
    for part in _parts(Path(place.folder(path))):
        fetch(place, part)


def _fetch(place: Place, path: str, mark: str) -> None:
    listed = store.read(_list(place, path))
    if listed is None:
        raise FileNotFoundError(f"{path} is not in {place.remote}; prepare the sweep again with --resume")
    for name, expected in json.loads(listed).items():
        target = Path(place.folder(name))
        if not target.resolve().is_relative_to(Path(place.storage).resolve()):
            raise ValueError(f"{place.remote} lists {name!r}, which is outside of the storage; it was not fetched")
        target.parent.mkdir(parents=True, exist_ok=True)
        for last in (False, True):
            partial = target.with_name(f"{target.name}.tmp-{uuid.uuid4().hex}")
            try:
                with store.answering(place.remote):
                    files, source = store.opened(store.joined(place.remote, "files", name))
                    files.get_file(source, str(partial))
                if store.file_hash(partial) == expected["sha256"]:
                    os.replace(partial, target)
                    break
                if last:
                    raise ValueError(f"{name} from {place.remote} is not what was stored there; remove it there")
            finally:
                partial.unlink(missing_ok=True)
    store.write(mark, listed)


def _whole(place: Place, mark: str) -> bool:
    """Whether every file of a local copy is there with its size; content was compared when it arrived."""
    try:
        listed = json.loads(store.read(mark) or b"null") or {"": {"bytes": -1}}
        return all(Path(place.folder(name)).stat().st_size == file["bytes"] for name, file in listed.items())
    except (OSError, ValueError):
        return False


def _make_room(place: Place) -> None:
    """Removes the copies that were not asked for longest, until they take no more than ``ORCHESTRATOR_CACHE_GB``."""
    limit = _limit(place)
    copies: list[tuple[float, int, Path, dict[str, Any]]] = []
    for mark in Path(place.folder("fetched")).glob("*.json"):
        with contextlib.suppress(FileNotFoundError, ValueError):  # another process makes room, too
            listed = json.loads(mark.read_text())
            copies.append((mark.stat().st_mtime, sum(file["bytes"] for file in listed.values()), mark, listed))
    used, now = sum(size for _, size, _, _ in copies), time.time()
    for asked, size, mark, listed in sorted(copies, key=lambda copy: copy[0]):
        if used <= limit or now - asked < _KEPT_SECONDS:
            break
        mark.unlink(missing_ok=True)
        for name in listed:
            Path(place.folder(name)).unlink(missing_ok=True)
        used -= size


def _limit(place: Place) -> float:
    text = os.environ.get("ORCHESTRATOR_CACHE_GB", "")
    if not text:
        return _DEFAULT_SHARE * shutil.disk_usage(place.storage).total
    try:
        return float(text) * 1e9
    except ValueError:
        raise ValueError(f"ORCHESTRATOR_CACHE_GB={text} is no number of gigabytes, such as 200") from None


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return sorted(file for file in path.parent.glob(f"{path.stem}.*") if file.is_file() and ".tmp-" not in file.name)


def _parts(path: Path) -> list[str]:
    """Other tables that a joined one consists of."""
    manifest = path / "manifest.json"
    if not manifest.is_file():
        return []
    return [f"{path.parent.name}/{part}" for part in json.loads(manifest.read_text()).get("parts", [])]


def _list(place: Place, path: str) -> str:
    return store.joined(place.remote, "lists", f"{_name(path)}.json")


def _name(path: str) -> str:
    return path.replace("/", "+")
