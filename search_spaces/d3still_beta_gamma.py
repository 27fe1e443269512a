"""How strongly should inconsistent (β) and consistent (γ) pairs bind the student?

Paper: figures 3 and 4, β ∈ {0.1, 0.2, 0.3} at γ = 0.1 and γ ∈ {0.1, 0.2, 0.3} at β = 0.2; default (0.2, 0.1).
"""

from search_spaces._space import Float, SearchSpace

SPACE = SearchSpace(
    method="d3still",
    question="How strongly should inconsistent (β) and consistent (γ) pairs bind the student?",
    tune={"beta": Float(0.02, 2.0, log=True), "gamma": Float(0.02, 2.0, log=True)},
    start=(
        {"beta": 0.2, "gamma": 0.1},
        {"beta": 0.1, "gamma": 0.1},
        {"beta": 0.3, "gamma": 0.1},
        {"beta": 0.2, "gamma": 0.2},
        {"beta": 0.2, "gamma": 0.3},
    ),
    trials=8,
    picture=("beta", "gamma"),
)
