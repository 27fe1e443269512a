"""How strongly should DDPS's three parts pull? The released weights first; the four terms of DFD keep their ratios."""

from search_spaces._space import Float, SearchSpace

SPACE = SearchSpace(
    method="ddps",
    question="How strongly should DDPS's three parts pull?",
    tune={"ld": Float(0.25, 4.0, log=True), "cd": Float(1e-3, 1e-1, log=True), "dfd": Float(0.1, 10.0, log=True)},
    start=({"ld": 1.0, "cd": 0.01, "dfd": 1.0},),
    trials=20,
    picture=("cd", "dfd"),
)
