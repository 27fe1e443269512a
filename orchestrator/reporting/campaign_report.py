"""A campaign as a whole: one report over all its sweeps, and one MLflow run that nests their summaries."""

import statistics
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator import figures, find, published, tracking
from orchestrator.launch import study
from orchestrator.launch.campaign import Entry, State
from orchestrator.launch.plan import Plan, TrialRecord, code_facts
from orchestrator.launch.study import ranked
from orchestrator.progress import label
from orchestrator.published import Published
from orchestrator.reporting import compared, content, printed, provenance, scores, summary
from orchestrator.reporting.campaign_board import CampaignBoard
from orchestrator.reporting.content import Link, Picture, Section, TableOf

Records = dict[str, list[TrialRecord]]  # title of a sweep -> its trials

_TOLD_SECONDS = 20.0  # between two updates of the MLflow run


def write(state: State, folder: str = "") -> tuple[Path, str]:
    """Writes the report into the campaign's folder, and into its MLflow run; returns the HTML file and the run's id."""
    plans = state.plans()
    records = {title: study.records(plan) for title, plan in plans.items()}
    sections = [_overview(state, plans, records)]
    for entry in state.entries:
        sections += _sections(entry, plans.get(entry.title), records.get(entry.title, []))
    sections.append(_reproduce(state))
    report = content.Report(state.name, state.question, _paragraph(state, plans, records), sections)
    html, markdown, *_ = content.write(report, Path(folder or state.where.folder("campaigns", state.name)))
    run_id = parent(state)
    for title, plan in plans.items():
        if records[title]:
            summary.summarise(plan, records[title])
    for file in (html, markdown):
        tracking.log_file(state.tracking_uri, run_id, file)
    return html, run_id


def parent(state: State) -> str:
    """Id of the campaign's MLflow run, in an experiment of the campaign's name."""
    params = {"sweeps": len(state.entries), "concurrent": state.concurrent}
    run_id = tracking.campaign_run(state.tracking_uri, state.tag, state.where.storage, state.question, params)
    # Tags, as a resume may change them.
    budget = {"orch.budget.trials": str(state.trials), "orch.budget.gpu_hours": str(state.gpu_hours)}
    tracking.log_values(state.tracking_uri, run_id, tags=budget)
    return run_id


@contextmanager
def told(state: State, board: CampaignBoard) -> Iterator[None]:
    """Writes the display into the campaign's MLflow run while the block runs, so that the page shows it."""
    run_id, stop = parent(state), threading.Event()

    def tell() -> None:
        step = 0
        while not stop.wait(_TOLD_SECONDS if step else 1.0):
            step += 1
            _tell(state, board, run_id)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        stop.set()
        teller.join(timeout=30)
        _tell(state, board, run_id)


def _tell(state: State, board: CampaignBoard, run_id: str) -> None:
    rows = [line.cells() for line in board.lines.values()]
    note = ["| sweep | trials | state | |", "| --- | ---: | --- | --- |", *(f"| {' | '.join(row)} |" for row in rows)]
    numbers = {f"campaign/{name}": value for name, value in board.numbers().items()}
    tracking.log_status(state.tracking_uri, run_id, numbers, "\n".join([*note, "", board.whole()]))


# --- The report -------------------------------------------------------------------------------------------------------


def _overview(state: State, plans: dict[str, Plan], records: Records) -> Section:
    rows = []
    for entry in state.entries:
        if entry.title not in plans:
            rows.append([entry.title, "", "", "", "", "not run", entry.left_out])
            continue
        plan = plans[entry.title]
        own = records[entry.title]
        counts = [str(sum(r.status == s for r in own)) for s in ("completed", "pruned", "failed")]
        done = [r for r in own if r.status == "completed"]
        best = ranked(done)[0] if done else None
        metric = scores.maximised(plan)
        shown = f"{metric.title} {scores.written(metric, best.value)}, {label(best.point)}" if best else "not run"
        rows.append([entry.title, str(plan.trials), *counts, shown, plan.sweep])
    head = ["sweep", "trials", "completed", "stopped early", "failed", "best trial", "folder, or why not run"]
    return Section("Sweeps", tables=[TableOf(head, rows, {1, 2, 3, 4})])


