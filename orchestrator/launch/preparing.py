"""Meets needs: in order, each under a lease, written into a ledger; a teacher is trained as an ordinary trial.

What is ready is never made again, a killed preparation keeps what it had finished, and two sweeps that want the
same thing make it once: the second one says for whom it waits.
"""

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from orchestrator import cache, checkpoint, find, leases, mirror, tracking
from orchestrator.launch import before, shelf, study
from orchestrator.launch import plan as plans
from orchestrator.launch.ledger import enter, entered, look_up
from orchestrator.launch.plan import Plan
from orchestrator.launch.runner import Runner, driving
from orchestrator.method import Where
from orchestrator.needs import Need, Place, Prepared, Ready, Report, digest
from orchestrator.progress import PreparationBar
from orchestrator.recipe import recipe_from


def needs_of(plan: Plan) -> dict[str, tuple[str, dict[str, Need]]]:
    """Every variant of a plan with its method and its needs by role.

    Raises:
        ValueError, OSError: as the readers, or a tuned number that decides what is prepared.
    """
    place = plan.where
    for name, method, low, high in plans.ranges(plan):
        ends = [find.method(method).needs(recipe, place) for recipe in (low, high)]
        differing = sorted(role for role in ends[0] if _key(ends[0], role) != _key(ends[1], role))
        if differing:
            raise ValueError(
                f"{name} decides what is prepared ({', '.join(differing)}), so it can only vary as a Choice"
            )
    found = plans.variants(plan).items()
    return {variant: (method, find.method(method).needs(recipe, place)) for variant, (method, recipe) in found}


class Refused(dict[str, str]):
    """Key of a need -> why it could not be met: of several sweeps that need it, one has tried."""


def prepared(plan: Plan, runner: Runner, bar: PreparationBar, refused: Refused | None = None) -> Plan:
    """The plan with everything ready that its trials open; stored.

    Raises:
        ValueError: data or teacher are not those that the sweep was started with, or as :func:`needs_of`.
    """
    find.listed.cache_clear()  # what was listed for another plan may have changed since
    preparation = Preparation(plan, runner, bar, refused=refused)
    then = fingerprints_then(plan)
    roles = _met_and_compared(preparation, needs_of(plan), then)
    plan = dataclasses.replace(plan, prepared=roles, facts=plans.code_facts())
    shelf.save(plan)
    return plan


def _met_and_compared(
    preparation: "Preparation", wanted: Mapping[str, tuple[str, Mapping[str, Need]]], then: Mapping[str, set[str]]
) -> dict[str, dict[str, Any]]:
    """Variant -> role -> what is ready, all of it as it was then.

    First what is made of nothing else: no teacher is trained on data that are others now.
    """

    def met(only_first: bool) -> dict[str, dict[str, Any]]:
        return {
            variant: {
                role: preparation.meet(method, need).plain()
                for role, need in needs.items()
                if not only_first or (not need.after and need.trial is None)
            }
            for variant, (method, needs) in wanted.items()
        }

    if then:
        check_fingerprints(then, fingerprints(met(only_first=True).values()))
    roles = met(only_first=False)
    if then:
        check_fingerprints(then, fingerprints_now(preparation.plan, roles))
    return roles


