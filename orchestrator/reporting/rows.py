"""A sweep that fills a table of rows × seeds: means and spreads, and what the networks cost."""

import statistics

from orchestrator import figures, published, tracking
from orchestrator.launch.plan import Plan, TrialRecord
from orchestrator.launch.study import ranked
from orchestrator.reporting import scores
from orchestrator.reporting.content import Picture, Section, TableOf, drawn
from orchestrator.reporting.provenance import networks, references

Runs = dict[str, list[TrialRecord]]  # row -> its completed trials
Costs = dict[str, tuple[float, float]]  # row -> GMACs and images/s of its student


def sections(plan: Plan, done: list[TrialRecord]) -> list[Section]:
    """The table, a picture of it and, where rows differ in cost, accuracy over throughput."""
    runs = {name: [r for r in done if r.point["cell"] == name] for name in plan.search_space.cells}
    costs = _costs(plan, runs)
    metric = scores.maximised(plan)
    values = [(name, [scores.shown(metric, r.value) for r in of_row]) for name, of_row in runs.items()]
    figure = figures.bars(f"{metric.title}, mean and every seed", values, scores.axis(metric))
    picture = drawn("table.png", f"{metric.title} of every row", figure)
    found = [Section("Rows", tables=[_table(plan, runs, costs)], pictures=[picture])]
    found += [_accuracy_over_throughput(plan, runs, costs)] if costs else []
    return [*found, _side_by_side(plan, runs)] if plan.search_space.compare else found


def _side_by_side(plan: Plan, runs: Runs) -> Section:
    """The picture that the space compares, of the first run of every row."""
    name, pictures = plan.search_space.compare, []
    for place, (row, of_row) in enumerate(runs.items()):
        drawing = tracking.file(plan.tracking_uri, of_row[0].run_id, f"{name}.png") if of_row else None
        if drawing is not None:
            pictures.append(Picture(f"{name}_{place}.png", f"{name} of {row}, seed {of_row[0].point['seed']}",
                                    drawing))  # fmt: skip
    return Section(f"{name.replace('_', ' ').capitalize()} of every row", pictures=pictures)


def cost(plan: Plan, done: list[TrialRecord]) -> Section:
    """Computation and size of the best trial's student."""
    best = ranked(done)[0]
    measured = tracking.client(plan.tracking_uri).get_run(best.run_id).data.metrics
    row = [
        networks(plan, best)[0],
        f"{measured.get('cost/macs', 0) / 1e9:.4f}",
        f"{measured.get('cost/parameters', 0) / 1e6:.3f}",
        f"{measured.get('cost/cpu_images_per_s', 0):.0f}",
    ]
    text = (
        "MACs are what papers of this field print as FLOPs. Images/s: the fastest batch of 32, or of fewer large ones."
    )
    table = TableOf(["network", "GMACs", "M parameters", "images/s, CPU"], [row], {1, 2, 3})
    return Section("Cost of the student", text, [table])


def _table(plan: Plan, runs: Runs, costs: Costs) -> TableOf:
    """One line per row, and one for every teacher and chance."""
    shown = scores.occurring(plan, [r for of_row in runs.values() for r in of_row])
    head = ["row", "seeds", *(m.title for m in shown), *(("GMACs", "images/s, CPU") if costs else ())]
    caption = "ours: mean ± standard deviation over seeds" + ", percent" * all(m.percent for m in shown)
    table = TableOf(head, [], set(range(1, len(head))), caption)
    for name, of_row in runs.items():
        cells = [scores.mean_and_spread(m, [r.metrics.get(m.name) for r in of_row]) for m in shown]
        if costs:
            cells += [f"{costs[name][0]:.4f}", f"{costs[name][1]:.0f}"] if name in costs else ["", ""]
        table.rows.append([name, str(len(of_row)), *cells])
    for reference in references(plan):
        cells = [scores.written(m, reference.metrics.get(m.name)) for m in shown]
        table.rows.append([reference.title, "", *cells, *([""] * (2 if costs else 0))])
    return table


def _costs(plan: Plan, runs: Runs) -> Costs:
    """GMACs and images/s of every row's student; nothing where all cost the same.

    Images/s is the median over all runs of equal GMACs: one run's depends on what ran beside it.
    """
    client = tracking.client(plan.tracking_uri)
    measured = {name: [client.get_run(r.run_id).data.metrics for r in of_row] for name, of_row in runs.items()}
    speeds: dict[float, list[float]] = {}
    for metrics in (m for of_row in measured.values() for m in of_row if "cost/macs" in m):
        speeds.setdefault(metrics["cost/macs"], []).append(metrics["cost/cpu_images_per_s"])
    found = {
        name: (of_row[0]["cost/macs"] / 1e9, statistics.median(speeds[of_row[0]["cost/macs"]]))
        for name, of_row in measured.items()
        if of_row and "cost/macs" in of_row[0]
    }
    return found if len(speeds) > 1 else {}


def _accuracy_over_throughput(plan: Plan, runs: Runs, costs: Costs) -> Section:
    """The compromise between accuracy and computation, ours and, beside it, the published one."""
    metric = scores.maximised(plan)
    ours = []
    for name, (_, images_per_s) in costs.items():
        values = [scores.shown(metric, r.value) for r in runs[name]]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        ours.append((images_per_s, statistics.mean(values), spread, name))
    score = scores.score(metric)
    printed = {
        (p.images_per_s, p.scores[score], 0.0, p.row)
        for p in published.beside(plan.space, plan.benchmark)
        if p.images_per_s
        and not scores.held_out(plan)
        and score in p.scores
        and p.student != published.OWN_NETWORK
        and scores.side_of(plan, p) == scores.side(metric)
    }
    figure = figures.compromise(ours, sorted(printed), scores.axis(metric))
    text = (
        f"{metric.title}: mean and standard deviation over seeds. Images/s of the student, fastest batch of a "
        "second at the end of each trial, median of all runs of equal GMACs. Other trials run at the same "
        "time: the programs in tests/benchmarks measure networks alone."
    )
    picture = drawn("throughput.png", f"{metric.title} over images per second", figure)
    return Section("Accuracy and throughput", text, pictures=[picture])
