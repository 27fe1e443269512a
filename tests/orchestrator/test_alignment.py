"""Five-point alignment: the transform against recorded and least-squares values, the warp against plain loops."""

import io
import math
import os

import numpy as np
import pytest
from PIL import Image

from orchestrator.datasets import alignment
from orchestrator.datasets.alignment import (
    COLUMNS,
    TEMPLATE_112,
    TEMPLATE_112_96,
    Aligned,
    align,
    aligned_or_as_is,
    first_words,
    landmark_table,
    numbers,
    similarity_transform,
)
from orchestrator.datasets.images import Folder, described, rebuilt


def landmarks(seed: int, scale: float = 1.0) -> np.ndarray:
    """A face that is turned, scaled, shifted and not quite the template."""
    rng = np.random.default_rng(seed)
    turn = rng.uniform(-0.6, 0.6)
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    return scale * (TEMPLATE_112 @ rotation.T + rng.normal(0, 1.5, (5, 2))) + rng.uniform(0, 20, 2)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


# --- The transform


def test_transforms_are_the_recorded_ones(shared):
    recorded = np.load(shared / "golden" / "face" / "alignment.npz")
    np.testing.assert_array_equal(TEMPLATE_112, recorded["template"])
    for points, matrix in zip(recorded["landmarks"], recorded["matrix"], strict=True):
        np.testing.assert_allclose(similarity_transform(points), matrix, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("template", [TEMPLATE_112, TEMPLATE_112_96])
@pytest.mark.parametrize("seed", range(5))
def test_the_transform_is_the_least_squares_one(seed, template):
    points = landmarks(seed, 2.5)
    rows = [row for x, y in points for row in ([x, -y, 1, 0], [y, x, 0, 1])]  # of [a, b, right, down]
    a, b, right, down = np.linalg.lstsq(np.array(rows), template.ravel(), rcond=None)[0]
    np.testing.assert_allclose(similarity_transform(points, template), [[a, -b, right], [b, a, down]], atol=1e-9)


def test_a_mirrored_face_is_never_mirrored_back():
    mirrored = landmarks(0) * [-1, 1]
    assert np.linalg.det(similarity_transform(mirrored)[:, :2]) > 0


def test_the_older_template_is_eight_pixels_to_the_left():
    np.testing.assert_allclose(TEMPLATE_112 - TEMPLATE_112_96, [[8, 0]] * 5, atol=1e-12)


def test_landmarks_that_fix_no_transform_are_refused():
    same = np.tile([3.0, 4.0], (5, 1))
    off = TEMPLATE_112 - TEMPLATE_112.mean(0)
    w = off @ [1, 1j]
    # Points whose best turn and scale is none at all: what is left of the mirror image without the face in it.
    none = np.conj(w) - w * np.vdot(w, np.conj(w)) / np.vdot(w, w)
    for points in (same, np.stack([none.real, none.imag], 1)):
        with pytest.raises(ValueError, match=r"landmarks \[\[.* fix no turn and scale; five different points"):
            similarity_transform(points)
    for points in (TEMPLATE_112[:4], TEMPLATE_112.ravel(), np.full((5, 2), np.nan)):
        with pytest.raises(ValueError, match=r"landmarks must be \(5, 2\) finite numbers x, y, got"):
            similarity_transform(points)


# --- The warp


def by_loops(image: Image.Image, points: np.ndarray, size: int) -> np.ndarray:
    """Every pixel of the aligned image from the four around its place in the photograph, black outside."""
    source = np.asarray(image, float)
    matrix = similarity_transform(points, TEMPLATE_112 * (size / 112))
    inverse = np.linalg.inv(matrix[:, :2])
    found = np.zeros((size, size, 3))
    for row in range(size):
        for column in range(size):
            x, y = inverse @ ([column, row] - matrix[:, 2])
            for i in (math.floor(x), math.floor(x) + 1):
                for j in (math.floor(y), math.floor(y) + 1):
                    if 0 <= i < image.width and 0 <= j < image.height:
                        found[row, column] += (1 - abs(x - i)) * (1 - abs(y - j)) * source[j, i]
    return found


@pytest.mark.parametrize(("size", "scale"), [(112, 1.7), (112, 0.4), (64, 1.0)])
def test_the_warp_is_bilinear_with_a_black_border(size, scale):
    image, points = noise(70, 90), landmarks(3, scale)
    found, expected = np.asarray(align(image, points, size), float), by_loops(image, points, size)
    assert (expected == 0).any() and (expected > 0).any()
    assert (found <= expected + 1e-6).all() and (found > expected - 1 - 1e-6).all()  # rounded down


def test_an_aligned_face_stays_as_it_is():
    image = noise(112, 112)
    np.testing.assert_allclose(np.asarray(align(image, TEMPLATE_112), int), np.asarray(image, int), atol=1)


# --- Lists of landmarks


def test_first_words_of_lines():
    for text, words in (
        (b"", []),
        (b"\n\n", []),
        (b"a b", ["a"]),
        (b"a", ["a"]),
        (b"a\tb\r\n\r\nlonger c\r\nd", ["a", "longer", "d"]),
        ("Ä.jpg 1\n".encode(), ["Ä.jpg"]),
    ):
        found = first_words(text)
        assert list(found) == words and len(found) == len(words)
        assert found.fixed().tolist() == [word.encode() for word in words]
    assert list(first_words(b"image,x\na b,1\n", b",", skip=1)) == ["a b"]


def test_numbers_of_long_lists_are_refused_by_line(tmp_path):
    path = tmp_path / "pairs.txt"
    path.write_text("1 2 0\n\n3 4 1\n")
    assert numbers("ijb", path, (0, 2), np.int32).tolist() == [[1, 0], [3, 1]]
    for text, line in (("1 2 0\n\n3 x 1\n", 3), ("1 2 0\n3 4\n", 2), ("1 2 0\n3 99999999999 1\n", 2)):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"ijb: .*pairs.txt line {line} has no int32 in columns 2 to 3: '3 "):
            numbers("ijb", path, (1, 2), np.int32)


