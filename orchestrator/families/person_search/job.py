"""What must be ready for a person search, how it is trained and scored."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from losses.oim import OIM
from models.person_search import PersonSearch
from orchestrator import checkpoint, find, published
from orchestrator.datasets.images import fetch
from orchestrator.families.person_search import data, search
from orchestrator.families.person_search.batches import LoadScenes, SceneRequests
from orchestrator.families.person_search.pictures import pictures
from orchestrator.families.person_search.recipe import (
    METRICS,
    SearchRecipe,
    learning_rate,
    network_config,
)
from orchestrator.families.person_search.training import build, check_network, memory
from orchestrator.families.retrieval.recipe import networks_precision, optimizer
from orchestrator.families.retrieval.supervised import loop_settings
from orchestrator.families.retrieval.teacher import ready_file, teacher_need, trainer_s_recipe
from orchestrator.method import Batch, Evaluation, Experiment, Method, Task, Where
from orchestrator.needs import Need, Place, Prepared, Ready, Report
from orchestrator.pictures import Picture
from orchestrator.recipe import Network, changed, check_cached_on_host, flat

MakeTask = Callable[[Any, PersonSearch, PersonSearch | None, OIM | None], Task]  # recipe, student, teacher, its memory


class PersonSearchMethod(Method):
    """A method of this family.

    Args:
        paper: what is re-implemented.
        recipes: benchmark -> recipe.
        task: of a recipe, a student, a teacher or None, and the teacher's memory or None.
        alone: recipe settings without which there is a teacher: a teacher is trained with them.
        wants_memory: whether a recipe looks at the teacher's memory of identities.
        trainer: method by whose recipes a teacher is trained; it has the fields of ``alone``.
        check_losses: raises ValueError for values of the paper's own that do not go together.
    """

    family = "person_search"
    metrics = METRICS

    def __init__(
        self, paper: str, recipes: Mapping[str, SearchRecipe], task: MakeTask, alone: Mapping[str, Any],
        wants_memory: Callable[[Any], bool], trainer: str, check_losses: Callable[[Any], None],
    ) -> None:  # fmt: skip
        self.paper, self.recipes, self.task = paper, recipes, task
        self.alone, self.wants_memory, self.trainer, self.check_losses = alone, wants_memory, trainer, check_losses

    def distils(self, recipe: Any) -> bool:
        """Whether there is a teacher."""
        return any(getattr(recipe, name) != value for name, value in self.alone.items())

    def check(self, recipe: Any, workers: int = 1) -> None:
        """Raises ValueError for values that are allowed alone but not together."""
        check_scenes(recipe, workers)
        if not int(recipe.detector.sampling.boxes * recipe.detector.sampling.box_share):
            sampled = recipe.detector.sampled_boxes
            raise ValueError(f"sampled_boxes is {sampled}, and a quarter of them may be people: none; take 4 or more")
        check_network("student", recipe.student, recipe)
        if self.distils(recipe):
            if recipe.teacher.network.size != recipe.student.size:
                raise ValueError(
                    f"teacher.size {recipe.teacher.network.size} is not student.size {recipe.student.size}: "
                    f"the teacher looks at the student's images and boxes; set both"
                )
            check_network("teacher.network", recipe.teacher.network, recipe, starts=not recipe.teacher.weights)
        self.check_losses(recipe)

    def needs(self, recipe: Any, place: Place, purpose: Literal["train", "score"] = "train") -> dict[str, Need]:
        sides = ("gallery",) if purpose == "score" else data.SIDES
        found = data.side_needs(recipe.data, recipe.run, recipe.student.size, place, *sides)
        if purpose == "score":
            return found
        data.check_identities(found["train scenes"], "which the memory of identities learns")
        asked = {"batch.scenes": recipe.batch.scenes} | (
            {"teacher.scenes": recipe.teacher.scenes} if self.distils(recipe) else {}
        )
        for name, scenes in asked.items():
            if scenes > found["train"].how["images"]:
                frames = found["train"].how["images"]
                raise ValueError(f"{name} ({scenes}) is more than the {frames:,} training frames; lower it")
        searched = {role: need for role, need in found.items() if role.startswith("gallery")}
        compared: dict[str, Any] = {"search": flat(recipe.search)}
        if self.distils(recipe):
            benchmark, training = self._teacher_training(recipe)
            config, scenes = network_config(recipe, recipe.teacher.network), {"scenes": found["train scenes"]}
            found["teacher"] = teacher_need(
                recipe.teacher, self.trainer, benchmark, training, config, found["train"], scenes
            )
            searched["teacher"] = found["teacher"]
            compared["network"] = self.networks(recipe)[1]
            if self.wants_memory(recipe):
                found["memory"] = Need(
                    "memory",
                    {"queue": recipe.memory.queue},
                    {"teacher": found["teacher"], **scenes},
                    title="teacher's memory",
                )
        found["references"] = Need(
            "references", compared, searched, {"size": list(recipe.student.size)}, "scores to compare with",
            network=True,
        )  # fmt: skip
        return found

    def _teacher_training(self, recipe: Any) -> tuple[str, Any]:
        """How the teacher is trained: the benchmark's own recipe without distillation, no field of the student."""
        benchmark, base = trainer_s_recipe(self.trainer, recipe.data.name)
        own = recipe.teacher
        training = replace(
            base, data=recipe.data, run=recipe.run, detector=recipe.detector, memory=recipe.memory,
            student=own.network, batch=replace(base.batch, scenes=own.scenes), search=recipe.search,
            train=replace(
                base.train, optimizer=own.train.optimizer, rate=own.train.rate, epochs=own.train.epochs,
                seed=own.train.seed, precision=recipe.train.precision,
            ),
        )  # fmt: skip
        return benchmark, changed(training, self.alone)

    def make(self, need: Need, after: Mapping[str, Ready], where: Where, progress: Report) -> Ready:
        if need.kind == "teacher file":
            return ready_file(need, where.place)
        if need.kind == "memory":
            return _check_memory(need, after, where.place)
        if need.kind == "references":
            return references(need, after, where, progress)
        return data.make(need, after, where.place, progress)

    def experiment(self, recipe: Any, prepared: Prepared, where: Where) -> Experiment:
        size = recipe.student.size
        frames, searched = data.open_frames(prepared, "train", size), data.open_gallery(prepared, size)
        scenes = data.open_scenes(prepared, "train", frames.images)
        student = build(recipe, scenes.num_identities)
        teacher = teachers = None
        if self.distils(recipe):
            teacher, _ = checkpoint.load_model(prepared.path("teacher"))
        if "memory" in prepared:
            teachers = memory(recipe.memory, recipe.detector.dim, scenes.num_identities)
            teachers.load_state_dict(_stored_memory(prepared.path("teacher")))
        task = self.task(recipe, student, teacher, teachers).to(where.device)
        load, requests = LoadScenes(frames, scenes), SceneRequests(frames.sizes(), recipe.batch, recipe.train.seed)
        workers = recipe.run.loader_workers if frames.decodes else 0

        def batches(epoch: int) -> Iterator[Batch]:
            return fetch(load, requests(epoch, where.rank, where.world), workers)

        return Experiment(
            task=task,
            optimizer=optimizer(recipe.train, task),
            rate=lambda progress: learning_rate(recipe.train, progress, requests.steps),
            batches=batches,
            evaluate=lambda task: _score(recipe, searched, task.student, where),
            steps_per_epoch=requests.steps,
            precision=networks_precision(recipe.train, where.device),
            items_per_step=recipe.batch.scenes,
            **loop_settings(recipe),
        )

    def score(self, student: PersonSearch, recipe: Any, prepared: Prepared, where: Where) -> Evaluation:
        searched = data.open_gallery(prepared, recipe.student.size)
        return _score(recipe, searched, student.to(where.device), where)

    def pictures(
        self, student: PersonSearch, recipe: Any, prepared: Prepared, evaluation: Evaluation, where: Where
    ) -> dict[str, Picture]:
        """Queries with their best match, what the network attends to, and mAP over the gallery's size."""
        searched = data.open_gallery(prepared, recipe.student.size)
        return pictures(student.to(where.device), searched, evaluation, recipe.search, where.device)

    def networks(self, recipe: Any) -> tuple[str, str]:
        return named(recipe.student), named(recipe.teacher.network) if self.distils(recipe) else published.NO_TEACHER

    def after_training(self, recipe: Any) -> frozenset[str]:
        """What is a detection, and who is searched how, is decided when a network is used."""
        of_search = {f"search.{name}" for name in flat(recipe.search)}
        return frozenset(of_search | {f"detector.{name}" for name in ("score", "overlap", "detections", "proposals")})


