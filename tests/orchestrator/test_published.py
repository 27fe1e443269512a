"""Stored published rows: spot values of every table, complete, with their source and the paper's slips flagged."""

from collections import Counter

import pytest

from orchestrator import find, published
from orchestrator.published import d3still, sureid
from orchestrator.published.d3still import ABLATION, REPOSITORY, REPOSITORY_ABLATION, TABLE_4
from orchestrator.recipe import changed

EVERYTHING = [
    *ABLATION,
    *d3still.BETA,
    *d3still.GAMMA,
    *(p for rows in TABLE_4.values() for p in rows),
    *REPOSITORY,
    *REPOSITORY_ABLATION,
    *d3still.REPOSITORY_TEACHERS,
]


@pytest.mark.parametrize(
    ("rows", "benchmark", "row", "teacher", "scores"),
    [
        (ABLATION, "inshop", "L_pd", "ResNet101@256", (0.85, 0.58)),
        (ABLATION, "sop", "L_f + L_drpd", "ResNet101@256", (51.33, 69.18)),
        (TABLE_4["B"], "inshop", "RKD", "ResNet101@256", (0.15, 0.10)),
        (TABLE_4["B"], "msmt17", "D3still", "ResNet101@256", (18.64, 28.79)),
        (TABLE_4["C"], "sop", "ROP", "ResNet101@256", (35.28, 47.11)),
        (TABLE_4["D"], "inshop", "CCKD", "SwinV2-T@256", (45.11, 77.63)),
        (REPOSITORY, "cub200_repo", "UGD", "ResNet101@256", (59.32, 65.05)),
        (REPOSITORY, "inshop_repo_large", "CSD", "ResNet101@384", (65.73, 78.55)),
        (REPOSITORY, "sop_repo_swin", "D3still", "SwinV2-S@256", (43.32, 56.98)),
        (REPOSITORY, "msmt17_repo_ibn", "UGD", "ResNet101-IBN@320×160", (41.98, 61.22)),
        (REPOSITORY, "msmt17_repo_mobilenet", "ROP", "ResNet101@320×160", (30.12, 48.12)),
        (REPOSITORY_ABLATION, "sop_repo", "L_f, authors' code", "ResNet101@256", (49.54, 66.53)),
    ],
)
def test_spot_values(rows, benchmark, row, teacher, scores):
    (found,) = [p for p in rows if (p.benchmark, p.row, p.teacher) == (benchmark, row, teacher)]
    assert (found.scores["map"], found.scores["rank1"]) == scores


def test_every_table_is_complete():
    assert {block: len(rows) for block, rows in TABLE_4.items()} == {"A": 12, "B": 24, "C": 18, "D": 18}
    assert Counter(p.row for p in REPOSITORY) == dict.fromkeys(
        ("VanillaKD", "RKD", "PKT", "FitNet", "CCKD", "CSD", "RAML", "ROP", "D3still", "UGD"), 16
    )
    assert (len(ABLATION), len(d3still.BETA), len(d3still.GAMMA)) == (16, 9, 9)
    assert len(REPOSITORY_ABLATION) == 9 and len(d3still.REPOSITORY_TEACHERS) == 12
    # "teacher on both sides" stands in the ablation and in the list of teachers.
    keys = [(p.source, p.benchmark, p.row, p.student, p.teacher, *p.at.items()) for p in EVERYTHING]
    assert len(set(keys)) == len(keys)
    assert all(p.source and p.losses and p.student and 0 <= p.scores["map"] <= 100 for p in EVERYTHING)


