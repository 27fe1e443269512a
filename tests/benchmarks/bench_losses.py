"""What every loss costs as the batch grows: time and memory of a forward and a backward pass, and how they grow.

    python tests/benchmarks/bench_losses.py [--batch 512 2048 8192] [--device cuda] [--only NAME …]

Embeddings have 512 numbers. Each loss at each size is a process of its own; memory is what it adds to its inputs, in
numbers of four bytes per pair of images (B²), so that what a formula needs can be read off: a loss on single rows
shows 0, one that compares all pairs shows the few matrices that its gradient keeps. The exponent is of time, between
the last two sizes. What would take more than ``--most`` seconds is left out, and its line says how long it would take.

The first line is the limit of most losses that compare all pairs: both products of similarities and the gradient's.
"""

import argparse
import math
import multiprocessing
import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from losses import (
    adadistill,
    aml,
    cckd,
    csd,
    d3still,
    ddps,
    ekd,
    face_kd,
    feature_consistency,
    fitnet,
    gkd,
    logit_kd,
    margin_distillation,
    margin_softmax,
    oim,
    partial_fc,
    pkt,
    raml,
    rkd,
    rop,
    rsiamnet,
    spkd,
    sureid,
    triplet,
    ugd,
)

DIM, IMAGES_EACH, CLASSES, PEOPLE = 512, 4, 1000, 10_000
OF_TRIPLES = ("d3still.relation_terms, all", "d3still.differential_term", "rkd.angle_term")
Step = Callable[[], Tensor]


