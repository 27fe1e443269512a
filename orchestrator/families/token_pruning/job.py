"""What must be ready for a token-pruning network, how it is trained and scored."""

# Shape legend: B = images of one block, D = width of the class token, Q and G = queries and gallery.

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from models.network import identity
from models.token_pruning import PrunedViT
from orchestrator import cache, checkpoint, find, published
from orchestrator.datasets import occlusion
from orchestrator.datasets.images import ImageSet, check_labels, fetch
from orchestrator.datasets.occlusion import Occluders
from orchestrator.families.retrieval import data, search
from orchestrator.families.retrieval.recipe import METRICS, networks_precision
from orchestrator.families.retrieval.supervised import loop_settings
from orchestrator.families.retrieval.teacher import ready_file, teacher_need
from orchestrator.families.token_pruning.networks import (
    check_batch,
    check_networks,
    student_config,
    teacher_config,
    teacher_training,
)
from orchestrator.families.token_pruning.opened import SIDES, Opened, camera_index, inputs, known_cameras, open_all
from orchestrator.families.token_pruning.pictures import pictures
from orchestrator.families.token_pruning.recipe import PruningRecipe, check_losses, check_selection
from orchestrator.families.token_pruning.views import LoadViews, requests
from orchestrator.method import Batch, Evaluation, Experiment, Method, Progress, Task, Where
from orchestrator.needs import Need, Place, Prepared, Ready, Report
from orchestrator.pictures import Picture
from orchestrator.recipe import check_cached_on_host, flat, recipe_from

_BLOCK = 256  # images of one forward pass of the teacher
MakeTask = Callable[[Any, PrunedViT, PrunedViT | None], Task]  # recipe, student, teacher


