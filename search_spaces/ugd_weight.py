"""How should UGD's global and local distances be weighed? The D3still authors use α = 1, 2, 3 or 5 and β = 2."""

from search_spaces._space import Float, SearchSpace

SPACE = SearchSpace(
    method="ugd",
    question="How should UGD's global and local distances be weighed?",
    tune={"alpha": Float(0.3, 100.0, log=True), "beta": Float(0.03, 30.0, log=True)},
    start=(
        {"alpha": 2.0, "beta": 2.0},
        {"alpha": 1.0, "beta": 2.0},
        {"alpha": 3.0, "beta": 2.0},
        {"alpha": 5.0, "beta": 2.0},
    ),
    trials=8,
    picture=("alpha", "beta"),
)
