"""Faces as they are passed on, in forms that need no pickle and no reader of their own.

    python -m orchestrator.datasets.convert lfw.bin lfw.npz          a verification pack, see verification_pack.py
    python -m orchestrator.datasets.convert train.rec faces          faces/<label>/<key>.jpg or .png
    python -m orchestrator.datasets.convert train.rec faces.zip      the same files in an archive

Encoded images are copied, never encoded anew. Labels and keys are written with as many digits as the largest has, so
that their order by name is that of their numbers. Started again it goes on: what is there and the same is left, what
is there and another is refused.
"""

import argparse
import os
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from orchestrator.datasets import verification_pack
from orchestrator.datasets.face_records import Index, open_index
from orchestrator.datasets.recordio import record_at
from orchestrator.needs import Report, silent

_SUFFIXES = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png"}
_EVERY = 0.5  # seconds between two lines of progress


def convert(source: str | Path, destination: str | Path, progress: Report = silent) -> str:
    """Converts a ``.bin`` or a ``.rec``; one line for people that counts what was done.

    Raises:
        FileNotFoundError: no such source.
        ValueError: a damaged source, another kind of file, or a destination that holds something else.
    """
    source, destination = Path(source), Path(destination)
    if source.suffix == ".bin" and destination.suffix == ".npz":
        return _pack(source, destination)
    if source.suffix != ".rec" or destination.suffix in (".npz", ".bin", ".rec"):
        raise ValueError(
            f"{source} to {destination}: expected <pack>.bin and <pack>.npz, or <faces>.rec and a folder or <faces>.zip"
        )
    return _images(source, destination, progress)


def _pack(source: Path, destination: Path) -> str:
    verification_pack.load(source)  # that every image can be decoded
    found = verification_pack.opened(source)
    count = f"{len(found.encoded):,} images, {len(found.same_P):,} pairs"
    if destination.exists():
        there = verification_pack.opened(destination)
        if there.encoded != found.encoded or not np.array_equal(there.same_P, found.same_P):
            raise ValueError(f"{destination} holds another pack; remove it, or name another file")
        return f"{count}: already in {destination}"
    destination.parent.mkdir(parents=True, exist_ok=True)
    verification_pack.save(destination, found.encoded, found.same_P)
    return f"{count}: written to {destination}"


def _images(source: Path, destination: Path, progress: Report) -> str:
    index = open_index(source)
    others: list[str] = []
    members = _members(source, index, others, progress)
    store = _into_zip if destination.suffix == ".zip" else _into_folder
    written, kept = store(members, destination)
    if others:
        others = [f"{len(others):,} are neither JPEG nor PNG and were left out, first {others[0]}"]
    labels = len(np.unique(index.label_N))
    return "; ".join([
        f"{len(index.key_N):,} images of {labels:,} identities: {written:,} written to {destination}, "
        f"{kept:,} were already there", *others,
    ])  # fmt: skip


def _members(source: Path, index: Index, others: list[str], progress: Report) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every image; those of another format go to ``others`` by key and place."""
    digits = [len(str(column.max())) for column in (index.label_N, index.key_N)]
    for number, (key, offset, label) in enumerate(zip(*index, strict=True), 1):
        image = record_at(source, int(offset)).image
        suffix = next((name for magic, name in _SUFFIXES.items() if image.startswith(magic)), None)
        if suffix is None:
            others.append(f"key {key} at byte {offset}")
        else:
            yield f"{label:0{digits[0]}d}/{key:0{digits[1]}d}.{suffix}", image
        progress("converting", number, len(index.key_N))


def _into_folder(members: Iterator[tuple[str, bytes]], folder: Path) -> tuple[int, int]:
    written = kept = 0
    hidden = folder / ".part"
    made = ""
    try:
        for name, image in members:
            path = folder / name
            if path.parent.name != made:
                path.parent.mkdir(parents=True, exist_ok=True)
                made = path.parent.name
            if path.exists():
                if path.stat().st_size != len(image) or path.read_bytes() != image:
                    raise ValueError(f"{path} holds another image; remove it, or name another folder")
                kept += 1
                continue
            hidden.write_bytes(image)
            os.replace(hidden, path)
            written += 1
    finally:
        hidden.unlink(missing_ok=True)
    return written, kept


def _into_zip(members: Iterator[tuple[str, bytes]], path: Path) -> tuple[int, int]:
    """An archive has its table at its end, so it grows under another name; ended from outside it starts anew."""
    hidden = path.with_name(f"{path.name}.part")
    if path.exists():
        return 0, _compare(members, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if hidden.exists() and not zipfile.is_zipfile(hidden):
        hidden.unlink()
    written = kept = 0
    with zipfile.ZipFile(hidden, "a", zipfile.ZIP_STORED) as archive:
        there = {member.filename: (member.file_size, member.CRC) for member in archive.infolist()}
        for name, image in members:
            if name not in there:
                archive.writestr(zipfile.ZipInfo(name), image)
                written += 1
            elif there[name] == (len(image), zlib.crc32(image)):
                kept += 1
            else:
                raise ValueError(f"{hidden} holds another {name}; remove it, or name another archive")
        if kept != len(there):
            raise ValueError(f"{hidden} holds {len(there) - kept:,} files of another source; remove it")
    os.replace(hidden, path)
    return written, kept


def _compare(members: Iterator[tuple[str, bytes]], path: Path) -> int:
    """How many members a finished archive has; raises ValueError unless it has these and no other."""
    count = 0
    with zipfile.ZipFile(path) as archive:
        there = {member.filename: (member.file_size, member.CRC) for member in archive.infolist()}
    for name, image in members:
        if there.get(name) != (len(image), zlib.crc32(image)):
            raise ValueError(f"{path} is there and holds something else than {name}; remove it, or name another")
        count += 1
    if count != len(there):
        raise ValueError(f"{path} is there and holds {len(there) - count:,} other files; remove it, or name another")
    return count


def _shown(clock: Callable[[], float] = time.monotonic) -> Report:
    """One line on the error stream that is written over: how many of how many, and how long it will take yet."""
    started = clock()
    last = started

    def report(what: str, done: int, total: int) -> None:
        nonlocal last
        now = clock()
        if now - last < _EVERY and done < total:
            return
        last = now
        left = (now - started) / done * (total - done)
        end = "\n" if done == total else ""
        print(f"\r{what} {done:,} of {total:,} ({100 * done // total} %), {left / 60:.1f} minutes left", end=end,
              file=sys.stderr, flush=True)  # fmt: skip

    return report


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m orchestrator.datasets.convert", description="Packed faces to files that need no pickle."
    )
    parser.add_argument("source", help="<pack>.bin or <faces>.rec")
    parser.add_argument("destination", help="<pack>.npz, a folder, or <faces>.zip")
    args = parser.parse_args(arguments)
    warnings.showwarning = lambda message, *where: print(f"warning: {message}", file=sys.stderr)
    try:
        print(convert(args.source, args.destination, _shown()))
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
