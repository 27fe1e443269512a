"""``campaign``: what it lists, plans and refuses, how it runs in this process, and how it goes on."""

import importlib
import json
import re
import threading
from pathlib import Path

import pytest
from command.typed import call, error, settings, storage_at

from orchestrator import campaign, find, leases, published, report, tracking
from orchestrator.launch import campaign as campaigns
from orchestrator.launch import leading, study, trial
from orchestrator.needs import Place
from search_spaces._campaign import Campaign, Sweep
from search_spaces._space import SearchSpace

WORDS = "from search_spaces._campaign import Campaign, Sweep\n"
NEGATIVE = """
from search_spaces._campaign import Campaign, Sweep
CAMPAIGN = Campaign("?", (Sweep("d3still_alpha"),), trials=-1)
"""


def tiny(**changes) -> dict:
    pairs = settings("d3still", **changes)[1::2]
    return dict(pair.split("=", 1) for pair in pairs)


def small() -> Campaign:
    """Two sweeps of one teacher, one of a benchmark whose data nobody has, one that a bad value ends."""
    return Campaign(
        "Does a campaign run?",
        (
            Sweep("d3still_alpha", "folder", trials=2, settings=tiny()),
            Sweep("rows", "folder", priority=2, seeds=(3, 4), settings=tiny()),
            Sweep("d3still_ablation", "inshop"),
        ),
    )


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """Campaigns and spaces of these tests."""
    spaces = {"rows": SearchSpace(method="d3still", question="Which row?", cells={"as it is": {}}, seeds=(0,))}
    space, found = find.space, find.campaign
    monkeypatch.setattr(find, "space", lambda name: spaces.get(name) or space(name))
    own = {"campaign_small": small()}
    monkeypatch.setattr(find, "campaign", lambda name: own[name] if name in own else found(name))
    return own


@pytest.fixture(scope="module")
def roots(root) -> list[str]:
    return ["--data-root", f"folder={root}", "--in-process"]


def state(storage: Path) -> campaigns.State:
    return campaigns.read(Place(str(storage)), "campaign_small-1")


@pytest.fixture(scope="module")
def ran(tmp_path_factory, roots, quick_disk):
    """Storage and output of a campaign that nobody disturbed."""
    storage = tmp_path_factory.mktemp("campaign") / "runs"
    with storage_at(storage) as patch:
        space, own = find.space, small()
        rows = SearchSpace(method="d3still", question="Which row?", cells={"as it is": {}}, seeds=(0,))
        patch.setattr(find, "space", lambda name: rows if name == "rows" else space(name))
        patch.setattr(find, "campaign", lambda name: own)
        return storage, call(campaign.main, "campaign_small", *roots).output


def table(storage: Path) -> dict:
    found = {}
    for title, plan in state(storage).plans().items():
        metrics = lambda r: {k: v for k, v in r.metrics.items() if not k.startswith("perf/")}  # noqa: E731
        found[title] = {r.number: (r.point, r.status, metrics(r)) for r in study.records(plan)}
    return found


def test_every_campaign_is_listed_and_its_sweeps_exist():
    shown = call(campaign.main, "--list").output
    assert find.campaigns() == sorted(
        f"campaign_{name}" for name in ("all", "d3still", "ddps", "face", "rsiamnet", "smoke", "sureid")
    )
    for name in find.campaigns():
        found = find.campaign(name)
        assert re.search(rf"{name} +{len(found.sweeps)} sweeps  {re.escape(found.question)}", shown)
        for sweep in found.sweeps:
            for method in find.space(sweep.space).methods:
                find.recipe(method, sweep.on)


def test_every_printed_row_is_in_a_campaign():
    """But those of networks that nobody has, and those that another sweep has, too."""
    have = {(sweep.space, sweep.on) for sweep in find.campaign("campaign_all").sweeps}
    left_out = set()
    for source in published.sources():
        for space, rows in importlib.import_module(f"orchestrator.published.{source}").BESIDE.items():
            left_out |= {(space, p.benchmark) for p in rows} - have
    assert left_out == {
        ("face_baselines", "synthetic"), ("asymmetric_baselines", "msmt17_repo_ibn"),
        *(("asymmetric_leaders", on) for on in ("inshop", "sop", "msmt17")),
    }  # fmt: skip


def test_a_dry_run_unites_what_is_to_be_made_and_writes_nothing(empty, roots):
    shown = call(campaign.main, "campaign_small", *roots, "--dry-run").output
    assert "d3still_alpha on folder: 2 trials, priority 1" in shown and "rows on folder: 2 trials, priority 2" in shown
    assert "d3still_ablation on inshop: left out: needs data: --data-root inshop=DIR" in shown
    assert shown.count("teacher resnet18 at 16×16") == 1 and not empty.exists()


