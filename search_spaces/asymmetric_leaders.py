"""Do the strongest methods of the D3still paper's table 4 keep their order? D3still, RAML and FitNet, three seeds.

The short form of ``asymmetric_baselines``, for another data set or a first look.
"""

from search_spaces._space import SearchSpace

SPACE = SearchSpace(
    method="d3still",
    question="Do the strongest methods of table 4 keep their order?",
    cells={"FitNet": {"method": "fitnet"}, "RAML": {"method": "raml"}, "D3still": {}},
    seeds=(0, 1, 2),
    fix={"evaluate_symmetric": True},
    early_stopping=False,
)
