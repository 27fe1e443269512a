"""What checkpoints cost a training at the demo's size: written before the next epoch, and behind it.

    python tests/benchmarks/bench_checkpoint.py [--epochs 4] [--rounds 20] [--storage DIR]

D3still's student of ``demo`` with a checkpoint after every epoch (recipes keep one every five minutes), its batches
held in memory. Three trainings take turns, the first one another in every round: none is written, each is written
before the next epoch begins, and each is written behind the training, as trials do. What holds an epoch up is timed
where it waits; the rest a checkpoint costs behind the training, in CPU time that the training would have had, where
there is no core to spare: that is in whole epochs, compared with those without any of the same round.
"""

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from orchestrator import checkpoint, find
from orchestrator.families.retrieval.recipe import build_embedder
from orchestrator.fit import fit
from orchestrator.method import Evaluation, Experiment, Losses, Task

BATCH, STEPS, CLASSES = 120, 10, 100  # of the demo: 1,200 images


class Supervised(Task):
    def forward(self, batch):
        return Losses({"entropy": torch.nn.functional.mse_loss(self.student(batch["x"]), batch["y"])}, {"entropy": 1.0})


def experiment(epochs: int) -> Experiment:
    recipe = find.recipe("d3still", "demo")
    torch.manual_seed(0)
    task = Supervised(build_embedder(recipe.student, recipe.embedding_dim, 0, 0))
    batch = {"x": torch.randn(BATCH, 3, *recipe.student.size), "y": torch.randn(BATCH, recipe.embedding_dim)}
    return Experiment(
        task=task,
        optimizer=torch.optim.SGD(task.parameters(), lr=0.01, momentum=0.9),
        epochs=epochs,
        rate=lambda progress: 0.01,
        batches=lambda epoch: [batch] * STEPS,
        evaluate=lambda task: Evaluation({"val/map": 0.0}),
        checkpoint_every=1,
    )


def trained(epochs: int, how: str, file: Path) -> tuple[float, list[float]]:
    """Seconds of the whole, until the last checkpoint is written, and what every one held an epoch up."""
    waited: list[float] = []
    begun = time.perf_counter()
    with checkpoint.Behind() as behind:

        def on_epoch(epoch, metrics, state):
            start = time.perf_counter()
            if how == "before":
                checkpoint.save(file, state())
            elif how == "behind":
                behind(partial(checkpoint.save, file, state()))
            waited.append(time.perf_counter() - start)

        fit(experiment(epochs), torch.device("cpu"), None, on_epoch)
    return time.perf_counter() - begun, waited


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--storage", default="", help="a folder on the disk that is meant")
    given = parser.parse_args()
    if given.rounds < 2:
        parser.error(f"--rounds {given.rounds}: an error needs pairs; ask for 2 or more")
    found: dict[str, list[tuple[float, list[float]]]] = {"none": [], "before": [], "behind": []}
    with tempfile.TemporaryDirectory(dir=given.storage or None) as folder:
        file = Path(folder) / "state.pt"
        for number in range(given.rounds):
            for how in [*found, *found][number % 3 :][:3]:
                found[how].append(trained(given.epochs, how, file))
        size = file.stat().st_size
    alone = statistics.median(seconds for seconds, _ in found["none"]) / given.epochs
    print(f"an epoch of {BATCH * STEPS} images {alone:.2f} s, a checkpoint of {size / 2**20:.1f} MiB after each, "
          f"{torch.get_num_threads()} threads")  # fmt: skip
    for how in ("before", "behind"):
        held = statistics.median(wait for _, waits in found[how] for wait in waits)
        more = [100 * (a / b - 1) for (a, _), (b, _) in zip(found[how], found["none"], strict=True)]
        error = statistics.stdev(more) / len(more) ** 0.5
        whole = f"{statistics.mean(more):+.2f} ± {error:.2f} %"
        print(f"written {how:6} the next epoch: it waits {1000 * held:.1f} ms = {100 * held / alone:.2f} % of one; "
              f"whole epochs {whole} (mean and its error, {len(more)} pairs)")  # fmt: skip


if __name__ == "__main__":
    main()
