"""Readers of face data: tiny trees in the original layouts, the real ORL faces, the drawn demo, and bad lists."""

import hashlib
import io
import zipfile

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from orchestrator.datasets import agedb, calfw, cfp, cplfw, demo_faces, folder_faces, ijbb, ijbc, lfw, orl
from orchestrator.datasets.alignment import COLUMNS, TEMPLATE_112, Aligned, align
from orchestrator.datasets.images import Folder, Frames, decode, described, rebuilt

FACE = " ".join(map(str, TEMPLATE_112.ravel()))  # landmarks of an image that is aligned


def save(root, names, size=(112, 112)) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shade = int.from_bytes(hashlib.sha256(name.encode()).digest()[:3])
        Image.new("RGB", size, (shade % 256, shade // 256 % 256, shade // 65536)).save(path, "PNG")


def named(pairs) -> list[tuple[str, str, bool]]:
    """Pairs by the keys of their images."""
    keys = pairs.images.keys
    columns = pairs.first_P.tolist(), pairs.second_P.tolist(), pairs.same_P.tolist()
    return [(keys[a], keys[b], same) for a, b, same in zip(*columns, strict=True)]


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "2024_data" / "faces"
    folder.mkdir(parents=True)
    return folder


# --- LFW


def lfw_lines(each=1, folds=10) -> list[str]:
    lines = [f"{folds}\t{each}"]
    for fold in range(folds):
        lines += [f"Ann_{fold}\t{n + 1}\t{n + 2}" for n in range(each)]
        lines += [f"Ann_{fold}\t{n + 1}\tBob\t{fold + n + 1}" for n in range(each)]
    return lines


def lfw_images(each=1, folds=10) -> list[str]:
    ann = [f"Ann_{fold}/Ann_{fold}_{n + 1:04d}.jpg" for fold in range(folds) for n in range(each + 1)]
    return ann + [f"Bob/Bob_{n + 1:04d}.jpg" for n in range(folds + each - 1)]


@pytest.fixture
def one_each(monkeypatch):
    for reader in (lfw, calfw, agedb, cfp):
        monkeypatch.setattr(reader, "_EACH", 1)


def write(path, lines) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("folder", ["lfw", "lfw_funneled", "."])
def test_lfw(root, one_each, folder):
    write(root / "pairs.txt", lfw_lines())
    save(root / folder, lfw_images())
    data = lfw.load(str(root))
    assert data.train is None and list(data.verification) == ["lfw"] and "real people" in data.notice
    pairs = data.verification["lfw"]
    assert pairs.folds == 10 and pairs.images.reader == Folder(str(root / folder).removesuffix("/."))
    assert named(pairs) == [
        pair
        for fold in range(10)
        for pair in (
            (f"Ann_{fold}/Ann_{fold}_0001.jpg", f"Ann_{fold}/Ann_{fold}_0002.jpg", True),
            (f"Ann_{fold}/Ann_{fold}_0001.jpg", f"Bob/Bob_{fold + 1:04d}.jpg", False),
        )
    ]
    assert Frames(pairs.images, (112, 112))([0, 5]).shape == (2, 3, 112, 112)


def test_lfw_keeps_the_order_of_the_list_in_every_fold(root, monkeypatch):
    monkeypatch.setattr(lfw, "_EACH", 3)
    write(root / "pairs.txt", lfw_lines(each=3))
    save(root / "lfw", lfw_images(each=3))
    pairs = lfw.load(str(root)).verification["lfw"]
    assert pairs.same_P.reshape(10, 6).tolist() == [[True] * 3 + [False] * 3] * 10
    assert named(pairs)[7] == ("Ann_1/Ann_1_0002.jpg", "Ann_1/Ann_1_0003.jpg", True)


def test_lfw_is_aligned_by_its_landmarks(root, one_each):
    write(root / "pairs.txt", lfw_lines())
    save(root / "lfw", lfw_images(), (250, 250))
    with pytest.raises(
        ValueError, match=r"lfw: 30 of 30 images are not 112 × 112, first Ann_0/Ann_0_0001.jpg of 250 × 250"
    ):
        lfw.load(str(root))
    points = ",".join(map(str, (2 * TEMPLATE_112 + 10).ravel()))
    write(root / "landmarks.csv", [COLUMNS, *(f"{name},{points}" for name in lfw_images())])
    images = lfw.load(str(root)).verification["lfw"].images
    assert images.reader == Aligned(str(root / "lfw"), str(root / "landmarks.csv"))
    found = Frames(images, (112, 112))([3])[0].permute(1, 2, 0).numpy()
    with Image.open(root / "lfw" / images.keys[3]) as photograph:
        np.testing.assert_array_equal(found, np.asarray(align(photograph, 2 * TEMPLATE_112 + 10)))
    write(root / "landmarks.csv", [COLUMNS, *(f"{name},{points}" for name in lfw_images()[1:])])
    with pytest.raises(ValueError, match=r"lfw: 1 of 30 images have no landmarks in .*, first Ann_0/Ann_0_0001.jpg"):
        lfw.load(str(root))


def test_lfw_pairs_that_name_a_missing_image(root, one_each):
    write(root / "pairs.txt", lfw_lines())
    save(root / "lfw", lfw_images())
    (root / "lfw/Ann_4/Ann_4_0001.jpg").unlink()
    (root / "lfw/Bob/Bob_0009.jpg").unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"lfw: pairs.txt line 10 names Ann_4/Ann_4_0001.jpg, which is not in .*lfw; 3 of 20 pairs name a missing",
    ):
        lfw.load(str(root))


def test_lfw_lists_that_are_wrong(root, one_each):
    lines = lfw_lines()
    for wrong, message in (
        (lines[:-1], r"pairs.txt has 19 lines of pairs, expected 10 × 2 × 1 = 20, 1 of one person and 1 of two in"),
        ([*lines, lines[-1]], r"pairs.txt has 21 lines of pairs, expected 10 × 2 × 1 = 20"),
        (lines[1:], r"pairs.txt begins with 'Ann_0 1 2', expected the number of folds and of pairs of each kind in"),
        (["10"], r"pairs.txt begins with '10', expected the number of folds"),
        (["10\t0"], r"pairs.txt begins with '10 0', expected the number of folds"),
        ([""], r"pairs.txt begins with '', expected the number of folds"),
        ([lines[0], lines[2], lines[1], *lines[3:]], r"line 2 is 'Ann_0 1 Bob 1', expected name n1 n2, a pair of one"),
        ([*lines[:2], "Ann_0\t1\tAnn_0\t2", *lines[3:]], r"line 3 is 'Ann_0 1 Ann_0 2', expected name1 n1 name2 n2"),
        ([lines[0], "Ann_0\t1\tx", *lines[2:]], r"lfw: pairs.txt: 'x' is no number"),
        ([lines[0], "../Ann\t1\t2", *lines[2:]], r"is not in|is not a path below"),
    ):
        write(root / "pairs.txt", wrong)
        save(root / "lfw", lfw_images())
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            lfw.load(str(root))
    (root / "pairs.txt").write_bytes("10\t1\nJosé\t1\t2\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"pairs.txt line 2 is not UTF-8 text"):
        lfw.load(str(root))


def test_lfw_says_what_is_missing_and_checks_the_published_counts(root):
    with pytest.raises(FileNotFoundError, match=r"lfw: --data-root DIR is needed; it must hold pairs.txt, lfw/<Name>"):
        lfw.load("")
    with pytest.raises(FileNotFoundError, match=r"lfw: no pairs.txt in .*; --data-root must hold pairs.txt, lfw/"):
        lfw.load(str(root))
    with pytest.raises(ValueError, match=r"lfw is only verified on: it has the part test alone, not 'validation'"):
        lfw.load(str(root), "validation")
    for lines, message in (
        (lfw_lines(), r"lfw: fold 1 of 10 has 1 pairs of one person and 1 of two, expected 300 of both in each of 10"),
        (lfw_lines(300, 2), r"lfw: fold 1 of 2 has 300 pairs of one person and 300 of two, expected 300 of both in"),
        (lfw_lines(300, 1), r"lfw: fold 1 of 0 has 300 pairs of one person and 300 of two"),
    ):
        write(root / "pairs.txt", lines)
        with pytest.raises(ValueError, match=message):
            lfw.load(str(root))


# --- CALFW, CPLFW


def flagged(each=1) -> list[str]:
    same = [line for pair in range(10 * each) for line in (f"s{pair}_a.jpg {pair + 1}", f"s{pair}_b.jpg {pair + 1}")]
    return same + [line for pair in range(10 * each) for line in (f"d{pair}_a.jpg 0", f"d{pair}_b.jpg 0")]


@pytest.mark.parametrize(("reader", "name"), [(calfw, "calfw"), (cplfw, "cplfw")])
@pytest.mark.parametrize("folder", ["aligned images/", "images/", ""])
def test_calfw_and_cplfw_interleave_the_halves(root, monkeypatch, reader, name, folder):
    monkeypatch.setattr(calfw, "_EACH", 2)
    write(root / f"pairs_{name.upper()}.txt", flagged(2))
    save(root / folder, [line.split()[0] for line in flagged(2)])
    data = reader.load(str(root))
    assert data.train is None and list(data.verification) == [name]
    expected = []
    for fold in range(10):
        for letter in "sd":
            expected += [
                (f"{folder}{letter}{pair}_a.jpg", f"{folder}{letter}{pair}_b.jpg", letter == "s")
                for pair in (2 * fold, 2 * fold + 1)
            ]
    assert named(data.verification[name]) == expected and data.verification[name].folds == 10


def test_calfw_inside_its_own_folder(root, one_each):
    write(root / "calfw" / "pairs_CALFW.txt", flagged())
    save(root / "calfw/images", [line.split()[0] for line in flagged()])
    assert calfw.load(str(root)).verification["calfw"].images.reader == Folder(str(root / "calfw"))


def test_calfw_lists_that_are_wrong(root, one_each):
    lines = flagged()
    save(root, [line.split()[0] for line in lines])
    swapped = [*lines[20:22], *lines[2:20], *lines[:2], *lines[22:]]
    for wrong, message in (
        (
            lines[:-1],
            r"pairs_CALFW.txt has 39 lines, an odd number, so one image has no partner; two lines make a pair",
        ),
        (lines[:-2], r"pairs_CALFW.txt has 38 lines, no 10 folds of equal halves"),
        ([], r"pairs_CALFW.txt has 0 lines, no 10 folds"),
        (swapped, r"line 1 has the flag 0, but the first 10 pairs must be of one person and the last 10 of two"),
        (
            ["s0_a.jpg 1", "s0_b.jpg 0", *lines[2:]],
            r"lines 1 and the next are 's0_a.jpg 1' and 's0_b.jpg 0', expected a",
        ),
        (["s0_a.jpg", *lines[1:]], r"lines 1 and the next are 's0_a.jpg' and"),
    ):
        write(root / "pairs_CALFW.txt", wrong)
        with pytest.raises(ValueError, match=message):
            calfw.load(str(root))
    write(root / "pairs_CALFW.txt", lines)
    (root / "d3_b.jpg").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"calfw: pairs_CALFW.txt line 27 names d3_b.jpg, which is not in .*; 1 of 20 pairs"
    ):
        calfw.load(str(root))


def test_calfw_says_what_is_missing_and_checks_the_published_counts(root):
    with pytest.raises(
        FileNotFoundError, match=r"cplfw: --data-root DIR is needed; it must hold pairs_CPLFW.txt and the"
    ):
        cplfw.load("")
    with pytest.raises(FileNotFoundError, match=r"calfw: no pairs_CALFW.txt in .*must hold pairs_CALFW.txt and the"):
        calfw.load(str(root))
    with pytest.raises(ValueError, match=r"cplfw is only verified on: it has the part test alone"):
        cplfw.load(str(root), "validation")
    write(root / "pairs_CALFW.txt", flagged())
    with pytest.raises(
        ValueError, match=r"calfw: fold 1 of 10 has 1 pairs of one person and 1 of two, expected 300 of"
    ):
        calfw.load(str(root))


# --- AgeDB-30


def cell(values: list) -> np.ndarray:
    found = np.empty(len(values), object)
    found[:] = values
    return found


def write_agedb(root, labels=True, folds=10, variable="splits", partner=True) -> None:
    """The nesting of the official file: a cell of structures, in each 2 × n cells of structures with name and age."""
    splits = []
    for fold in range(folds):
        sides = np.empty((2, 2), object)
        first, second = [f"Ann_{fold}_a_30_f", f"Ann_{fold}_a_30_f"], [f"Ann_{fold}_b_60_f", f"Bob_{fold}_c_61_m"]
        for side, names in enumerate((first, second)):
            sides[side] = cell([{"name": name, "age": 30.0 + 30 * side} for name in names])
        splits.append({"pair": sides if partner else sides[:1]} | ({"label": np.array([1.0, -1.0])} if labels else {}))
    savemat(root / "04_FINAL_protocol_30_years.mat", {variable: cell(splits)[:, None]})


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("inside", ["AgeDB", "."])
def test_agedb(root, one_each, labels, inside):
    (root / inside).mkdir(exist_ok=True)
    write_agedb(root / inside, labels)
    folder = root / inside / "03_Protocol_Images"
    save(folder, [f"{n}.jpg" for f in range(10) for n in (f"Ann_{f}_a_30_f", f"Ann_{f}_b_60_f", f"Bob_{f}_c_61_m")])
    data = agedb.load(str(root))
    assert data.train is None and list(data.verification) == ["agedb_30"]
    pairs = data.verification["agedb_30"]
    assert named(pairs) == [
        pair
        for f in range(10)
        for pair in (
            (f"Ann_{f}_a_30_f.jpg", f"Ann_{f}_b_60_f.jpg", True),
            (f"Ann_{f}_a_30_f.jpg", f"Bob_{f}_c_61_m.jpg", False),
        )
    ]
    (folder / "Bob_6_c_61_m.jpg").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"agedb_30: 04_FINAL_.*.mat split 7 pair 2 names Bob_6_c_61_m.jpg, which"
    ):
        agedb.load(str(root))


