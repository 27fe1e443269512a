"""How strong, and how soft, should the class predictions be in NPKD? The paper fixes λ = 0.1 and T = 1."""

from search_spaces._space import Choice, SearchSpace

SPACE = SearchSpace(
    method="sureid",
    question="How strong, and how soft, should the class predictions be in NPKD?",
    tune={"logit_weight": Choice((0.0, 0.05, 0.1, 0.5, 1.0)), "temperature": Choice((1.0, 2.0, 4.0, 8.0))},
    start=(
        {"logit_weight": 0.1, "temperature": 1.0},
        *({"logit_weight": weight, "temperature": 1.0} for weight in (0.0, 0.05, 0.5, 1.0)),
        *({"logit_weight": 0.1, "temperature": temperature} for temperature in (2.0, 4.0, 8.0)),
    ),
    trials=12,
    picture=("logit_weight", "temperature"),
)
