"""DDPS, IEEE TMM 2025: the numbers of the public repository, of single runs; the paper's own tables were not available.

CUHK-SYSU with galleries of 100 frames. The text claims students above their teacher: that holds for ResNet18 on both
sets, and for MobileNetV2 on PRW alone.
"""

from dataclasses import replace

from orchestrator.published._row import NO_TEACHER, TEACHER, Published, rows_of

_SOURCE = "DDPS, IEEE TMM 2025, README of the public code"
_PIXELS = "900×1500"
_STUDENTS = {"R50": "ResNet50", "R18": "ResNet18", "R18 ×0.5": "ResNet18 ×0.5", "MobileNetV2": "MobileNetV2"}
_ALONE, _WHOLE = "detection + OIM", "detection + OIM + LD + CD + DFD"
_UNEQUAL = {
    ("cuhk_sysu", "R18"): "its batch norms are frozen, those of its distilled twin are not",
    ("cuhk_sysu", "MobileNetV2"): "from scratch, its distilled twin from ImageNet",
}


def _rows(table: str) -> list[Published]:
    """Rows "network [+ DDPS]: mAP and top-1 on CUHK-SYSU, mAP and top-1 on PRW"."""
    found = []
    for row, values in rows_of(table):
        network, _, distilled = row.partition(" + ")
        for benchmark, (mean, top1) in (("cuhk_sysu", values[:2]), ("prw", values[2:])):
            found.append(
                Published(
                    source=_SOURCE,
                    benchmark=benchmark,
                    row=TEACHER if network == "R50" else row,
                    student=f"{_STUDENTS[network]}@{_PIXELS}",
                    teacher=f"ResNet50@{_PIXELS}" if distilled else NO_TEACHER,
                    losses=_WHOLE if distilled else _ALONE,
                    scores={"map": mean, "top1": top1},
                    note=_UNEQUAL.get((benchmark, row), ""),
                )
            )
    return found


TABLE = _rows(
    """
    R50: 91.96 92.72 41.43 79.24
    R18: 89.96 91.03 38.50 77.39
    R18 + DDPS: 92.57 93.45 41.93 79.58
    R18 ×0.5: 79.23 81.34 32.29 74.28
    R18 ×0.5 + DDPS: 86.03 87.21 36.50 76.28
    MobileNetV2: 89.60 91.00 39.85 79.97
    MobileNetV2 + DDPS: 91.12 92.45 41.78 80.21
    """
)

_CELLS = {TEACHER: TEACHER, "R18": "student alone", "R18 + DDPS": "DDPS"}
BESIDE = {
    "ddps_students": TABLE,
    "ddps_modules": [replace(row, row=_CELLS[row.row]) for row in TABLE if row.row in _CELLS],
}
