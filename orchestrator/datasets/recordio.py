"""RecordIO: the file that packed training faces come in, read without the framework that wrote it.

    train.rec    records one after the other, little-endian, each at a multiple of 4 bytes
    train.idx    a line "key<TAB>byte offset" for each record

A record is ``u32 magic, u32 kind << 29 | n, n bytes, zeros up to a multiple of 4``. Kind 0 holds a whole payload. A
payload that has the magic at a multiple of 4 bytes is cut there, the magic left out: kind 1 is its first part, 2 a
middle one, 3 the last. A payload is ``u32 flag, f32 label, u64 id, u64 id2``, then ``flag`` labels f32, then the
encoded image.
"""

# Shape legend:
#   N = records, K = labels of one record

import os
import re
import struct
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import NamedTuple

import numpy as np

MAGIC = struct.pack("<I", 0xCED7230A)
WHOLE, FIRST, MIDDLE, LAST = range(4)  # the kinds of a record
_LONGEST = 2**29  # a length has 29 bits
_HEADER = struct.Struct("<IfQQ")
_BLOCK = 1 << 24  # bytes of an .idx that are parsed at once
_GATHERED = 4096  # records whose headers are looked at under one map: their pages stay in memory until it is closed


@dataclass(frozen=True, eq=False)
class Record:
    """A payload taken apart."""

    labels_K: np.ndarray  # float32; the one label of the header where flag is 0
    image: bytes  # encoded; empty in records that only describe others
    flag: int = 0  # number of labels after the header; 0: the label is in the header
    id: int = 0
    id2: int = 0

    @property
    def label(self) -> float:
        """The first label."""
        return float(self.labels_K[0])


class Headers(NamedTuple):
    """What the headers of many records say."""

    flag_N: np.ndarray
    label_N: np.ndarray  # float32, the first label
    second_N: np.ndarray  # float32, the second label; 0 where there is none
    image_N: np.ndarray  # bool: an image follows


