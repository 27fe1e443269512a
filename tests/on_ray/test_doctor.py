"""Every judgement on made-up answers, and the real command on a real cluster, one node of which is unlike the rest."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator import doctor
from orchestrator.on_ray import checkup, cluster, examination, findings
from orchestrator.on_ray.findings import Finding, Gpus, Used

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
HERE = {
    "python": "3.11.7", "ray": "2.60.0", "torch": "2.14.1", "numpy": "2.4.6", "pyarrow": "25.0.1", "mlflow": "3.17.2",
    "optuna": "5.0.0", "project": "0.4.0", "commit": "4b8a1baad724",
}  # fmt: skip
FAST = {"visible": True, "write": 300.0, "read": 900.0, "latency": 2.0, "free": 500 * GIB}


def states(found: list[Finding]) -> list[str]:
    return [finding.state for finding in found]


def test_a_finding_is_one_line_with_what_to_do():
    assert str(Finding("clocks", "ok", "0 s")) == "ok    clocks         0 s"
    assert str(Finding("clocks", "bad", "an hour", "set it")) == "bad   clocks         an hour → set it"


@pytest.mark.parametrize(
    ("package", "theirs", "state"),
    [
        ("python", "3.11.9", "warn"),
        ("python", "3.12.0", "bad"),
        ("ray", "2.60.1", "bad"),
        ("torch", "2.14.1+cu130", "warn"),  # another build of the same version
        ("torch", "2.14.2", "warn"),
        ("torch", "2.13.0", "bad"),
        ("numpy", "2.3.0", "warn"),
        ("pyarrow", "24.0.0", "bad"),
        ("mlflow", "", "bad"),
        ("project", "0.3.0", "bad"),
        ("commit", "86aa8a71d5ff", "bad"),
        ("commit", "4b8a1baad724-dirty", "bad"),
        ("commit", "unknown", "warn"),  # a wheel beside a checkout
    ],
)
def test_versions_that_differ(package, theirs, state):
    (found,) = findings.versions(HERE, {"a": HERE, "b": HERE | {package: theirs}})
    assert found.state == state and f"{package} {theirs or 'is missing'} on b, {HERE[package]} here" in found.text
    assert found.remedy


def test_versions_that_agree_are_one_line():
    (found,) = findings.versions(HERE, {"a": HERE, "b": HERE})
    assert found.state == "ok" and "2 node(s)" in found.text and "ray 2.60.0" in found.text


def test_a_difference_of_many_nodes_is_one_line():
    other = HERE | {"ray": "2.59.0"}
    (found,) = findings.versions(HERE, {f"n{i}": other for i in range(100)})
    assert "n0, n1, n2, n3, 96 more" in found.text and "n4" not in found.text


def test_gpus():
    good = Gpus(2, 2, ["570.1", "570.1"])
    none = Gpus(0, 0, [])
    assert states(findings.gpus({"a": none})) == ["ok"]
    (found,) = findings.gpus({"a": good, "b": none})
    assert found.state == "ok" and found.text == "2 usable, driver 570.1"
    (found,) = findings.gpus({"a": good, "b": Gpus(1, 0, ["570.1"], "driver too old")})
    assert found.state == "bad" and found.text == "b offers 1, torch can use 0 (driver too old)"
    (found,) = findings.gpus({"a": good, "b": Gpus(1, 1, ["535.2"])})
    assert found.state == "bad" and found.text == "driver 570.1 on a, driver 535.2 on b"
    (found,) = findings.gpus({"a": Gpus(0, 1, ["570.1"])})
    assert found.state == "warn" and "none of 1 on a" in found.text


def test_head_memory():
    a_trial = cluster.CONTROL_BYTES
    assert a_trial == 0.25 * GIB
    assert findings.head_memory(4.5 * GIB, 10, a_trial).state == "ok"  # 2 + 10 · 0.25 = 4.5
    found = findings.head_memory(4.5 * GIB - 1, 10, a_trial)
    assert found.state == "bad" and found.remedy.startswith("--concurrent 9")
    found = findings.head_memory(GIB, 1, a_trial)
    assert found.state == "bad" and "--concurrent" not in found.remedy
    assert findings.head_memory(None, 1, a_trial).state == "warn"


def test_resources_that_do_not_suffice():
    assert findings.fitting("1 worker(s)", 4, None).state == "ok"
    assert findings.fitting("1 worker(s)", 4, 4).state == "ok"
    found = findings.fitting("1 worker(s)", 3, 4)
    assert found.state == "warn" and "3 of 4" in found.text and "--concurrent 3" in found.remedy


def test_clocks():
    assert findings.clocks({"a": (0.1, 0.05), "b": (-1.9, 0.0)}, {}).state == "ok"
    found = findings.clocks({"a": (0.1, 0.05), "b": (-3600.0, 0.1)}, {})
    assert found.state == "warn" and "b -3600.0 s" in found.text and "a " not in found.text
    assert findings.clocks({"a": (3.0, 1.5)}, {}).state == "ok"  # the question took 3 s: nobody can tell
    assert findings.clocks({"a": (0.0, 0.0)}, {"b": "no answer within 60 s"}).state == "warn"


def test_what_is_little_on_a_node():
    assert findings.shared_memory({"a": (8 * GIB, 2 * GIB)}).state == "ok"
    found = findings.shared_memory({"a": (8 * GIB, 8 * GIB), "b": (64 * 2**20, 64 * 2**20), "c": None})
    assert found.state == "warn" and "b 0.1 GiB free of 0.1 GiB; c has none" in found.text
    assert findings.open_files({"a": 65536}).state == "ok"
    found = findings.open_files({"a": 65536, "b": 1024})
    assert found.state == "warn" and "1024 on b" in found.text
    assert findings.temporary_space({"a": 50 * GIB}).state == "ok"
    assert findings.temporary_space({"a": 50 * GIB, "b": GIB}).state == "warn"


def test_the_dashboard_is_away():
    assert findings.dashboard("").state == "ok"
    found = findings.dashboard("ConnectionError: refused")
    assert found.state == "warn" and "refused" in found.text and "ray[default]" in found.remedy


def test_storage_that_is_shared_and_fast():
    found = findings.storage("/s", {"a": Used(**FAST), "b": Used(**FAST | {"write": 100.0})}, {})
    assert states(found) == ["ok", "ok", "ok"]
    assert "writes 100 MiB/s, reads 900 MiB/s from the slowest node, 2 ms" in found[1].text


@pytest.mark.parametrize(
    ("used", "failed", "text"),
    [
        (Used(visible=False), {}, "/s is another folder on b"),
        (Used(**FAST, seen=False), {}, "what b writes to /s is not seen here"),
        (None, {"b": "OSError: read-only"}, "/s on b: OSError: read-only"),
    ],
)
def test_storage_that_is_not_shared(used, failed, text):
    nodes = {"a": Used(**FAST)} | ({"b": used} if used else {})
    first, *rest = findings.storage("/s", nodes, failed)
    assert first.state == "bad" and text in first.text and "mount one file system" in first.remedy
    assert states(rest) == ["ok", "ok"]  # what a can do is told all the same


@pytest.mark.parametrize("slow", [{"write": 5.0}, {"read": 5.0}, {"latency": 400.0}])
def test_storage_that_is_slow(slow):
    shared, speed, _ = findings.storage("/s", {"a": Used(**FAST), "b": Used(**FAST | slow)}, {})
    assert shared.state == "ok" and speed.state == "warn"
    assert speed.text.startswith("b writes") and f"{next(iter(slow.values())):.0f}" in speed.text


def test_storage_that_is_full():
    space = {free: findings.storage("/s", {"a": Used(**FAST | {"free": free})}, {})[-1].state
             for free in (100 * GIB, 5 * GIB, 1000)}  # fmt: skip
    assert list(space.values()) == ["ok", "warn", "bad"]
    endless = findings.storage("s3://b", {"a": Used(**FAST | {"free": None})}, {})
    assert [finding.what for finding in endless] == ["storage", "storage speed"]


def test_tracking():
    assert findings.tracking("sqlite:////s/mlflow.db", 1, {}).state == "ok"
    assert findings.tracking("sqlite:////s/mlflow.db", 1, None).state == "ok"
    found = findings.tracking("sqlite:////s/mlflow.db", 2, {})
    assert found.state == "bad" and "MLFLOW_TRACKING_URI" in found.remedy
    assert findings.tracking("http://h:5000", 2, {}).state == "ok"
    found = findings.tracking("http://h:5000", 2, {"b": "refused", "c": "refused"})
    assert found.state == "bad" and "from b, c: refused" in found.text
    assert findings.tracking("", 2, {}).state == "bad"  # object storage without a server


def test_the_rest():
    assert findings.study("", "").state == "ok"
    assert findings.study("postgresql://u:***@h/d", "").state == "ok"
    assert findings.study("postgresql://u:***@h/d", "refused").state == "bad"
    assert findings.weights("resnet18", 2, {}).state == "ok"
    found = findings.weights("resnet18", 2, {"b": "not in the cache"})
    assert found.state == "bad" and "b: not in the cache" in found.text and "HF_HOME" in found.remedy
    (found,) = findings.silent({"b": "no answer within 60 s"})
    assert found.state == "bad" and "b does not answer" in found.text


def test_no_password_is_shown():
    environment = {
        "PGPASSWORD": "hush", "MLFLOW_TRACKING_URI": "https://me:a%2Fb@host", "OPTUNA_STORAGE": "postgresql://h/d?password=deep",
        "MLFLOW_TRACKING_TOKEN": "", "HOME": "/home/me",
    }  # fmt: skip
    shown = examination.hidden("hush a%2Fb a/b deep https://me:a%2Fb@host /home/me", environment)
    assert shown == "*** *** *** *** https://me:***@host /home/me"
    found = examination._study("postgresql+nodriver://me:hush@host/d")
    assert found.state == "bad" and "hush" not in str(found)
    found = examination._study("not an address hush")
    assert found.state == "bad" and "hush" not in str(found)


def test_a_real_database_is_asked(tmp_path):
    found = examination._study(f"sqlite:///{tmp_path}/study.db")
    assert found.state == "ok" and "study.db answers" in found.text
    assert examination._study(f"sqlite:///{tmp_path}/nowhere/study.db").state == "bad"


def test_what_hangs_is_not_waited_for():
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="no answer within 0 s"):
        examination.within(0.1, time.sleep, 30)
    assert time.monotonic() - began < 10
    with pytest.raises(ZeroDivisionError):
        examination.within(5, divmod, 1, 0)
    assert examination.within(5, divmod, 7, 2) == (3, 1)


def test_a_node_uses_only_the_storage_that_the_driver_marked(tmp_path, monkeypatch):
    monkeypatch.setattr(checkup, "LARGE_BYTES", 2**20)
    for storage in (str(tmp_path / "runs"), f"file://{tmp_path}/runs", "memory://runs"):
        assert examination._begin(storage, "marked", b"secret") is True
        used = Used(**checkup.use_storage(storage, "marked", b"secret", "node"))
        assert used.visible and min(used.write, used.read, used.latency) > 0, storage
        assert (used.free is None) == storage.startswith("memory:")
        assert examination._is_seen(storage, "marked/node", b"secret")
        assert not examination._is_seen(storage, "marked/other", b"secret")
        assert checkup.use_storage(storage, "marked", b"another", "node") == {"visible": False}
        assert checkup.use_storage(storage, "unmarked", b"secret", "node") == {"visible": False}
        examination._end(storage, "marked", True)
        assert list(tmp_path.iterdir()) == []  # no trace, also of the folder that was not there


def test_a_storage_that_was_there_stays(tmp_path):
    assert examination._begin(str(tmp_path), "marked", b"secret") is False
    (tmp_path / "kept").touch()
    examination._end(str(tmp_path), "marked", False)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_limits_of_this_machine():
    told = checkup.about(0.0)
    assert told["versions"]["python"] == sys.version.split()[0] and told["versions"]["project"]
    assert told["open_files"] > 0 and told["temporary"] > 0
    if sys.platform == "linux":
        size, free = told["shared_memory"]
        assert 0 <= free <= size and 0 < told["memory"] < 2**50
    assert checkup.shared_memory("/nowhere") is None


def test_a_driver_that_hangs_or_fails():
    assert checkup._said([sys.executable, "-c", "print(3)"], 30) == ("3\n", "")
    assert checkup._said([sys.executable, "-c", "raise SystemExit('no device')"], 30) == ("", "no device")
    output, error = checkup._said([sys.executable, "-c", "import time; time.sleep(60)"], 0.5)
    assert not output and "does not end" in error


def test_weights_that_a_recipe_starts_from():
    assert doctor.pretrained("d3still", "inshop") == ["resnet18.tv_in1k", "resnet101.tv_in1k"]
    assert doctor.pretrained("d3still", "demo") == doctor.pretrained("", "") == []
    with pytest.raises(ValueError, match="needs --method"):
        doctor.pretrained("", "inshop")
    with pytest.raises(ValueError, match="d3still"):
        doctor.pretrained("d3stil", "")


def test_a_check_that_fails_is_a_finding(monkeypatch, tmp_path):
    def gone() -> None:
        raise RuntimeError("the head is gone")

    monkeypatch.setattr(examination, "living", gone)
    (found,) = examination.examine(examination.Asked(str(tmp_path), None, 1, 0.0))
    assert found.state == "bad" and "RuntimeError: the head is gone" in found.text
    monkeypatch.setattr(examination, "_begin", lambda *arguments: gone())
    (found,) = examination._storage(str(tmp_path), [])
    assert found.state == "bad" and f"{tmp_path} on this machine: RuntimeError" in found.text


@pytest.mark.slow
def test_a_node_that_is_too_late_or_fails(local_ray):
    def late() -> None:
        time.sleep(120)

    def broken() -> None:
        raise ValueError("no disk")

    (node,) = examination.living()
    assert node.head
    assert examination.ask({node: ()}, broken) == ({}, {node.name: "no disk"})
    assert examination.ask({node: ()}, late, seconds=2) == ({}, {node.name: "no answer within 2 s"})
    assert examination.ask({}, late) == ({}, {})


def test_weights_that_are_not_here_are_not_loaded_from_elsewhere(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "")  # set by the check, and given back by this
    found = checkup.load_weights(["test_vit3.r160_in1k", "resnet19", "resnet10t.nobody"])
    assert "cannot be loaded" in found["test_vit3.r160_in1k"]
    assert "did you mean" in found["resnet19"] and "'nobody'" in found["resnet10t.nobody"]


@pytest.mark.parametrize(("address", "asked"), [("auto", False), ("local", False), ("ray://127.0.0.1:{}", True),
                                                ("[::1]:{}", True), ("localhost:{}", True)])  # fmt: skip
def test_addresses_that_are_tried(address, asked):
    address = address.format(free_port())
    with pytest.raises(ConnectionError, match="does not answer") if asked else contextlib.nullcontext():
        cluster._check_address(address)


def test_nobody_at_the_address_is_a_finding_within_seconds(monkeypatch, tmp_path):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # whatever cluster the session has
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    monkeypatch.setenv("ORCHESTRATOR_STORAGE", str(tmp_path))
    began = time.monotonic()
    result = CliRunner().invoke(doctor.main, [])
    assert result.exit_code == 1 and result.output.startswith("bad   cluster"), result.output
    assert "does not answer" in result.output and time.monotonic() - began < 30


def free_port() -> int:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return chosen.getsockname()[1]


def put_weights(home: Path, network: str) -> None:
    """Weights of timm's at the place where the client of Hugging Face's hub keeps what it has loaded."""
    import timm
    from safetensors.torch import save_file

    repository, revision = home / "hub" / f"models--timm--{network}", "0" * 40
    for folder in (repository / "refs", repository / "snapshots" / revision):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    weights = timm.create_model(network.partition(".")[0], pretrained=False).state_dict()
    save_file(weights, repository / "snapshots" / revision / "model.safetensors")


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory) -> Iterator[str]:
    """The address of a cluster of two nodes on this machine, without a dashboard; they have weights of one network."""
    import ray
    import ray.experimental.internal_kv
    from ray.cluster_utils import Cluster

    home = tmp_path_factory.mktemp("hub")
    put_weights(home, "test_resnet.r160_in1k")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(home))
        for name in ("RAY_ADDRESS", "PYTEST_CURRENT_TEST"):
            patch.delenv(name, raising=False)
        node = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
        made = Cluster(initialize_head=True, head_node_args=node)
        made.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        made.wait_for_nodes()
        yield made.address
        made.shutdown()
        if ray.is_initialized():  # it has reset the blackboard of the session's own cluster
            ray.experimental.internal_kv._initialize_internal_kv(ray._private.worker.global_worker.gcs_client)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    """The address of a real MLflow server."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port),
               "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]  # fmt: skip
    quiet = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, cwd=folder, env=quiet, stdout=log, stderr=log, start_new_session=True)
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + 120
    try:
        while time.monotonic() < end:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
                break
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.5)
        yield address
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


