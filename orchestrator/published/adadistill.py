"""AdaDistill, ECCV 2024: its comparison of methods and its ablation, of single runs.

Percent: verification accuracy of LFW to CPLFW and their average, TAR at a FAR of IJB-C and IJB-B, and the three columns
of the masked face recognition challenge of ICCV 2021. Rows of other methods are as this paper prints them. The best
teacher of its student is not the largest.
"""

from orchestrator.published._row import ALONE, NO_TEACHER, TEACHER, Published, given, rows_of

_PAPER = "AdaDistill, ECCV 2024"
_STUDENT, _TEACHER = "MobileFaceNet@112", "IResNet50@112"
_ALONE, _WHOLE = "margin softmax", "all of each method's own"

_SETS = tuple(f"{name}/accuracy" for name in ("lfw", "cfp_fp", "agedb_30", "calfw", "cplfw"))
_IJB = ("ijbc/tar_1e-4", "ijbc/tar_1e-5", "ijbb/tar_1e-4", "ijbb/tar_1e-5")
_MFR = ("mfr_all", "mfr_children", "mfr_mask")
_SHORT = ("accuracy", "ijbc/tar_1e-4", "ijbc/tar_1e-5")

_OTHER_EVALUATION = "the ablation prints 96.05 / 93.96 on IJB-C for this teacher: another evaluation"
_TEACHER_THERE = "the comparison prints 95.16 / 92.66 on IJB-C for this teacher: another evaluation"
_AVERAGE = "the ablation prints an average of 95.47; its own five numbers average 95.43"


def _row(
    part: str, row: str, scores: dict[str, float], benchmark: str = "ms1mv2", teacher: str = _TEACHER, note: str = ""
) -> Published:
    """A row of the small student, or of the teacher where its name says so."""
    by_itself = row in (TEACHER, ALONE)
    return Published(
        source=f"{_PAPER}, {part}",
        benchmark=benchmark,
        row=row,
        student=_TEACHER if row == TEACHER else _STUDENT,
        teacher=NO_TEACHER if by_itself else teacher,
        losses=_ALONE if by_itself else _WHOLE,
        scores=scores,
        note=note,
    )


TABLE = [
    _row("comparison", row, given((*_SETS, "accuracy", *_IJB, *_MFR), values),
         note=_OTHER_EVALUATION if row == TEACHER else "")
    for row, values in rows_of(
        f"""
        {TEACHER}: 99.80 97.63 97.92 96.05 92.50 96.78 95.16 92.66 93.45 88.65 75.48 49.41 54.50
        {ALONE}: 99.52 91.66 95.82 95.12 87.93 94.01 89.13 81.65 87.07 74.63 53.43 24.71 27.90
        FitNet: 99.47 91.30 96.18 95.12 88.30 94.07 87.76 73.71 86.35 70.19 54.46 26.62 28.47
        KD: 99.50 91.71 95.93 95.03 87.85 94.00 88.37 80.39 86.08 74.30 50.77 26.36 25.74
        DarkRank: 99.55 91.84 95.60 95.07 87.77 93.97 89.28 81.62 86.76 73.75 56.82 28.84 30.07
        SP: 99.53 92.33 96.17 95.07 88.45 94.31 88.43 78.13 86.34 72.85 54.44 26.63 29.75
        CCKD: 99.47 91.90 95.83 95.22 88.48 94.18 87.99 78.75 85.63 72.38 55.64 27.65 30.22
        RKD: 99.58 92.13 96.18 95.25 87.97 94.22 89.65 83.21 87.27 75.17 53.92 27.91 27.94
        ShrinkTeaNet: 99.47 91.97 96.00 94.98 88.52 94.19 87.80 79.78 85.31 75.23 55.28 27.73 30.24
        TripletDistillation: 99.55 93.14 95.53 94.97 88.03 94.24 84.57 76.65 81.88 70.51 - - -
        MarginDistillation: 99.61 92.01 96.55 95.13 88.03 94.27 85.71 75.00 82.97 66.25 50.73 25.14 28.54
        SFTN: 99.48 92.77 96.30 - - - 90.96 82.67 - - 55.50 28.51 29.66
        EKD: 99.60 94.33 96.48 95.37 89.35 95.03 90.48 84.00 88.35 76.60 56.60 28.95 32.14
        SH-KD: 99.47 94.67 96.53 - - - 91.75 85.76 - - 57.69 30.15 32.01
        ReFO: 99.55 94.51 96.92 - - - 92.23 87.55 - - 56.63 33.36 31.88
        ReFO+: 99.65 94.77 96.42 - - - 92.41 87.80 - - 59.17 32.80 32.24
        AdaArcDistill: 99.58 95.24 96.78 95.55 90.02 95.43 93.27 89.32 91.21 84.13 58.37 37.21 35.36
        AdaCosDistill: 99.50 95.07 96.60 95.33 90.02 95.30 93.05 89.21 90.93 84.32 60.56 39.94 37.06
        """
    )
]  # fmt: skip

ABLATION = [
    _row(
        "ablation", TEACHER,
        {"calfw/accuracy": 96.10, "cplfw/accuracy": 92.43, "ijbc/tar_1e-4": 96.05, "ijbc/tar_1e-5": 93.96},
        note=_TEACHER_THERE,
    ),
    *(
        _row("ablation", row, given(_SHORT, values), note=_AVERAGE if row == "AdaArcDistill, a', m 0.45" else "")
        for row, values in rows_of(
            """
            vanilla feature L2: 95.00 91.29 79.79
            ArcDistill, fixed centres of the teacher: 94.99 91.70 84.57
            AdaArcDistill, a: 95.15 92.56 88.23
            AdaArcDistill, a', m 0.50: 95.42 92.97 89.13
            AdaArcDistill, a', m 0.40: 95.42 92.98 88.87
            AdaArcDistill, a', m 0.45: 95.43 93.27 89.32
            AdaCosDistill, a', m 0.30: 95.19 92.92 89.26
            AdaCosDistill, a', m 0.35: 95.30 93.05 89.21
            AdaCosDistill, a', m 0.40: 94.99 93.12 89.09
            """
        )
    ),
]  # fmt: skip

TEACHERS = [
    _row("ablation of teachers", "AdaArcDistill", given(_SHORT, values), teacher=f"{teacher}@112")
    for teacher, values in rows_of(
        """
        IResNet18: 94.96 92.27 88.10
        IResNet50: 95.43 93.27 89.32
        IResNet100: 95.15 92.54 87.48
        TransFace-B: 95.13 92.85 87.98
        """
    )
]

# The student's data; the teacher is that of the other rows.
OTHER_DATA = [
    _row("ablation of training data", row, given(_SHORT, values), benchmark=benchmark,
         note="IDiff-Face" if benchmark == "synthetic" else "")
    for benchmark, table in (
        ("casia", f"{ALONE}: 92.25 77.46 57.75\nAdaArcDistill: 94.81 91.49 86.25"),
        ("synthetic", f"{ALONE}: 85.11 22.19 3.43\nAdaArcDistill: 92.07 71.33 24.83"),
    )
    for row, values in rows_of(table)
]  # fmt: skip

BESIDE = {"face_baselines": [*TABLE, *OTHER_DATA]}
