"""What the losses of face distillation cost in a step, and a softmax over a million people.

    python tests/benchmarks/bench_face.py --batch 512 --classes 1000000

Forward and backward pass of each loss on embeddings of 512 numbers, each in a process of its own for its memory.
Beside it the matrix products that it cannot do without, and the obvious alternative: of RPSD a loop over anchors, of
AdaDistill centres of which one row of a class wins, of Partial FC all classes in every step.
"""

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.adadistill import AdaDistill
from losses.ekd import EKD
from losses.face_kd import ILED, RPSD
from losses.margin_softmax import arcface_logits, cosines
from losses.partial_fc import sampled_classes, split_cross_entropy

DIM = 512


def seconds(step: Callable[[], object], repeats: int = 3) -> float:
    """Least of some runs, the first not counted."""
    step()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        found.append(time.perf_counter() - start)
    return min(found)


def embeddings(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(batch, DIM, requires_grad=True), torch.randn(batch, DIM), torch.randint(0, 85_742, (batch,))


def memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def relations(batch: int, slots: int) -> None:
    student, teacher, label = embeddings(batch)
    loss = RPSD(DIM, DIM, bank_size=slots)
    loss.enqueue(torch.randn(slots, DIM), torch.randn(slots, DIM), torch.randint(0, 85_742, (slots,)))
    before = memory()
    ours = seconds(lambda: loss(student, teacher, label).backward())
    references = torch.randn(slots + batch, DIM)

    def products() -> None:  # both networks' similarities, and the gradient to the student
        similarity = teacher @ references.T
        _ = student.detach() @ references.T
        _ = similarity @ references

    def one_by_one() -> None:
        for row in range(batch):
            own = F.normalize(student[row], dim=0) @ loss.student_MD.T
            theirs = F.normalize(teacher[row], dim=0) @ loss.teacher_MD.T
            chosen = own.detach().topk(64).indices
            (own[chosen] - theirs[chosen]).square().mean().backward()

    limit, naive = seconds(products), seconds(one_by_one, 1)
    print(
        f"RPSD, bank of {slots:,}: {1000 * ours:.0f} ms, {ours / limit:.1f} × its matrix products, anchors one by one "
        f"{naive / ours:.1f} × ours; bank {2 * slots * DIM * 4 / 2**20:.0f} MiB, "
        f"{1024 * (memory() - before):.0f} MiB more",
        flush=True,
    )


def others(batch: int) -> None:
    student, teacher, label = embeddings(batch)
    instance, pairs = ILED(), EKD()
    print(f"ILED: {1000 * seconds(lambda: instance(student, teacher).backward()):.1f} ms")
    product = seconds(lambda: student.detach() @ student.detach().T)
    ours = seconds(lambda: sum(pairs(student, teacher, label)).backward())
    count = batch * (batch - 1) // 2
    ordering = seconds(lambda: [torch.rand(count).sort() for _ in range(3)])
    print(f"EKD: {1000 * ours:.0f} ms for {count:,} pairs; three sorts of them {1000 * ordering:.0f} ms, "
          f"both products {2000 * product:.0f} ms")  # fmt: skip
    centres = AdaDistill(DIM, 85_742)

    def one_wins() -> None:
        near = F.cosine_similarity(student.detach(), teacher)[:, None]
        centres.centre_CD[label] = torch.lerp(F.normalize(teacher), centres.centre_CD[label], near)

    ours, scatter = seconds(lambda: centres.update(student, teacher, label)), seconds(one_wins)
    print(f"AdaDistill's centres: {1000 * ours:.0f} ms, a scatter of which one row of a class wins "
          f"{1000 * scatter:.1f} ms", flush=True)  # fmt: skip


def million(batch: int, classes: int, rate: float) -> None:
    student, _, _ = embeddings(batch)
    weight = torch.nn.Parameter(0.01 * torch.randn(classes, DIM))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    rows, label = range(classes), torch.randint(0, classes, (batch,))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        chosen, place = (slice(None), label) if rate == 1 else sampled_classes(label, rows, rate)
        logits = arcface_logits(cosines(student, weight[chosen]), place)
        split_cross_entropy(logits, place).backward()
        optimizer.step()

    ours = seconds(step, 1)
    looked = int(rate * classes)
    part = torch.randn(looked, DIM)
    limit = 3 * seconds(lambda: student.detach() @ part.T, 1)
    print(
        f"softmax over {classes:,} people, {looked:,} looked at: {ours:.2f} s a step, {ours / limit:.1f} × its matrix "
        f"products; peak {memory():.1f} GiB, of which centres, gradient, momentum {3 * classes * DIM * 4 / 2**30:.1f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--classes", type=int, default=1_000_000)
    options = parser.parse_args()
    print(f"batch {options.batch}, {DIM} numbers, {torch.get_num_threads()} threads")
    jobs = [(others, (options.batch,)), *((relations, (options.batch, slots)) for slots in (4096, 16_384, 65_536))]
    jobs += [(million, (options.batch // 4, options.classes, rate)) for rate in (1.0, 0.1)]
    for function, arguments in jobs:
        process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(process.exitcode)


if __name__ == "__main__":
    main()
