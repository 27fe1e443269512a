"""Does the order of the methods hold for other networks? Blocks B, C and D of the D3still paper's table 4.

B: ResNet18 under ResNet101. C: MobileNetV2 under ResNet101. D: ResNet18 under SwinV2-T. Three full-size teachers are
not trained in minutes: made for a GPU and the paper's data sets (``--on inshop``).
"""

from search_spaces._space import SearchSpace

_RESNET101 = {"teacher.name": "resnet101.tv_in1k", "teacher.width": 1.0}
_SWIN = {
    "teacher.name": "swinv2_tiny_window8_256.ms_in1k",
    "teacher.width": 1.0,
    "teacher.optimizer": "adamw",
    "teacher.rate": 1e-4,
}
_BLOCKS = {
    "B": {"student.name": "resnet18.tv_in1k", "student.width": 1.0, **_RESNET101},
    "C": {"student.name": "mobilenetv2_100.ra_in1k", "student.width": 1.0, **_RESNET101},
    "D": {"student.name": "resnet18.tv_in1k", "student.width": 1.0, **_SWIN},
}
_METHODS = {"FitNet": "fitnet", "CCKD": "cckd", "CSD": "csd", "RAML": "raml", "ROP": "rop", "D3still": "d3still"}

SPACE = SearchSpace(
    method="d3still",
    question="Does the order of the methods hold for other networks?",
    cells={
        f"{block} {name}": {"method": method, **networks}
        for block, networks in _BLOCKS.items()
        for name, method in _METHODS.items()
    },
    early_stopping=False,
)
