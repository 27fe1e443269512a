"""R-SiamNet's losses, memory and clusters: recorded numbers, plain loops, gradients, degenerate batches."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from losses.rsiamnet import (
    cluster_contrastive,
    first_neighbour_labels,
    first_neighbours,
    fused,
    inter_instance_consistency,
    self_instance_consistency,
    update_memory,
)

GOLDEN = {k: torch.from_numpy(np.asarray(v)) for k, v in
          np.load(Path(__file__).parents[1] / "golden" / "rsiamnet.npz").items()}  # fmt: skip
RULES = {"literal": "labels", "strict": "labels_strict", "other_images": "labels_other_image"}


def golden(name):
    return GOLDEN[name].clone()


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def close(found, expected, rtol=1e-10, atol=1e-12):
    torch.testing.assert_close(found.double(), torch.as_tensor(expected, dtype=torch.float64), rtol=rtol, atol=atol)


# --- L_ins ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_self_instance_consistency_and_its_gradients(dtype, rtol):
    scene, crop = (golden(f"ins_random/f_{x}").to(dtype).requires_grad_() for x in "ab")
    loss = self_instance_consistency(scene, crop)
    loss.backward()
    close(loss, golden("ins_random/loss"), rtol, 1e-7)
    close(scene.grad, golden("ins_random/grad_a"), rtol * 10, 1e-7)
    close(crop.grad, golden("ins_random/grad_b"), rtol * 10, 1e-7)
    close(self_instance_consistency(golden("ins_hand/f_a"), golden("ins_hand/f_b")), golden("ins_hand/loss"))


def test_self_instance_consistency_of_few_and_of_zero():
    assert self_instance_consistency(rand(0, 3), rand(0, 3)) == 0
    zero, other = torch.zeros(1, 3, requires_grad=True), rand(1, 3).requires_grad_()
    loss = self_instance_consistency(zero, other)
    loss.backward()
    assert loss == 1 and not zero.grad.any() and not other.grad.any()
    assert self_instance_consistency(rand(2, 3).half(), rand(2, 3).half()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"two matrices of one shape"):
        self_instance_consistency(rand(2, 3), rand(3, 3))


# --- L_int ------------------------------------------------------------------------------------------------------------

VARIANTS = [
    {},
    {"temperature": 0.5},
    {"temperature": 0.1, "keep_diagonal": False},
    {"keep_diagonal": False},
    {"normalization": "matrix_softmax"},
    {"normalization": "linear"},
    {"reduction": "sum"},
]


def plain_inter(scene, crop, normalization="row_softmax", temperature=1.0, keep_diagonal=True, reduction="mean"):
    """Loops over rows and pairs."""

    def shares(x):
        count, found = len(x), []
        for i in range(count):
            row = []
            for j in range(count):
                if keep_diagonal or i != j:
                    cosine = float(x[i] @ x[j] / (x[i].norm() * x[j].norm()))
                    row.append((cosine + 1) / 2 if normalization == "linear" else math.exp(cosine / temperature))
            found.append(row)
        whole = sum(map(sum, found))
        return [[v / (whole if normalization == "matrix_softmax" else sum(row)) for v in row] for row in found]

    total = sum(
        a * math.log(a / b) + b * math.log(b / a)
        for own, other in zip(shares(scene), shares(crop), strict=True)
        for a, b in zip(own, other, strict=True)
    )
    return total / len(scene) if reduction == "mean" and normalization != "matrix_softmax" else total


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_inter_instance_consistency_is_that_of_plain_loops(variant):
    scene, crop = rand(6, 5).requires_grad_(), rand(6, 5, seed=1).requires_grad_()
    close(inter_instance_consistency(scene, crop, **variant), plain_inter(scene.detach(), crop.detach(), **variant))
    assert torch.autograd.gradcheck(lambda a, b: inter_instance_consistency(a, b, **variant), (scene, crop))
    assert inter_instance_consistency(scene, 3 * scene, **variant).abs() < 1e-12
    order = torch.tensor([3, 1, 0, 5, 4, 2])
    close(inter_instance_consistency(scene, crop, **variant),
          inter_instance_consistency(scene[order], crop[order], **variant).detach())  # fmt: skip


def test_inter_instance_consistency_by_hand():
    close(inter_instance_consistency(golden("int_hand/f_a"), golden("int_hand/f_b")), golden("int_hand/closed_form"))
    close(golden("int_hand/loss"), (math.e - 1) / (2 * (math.e + 1)))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("rows", [0, 1])
def test_inter_instance_consistency_of_one_person_or_none_is_zero(rows, variant):
    scene, crop = rand(rows, 4).requires_grad_(), rand(rows, 4, seed=1).requires_grad_()
    loss = inter_instance_consistency(scene, crop, **variant)
    loss.backward()
    assert loss == 0 and not scene.grad.any() and not crop.grad.any()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_inter_instance_consistency_of_opposite_and_zero_rows_is_finite(variant):
    scene = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]], requires_grad=True)
    loss = inter_instance_consistency(scene, rand(3, 2, dtype=torch.float16), **variant)
    loss.backward()
    assert loss.isfinite() and loss.dtype == torch.float32 and scene.grad.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"normalization": "softmax"}, "normalization is row_softmax, matrix_softmax or linear, got 'softmax'"),
     ({"reduction": "none"}, "reduction is mean or sum, got 'none'"),
     ({"temperature": 0.0}, "must be above 0, got 0.0"),
     ({"normalization": "linear", "temperature": 0.5}, r"the linear form has no temperature, got 0\.5; leave it at 1")],
)  # fmt: skip
def test_inter_instance_consistency_refuses(settings, words):
    with pytest.raises(ValueError, match=words):
        inter_instance_consistency(rand(2, 2), rand(2, 2), **settings)


# --- L_clu and its memory ---------------------------------------------------------------------------------------------


def plain_cluster(feature, memory, label, row, scale):
    losses = []
    for f, t in zip(feature, row.tolist(), strict=True):
        cosine = [float(f @ m / (f.norm() * m.norm())) for m in memory]
        own = [s for s, y in zip(cosine, label.tolist(), strict=True) if y == label[t]]
        others = [s for s, y in zip(cosine, label.tolist(), strict=True) if y != label[t]]
        losses.append(math.log(1 + sum(math.exp(scale * (n - p)) for p in own for n in others)))
    return torch.tensor(losses, dtype=torch.float64)


def test_cluster_contrastive_is_that_of_plain_loops():
    feature, memory = rand(5, 4).requires_grad_(), rand(9, 4, seed=1)
    label, row = torch.tensor([0, 1, 0, 2, 2, 1, 3, 0, 4]), torch.tensor([3, 0, 6, 7, 1])
    each = cluster_contrastive(feature, memory, label, row, 7.0, "none")
    close(each, plain_cluster(feature.detach(), memory, label, row, 7.0))
    close(cluster_contrastive(feature, memory, label, row, 7.0), each.mean().detach())
    assert torch.autograd.gradcheck(lambda f: cluster_contrastive(f, memory, label, row, 7.0), (feature,))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    again = cluster_contrastive(feature, memory[order], label[order], order.argsort()[row], 7.0, "none")
    close(again, each.detach())


@pytest.mark.parametrize("scale", [1, 8, 16, 32, 64])
def test_singletons_are_instance_recognition(scale):
    feature, memory, row = (golden(f"instance_recognition/{name}") for name in ("f", "memory", "rows_t"))
    loss = cluster_contrastive(feature, memory, torch.arange(40), row, scale)
    close(loss, golden(f"instance_recognition/loss_gamma_{scale}"))
    close(loss, F.cross_entropy(scale * F.normalize(feature, dim=1) @ F.normalize(memory, dim=1).T, row))


def test_cluster_contrastive_by_hand():
    row = torch.tensor([0])
    for name, scale in (("clu_hand", 2), ("clu_overflow", 512)):
        found = [golden(f"{name}/{part}") for part in ("f", "memory", "labels_memory")]
        close(cluster_contrastive(*found, row, scale), golden(f"{name}/loss"))
        in_float = cluster_contrastive(found[0].float(), found[1].float(), found[2], row, scale)
        close(in_float, golden(f"{name}/loss"), 1e-6)
    equal = torch.ones(5, 3, dtype=torch.float64)
    label = torch.tensor([0, 0, 1, 2, 2])
    close(cluster_contrastive(equal[:1], equal, label, torch.tensor([0])), math.log(1 + 2 * 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_one_cluster_of_all_has_no_loss_and_no_gradient(dtype):
    feature = rand(3, 4).to(dtype).requires_grad_()
    loss = cluster_contrastive(
        feature, rand(6, 4, seed=1).to(dtype), torch.zeros(6, dtype=int), torch.tensor([1, 2, 5])
    )
    loss.backward()
    assert loss == 0 and feature.grad.isfinite().all() and not feature.grad.any()


def test_an_empty_batch_and_an_empty_memory_s_rows():
    feature = rand(0, 4).requires_grad_()
    loss = cluster_contrastive(feature, rand(6, 4), torch.arange(6), torch.zeros(0, dtype=int))
    loss.backward()
    assert loss == 0
    zero = rand(2, 4).requires_grad_()  # before the memory is filled
    loss = cluster_contrastive(zero, torch.zeros(6, 4).double(), torch.arange(6), torch.tensor([0, 1]))
    loss.backward()
    close(loss, math.log(6))
    assert not zero.grad.any()


def test_cluster_contrastive_refuses():
    memory, label, row = rand(4, 3), torch.arange(4), torch.tensor([0, 1])
    for wrong, words in (
        ((rand(2, 2), memory, label, row), r"matrices of one width, got \(2, 2\) and \(4, 3\)"),
        ((rand(3, 3), memory, label, row), "3 features need a row of the memory each"),
        ((rand(2, 3), memory, label, row - 1), r"rows must be 0 … 3, got -1 … 0"),
        ((rand(2, 3), memory, label[:3], row), "4 rows of the memory need a label each"),
        ((rand(2, 3), memory, label, row, 0.0), "scale must be above 0"),
        ((rand(2, 3), memory, label, row, 1.0, "sum"), "reduction is mean or none"),
    ):
        with pytest.raises(ValueError, match=words):
            cluster_contrastive(*wrong)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.2, 1.0])
def test_the_memory_takes_rows_by_the_weight_of_the_old_ones(normalize, renormalize, momentum):
    memory, feature, row = rand(5, 3), rand(2, 3, seed=1).requires_grad_(), torch.tensor([4, 1])
    before = memory.clone()
    update_memory(memory, row, feature, momentum, normalize, renormalize)
    for f, t in zip(feature.detach(), (4, 1), strict=True):
        expected = momentum * before[t] + (1 - momentum) * (f / f.norm() if normalize else f)
        close(memory[t], expected / expected.norm() if renormalize else expected)
    assert torch.equal(memory[[0, 2, 3]], before[[0, 2, 3]]) and not memory.requires_grad


def test_the_memory_refuses_and_is_left_alone():
    memory = rand(3, 2)
    before = memory.clone()
    with pytest.raises(ValueError, match=r"weight of the old row, must be in \[0, 1\], got 1.5"):
        update_memory(memory, torch.tensor([0]), rand(1, 2), 1.5)
    with pytest.raises(ValueError, match="matrices of one width"):
        update_memory(memory, torch.tensor([0]), rand(1, 3))
    update_memory(memory, torch.zeros(0, dtype=int), rand(0, 2))
    assert torch.equal(memory, before)


def test_a_fused_feature_is_the_mean_of_unit_vectors_and_no_unit_itself():
    scene, crop = rand(4, 3), rand(4, 3, seed=1)
    close(fused(scene, crop), (F.normalize(scene, dim=1) + F.normalize(crop, dim=1)) / 2)
    close(fused(scene, crop, normalize=False), (scene + crop) / 2)


# --- clusters ---------------------------------------------------------------------------------------------------------


def dense_labels(embedding, image, rule):
    """The pairwise rule on the whole matrix."""
    unit = F.normalize(embedding, dim=1)
    similarity, image, count = (unit @ unit.T).numpy(), image.tolist(), len(embedding)
    hidden = similarity.copy()
    for i in range(count):
        for j in range(count):
            if i == j or (rule == "other_images" and image[i] == image[j]):
                hidden[i, j] = -np.inf
    nearest = [int(row.argmax()) if np.isfinite(row).any() else -1 - i for i, row in enumerate(hidden)]
    pairs = [
        (i, j)
        for i in range(count)
        for j in range(i + 1, count)
        if image[i] != image[j] and (nearest[i] == j or nearest[j] == i or nearest[i] == nearest[j])
    ]
    if rule == "strict":
        pairs.sort(key=lambda pair: (-similarity[pair], pair))
    group = list(range(count))
    for i, j in pairs:
        one = [r for r in range(count) if group[r] == group[i]]
        other = [r for r in range(count) if group[r] == group[j]]
        if group[i] == group[j] or (rule == "strict" and {image[r] for r in one} & {image[r] for r in other}):
            continue
        for r in other:
            group[r] = group[i]
    number: dict[int, int] = {}
    return torch.tensor([number.setdefault(g, len(number)) for g in group])


@pytest.mark.parametrize("case", ["cluster_h1", "cluster_h2", "cluster_h4"])
def test_recorded_clusters(case):
    embedding, image = golden(f"{case}/X"), golden(f"{case}/image_id")
    for block_rows in (1, 2, 4096):
        assert torch.equal(first_neighbours(embedding, block_rows=block_rows), golden(f"{case}/neighbour"))
        other = first_neighbours(embedding, image, block_rows)
        assert torch.equal(other, golden(f"{case}/neighbour_other_image"))
        for rule, name in RULES.items():
            assert torch.equal(first_neighbour_labels(embedding, image, rule, block_rows), golden(f"{case}/{name}"))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(12))
def test_clusters_are_those_of_the_pairwise_rule(seed, rule):
    rows = random.Random(seed).randint(2, 70)
    embedding = rand(rows, 4, seed=seed)
    image = torch.randint(0, max(2, rows // 3), (rows,), generator=torch.Generator().manual_seed(seed))
    expected = dense_labels(embedding, image, rule)
    for block_rows in (7, 4096):
        assert torch.equal(first_neighbour_labels(embedding, image, rule, block_rows), expected)


def test_no_two_people_of_an_image_share_a_strict_cluster():
    image = torch.arange(120) // 6
    label = first_neighbour_labels(rand(120, 3), image, "strict")
    assert len({*zip(label.tolist(), image.tolist(), strict=True)}) == 120


def test_equal_rows_have_the_lowest_as_neighbour():
    assert first_neighbours(torch.ones(5, 3)).tolist() == [1, 0, 0, 0, 0]
    assert first_neighbours(torch.ones(5, 3), torch.tensor([0, 0, 1, 1, 1])).tolist() == [2, 2, 0, 0, 0]
    assert first_neighbours(torch.zeros(3, 3)).tolist() == [1, 0, 0]


@pytest.mark.parametrize("block_rows", [7, 64, 4096])
def test_copies_have_the_lowest_as_neighbour_in_tiles_of_any_size(block_rows):
    once = rand(101, 256, dtype=torch.float32)
    copies, image = once.repeat(3, 1), torch.arange(303) // 3
    found = first_neighbours(copies, block_rows=block_rows)
    assert torch.equal(found, torch.cat([torch.arange(101) + 101, torch.arange(101), torch.arange(101)]))
    found = first_neighbours(copies, image, block_rows)
    expected = [min(j for j in range(i % 101, 303, 101) if j != i and image[j] != image[i]) for i in range(303)]
    assert found.tolist() == expected


@pytest.mark.parametrize("rule", RULES)
def test_clusters_of_few_people(rule):
    assert first_neighbour_labels(torch.zeros(0, 3), torch.zeros(0, dtype=int), rule).tolist() == []
    assert first_neighbour_labels(rand(1, 3), torch.zeros(1, dtype=int), rule).tolist() == [0]
    assert first_neighbour_labels(rand(3, 3), torch.zeros(3, dtype=int), rule).tolist() == [0, 1, 2]  # one image
    assert first_neighbour_labels(torch.ones(4, 3), torch.arange(4), rule).tolist() == [0, 0, 0, 0]


def test_clustering_refuses():
    with pytest.raises(ValueError, match="the embedding of row 1 is not finite"):
        first_neighbours(torch.tensor([[1.0], [float("nan")]]))
    with pytest.raises(ValueError, match=r"an image for each, got \(3, 2\) with images \(2,\)"):
        first_neighbour_labels(rand(3, 2), torch.zeros(2, dtype=int))
    with pytest.raises(ValueError, match="rule is literal, strict or other_images, got 'dbscan'"):
        first_neighbour_labels(rand(3, 2), torch.zeros(3, dtype=int), "dbscan")
    with pytest.raises(ValueError, match="block_rows must be at least 1"):
        first_neighbours(rand(3, 2), block_rows=0)
