"""Clusters of first neighbours: the first partition of FINCH (Sarfraz et al., CVPR 2019), as R-SiamNet has it (3.3).

    A(i, j) = 1  where  j = κ(i) or κ(j) = i or κ(i) = κ(j),  and  image(i) ≠ image(j)

Pseudo labels are the connected components of A. Nothing of N × N is held: neighbours are found in tiles, and of A only
as many links as its components need.
"""

# Shape legend: N = persons of the training set, D = embedding width, L = links, n = persons with a neighbour.

from typing import Literal

import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from losses.similarity import unit_rows

Rule = Literal["literal", "strict", "other_images"]


@torch.no_grad()
def first_neighbours(embedding_ND: Tensor, image_N: Tensor | None = None, block_rows: int = 4096) -> Tensor:
    """κ: the row with the largest cosine to each row, itself left out, (N,) int64; of equal rows the lowest.

    Different rows of exactly the same cosine are told apart by how a tile rounds, as in any matrix product. The
    similarity of two rows is computed once, in tiles: half of the matrix product, and never N × N numbers.

    Args:
        embedding_ND: any length, compared by cosine.
        image_N: the image of every row; a neighbour is then of another image.
        block_rows: side of a tile; a tile of 4,096 is 64 MiB in float32.

    Returns:
        Row numbers; -1 where there is no other row (or image).

    Raises:
        ValueError: shapes do not fit, a number that is not finite, or no rows in a block.

    >>> first_neighbours(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])).tolist()
    [1, 0, 1]
    """
    _check_clustered(embedding_ND, image_N, block_rows)
    unit_ND = unit_rows(embedding_ND)
    image_N = None if image_N is None else image_N.to(unit_ND.device)
    rows = len(unit_ND)
    best_N = unit_ND.new_full((rows,), -torch.inf)
    index_N = torch.full((rows,), -1, dtype=torch.int64, device=unit_ND.device)
    blocks = [slice(start, min(start + block_rows, rows)) for start in range(0, rows, block_rows)]
    for number, own in enumerate(blocks):
        for other in blocks[number:]:
            tile = unit_ND[own] @ unit_ND[other].T
            if own == other:
                tile.fill_diagonal_(-torch.inf)
            if image_N is not None:
                tile.masked_fill_(image_N[own, None] == image_N[None, other], -torch.inf)
            # Every row meets the others in their order, so the lowest of equal ones stays.
            _keep_better(best_N, index_N, own, tile.max(1), other.start)
            if own != other:
                _keep_better(best_N, index_N, other, tile.max(0), own.start)
    return _lowest_of_equal(unit_ND, index_N, image_N, block_rows)


def _lowest_of_equal(unit_ND: Tensor, index_N: Tensor, image_N: Tensor | None, block_rows: int) -> Tensor:
    """The same neighbours, where several rows are equal the lowest: two tiles may round their cosines differently."""
    draw = torch.Generator().manual_seed(0)
    weight_D = torch.rand(unit_ND.shape[1], generator=draw, dtype=torch.float64).to(unit_ND)
    sums = [(rows * weight_D).sum(1) for rows in unit_ND.split(block_rows)]
    _, number_N, count_K = torch.cat(sums).unique(return_inverse=True, return_counts=True)
    for number in (count_K > 1).nonzero()[:, 0].tolist():
        rows = (number_N == number).nonzero()[:, 0]
        rows = rows[(unit_ND[rows] == unit_ND[rows[0]]).all(1)]
        others = rows[1:] if image_N is None else rows[image_N[rows] != image_N[rows[0]]]
        asking = torch.isin(index_N, rows).nonzero()[:, 0]
        same = asking == rows[0] if image_N is None else image_N[asking] == image_N[rows[0]]
        index_N[asking] = torch.where(same, others[0], rows[0]) if len(others) else rows[0]
    return index_N


def _keep_better(best_N: Tensor, index_N: Tensor, rows: slice, found: tuple[Tensor, Tensor], start: int) -> None:
    value, index = found
    better = value > best_N[rows]
    best_N[rows] = torch.where(better, value, best_N[rows])
    index_N[rows] = torch.where(better, index + start, index_N[rows])


@torch.no_grad()
def first_neighbour_labels(
    embedding_ND: Tensor, image_N: Tensor, rule: Rule = "literal", block_rows: int = 4096
) -> Tensor:
    """Pseudo labels: connected components of A, in which people of one image are never linked.

    Args:
        embedding_ND: any length, compared by cosine.
        image_N: the image of every row.
        rule: "literal": neighbours among all rows, links inside an image removed, components of the rest; two people
            of an image may still be joined through a third. "strict": links by falling cosine, and none that would
            join two people of an image. "other_images": as literal, with neighbours of other images alone.
        block_rows: as in :func:`first_neighbours`.

    Returns:
        (N,) int64 on the device of the embeddings, numbered by first appearance.

    Raises:
        ValueError: as :func:`first_neighbours`, or an unknown rule.

    >>> e = torch.tensor([[1.0, 0.0], [0.99, 0.1], [0.0, 1.0], [0.1, 0.99]])
    >>> first_neighbour_labels(e, torch.tensor([0, 1, 2, 2])).tolist()  # the last two share an image
    [0, 0, 1, 2]
    """
    if rule not in ("literal", "strict", "other_images"):
        raise ValueError(f"rule is literal, strict or other_images, got {rule!r}")
    _check_clustered(embedding_ND, image_N, block_rows)
    index_N = first_neighbours(embedding_ND, image_N if rule == "other_images" else None, block_rows).cpu()
    image_N = image_N.cpu()
    if rule == "strict":
        links_2L = _all_links(index_N, image_N)
        root_N = _joined_by_turns(links_2L, _cosines(unit_rows(embedding_ND), links_2L, block_rows), image_N)
    else:
        one_L, other_L = _links(index_N, image_N)
        size = (len(image_N), len(image_N))
        graph = coo_array((torch.ones(len(one_L)).numpy(), (one_L.numpy(), other_L.numpy())), shape=size)
        root_N = torch.from_numpy(connected_components(graph, directed=False)[1]).long()
    return _by_appearance(root_N).to(embedding_ND.device)


