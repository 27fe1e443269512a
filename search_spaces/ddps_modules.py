"""What does each part of DDPS add, and what do other feature losses in the place of DFD?

The paper's table of parts was not available; the rows with PKD and ReviewKD are configurations of the public code.
"""

from search_spaces._space import SearchSpace

_ALONE = {"ld": 0.0, "cd": 0.0, "dfd": 0.0}

SPACE = SearchSpace(
    method="ddps",
    question="What does each part of DDPS add?",
    cells={
        "student alone": _ALONE,
        "LD": {"cd": 0.0, "dfd": 0.0},
        "CD": {"ld": 0.0, "dfd": 0.0},
        "DFD": {"ld": 0.0, "cd": 0.0},
        "DDPS": {},
        "LD + CD": {"dfd": 0.0},
        "LD + CD + PKD": {"dfd": 0.0, "pkd": 6.0},
        "LD + CD + ReviewKD": {"dfd": 0.0, "reviewkd": 1.2},
    },
    seeds=(0, 1),
    early_stopping=False,
)
