"""Does pasting occluders help a plain transformer, and one that drops tokens? Table VII of the paper.

The paper's rows seem to be of two networks: the plain ones of ViT-B, the others (equal to two rows of table IV) of
DeiT-S. On benchmarks with networks of a set width all rows have that width.
"""

from search_spaces._space import SearchSpace

_PLAIN = {"hts": False, "npkd": False, "student.name": "vit_base_patch16_224.orig_in21k_ft_in1k"}

SPACE = SearchSpace(
    method="sureid",
    question="Does pasting occluders help a plain transformer, and one that drops tokens?",
    cells={
        "ViT": {**_PLAIN, "noda": False},
        "ViT + NODA": _PLAIN,
        "SUReID without NODA": {"noda": False},
        "SUReID": {},
    },
    seeds=(0, 1),
    early_stopping=False,
)
