"""Write the report of a sweep: ``python -m orchestrator.report d3still_beta_gamma [--on demo]``.

One HTML file without any reference outside itself, the same as Markdown, and the pictures as files; all are
also artifacts of the sweep's summary run in MLflow.
"""

import base64
import io
import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import typer
from matplotlib.figure import Figure

from orchestrator import command, figures, find, on_ray, published, tracking
from orchestrator.command import console
from orchestrator.method import changed, recipe_dict
from orchestrator.on_ray import Plan, TrialRecord
from orchestrator.progress import label, symbol
from search_spaces._space import SearchSpace


@dataclass
class TableOf:
    head: list[str]
    rows: list[list[str]]
    numeric: set[int] = field(default_factory=set)
    caption: str = ""
    best: int = -1
    published: bool = False


@dataclass
class Picture:
    name: str
    alt: str
    png: bytes

    @property
    def data(self) -> str:
        return base64.b64encode(self.png).decode()


@dataclass
class Section:
    title: str
    text: str = ""
    tables: list[TableOf] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    code: str = ""
    facts: dict[str, str] = field(default_factory=dict)


@command.app
def main(
    name: str = typer.Argument(..., help="The sweep.", metavar="NAME"),
    on: str = typer.Option("", "--on", help="Default: the benchmark of the newest sweep.", metavar="BENCHMARK"),
    to: str = typer.Option("", "--to", help="Default: the sweep's own folder.", metavar="DIR"),
) -> None:
    """Curves beside the published ones, the trial table, a heat map, training curves, a retrieval panel."""
    find.space(name)
    html, run_id = write(command.latest_plan(name, on or None), to)
    console.print(f"report: {html}")
    console.print(f"summary run in MLflow: {run_id}")


def write(plan: Plan, to: str = "") -> tuple[Path, str]:
    """Writes report.html, report.md and figures/; returns the HTML file and the id of the summary run.

    Raises:
        ValueError: no trial has completed yet.
    """
    space = on_ray.search_space(plan)
    records = on_ray.records(plan)
    done = [r for r in records if r.status == "completed"]
    if not done:
        raise ValueError(f"the sweep {plan.sweep} has no completed trial yet; there is nothing to report")
    content = {
        "title": f"{plan.space} on {plan.benchmark}",
        "question": space.question,
        "summary": _summary(plan, space, records),
        "sections": [
            *(_cells(plan, space, done) if space.cells else _dimensions(plan, space, records)),
            _trials(space, records),
            _best(plan, space, done),
            _cost(plan, done),
            _provenance(plan, records),
        ],
    }
    folder = Path(to or plan.folder)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    pictures = [p for section in content["sections"] for p in section.pictures]
    for picture in pictures:
        _replace(folder / "figures" / picture.name, picture.png)
    html = jinja2.Environment(loader=loader, autoescape=True).get_template("report.html").render(content)
    _replace(folder / "report.html", html.encode())
    markdown = jinja2.Environment(loader=loader, autoescape=False).get_template("report.md").render(content)
    _replace(folder / "report.md", markdown.encode())
    return folder / "report.html", _log(plan, records, folder, pictures)


def _summary(plan: Plan, space: SearchSpace, records: list[TrialRecord]) -> str:
    best = command.ranked(records)[0]
    named, value = f"{label(best.point)}", best.value
    if space.cells:  # a row, not a lucky seed
        rows = {cell: [r.value for r in records if r.status == "completed" and r.point["cell"] == cell]
                for cell in space.cells}  # fmt: skip
        value, named = max((statistics.mean(v), cell) for cell, v in rows.items() if v)
    counts = {s: sum(r.status == s for r in records) for s in ("completed", "pruned", "failed", "running")}
    text = ", ".join(f"{n} {'stopped early' if s == 'pruned' else s}" for s, n in counts.items() if n)
    facts = _facts(plan)
    teacher = next((f["teacher_metrics"] for f in plan.facts["prepared"].values() if "teacher_metrics" in f), {})
    gallery = f" The teacher on both sides reaches mAP {100 * teacher['teacher/map']:.2f}." if teacher else ""
    return (
        f"{len(records)} of {plan.trials} trials ({text}). Best: {named}, {space.metric} {100 * value:.2f}.{gallery} "
        f"All our numbers are percent, measured on {plan.benchmark} under “{facts.get('protocol', '')}”."
    )


