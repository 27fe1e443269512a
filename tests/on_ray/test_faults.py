"""What a campaign survives: a real cluster of three hosts, PostgreSQL, an MLflow server, and one fault at a time.

After each: the numbers of an undisturbed campaign, one MLflow run a trial, every epoch once, a line that says what
happened, and no placement group left. ``FAULTS_TABLE=FILE`` keeps a line of JSON for each.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest
from on_ray.hosts import Cluster, Network, Servers, servers, skip_where_impossible, wait_for

from orchestrator import tracking
from orchestrator.launch import campaign as campaigns
from orchestrator.launch import study
from orchestrator.needs import Place

pytestmark = [pytest.mark.slow, pytest.mark.night]

CAMPAIGN = """
from search_spaces._campaign import Campaign, Sweep
SHORT = {"train.epochs": 4, "teacher.epochs": 1, "constant_epochs": 2, "data.fraction": 0.5, "run.checkpoint_every": 1}
CAMPAIGN = Campaign("What survives?", (
    Sweep("d3still_alpha", trials=2, settings=SHORT),
    Sweep("fitnet_weight", trials=1, settings=SHORT),
))
"""
DRIVER = """
import sys
import search_spaces
search_spaces.__path__.append(sys.argv.pop(1))
from orchestrator.campaign import main
main()
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
            host.environment.clear()
        missing = [host for host in self.cluster.workers if not host.processes()]
        if missing:
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
        self.struck_at = 0.0
        self.process: subprocess.Popen | None = None

    def start(self, *more: str, **environment: str) -> "Run":
        self.process = self.field.cluster.head.python(
            DRIVER, str(self.field.spaces), "campaign_faults", *more, log=self.log,
            ORCHESTRATOR_STORAGE=str(self.storage), RAY_ADDRESS=self.field.cluster.address, **environment,
        )  # fmt: skip
        return self

    @property
    def said(self) -> str:
        return self.log.read_text()

    def in_mid_trial(self) -> None:
        """Waits until a trial has a checkpoint and goes on."""
        self.until(lambda: list(self.storage.glob("sweeps/[df]*/train/t*/checkpoint_*")), 180, "a checkpoint")
        self.struck_at = time.time()

    def until(self, condition, seconds: float, what: str):
        def looked():
            assert self.process.poll() is None or condition(), self.said
            return condition()

        return wait_for(looked, seconds, what)

    def finish(self, code: int = 0, seconds: float = 400) -> "Run":
        assert self.process.wait(seconds) == code, self.said
        return self

    def recovered(self) -> float | None:
        """Seconds from the fault until every trial that it met was further than before."""
        found = []
        for plan in campaigns.read(Place(str(self.storage)), "campaign_faults-1").plans().values():
            for run in tracking.runs_of(plan.tracking_uri, plan.tag):
                history = tracking.client(plan.tracking_uri).get_metric_history(run.info.run_id, "train/loss")
                times = [metric.timestamp / 1000 - self.struck_at for metric in history]
                if any(at <= 0 for at in times) and any(at > 0 for at in times):
                    found.append(min(at for at in times if at > 0))
        return round(max(found), 1) if found and self.struck_at else None

    def table(self) -> dict:
        """Sweep -> trial -> point, status, metrics; and every trial's runs and steps in MLflow are looked at."""
        state = campaigns.read(Place(str(self.storage)), "campaign_faults-1")
        found = {}
        for title, plan in state.plans().items():
            records = study.records(plan)
            runs = tracking.runs_of(plan.tracking_uri, plan.tag)
            assert sorted(int(r.data.tags["orch.trial"]) for r in runs) == [r.number for r in records], "runs"
            assert {r.info.status for r in runs} == {"FINISHED"}, self.said
            for run in runs:
                steps = [step for step, _ in tracking.curve(plan.tracking_uri, run.info.run_id, "train/loss")]
                assert steps == [1, 2, 3, 4], (title, steps)
            metrics = lambda r: {k: v for k, v in r.metrics.items() if not k.startswith("perf/")}  # noqa: E731
            found[title] = {r.number: (r.point, r.status, metrics(r)) for r in records}
        return found


@pytest.fixture(scope="module")
def undisturbed(field):
    """A campaign to which nothing happens: its storage and its table."""
    first = Run(field).start().finish()
    return first.storage, first.table()


@pytest.fixture
def fault(field, undisturbed):
    """Makes a campaign, and afterwards compares it and writes a line of the table of faults."""
    field.mend()
    prepared, expected = undisturbed

    def make(new: bool = False, storage: Path | None = None) -> Run:
        return Run(field, None if new else prepared, storage)

    def check(run: Run, name: str, line: str) -> None:
        assert run.table() == expected
        said = re.search(line, run.said)
        assert said, f"no line {line!r} in\n{run.said}"
        wait_for(lambda: field.cluster.ask(GROUPS).strip() == "[]", 30, "the end of all placement groups")
        whole_line = next(text for text in run.said.splitlines() if re.search(line, text))
        row = {"fault": name, "lost": "nothing", "seconds": run.recovered(), "line": whole_line.strip()}
        if os.environ.get("FAULTS_TABLE"):
            with open(os.environ["FAULTS_TABLE"], "a") as table:
                table.write(json.dumps(row, ensure_ascii=False) + "\n")

    yield make, check
    for process in (r for r in field.cluster.head.processes("ip netns") if r):
        raise AssertionError(f"a driver was left: {process}")


