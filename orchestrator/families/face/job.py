"""What must be ready for a face network, how it is trained, scored and shown."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from models.network import identity
from orchestrator import cache, checkpoint, find, published, tables
from orchestrator.datasets.images import ImageSet, fetch
from orchestrator.families.asymmetric.teacher_side import check_classifier
from orchestrator.families.face import data, verify
from orchestrator.families.face.batches import FaceRequests, LoadFaces
from orchestrator.families.face.pictures import pictures
from orchestrator.families.face.public_teacher import is_public, make_public_teacher, public_teacher_need
from orchestrator.families.face.recipe import (
    METRICS,
    DistillationRecipe,
    FaceRecipe,
    check,
    check_distillation,
    learning_rate,
    network_config,
    optimizer,
    scaled_schedule,
    teacher_dim,
)
from orchestrator.families.face.training import ALONE, Distillation, FaceTask, Sizes, build, trains_centres
from orchestrator.families.face.verify import Embedded
from orchestrator.families.retrieval.data import Source, decodes, make_embeddings, open_after, open_frames, shards
from orchestrator.families.retrieval.recipe import networks_precision
from orchestrator.families.retrieval.search import model_input
from orchestrator.families.retrieval.supervised import loop_settings
from orchestrator.families.retrieval.teacher import ready_file, teacher_need, trainer_s_recipe
from orchestrator.method import Batch, Evaluation, Experiment, Method, Task, Where
from orchestrator.needs import Need, Place, Prepared, Ready, Report
from orchestrator.pictures import Picture

TRAINER = "margin_softmax"  # the method that trains teachers
_BLOCK = 256  # images of one forward pass of the teacher


class FaceMethod(Method):
    """A method of this family.

    Args:
        paper: what is re-implemented.
        recipes: benchmark -> recipe.
        distillation: the terms; without one there is no teacher.
        distils: whether a recipe looks at the teacher: it may be the student alone.
    """

    family = "face"
    metrics = METRICS

    def __init__(
        self, paper: str, recipes: Mapping[str, FaceRecipe], distillation: Distillation = ALONE,
        distils: Callable[[Any], bool] | None = None,
    ) -> None:  # fmt: skip
        self.paper, self.recipes, self.distillation = paper, recipes, distillation
        self.distils = distils or (lambda recipe: distillation is not ALONE)

    def check(self, recipe: Any, workers: int = 1) -> None:
        """Raises ValueError for values that are allowed alone but not together."""
        method = self.distillation
        if self.distils(recipe):
            check_distillation(recipe, workers)
            _check_centres(recipe, method, workers)
        else:
            check(recipe, workers)
        find.dataset(recipe.data.name)
        data.parts_of(recipe.verify)
        method.check(recipe)
        if not getattr(recipe, "cls", 1.0) and not any(method.weights(recipe).values()):
            raise ValueError("nothing to train on: every loss weight is 0; set cls or one of the others above 0")

    def needs(self, recipe: Any, place: Place, purpose: Literal["train", "score"] = "train") -> dict[str, Need]:
        searched = data.verification_needs(recipe, place)
        distils, sets = self.distils(recipe), data.set_names(searched)
        if purpose == "score" and not distils:
            return searched
        train = data.train_needs(recipe, place)
        own = [name for name in sets if searched[name].made_from["data"]["name"] == recipe.data.name]
        teacher = self._teacher_needs(recipe, train[data.TRAIN]) if distils else {}
        # How near the student is to its teacher is told of the data set's own first pairs.
        first = next((name for name in own if f"{name} members" not in searched), None)
        if distils and first is not None:
            searched[f"{first} teacher"] = self._embeddings(recipe, searched | teacher, first)
        if purpose == "score":
            return searched
        _check_sizes(recipe, train[data.TRAIN], distils)
        found = {**searched, **teacher}
        if distils and recipe.targets == "cached":
            found["targets"] = self._embeddings(recipe, train | teacher, data.TRAIN)
        compared: dict[str, Any] = {"own": own} | ({"network": self.networks(recipe)[1]} if distils else {})
        after = searched | ({"teacher": teacher["teacher"]} if distils else {})
        how = {"size": list(recipe.student.size), "loader_workers": recipe.run.loader_workers}
        found["references"] = Need("references", compared, after, how, "scores to compare with", network=True)
        return found | train

    def _teacher_needs(self, recipe: DistillationRecipe, train: Need) -> dict[str, Need]:
        config = network_config(recipe.teacher.network, teacher_dim(recipe))
        if is_public(recipe.teacher):
            wants_centres = _wants_classifier(recipe, self.distillation)
            found = {"teacher": public_teacher_need(recipe.teacher, config, train, wants_centres)}
        else:
            benchmark, training = _teacher_training(recipe)
            found = {"teacher": teacher_need(recipe.teacher, TRAINER, benchmark, training, config, train)}
        if _wants_classifier(recipe, self.distillation):
            made_from = {"width": teacher_dim(recipe)}
            found["classifier"] = Need("classifier", made_from, {"teacher": found["teacher"], "train": train})
        return found

    def _embeddings(self, recipe: DistillationRecipe, found: Mapping[str, Need], role: str) -> Need:
        """A table of the teacher's embeddings of every image and its mirror image."""
        config = network_config(recipe.teacher.network, teacher_dim(recipe))
        transform = {"network": identity(config) | {"precision": "float32"}, "augmentation": "mirrored"}
        after = {"images": found[role], "teacher": found["teacher"]}
        after |= {"pixels": found[f"{role} pixels"]} if f"{role} pixels" in found else {}
        how = {"size": list(recipe.student.size), "loader_workers": recipe.run.loader_workers}
        title = f"teacher embeddings of {role}, both mirror images"
        return shards(Need("embeddings", {"transform": transform, "views": 2}, after, how, title, network=True))

    def make(self, need: Need, after: Mapping[str, Ready], where: Where, progress: Report) -> Ready:
        if need.kind == "teacher file":
            return ready_file(need, where.place)
        if need.kind == "public teacher":
            return make_public_teacher(need, where.place)
        if need.kind == "classifier":
            return check_classifier(need, after, where.place)
        if need.kind == "references":
            return _references(need, after, where, progress)
        if need.kind in ("embeddings", "embedding shard"):
            return _make_embeddings(need, after, where, progress)
        return data.make(need, after, where, progress)

    def experiment(self, recipe: Any, prepared: Prepared, where: Where) -> Experiment:
        size, method = recipe.student.size, self.distillation
        train, verified = data.open_images(where.place, prepared[data.TRAIN]), data.open_verification(prepared, size)
        theirs = _taught(prepared)
        teacher = targets = None
        if self.distils(recipe):
            cached = recipe.targets == "cached"
            targets = cache.open_rows(prepared.path("targets")) if cached else None
            teacher = None if cached else checkpoint.load_model(prepared.path("teacher"))[0]
        centres = checkpoint.load_classifier(prepared.path("classifier")) if "classifier" in prepared else None
        frames, requests = open_frames(prepared, f"{data.TRAIN} pixels", train, size), FaceRequests.of(recipe, train)
        sizes = Sizes(train.num_identities, requests.steps * recipe.train.epochs)
        own = method if self.distils(recipe) else ALONE
        task = FaceTask(recipe, own, build(recipe), sizes, teacher, centres).to(where.device)
        frames, targets = tables.placed(recipe.run.pixel_cache, where, frames, targets, label=train.labels)
        load = LoadFaces(frames, train, targets)
        workers = recipe.run.loader_workers if decodes(frames) else 0

        def batches(epoch: int) -> Iterator[Batch]:
            return fetch(load, requests(epoch, where.rank, where.world), workers)

        return Experiment(
            task=task,
            optimizer=optimizer(recipe.train, task),
            rate=lambda progress: learning_rate(recipe.train, progress, requests.steps),
            batches=batches,
            evaluate=lambda task: _score(recipe, verified, theirs, task, where),
            steps_per_epoch=requests.steps,
            precision=networks_precision(recipe.train, where.device),
            items_per_step=requests.images_per_step,
            **loop_settings(recipe),
        )

    def score(self, student: nn.Module, recipe: Any, prepared: Prepared, where: Where) -> Evaluation:
        verified = data.open_verification(prepared, recipe.student.size)
        student, workers = student.to(where.device), recipe.run.loader_workers
        return verify.evaluate(student, verified, where.device, workers, _taught(prepared))

    def pictures(
        self, student: nn.Module, recipe: Any, prepared: Prepared, evaluation: Evaluation, where: Where
    ) -> dict[str, Picture]:
        """Curves, scores of both kinds of pairs, cosines to the teacher; hardest pairs where faces may be shown."""
        verified = data.open_verification(prepared, recipe.student.size)
        too = data.parts_of(recipe.verify)
        faces_of = {"none": [], "own": [s for s in verified.sets if s not in too], "all": list(verified.sets)}
        return pictures(verified, evaluation.found, _taught(prepared), faces_of[recipe.show_faces])

    def networks(self, recipe: Any) -> tuple[str, str]:
        own = recipe.student
        theirs = recipe.teacher.network if self.distils(recipe) else None
        return named(own.name, own.size), published.NO_TEACHER if theirs is None else named(theirs.name, theirs.size)

    def after_training(self, recipe: Any) -> frozenset[str]:
        return frozenset({"verify", "show_faces"})


