"""Readers, decoding, sampling and augmentation."""

import io
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from orchestrator.datasets import demo, folder, omniglot
from orchestrator.datasets.augmentation import MEAN, STD, Augmentation, normalised
from orchestrator.datasets.images import Folder, Frames, ImageSet, RetrievalData, decode, fetch, frame
from orchestrator.datasets.sampling import identity_batches, own_part, shuffled_batches
from orchestrator.evaluation.retrieval import evaluate


def png(pixels) -> bytes:
    stored = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(stored, "PNG")
    return stored.getvalue()


# --- Omniglot


def omniglot_zip(path, part, alphabets, drawers):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"images_{part}/", "")
        for a in range(alphabets):
            for drawer in range(1, drawers + 1):
                name = f"images_{part}/Alphabet_{a}/character01/{a:04d}_{drawer:02d}.png"
                archive.writestr(name, png(Image.new("1", (105, 105), a % 2)))


def test_omniglot_is_read_in_place(tmp_path, monkeypatch):
    monkeypatch.setattr(omniglot, "_COUNTS", {"background": (21, 7), "evaluation": (6, 2)})
    omniglot_zip(tmp_path / "images_background.zip", "background", 7, 3)
    omniglot_zip(tmp_path / "images_evaluation.zip", "evaluation", 2, 3)
    data = omniglot.load(str(tmp_path))
    assert (len(data.train), data.train.num_identities, len(data.query)) == (21, 7, 6)
    assert data.leave_one_out and data.query is data.gallery
    assert data.query.camera.tolist() == [1, 2, 3, 1, 2, 3]
    assert Frames(data.train, (28, 28))([0, 20]).shape == (2, 3, 28, 28)
    held = omniglot.load(str(tmp_path), "validation")
    assert (held.train.num_identities, held.query.num_identities) == (2, 5)
    assert not set(held.train.keys) & set(held.query.keys)


def test_omniglot_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no images_background.zip in .*--data-root must hold"):
        omniglot.load(str(tmp_path))
    omniglot_zip(tmp_path / "images_background.zip", "background", 2, 3)
    with pytest.raises(ValueError, match="has 6 images of 2 characters, expected 19280 of 964"):
        omniglot.load(str(tmp_path))


def test_omniglot_at_full_size(shared):
    data = omniglot.load(str(shared / "data/omniglot"))
    assert (len(data.train), data.train.num_identities) == (19_280, 964)
    assert (len(data.query), data.query.num_identities) == (13_180, 659)
    pixels = 255 - Frames(data.query, (28, 28))(range(0, 13_180, 20)).float().mean(1).flatten(1)
    assert pixels.shape == (659, 784) and pixels.max() > 100


# --- Folder


def make_tree(root, names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(np.zeros((8, 8, 3), np.uint8)))


def test_folder_with_cameras(tmp_path):
    make_tree(
        tmp_path,
        ["train/a/1.JPG", "train/b/2.png", "query/x/q_c1_0.png", "gallery/x/g_c2_0.png", "gallery/y/g_c3s1_9.jpg"],
    )
    (tmp_path / "gallery/y/notes.txt").write_text("not an image")
    data = folder.load(str(tmp_path))
    assert data.camera_filter and not data.leave_one_out
    assert data.query.camera.tolist() == [1] and data.gallery.camera.tolist() == [2, 3]
    assert data.query.identity.tolist() == [0] and data.gallery.identity.tolist() == [0, 1]


