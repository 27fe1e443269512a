"""Does R-SiamNet gain from more scenes? The paper's table 3: a part of the training frames, each inside the next.

Its rows of several data sets are benchmarks: ``--on cuhk_sysu_and_prw``, ``cuhk_sysu_and_both``, ``prw_and_cuhk_sysu``,
``prw_and_both``.
"""

from search_spaces._space import SearchSpace

SPACE = SearchSpace(
    method="rsiamnet",
    question="Does R-SiamNet gain from more scenes?",
    cells={f"{share} % data": {"data.fraction": share / 100} for share in (20, 40, 60, 80, 100)},
    seeds=(0, 1),
    early_stopping=False,
)