class TokenPruning(Method):
    """A method of this family: a paper, its recipes, and its task."""

    family = "token_pruning"
    metrics = METRICS

    def __init__(self, paper: str, recipes: Mapping[str, PruningRecipe], task: MakeTask):
        self.paper, self.recipes, self.task = paper, recipes, task

    def check(self, recipe: PruningRecipe, workers: int = 1) -> None:
        """Raises ValueError for values that are allowed alone but not together."""
        find.dataset(recipe.data.name)
        check_cached_on_host(recipe.run, "people are occluded on the host, beside the training")
        check_batch(recipe, workers)
        check_losses(recipe)
        check_selection(recipe)
        check_networks(recipe)

    def needs(self, recipe: PruningRecipe, place: Place, purpose: Literal["train", "score"] = "train") -> dict:
        listed = data.listed(recipe.data, place)
        _check_people(recipe, listed.train)
        if recipe.patches.camera_weight:
            for images in listed.sets().values():
                camera_index(listed.train, images)
        sides = data.index_needs(recipe.data, place)
        used = sides
        if purpose == "score" and not recipe.patches.camera_weight:
            used = {side: need for side, need in sides.items() if side != "train"}
        found = dict(used)
        pixels = {
            side: need
            for side, index in used.items()
            for need in data.pixel_need(recipe.run, index, recipe.student.size, "bicubic").values()
        }
        found |= {f"{side} pixels": need for side, need in pixels.items()}
        if purpose == "score":
            return found
        if recipe.noda:
            found["occluders"] = _occluder_need(recipe, sides["train"])
        searched = {"query": sides["query"], "gallery": sides.get("gallery", sides["query"])}
        references: dict[str, Any] = {"ap": recipe.ap}
        if recipe.npkd:
            cameras = len(known_cameras(listed.train))
            found |= self._teacher_needs(recipe, sides, pixels, cameras)
            searched |= {f"{s} embeddings": found[f"{s} embeddings"] for s in ("query", "gallery")}
            searched["teacher"] = found["teacher"]
            references |= {"network": self.networks(recipe)[1], "view": recipe.teacher_view}
        found["references"] = Need("references", references, searched, title="scores to compare with")
        return found

    def _teacher_needs(
        self, recipe: PruningRecipe, sides: Mapping[str, Need], pixels: Mapping[str, Need], cameras: int
    ) -> dict[str, Need]:
        benchmark, training = teacher_training(recipe)
        config, train = teacher_config(recipe, cameras), sides["train"]
        more = {}
        if training.noda and training.views.occluders == "folder":
            more["occluders"] = _occluder_need(training, train)
        teacher = teacher_need(recipe.teacher, "sureid", benchmark, training, config, train, more)
        found = {"teacher": teacher}
        made_from = {"required": recipe.logit_weight > 0}
        found["classifier"] = Need("classifier", made_from, {"teacher": teacher, "train": train})
        transform = {
            "network": identity(config), "augmentation": "none", "resize": "bicubic", "output": "class token",
        }  # fmt: skip
        taught = [*(["train"] if recipe.teacher_view == "clean" else []), "query", "gallery"]
        for side in taught:
            index = sides.get(side, sides["query"])
            after = {"images": index, "teacher": teacher}
            if side in pixels or side not in sides:
                after |= {"pixels": pixels.get(side, pixels.get("query"))} if pixels else {}
            if recipe.patches.camera_weight:
                after["train"] = train
            found[f"{side} embeddings"] = data.shards(
                Need(
                    "embeddings", {"transform": transform, "cameras": recipe.patches.camera_weight > 0, "views": 1},
                    after, {"recipe": flat(recipe)}, f"teacher class tokens of {index.made_from['side']}", network=True,
                )
            )  # fmt: skip
        return found

    def make(self, need: Need, after: Mapping[str, Ready], where: Where, progress: Report) -> Ready:
        place = where.place
        if need.kind in ("index", "pixels"):
            return data.make(need, after, where, progress)
        if need.kind == "teacher file":
            return ready_file(need, place)
        if need.kind == "classifier":
            return _check_classifier(need, after, place)
        if need.kind == "occluders":
            return _make_occluders(need, after, place)
        if need.kind == "references":
            return _references(need, after, where)
        return self._make_embeddings(need, after, where, progress)

    def _make_embeddings(self, need: Need, after: Mapping[str, Ready], where: Where, progress: Report) -> Ready:
        place, cameras = where.place, {}
        recipe = recipe_from(self.recipes["demo"], need.how["recipe"])
        transform = dict(need.made_from["transform"])
        if need.made_from["cameras"]:
            train = data.open_images(place, after["train"])
            transform["cameras"] = known_cameras(train).tolist()
            cameras = {"images": camera_index(train, data.open_images(place, after["images"]))}

        def embedder(images: ImageSet) -> _ClassTokens:
            teacher, _ = checkpoint.load_model(place.folder(after["teacher"].path))
            source = data.open_after(place, after, recipe.student.size, "bicubic")
            return _ClassTokens(
                teacher.to(where.device), Opened(None, {"images": source}, cameras=cameras), where.device
            )

        return data.make_embeddings(need, after, transform, place, embedder, progress)

    def experiment(self, recipe: PruningRecipe, prepared: Prepared, where: Where) -> Experiment:
        opened, seed = open_all(recipe, prepared), recipe.train.seed
        train = opened.data.train
        torch.manual_seed(seed)
        config = student_config(recipe, train.num_identities, len(known_cameras(train)))
        start = recipe.student
        student = PrunedViT(config, start.pretrained, start.weights, start.drop_path, recipe.patches.pos_resize)
        if student.classifier is not None:
            check_labels(train.labels, student.classifier.out_features)
        task = self.task(recipe, student, _open_teacher(prepared)).to(where.device)
        # Equal weights on all ranks, but not equal paths dropped.
        torch.manual_seed(int(np.random.SeedSequence((seed, where.rank, 4)).generate_state(1)[0]))
        load = LoadViews.of(recipe, opened, student.num_tokens, where.rank, where.world)
        workers = recipe.run.loader_workers

        def batches(epoch: int) -> Iterator[Batch]:
            return fetch(load, requests(recipe, train, epoch, where.rank, where.world), workers)

        return Experiment(
            task=task,
            optimizer=_optimizer(recipe, task),
            rate=lambda progress: learning_rate(recipe, progress),
            batches=batches,
            evaluate=lambda task: _score(recipe, opened, task.student, where.device),
            precision=networks_precision(recipe.train, where.device),
            items_per_step=recipe.labelled.images * recipe.num_views,
            **loop_settings(recipe),
        )

    def score(self, student: PrunedViT, recipe: PruningRecipe, prepared: Prepared, where: Where) -> Evaluation:
        return _score(recipe, open_all(recipe, prepared), student.to(where.device), where.device)

    def pictures(
        self, student: PrunedViT, recipe: PruningRecipe, prepared: Prepared, evaluation: Evaluation, where: Where
    ) -> dict[str, Picture]:
        """Retrieval panel, dropped tokens (figure 6), map of a few identities (figure 4), and the training views."""
        return pictures(recipe, open_all(recipe, prepared), student.to(where.device), evaluation.found, where.device)

    def networks(self, recipe: PruningRecipe) -> tuple[str, str]:
        size = recipe.student.size
        taught = published.network(recipe.teacher.network.name, size) if recipe.npkd else published.NO_TEACHER
        return published.network(recipe.student.name, size), taught

    def after_training(self, recipe: PruningRecipe) -> frozenset[str]:
        """The same weights may keep other tokens: predictors rank them whatever p they were trained with."""
        fields = {"ap"}
        if recipe.hts:
            names = ("keep_ratio", "rounding", "token_order", "selection", "inference")
            fields |= {f"pruning.{name}" for name in names}
            if recipe.pruning.selection == "random":
                fields |= {"pruning.selection_seed"}
        return frozenset(fields)


