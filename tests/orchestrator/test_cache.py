"""Caches: built once, never used when damaged, nothing left of a killed build."""

import json
import multiprocessing
import os
import pickle
import signal
import time
import warnings

import numpy as np
import pytest
import torch

from orchestrator import cache
from orchestrator.datasets.folder import load
from orchestrator.datasets.images import Folder, ImageSet


def blocks(rows=10, width=4, step=3, counter=None):
    def make():
        if counter is not None:
            counter.append(1)
        values = np.arange(rows * width, dtype=np.float32).reshape(rows, width)
        for start in range(0, rows, step):
            yield {"value": values[start : start + step]}

    return make


def build_slowly(root, log):
    def make():
        with open(log, "a") as handle:
            handle.write("built\n")
        time.sleep(0.5)
        yield from blocks()()

    assert len(cache.ensure(root, "x", {"a": 1}, make)) == 10


def build_for_ever(root, started):
    def make():
        yield from blocks()()
        started.set()
        time.sleep(60)

    cache.ensure(root, "x", {"a": 1}, make)


@pytest.mark.parametrize("batch_bytes", [1, 2**25])
def test_rows_come_back_by_number(tmp_path, monkeypatch, batch_bytes):
    monkeypatch.setattr(cache, "_BATCH_BYTES", batch_bytes)
    rows = cache.ensure(tmp_path, "x", {"a": 1}, blocks())
    expected = np.arange(40, dtype=np.float32).reshape(10, 4)
    for wanted in ([0], [9, 0, 3, 3], np.arange(10), []):
        np.testing.assert_array_equal(rows(wanted), expected[np.array(wanted, dtype=int)])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(rows))([2]), expected[[2]])
    with pytest.raises(IndexError, match="between 0 and 9"):
        rows([10])


def test_the_second_caller_does_not_build(tmp_path):
    counter = []
    for _ in range(2):
        cache.ensure(tmp_path, "x", {"a": 1}, blocks(counter=counter), verify=True)
    cache.ensure(tmp_path, "x", {"a": 2}, blocks(counter=counter))
    assert len(counter) == 2


def test_concurrent_builders_build_once(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=build_slowly, args=(tmp_path / "c", tmp_path / "log")) for _ in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert [w.exitcode for w in workers] == [0] * 4
    assert (tmp_path / "log").read_text() == "built\n"


def test_a_killed_build_leaves_nothing_behind(tmp_path):
    context = multiprocessing.get_context("fork")
    started = context.Event()
    builder = context.Process(target=build_for_ever, args=(tmp_path, started))
    builder.start()
    assert started.wait(20)
    os.kill(builder.pid, signal.SIGKILL)
    builder.join()
    assert not list(tmp_path.glob("x-????????????????????????????????"))  # nothing that could be taken for a cache
    assert len(cache.ensure(tmp_path, "x", {"a": 1}, blocks())) == 10
    assert [p.name for p in tmp_path.glob("*tmp*")] == []


def test_a_failing_build_leaves_nothing_behind(tmp_path):
    def make():
        yield {"value": np.ones((2, 3), np.float32)}
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cache.ensure(tmp_path, "x", {}, make)
    with pytest.raises(ValueError, match="not finite"):
        cache.ensure(tmp_path, "x", {}, lambda: iter([{"value": np.full((2, 3), np.nan, np.float32)}]))
    with pytest.raises(ValueError, match="nothing to store"):
        cache.ensure(tmp_path, "x", {}, lambda: iter(()))
    assert [p.name for p in tmp_path.iterdir()] == [".locks"]


def truncate(folder):
    data = folder / "data.arrow"
    data.write_bytes(data.read_bytes()[:-7])


def flip_a_bit(folder):
    data = bytearray((folder / "data.arrow").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "data.arrow").write_bytes(data)


def other_teacher(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["made_from"]["a"] = 3
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "data.arrow has .* bytes, expected"),
        (flip_a_bit, "the content of data.arrow has changed"),
        (other_teacher, "was made from another a"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda f: (f / "data.arrow").unlink(), "data.arrow has 0 bytes"),
    ],
)
def test_damage_is_named_and_built_again(tmp_path, damage, message):
    rows = cache.ensure(tmp_path, "x", {"a": 1}, blocks())
    damage(rows.folder)
    with pytest.raises(cache.DamagedCache, match=message):
        cache.open_rows(rows.folder, {"a": 1, "format": cache.FORMAT}, verify=True)
    counter = []
    with pytest.warns(UserWarning, match=f"{message}.*building it again"):
        again = cache.ensure(tmp_path, "x", {"a": 1}, blocks(counter=counter), verify=True)
    assert counter == [1] and again([1]).tolist() == [[4, 5, 6, 7]]


def test_fingerprints_follow_content_not_place(tiny_root, tmp_path):
    import shutil

    train = load(str(tiny_root)).train
    first = cache.indexed(train, tmp_path / "a")
    shutil.copytree(tiny_root, tmp_path / "moved")
    moved = cache.indexed(load(str(tmp_path / "moved")).train, tmp_path / "b")
    assert first.fingerprint == moved.fingerprint != ""
    victim = tmp_path / "moved" / train.keys[0]
    victim.write_bytes((tmp_path / "moved" / train.keys[1]).read_bytes())
    assert cache.indexed(load(str(tmp_path / "moved")).train, tmp_path / "b").fingerprint != moved.fingerprint


def test_unreadable_images_are_named_counted_and_only_skipped_on_request(tiny_root, tmp_path):
    keys = ("good.png", "bad.png", "gone.png")
    (tmp_path / "good.png").write_bytes((tiny_root / load(str(tiny_root)).train.keys[0]).read_bytes())
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:300])
    (tmp_path / "gone.png").write_bytes(b"")
    images = ImageSet("x", keys, np.array([0, 1, 2]), Folder(str(tmp_path)))
    with pytest.raises(OSError, match=r"x: 2 of 3 images cannot be read: bad.png, gone.png; .*skip_unreadable=true"):
        cache.indexed(images, tmp_path / "c")
    with pytest.warns(UserWarning, match="2 of 3 images cannot be read"):
        left = cache.indexed(images, tmp_path / "c", skip_unreadable=True)
    assert left.keys == ("good.png",) and left.identity.tolist() == [0]


def test_pixels_are_the_decoded_frames(tiny_root, tmp_path):
    from orchestrator.datasets.images import Frames

    train = cache.indexed(load(str(tiny_root)).train, tmp_path)
    rows = cache.pixels(train, (12, 10), tmp_path)
    np.testing.assert_array_equal(rows([5, 2]), Frames(train, (12, 10))([5, 2]).numpy())


def test_weights_hash_sees_values_names_and_buffers():
    torch.manual_seed(0)
    net = torch.nn.BatchNorm1d(3)
    first = cache.weights_hash(net)
    net.running_mean[0] = 1
    assert cache.weights_hash(net) != first


def test_nothing_warns_when_all_is_well(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.ensure(tmp_path, "x", {"a": 1}, blocks())
        cache.ensure(tmp_path, "x", {"a": 1}, blocks(), verify=True)