def test_a_campaign_runs_all_its_sweeps_and_makes_what_they_share_once(ran):
    storage, shown = ran
    assert len(list(storage.glob("teachers/*/teacher.json"))) == 1
    assert shown.count("trained now, kept for all sweeps") == 1
    found = table(storage)
    assert {title: len(rows) for title, rows in found.items()} == {"d3still_alpha on folder": 2, "rows on folder": 2}
    assert {status for rows in found.values() for _, status, _ in rows.values()} == {"completed"}
    assert {point["seed"] for point, _, _ in found["rows on folder"].values()} == {3, 4}
    assert re.search(r"\| d3still_alpha on folder +2/2 done +best val/map 0\.\d+", shown)
    assert "| d3still_ablation on inshop           left out  needs data: --data-root inshop=DIR" in shown
    assert "4/4 trials done" in shown


def test_its_report_has_every_table_with_ours_and_not_run(ran):
    storage, _ = ran
    folder = storage / "campaigns" / "campaign_small-1"
    html, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    assert "not run" in text and "D3still" in text and "64.31" in text, "printed rows of the sweep without data"
    assert re.search(r"\| as it is \|( \d+\.\d+ ± \d+\.\d+ \|)+ 2 \| \[\w{8}\]\(http://127.0.0.1:5000/#/exp", text)
    assert html.count('<img src="data:image/png') == 2 and "http://127.0.0.1:5000/#/experiments/" in html
    assert re.search(r'src="(?!data:)', html) is None, "it refers to no other file"


def test_its_mlflow_run_nests_the_summaries(ran):
    storage, _ = ran
    own = state(storage)
    client = tracking.client(own.tracking_uri)
    experiment = client.get_experiment_by_name("campaign_small")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    parent = runs.pop("campaign_small-1")
    assert parent.info.status == "FINISHED" and "rows on folder" in parent.data.tags["mlflow.note.content"]
    assert parent.data.metrics["campaign/done"] == 4 and parent.data.metrics["campaign/running"] == 0
    assert sorted(runs) == ["summary of d3still_alpha-folder-1", "summary of rows-folder-1"]
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    assert tracking.file(own.tracking_uri, parent.info.run_id, "report.html")


def test_a_sweep_of_a_campaign_is_a_sweep(ran):
    storage, _ = ran
    with storage_at(storage):
        shown = call(report.main, "d3still_alpha").output
    assert "report:" in shown
    client = tracking.client(state(storage).tracking_uri)
    experiment = client.get_experiment_by_name("campaign_small")
    assert len(client.search_runs([experiment.experiment_id])) == 3, "its summary is the one that is there"


def test_what_was_interrupted_goes_on_to_the_same_table(ran, tmp_path, roots, monkeypatch):
    """Interrupted in the second and in the third trial; the finished ones are not run again."""
    expected, work = table(ran[0]), trial.work
    with storage_at(tmp_path / "runs"):
        calls = []

        def dying(*arguments):
            calls.append(1)
            if len(calls) in (3, 5):
                raise KeyboardInterrupt
            return work(*arguments)

        monkeypatch.setattr(trial, "work", dying)
        call(campaign.main, "campaign_small", *roots, code=130)
        call(campaign.main, "campaign_small", "--resume", "--in-process", code=130)
        shown = call(campaign.main, "campaign_small", "--resume", "--dry-run").output
        assert re.search(r"rows on folder: \d of 2 trials are finished", shown)
        call(campaign.main, "campaign_small", "--resume", "--in-process")
        assert table(tmp_path / "runs") == expected
        assert len(calls) == 1 + 4 + 2, "the teacher, four trials, and the two that were interrupted"
        plans = state(tmp_path / "runs").plans().values()
        assert all(len(tracking.runs_of(plan.tracking_uri, plan.tag)) == plan.trials for plan in plans)


def test_a_resume_loads_networks_before_it_has_threads(ran, monkeypatch):
    """Threads that import torchvision and timm at the same time meet each other half-way."""
    checked: list[str] = []
    kind, add = type(find.method("d3still")), leading.Pool.add

    def check(self, *arguments):
        checked.append(threading.current_thread().name)

    monkeypatch.setattr(kind, "check", check)
    monkeypatch.setattr(leading.Pool, "add", lambda *a, **k: checked.append("added") or add(*a, **k))
    with storage_at(ran[0]):
        call(campaign.main, "campaign_small", "--resume", "--in-process")
    assert checked[: checked.index("added")] == ["MainThread"] * 2, "of both sweeps"