def learning_rate(recipe: PruningRecipe, progress: Progress) -> float:
    """Rate of a step: linear warm-up inside a cosine that ends at 0.002 of the rate (TransReID's code), by epoch.

    >>> recipe = find.recipe("sureid", "market1501")
    >>> [round(learning_rate(recipe, Progress(e, 0, 0.0)), 6) for e in (1, 5, 100, 200)]
    [0.001664, 0.007988, 0.004008, 1.6e-05]
    """
    train, epoch = recipe.train, progress.epoch
    base, least = train.rate, 0.002 * train.rate
    if epoch < train.warmup_epochs:
        return base * (0.01 + 0.99 * epoch / train.warmup_epochs)
    return least + (base - least) * (1 + math.cos(math.pi * epoch / train.epochs)) / 2


@dataclass(frozen=True)
class _ClassTokens:
    """Row numbers -> the teacher's class tokens, a block at a time."""

    network: PrunedViT
    opened: Opened
    device: torch.device

    @torch.inference_mode()
    def __call__(self, rows: np.ndarray) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(rows), _BLOCK):
            block = rows[start : start + _BLOCK]
            images_BCHW, camera_B = inputs(self.network, self.opened, "images", block, self.device)
            yield {"value": self.network.trained(images_BCHW, camera_B=camera_B).feature_BD.float()}


def _check_people(recipe: PruningRecipe, train: ImageSet) -> None:
    """Raises ValueError where the training set is too small, or has no cameras where the loss needs them."""
    if recipe.labelled.triplet_mining == "camera" and train.camera is None:
        raise ValueError(
            f"the camera-constrained triplet needs cameras, and {train.name} has none; "
            f"set triplet_mining (of the teacher: teacher.triplet) to plain"
        )
    asked = recipe.labelled.identities_per_batch
    data.check_identities("identities_per_batch", asked, train.num_identities, train.name)


def _occluder_need(recipe: PruningRecipe, train: Need) -> Need:
    own = recipe.views
    made_from: dict[str, Any] = {"source": own.occluders}
    how: dict[str, Any] = {}
    after = {}
    if own.occluders == "folder":
        files = occlusion.pictures_in(own.occluder_folder)
        made_from |= {"alpha": own.occluder_alpha, "files": occlusion.stamp(own.occluder_folder, files)}
        how["folder"] = own.occluder_folder
    else:
        made_from |= {"count": own.occluder_count, "seed": own.occluder_seed}
    if own.occluders == "train_crops":
        made_from["size"] = list(recipe.student.size)
        after["images"] = train
    return Need("occluders", made_from, after, how, f"occluders ({own.occluders})")


def _make_occluders(need: Need, after: Mapping[str, Ready], place: Place) -> Ready:
    asked = need.made_from
    if asked["source"] == "folder":
        found = occlusion.from_folder(need.how["folder"], asked["alpha"])
    elif asked["source"] == "train_crops":
        images = data.open_images(place, after["images"])
        found = occlusion.from_training(images, tuple(asked["size"]), asked["count"], asked["seed"])
    else:
        found = occlusion.procedural(asked["count"], asked["seed"])
    return _stored_occluders(need, found, place)