def examined(address: str, storage: Path | str, *arguments: str, **environment: str) -> tuple[int, list[str]]:
    """Exit code and lines of the command in a process of its own."""
    own = {**os.environ, "RAY_ADDRESS": address, "ORCHESTRATOR_STORAGE": str(storage), "PYTHONPATH": str(ROOT)}
    for name in ("MLFLOW_TRACKING_URI", "OPTUNA_STORAGE", "PYTEST_CURRENT_TEST"):
        own.pop(name, None)
    command = [sys.executable, "-m", "orchestrator.doctor", *arguments]
    done = subprocess.run(command, env=own | environment, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    return done.returncode, done.stdout.splitlines()


def of(lines: list[str], what: str) -> list[str]:
    """State of every finding about something."""
    return [line[:5].strip() for line in lines if line[6:20].strip() == what]


@pytest.mark.slow
def test_two_nodes_that_share_everything(two_nodes, server, tmp_path):
    code, lines = examined(
        two_nodes,
        tmp_path / "runs",
        "--weights",
        "test_resnet.r160_in1k",
        MLFLOW_TRACKING_URI=server,
        OPTUNA_STORAGE=f"sqlite:///{tmp_path}/study.db",
    )
    assert code == 0, lines
    for what in ("versions", "GPUs", "resources", "head memory", "clocks", "storage", "tracking", "study", "weights"):
        assert of(lines, what) == ["ok"], lines
    assert of(lines, "dashboard") == ["warn"]  # this cluster has none
    assert of(lines, "storage speed") and of(lines, "open files") and of(lines, "shared memory")
    assert any("2 node(s) as here" in line for line in lines)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_sqlite_memory_of_one_process_and_missing_weights_are_bad_on_two_nodes(two_nodes, tmp_path):
    code, lines = examined(
        two_nodes, "memory://runs", "--concurrent", "100000", "--weights", "test_vit.r160_in1k",
        MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db",
    )  # fmt: skip
    assert code == 1
    for what in ("storage", "tracking", "head memory", "weights"):
        assert of(lines, what) == ["bad"], lines
    assert of(lines, "resources") == ["warn"]


@contextlib.contextmanager
def strange_node(address: str, storage: Path, broken: Path, log: Path) -> Iterator[None]:
    """A node with another folder at the place of the storage, and with a broken one at that of this project."""
    hide = f"mount -t tmpfs none {storage} && mount --bind {broken} {ROOT}/orchestrator"
    ray = "import sys; from ray.scripts.scripts import main; sys.exit(main())"
    start = (
        f"{sys.executable} -c '{ray}' start --address={address} --num-cpus=1 --object-store-memory=100000000 --block"
    )
    alone = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    if not shutil.which("unshare") or subprocess.run([*alone, "sh", "-c", hide], capture_output=True).returncode:
        pytest.skip("this system lets nobody have mounts of his own")
    with open(log, "w") as output:
        process = subprocess.Popen(
            [*alone, "sh", "-c", f"{hide} && exec {start}"], stdout=output, stderr=output, start_new_session=True
        )
    try:
        end = time.monotonic() + 90
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.5)
        yield
    finally:
        os.killpg(process.pid, 15)
        process.wait(60)


@pytest.mark.slow
def test_a_node_that_sees_another_folder_and_lacks_the_project(two_nodes, server, tmp_path):
    storage, broken = tmp_path / "runs", tmp_path / "broken"
    storage.mkdir()
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('not here')")
    with strange_node(two_nodes, storage, broken, tmp_path / "log"):
        code, lines = examined(two_nodes, storage, MLFLOW_TRACKING_URI=server)
    assert code == 1
    (blind,) = [line for line in lines if line.startswith("bad   storage  ")]
    (named,) = re.findall(r"is another folder on (\S+):", blind)  # one of three
    assert any(line.startswith("bad   versions") and f"project is missing on {named}," in line for line in lines), lines
    (away,) = [line for line in lines if line.startswith("bad   tracking")]
    assert f"from {named}:" in away and "not here" in away  # that node lacks what asks the server
    assert list(storage.iterdir()) == []