def _dimensions(plan: Plan, space: SearchSpace, records: list[TrialRecord]) -> list[Section]:
    """A curve for every pictured field with the others at the paper's values, and a heat map for two."""
    rows = published.beside(plan.space, plan.benchmark)
    sections = []
    metric = "mAP" if space.metric == "val/map" else "mAP, student on both sides"
    base = dict(space.start[0]) if space.start else {}
    for name in space.picture:
        others = {k: v for k, v in base.items() if k != name}
        points = [
            (r.point[name], 100 * r.value)
            for r in records
            if r.status == "completed" and all(r.point[k] == v for k, v in others.items())
        ]
        beside: dict[str, list[tuple[float, float]]] = {}
        figure_rows = [
            p for p in rows
            if all(p.at.get(k) == v for k, v in others.items())
            and len({q.at.get(name) for q in rows if q.source == p.source}) > 1
        ]  # fmt: skip
        for p in figure_rows:
            beside.setdefault(p.benchmark, []).append((p.at[name], p.scores["map"]))
        at = ", ".join(f"{symbol(k)} = {v:g}" for k, v in others.items())
        title = f"{symbol(name)}" + (f" at {at}" if at else "")
        reference = base.get(name, 0.0)
        drawn = figures.curves(f"ours, {plan.benchmark}", points, symbol(name), metric, beside, reference)
        note = "One run a point: differences of a few tenths are within what another seed does."
        section = Section(title, note, pictures=[_png(f"{name}.png", f"{metric} over {name}", drawn)])
        section.tables.append(
            TableOf(
                [symbol(name), f"{metric} (%), ours"], [[f"{x:.4g}", f"{y:.2f}"] for x, y in sorted(points)], {0, 1}
            )
        )
        if beside:
            values = sorted({x for curve in beside.values() for x, _ in curve})
            section.tables.append(
                TableOf(
                    [symbol(name), *beside],
                    [[f"{x:g}", *(f"{dict(c).get(x, float('nan')):.2f}" for c in beside.values())] for x in values],
                    set(range(len(beside) + 1)),
                    caption=f"published: {'; '.join(sorted({p.source for p in figure_rows}))}; "
                    f"{figure_rows[0].teacher} → {figure_rows[0].student}"
                    + "".join(
                        f"; {p.benchmark}: {p.note}" for p in {p.benchmark: p for p in figure_rows if p.note}.values()
                    ),
                    published=True,
                )
            )
        sections.append(section)
    if len(space.picture) == 2:
        x, y = space.picture
        points4 = [(r.point[x], r.point[y], 100 * (r.value or 0), r.status) for r in records if r.value is not None]
        drawn = figures.heat_map("All trials", symbol(x), symbol(y), f"{metric} (%)", points4)
        sections.append(
            Section(f"{symbol(x)} × {symbol(y)}", pictures=[_png("heat_map.png", f"{metric} over {x} and {y}", drawn)])
        )
    return sections


def _cells(plan: Plan, space: SearchSpace, done: list[TrialRecord]) -> list[Section]:
    """One row per cell: mean and spread over seeds; teacher, chance, cost where it differs, and the published rows."""
    rows = {name: [r for r in done if r.point["cell"] == name] for name in space.cells}
    scores = {"val/map": "mAP", "val/rank1": "R1", "symmetric/map": "mAP, student on both sides"}
    scores = {key: title for key, title in scores.items() if any(key in r.metrics for r in done)}
    costs = _costs_of_rows(plan, rows)
    head = ["row", "seeds", *scores.values(), *(("GMACs", "images/s, CPU") if costs else ())]
    ours = TableOf(head, [], set(range(1, len(head))), "ours: mean ± standard deviation over seeds, percent")
    for name, runs in rows.items():
        cells = [name, str(len(runs)), *(_mean_spread([r.metrics.get(key) for r in runs]) for key in scores)]
        if costs:
            cells += [f"{costs[name][0]:.4f}", f"{costs[name][1]:.0f}"] if name in costs else ["", ""]
        ours.rows.append(cells)
    values = [(name, [100 * r.value for r in runs]) for name, runs in rows.items()]
    known: set[str] = set()
    for facts in _distinct_teachers(plan):
        for title, key in (
            (f"{published.TEACHER}, {facts.get('teacher', 'unnamed')}", "teacher"),
            ("chance", "chance"),
        ):
            reference = facts.get(f"{key}_metrics", {})
            if reference and title not in known:
                known.add(title)
                names = [k.replace("val/", f"{key}/") for k in scores]
                cells = [title, "", *(_percent(reference.get(name)) for name in names)]
                ours.rows.append(cells + [""] * (len(head) - len(cells)))
    picture = _png("table.png", "mAP of every row", figures.bars("mAP, mean and every seed", values, "mAP (%)"))
    sections = [Section("Rows", tables=[ours], pictures=[picture])]
    if costs:
        sections.append(_accuracy_and_cost(plan, rows, costs))
    return [*sections, *_published(plan, space, done)]


