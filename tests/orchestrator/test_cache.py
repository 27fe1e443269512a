"""Caches: built once, never used when damaged, nothing left of a killed build."""

import dataclasses
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

from orchestrator import cache, find, indexing, tables
from orchestrator.datasets.folder import load
from orchestrator.datasets.images import Chosen, Folder, ImageSet
from orchestrator.method import Where
from orchestrator.needs import Place, digest


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
    first = indexing.indexed(train, tmp_path / "a")
    shutil.copytree(tiny_root, tmp_path / "moved")
    moved = indexing.indexed(load(str(tmp_path / "moved")).train, tmp_path / "b")
    assert first.fingerprint == moved.fingerprint != ""
    victim = tmp_path / "moved" / train.keys[0]
    victim.write_bytes((tmp_path / "moved" / train.keys[1]).read_bytes())
    assert indexing.indexed(load(str(tmp_path / "moved")).train, tmp_path / "b").fingerprint != moved.fingerprint


def test_unreadable_images_are_named_counted_and_only_skipped_on_request(tiny_root, tmp_path):
    keys = ("good.png", "bad.png", "gone.png")
    (tmp_path / "good.png").write_bytes((tiny_root / load(str(tiny_root)).train.keys[0]).read_bytes())
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:300])
    (tmp_path / "gone.png").write_bytes(b"")
    images = ImageSet("x", keys, np.array([0, 1, 2]), Folder(str(tmp_path)))
    with pytest.raises(OSError, match=r"x: 2 of 3 images cannot be read: bad.png, gone.png; .*skip_unreadable=true"):
        indexing.indexed(images, tmp_path / "c")
    with pytest.warns(UserWarning, match="2 of 3 images cannot be read"):
        left = indexing.indexed(images, tmp_path / "c", skip_unreadable=True)
    assert tuple(left.keys) == ("good.png",) and left.identity.tolist() == [0] and left.num_identities == 1


def test_pixels_are_the_decoded_frames(tiny_root, tmp_path):
    from orchestrator.datasets.images import Frames

    train = indexing.indexed(load(str(tiny_root)).train, tmp_path)
    rows = tables.pixels(train, (12, 10), tmp_path)
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


# --- Columns of text --------------------------------------------------------------------------------------------------

WORDS = ["", "a/b.png", "Straße 7", "人.jpg", "x" * 300]


@pytest.mark.parametrize("batch_bytes", [1, 2**25])
def test_texts_come_back_one_by_one(tmp_path, monkeypatch, batch_bytes):
    monkeypatch.setattr(cache, "_BATCH_BYTES", batch_bytes)

    def make():
        for start in range(0, 5, 2):
            part = WORDS[start : start + 2]
            yield {"key": part, "value": np.arange(start, start + len(part), dtype=np.int64)[:, None]}

    texts = cache.ensure(tmp_path, "x", {"a": 1}, make).text("key")
    assert list(texts) == WORDS and len(texts) == 5 and texts[-1] == WORDS[-1] and texts[-5] == ""
    for outside in (5, -6):
        with pytest.raises(IndexError):
            texts[outside]
    assert Chosen(texts, np.array([4, 1])).listed() == (WORDS[4], WORDS[1])


# --- The table of a set -----------------------------------------------------------------------------------------------


