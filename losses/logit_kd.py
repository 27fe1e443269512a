"""Distillation of class predictions (Hinton et al., 2015), "VanillaKD" in the D3still authors' code.

It aligns predictions, not embedding spaces: a student trained with it alone retrieves at chance against the
teacher's gallery. That is what the published tables show, not a defect.
"""

# Shape legend: B = batch, C = classes.

import math

import torch.nn.functional as F
from torch import Tensor

from losses.similarity import at_least_float32, check_pair, full_precision


def logit_kd(
    student_logits_BC: Tensor, teacher_logits_BC: Tensor, temperature: float = 2.0, reverse: bool = False
) -> Tensor:
    """T² · mean over images of KL(softmax(teacher / T) ‖ softmax(student / T)).

    Column c must be the same class on both sides.

    Args:
        student_logits_BC: gradient flows.
        teacher_logits_BC: no gradient.
        temperature: T > 0.
        reverse: KL(softmax(student / T) ‖ softmax(teacher / T)) instead.

    Returns:
        Scalar >= 0, unweighted, at least float32; 0 where student = teacher.

    Raises:
        ValueError: shapes differ, no rows, or a temperature that is not above 0 and finite.

    >>> import torch
    >>> logit_kd(torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 5.0]])).item()  # one distribution, shifted
    0.0
    """
    check_pair(student_logits_BC, teacher_logits_BC)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be above 0 and finite, got {temperature}")
    with full_precision(student_logits_BC):
        student_BC = F.log_softmax(at_least_float32(student_logits_BC) / temperature, dim=1)
        teacher_BC = F.log_softmax(at_least_float32(teacher_logits_BC.detach()) / temperature, dim=1)
        weighing_BC, other_BC = (student_BC, teacher_BC) if reverse else (teacher_BC, student_BC)
        return temperature**2 * F.kl_div(other_BC, weighing_BC, log_target=True, reduction="batchmean")