def _costs_of_rows(plan: Plan, rows: dict[str, list[TrialRecord]]) -> dict[str, tuple[float, float]]:
    """GMACs and images/s of every row's student; nothing where all cost the same.

    Images/s is the median over all runs of equal GMACs: one run's depends on what ran beside it.
    """
    metrics = {
        name: [tracking.client(plan.tracking_uri).get_run(r.run_id).data.metrics for r in runs]
        for name, runs in rows.items()
    }
    speeds: dict[float, list[float]] = {}
    for m in (m for runs in metrics.values() for m in runs if "cost/macs" in m):
        speeds.setdefault(m["cost/macs"], []).append(m["cost/cpu_images_per_s"])
    found = {
        name: (runs[0]["cost/macs"] / 1e9, statistics.median(speeds[runs[0]["cost/macs"]]))
        for name, runs in metrics.items()
        if runs and "cost/macs" in runs[0]
    }
    return found if len(speeds) > 1 else {}


def _accuracy_and_cost(
    plan: Plan, rows: dict[str, list[TrialRecord]], costs: dict[str, tuple[float, float]]
) -> Section:
    """The compromise between accuracy and computation, ours and, beside it, the published one."""
    ours = []
    for name in rows.keys() & costs.keys():
        scores = [100 * r.value for r in rows[name]]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        ours.append((costs[name][1], statistics.mean(scores), spread, name))
    printed = {(p.images_per_s, p.scores["map"], 0.0, p.row) for p in published.beside(plan.space, plan.benchmark)
               if p.images_per_s and "map" in p.scores and p.student != published.OWN_NETWORK}  # fmt: skip
    drawn = figures.compromise(ours, sorted(printed))
    text = (
        "mAP: mean and standard deviation over seeds. Images/s of the query network, batch 32, fastest batch of a "
        "second at the end of each trial, median of all runs of equal GMACs. Other trials run at the same time: "
        "tests/benchmarks/bench_token_pruning.py measures the networks alone."
    )
    return Section(
        "Accuracy and throughput", text, pictures=[_png("throughput.png", "mAP over images per second", drawn)]
    )


def _published(plan: Plan, space: SearchSpace, done: list[TrialRecord]) -> list[Section]:
    """The printed tables this sweep belongs beside, with ours where benchmark and networks are the same."""
    groups: dict[tuple[str, str], list[published.Published]] = {}
    for p in published.beside(plan.space, plan.benchmark):
        # Rows of one network on both sides are one table whatever the network.
        networks = p.teacher if p.teacher == published.BOTH_SIDES else f"{p.teacher} → {p.student}"
        networks = f"{p.student}, no teacher" if p.teacher == published.NO_TEACHER else networks
        groups.setdefault((networks, p.losses), []).append(p)
    tables = []
    for (networks, losses), found in groups.items():
        benchmarks = list(dict.fromkeys(p.benchmark for p in found))
        timed = any(p.images_per_s for p in found)
        body = []
        for row, student in dict.fromkeys((p.row, p.student) for p in found):
            printed = {p.benchmark: p for p in found if (p.row, p.student) == (row, student)}
            cells = [_printed(p) if (p := printed.get(b)) else "" for b in benchmarks]
            noted: dict[str, list[str]] = {}
            for b, p in printed.items():
                noted.setdefault(p.note, []).append(b)
            notes = "; ".join(f"{', '.join(of)}: {note}" for note, of in noted.items() if note)
            mine = _ours(plan, space, done, printed[plan.benchmark]) if plan.benchmark in printed else "not run"
            speeds = [f"{p.images_per_s:.0f}" for p in printed.values() if p.images_per_s]
            name = f"{row}, {student}" if networks == published.BOTH_SIDES else row
            body.append([name, *cells, *([speeds[0] if speeds else ""] if timed else []), mine, notes])
        caption = f"published: {'; '.join(dict.fromkeys(p.source for p in found))}; {networks}; {losses}; single runs"
        scores = [f"{b}, {' / '.join(_scores_of(found, b))}" for b in benchmarks]
        head = ["row", *scores, *(["images/s, their GPU"] if timed else []), "ours", "note"]
        tables.append(TableOf(head, body, set(range(1, len(head) - 1)), caption, published=True))
    settings = _changed_fields(plan)
    text = "“ours” is of the same benchmark and networks. " + (
        f"They differ from the benchmark's recipes in {', '.join(settings)}." if settings else ""
    )
    return [Section("Published", text=text, tables=tables)] if tables else []


