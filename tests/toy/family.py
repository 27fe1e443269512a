"""What methods that find and recognise boxes share: recipe, needs, how they are met, training job, score, picture."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from orchestrator import cache, checkpoint, distributed
from orchestrator import recipe as base
from orchestrator.method import Batch, Evaluation, Experiment, Method, Metric, Task, Where
from orchestrator.needs import Need, Place, Prepared, Ready, Report
from orchestrator.pictures import Sheet
from orchestrator.recipe import Count, Share, Whole, changed, flat
from toy import data
from toy.network import BoxEmbedder, Config, cosines

FOUND, OFF = Metric("toy/found", "Found"), Metric("toy/off", "Pixels off", percent=False)


@dataclass(frozen=True, kw_only=True)
class Net:
    channels: Count = 8
    dim: Count = 8


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """What is drawn."""

    train: Count = 12
    test: Count = 10
    seed: Whole = 0


@dataclass(frozen=True, kw_only=True)
class Recipe(base.Recipe):
    net: Net = field(default_factory=Net)
    tutor: Net = field(default_factory=lambda: Net(channels=16))  # the teacher's network
    taught: bool = True
    scenes: Scenes = field(default_factory=Scenes)
    per_step: Count = 4  # scenes
    bank: Count = 64  # rows
    alike: Share = 0.9  # cosine from which two boxes are of one cluster


class BoxMethod(Method):
    family = "toy"
    metrics = (FOUND, OFF)

    def __init__(self, paper: str, recipes: Mapping[str, Recipe], task: Callable[..., Task]):
        self.paper, self.recipes, self.task = paper, recipes, task

    def check(self, recipe: Recipe, workers: int = 1) -> None:
        if recipe.per_step % workers:
            raise ValueError(f"per_step = {recipe.per_step} scenes cannot be shared evenly by {workers} workers")

    def needs(self, recipe: Recipe, place: Place, purpose: Literal["train", "score"] = "train") -> dict[str, Need]:
        made_from = {path: value for path, value in flat(recipe).items() if path.startswith("scenes.")}
        scenes = Need("boxes", made_from, title="boxes of all scenes")
        if purpose == "score" or not recipe.taught:
            return {"scenes": scenes}
        of_tutor = {f"net.{name}": value for name, value in flat(recipe.tutor).items()}
        training = flat(changed(self.recipes["two_sizes_tutor"], {**of_tutor, **made_from}))
        tutor = Need(
            "tutor", {"recipe": training}, {"scenes": scenes}, title="tutor", trial=("toy", "two_sizes_tutor", training)
        )
        both = {"scenes": scenes, "tutor": tutor}
        return {**both, "references": Need("references", {}, both, title="score of the tutor", network=True)}

    def make(self, need: Need, after: Mapping[str, Ready], where: Where, progress: Report) -> Ready:
        if need.kind == "references":
            prepared = Prepared(where.place, after)
            tutor, _ = checkpoint.load_model(prepared.path("tutor"))
            metrics = self.score(tutor.to(where.device), None, prepared, where).metrics
            return Ready(need.key, need.kind, "", "", {"teacher": "the tutor", "teacher_metrics": dict(metrics)})
        asked = need.made_from
        counts, seed = (asked["scenes.train"], asked["scenes.test"]), asked["scenes.seed"]
        made = cache.ensure(where.place.folder("cache"), "boxes", asked, lambda: data.rows(seed, counts))
        progress("boxes", len(made), len(made))
        told = {"protocol": "every box against all other boxes", "scenes": {"seed": seed}}
        path = cache.folder_below(where.place.storage, made)
        return Ready(need.key, need.kind, path, made.manifest["fingerprint"], told)

    def experiment(self, recipe: Recipe, prepared: Prepared, where: Where) -> Experiment:
        scenes, tutor, tutors_bank = opened(prepared, 0), None, None
        if recipe.taught:
            tutor, _ = checkpoint.load_model(prepared.path("tutor"))
            tutors_bank = checkpoint.load_extras(prepared.path("tutor"))["bank.rows_MD"]
        torch.manual_seed(recipe.train.seed)
        student = BoxEmbedder(Config(recipe.net.channels, recipe.net.dim, recipe.bank))
        task = self.task(recipe, student, tutor, tutors_bank, len(scenes.rows_N)).to(where.device)
        steps, own = len(scenes) // recipe.per_step, recipe.per_step // where.world

        def batches(epoch: int) -> Iterator[Batch]:
            order = np.random.default_rng((recipe.train.seed, epoch)).permutation(len(scenes))
            for whole in order[: steps * recipe.per_step].reshape(steps, -1):
                yield scenes.batch(whole[where.rank * own : (where.rank + 1) * own], whole)

        return Experiment(
            task=task,
            optimizer=torch.optim.SGD(task.parameters(), recipe.train.rate, recipe.train.momentum),
            epochs=recipe.train.epochs,
            rate=lambda progress: recipe.train.rate * min(1.0, (progress.step + 1) / steps),  # up within an epoch
            batches=batches,
            evaluate=lambda task: self.score(task.student, recipe, prepared, where),
            start_epoch=lambda task, epoch: task.label_anew(embedded(task.student, scenes, where)[1]),
            steps_per_epoch=steps,
            unused_parameters=True,  # the head, where nobody's identity is told
            evaluate_every=recipe.train.evaluate_every,
            checkpoint_every=recipe.run.checkpoint_every,
            items_per_step=recipe.per_step,
        )

    def score(self, student: BoxEmbedder, recipe: Recipe | None, prepared: Prepared, where: Where) -> Evaluation:
        """One over the rank of the first box of the same identity, and how far corners are off; means over boxes."""
        scenes = opened(prepared, 1)
        box_N4, embedding_ND = embedded(student.eval(), scenes, where)
        identity_N = torch.from_numpy(scenes.identity_N)
        order_NM = cosines(embedding_ND, embedding_ND).fill_diagonal_(-2).argsort(1, descending=True)[:, :-1].cpu()
        right_NM = identity_N[order_NM] == identity_N[:, None]
        found = (1 / (1 + right_NM.double().argmax(1)))[right_NM.any(1)].mean().item()
        off = (box_N4.cpu() - torch.from_numpy(scenes.table(scenes.rows_N, "box"))).abs().mean().item()
        return Evaluation({FOUND.name: found, OFF.name: off}, box_N4.cpu().numpy())

    def pictures(
        self, student: BoxEmbedder, recipe: Recipe, prepared: Prepared, evaluation: Evaluation, where: Where
    ) -> dict[str, Sheet]:
        """The first scenes of both sizes with the boxes that were found."""
        scenes = opened(prepared, 1)
        of_N = scenes.table(scenes.rows_N, "scene")[:, 1]
        images = np.zeros((2, 3, 32, 32, 3), np.uint8)
        for scene in range(6):
            image = (255 * scenes.image(scene)).byte().permute(1, 2, 0).numpy()
            for x0, y0, x1, y1 in evaluation.found[of_N == scene].round().astype(int).clip(0, 23):
                image[[y0, y1], x0 : x1 + 1] = image[y0 : y1 + 1, [x0, x1]] = 255
            images[scene % 2, scene // 2, : image.shape[0], : image.shape[1]] = image
        return {"boxes": Sheet("Boxes that were found", images, ("", "", ""), ("24×32", "32×28"))}

    def networks(self, recipe: Recipe) -> tuple[str, str]:
        return f"boxes, {recipe.net.channels} channels", "the tutor" if recipe.taught else ""


def opened(prepared: Prepared, part: int) -> data.Scenes:
    return data.Scenes(cache.open_rows(prepared.path("scenes")), part, prepared["scenes"].told["scenes"]["seed"])


@torch.no_grad()
def embedded(student: BoxEmbedder, scenes: data.Scenes, where: Where) -> tuple[Tensor, Tensor]:
    """Boxes and embeddings of every box in order; every rank looks at a share of the scenes."""
    share = -(-len(scenes) // where.world)
    own = (np.arange(share) + where.rank * share).clip(max=len(scenes) - 1)  # the last share may repeat its end
    batch = scenes.batch(own)
    found = student(batch["images"], [start.to(where.device) for start in batch["start"]])
    row_N = distributed.gather_without_gradient(batch["row"])
    place = torch.full((len(scenes.rows_N),), -1)
    place[row_N[row_N >= 0]] = torch.arange(len(row_N))[row_N >= 0]
    box_N4, embedding_ND = (distributed.gather_without_gradient(value)[place.to(where.device)] for value in found)
    return box_N4, embedding_ND
