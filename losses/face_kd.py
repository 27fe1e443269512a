"""Unified distillation for face recognition (Mishra and Uikey, IJCB 2025): ILED and RPSD, our reading.

The paper's formulas are not public to us. What its abstract says is kept: single embeddings aligned under dynamic hard
mining, and pairwise similarities matched over a memory bank under sample mining. All else is our formulation, so no
number from here is the paper's.
"""

# Shape legend: B = batch, D = embedding width (of the student and of the teacher it may differ where that is said),
# M = slots of the bank, R = references: M + B.

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.similarity import check_pair, full_precision, mean_where, unit_pair, unit_rows

InstanceMiner = Literal["adaptive", "topk", "soft", "none"]
PairMiner = Literal["hard_negative", "teacher_similar", "discrepancy", "all", "random"]


def ramp(step: int | Tensor, steps: int) -> float | Tensor:
    """min(1, step / steps), ``step`` counted from 1; of a tensor on its device. Without steps it is 1.

    >>> ramp(1, 4), ramp(9, 4), ramp(1, 0)
    (0.25, 1.0, 1.0)
    """
    if isinstance(step, Tensor):
        return (step / max(steps, 1)).clamp(max=1.0) if steps else torch.ones_like(step, dtype=torch.float32)
    return min(1.0, step / steps) if steps else 1.0