def named(name: str, size: tuple[int, int]) -> str:
    """As printed tables name a network.

    >>> named("mobilefacenet_x2", (112, 112)), named("iresnet50", (112, 112))
    ('MobileFaceNet-x2@112', 'IResNet50@112')
    """
    plain = name.replace("mobilefacenet", "MobileFaceNet").replace("iresnet", "IResNet").replace("_", "-")
    own = name.startswith(("mobilefacenet", "iresnet"))
    return published.network(plain if own else name, size)


def _wants_classifier(recipe: DistillationRecipe, method: Distillation) -> bool:
    return method.logits(recipe) or (recipe.centres == "teacher" and recipe.cls > 0)


def _check_sizes(recipe: FaceRecipe, train: Need, distils: bool) -> None:
    """Raises ValueError where a batch asks for more images or people than there are."""
    images, people = train.how["images"], train.how["identities"]
    batches = {"batch_size": recipe.batch_size}
    if distils and not recipe.teacher.weights:
        batches["teacher.batch_size"] = recipe.teacher.batch_size
    for name, size in batches.items():
        if size > images:
            asked = f"; data.fraction is {recipe.data.fraction:g}" if recipe.data.fraction < 1 else ""
            raise ValueError(f"{name} ({size}) is more than the {images:,} training images{asked}; lower it")
    if max(recipe.balanced.identities, 2) > people:
        raise ValueError(
            f"{recipe.data.name} has {people} training identities, asked for are "
            f"{max(recipe.balanced.identities, 2)}: balanced.identities, or two to tell apart"
        )


