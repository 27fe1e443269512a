"""Readers of people: tiny trees in the exact layouts, the camera rule, and the two embedded or pasted sets."""

import numpy as np
import pytest
import torch
from PIL import Image

from orchestrator.datasets import (
    demo_people,
    dukemtmc,
    emoji_occluded,
    market1501,
    occluded_duke,
    occluded_reid,
    partial_reid,
    partial_reid_occluded,
)
from orchestrator.datasets.images import Frames
from orchestrator.evaluation.retrieval import evaluate


def tree(root, names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 16), "grey").save(path, "TIFF" if path.suffix == ".tif" else "JPEG")


@pytest.fixture
def root(tmp_path):
    """A data root whose own path holds what careless parsing would take for identities and cameras."""
    folder = tmp_path / "2024_c9_data"
    folder.mkdir(parents=True)
    return folder


MARKET = ["Market-1501-v15.09.15/bounding_box_train/0002_c1s1_000451_03.jpg",
          "Market-1501-v15.09.15/bounding_box_train/0007_c3s1_000451_03.jpg"]  # fmt: skip
DUKE = {
    "bounding_box_train": ["0001_c2_f0046182.jpg", "0001_c5_f0051341.jpg", "0009_c1_f0000001.jpg"],
    "query": ["0005_c2_f0046985.jpg"],
    "bounding_box_test": ["0005_c2_f0046986.jpg", "0005_c5_f0051781.jpg", "0034_c8_f0000003.jpg"],
}
TINY_DUKE = {"train": (3, 2), "query": (1, 1), "gallery": (3, 2)}


@pytest.mark.parametrize("inside", ["", "DukeMTMC-reID/"])
def test_dukemtmc(root, monkeypatch, inside):
    monkeypatch.setattr(dukemtmc, "_COUNTS", TINY_DUKE)
    tree(root, [f"{inside}{folder}/{name}" for folder, names in DUKE.items() for name in names])
    (root / inside / "bounding_box_train" / "Thumbs.db").write_bytes(b"not an image")
    data = dukemtmc.load(str(root))
    assert data.train.identity.tolist() == [1, 1, 9] and data.train.camera.tolist() == [2, 5, 1]
    assert data.gallery.identity.tolist() == [5, 5, 34] and data.camera_filter
    assert "withdrawn" in data.notice
    assert dukemtmc.load(str(root), "validation").query.identity.tolist() == [9]
    tree(root, [f"{inside}query/0005_c9_f0046985.jpg"])
    with pytest.raises(ValueError, match="does not follow"):
        dukemtmc.load(str(root))


def test_dukemtmc_counts_are_asserted(root):
    tree(root, [f"{folder}/{name}" for folder, names in DUKE.items() for name in names])
    with pytest.raises(ValueError, match=r"dukemtmc/train: 3 images of 2 identities, expected 16,522 of 702"):
        dukemtmc.load(str(root))
    with pytest.raises(FileNotFoundError, match="--data-root"):
        dukemtmc.load("")


def test_occluded_duke_from_lists_and_from_folders(root, monkeypatch):
    monkeypatch.setattr(occluded_duke, "_COUNTS", {"train": (2, 1), "query": (2, 1), "gallery": (3, 2)})
    tree(root, [f"DukeMTMC-reID/{folder}/{name}" for folder, names in DUKE.items() for name in names])
    # A query of the new division lies in the old gallery, a gallery image in the old query folder.
    lists = {"train": DUKE["bounding_box_train"][:2], "query": DUKE["bounding_box_test"][:2],
             "gallery": [*DUKE["bounding_box_test"][1:], *DUKE["query"]]}  # fmt: skip
    for part, names in lists.items():
        (root / f"{part}.list").write_text("\n".join(names) + "\n")
    data = occluded_duke.load(str(root))
    assert data.query.keys == ("bounding_box_test/0005_c2_f0046986.jpg", "bounding_box_test/0005_c5_f0051781.jpg")
    assert data.gallery.keys[2] == "query/0005_c2_f0046985.jpg" and "withdrawn" in data.notice
    assert Frames(data.query, (8, 4))([0, 1]).shape == (2, 3, 8, 4)
    built = root / "elsewhere"
    folders = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
    tree(built, [f"Occluded_Duke/{folders[part]}/{name}" for part, names in lists.items() for name in names])
    again = occluded_duke.load(str(built))
    assert again.gallery.identity.tolist() == sorted(data.gallery.identity.tolist())
    (root / "query.list").write_text("0001_c2_f9999999.jpg\n")
    monkeypatch.setattr(occluded_duke, "_COUNTS", {"train": (2, 1), "query": (1, 1), "gallery": (3, 2)})
    with pytest.raises(FileNotFoundError, match="1 of 1 images are missing"):
        occluded_duke.load(str(root))


