"""How should distances and angles be weighed? The D3still authors use 25 and 50, the original 1 and 2.

Watch the student on both sides: the asymmetric numbers stay at chance.
"""

from search_spaces._space import Float, SearchSpace

SPACE = SearchSpace(
    method="rkd",
    question="How should distances and angles be weighed?",
    tune={"distance": Float(0.5, 500.0, log=True), "angle": Float(0.5, 500.0, log=True)},
    start=({"distance": 25.0, "angle": 50.0}, {"distance": 1.0, "angle": 2.0}),
    fix={"evaluate_symmetric": True},
    trials=8,
    metric="symmetric/map",
    picture=("distance", "angle"),
)
