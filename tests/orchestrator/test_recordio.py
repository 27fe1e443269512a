"""Packed faces: recorded bytes, payloads that hold the magic, damage named by its place, labels, one data set."""

import io
import multiprocessing
import os
import pickle
import random
import re
import struct
import time
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from orchestrator import indexing
from orchestrator.datasets import face_records, recordio, verification_pack
from orchestrator.datasets.face_records import Records, open_index
from orchestrator.datasets.images import described, rebuilt
from orchestrator.datasets.recordio import FIRST, LAST, MAGIC, MIDDLE, RecordIO, packed, unpacked, write_records

PLACE = r"\.rec: byte "


@pytest.fixture(scope="session")
def golden(shared):
    with np.load(shared / "golden" / "face" / "recordio.npz") as stored:
        return dict(stored)


def jpeg(seed, side=112, form="JPEG"):
    pixels = np.random.default_rng(seed).integers(0, 255, (side // 8, side // 8, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((side, side)).save(stream, form)
    return stream.getvalue()


def faces(path, labels=(0, 0, 1, 1, 1, 2), image=lambda key: b"image %d" % key, changed=None, order=None):
    """A file as training sets come: key 0, images 1 … n of rising label, one record for each identity."""
    count, starts = len(labels), [i for i in range(len(labels)) if i == 0 or labels[i] != labels[i - 1]]
    ends = [*starts[1:], count]
    payloads = {0: packed([count + 1.0, count + 1.0 + len(starts)])}
    payloads |= {i + 1: packed(float(label), image(i + 1), id=i + 1) for i, label in enumerate(labels)}
    payloads |= {count + 1 + i: packed([a + 1.0, b + 1.0]) for i, (a, b) in enumerate(zip(starts, ends, strict=True))}
    payloads |= changed or {}
    keys = [key for key in order or payloads if payloads[key] is not None]
    write_records(path, [payloads[key] for key in keys], keys)
    return path


def slow_payload(data, offset):
    """By the words of the format."""
    parts = []
    while True:
        magic, word = struct.unpack("<II", data[offset : offset + 8])
        assert magic == 0xCED7230A
        kind, length = word >> 29, word % 2**29
        parts.append(data[offset + 8 : offset + 8 + length])
        offset += 8 + (length + 3) // 4 * 4
        if kind in (0, 3):
            joined = parts[0]
            for part in parts[1:]:
                joined += MAGIC + part
            return joined


# --- The format -------------------------------------------------------------------------------------------------------


def test_recorded_bytes_are_read_and_written(golden, tmp_path):
    path = tmp_path / "train.rec"
    path.write_bytes(golden["rec"].tobytes())
    path.with_suffix(".idx").write_bytes(golden["idx"].tobytes())
    records = RecordIO(path)
    assert records.keys.tolist() == list(range(10)) and (records.offsets == golden["offsets"]).all()
    payloads = [records.payload(key) for key in records.keys]
    assert payloads == [golden[f"payload_{key}"].tobytes() for key in records.keys]
    assert records.record(0).labels_K.tolist() == [7, 10] and not records.record(0).image
    assert [records.record(key).label for key in range(1, 7)] == [0, 0, 1, 1, 2, 2]
    for key in range(1, 6):
        pixels = np.array(Image.open(io.BytesIO(records.record(key).image)))
        assert (pixels == golden["images"][key - 1]).all()
    assert write_records(tmp_path / "again.rec", payloads) == 10
    assert (tmp_path / "again.rec").read_bytes() == golden["rec"].tobytes()
    assert (tmp_path / "again.idx").read_bytes() == golden["idx"].tobytes()
    index = open_index(path)
    assert index.key_N.tolist() == list(range(1, 7)) and index.label_N.tolist() == [0, 0, 1, 1, 2, 2]


def test_payloads_full_of_magics_come_back(tmp_path):
    rng = random.Random(0)
    pieces = [MAGIC, MAGIC, b"", b"a", b"ab", b"abcd", MAGIC[:2], MAGIC[2:], b"\0" * 4]
    payloads = [b"".join(rng.choices(pieces, k=rng.randrange(12))) for _ in range(300)]
    payloads += [b"", MAGIC, MAGIC * 3, b"x" + MAGIC, MAGIC + b"x", b"abc" + MAGIC * 2]
    path = tmp_path / "some.rec"
    write_records(path, payloads)
    records, data = RecordIO(path), path.read_bytes()
    assert [records.payload(key) for key in records.keys] == payloads
    assert [slow_payload(data, int(offset)) for offset in records.offsets] == payloads
    kinds = {struct.unpack_from("<I", data, found.start() + 4)[0] >> 29 for found in re.finditer(re.escape(MAGIC), data)
             if found.start() % 4 == 0}  # fmt: skip
    assert kinds == {0, FIRST, MIDDLE, LAST} and len(data) % 4 == 0
    path.with_suffix(".idx").unlink()
    with pytest.warns(UserWarning, match=r"some\.rec: no some\.idx beside it; its records are counted one by one"):
        assert (RecordIO(path).offsets == records.offsets).all()


def test_labels_of_the_header_and_labels_after_it():
    record = unpacked(packed(3.0, b"xyz", id=2**40, id2=7))
    assert (record.flag, record.label, record.id, record.id2, record.image) == (0, 3.0, 2**40, 7, b"xyz")
    several = unpacked(packed([5.0, 6.0, 7.0], b"xyz"))
    assert several.flag == 3 and several.labels_K.tolist() == [5, 6, 7] and several.image == b"xyz"
    assert packed(3.0)[4:8] == struct.pack("<f", 3) and packed([3.0])[:8] == struct.pack("<If", 1, 0)
    with pytest.raises(ValueError, match=r"the payload has 23 bytes, its header and 0 labels need 24"):
        unpacked(packed(3.0)[:-1])
    with pytest.raises(ValueError, match=r"has 28 bytes, its header and 2 labels need 32"):
        unpacked(packed([3.0, 4.0])[:-4])


def test_headers_of_many_are_those_of_each(tmp_path, monkeypatch):
    monkeypatch.setattr(recordio, "_GATHERED", 7)
    aligned = struct.unpack("<f", MAGIC)[0]
    labels = [0.0, 2.0, [4.0], [5.0, 6.0], [aligned, 8.0], aligned, [9.0, 10.0, 11.0]]
    images = [b"", b"im", b"image", MAGIC, b"imag" + MAGIC + b"e"]
    write_records(tmp_path / "a.rec", [packed(label, image) for label in labels for image in images])
    records = RecordIO(tmp_path / "a.rec")
    found = recordio.headers(records.path, records.offsets)
    each = [records.record(key) for key in records.keys]
    assert found.flag_N.tolist() == [record.flag for record in each]
    assert found.label_N.tolist() == [record.label for record in each]
    assert found.second_N.tolist() == [float(record.labels_K[1]) if record.flag > 1 else 0 for record in each]
    assert found.image_N.tolist() == [bool(record.image) for record in each]
    assert [len(column) for column in recordio.headers(records.path, np.zeros(0, np.int64))] == [0] * 4


def test_an_empty_file_has_no_record(tmp_path):
    assert write_records(tmp_path / "a.rec", []) == 0
    records = RecordIO(tmp_path / "a.rec")
    assert len(records) == 0
    with pytest.raises(ValueError, match=r"a\.rec: no record of key 0; the file is empty"):
        records.payload(0)
    with pytest.raises(ValueError, match=PLACE + "0: the file ends at byte 0 where a record must begin"):
        recordio.payload_at(tmp_path / "a.rec", 0)
    with pytest.raises(ValueError, match=r"a\.rec: no record in the file"):
        open_index(tmp_path / "a.rec")


def test_what_was_not_written_to_its_end_is_not_there(tmp_path, monkeypatch):
    def broken():
        yield b"whole"
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="the disk is full"):
        write_records(tmp_path / "a.rec", broken())
    monkeypatch.setattr(recordio, "_LONGEST", 6)
    with pytest.raises(ValueError, match=r"payload 5 has 6 bytes, a record holds fewer than 2\*\*29"):
        write_records(tmp_path / "a.rec", [b"12345", b"123456"], [4, 5])
    assert list(tmp_path.iterdir()) == []


# --- Damage -----------------------------------------------------------------------------------------------------------

PAYLOADS = [b"a" * 10, b"bbbb" + MAGIC + b"cccc" + MAGIC, b"d"]  # at bytes 0, 20 (parts at 20, 32, 44) and 52


def damaged(path, change):
    write_records(path, PAYLOADS)
    data = bytearray(path.read_bytes())
    assert len(data) == 64
    path.write_bytes(bytes(change(data) or data))
    return path


def put(at, content):
    def change(data):
        data[at : at + len(content)] = content

    return change


DAMAGE = {
    "cut in a payload": (lambda data: data[:10], "0: a record of 10 bytes ends beyond the file's 10; it is truncated"),
    "cut in the padding": (
        lambda data: data[:62],
        "52: a record of 1 bytes ends beyond the file's 62; it is truncated",
    ),
    "cut in a header": (lambda data: data[:36], "32: the file ends at byte 36 where a record must begin"),
    "cut between parts": (lambda data: data[:44], "44: the file ends"),
    "another magic": (put(20, b"evil"), "20: a record must begin with 0a23d7ce, found 6576696c"),
    "another magic of a part": (put(32, b"evil"), "32: a record must begin with 0a23d7ce"),
    "too long": (put(56, b"\x40\0\0\0"), "52: a record of 64 bytes ends beyond the file's 64"),
    "a middle part first": (
        put(24, struct.pack("<I", MIDDLE << 29 | 4)),
        "20: the record is of kind 2, expected 0 or 1",
    ),
    "a last part first": (put(56, struct.pack("<I", LAST << 29 | 1)), "52: the record is of kind 3, expected 0 or 1"),
    "a whole record as part": (put(36, struct.pack("<I", 4)), "32: the record is of kind 0, expected 2 or 3"),
    "a first part twice": (put(36, struct.pack("<I", FIRST << 29 | 4)), "32: the record is of kind 1, expected 2 or 3"),
    "kind 7": (put(24, struct.pack("<I", 7 << 29 | 4)), "20: the record is of kind 7, expected 0 or 1"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_by_file_and_byte(case, tmp_path):
    change, message = DAMAGE[case]
    path = damaged(tmp_path / "a.rec", change)
    with pytest.raises(ValueError, match=PLACE + re.escape(message)) as found:
        for offset in (0, 20, 52):
            recordio.payload_at(path, offset)
    assert "\n" not in str(found.value)
    path.with_suffix(".idx").unlink()
    with pytest.warns(UserWarning, match="counted one by one"):
        walked = "44: the file ends before the last part" if case == "cut between parts" else message
        with pytest.raises(ValueError, match=PLACE + re.escape(walked)):
            RecordIO(path)


@pytest.mark.parametrize(("text", "message"), [
    ("0\t0\n1\t20\n2\t52\n1\t0\n", "key 1 is listed twice"),
    ("0\t0\n1\t22\n", "key 1 lies at byte 22, which is no beginning of a record in a file of 64 bytes"),
    ("0\t0\n1\t60\n", "key 1 lies at byte 60"),
    ("0\t0\n1\t-4\n", r"line 2 is b'1\\t-4', expected a key, a tab and a byte offset"),
    ("0\t0\n1 20\n", r"line 2 is b'1 20', expected a key"),
    ("0\t0\n1\t20\t52\n2\n", r"line 2 is b'1\\t20\\t52'"),
    ("0\t0\none\t20\n", r"line 2 is b'one\\t20'"),
    ("0\t0\n1\t20.5\n", r"line 2 is b'1\\t20.5'"),
    ("0\n20\n", r"line 1 is b'0'"),
    ("0\t99999999999999999999\n", "key 0 lies at byte 9223372036854775807"),
])  # fmt: skip
@pytest.mark.parametrize("block", [1 << 24, 5])
def test_a_list_that_is_none_is_refused(text, message, block, tmp_path, monkeypatch):
    monkeypatch.setattr(recordio, "_BLOCK", block)
    path = damaged(tmp_path / "a.rec", bytes)
    path.with_suffix(".idx").write_text(text)
    with pytest.raises(ValueError, match=r"a\.idx.* ?" + message):
        RecordIO(path)


@pytest.mark.parametrize("text", [b"2\t52\n0\t0\n1\t20", b"0\t0\r\n1\t20\r\n2\t52\r\n", b"0\t0\n1\t20\n\n2\t52\n\n"])
@pytest.mark.parametrize("block", [1 << 24, 3])
def test_a_list_in_any_order_with_any_line_ends(text, block, tmp_path, monkeypatch):
    monkeypatch.setattr(recordio, "_BLOCK", block)
    path = damaged(tmp_path / "a.rec", bytes)
    path.with_suffix(".idx").write_bytes(text)
    records = RecordIO(path)
    assert records.keys.tolist() == [0, 1, 2] and records.offsets.tolist() == [0, 20, 52]
    assert records.payload(1) == PAYLOADS[1]
    with pytest.raises(ValueError, match=r"a\.rec: no record of key 3; keys are 0 to 2"):
        records.payload(3)


def test_there_must_be_a_file(tmp_path):
    for opening in (RecordIO, open_index):
        with pytest.raises(FileNotFoundError, match=r"absent\.rec: no such file"):
            opening(tmp_path / "absent.rec")


# --- Workers ----------------------------------------------------------------------------------------------------------


def _sums(reader, names, answer):
    answer.put(sum(sum(reader.read(name)) for name in names))


def test_forked_workers_read_what_one_process_reads(tmp_path):
    index = open_index(faces(tmp_path / "train.rec", [i // 5 for i in range(60)]))
    reader, names = Records(str(tmp_path / "train.rec")), list(face_records.Keys(index.key_N, index.offset_N))
    before = sum(sum(reader.read(name)) for name in names)  # this process has its map already
    fork = multiprocessing.get_context("fork")
    answer = fork.Queue()
    tasks = [fork.Process(target=_sums, args=(reader, names[i::3], answer)) for i in range(3)]
    for task in tasks:
        task.start()
    assert sum(answer.get(timeout=60) for _ in tasks) == before
    for task in tasks:
        task.join()


def test_workers_that_start_anew_are_handed_the_records(tmp_path):
    records = RecordIO(faces(tmp_path / "train.rec"))
    read = [records.payload(key) for key in range(10)]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(records.payload, range(10)) == read
    (tmp_path / "train.idx").unlink()  # a pickled one takes its index along
    assert [pickle.loads(pickle.dumps(records)).payload(key) for key in range(10)] == read


def test_a_file_that_changed_since_is_read_as_it_is_now(tmp_path):
    path = faces(tmp_path / "train.rec")
    offset = int(RecordIO(path).offsets[5])
    assert recordio.record_at(path, offset).image == b"image 5"
    faces(path, image=lambda key: b"other %d" % key)
    assert recordio.record_at(path, offset).image == b"other 5"
    os.truncate(path, offset + 4)
    with pytest.raises(ValueError, match=PLACE + f"{offset}: the file ends at byte {offset + 4}"):
        recordio.record_at(path, offset)


# --- Labels -----------------------------------------------------------------------------------------------------------


def test_two_headers_of_each_identity_are_read(tmp_path, monkeypatch):
    looked = []
    gather = face_records.headers
    monkeypatch.setattr(
        face_records, "headers", lambda path, offset_N: looked.append(len(offset_N)) or gather(path, offset_N)
    )
    index = open_index(faces(tmp_path / "train.rec", [i // 50 for i in range(1000)]))
    assert index.label_N.tolist() == [i // 50 for i in range(1000)] and index.label_N.dtype == np.int32
    assert looked == [1, 20, 20, 20]  # the end of the file, identities, their first and last image


UNUSUAL = {
    "an identity whose images differ": ({3: packed(7.0, b"image")}, [0, 0, 7, 1, 1, 2]),
    "ranges that leave an image out": ({8: packed([3.0, 5.0])}, [0, 0, 1, 1, 1, 2]),
    "ranges that overlap": ({8: packed([2.0, 6.0])}, [0, 0, 1, 1, 1, 2]),
    "an image that was taken out": ({4: None}, [0, 0, 1, 1, 2]),
    "an empty image": ({4: packed(1.0)}, [0, 0, 1, 1, 1, 2]),
    "an empty last image": ({5: packed(1.0)}, [0, 0, 1, 1, 2]),
    "identities without records": ({7: None, 8: None, 9: None}, [0, 0, 1, 1, 1, 2]),
    "an identity without images": ({10: packed([7.0, 7.0]), 0: packed([7.0, 11.0])}, [0, 0, 1, 1, 1, 2]),
    "labels in an array": ({i: packed([label, 9.0], b"image") for i, label in enumerate((0, 0, 1, 1, 1, 2), 1)},
                           [0, 0, 1, 1, 1, 2]),
    "no key 0": ({0: None, 7: None, 8: None, 9: None}, [0, 0, 1, 1, 1, 2]),
    "key 0 is an image": ({0: packed(4.0, b"image"), 7: None, 8: None, 9: None}, [4, 0, 0, 1, 1, 1, 2]),
    "key 0 is an image of two labels": ({0: packed([4.0, 5.0], b"image"), 7: None, 8: None, 9: None},
                                        [4, 0, 0, 1, 1, 1, 2]),
    "images of several parts": ({1: packed(0.0, MAGIC), 5: packed(1.0, b"abcd" + MAGIC + b"e")}, [0, 0, 1, 1, 1, 2]),
    "more than a float counts exactly": ({0: packed([7.0, 2.0**24 + 2])}, [0, 0, 1, 1, 1, 2]),
}  # fmt: skip


@pytest.mark.parametrize("case", UNUSUAL)
def test_labels_where_the_usual_does_not_hold(case, tmp_path):
    changed, labels = UNUSUAL[case]
    path = faces(tmp_path / "train.rec", changed=changed)
    index, records = open_index(path), RecordIO(path)
    assert index.label_N.tolist() == labels
    if "empty image" not in case:
        assert [records.record(int(key)).label for key in index.key_N] == labels
    assert (records.offsets[np.searchsorted(records.keys, index.key_N)] == index.offset_N).all()


def test_records_in_another_order_than_their_keys(tmp_path):
    order = random.Random(0).sample(range(10), 10)
    index = open_index(faces(tmp_path / "train.rec", order=order))
    assert index.label_N.tolist() == [0, 0, 1, 1, 1, 2] and index.offset_N.tolist() != sorted(index.offset_N)


@pytest.mark.parametrize(("changed", "message"), [
    ({1: packed(-1.0, b"x"), 2: packed(-1.0, b"x")}, r"byte 40: label -1\.0 is no whole number from 0 to 2\*\*24"),
    ({3: packed(0.5, b"x")}, r"byte 120: label 0\.5 is no whole number"),
    ({3: packed(2.0**24 + 2, b"x")}, r"byte 120: label 16777218\.0 is no whole"),
    ({3: packed(float("nan"), b"x")}, r"byte 120: label nan is no whole"),
    ({3: b"short"}, r"byte 120: the payload has 5 bytes, its header and 0 labels need 24"),
    ({0: packed([0.0, 3.0])}, "key 0 says images end at key 0.0 and identities at 3.0"),
    ({0: packed([7.5, 9.0])}, "key 0 says images end at key 7.5"),
    ({0: packed([7.0, 6.0])}, "key 0 says"),
    ({key: packed(0.0) for key in range(1, 7)}, "none of 6 records holds an image"),
])  # fmt: skip
def test_labels_that_are_none_are_refused(changed, message, tmp_path):
    with pytest.raises(ValueError, match=r"train\.rec: " + message):
        open_index(faces(tmp_path / "train.rec", changed=changed))


def test_a_truncated_file_is_noticed_when_it_is_opened(tmp_path):
    path = faces(tmp_path / "train.rec")
    offset = int(RecordIO(path).offsets[-1])
    os.truncate(path, offset + 8)
    with pytest.raises(ValueError, match=PLACE + f"{offset}: a record of 32 bytes ends beyond the file's {offset + 8}"):
        open_index(path)
    os.truncate(path, offset)
    with pytest.raises(ValueError, match=f"key 9 lies at byte {offset}, which is no beginning .* is truncated"):
        open_index(path)


# --- The index that is kept -------------------------------------------------------------------------------------------


def test_an_index_is_made_once(tmp_path, monkeypatch):
    path = faces(tmp_path / "train.rec")
    made = open_index(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train.idx", "train.index.npz", "train.rec"]
    with np.load(tmp_path / "train.index.npz", allow_pickle=False) as stored:
        assert {name: stored[name].dtype for name in stored.files} == {
            "stamp": np.int64, "key": np.int64, "offset": np.int64, "label": np.int32}  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(face_records, "RecordIO", None)
        again = open_index(path)
    assert all((a == b).all() and a.dtype == b.dtype for a, b in zip(made, again, strict=True))


@pytest.mark.parametrize("what", ["rec", "idx", "no idx", "damaged", "empty", "of another version"])
def test_an_index_of_other_files_is_made_anew(what, tmp_path):
    path = faces(tmp_path / "train.rec", [0, 0, 1])
    kept = tmp_path / "train.index.npz"
    assert len(open_index(path).key_N) == 3
    if what in ("rec", "idx"):
        faces(path, [0, 0, 1, 1])
        os.utime(path.with_suffix(".idx" if what == "rec" else ".rec"), ns=(1, 1))
    elif what == "no idx":
        path.with_suffix(".idx").unlink()
    elif what == "of another version":
        np.savez(kept, stamp=np.zeros(4))
    else:
        kept.write_bytes(kept.read_bytes()[:100] if what == "damaged" else b"")
    before = kept.stat().st_mtime_ns
    time.sleep(0.01)
    if what == "no idx":
        with pytest.warns(UserWarning, match=r"no train\.idx beside it"):
            index = open_index(path)
    else:
        index = open_index(path)
    assert index.label_N.tolist() == ([0, 0, 1, 1] if what in ("rec", "idx") else [0, 0, 1])
    assert kept.stat().st_mtime_ns > before
    assert open_index(path).label_N.tolist() == index.label_N.tolist()


def test_where_an_index_cannot_be_kept_it_is_said(tmp_path):
    path = faces(tmp_path / "train.rec")
    (tmp_path / "train.index.npz").mkdir()
    with pytest.warns(
        UserWarning, match=r"train\.index\.npz cannot be written \(.+\): the index is made anew each time"
    ):
        assert len(open_index(path).key_N) == 6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train.idx", "train.index.npz", "train.rec"]


# --- The data set -----------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path):
    """Twelve identities of five faces, one pack in both forms, one as .bin."""
    root = tmp_path / "faces"
    root.mkdir()
    faces(root / "train.rec", [i // 5 for i in range(60)], jpeg)
    (root / "property").write_text("12,112,112\n")
    images, same = [jpeg(i, form="PNG") for i in range(40)], [i % 2 == 0 for i in range(20)]
    (root / "agedb_30.bin").write_bytes(pickle.dumps((images, same)))
    (root / "lfw.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")  # not looked at: the safe form is there
    verification_pack.save(root / "lfw.npz", images, same)
    return root


def test_what_training_is_given(root, tmp_path):
    data = face_records.load(str(root))
    assert data.train.num_identities == 12 and len(data.train) == 60 and list(data.verification) == ["agedb_30", "lfw"]
    assert data.train.identity.tolist() == [i // 5 for i in range(60)]
    assert data.notice == face_records.PRIVACY
    for pairs in data.verification.values():
        assert len(pairs.images) == 40 and pairs.folds == 10 and pairs.same_P.tolist() == [True, False] * 10
        assert pairs.first_P.tolist() == list(range(0, 40, 2)) and pairs.second_P.tolist() == list(range(1, 40, 2))
        assert (pairs.images.identity == -1).all() and pairs.images.reader.read("7") == jpeg(7, form="PNG")
    for images in data.sets().values():
        reader = rebuilt(described(images.reader))
        assert reader == images.reader and reader.stamp(images.keys) == images.reader.stamp(images.keys)
        assert [reader.read(key) for key in images.keys] == [images.reader.read(key) for key in images.keys]
        assert len(indexing.indexed(images, tmp_path / "cache").fingerprint) == 64
    assert data.train.reader.read(data.train.keys[4]) == jpeg(5)
    assert face_records.load(str(root)).protocol == data.protocol


def test_validation_needs_no_pack(root):
    for path in (*root.glob("*.bin"), *root.glob("lfw.npz")):
        path.unlink()
    data = face_records.load(str(root), "validation")
    assert list(data.verification) == ["val"] and data.train.num_identities == 10
    with pytest.raises(FileNotFoundError, match=r"no verification pack in .*add packs such as lfw\.bin, or verify on "
                                                r"held-out identities with --set data\.part=validation"):  # fmt: skip
        face_records.load(str(root))


def test_no_image_is_read_to_index_training_faces(root, tmp_path, monkeypatch):
    images = face_records.load(str(root)).train
    monkeypatch.setattr(face_records, "record_at", None)
    before = indexing.indexed(images, tmp_path / "cache").fingerprint
    moved = root.rename(tmp_path / "moved")
    images = face_records.load(str(moved)).train
    assert indexing.indexed(images, tmp_path / "cache").fingerprint == before  # where they lie does not matter
    os.utime(moved / "train.rec", ns=(5, 5))
    assert indexing.indexed(images, tmp_path / "cache").fingerprint != before


def test_damaged_faces_of_a_pack_are_refused(root, tmp_path):
    images = [jpeg(i) for i in range(40)]
    images[13] = images[13][:-300]
    verification_pack.save(root / "lfw.npz", images, [i % 2 == 0 for i in range(20)])
    data = face_records.load(str(root))
    with pytest.raises(ValueError, match=r"lfw\.npz: image 13 cannot be decoded: .*; get the pack anew"):
        indexing.indexed(data.verification["lfw"].images, tmp_path / "cache", skip_unreadable=True)


def test_what_is_odd_about_the_data_is_told(root, monkeypatch):
    monkeypatch.setitem(face_records._PUBLIC, (60, 12), "a public set")
    (root / "property").write_text("12, 96 ,112")
    verification_pack.save(root / "mine.npz", [jpeg(0)] * 6, [True, False, True])
    data = face_records.load(str(root))
    assert data.notice.split("; ")[1:] == [
        "these are the counts of a public set, for non-commercial research alone",
        "faces have 96 × 112 pixels, not 112 × 112, and are resized",
        "mine has no 10 folds of equal size, so its accuracy is that at equal error rates",
    ]
    assert data.verification["mine"].folds == 0


@pytest.mark.parametrize(("text", "message"), [
    ("11,112,112", "says 11 classes, train.rec has 12 different labels up to 11"),
    ("13,112,112", "says 13 classes, train.rec has 12 different labels up to 11; correct the property"),
    ("12,112", r"is '12,112', expected classes,height,width"),
    ("12,112,x", "expected classes,height,width"),
    ("", "expected classes,height,width"),
])  # fmt: skip
def test_a_property_that_denies_the_labels_is_refused(text, message, root):
    (root / "property").write_text(text)
    with pytest.raises(ValueError, match=message):
        face_records.load(str(root))


def test_what_is_missing_is_named(root):
    with pytest.raises(FileNotFoundError, match=r"--data-root DIR is needed; it must hold train\.rec, train\.idx"):
        face_records.load("")
    with pytest.raises(ValueError, match="part"):
        face_records.load(str(root), "nothing")
    for name in ("property", "train.rec"):
        (root / name).unlink()
        with pytest.raises(FileNotFoundError, match=rf"no {name} in .*; it must hold train\.rec, train\.idx, property"):
            face_records.load(str(root))


def test_a_record_without_an_image_is_no_training_face(root):
    with pytest.raises(ValueError, match=r"train\.rec: byte 0: the record holds no image"):
        Records(str(root / "train.rec")).read("0@0")


def test_a_list_of_many_faces_is_opened_in_little_memory(tmp_path, monkeypatch):
    """Only headers are there: what lies between is a hole. No object is held for an image."""
    count, apart = 200_000, 512
    path = tmp_path / "train.rec"
    body = struct.pack("<I", apart - 8)
    with open(path, "wb") as file:
        for key in range(count + 1):
            file.seek(key * apart)
            file.write(MAGIC + body + packed(float(max(key - 1, 0) // 50)))
        file.truncate((count + 1) * apart)
    path.with_suffix(".idx").write_text("".join(f"{key}\t{key * apart}\n" for key in range(count + 1)))
    monkeypatch.setattr(recordio, "_BLOCK", 1 << 18)
    tracemalloc.start()
    index = open_index(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(index.key_N) == count + 1 and index.label_N[-1] == (count - 1) // 50
    assert peak < 100 * count
