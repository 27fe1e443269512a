"""Data, teacher, training job, evaluation and pictures of SUReID; the method itself is in sureid.py."""

# Shape legend: B = images of one rank's batch, S = stages, N = image tokens, D = width of the class token,
# Q/G = queries and gallery.

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from models.embedder import check_backbone
from models.token_pruning import PrunedViT, PrunedViTConfig
from orchestrator import cache, checkpoint, find, published
from orchestrator.cache import Progress, Rows, silent
from orchestrator.datasets import occlusion, person_views
from orchestrator.datasets.images import Frames, ImageSet, RetrievalData, check_labels, fetch
from orchestrator.datasets.occlusion import Occluders
from orchestrator.datasets.person_views import PersonAugmentation
from orchestrator.datasets.sampling import identity_batches, own_part
from orchestrator.method import Batch, Experiment, Panel, Place, Points, Sheet, Task, did_you_mean
from orchestrator.methods import embedding

if TYPE_CHECKING:
    from orchestrator.methods.sureid import Recipe

# Recipe fields that change what is prepared: data, pixels, teacher, and the set of occluders.
PREPARED_BY = frozenset({
    "dataset", "evaluate_on", "ap", "student_size", "pixel_cache", "skip_unreadable", "npkd", "teacher_view", "noda",
    "pixels", "patch_size", "patch_stride", "camera_weight", "depth", "occluders", "occluder_folder", "occluder_alpha",
    "occluder_count", "occluder_seed", "teacher", "teacher_width", "teacher_heads", "teacher_weights",
    "teacher_logit_neck", "teacher_triplet", "teacher_noda", "teacher_epochs", "teacher_learning_rate", "teacher_seed",
    "teacher_start", "identities_per_batch", "images_per_identity", "precision", "pos_resize", "teacher_pretrained",
})  # fmt: skip
STAGES, COLUMNS = 3, 2  # of the Gumbel noise


def check(recipe: "Recipe", workers: int = 1) -> None:
    """Raises ValueError for values that are allowed alone but not together."""
    embedding.check_labelled(recipe, workers)
    labelled = recipe.identities_per_batch * recipe.images_per_identity
    if labelled * recipe.views < 2 * workers:
        raise ValueError(f"a batch of {labelled} images leaves {workers} workers fewer than 2 each; enlarge it")
    find.dataset(recipe.dataset)
    if recipe.npkd and not recipe.alpha:
        raise ValueError("alpha is 0, so the teacher would be trained and never used; set npkd to false as well")
    if not recipe.beta and not recipe.npkd:
        raise ValueError("nothing to train on: beta is 0 and npkd is off")
    if recipe.backbone_frozen_epochs >= recipe.epochs:
        raise ValueError(
            f"backbone_frozen_epochs ({recipe.backbone_frozen_epochs}) must be below epochs ({recipe.epochs})"
        )
    if recipe.selection != "predictor" and not recipe.hts:
        raise ValueError(f"selection={recipe.selection} chooses among tokens, and hts is off; leave it at predictor")
    if recipe.selection_seed and recipe.selection != "random":
        raise ValueError(f"selection_seed={recipe.selection_seed} is of selection=random; leave it at 0")
    if recipe.occluders == "folder" and recipe.noda:
        if not recipe.occluder_folder:
            raise ValueError("occluders=folder needs occluder_folder, a folder of RGB or RGBA pictures")
        occlusion.pictures_in(recipe.occluder_folder)
    _check_start(recipe.pretrained, recipe.weights, (recipe.student_width, recipe.student_heads), recipe, "")
    if recipe.npkd and not recipe.teacher_weights:
        sizes = recipe.teacher_width, recipe.teacher_heads
        _check_start(recipe.teacher_pretrained, recipe.teacher_start, sizes, recipe, "teacher_")
    if recipe.evaluate_neck == "after" and not (recipe.neck == "bn" and recipe.classifies):
        raise ValueError("evaluate_neck=after needs neck=bn and a loss that trains it: beta, or npkd with logit_weight")
    if recipe.npkd:
        check_backbone(recipe.teacher)
    with torch.device("meta"):  # the network's own checks: stages, image size, heads; no memory, no weights
        for network in [student_config(recipe), *([teacher_config(recipe)] if recipe.npkd else [])]:
            PrunedViT(network)