def csv(rows: dict[str, np.ndarray]) -> str:
    return "\n".join([COLUMNS, *(f"{name},{','.join(map(str, p.ravel()))}" for name, p in rows.items())]) + "\n"


@pytest.fixture
def root(tmp_path):
    """Three photographs in folders, one with a space in its name, and their landmarks."""
    for name in ("b/2.png", "a/1.png", "c d/3.png"):
        (tmp_path / name).parent.mkdir()
        noise(80 + len(name), 90).save(tmp_path / name)
    names = ("b/2.png", "a/1.png", "c d/3.png")
    (tmp_path / "landmarks.csv").write_text(csv({name: landmarks(i, 0.8) for i, name in enumerate(names)}))
    return tmp_path


def test_a_table_gives_every_image_its_points(root):
    table = landmark_table(root / "landmarks.csv")
    for i, name in enumerate(("b/2.png", "a/1.png", "c d/3.png")):
        np.testing.assert_array_equal(table.of(name), landmarks(i, 0.8))
    for name in ("a/1.pn", "a/1.pngs", "z.png", ""):
        with pytest.raises(ValueError, match=r"has no landmarks in .*landmarks.csv; add a line for it"):
            table.of(name)


def test_a_table_in_the_form_of_ijb(tmp_path):
    path = tmp_path / "name_5pts_score.txt"
    path.write_text("".join(f"{i}.jpg {' '.join(map(str, landmarks(i).ravel()))} 0.9\n" for i in (2, 10, 1)))
    for i in (1, 2, 10):
        np.testing.assert_array_equal(landmark_table(path).of(f"{i}.jpg"), landmarks(i))


def test_tables_say_what_is_wrong(tmp_path):
    path, row = tmp_path / "landmarks.csv", f"a.png,{','.join('1234567890')}\n"
    for text, message in (
        (row, r"landmarks.csv must begin with the line image,x1,y1,x2,.*,y5, got 'a.png,1"),
        ("", r"landmarks.csv must begin with the line image,x1"),
        (f"{COLUMNS}\n{row}{row}", r"landmarks.csv lists a.png twice; keep one line"),
        (f"{COLUMNS}\n{row}b.png,1,2\n", r"landmarks.csv line 3 has no float64 in columns 2 to 11: 'b.png,1,2'"),
        (f"{COLUMNS}\nb.png,,,,,,,,,,\n", r"line 2 has no float64 in columns 2 to 11"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            landmark_table(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"landmarks.csv line 1 is not UTF-8 text"):
        landmark_table(path)
    path.write_text(f"{COLUMNS}\n")
    with pytest.raises(ValueError, match=r"a.png has no landmarks"):
        landmark_table(path).of("a.png")


# --- The reader


def test_photographs_are_aligned_as_they_are_read(root):
    reader = rebuilt(described(Aligned(str(root), str(root / "landmarks.csv"))))
    for i, name in enumerate(("b/2.png", "a/1.png", "c d/3.png")):
        with Image.open(io.BytesIO(reader.read(name))) as found, Image.open(root / name) as photograph:
            assert (found.format, found.size) == ("PNG", (112, 112))
            np.testing.assert_array_equal(np.asarray(found), np.asarray(align(photograph, landmarks(i, 0.8))))


def test_the_table_is_read_once_and_again_when_it_has_changed(root, monkeypatch):
    calls, path = [], root / "landmarks.csv"
    monkeypatch.setattr(alignment, "landmark_table", lambda path: calls.append(path) or landmark_table(path))
    reader = Aligned(str(root), str(path))
    first = [reader.read("a/1.png") for _ in range(3)]
    stamp = reader.stamp(["a/1.png"])
    assert len(calls) == 1 and len(set(first)) == 1 and reader.stamp(["a/1.png"]) == stamp
    path.write_text(csv({"a/1.png": landmarks(9, 0.9)}))
    os.utime(path, ns=(0, 12_345))
    assert reader.read("a/1.png") != first[0] and len(calls) == 2 and reader.stamp(["a/1.png"]) != stamp


def test_images_without_landmarks_are_named(root):
    reader = aligned_or_as_is("lfw", root, ["a/1.png", "b/2.png"], root / "landmarks.csv")
    assert reader == Aligned(str(root), str(root / "landmarks.csv"))
    with pytest.raises(ValueError, match=r"lfw: 2 of 3 images have no landmarks in .*landmarks.csv, first x.png; add"):
        aligned_or_as_is("lfw", root, ["a/1.png", "x.png", "y.png"], root / "landmarks.csv")


def test_images_that_are_not_aligned_need_landmarks(root):
    (root / "landmarks.csv").unlink()
    with pytest.raises(
        ValueError,
        match=r"lfw: 1 of 1 images are not 112 × 112, first a/1.png of 87 × 90, and there is no .*landmarks.csv; faces "
        r"that are not aligned cost 6 to 14 points of accuracy, so put five landmarks of every image there \(image,x1",
    ):
        aligned_or_as_is("lfw", root, ["a/1.png"], root / "landmarks.csv")
    noise(112, 112).save(root / "a/1.png")
    assert aligned_or_as_is("lfw", root, ["a/1.png"], root / "landmarks.csv") == Folder(str(root))
    (root / "a/1.png").write_bytes(b"no image")
    with pytest.raises(OSError, match=r"a/1.png is no image that can be read"):
        aligned_or_as_is("lfw", root, ["a/1.png"], root / "landmarks.csv")