def test_agedb_protocols_that_are_wrong(root, one_each):
    with pytest.raises(FileNotFoundError, match=r"agedb: no 04_FINAL_protocol_30_years.mat in .*must hold 04_FINAL"):
        agedb.load(str(root))
    for changes, message in (
        ({"variable": "split"}, r"agedb: .*.mat has no variable splits; take the protocol as it was released"),
        ({"folds": 9}, r"agedb: fold 1 of 9 has 1 pairs of one person and 1 of two, expected 1 of both in each of 10"),
        ({"partner": False}, r"agedb: .*.mat is not laid out as the release's"),
    ):
        write_agedb(root, **changes)
        with pytest.raises(ValueError, match=message):
            agedb.load(str(root))
    savemat(root / "04_FINAL_protocol_30_years.mat", {"splits": np.zeros((10, 1))})
    with pytest.raises(ValueError, match=r"agedb: .*.mat is not laid out as the release's"):
        agedb.load(str(root))
    with pytest.raises(ValueError, match=r"agedb is only verified on"):
        agedb.load(str(root), "validation")


# --- CFP


def write_cfp(root) -> list[str]:
    frontal = [f"Data/Images/{who:03d}/frontal/{n:02d}.jpg" for who in (1, 2) for n in range(1, 11)]
    profile = [f"Data/Images/{who:03d}/profile/{n:02d}.jpg" for who in (1, 2) for n in range(1, 5)]
    for letter, paths in (("F", frontal), ("P", profile)):
        write(root / f"Protocol/Pair_list_{letter}.txt", [f"{n} ../{path}" for n, path in enumerate(paths, 1)])
    for fold in range(1, 11):
        split = root / "Protocol/Split"
        write(split / f"FP/{fold:02d}/same.txt", [f"{fold},{fold % 4 + 1}"])
        write(split / f"FP/{fold:02d}/diff.txt", [f"{fold},{fold % 4 + 5}"])
        write(split / f"FF/{fold:02d}/same.txt", [f"{fold},{fold % 10 + 1}"])
        write(split / f"FF/{fold:02d}/diff.txt", [f"{fold},{fold + 10}"])
    save(root, frontal + profile)
    return frontal


