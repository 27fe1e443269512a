"""What a campaign survives: a real cluster of three hosts, PostgreSQL, an MLflow server, and one fault at a time.

A campaign meets a few faults one after the other, each in mid-trial and when it is over the last one. After each a
line that says what happened; in the end the numbers of an undisturbed campaign, one MLflow run a trial, every epoch
once, and no placement group left. ``FAULTS_TABLE=FILE`` keeps a line of JSON for each fault.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from on_ray.hosts import ROOT, Cluster, Network, Servers, servers, skip_where_impossible, wait_for
from PIL import Image

from orchestrator import tracking
from orchestrator.launch import campaign as campaigns
from orchestrator.launch import study
from orchestrator.needs import Place

pytestmark = [pytest.mark.slow, pytest.mark.hosts]

EPOCHS = 16
CAMPAIGN = f"""
from search_spaces._campaign import Campaign, Sweep
SHORT = {{
    "train.epochs": {EPOCHS}, "run.checkpoint_every": 1, "constant_epochs": 2, "teacher.epochs": 1,
}}
CAMPAIGN = Campaign("What survives?", (
    Sweep("d3still_alpha", trials=2, settings=SHORT),
    Sweep("fitnet_weight", trials=1, settings=SHORT),
))
"""
ROOTED = """
from search_spaces._campaign import Campaign, Sweep
CAMPAIGN = Campaign("Is it there?", (Sweep("d3still_alpha", "folder", trials=1),))
"""
DRIVER = """
import sys
import search_spaces
search_spaces.__path__.append(sys.argv.pop(1))
from orchestrator.campaign import main
main()
"""


LATE = """
import time
now, now_ns = time.time, time.time_ns
time.time, time.time_ns = lambda: now() - 3600, lambda: now_ns() - 3600 * 10**9
"""
GROUPS = """
from ray.util import placement_group_table
print([group for group, info in placement_group_table().items() if info["state"] != "REMOVED"])
"""


class Field:
    """The cluster, its servers, and one storage folder after another."""

    def __init__(self, folder: Path):
        self.folder, self.spaces = folder, folder / "spaces"
        self.spaces.mkdir()
        (self.spaces / "campaign_faults.py").write_text(CAMPAIGN)
        # Hosts see what is mounted below later, and what is unmounted.
        subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
        subprocess.run(["mount", "--make-shared", str(folder)], check=True)
        self.network = Network(folder)
        self.cluster = Cluster(self.network, self.network.host(1), [self.network.host(2), self.network.host(3)])
        self.servers: Servers | None = None
        self.count = 0

    def start(self) -> None:
        self.cluster.start_head()
        for worker in self.cluster.workers:
            self.cluster.start_worker(worker)
        self.whole()

    def whole(self, workers: int = 2) -> None:
        """Waits until so many workers are there, and no more."""
        alive = "print(sum(n['Alive'] and n['Resources'].get('CPU', 0) > 0 for n in ray.nodes()))"
        wait_for(lambda: self.cluster.ask(alive).strip() == str(workers), 90, f"a cluster of {workers} workers")

    def mend(self) -> None:
        """The cluster as it was, whatever a test has done to it."""
        for host in (self.cluster.head, *self.cluster.workers):
            host.link("up")
        raylet = str(Path(find_spec("ray").origin).parent / "core/src/ray/raylet/raylet")
        missing = [host for host in self.cluster.workers if not host.processes(raylet)]
        if missing:
            for host in missing:
                host.kill()
            self.whole(2 - len(missing))  # else a dead one is still counted
        for host in missing:
            self.cluster.start_worker(host)
        self.whole()


@pytest.fixture(scope="module")
def field():
    skip_where_impossible()
    folder = Path(tempfile.mkdtemp(prefix="orchestrator-hosts-", dir="/var/tmp"))
    folder.chmod(0o755)  # PostgreSQL's user goes through it
    made = Field(folder)
    try:
        with servers(folder, made.network.ip) as made.servers:
            made.network.environment |= made.servers.environment
            os.environ["PGPASSWORD"] = made.servers.environment["PGPASSWORD"]
            made.start()
            yield made
    finally:
        os.environ.pop("PGPASSWORD", None)
        made.network.close()
        subprocess.run(["umount", "-l", str(folder)])
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Strike:
    """A fault that a campaign met, and the line that it said about it."""

    name: str
    at: float
    before: int  # lines that were said before
    line: str = ""
    said_at: float = 0.0


class Run:
    """One campaign in a storage of its own."""

    def __init__(self, field: Field, prepared: Path | None = None, storage: Path | None = None):
        field.count += 1
        self.field, self.storage = field, storage or field.folder / f"storage-{field.count}"
        self.storage.mkdir(exist_ok=True)
        if prepared is not None:
            for name in ("cache", "ready", "teachers"):
                shutil.copytree(prepared / name, self.storage / name)
        self.log = field.folder / f"driver-{field.count}.txt"
        self.strikes: list[Strike] = []
        self.process: subprocess.Popen | None = None

    def start(self, *more: str, name: str = "campaign_faults") -> "Run":
        self.process = self.field.cluster.head.python(
            DRIVER, str(self.field.spaces), name, *more, log=self.log,
            ORCHESTRATOR_STORAGE=str(self.storage), RAY_ADDRESS=self.field.cluster.address,
        )  # fmt: skip
        return self

    @property
    def said(self) -> str:
        return self.log.read_text()

    @property
    def plans(self) -> dict:
        return campaigns.read(Place(str(self.storage)), "campaign_faults-1").plans()

    def curves(self) -> list[tuple[str, dict[int, float]]]:
        """State of every trial's run, and when its epochs were computed."""
        found = []
        for plan in self.plans.values():
            for run in tracking.runs_of(plan.tracking_uri, plan.tag):
                history = tracking.client(plan.tracking_uri).get_metric_history(run.info.run_id, "train/loss")
                found.append((run.info.status, {metric.step: metric.timestamp / 1000 for metric in history}))
        return found

    def strike(self, name: str, mid_trial: bool = True) -> Strike:
        """The moment for a fault: a trial has a checkpoint and epochs left, and the last fault is over."""

        def is_moment() -> bool:
            if not list(self.storage.glob("sweeps/[df]*/train/t*/checkpoint_*")):
                return False
            running = [curve for status, curve in self.curves() if status == "RUNNING" and curve]
            last = self.strikes[-1].said_at if self.strikes else 0.0  # epochs on their way were computed before
            over = all(max(curve.values()) > last for curve in running)
            return over and any(max(curve) <= EPOCHS - 6 for curve in running)

        if mid_trial:
            self.until(is_moment, 180, f"a moment for {name}")
        self.strikes.append(Strike(name, time.time(), len(self.said.splitlines())))
        return self.strikes[-1]

    def struck(self) -> None:
        """The last fault has happened only now: until here, epochs were those of before."""
        self.strikes[-1].at = time.time()

    def says(self, pattern: str, seconds: float = 120) -> None:
        """Waits for the line about the last fault."""
        strike = self.strikes[-1]
        lines = lambda: [s for s in self.said.splitlines()[strike.before :] if re.search(pattern, s)]  # noqa: E731
        strike.line = self.until(lines, seconds, f"a line {pattern!r} about {strike.name}")[-1].strip()
        strike.said_at = time.time()

    def until(self, condition, seconds: float, what: str):
        def looked():
            assert self.process.poll() is None or condition(), f"{what} did not happen in\n{self.said}"
            return condition()

        return wait_for(looked, seconds, what)

    def finish(self, code: int = 0, seconds: float = 800) -> "Run":
        assert self.process.wait(seconds) == code, self.said
        return self

    def recovered(self, strike: Strike) -> float | None:
        """Seconds from a fault until every trial that it met has computed an epoch after the line about it."""
        found = []
        for _, curve in self.curves():
            after = [at - strike.at for at in curve.values() if at > strike.said_at]
            if after and min(curve.values()) <= strike.at:
                found.append(min(after))
        return round(max(found), 1) if found else None

    def table(self) -> dict:
        """Sweep -> trial -> point, status, metrics; and every trial's runs and steps in MLflow are looked at."""
        found = {}
        for title, plan in self.plans.items():
            records = study.records(plan)
            runs = tracking.runs_of(plan.tracking_uri, plan.tag)
            assert sorted(int(r.data.tags["orch.trial"]) for r in runs) == [r.number for r in records], "runs"
            assert {r.info.status for r in runs} == {"FINISHED"}, self.said
            for run in runs:
                steps = [step for step, _ in tracking.curve(plan.tracking_uri, run.info.run_id, "train/loss")]
                assert steps == list(range(1, EPOCHS + 1)), (title, steps)
            metrics = lambda r: {k: v for k, v in r.metrics.items() if not k.startswith("perf/")}  # noqa: E731
            found[title] = {r.number: (r.point, r.status, metrics(r)) for r in records}
        return found


