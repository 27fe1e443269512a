"""Scenes that are composed, one's own scenes and what is wrong with them, and the tables they become."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import write_scenes
from PIL import Image
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from losses.oim import UNLABELLED
from orchestrator import cache, find
from orchestrator.datasets import composed, demo_scenes, folder_scenes
from orchestrator.datasets.images import decode, size_of
from orchestrator.datasets.sampling import grouped_batches
from orchestrator.datasets.scenes import SearchData
from orchestrator.families.person_search import data
from orchestrator.families.person_search.batches import LoadScenes, SceneRequests
from orchestrator.families.person_search.recipe import Batches
from orchestrator.needs import Place, silent
from orchestrator.recipe import Data, changed


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("own")
    write_scenes(root / "scenes")
    return root / "scenes"


@pytest.fixture
def own(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "scenes")


def edited(path, *replacements):
    text = path.read_text()
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new, 1)
    path.write_text(text)


# --- composed ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["demo_scenes", "emoji_scenes"])
def test_composed_scenes_are_complete(name, request):
    root = ""
    if name == "emoji_scenes":
        root = str(request.getfixturevalue("shared") / "data" / "emoji-xvendor")
    found: SearchData = find.dataset(name)(root)
    assert set(found.train.identities) == set(range(1, found.train.num_identities + 1))
    assert (found.train.identity_N == UNLABELLED).any() and (found.gallery.identity_N == UNLABELLED).any()
    keys = found.train.frames.keys
    reader = found.train.frames.reader
    assert reader.read(keys[0]) == reader.read(keys[0]) != reader.read(keys[1])
    for side in (found.train, found.gallery):
        sizes = np.array([size_of(side.frames.reader.read(key)) for key in side.frames.keys[:12]])
        assert len(np.unique(sizes, axis=0)) == 2 and side.frames.camera.max() == 2
        data.check_boxes(side, np.array([sizes[c] for c in side.frames.camera]))
    first, *smaller = found.galleries.items()
    assert first[0] == "all" and [n for n, _ in smaller] == sorted((n for n, _ in smaller), key=int)
    for query in range(0, len(found.queries), 7):
        assert found.queries.frame_Q[query] not in first[1].frames[query] and first[1].targets[query]
        for size, gallery in smaller:
            assert len(gallery.frames[query]) == int(size)
            assert set(gallery.targets[query]) <= set(gallery.frames[query].tolist())
            assert set(gallery.targets[query]) == set(first[1].targets[query]) or int(size) < len(
                first[1].targets[query]
            )


def test_boxes_are_those_of_what_is_pasted():
    """Pasted on nothing, what is not transparent fills the box to its edges."""
    plan = composed.Plan(7, 3, range(1, 4), range(10, 12), ((48, 64),), most=1)
    image, box_n4, people = composed.compose(plan, 0, lambda who, height, rng: Image.new("RGBA", (9, height), "red"))
    pixels = np.asarray(image).astype(int)
    red = (pixels[..., 0] > pixels[..., 1] + 60) & (pixels[..., 0] > pixels[..., 2] + 60)
    (y,), (x,) = (np.nonzero(red.mean(1) > 0.05)[:1], np.nonzero(red.mean(0) > 0.05)[:1])
    assert len(people) == 1 and abs(np.array([x[0], y[0], x[-1] + 1, y[-1] + 1]) - box_n4[0]).max() <= 1
    person = demo_scenes.cut(5, 40, np.random.default_rng(0))
    alpha = np.asarray(person)[..., 3]
    assert person.height == 40 and all(edge.any() for edge in (alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]))


# --- one's own --------------------------------------------------------------------------------------------------------


def test_own_scenes_are_read(own):
    found = folder_scenes.load(str(own.parent))
    assert found.train.num_identities == 16 and len(found.train) == 24 and len(found.gallery) == 10
    assert found.gallery.frames.camera.tolist() == [0, 1] * 5 and "all" in found.galleries
    rows = (own / "train" / "boxes.csv").read_text().splitlines()[1:]
    first = [row.split(",") for row in rows if row.startswith("00.png")]
    assert found.train.boxes(0).tolist() == [[int(v) for v in row[1:5]] for row in first]
    # The same as COCO's JSON.
    for side in ("train", "gallery"):
        rows = [row.split(",") for row in (own / side / "boxes.csv").read_text().splitlines()[1:]]
        names = sorted({row[0] for row in rows})
        images = [
            {"id": i, "file_name": n, "camera": next(r[6] for r in rows if r[0] == n)} for i, n in enumerate(names)
        ]
        annotations = []
        for image, *corners, identity, _ in rows:
            x1, y1, x2, y2 = map(int, corners)
            person = {"person_id": int(identity)} if identity else {}
            annotations.append({"image_id": names.index(image), "bbox": [x1, y1, x2 - x1, y2 - y1], **person})
        (own / side / "boxes.json").write_text(json.dumps({"images": images, "annotations": annotations}))
        (own / side / "boxes.csv").unlink()
    again = folder_scenes.load(str(own))
    for side in ("train", "gallery"):
        a, b = getattr(found, side), getattr(again, side)
        assert np.array_equal(a.box_N4, b.box_N4) and np.array_equal(a.frames.camera, b.frames.camera)
        assert np.array_equal(a.identity_N == UNLABELLED, b.identity_N == UNLABELLED)
        assert a.num_identities == b.num_identities


def test_images_without_boxes_are_background(own):
    Image.new("RGB", (64, 48)).save(own / "train" / "images" / "empty.png")
    (own / "train" / "images" / "notes.txt").write_text("x")
    found = folder_scenes.load(str(own))
    assert found.train.count_F[-1] == 0 and len(found.train) == 25
    assert "1 train images without a box, such as empty.png" in found.notice and "1 file was left out" in found.notice


@pytest.mark.parametrize(
    ("file", "replacements", "words"),
    [
        ("train/boxes.csv", [("00.png", "nobody.png")], r"line 2: a box of 'nobody.png', which is not in .*images"),
        ("train/boxes.csv", [("\n00.png,", "\n00.png,x")], r"line 2: corners \['x.*must be four numbers"),
        ("train/boxes.csv", [("image,x1", "picture,x1")], "has no column image; expected image,x1"),
        ("query.csv", [(".png", ".jpg")], r"query.csv line 2: there is no gallery image"),
        ("query.csv", [("\n", "\n00.png,1,1,9,9,stranger,0\n")], "identity 'stranger' is in no other gallery image"),
        ("query.csv", [("\n", "\n00.png,1,1,9,9,,0\n")], "a query without identity cannot be right or wrong"),
        ("gallery/boxes.csv", [("\n", "\n00.png,5,5,5,9,1,0\n")], r"box 5,5,5,9 has no area"),
        ("gallery/boxes.csv", [("\n", "\n00.png,5,5,nan,9,1,0\n")], "corners 5,5,nan,9 are no places in an image"),
        ("gallery/boxes.csv", [("\n", "\n00.png,5,5,1e12,9,1,0\n")], r"corners 5,5,1e\+12,9 are no places in an image"),
        ("gallery/boxes.csv", [("\n", "\n00.png,5,5\n")], "line 2 has too few fields"),
        ("gallery/boxes.csv", [("\n", "\n01.png,1,1,9,9,1,7\n")], r"gallery image '01.png' has cameras \['1', '7'\]"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_list_is_said(own, file, replacements, words):
    edited(own / file, *replacements)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        folder_scenes.load(str(own))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "no list of boxes in COCO's form"), ('{"images": []}', "KeyError 'annotations'"),
     ('{"images": [{"id": 1, "file_name": "00.png"}], "annotations": [{"image_id": 2, "bbox": [1, 1, 2, 2]}]}',
      "a box of image_id 2, which is not among the images"),
     ('{"images": [{"id": 1, "file_name": "00.png"}], "annotations": [{"image_id": 1, "bbox": [1, 1, 2]}]}',
      "must be x, y, width, height"),
     ('{"images": [{"id": 1, "file_name": "00.png"}], "annotations": [{"image_id": 1, "bbox": [1, 1, "a", 2]}]}',
      "must be four numbers"),
     ('{"images": [{"id": 1, "file_name": "00.png"}], "annotations": [{"image_id": 1, "bbox": [1, 1, 0, 2]}]}',
      "has no area"),
     ('{"images": [{"id": 1, "file_name": "00.png"}], "annotations": [{"image_id": 1, "bbox": ["3", "5", "1", "3"]}]}',
      "must be four numbers"),
     ('{"images": [{"id": 1}], "annotations": [{"image_id": 1, "bbox": [1, 1, 2, 2]}]}', "KeyError 'file_name'"),
     ('{"images": [{"id": 1, "file_name": "00.png"}], "annotations": [{"image_id": [1], "bbox": [1, 1, 2, 2]}]}',
      "TypeError"),
     ('{"images": [{"id": 1, "file_name": "00.png"}, {"id": 1, "file_name": "01.png"}], "annotations": []}',
      "two images of one id, one of them '00.png'; give each its own"),
     ('{"images": [{"id": 1, "file_name": "00.png"}], "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": '
      '"car"}], "annotations": [{"image_id": 1, "bbox": [1, 1, 9, 9], "category_id": 2}]}',
      "is of category 'car'; leave all but people out"),
     ('{"images": [{"id": 1, "file_name": "00.png"}], "annotations": [{"image_id": 1, "bbox": [1, 1, 9, 9], '
      '"iscrowd": 1}]}', "is a crowd and no person"),
     ('{"images": [{"id": 1, "file_name": "00.png"}], "annotations": [{"image_id": 1, "bbox": [1, 1, 9, 9], '
      '"person_id": [1]}]}', r"\[1\] must be a text or a whole number"),
     ('{"images": [{"id": 1, "file_name": "00.png"}], "annotations": [{"image_id": 1, "bbox": [1, 1, 9, 9], '
      '"person_id": 1.5}]}', "1.5 must be a text or a whole number")],
)  # fmt: skip
def test_what_is_wrong_with_a_json_list_is_said(own, text, words):
    (own / "train" / "boxes.csv").unlink()
    (own / "train" / "boxes.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        folder_scenes.load(str(own))


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), (-1, ""), (float("nan"), ""), ("", ""), (3.0, "3"), (3, "3"), (" a ", "a")]
)
def test_a_person_of_a_json_list_is_a_text(value, text):
    assert folder_scenes._label("here", value) == text


def test_what_is_missing_is_said(own, tmp_path):
    with pytest.raises(FileNotFoundError, match="--data-root DIR is needed"):
        folder_scenes.load("")
    (own / "train" / "boxes.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has boxes\.csv and boxes\.json; remove one"):
        folder_scenes.load(str(own))
    (own / "train" / "boxes.json").unlink()
    (own / "query.csv").rename(own / "queries.csv")
    with pytest.raises(FileNotFoundError, match=r"no query\.csv in"):
        folder_scenes.load(str(own))
    (own / "train" / "boxes.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"no boxes\.csv and no boxes\.json in"):
        folder_scenes.load(str(own))


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(600, 800), (1080, 1920), (576, 720), (333, 777), (900, 1500), (47, 31)])
def test_frames_are_resized_as_torchvision_does(size):
    transform = GeneralizedRCNNTransform(90, 150, [0.0] * 3, [1.0] * 3)
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    expected = transform.resize(image, None)[0]
    assert data.resized_size(*size, (90, 150)) == tuple(expected.shape[1:])
    found = data.resize((255 * image).round().to(torch.uint8), tuple(expected.shape[1:]))
    assert (found.float() / 255 - expected).abs().max() < 0.51 / 255 + 0.5 / 255 + 1e-6


def test_a_box_that_no_frame_can_have_is_named(own):
    found = folder_scenes.load(str(own)).train
    sizes = np.array([size_of(found.frames.reader.read(key)) for key in found.frames.keys])
    data.check_boxes(found, sizes)
    found.box_N4[3] = [200, 5, 230, 9]
    frame = found.frames.keys[int(np.repeat(np.arange(24), found.count_F)[3])]
    with pytest.raises(
        ValueError, match=rf"box \[200, 5, 230, 9\] of {frame} \(\d+×\d+ pixels\) lies outside its frame;"
    ):
        data.check_boxes(found, sizes)
    found.box_N4[4] = [5, 5, 5, 9]
    with pytest.raises(ValueError, match="has no area"):
        data.check_boxes(found, sizes)


def test_a_query_outside_its_frame_is_named(own, tmp_path):
    shutil.copytree(own, tmp_path / "data")
    line = (own / "query.csv").read_text().splitlines()[1].split(",")
    edited(tmp_path / "data" / "query.csv", (",".join(line[:5]), f"{line[0]},900,5,930,20"))
    place = Place(str(tmp_path), str(tmp_path / "data"))
    recipe = changed(find.recipe("ddps", "folder"), {"student.size": (48, 64), "loader_workers": 0})
    needs = data.side_needs(recipe.data, recipe.run, recipe.student.size, place, "gallery")
    ready = {}
    for need in (needs["gallery"], needs["gallery frames"]):
        ready[need.kind] = data.make(need, {"images": ready.get("index")}, place, silent)
    with pytest.raises(ValueError, match=r"query box \[900, 5, 930, 20\] of .* lies outside its frame"):
        data.make(needs["gallery scenes"], {"images": ready["index"], "frames": ready["frames"]}, place, silent)
    assert not list((tmp_path / "scenes").glob("*.safetensors"))


def test_a_damaged_frame_is_to_be_repaired_not_skipped(own, tmp_path):
    shutil.copytree(own, tmp_path / "data")
    (tmp_path / "data" / "gallery" / "images" / "00.png").write_bytes(b"no picture")
    place = Place(str(tmp_path), str(tmp_path / "data"))
    recipe = find.recipe("ddps", "folder")
    needs = data.side_needs(recipe.data, recipe.run, (48, 64), place, "gallery")
    with pytest.raises(OSError, match=r"1 of \d+ images cannot be read: 00.png; repair them, or take them out"):
        data.make(needs["gallery"], {}, place, silent)


def test_a_fraction_is_inside_every_larger_one_and_numbers_its_identities(own):
    place = Place("", str(own))
    half, most = (data.listed(Data(name="folder_scenes", fraction=f), place).train for f in (0.5, 0.75))
    assert len(half) == 12 and len(most) == 18 and set(half.frames.keys) < set(most.frames.keys)
    assert set(half.identities) == set(range(1, half.num_identities + 1))
    with pytest.raises(ValueError, match="holds no scenes with boxes of people"):
        data.listed(Data(name="demo"), place)


@pytest.mark.parametrize("stored", ["on", "off"])
def test_a_frame_s_table_gives_the_frame(stored, prepared, tiny_recipe, tiny_place):
    recipe = tiny_recipe("ddps", **{"run.pixel_cache": stored, "student.size": "24x64", "ld": 0, "cd": 0, "dfd": 0})
    ready = prepared("ddps", recipe)
    frames = data.open_frames(ready, "train", (24, 64))
    assert frames.decodes == (stored == "off") and len(frames.sizes()) == 24
    original = torch.from_numpy(np.array(decode(frames.images.reader.read(frames.images.keys[1])))).permute(2, 0, 1)
    expected = data.resize(original, data.resized_size(*original.shape[1:], (24, 64)))
    assert tuple(frames.sizes()[1]) == tuple(expected.shape[1:]) == tuple(frames(1).shape[1:])
    assert (frames(1).float() - expected.float()).abs().mean() < (3 if stored == "on" else 1e-9)
    assert frames.scale(1).tolist() == pytest.approx([expected.shape[2] / original.shape[2]] * 2 * 2, abs=0.05)
    searched = data.open_gallery(ready, (24, 64))
    listed = data.listed(recipe.data, tiny_place)
    assert list(searched.galleries) == list(listed.galleries) and len(searched.queries) == len(listed.queries)
    for name, gallery in listed.galleries.items():
        for query in range(len(searched.queries)):
            assert np.array_equal(searched.galleries[name].frames[query], gallery.frames[query])
            assert {f: b.tolist() for f, b in searched.galleries[name].targets[query].items()} == {
                f: b.tolist() for f, b in gallery.targets[query].items()
            }


def test_rows_of_bytes_are_stored(tmp_path):
    rows = [b"", b"\x00\xff", b"abc" * 1000]
    made = cache.ensure(
        tmp_path, "files", {"a": 1}, lambda: iter([{"file": rows[:2]}, {"file": rows[2:]}]), verify=True
    )
    again = cache.open_rows(made.folder, verify=True)
    assert list(again.text("file")) == rows and again.manifest["columns"]["file"]["dtype"] == "bytes"


# --- batches ----------------------------------------------------------------------------------------------------------


def test_scenes_of_one_shape_meet():
    group = np.array([0] * 13 + [1] * 7 + [2] * 2)
    batches = grouped_batches(group, 4, (1, 2))
    assert batches.shape == (5, 4) and len(np.unique(batches)) == 20
    alike = [len(set(group[rows])) for rows in batches]
    assert alike.count(1) == 4
    assert np.array_equal(batches, grouped_batches(group, 4, (1, 2)))
    assert not np.array_equal(batches, grouped_batches(group, 4, (1, 3)))
    seen = np.unique(np.concatenate([grouped_batches(group, 4, (1, e)).ravel() for e in range(30)]))
    assert len(seen) == 22  # rare shapes too
    with pytest.raises(ValueError, match="a batch of 30 images is more than the 22 training images"):
        grouped_batches(group, 30, (0,))


def test_a_batch_is_that_of_its_place_whoever_takes_it(prepared, tiny_recipe):
    recipe = tiny_recipe("ddps")
    ready = prepared("ddps", recipe)
    frames = data.open_frames(ready, "train", recipe.student.size)
    scenes = data.open_scenes(ready, "train", frames.images)
    requests = SceneRequests(frames.sizes(), Batches(scenes=4), 3)
    assert requests.steps == 6
    alone = list(requests(2, 0, 1))
    halves = [list(requests(2, rank, 2)) for rank in range(2)]
    for whole, *parts in zip(alone, *halves, strict=True):
        assert np.concatenate([p.frames for p in parts]).tolist() == whole.frames.tolist()
        assert [d for p in parts for d in p.draws] == whole.draws and {p.padded for p in parts} == {whole.padded}
        assert whole.padded[0] % 32 == whole.padded[1] % 32 == 0
    load = LoadScenes(frames, scenes)
    request = next(r for r in alone if r.mirrored.any() and not r.mirrored.all())
    batch = load(request)
    for place, (number, mirrored) in enumerate(zip(request.frames.tolist(), request.mirrored, strict=True)):
        height, width = batch["sizes"][place]
        plain = frames(number)
        shown = batch["frames"][place, :, :height, :width]
        assert torch.equal(shown.flip(2) if mirrored else shown, plain)
        assert not batch["frames"][place, :, height:].any() and not batch["frames"][place, :, :, width:].any()
        boxes = batch["boxes"][place].numpy()
        if mirrored:
            boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
        assert np.allclose(boxes, scenes.boxes(number) * frames.scale(number), atol=1e-4)
        assert batch["identity"][place].tolist() == scenes.identity_N[scenes.rows(number)].tolist()


def test_the_size_of_a_picture_is_that_of_the_decoded_one():
    for orientation in (1, 6):
        picture, file = Image.new("RGB", (30, 20)), io.BytesIO()
        exif = picture.getexif()
        exif[0x0112] = orientation
        picture.save(file, "JPEG", exif=exif)
        assert size_of(file.getvalue()) == decode(file.getvalue()).size[::-1]
