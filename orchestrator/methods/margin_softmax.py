"""Margin softmax: ArcFace (Deng et al., CVPR 2019), CosFace (Wang et al., CVPR 2018), AdaFace (Kim et al., CVPR 2022).

A face network trained on identities, without any teacher: how teachers of face distillation are trained, and the
"student alone" that a distilled student must beat. Class centres are spread over workers, and a share of them can be
sampled in every step (Partial FC), so that a million identities fit.

    python -m orchestrator.train margin_softmax --on demo
    python -m orchestrator.train margin_softmax --on ms1mv2 --data-root DIR --workers 4

A minute on the demo; about a GPU-day for IResNet-50 on MS1MV2 (``student.name=iresnet50``; the recipes name the
MobileFaceNet that others distil). Recipes are those of public code: batches of 512, SGD at 0.1, 26 epochs.
"""

from dataclasses import dataclass

from orchestrator.families.face.benchmarks import recipes
from orchestrator.families.face.job import FaceMethod
from orchestrator.families.face.recipe import FaceRecipe


@dataclass(frozen=True, kw_only=True)
class Recipe(FaceRecipe):
    """The network of the recipe is named ``student``, whoever it will teach."""


METHOD = FaceMethod(
    paper="ArcFace, CVPR 2019, with CosFace, AdaFace and Partial FC: the recipes of public code",
    recipes=recipes(Recipe, {"webface42m": {"head.sample": 0.2}}),
)