@pytest.fixture(scope="module")
def undisturbed(field):
    """A campaign to which nothing happens: its storage and its table."""
    first = Run(field).start().finish()
    return first.storage, first.table()


@pytest.fixture
def faults(field, undisturbed):
    """Makes a campaign, and afterwards compares it and writes a line of the table for each of its faults."""
    field.mend()
    prepared, expected = undisturbed
    made: list[Run] = []

    def make(new: bool = False, storage: Path | None = None) -> Run:
        made.append(Run(field, None if new else prepared, storage))
        return made[-1]

    def check(run: Run) -> None:
        assert run.table() == expected
        wait_for(lambda: field.cluster.ask(GROUPS).strip() == "[]", 30, "the end of all placement groups")
        for strike in run.strikes:
            row = {"fault": strike.name, "lost": "nothing", "seconds": run.recovered(strike), "line": strike.line}
            if os.environ.get("FAULTS_TABLE"):
                with open(os.environ["FAULTS_TABLE"], "a") as table:
                    table.write(json.dumps(row, ensure_ascii=False) + "\n")

    yield make, check
    for run in made:  # of a test that has failed: its trials would be the next one's neighbours
        if run.process is not None and run.process.poll() is None:
            os.killpg(run.process.pid, signal.SIGKILL)
            run.process.wait()


