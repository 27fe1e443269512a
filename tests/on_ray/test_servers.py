"""A campaign whose study is in PostgreSQL, runs on an MLflow server and files on an S3 server, all on localhost.

Its runs are evaluated and exported from a folder that shares nothing with it but the servers' addresses. No planted
secret is in anything that was written.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import pytest
from on_ray.hosts import ROOT, Servers, answers, free_port, postgres, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.hosts]

CAMPAIGN = """
from search_spaces._campaign import Campaign, Sweep
SHORT = {"train.epochs": 2, "teacher.epochs": 1, "data.fraction": 0.5}
CAMPAIGN = Campaign("Do servers do?", (Sweep("d3still_alpha", trials=3, settings=SHORT),))
"""
COMMAND = """
import sys
import search_spaces
search_spaces.__path__.append(sys.argv.pop(1))
from orchestrator.campaign import main
main()
"""
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "planted-secret-1", "AWS_ACCESS_KEY_ID": "planted-secret-2",
    "MLFLOW_TRACKING_PASSWORD": "planted-secret-3", "MLFLOW_TRACKING_USERNAME": "planted-secret-4",
    "MLFLOW_TRACKING_TOKEN": "planted-secret-5", "ORCHESTRATOR_PASSWORD": "planted-secret-6",
    "OPTUNA_SECRET": "planted-secret-7", "PGPASSWORD": "a-secret-of-the-test", "AWS_SESSION_TOKEN": "planted-secret-8",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder():
    if os.geteuid() or postgres() is None or shutil.which("runuser") is None:
        pytest.skip("needs PostgreSQL's programs and root, who starts them as another user (Debian: postgresql)")
    pytest.importorskip("moto.server", reason="needs moto's S3 server: pip install 'moto[s3]' flask flask-cors")
    # A short name: Ray puts sockets below it, whose paths may not be long.
    made = Path(tempfile.mkdtemp(prefix="os-", dir="/var/tmp"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture(scope="module")
def environment(folder):
    """Variables of all that run here, with the servers started."""
    s3 = free_port()
    aws = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3}", "AWS_DEFAULT_REGION": "us-east-1"}
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_ADDRESS", "ORCHESTRATOR_", "MLFLOW_"))}
    own = {**keep, **aws, **SECRETS, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        bucket = started(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(s3)], folder / "s3.log", own
        )
        stack.callback(ended, bucket)
        wait_for(lambda: answers("127.0.0.1", s3), 60, "the start of the S3 server")
        made = "import boto3; [boto3.client('s3').create_bucket(Bucket=name) for name in ('campaigns', 'artifacts')]"
        subprocess.run([sys.executable, "-c", made], check=True, env=own)
        servers = Servers(folder, "127.0.0.1", database_port=free_port(), mlflow_port=free_port())
        servers.start_postgres()
        stack.callback(servers.stop_postgres)
        servers.start_mlflow({**aws, **SECRETS}, "s3://artifacts/mlflow")
        stack.callback(servers.stop_mlflow)
        own |= servers.environment
        own["ORCHESTRATOR_STORAGE"] = "s3://campaigns/ours"
        yield own


def started(command: list[str], log: Path, environment: dict) -> subprocess.Popen:
    with open(log, "a") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )


def ended(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(environment: dict, cwd: Path, *arguments: str, code: int = 0, seconds: float = 300) -> str:
    """What a command prints in a folder of its own, with a copy of the object storage of its own."""
    cwd.mkdir(exist_ok=True)
    own = {**environment, "ORCHESTRATOR_CACHE": str(cwd / "cache"), "TMPDIR": str(cwd)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=own, capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == code, done.stdout + done.stderr
    (cwd / "said.txt").open("a").write(done.stdout + done.stderr)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def ran(folder, environment):
    """The campaign's output, and addresses on which anything listened meanwhile."""
    spaces = folder / "spaces"
    spaces.mkdir()
    (spaces / "campaign_servers.py").write_text(CAMPAIGN)
    return run(environment, folder / "driver", "-c", COMMAND, str(spaces), "campaign_servers")


def rows(said: str) -> list[str]:
    return re.findall(r"trial \d completed after epoch 2: val/map (\d\.\d{4})", said)


def test_a_campaign_runs_on_servers_alone(ran, folder, environment):
    assert "3/3 trials done" in ran and len(rows(ran)) == 3 and "teacher ready" in ran
    listed = "import fsspec; print(*fsspec.filesystem('s3').find('campaigns/ours'), sep='\\n')"
    names = run(environment, folder / "elsewhere", "-c", listed).splitlines()
    for part in (
        "/campaigns/campaign_servers-1/campaign.json", "/sweeps/d3still_alpha-demo-1/plan.json", "/lists/teachers",
        "/files/cache/", "/files/teachers/", "/ready/", "/sweeps/d3still_alpha-demo-1/train/t000/checkpoint",
    ):  # fmt: skip
        assert any(part in name for name in names), part
    assert not list((folder / "driver").rglob("*.db")), "no database beside the servers"


