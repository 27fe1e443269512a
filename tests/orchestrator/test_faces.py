"""What a benchmark of faces is: pairs that are checked, drawn by lot, and held out."""

from itertools import combinations

import numpy as np
import pytest

from orchestrator.datasets.faces import FaceData, Pairs, Search, Templates, all_pairs, drawn_pairs, held_out
from orchestrator.datasets.images import Folder, ImageSet


def images(identity, name="set/train") -> ImageSet:
    keys = tuple(f"{row}.png" for row in range(len(identity)))
    return ImageSet(name, keys, np.array(identity, np.int64), Folder("nowhere"))


def templates(**changes):
    columns = {
        "template_N": [7, 7, 9],
        "medium_N": [1, 2, 3],
        "score_N": [0.5, 0.5, 0.5],
        "first_P": [7, 7],
        "second_P": [7, 9],
        "same_P": [True, False],
    }
    return Templates(images([-1] * 3), **{name: np.array(value) for name, value in (columns | changes).items()})


# --- Checks


def test_pairs_say_what_is_wrong():
    for first, second, same, folds, message in (
        ([0], [1, 2], [True, False], 0, r"set/train: columns of pairs differ in number: \[1, 2\]"),
        ([0, 0], [1, 3], [True, False], 0, "set/train: a pair names image 3, there are 0 to 2"),
        ([0, -1], [1, 2], [True, False], 0, "set/train: a pair names image -1, there are 0 to 2"),
        ([0, 0], [1, 2], [True, True], 0, "set/train: 2 genuine and 0 impostor pairs; both kinds are needed"),
        ([0, 0], [1, 2], [False, False], 0, "set/train: 0 genuine and 2 impostor pairs; both kinds are needed"),
        ([], [], [], 0, "set/train: 0 genuine and 0 impostor pairs; both kinds are needed"),
        ([0, 0, 1], [1, 2, 2], [True, False, False], 2, "set/train: 3 pairs cannot be 2 folds of equal size"),
    ):
        columns = np.array(first, np.int64), np.array(second, np.int64), np.array(same, bool)
        with pytest.raises(ValueError, match=message):
            Pairs(images([0, 0, 1]), *columns, folds)


def test_templates_say_what_is_wrong():
    assert templates().protocol == "3 images, 2 templates, 1 genuine and 1 impostor"
    for changes, message in (
        ({"medium_N": [1, 2]}, r"set/train: columns differ in number: \[2, 3\] of images, 2, 2, 2 of pairs"),
        ({"same_P": [True]}, r"set/train: columns differ in number: \[3\] of images, 2, 2, 1 of pairs"),
        ({"second_P": [8, 8]}, "set/train: 2 times a template without any image is asked for, first 8"),
        ({"same_P": [True, True]}, "both kinds are needed"),
    ):
        with pytest.raises(ValueError, match=message):
            templates(**changes)
    search = Search(np.array([7]), np.array([1]), np.array([10]), np.array([1]))
    with pytest.raises(ValueError, match="1 times a template without any image is asked for, first 10"):
        Templates(
            images([-1]), *(np.array(c) for c in ([7], [1], [0.5], [7, 7], [7, 7], [True, False])), {"g1": search}
        )


def test_the_protocol_is_one_line():
    data = FaceData(images([0, 0, 1, 1, 1]), {"val": all_pairs(images([4, 4, 5], "set/test"))})
    assert data.protocol == (
        "train 5 images of 2 identities; val: 3 images, 1 genuine and 2 impostor, no folds"
    )  # fmt: skip
    assert list(data.sets()) == ["train", "val"] and list(FaceData(None, data.verification).sets()) == ["val"]


# --- All pairs, drawn pairs


def test_every_two_images_are_paired_once():
    found = all_pairs(images([3, 5, 3, 8]))
    naive = list(combinations(range(4), 2))
    assert list(zip(found.first_P.tolist(), found.second_P.tolist(), strict=True)) == naive
    assert found.same_P.tolist() == [pair == (0, 2) for pair in naive] and found.folds == 0


