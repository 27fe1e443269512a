"""What tests of losses share: seeded tensors, comparisons in float64, gradients, autocast."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def close(found: Tensor, expected: Any, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    """Raises AssertionError unless both are the same numbers, in float64."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found.detach().double(), expected.detach().double(), rtol=rtol, atol=atol)


def with_gradient(loss: Callable[..., Tensor], student: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """Value, gradient to the student."""
    student = student.clone().requires_grad_()
    value = loss(student, *others)
    value.backward()
    return value.detach(), student.grad


def under_autocast(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The forward pass alone, as autocast is meant to be used."""

    def call(*arguments: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return loss(*arguments)

    return call
