"""Retrieval metrics: mAP, CMC and mINP as the re-identification field defines them, in bounded memory.

Cosine similarity of L2-normalised embeddings, higher is nearer, ties by gallery index. For one query with P
relevant gallery images at ranks r_1 < … < r_P (1-based, after the protocol's removals):

    AP = 1/P Σ_j j / r_j        CMC-k = [r_1 <= k]        INP = P / r_P

Queries without a relevant image left are skipped and counted. Means are over the remaining queries. AP by trapezoids
(Oxford buildings, the first tool of Market-1501) is there on request: the mean with the precision just before the hit,
(j - 1) / (r_j - 1), and 1 before rank 1. Not comparable: MAP@R, R@K with a cut gallery.

Only the ranks of relevant images matter. So only similarities from a query's worst relevant image on are counted, or
sorted without their indices; of a trained network they are few. Where an irrelevant image is exactly
as near as a relevant one, the gallery index decides, and the whole row is sorted with it.
"""

# Shape legend: Q = queries, G = gallery, D = embedding width, B = queries of one block, R = its pairs of one identity,
# P = most relevant images of any query of the block, N = training images, K = neighbours.

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

MAX_RANK = 50
PrecisionRule = Literal["precision", "trapezoid"]
_COUNTED = 48  # relevant images of a query up to which two passes for each are quicker than to sort once
_BLOCK_BYTES = 256 * 2**20  # of float32 similarities alive at once


@dataclass(frozen=True)
class RetrievalMetrics:
    """All rates are fractions in [0, 1]; ``cmc[k - 1]`` is the CMC at rank k."""

    map: float
    rank1: float
    rank3: float
    rank5: float
    rank10: float
    minp: float
    cmc: np.ndarray = field(repr=False)
    valid_queries: int  # queries with at least one relevant gallery image left
    average_precision: np.ndarray = field(repr=False)  # (Q,), NaN where the query was skipped
    first_rank: np.ndarray = field(repr=False)  # (Q,), of the nearest relevant image; NaN likewise
    inverse_penalty: np.ndarray = field(repr=False)  # (Q,), NaN likewise

    def log(self, prefix: str = "val") -> dict[str, float]:
        """The scalars under the names of the log: ``val/map``, ``val/rank1``, …"""
        names = ("map", "rank1", "rank3", "rank5", "rank10", "minp")
        return {f"{prefix}/{name}": float(getattr(self, name)) for name in names}

    def of_queries(self, prefix: str = "val") -> dict[str, np.ndarray]:
        """What :meth:`log` is the mean of, of every query."""
        counted = ~np.isnan(self.first_rank)
        ranks = {f"rank{k}": np.where(counted, self.first_rank <= k, np.nan) for k in (1, 3, 5, 10)}
        scores = {"map": self.average_precision, **ranks, "minp": self.inverse_penalty}
        return {f"{prefix}/{name}": values for name, values in scores.items()}


