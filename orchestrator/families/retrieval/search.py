"""Embedding, searching and showing: what every retrieval network is scored with."""

# Shape legend: B = images of a batch, D = embedding width, Q and G = queries and gallery, R = results.

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transform

from orchestrator import cache, distributed
from orchestrator.datasets.augmentation import normalised
from orchestrator.datasets.images import Frames, RetrievalData, fetch
from orchestrator.evaluation.retrieval import PrecisionRule, RetrievalMetrics, evaluate, nearest
from orchestrator.families.retrieval.data import Source
from orchestrator.method import Evaluation, Queries
from orchestrator.needs import Need, Ready
from orchestrator.pictures import Panel


@dataclass(frozen=True)
class Found:
    """What an evaluation found, for pictures: raw embeddings of both sides."""

    query_QD: Tensor
    gallery_GD: Tensor


def model_input(model: nn.Module, frames: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """uint8 frames as the network wants its pixels."""
    return normalised(torch.as_tensor(frames).to(device), model.pixels)


@torch.no_grad()
def embed(
    model: nn.Module, source: Source, count: int, device: torch.device, batch: int = 256, workers: int = 0,
    camera: np.ndarray | None = None,
) -> Tensor:  # fmt: skip
    """Raw float32 embeddings of all images, in order, in eval mode: (count, D) on the device.

    Every rank embeds a share and receives all rows. ``workers`` processes decode images that are not cached.
    ``camera`` is the number of every image's camera, for networks that are told.
    """
    was_training = model.training
    model.eval()
    share = -(-count // distributed.world_size())
    own = (np.arange(share) + distributed.rank() * share).clip(max=count - 1)  # the last share may repeat its end
    requests = [own[start : start + batch] for start in range(0, share, batch)]
    decoding = workers if isinstance(source, Frames) else 0
    parts = []
    for rows, frames in zip(requests, fetch(source, requests, decoding), strict=True):
        cameras = () if camera is None else (torch.from_numpy(camera[rows]).to(device),)
        parts.append(model(model_input(model, frames, device), *cameras).float())
    model.train(was_training)
    return distributed.gather_without_gradient(torch.cat(parts))[:count]


def score(ap: PrecisionRule, data: RetrievalData, query_QD: Tensor, gallery_GD: Tensor) -> RetrievalMetrics:
    """Metrics under the benchmark's own protocol."""
    cameras = (data.query.camera, data.gallery.camera) if data.camera_filter else (None, None)
    return evaluate(
        query_QD, gallery_GD, data.query.identity, data.gallery.identity, *cameras, leave_one_out=data.leave_one_out,
        ap=ap,
    )  # fmt: skip


def evaluation(data: RetrievalData, found: Found, **scored: RetrievalMetrics) -> Evaluation:
    """Metrics under the prefixes they were given, with the scores of the single queries."""
    metrics = {name: value for prefix, one in scored.items() for name, value in one.log(prefix).items()}
    of_queries = {name: values for prefix, one in scored.items() for name, values in one.of_queries(prefix).items()}
    return Evaluation(metrics, found, Queries(np.asarray(data.query.identity), of_queries))


def symmetric(ap: PrecisionRule, data: RetrievalData, embedded: Callable[[str], Tensor]) -> Evaluation:
    """One network on both sides: ``embedded`` gives the raw embeddings of "query" or "gallery"."""
    query_QD = embedded("query")
    gallery_GD = query_QD if data.leave_one_out else embedded("gallery")
    return evaluation(data, Found(query_QD, gallery_GD), val=score(ap, data, query_QD, gallery_GD))


def references(
    need: Need, data: RetrievalData, chance_QD: Tensor, gallery_GD: Tensor, teacher_QD: Tensor | None,
    teacher: Mapping[str, str],
) -> Ready:  # fmt: skip
    """What a student is compared with: the teacher on both sides, and random queries.

    Args:
        need: of kind "references".
        data: the benchmark.
        chance_QD: random embeddings of the queries.
        gallery_GD: what is searched in.
        teacher_QD: the teacher's embeddings of the queries; None where there is no teacher.
        teacher: what the record says about it.
    """
    ap = need.made_from["ap"]
    chance = score(ap, data, chance_QD, gallery_GD)
    told = {"chance_metrics": chance.log("val"), "valid_queries": chance.valid_queries, **teacher}
    if ap == "trapezoid":
        told["rule"] = "AP by trapezoids"
    if teacher_QD is not None:
        told["teacher_metrics"] = score(ap, data, teacher_QD, gallery_GD).log("val")
    return Ready(need.key, need.kind, "", "", told)  # measured anew elsewhere the last digits differ


def random_rows(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The embeddings of chance, the same every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def chance_sides(data: RetrievalData, device: torch.device, width: int = 128) -> tuple[Tensor, Tensor]:
    """Random embeddings of both sides, of one generator."""
    generator = torch.Generator().manual_seed(0)
    query_QD, gallery_GD = (torch.randn(len(s), width, generator=generator) for s in (data.query, data.gallery))
    return query_QD.to(device), (query_QD if data.leave_one_out else gallery_GD).to(device)


def panel(
    data: RetrievalData, found: Found, query: Source, gallery: Source, queries: int = 6, results: int = 10
) -> Panel:
    """A few queries, spread over the set, with their first results under the benchmark's protocol.

    Args:
        data: the benchmark.
        found: raw embeddings of both sides.
        query: frames of the queries, cached where they are.
        gallery: frames of the gallery.
        queries: how many.
        results: how many for each.
    """
    chosen = np.unique(np.linspace(0, len(data.query) - 1, queries).astype(int))
    removed_QG = np.zeros((len(chosen), len(data.gallery)), bool)
    if data.leave_one_out:
        removed_QG[np.arange(len(chosen)), chosen] = True
    if data.camera_filter:
        removed_QG |= (data.query.identity[chosen, None] == data.gallery.identity[None]) & (
            data.query.camera[chosen, None] == data.gallery.camera[None]
        )
    shown = min(results, len(data.gallery) - int(removed_QG.sum(1).max()))
    query_QD = found.query_QD[torch.from_numpy(chosen).to(found.query_QD.device)]
    found_QR = nearest(query_QD, found.gallery_GD, shown, removed_QG)
    return Panel(
        title="Queries and their first results, right framed green, wrong framed red",
        query=small(query(chosen)),
        results=np.stack([small(gallery(row)) for row in found_QR]),
        correct=data.query.identity[chosen, None] == data.gallery.identity[found_QR],
    )


def small(frames: np.ndarray | Tensor, longest: int = 96) -> np.ndarray:
    """Frames for a picture, at most ``longest`` pixels on a side: uint8 (B, H, W, 3)."""
    frames_BCHW = torch.as_tensor(frames)
    height, width = frames_BCHW.shape[2:]
    scale = min(1.0, longest / max(height, width))
    if scale < 1:
        frames_BCHW = transform.resize(frames_BCHW, [round(height * scale), round(width * scale)], antialias=True)
    return frames_BCHW.permute(0, 2, 3, 1).numpy()


def whole(rows: cache.Rows, device: torch.device) -> Tensor:
    """All embeddings of a cache on the device."""
    return torch.from_numpy(rows(np.arange(len(rows)))).to(device)
