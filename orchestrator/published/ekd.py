"""EKD, CVPR 2022: its rows on MegaFace, refined, of single runs; AdaDistill's comparison has its rows on other sets.

Percent: rank 1 among a million distractors, and TAR at a FAR of 1e-6. The losses are named as this paper trains, so
that its rows are a table of their own and not columns of another paper's.
"""

from orchestrator.published._row import ALONE, NO_TEACHER, TEACHER, Published, given, rows_of

_STUDENT, _TEACHER = "MobileFaceNet@112", "IResNet50@112"

MEGAFACE = [
    Published(
        source="EKD, CVPR 2022, MegaFace",
        benchmark="ms1mv2",
        row=row,
        student=_TEACHER if row == TEACHER else _STUDENT,
        teacher=NO_TEACHER if row in (TEACHER, ALONE) else _TEACHER,
        losses="as EKD trains it" if row in (TEACHER, ALONE) else "as EKD trains each method",
        scores=given(("megaface_rank1", "megaface_1e-6"), values),
    )
    for row, values in rows_of(
        f"""
        {TEACHER}: 98.14 98.34
        {ALONE}: 90.91 92.71
        RKD: 91.44 92.92
        MarginDistillation: 91.70 92.96
        EKD: 91.02 93.08
        """
    )
]

BESIDE = {"face_baselines": MEGAFACE}
