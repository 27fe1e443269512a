"""UGD: global features, and local ones where the teacher recognises the image (Neural Networks 187:107303, 2025).

    L = weight · (α L_FD + β (L_loc + L_loc,half))

    python -m orchestrator.train ugd --on demo
    python -m orchestrator.sweep ugd_weight

The teacher's last map is averaged over p × p and p/2 × p/2 areas, p = student height / 16, and each goes through the
teacher's own neck and classifier; areas that get the image's label are trusted. The student's map of one stage is
averaged over the same areas and projected by a trainable head for each grid. Needs the teacher's classifier.
In the D3still authors' code only, where its distillation batch is 96 and its epochs so have more steps.
"""

from dataclasses import dataclass
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor, nn

from losses.similarity import at_least_float32, full_precision
from losses.ugd import feature_distance, local_distance
from models.embedder import Embedder
from orchestrator.families import asymmetric
from orchestrator.families.asymmetric import SMALL, AsymmetricRecipe, Distillation, Pairs
from orchestrator.recipe import Positive, Range, Weight

# Shape legend: B = images, C = channels, P = positions of a grid, D = embedding width.


@dataclass(frozen=True, kw_only=True)
class Recipe(AsymmetricRecipe):
    """Numbers of one UGD training."""

    weight: Weight = 1.0
    alpha: Positive = 2.0  # of the global feature distance; without it nothing would train the embedding
    beta: Weight = 2.0  # of both local distances
    stage: Annotated[int, Range(1, 4)] = 3  # whose map the student's local features come from

    @property
    def grids(self) -> tuple[int, int]:
        """Sides of the two square grids, also over oblong images; at least 2 and 1, for students under 32 pixels."""
        return max(2, self.student.size[0] // 16), max(1, self.student.size[0] // 32)


def weights(recipe: Recipe) -> dict[str, float]:
    local = recipe.weight * recipe.beta
    return {"feature": recipe.weight * recipe.alpha, "local": local, "local_half": local}


def heads(recipe: Recipe, student: Embedder) -> nn.Module | None:
    """A projector for each grid; None where there is no local loss."""
    if not recipe.weight * recipe.beta:
        return None
    channels = student.backbone.feature_info[recipe.stage - 5]["num_chs"]
    return nn.ModuleList(_projector(channels, recipe.embedding_dim) for _ in recipe.grids)


def student_outputs(
    recipe: Recipe, student: Embedder, heads: nn.ModuleList | None, images_BCHW: Tensor
) -> dict[str, Tensor]:
    if heads is None:
        return {"embedding": student(images_BCHW)}
    embedding_BD, map_BCHW = student.with_map(images_BCHW, recipe.stage)
    outputs = {"embedding": embedding_BD}
    with full_precision(map_BCHW):  # as the neck, whose output the projectors imitate
        for name, p, head in zip(("local", "local_half"), recipe.grids, heads, strict=True):
            cells_BPC = F.adaptive_avg_pool2d(at_least_float32(map_BCHW), (p, p)).flatten(2).transpose(1, 2)
            outputs[name] = head(cells_BPC.flatten(0, 1)).view(*cells_BPC.shape[:2], -1)
    return outputs


def teacher_outputs(recipe: Recipe, teacher: Embedder, images_BCHW: Tensor) -> dict[str, Tensor]:
    embedding_BD, local = teacher.local(images_BCHW, recipe.grids)
    outputs = {"embedding": embedding_BD}
    for name, local_BPD in zip(("local", "local_half"), local, strict=True):
        with full_precision(local_BPD):
            outputs |= {name: local_BPD, f"{name}_class": teacher.classifier(local_BPD).argmax(dim=2)}
    return outputs


def terms(recipe: Recipe, pairs: Pairs) -> dict[str, Tensor]:
    found = {"feature": feature_distance(pairs.student_BD, pairs.teacher_BD)}
    if recipe.beta:
        for name in ("local", "local_half"):
            trusted_BP = pairs.teacher[f"{name}_class"] == pairs.label_B[:, None]
            found[name] = local_distance(pairs.student[name], pairs.teacher[name], trusted_BP)
    return found


def _projector(channels: int, width: int) -> nn.Module:
    projector = nn.Sequential(
        nn.BatchNorm1d(channels), nn.Linear(channels, width, bias=False), nn.BatchNorm1d(width)
    )  # fmt: skip
    nn.init.kaiming_normal_(projector[1].weight, mode="fan_out")
    return projector


METHOD = asymmetric.method(
    paper="UGD, Neural Networks 187:107303, 2025, as in the D3still authors' code",
    recipes=asymmetric.recipes(
        Recipe,
        {
            "*_repo*": {"batch_size": 96},
            "*_repo_mobilenet": {"alpha": 5.0},
            "*_repo_swin": {"alpha": 5.0},
            "msmt17_repo*": {"alpha": 1.0},
            "msmt17_repo_mobilenet": {"alpha": 3.0},
            SMALL: {"weight": 4.0, "alpha": 5.0},
        },
    ),
    distillation=Distillation(
        weights=weights,
        terms=terms,
        teacher_classifier=True,
        heads=heads,
        student_outputs=student_outputs,
        teacher_outputs=teacher_outputs,
        outputs="ugd",
        outputs_by=lambda recipe: {"student_size": list(recipe.student.size)},
    ),
)
