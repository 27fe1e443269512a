"""At which temperature are class predictions of faces distilled best, whole and grouped?"""

from search_spaces._space import SearchSpace

_TEMPERATURES = (1.0, 2.0, 4.0, 8.0)

SPACE = SearchSpace(
    method="face_kd",
    question="At which temperature do KD and GKD distil best?",
    cells={
        **{f"KD, T = {t:g}": {"temperature": t} for t in _TEMPERATURES},
        **{f"GKD, T = {t:g}": {"method": "gkd", "temperature": t} for t in _TEMPERATURES},
    },
    seeds=(0, 1),
    early_stopping=False,
)