def _check_start(pretrained: bool, file: str, sizes: tuple[int, int], recipe: "Recipe", whose: str) -> None:
    """Raises ValueError when a network cannot start from the weights it is told to start from."""
    field = "teacher_start" if whose else "weights"
    if file and not Path(file).is_file():
        raise ValueError(f"{field}: there is no file {file}")
    if pretrained and not file and any((*sizes, recipe.patch_size, recipe.depth)):
        raise ValueError(
            f"there are no pretrained weights for a network of another width, heads, depth or patch_size; "
            f"set {whose}pretrained to false"
        )


def student_config(recipe: "Recipe", num_classes: int = 0, cameras: int = 0) -> PrunedViTConfig:
    pruning = {
        "stages": recipe.stages, "keep_ratio": recipe.keep_ratio, "rounding": recipe.rounding,
        "predictor": recipe.predictor, "keep_column": recipe.keep_column, "inference": recipe.inference,
        "token_order": recipe.token_order, "selection": recipe.selection, "selection_seed": recipe.selection_seed,
        "softmax_guard": recipe.softmax_guard, "reweight": recipe.reweight,
        "reweight_at_inference": recipe.reweight_at_inference,
    }  # fmt: skip
    return PrunedViTConfig(
        backbone=recipe.student,
        image_size=recipe.student_size,
        patch_size=recipe.patch_size,
        width=recipe.student_width,
        heads=recipe.student_heads,
        depth=recipe.depth,
        patch_stride=recipe.patch_stride,
        **({"cameras": cameras, "camera_weight": recipe.camera_weight} if recipe.camera_weight else {}),
        attention_scale=recipe.attention_scale,
        pruning=recipe.hts,
        **(pruning if recipe.hts else {}),
        neck=recipe.neck == "bn" and recipe.classifies,
        embed_after_neck=recipe.evaluate_neck == "after",
        pixels=recipe.pixels,
        num_classes=num_classes if recipe.classifies else 0,
    )


def teacher_config(recipe: "Recipe", cameras: int = 0) -> PrunedViTConfig:
    return student_config(teacher_training(recipe), cameras=cameras)


def teacher_training(recipe: "Recipe") -> "Recipe":
    """How the teacher is trained: the benchmark's own recipe without HTS and NPKD; no field of the student enters."""
    recipes = {r.dataset: r for r in reversed(find.method("sureid").recipes.values())}
    if recipe.dataset not in recipes:
        raise ValueError(
            f"no benchmark of sureid has the data set {recipe.dataset!r}, so its teacher's recipe is not known"
            + did_you_mean(recipe.dataset, recipes)
        )
    base = recipes[recipe.dataset]
    occluders = ("occluders", "occluder_folder", "occluder_alpha", "occluder_count", "occluder_seed")
    as_student = (  # how the data are sampled; where, how fast and at which precision it runs
        "identities_per_batch", "images_per_identity", "evaluate_on", "ap", "pixel_cache", "loader_workers", "compile",
        "precision", "pos_resize", "skip_unreadable", *(occluders if recipe.teacher_noda else ()),
    )  # fmt: skip
    return replace(
        base,
        **{name: getattr(recipe, name) for name in as_student},
        student=recipe.teacher,
        student_size=recipe.student_size,  # both see the same images
        pixels=recipe.pixels,
        student_width=recipe.teacher_width,
        student_heads=recipe.teacher_heads,
        patch_size=recipe.patch_size,
        patch_stride=recipe.patch_stride,
        camera_weight=recipe.camera_weight,
        depth=recipe.depth,
        hts=False,
        npkd=False,
        alpha=1.0,
        beta=1.0,
        noda=recipe.teacher_noda,
        triplet_mining=recipe.teacher_triplet,
        neck=recipe.teacher_logit_neck,
        pretrained=recipe.teacher_pretrained,
        weights=recipe.teacher_start,
        learning_rate=recipe.teacher_learning_rate,
        epochs=recipe.teacher_epochs,
        seed=recipe.teacher_seed,
    )


