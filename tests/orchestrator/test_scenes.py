"""Readers of person search: the tiny trees with their expected parses, real lists, and what is wrong with files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat

from losses.oim import UNLABELLED
from orchestrator import find
from orchestrator.datasets import cuhk_sysu, prw
from orchestrator.datasets.scenes import AllBut, SceneSet, SearchData
from orchestrator.evaluation.person_search import evaluate_detection, evaluate_search
from orchestrator.families.retrieval import data as retrieval_data
from orchestrator.needs import Place
from orchestrator.recipe import Data


@pytest.fixture
def tree(shared, tmp_path):
    """A copy of a tiny tree, with a picture for each frame."""

    def make(name: str, folder: str, names: list[str]):
        root = tmp_path / name
        shutil.copytree(shared / "golden" / "ddps" / "fixtures" / name, root)
        (root / folder).mkdir(parents=True)
        for frame in names:
            Image.new("RGB", (8, 8)).save(root / folder / frame)
        return root

    return make


@pytest.fixture
def expected(shared):
    return json.loads((shared / "golden" / "ddps" / "dataset_parse_expected.json").read_text())


@pytest.fixture
def cuhk_root(tree, expected):
    return tree("CUHK-SYSU", "Image/SSM", [f["img_name"] for p in ("train", "gallery") for f in expected["cuhk"][p]])


@pytest.fixture
def prw_root(tree, expected):
    return tree("PRW", "frames", [f["img_name"] for p in ("train", "gallery") for f in expected["prw"][p]])


def same(scenes: SceneSet, frames: list[dict], rename=lambda identity: identity) -> None:
    assert [key.rpartition("/")[2] for key in scenes.frames.keys] == [f["img_name"] for f in frames]
    for i, frame in enumerate(frames):
        assert scenes.boxes(i).tolist() == frame["boxes"]
        assert scenes.identity_N[scenes.rows(i)].tolist() == [rename(p) for p in frame["pids"]]


def test_cuhk_sysu_as_expected(cuhk_root, expected):
    found = cuhk_sysu.read(cuhk_root)
    same(found.train, expected["cuhk"]["train"])
    same(found.gallery, expected["cuhk"]["gallery"])
    names = [f["img_name"] for f in expected["cuhk"]["gallery"]]
    for query, frame, box in zip(expected["cuhk"]["query"], found.queries.frame_Q, found.queries.box_Q4, strict=True):
        assert names[frame] == query["img_name"] and box.tolist() == query["boxes"][0]
    assert list(found.galleries) == ["100", "50"]
    assert [len(f) for f in found.galleries["50"].frames] == [9] * 5
    assert [len(f) for f in found.galleries["100"].frames] == [14] * 5
    assert "frames/boxes/identities: train 12/" in found.protocol and "5 queries, gallery 100" in found.protocol


def test_prw_as_expected(prw_root, expected):
    found = prw.read(prw_root)
    raw = sorted({p for f in expected["prw"]["train"] for p in f["pids"]} - {UNLABELLED, prw.NO_IDENTITY})
    number = {identity: i for i, identity in enumerate(raw, 1)}
    same(found.train, expected["prw"]["train"], lambda identity: number.get(identity, UNLABELLED))
    same(found.gallery, expected["prw"]["gallery"])
    assert found.gallery.frames.camera.tolist() == [f["cam_id"] for f in expected["prw"]["gallery"]]
    assert found.train.identities.tolist() == list(range(1, len(raw) + 1))
    names = [f["img_name"] for f in expected["prw"]["gallery"]]
    for query, frame, box in zip(expected["prw"]["query"], found.queries.frame_Q, found.queries.box_Q4, strict=True):
        assert names[frame] == query["img_name"] and box.tolist() == query["boxes"][0]
    for q, frame in enumerate(found.queries.frame_Q):
        assert frame not in found.galleries["all"].frames[q] and len(found.galleries["all"].frames[q]) == 11
        cameras = found.gallery.frames.camera[found.galleries["other cameras"].frames[q]]
        assert found.gallery.frames.camera[frame] not in cameras


def check(found: SearchData, shared, case: str, names: dict[str, str], context: tuple[int, int]) -> None:
    data = dict(np.load(shared / "golden" / "ddps" / f"{case}.npz"))
    detections, embeddings = (np.split(data[n], np.cumsum(data["gal_count"])[:-1]) for n in ("gal_det", "gal_feat"))
    people = np.split(data["q_feat"], np.cumsum(data["q_count"])[:-1])
    for name, prefix in names.items():
        gallery = found.galleries[name]
        for matched in (0, 1):
            options = dict(zip(("context_detections", "context_people"), context, strict=True))
            options |= {"context_embeddings": people if matched else None}
            score = evaluate_search(
                data["query_feat"], gallery.targets, gallery.frames, detections, embeddings, **options
            )
            np.testing.assert_allclose(score.average_precision_Q, data[f"{prefix}_cbgm{matched}_aps"], atol=1e-6)
            assert score.found_QK.astype(int).tolist() == data[f"{prefix}_cbgm{matched}_top"].tolist()
    boxes = [found.gallery.boxes(i) for i in range(len(found.gallery))]
    labelled = [found.gallery.identity_N[found.gallery.rows(i)] != UNLABELLED for i in range(len(found.gallery))]
    for threshold in ("0.01", "0.5"):
        for only in (0, 1):
            score = evaluate_detection(detections, boxes, labelled if only else None, float(threshold))
            assert score == pytest.approx(data[f"det_recall_ap_th{threshold}_lab{only}"].tolist(), abs=1e-9)


def test_recorded_scores_of_both_protocols(cuhk_root, prw_root, shared):
    check(cuhk_sysu.read(cuhk_root), shared, "eval_cuhk_easy", {"50": "g50", "100": "g100"}, (10, 3))
    check(prw.read(prw_root), shared, "eval_prw_easy", {"all": "allcam1", "other cameras": "allcam0"}, (30, 4))


def test_what_is_wrong_with_cuhk_sysu_is_one_line(cuhk_root, tmp_path):
    split = cuhk_root / "annotation" / "test" / "train_test"
    with pytest.raises(ValueError, match=r"cuhk_sysu/train: 12 frames, \d+ boxes, \d+ identities; expected 11,206"):
        cuhk_sysu.load(str(cuhk_root))
    with pytest.raises(ValueError, match="no field 'Train'; it has Img"):
        shutil.copy(cuhk_root / "annotation" / "Images.mat", split / "Train.mat")
        cuhk_sysu.read(cuhk_root)
    savemat(split / "Train.mat", {"Train": np.zeros((2, 1))})
    with pytest.raises(ValueError, match=r"Train.mat is not laid out as the release's \(.*\); take the annotation"):
        cuhk_sysu.read(cuhk_root)
    (split / "Train.mat").write_bytes(b"no MATLAB")
    with pytest.raises(ValueError, match=r"Train.mat cannot be read"):
        cuhk_sysu.read(cuhk_root)
    (split / "Train.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"no Train.mat in .*; --data-root must hold Image/SSM"):
        cuhk_sysu.read(cuhk_root)
    with pytest.raises(FileNotFoundError, match=r"no Train.mat"):
        cuhk_sysu.load(str(tmp_path))


def test_a_nested_field_that_is_missing_is_told_with_its_file(cuhk_root):
    path = cuhk_root / "annotation" / "Images.mat"
    entries = loadmat(path)["Img"]
    without = np.zeros(entries.shape, [("imname", "O")])
    without["imname"] = entries["imname"]
    savemat(path, {"Img": without})
    with pytest.raises(ValueError, match=r"Images.mat is not laid out as the release's \(no field of name box\)"):
        cuhk_sysu.read(cuhk_root)


def test_a_query_in_no_frame_of_the_gallery_is_named(cuhk_root):
    path = cuhk_root / "annotation" / "pool.mat"
    savemat(path, {"pool": loadmat(path)["pool"].ravel()[:1].reshape(1, 1)})
    with pytest.raises(ValueError, match=r"s\d+.jpg is searched, and pool.mat has no such frame; is it the right"):
        cuhk_sysu.read(cuhk_root)


def test_what_is_wrong_with_prw_is_one_line(prw_root, tmp_path):
    with pytest.raises(ValueError, match=r"prw/train: frames, boxes, identities are \(12, "):
        prw.load(str(prw_root))
    (prw_root / "frames" / "c1s1_000401.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 12 images are missing, first .*c1s1_000401.jpg"):
        prw.read(prw_root)
    first = prw_root / "annotations" / "c1s1_000151.jpg.mat"
    savemat(first, {"box_new": np.zeros((2, 4))})
    with pytest.raises(ValueError, match=r"box_new of .* is \(2, 4\), expected \(n, 5\)"):
        prw.read(prw_root)
    savemat(first, {"box_new": np.full((2, 5), np.nan)})
    with pytest.raises(ValueError, match="has a number that is not finite; take the annotation as released"):
        prw.read(prw_root)
    savemat(first, {"boxes": np.zeros((2, 5))})
    with pytest.raises(ValueError, match=r"has none of box_new, anno_file, anno_previous"):
        prw.read(prw_root)
    with pytest.raises(FileNotFoundError, match=r"no frame_train.mat"):
        prw.load(str(tmp_path))


@pytest.mark.parametrize("name", ["cuhk_sysu", "prw"])
def test_scenes_are_no_data_of_a_retrieval_method(name, cuhk_root, prw_root, monkeypatch):
    module, root = {"cuhk_sysu": (cuhk_sysu, cuhk_root), "prw": (prw, prw_root)}[name]
    with pytest.raises(ValueError, match=rf"{name} is scored on its test part, got data.part=validation"):
        module.load(str(root), "validation")
    monkeypatch.setattr(module, "load", lambda data_root, part: module.read(Path(data_root)))
    find.listed.cache_clear()
    with pytest.raises(ValueError, match=rf"{name} holds no images of one object each"):
        retrieval_data.listed(Data(name=name), Place(storage="", data_root=str(root)))


def test_a_gallery_of_all_but_some():
    frames = AllBut(5, [np.array([1]), np.array([0, 4])])
    assert [f.tolist() for f in frames] == [[0, 2, 3, 4], [1, 2, 3]] and len(frames) == 2


@pytest.mark.slow
def test_galleries_of_100_at_full_size(shared, tmp_path):
    path = shared / "data" / "reid-annotations" / "cuhk_sysu_TestG100.mat"
    names = {str(n) for person in loadmat(path, simplify_cells=True)["TestG100"]
             for n in [person["Query"]["imname"], *(e["imname"] for e in person["Gallery"])]}  # fmt: skip
    frame = {name: i for i, name in enumerate(sorted(names))}
    gallery = cuhk_sysu._gallery(path, "TestG100", frame)
    assert {len(f) for f in gallery.frames} == {100} and len(gallery.frames) == 2_900
    # 5,447 entries hold a person; four of them name a frame of their query a second time.
    assert sum(map(len, gallery.targets)) == 5_443 and len(frame) == 6_978
