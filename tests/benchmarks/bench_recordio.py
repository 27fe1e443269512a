"""Packed training faces: how fast images are found and handed out, and what opening 5.8 million of them costs.

    python tests/benchmarks/bench_recordio.py                      # three minutes, 0.7 GiB in a temporary folder
    python tests/benchmarks/bench_recordio.py --records 20000 --images 500000 --identities 7500

First a file of 100,000 JPEGs of 112 × 112 pixels: index and raw payload against decoding, which is what waits for
them, and must be 20 × slower. Then a list of the size of MS1MV2 whose images are holes: real are all identity
records, and the headers of each identity's first and last image. The obvious alternative is a dictionary of Python
numbers, filled line by line.
"""

import argparse
import io
import multiprocessing
import os
import struct
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from orchestrator.datasets.face_records import open_index
from orchestrator.datasets.images import decode
from orchestrator.datasets.recordio import MAGIC, RecordIO, packed, record_at, write_records

_DIFFERENT = 50  # pictures
_APART = 8192  # bytes from one record of the large list to the next
_WORKERS = 4


def pictures() -> list[bytes]:
    """JPEGs of quality 95 with a gradient and some noise."""
    rng = np.random.default_rng(0)
    slope = np.linspace(0, 200, 112)[:, None, None] + np.zeros((112, 112, 3))
    found = []
    for _ in range(_DIFFERENT):
        stream = io.BytesIO()
        pixels = (slope + rng.integers(0, 56, slope.shape)).astype(np.uint8)
        Image.fromarray(pixels).save(stream, "JPEG", quality=95)
        found.append(stream.getvalue())
    return found


def faces(path: Path, count: int) -> int:
    """Writes images 1 … count, fifty of each identity; their size in bytes."""
    images, identities = pictures(), -(-count // 50)

    def payloads() -> Any:
        yield packed([count + 1.0, count + 1.0 + identities])
        for number in range(count):
            yield packed(float(number // 50), images[number % _DIFFERENT], id=number + 1)
        for number in range(identities):
            yield packed([50.0 * number + 1, min(50.0 * number + 50, count) + 1])

    write_records(path, payloads())
    return path.stat().st_size


def holes(path: Path, count: int, identities: int) -> None:
    """A list of ``count`` images; of most images not even the header is there."""
    bounds = np.linspace(1, count + 1, identities + 1).astype(np.int64)
    with open(path, "wb") as file:

        def put(key: int, payload: bytes, length: int) -> None:
            file.seek(key * _APART)
            file.write(MAGIC + struct.pack("<I", length) + payload)

        put(0, packed([count + 1.0, count + 1.0 + identities]), 32)
        for label, (first, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
            for key in {first, end - 1}:
                put(key, packed(float(label), id=key), _APART - 8)
            put(count + 1 + label, packed([float(first), float(end)]), 32)
        file.truncate((count + identities + 1) * _APART)
    with open(path.with_suffix(".idx"), "w") as lines:
        lines.writelines(f"{key}\t{key * _APART}\n" for key in range(count + identities + 1))


def read(path: str, offsets: Sequence[int]) -> int:
    return sum(len(record_at(path, offset).image) for offset in offsets)


def measure(path: str, size: int, count: int) -> None:
    seconds, index = timed(lambda: open_index(path))
    print(f"{count:,} records, {size / 2**20:,.0f} MiB: opened in {seconds:.2f} s")
    offsets, draw = index.offset_N.tolist(), np.random.default_rng(1)
    mixed = draw.permutation(index.offset_N).tolist()
    some = [record_at(path, offset).image for offset in mixed[:4000]]
    decoding = len(some) / best(lambda: [decode(data) for data in some])
    print(f"decoding                        {decoding:12,.0f} images/s")

    def report(what: str, seconds: float) -> None:
        rate = len(offsets) / seconds
        print(f"{what:32s}{rate:12,.0f} images/s   {rate / decoding:6.1f} × decoding")

    report("in the order of the file", best(lambda: read(path, offsets)))
    report("in random order", best(lambda: read(path, mixed)))
    records, keys = RecordIO(path), draw.permutation(index.key_N).tolist()
    report("by key, in random order", best(lambda: sum(len(records.payload(key)) for key in keys)))
    with multiprocessing.get_context("fork").Pool(_WORKERS) as pool:
        parts = [(path, mixed[i::_WORKERS]) for i in range(_WORKERS)]
        pool.starmap(read, [(path, offsets[:1])] * _WORKERS)  # that all are there
        report(f"random, {_WORKERS} workers on {os.cpu_count()} cores", best(lambda: pool.starmap(read, parts)))


def alternative(path: str) -> int:
    """What a reader does that parses the list in Python; labels are not even looked at."""
    with open(Path(path).with_suffix(".idx")) as lines:
        pairs = (line.split() for line in lines)
        return len({int(key): int(offset) for key, offset in pairs})


def opened(path: str) -> int:
    return len(open_index(path).key_N)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    found = work()
    return time.perf_counter() - started, found


def best(work: Callable[[], Any]) -> float:
    """Seconds of the quickest of three, as other programs may be busy."""
    return min(timed(work)[0] for _ in range(3))


def _peak_mib() -> float:
    """Of this process alone: the number of getrusage is that of whoever started it, where that was larger."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**10


def _alone(work: Callable[[str], int], path: str, answer: Any) -> None:
    before = _peak_mib()
    seconds, count = timed(lambda: work(path))
    answer.put((seconds, _peak_mib(), before, count))


def alone(what: str, work: Callable[[str], int], path: str) -> float:
    """Seconds of a piece of work in a process of its own, so that its peak memory is its own."""
    spawn = multiprocessing.get_context("spawn")
    answer = spawn.Queue()
    process = spawn.Process(target=_alone, args=(work, path, answer))
    process.start()
    seconds, peak, before, count = answer.get()
    process.join()
    print(f"{what:32s}{seconds:8.2f} s, {count:,} entries, peak {peak:,.0f} MiB ({before:,.0f} before, with torch)")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--images", type=int, default=5_822_653)
    parser.add_argument("--identities", type=int, default=85_742)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder, "small.rec"), Path(folder, "large.rec")
        measure(str(small), faces(small, args.records), args.records)
        holes(large, args.images, args.identities)
        text = large.with_suffix(".idx").stat().st_size
        print(f"{args.images:,} images of {args.identities:,} identities, list of {text / 2**20:,.0f} MiB, .rec of "
              f"{large.stat().st_size / 2**30:,.1f} GiB with holes")  # fmt: skip
        first = alone("opened the first time", opened, str(large))
        again = alone("opened again", opened, str(large))
        python = alone("dictionary of Python numbers", alternative, str(large))
        print(f"dictionary / first time {python / first:.2f}, dictionary / again {python / again:.1f}")


if __name__ == "__main__":
    main()
