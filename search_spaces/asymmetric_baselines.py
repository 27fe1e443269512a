"""Which method makes the best asymmetric student? Block B of the D3still paper's table 4, at equal budget.

Every row trains the same student under the same teacher for the same epochs, each with its method's own weights on the
benchmark. Rows with "+ CE + triplet" add the supervised losses of the authors' later code, with its weights for
ResNet18 on In-Shop and SOP; the whole of its setting is ``--on inshop_repo`` and the like. "whole set" takes the
neighbours from the training set, as CSD and ROP originally do. "student alone" has no distillation loss and does not
live in the teacher's space, so its numbers on both sides are the fair ones.
"""

from search_spaces._space import SearchSpace

_SUPERVISED = {"mode": "repo"}

SPACE = SearchSpace(
    method="d3still",
    question="Which method makes the best asymmetric student?",
    cells={
        "student alone": {"alpha": 0.0, "beta": 0.0, "gamma": 0.0, **_SUPERVISED},
        "VanillaKD": {"method": "vanillakd"},
        "RKD": {"method": "rkd"},
        "PKT": {"method": "pkt"},
        "SP-KD": {"method": "spkd"},
        "CCKD kernel": {"method": "cckd", "form": "kernel"},
        "FitNet": {"method": "fitnet"},
        "AML regression": {"method": "aml"},
        "CCKD": {"method": "cckd"},
        "CSD": {"method": "csd"},
        "CSD whole set": {"method": "csd", "neighbours": "train"},
        "RAML": {"method": "raml"},
        "ROP": {"method": "rop"},
        "ROP whole set": {"method": "rop", "neighbours": "train"},
        "UGD": {"method": "ugd"},
        "D3still": {},
        "CSD + CE + triplet": {"method": "csd", "weight": 10.0, **_SUPERVISED},
        "ROP + CE + triplet": {"method": "rop", "weight": 1.0, **_SUPERVISED},
        "D3still + CE + triplet": {"alpha": 100.0, "beta": 5 / 9, "gamma": 1 / 9, **_SUPERVISED},
    },
    seeds=(0, 1),
    fix={"evaluate_symmetric": True},
    early_stopping=False,
)