@pytest.mark.parametrize("inside", ["cfp-dataset", "."])
def test_cfp_gives_both_protocols(root, one_each, inside):
    write_cfp(root / inside)
    data = cfp.load(str(root))
    assert data.train is None and list(data.verification) == ["cfp_fp", "cfp_ff"]
    image = "Data/Images/{:03d}/{}/{:02d}.jpg".format
    profile, frontal = [], []
    for f in range(1, 11):
        one = image(1, "frontal", f)
        profile += [(one, image(1, "profile", f % 4 + 1), True), (one, image(2, "profile", f % 4 + 1), False)]
        frontal += [(one, image(1, "frontal", f % 10 + 1), True), (one, image(2, "frontal", f), False)]
    assert named(data.verification["cfp_fp"]) == profile and named(data.verification["cfp_ff"]) == frontal


def test_cfp_lists_that_are_wrong(root, one_each, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match=r"cfp: no Pair_list_F.txt in .*Protocol; --data-root must hold Protocol/"
    ):
        cfp.load(str(root))
    write_cfp(root)
    path = root / "Protocol/Split/FP/03/diff.txt"
    for line in ("3,99", "3", "3,4,5", "x,1", "99,1"):
        write(path, [line])
        with pytest.raises(
            ValueError,
            match=rf"cfp_fp: .*diff.txt line 1 is '{line}', expected two numbers n1,n2 of Pair_list_F.txt and",
        ):
            cfp.load(str(root))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"cfp: no diff.txt in .*FP/03"):
        cfp.load(str(root))
    write(path, ["3 , 8"])
    (root / "Data/Images/002/profile/04.jpg").unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"cfp_fp: Split/FP/03/diff.txt line 1 names Data/Images/002/profile/04.jpg, .*; 2 of 20",
    ):
        cfp.load(str(root))
    write(root / "Protocol/Pair_list_P.txt", ["1"])
    with pytest.raises(ValueError, match=r"cfp: .*Pair_list_P.txt line 1 is '1', expected a number and a path"):
        cfp.load(str(root))
    monkeypatch.setattr(cfp, "_EACH", 350)
    write_cfp(root)
    with pytest.raises(
        ValueError, match=r"cfp_fp: fold 1 of 10 has 1 pairs of one person and 1 of two, expected 350 of"
    ):
        cfp.load(str(root))
    with pytest.raises(ValueError, match=r"cfp is only verified on"):
        cfp.load(str(root), "validation")


