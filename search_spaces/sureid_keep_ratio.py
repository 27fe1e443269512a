"""How many tokens can be dropped? Table V of the paper, with p = 1 (predictors, nothing dropped) and no pruning at all.

"no pruning" is trained with the same teacher and views, so that the rows differ in the tokens alone.
"""

from search_spaces._space import SearchSpace

SPACE = SearchSpace(
    method="sureid",
    question="How many tokens can be dropped?",
    cells={
        "no pruning": {"hts": False},
        **{f"p = {p}": {"keep_ratio": p} for p in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)},
    },
    seeds=(0, 1),
    early_stopping=False,
)