@dataclass(frozen=True, eq=False)
class RecordIO:
    """The records of a ``.rec`` file by their key, read through a memory map that every process opens for itself.

    Without the ``.idx`` beside it the file is walked from record to record, which a warning says; keys are then
    0, 1, … in their order. Safe in forked and spawned workers; a pickled one takes its index along.

    Raises:
        FileNotFoundError: no such ``.rec``.
        ValueError: the ``.idx`` is no such list, has a key twice, or an offset that lies outside the file; or, walking
            without it, a record is damaged.
    """

    path: str | Path

    def __post_init__(self) -> None:
        len(self)  # a damaged list is found when the file is opened

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        path = Path(self.path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        listed = path.with_suffix(".idx")
        if listed.is_file():
            return _parsed(listed, path.stat().st_size)
        warnings.warn(f"{path}: no {listed.name} beside it; its records are counted one by one", stacklevel=5)
        offset_N = np.fromiter(_walked(path), np.int64)
        return np.arange(len(offset_N)), offset_N

    @property
    def keys(self) -> np.ndarray:
        """(N,) int64, ascending."""
        return self._index[0]

    @property
    def offsets(self) -> np.ndarray:
        """(N,) int64 byte offset of the record of every key."""
        return self._index[1]

    def payload(self, key: int) -> bytes:
        """The bytes that were written under a key.

        Raises:
            ValueError: no such key, or a damaged record, by file and byte offset.
        """
        return payload_at(self.path, self._offset(key))

    def record(self, key: int) -> Record:
        """Labels and encoded image of a key; raises as :meth:`payload`, and for a payload without a whole header."""
        return record_at(self.path, self._offset(key))

    def _offset(self, key: int) -> int:
        key_N, offset_N = self._index
        if not len(key_N):
            raise ValueError(f"{self.path}: no record of key {key}; the file is empty")
        row = int(key - key_N[0])  # where no key is left out
        if not (0 <= row < len(key_N) and key_N[row] == key):
            row = min(int(key_N.searchsorted(key)), len(key_N) - 1)
        if key_N[row] != key:
            raise ValueError(f"{self.path}: no record of key {key}; keys are {key_N[0]} to {key_N[-1]}")
        return int(offset_N[row])


def payload_at(path: str | Path, offset: int) -> bytes:
    """The payload of the record at a byte offset, its parts joined.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged record, by file and byte offset.
    """
    data = _opened(str(path), os.getpid())
    parts: list[bytes] = []
    while True:
        kind, length = _checked(path, data[offset : offset + 8], offset, len(data), bool(parts))
        parts.append(data[offset + 8 : offset + 8 + length])
        if kind in (WHOLE, LAST):
            return MAGIC.join(parts)
        offset += 8 + length + -length % 4


def record_at(path: str | Path, offset: int) -> Record:
    """Labels and encoded image of the record at a byte offset; raises as :func:`payload_at`."""
    payload = payload_at(path, offset)
    try:
        return unpacked(payload)
    except ValueError as error:
        raise ValueError(f"{path}: byte {offset}: {error}") from error


def unpacked(payload: bytes) -> Record:
    """A payload as :func:`packed` makes it, taken apart.

    Raises:
        ValueError: shorter than its header says.

    >>> record = unpacked(packed([7.0, 10.0], b"image"))
    >>> record.label, record.labels_K.tolist(), record.image
    (7.0, [7.0, 10.0], b'image')
    """
    flag = struct.unpack_from("<I", payload)[0] if len(payload) >= _HEADER.size else 0
    start = _HEADER.size + 4 * flag
    if len(payload) < start:
        raise ValueError(f"the payload has {len(payload)} bytes, its header and {flag} labels need {start}")
    _, label, number, second = _HEADER.unpack_from(payload)
    labels_K = np.frombuffer(payload, "<f4", flag, _HEADER.size) if flag else np.array([label], np.float32)
    return Record(labels_K, payload[start:], flag, number, second)


def packed(label: float | Sequence[float], image: bytes = b"", id: int = 0, id2: int = 0) -> bytes:
    """A payload of one label, which the header holds, or of several, which follow it."""
    if isinstance(label, Sequence):
        return _HEADER.pack(len(label), 0, id, id2) + struct.pack(f"<{len(label)}f", *label) + image
    return _HEADER.pack(0, label, id, id2) + image


def write_records(path: str | Path, payloads: Iterable[bytes], keys: Iterable[int] | None = None) -> int:
    """Writes ``path`` and its ``.idx``, under other names until both are complete.

    Args:
        path: of the ``.rec``.
        payloads: in the order of the file.
        keys: of the payloads; default 0, 1, …

    Returns:
        the number of records.

    Raises:
        ValueError: a payload of 2²⁹ bytes or more, or not as many keys as payloads.
    """
    path = Path(path)
    final = path, path.with_suffix(".idx")
    hidden = [one.with_name(f".{one.name}.{os.getpid()}") for one in final]
    numbered = enumerate(payloads) if keys is None else zip(keys, payloads, strict=True)
    count = offset = 0
    try:
        with open(hidden[0], "wb") as records, open(hidden[1], "w", newline="\n") as lines:
            for key, payload in numbered:
                if len(payload) >= _LONGEST:
                    raise ValueError(
                        f"{path}: payload {key} has {len(payload):,} bytes, a record holds fewer than 2**29"
                    )
                lines.write(f"{key}\t{offset}\n")
                offset += records.write(b"".join(_parts(payload)))
                count += 1
        for temporary, place in zip(hidden, final, strict=True):
            os.replace(temporary, place)
    finally:
        for temporary in hidden:
            temporary.unlink(missing_ok=True)
    return count


def headers(path: str | Path, offset_N: np.ndarray) -> Headers:
    """The headers of many records, gathered without a loop over them.

    Args:
        path: of the ``.rec``.
        offset_N: byte offset of each record.

    Raises:
        ValueError: a damaged record, by file and byte offset.
    """
    blocks = [_gathered(path, offset_N[i : i + _GATHERED]) for i in range(0, max(len(offset_N), 1), _GATHERED)]
    return Headers(*map(np.concatenate, zip(*blocks, strict=True)))


def _gathered(path: str | Path, offset_N: np.ndarray) -> Headers:
    size = os.path.getsize(path)
    if not len(offset_N):
        return Headers(np.zeros(0, np.uint32), *np.zeros((2, 0), np.float32), np.zeros(0, bool))
    # A map of its own, so that the pages that were looked at are given back with it.
    words = np.memmap(path, "<u4", "r", shape=(size // 4,))
    column = np.minimum(offset_N[:, None] // 4 + np.arange(10), len(words) - 1)  # what lies beyond is not used
    word = np.asarray(words[column])
    length_N = (word[:, 1] & (_LONGEST - 1)).astype(np.int64)
    kind_N, flag_N = word[:, 1] >> 29, word[:, 2]
    whole_N = (word[:, 0] == struct.unpack("<I", MAGIC)[0]) & (kind_N == WHOLE)
    whole_N &= offset_N + 8 + length_N + -length_N % 4 <= size
    start_N = _HEADER.size + 4 * flag_N.astype(np.int64)
    whole_N &= length_N >= start_N
    real = word.view("<f4")
    label_N = np.where(flag_N > 0, real[:, 8], real[:, 3])
    second_N = np.where(flag_N > 1, real[:, 9], np.float32(0))
    image_N = length_N > start_N
    for row in np.flatnonzero(~whole_N):  # several parts, which are rare, or damaged, which says so
        record = record_at(path, int(offset_N[row]))
        flag_N[row], label_N[row], image_N[row] = record.flag, record.label, len(record.image) > 0
        second_N[row] = record.labels_K[1] if record.flag > 1 else 0
    return Headers(flag_N, label_N, second_N, image_N)


def _parts(payload: bytes) -> Iterator[bytes]:
    start, found = 0, payload.find(MAGIC)
    while found >= 0:
        if found % 4 == 0:
            yield _record(MIDDLE if start else FIRST, payload[start:found])
            start = found + 4
        found = payload.find(MAGIC, start if found % 4 == 0 else found + 1)
    yield _record(LAST if start else WHOLE, payload[start:])


def _record(kind: int, part: bytes) -> bytes:
    return MAGIC + struct.pack("<I", kind << 29 | len(part)) + part + bytes(-len(part) % 4)


def _checked(path: str | Path, head: bytes, offset: int, size: int, begun: bool) -> tuple[int, int]:
    """Kind and length of the record that begins at an offset; ``begun``: the last one was no last part."""
    if len(head) < 8:
        problem = f"the file ends at byte {size} where a record must begin; it is truncated"
    elif head[:4] != MAGIC:
        problem = f"a record must begin with {MAGIC.hex()}, found {head[:4].hex()}; it is damaged"
    else:
        word = int.from_bytes(head[4:], "little")
        kind, length = word >> 29, word & (_LONGEST - 1)
        if kind > LAST or (kind in (MIDDLE, LAST)) != begun:
            expected = "2 or 3, a further part" if begun else "0 or 1, a beginning"
            problem = f"the record is of kind {kind}, expected {expected}; the file is damaged"
        elif offset + 8 + length + -length % 4 > size:
            problem = f"a record of {length:,} bytes ends beyond the file's {size:,}; it is truncated"
        else:
            return kind, length
    raise ValueError(f"{path}: byte {offset}: {problem}")


_MAPS: dict[tuple[str, int], tuple[int, mmap | bytes]] = {}


def _opened(path: str, process: int) -> mmap | bytes:
    # One map per process: workers that are started anew have none, and forked ones share no handle.
    found = _MAPS.get((path, process))
    if found is not None:
        # To read beyond the end of a file that was shortened since would end the process without a word.
        stat = os.fstat(found[0])
        if stat.st_nlink and stat.st_size == len(found[1]):
            return found[1]
    file = os.open(path, os.O_RDONLY)
    # An empty file cannot be mapped.
    data = mmap(file, 0, access=ACCESS_READ) if os.fstat(file).st_size else b""
    _MAPS[path, process] = file, data
    return data


def _walked(path: Path) -> Iterator[int]:
    """Offsets of all records; headers are read, not mapped, so that no page of the images stays in memory."""
    size, offset, begun = path.stat().st_size, 0, False
    with open(path, "rb", buffering=0) as file:
        while offset < size:
            if not begun:
                yield offset
            file.seek(offset)
            kind, length = _checked(path, file.read(8), offset, size, begun)
            begun = kind in (FIRST, MIDDLE)
            offset += 8 + length + -length % 4
    if begun:
        raise ValueError(f"{path}: byte {size}: the file ends before the last part of a record; it is truncated")


def _parsed(path: Path, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and offsets of an ``.idx``, by key."""
    blocks, rest, line = [np.zeros((0, 2), np.int64)], b"", 1
    with open(path, "rb") as file:
        while True:
            read = file.read(_BLOCK)
            text, newline, rest = (rest + read).rpartition(b"\n") if read else (rest, b"", b"")
            if text.strip():
                blocks.append(_pairs(path, text.rstrip() + b"\n", line))
            line += text.count(b"\n") + len(newline)
            if not read:
                break
    pair_N2 = np.concatenate(blocks)
    key_N, offset_N = np.ascontiguousarray(pair_N2.T)
    if (key_N[1:] <= key_N[:-1]).any():
        order = np.argsort(key_N, kind="stable")
        key_N, offset_N = key_N[order], offset_N[order]
        twice = np.flatnonzero(key_N[1:] == key_N[:-1])
        if len(twice):
            raise ValueError(f"{path}: key {key_N[twice[0]]} is listed twice; remove the file to have it built anew")
    wrong = np.flatnonzero((offset_N % 4 != 0) | (offset_N > size - 8))
    if len(wrong):
        key, offset = key_N[wrong[0]], offset_N[wrong[0]]
        raise ValueError(
            f"{path}: key {key} lies at byte {offset}, which is no beginning of a record in a file of {size} bytes; "
            f"the .rec is truncated, or the list is of another file"
        )
    return key_N, offset_N


def _pairs(path: Path, text: bytes, line: int) -> np.ndarray:
    """(n, 2) numbers of complete lines, the first of which has the number ``line`` in the file."""
    letters = np.frombuffer(text, np.uint8)
    marks = letters[(letters == 9) | (letters == 10)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # how some releases say that text is no number
        try:
            numbers = np.fromstring(text, np.int64, sep=" ")
        except ValueError:
            numbers = np.zeros(0, np.int64)
    alternate = len(marks) % 2 == 0 and (marks[0::2] == 9).all() and (marks[1::2] == 10).all()
    if len(numbers) != len(marks) or not alternate or numbers.min() < 0:
        for number, row in enumerate(text.splitlines(), line):
            if not re.fullmatch(rb"(\d{1,18}\t\d{1,18})?\r?", row):
                raise ValueError(f"{path} line {number} is {row[:80]!r}, expected a key, a tab and a byte offset")
    return numbers.reshape(-1, 2)