@pytest.mark.parametrize(
    ("table", "benchmark", "row", "scores"),
    [
        ("I", "occluded_duke", "PFD, sliding window", (69.5, 61.8, None, 95)),
        ("I", "occluded_duke", "SUReID", (65.8, 54.9, None, 1585)),
        ("II", "occluded_reid", "FED", (87.0, 79.4, None, None)),
        ("II", "partial_reid", "FED", (84.6, None, None, None)),
        ("II", "partial_reid", "SUReID", (85.3, None, 90.7, None)),
        ("III", "market1501", "TransReID, sliding window", (95.0, 88.2, None, None)),
        ("III", "dukemtmc", "SUReID", (89.1, 79.7, None, None)),
        ("IV", "occluded_duke", "none", (57.6, 49.2, None, 1074)),
        ("IV", "occluded_duke", "HTS + NPKD", (64.8, 53.2, None, 1585)),
        ("V", "occluded_duke", "p = 0.9", (65.9, 55.7, None, 1279)),
        ("VI", "occluded_duke", "S-T linear", (56.6, 46.7, None, None)),
        ("VII", "occluded_duke", "ViT + NODA", (61.1, 51.6, None, None)),
    ],
)
def test_spot_values_of_sureid(table, benchmark, row, scores):
    (found,) = [p for p in sureid.TABLES[table] if (p.benchmark, p.row) == (benchmark, row)]
    assert (*map(found.scores.get, ("rank1", "map", "rank3")), found.images_per_s) == scores


def test_the_tables_of_sureid_are_complete_and_stand_beside_their_sweeps():
    assert {table: len(rows) for table, rows in sureid.TABLES.items()} == {
        "I": 13, "II": 16, "III": 24, "IV": 4, "V": 5, "VI": 4, "VII": 4}  # fmt: skip
    rows = [p for table in sureid.TABLES.values() for p in table]
    keys = [(p.source, p.benchmark, p.row) for p in rows]
    assert len(set(keys)) == len(keys)
    assert {p.benchmark for p in rows} <= set(find.method("sureid").recipes)
    for table, name in (("IV", "components"), ("V", "keep_ratio"), ("VI", "alignment"), ("VII", "noda")):
        assert {p.row for p in sureid.TABLES[table]} <= set(find.space(f"sureid_{name}").cells)
        beside = published.beside(f"sureid_{name}", "occluded_duke")
        assert all(p in beside for p in sureid.TABLES[table])
    recipe = find.recipe("sureid", "occluded_duke")
    full = next(p for p in sureid.TABLES["IV"] if p.row == "SUReID")
    assert full.student == published.network(recipe.student.name, recipe.student.size)
    assert full.teacher == published.network(recipe.teacher.network.name, recipe.student.size)


def test_numbers_of_different_settings_are_never_of_one_benchmark():
    assert {p.losses for p in EVERYTHING if p.benchmark in ("inshop", "sop", "msmt17")} == {
        "distillation alone", "not stated"}  # fmt: skip
    assert all(p.benchmark.count("_repo") == 1 for p in REPOSITORY)
    runnable = set(find.method("d3still").recipes)
    assert {p.benchmark for p in EVERYTHING} - runnable == {"msmt17_repo_ibn"}


def test_the_sources_slips_are_flagged():
    flagged = {(p.row, p.benchmark, p.source.rsplit(" ", 1)[-1]) for p in EVERYTHING if p.note}
    assert ("CCKD", "inshop", "D") in flagged and ("D3still", "msmt17", "B") in flagged
    assert ("CSD", "sop", "B") in flagged and ("D3still", "msmt17", "3") in flagged
    assert ("RAML", "msmt17", "B") in flagged and {("FitNet", b, "B") for b in ("inshop", "sop")} <= flagged
    assert all(p.note for p in REPOSITORY if p.row in ("UGD", "RAML", "CCKD"))
    assert all("stride 2" in p.note for p in REPOSITORY if p.benchmark == "msmt17_repo_ibn")


def test_rows_stand_beside_the_cells_of_their_sweep():
    for name in ("asymmetric_baselines", "d3still_networks", "d3still_ablation"):
        beside, cells = d3still.BESIDE[name], set(find.space(name).cells)
        paper = [p for p in beside if p.source.startswith("D3still, CVPR") and p.row != published.TEACHER]
        unknown = {p.row for p in paper} - cells
        assert unknown <= {"B RKD", "B PKT"}, "every printed row has a cell of its name"


