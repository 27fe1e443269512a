"""What does each part of SUReID add? Table IV of the paper, and what two views add without an occluder.

"none" is the plain network. NODA doubles the images of a step; "HTS + NPKD, two views" has as many without pasting, so
that the last two rows differ in the occluders alone. The paper does not have that row.
"""

from search_spaces._space import SearchSpace

SPACE = SearchSpace(
    method="sureid",
    question="What does each part of SUReID add?",
    cells={
        "none": {"hts": False, "npkd": False, "noda": False},
        "HTS": {"npkd": False, "noda": False},
        "HTS + NPKD": {"noda": False},
        "HTS + NPKD, two views": {"noda": False, "views_without_noda": 2},
        "SUReID": {},
    },
    seeds=(0, 1),
    early_stopping=False,
)