def inputs(batch: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher that agree somewhat, and labels of four images each."""
    torch.manual_seed(0)
    label = torch.arange(batch, device=device) // IMAGES_EACH
    teacher = torch.randn(batch // IMAGES_EACH, DIM, device=device).repeat_interleave(IMAGES_EACH, 0)
    teacher = teacher + torch.randn(batch, DIM, device=device)
    student = (teacher + torch.randn(batch, DIM, device=device)).requires_grad_()
    return student, teacher, label


def steps(s: Tensor, t: Tensor, label: Tensor) -> dict[str, Callable[[], Step]]:
    """Name -> a function that makes what the loss is given beside the embeddings, and returns its forward pass."""
    batch, device = len(s), s.device
    head = torch.randn(CLASSES, DIM, device=device) / DIM**0.5
    camera = torch.arange(batch, device=device) % 3

    def mined() -> Tensor:
        positive, negative, counted = aml.mine(s, t, label)
        return aml.triplet(s, t[positive], t[negative], counted_A=counted) + aml.contrastive(
            s, t[positive], t[negative], counted_A=counted
        )

    def queued() -> Step:
        memory = oim.OIM(DIM, CLASSES, 5000).to(device)
        return lambda: memory(s, label % CLASSES)

    def relations() -> Step:
        bank = face_kd.RPSD(DIM, DIM).to(device)
        bank.enqueue(torch.randn_like(t), t, label)
        return lambda: bank(s, t, label)

    def centres() -> Step:
        module = adadistill.AdaDistill(DIM, batch // IMAGES_EACH).to(device)

        def step() -> Tensor:
            module.update(s.detach(), t, label)
            return module(s).square().mean()

        return step

    def clusters() -> Step:
        memory, rows = torch.nn.functional.normalize(t), torch.arange(batch, device=device)
        return lambda: rsiamnet.cluster_contrastive(s, memory, label, rows)

    def softmax(margin: Callable[[Tensor], Tensor]) -> Step:
        centre = torch.randn(PEOPLE, DIM, device=device, requires_grad=True)
        cross_entropy = partial_fc.split_cross_entropy
        return lambda: cross_entropy(margin(margin_softmax.cosines(s, centre)), label)

    def sampled() -> Step:
        centre = torch.randn(PEOPLE, DIM, device=device, requires_grad=True)

        def step() -> Tensor:
            chosen, place = partial_fc.sampled_classes(label, range(PEOPLE), 0.1)
            logits = margin_softmax.arcface_logits(margin_softmax.cosines(s, centre[chosen]), place)
            return partial_fc.split_cross_entropy(logits, place)

        return step

    def quality() -> Step:
        module, norm = margin_softmax.AdaFace().to(device), s.detach().norm(dim=1)
        return softmax(lambda cosine: module(cosine, norm, label))

    return {
        "limit: matrix products": lambda: lambda: (s @ t.T + t @ t.T).mean(),
        "d3still.feature_term": lambda: lambda: d3still.feature_term(s, t),
        "d3still.pairwise_term": lambda: lambda: d3still.pairwise_term(s, t),
        "d3still.relation_terms, top 10": lambda: lambda: sum(d3still.relation_terms(s, t)),
        "d3still.relation_terms, all": lambda: lambda: sum(d3still.relation_terms(s, t, top_k=None)),
        "d3still.differential_term": lambda: lambda: d3still.differential_term(s, t),
        "fitnet": lambda: lambda: fitnet.feature_mse(s, t),
        "aml.regression": lambda: lambda: aml.regression(s, t),
        "aml, mined": lambda: mined,
        "raml": lambda: lambda: raml.absolute_term(s, t) + raml.cross_term(s, t) + raml.student_term(s, t),
        "csd, top 256": lambda: lambda: csd.csd(s, t, top_k=256),
        "rop, top 256": lambda: lambda: rop.rop(s, t, top_k=256),
        "ugd": lambda: lambda: ugd.feature_distance(s, t),
        "rkd.distance_term": lambda: lambda: rkd.distance_term(s, t),
        "rkd.angle_term": lambda: lambda: rkd.angle_term(s, t),
        "pkt": lambda: lambda: pkt.pkt(s, t),
        "cckd": lambda: lambda: cckd.kernel_congruence(s, t) + cckd.neighbour_product(s, t),
        "spkd": lambda: lambda: spkd.similarity_preserving(s, t),
        "logit_kd, 1,000 classes": lambda: lambda: logit_kd.logit_kd(s @ head.T, t @ head.T),
        "gkd, 1,000 classes": lambda: lambda: sum(
            gkd.grouped_kd(s @ head.T, t @ head.T, label % CLASSES, size=50)[:2]
        ),
        "feature_consistency": lambda: lambda: feature_consistency.feature_consistency(s, t),
        "triplet, hard": lambda: lambda: triplet.batch_hard_triplet(s, label),
        "triplet, soft": lambda: lambda: triplet.batch_soft_triplet(s, label),
        "triplet, cameras": lambda: lambda: triplet.camera_triplet(s, label, camera),
        "margin_distillation": lambda: lambda: sum(
            margin_distillation.triplet_distillation(*(
                tuple(x[index] for index in margin_distillation.hardest_triplets(s.detach(), label)) for x in (s, t)
            ))[:1]
        ),
        "sureid.feature_term": lambda: lambda: sureid.feature_term(s, t),
        "sureid.logit_term": lambda: lambda: sureid.logit_term(s @ head.T, t @ head.T),
        "face_kd.ILED": lambda: (lambda module: lambda: module(s, t))(face_kd.ILED().to(device)),
        "face_kd.RPSD, bank of 4,096": relations,
        "ekd": lambda: (lambda module: lambda: sum(module(s, t, label)))(ekd.EKD().to(device)),
        "arcface, 10,000 classes": lambda: softmax(lambda cosine: margin_softmax.arcface_logits(cosine, label)),
        "cosface, 10,000 classes": lambda: softmax(lambda cosine: margin_softmax.cosface_logits(cosine, label)),
        "adaface, 10,000 classes": quality,
        "arcface, a tenth of 10,000": sampled,
        "adadistill": centres,
        "ddps.correlation": lambda: lambda: ddps.correlation_distillation(s, t),
        "ddps.logit": lambda: lambda: ddps.logit_distillation(s @ head.T, t @ head.T, label % CLASSES),
        "oim, queue of 5,000": queued,
        "rsiamnet.consistency": lambda: lambda: rsiamnet.inter_instance_consistency(s, t),
        "rsiamnet.clusters": clusters,
    }  # fmt: skip


def resident() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured(name: str, batch: int, device: str, answer: Any) -> None:
    """Seconds of a step, and bytes that it added at its peak; the first step is not counted where others follow."""
    s, t, label = inputs(batch, device)
    step = steps(s, t, label)[name]()
    on_gpu = device.startswith("cuda")
    (s @ t.T)[:1].sum().backward()  # libraries load what they need
    s.grad = None
    before = torch.cuda.memory_allocated() if on_gpu else resident()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    least, began = math.inf, time.perf_counter()
    for _ in range(4):
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        step().backward()
        if on_gpu:
            torch.cuda.synchronize()
        least = min(least, time.perf_counter() - start)
        s.grad = None
        if time.perf_counter() - began > 10:
            break
    answer.send((least, (torch.cuda.max_memory_allocated() if on_gpu else resident()) - before))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--most", type=float, default=60.0, help="seconds of a step that are worth waiting for")
    given = parser.parse_args()
    processes = multiprocessing.get_context("spawn")
    print(f"{torch.get_num_threads()} threads, {given.device}; per size: seconds, memory as multiples of 4 B² bytes")
    for name in given.only or steps(*inputs(8, "cpu")):
        found: list[tuple[int, float, float]] = []
        said = []
        for batch in given.batch:
            least = 3.0 if name in OF_TRIPLES else 0.0
            expected = found[-1][1] * (batch / found[-1][0]) ** max(growth(found), least) if found else 0.0
            if expected > given.most:
                said.append(f"{batch:,}: about {expected:,.0f} s")
                continue
            ours, theirs = processes.Pipe()
            worker = processes.Process(target=measured, args=(name, batch, given.device, theirs))
            worker.start()
            theirs.close()
            try:
                seconds, memory = ours.recv()
            except EOFError:
                said.append(f"{batch:,}: ended without an answer")
                break
            finally:
                worker.join()
            found.append((batch, seconds, memory))
            said.append(f"{batch:,}: {seconds:.4f} s, {memory / 4 / batch**2:.1f}")
        print(f"{name:32} {'   '.join(said)}   exponent {growth(found):.1f}", flush=True)


def growth(found: list[tuple[int, float, float]]) -> float:
    """Exponent of time between the last two sizes; 0 where there are none."""
    if len(found) < 2:
        return 0.0
    (small, before, _), (large, after, _) = found[-2:]
    return math.log(after / before) / math.log(large / small)


if __name__ == "__main__":
    main()
