"""The family of plain retrieval for tests that run for every family."""

from typing import Any

# The same networks and batches; what a method does not have is left out.
from families.asymmetric import NORMS_PER_WORKER, TINY

__all__ = ["CASES", "NORMS_PER_WORKER", "TINY"]

CASES: dict[str, tuple[dict[str, Any], ...]] = {"supervised": ({}, {"cross_entropy": 1.0, "triplet": 0.0})}
