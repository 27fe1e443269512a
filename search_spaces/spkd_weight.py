"""How strong should preserved similarities be? The usual weight for classification is 3,000.

Watch the student on both sides: the asymmetric numbers stay at chance.
"""

from search_spaces._space import Float, SearchSpace

SPACE = SearchSpace(
    method="spkd",
    question="How strong should preserved similarities be?",
    tune={"weight": Float(30.0, 3e5, log=True)},
    start=({"weight": 3_000.0},),
    fix={"evaluate_symmetric": True},
    trials=8,
    metric="symmetric/map",
    picture=("weight",),
)