# --- IJB


def write_ijb(root, name, galleries) -> None:
    meta, upper = root / "meta", name
    write(meta / f"{upper}_face_tid_mid.txt", ["1.jpg 11 5", "2.jpg 11 6", "3.jpg 40 7", "10.jpg 2 7"])
    write(meta / f"{upper}_template_pair_label.txt", ["11 40 1", "11 2 0", "40 2 0"])
    write(meta / f"{upper}_name_5pts_score.txt", [f"{n}.jpg {FACE} 0.{n}" for n in (1, 2, 3, 10)])
    for gallery, template in zip(galleries, (11, 2), strict=True):
        rows = [f"{template},{template + 100},img/7.jpg,3"] * 2
        write(meta / f"{upper}_1N_gallery_{gallery}.csv", ["TEMPLATE_ID,SUBJECT_ID,FILENAME,X", *rows])
    write(meta / f"{upper}_1N_probe_mixed.csv", ["TEMPLATE_ID,SUBJECT_ID", "40,111", "40,111", "2,102"])
    save(root / "loose_crop", [f"{n}.jpg" for n in (1, 2, 3, 10)])


IJB = [(ijbb, "ijbb", ("S1", "S2"), "IJBB"), (ijbc, "ijbc", ("G1", "G2"), "IJB-C")]


@pytest.fixture
def few(monkeypatch):
    for reader in (ijbb, ijbc):
        monkeypatch.setattr(reader, "_COUNTS", (4, 3, 1, 2))


