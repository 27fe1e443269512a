"""Occluders and how they are pasted: SUReID's noise occlusion data augmentation, NODA (section III-C).

An occluder taller than twice its width covers the image from top to bottom at its left or right edge, any other from
left to right at its top or bottom edge; a third to a half of the image is covered. Before that it is jittered in
colour, mirrored and cropped, so that few patches make many occlusions.

Three sets: patches drawn by a seeded generator, a folder of one's own pictures (what the paper uses; its photographs
are not public), or strips cut from the training images, which is data-related and not the paper's idea.
"""

# Shape legend: B = images, V = draws of one occlusion, H and W = pixels.

import hashlib
import math
import os
import shutil
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from orchestrator.datasets.images import Frames, ImageSet, eight_bit, upright
from orchestrator.datasets.listing import files_below, is_image
from orchestrator.needs import digest

OCCLUDER_DRAWS = 11  # which; brightness, contrast, saturation; mirror; crop height, width, y, x; size; side
_JITTER, _CROP = 0.5, 0.6  # colour factors within 1 ± 0.5; at least 0.6 of each side is left


@dataclass(frozen=True)
class Occluders:
    """A set of patches, uint8 (4, h, w) with alpha, and where it comes from."""

    source: str  # "procedural", "folder" or "training"
    patches: tuple[Tensor, ...] = field(repr=False)
    seed: int = 0

    def __post_init__(self):
        if not self.patches:
            raise ValueError(f"the {self.source} set of occluders is empty; at least one patch is needed")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all patches."""
        digest = hashlib.sha256()
        for patch in self.patches:
            digest.update(str(tuple(patch.shape)).encode())
            digest.update(patch.numpy().tobytes())
        return digest.hexdigest()

    def __str__(self) -> str:
        return f"{self.source}, {len(self.patches)} patches, seed {self.seed}"

    def overlay(self, draws_BV: np.ndarray, size: tuple[int, int]) -> Tensor:
        """uint8 (B, 4, H, W): one pasted occluder per row of draws in [0, 1), transparent elsewhere."""
        overlay = torch.zeros(len(draws_BV), 4, *size, dtype=torch.uint8)
        for row, draws in enumerate(draws_BV.tolist()):
            patch = self.patches[min(int(draws[0] * len(self.patches)), len(self.patches) - 1)]
            top, left, bottom, right = paste_box(tuple(patch.shape[1:]), size, draws[9], draws[10] >= 0.5)
            overlay[row, :, top:bottom, left:right] = _varied(patch, draws[1:9], (bottom - top, right - left))
        return overlay


def is_vertical(height: int, width: int) -> bool:
    """Whether a patch stands: strictly more than twice as tall as wide.

    >>> is_vertical(100, 50), is_vertical(101, 50)
    (False, True)
    """
    return height > 2 * width


def size_range(length: int) -> tuple[int, int]:
    """Smallest and largest whole number of pixels between a third and a half of a side.

    >>> size_range(256), size_range(128)
    ((86, 128), (43, 64))
    """
    return math.ceil(length / 3), max(length // 2, math.ceil(length / 3))


def paste_box(
    patch: tuple[int, int], image: tuple[int, int], fraction: float, far: bool
) -> tuple[int, int, int, int]:  # fmt: skip
    """Where a patch goes: (top, left, bottom, right), the last two excluded.

    Args:
        patch: its stored height and width, which decide whether it stands.
        image: height and width.
        fraction: in [0, 1): where in the size range the covered length lies.
        far: bottom instead of top, right instead of left.

    >>> paste_box((50, 100), (256, 128), 0.0, True)
    (170, 0, 256, 128)
    """
    height, width = image
    low, high = size_range(width if is_vertical(*patch) else height)
    length = min(low + int(fraction * (high - low + 1)), high)
    if is_vertical(*patch):
        return (0, width - length, height, width) if far else (0, 0, height, length)
    return (height - length, 0, height, width) if far else (0, 0, length, width)


def colour_jitter(images_BCHW: Tensor, factors_B3: Tensor) -> Tensor:
    """Brightness, contrast, then saturation of RGB images in [0, 1] multiplied by the factors, clamped after each."""
    brightness, contrast, saturation = (f[:, None, None, None] for f in factors_B3.unbind(1))
    x = (images_BCHW * brightness).clamp(0, 1)
    x = torch.lerp(_grey(x).mean(dim=(2, 3), keepdim=True), x, contrast).clamp(0, 1)
    return torch.lerp(_grey(x), x, saturation).clamp(0, 1)


def procedural(count: int = 200, seed: int = 0, stream: int = 9) -> Occluders:
    """Drawn things that stand in front of people: half of them poles, trunks and fences, the rest bins, boxes,
    walls, cars and bushes, in muted colours, with value noise, stripes and shading.

    Sets of different ``stream`` have no patch in common, whatever their seeds.
    """
    patches = []
    for number in range(count):
        rng = np.random.default_rng([seed, stream, number])
        if number % 2 == 0:
            width = int(rng.integers(24, 40))
            height = int(width * rng.uniform(3, 6))
            patches.append(_drawn(rng, height, width, str(rng.choice(["pole", "trunk", "fence"]))))
        else:
            width = int(rng.integers(64, 112))
            height = int(width * rng.uniform(0.4, 1.8))
            kind = str(rng.choice(["bin", "box", "wall", "car", "bush"]))
            patches.append(_drawn(rng, height, width, kind))
    return Occluders("procedural", tuple(patches), seed)


def from_folder(folder: str | Path, alpha: bool = False, longest: int = 512) -> Occluders:
    """All images below a folder, in order of path; their alpha channel is used if ``alpha``, else they are opaque.

    Turned upright by their EXIF tag; photographs are shrunk to ``longest`` pixels on their longer side, twice what is
    ever pasted at 256 × 128, so that neither memory nor time depends on the camera.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no image in it, or one that cannot be read.
    """
    patches = []
    for file in pictures_in(folder):
        try:
            with Image.open(file) as image:
                image.load()  # whole: a picture that is still to be decoded would be shrunk by its decoder first
                picture = eight_bit(upright(image))
                picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
                pixels = np.array(picture.convert("RGBA"))
        except Exception as error:  # whatever a damaged file makes the decoder raise, the file's name matters
            raise ValueError(f"occluder {file} cannot be read: {error}") from error
        if not alpha:
            pixels[..., 3] = 255
        patches.append(torch.from_numpy(pixels).permute(2, 0, 1).contiguous())
    return Occluders("folder", tuple(patches))


def pictures_in(folder: str | Path) -> list[Path]:
    """All image files below a folder, in order of path.

    Raises:
        FileNotFoundError: no such folder, or a link in it that leads nowhere.
        ValueError: no image in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(
            f"no folder of occluders at {root}; set occluder_folder to one with RGB or RGBA pictures"
        )
    files = [root / file for file in files_below("occluders", root) if is_image(file)]
    if not files:
        raise ValueError(f"the folder of occluders {root} holds no image; put RGB or RGBA pictures there")
    return files