class Untouched:
    """A reader that nobody may ask."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise AssertionError(f"{name} of a reader was used")


def same(one: ImageSet, other: ImageSet) -> bool:
    pairs = zip((one.identity, one.camera, one.labels), (other.identity, other.camera, other.labels), strict=True)
    equal = all((a is None) == (b is None) and (a is None or np.array_equal(a, b)) for a, b in pairs)
    return equal and tuple(one.keys) == tuple(other.keys) and one.name == other.name


@pytest.mark.parametrize("side", ["train", "gallery"])
def test_a_set_opened_from_its_table_is_the_listed_one_and_reads_no_file(tiny_root, tmp_path, side):
    images = getattr(load(str(tiny_root)), side)
    if side == "train":
        images = ImageSet(images.name, images.keys, images.identity, images.reader)  # without cameras
    table = indexing.index(images, tmp_path)
    checked = indexing.checked(images, table)
    opened = indexing.open_index(table.folder, images.name, Untouched(), images.camera is not None, checked.fingerprint)
    assert same(opened, images) and same(checked, images)
    assert opened.fingerprint == checked.fingerprint != ""
    assert opened.num_identities == images.num_identities


def test_what_cannot_be_read_is_left_out_of_the_opened_set_too(tiny_root, tmp_path):
    keys = [f"{name}.png" for name in "abcd"]
    whole = (tiny_root / load(str(tiny_root)).train.keys[0]).read_bytes()
    for key in keys:
        (tmp_path / key).write_bytes(whole[:99] if key == "b.png" else whole)
    images = ImageSet("x", keys, np.array([5, 6, 9, 9]), Folder(str(tmp_path)), np.array([1, 2, 3, 4]))
    table = indexing.index(images, tmp_path / "c")
    with pytest.warns(UserWarning, match=r"x: 1 of 4 images cannot be read: b\.png; left out"):
        checked = indexing.checked(images, table, skip_unreadable=True)
    opened = indexing.open_index(table.folder, "x", Untouched(), True, checked.fingerprint)
    for found in (opened, checked):
        assert tuple(found.keys) == ("a.png", "c.png", "d.png") and found.camera.tolist() == [1, 3, 4]
        assert found.labels.tolist() == [0, 1, 1], "classes are counted anew"
    left = ImageSet("x", found.keys, found.identity, images.reader, found.camera)
    assert indexing.indexed(left, tmp_path / "c").fingerprint == checked.fingerprint


def test_a_table_is_made_again_only_when_a_file_or_the_listing_changed(tiny_root, tmp_path, monkeypatch):
    images = load(str(tiny_root)).gallery
    first = indexing.index(images, tmp_path)
    monkeypatch.setattr(Folder, "read", lambda reader, key: pytest.fail(f"read {key}"))
    assert indexing.index(images, tmp_path).folder == first.folder
    other = ImageSet(images.name, images.keys, images.identity + 1, images.reader, images.camera)
    with pytest.raises(pytest.fail.Exception, match="read gallery/"):
        indexing.index(other, tmp_path)


def test_a_reader_s_own_checksum_stands_for_reading(tmp_path):
    class Known:
        def checksum(self, key):
            return key.encode().ljust(32)

        def stamp(self, keys):
            return "1"

        def read(self, key):
            raise AssertionError("read")

    images = ImageSet("x", ("a", "b"), np.array([0, 1]), Known())
    table = indexing.index(images, tmp_path)
    assert table([1], "sha256").tobytes() == b"b".ljust(32) and indexing.checked(images, table).fingerprint


@pytest.mark.parametrize("count", [1, 2, 5])
def test_streamed_digests_are_those_of_the_whole(monkeypatch, count):
    """In blocks of two: a set of millions has the fingerprint that it would have in one piece."""
    ranges = cache.ranges
    monkeypatch.setattr(cache, "ranges", lambda total, step: ranges(total, 2))
    keys, identity, camera = WORDS[:count], np.arange(count) * 3, np.arange(count) - 1
    hashes = [f"{i:064x}" for i in range(count)]
    images = ImageSet("x/ü", keys, identity, None, camera)
    listed = [keys, identity.tolist(), camera.tolist()]
    assert indexing.listing_digest(keys, identity, camera) == digest(listed)
    assert indexing._content_digest(images, iter(hashes)) == digest(["x/ü", [*listed, "".join(hashes)]])
    alone = ImageSet("x/ü", keys, identity, None)
    expected = digest(["x/ü", [keys, identity.tolist(), [-1] * count, "".join(hashes)]])
    assert indexing._content_digest(alone, iter(hashes)) == expected


# Of version 0.3: sweeps and students that it stored are compared with them.
FINGERPRINTS = {
    "demo": {
        "train": "02e1454a0452b65fedf864a53aa20bd6fbc48ac4b8a3724d51b952925b99031f",
        "query": "60b6d94c6542993adcd47b027db387e4e6b85c36777d74a0f97c07d8317042f9",
        "gallery": "890f0c1a00081ba916a610099f872be951cb8fe68d5a8162d55eacff081840f2",
    },
    "demo_people": {
        "train": "593f0ed2c5575fe384cb1f6edf927d270a3dc456ecaea7ade9a60695663a9a76",
        "query": "c022973df903bf6b2db3d0777ea2eb8355cc83f31354bcb05b433e1a2c1dff33",
        "gallery": "474fd9768614c739223137ddaaecb84da22974dd1369317b20ace8e8d5910933",
    },
}


EVERY_SIDE = [(name, side) for name, sides in FINGERPRINTS.items() for side in sides]


@pytest.mark.parametrize(
    ("name", "side"),
    [pytest.param(*case, marks=() if case[1] == "query" else pytest.mark.slow) for case in EVERY_SIDE],
)
def test_fingerprints_are_those_of_03(name, side, tmp_path):
    images = find.dataset(name)("").sets()[side]
    assert indexing.indexed(images, tmp_path).fingerprint == FINGERPRINTS[name][side]


# --- Parts, presence, neighbours --------------------------------------------------------------------------------------


def test_shards_are_one_table_without_a_copy(tmp_path):
    def part(number: int) -> cache.Rows:
        values = np.arange(4, dtype=np.float32).reshape(2, 2) + 10 * number
        return cache.ensure(
            tmp_path, "x", {"shard": number}, lambda: iter([{"value": values, "key": ["a", str(number)]}])
        )

    parts = [part(number) for number in range(3)]
    whole = cache.joined(tmp_path, "x", {"a": 1}, parts)
    assert len(whole) == 6 and whole([5, 0, 2]).tolist() == [[22, 23], [0, 1], [10, 11]]
    assert whole.all().shape == (6, 2) and list(whole.text("key")) == ["a", "0", "a", "1", "a", "2"]
    assert not (whole.folder / "data.arrow").exists() and whole.folders() == [rows.folder for rows in parts]
    assert cache.joined(tmp_path, "x", {"a": 1}, parts).manifest == whole.manifest
    assert cache.there(tmp_path, "x", {"a": 1}).manifest == whole.manifest
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(whole))([3]), [[12, 13]])
    flip_a_bit(parts[1].folder)
    with pytest.raises(cache.DamagedCache, match=r"content of data\.arrow has changed"):
        cache.open_rows(whole.folder, verify=True)
    truncate(parts[1].folder)
    assert cache.there(tmp_path, "x", {"a": 1}) is None, "a table is as whole as its parts"


def test_what_is_there_is_found_and_nothing_is_built(tmp_path):
    assert cache.there(tmp_path / "none", "x", {"a": (1, 2)}) is None and not (tmp_path / "none").exists()
    rows = cache.ensure(tmp_path, "x", {"a": (1, 2)}, blocks())
    assert cache.there(tmp_path, "x", {"a": [1, 2]}).manifest == rows.manifest
    assert cache.there(tmp_path, "x", {"a": [1, 3]}) is None
    truncate(rows.folder)
    assert cache.there(tmp_path, "x", {"a": [1, 2]}) is None
    assert cache.folder_below(str(tmp_path), rows) == rows.folder.name


@pytest.mark.parametrize(
    ("top_k", "images", "count"),
    [(2, 10_000, 256), (256, 10_000, 256), (257, 10_000, 512), (512, 10_000, 512), (513, 600, 600), (10, 40, 40)],
)
def test_a_table_of_neighbours_serves_a_sweep_over_their_number(top_k, images, count):
    assert tables.neighbour_count(top_k, images) == count


def test_neighbours_are_the_nearest_of_the_whole_set(tmp_path):
    values = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
    embedded = cache.ensure(tmp_path, "e", {"a": 1}, lambda: iter([{"value": values[:5]}, {"value": values[5:]}]))
    found = tables.neighbours(embedded, 4, tmp_path)
    normal = values / np.linalg.norm(values, axis=1, keepdims=True)
    cosine = normal @ normal.T
    order = np.argsort(-cosine, axis=1, kind="stable")[:, :4]
    assert found.all("index").tolist() == order.tolist() and (order[:, 0] == np.arange(9)).all()
    np.testing.assert_allclose(found.all("cosine"), np.take_along_axis(cosine, order, 1), atol=1e-6)
    assert tables.neighbours(embedded, 99, tmp_path).all("index").shape == (9, 9)


def test_a_resident_table_gives_the_rows_of_its_table(tmp_path):
    rng = np.random.default_rng(0)
    parts = []
    for number in range(2):
        block = {
            "value": rng.integers(0, 256, (7, 3, 4), dtype=np.uint8),
            "draws": rng.random((7, 2), np.float32),
            "key": [f"{number}/{i}" for i in range(7)],
        }
        parts.append(cache.ensure(tmp_path, "pixels", {"part": number}, lambda block=block: iter([block])))
    table = cache.joined(tmp_path, "pixels", {"whole": True}, parts)
    resident = tables.Resident(table, torch.device("cpu"))
    rows = np.array([13, 0, 6, 7, 0])
    assert len(resident) == 14
    for column in ("value", "draws"):
        found = resident(rows, column)
        np.testing.assert_array_equal(found.numpy(), table(rows, column))
        assert found.dtype == torch.from_numpy(table(rows, column)).dtype
    assert resident(np.empty(0, int)).shape == (0, 3, 4)


def test_tables_are_placed_together_or_not_at_all(tmp_path):
    block = {"value": np.zeros((3, 2), np.float32)}
    table = cache.ensure(tmp_path, "pixels", {}, lambda: iter([block]))
    cpu = Where(Place(str(tmp_path)), 0, 1, torch.device("cpu"))
    decoder = object()
    assert tables.placed("auto", cpu, table, None) == [table, None]  # a memory map is as good
    assert tables.placed("on", cpu, table) == [table]
    placed = tables.placed("device", cpu, table, decoder, None)
    assert isinstance(placed[0], tables.Resident) and placed[1:] == [decoder, None]


def test_what_is_beside_a_table_goes_with_it(tmp_path):
    pixels, targets = (
        cache.ensure(tmp_path, "pixels", {"of": name}, lambda: iter([{"value": np.zeros((3, 2), np.float32)}]))
        for name in ("frames", "targets")
    )
    cpu, label = Where(Place(str(tmp_path)), 0, 1, torch.device("cpu")), np.array([4, 0, 9])
    frames, theirs = tables.placed("device", cpu, pixels, targets, label=label)
    for source in (frames, pixels):
        found = tables.column(source, "label", label, np.array([2, 0, 2]))
        assert found.tolist() == [9, 4, 9] and found.dtype == torch.int64
    with pytest.raises(KeyError):
        theirs(np.array([0]), "label")


@pytest.mark.parametrize(
    ("free", "share", "fits"), [(48, 1.0, True), (47, 1.0, False), (192, 0.25, True), (191, 0.25, False)]
)
def test_a_gpu_holds_what_fits_in_half_of_a_jobs_share(tmp_path, monkeypatch, free, share, fits):
    """24 bytes of a table; students that start together on one GPU see the same free memory."""
    table = cache.ensure(tmp_path, "pixels", {}, lambda: iter([{"value": np.zeros((3, 2), np.float32)}]))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1000))
    monkeypatch.setattr(tables, "Resident", lambda rows, device, **beside: ("resident", rows, *beside))
    gpu = Where(Place(str(tmp_path)), 0, 1, torch.device("cuda:0"), share)
    assert tables.placed("auto", gpu, table) == [("resident", table) if fits else table]
    assert tables.placed("auto", gpu, table, object())[0] is table
    label = np.zeros(3, np.int64)  # another 24 bytes
    few = dataclasses.replace(gpu, share=share / 2)
    assert tables.placed("auto", few, table, label=label)[0] is table
    assert tables.placed("auto", gpu, table, label=label)[0] is table
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * free, 1000))
    assert tables.placed("auto", gpu, table, label=label) == [("resident", table, "label") if fits else table]
