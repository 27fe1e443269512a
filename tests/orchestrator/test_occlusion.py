"""Occluders: recorded geometry, the three sets, pasted pixels; and the two views made with them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from orchestrator.datasets import occlusion, person_views
from orchestrator.datasets.augmentation import standardised
from orchestrator.datasets.demo import load
from orchestrator.datasets.images import Frames
from orchestrator.datasets.occlusion import Occluders, colour_jitter, is_vertical, paste_box, size_range
from orchestrator.datasets.person_views import PersonAugmentation

GEOMETRY = json.loads((Path(__file__).parents[1] / "golden" / "sureid.json").read_text())["noda_geometry"]


@pytest.mark.parametrize("case", GEOMETRY, ids=lambda c: "x".join(map(str, c["patch"])))
def test_geometry_is_the_recorded_one(case):
    patch, image = tuple(case["patch"]), (256, 128)
    assert is_vertical(*patch) == (case["type"] == "vertical")
    low, high = case["size_range"]["width" if is_vertical(*patch) else "height"]
    assert size_range(128 if is_vertical(*patch) else 256) == (low, high)
    drawn = 50 if is_vertical(*patch) else 100
    fraction = (drawn - low + 0.5) / (high - low + 1)
    for far, position in enumerate(case["positions"]):
        assert list(paste_box(patch, image, fraction, bool(far))) == case["example_box_yxyx"][position]


@pytest.mark.parametrize("image", [(256, 128), (64, 32), (7, 5), (2, 2)])
def test_a_third_to_a_half_is_covered_at_every_size(image):
    rng = np.random.default_rng(0)
    for patch in ((50, 100), (101, 50)):
        seen = set()
        for fraction, far in zip(rng.random(500), rng.random(500) < 0.5, strict=True):
            top, left, bottom, right = paste_box(patch, image, fraction, bool(far))
            side = image[1] if is_vertical(*patch) else image[0]
            length = right - left if is_vertical(*patch) else bottom - top
            assert 0 <= top < bottom <= image[0] and 0 <= left < right <= image[1]
            assert side / 3 <= length <= max(side / 2, -(-side // 3))
            seen.add(length)
        assert seen == set(range(size_range(side)[0], size_range(side)[1] + 1))


def test_the_drawn_set_is_the_same_for_one_seed():
    first, again, other = occlusion.procedural(20, 0), occlusion.procedural(20, 0), occlusion.procedural(20, 1)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert sum(is_vertical(*p.shape[1:]) for p in first.patches) == 10
    assert str(occlusion.procedural()) == "procedural, 200 patches, seed 0"
    assert all(p.float().std() > 3 for p in (q[:3] for q in first.patches))  # none is a flat colour


def test_a_folder_of_pictures(tmp_path):
    (tmp_path / "poles").mkdir()
    Image.new("RGB", (10, 40), "red").save(tmp_path / "poles" / "a.png")
    Image.new("RGBA", (40, 30), (0, 0, 255, 0)).save(tmp_path / "b.PNG")
    (tmp_path / "notes.txt").write_text("no picture")
    opaque, clear = occlusion.from_folder(tmp_path), occlusion.from_folder(tmp_path, alpha=True)
    assert len(opaque.patches) == 2 and opaque.fingerprint != clear.fingerprint
    draws = np.full((1, occlusion.OCCLUDER_DRAWS), 0.4, np.float32)
    draws[0, 0] = 0.0  # b.PNG is the first in order of path
    assert opaque.overlay(draws, (32, 16))[0, 3].max() == 255
    assert clear.overlay(draws, (32, 16))[0, 3].max() == 0
    (tmp_path / "c.jpg").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"c\.jpg cannot be read"):
        occlusion.from_folder(tmp_path)


def test_photographs_are_turned_upright_and_shrunk(tmp_path):
    picture = Image.new("RGB", (3000, 1000), "red")
    tag = picture.getexif()
    tag[0x0112] = 6  # the camera was held on its side
    picture.save(tmp_path / "pole.jpg", exif=tag)
    (patch,) = occlusion.from_folder(tmp_path).patches
    assert patch.shape == (4, 512, 171) and is_vertical(*patch.shape[1:])


def test_sets_of_another_stream_share_no_patch():
    first, other = (occlusion.procedural(30, 0, stream).patches for stream in (9, 11))
    assert not {p.numpy().tobytes() for p in first} & {p.numpy().tobytes() for p in other}


def test_empty_and_missing_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no image"):
        occlusion.from_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no folder of occluders .* set occluder_folder"):
        occlusion.from_folder(tmp_path / "none")
    with pytest.raises(ValueError, match="is empty"):
        Occluders("procedural", ())


def test_strips_of_training_images():
    train = load("").train
    strips = occlusion.from_training(train, (64, 32), count=8)
    assert [is_vertical(*p.shape[1:]) for p in strips.patches] == [True, False] * 4
    assert strips.fingerprint == occlusion.from_training(train, (64, 32), count=8).fingerprint


def test_overlay_is_the_jittered_patch_in_its_box():
    patch = torch.full((4, 20, 60), 255, dtype=torch.uint8)
    patch[:3] = torch.tensor([200, 100, 50], dtype=torch.uint8)[:, None, None]
    draws = np.full((1, occlusion.OCCLUDER_DRAWS), 0.5, np.float32)  # factors of 1
    overlay = Occluders("folder", (patch,)).overlay(draws, (60, 30))[0]
    top, left, bottom, right = paste_box((20, 60), (60, 30), 0.5, True)
    inside = torch.zeros(60, 30, dtype=torch.bool)
    inside[top:bottom, left:right] = True
    assert torch.equal(overlay[3] == 255, inside)
    assert overlay[:3, inside].T.unique(dim=0).tolist() == [[200, 100, 50]]
    assert not overlay[:, ~inside].any()


def test_colour_jitter_is_torchvisions():
    from torchvision.transforms.v2 import functional

    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    factors = torch.tensor([[0.5, 1.0, 1.0], [1.0, 1.5, 1.0], [1.2, 0.7, 0.4]])
    for image, (b, c, s), found in zip(x, factors.tolist(), colour_jitter(x, factors), strict=True):
        expected = functional.adjust_brightness(image, b)
        expected = functional.adjust_saturation(functional.adjust_contrast(expected, c), s)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)  # torchvision's grey weights are rounded


# --- Views ------------------------------------------------------------------------------------------------------------


def view(augment, count=6, key=(0, 1), seed=0):
    frames = torch.randint(0, 256, (count, 3, 32, 16), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    draws = augment.draw(count, 0.5, key)
    overlay = torch.zeros(count, 4, 32, 16, dtype=torch.uint8)
    return frames, draws, overlay


def test_a_view_without_anything_is_the_image():
    augment = PersonAugmentation(flip=0, pad=0, patch=0, erase=0)
    frames, draws, overlay = view(augment)
    torch.testing.assert_close(
        augment(frames, torch.from_numpy(draws), overlay, "half"), (frames.float() / 255 - 0.5) / 0.5
    )


def test_erased_pixels_are_normal_noise_and_all_else_is_left():
    augment = PersonAugmentation(flip=0, pad=0, patch=0, erase=1.0)
    frames, draws, overlay = view(augment, count=400)
    views = augment(frames, torch.from_numpy(draws), overlay, "half")
    changed = (views != standardised(frames.float() / 255, "half")).any(1)
    share = changed.float().mean((1, 2))
    assert (share > 0).all() and share.max() < 0.45 and 0.1 < share.mean() < 0.25
    noise = views.permute(1, 0, 2, 3)[:, changed]
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert torch.equal(views, augment(frames, torch.from_numpy(draws), overlay, "half"))


def test_half_of_the_views_get_a_patch_that_is_a_box_of_its_source():
    augment = PersonAugmentation(flip=0, pad=0, patch=0.5, erase=0)
    frames, draws, _ = view(augment, count=400)
    chosen = person_views.has_patch(draws)
    assert 0.4 < chosen.mean() < 0.6
    overlay = person_views.patch_overlay(frames[chosen], draws[chosen])
    for source, laid, row in zip(frames[chosen], overlay, draws[chosen], strict=True):
        rows, columns = torch.nonzero(laid[3].any(1)).flatten(), torch.nonzero(laid[3].any(0)).flatten()
        box = laid[:3, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        y, x = int(row[12] * (32 - len(rows) + 1)), int(row[13] * (16 - len(columns) + 1))
        assert torch.equal(box, source[:, y : y + len(rows), x : x + len(columns)])
    share = (overlay[:, 3] > 0).float().mean((1, 2))
    assert 0.005 < share.min() and share.max() < 0.6
    source = person_views.patch_source(draws, 50)
    assert source.min() >= 0 and source.max() < 50 and len(set(source.tolist())) > 40


def test_an_occluded_view_shows_the_occluder_unjittered_and_unerased():
    augment = PersonAugmentation(flip=0, pad=0, patch=0, erase=0, jitter=0.4, occlude=True)
    frames, draws, _ = view(augment)
    overlay = occlusion.procedural(10).overlay(person_views.occluder_draws(draws), (32, 16))
    views = augment(frames, torch.from_numpy(draws), overlay, "half")
    inside = (overlay[:, 3] == 255)[:, None].expand(-1, 3, -1, -1)
    expected = standardised(overlay[:, :3].float() / 255, "half")
    torch.testing.assert_close(views[inside], expected[inside])
    assert not torch.equal(views, PersonAugmentation(flip=0, pad=0, patch=0, erase=0, occlude=True)(
        frames, torch.from_numpy(draws), overlay, "half"))  # fmt: skip


def test_draws_depend_on_the_key_alone():
    augment = PersonAugmentation()
    assert np.array_equal(augment.draw(5, 0.5, (0, 1)), augment.draw(5, 0.5, (0, 1)))
    assert not np.array_equal(augment.draw(5, 0.5, (0, 1)), augment.draw(5, 0.5, (0, 2)))
    assert augment.draw(5, 0.5, (0, 1)).dtype == np.float32


def test_frames_of_the_demo_survive_a_view():
    train = load("").train
    frames = Frames(train, (64, 32))([0, 1])
    augment = PersonAugmentation()
    draws = augment.draw(2, 0.5, (0,))
    overlay = person_views.patch_overlay(frames, draws)
    assert augment(frames, torch.from_numpy(draws), overlay, "imagenet").isfinite().all()