def stamp(folder: str | Path, files: list[Path]) -> str:
    """Changes whenever the pictures may have changed; reads none."""
    stats = ((file, file.stat()) for file in files)
    return digest([[str(file.relative_to(folder)), s.st_size, s.st_mtime_ns] for file, s in stats])


def from_training(images: ImageSet, size: tuple[int, int], count: int = 200, seed: int = 0) -> Occluders:
    """Strips from the edges of training images, where the background is: half left and right, half at the bottom."""
    rng = np.random.default_rng([seed, 10])
    height, width = size
    frames = Frames(images, size)
    patches = []
    for number, index in enumerate(rng.integers(0, len(images), count)):
        frame = frames([int(index)])[0]
        if number % 2 == 0:
            side = max(1, int(width * rng.uniform(0.2, 0.3)))
            frame = frame[:, :, :side] if rng.random() < 0.5 else frame[:, :, width - side :]
        else:
            frame = frame[:, height - max(1, int(height * rng.uniform(0.2, 0.3))) :]
        patches.append(torch.cat([frame, torch.full_like(frame[:1], 255)]).contiguous())
    return Occluders("training", tuple(patches), seed)


def save(folder: str | Path, occluders: Occluders) -> None:
    """The patches as ``patches.safetensors`` in a new folder, from which :func:`stored` reads them."""
    folder = Path(folder)
    partial = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    partial.mkdir(parents=True)
    patches = {f"{number:06d}": patch for number, patch in enumerate(occluders.patches)}
    save_file(patches, partial / "patches.safetensors", {"source": occluders.source, "seed": str(occluders.seed)})
    try:
        os.replace(partial, folder)
    except OSError:  # somebody else has stored the same
        shutil.rmtree(partial)


def stored(folder: str | Path) -> Occluders:
    """The set that was saved."""
    with safe_open(Path(folder) / "patches.safetensors", "pt") as file:
        patches = tuple(file.get_tensor(name) for name in sorted(file.keys()))
        return Occluders(file.metadata()["source"], patches, int(file.metadata()["seed"]))