@dataclass
class Preparation:
    """Meets the needs of one plan."""

    plan: Plan  # whose place, workers and GPUs are used
    runner: Runner
    bar: PreparationBar
    trains: bool = True  # whether a teacher that is missing may be trained
    met: dict[str, Ready] = field(default_factory=dict)
    refused: Refused | None = None  # shared by the sweeps of a campaign

    @property
    def place(self) -> Place:
        return self.plan.where

    def meet(self, method: str, need: Need) -> Ready:
        """What is ready for a need, made now where it is not."""
        key = need.key
        if key not in self.met:
            self.met[key] = self._there(need) or self._made_once(method, need)
        return self.met[key]

    def _made_once(self, method: str, need: Need) -> Ready:
        """Raises ValueError at once where another sweep of the campaign could not make it either."""
        try:
            return self._make(method, need)
        except ValueError as error:
            if self.refused is not None:
                self.refused.setdefault(need.key, str(error))
            raise

    def _not_refused(self, need: Need) -> None:
        if self.refused is not None and need.key in self.refused:
            raise ValueError(self.refused[need.key])

    def _there(self, need: Need) -> Ready | None:
        """What the ledger has for a need, unless what it was made with is another now, such as other weights."""
        found = look_up(self.place, need.key, verify=True)
        if found is None:
            return None
        for role, part in need.after.items():
            now = self.met.get(part.key) or look_up(self.place, part.key)
            if now is not None and found.after.get(role, now.fingerprint) != now.fingerprint:
                return None
        return found

    def _make(self, method: str, need: Need) -> Ready:
        after = self._meet_all(method, need.after)
        if need.trial is not None:
            return self._train(need, after)
        with self._held(self.place.address("leases", need.key), need):
            self._not_refused(need)
            found = self._there(need)
            if found is None:
                values = {
                    "method": method,
                    "need": need.plain(),
                    "after": {role: ready.plain() for role, ready in after.items()},
                    "place": dataclasses.asdict(self.place),
                }
                answer = self.runner.call(f"{__name__}:make", values, need.network, self.bar)
                for message in answer["warnings"]:
                    warnings.warn(message, stacklevel=2)
                made_with = {role: ready.fingerprint for role, ready in after.items()}
                found = dataclasses.replace(Ready(**answer["ready"]), after=made_with)
                enter(self.place, found)
        return found

    def _meet_all(self, method: str, needs: Mapping[str, Need]) -> dict[str, Ready]:
        """In order; pieces, which come last and do not need each other, side by side."""
        shards = {role: need for role, need in needs.items() if need.piece}
        found = {role: self.meet(method, need) for role, need in needs.items() if role not in shards}
        if shards:
            for need in shards.values():  # what they share is there before they start
                self._meet_all(method, need.after)
            with ThreadPoolExecutor(max(1, self.runner.capacity().calls)) as pool:
                made = pool.map(lambda need: self.meet(method, need), shards.values())
                found |= dict(zip(shards, made, strict=True))
        return found

    def _held(self, lease: str, need: Need) -> Any:
        what = need.title or need.kind
        waiting = lambda holder: self.bar.line(f"{what}: waiting for {holder}, who is making it")  # noqa: E731
        return leases.held(lease, waiting, what, self.bar.line)

    # --- Trainings ------------------------------------------------------------------------------------------------

    def _train(self, need: Need, after: Mapping[str, Ready]) -> Ready:
        """Trains a teacher as its own MLflow run, unless it is there: found by what decides it, wherever data lie."""
        content = {role: ready.fingerprint for role, ready in after.items()}
        key = digest([dict(need.made_from), content])[:32]
        names = [name for name in (key, before.teacher_folder(need.trial[2], content)) if name is not None]
        folders = [Path(self.place.folder("teachers", name)) for name in names]
        with self._held(self.place.address("leases", f"teacher-{key}"), need):
            self._not_refused(need)
            for name in names:
                self._fetch(f"teachers/{name}/teacher.safetensors")
            stored = [folder for folder in folders if (folder / "teacher.json").exists()]
            if not stored:
                self._train_now(need, key, folders[0])
                mirror.publish(self.place, f"teachers/{key}/teacher.safetensors")
            ready = self._stored_teacher(need, (stored or folders)[0])
            enter(self.place, ready)
        return ready

    def _fetch(self, path: str) -> None:
        """Copies what an object storage has of a teacher."""
        if self.place.remote and mirror.published(self.place, path):
            mirror.fetch(self.place, path)

    def _stored_teacher(self, need: Need, folder: Path) -> Ready:
        """A teacher that was trained before; a damaged one is fetched again from its MLflow run."""
        try:
            return _teacher(need, folder, self.place)
        except (ValueError, OSError) as error:
            damage = f"the {need.title} is damaged: {error}"
        try:
            known = entered(self.place, need.key)
            try:
                facts = checkpoint.facts_of(folder / "teacher.safetensors")
            except ValueError:
                facts = {}
            run_id = facts.get("run_id") or (known.told.get("teacher_run", "") if known else "")
            student = tracking.student_file(self.plan.tracking_uri, run_id)
            facts = {"run_id": run_id, "sha256": checkpoint.hashes(student)} | facts
            checkpoint.copy_model(student, folder, "teacher", facts)
            found = _teacher(need, folder, self.place)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{damage}; it cannot be fetched from its MLflow run ({error}); remove {folder} to train it anew"
            ) from error
        self.bar.line(f"{damage}; fetched again from its MLflow run {run_id}")
        return found

    def _train_now(self, need: Need, key: str, folder: Path) -> None:
        if not self.trains:
            raise ValueError(f"the {need.title} is not in {self.place.storage} any more, and scoring trains nothing")
        plan = self._unfinished(key)
        if plan is None:
            method, benchmark, values = need.trial
            recipe = recipe_from(find.recipe(method, benchmark), values)
            self.bar.line(f"[bold]{need.title}[/bold], {recipe.train.epochs} epochs: trained now, kept for all sweeps")
            space = plans.single(method, recipe.train.seed, f"A teacher by {method} on {benchmark}.")
            plan = shelf.new_plan(
                f"teacher-{key[:8]}", space, f"teacher on {benchmark}", benchmark, {method: recipe}, self.place,
                self.plan.tracking_uri, 1, 1, self.plan.workers, self.plan.gpus_per_worker,
            )  # fmt: skip
        else:
            self.bar.line(f"[bold]{need.title}[/bold]: its training was interrupted and goes on")
        with driving(plan):
            plan = prepared(plan, self.runner, self.bar)
            with self.bar.paused():
                board = self.bar.board(plan.metric, study.records(plan), plan.trials)
                record = self.runner.sweep(plan, board)[0]
        if record.status != "completed":
            raise ValueError(f"the teacher could not be trained: {record.message or record.status}")
        student = tracking.student_file(plan.tracking_uri, record.run_id)
        facts = {"run_id": record.run_id, "metrics": record.metrics, "sha256": checkpoint.hashes(student)}
        checkpoint.copy_model(student, folder, "teacher", facts)
        self.bar.line(f"  teacher ready: {plan.metric} {record.value:.4f}, MLflow run {record.run_id}")

    def _unfinished(self, key: str) -> Plan | None:
        """The plan of a training that somebody killed, also between its end and the copy of what it gave."""
        for plan in reversed(shelf.stored(f"teacher-{key[:8]}", root=self.place.storage)):
            records = study.records(plan)
            if any(r.status == "failed" or (r.status == "completed" and not _gives(plan, r)) for r in records):
                continue
            return plan
        return None


