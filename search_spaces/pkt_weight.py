"""How strong should the probabilities of being neighbours be? The D3still authors use 30,000.

Watch the student on both sides: the asymmetric numbers stay at chance.
"""

from search_spaces._space import Float, SearchSpace

SPACE = SearchSpace(
    method="pkt",
    question="How strong should the probabilities of being neighbours be?",
    tune={"weight": Float(300.0, 3e6, log=True)},
    start=({"weight": 30_000.0},),
    fix={"evaluate_symmetric": True},
    trials=8,
    metric="symmetric/map",
    picture=("weight",),
)
