"""Which sharpness, rank weight, number of neighbours and weight does ROP need?

The D3still authors use 0.1 and 0.2, weights 0.5 to 2 and the whole batch of 256, which is the recipe of ``*_repo*``;
the range here fits the smallest batch of any benchmark.
"""

from search_spaces._space import Float, Int, SearchSpace

SPACE = SearchSpace(
    method="rop",
    question="Which sharpness, rank weight, number of neighbours and weight does ROP need?",
    tune={
        "weight": Float(0.1, 100.0, log=True),
        "temperature": Float(0.01, 1.0, log=True),
        "rank_weight": Float(0.0, 10.0),
        "top_k": Int(4, 112, log=True),
    },
    start=(
        {"weight": 1.0, "temperature": 0.1, "rank_weight": 0.2, "top_k": 96},
        {"weight": 10.0, "temperature": 0.1, "rank_weight": 0.2, "top_k": 96},
        {"weight": 10.0, "temperature": 0.1, "rank_weight": 0.2, "top_k": 10},
    ),
    trials=12,
    picture=("temperature", "top_k"),
)
