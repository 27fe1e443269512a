"""Which temperatures, how many neighbours and which weight does CSD need?

The D3still authors use 1 and 0.01, weights 5 to 20 and the whole batch of 256, which is the recipe of ``*_repo*``; the
range here fits the smallest batch of any benchmark.
"""

from search_spaces._space import Float, Int, SearchSpace

SPACE = SearchSpace(
    method="csd",
    question="Which temperatures, how many neighbours and which weight does CSD need?",
    tune={
        "weight": Float(0.3, 100.0, log=True),
        "query_temperature": Float(0.01, 2.0, log=True),
        "gallery_temperature": Float(0.005, 1.0, log=True),
        "top_k": Int(4, 112, log=True),
    },
    start=(
        {"weight": 1.0, "query_temperature": 1.0, "gallery_temperature": 0.01, "top_k": 96},
        {"weight": 10.0, "query_temperature": 1.0, "gallery_temperature": 0.01, "top_k": 96},
        {"weight": 10.0, "query_temperature": 0.1, "gallery_temperature": 0.1, "top_k": 96},
    ),
    trials=12,
    picture=("query_temperature", "top_k"),
)
