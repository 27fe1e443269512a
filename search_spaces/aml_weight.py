"""How strong should AML's contrastive pairs be, and from which distance is a negative far enough? (0.7.)"""

from search_spaces._space import Float, SearchSpace

SPACE = SearchSpace(
    method="aml",
    question="How strong should AML's pairs be, and from which distance is a negative far enough?",
    tune={"weight": Float(1e-4, 1.0, log=True), "margin": Float(0.0, 1.4)},
    start=({"weight": 1 / 512, "margin": 0.7}, {"weight": 1 / 512, "margin": 0.1}),
    fix={"variant": "contrastive+", "together": 2},
    trials=8,
    picture=("weight", "margin"),
)
