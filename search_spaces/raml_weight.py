"""How should RAML's two relational terms be weighed? Its authors' optimum on SOP is λ1 = 0.7482, λ2 = 0.6778.

The second point is what the D3still authors' code runs on In-Shop and SOP: it uses λ1 twice, at weight 10.
"""

from search_spaces._space import Float, SearchSpace

SPACE = SearchSpace(
    method="raml",
    question="How should RAML's two relational terms be weighed?",
    tune={"lambda1": Float(0.0, 2.0), "lambda2": Float(0.0, 2.0), "weight": Float(0.3, 300.0, log=True)},
    start=(
        {"lambda1": 0.7482, "lambda2": 0.6778, "weight": 1.0},
        {"lambda1": 0.7482, "lambda2": 0.7482, "weight": 10.0},
        {"lambda1": 0.7482, "lambda2": 0.6778, "weight": 10.0},
    ),
    fix={"lambda2_slip": False},
    trials=10,
    picture=("lambda1", "lambda2"),
)
