"""Which images meet in a batch. All ranks compute the same epoch and take their own part of every batch."""

import numpy as np


def shuffled_batches(count: int, batch_size: int, key: tuple[int, ...]) -> np.ndarray:
    """A shuffled epoch cut into whole batches, the incomplete last one dropped: (steps, batch_size).

    Raises:
        ValueError: fewer images than one batch.
    """
    if count < batch_size:
        raise ValueError(f"a batch of {batch_size} images is more than the {count} training images; lower batch_size")
    order = np.random.default_rng(np.random.SeedSequence(key)).permutation(count)
    steps = count // batch_size
    return order[: steps * batch_size].reshape(steps, batch_size)


def identity_batches(identity: np.ndarray, identities: int, images: int, key: tuple[int, ...]) -> np.ndarray:
    """P identities × K images a batch, as the D3still authors sample: (steps, P·K).

    Every identity's images are shuffled and cut into groups of K (fewer than K images: K drawn with
    replacement; a rest below K is dropped). Batches take one group of P different identities at random until
    fewer than P identities have groups left.

    Raises:
        ValueError: fewer than P identities, or P below 2: losses on labels need another identity in every batch.
    """
    if identities < 2:
        raise ValueError(f"a batch must hold images of at least 2 identities, got {identities}")
    rng = np.random.default_rng(np.random.SeedSequence(key))
    order = np.argsort(identity, kind="stable")
    bounds = np.flatnonzero(np.diff(identity[order])) + 1
    groups: list[list[np.ndarray]] = []
    for own in np.split(order, bounds):
        own = rng.permutation(own) if len(own) >= images else rng.choice(own, images, replace=True)
        groups.append(list(own[: len(own) // images * images].reshape(-1, images)))
    if len(groups) < identities:
        raise ValueError(f"a batch of {identities} identities is more than the {len(groups)} of the training set")
    available = list(range(len(groups)))
    batches = []
    while len(available) >= identities:
        chosen = rng.choice(len(available), identities, replace=False)
        batches.append(np.concatenate([groups[available[c]].pop() for c in chosen]))
        available = [g for g in available if groups[g]]
    return np.stack(batches)


def own_part(batch: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """This rank's contiguous share of a batch (last axis).

    Raises:
        ValueError: the batch does not divide evenly, which would weigh images differently.
    """
    size = batch.shape[-1]
    if size % world_size:
        raise ValueError(f"a batch of {size} images cannot be shared evenly by {world_size} workers")
    share = size // world_size
    return batch[..., rank * share : (rank + 1) * share]


def grouped_batches(group: np.ndarray, batch_size: int, key: tuple[int, ...]) -> np.ndarray:
    """A shuffled epoch in whole batches of one group each, as far as that goes: (steps, batch_size).

    What is left of the groups meets in mixed batches, neighbouring groups first; as many images as a shuffled epoch
    drops are dropped of these, by lot, so that rare shapes are trained on too. Batches come in the order in which they
    fill, mixed ones last.

    Raises:
        ValueError: fewer images than one batch.

    >>> batches = grouped_batches(np.array([0, 0, 0, 1, 1, 1]), 2, (0,))
    >>> sorted(len(set((rows // 3).tolist())) for rows in batches)  # two batches of one group, one mixed
    [1, 1, 2]
    """
    order = shuffled_batches(len(group), 1, key)[:, 0]
    if len(group) < batch_size:
        raise ValueError(f"a batch of {batch_size} images is more than the {len(group)} training images; lower it")
    found: list[tuple[int, np.ndarray]] = []
    left: list[np.ndarray] = []
    for number in np.unique(group):
        places = np.flatnonzero(group[order] == number)
        whole = len(places) // batch_size * batch_size
        found += [(int(own[-1]), order[own]) for own in places[:whole].reshape(-1, batch_size)]
        left.append(order[places[whole:]])
    batches = [rows for _, rows in sorted(found, key=lambda batch: batch[0])]
    rest = np.concatenate(left)
    whole = len(rest) // batch_size * batch_size
    kept = np.sort(np.random.default_rng(np.random.SeedSequence((*key, 1))).permutation(len(rest))[:whole])
    batches += list(rest[kept].reshape(-1, batch_size))
    return np.stack(batches)