@pytest.mark.parametrize("seed", range(4))
def test_drawn_pairs_are_different_true_and_cut_into_folds(seed):
    identity = np.random.default_rng(seed).integers(0, 7, 40)
    found = drawn_pairs(images(identity), 60, (seed,), folds=5)
    assert len(found.same_P) == 120 and found.folds == 5
    assert found.same_P.reshape(5, 24).tolist() == [[True] * 12 + [False] * 12] * 5
    named = {frozenset(pair) for pair in zip(found.first_P.tolist(), found.second_P.tolist(), strict=True)}
    assert len(named) == 120 and all(len(pair) == 2 for pair in named)
    assert np.array_equal(identity[found.first_P] == identity[found.second_P], found.same_P)


def test_drawn_pairs_are_those_of_their_seed():
    one, again, other = (drawn_pairs(images(np.arange(60) % 6), 100, seed) for seed in ((1, 2), (1, 2), (1, 3)))
    assert np.array_equal(one.first_P, again.first_P) and np.array_equal(one.second_P, again.second_P)
    assert not np.array_equal(one.first_P, other.first_P)


def test_all_pairs_are_drawn_where_there_are_no_more():
    identity = [0, 1, 0, 2, 0, 1, 1, 2, 2]
    found = drawn_pairs(images(identity), 1000, (0,), folds=3)
    genuine = {(a, b) for a, b in combinations(range(9), 2) if identity[a] == identity[b]}
    drawn = {
        tuple(sorted(pair)) for pair in zip(found.first_P[found.same_P], found.second_P[found.same_P], strict=True)
    }
    assert drawn == genuine and int((~found.same_P).sum()) == 9


def test_every_genuine_pair_is_equally_likely():
    identity = np.repeat([0, 1], [3, 5])  # 3 and 10 pairs
    counts = np.zeros((8, 8))
    for seed in range(400):
        found = drawn_pairs(images(identity), 1, (seed,), folds=1)
        counts[found.first_P[0], found.second_P[0]] += 1
    counts += counts.T
    hit = counts[np.triu(identity[:, None] == identity, 1)]
    assert len(hit) == 13 and hit.sum() == 400 and hit.min() > 12 and hit.max() < 55  # 31 are expected


def test_pairs_of_millions_of_images_are_drawn_without_a_list_of_them():
    found = drawn_pairs(images_of_many(), 1000, (0,))
    identity = found.images.identity
    assert np.array_equal(identity[found.first_P] == identity[found.second_P], found.same_P)
    assert (found.first_P != found.second_P).all()


def images_of_many() -> ImageSet:
    # One person has so many images that the number of a pair is beyond what a square root gives exactly.
    identity = np.concatenate([np.zeros(400_000, np.int64), np.arange(1, 1001)])
    return ImageSet("many/test", range(len(identity)), identity, Folder("nowhere"))


def test_too_few_images_for_a_pair_are_refused():
    for identity, message in (
        ([0, 0, 1], "set/train: 1 genuine and 2 impostor pairs are too few for 10 folds"),
        ([0, 1, 2], "set/train: 0 genuine and 3 impostor pairs are too few"),
        ([0] * 9, "set/train: 36 genuine and 0 impostor pairs are too few"),
        ([], "set/train: 0 genuine and 0 impostor pairs are too few"),
    ):
        with pytest.raises(ValueError, match=message):
            drawn_pairs(images(identity), 10, (0,))


# --- A held-out part


def test_the_last_tenth_of_the_identities_is_held_out():
    data = FaceData(images(np.repeat(np.arange(40), 5)), {"test": all_pairs(images([0, 0, 1]))}, notice="said")
    found = held_out(data)
    assert sorted(set(found.train.identity)) == list(range(36)) and list(found.verification) == ["val"]
    validation = found.verification["val"]
    assert sorted(set(validation.images.identity)) == [36, 37, 38, 39] and validation.folds == 10
    assert (found.train.name, validation.images.name, found.notice) == ("set/train-part", "set/validation", "said")


def test_two_identities_are_held_out_at_least():
    found = held_out(FaceData(images(np.repeat(np.arange(5), 6)), {}))
    assert sorted(set(found.verification["val"].images.identity)) == [3, 4]


def test_somebody_must_be_left_to_train_on():
    with pytest.raises(ValueError, match="set/train: 2 identities are too few to hold two of them out"):
        held_out(FaceData(images(np.repeat(np.arange(2), 20)), {}))


def test_what_is_only_verified_on_has_nothing_to_hold_out():
    with pytest.raises(ValueError, match="there are no training faces, so no part of them can be held out"):
        held_out(FaceData(None, {"val": all_pairs(images([0, 0, 1]))}))
