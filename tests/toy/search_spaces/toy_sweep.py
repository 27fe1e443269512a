"""How hard should the bank pull, and how sharply?"""

from search_spaces._space import Float, SearchSpace

SPACE = SearchSpace(
    method="toy",
    question="How hard should the bank pull, and how sharply?",
    tune={"lambda_bank": Float(0.1, 10.0, log=True), "tau": Float(0.05, 1.0, log=True)},
    start=({"lambda_bank": 1.0, "tau": 0.2}, {"lambda_bank": 3.0, "tau": 0.2}),
    trials=4,
    picture=("lambda_bank", "tau"),
)
