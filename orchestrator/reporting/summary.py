"""A sweep as a whole: its report, its summary run in MLflow, and the paragraph on top."""

import dataclasses
import statistics
from pathlib import Path

from orchestrator import tracking
from orchestrator.launch import study
from orchestrator.launch.plan import Plan, TrialRecord
from orchestrator.launch.study import ranked
from orchestrator.progress import label
from orchestrator.reporting import compared, confirmed, content, curves, printed, provenance, rows, scores, trial_table


def write_report(plan: Plan, to: str = "") -> tuple[Path, str]:
    """Writes the report into the sweep's folder or ``to`` and into its summary run.

    Returns the HTML file and the id of the run.

    Raises:
        ValueError: no trial has completed yet.
    """
    space, records = plan.search_space, study.records(plan)
    done = [r for r in records if r.status == "completed"]
    if not done:
        raise ValueError(f"the sweep {plan.sweep} has no completed trial yet; there is nothing to report")
    if space.cells:
        own = [*rows.sections(plan, done), *compared.sections(plan, done), *printed.sections(plan, done)]
    else:
        own = curves.sections(plan, records)
    if plan.confirm:
        search = [dataclasses.replace(one, title=f"The search, on held-out identities: {one.title}") for one in own]
        own = [*confirmed.sections(plan, records), *search]
    report = content.Report(
        f"{plan.space} on {plan.benchmark}",
        space.question,
        _paragraph(plan, records),
        [
            *own,
            trial_table.section(plan, records),
            trial_table.best_trial(plan, done),
            rows.cost(plan, done),
            provenance.section(plan, records),
        ],
    )
    html, markdown, *pictures = content.write(report, Path(to or plan.folder))
    run_id = summarise(plan, records)
    for file in (html, markdown):
        tracking.log_file(plan.tracking_uri, run_id, file)
    for file in pictures:
        tracking.log_file(plan.tracking_uri, run_id, file, "figures")
    return html, run_id


def summarise(plan: Plan, records: list[TrialRecord]) -> str:
    """The sweep's summary run in MLflow: best trial, teacher, all trials as JSON; returns its id."""
    uri = plan.tracking_uri
    storage, question = plan.place["storage"], plan.search_space.question
    tags = {"orch.sweep": plan.tag, "orch.kind": "summary", "orch.space": plan.space, "orch.benchmark": plan.benchmark}
    if plan.campaign:
        experiment = tracking.experiment(uri, tracking.campaign_title(plan.campaign), storage, question)
        tags["mlflow.parentRunId"] = tracking.campaign_run(uri, plan.campaign, storage, question, {})
    else:
        experiment = tracking.experiment(uri, plan.title, storage, question)
    params = {"space": plan.space, "benchmark": plan.benchmark}
    run_id = tracking.run(uri, experiment, f"{plan.tag}/summary", f"summary of {plan.sweep}", tags, params)
    best = ranked(records)[0]
    side = scores.side(scores.metrics(plan)[0]) + "/"
    values = {f"summary/{k.removeprefix(side)}": v for k, v in best.metrics.items() if k.startswith(side)}
    for reference in reversed(provenance.references(plan)):  # of several teachers the first one stays
        if reference.kind == "teacher":
            values |= {f"teacher/{k.removeprefix(side)}": v for k, v in reference.metrics.items()}
    ended = {"orch.best_trial": str(best.number), "orch.best_run": best.run_id, "orch.trials": str(len(records))}
    ended |= {"orch.choice": scores.choice(plan)} if scores.choice(plan) else {}
    tracking.log_values(uri, run_id, values, ended)
    tracking.log_json(uri, run_id, [dataclasses.asdict(r) for r in ranked(records)], "trials.json")
    tracking.finish(uri, run_id, "completed")
    return run_id


def _paragraph(plan: Plan, records: list[TrialRecord]) -> str:
    """How many trials, the best of them or the best row, and what the teachers reach."""
    space, metric = plan.search_space, scores.maximised(plan)
    best = ranked(records)[0]
    named, value = label(best.point), best.value
    if space.cells:  # a row, not a lucky seed
        done = [r for r in records if r.status == "completed"]
        of_row = {cell: [r.value for r in done if r.point["cell"] == cell] for cell in space.cells}
        means = {cell: statistics.mean(values) for cell, values in of_row.items() if values}
        named, value = max(means.items(), key=lambda one: one[1])  # of equal ones the first, as in the table below
    counts = {s: sum(r.status == s for r in records) for s in ("completed", "pruned", "failed", "running")}
    text = ", ".join(f"{n} {'stopped early' if s == 'pruned' else s}" for s, n in counts.items() if n)
    main = scores.metrics(plan)[0]
    teachers = "".join(
        f" The {r.title}, reaches {main.title} {scores.written(main, r.metrics[main.name])}."
        for r in provenance.references(plan)
        if r.kind == "teacher" and main.name in r.metrics
    )
    chosen = f" ({scores.choice(plan)})" if scores.choice(plan) else ""
    of_whom = " These scores are of held-out identities, the teacher's, too." if scores.held_out(plan) else ""
    unit = "percent, " if all(m.percent for m in scores.occurring(plan, records)) else ""
    return (
        f"{len(records)} of {plan.trials} trials ({text}). Best: {named}, {metric.title} "
        f"{scores.written(metric, value)}{chosen}.{teachers}{of_whom} All our numbers are {unit}measured on "
        f"{plan.benchmark} under “{provenance.facts(plan).get('protocol', '')}”."
    )