class ILED(nn.Module):
    """Instance-level embedding distillation: Σ w_i d_i / Σ w_i with d_i = 1 − cos(s_i, t_i), in [0, 2].

    The weights w are constants for the gradient; where all are 0 the loss is the mean of d. ``miner``:

    - "adaptive": 1 where d_i > τ = μ + κ·σ, else ``easy_weight``. μ and σ are running mean and population deviation of
      d: the first batch sets them, later ones move them by 1 − ``momentum``, before they are used.
    - "topk": 1 for the k = max(1, ⌈ρ·B⌉) largest d (ties: the lower row), else ``easy_weight``; ρ goes from
      ``ratio_start`` to ``ratio_end`` by half a cosine over ``ratio_steps`` steps.
    - "soft": (d_i / mean d)^``gamma``.
    - "none": 1, which is feature consistency; so is easy_weight = 1.

    Buffers: ``mean``, ``deviation`` (one number each) and ``seen``, the batches so far. They move in training mode
    alone. Rows of all ranks must be given, or the ranks' states part.

    Raises:
        ValueError: a setting outside its range.

    >>> x = torch.eye(2)
    >>> ILED(miner="none")(x, x).item()
    0.0
    """

    mean: Tensor
    deviation: Tensor
    seen: Tensor

    def __init__(
        self, miner: InstanceMiner = "adaptive", momentum: float = 0.9, kappa: float = 0.0, easy_weight: float = 0.5,
        ratio_start: float = 1.0, ratio_end: float = 0.3, ratio_steps: int = 1000, gamma: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        _check_option("miner", miner, ("adaptive", "topk", "soft", "none"))
        for name, value in (("momentum", momentum), ("easy_weight", easy_weight)):
            _check(0 <= value <= 1, name, value, "between 0 and 1")
        for name, value in (("ratio_start", ratio_start), ("ratio_end", ratio_end)):
            _check(0 < value <= 1, name, value, "above 0 and at most 1")
        _check(ratio_steps >= 1, "ratio_steps", ratio_steps, "at least 1")
        _check(gamma >= 0, "gamma", gamma, "at least 0")
        self.miner, self.momentum, self.kappa, self.easy_weight = miner, momentum, kappa, easy_weight
        self.ratio_start, self.ratio_end, self.ratio_steps, self.gamma = ratio_start, ratio_end, ratio_steps, gamma
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("deviation", torch.zeros(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
        """Scalar in [0, 2], unweighted, at least float32.

        Args:
            student_BD: raw student embeddings; gradient flows, none into a zero row.
            teacher_BD: raw teacher embeddings of the same images; no gradient.

        Raises:
            ValueError: shapes differ, or no rows.
        """
        check_pair(student_BD, teacher_BD)
        with full_precision(student_BD):
            distance_B = cosine_distances(student_BD, teacher_BD)
            weight_B = self.weights(distance_B.detach())
            total = weight_B.sum()
            weighted = (weight_B * distance_B).sum() / torch.where(total > 0, total, 1.0)
            return torch.where(total > 0, weighted, distance_B.mean())

    @torch.no_grad()
    def weights(self, distance_B: Tensor) -> Tensor:
        """w of a batch; in training mode the running values take the batch first."""
        if self.miner == "adaptive":
            mean, deviation = distance_B.mean(), distance_B.std(correction=0)
            if self.training:
                own = torch.where(self.seen == 0, torch.ones_like(self.mean), 1.0 - self.momentum)
                self.mean.lerp_(mean.to(self.mean), own)
                self.deviation.lerp_(deviation.to(self.deviation), own)
            is_hard_B = distance_B > self.mean + self.kappa * self.deviation
        elif self.miner == "topk":
            kept = (self.ratio() * len(distance_B) - 1e-9).ceil().clamp(min=1)
            place_B = distance_B.argsort(descending=True, stable=True).argsort()
            is_hard_B = place_B < kept
        if self.training:
            self.seen += 1
        if self.miner == "soft":
            positive_B = distance_B.clamp(min=0)  # rounding can leave it below
            return (positive_B / positive_B.mean().clamp(min=torch.finfo(positive_B.dtype).tiny)) ** self.gamma
        if self.miner == "none":
            return torch.ones_like(distance_B)
        return torch.where(is_hard_B, torch.ones_like(distance_B), self.easy_weight)

    def ratio(self) -> Tensor:
        """ρ of the next batch of "topk": one number, float64 so that ρ·B is not rounded over a whole number."""
        done = (self.seen.double() / self.ratio_steps).clamp(max=1.0)
        return self.ratio_end + (self.ratio_start - self.ratio_end) * (1 + (math.pi * done).cos()) / 2


class MinedPairs(NamedTuple):
    """What RPSD compares: every anchor with every reference, bank slots first, then the batch."""

    difference_BR: Tensor  # student's similarity minus the teacher's; gradient flows to the student
    is_mined_BR: Tensor  # bool
    slots: int  # of the bank: the first columns


class RPSD(nn.Module):
    """Relation-based pairwise similarity distillation: mean of φ(S^s_ij − S^t_ij) over mined pairs.

    References of anchor i are the valid slots of the bank in storage order, then the batch without i itself.
    S^s_ij = cos(s_i, r^s_j), S^t_ij = cos(t_i, r^t_j). With ``reference="self"`` r^s is the student's stored vector, or
    of the batch its fresh one, into which gradient flows; with "cross" r^s = r^t, which needs equal widths. ``miner``:

    - "hard_negative": every reference of the anchor's label, and the ``top_k`` others of largest S^s;
    - "teacher_similar": the ``top_k`` of largest S^t; "discrepancy": of largest |S^s − S^t|; both without labels;
    - "all", and "random": ``top_k`` at random.

    Ties go to the earlier reference. φ is the square, or Huber's with ``delta``. Buffers: ``teacher_MD`` and
    ``student_MD``, unit rows; ``label_M``, -1 = empty; ``sample_M``, which image, -1 = unknown; ``ptr``, where the next
    row goes; ``count``, how many slots are filled, from slot 0 on. Only :meth:`enqueue` changes them.

    Args:
        half: store the bank in float16.

    Raises:
        ValueError: a setting outside its range, or "cross" between different widths.

    >>> x = torch.eye(3)
    >>> RPSD(3, 3, bank_size=4)(x[:, [1, 2, 0]], x, torch.arange(3)).item()  # a rotation changes no relation
    0.0
    """

    teacher_MD: Tensor
    student_MD: Tensor
    label_M: Tensor
    sample_M: Tensor
    ptr: Tensor
    count: Tensor

    def __init__(
        self, dim_student: int, dim_teacher: int, bank_size: int = 4096, top_k: int = 64,
        miner: PairMiner = "hard_negative", reference: Literal["self", "cross"] = "self", include_batch: bool = True,
        phi: Literal["square", "huber"] = "square", delta: float = 0.1, half: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        _check_option("miner", miner, ("hard_negative", "teacher_similar", "discrepancy", "all", "random"))
        _check_option("reference", reference, ("self", "cross"))
        _check_option("phi", phi, ("square", "huber"))
        for name, value, least in (("dim_student", dim_student, 1), ("dim_teacher", dim_teacher, 1),
                                   ("bank_size", bank_size, 0), ("top_k", top_k, 0)):  # fmt: skip
            _check(value >= least, name, value, f"at least {least}")
        _check(delta > 0, "delta", delta, "above 0")
        if reference == "cross" and dim_student != dim_teacher:
            raise ValueError(
                f"reference=cross compares student and teacher vectors, of widths {dim_student} and {dim_teacher}; "
                f"take reference=self, or equal widths"
            )
        self.top_k, self.miner, self.reference, self.include_batch = top_k, miner, reference, include_batch
        self.phi, self.delta, self.bank_size = phi, delta, bank_size
        stored = torch.float16 if half else torch.float32
        self.register_buffer("teacher_MD", torch.zeros(bank_size, dim_teacher, dtype=stored))
        self.register_buffer("student_MD", torch.zeros(bank_size, dim_student, dtype=stored))
        self.register_buffer("label_M", torch.full((bank_size,), -1))
        self.register_buffer("sample_M", torch.full((bank_size,), -1))
        self.register_buffer("ptr", torch.zeros((), dtype=torch.int64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(
        self, student_BD: Tensor, teacher_BD: Tensor, label_B: Tensor, sample_B: Tensor | None = None,
        use_bank: bool | Tensor = True,
    ) -> Tensor:  # fmt: skip
        """Scalar >= 0, unweighted, at least float32; 0 with a zero gradient where there is no pair.

        Args:
            student_BD: raw student embeddings; gradient flows, none into a zero row.
            teacher_BD: raw teacher embeddings of the same images; no gradient.
            label_B: identities, from 0.
            sample_B: which image each row is of; the same image, of the batch or of an earlier step, is no reference.
            use_bank: whether the bank's slots are references; a tensor keeps the decision on the device.

        Raises:
            ValueError: numbers of rows differ or are 0, or other widths than the module's.
        """
        return self.loss(self.pairs(student_BD, teacher_BD, label_B, sample_B, use_bank))

    def pairs(
        self, student_BD: Tensor, teacher_BD: Tensor, label_B: Tensor, sample_B: Tensor | None = None,
        use_bank: bool | Tensor = True,
    ) -> MinedPairs:  # fmt: skip
        """The pairs of a batch, and which are mined; arguments as :meth:`forward`."""
        self._check(student_BD, teacher_BD, label_B)
        with full_precision(student_BD):
            student_BD, teacher_BD = unit_rows(student_BD), unit_rows(teacher_BD.detach())
            teachers_RD = torch.cat([self.teacher_MD.to(teacher_BD), teacher_BD])
            students_RD = torch.cat([self.student_MD.to(student_BD), student_BD])
            own_BR = student_BD @ (students_RD if self.reference == "self" else teachers_RD.to(student_BD)).T
            theirs_BR = (teacher_BD @ teachers_RD.T).to(own_BR)
            difference_BR = own_BR - theirs_BR
            is_reference_BR = self._references(label_B, sample_B, use_bank)
            labels_R = torch.cat([self.label_M, label_B])
            with torch.no_grad():
                is_mined_BR = self._mined(own_BR.detach(), theirs_BR, is_reference_BR, label_B[:, None] == labels_R)
        return MinedPairs(difference_BR, is_mined_BR, self.bank_size)

    def loss(self, pairs: MinedPairs) -> Tensor:
        """Mean of φ over the mined pairs."""
        return mean_where(self._phi(pairs.difference_BR), pairs.is_mined_BR)

    @torch.no_grad()
    def staleness(self, pairs: MinedPairs) -> dict[str, Tensor]:
        """Mean square difference of the mined pairs with the bank, and with the batch.

        Above three times the other the bank's drift dominates what is learnt: make it smaller, or take "cross".
        """
        square_BR, slots = pairs.difference_BR.detach().square(), pairs.slots
        parts = {"bank": slice(0, slots), "batch": slice(slots, None)}
        return {name: mean_where(square_BR[:, own], pairs.is_mined_BR[:, own]) for name, own in parts.items()}

    @torch.no_grad()
    def enqueue(self, student_BD: Tensor, teacher_BD: Tensor, label_B: Tensor, sample_B: Tensor | None = None) -> None:
        """Stores rows as unit vectors, row r in slot (ptr + r) mod M; of more rows than slots the last M.

        To be called after the backward pass, on every rank with the rows of all ranks in rank order.

        Args, Raises: as :meth:`forward`.
        """
        self._check(student_BD, teacher_BD, label_B)
        if not self.bank_size:
            return
        rows = len(label_B)
        kept = min(rows, self.bank_size)
        slot_B = (self.ptr + torch.arange(rows - kept, rows, device=self.ptr.device)) % self.bank_size
        sample_B = torch.full_like(label_B, -1) if sample_B is None else sample_B
        self.teacher_MD[slot_B] = unit_rows(teacher_BD[-kept:]).to(self.teacher_MD)
        self.student_MD[slot_B] = unit_rows(student_BD[-kept:]).to(self.student_MD)
        self.label_M[slot_B] = label_B[-kept:]
        self.sample_M[slot_B] = sample_B[-kept:]
        self.ptr.copy_((self.ptr + rows) % self.bank_size)
        self.count.copy_((self.count + rows).clamp(max=self.bank_size))

    def _references(self, label_B: Tensor, sample_B: Tensor | None, use_bank: bool | Tensor) -> Tensor:
        """(B, R) which references an anchor has."""
        rows, device = len(label_B), label_B.device
        valid_M = torch.arange(self.bank_size, device=device) < self.count
        slot_BM = (valid_M & use_bank).expand(rows, -1)
        if sample_B is not None:
            slot_BM = slot_BM & ((self.sample_M != sample_B[:, None]) | (self.sample_M < 0))
        other_BB = ~torch.eye(rows, dtype=torch.bool, device=device) & self.include_batch
        if sample_B is not None:
            other_BB = other_BB & (sample_B != sample_B[:, None])
        return torch.cat([slot_BM, other_BB], dim=1)

    def _mined(self, own_BR: Tensor, theirs_BR: Tensor, is_reference_BR: Tensor, is_same_BR: Tensor) -> Tensor:
        if self.miner == "all":
            return is_reference_BR
        if self.miner == "hard_negative":
            others_BR = is_reference_BR & ~is_same_BR
            return (is_reference_BR & is_same_BR) | _largest(own_BR, others_BR, self.top_k)
        ranked = {
            "teacher_similar": lambda: theirs_BR,
            "discrepancy": lambda: (own_BR - theirs_BR).abs(),
            "random": lambda: torch.rand_like(own_BR),
        }[self.miner]()
        return _largest(ranked, is_reference_BR, self.top_k)

    def _phi(self, difference: Tensor) -> Tensor:
        if self.phi == "square":
            return difference.square()
        return F.huber_loss(difference, torch.zeros_like(difference), reduction="none", delta=self.delta)

    def _check(self, student_BD: Tensor, teacher_BD: Tensor, label_B: Tensor) -> None:
        shapes = [tuple(x.shape) for x in (student_BD, teacher_BD, label_B)]
        rows = shapes[0][0] if shapes[0] else 0
        expected = [(rows, self.student_MD.shape[1]), (rows, self.teacher_MD.shape[1]), (rows,)]
        if shapes != expected or not rows:
            raise ValueError(
                f"expected student (B, {expected[0][1]}), teacher (B, {expected[1][1]}) and labels (B,) with B at "
                f"least 1, got {shapes[0]}, {shapes[1]} and {shapes[2]}"
            )


def cosine_distances(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """(B,) 1 − cos(s_i, t_i) of raw embeddings, in [0, 2]; gradient to the student alone."""
    student_BD, teacher_BD = unit_pair(student_BD, teacher_BD)
    return 1 - (student_BD * teacher_BD).sum(dim=1)


def _largest(value_BR: Tensor, allowed_BR: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` largest allowed values of every row; ties go to the earlier column."""
    count = min(count, value_BR.shape[1])
    if not count:
        return torch.zeros_like(allowed_BR)
    value_BR = value_BR.masked_fill(~allowed_BR, -math.inf)
    least_B1 = value_BR.topk(count, dim=1).values[:, -1:]
    # topk orders ties as the device likes: of the values at its end the first ones are taken, until there are enough.
    above_BR, tie_BR = value_BR > least_B1, (value_BR == least_B1) & allowed_BR
    left_B1 = count - above_BR.sum(dim=1, keepdim=True)
    return above_BR | (tie_BR & (tie_BR.cumsum(dim=1, dtype=torch.int32) <= left_B1))


def _check(right: bool, name: str, value: float, expected: str) -> None:
    if not right:
        raise ValueError(f"{name} must be {expected}, got {value}")


def _check_option(name: str, value: str, known: tuple[str, ...]) -> None:
    _check(value in known, name, value, f"one of {', '.join(known)}")
