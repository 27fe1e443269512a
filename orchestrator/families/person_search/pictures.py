"""Pictures of a person search: matches in their frames, where the network looks, and the price of a larger gallery."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw

from losses.ddps import attention_maps, person_masks
from models.person_search import PersonSearch, padded
from orchestrator.datasets.augmentation import normalised
from orchestrator.evaluation.person_search import iou_threshold, overlaps
from orchestrator.families.person_search.data import Searched
from orchestrator.families.person_search.recipe import Search
from orchestrator.families.person_search.search import Found
from orchestrator.method import Evaluation
from orchestrator.pictures import Lines, Panel, Picture, Sheet

_LONGEST = 240  # pixels of a frame in a picture
_QUERIES, _RESULTS, _FRAMES = 5, 5, 4
_PERSON, _OTHER = (255, 210, 0), (200, 200, 200)


def pictures(
    student: PersonSearch, searched: Searched, evaluation: Evaluation, own: Search, device: torch.device
) -> dict[str, Picture]:
    """Of a trained student, from what its evaluation found."""
    found = {"matches": matches(searched, evaluation.found, own), "looks": looks(student, searched, device)}
    curve = gallery_sizes(searched, evaluation)
    return found | ({"gallery_size": curve} if curve else {})


def matches(searched: Searched, found: Found, own: Search) -> Panel:
    """A few queries in their frames, and the frames of the people most like them, with all detections."""
    chosen = np.unique(np.linspace(0, len(searched.queries) - 1, _QUERIES).astype(int))
    queries, results, correct = [], [], []
    side = canvas(searched)
    for query in chosen.tolist():
        frame, box_4 = int(searched.queries.frame_Q[query]), searched.queries.box_Q4[query]
        queries.append(drawn(searched, frame, [box_4], 0, side))
        row, right = [], []
        for place, number, is_person in nearest(searched, found, own, query, _RESULTS):
            certain = int((found.detections[place][:, 4] >= own.least_score).sum())  # by falling score
            row.append(drawn(searched, place, found.detections[place][:certain, :4], number, side))
            right.append(is_person)
        while len(row) < _RESULTS:  # fewer detections than places
            row.append(np.full_like(queries[-1], 255))
            right.append(False)
        results.append(row)
        correct.append(right)
    return Panel(
        "Who is searched, and who of all detected is most alike",
        np.array(queries), np.array(results), np.array(correct),
    )  # fmt: skip


def nearest(searched: Searched, found: Found, own: Search, query: int, count: int) -> list[tuple[int, int, bool]]:
    """(frame, detection, whether it is the person) of the detections most like a query, best first."""
    gallery = next(iter(searched.galleries.values()))
    weighted, ranked = found.searched(own), []
    for frame in gallery.frames[query].tolist():
        similar = weighted[frame] @ found.query_QD[query]
        ranked += [
            (-float(s), frame, n) for n, s in enumerate(similar) if found.detections[frame][n, 4] >= own.least_score
        ]
    result: list[tuple[int, int, bool]] = []
    met: set[int] = set()  # frames whose person is found: a second box around it is scored as wrong
    for _, frame, number in sorted(ranked)[:count]:
        target = gallery.targets[query].get(frame)
        box_14 = found.detections[frame][number, :4][None]
        is_person = (
            target is not None
            and frame not in met
            and bool(overlaps(box_14, np.asarray(target)[None])[0, 0] >= iou_threshold(target))
        )
        met |= {frame} if is_person else set()
        result.append((frame, number, is_person))
    return result


@torch.no_grad()
def looks(student: PersonSearch, searched: Searched, device: torch.device) -> Sheet:
    """Frames with their people, the weights of people and background in DFD, and the student's attention."""
    frames = np.unique(np.linspace(0, len(searched.scenes) - 1, _FRAMES).astype(int)).tolist()
    side, rows = canvas(searched), []
    for frame in frames:
        boxes_n4 = searched.scenes.boxes(frame)
        images = padded(normalised(searched.frames(frame)[None].to(device), student.pixels))
        map_1CHW = student.pyramid(images.pixels_BCHW)["0"]
        size, shape = tuple(images.pixels_BCHW.shape[-2:]), map_1CHW.shape[-2:]
        boxes = torch.from_numpy(boxes_n4 * searched.frames.scale(frame)).float()
        person_1HW, background_1HW = person_masks([boxes], [size], *shape)
        attention_1HW, _ = attention_maps(map_1CHW)
        plain = drawn(searched, frame, boxes_n4, None, side)
        layers = (person_1HW[0], background_1HW[0], attention_1HW[0].cpu().log())
        rows.append([plain, *(over(searched, frame, layer.numpy(), size, side) for layer in layers)])
    columns = ("people", "weight of people", "weight of background", "attention")
    return Sheet("What the finest level is distilled by, and where the student looks", np.array(rows), columns)