def test_a_source_is_found_by_its_file(tmp_path, monkeypatch):
    """A paper is one file; two papers may have rows beside one sweep."""
    (tmp_path / "another.py").write_text(
        "from orchestrator.published import Published\n"
        "ROW = Published(source='Another', benchmark='sop', row='X', student='A@1', teacher='B@2')\n"
        "BESIDE = {'d3still_alpha': [ROW], 'd3still_ablation': [ROW]}\n"
    )
    assert (
        published.sources() == ["adadistill", "d3still", "ddps", "ekd", "rsiamnet", "sureid"]
        and published.beside("d3still_alpha", "sop") == []
    )
    monkeypatch.setattr(published, "__path__", [*published.__path__, str(tmp_path)])
    assert [p.row for p in published.beside("d3still_alpha", "inshop")] == ["X"]
    assert {p.source for p in published.beside("d3still_ablation", "sop")} > {"Another"}


def test_other_networks_are_shown_where_they_are_run():
    shown = {p.benchmark for p in published.beside("asymmetric_baselines", "sop_repo_swin")}
    assert "sop_repo_swin" in shown and not shown & {"inshop_repo_swin", "msmt17_repo_ibn", "cub200_repo_large"}
    assert published.network("swinv2_tiny_window8_256.ms_in1k", (256, 256)) == "SwinV2-T@256"


def test_rsiamnet_rows_are_those_of_the_paper():
    from orchestrator.published import rsiamnet

    found = {(p.source[-7:], p.row, p.benchmark): p.scores for p in (
        *rsiamnet.LOSSES, *rsiamnet.DATA_SCALE, *rsiamnet.COMPARED)}  # fmt: skip
    assert len(found) == 5 + 14 + 31
    assert found["table 2", "L_ins + L_int + L_clu", "cuhk_sysu"] == {
        "map": 85.72, "top1": 86.86, "top5": 95.24, "top10": 96.86,
    }  # fmt: skip
    assert found["table 3", "with the other and INRIA", "prw_and_both"] == {"top1": 76.03, "map": 25.53}
    assert found["table 4", "R-SiamNet, large scenes", "prw_large"] == {"top1": 75.2, "map": 21.4}
    assert ("table 4", "RCAA", "prw") not in found and found["table 4", "OIM", "prw"] == {"top1": 49.9, "map": 21.3}


def test_ddps_rows_are_those_of_the_repository():
    from orchestrator.published import ddps

    assert len(ddps.TABLE) == 14 and {p.benchmark for p in ddps.TABLE} == {"cuhk_sysu", "prw"}
    found = {(p.row, p.benchmark): p.scores for p in ddps.TABLE}
    assert found["R18 + DDPS", "prw"] == {"map": 41.93, "top1": 79.58}
    assert found["R18 ×0.5", "cuhk_sysu"] == {"map": 79.23, "top1": 81.34}
    assert found[published.TEACHER, "cuhk_sysu"] == {"map": 91.96, "top1": 92.72}
    assert {(p.row, p.benchmark) for p in ddps.TABLE if p.note} == {("R18", "cuhk_sysu"), ("MobileNetV2", "cuhk_sysu")}
    for name in ("ddps_students", "ddps_modules"):
        rows = {p.row for p in ddps.BESIDE[name]} - {published.TEACHER}
        assert rows <= set(find.space(name).cells), "every printed row has a cell of its name"
    cells = find.space("ddps_students").cells
    for row in {p.row: p for p in ddps.TABLE if p.row != published.TEACHER}.values():
        recipe = changed(find.recipe("ddps", "cuhk_sysu"), cells[row.row])
        assert find.method("ddps").networks(recipe) == (row.student, row.teacher)
