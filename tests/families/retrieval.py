"""The family of plain retrieval for tests that run for every family."""

from families.asymmetric import TINY  # the same networks and batches; what a method does not have is left out

__all__ = ["TINY"]