def test_a_broken_file_of_a_campaign_is_named_and_hides_no_other(monkeypatch, tmp_path):
    import search_spaces

    monkeypatch.setattr(search_spaces, "__path__", [*search_spaces.__path__, str(tmp_path)])
    for name, text in {
        "syntax": "CAMPAIGN = (", "empty": "", "negative": NEGATIVE, "five": "CAMPAIGN = 5",
        "names": f"{WORDS}CAMPAIGN = Campaign('?', ('d3still_alpha',))",
        "comma": f"{WORDS}CAMPAIGN = Campaign('?', (Sweep('d3still_alpha')))",
        "words": f"{WORDS}CAMPAIGN = Campaign('?', (Sweep('d3still_alpha', trials='3'),))",
    }.items():  # fmt: skip
        (tmp_path / f"campaign_{name}.py").write_text(text)
    said = error(campaign.main, "campaign_syntax")
    assert "search_spaces/campaign_syntax.py cannot be loaded: SyntaxError: '(' was never closed" in said
    assert "search_spaces/campaign_empty.py has no CAMPAIGN, which makes it a campaign" in error(
        campaign.main, "campaign_empty"
    )
    five = error(campaign.main, "campaign_five")
    assert "search_spaces/campaign_five.py: CAMPAIGN is 5, expected Campaign(question=…, sweeps=…)" in five
    assert "sweeps holds 'd3still_alpha', expected Sweep(…)" in error(campaign.main, "campaign_names")
    assert "a tuple of one needs a comma" in error(campaign.main, "campaign_comma")
    assert "trials is '3', expected a number" in error(campaign.main, "campaign_words")
    assert "there is no campaign 'smoke'; did you mean campaign_smoke?" in error(campaign.main, "smoke")
    shown = call(campaign.main, "--list").output
    assert "campaign_five" in shown
    assert "campaign_smoke " in shown and "campaign_negative.py cannot be loaded: ValueError: a budget of -1" in shown


@pytest.mark.slow
def test_a_budget_ends_it_and_a_larger_one_goes_on(ran, tmp_path, roots):
    with storage_at(tmp_path / "runs"):
        shown = call(campaign.main, "campaign_small", *roots, "--trials", 3).output
        assert "3/4 trials done" in shown
        shown = call(campaign.main, "campaign_small", "--resume", "--dry-run").output
        assert "the budget of 3 trials is spent; --resume --trials with more goes on" in shown
        assert "trials use no GPU here" in error(campaign.main, "campaign_small", "--resume", "--gpu-hours", 1)
        shown = call(campaign.main, "campaign_small", "--resume", "--in-process", "--trials", 4).output
        assert "4/4 trials done" in shown and table(tmp_path / "runs") == table(ran[0])


@pytest.mark.slow
def test_a_sweep_that_fails_does_not_stop_the_rest(known, tmp_path, roots):
    broken = tiny(**{"teacher.epochs": None})
    bad = Sweep("rows", "folder", settings={**broken, "teacher.weights": str(tmp_path / "none.safetensors")})
    known["campaign_small"] = Campaign("Who goes on?", (bad, small().sweeps[0]))
    with storage_at(tmp_path / "runs"):
        result = call(campaign.main, "campaign_small", *roots, code=2)
        line = result.stderr.splitlines()[-1]
        assert line.startswith("error: 1 of 2 sweeps failed: rows on folder: ") and "none.safetensors" in line
        assert len(table(tmp_path / "runs")["d3still_alpha on folder"]) == 2
        assert "rows on folder" in (tmp_path / "runs/campaigns/campaign_small-1/report.md").read_text()


def test_a_teacher_that_cannot_be_trained_is_tried_once(known, tmp_path, roots, monkeypatch):
    known["campaign_small"] = Campaign("Who is told?", small().sweeps[:2])
    calls = []

    def failing(*arguments):
        calls.append(1)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(trial, "work", failing)
    with storage_at(tmp_path / "runs"):
        result = call(campaign.main, "campaign_small", *roots, code=2)
    assert "2 of 2 sweeps failed" in result.stderr and result.output.count("out of memory") >= 2 and len(calls) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"space": "d3still_alfa"},
            "d3still_alfa on folder: there is no sweep 'd3still_alfa'; did you mean d3s",
        ),
        ({"on": "foldr"}, "d3still_alpha on foldr: d3still has no recipe for 'foldr'; did you mean folder"),
        ({"settings": {"alpha": 3}}, "alpha is what this sweep varies or fixes"),
        ({"settings": {"epochs": "many"}}, "epochs"),
        ({"seeds": (1,)}, "seeds are of tables"),
    ],
)
def test_a_campaign_with_a_wrong_name_or_value_is_refused(known, empty, roots, change, message):
    sweep = {"space": "d3still_alpha", "on": "folder", "settings": tiny()} | change
    known["campaign_small"] = Campaign("?", (Sweep(**sweep), small().sweeps[1]))
    assert message in error(campaign.main, "campaign_small", *roots)
    assert not (empty / "sweeps").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["campaign_smal"], "there is no campaign 'campaign_smal'; did you mean campaign_small"),
        (["campaign_small", "--trials", "0"], "--trials 0: the budget must be at least 1 trial"),
        (["campaign_small", "--gpu-hours", "0"], "--gpu-hours 0: the budget must be a number above 0"),
        (["campaign_small", "--gpu-hours", "inf"], "--gpu-hours inf: the budget must be a number above 0"),
        (["campaign_small", "--data-root", "folder="], "--data-root folder=: an empty name is not a directory"),
        (["campaign_small", "--data-root", "nowhere"], "--data-root nowhere: nowhere is not a directory"),
        (["campaign_small", "--data-root", "sop=/"], "the campaign has no sweep on 'sop'; it has folder, inshop"),
        (["campaign_small", "--in-process"], "nothing is left of the campaign: d3still_alpha on folder: needs data"),
        (["campaign_small", "--resume"], "no campaign campaign_small in"),
    ],
)
def test_what_cannot_be_meant_is_one_line(known, empty, monkeypatch, arguments, message):
    own = dict(known)

    def found(name):
        if name in own:
            return own[name]
        raise ValueError(f"there is no campaign {name!r}; did you mean campaign_small?")

    monkeypatch.setattr(find, "campaign", found)
    assert message in error(campaign.main, *arguments)