def teacher(recipe: "Recipe", place: Place) -> tuple[str, Any] | None:
    """What must be trained first; None without NPKD, or when the teacher is given or already there."""
    if not recipe.npkd or recipe.teacher_weights or (Path(teacher_folder(recipe, place)) / "teacher.json").exists():
        return None
    return "sureid", teacher_training(recipe)


def teacher_folder(recipe: "Recipe", place: Place, progress: Progress = silent) -> str:
    """Where the trained teacher is or will be; empty when there is none, or its weights are given."""
    if not recipe.npkd or recipe.teacher_weights:
        return ""
    training, more = teacher_training(recipe), {}
    if training.noda and training.occluders == "folder":
        found = occlusion.from_folder(training.occluder_folder, training.occluder_alpha)
        more["occluders_fingerprint"] = found.fingerprint
    # Benchmarks that train on the same images, as the cross-domain ones do, share their teacher.
    return str(embedding.teacher_folder(training, place, progress, ("dataset", "occluder_folder"), **more))


@dataclass
class Prepared:
    """What all trials of one teacher and data set share, opened by every worker."""

    data: RetrievalData
    frames: dict[str, Rows | Frames]  # by side of the data: train, query, gallery
    teacher: PrunedViT | None
    occluders: Occluders | None
    cameras: dict[str, np.ndarray] = field(default_factory=dict)  # what networks are told of them, by side
    teacher_fingerprint: str = ""
    taught: dict[str, Rows] = field(default_factory=dict)  # the teacher's class tokens of the plain images, by side


def prepare(recipe: "Recipe", place: Place, progress: Progress = silent) -> dict[str, Any]:
    """Index, pixel caches, teacher outputs; returns what the record says about them."""
    device = embedding.default_device()
    prepared = _open(recipe, place, progress, verify=True)
    data = prepared.data
    facts = embedding.plain_facts(recipe, data)
    if prepared.occluders is not None:
        facts |= {"occluders": str(prepared.occluders), "occluders_fingerprint": prepared.occluders.fingerprint}
    if prepared.teacher is not None:
        facts |= {
            "teacher": networks(recipe)[1],
            "teacher_fingerprint": prepared.teacher_fingerprint,
            "teacher_view": recipe.teacher_view,
        }
        if "train" in prepared.taught:
            facts["target_cache"] = prepared.taught["train"].folder.name
        facts["gallery_cache"] = prepared.taught["gallery"].folder.name
        sides = [torch.from_numpy(prepared.taught[s](np.arange(len(prepared.taught[s])))) for s in ("query", "gallery")]
        facts["teacher_metrics"] = embedding.score(recipe, data, *(s.to(device) for s in sides)).log("teacher")
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randn(len(s), 128, generator=generator) for s in (data.query, data.gallery)]
    if data.leave_one_out:
        sides[1] = sides[0]
    chance = embedding.score(recipe, data, *(s.to(device) for s in sides))
    return facts | {"chance_metrics": chance.log("chance"), "valid_queries": chance.valid_queries}


