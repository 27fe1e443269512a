"""What does each term of D3still add? The rows of the paper's tables 1, 2 and 3, and the student alone.

The paper does not give the weights of L_pair (here 1), nor of L_irpd and L_crpd alone (here 0.1, as in L_rpd).
"student alone" has no distillation loss and is trained with cross-entropy and triplet; it does not live in the
teacher's space, so its symmetric numbers are the fair ones.
"""

from search_spaces._space import SearchSpace

_OFF = {"alpha": 0.0, "beta": 0.0, "gamma": 0.0}

SPACE = SearchSpace(
    method="d3still",
    question="What does each term of D3still add?",
    cells={
        "student alone": {**_OFF, "mode": "repo"},
        "L_pd": {**_OFF, "differential": 1.0},
        "L_f": {"beta": 0.0, "gamma": 0.0},
        "L_f + L_pair": {"beta": 0.0, "gamma": 0.0, "pairwise": 1.0},
        "L_f + L_irpd": {"beta": 0.1, "gamma": 0.0},
        "L_f + L_crpd": {"beta": 0.0, "gamma": 0.1},
        "L_f + L_rpd": {"beta": 0.1, "gamma": 0.1},
        "L_f + L_drpd": {"beta": 0.2, "gamma": 0.1},
    },
    seeds=(0, 1, 2),
    fix={"evaluate_symmetric": True},
    early_stopping=False,
)