def make(values: Mapping[str, Any], device: str, progress: Report) -> dict[str, Any]:
    """Meets one need, in whatever process: plain values in, plain values out."""
    place = Place(**values["place"])
    where = Where(place, 0, 1, torch.device(device))
    after = {role: Ready(**ready) for role, ready in values["after"].items()}
    for ready in after.values():
        mirror.fetch(place, ready.path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ready = find.method(values["method"]).make(Need.of(values["need"]), after, where, progress)
    mirror.publish(place, ready.path)
    told = [str(w.message) for w in caught if "cache" in str(w.message) or "cannot be read" in str(w.message)]
    return {"ready": ready.plain(), "warnings": told}


def status(plan: Plan) -> tuple[list[str], list[str]]:
    """Titles of what is ready, and of what will be made, in the order in which it is."""
    ready, missing = {}, {}

    def visit(need: Need) -> None:
        key = need.key
        if key in ready or key in missing:
            return
        if look_up(plan.where, key) is not None:
            ready[key] = need.title or need.kind
            return
        for part in need.after.values():
            visit(part)
        missing[key] = need.title or need.kind

    for _, needs in needs_of(plan).values():
        for need in needs.values():
            visit(need)
    return list(dict.fromkeys(ready.values())), list(dict.fromkeys(missing.values()))


# --- Is it what it was? -----------------------------------------------------------------------------------------------


def fingerprints(variants: Iterable[Mapping[str, Mapping[str, Any]]]) -> dict[str, set[str]]:
    """Role -> fingerprints of what the variants of a plan have for it."""
    found: dict[str, set[str]] = {}
    for roles in variants:
        for role, ready in roles.items():
            if ready["fingerprint"]:
                found.setdefault(role, set()).add(ready["fingerprint"])
    return found


def fingerprints_then(plan: Plan) -> dict[str, set[str]]:
    """What a stored plan says of its data and teachers, whatever version has written it."""
    return fingerprints(plan.prepared.values()) if plan.prepared else before.fingerprints(plan.facts)


def fingerprints_now(plan: Plan, roles: Mapping[str, Mapping[str, Any]]) -> dict[str, set[str]]:
    """What is ready for the variants of a plan, comparable with :func:`fingerprints_then`."""
    found = fingerprints(roles.values())
    if not plan.prepared and "teacher" in found:  # 0.3 hashed the teacher of some methods with its classifier
        paths = {ready["path"] for own in roles.values() for role, ready in own.items() if role == "teacher"}
        found["teacher"] |= {_hash_with_classifier(plan.where.folder(path)) for path in paths}
    return found


def _hash_with_classifier(path: str) -> str:
    model, _ = checkpoint.load_model(path)
    model.classifier = checkpoint.load_classifier(path)
    return cache.weights_hash(model)


def check_fingerprints(then: Mapping[str, set[str]], now: Mapping[str, set[str]]) -> None:
    """Raises ValueError when data or teacher are not those of the record."""
    for role, known in then.items():
        changed = sorted(known - now.get(role, known))
        if changed:
            other = sorted(now[role] - known) or sorted(now[role])
            raise ValueError(f"the {role} is not the one of the record: {changed[0][:12]} then, {other[0][:12]} now")


def for_scoring(
    method: str, recipe: Any, place: Place, runner: Runner, bar: PreparationBar, then: Mapping[str, set[str]]
) -> Prepared:
    """What a stored student is scored with, compared with what its record says.

    Raises:
        ValueError: data or teacher are not those of the record, or the teacher is not there any more.
    """
    plan = Plan("", "", "", "", {}, dataclasses.asdict(place), tracking.tracking_uri(place.storage), 1)
    preparation = Preparation(plan, runner, bar, trains=False)
    needs = find.method(method).needs(recipe, place, "score")
    roles = _met_and_compared(preparation, {"": (method, needs)}, then)[""]
    for ready in roles.values():
        mirror.fetch(place, ready["path"])
    return Prepared.of(place, roles)


def _key(needs: Mapping[str, Need], role: str) -> str:
    return needs[role].key if role in needs else ""


def _gives(plan: Plan, record: plans.TrialRecord) -> bool:
    try:
        return tracking.student_file(plan.tracking_uri, record.run_id).is_file()
    except ValueError:
        return False


def _teacher(need: Need, folder: Path, place: Place) -> Ready:
    """Raises ValueError, FileNotFoundError: a file is missing, or not what was stored."""
    path = folder / "teacher.safetensors"
    model, facts = checkpoint.load_model(path)
    files = {f"teacher{suffix}.safetensors": sha for suffix, sha in checkpoint.hashes(path).items()}
    known = facts.get("sha256")  # 0.3 did not store it
    for suffix, sha in (known if isinstance(known, dict) else {}).items():
        name = f"teacher{suffix}.safetensors"
        if files.get(name) != sha:
            what = "not what was stored there" if name in files else "missing"
            raise ValueError(f"{path.with_name(name)} is {what}")
    files["teacher.json"] = cache.file_hash(path.with_suffix(".json"))
    told = {"teacher_run": facts.get("run_id", ""), "files": files}
    return Ready(need.key, need.kind, str(path.relative_to(place.storage)), cache.weights_hash(model), told)
