"""How sharp should L_clu be, and how much of a memory's row should stay? The paper's values first."""

from search_spaces._space import Choice, SearchSpace

SPACE = SearchSpace(
    method="rsiamnet",
    question="How sharp should L_clu be, and how slow its memory?",
    tune={"gamma": Choice((8.0, 16.0, 32.0, 64.0)), "bank_momentum": Choice((0.0, 0.2, 0.5, 0.8))},
    start=({"gamma": 16.0, "bank_momentum": 0.2},),
    trials=12,
    picture=("gamma", "bank_momentum"),
)
