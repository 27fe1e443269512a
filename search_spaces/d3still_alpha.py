"""How dominant must the feature term be? Paper: α = 100; the authors' code uses 50, 100 and 200."""

from search_spaces._space import Float, SearchSpace

SPACE = SearchSpace(
    method="d3still",
    question="How dominant must the feature term (α) be?",
    tune={"alpha": Float(5.0, 1000.0, log=True)},
    start=({"alpha": 100.0}, {"alpha": 50.0}, {"alpha": 200.0}),
    trials=8,
    picture=("alpha",),
)