@pytest.mark.parametrize(("reader", "name", "galleries", "inside"), IJB)
def test_ijb(root, few, reader, name, galleries, inside):
    write_ijb(root / inside, name, galleries)
    data = reader.load(str(root))
    assert data.train is None and list(data.verification) == [name]
    found = data.verification[name]
    assert list(found.images.keys) == ["1.jpg", "2.jpg", "3.jpg", "10.jpg"] and set(found.images.identity) == {-1}
    assert found.template_N.tolist() == [11, 11, 40, 2] and found.medium_N.tolist() == [5, 6, 7, 7]
    np.testing.assert_allclose(found.score_N, [0.1, 0.2, 0.3, 0.1], rtol=1e-6)
    assert (found.first_P.tolist(), found.second_P.tolist()) == ([11, 11, 40], [40, 2, 2])
    assert found.same_P.tolist() == [True, False, False] and found.first_P.itemsize == 4
    first, second = found.searches["g1"], found.searches["g2"]
    assert (first.gallery_T.tolist(), first.gallery_subject_T.tolist()) == ([11], [111])
    assert (second.gallery_T.tolist(), second.gallery_subject_T.tolist()) == ([2], [102])
    assert (first.probe_T.tolist(), first.probe_subject_T.tolist()) == ([2, 40], [102, 111])
    pixels = Frames(found.images, (112, 112))([3])[0].permute(1, 2, 0).numpy()
    with Image.open(root / inside / "loose_crop/10.jpg") as crop:
        np.testing.assert_allclose(pixels.astype(int), np.asarray(crop, int), atol=1)
    assert data.protocol == f"{name}: 4 images, 3 templates, 1 genuine and 2 impostor"


def test_ijb_without_its_searches(root, few):
    write_ijb(root, "ijbb", ("S1", "S2"))
    for path in (root / "meta").glob("*_1N_*"):
        path.unlink()
    assert ijbb.load(str(root)).verification["ijbb"].searches == {}