def check_scenes(recipe: Any, workers: int) -> None:
    """Raises ValueError for data or batches that no training on scenes can have."""
    for name in data.parts_of(recipe.data.name):
        find.dataset(name)
    check_cached_on_host(recipe.run, "frames and their boxes are put together on the host")
    if recipe.run.compile:
        raise ValueError("run.compile=true: how many people a scene has is known only in its step; use false")
    if recipe.data.skip_unreadable:
        raise ValueError("skip_unreadable: a frame that is left out may hold somebody who is searched; repair it")
    if recipe.batch.scenes % workers:
        raise ValueError(f"a batch of {recipe.batch.scenes} images cannot be shared evenly by {workers} workers")


def named(network: Network) -> str:
    """As printed tables name it."""
    plain, _, pixels = published.network(network.name, network.size).partition("@")
    return f"{plain}{f' ×{network.width:g}' if network.width != 1 else ''}@{pixels}"


def _score(recipe: SearchRecipe, searched: data.Searched, student: PersonSearch, where: Where) -> Evaluation:
    found = search.embedded(student, searched, where.device, recipe.run.loader_workers)
    return search.scored(found, searched, recipe.search)


def _stored_memory(path: str) -> dict[str, Tensor]:
    stored = checkpoint.load_extras(path)
    return {name.removeprefix("memory."): value for name, value in stored.items() if name.startswith("memory.")}


