"""How strongly should raw embeddings be pulled together? The D3still authors use 2, with MobileNetV3-small 5."""

from search_spaces._space import Float, SearchSpace

SPACE = SearchSpace(
    method="fitnet",
    question="How strongly should raw embeddings be pulled together?",
    tune={"weight": Float(0.1, 1000.0, log=True)},
    start=({"weight": 2.0}, {"weight": 5.0}),
    trials=8,
    picture=("weight",),
)
