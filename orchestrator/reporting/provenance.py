"""Where the numbers of a sweep come from: recipes, teachers, data, commands that repeat it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator import find, tracking
from orchestrator.launch import confirming, study
from orchestrator.launch.plan import Plan, TrialRecord
from orchestrator.launch.study import ranked
from orchestrator.published import TEACHER
from orchestrator.recipe import changed, differing
from orchestrator.reporting.content import Section


@dataclass(frozen=True)
class Reference:
    """Scores that trials are compared with."""

    title: str
    kind: Literal["teacher", "chance"]
    network: str  # of a teacher, as published tables name it
    metrics: Mapping[str, float]  # under the names of the methods' metrics


def references(plan: Plan) -> list[Reference]:
    """Every teacher of the sweep and chance, as measured when they were prepared."""
    found: dict[str, Reference] = {}
    for told in plan.told():
        teacher = told.get("teacher", "unnamed")
        for kind, title, network in (("teacher", f"{TEACHER}, {teacher}", teacher), ("chance", "chance", "")):
            measured = told.get(f"{kind}_metrics", {})
            if measured:
                found.setdefault(title, Reference(title, kind, network, measured))
    return list(found.values())


def facts(plan: Plan) -> dict[str, Any]:
    """Code version, and data and teacher of the first preparation."""
    return {**plan.facts, **next(iter(plan.told()), {})}


def networks(plan: Plan, record: TrialRecord) -> tuple[str, str]:
    """Student and teacher of a trial as published tables name them."""
    method, recipe = plan.recipe_of(record.point)
    return find.method(method).networks(recipe)


def changed_settings(plan: Plan) -> list[str]:
    """What the command line set, as FIELD=VALUE."""
    found: dict[str, None] = {}
    for method in plan.recipes:
        usual = changed(find.recipe(method, plan.benchmark), plan.search_space.fix)
        for name, value in differing(plan.base_recipe(method), usual).items():
            found[f"{name}={'x'.join(map(str, value)) if isinstance(value, list) else value}"] = None
    return list(found)


def section(plan: Plan, records: list[TrialRecord]) -> Section:
    """Commands that run the sweep again and take its best student away, and what it was run on."""
    command = [f"python -m orchestrator.sweep {plan.space} --on {plan.benchmark}"]
    given = [setting for setting in changed_settings(plan) if not (plan.confirm and setting == "part=validation")]
    command += [f"--set {setting}" for setting in given]
    if plan.confirm:
        points, seeds = plan.confirm["points"], len(plan.confirm["seeds"])
        command += [f"--select-on validation --confirm {points} --seeds {seeds}"]
    command += ["--data-root DIR"] if plan.place["data_root"] else []
    command += [f"--trials {plan.trials}"] if not plan.search_space.cells else []
    command += [f"--workers {plan.workers}"] if plan.workers > 1 else []
    best = _taken(plan, records)
    use = [f"python -m orchestrator.evaluate {best}", f"python -m orchestrator.export {best} --format safetensors"]
    lines = [" ".join(command), *(use if best else []), tracking.ui_command(plan.tracking_uri)]
    told = {k: v for k, v in facts(plan).items() if not isinstance(v, dict) and k != "code" and v != ""}
    plain = {k.replace("_", " "): str(v) for k, v in told.items()}
    return Section("How to reproduce", code="\n".join(lines), facts=plain)


def _taken(plan: Plan, records: list[TrialRecord]) -> str:
    """The run whose student to take: the best one or, after a search on held-out identities, one that saw all data."""
    if not plan.confirm:
        return ranked(records)[0].run_id
    found = confirming.stored(plan)
    done = study.records(found) if found else []
    first = next(iter(found.search_space.cells)) if found else ""
    return next((r.run_id for r in done if r.status == "completed" and r.point["cell"] == first), "")