def _check_memory(need: Need, after: Mapping[str, Ready], place: Place) -> Ready:
    """Raises ValueError where the teacher has no memory, or one of other identities or another queue."""
    path = place.folder(after["teacher"].path)
    stored = _stored_memory(path)
    identities = after["scenes"].told["train_identities"]
    if "table_KD" not in stored:
        raise ValueError(
            f"{path} has no memory of identities beside it (….memory.safetensors), by which boxes are ranked; "
            f"set cd_score=constant, or train the teacher here"
        )
    queue = need.made_from["queue"]
    if len(stored["queue_QD"]) != queue:
        raise ValueError(
            f"the memory of {path} has a queue of {len(stored['queue_QD'])}, the recipe one of {queue}; "
            f"set memory.queue"
        )
    if len(stored["table_KD"]) != identities:
        raise ValueError(
            f"the memory of {path} is of {len(stored['table_KD'])} identities, the training set has {identities}; "
            f"is it the teacher of these data?"
        )
    return Ready(need.key, need.kind, "", "", {})


def references(need: Need, after: Mapping[str, Ready], where: Where, progress: Report) -> Ready:
    """What a student is compared with: its teacher, and chance."""
    from orchestrator.families.person_search.recipe import Search

    prepared, own = Prepared(where.place, after), Search(**need.made_from["search"])
    searched = data.open_gallery(prepared, tuple(need.how["size"]))
    told: dict[str, Any] = {"chance_metrics": search.by_chance(searched, own)}
    if "teacher" in after:
        teacher, _ = checkpoint.load_model(prepared.path("teacher"))
        found = search.embedded(teacher.to(where.device), searched, where.device)
        told["teacher_metrics"] = dict(search.scored(found, searched, own).metrics)
        told["teacher"] = need.made_from["network"]
    progress("scores to compare with", 1, 1)
    return Ready(need.key, need.kind, "", "", told)
