"""How large a memory bank, how many mined references, and which?"""

from search_spaces._space import Choice, SearchSpace

SPACE = SearchSpace(
    method="unified_face",
    question="How do the bank's size, the number of mined references and the miner of RPSD matter?",
    tune={
        "bank": Choice((0, 1024, 4096, 16_384)),
        "top_k": Choice((16, 64, 256)),
        "rpsd_miner": Choice(("hard_negative", "teacher_similar", "discrepancy")),
    },
    start=({"bank": 4096, "top_k": 64, "rpsd_miner": "hard_negative"},),
    fix={"iled": 0.0},
    trials=20,
    picture=("bank", "top_k"),
)
