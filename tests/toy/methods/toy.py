"""Toy: a student finds and recognises boxes; a tutor looks where the student looks; clusters are its labels.

    python -m orchestrator.train toy --on two_sizes

Two seconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy import data, family
from toy.network import BoxEmbedder, cosines

from models.network import at_least_float32
from orchestrator import distributed
from orchestrator.method import Batch, Losses, Task
from orchestrator.recipe import Positive, Weight, changed


@dataclass(frozen=True, kw_only=True)
class Recipe(family.Recipe):
    tau: Positive = 0.2  # temperature of the bank
    lambda_tutor: Weight = 1.0
    lambda_bank: Weight = 1.0
    lambda_told: Weight = 0.5


class Toy(Task):
    """Four terms; that of told identities is absent from steps without any."""

    def __init__(
        self, recipe: Recipe, student: BoxEmbedder, tutor: BoxEmbedder | None, tutors_bank: Tensor | None, boxes: int
    ):
        super().__init__(student, tutor)
        self.recipe, self.head = recipe, nn.Linear(recipe.net.dim, data.IDENTITIES)
        self.register_buffer("cluster_N", torch.full((boxes,), -1))
        if tutors_bank is not None:
            self.student.bank.rows_MD.copy_(tutors_bank)

    @torch.no_grad()
    def label_anew(self, embedding_ND: Tensor) -> Mapping[str, float]:
        """Every box goes to the first leader that it is like, or leads a cluster of its own."""
        alike_NN = (cosines(embedding_ND, embedding_ND) >= self.recipe.alike).cpu()
        leaders: list[int] = []
        for row, alike_N in enumerate(alike_NN):
            own = next((number for number, leader in enumerate(leaders) if alike_N[leader]), len(leaders))
            leaders += [row] if own == len(leaders) else []
            self.cluster_N[row] = own
        return {"clusters/count": len(leaders), "clusters/largest": int(self.cluster_N.bincount().max())}

    def forward(self, batch: Batch) -> Losses:
        own_N4, embedding_ND = self.student(batch["images"], batch["start"])
        own_N4, embedding_ND = (distributed.gather(at_least_float32(value)) for value in (own_N4, embedding_ND))
        row_N, told_N, identity_N, true_N4 = map(
            distributed.gather, (batch["row"], batch["told"], batch["identity"], torch.cat(batch["box"]))
        )
        real_N = row_N >= 0
        terms = {"box": _mean(F.smooth_l1_loss(own_N4, true_N4.to(own_N4), reduction="none").mean(1), real_N)}
        weights = {"box": 0.1}
        if self.recipe.lambda_bank:
            terms["bank"], weights["bank"] = self.against_bank(embedding_ND, row_N), self.recipe.lambda_bank
        if self.recipe.lambda_tutor and self.teacher is not None:
            local = own_N4.detach().split(len(batch["row"]))[distributed.rank()].split(data.BOXES)
            with torch.no_grad():
                tutor_ND = distributed.gather(at_least_float32(self.teacher.at(batch["images"], local)))
            terms["tutor"] = _mean(1 - F.cosine_similarity(embedding_ND, tutor_ND), real_N)
            weights["tutor"] = self.recipe.lambda_tutor
        if self.recipe.lambda_told and batch["any_told"]:
            each_N = F.cross_entropy(self.head(embedding_ND), identity_N, reduction="none")
            terms["told"], weights["told"] = _mean(each_N, told_N), self.recipe.lambda_told
        kept = {"embedding": embedding_ND.detach().split(len(batch["row"]))[distributed.rank()], "row": batch["row"]}
        return Losses(terms, weights, {"boxes": real_N.sum().float()}, kept)

    def against_bank(self, embedding_ND: Tensor, row_N: Tensor) -> Tensor:
        """Boxes of one's own cluster against all others in the bank."""
        bank = self.student.bank
        logit_NM = cosines(embedding_ND, bank.rows_MD) / self.recipe.tau
        filled_M = bank.owner_M >= 0
        own_NM = filled_M & (self.cluster_N[row_N.clamp(min=0)][:, None] == self.cluster_N[bank.owner_M.clamp(min=0)])
        known_N = own_NM.any(1) & (row_N >= 0)
        every_N = logit_NM.masked_fill(~filled_M, -1e4).logsumexp(1)
        return _mean(every_N - logit_NM.masked_fill(~own_NM, -1e4).logsumexp(1), known_N)

    def after_step(self, kept: Mapping[str, Tensor]) -> None:
        self.student.bank.put(*(distributed.gather_without_gradient(kept[name]) for name in ("embedding", "row")))


def _mean(value_N: Tensor, chosen_N: Tensor) -> Tensor:
    return torch.where(chosen_N, value_N, 0).sum() / chosen_N.sum().clamp(min=1)


_TINY = {"train.rate": 0.01, "train.epochs": 4, "train.evaluate_every": 1, "run.checkpoint_every": 2}
_TUTOR = {"taught": False, "lambda_told": 1.0, "train.epochs": 6, "net.channels": 16, "run.checkpoint_every": 0}

METHOD = family.BoxMethod(
    "none: it proves the contract",
    {
        name: changed(Recipe(), {"data.name": "drawn", **_TINY, **settings})
        for name, settings in (("two_sizes", {}), ("two_sizes_tutor", _TUTOR))
    },
    Toy,
)
