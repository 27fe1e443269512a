"""AdaDistill (Boutros, Štruc and Damer, ECCV 2024): class centres that are made of the teacher's embeddings.

The margin softmax of the student is on centres that every image moves towards the teacher's embedding of it, the more
the less student and teacher agree. No class centres of the teacher are needed, so it works across data sets.

    python -m orchestrator.train adadistill --on demo

As published m = 0.45 of ArcFace; ``head.kind=cosface head.margin=0.35`` is AdaCosDistill. In the released code every
rank moves centres of its own, and of several images of one person an arbitrary one wins; here all count, in order.
Every worker holds all centres: C × 512 numbers, 4.2 GB for two million people.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from losses.adadistill import AdaDistill
from orchestrator.families.face.benchmarks import recipes
from orchestrator.families.face.job import FaceMethod
from orchestrator.families.face.recipe import DistillationRecipe, teacher_dim
from orchestrator.families.face.training import Distillation, Faces, FaceTask, Sizes, Terms


@dataclass(frozen=True, kw_only=True)
class Recipe(DistillationRecipe):
    """Numbers of one training."""

    weighted: bool = True  # α', which also looks at how near the centre is to the teacher's embedding


def remembers(recipe: Recipe, sizes: Sizes) -> nn.Module:
    return AdaDistill(teacher_dim(recipe), sizes.classes, recipe.weighted)


def before(recipe: Recipe, task: FaceTask, faces: Faces) -> None:
    rows = slice(0, faces.shuffled)
    task.memory.update(faces.student_BD[rows], faces.teacher_BD[rows], faces.label_B[rows])


def centres(recipe: Recipe, task: FaceTask) -> Tensor:
    return task.memory.centre_CD


def check(recipe: Recipe) -> None:
    if recipe.centres == "teacher" or not recipe.cls:
        raise ValueError("AdaDistill makes class centres for the margin softmax itself: take centres=own and cls=1")
    if teacher_dim(recipe) != recipe.embedding_dim:
        raise ValueError(
            f"class centres are as wide as the teacher's embedding, {teacher_dim(recipe)}, which the student is "
            f"compared with; embedding_dim is {recipe.embedding_dim}; set both"
        )


_OTHERS = {
    **{name: {"head.margin": 0.25} for name in ("demo", "orl")},
    **{name: {"head.margin": 0.35} for name in ("glint360k", "webface4m", "webface12m", "webface42m")},  # CosFace
}

METHOD = FaceMethod(
    paper="AdaDistill, Boutros et al., ECCV 2024",
    recipes=recipes(Recipe, {"*": {"head.margin": 0.45}, **_OTHERS}),
    distillation=Distillation(
        weights=lambda recipe: {},
        terms=lambda recipe, task, faces: Terms({}),
        check=check,
        remembers=remembers,
        before=before,
        centres=centres,
    ),
)