def _links(index_N: Tensor, image_N: Tensor) -> Tensor:
    """Links (2, L) with the components of A, at most two for each row.

    All rows with one neighbour are linked to each other but inside an image. Where they are of two images or more
    that joins them all, so a link of each to the first is as good; where they are of one it joins none.
    """
    row_n, neighbour_n = _with_neighbour(index_N)
    direct_n = image_N[row_n] != image_N[neighbour_n]
    _, group_n, count_G = neighbour_n.unique_consecutive(return_inverse=True, return_counts=True)
    first_n = row_n[(count_G.cumsum(0) - count_G)[group_n]]
    differs_n = image_N[row_n] != image_N[first_n]
    mixed_G = torch.zeros_like(count_G).index_add_(0, group_n, differs_n.long()) > 0
    joined_n = mixed_G[group_n]
    links = torch.stack([row_n, neighbour_n])[:, direct_n], torch.stack([row_n, first_n])[:, joined_n]
    return torch.cat(links, 1)


def _all_links(index_N: Tensor, image_N: Tensor) -> Tensor:
    """Every link of A, (2, L) lower and higher row; some come twice.

    A neighbour that g rows share has g² / 2 links, 16 bytes each: ten thousand sharing one are 800 MB.
    """
    row_n, neighbour_n = _with_neighbour(index_N)
    found = [torch.stack([row_n, neighbour_n])]
    counts = neighbour_n.unique_consecutive(return_counts=True)[1].tolist()
    found += [torch.combinations(group).T for group in row_n.split(counts) if len(group) > 1]
    links_2L = torch.cat(found, 1).sort(0).values
    return links_2L[:, image_N[links_2L[0]] != image_N[links_2L[1]]]


def _with_neighbour(index_N: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that have a neighbour, and it; those that share one lie together, in their order."""
    row_n = (index_N >= 0).nonzero()[:, 0]
    row_n = row_n[index_N[row_n].argsort(stable=True)]
    return row_n, index_N[row_n]


def _cosines(unit_ND: Tensor, links_2L: Tensor, block_rows: int) -> Tensor:
    blocks = links_2L.to(unit_ND.device).split(block_rows, dim=1)
    return torch.cat([(unit_ND[one] * unit_ND[other]).sum(1) for one, other in blocks]).cpu()


def _joined_by_turns(links_2L: Tensor, cosine_L: Tensor, image_N: Tensor) -> Tensor:
    """A number for every row, equal in a group; links by falling cosine, then by row, none that joins one image."""
    root = list(range(len(image_N)))
    images = [{image} for image in image_N.tolist()]

    def find(row: int) -> int:
        while root[row] != row:
            root[row] = root[root[row]]
            row = root[row]
        return row

    by_row_L = (links_2L[0] * len(image_N) + links_2L[1]).argsort(stable=True)
    order_L = by_row_L[cosine_L[by_row_L].argsort(descending=True, stable=True)]
    for low, high in links_2L[:, order_L].T.tolist():
        one, other = find(low), find(high)
        if one == other or not images[one].isdisjoint(images[other]):
            continue
        if len(images[one]) < len(images[other]):
            one, other = other, one
        root[other] = one
        images[one] |= images[other]
    return torch.tensor([find(row) for row in range(len(root))], dtype=torch.int64)


def _by_appearance(root_N: Tensor) -> Tensor:
    """Numbers from 0, in the order in which they first come.

    >>> _by_appearance(torch.tensor([7, 3, 7, 1])).tolist()
    [0, 1, 0, 2]
    """
    known, number_N = root_N.unique(return_inverse=True)
    places_N = torch.arange(len(root_N))
    first_K = torch.full_like(known, len(root_N)).scatter_reduce_(0, number_N, places_N, "amin")
    return first_K.argsort().argsort()[number_N]


def _check_clustered(embedding_ND: Tensor, image_N: Tensor | None, block_rows: int) -> None:
    if embedding_ND.ndim != 2 or (image_N is not None and image_N.shape != embedding_ND.shape[:1]):
        found = "" if image_N is None else f" with images {tuple(image_N.shape)}"
        raise ValueError(f"need embeddings (rows, width) and an image for each, got {tuple(embedding_ND.shape)}{found}")
    if block_rows < 1:
        raise ValueError(f"block_rows must be at least 1, got {block_rows}")
    if not embedding_ND.isfinite().all():
        row = int((~embedding_ND.isfinite()).any(1).nonzero()[0, 0])
        raise ValueError(f"the embedding of row {row} is not finite; neighbours of such rows mean nothing")
