"""How should cosines become the distributions of L_int, and how much should it weigh? The paper says neither."""

from search_spaces._space import Choice, SearchSpace

SPACE = SearchSpace(
    method="rsiamnet",
    question="How should L_int compare likenesses, and how much should it weigh?",
    tune={
        "inter": Choice((0.1, 1.0, 10.0)),
        "inter_temperature": Choice((0.0625, 0.1, 0.5, 1.0)),
        "inter_diagonal": Choice((True, False)),
        "inter_reduction": Choice(("mean", "sum")),
    },
    start=(
        {"inter": 1.0, "inter_temperature": 1.0, "inter_diagonal": True, "inter_reduction": "mean"},
        {"inter": 1.0, "inter_temperature": 0.1, "inter_diagonal": False, "inter_reduction": "mean"},
    ),
    trials=16,
    picture=("inter_temperature", "inter"),
)
