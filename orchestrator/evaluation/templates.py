"""From embeddings of face images to what is compared: flip sums, cosines of pairs, templates of several images.

Card "Unified face", section 6. Nothing here holds two rows for every pair: IJB-C compares 23,124 templates in 15.7
million pairs, whose rows would be 64 GB.
"""

# Shape legend: N = images, D = embedding width, T = templates, P = pairs, A, B = rows that a chunk of pairs names.

import numpy as np

CHUNK = 65_536  # pairs compared at once
_ROWS = 4096  # rows alive at once, where neither product nor result holds them
_DENSE = 64  # a product of all rows of a chunk is quicker than its pairs alone up to this many entries a pair
_TINY = 1e-12  # least norm: a row of zeros stays zero


def flip_summed(embedding_ND: np.ndarray, flipped_ND: np.ndarray | None) -> np.ndarray:
    """Unit rows of image + mirrored image: raw outputs are summed, so the clearer of both counts more.

    Args:
        embedding_ND: raw outputs of the images.
        flipped_ND: of the mirrored images; None = the images alone.

    Returns:
        (N, D), float64 of float64, else float32. A sum of zeros stays zero.

    Raises:
        ValueError: matrices of two shapes, or a row that is not finite.

    >>> flip_summed(np.array([[3.0, 0.0]]), np.array([[0.0, 4.0]])).round(3).tolist()
    [[0.6, 0.8]]
    """
    check_matrix("embeddings", embedding_ND)
    unit_ND = np.array(embedding_ND, precision(embedding_ND))
    if flipped_ND is not None:
        _check_mirrored(embedding_ND, flipped_ND)
        unit_ND += flipped_ND
    unit_ND *= inverse_norms("embeddings", unit_ND)[:, None]
    return unit_ND


def pair_scores(embedding_ND: np.ndarray, first_P: np.ndarray, second_P: np.ndarray, chunk: int = CHUNK) -> np.ndarray:
    """Cosines of pairs of rows, in [-1, 1]; 0 with a row of zeros.

    Pairs are taken in order of their first row, so that a chunk of a dense list names few rows: the product of all of
    them is then quicker than fetching two rows for every pair. Memory: the order of the pairs, and one chunk.

    Args:
        embedding_ND: raw or unit rows.
        first_P, second_P: row numbers.
        chunk: pairs compared at once.

    Returns:
        (P,), float64 of float64, else float32.

    Raises:
        ValueError: no matrix, a row that is not finite, columns of two lengths, row numbers that are no integers or
            that the matrix does not have, or a chunk below 1.

    >>> pair_scores(np.array([[2.0, 0.0], [0.6, 0.8]]), np.array([0, 1]), np.array([1, 1])).tolist()
    [0.6, 1.0]
    """
    check_matrix("embeddings", embedding_ND)
    first_P, second_P = (_row_numbers(row_P, len(embedding_ND)) for row_P in (first_P, second_P))
    if len(first_P) != len(second_P):
        raise ValueError(f"pairs need as many first as second rows, got {len(first_P):,} and {len(second_P):,}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 pair, got {chunk}")
    inverse_N = inverse_norms("embeddings", embedding_ND)
    score_P = np.empty(len(first_P), inverse_N.dtype)
    order_P = np.argsort(first_P, kind="stable")
    for start in range(0, len(order_P), chunk):
        pairs = order_P[start : start + chunk]
        first, second = first_P[pairs], second_P[pairs]
        cosine = _products(embedding_ND, first, second, inverse_N.dtype) * inverse_N[first] * inverse_N[second]
        score_P[pairs] = np.clip(cosine, -1, 1)
    return score_P


# Rows of templates are rows like others.
template_scores = pair_scores