def _check_centres(recipe: DistillationRecipe, method: Distillation, workers: int) -> None:
    same = teacher_dim(recipe) == recipe.embedding_dim
    if recipe.centres == "teacher" and not same:
        raise ValueError(
            f"centres=teacher needs embeddings as wide as the teacher's {teacher_dim(recipe)}, embedding_dim is "
            f"{recipe.embedding_dim}; set both"
        )
    if recipe.head.sample < 1 and (not trains_centres(recipe, method) or method.logits(recipe)):
        raise ValueError(
            f"head.sample={recipe.head.sample:g} takes a sample of trained class centres; this method looks at all of "
            f"them, or at the teacher's; set it to 1"
        )


def _teacher_training(recipe: DistillationRecipe) -> tuple[str, FaceRecipe]:
    """How the teacher is trained: the benchmark's own recipe with the teacher's network, no field of the student."""
    benchmark, base = trainer_s_recipe(TRAINER, recipe.data.name)
    own = recipe.teacher
    return benchmark, replace(
        base, data=recipe.data, run=recipe.run, student=own.network, embedding_dim=teacher_dim(recipe),
        batch_size=own.batch_size,
        train=replace(
            scaled_schedule(base.train, own.train.epochs), optimizer=own.train.optimizer, rate=own.train.rate,
            seed=own.train.seed, precision=recipe.train.precision,
        ),
    )  # fmt: skip