def experiment(
    task_of: Callable[["Recipe", PrunedViT, PrunedViT | None], Task],
    recipe: "Recipe", place: Place, rank: int, world: int, device: torch.device,
) -> Experiment:  # fmt: skip
    """One training job; ``task_of`` makes the task of the student and its teacher."""
    prepared = _open(recipe, place)
    train = prepared.data.train
    torch.manual_seed(recipe.seed)
    config = student_config(recipe, train.num_identities, len(_known_cameras(train)))
    student = PrunedViT(config, recipe.pretrained, recipe.weights, recipe.drop_path, recipe.pos_resize)
    if student.classifier is not None:
        check_labels(train.labels, student.classifier.out_features)
    task = task_of(recipe, student, prepared.teacher).to(device)
    # Equal weights on all ranks, but not equal paths dropped.
    torch.manual_seed(int(np.random.SeedSequence((recipe.seed, rank, 4)).generate_state(1)[0]))
    load = _loader(recipe, prepared, student.num_tokens, rank, world)
    images = recipe.identities_per_batch * recipe.images_per_identity

    def batches(epoch: int) -> Iterator[Batch]:
        return fetch(load, _requests(recipe, train, epoch, rank, world), recipe.loader_workers)

    return Experiment(
        task=task,
        optimizer=_optimizer(recipe, task),
        epochs=recipe.epochs,
        learning_rate=partial(learning_rate, recipe),
        batches=batches,
        evaluate=lambda task: _scores(recipe, prepared, task.student, device, "val"),
        precision=embedding.networks_precision(recipe, device),
        compile=recipe.compile,
        clip_norm=recipe.clip_norm,
        evaluate_every=recipe.evaluate_every,
        images_per_step=images * recipe.views,
    )


def learning_rate(recipe: "Recipe", epoch: int) -> float:
    """Rate of a 1-based epoch: linear warm-up inside a cosine that ends at 0.002 of the rate (TransReID's code).

    >>> recipe = find.recipe("sureid", "market1501")
    >>> [round(learning_rate(recipe, e), 6) for e in (1, 5, 100, 200)]
    [0.001664, 0.007988, 0.004008, 1.6e-05]
    """
    base, least = recipe.learning_rate, 0.002 * recipe.learning_rate
    if epoch < recipe.warmup_epochs:
        return base * (0.01 + 0.99 * epoch / recipe.warmup_epochs)
    return least + (base - least) * (1 + math.cos(math.pi * epoch / recipe.epochs)) / 2


def augmentations(recipe: "Recipe") -> tuple[PersonAugmentation, ...]:
    """What happens to each view."""
    plain = PersonAugmentation(recipe.flip, recipe.student_pad, recipe.patch, recipe.erase, recipe.jitter)
    if not recipe.noda:
        return (plain,) * recipe.views
    return plain, PersonAugmentation(recipe.flip, recipe.student_pad, 0.0, 0.0, recipe.jitter, occlude=True)


def evaluate_student(student: PrunedViT, recipe: "Recipe", place: Place) -> dict[str, float]:
    """Metrics of a stored network, recomputed from images."""
    device = embedding.default_device()
    return _scores(recipe, _open(for_evaluation(recipe), place), student.to(device), device, "val")


def after_training(recipe: "Recipe") -> frozenset[str]:
    """The same weights may keep other tokens: predictors rank them whatever p they were trained with."""
    fields = embedding.after_training(recipe)
    if recipe.hts:
        fields |= {"keep_ratio", "rounding", "token_order", "selection", "inference"}
        if recipe.selection == "random":
            fields |= {"selection_seed"}
    return fields


def for_evaluation(recipe: "Recipe") -> "Recipe":
    """Neither teacher nor occluders nor cameras of the training set are needed to score a student."""
    return replace(recipe, npkd=False, noda=False, triplet_mining="plain")


def networks(recipe: "Recipe") -> tuple[str, str]:
    """Student and teacher as published tables name them."""
    taught = published.network(recipe.teacher, recipe.student_size) if recipe.npkd else published.NO_TEACHER
    return published.network(recipe.student, recipe.student_size), taught


