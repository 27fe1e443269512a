"""Cosine similarities as every relational loss here needs them."""

# Shape legend: B = batch, D = embedding width, K = kept neighbours, N = columns, R = rows of one part.

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Numbers of a tensor that a loss works on at once: on a CPU it stays in the cache (five times as fast as 2^26), while a
# GPU is to be filled; there 2^26 are 256 MiB in float32.
_AT_ONCE_CPU, _AT_ONCE_GPU = 2**19, 2**26
_WHOLE_IF_COMPILED = 2**22  # chunks break a compiled graph, so there a batch of a paper, 128 of 128 × 128, is one
_SORTED_AT_ONCE = 2**22  # numbers whose 64-bit places are alive at once


def unit_rows(embedding_BD: Tensor) -> Tensor:
    """Rows divided by their Euclidean norm, in at least float32; a zero row stays zero.

    The gradient of a zero row is zero. Departs from the authors' code of D3still, where x / max(‖x‖, 1e-12)
    sends a gradient of order 1e12 into a zero row.

    >>> unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    embedding_BD = at_least_float32(embedding_BD)
    is_zero_B1 = (embedding_BD == 0).all(dim=1, keepdim=True)
    return F.normalize(embedding_BD.masked_fill(is_zero_B1, 0.0), dim=1).masked_fill(is_zero_B1, 0.0)


def unit_pair(student_BD: Tensor, teacher_BD: Tensor) -> tuple[Tensor, Tensor]:
    """Both as unit rows of one type, the wider of the two; no gradient flows to the teacher.

    >>> [x.dtype for x in unit_pair(torch.ones(1, 2, dtype=torch.float16), torch.ones(1, 2, dtype=torch.float64))]
    [torch.float64, torch.float64]
    """
    student_BD, teacher_BD = unit_rows(student_BD), unit_rows(teacher_BD.detach())
    common = torch.promote_types(student_BD.dtype, teacher_BD.dtype)
    return student_BD.to(common), teacher_BD.to(common)


def at_least_float32(x: Tensor) -> Tensor:
    """float16 and bfloat16 become float32; float64 stays.

    Ties between similarities are rare in float32 and common below it: rounding a 256 × 256 similarity
    matrix to bfloat16 was seen to change the gradient of D3still by a fifth.
    """
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def check_pair(student_BD: Tensor, teacher_BD: Tensor, least: int = 1) -> None:
    """Raises ValueError unless both are (B, D) of one shape with at least ``least`` rows."""
    if student_BD.ndim != 2 or student_BD.shape != teacher_BD.shape:
        raise ValueError(
            f"student and teacher embeddings must be two matrices of one shape (images, width), "
            f"got {tuple(student_BD.shape)} and {tuple(teacher_BD.shape)}"
        )
    if len(student_BD) < least:
        raise ValueError(f"this loss compares images with each other and needs at least {least}, got {len(student_BD)}")


def check_rows(student_BD: Tensor, teacher_BD: Tensor, least: int = 1) -> None:
    """Raises ValueError unless both have the same ``least`` or more rows; their widths may differ."""
    rows = [len(x) if x.ndim == 2 else -1 for x in (student_BD, teacher_BD)]
    if rows[0] != rows[1]:
        shapes = f"{tuple(student_BD.shape)} and {tuple(teacher_BD.shape)}"
        raise ValueError(f"student and teacher embeddings must be matrices with one row per image, got {shapes}")
    check_pair(student_BD, student_BD, least)


def mean_where(value: Tensor, mask: Tensor) -> Tensor:
    """Mean of the masked values, 0 with a zero gradient of none: selecting them would wait for the device.

    >>> mean_where(torch.tensor([1.0, 5.0]), torch.tensor([False, True])).item()
    5.0
    """
    return (value * mask).sum() / mask.sum().clamp(min=1)


def full_precision(like: Tensor) -> torch.autocast:
    """A context in which nothing is computed below float32, also where autocast is on around it."""
    return torch.autocast(like.device.type, enabled=False)


def nearest_similarities(student_BD: Tensor, teacher_BD: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Similarities to the teacher's ``top_k`` nearest images of the batch, nearest first: S^q and S^g, (B, K).

    S^q_ij = cos(student_i, teacher_j), S^g_ij = cos(teacher_i, teacher_j). The image itself counts as a
    neighbour, normally the first. Equal similarities are taken in index order: unstable sorting, as in the
    authors' code, makes the neighbours depend on the device.

    Raises:
        ValueError: top_k outside [1, B].

    >>> e = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    >>> nearest_similarities(e, e, top_k=2)[1][0].tolist()
    [1.0, 0.6000000238418579]
    """
    if not 1 <= top_k <= len(teacher_BD):
        raise ValueError(
            f"top_k must be between 1 and the {len(teacher_BD)} images of the batch, got {top_k}; "
            f"lower top_k or enlarge the batch"
        )
    with full_precision(student_BD):
        student_BD, teacher_BD = unit_pair(student_BD, teacher_BD)
        query_BB, gallery_BB = student_BD @ teacher_BD.T, teacher_BD @ teacher_BD.T
    nearest_BK = largest_columns(gallery_BB, top_k)
    return query_BB.gather(1, nearest_BK), gallery_BB.gather(1, nearest_BK)