_SCORES = {"map": "mAP", "rank1": "R1", "rank3": "R3"}


def _scores_of(rows: list[published.Published], benchmark: str) -> list[str]:
    """Names of the scores that a source prints for a benchmark."""
    own = [p for p in rows if p.benchmark == benchmark]
    return [title for name, title in _SCORES.items() if any(name in p.scores for p in own)]


def _printed(p: published.Published) -> str:
    """A row's scores as printed."""
    return " / ".join(f"{p.scores[name]:.2f}" for name in _SCORES if name in p.scores)


def _ours(plan: Plan, space: SearchSpace, done: list[TrialRecord], p: published.Published) -> str:
    """Our mAP / R1 of a printed row's cell and networks, or "not run"."""
    if p.row == published.TEACHER:
        for facts in _distinct_teachers(plan):
            if facts.get("teacher") == p.student:
                scores = facts["teacher_metrics"]
                return f"{100 * scores['teacher/map']:.2f} / {100 * scores['teacher/rank1']:.2f}"
    side = "symmetric" if p.teacher == published.BOTH_SIDES else "val"
    found = []
    for r in done:
        method = space.method_of(r.point)
        student, teacher = find.method(method).networks(changed(plan.base_recipe(method), space.settings(r.point)))
        if (r.point["cell"], student) == (p.row, p.student) and p.teacher in (teacher, published.BOTH_SIDES):
            found.append(r)
    if not any(f"{side}/map" in r.metrics for r in found):
        return "not run"
    names = [name for name in _SCORES if name in p.scores]
    return " / ".join(_mean_spread([r.metrics.get(f"{side}/{m}") for r in found]) for m in names)


def _changed_fields(plan: Plan) -> list[str]:
    """What the command line set: field=value."""
    fix = on_ray.search_space(plan).fix
    defaults = recipe_dict(changed(find.recipe(plan.method, plan.benchmark), fix))
    return [f"{k}={v}" for k, v in plan.recipe.items() if defaults.get(k) != v]


def _trials(space: SearchSpace, records: list[TrialRecord]) -> Section:
    fields = list(space.table()[0]) if space.table() else sorted(space.tune)
    scores = ("mAP", "R1", "R3", "R5", "mINP")
    table = TableOf(
        ["trial", *map(symbol, fields), "status", "epochs", *scores, "minutes", "MLflow run"], [],
        {0, *range(1, 1 + len(fields)), *range(len(fields) + 2, len(fields) + 9)}, best=0,
    )  # fmt: skip
    for r in command.ranked(records):
        metrics = [_percent(r.metrics.get(f"val/{m}")) for m in ("map", "rank1", "rank3", "rank5", "minp")]
        point = [f"{r.point[f]:.4g}" if isinstance(r.point[f], float) else str(r.point[f]) for f in fields]
        status = r.status + (f": {r.message}" if r.message else "")
        table.rows.append([str(r.number), *point, status, str(r.epochs), *metrics, f"{r.seconds / 60:.1f}", r.run_id])
    return Section("Trials", tables=[table])