def test_queries_that_are_in_the_gallery_do_not_find_themselves(root, monkeypatch):
    """The camera rule of Occluded-Duke: without it an image finds its own file first."""
    monkeypatch.setattr(occluded_duke, "_COUNTS", {"train": (2, 1), "query": (1, 1), "gallery": (4, 3)})
    tree(root, [f"DukeMTMC-reID/{folder}/{name}" for folder, names in DUKE.items() for name in names])
    lists = {"train": DUKE["bounding_box_train"][:2], "query": DUKE["query"],
             "gallery": [*DUKE["query"], *DUKE["bounding_box_test"][1:], DUKE["bounding_box_train"][2]]}  # fmt: skip
    for part, names in lists.items():
        (root / f"{part}.list").write_text("\n".join(names) + "\n")
    data = occluded_duke.load(str(root))
    query = torch.tensor([[1.0, 0.0]])
    gallery = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [0.0, -1.0]])  # itself, the match, a stranger, …
    arguments = query, gallery, data.query.identity, data.gallery.identity
    with_rule = evaluate(*arguments, data.query.camera, data.gallery.camera)
    assert evaluate(*arguments).log("x")["x/rank1"] == 1.0
    assert with_rule.log("x")["x/rank1"] == 0.0 and with_rule.log("x")["x/rank3"] == 1.0


@pytest.mark.parametrize(("folders", "suffix"), [(("occluded_body_images", "whole_body_images"), "tif"),
                                                 (("query", "gallery"), "jpg")])  # fmt: skip
def test_occluded_reid(root, monkeypatch, folders, suffix):
    monkeypatch.setattr(market1501, "_COUNTS", {"train": (2, 2)})
    monkeypatch.setattr(occluded_reid, "_COUNT", (4, 2))
    tree(root, MARKET)
    inner = "{p:03d}/" if suffix == "tif" else ""
    tree(root, [f"Occluded_REID/{folder}/{inner.format(p=p)}{p:03d}_{i:02d}.{suffix}"
                for folder in folders for p in (1, 2) for i in (1, 2)])  # fmt: skip
    data = occluded_reid.load(str(root))
    assert data.query.identity.tolist() == [1, 1, 2, 2] == data.gallery.identity.tolist()
    assert set(data.query.camera) == {0} and set(data.gallery.camera) == {1}
    assert data.train.identity.tolist() == [2, 7]
    assert Frames(data.query, (16, 8))([0]).float().mean() > 100
    # Equal image numbers are not equal cameras: every true match counts.
    same = torch.eye(2).repeat_interleave(2, dim=0)
    found = evaluate(same, same, data.query.identity, data.gallery.identity, data.query.camera, data.gallery.camera)
    assert found.log("x")["x/map"] == 1.0
    monkeypatch.setattr(occluded_reid, "_COUNT", (1_000, 200))
    with pytest.raises(ValueError, match="expected 1,000 of 200"):
        occluded_reid.load(str(root))


def test_occluded_reid_without_its_folders(root, monkeypatch):
    monkeypatch.setattr(market1501, "_COUNTS", {"train": (2, 2)})
    tree(root, MARKET)
    with pytest.raises(FileNotFoundError, match="no occluded_body_images or query"):
        occluded_reid.load(str(root))


def test_partial_reid_with_folders_and_with_lists(root, monkeypatch):
    monkeypatch.setattr(market1501, "_COUNTS", {"train": (2, 2)})
    monkeypatch.setattr(partial_reid, "_COUNT", (2, 2))
    tree(root, MARKET)
    tree(root, [f"Partial-REID/{kind}_body_images/{p:03d}_001.jpg" for kind in ("partial", "occluded", "whole")
                for p in (1, 2)])  # fmt: skip
    data = partial_reid.load(str(root))
    assert data.query.keys == ("partial_body_images/001_001.jpg", "partial_body_images/002_001.jpg")
    assert partial_reid_occluded.load(str(root)).query.keys[0] == "occluded_body_images/001_001.jpg"
    for listing, kind in (("Probe.txt", "partial"), ("Gallery.txt", "whole")):
        lines = [f"{kind}_body_images\\{p:03d}_001.jpg" for p in (2, 1)]
        (root / "Partial-REID" / listing).write_text("\n".join(lines))
    assert partial_reid.load(str(root)).query.identity.tolist() == [2, 1]
    with pytest.raises(ValueError, match="test and validation"):
        partial_reid.load(str(root), "train")


# --- Drawn people, and emoji with something in front ------------------------------------------------------------------


def test_demo_people_are_drawn_the_same_every_time():
    data = demo_people.load("")
    assert (len(data.train), len(data.query), len(data.gallery)) == (1200, 240, 480)
    assert not set(data.train.identity) & set(data.query.identity)
    assert set(data.query.identity) == set(data.gallery.identity)
    assert all(key.endswith("/1") for key in data.query.keys)  # every query is occluded
    assert 0.1 < np.mean([key.endswith("/1") for key in data.gallery.keys]) < 0.2
    assert data.query.reader.read(data.query.keys[0]) == data.query.reader.read(data.query.keys[0])
    assert not set(data.query.keys) & set(data.gallery.keys)
    validation = demo_people.load("", "validation")
    assert not set(validation.query.identity) & {*data.train.identity, *data.query.identity}


def test_occluded_emoji_are_covered_by_a_third_to_a_half(shared):
    data = emoji_occluded.load(str(shared / "data" / "emoji-xvendor"))
    clean = Frames(data.gallery, (64, 64))(range(0, 400, 20)).float()
    under = Frames(data.query, (64, 64))(range(0, 400, 20)).float()
    assert data.query.keys == data.gallery.keys and data.camera_filter
    changed = ((clean - under).abs().amax(1) > 4).float().mean((1, 2))
    assert 0.28 < changed.min() and changed.max() < 0.55
    assert torch.equal(under, Frames(data.query, (64, 64))(range(0, 400, 20)).float())
    assert data.query.reader.stamp(data.query.keys) != data.gallery.reader.stamp(data.gallery.keys)
