"""Which weights do ILED and RPSD want, and which learning rate? Ours to find: the paper's are not public."""

from search_spaces._space import Float, SearchSpace

SPACE = SearchSpace(
    method="unified_face",
    question="Which weights of ILED and RPSD, and which rate, verify best?",
    tune={
        "iled": Float(1.0, 50.0, log=True),
        "rpsd": Float(5.0, 500.0, log=True),
        "train.rate": Float(1e-4, 0.3, log=True),
    },
    start=({"iled": 10.0, "rpsd": 50.0, "train.rate": 0.1}, {"iled": 10.0, "rpsd": 50.0, "train.rate": 2e-3}),
    trials=20,
    picture=("iled", "rpsd"),
)