def evaluate(
    query_QD: Tensor | np.ndarray,
    gallery_GD: Tensor | np.ndarray,
    query_identity: Tensor | np.ndarray,
    gallery_identity: Tensor | np.ndarray,
    query_camera: Tensor | np.ndarray | None = None,
    gallery_camera: Tensor | np.ndarray | None = None,
    leave_one_out: bool = False,
    block_bytes: int = _BLOCK_BYTES,
    ap: PrecisionRule = "precision",
) -> RetrievalMetrics:
    """Searches every query in the gallery and scores the ranking.

    Args:
        query_QD: query embeddings, raw or normalised (they are normalised here, in float32).
        gallery_GD: gallery embeddings of the same width.
        query_identity, gallery_identity: whose image each row is.
        query_camera, gallery_camera: both or neither; gallery images with the query's identity *and* camera
            are removed for that query.
        leave_one_out: query i and gallery i are the same image, which is removed for query i.
        block_bytes: bound on the similarities alive at once; memory does not grow with Q × G.
        ap: precision at every hit, or its mean with the precision just before (see the module).

    Returns:
        :class:`RetrievalMetrics`.

    Raises:
        ValueError: shapes that do not fit, an empty side, non-finite embeddings, only one side's cameras, no query
            with a relevant image, or an unknown rule.

    >>> e = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    >>> round(evaluate(e[:1], e[1:], [7], [3, 7]).map, 3)  # the relevant image comes second
    0.5
    """
    if ap not in get_args(PrecisionRule):
        raise ValueError(f"ap must be one of {', '.join(get_args(PrecisionRule))}, got {ap!r}")
    query_QD, gallery_GD = _unit(query_QD, "query"), _unit(gallery_GD, "gallery")
    device = query_QD.device
    gallery_GD = gallery_GD.to(device)
    query_identity_Q = _labels(query_identity, len(query_QD), "query_identity", device)
    gallery_identity_G = _labels(gallery_identity, len(gallery_GD), "gallery_identity", device)
    if query_QD.shape[1] != gallery_GD.shape[1]:
        raise ValueError(f"query embeddings are {query_QD.shape[1]} wide, gallery embeddings {gallery_GD.shape[1]}")
    if (query_camera is None) != (gallery_camera is None):
        raise ValueError("cameras are needed for both the queries and the gallery, or for neither")
    if leave_one_out and len(query_QD) != len(gallery_GD):
        raise ValueError(f"leave_one_out needs one gallery row per query, got {len(query_QD)} and {len(gallery_GD)}")
    query_camera_Q = gallery_camera_G = None
    if query_camera is not None:
        query_camera_Q = _labels(query_camera, len(query_QD), "query_camera", device)
        gallery_camera_G = _labels(gallery_camera, len(gallery_GD), "gallery_camera", device)

    queries, gallery = len(query_QD), len(gallery_GD)
    rows = max(1, min(queries, block_bytes // (4 * gallery)))
    order_G = gallery_identity_G.argsort(stable=True)
    sorted_G = gallery_identity_G[order_G]
    both = torch.promote_types(query_identity_Q.dtype, sorted_G.dtype)
    query_identity_Q, sorted_G = query_identity_Q.to(both).contiguous(), sorted_G.to(both)
    first_Q, last_Q = (torch.searchsorted(sorted_G, query_identity_Q, right=right) for right in (False, True))
    average_precision_Q = np.full(queries, np.nan)
    inverse_penalty_Q = np.full(queries, np.nan)
    first_rank_Q = np.full(queries, np.nan)
    for start in range(0, queries, rows):
        block = slice(start, min(start + rows, queries))
        similarity_BG = query_QD[block] @ gallery_GD.T
        row_R, place_R = _spans(first_Q[block], last_Q[block])  # all pairs of one identity
        column_R = order_G[place_R]
        removed_R = torch.zeros(len(row_R), dtype=torch.bool, device=device)
        if query_camera_Q is not None:
            removed_R |= query_camera_Q[block][row_R] == gallery_camera_G[column_R]
        if leave_one_out:
            removed_R |= column_R == row_R + start
            own = torch.arange(block.start, block.stop, device=device)
            similarity_BG[own - start, own] = -torch.inf
        similarity_BG[row_R[removed_R], column_R[removed_R]] = -torch.inf
        rank_BP, counts_B = _relevant_ranks(similarity_BG, row_R[~removed_R], column_R[~removed_R])
        rank_BP, counts_B = rank_BP.cpu().double().numpy(), counts_B.cpu().numpy()
        found = counts_B > 0
        if not found.any():
            continue
        hit_P = np.arange(1, rank_BP.shape[1] + 1)
        precision_BP = hit_P / rank_BP
        if ap == "trapezoid":
            before_BP = np.where(rank_BP > 1, (hit_P - 1) / np.maximum(rank_BP - 1, 1), 1.0)
            precision_BP = (precision_BP + before_BP) / 2
        precision_BP[hit_P > counts_B[:, None]] = 0.0
        average_precision_Q[block][found] = (precision_BP.sum(axis=1)[found]) / counts_B[found]
        first_rank_Q[block][found] = rank_BP[found, 0]
        inverse_penalty_Q[block][found] = counts_B[found] / rank_BP[found, counts_B[found] - 1]
    valid = ~np.isnan(average_precision_Q)
    if not valid.any():
        raise ValueError(
            "no query has a relevant gallery image left; are the identities of both sides the same labels?"
        )
    cmc = (first_rank_Q[valid][:, None] <= np.arange(1, MAX_RANK + 1)[None, :]).mean(axis=0)
    return RetrievalMetrics(
        map=float(average_precision_Q[valid].mean()),
        rank1=float(cmc[0]),
        rank3=float(cmc[2]),
        rank5=float(cmc[4]),
        rank10=float(cmc[9]),
        minp=float(inverse_penalty_Q[valid].mean()),
        cmc=cmc,
        valid_queries=int(valid.sum()),
        average_precision=average_precision_Q,
        first_rank=first_rank_Q,
        inverse_penalty=inverse_penalty_Q,
    )


def nearest(
    query_QD: Tensor, gallery_GD: Tensor, count: int, removed_QG: Tensor | np.ndarray | None = None
) -> np.ndarray:
    """Gallery indices of each query's nearest images, ties by index: (Q, count). For pictures of a few queries.

    Raises:
        ValueError: fewer than ``count`` gallery images are left for some query.
    """
    query_QD, gallery_GD = _unit(query_QD, "query"), _unit(gallery_GD, "gallery")
    similarity_QG = query_QD @ gallery_GD.T
    if removed_QG is not None:
        similarity_QG.masked_fill_(torch.as_tensor(removed_QG, device=similarity_QG.device), -torch.inf)
    left = int((similarity_QG > -torch.inf).sum(dim=1).min())
    if not 1 <= count <= left:
        raise ValueError(f"count must be between 1 and the {left} gallery images that are left, got {count}")
    return similarity_QG.argsort(dim=1, descending=True, stable=True)[:, :count].cpu().numpy()


def neighbours(
    embedding_ND: Tensor | np.ndarray, count: int, block_bytes: int = _BLOCK_BYTES // 4
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every row's ``count`` nearest rows, itself included: blocks of (indices int32, cosines float32), (B, count).

    Nearest first, ties by index. Memory: the rows once more, normalised, and one block of similarities.

    Raises:
        ValueError: count outside [1, N], or embeddings that are not finite.

    >>> index, cosine = next(neighbours(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]]), count=2))
    >>> index.tolist()
    [[0, 2], [1, 2], [2, 1]]
    """
    unit_ND = _unit(embedding_ND, "training")
    del embedding_ND  # the caller may have left it to us
    if not 1 <= count <= len(unit_ND):
        raise ValueError(f"count must be between 1 and the {len(unit_ND)} training images, got {count}")
    rows = max(1, min(len(unit_ND), block_bytes // (4 * len(unit_ND))))
    for block_BD in unit_ND.split(rows):
        similarity_BN = block_BD @ unit_ND.T
        cosine_BK, index_BK = similarity_BN.topk(count, dim=1)
        # topk takes any of several equal ones: where the last is tied with one left out, the whole row is sorted.
        tied_B = (similarity_BN >= cosine_BK[:, -1:]).sum(dim=1) > count
        order_BK = index_BK.argsort(dim=1)
        cosine_BK, index_BK = cosine_BK.gather(1, order_BK), index_BK.gather(1, order_BK)
        cosine_BK, order_BK = cosine_BK.sort(dim=1, descending=True, stable=True)
        index_BK = index_BK.gather(1, order_BK)
        for row in tied_B.nonzero().flatten().tolist():
            index_BK[row] = similarity_BN[row].argsort(descending=True, stable=True)[:count]
        yield index_BK.int().cpu().numpy(), cosine_BK.cpu().numpy()


def _spans(first_B: Tensor, last_B: Tensor) -> tuple[Tensor, Tensor]:
    """Row number and value of every number from first to last (exclusive) of each row, row by row: (R,), (R,)."""
    counts_B = last_B - first_B
    row_R = torch.repeat_interleave(counts_B)
    return row_R, first_B[row_R] + _places(row_R, counts_B)


def _places(row_R: Tensor, counts_B: Tensor) -> Tensor:
    """The place of every entry in its row, from 0, where entries come row by row."""
    return torch.arange(len(row_R), device=row_R.device) - (counts_B.cumsum(0) - counts_B)[row_R]


def _relevant_ranks(similarity_BG: Tensor, row_R: Tensor, column_R: Tensor) -> tuple[Tensor, Tensor]:
    """1-based ranks of each row's relevant entries, rising and padded at the end: (B, P), and their counts (B,).

    Relevant entries are given row by row. Removed ones must be -inf in ``similarity_BG`` already.
    """
    rows, device = len(similarity_BG), similarity_BG.device
    counts_B = torch.bincount(row_R, minlength=rows)
    most = int(counts_B.max())
    if most == 0:
        return torch.ones(rows, 1, device=device, dtype=torch.int64), counts_B
    place_P = torch.arange(most, device=device)
    relevant_BP = torch.full((rows, most), torch.inf, device=device)  # rising, padded at the end
    relevant_BP[row_R, _places(row_R, counts_B)] = similarity_BG[row_R, column_R]
    relevant_BP = relevant_BP.sort(dim=1).values
    count = _count_on_host if device.type == "cpu" else _count
    from_BP, above_BP = count(similarity_BG, relevant_BP, counts_B)
    # The same among relevant entries alone: equal ones have the ranks of their group, in turn.
    before_BP, upto_BP = (torch.searchsorted(relevant_BP, relevant_BP, right=right) for right in (False, True))
    rank_BP = from_BP - (place_P - before_BP)
    best_first_BP = (counts_B[:, None] - 1 - place_P).clamp_min(0)
    rank_BP = rank_BP.gather(1, best_first_BP).clamp_min(1)  # of padding, too
    tied_BP = (from_BP - above_BP != upto_BP - before_BP) & (place_P < counts_B[:, None])
    for row in tied_BP.any(dim=1).nonzero().flatten().tolist():
        order_G = similarity_BG[row].argsort(descending=True, stable=True)
        relevant_G = torch.isin(order_G, column_R[row_R == row])
        rank_BP[row, : counts_B[row]] = relevant_G.nonzero().flatten() + 1
    return rank_BP, counts_B


def _count(similarity_BG: Tensor, relevant_BP: Tensor, counts_B: Tensor) -> tuple[Tensor, Tensor]:
    """How many entries of its row are at least as near as each relevant one, and how many are nearer: (B, P) each."""
    sorted_BG = similarity_BG.sort(dim=1).values
    below_BP, upto_BP = (torch.searchsorted(sorted_BG, relevant_BP, right=right) for right in (False, True))
    return sorted_BG.shape[1] - below_BP, sorted_BG.shape[1] - upto_BP


def _count_on_host(similarity_BG: Tensor, relevant_BP: Tensor, counts_B: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`_count`, row by row, of what is as near as the worst relevant entry: few of them need no sorting."""
    similarity_BG, relevant_BP, counts_B = (values.numpy() for values in (similarity_BG, relevant_BP, counts_B))
    from_BP, above_BP = np.zeros((2, *relevant_BP.shape), np.int64)

    def count(rows: range) -> None:
        for row in rows:
            relevant_P = relevant_BP[row, : counts_B[row]]
            if not len(relevant_P):
                continue
            near = similarity_BG[row][similarity_BG[row] >= relevant_P[0]]
            if len(relevant_P) <= _COUNTED:
                from_BP[row, : len(relevant_P)] = [np.count_nonzero(near >= bound) for bound in relevant_P]
                above_BP[row, : len(relevant_P)] = [np.count_nonzero(near > bound) for bound in relevant_P]
            else:
                near.sort()
                from_BP[row, : len(relevant_P)] = len(near) - near.searchsorted(relevant_P)
                above_BP[row, : len(relevant_P)] = len(near) - near.searchsorted(relevant_P, "right")

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        parts = np.linspace(0, len(similarity_BG), 4 * threads + 1).astype(int)
        list(pool.map(count, map(range, parts[:-1], parts[1:])))
    return torch.from_numpy(from_BP), torch.from_numpy(above_BP)


def _unit(embedding: Tensor | np.ndarray, side: str) -> Tensor:
    embedding = torch.as_tensor(embedding)
    if embedding.ndim != 2 or len(embedding) == 0:
        raise ValueError(f"{side} embeddings must be a non-empty matrix (images, width), got {tuple(embedding.shape)}")
    embedding = embedding.detach().float()
    norm = torch.linalg.vector_norm(embedding, dim=1, keepdim=True)
    if not torch.isfinite(norm).all():
        raise ValueError(f"{int((~torch.isfinite(norm)).sum())} of {len(norm)} {side} embeddings are not finite")
    return embedding / norm.clamp_min(1e-12)


def _labels(values: Tensor | np.ndarray | list[int], expected: int, name: str, device: torch.device) -> Tensor:
    if isinstance(values, np.ndarray) and not values.flags.writeable:  # of a table's memory map
        values = values.copy()
    labels = torch.as_tensor(values, device=device)
    if labels.shape != (expected,):
        raise ValueError(f"{name} must have one entry per image ({expected}), got shape {tuple(labels.shape)}")
    return labels