def test_folder_without_query_is_leave_one_out(tmp_path):
    make_tree(tmp_path, ["train/a/1.png", "gallery/2024_c9/1.png", "gallery/2024_c9/2.png"])
    data = folder.load(str(tmp_path))
    assert data.leave_one_out and data.gallery.camera is None  # a folder name is never a camera


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["gallery/x/1.png"], FileNotFoundError, "has no train folder; it must hold"),
        (["train/x/1.png", "gallery/1.png"], FileNotFoundError, "no images in .*gallery"),
        (
            ["train/x/1.png", "gallery/x/a_c1_.png", "gallery/x/b.png"],
            ValueError,
            "1 of 2 files in gallery name a camera",
        ),
        (["train/x/1.png", "gallery/x/a_c1_.png", "query/x/b.png"], ValueError, "only one of query and gallery"),
    ],
)
def test_folder_says_what_is_wrong(tmp_path, names, error, message):
    make_tree(tmp_path, names)
    with pytest.raises(error, match=message):
        folder.load(str(tmp_path))


# --- Demo


def test_demo_is_seeded_and_disjoint():
    data = demo.load("")
    assert (len(data.train), len(data.query), len(data.gallery)) == (1200, 320, 960) and data.camera_filter
    assert not set(data.train.identity) & set(data.gallery.identity)
    assert not set(data.query.keys) & set(data.gallery.keys)
    assert demo.Renderer().read("3/1/0") == demo.Renderer().read("3/1/0") != demo.Renderer().read("3/1/1")
    validation = demo.load("", "validation")
    assert not set(validation.query.identity) & set(data.query.identity)


@pytest.mark.slow
def test_demo_cannot_be_solved_with_pixels():
    data = demo.load("")
    pixels = [Frames(s, (12, 12))(range(len(s))).float().flatten(1) - 128 for s in (data.query, data.gallery)]
    metrics = evaluate(*pixels, data.query.identity, data.gallery.identity, data.query.camera, data.gallery.camera)
    assert metrics.map < 0.05


# --- Decoding


def test_transparency_is_laid_on_white():
    image = decode(png(Image.new("RGBA", (2, 2), (255, 0, 0, 0))))
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (255, 255, 255)
    assert frame(image, (5, 3)).shape == (3, 5, 3)


def test_truncated_image_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(png(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))[:900])
    images = ImageSet("x", ("a.png",), np.array([0]), Folder(str(tmp_path)))
    with pytest.raises(OSError, match=r"x: cannot read image 'a.png'"):
        Frames(images, (8, 8))([0])


def test_worker_processes_give_the_same_in_the_same_order(tiny_root):
    images = folder.load(str(tiny_root)).train
    frames, requests = Frames(images, (12, 12)), [[0, 5], [3], [7, 8, 9]]
    for here, there in zip(fetch(frames, requests), fetch(frames, requests, workers=2), strict=True):
        assert torch.equal(here, there)


def test_sets_refuse_uneven_labels():
    with pytest.raises(ValueError, match="differ in number"):
        ImageSet("x", ("a",), np.array([0, 1]), None)
    one, two = (ImageSet("x", (k,), np.array([0]), None) for k in "ab")
    with pytest.raises(ValueError, match="same images on both sides"):
        RetrievalData(one, one, two, leave_one_out=True)
    with pytest.raises(ValueError, match="cameras on both sides"):
        RetrievalData(one, one, two, camera_filter=True)


def test_labels_are_classes_in_sorted_order():
    images = ImageSet("x", ("a", "b", "c"), np.array([40, 7, 40]), None)
    assert images.labels.tolist() == [1, 0, 1] and images.num_identities == 2


# --- Sampling


def test_identity_batches_hold_p_identities_times_k_images():
    identity = np.repeat(np.arange(11), [2, 9, 6, 7, 12, 6, 6, 6, 6, 6, 6])
    batches = identity_batches(identity, 4, 6, key=(1, 2))
    for batch in batches:
        groups = Counter(identity[batch])
        assert len(groups) == 4 and set(groups.values()) == {6}
    used = batches[np.isin(identity[batches], [0], invert=True)]
    assert len(used) == len(set(used))  # only an identity with too few images repeats them
    assert np.array_equal(batches, identity_batches(identity, 4, 6, key=(1, 2)))
    assert not np.array_equal(batches[0], identity_batches(identity, 4, 6, key=(1, 3))[0])