def gallery_sizes(searched: Searched, evaluation: Evaluation) -> Lines | None:
    """mAP and top-1 over the number of frames searched; None for galleries of one size."""
    lines: dict[str, list[tuple[float, float]]] = {"mAP": [], "top-1": []}
    for place, (name, gallery) in enumerate(searched.galleries.items()):
        if place and not name.isdigit():
            continue  # such as of other cameras: another question
        group = "val" if place == 0 else f"gallery_{name}"
        frames = float(np.mean([len(gallery.frames[query]) for query in range(min(100, len(searched.queries)))]))
        lines["mAP"].append((frames, 100 * evaluation.metrics[f"{group}/map"]))
        lines["top-1"].append((frames, 100 * evaluation.metrics[f"{group}/top1"]))
    if len(lines["mAP"]) < 2:
        return None
    return Lines("A larger gallery is harder", "frames searched", "%", {k: tuple(sorted(v)) for k, v in lines.items()})


def canvas(searched: Searched) -> int:
    """Side of the square that holds every frame."""
    return min(_LONGEST, int(searched.frames.sizes().max()))


def drawn(
    searched: Searched, frame: int, boxes: Sequence[np.ndarray] | np.ndarray, marked: int | None, side: int
) -> np.ndarray:
    """A frame with boxes in pixels of the original, one of them marked; in a square of white."""
    image, scale_4 = _small(searched, frame, side)
    draw = ImageDraw.Draw(image)
    for number, box_4 in sorted(enumerate(boxes), key=lambda pair: pair[0] == marked):
        corners = np.asarray(box_4) * scale_4
        draw.rectangle(
            corners.round().tolist(), outline=_PERSON if number == marked else _OTHER, width=1 + (number == marked)
        )
    return _on_square(image, side)


def over(searched: Searched, frame: int, weight_HW: np.ndarray, padded_size: tuple[int, int], side: int) -> np.ndarray:
    """A map of a padded frame laid over it in red, darkest where it is least."""
    image, _ = _small(searched, frame, side)
    height, width = searched.frames.sizes()[frame]
    spread = np.ptp(weight_HW) or 1.0
    heat = Image.fromarray((255 * (weight_HW - weight_HW.min()) / spread).astype(np.uint8))
    heat = heat.resize(padded_size[::-1], Image.Resampling.BILINEAR).crop((0, 0, width, height)).resize(image.size)
    share = np.asarray(heat, np.float64)[..., None] / 255
    mixed = 0.45 * np.asarray(image, np.float64) * (1 - share) + share * np.array([230.0, 60.0, 30.0])
    return _on_square(Image.fromarray(mixed.astype(np.uint8)), side)


def _small(searched: Searched, frame: int, side: int) -> tuple[Image.Image, np.ndarray]:
    """The frame inside the square, and what boxes of the original are multiplied by."""
    image = Image.fromarray(searched.frames(frame).permute(1, 2, 0).numpy())
    factor = min(1.0, side / max(image.size))
    small = image.resize((round(image.width * factor), round(image.height * factor))) if factor < 1 else image
    return small, searched.frames.scale(frame) * factor


def _on_square(image: Image.Image, side: int) -> np.ndarray:
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square)