def test_ijb_lists_that_are_wrong(root, few, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match=r"ijbb: no ijbb_face_tid_mid.txt in .*meta; --data-root must hold meta/"
    ):
        ijbb.load(str(root))
    for name, lines, message in (
        ("name_5pts_score.txt", [f"{n}.jpg {FACE} 1" for n in (1, 2, 3)],
         r"ijbb_name_5pts_score.txt has 3 images and ijbb_face_tid_mid.txt 4; they differ from image 4 on, and must"),
        ("name_5pts_score.txt", [f"{n}.jpg {FACE} 1" for n in (1, 3, 2, 10)], r"they differ from image 2 on"),
        ("name_5pts_score.txt", [f"{n}.jpg {FACE}" for n in (1, 2, 3, 10)], r"line 1 has no float32 in column 12"),
        ("face_tid_mid.txt", ["1.jpg 11 5", "2.jpg x 6"], r"tid_mid.txt line 2 has no int32 in columns 2 to 3"),
        ("template_pair_label.txt", ["11 40 1", "11 2"], r"label.txt line 2 has no int32 in columns 1 to 3"),
        ("template_pair_label.txt", ["11 40 1", "11 2 2"], r"pair 2 of .*pair_label.txt has the label 2, not 0 or 1"),
        ("template_pair_label.txt", ["11 40 1", "11 2 0"],
         r"genuine and impostor pairs are \(4, 3, 1, 1\), expected \(4, 3, 1, 2\); is the release complete"),
        ("template_pair_label.txt", ["11 40 1", "11 3 0", "40 2 0"], r"1 times a template without any image is asked"),
        ("1N_gallery_S1.csv", ["T,S", "11,1", "11,2"], r"gallery_S1.csv gives template 11 several subjects"),
        ("1N_gallery_S2.csv", ["T,S", "11,1", "2,1"], r"gallery_S2.csv has several templates of subject 1; a gallery"),
    ):  # fmt: skip
        write_ijb(root, "ijbb", ("S1", "S2"))
        write(root / "meta" / f"ijbb_{name}", lines)
        with pytest.raises(ValueError, match=message):
            ijbb.load(str(root))
    write_ijb(root, "ijbb", ("S1", "S2"))
    (root / "loose_crop/3.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"ijbb: 1 of 4 images are not in .*loose_crop, first 3.jpg"):
        ijbb.load(str(root))
    write_ijb(root, "ijbb", ("S1", "S2"))
    (root / "meta/ijbb_1N_gallery_S2.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"ijbb: no ijbb_1N_gallery_S2.csv in .*; 1:N needs it, or remove the"):
        ijbb.load(str(root))
    with pytest.raises(ValueError, match=r"ijbc is only verified on"):
        ijbc.load(str(root), "validation")


def test_keys_of_long_lists_are_made_when_they_are_asked_for(root, few):
    write_ijb(root, "ijbb", ("S1", "S2"))
    keys = ijbb.load(str(root)).verification["ijbb"].images.keys
    assert not isinstance(keys, (tuple, list)) and keys[2] == "3.jpg" and keys[-1] == "10.jpg"
    with pytest.raises(IndexError):
        keys[4]


# --- ORL


def mean_free(images, size: tuple[int, int]) -> np.ndarray:
    """Unit rows of the pixels of 92 × 112 portraits, less their mean."""
    crops = [decode(images.reader.read(key)).crop((10, 0, 102, 112)).convert("L") for key in images.keys]
    rows = np.stack([np.asarray(crop.resize(size, Image.Resampling.BOX), float).ravel() for crop in crops])
    rows -= rows.mean(axis=1, keepdims=True)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def tar(score_P, same_P, far) -> float:
    """Accepted genuine pairs above the (k + 1)-th largest impostor score, k = the impostor pairs that may pass."""
    impostor = sorted(score_P[~same_P], reverse=True)
    return float((score_P[same_P] > impostor[int(far * len(impostor) + 1e-9)]).mean())


def test_orl_floor_of_raw_pixels(shared):
    data = orl.load(str(shared / "data" / "orl-faces"))
    pairs = data.verification["val"]
    assert (len(data.train), data.train.num_identities) == (200, 20)
    assert pairs.protocol == "200 images, 900 genuine and 19,000 impostor, no folds"
    assert sorted(set(pairs.images.identity)) == list(range(21, 41)) and "Olivetti" in data.notice
    rows = mean_free(pairs.images, (23, 28))
    score_P = (rows[pairs.first_P] * rows[pairs.second_P]).sum(1)
    # The source of the floor names no filter. Means of 4 × 4 pixels come within one pair of 900; bilinear gives 0.544.
    assert tar(score_P, pairs.same_P, 1e-2) == pytest.approx(0.529, abs=0.002)
    assert tar(score_P, pairs.same_P, 1e-3) == pytest.approx(0.266, abs=0.002)


def test_orl_holds_people_of_the_training_part_out(shared):
    data = orl.load(str(shared / "data" / "orl-faces"), "validation")
    assert sorted(set(data.train.identity)) == list(range(1, 17)) and list(data.verification) == ["val"]
    pairs = data.verification["val"]
    assert sorted(set(pairs.images.identity)) == [17, 18, 19, 20] and int(pairs.same_P.sum()) == 4 * 45


def test_orl_unpacked_is_the_archive(shared, root):
    packed = orl.load(str(shared / "data" / "orl-faces"))
    with zipfile.ZipFile(shared / "data" / "orl-faces" / "orl_faces.zip") as archive:
        archive.extractall(root)
    for place in (root, root / "orl_faces"):
        found = orl.load(str(place)).verification["val"].images
        reader = rebuilt(described(found.reader))
        assert [key.split("orl_faces/")[-1] for key in packed.verification["val"].images.keys] == [
            key.split("orl_faces/")[-1] for key in found.keys
        ]
        assert reader.read(found.keys[7]) == packed.train.reader.read(packed.verification["val"].images.keys[7])
        assert reader.stamp(found.keys) != packed.train.reader.stamp(found.keys)


def write_orl(root) -> None:
    """Portraits whose columns are numbered."""
    portrait = np.tile(np.arange(92, dtype=np.uint8), (112, 1))
    stored = io.BytesIO()
    Image.fromarray(portrait).save(stored, "PPM")
    with zipfile.ZipFile(root / "orl_faces.zip", "w") as archive:
        for person in range(1, 41):
            for shot in range(1, 11):
                archive.writestr(f"orl_faces/s{person}/{shot}.pgm", stored.getvalue())


def test_orl_portraits_are_widened_and_not_stretched(root):
    write_orl(root)
    found = np.asarray(decode(orl.load(str(root)).train.reader.read("orl_faces/s1/1.pgm")))
    assert found.shape == (112, 112, 3)
    assert found[5, :, 0].tolist() == [0] * 10 + list(range(92)) + [91] * 10


def test_orl_says_what_is_missing(root):
    with pytest.raises(FileNotFoundError, match=r"orl: --data-root DIR is needed; it must hold orl_faces.zip, or orl_"):
        orl.load("")
    with pytest.raises(
        FileNotFoundError, match=r"orl: 400 of 400 images are missing in .*, first s1/1.pgm; --data-root"
    ):
        orl.load(str(root))
    with pytest.raises(ValueError, match=r"orl has the parts test and validation, not 'query'"):
        orl.load(str(root), "query")
    (root / "orl_faces.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"orl: .*orl_faces.zip is no complete zip file \(.*\); download it again"):
        orl.load(str(root))
    with zipfile.ZipFile(root / "orl_faces.zip", "w") as archive:
        archive.writestr("orl_faces/s1/1.pgm", b"")
    with pytest.raises(FileNotFoundError, match=r"399 of 400 images are missing in .*zip, first orl_faces/s1/2.pgm"):
        orl.load(str(root))
    save(root, ["wide.png"], (120, 100))
    with pytest.raises(ValueError, match=r"wide.png is 120 × 100, expected a portrait of 92 × 112"):
        orl.Widened(Folder(str(root))).read("wide.png")


# --- One's own faces


def own_names(people=4, shots=4) -> list[str]:
    train = [f"train/t{who}/{n}.png" for who in range(people) for n in range(shots)]
    return train + [f"test/p{who}/p{who}_{n + 1:04d}.png" for who in range(people) for n in range(shots)]


def test_own_faces_with_drawn_pairs(root):
    save(root, own_names())
    data = folder_faces.load(str(root))
    assert data.train.keys[0] == "train/t0/0.png" and data.train.identity.tolist() == np.repeat(range(4), 4).tolist()
    pairs = data.verification["val"]
    assert list(data.verification) == ["val"] and data.notice == ""
    assert pairs.folds == 10 and int(pairs.same_P.sum()) == 20 and len(pairs.same_P) == 40  # of 24 genuine pairs
    people = [key.split("/")[1] for key in pairs.images.keys]
    assert [people[a] == people[b] for a, b in zip(pairs.first_P, pairs.second_P, strict=True)] == pairs.same_P.tolist()
    assert Frames(data.train, (8, 8))([1]).shape == (1, 3, 8, 8)


def test_own_faces_with_a_list_of_pairs(root):
    save(root, own_names())
    save(root, ["test/van der x/a b.JPG"])
    lines = ["2\t1", "p0\t1\t2", "p1\tp1_0003.png\tvan der x\ta b.JPG", "p2\t4\tp2_0001.png", "p3\t1\tp0\t1"]
    write(root / "pairs.txt", lines)
    pairs = folder_faces.load(str(root)).verification["val"]
    assert named(pairs) == [
        ("test/p0/p0_0001.png", "test/p0/p0_0002.png", True),
        ("test/p1/p1_0003.png", "test/van der x/a b.JPG", False),
        ("test/p2/p2_0004.png", "test/p2/p2_0001.png", True),
        ("test/p3/p3_0001.png", "test/p0/p0_0001.png", False),
    ]
    assert pairs.folds == 2 and len(pairs.images) == 17
    write(root / "pairs.txt", ["1\t1", *lines[1:3]])
    assert folder_faces.load(str(root)).verification["val"].folds == 0
    write(root / "pairs.txt", lines[:-1])
    with pytest.raises(ValueError, match=r"folder_faces: .*pairs.txt has 3 lines of pairs, expected 2 × 2 × 1 = 4"):
        folder_faces.load(str(root))
    write(root / "pairs.txt", [*lines[:3], "p2\t4\t9", "p3\tx.png\tp9\t1"])
    with pytest.raises(
        FileNotFoundError,
        match=r"folder_faces: pairs.txt line 4 names test/p2/9, which is not in .*; 2 of 4 pairs name",
    ):
        folder_faces.load(str(root))


def test_own_faces_hold_identities_out(root):
    save(root, own_names(people=12, shots=5))
    data = folder_faces.load(str(root), "validation")
    assert data.train.num_identities == 10 and list(data.verification) == ["val"]
    assert {key.split("/")[1] for key in data.verification["val"].images.keys} == {"t8", "t9"}  # the last by name
    with pytest.raises(ValueError, match="folder_faces has the parts test and validation, not 'query'"):
        folder_faces.load(str(root), "query")


def test_own_faces_as_people_have_them(root):
    save(root, own_names())
    save(root, ["elsewhere/9.png", "train/t0/.hidden.png", "train/t0/._0.jpg", "train/__MACOSX/0.png"])
    save(root, ["train/t0/UPPER.JPG", "train/t0/deeper/1.png", "train/beside.png"])
    (root / "train/t0/notes.txt").write_text("x")
    (root / "train/linked").symlink_to(root / "elsewhere")
    data = folder_faces.load(str(root))
    assert data.train.keys[:2] == ("train/linked/9.png", "train/t0/0.png") and "train/t0/UPPER.JPG" in data.train.keys
    assert len(data.train) == 18
    assert data.notice == (
        "3 files were left out: train/beside.png, train/t0/deeper/1.png, train/t0/notes.txt; what is read are images "
        "at {train,test}/<identity>/<image>"
    )


def test_own_faces_of_another_size_are_resized_and_it_is_said(root):
    save(root, own_names())
    save(root, ["train/t2/0.png", "test/p1/p1_0001.png"], (100, 120))
    (root / "train/t3/0.png").write_bytes(b"damaged")
    notice = folder_faces.load(str(root)).notice
    assert notice == (
        "2 of 8 identities have faces that are not 112 × 112, first train/t2/0.png of 100 × 120: they are resized, not "
        "aligned, as there is no landmarks.csv, which costs 6 to 14 points of accuracy"
    )


def test_own_faces_are_aligned_by_landmarks(root):
    save(root, own_names(), (200, 200))
    points = ",".join(map(str, (1.5 * TEMPLATE_112).ravel()))
    write(root / "landmarks.csv", [COLUMNS, *(f"{name},{points}" for name in own_names())])
    data = folder_faces.load(str(root))
    assert data.notice == "" and data.train.reader == Aligned(str(root), str(root / "landmarks.csv"))
    assert Frames(data.train, (112, 112))([0]).shape == (1, 3, 112, 112)
    write(root / "landmarks.csv", [COLUMNS, *(f"{name},{points}" for name in own_names()[2:])])
    with pytest.raises(ValueError, match=r"folder_faces: 2 of 32 images have no landmarks in .*, first train/t0/0.png"):
        folder_faces.load(str(root))


def test_own_faces_say_what_is_wrong(root):
    for arrange, message in (
        (
            lambda: None,
            r"folder_faces: .* has no train and no test folder; it must hold {train,test}/<identity>/<image>",
        ),
        (lambda: save(root, own_names()[:4]), r"folder_faces: .* has no test folder"),
        (
            lambda: save(root, ["Test/a/1.png"]),
            r"folder_faces: .*Test would not be read; it must be a folder named test",
        ),
        (lambda: (root / "Test").rename(root / "elsewhere"), r"has no test folder"),
        (lambda: save(root, ["test/1.png"]), r"no images in .*test; 1 file was left out: test/1.png; what is read are"),
    ):
        arrange()
        with pytest.raises(FileNotFoundError, match=message):
            folder_faces.load(str(root))
    with pytest.raises(
        FileNotFoundError, match=r"folder_faces: --data-root DIR is needed, with {train,test}/<identity>"
    ):
        folder_faces.load("")
    save(root, [*own_names(), "test/t1/0.png"])
    with pytest.raises(ValueError, match=r"folder_faces: 1 identities are in both train and test, first t1; what is"):
        folder_faces.load(str(root))
    (root / "test/t1/0.png").unlink()
    (root / "test/broken.png").symlink_to(root / "nowhere.png")
    with pytest.raises(FileNotFoundError, match=r"folder_faces: links that lead nowhere: 1 below"):
        folder_faces.load(str(root))


# --- The demo


def test_demo_faces():
    data = demo_faces.load("")
    assert data.protocol == (
        "train 1,280 images of 64 identities; val: 480 images, 1,500 genuine and 1,500 impostor, 10 folds"
    )  # fmt: skip
    held = demo_faces.load("", "validation").verification["val"].images
    verified = data.verification["val"].images
    people = [set(images.identity) for images in (data.train, held, verified)]
    assert [len(p) for p in people] == [64, 30, 60] and len(set().union(*people)) == 154
    with pytest.raises(ValueError, match=r"demo_faces has the parts test and validation, not 'query'"):
        demo_faces.load("", "query")


def test_demo_faces_are_drawn_alike_every_time():
    reader = rebuilt(described(demo_faces.Renderer()))
    first, again = (decode(reader.read("3/5")) for _ in range(2))
    assert first.size == (112, 112) and first.mode == "RGB" and first.tobytes() == again.tobytes()
    assert first.tobytes() == demo_faces.render(3, 5).tobytes()
    others = [demo_faces.render(*who).tobytes() for who in ((3, 6), (4, 5), (5, 3))]
    assert len({first.tobytes(), *others}) == 4
    assert reader.stamp(["3/5"]) == f"demo-faces-{demo_faces._VERSION}"


def test_every_look_of_the_demo_can_be_drawn():
    people = [demo_faces.person(identity) for identity in range(160)]
    assert {who.style for who in people} == set(range(6)) and {who.beard for who in people} == set(range(5))
    assert {who.freckles for who in people} == {False, True}
    seen = {(who.style, who.beard): identity for identity, who in enumerate(people)}
    for identity in seen.values():
        pixels = np.asarray(demo_faces.render(identity, 0), float)
        assert pixels.std() > 5 and pixels.shape == (112, 112, 3)


def test_people_of_a_family_resemble_each_other():
    faces = np.array(
        [[w.width, w.chin, w.eye_gap, *w.skin / 5, *w.nose, *w.mouth] for w in map(demo_faces.person, range(64))]
    )
    faces = (faces - faces.mean(0)) / faces.std(0)
    distance = np.linalg.norm(faces[:, None] - faces[None], axis=2)
    family = np.arange(64) // 4
    alike = (family[:, None] == family) & ~np.eye(64, dtype=bool)
    strangers = distance[family[:, None] != family]
    assert 0.4 * strangers.mean() < distance[alike].mean() < 0.85 * strangers.mean()


def test_pixels_alone_do_not_tell_the_people_of_the_demo_apart():
    data = demo_faces.load("")
    pairs = data.verification["val"]
    rows = np.stack([
        np.asarray(demo_faces.render(*map(int, key.split("/"))).convert("L").resize((28, 28)), float).ravel()
        for key in pairs.images.keys
    ])  # fmt: skip
    rows -= rows.mean(axis=1, keepdims=True)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    score_P = (rows[pairs.first_P] * rows[pairs.second_P]).sum(1)
    assert 0.01 < tar(score_P, pairs.same_P, 1e-2) < 0.3
    best = max(((score_P > threshold) == pairs.same_P).mean() for threshold in np.linspace(-1, 1, 201))
    assert 0.5 < best < 0.7


def test_the_person_of_the_demo_is_in_the_middle_of_its_images():
    mean = np.mean([np.asarray(demo_faces.render(i, 1), float) for i in range(0, 64, 2)], axis=0).mean(axis=2)
    spread = np.std([np.asarray(demo_faces.render(7, shot), float) for shot in range(12)], axis=0).mean()
    assert spread > 15  # light, pose and background change the same face
    eyes, cheeks = mean[47:56, 34:43].mean(), mean[60:68, 30:36].mean()
    assert eyes < cheeks - 5  # eyes are darker than cheeks, where alignment puts them