def test_shuffled_batches_drop_the_rest():
    batches = shuffled_batches(23, 5, key=(0, 1))
    assert batches.shape == (4, 5) and len(set(batches.flatten())) == 20


def test_shares_tile_the_batch():
    batch = np.arange(12)
    assert np.concatenate([own_part(batch, r, 3) for r in range(3)]).tolist() == batch.tolist()
    with pytest.raises(ValueError, match="12 images cannot be shared evenly by 5"):
        own_part(batch, 0, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shuffled_batches(4, 5, (0,)), "a batch of 5 images is more than the 4"),
        (lambda: identity_batches(np.array([0, 0, 1]), 3, 2, (0,)), "a batch of 3 identities is more than the 2"),
        (lambda: identity_batches(np.array([0, 0, 1]), 1, 2, (0,)), "at least 2 identities, got 1"),
    ],
)
def test_batches_that_cannot_be_filled(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- Augmentation


def naive_view(image, draws, pad, fill):
    """The same view with slices, from (3, H, W) uint8."""
    flip, y, x, eh, ew, ey, ex = draws
    _, height, width = image.shape
    image = np.flip(image, 2) if flip > 0.5 else image
    image = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
    top, left = int(np.float32(y) * (2 * pad + 1)), int(np.float32(x) * (2 * pad + 1))
    view = image[:, top : top + height, left : left + width] / 255
    view = (view - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]
    h, w = round(float(eh) * height), round(float(ew) * width)
    if h and w:
        top, left = int(ey * (height - h + 1)), int(ex * (width - w + 1))
        view[:, top : top + h, left : left + w] = np.array(fill)[:, None, None]
    return view


@pytest.mark.parametrize("size", [(16, 16), (20, 10)])
@pytest.mark.parametrize("fill", ["mean", "zero"])
def test_views_equal_the_naive_ones(size, fill):
    augment = Augmentation(flip=0.5, erase=0.7, erase_fill=fill)
    draws = augment.draw(40, size[1] / size[0], (3, 1))
    images = torch.randint(0, 256, (40, 3, *size), dtype=torch.uint8)
    views = augment(images, torch.from_numpy(draws), pad=2)
    for i in range(40):
        expected = naive_view(images[i].numpy(), draws[i], 2, MEAN if fill == "mean" else (0, 0, 0))
        np.testing.assert_allclose(views[i].numpy(), expected, atol=1e-5)


def test_draws_have_the_library_s_distribution():
    draws = Augmentation(flip=0.5, erase=0.5).draw(20_000, 0.5, (0,))
    erased = draws[:, 3] > 0
    assert abs(erased.mean() - 0.5) < 0.02 and abs(draws[:, 0].mean() - 0.5) < 0.02
    area, ratio = draws[erased, 3] * draws[erased, 4], draws[erased, 3] / (draws[erased, 4] * 0.5)
    assert 0.02 <= area.min() and area.max() <= 0.33 + 1e-6
    assert 0.3 - 1e-4 <= ratio.min() and ratio.max() <= 3.3 + 1e-4
    assert draws.min() >= 0 and draws.max() < 1 + 1e-6


def test_no_augmentation_is_normalisation():
    augment = Augmentation(flip=0, erase=0)
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    draws = augment.draw(3, 1.0, (0,))
    assert torch.equal(augment(images, torch.from_numpy(draws), pad=0), normalised(images))


def test_the_same_draws_hold_at_two_resolutions():
    augment = Augmentation(flip=1.0, erase=0)
    small = torch.arange(8 * 8, dtype=torch.uint8).reshape(1, 1, 8, 8).expand(1, 3, 8, 8)
    large = small.repeat_interleave(4, 2).repeat_interleave(4, 3)
    draws = torch.from_numpy(augment.draw(1, 1.0, (5,)))
    draws[0, 1:3] = 0.5  # the centre at any padding
    torch.testing.assert_close(augment(large, draws, 4)[:, :, ::4, ::4], augment(small, draws, 1))
