"""Asymmetric image retrieval, the task of D3still and of the methods it is compared with.

A small student embeds queries, a large frozen teacher the gallery, so the student must live in the teacher's
space. A method of this family is its recipe and one function from a batch's :class:`Pairs` to loss terms.

Two published modes: ``paper`` (the distillation loss alone on one shuffled batch) and ``repo`` (the authors'
later code: additionally cross-entropy and triplet on a second, P × K batch; the student runs twice a step).

The teacher's embedding of a training image can come from three places, which are three objectives:

    online     the teacher runs in the loop on its own augmented view (what the authors do)
    recorded   V augmented views per image, embedded once, their draws stored; a view is replayed at random
    clean      the embedding of the plain image, as in the gallery at test time

Rooms: recipe.py (numbers, and what a method is), pairs.py (the task), job.py (needs, training, scoring),
benchmarks.py (what all methods share on a benchmark).
"""

from orchestrator.families.asymmetric.benchmarks import SMALL
from orchestrator.families.asymmetric.job import method
from orchestrator.families.asymmetric.pairs import Pairs
from orchestrator.families.asymmetric.recipe import (
    AsymmetricRecipe,
    Distillation,
    check_top_k,
    over_neighbours,
    recipes,
)

__all__ = [
    "SMALL", "AsymmetricRecipe", "Distillation", "Pairs", "check_top_k", "method", "over_neighbours", "recipes",
]  # fmt: skip