def _score(
    recipe: FaceRecipe, verified: data.Verified, theirs: Mapping[str, Embedded], task: Task, where: Where
) -> Evaluation:
    return verify.evaluate(task.student, verified, where.device, recipe.run.loader_workers, theirs)


def _taught(prepared: Prepared) -> dict[str, Embedded]:
    """The teacher's embeddings of verification sets, where they are prepared."""
    roles = {role.removesuffix(" teacher"): role for role in prepared if role.endswith(" teacher")}
    return {name: _both(cache.open_rows(prepared.path(role))) for name, role in roles.items()}


def _both(rows: cache.Rows) -> Embedded:
    views_ND = rows(np.arange(len(rows)))
    return Embedded(views_ND[0::2], views_ND[1::2])


@dataclass(frozen=True)
class _EmbedBoth:
    """Row numbers (2 · image + mirrored) -> embeddings, a block at a time."""

    teacher: nn.Module
    source: Source
    device: torch.device

    @torch.inference_mode()
    def __call__(self, rows: np.ndarray) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(rows), _BLOCK):
            block = rows[start : start + _BLOCK]
            images, place = np.unique(block // 2, return_inverse=True)  # decoded once for both
            images_BCHW = model_input(self.teacher, self.source(images), self.device)[place]
            is_mirrored_B = torch.from_numpy(block % 2 == 1).to(self.device)
            images_BCHW[is_mirrored_B] = images_BCHW[is_mirrored_B].flip(3)
            yield {"value": self.teacher(images_BCHW).float()}


def _make_embeddings(need: Need, after: Mapping[str, Ready], where: Where, progress: Report) -> Ready:
    def embedder(images: ImageSet) -> _EmbedBoth:
        teacher = checkpoint.load_model(where.place.folder(after["teacher"].path))[0].to(where.device)
        source = open_after(where.place, after, tuple(need.how["size"]))
        return _EmbedBoth(teacher, source, where.device)

    return make_embeddings(need, after, need.made_from["transform"], where.place, embedder, progress)


def _references(need: Need, after: Mapping[str, Ready], where: Where, progress: Report) -> Ready:
    """What a student is compared with: its teacher, and chance."""
    prepared = Prepared(where.place, after)
    verified = data.open_verification(prepared, tuple(need.how["size"]))
    too = [f"{name}: {verified.sets[name].protocol}" for name in verified.sets if name not in need.made_from["own"]]
    notices = dict.fromkeys(after[name].told["notice"] for name in verified.sets)
    told: dict[str, Any] = {
        "chance_metrics": verify.by_chance(verified.sets),
        "rule": f"verified too: {'; '.join(too)}" if too else "",
        "notice": "; ".join(notice for notice in notices if notice),
    }
    if "teacher" in after:
        teacher = checkpoint.load_model(prepared.path("teacher"))[0].to(where.device)
        found = verify.evaluate(teacher, verified, where.device, need.how["loader_workers"])
        told["teacher_metrics"], told["teacher"] = dict(found.metrics), need.made_from["network"]
    progress("scores to compare with", 1, 1)
    return Ready(need.key, need.kind, "", "", told)
