"""Published rows of face distillation: spot values of every table, complete, with the sources' slips flagged."""

import pytest

from orchestrator import published
from orchestrator.published import adadistill, ekd

BASELINES = {
    "student alone", "FitNet", "KD", "DarkRank", "SP", "CCKD", "RKD", "ShrinkTeaNet", "TripletDistillation",
    "MarginDistillation", "SFTN", "EKD", "SH-KD", "ReFO", "ReFO+", "AdaArcDistill", "AdaCosDistill",
}  # fmt: skip
EVERYTHING = [*adadistill.TABLE, *adadistill.ABLATION, *adadistill.TEACHERS, *adadistill.OTHER_DATA, *ekd.MEGAFACE]
FIVE = ("lfw/accuracy", "cfp_fp/accuracy", "agedb_30/accuracy", "calfw/accuracy", "cplfw/accuracy")
IJB = ("ijbc/tar_1e-4", "ijbc/tar_1e-5", "ijbb/tar_1e-4", "ijbb/tar_1e-5")
MFR = ("mfr_all", "mfr_children", "mfr_mask")


def only(rows, row, **other):
    (found,) = [p for p in rows if p.row == row and all(getattr(p, n) == v for n, v in other.items())]
    return found


@pytest.mark.parametrize(
    ("row", "names", "values"),
    [
        (published.TEACHER, FIVE, (99.80, 97.63, 97.92, 96.05, 92.50)),
        (published.TEACHER, MFR, (75.48, 49.41, 54.50)),
        (published.ALONE, IJB, (89.13, 81.65, 87.07, 74.63)),
        ("KD", FIVE, (99.50, 91.71, 95.93, 95.03, 87.85)),
        ("DarkRank", MFR, (56.82, 28.84, 30.07)),
        ("MarginDistillation", ("accuracy", *IJB), (94.27, 85.71, 75.00, 82.97, 66.25)),
        ("ShrinkTeaNet", IJB, (87.80, 79.78, 85.31, 75.23)),
        ("EKD", ("accuracy", *MFR), (95.03, 56.60, 28.95, 32.14)),
        (
            "ReFO",
            ("lfw/accuracy", "cfp_fp/accuracy", "agedb_30/accuracy", *MFR),
            (99.55, 94.51, 96.92, 56.63, 33.36, 31.88),
        ),
        ("ReFO+", ("ijbc/tar_1e-4", "ijbc/tar_1e-5", *MFR), (92.41, 87.80, 59.17, 32.80, 32.24)),
        ("AdaArcDistill", IJB, (93.27, 89.32, 91.21, 84.13)),
        ("AdaCosDistill", ("accuracy", *MFR), (95.30, 60.56, 39.94, 37.06)),
    ],
)
def test_spot_values_of_the_comparison(row, names, values):
    assert tuple(only(adadistill.TABLE, row).scores[name] for name in names) == values


@pytest.mark.parametrize(
    ("rows", "row", "other", "values"),
    [
        (adadistill.ABLATION, "vanilla feature L2", {}, (95.00, 91.29, 79.79)),
        (adadistill.ABLATION, "AdaArcDistill, a", {}, (95.15, 92.56, 88.23)),
        (adadistill.ABLATION, "AdaCosDistill, a', m 0.40", {}, (94.99, 93.12, 89.09)),
        (adadistill.TEACHERS, "AdaArcDistill", {"teacher": "IResNet100@112"}, (95.15, 92.54, 87.48)),
        (adadistill.TEACHERS, "AdaArcDistill", {"teacher": "TransFace-B@112"}, (95.13, 92.85, 87.98)),
        (adadistill.OTHER_DATA, "student alone", {"benchmark": "casia"}, (92.25, 77.46, 57.75)),
        (adadistill.OTHER_DATA, "AdaArcDistill", {"benchmark": "synthetic"}, (92.07, 71.33, 24.83)),
    ],
)
def test_spot_values_of_the_ablations(rows, row, other, values):
    assert tuple(only(rows, row, **other).scores.values()) == values