def killed_anywhere(field: Field, beginning: str) -> int:
    """Kills the first process of that title on any host."""
    for host in (*field.cluster.workers, field.cluster.head):
        for pid in host.processes(beginning)[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
                return pid
    return 0


def at_work(field: Field):
    """A host on which a trial runs."""
    return next(host for host in field.cluster.workers if host.processes("ray::RayTrainWorker"))


def test_killed_processes_of_a_trial(field, faults):
    make, check = faults
    run = make().start()
    for name, title, line in (
        ("a worker of a trial killed", "ray::RayTrainWorker", "lost a worker"),
        ("a trial's own process killed, with its Train controller", "ray::ImplicitFunc", "its process died"),
    ):
        run.strike(name)
        assert wait_for(lambda title=title: killed_anywhere(field, title), 20, f"a process {title}")
        run.struck()
        run.says(rf"trial \d: {line}; goes on from its last checkpoint")
    check(run.finish())


def test_a_data_root_that_a_node_does_not_have_is_refused(field, faults):
    """Every host has its own temporary folder: what lies there on the head is on no node."""
    for name in ("train/a", "train/b", "query/a", "gallery/a"):
        folder = field.cluster.head.own / "data" / name
        folder.mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (32, 32), (number * 99, 50, 80)).save(folder / f"{number}_c{number}.png")
    (field.spaces / "campaign_rooted.py").write_text(ROOTED)
    root, storage = f"{field.network.temp}/data", field.folder / "storage-rooted"
    run = Run(field, storage=storage).start("--data-root", root, name="campaign_rooted")
    assert run.process.wait(120) == 2, run.said
    (line,) = [line for line in run.said.splitlines() if line.startswith("error")]
    assert re.search(rf"--data-root {root} is a folder here and not on node .*; mount it at that path", line), line
    assert not (storage / "sweeps").exists(), "nothing was begun"