def template_embeddings(
    embedding_ND: np.ndarray,
    flipped_ND: np.ndarray | None,
    score_N: np.ndarray | None,
    template_N: np.ndarray,
    medium_N: np.ndarray,
    keep_norm: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """One unit row for each template: mean within a medium (a still, a video), sum over media.

    The public protocols by letter: F1 with ``flipped_ND``, N1 with ``keep_norm``, D1 with ``score_N``; N1D1F1 is the
    usual one.

    Args:
        embedding_ND: raw outputs of the images.
        flipped_ND: of the mirrored images, added; None leaves them out.
        score_N: of the face detector, multiplies a row; None leaves it out.
        template_N: id of every image's template; need not be contiguous nor sorted.
        medium_N: id of its medium; one id in two templates is two media.
        keep_norm: False makes image + mirrored image unit before the detector's score.

    Returns:
        ids of the templates, rising (T,), and their embeddings (T, D), float64 of float64, else float32. A template of
        zeros alone stays zero.

    Raises:
        ValueError: matrices of two shapes, columns of another length, a row or a score that is not finite.

    >>> e = np.array([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]])
    >>> template, unit = template_embeddings(e, None, None, np.array([7, 7, 7]), np.array([1, 1, 2]))
    >>> template.tolist(), unit.round(4).tolist()  # (1 + 3) / 2 = 2 of the first medium, 2 of the second
    ([7], [[0.7071, 0.7071]])
    """
    check_matrix("embeddings", embedding_ND)
    if flipped_ND is not None:
        _check_mirrored(embedding_ND, flipped_ND)
    dtype = precision(embedding_ND)
    weight_N = np.ones(len(embedding_ND)) if score_N is None else np.asarray(score_N, np.float64)
    for name, column_N in (("templates", template_N), ("media", medium_N), ("detector scores", weight_N)):
        if np.shape(column_N) != (len(embedding_ND),):
            raise ValueError(f"{name} must be one for each of {len(embedding_ND):,} images, got {np.shape(column_N)}")
    if not np.isfinite(weight_N).all():
        image = int(np.argmin(np.isfinite(weight_N)))
        raise ValueError(f"detector score of image {image} is {weight_N[image]}; give the image a number or drop it")
    template_T, of_N = np.unique(template_N, return_inverse=True)
    medium_M, medium_N = np.unique(medium_N, return_inverse=True)
    _, group_N, count_G = np.unique(of_N * len(medium_M) + medium_N, return_inverse=True, return_counts=True)
    # The sum of means is one weighted sum over the template.
    weight_N = (weight_N / count_G[group_N]).astype(dtype)
    sum_TD = np.zeros((len(template_T), embedding_ND.shape[1]), dtype)
    order_N = np.argsort(of_N, kind="stable")
    for start in range(0, len(order_N), _ROWS):
        rows = order_N[start : start + _ROWS]
        face = np.asarray(embedding_ND[rows], dtype)
        if flipped_ND is not None:
            face = face + flipped_ND[rows]
        if not keep_norm:
            face = face * inverse_norms("embeddings", face, rows)[:, None]
        of = of_N[rows]
        begins = np.flatnonzero(np.diff(of, prepend=-1))
        sum_TD[of[begins]] += np.add.reduceat(face * weight_N[rows, None], begins)
    sum_TD *= inverse_norms("the sum of images of templates", sum_TD, template_T)[:, None]
    return template_T, sum_TD


def precision(embedding_ND: np.ndarray) -> np.dtype:
    """What is calculated in: float64 of float64, float32 of anything shorter."""
    return np.result_type(embedding_ND.dtype, np.float32)


def inverse_norms(what: str, embedding_ND: np.ndarray, name_N: np.ndarray | None = None) -> np.ndarray:
    """1 / max(norm, 1e-12) of every row, (N,).

    Raises:
        ValueError: a row that is not finite; it is named by ``name_N``, else by its number.
    """
    norm_N = np.empty(len(embedding_ND), precision(embedding_ND))
    for start in range(0, len(norm_N), _ROWS):
        block = np.asarray(embedding_ND[start : start + _ROWS], norm_N.dtype)
        norm_N[start : start + _ROWS] = np.sqrt(np.einsum("nd,nd->n", block, block))
    if not np.isfinite(norm_N).all():
        row = int(np.argmin(np.isfinite(norm_N)))
        name = row if name_N is None else name_N[row]
        raise ValueError(f"{what}: row {name} is not finite (norm {norm_N[row]}); was the network's output NaN?")
    return 1 / np.maximum(norm_N, _TINY)


def check_matrix(what: str, embedding_ND: np.ndarray) -> None:
    """Raises ValueError unless it is a matrix of floating numbers."""
    if embedding_ND.ndim != 2 or embedding_ND.dtype.kind != "f":
        raise ValueError(
            f"{what} must be a matrix (rows, width) of floating numbers, got {embedding_ND.shape} of "
            f"{embedding_ND.dtype}"
        )


def _check_mirrored(embedding_ND: np.ndarray, flipped_ND: np.ndarray) -> None:
    if np.shape(flipped_ND) != embedding_ND.shape:
        raise ValueError(
            f"mirrored images have embeddings {np.shape(flipped_ND)}, the images {embedding_ND.shape}; both must be of "
            "the same images"
        )


def _row_numbers(row_P: np.ndarray, rows: int) -> np.ndarray:
    row_P = np.asarray(row_P)
    if row_P.ndim != 1 or (row_P.size and row_P.dtype.kind not in "iu"):
        raise ValueError(f"rows of pairs must be one column of integers, got {row_P.shape} of {row_P.dtype}")
    if row_P.size and not 0 <= row_P.min() <= row_P.max() < rows:
        wrong = int(row_P.min() if row_P.min() < 0 else row_P.max())
        raise ValueError(f"a pair names row {wrong}, there are 0 to {rows - 1}; ids of templates are not row numbers")
    return row_P.astype(np.int64, copy=False)


def _products(embedding_ND: np.ndarray, first: np.ndarray, second: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Inner products of the pairs of one chunk."""
    row_A, of_first = _distinct(first, len(embedding_ND))
    row_B, of_second = _distinct(second, len(embedding_ND))
    if len(row_A) * len(row_B) <= _DENSE * len(first):
        if 2 * len(row_B) > len(embedding_ND):  # then the product with all rows is quicker than fetching most of them
            row_B, of_second = slice(None), second
        product_AB = np.asarray(embedding_ND[row_A], dtype) @ np.asarray(embedding_ND[row_B], dtype).T
        return product_AB[of_first, of_second]
    product = np.empty(len(first), dtype)
    for start in range(0, len(first), _ROWS):  # short enough for the processor's cache
        part = slice(start, start + _ROWS)
        left, right = (np.asarray(embedding_ND[row[part]], dtype) for row in (first, second))
        product[part] = np.einsum("pd,pd->p", left, right)
    return product


def _distinct(row: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows, rising, and which of them each is; as np.unique, without sorting."""
    named = np.zeros(rows, bool)
    named[row] = True
    distinct = np.flatnonzero(named)
    place = np.empty(rows, np.int64)
    place[distinct] = np.arange(len(distinct))
    return distinct, place[row]
