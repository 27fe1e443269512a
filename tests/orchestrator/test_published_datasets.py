"""Readers of published data sets: tiny trees in the exact official and re-packed layouts, real lists at full size."""

import csv
import gzip
import io
import json
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import loadmat

from orchestrator.datasets import cub200, cub200_metric, emoji, inshop, layout, market1501, msmt17, msmt17_v2, sop
from orchestrator.datasets.images import Frames
from orchestrator.evaluation.retrieval import evaluate


def picture(kind="JPEG", mode="RGB") -> bytes:
    stored = io.BytesIO()
    Image.new(mode, (8, 8)).save(stored, kind)
    return stored.getvalue()


JPG = picture()


def tree(root, names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(JPG)


@pytest.fixture
def root(tmp_path):
    """A data root whose own path holds what careless parsing would take for identities and cameras."""
    folder = tmp_path / "2024_c9_data" / "id_00000001"
    folder.mkdir(parents=True)
    return folder


# --- In-Shop


INSHOP = [
    ("img/WOMEN/Dresses/id_00000002/02_1_front.jpg", "id_00000002", "train"),
    ("img/WOMEN/Dresses/id_00000002/02_3_back.jpg", "id_00000002", "train"),
    ("img/MEN/Denim/id_00000080/01_1_front.jpg", "id_00000080", "query"),
    ("img/MEN/Denim/id_00000080/01_2_side.jpg", "id_00000080", "gallery"),
    ("img/MEN/Denim/id_00007982/01_1_front.jpg", "id_00007982", "query"),
    ("img/MEN/Denim/id_00007982/01_2_side.jpg", "id_00007982", "gallery"),
]


def write_inshop(root, rows):
    tree(root, [row[0] for row in rows])
    (root / "Eval").mkdir(exist_ok=True)
    lines = [str(len(rows)), "image_name item_id evaluation_status"]
    lines += [f"{path:<66} {item:<12} {part}" for path, item, part in rows]
    (root / "Eval/list_eval_partition.txt").write_text("\n".join(lines) + "\n")


def test_inshop(root, monkeypatch):
    monkeypatch.setattr(inshop, "_COUNTS", {"train": (2, 1), "query": (2, 2), "gallery": (2, 2)})
    write_inshop(root, INSHOP)
    data = inshop.load(str(root))
    assert data.train.identity.tolist() == [2, 2] and data.query.identity.tolist() == [80, 7982]
    assert data.query.keys[0] == INSHOP[2][0] and not data.leave_one_out and not data.camera_filter
    assert Frames(data.gallery, (4, 4))([0, 1]).shape == (2, 3, 4, 4)


def test_inshop_as_the_authors_packed_it(root, monkeypatch):
    monkeypatch.setattr(inshop, "_COUNTS", {"train": (2, 2), "query": (1, 1), "gallery": (2, 1)})
    tree(root, ["train/0002_1.jpg", "train/0003_1.jpg", "query/0080_1.jpg", "gallery/0080_2.jpg", "gallery/0080_3.jpg"])
    data = inshop.load(str(root))
    assert data.train.identity.tolist() == [2, 3] and data.gallery.identity.tolist() == [80, 80]


def test_inshop_says_what_is_wrong(root, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"inshop: --data-root DIR is needed; it must hold Eval"):
        inshop.load("")
    with pytest.raises(FileNotFoundError, match=r"no list_eval_partition.txt in .*Eval; it must hold Eval"):
        inshop.load(str(root))
    write_inshop(root, INSHOP)
    with pytest.raises(ValueError, match=r"inshop/train: 2 images of 1 identities, expected 25,882 of 3,997; is the"):
        inshop.load(str(root))
    monkeypatch.setattr(inshop, "_COUNTS", {"train": (2, 1), "query": (2, 2), "gallery": (2, 2)})
    for rows, message in (
        ([*INSHOP[:-1], (*INSHOP[-1][:2], "test")], "unknown parts test"),
        ([*INSHOP[:-1], (INSHOP[-1][0], "0007982", "gallery")], "'0007982' is no number after 'id_'"),
        ([*INSHOP[:-1], (INSHOP[-1][0], "id_00000081", "gallery")], "query and gallery must hold the same items"),
        ([*INSHOP[:-1], INSHOP[3]], "01_2_side.jpg is listed twice"),
        ([*INSHOP[:-1], ("img/a b.jpg", *INSHOP[-1][1:])], r"line 8 has 4 fields, expected 3"),
        ([*INSHOP[:-1], ("../secret.jpg", *INSHOP[-1][1:])], r"\.\./secret.jpg is not a path below"),
    ):
        write_inshop(root, rows)
        with pytest.raises(ValueError, match=message):
            inshop.load(str(root))
    write_inshop(root, INSHOP)
    (root / INSHOP[3][0]).unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images are missing, first .*01_2_side.jpg"):
        inshop.load(str(root))


# --- Stanford Online Products


def write_sop(root, part, rows):
    tree(root, [path for *_, path in rows])
    lines = ["image_id class_id super_class_id path", *(" ".join(map(str, row)) for row in rows)]
    (root / f"Ebay_{part}.txt").write_text("\n".join(lines) + "\n")


def test_sop(root, monkeypatch):
    monkeypatch.setattr(sop, "_COUNTS", {"train": (2, 1), "test": (3, 2)})
    write_sop(root, "train", [(1, 1, 1, "bicycle_final/111_0.JPG"), (2, 1, 1, "bicycle_final/111_1.JPG")])
    test = [(59552, 11319, 1, "toaster_final/9_0.JPG"), (59553, 11319, 1, "toaster_final/9_1.JPG"),
            (59554, 22634, 12, "sofa_final/7_0.JPG")]  # fmt: skip
    write_sop(root, "test", test)
    data = sop.load(str(root))
    assert data.leave_one_out and data.query is data.gallery
    assert data.query.identity.tolist() == [11319, 11319, 22634]
    write_sop(root, "test", [*test[:2], (59554, 1, 12, "sofa_final/7_0.JPG")])
    with pytest.raises(ValueError, match="some classes are in both"):
        sop.load(str(root))


def test_sop_as_the_authors_packed_it(root, monkeypatch):
    monkeypatch.setattr(sop, "_COUNTS", {"train": (3, 2), "test": (2, 1)})
    tree(root, ["train/1_1.JPG", "train/1_2.JPG", "train/10_3.JPG", "test/11319_59552.JPG", "test/11319_59553.JPG"])
    data = sop.load(str(root))
    assert data.train.identity.tolist() == [10, 1, 1]  # files in order of name
    assert data.train.labels.tolist() == [1, 0, 0]  # classes in order of number


# --- MSMT17


def write_msmt17(root, train, test):
    lists = {
        "train": (train, ["0000/0000_000_01_0303morning_0008_0.jpg 0", "0001/0001_004_15_0303noon_0008_1.jpg 1"]),
        "val": (train, ["0000/0000_001_12_0303morning_0009_0.jpg 0"]),
        "query": (test, ["0000/0000_000_01_0113morning_0001_0.jpg 0"]),
        "gallery": (test, ["0000/0000_000_01_0113morning_0002_0.jpg 0", "0000/0000_002_03_0114noon_0001_0.jpg 0"]),
    }
    for part, (folder, rows) in lists.items():
        (root / f"list_{part}.txt").write_text("\n".join(rows) + "\n")
        tree(root, [f"{folder}/{row.split()[0]}" for row in rows])


@pytest.mark.parametrize(
    ("reader", "folders"), [(msmt17, ("train", "test")), (msmt17_v2, ("mask_train_v2", "mask_test_v2"))]
)
def test_msmt17(root, monkeypatch, reader, folders):
    monkeypatch.setattr(msmt17, "_COUNTS", {"train": (3, 2), "query": (1, 1), "gallery": (2, 1)})
    write_msmt17(root, *folders)
    data = reader.load(str(root))
    assert data.train.identity.tolist() == [0, 1, 0] and data.train.camera.tolist() == [1, 15, 12]  # val is in train
    assert data.gallery.camera.tolist() == [1, 3] and data.camera_filter
    assert data.query.keys[0].startswith(f"{folders[1]}/0000/")
    assert reader is msmt17 or data.query.name == "msmt17_v2/query"
    e = torch.eye(3)
    assert evaluate(e[:1], e[1:], data.query.identity, data.gallery.identity, data.query.camera, data.gallery.camera,
                    ).map == 1.0  # the nearer one of camera 1 does not count  # fmt: skip


def test_msmt17_as_the_authors_packed_it(root, monkeypatch):
    monkeypatch.setattr(msmt17, "_COUNTS", {"train": (2, 2), "query": (1, 1), "gallery": (1, 1)})
    tree(root, ["train/0000_c1_0.jpg", "train/0001_c15_0.jpg", "query/0003_c2_1.jpg", "gallery/0003_c11_1.jpg",
                "gallery/-1_c3_9.jpg"])  # fmt: skip
    data = msmt17.load(str(root))
    assert data.train.camera.tolist() == [1, 15] and data.gallery.camera.tolist() == [11]


def test_msmt17_v1_images_are_not_taken_for_v2(root, monkeypatch):
    monkeypatch.setattr(msmt17, "_COUNTS", {"train": (3, 2), "query": (1, 1), "gallery": (2, 1)})
    write_msmt17(root, "train", "test")
    with pytest.raises(FileNotFoundError, match=r"msmt17_v2/train: 3 of 3 images are missing, first .*mask_train_v2"):
        msmt17_v2.load(str(root))


# --- CUB-200-2011


def write_cub(root, rows):
    tree(root, [f"images/{path}" for _, path, _, _ in rows])
    for file, column in (("images.txt", 1), ("image_class_labels.txt", 2), ("train_test_split.txt", 3)):
        (root / file).write_text("".join(f"{row[0]} {row[column]}\n" for row in rows))


CUB = [
    (1, "001.Black_footed_Albatross/A_0046_18.jpg", 1, 0),
    (2, "001.Black_footed_Albatross/A_0009_34.jpg", 1, 1),
    (10, "101.White_Pelican/W_0001.jpg", 101, 1),
    (3, "101.White_Pelican/W_0002.jpg", 101, 0),
]


def test_cub_has_two_splits_that_do_not_mix(root, monkeypatch):
    monkeypatch.setattr(cub200, "_COUNTS", {"train": (2, 2), "test": (2, 2)})
    monkeypatch.setattr(cub200_metric, "_COUNTS", {"train": (2, 1), "test": (2, 1)})
    write_cub(root, CUB)
    closed, metric = cub200.load(str(root)), cub200_metric.load(str(root))
    assert closed.train.identity.tolist() == [1, 101] and closed.query.identity.tolist() == [1, 101]
    assert metric.train.identity.tolist() == [1, 1] and metric.query.identity.tolist() == [101, 101]
    assert closed.leave_one_out and metric.leave_one_out
    assert closed.train.name != metric.train.name  # so that their caches differ
    with pytest.raises(
        FileNotFoundError, match=r"cub200_metric: no images.txt in .*; it must hold images.txt.* and images/$"
    ):
        cub200_metric.load(str(root.parent))
    (root / "train_test_split.txt").write_text("1 0\n2 1\n3 0\n")
    with pytest.raises(ValueError, match=r"images.txt and train_test_split.txt differ in 1 image ids, 10"):
        cub200.load(str(root))


def test_cub_as_the_authors_packed_it(root, monkeypatch):
    monkeypatch.setattr(cub200, "_COUNTS", {"train": (2, 2), "test": (1, 1)})
    tree(root, ["train/0_12.jpg", "train/199_11787.jpg", "test/7_3.jpg"])
    assert cub200.load(str(root)).train.identity.tolist() == [0, 199]


# --- Market-1501


def test_market1501(root, monkeypatch):
    monkeypatch.setattr(market1501, "_COUNTS", {"train": (2, 2), "query": (1, 1), "gallery": (3, 2)})
    tree(
        root,
        [
            "bounding_box_train/0002_c1s1_000451_03.jpg",
            "bounding_box_train/0007_c6s3_000451_03.jpg.jpg",
            "query/0001_c1s1_001051_00.jpg",
            "bounding_box_test/0001_c2s1_001051_00.jpg",
            "bounding_box_test/0001_c1s1_009051_00.jpg",
            "bounding_box_test/0000_c3s1_001051_00.jpg",  # a distractor stays
            "bounding_box_test/-1_c3s1_001051_00.jpg",  # junk goes
        ],
    )
    (root / "bounding_box_train/Thumbs.db").write_bytes(b"")
    data = market1501.load(str(root))
    assert data.train.identity.tolist() == [2, 7] and data.train.camera.tolist() == [1, 6]
    assert sorted(data.gallery.identity.tolist()) == [0, 1, 1] and data.camera_filter
    tree(root, ["query/0001_c1s1.jpg"])
    with pytest.raises(ValueError, match=r"file name '0001_c1s1.jpg' does not follow"):
        market1501.load(str(root))
    with pytest.raises(FileNotFoundError, match=r"market1501/train: no images in .*bounding_box_train"):
        market1501.load(str(root.parent))


# --- Emoji


def test_emoji(root, monkeypatch):
    monkeypatch.setattr(emoji, "_COUNTS", {"train": (4, 2), "test": (2, 1)})
    motifs = [(1, "x", "train"), (2, "y", "train"), (3, "z", "test")]
    rows = [(f"{v}/{pid}.png", pid, cam, stem, part) for pid, stem, part in motifs for cam, v in ((1, "a"), (2, "b"))]
    with zipfile.ZipFile(root / "images.zip", "w") as archive:
        for row in rows:
            archive.writestr(row[0], picture("PNG", "RGBA"))
    with open(root / "manifest.csv", "w", newline="") as handle:
        csv.writer(handle).writerows([("file", "pid", "camid", "stem", "split"), *rows])
    data = emoji.load(str(root))
    assert data.train.identity.tolist() == [1, 1, 2, 2] and data.query.camera.tolist() == [1, 2]
    assert data.camera_filter and Frames(data.query, (4, 4))([0]).max() == 255  # transparent is white
    with zipfile.ZipFile(root / "images.zip", "w") as archive:
        archive.writestr("a/1.png", b"")
    with pytest.raises(FileNotFoundError, match=r"5 images of the manifest are not in .*, first a/2.png"):
        emoji.load(str(root))
    (root / "images.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match="no complete zip"):
        emoji.load(str(root))
    (root / "manifest.csv").write_text("file,pid,camid,stem,split\na/1.png,x,1,y,train\n")
    with zipfile.ZipFile(root / "images.zip", "w") as archive:
        archive.writestr("a/1.png", b"")
    with pytest.raises(ValueError, match=r"emoji: pid of a/1.png: 'x' is no number"):
        emoji.load(str(root))
    head = "file,pid,camid,stem,split\n"
    for text, message in (
        (head + "a,1,1\n", "line 2 has too few fields"),
        (head + "a,1,1,x,tset\n", "line 2: split must be train or test, got 'tset'"),
        (head + "a,1,1,x,test\n" * 2, "line 3: a is listed twice"),
    ):
        (root / "manifest.csv").write_text(text)
        with pytest.raises(ValueError, match=message):
            emoji.load(str(root))
    (root / "manifest.csv").write_text(head, encoding="utf-16")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        emoji.load(str(root))
    (root / "images.zip").write_bytes(b"PK")
    (root / "manifest.csv").write_text(head)
    (root / "manifest.csv").write_text("file,pid\na,1\n")
    with pytest.raises(ValueError, match="has no column camid, stem, split"):
        emoji.load(str(root))


def test_emoji_at_full_size(shared):
    data = emoji.load(str(shared / "data/emoji-xvendor"))
    assert (len(data.train), len(data.query)) == (4_263, 3_936) and set(data.query.camera) == {1, 2, 3, 4, 5}
    held = emoji.load(str(shared / "data/emoji-xvendor"), "validation")
    assert not set(held.query.identity) & set(held.train.identity) and len(held.query) + len(held.train) == 4_263


# --- A held-out part of any of them


def test_validation_holds_the_last_identities_out(root, monkeypatch):
    monkeypatch.setattr(inshop, "_COUNTS", {"train": (20, 20), "query": (2, 2), "gallery": (2, 2)})
    train = [(f"img/t{i}.jpg", f"id_{1000 + i:08d}", "train") for i in range(20)]
    write_inshop(root, [*train, *INSHOP[2:]])
    data = inshop.load(str(root), "validation")
    assert data.query.identity.tolist() == [1018, 1019] and len(data.train) == 18 and data.leave_one_out
    with pytest.raises(ValueError, match="has the parts test and validation, not 'val'"):
        inshop.load(str(root), "val")


def test_the_validation_part_of_birds_is_closed_set_too(root, monkeypatch):
    monkeypatch.setattr(cub200, "_COUNTS", {"train": (40, 2), "test": (1, 1)})
    rows = [(i, f"{c}/{i}.jpg", c, 1) for c in (1, 2) for i in range(20 * c, 20 * c + 20)] + [(99, "1/99.jpg", 1, 0)]
    write_cub(root, rows)
    data = cub200.load(str(root), "validation")
    assert set(data.query.identity) == set(data.train.identity) == {1, 2}
    assert (len(data.query), len(data.train)) == (8, 32) and not set(data.query.keys) & set(data.train.keys)


def test_cameras_and_identities_of_both_sides_must_fit(root, monkeypatch):
    monkeypatch.setattr(msmt17, "_COUNTS", {"train": (1, 1), "query": (1, 1), "gallery": (1, 1)})
    for query, gallery, message in (
        ("0003_c16_1", "0003_c1_1", r"msmt17/query: cameras 16 to 16, expected 1 to 15"),
        ("0003_c1_1", "0004_c2_1", r"msmt17/query: 1 identities are not in the gallery, such as 3"),
    ):
        folder = root / query
        tree(folder, ["train/0000_c1_0.jpg", f"query/{query}.jpg", f"gallery/{gallery}.jpg"])
        with pytest.raises(ValueError, match=message):
            msmt17.load(str(folder))


def test_a_table_row_that_is_too_short_is_named(tmp_path):
    (tmp_path / "list.txt").write_text("a 1\n\nb\n")
    with pytest.raises(ValueError, match=r"line 3 has 1 fields, expected 2: 'b'"):
        layout.table("x", tmp_path / "list.txt", 2)


# --- Real lists


def naive_scores(query, gallery, q_id, g_id, q_cam, g_cam):
    """Average precision and first hit of a few queries, one by one."""
    for q, person, camera in zip(query, q_id, q_cam, strict=True):
        similarity = gallery @ q
        kept = ~((g_id == person) & (g_cam == camera))
        order = np.argsort(-similarity, kind="stable")
        hits = np.flatnonzero((g_id[order] == person)[kept[order]]) + 1
        yield (np.arange(1, len(hits) + 1) / hits).mean() if len(hits) else np.nan


def seeded(identity, seed, width=64, noise=1.3):
    """Unit features: a centre per identity and noise."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(int(identity.max()) + 1, width))
    x = centres[identity] + noise * rng.normal(size=(len(identity), width)) * np.sqrt(2)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def check_at_real_size(q_id, g_id, q_cam, g_cam):
    query, gallery = seeded(q_id, 0), seeded(g_id, 1)
    found = evaluate(query, gallery, q_id, g_id, q_cam, g_cam)
    some = np.arange(0, len(q_id), 37)
    expected = list(naive_scores(query[some], gallery, q_id[some], g_id, q_cam[some], g_cam))
    np.testing.assert_allclose(found.average_precision[some], expected, rtol=1e-5)
    assert 0.05 < found.map < 0.95
    return found


@pytest.mark.slow
def test_market1501_lists_at_full_size(shared):
    folder = shared / "data/reid-annotations"
    train = gzip.open(folder / "market1501_list_train.txt.gz", "rt").read().splitlines()
    person, camera = market1501.labels([line.split()[0] for line in train])
    assert (len(person), len(np.unique(person))) == market1501._COUNTS["train"]
    assert camera.tolist() == [int(line.split()[2]) for line in train]
    # The list numbers classes 0 … 750 in order of the person's number, as our classifiers do.
    assert np.unique(person, return_inverse=True)[1].tolist() == [int(line.split()[1]) for line in train]
    test = [line.split() for line in gzip.open(folder / "market1501_list_test.txt.gz", "rt").read().splitlines()]
    assert sum(row[0].endswith(".jpg.jpg") for row in [*test, *(line.split() for line in train)]) == 22
    sides = {}
    for side, directory in (("query", "query"), ("gallery", "bounding_box_test")):
        rows = [row for row in test if row[0].startswith(f"{directory}/")]
        person, camera = market1501.labels([row[0].split("/")[1] for row in rows])
        assert person.tolist() == [int(r[1]) for r in rows] and camera.tolist() == [int(r[2]) for r in rows]
        assert (len(person), len(np.unique(person))) == market1501._COUNTS[side]
        sides[side] = person, camera
    (q_id, q_cam), (g_id, g_cam) = sides["query"], sides["gallery"]
    assert check_at_real_size(q_id, g_id, q_cam, g_cam).valid_queries == 3_368


@pytest.mark.slow
def test_prw_persons_at_full_size(shared):
    """Annotated boxes as images, the frame's name as camera: the camera rule on real numbers."""
    for part, boxes, labelled_ids in (("train", 18_048, 483), ("test", 25_062, 544)):
        with gzip.open(shared / f"data/reid-annotations/prw_{part}_pid.json.gz", "rt") as handle:
            content = json.load(handle)
        names = {image["id"]: image["file_name"] for image in content["images"]}
        person = np.array([a["person_id"] for a in content["annotations"]])
        frame = [names[a["image_id"]] for a in content["annotations"]]
        camera = layout.parse_names("prw", frame, r"c(\d)s\d+_\d+\.jpg")[:, 0]
        assert len(person) == boxes and set(camera) == {1, 2, 3, 4, 5, 6}
        known = person >= 0
        assert len(np.unique(person[known])) == labelled_ids
    person, camera = person[known], camera[known]
    query = np.sort(np.unique(person * 10 + camera, return_index=True)[1])  # one box a person and camera
    rest = np.setdiff1d(np.arange(len(person)), query)
    check_at_real_size(person[query], person[rest], camera[query], camera[rest])


@pytest.mark.slow
def test_cuhk_sysu_galleries_at_full_size(shared):
    """2,900 queries with 100 gallery frames each; the frames that hold the person are its relevant images."""
    protocol = loadmat(shared / "data/reid-annotations/cuhk_sysu_TestG100.mat", simplify_cells=True)["TestG100"]
    assert len(protocol) == 2_900
    counted, frames = Counter(), set()
    rng = np.random.default_rng(0)
    for number, entry in enumerate(protocol):
        gallery = entry["Gallery"]
        relevant = np.array([np.size(item["idlocate"]) == 4 for item in gallery])
        assert len(gallery) == 100 and relevant.any()
        counted["relevant"] += int(relevant.sum())
        counted["hard"] += int(entry["Query"]["ishard"])
        frames |= {item["imname"] for item in gallery}
        if number % 29 == 0:
            features = rng.normal(size=(101, 16)).astype(np.float32)
            features /= np.linalg.norm(features, axis=1, keepdims=True)
            labels, cameras = relevant.astype(int), np.arange(100)
            found = evaluate(features[:1], features[1:], [1], labels, [-1], cameras)
            arguments = np.array([1]), labels, np.array([-1]), cameras
            assert found.map == pytest.approx(next(naive_scores(features[:1], features[1:], *arguments)), rel=1e-5)
    assert counted == {"relevant": 5_447, "hard": 193} and len(frames) == 6_978
