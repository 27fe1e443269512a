"""What must be ready for a person search trained on boxes alone, how it is trained and scored."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from models.siamese_search import SiameseSearch
from orchestrator import published
from orchestrator.datasets.images import fetch
from orchestrator.families.person_search import data, search
from orchestrator.families.person_search.batches import LoadScenes, SceneRequests
from orchestrator.families.person_search.job import check_scenes, named, references
from orchestrator.families.person_search.recipe import METRICS
from orchestrator.families.retrieval.recipe import networks_precision, optimizer
from orchestrator.families.retrieval.supervised import loop_settings
from orchestrator.families.weak_search.batches import LoadPeople, PeopleRequests
from orchestrator.families.weak_search.clustering import Path, TrainingPeople
from orchestrator.families.weak_search.crops import crops_need, inside, make_crops, open_crops
from orchestrator.families.weak_search.pictures import Found, pictures
from orchestrator.families.weak_search.recipe import WeakSearchRecipe, learning_rate
from orchestrator.families.weak_search.training import build, check_network
from orchestrator.method import Batch, Evaluation, Experiment, Method, Metric, Task, Where
from orchestrator.needs import Need, Place, Prepared, Ready, Report
from orchestrator.pictures import Picture
from orchestrator.recipe import flat

MakeTask = Callable[[Any, SiameseSearch, int, int], Task]  # recipe, student, training people, identities
StartEpoch = Callable[[Task, TrainingPeople, Where, int], Mapping[str, float]]


class WeakSearchMethod(Method):
    """A method of this family.

    Args:
        paper: what is re-implemented.
        recipes: benchmark -> recipe.
        task: of a recipe, a student, and how many people and identities are trained on.
        path: by which path a recipe embeds people.
        start_epoch: of a recipe the work before each epoch, or None.
        check_losses: raises ValueError for values of the paper's own that do not go together.
        looks_at_identities: whether a recipe is the supervised reference.
    """

    family = "weak_search"
    metrics: tuple[Metric, ...] = METRICS

    def __init__(
        self, paper: str, recipes: Mapping[str, WeakSearchRecipe], task: MakeTask, path: Callable[[Any], Path],
        start_epoch: Callable[[Any], StartEpoch | None], check_losses: Callable[[Any], None],
        looks_at_identities: Callable[[Any], bool],
    ) -> None:  # fmt: skip
        self.paper, self.recipes, self.task, self.path = paper, recipes, task, path
        self.looks_at_identities = looks_at_identities
        self.start_epoch, self.check_losses = start_epoch, check_losses

    def check(self, recipe: Any, workers: int = 1) -> None:
        """Raises ValueError for values that are allowed alone but not together."""
        check_scenes(recipe, workers)
        check_network(recipe)
        self.check_losses(recipe)

    def needs(self, recipe: Any, place: Place, purpose: Literal["train", "score"] = "train") -> dict[str, Need]:
        sides = ("gallery",) if purpose == "score" else data.SIDES
        found = data.side_needs(recipe.data, recipe.run, recipe.student.size, place, *sides)
        if purpose == "score":
            return found
        frames, people = found["train"].how["images"], found["train scenes"].how["people"]
        if recipe.batch.scenes > frames:
            asked = f"; data.fraction is {recipe.data.fraction:g}" if recipe.data.fraction < 1 else ""
            raise ValueError(
                f"batch.scenes ({recipe.batch.scenes}) is more than the {frames:,} training frames{asked}, so an epoch "
                f"would be empty; lower it" + (" or take a larger fraction" if asked else "")
            )
        if people < 2:
            raise ValueError(f"{recipe.data.name} has {people} boxes in its training frames; people are told apart "
                             f"from each other, so two are needed")  # fmt: skip
        if self.looks_at_identities(recipe):
            data.check_identities(found["train scenes"], "which the supervised reference learns")
        if self.path(recipe) != "scene":
            found["crops"] = crops_need(recipe.student.crop, found, recipe.run.loader_workers)
        searched = {role: need for role, need in found.items() if role.startswith("gallery")}
        found["references"] = Need(
            "references", {"search": flat(recipe.search)}, searched, {"size": list(recipe.student.size)},
            "scores to compare with",
        )  # fmt: skip
        return found

    def make(self, need: Need, after: Mapping[str, Ready], where: Where, progress: Report) -> Ready:
        if need.kind == "crops":
            return make_crops(need, after, where.place, progress)
        if need.kind == "references":
            return references(need, after, where, progress)
        return data.make(need, after, where.place, progress)

    def experiment(self, recipe: Any, prepared: Prepared, where: Where) -> Experiment:
        searched = data.open_gallery(prepared, recipe.student.size)
        people = training_people(recipe, prepared)
        task = self.task(recipe, build(recipe), len(people), people.scenes.num_identities).to(where.device)
        scenes = SceneRequests(people.frames.sizes(), recipe.batch, recipe.train.seed)
        requests = PeopleRequests(scenes, people.usable_of_frames())
        load = LoadPeople(LoadScenes(people.frames, people.scenes), people.crops, people.usable_N)
        workers = recipe.run.loader_workers if people.frames.decodes else 0
        start = self.start_epoch(recipe)

        def batches(epoch: int) -> Iterator[Batch]:
            return fetch(load, requests(epoch, where.rank, where.world), workers)

        return Experiment(
            task=task,
            optimizer=optimizer(recipe.train, task),
            rate=lambda progress: learning_rate(recipe.train, progress),
            batches=batches,
            evaluate=lambda task: _with_clusters(_score(recipe, searched, task.student, where), task),
            start_epoch=None if start is None else lambda task, epoch: start(task, people, where, epoch),
            steps_per_epoch=scenes.steps,
            precision=networks_precision(recipe.train, where.device),
            items_per_step=recipe.batch.scenes,
            unused_parameters=True,  # a rank's scenes may hold nobody, and a term may be switched off
            **loop_settings(recipe),
        )

    def score(self, student: SiameseSearch, recipe: Any, prepared: Prepared, where: Where) -> Evaluation:
        searched = data.open_gallery(prepared, recipe.student.size)
        return _score(recipe, searched, student.to(where.device), where)

    def pictures(
        self, student: SiameseSearch, recipe: Any, prepared: Prepared, evaluation: Evaluation, where: Where
    ) -> dict[str, Picture]:
        """Queries with their best match, clusters of training people and over epochs, mAP over the gallery's size."""
        searched = data.open_gallery(prepared, recipe.student.size)
        people = training_people(recipe, prepared) if "train" in prepared else None
        return pictures(student.to(where.device), searched, evaluation, recipe, people, self.path(recipe), where.device)

    def networks(self, recipe: Any) -> tuple[str, str]:
        return named(recipe.student), published.NO_TEACHER

    def after_training(self, recipe: Any) -> frozenset[str]:
        """What is a detection, and who is searched how, is decided when a network is used."""
        groups = {"search": recipe.search, "detection": recipe.detection}
        fields = {f"{group}.{name}" for group, own in groups.items() for name in flat(own)}
        return frozenset(fields | {"student.search_by"})


def training_people(recipe: Any, prepared: Prepared) -> TrainingPeople:
    frames = data.open_frames(prepared, "train", recipe.student.size)
    crops = open_crops(prepared) if "crops" in prepared else None
    scenes = data.open_scenes(prepared, "train", frames.images)
    # Both paths and the detector see the part of a box that is in its frame, as its crop is.
    size_N2 = np.repeat(frames.table.all("size")[:, :2], scenes.count_F, axis=0)
    return TrainingPeople(frames, replace(scenes, box_N4=inside(scenes.box_N4, size_N2)), crops)


def _score(recipe: Any, searched: data.Searched, student: SiameseSearch, where: Where) -> Evaluation:
    found = search.embedded(student, searched, where.device, recipe.run.loader_workers)
    scored = search.scored(found, searched, recipe.search)
    return replace(scored, found=Found(scored.found))


def _with_clusters(scored: Evaluation, task: Task) -> Evaluation:
    """What was found, and what was told of every epoch's clusters, for the pictures."""
    return replace(scored, found=replace(scored.found, clusters_E5=task.clusters_E5.cpu().numpy()))