def test_two_drivers_and_a_killed_one(field, faults):
    make, check = faults
    run = make().start()
    strike = run.strike("two drivers on one storage")
    second = Run(field, storage=run.storage).start("--resume")
    assert second.process.wait(120) == 2, second.said
    refused = [line for line in second.said.splitlines() if "the campaign campaign_faults is being run by" in line]
    strike.line, strike.said_at = refused[-1].strip(), time.time()
    run.strike("the driver killed, then --resume")
    assert field.cluster.head.kill(f"{os.sys.executable} -u -c \nimport sys\nimport search_spaces")
    run.struck()
    run.process.wait(20)
    run.start("--resume")
    run.says(r"trial \d: its driver ended; goes on")
    check(run.finish())


def test_a_killed_and_a_partitioned_node(field, faults):
    make, check = faults
    run = make().start()
    run.strike("a whole node killed in mid-trial")
    lost = at_work(field)
    lost.kill()
    run.struck()
    run.says(r"trial \d: lost a (node|worker); goes on")
    field.whole(1)  # else the dead one is still counted
    field.cluster.start_worker(lost)
    field.whole()
    run.strike("one node partitioned for 30 s")
    lost = at_work(field)
    lost.link("down")
    time.sleep(30)
    lost.link("up")
    run.says(r"trial \d: lost a (node|worker); goes on")
    check(run.finish())
    lost.kill()


def test_a_killed_head(field, faults):
    make, check = faults
    run = make().start()
    run.strike("the head node killed, a new cluster, then --resume")
    for host in (field.cluster.head, *field.cluster.workers):
        host.kill()
    run.struck()
    run.process.wait(60)
    field.start()
    run.start("--resume")
    run.says(r"trial \d: its driver ended; goes on")
    check(run.finish())


def test_servers_that_are_away(field, faults):
    make, check = faults
    run = make().start()
    run.strike("PostgreSQL away for 25 s")
    field.servers.stop_postgres()
    time.sleep(25)
    field.servers.start_postgres()
    run.says(r"is back after \d+ s")
    run.strike("the MLflow server away for 60 s")
    field.servers.stop_mlflow()
    time.sleep(60)
    field.servers.start_mlflow()
    run.says(r"the MLflow server http\S+ is back after [6-9]\d s")
    check(run.finish())


def test_a_disk_that_is_full_and_one_that_is_unmounted(field, faults):
    make, check = faults
    real, storage = field.folder / f"real-{field.count}", field.folder / f"mounted-{field.count}"
    real.mkdir(), storage.mkdir()
    mount = lambda: subprocess.run(["mount", "--bind", str(real), str(storage)], check=True)  # noqa: E731
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120m", "none", str(real)], check=True)
    mount()
    try:
        run = make(storage=storage).start()
        run.strike("a full disk under the storage for 25 s")
        with open(storage / "rest", "wb", buffering=0) as rest, contextlib.suppress(OSError):
            while True:
                rest.write(b"0" * 2**16)
        time.sleep(25)
        (storage / "rest").unlink()
        run.says(r"No space left on device")
        run.strike("the storage unmounted for 20 s")
        subprocess.run(["umount", "-l", str(storage)], check=True)
        time.sleep(20)
        mount()
        run.says(r"is not there; mount it again")
        check(run.finish())
    finally:
        for mounted in (storage, real):
            subprocess.run(["umount", "-l", str(mounted)])
    assert not list(storage.iterdir()), "nothing was written where the storage was not mounted"


def test_a_late_clock_and_a_killed_preparation(field, faults):
    make, check = faults
    late = field.cluster.workers[0]
    late.kill()
    field.whole(1)
    # Of all its Python processes. libfaketime would set the raylet's clock, too, but Python's sleep fails under it.
    (late.own / "sitecustomize.py").write_text(LATE)
    field.cluster.start_worker(late, PYTHONPATH=f"{field.network.temp}:{ROOT}")
    field.whole()
    run = make(new=True).start()
    run.strike("the clock of one node set back by an hour", mid_trial=False)
    run.says(r"the clock of node .* is 3[56]\d\d s behind")
    run.until(lambda: list(run.storage.glob("cache/*.tmp-*")), 120, "a half-made cache")
    run.strike("the maker of a cache killed half-way", mid_trial=False)
    assert wait_for(lambda: killed_anywhere(field, "ray::_call"), 20, "a preparation to kill")
    run.says(r"a preparation lost .*; made again")
    check(run.finish())
    late.kill()
