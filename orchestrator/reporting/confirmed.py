"""A search on held-out identities beside what confirmed it on test: the two kept apart."""

from orchestrator.launch import confirming, study
from orchestrator.launch.plan import Plan, TrialRecord
from orchestrator.reporting import scores
from orchestrator.reporting.content import Section, TableOf
from orchestrator.reporting.provenance import references

_TEXT = (
    "Chosen on identities that are neither trained on nor in test, then trained again on the whole training set with "
    "seeds that the search had not seen, and scored once on test. The first row is the answer; to take another one "
    "because of its test score would be choosing on test after all."
)


def section(plan: Plan, records: list[TrialRecord]) -> Section:
    """The best points of a search, the best first: their value on validation, and every metric on test."""
    title, found = "Confirmed on test", confirming.stored(plan)
    if found is None:
        return Section(title, "Not yet: the search has not ended. Its own numbers are of held-out identities.")
    done = [r for r in study.records(found) if r.status == "completed"]
    chosen, main = confirming.best(plan, records, plan.confirm["points"]), scores.maximised(plan)
    shown = scores.occurring(found, done)
    head = ["chosen", f"{main.title} on validation", "seeds", *(f"{m.title} on test" for m in shown)]
    table = TableOf(head, [], set(range(1, len(head))), "mean ± standard deviation over seeds", best=0)
    for name in found.search_space.cells:
        of_row = [r for r in done if r.point["cell"] == name]
        cells = [scores.mean_and_spread(m, [r.metrics.get(m.name) for r in of_row]) for m in shown]
        value = scores.written(main, chosen[name][1]) if name in chosen else ""
        table.rows.append([name, value, str(len(of_row)), *cells])
    for reference in references(found):
        cells = [scores.written(m, reference.metrics.get(m.name)) for m in shown]
        table.rows.append([reference.title, "", "", *cells])
    return Section(title, _TEXT, [table])
