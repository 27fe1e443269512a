"""How strong should correlation congruence be?

The D3still authors use 5, 10 and 2; the other form is ``--set form=kernel``.
"""

from search_spaces._space import Float, SearchSpace

SPACE = SearchSpace(
    method="cckd",
    question="How strong should correlation congruence be?",
    tune={"weight": Float(0.1, 1000.0, log=True)},
    start=({"weight": 1.0}, {"weight": 2.0}, {"weight": 5.0}, {"weight": 10.0}),
    trials=8,
    picture=("weight",),
)