def largest_columns(value_BN: Tensor, count: int) -> Tensor:
    """Columns of every row's largest values, falling, equal ones by index: (B, K).

    Rows are sorted a few at a time: whole, their indices would take twice the memory of the values.

    >>> largest_columns(torch.tensor([[1.0, 3.0, 1.0, 2.0]]), 3).tolist()
    [[1, 3, 0]]
    """
    rows = max(1, _SORTED_AT_ONCE // value_BN.shape[1])
    # Copies: a slice would keep the places of its whole part alive.
    return torch.cat(
        [
            part_RN.argsort(dim=1, descending=True, stable=True)[:, :count].contiguous()
            for part_RN in value_BN.split(rows)
        ]
    )


def in_chunks(
    numbers_per_row: int, function: Callable[..., Tensor], *by_row: Tensor, whole: tuple[Tensor, ...] = ()
) -> Tensor:
    """``function(*by_row, *whole)`` of a few rows at a time, once more in the backward pass: memory for one chunk only.

    The function maps tensors of R rows each, and the whole ones, to one value or more per row; they come back in
    order. What fits in one chunk is computed once: a second time it would take as much memory.

    Args:
        numbers_per_row: of the largest tensor inside the function, which decides how many rows are taken at once.
        function: of nothing else that has a gradient or that changes before the backward pass.

    >>> in_chunks(2, lambda x: x * 2, torch.arange(3.0)).tolist()
    [0.0, 2.0, 4.0]
    """
    at_once = _AT_ONCE_CPU if by_row[0].device.type == "cpu" else _AT_ONCE_GPU
    rows, compiling = max(1, at_once // max(1, numbers_per_row)), torch.compiler.is_compiling()
    fits = max(rows, _WHOLE_IF_COMPILED // max(1, numbers_per_row)) if compiling else rows
    if len(by_row[0]) <= fits:
        return function(*by_row, *whole)
    apply = _InChunks.apply
    if compiling:  # a graph of a hundred chunks would take minutes to compile
        apply = torch.compiler.disable(apply)
    return apply(function, rows, len(by_row), *by_row, *whole)


class _InChunks(torch.autograd.Function):
    """As torch's checkpoint of every chunk, but nothing small is left between two chunks.

    It would keep glibc from giving the memory of one to the next: a batch of 512 then took 4 GB, not 0.2.
    """

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], rows: int, split: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.function, ctx.rows, ctx.split = function, rows, split
        value = None
        for start in range(0, len(tensors[0]), rows):
            found = function(*(x[start : start + rows] for x in tensors[:split]), *tensors[split:])
            if value is None:
                value = found.new_empty(len(tensors[0]), *found.shape[1:])
            value[start : start + rows] = found
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        tensors, rows, needed = ctx.saved_tensors, ctx.rows, ctx.needs_input_grad[3:]
        gradients = [torch.zeros_like(x) if need else None for x, need in zip(tensors, needed, strict=True)]
        for start in range(0, len(tensors[0]), rows):
            here = slice(start, start + rows)
            parts = [x[here] if number < ctx.split else x for number, x in enumerate(tensors)]
            parts = [x.detach().requires_grad_(need) for x, need in zip(parts, needed, strict=True)]
            with full_precision(upstream):
                with torch.enable_grad():
                    value = ctx.function(*parts)
                asked = [x for x in parts if x.requires_grad]
                found = iter(torch.autograd.grad(value, asked, upstream[here], allow_unused=True))
            for number, gradient in enumerate(gradients):
                if gradient is not None and (part := next(found)) is not None:
                    (gradient[here] if number < ctx.split else gradient).add_(part)
        return None, None, None, *gradients
