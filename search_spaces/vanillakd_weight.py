"""How soft, and how strong, should the teacher's class predictions be? The D3still authors use T = 2, weight 1.

Watch the student on both sides: the asymmetric numbers stay at chance.
"""

from search_spaces._space import Float, SearchSpace

SPACE = SearchSpace(
    method="vanillakd",
    question="How soft, and how strong, should the teacher's class predictions be?",
    tune={"weight": Float(0.1, 100.0, log=True), "temperature": Float(1.0, 20.0, log=True)},
    start=(
        {"weight": 1.0, "temperature": 2.0},
        {"weight": 1.0, "temperature": 1.0},
        {"weight": 1.0, "temperature": 4.0},
    ),
    fix={"evaluate_symmetric": True},
    trials=8,
    metric="symmetric/map",
    picture=("weight", "temperature"),
)