def pictures(student: PrunedViT, recipe: "Recipe", place: Place) -> dict[str, Panel | Sheet | Points]:
    """Retrieval panel, dropped tokens (figure 6), map of a few identities (figure 4), and the training views."""
    prepared, device = _open(recipe, place), embedding.default_device()
    student = student.to(device)
    gallery_GD = _embed(recipe, prepared, student, "gallery", device)

    @torch.no_grad()
    def embed_queries(chosen: np.ndarray) -> Tensor:
        return student(*_inputs(student, prepared, "query", chosen, device))

    found: dict[str, Panel | Sheet | Points] = {
        "retrieval": embedding.panel(prepared.data, embed_queries, gallery_GD, recipe.student_size),
        "identities": _identity_map(prepared, student, gallery_GD, device),
        "views": _view_sheet(recipe, prepared),
    }
    if recipe.hts:
        found["tokens"] = _token_sheet(prepared, student, device)
    return found


@torch.no_grad()
def _token_sheet(prepared: Prepared, student: PrunedViT, device: torch.device) -> Sheet:
    """A few queries and what is left of each after each stage; dropped patches are whitened."""
    chosen = _spread(prepared, 8)
    frames_B3HW = torch.as_tensor(prepared.frames["query"](chosen))
    _, masks_BSN = student.eval().masked(*_inputs(student, prepared, "query", chosen, device))
    kept = masks_BSN.cpu().view(len(frames_B3HW), -1, *student.backbone.patch_embed.grid_size)
    kept = nn.functional.interpolate(kept, frames_B3HW.shape[2:])[:, :, None].bool()
    shown = torch.where(kept, frames_B3HW[:, None], (frames_B3HW[:, None] // 8 + 223).to(torch.uint8))
    shown = torch.cat([frames_B3HW[:, None], shown], dim=1).permute(0, 1, 3, 4, 2).numpy()
    # Images side by side, stages below each other.
    counts = student.counts if student.config.inference == "topk" else ("",) * 3
    names = ("image", *(f"stage {s}: {n}" for s, n in enumerate(counts, 1)))
    return Sheet("Tokens that are left after each stage", shown.swapaxes(0, 1), ("",) * len(frames_B3HW), names)


@torch.no_grad()
def _identity_map(prepared: Prepared, student: PrunedViT, gallery_GD: Tensor, device: torch.device) -> Points:
    """t-SNE of a few identities' queries and gallery images, for the student and, where there is one, its teacher."""
    from sklearn.manifold import TSNE

    data = prepared.data
    identities = np.unique(data.query.identity)
    chosen = identities[np.linspace(0, len(identities) - 1, min(10, len(identities))).astype(int)]
    sides = {
        side: np.flatnonzero(np.isin(images.identity, chosen))[:400]
        for side, images in (("query", data.query), ("gallery", data.gallery))
    }
    label = np.concatenate([getattr(data, side).identity[rows] for side, rows in sides.items()])
    marked = np.concatenate([np.full(len(rows), side == "query") for side, rows in sides.items()])
    own = [student(*_inputs(student, prepared, "query", sides["query"], device))]
    embedded = {"student": torch.cat([*own, gallery_GD[torch.from_numpy(sides["gallery"])]]).float().cpu()}
    if prepared.taught:
        taught = [prepared.taught[side](rows) for side, rows in sides.items()]
        embedded["teacher"] = torch.from_numpy(np.concatenate(taught))
    maps = {}
    for name, rows_ND in embedded.items():
        perplexity = max(2.0, min(20.0, (len(rows_ND) - 1) / 4))
        unit = nn.functional.normalize(rows_ND, dim=1).numpy()
        maps[name] = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(unit)
    return Points("A few identities (t-SNE of normalised embeddings)", maps, label, marked, ("gallery", "query"))


def _view_sheet(recipe: "Recipe", prepared: Prepared, images: int = 8) -> Sheet:
    """Training images and the views that the networks see of them."""
    load = _loader(recipe, prepared, 1, 0, 1)
    indices = next(_requests(recipe, prepared.data.train, 1, 0, 1))
    batch = load((indices[0][:images], [d[:images] for d in indices[1]], indices[2]))
    rows = [batch["frames"]]
    for augment, draws, overlay in zip(augmentations(recipe), batch["draws"], batch["overlays"], strict=True):
        shown = augment(batch["frames"], draws, overlay, "half")
        rows.append(((shown * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8))
    names = ("image", *(f"view {v}" + (": NODA" if a.occlude else "") for v, a in enumerate(augmentations(recipe), 1)))
    stacked = torch.stack(rows).permute(0, 1, 3, 4, 2).numpy()
    return Sheet("What training sees", stacked, ("",) * stacked.shape[1], names)


def _spread(prepared: Prepared, count: int) -> np.ndarray:
    """Query numbers spread over the set."""
    return np.unique(np.linspace(0, len(prepared.data.query) - 1, count).astype(int))


def _open(recipe: "Recipe", place: Place, progress: Progress = silent, verify: bool = False) -> Prepared:
    """Opens what is prepared, building what is missing."""
    data = embedding.load_data(recipe, place, progress)
    if recipe.triplet_mining == "camera" and data.train.camera is None:
        raise ValueError(
            f"the camera-constrained triplet needs cameras, and {data.train.name} has none; "
            f"set triplet_mining (of the teacher: teacher_triplet) to plain"
        )
    if recipe.identities_per_batch > data.train.num_identities:
        raise ValueError(
            f"identities_per_batch ({recipe.identities_per_batch}) is more than the {data.train.num_identities} "
            f"identities of {data.train.name}; lower it"
        )
    frames = {
        side: embedding.frames(recipe, images, recipe.student_size, place, progress, verify, "bicubic")
        for side, images in data.sets().items()
    }
    frames.setdefault("gallery", frames["query"])
    prepared = Prepared(data, frames, None, _occluders(recipe, data))
    if recipe.camera_weight:
        prepared.cameras = {
            side: _camera_index(data.train, getattr(data, side)) for side in ("train", "query", "gallery")
        }
    if recipe.npkd:
        _add_teacher(prepared, recipe, place, progress, verify)
    return prepared


def _known_cameras(train: ImageSet) -> np.ndarray:
    """Numbers of the training set's cameras, rising: the rows of the networks' camera embedding."""
    return np.unique(train.camera) if train.camera is not None else np.array([], np.int64)


def _camera_index(train: ImageSet, images: ImageSet) -> np.ndarray:
    """Every image's camera as its place among the training set's cameras.

    Raises:
        ValueError: an image of a camera that the training set does not have.
    """
    # Names are those of data set and part. Another data set's cameras are other cameras, whatever their numbers.
    if images.name.split("/")[0] != train.name.split("/")[0]:
        raise ValueError(
            f"the camera embedding needs cameras of the training set, and {images.name} is of other data than "
            f"{train.name}; set camera_weight to 0"
        )
    known = _known_cameras(train)
    camera = images.camera if images.camera is not None else np.full(len(images), -1)
    unseen = np.setdiff1d(camera, known)
    if len(unseen):
        what = "has no cameras" if images.camera is None else f"has camera {unseen[0]}, {train.name} has not"
        raise ValueError(f"the camera embedding needs known cameras, and {images.name} {what}; set camera_weight to 0")
    return np.searchsorted(known, camera)


def _occluders(recipe: "Recipe", data: RetrievalData) -> Occluders | None:
    if not recipe.noda:
        return None
    if recipe.occluders == "folder":
        return occlusion.from_folder(recipe.occluder_folder, recipe.occluder_alpha)
    if recipe.occluders == "train_crops":
        return occlusion.from_training(data.train, recipe.student_size, recipe.occluder_count, recipe.occluder_seed)
    return occlusion.procedural(recipe.occluder_count, recipe.occluder_seed)


def _add_teacher(prepared: Prepared, recipe: "Recipe", place: Place, progress: Progress, verify: bool) -> None:
    """Raises ValueError when the teacher is of another network, or its classes are not those of the training set."""
    path = Path(recipe.teacher_weights or Path(teacher_folder(recipe, place)) / "teacher.safetensors")
    found, facts = checkpoint.load_model(path, teacher_config(recipe, len(_known_cameras(prepared.data.train))))
    classes = embedding.classes_fingerprint(prepared.data.train)
    if facts.get("classes_fingerprint", classes) != classes:
        raise ValueError(f"the classes of {path} are not the identities of {prepared.data.train.name}")
    found.classifier = checkpoint.load_classifier(path)
    shape = (prepared.data.train.num_identities, found.backbone.embed_dim)
    if recipe.logit_weight and (found.classifier is None or tuple(found.classifier.weight.shape) != shape):
        stored = "missing" if found.classifier is None else f"{tuple(found.classifier.weight.shape)}"
        raise ValueError(
            f"the logit term needs the teacher's classifier, a matrix 'weight' {shape} in "
            f"{path.with_suffix('.classifier.safetensors').name} beside {path}; it is {stored}"
        )
    prepared.teacher, prepared.teacher_fingerprint = found, cache.weights_hash(found)
    embed = partial(_taught, found, prepared)
    transform = {"network": asdict(found.config), "augmentation": "none", "resize": "bicubic", "output": "class token"}
    if prepared.cameras:
        transform["cameras"] = _known_cameras(prepared.data.train).tolist()
    for side in ["query", "gallery", *(["train"] if recipe.teacher_view == "clean" else [])]:
        prepared.taught[side] = cache.embeddings(
            getattr(prepared.data, side), prepared.teacher_fingerprint, transform, partial(embed, side),
            place.folder("cache"), 1, progress, verify,
        )  # fmt: skip


@torch.inference_mode()
def _taught(network: PrunedViT, prepared: Prepared, side: str, rows: np.ndarray) -> Iterator[dict[str, Tensor]]:
    device = embedding.default_device()
    network = network.to(device)
    for start in range(0, len(rows), 256):
        images_BCHW, camera_B = _inputs(network, prepared, side, rows[start : start + 256], device)
        yield {"value": network.trained(images_BCHW, camera_B=camera_B).feature_BD.float()}


def _inputs(
    network: PrunedViT, prepared: Prepared, side: str, rows: np.ndarray, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Images of one side as the network wants them, and their cameras where it is told."""
    images_BCHW = embedding.model_input(network, prepared.frames[side](rows), device)
    if not prepared.cameras:
        return images_BCHW, None
    return images_BCHW, torch.from_numpy(prepared.cameras[side][rows]).to(device)


Request = tuple[np.ndarray, list[np.ndarray], tuple[int, ...]]  # image numbers, draws of every view, key of the noise


def _requests(recipe: "Recipe", train: ImageSet, epoch: int, rank: int, world: int) -> Iterator[Request]:
    """This rank's part of every P × K batch of an epoch."""
    batches = identity_batches(
        train.identity, recipe.identities_per_batch, recipe.images_per_identity, (recipe.seed, epoch, 1)
    )
    height, width = recipe.student_size
    drawn = [
        augment.draw(batches.size, width / height, (recipe.seed, epoch, 2, view)).reshape(*batches.shape, -1)
        for view, augment in enumerate(augmentations(recipe))
    ]
    slots = own_part(np.arange(batches.shape[1]), rank, world)
    for step, indices in enumerate(batches):
        yield indices[slots], [draws[step, slots] for draws in drawn], (recipe.seed, epoch, 3, step)


def _loader(recipe: "Recipe", prepared: Prepared, num_tokens: int, rank: int, world: int) -> Callable[[Request], Batch]:
    """Turns a request into what the task is given; runs in worker processes where images are decoded."""
    source, train, occluders = prepared.frames["train"], prepared.data.train, prepared.occluders
    labels = torch.from_numpy(train.labels)
    camera = prepared.cameras.get("train", train.camera)  # the triplet loss only compares them
    cameras = torch.from_numpy(np.zeros(len(train), np.int64) if camera is None else camera)
    augments = augmentations(recipe)

    def overlay(augment: PersonAugmentation, draws: np.ndarray) -> Tensor:
        if augment.occlude:
            return occluders.overlay(person_views.occluder_draws(draws), recipe.student_size)
        laid = torch.zeros(len(draws), 4, *recipe.student_size, dtype=torch.uint8)
        patched = np.flatnonzero(person_views.has_patch(draws))
        if len(patched):
            frames = torch.as_tensor(source(person_views.patch_source(draws[patched], len(train))))
            laid[patched] = person_views.patch_overlay(frames, draws[patched])
        return laid

    def load(request: Request) -> Batch:
        indices, drawn, key = request
        batch: Batch = {
            "frames": torch.as_tensor(source(indices)),
            "draws": [torch.from_numpy(draws) for draws in drawn],
            "overlays": [overlay(augment, draws) for augment, draws in zip(augments, drawn, strict=True)],
            "label": labels[indices],
            "camera": cameras[indices],
            "names": embedding.names_of(train, indices),
        }
        if recipe.hts:
            # Of the whole batch, so that every rank's decisions are those of a single process; resumed runs draw them
            # again from the key.
            shape = (len(augments), len(indices) * world, STAGES, num_tokens, COLUMNS)
            uniform = np.random.default_rng(np.random.SeedSequence(key)).random(shape, dtype=np.float32)
            own = uniform[:, rank * len(indices) : (rank + 1) * len(indices)]
            batch["uniform"] = torch.from_numpy(own.reshape(-1, *shape[2:]))
        if "train" in prepared.taught:
            batch["teacher"] = torch.from_numpy(prepared.taught["train"](indices))
        return batch

    return load


def _optimizer(recipe: "Recipe", task: Task) -> Optimizer:
    """Biases learn at a multiple of the rate; λ of eq. 8 does not decay. Rates are set by the training loop."""
    groups: dict[tuple[float, int, float], list[nn.Parameter]] = {}
    for name, parameter in task.named_parameters():
        if parameter.requires_grad:
            backbone = name.startswith("student.backbone.")
            scale = recipe.bias_rate_scale if name.endswith("bias") else 1.0
            scale *= recipe.backbone_rate_scale if backbone else 1.0
            decay = 0.0 if name == "student.reweight" else recipe.weight_decay
            groups.setdefault((scale, recipe.backbone_frozen_epochs * backbone, decay), []).append(parameter)
    options = [
        {"params": p, "rate_scale": scale, "frozen_epochs": frozen, "weight_decay": decay}
        for (scale, frozen, decay), p in groups.items()
    ]
    if recipe.optimizer == "adamw":
        return AdamW(options, lr=recipe.learning_rate)
    return SGD(options, lr=recipe.learning_rate, momentum=recipe.momentum)


def _embed(recipe: "Recipe", prepared: Prepared, network: PrunedViT, side: str, device: torch.device) -> Tensor:
    count = len(getattr(prepared.data, side))
    camera = prepared.cameras.get(side)
    return embedding.embed(network, prepared.frames[side], count, device, workers=recipe.loader_workers, camera=camera)


def _scores(
    recipe: "Recipe", prepared: Prepared, network: PrunedViT, device: torch.device, name: str
) -> dict[str, float]:
    """The network on both sides, tokens really removed."""
    query_QD = _embed(recipe, prepared, network, "query", device)
    gallery_GD = query_QD if prepared.data.leave_one_out else _embed(recipe, prepared, network, "gallery", device)
    return embedding.score(recipe, prepared.data, query_QD, gallery_GD).log(name)