def _sections(entry: Entry, plan: Plan | None, records: list[TrialRecord]) -> list[Section]:
    """Every table of one sweep: published rows with ours and the difference, then our own rows."""
    rows = published.beside(entry.space, entry.benchmark)
    if plan is None:
        tables = _not_run(rows)
        return [Section(entry.title, f"Not run: {entry.left_out}.", tables)] if tables else []
    done = [r for r in records if r.status == "completed"]
    tables = _published(plan, done, rows) if plan.search_space.cells else _not_run(rows)
    own = _rows(plan, done) if plan.search_space.cells else _points(plan, done)
    facts = provenance.facts(plan).get("protocol", "")
    text = plan.search_space.question + (f" Measured under “{facts}”." if facts else "")
    apart = compared.sections(plan, done) if plan.search_space.cells else []
    told = [table for section in apart for table in section.tables]
    text = " ".join([text, *(section.text for section in apart)])
    return [Section(entry.title, text, [*tables, own, *told], _picture(plan, done))]


def _picture(plan: Plan, done: list[TrialRecord]) -> list[Picture]:
    """Every row, or point, with the value of every seed."""
    if not done:
        return []
    metric, space = scores.maximised(plan), plan.search_space
    named = (lambda r: r.point["cell"]) if space.cells else (lambda r: label(r.point))
    order = list(space.cells) if space.cells else [label(r.point) for r in ranked(done)]
    values = [(name, [scores.shown(metric, r.value) for r in done if named(r) == name]) for name in order]
    figure = figures.bars(f"{metric.title} on {plan.benchmark}", [row for row in values if row[1]], scores.axis(metric))
    return [content.drawn(f"{plan.sweep}.png", f"{metric.title} of {plan.sweep}", figure)]


def _groups(rows: list[Published]) -> dict[tuple[str, ...], list[Published]]:
    found: dict[tuple[str, ...], list[Published]] = {}
    for p in rows:
        found.setdefault((p.source, p.benchmark, f"{p.teacher} → {p.student}", p.losses), []).append(p)
    return found


def _caption(group: tuple[str, ...]) -> str:
    source, benchmark, names, losses = group
    return f"published: {source}; {benchmark}; {names}; {losses}; single runs"


def _not_run(rows: list[Published]) -> list[TableOf]:
    """Printed rows beside which there is nothing of ours."""
    tables = []
    for group, printed_rows in _groups(rows).items():
        names = list(dict.fromkeys(name for p in printed_rows for name in p.scores))
        body = [[p.row, *(_number(p.scores.get(name)) for name in names), "not run"] for p in printed_rows]
        head = ["row", *(f"{name}, published" for name in names), "ours"]
        tables.append(TableOf(head, body, set(range(1, len(head))), _caption(group), published=True))
    return tables


def _published(plan: Plan, done: list[TrialRecord], rows: list[Published]) -> list[TableOf]:
    """Printed rows with ours where benchmark and networks are the same, their difference, seeds and runs."""
    tables = []
    for group, printed_rows in _groups(rows).items():
        named = printed.named(plan, dict.fromkeys(name for p in printed_rows for name in p.scores))
        body = []
        for p in printed_rows:
            own = printed.of_row(plan, done, p) if p.benchmark == plan.benchmark else []
            cells: list[Any] = [p.row]
            for name, metric in named:
                values = printed.values_of(plan, own, p, name)
                ours = scores.mean_and_spread(metric, values) or "not run"
                apart = ""
                if values and name in p.scores:
                    apart = f"{scores.shown(metric, statistics.mean(values)) - p.scores[name]:+.2f}"
                cells += [_number(p.scores.get(name)), ours, apart]
            body.append([*cells, str(len(own) or ""), [*_links(plan, own).values()]])
        head = ["row"]
        for _, metric in named:
            head += [f"{metric.title}, published", "ours", "difference"]
        head += ["seeds", "runs"]
        tables.append(TableOf(head, body, set(range(1, len(head) - 1)), _caption(group), published=True))
    return tables