def test_a_server_that_is_away_at_the_start_is_one_line(empty, roots):
    with storage_at(empty, MLFLOW_TRACKING_URI="http://127.0.0.1:9"):
        assert "http://127.0.0.1:9 does not answer" in error(campaign.main, "campaign_small", *roots)
    address = "postgresql+psycopg2://nobody@127.0.0.1:9/optuna"
    with storage_at(empty, OPTUNA_STORAGE=address):
        assert f"OPTUNA_STORAGE={address} cannot be used" in error(campaign.main, "campaign_small", *roots)
    assert not list(empty.glob("sweeps/*")) and not list(empty.glob("campaigns/*/campaign.json"))


def test_a_folder_without_the_data_is_refused_before_anything_starts(empty, tmp_path):
    (tmp_path / "nothing").mkdir()
    line = error(campaign.main, "campaign_small", "--data-root", f"folder={tmp_path / 'nothing'}")
    assert f"--data-root folder={tmp_path / 'nothing'}: " in line and "train" in line
    everywhere = error(campaign.main, "campaign_small", "--data-root", tmp_path / "nothing")
    assert f"nothing is left of the campaign: d3still_alpha on folder: not in {tmp_path / 'nothing'}" in everywhere
    assert not empty.exists() or not list(empty.glob("sweeps/*"))


def test_two_campaigns_of_one_name_do_not_run_at_once(empty, roots):
    empty.mkdir(parents=True)
    with leases.held(str(empty / "leases" / "campaign_small")):
        line = error(campaign.main, "campaign_small", *roots)
    assert "the campaign campaign_small is being run by process" in line


def test_addresses_with_passwords_are_refused_and_not_shown(empty, roots):
    for variable, address in (
        ("OPTUNA_STORAGE", "postgresql+psycopg2://me:hunter2@host/optuna"),
        ("MLFLOW_TRACKING_URI", "http://me:hunter2@host:5000"),
        ("ORCHESTRATOR_STORAGE", "s3://me:hunter2@bucket/prefix"),
    ):
        with storage_at(empty, **{variable: address}):
            line = error(campaign.main, "campaign_small", *roots)
        assert "hunter2" not in line and variable in line, line


def test_a_stored_campaign_that_is_newer_or_damaged_says_so(ran):
    storage, _ = ran
    place, file = Place(str(storage)), storage / "campaigns/campaign_small-1/campaign.json"
    whole = file.read_text()
    try:
        file.write_text(json.dumps({**json.loads(whole), "format": 9}))
        with pytest.raises(ValueError, match="format 9, this version reads up to 1; update it"):
            campaigns.read(place, "campaign_small-1")
        file.write_text("{")
        with pytest.raises(ValueError, match=r"campaign.json cannot be read"):
            campaigns.read(place, "campaign_small-1")
        outside = json.loads(whole)
        outside["entries"][0]["sweep"] = "../../elsewhere"
        file.write_text(json.dumps(outside))
        with pytest.raises(ValueError, match=r"names the sweep '../../elsewhere', which is no name of a folder"):
            campaigns.read(place, "campaign_small-1").plans()
    finally:
        file.write_text(whole)


def test_words_of_a_campaign_are_checked():
    with pytest.raises(ValueError, match="needs sweeps"):
        Campaign("?", ())
    with pytest.raises(ValueError, match="has a on demo twice"):
        Campaign("?", (Sweep("a"), Sweep("a")))
    with pytest.raises(ValueError, match="priority 0 must be above 0"):
        Sweep("a", priority=0)
    with pytest.raises(ValueError, match="must not be below 0"):
        Campaign("?", (Sweep("a"),), gpu_hours=-1)
