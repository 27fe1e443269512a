"""How soft should the logits of LD and the attention of DFD be? The released temperatures first."""

from search_spaces._space import Choice, SearchSpace

SPACE = SearchSpace(
    method="ddps",
    question="How soft should the logits of LD and the attention of DFD be?",
    tune={"tau": Choice((1.0, 2.0, 4.0, 8.0)), "attention_temperature": Choice((0.25, 0.5, 1.0))},
    start=({"tau": 4.0, "attention_temperature": 0.5},),
    trials=12,
    picture=("tau", "attention_temperature"),
)