def _rows(plan: Plan, done: list[TrialRecord]) -> TableOf:
    """Our rows: mean and spread over seeds of every metric."""
    metrics = scores.occurring(plan, done) or scores.metrics(plan)
    body = []
    for cell in plan.search_space.cells:
        own = [r for r in done if r.point["cell"] == cell]
        values = [scores.mean_and_spread(m, [r.metrics.get(m.name) for r in own]) for m in metrics]
        body.append([cell, *([value or "–" for value in values] if own else ["not run"] * len(metrics)),
                     str(len(own) or ""), [*_links(plan, own).values()]])  # fmt: skip
    for reference in provenance.references(plan):
        values = [scores.written(m, reference.metrics.get(m.name)) or "–" for m in metrics]
        body.append([reference.title, *values, "", ""])
    head = ["row", *(m.title for m in metrics), "seeds", "runs"]
    caption = f"ours on {plan.benchmark}: mean ± standard deviation over seeds"
    return TableOf(head, body, set(range(1, len(head) - 1)), caption)


def _points(plan: Plan, done: list[TrialRecord]) -> TableOf:
    """Our points of a sampled space, the best first."""
    metrics, links = scores.occurring(plan, done) or scores.metrics(plan), _links(plan, done)
    body = []
    for r in ranked(done):
        own = [links[r.run_id]] if r.run_id in links else []
        body.append([label(r.point), *(scores.written(m, r.metrics.get(m.name)) for m in metrics), own])
    head = ["point", *(m.title for m in metrics), "run"]
    body = body or [["all points", *["not run"] * len(metrics), ""]]
    caption = "; ".join(filter(None, [f"ours on {plan.benchmark}, one seed", scores.choice(plan)]))
    return TableOf(head, body, set(range(1, len(head) - 1)), caption, best=0 if done else -1)


def _links(plan: Plan, records: list[TrialRecord]) -> dict[str, Link]:
    """By run; a run that somebody has deleted has none."""
    pages = tracking.pages(plan.tracking_uri, [r.run_id for r in records if r.run_id])
    return {run_id: Link(run_id[:8], page) for run_id, page in pages.items()}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _paragraph(state: State, plans: dict[str, Plan], records: Records) -> str:
    done = sum(r.status == "completed" for rows in records.values() for r in rows)
    failed = sum(r.status == "failed" for rows in records.values() for r in rows)
    total = sum(plan.trials for plan in plans.values())
    left_out = sum(bool(entry.left_out) for entry in state.entries)
    text = f"{len(plans)} sweeps, {done} of {total} trials completed, {failed} failed."
    text += f" {left_out} sweeps were left out." if left_out else ""
    budget = [f"{state.trials} trials"] if state.trials else []
    budget += [f"{state.gpu_hours:g} GPU hours, {state.spent:.2f} used"] if state.gpu_hours else []
    text += f" Budget: {', '.join(budget)}." if budget else ""
    return text + " Published numbers are of the papers; “not run” stands where we have none. Ours are in percent."


def _reproduce(state: State) -> Section:
    command = f"python -m orchestrator.campaign {state.campaign}"
    facts = {"campaign": state.name, **{k: v for k, v in code_facts().items() if k != "code"}}
    lines = [command, tracking.ui_command(state.tracking_uri)]
    return Section("How to reproduce", code="\n".join(lines), facts=facts)


def standing(state: State) -> list[tuple[str, int, int]]:
    """Title, finished trials, planned trials of every sweep."""
    return [(title, study.finished(plan), plan.trials) for title, plan in state.plans().items()]


def listing() -> list[str]:
    """Every campaign with its question."""
    found = []
    for name in find.campaigns():
        try:
            campaign = find.campaign(name)
        except ValueError as error:
            found.append(f"{name:20}   – {error}")
            continue
        found.append(f"{name:20} {len(campaign.sweeps):3} sweeps  {campaign.question}")
    return found
