"""Which students gain from DDPS? The paper's three, alone and distilled, under the same settings."""

from search_spaces._space import SearchSpace

_ALONE = {"ld": 0.0, "cd": 0.0, "dfd": 0.0}
# Its stem stays as it was drawn, as in the public code; --set student.freeze_stem=false trains it.
_HALF = {"student.name": "resnet18.tv_in1k", "student.width": 0.5, "student.pretrained": False}
_MOBILE = {"student.name": "mobilenetv2_100.ra_in1k", "student.width": 1.0}
_WHOLE = {"student.name": "resnet18.tv_in1k", "student.width": 1.0}

SPACE = SearchSpace(
    method="ddps",
    question="Which students gain from DDPS?",
    cells={
        "R18": {**_WHOLE, **_ALONE},
        "R18 + DDPS": _WHOLE,
        "R18 ×0.5": {**_HALF, **_ALONE},
        "R18 ×0.5 + DDPS": _HALF,
        "MobileNetV2": {**_MOBILE, **_ALONE},
        "MobileNetV2 + DDPS": _MOBILE,
    },
    seeds=(0, 1),
    early_stopping=False,
)