def _stored_occluders(need: Need, found: Occluders, place: Place) -> Ready:
    path = f"occluders/{found.fingerprint[:32]}"
    if not Path(place.folder(path)).exists():
        occlusion.save(place.folder(path), found)
    told = {"occluders": str(found), "occluders_fingerprint": found.fingerprint}
    return Ready(need.key, need.kind, path, found.fingerprint, told)


def _check_classifier(need: Need, after: Mapping[str, Ready], place: Place) -> Ready:
    """Raises ValueError when the teacher's classes are not those of the training set, or not known where needed."""
    path = Path(place.folder(after["teacher"].path))
    network, facts = checkpoint.load_model(path)
    train = data.open_images(place, after["train"])
    classes = data.classes_fingerprint(train)
    if facts.get("classes_fingerprint", classes) != classes:
        raise ValueError(f"the classes of {path} are not the identities of {train.name}")
    classifier = checkpoint.load_classifier(path)
    shape = (train.num_identities, network.backbone.embed_dim)
    fits = classifier is not None and tuple(classifier.weight.shape) == shape
    if need.made_from["required"] and not fits:
        stored = "missing" if classifier is None else f"{tuple(classifier.weight.shape)}"
        raise ValueError(
            f"the logit term needs the teacher's classifier, a matrix 'weight' {shape} in "
            f"{path.with_suffix('.classifier.safetensors').name} beside {path}; it is {stored}"
        )
    fingerprint = cache.weights_hash(classifier) if fits else ""
    return Ready(need.key, need.kind, after["teacher"].path, fingerprint)


def _references(need: Need, after: Mapping[str, Ready], where: Where) -> Ready:
    place, device = where.place, where.device
    found = data.open_data(Prepared(place, {role: after[role] for role in ("query", "gallery")}))
    ready = search.references(need, found, *search.chance_sides(found, device), None, {})
    if "teacher" not in after:
        return ready
    sides = [search.whole(cache.open_rows(place.folder(after[f"{s} embeddings"].path)), device) for s in SIDES[1:]]
    told = {
        **ready.told,
        "teacher": need.made_from["network"],
        "teacher_fingerprint": after["teacher"].fingerprint,
        "teacher_view": need.made_from["view"],
        "teacher_metrics": search.score(need.made_from["ap"], found, *sides).log("val"),
    }
    return Ready(need.key, need.kind, "", ready.fingerprint, told)


def _open_teacher(prepared: Prepared) -> PrunedViT | None:
    if "teacher" not in prepared:
        return None
    found, _ = checkpoint.load_model(prepared.path("teacher"))
    found.classifier = checkpoint.load_classifier(prepared.path("teacher"))
    return found


def _optimizer(recipe: PruningRecipe, task: Task) -> Optimizer:
    """Biases learn at a multiple of the rate; λ of eq. 8 does not decay. Rates are set by the training loop."""
    train = recipe.train
    groups: dict[tuple[float, int, float], list[nn.Parameter]] = {}
    for name, parameter in task.named_parameters():
        if parameter.requires_grad:
            backbone = name.startswith("student.backbone.")
            scale = train.bias_rate_scale if name.endswith("bias") else 1.0
            scale *= train.backbone_rate_scale if backbone else 1.0
            decay = 0.0 if name == "student.reweight" else train.weight_decay
            groups.setdefault((scale, train.backbone_frozen_epochs * backbone, decay), []).append(parameter)
    options = [
        {"params": p, "rate_scale": scale, "frozen_epochs": frozen, "weight_decay": decay}
        for (scale, frozen, decay), p in groups.items()
    ]
    if train.optimizer == "adamw":
        return AdamW(options, lr=train.rate)
    return SGD(options, lr=train.rate, momentum=train.momentum)


def _score(recipe: PruningRecipe, opened: Opened, network: PrunedViT, device: torch.device) -> Evaluation:
    """The network on both sides, tokens really removed."""

    def embedded(side: str) -> Tensor:
        images, camera = getattr(opened.data, side), opened.cameras.get(side)
        workers = recipe.run.loader_workers
        return search.embed(network, opened.frames[side], len(images), device, workers=workers, camera=camera)

    return search.symmetric(recipe.ap, opened.data, embedded)
