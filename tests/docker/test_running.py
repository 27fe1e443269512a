"""Every command and health check of ``compose.yaml``, run on this machine without containers.

Names of hosts become 127.0.0.1 and ports become free ones; nothing else of a command is changed. What its image does
for PostgreSQL is done here with Debian's package: a server with a user, a password and databases. Another S3 server
stands in for MinIO. Its own command and health check need its image, so they are the only ones that do not run.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from images import DOCKER, ROOT, SECRET, compose, example, filled

POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1:]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not POSTGRES, reason="no PostgreSQL; on Debian: apt-get install postgresql"),
]
HOSTS = re.compile(r"\b(mlflow|minio|ray-head)(?=:\d)|(?<=@)postgres(?=/)|\b0\.0\.0\.0\b")
PORT = re.compile(r"(?<=[=:])\d{4,5}\b")


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@dataclass
class Lab:
    """The services of ``compose.yaml`` as processes of this machine; all end with the block."""

    folder: Path
    services: dict[str, Any]
    ports: dict[str, int]  # of compose.yaml -> of this machine
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def here(self, name: str, text: str) -> str:
        """A text of a service with this machine's addresses."""
        if text.startswith("--allowed-hosts"):  # names, not addresses
            return text
        ports = self.ports | {"52365": self.ports[f"52365 {name}"]} if name.startswith("ray-") else self.ports
        return PORT.sub(lambda match: str(ports.get(match[0], match[0])), HOSTS.sub("127.0.0.1", text))

    def environment(self, name: str) -> dict[str, str]:
        """What a service is told, and nothing that this process knows besides: a container inherits nothing."""
        told = {key: self.here(name, value) for key, value in self.services[name]["environment"].items()}
        return told | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),  # the wheel in the image
            "HOME": str(self.folder),
            "PGPORT": str(self.ports["5432"]),
            "RAY_TMPDIR": str(self.folder),
            "ORCHESTRATOR_STORAGE": str(self.folder / "storage"),  # the volume
            "OMP_NUM_THREADS": "1",
        }

    def command(self, name: str) -> list[str]:
        return [self.here(name, part) for part in self.services[name]["command"]]

    def start(self, name: str, command: list[str], **environment: str) -> None:
        """Starts a service in a process group of its own."""
        with (self.folder / f"{name}.log").open("wb") as log:
            self.running[name] = subprocess.Popen(
                command,
                env=self.environment(name) | environment,
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(self, name: str, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs a command inside a service and waits for its end."""
        told = self.environment(name) | environment
        return subprocess.run(command, env=told, cwd=self.folder, capture_output=True, text=True, timeout=60)

    def healthy(self, name: str) -> bool:
        test = [self.here(name, part) for part in self.services[name]["healthcheck"]["test"]]
        assert test.pop(0) == "CMD"
        return self.run(name, test, PATH=f"{POSTGRES[0]}:{self.environment(name)['PATH']}").returncode == 0

    def wait(self, name: str, seconds: float = 60) -> None:
        """Waits for a service's health check."""
        end = time.monotonic() + seconds
        while not self.healthy(name):
            log = self.folder / f"{name}.log"
            assert self.running[name].poll() is None, f"{name} ended: {log.read_text()[-3000:]}"
            assert time.monotonic() < end, f"{name} is not healthy after {seconds} s: {log.read_text()[-3000:]}"
            time.sleep(0.3)

    def stop(self) -> None:
        """Asks what is left to end, newest first, as ``docker stop`` does: the command alone. Then ends its group."""
        for name, process in reversed(self.running.items()):
            process.send_signal(signal.SIGINT if name == "postgres" else signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)  # stop_grace_period
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def start_postgres(lab: Lab) -> None:
    """What PostgreSQL's image does at its first start, by the variables it is given."""
    told, data = lab.services["postgres"]["environment"], lab.folder / "postgres"
    data.mkdir()
    as_owner: list[str] = []
    if os.geteuid() == 0:  # PostgreSQL does not run as root
        shutil.chown(data, "postgres", "postgres")
        as_owner = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", "--"]
    password = data.with_suffix(".password")
    password.write_text(told["POSTGRES_PASSWORD"])
    if as_owner:
        shutil.chown(password, "postgres")
    initdb = [f"{POSTGRES[0]}/initdb", f"--pgdata={data}/data", f"--username={told['POSTGRES_USER']}", "--no-sync",
              "--auth=scram-sha-256", f"--pwfile={password}"]  # fmt: skip
    made = lab.run("postgres", as_owner + initdb)
    assert made.returncode == 0, made.stderr
    server = [f"{POSTGRES[0]}/postgres", "-D", f"{data}/data", "-h", "127.0.0.1", "-p", str(lab.ports["5432"]),
              "-k", str(data), "-c", "fsync=off"]  # fmt: skip
    lab.start("postgres", as_owner + server)
    lab.wait("postgres")
    psql = [f"{POSTGRES[0]}/psql", "--host=127.0.0.1", f"--username={told['POSTGRES_USER']}", "--set=ON_ERROR_STOP=1"]
    for database, script in (
        ("postgres", f"--command=CREATE DATABASE {told['POSTGRES_DB']}"),
        (told["POSTGRES_DB"], f"--file={DOCKER / 'databases.sql'}"),
    ):
        done = lab.run("postgres", [*psql, f"--dbname={database}", script], PGPASSWORD=told["POSTGRES_PASSWORD"])
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """All services up, started in the order of compose, each after what it waits for is healthy."""
    given = example() | {name: secrets.token_hex(16) for name in example() if SECRET.search(name)}
    ports = {
        name: free_port() for name in ("5432", "9000", "5000", "6379", "8265", "52365 ray-head", "52365 ray-worker")
    }
    # Short, as sockets have short names; and below no folder that only root may enter.
    with tempfile.TemporaryDirectory(prefix="lab-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        lab = Lab(Path(folder), filled(compose()["services"], given), ports)
        (lab.folder / "storage").mkdir()
        try:
            for name in ("postgres", "mlflow", "ray-head", "ray-worker"):
                assert not lab.healthy(name), f"{name}: a check that passes without its service checks nothing"
            start_postgres(lab)
            lab.start("minio", [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(ports["9000"])])
            end = time.monotonic() + 60
            while lab.run("buckets", lab.command("buckets")).returncode:
                assert time.monotonic() < end, lab.run("buckets", lab.command("buckets")).stderr
            lab.start("mlflow", lab.command("mlflow"))
            lab.wait("mlflow")
            # What two nodes on one machine must not share, or would take from its other work.
            own = ["--node-ip-address=127.0.0.1", "--object-store-memory=100000000"]
            lab.start("ray-head", [*lab.command("ray-head"), *own, f"--ray-client-server-port={free_port()}"])
            lab.wait("ray-head")
            lab.start("ray-worker", [*lab.command("ray-worker"), *own, "--num-cpus=2"])
            lab.wait("ray-worker")
            yield lab
        finally:
            lab.stop()


def answer(url: str, **headers: str) -> int:
    """The status of an answer."""
    request = urllib.request.Request(url, headers={"User-Agent": "test"} | headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def test_buckets_may_be_made_twice(lab):
    done = lab.run("buckets", lab.command("buckets"))
    assert done.returncode == 0, done.stderr


def test_postgres_wants_the_password(lab):
    told = lab.environment("ray-head")
    connect = "import os, psycopg2; psycopg2.connect(host='127.0.0.1', user='orchestrator', dbname='optuna')"
    assert lab.run("ray-head", [sys.executable, "-c", connect]).returncode == 0
    wrong = lab.run("ray-head", [sys.executable, "-c", connect], PGPASSWORD=told["PGPASSWORD"] + "x")
    assert wrong.returncode != 0 and "password authentication failed" in wrong.stderr


def test_mlflow_answers_to_the_name_that_nodes_use_and_to_no_other(lab):
    url = f"http://127.0.0.1:{lab.ports['5000']}/api/2.0/mlflow/experiments/get?experiment_id=0"
    assert answer(url, Host="mlflow:5000") == 200
    assert answer(url, Host="somewhere.example:5000") == 403


def test_artifacts_reach_the_bucket_from_a_client_without_keys(lab):
    code = """
import sys
from mlflow import MlflowClient
client = MlflowClient()
run = client.create_run(client.create_experiment("lab")).info
client.log_text(run.run_id, "from a worker", "note.txt")
print(run.artifact_uri)
"""
    keys = {name: "" for name in lab.services["buckets"]["environment"]}
    logged = lab.run("ray-worker", [sys.executable, "-c", code], **keys)
    assert logged.returncode == 0 and logged.stdout.strip().startswith("mlflow-artifacts:/"), logged.stderr
    listing = "import s3fs; print(*s3fs.S3FileSystem().find('mlflow'))"
    listed = lab.run("buckets", [sys.executable, "-c", listing])
    assert re.fullmatch(r"mlflow/\S+/artifacts/note\.txt", listed.stdout.strip()), listed.stdout + listed.stderr


def test_a_study_is_kept_in_postgres(lab):
    code = """
import os, optuna
study = optuna.create_study(study_name="lab", storage=os.environ["OPTUNA_STORAGE"], load_if_exists=True)
study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
print(len(study.trials))
"""
    counts = [lab.run("ray-head", [sys.executable, "-c", code]) for _ in range(2)]
    assert [done.stdout.strip() for done in counts] == ["1", "2"], counts[0].stderr


def test_the_dashboard_wants_the_token(lab):
    url = f"http://127.0.0.1:{lab.ports['8265']}/api/jobs/"
    token = lab.environment("ray-head")["RAY_AUTH_TOKEN"]
    assert answer(url) == 401
    assert answer(url, Authorization=f"Bearer {token}x") == 403
    assert answer(url, Authorization=f"Bearer {token}") == 200


def test_work_goes_to_the_worker_and_is_told_what_its_node_is_told(lab):
    """A driver on the head, by RAY_ADDRESS: the head has no CPU, and secrets come from the worker's environment."""
    code = """
import os, ray
ray.init(log_to_driver=False, logging_level="ERROR")
names = ("PGPASSWORD", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_URI", "OPTUNA_STORAGE")
where = ray.remote(lambda: (ray.get_runtime_context().get_node_id(), [os.environ[name] for name in names]))
node, told = ray.get(where.remote(), timeout=60)
print(sorted(n["Resources"].get("CPU", 0) for n in ray.nodes() if n["Alive"]))
print(node != ray.get_runtime_context().get_node_id(), told == [os.environ[name] for name in names])
"""
    done = lab.run("ray-head", [sys.executable, "-c", code])
    assert done.stdout.splitlines() == ["[0, 2.0]", "True True"], done.stdout + done.stderr[-3000:]


def test_the_command_of_the_image_works_inside(lab):
    lines = (DOCKER / "Dockerfile").read_text().splitlines()
    command = json.loads(next(line for line in lines if line.startswith("CMD ")).removeprefix("CMD "))
    done = lab.run("ray-head", command)
    assert done.returncode == 0 and "d3still_beta_gamma" in done.stdout, done.stderr


def test_a_job_is_submitted_from_a_checkout(lab):
    """The command of docker/README.md, with a question that trains nothing."""
    command = ["ray", "job", "submit", "--working-dir", str(ROOT), "--", "python", "-m",
               "orchestrator.sweep", "--list"]  # fmt: skip
    done = lab.run("ray-head", command, RAY_ADDRESS=f"http://127.0.0.1:{lab.ports['8265']}")
    assert done.returncode == 0 and "d3still_beta_gamma" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]


def test_no_secret_is_in_a_log(lab):
    hidden = [value for name in ("postgres", "mlflow", "ray-head") for key, value in lab.environment(name).items()
              if SECRET.search(key)]  # fmt: skip
    logs = [path for path in lab.folder.rglob("*") if path.suffix in (".log", ".out", ".err") and path.is_file()]
    assert len(logs) > 10
    for path in logs:
        text = path.read_text(errors="replace")
        assert not any(secret in text for secret in hidden), path


def test_a_worker_that_is_told_to_end_ends_and_is_noticed(lab):
    """The last test: as ``docker stop`` does."""
    worker = lab.running["ray-worker"]
    worker.terminate()
    worker.wait(30)
    end = time.monotonic() + 30
    while lab.healthy("ray-worker"):
        assert time.monotonic() < end, "the health check passes without its worker"
    assert lab.healthy("ray-head")