def test_its_runs_are_evaluated_and_exported_from_a_folder_that_shares_nothing(ran, folder, environment):
    found = run(environment, folder / "elsewhere", "-c", "from orchestrator.launch import shelf, study; "
                "print(*[r.run_id for r in study.records(shelf.latest('d3still_alpha'))])")  # fmt: skip
    run_id, other = found.split()[:2]
    nothing = {k: v for k, v in environment.items() if k not in ("ORCHESTRATOR_STORAGE", "OPTUNA_STORAGE")}
    said = run(nothing, folder / "stranger", "-m", "orchestrator.evaluate", run_id)
    values = re.findall(r"(val/\w+) +(\d\.\d+) +\(logged (\d\.\d+)\)", said)
    assert len(values) >= 3 and all(now == logged for _, now, logged in values)
    run(nothing, folder / "stranger", "-m", "orchestrator.export", run_id, "--format", "onnx", "--to", "out")
    assert list((folder / "stranger" / "out").glob("*.onnx"))
    assert "95 %" in run(nothing, folder / "stranger", "-m", "orchestrator.compare", run_id, other)
    copies = {one for pattern in ("tmp*", "orchestrator-*") for one in (folder / "stranger").glob(pattern)}
    assert not copies, "of what the server holds"


def test_it_goes_on_from_another_machine(ran, folder, environment):
    """The second one has its own copy of the storage; nothing is run again."""
    said = run(environment, folder / "second", "-c", COMMAND, str(folder / "spaces"), "campaign_servers", "--resume")
    assert "3/3 trials done" in said and "started" not in said


def test_the_study_is_in_the_database_for_its_dashboard(ran, folder, environment):
    port = free_port()
    address = environment["OPTUNA_STORAGE"]
    command = shutil.which("optuna-dashboard", path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip("optuna-dashboard is not installed: pip install optuna-dashboard")
    dashboard = started(
        [command, address, "--host", "127.0.0.1", "--port", str(port)], folder / "dash.log", environment
    )
    try:
        wait_for(lambda: answers("127.0.0.1", port), 60, "the start of the dashboard")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies", timeout=30) as answer:
            studies = json.loads(answer.read())["study_summaries"]
    finally:
        ended(dashboard)
    assert {s["study_name"].rpartition("-")[0] for s in studies} >= {"d3still_alpha-demo-1"}


def test_no_planted_secret_is_in_anything_that_was_written(ran, folder, environment):
    """Output, plans, records, reports, Ray's logs, parameters and tags of MLflow, the objects of the storage."""
    planted = {name: value.encode() for name, value in SECRETS.items()}
    seen = 0
    not_ours = ("password", "s3.log")  # of PostgreSQL's start; the S3 server names the user of every request
    for file in (file for file in folder.rglob("*") if file.is_file() and file.name not in not_ours):
        content = file.read_bytes()
        seen += 1
        for name, value in planted.items():
            assert value not in content, f"{name} is in {file}"
    objects = (
        "import fsspec, sys\nfiles = fsspec.filesystem('s3')\n"
        "for name in files.find('campaigns') + files.find('artifacts'):\n"
        "    text = files.cat_file(name)\n    [print(name, v) for v in sys.argv[1:] if v.encode() in text]"
    )
    assert run(environment, folder / "looking", "-c", objects, *SECRETS.values()) == "" and seen > 100
    runs = (
        "import os, sys\nfrom mlflow.tracking import MlflowClient\nclient = MlflowClient()\n"
        "ids = [e.experiment_id for e in client.search_experiments()]\n"
        "found = str([r.to_dictionary() for r in client.search_runs(ids)])\n"
        "assert len(found) > 10000\n[print(v) for v in sys.argv[1:] if v in found]"
    )
    assert run(environment, folder / "looking", "-c", runs, *SECRETS.values()) == ""


def test_everything_listens_on_localhost(ran, folder, environment):
    """While a campaign runs: its servers and, of Ray, what answers to people."""
    spaces = str(folder / "spaces")
    own = {**environment, "ORCHESTRATOR_CACHE": str(folder / "third/cache"), "TMPDIR": str(folder)}
    log = folder / "third.txt"
    campaign = started([sys.executable, "-u", "-c", COMMAND, spaces, "campaign_servers"], log, own)
    try:
        wait_for(lambda: "trial 0 started" in log.read_text() or campaign.poll(), 120, "a trial")
        assert campaign.poll() is None, log.read_text()
        heard = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout
        ports = [environment[name] for name in ("MLFLOW_TRACKING_URI", "OPTUNA_STORAGE", "AWS_ENDPOINT_URL")]
        ports = [re.search(r":(\d+)", address.partition("://")[2])[1] for address in ports] + ["8265"]
        listening = {line.split()[3] for line in heard.splitlines()}
        for port in ports:
            assert {name for name in listening if name.endswith(f":{port}")} <= {f"127.0.0.1:{port}"}, port
        assert any(name == "127.0.0.1:8265" for name in listening), "Ray's dashboard"
    finally:
        ended(campaign)


def test_a_storage_that_does_not_answer_is_one_line(folder, environment):
    other = {**environment, "ORCHESTRATOR_STORAGE": "s3://no-such-bucket/ours"}
    said = run(other, folder / "wrong", "-m", "orchestrator.sweep", "d3still_alpha", "--in-process", code=2)
    (line,) = [line for line in said.splitlines() if line.startswith("error")]
    assert "ORCHESTRATOR_STORAGE=s3://no-such-bucket/ours cannot be used" in line
    no_study = {k: v for k, v in environment.items() if k != "OPTUNA_STORAGE"}
    said = run(no_study, folder / "wrong", "-m", "orchestrator.sweep", "d3still_alpha", "--in-process", code=2)
    assert "set OPTUNA_STORAGE" in said
