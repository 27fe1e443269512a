"""What do ILED, RPSD, its memory bank and the mining of both add? The grid that the paper's abstract suggests.

With "mining" ILED weighs hard faces more and RPSD compares with mined references; without, every face counts alike,
which makes ILED feature consistency, and every reference is compared with. ILED and RPSD are our reading.
"""

from search_spaces._space import SearchSpace

_NO_BANK = {"bank": 0}
_PLAIN = {"iled_miner": "none", "rpsd_miner": "all"}

SPACE = SearchSpace(
    method="unified_face",
    question="What do ILED, RPSD, the memory bank and mining add?",
    cells={
        "student alone": {"iled": 0.0, "rpsd": 0.0},
        "FC": {"iled_miner": "none", "rpsd": 0.0},
        "ILED": {"rpsd": 0.0},
        "RPSD": {"iled": 0.0},
        "RPSD without bank": {"iled": 0.0, **_NO_BANK},
        "RPSD without mining": {"iled": 0.0, "rpsd_miner": "all"},
        "RPSD without both": {"iled": 0.0, "rpsd_miner": "all", **_NO_BANK},
        "ILED + RPSD": {},
        "ILED + RPSD without bank": _NO_BANK,
        "ILED + RPSD without mining": _PLAIN,
        "ILED + RPSD without both": {**_PLAIN, **_NO_BANK},
    },
    seeds=(0, 1),
    early_stopping=False,
)