@contextlib.contextmanager
def after(seconds: float, do):
    timer = threading.Timer(seconds, do)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def killed_anywhere(field: Field, beginning: str) -> int:
    """Kills the first process of that title on any host."""
    for host in (*field.cluster.workers, field.cluster.head):
        for pid in host.processes(beginning)[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
                return pid
    return 0


@pytest.mark.parametrize(
    ("name", "title", "line"),
    [
        (
            "a worker of a trial killed",
            "ray::RayTrainWorker",
            r"trial \d: lost a worker; goes on from its last checkpoint",
        ),
        ("a Train controller killed", "ray::TrainController", r"trial \d: lost its controller; goes on from its last"),
        ("a trial's own process killed", "ray::ImplicitFunc", r"trial \d: its process died; goes on from its last"),
    ],
)
def test_a_killed_process_of_a_trial(field, fault, name, title, line):
    make, check = fault
    run = make().start()
    run.in_mid_trial()
    assert wait_for(lambda: killed_anywhere(field, title), 20, f"a process {title}")
    check(run.finish(), name, line)


def test_a_killed_driver(field, fault):
    make, check = fault
    run = make().start()
    run.in_mid_trial()
    assert field.cluster.head.kill(f"{os.sys.executable} -u -c \nimport sys\nimport search_spaces")
    run.process.wait(20)
    run.start("--resume")
    check(run.finish(), "the driver killed, then --resume", r"trial \d: its driver ended; goes on")


def test_a_killed_node(field, fault):
    make, check = fault
    run = make().start()
    run.in_mid_trial()
    lost = next(host for host in field.cluster.workers if host.processes("ray::RayTrainWorker"))
    lost.kill()
    check(run.finish(), "a whole node killed in mid-trial", r"trial \d: lost a (node|worker); goes on")


def test_a_killed_head(field, fault):
    make, check = fault
    run = make().start()
    run.in_mid_trial()
    for host in (field.cluster.head, *field.cluster.workers):
        host.kill()
    run.process.wait(60)
    field.start()
    run.start("--resume")
    check(run.finish(), "the head node killed, a new cluster, then --resume", r"trial \d: its driver ended; goes on")


def test_an_mlflow_server_that_is_away(field, fault):
    make, check = fault
    run = make().start()
    run.in_mid_trial()
    field.servers.stop_mlflow()
    time.sleep(60)
    field.servers.start_mlflow()
    check(run.finish(), "the MLflow server away for 60 s", r"the MLflow server http\S+ is back after \d+ s")


def test_a_restarted_database(field, fault):
    make, check = fault
    run = make().start()
    run.in_mid_trial()
    field.servers.stop_postgres()
    time.sleep(25)
    field.servers.start_postgres()
    check(run.finish(), "PostgreSQL away for 25 s", r"is back after \d+ s")


def test_a_full_disk(field, fault):
    make, check = fault
    storage = field.folder / f"small-{field.count}"
    storage.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120m", "none", str(storage)], check=True)
    try:
        run = make(storage=storage).start()
        run.in_mid_trial()
        with open(storage / "rest", "wb") as rest, contextlib.suppress(OSError):
            while True:
                rest.write(b"0" * 2**16)
                rest.flush()
        with after(25, (storage / "rest").unlink):
            run.finish()
        check(run, "a full disk under the storage for 25 s", r"No space left on device")
    finally:
        subprocess.run(["umount", "-l", str(storage)])


def test_a_storage_that_is_unmounted_and_back(field, fault):
    make, check = fault
    real, storage = field.folder / f"real-{field.count}", field.folder / f"mounted-{field.count}"
    real.mkdir(), storage.mkdir()
    mount = lambda: subprocess.run(["mount", "--bind", str(real), str(storage)], check=True)  # noqa: E731
    mount()
    try:
        run = make(storage=storage).start()
        run.in_mid_trial()
        subprocess.run(["umount", "-l", str(storage)], check=True)
        with after(20, mount):
            run.finish()
        check(run, "the storage unmounted for 20 s", r"is not there; mount it again")
    finally:
        subprocess.run(["umount", "-l", str(storage)])
    assert not list(storage.iterdir()), "nothing was written where the storage was not mounted"


def test_a_partitioned_node(field, fault):
    make, check = fault
    run = make().start()
    run.in_mid_trial()
    lost = next(host for host in field.cluster.workers if host.processes("ray::RayTrainWorker"))
    lost.link("down")
    time.sleep(30)
    lost.link("up")
    check(run.finish(), "one node partitioned for 30 s", r"trial \d: lost a (node|worker); goes on")
    lost.kill()


def test_a_maker_of_a_cache_that_is_killed(field, fault):
    make, check = fault
    run = make(new=True).start()
    run.until(lambda: list(run.storage.glob("cache/*.tmp-*")), 120, "a half-made cache")
    assert wait_for(lambda: killed_anywhere(field, "ray::_call"), 20, "a preparation to kill")
    check(run.finish(), "the maker of a cache killed half-way", r"a preparation lost .*; made again")


def test_two_drivers_on_one_storage(field, fault):
    make, check = fault
    run = make().start()
    run.in_mid_trial()
    second = Run(field, storage=run.storage).start("--resume")
    assert second.process.wait(120) == 2, second.said
    run.finish()
    run.log.write_text(run.said + second.said)
    check(run, "two drivers on one storage", r"the campaign campaign_faults is being run by process")


def test_a_clock_that_is_an_hour_late(field, fault):
    library = next(iter(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), None)
    if library is None:
        pytest.skip("libfaketime is not installed (Debian: faketime)")
    make, check = fault
    late = field.cluster.workers[0]
    late.kill()
    field.whole(1)
    late.environment.update({"LD_PRELOAD": str(library), "FAKETIME": "-1h", "FAKETIME_DONT_FAKE_MONOTONIC": "1"})
    field.cluster.start_worker(late)
    field.whole()
    run = make(new=True).start()
    run.finish()
    check(
        run,
        "the clock of one node set back by an hour (with the preparation)",
        r"the clock of node .* is 36\d\d s behind",
    )
    late.kill()
