"""A search on held-out identities beside what confirmed it on test: the two kept apart."""

import dataclasses

from orchestrator.launch import confirming, study
from orchestrator.launch.plan import Plan, TrialRecord
from orchestrator.reporting import compared, printed, scores
from orchestrator.reporting.content import Section, TableOf
from orchestrator.reporting.provenance import facts, references

_TEXT = (
    "Chosen on identities that are neither trained on nor in test, then trained again on the whole training set with "
    "seeds that the search had not seen, and scored once on test. The first row is the answer; to take another one "
    "because of its test score would be choosing on test after all."
)


def sections(plan: Plan, records: list[TrialRecord]) -> list[Section]:
    """The best points of a search on test, which of them are told apart, and published rows beside them."""
    title, found = "Confirmed on test", confirming.stored(plan)
    if found is None:
        return [Section(title, "Not yet: the search has not ended. Its own numbers are of held-out identities.")]
    done = [r for r in study.records(found) if r.status == "completed"]
    text = f"{_TEXT} Measured under “{facts(found).get('protocol', '')}”." if done else ""
    if len(done) < found.trials:
        text = f"{len(done)} of {found.trials} runs have ended. {text}"
    own = Section(title, text, [_table(plan, found, records, done)])
    # Published rows are known by the name of the search.
    beside = printed.sections(dataclasses.replace(found, space=plan.space), done)
    return [own, *(compared.sections(found, done)), *beside]


def _table(plan: Plan, found: Plan, records: list[TrialRecord], done: list[TrialRecord]) -> TableOf:
    """The best points, the best first: their value on validation, and every metric on test."""
    chosen, main = confirming.best(plan, records, plan.confirm["points"]), scores.maximised(plan)
    shown = scores.occurring(found, done)
    head = ["chosen", f"{main.title} on validation", "seeds", *(f"{m.title} on test" for m in shown), "MLflow runs"]
    numeric = set(range(1, len(head) - 1))
    table = TableOf(head, [], numeric, "mean ± standard deviation over seeds", best=0)
    for name in found.search_space.cells:
        of_row = [r for r in done if r.point["cell"] == name]
        cells = [scores.mean_and_spread(m, [r.metrics.get(m.name) for r in of_row]) for m in shown]
        value = scores.written(main, chosen[name][1]) if name in chosen else ""
        table.rows.append([name, value, str(len(of_row)), *cells, " ".join(r.run_id for r in of_row)])
    for reference in references(found):
        cells = [scores.written(m, reference.metrics.get(m.name)) for m in shown]
        table.rows.append([reference.title, "", "", *cells, ""])
    return table