def _varied(patch_4HW: Tensor, draws: list[float], size: tuple[int, int]) -> Tensor:
    """One patch jittered, mirrored, cropped and resized (bicubic): uint8 (4, *size)."""
    _, height, width = patch_4HW.shape
    kept = [
        max(1, round(side * (_CROP + (1 - _CROP) * u))) for side, u in zip((height, width), draws[4:6], strict=True)
    ]
    top, left = (int(u * (side - k + 1)) for side, k, u in zip((height, width), kept, draws[6:8], strict=True))
    x = patch_4HW[None, :, top : top + kept[0], left : left + kept[1]].float() / 255
    factors = torch.tensor([[1 + _JITTER * (2 * u - 1) for u in draws[:3]]])
    x = torch.cat([colour_jitter(x[:, :3], factors), x[:, 3:]], dim=1)
    x = x.flip(3) if draws[3] < 0.5 else x
    x = F.interpolate(x, size=size, mode="bicubic", antialias=True, align_corners=False)
    return (x[0].clamp(0, 1) * 255).round().to(torch.uint8)


def _grey(images_BCHW: Tensor) -> Tensor:
    return (images_BCHW * _luma(images_BCHW.device)).sum(dim=1, keepdim=True)


@cache  # a copy to the device in every step would make a GPU wait
def _luma(device: torch.device) -> Tensor:
    return torch.tensor([0.299, 0.587, 0.114], device=device).view(1, 3, 1, 1)


# --- Drawing ----------------------------------------------------------------------------------------------------------


def _drawn(rng: np.random.Generator, height: int, width: int, kind: str) -> Tensor:
    base = _muted(rng)
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.broadcast_to(base, (height, width, 3)).copy()
    if kind in ("pole", "trunk"):  # rounded: darker towards the edges
        pixels *= (0.55 + 0.45 * np.sin(np.pi * (x + 0.5) / width))[..., None]
    if kind == "trunk":
        pixels *= (0.85 + 0.15 * np.sin(x * rng.uniform(0.8, 2.0) + 3 * _noise(rng, height, width)))[..., None]
    if kind == "fence":
        slat = x % int(rng.integers(8, 14)) < 2
        pixels[slat | (y % int(rng.integers(30, 60)) < 3)] *= 0.4
    if kind == "wall":
        brick_height, brick_width = int(rng.integers(8, 14)), int(rng.integers(18, 30))
        shifted = x + (y // brick_height % 2) * (brick_width // 2)
        pixels[(y % brick_height < 2) | (shifted % brick_width < 2)] *= 0.6
    if kind in ("bin", "box"):
        edge = max(2, width // 14)
        pixels[(x < edge) | (x >= width - edge) | (y < edge)] *= 0.65
        if kind == "bin":
            pixels[(x // max(3, width // 10)) % 2 == 0] *= 0.88
    if kind == "car":
        window = (y > height * 0.1) & (y < height * 0.45) & (x > width * 0.15) & (x < width * 0.85)
        pixels[window] = 0.35 * _muted(rng) + 20
        wheel_y, radius = height * 0.88, height * 0.2
        for wheel_x in (width * 0.22, width * 0.78):
            pixels[(x - wheel_x) ** 2 + (y - wheel_y) ** 2 < radius**2] = 25
    if kind == "bush":
        leaves = _noise(rng, height, width, cells=12)
        pixels = np.array([70, 105, 55]) * rng.uniform(0.7, 1.2) * (0.6 + 0.8 * leaves[..., None])
    pixels *= (1 + 0.25 * (_noise(rng, height, width) - 0.5))[..., None]
    pixels *= np.linspace(rng.uniform(0.85, 1.15), rng.uniform(0.85, 1.15), height)[:, None, None]
    rgb = torch.from_numpy(np.clip(pixels, 0, 255).astype(np.uint8)).permute(2, 0, 1)
    return torch.cat([rgb, torch.full_like(rgb[:1], 255)]).contiguous()


def _muted(rng: np.random.Generator) -> np.ndarray:
    grey = rng.uniform(50, 190)
    return np.clip(grey + rng.uniform(-45, 45, 3), 15, 240)


def _noise(rng: np.random.Generator, height: int, width: int, cells: int = 6) -> np.ndarray:
    """Value noise in [0, 1]: a coarse random grid, smoothly enlarged."""
    coarse = torch.from_numpy(rng.random((1, 1, cells, cells)))
    return F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)[0, 0].clamp(0, 1).numpy()