def test_spot_values_of_megaface():
    assert {p.row: tuple(p.scores.values()) for p in ekd.MEGAFACE} == {
        published.TEACHER: (98.14, 98.34), "student alone": (90.91, 92.71), "RKD": (91.44, 92.92),
        "MarginDistillation": (91.70, 92.96), "EKD": (91.02, 93.08),
    }  # fmt: skip


def test_the_tables_are_complete():
    counts = [len(rows) for rows in (adadistill.TABLE, adadistill.ABLATION, adadistill.TEACHERS, adadistill.OTHER_DATA)]
    assert counts == [18, 10, 4, 4]
    assert {p.row for p in adadistill.TABLE} == {published.TEACHER, *BASELINES}
    gaps = {p.row: {*FIVE, "accuracy", *IJB, *MFR} - set(p.scores) for p in adadistill.TABLE}
    partial = {"calfw/accuracy", "cplfw/accuracy", "accuracy", "ijbb/tar_1e-4", "ijbb/tar_1e-5"}
    assert {row: gap for row, gap in gaps.items() if gap} == {
        "TripletDistillation": set(MFR), **dict.fromkeys(("SFTN", "SH-KD", "ReFO", "ReFO+"), partial)}  # fmt: skip
    assert all(0 < value < 100 for p in EVERYTHING for value in p.scores.values())
    keys = [(p.source, p.benchmark, p.row, p.student, p.teacher) for p in EVERYTHING]
    assert len(set(keys)) == len(keys) == 41


def test_printed_averages_are_those_of_the_five_sets():
    found = [p for p in adadistill.TABLE if "accuracy" in p.scores]
    assert len(found) == 14
    for p in found:
        assert sum(p.scores[name] for name in FIVE) / 5 == pytest.approx(p.scores["accuracy"], abs=0.0051), p.row


def test_the_networks_of_every_row_are_named():
    for p in EVERYTHING:
        alone = p.row in (published.TEACHER, published.ALONE)
        assert p.student == ("IResNet50@112" if p.row == published.TEACHER else "MobileFaceNet@112")
        assert (p.teacher == published.NO_TEACHER) == alone and p.source.startswith(("AdaDistill, ECCV", "EKD, CVPR"))
    assert {p.teacher for p in EVERYTHING if p not in adadistill.TEACHERS} == {published.NO_TEACHER, "IResNet50@112"}
    assert {p.benchmark for p in EVERYTHING if p not in adadistill.OTHER_DATA} == {"ms1mv2"}


def test_the_sources_slips_are_flagged():
    assert {(p.source.rpartition(", ")[2], p.row) for p in EVERYTHING if p.note} == {
        ("comparison", published.TEACHER), ("ablation", published.TEACHER),
        ("ablation", "AdaArcDistill, a', m 0.45"), *(("ablation of training data", row) for row in (
            "student alone", "AdaArcDistill")),
    }  # fmt: skip
    assert "96.05 / 93.96" in only(adadistill.TABLE, published.TEACHER).note
    assert "95.16 / 92.66" in only(adadistill.ABLATION, published.TEACHER).note
    assert "95.47" in only(adadistill.ABLATION, "AdaArcDistill, a', m 0.45").note
    assert {p.benchmark for p in adadistill.OTHER_DATA if p.note == "IDiff-Face"} == {"synthetic"}


def test_rows_beside_the_baselines_have_the_cells_names_and_no_row_hides_another():
    beside = published.beside("face_baselines", "ms1mv2")
    assert {p.row for p in beside} == {published.TEACHER, *BASELINES}
    assert all(p in beside for p in (*adadistill.TABLE, *adadistill.OTHER_DATA, *ekd.MEGAFACE))
    # A table of the report is of one pair of networks and one set of losses, and has one number per row and benchmark.
    cells = [(p.losses, p.student, p.teacher, p.row, p.benchmark) for p in beside]
    assert len(set(cells)) == len(cells)
