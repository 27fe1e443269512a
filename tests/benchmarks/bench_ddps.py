"""What DDPS costs: time and memory of a distilled step against the student alone, and the memory that DFD keeps.

    python tests/benchmarks/bench_ddps.py [--size 480x640] [--scenes 2] [--student resnet18] [--teacher resnet50]
                                          [--device cpu|cuda]

Random scenes and weights. Three jobs, each in a process of its own: the student alone, the teacher's look at given
boxes, and the distilled step. The limit is teacher + student run apart: distillation needs both, and losses that cost
nothing. DFD's minimum is the teacher's maps, which its gradient needs; the student's are there anyway.
"""

import argparse
import resource
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models.person_search import PersonSearch
from models.pyramid import LEVELS
from orchestrator.families.person_search.recipe import network_config
from orchestrator.families.person_search.training import build, memory
from orchestrator.methods.ddps import DDPS, METHOD
from orchestrator.recipe import changed

IDENTITIES, STEPS = 482, 4
JOBS = ("student alone", "teacher's look", "distilled")


def made(options: argparse.Namespace, distilled: bool) -> tuple[DDPS, dict]:
    """A task of the full-size recipe with random weights, and a batch."""
    torch.manual_seed(0)
    size = tuple(map(int, options.size.split("x")))
    recipe = changed(METHOD.recipes["prw"], {
        "student.name": options.student, "teacher.network.name": options.teacher, "student.size": size,
        "teacher.network.size": size, "student.pretrained": False, "teacher.network.pretrained": False,
        "student.freeze_stem": False,
    })  # fmt: skip
    student, teacher = build(recipe, IDENTITIES), PersonSearch(network_config(recipe, recipe.teacher.network))
    teachers = memory(recipe.memory, recipe.detector.dim, IDENTITIES)
    task = DDPS(recipe, student, *((teacher, teachers) if distilled else (None, None))).to(options.device).train()
    height, width = (-(-s // 32) * 32 for s in size)
    low = torch.rand(options.scenes, 4, 2) * torch.tensor([width * 0.7, height * 0.5])
    boxes = torch.cat([low, low + torch.tensor([width * 0.1, height * 0.4])], 2).to(options.device)
    identity = torch.randint(1, IDENTITIES, (options.scenes, 4), device=options.device)
    batch = {
        "frames": torch.randint(0, 256, (options.scenes, 3, height, width), dtype=torch.uint8, device=options.device),
        "sizes": [(height, width)] * options.scenes, "boxes": list(boxes), "identity": list(identity),
        "draws": list(range(options.scenes)),
    }  # fmt: skip
    return task, batch


def peak(device: str) -> float:
    """GiB"""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def step(task: DDPS, batch: dict) -> None:
    losses = task(batch)
    losses.total.backward()
    with torch.no_grad():
        task.after_step(losses.kept)
    for parameter in task.parameters():
        parameter.grad = None


@torch.no_grad()
def look(task: DDPS, batch: dict, looked: tuple) -> None:
    """What the teacher does in a distilled step."""
    pixels_BCHW, regions, people, sizes = looked
    maps = task.teacher.pyramid(pixels_BCHW)
    task.teacher.classify(maps, regions, sizes)
    task.teacher.embed(maps, people, sizes)


def measure(options: argparse.Namespace, job: str, out) -> None:
    """Seconds of the fastest step, and how far memory grew above what the networks themselves take."""
    task, batch = made(options, job != "student alone")
    run = step
    arguments: tuple = (task, batch)
    if job == "teacher's look":
        with torch.no_grad():
            seen = task.look(batch)
        boxes = seen.seen.regions.boxes, seen.seen.people.boxes
        run, arguments = look, (task, batch, (seen.images.pixels_BCHW, *boxes, seen.images.sizes))
        del seen
        run(*arguments)
        out.send((fastest(run, arguments, options.device), float("nan")))
        return
    before = peak(options.device)
    seconds = fastest(run, arguments, options.device)
    out.send((seconds, peak(options.device) - before))


def fastest(run, arguments: tuple, device: str) -> float:
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        run(*arguments)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def kept_by_dfd(options: argparse.Namespace) -> tuple[int, int]:
    """Bytes that DFD keeps for its gradient beside the student's maps, and those of the teacher's maps."""
    task, batch = made(options, True)
    with torch.no_grad():
        looked = task.look(batch)
    own = {name: looked.seen.maps[name].clone().requires_grad_() for name in LEVELS}
    students = {value.untyped_storage().data_ptr() for value in own.values()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in students:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    parameters = {p.untyped_storage().data_ptr() for p in task.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        terms = task._on_maps(looked._replace(seen=looked.seen._replace(maps=own)))
    assert terms.terms
    teachers = sum(looked.taught[name].untyped_storage().nbytes() for name in LEVELS)
    return sum(size for pointer, size in kept.items() if pointer not in parameters), teachers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="480x640")
    parser.add_argument("--scenes", type=int, default=2)
    parser.add_argument("--student", default="resnet18")
    parser.add_argument("--teacher", default="resnet50")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    context, found = get_context("spawn"), {}
    for job in JOBS:
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=measure, args=(options, job, send))
        process.start()
        found[job] = receive.recv()
        process.join()
        seconds, memory_gib = found[job]
        grown = "" if memory_gib != memory_gib else f", memory grew by {memory_gib:.2f} GiB"
        print(f"{job:16} {seconds:7.2f} s a step{grown}", flush=True)
    alone, look_, distilled = (found[job] for job in JOBS)
    print(f"distilled / student alone: time {distilled[0] / alone[0]:.2f}, memory {distilled[1] / alone[1]:.2f}")
    print(f"distilled / (teacher + student run apart): time {distilled[0] / (alone[0] + look_[0]):.2f}")
    kept, least = kept_by_dfd(options)
    print(f"DFD keeps {kept / 2**20:.1f} MiB beside the student's maps; its minimum, the teacher's maps: "
          f"{least / 2**20:.1f} MiB, ratio {kept / least:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