def _best(plan: Plan, space: SearchSpace, done: list[TrialRecord]) -> Section:
    best = command.ranked(done)[0]
    uri = plan.tracking_uri
    keys = tracking.client(uri).get_run(best.run_id).data.metrics
    terms = {
        k.split("/")[1]: tracking.curve(uri, best.run_id, k) for k in sorted(keys) if k.startswith("loss_weighted/")
    }
    metric = {k: tracking.curve(uri, best.run_id, k) for k in ("val/map", "val/rank1", "symmetric/map") if k in keys}
    drawn = figures.training(f"trial {best.number}", terms, metric)
    pictures = [_png("training.png", "training curves of the best trial", drawn)]
    for name in tracking.pictures(uri, best.run_id):
        file = tracking.artifact(uri, best.run_id, name)
        if file is not None:
            pictures.append(Picture(name, f"{Path(name).stem} of the best trial", file.read_bytes()))
    return Section(f"Best trial: {label(best.point, '.4g')}", pictures=pictures)


def _cost(plan: Plan, done: list[TrialRecord]) -> Section:
    best = command.ranked(done)[0]
    metrics = tracking.client(plan.tracking_uri).get_run(best.run_id).data.metrics
    recipe = tracking.read_record(plan.tracking_uri, best.run_id).recipe
    rows = [
        [recipe["student"], "×".join(map(str, recipe["student_size"])),
         f"{metrics.get('cost/macs', 0) / 1e9:.4f}", f"{metrics.get('cost/parameters', 0) / 1e6:.3f}",
         f"{metrics.get('cost/cpu_images_per_s', 0):.0f}"],
    ]  # fmt: skip
    text = "MACs are what papers of this field print as FLOPs. Images/s: batch 32, the fastest of a second."
    return Section(
        "Cost of the student",
        text,
        [TableOf(["network", "pixels", "GMACs", "M parameters", "images/s, CPU"], rows, {2, 3, 4})],
    )


def _provenance(plan: Plan, records: list[TrialRecord]) -> Section:
    commands = f"python -m orchestrator.sweep {plan.space} --on {plan.benchmark}"
    defaults = recipe_dict(find.recipe(plan.method, plan.benchmark)) | dict(on_ray.search_space(plan).fix)
    for key, value in plan.recipe.items():
        if defaults.get(key) != value:
            text = "x".join(map(str, value)) if isinstance(value, list) else value
            commands += f" --epochs {value}" if key == "epochs" else f" --set {key}={text}"
    if plan.place["data_root"]:
        commands += " --data-root DIR"
    if not on_ray.search_space(plan).cells:
        commands += f" --trials {plan.trials}"
    commands += f" --workers {plan.workers}" if plan.workers > 1 else ""
    best = command.ranked(records)[0]
    commands += (
        f"\npython -m orchestrator.evaluate {best.run_id}\npython -m orchestrator.export {best.run_id} --format onnx"
    )
    commands += f"\n{tracking.ui_command(plan.tracking_uri)}"
    facts = {
        k.replace("_", " "): str(v)
        for k, v in {**plan.facts, **_facts(plan)}.items()
        if not isinstance(v, dict) and k != "code"
    }
    return Section("How to reproduce", code=commands, facts=facts)


def _log(plan: Plan, records: list[TrialRecord], folder: Path, pictures: list[Picture]) -> str:
    uri, run_id = plan.tracking_uri, command.summarise(plan, records)
    for name in ("report.html", "report.md"):
        tracking.log_file(uri, run_id, folder / name)
    for picture in pictures:
        tracking.log_file(uri, run_id, folder / "figures" / picture.name, "figures")
    return run_id


def _png(name: str, alt: str, figure: Figure) -> Picture:
    stored = io.BytesIO()
    figure.savefig(stored, format="png", dpi=110)
    return Picture(name, alt, stored.getvalue())


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    partial.write_bytes(data)
    os.replace(partial, path)


def _distinct_teachers(plan: Plan) -> list[dict[str, Any]]:
    """Preparations with different teachers."""
    return list({facts.get("teacher_fingerprint"): facts for facts in plan.facts["prepared"].values()}.values())


def _facts(plan: Plan) -> dict[str, Any]:
    """Data and teacher of the sweep's first preparation."""
    return next(iter(plan.facts["prepared"].values()), {})


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def _mean_spread(values: list[float | None]) -> str:
    known = [100 * v for v in values if v is not None]
    if not known:
        return ""
    return f"{statistics.mean(known):.2f}" + (f" ± {statistics.stdev(known):.2f}" if len(known) > 1 else "")


if __name__ == "__main__":
    main()
