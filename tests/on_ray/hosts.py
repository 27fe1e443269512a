"""Several hosts on one machine: network namespaces, each with its own mount of the temporary folder and its own Ray.

They share one storage folder, a PostgreSQL server from Debian's package and a real MLflow server. Everything that is
made here is removed again, and only processes of these namespaces are ended.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOKEN = "0123456789abcdef" * 2  # of these clusters, which live for a test
RAY = "import sys; from ray.scripts.scripts import main; sys.exit(main())"


def can() -> str:
    """Why hosts cannot be made here; empty if they can."""
    if os.geteuid():
        return "hosts are network namespaces, which only root can make"
    missing = [name for name in ("ip", "unshare", "runuser") if shutil.which(name) is None]
    if missing:
        return f"hosts need {', '.join(missing)} (Debian: iproute2, util-linux)"
    tried = subprocess.run(["unshare", "-n", "-m", "true"], capture_output=True, text=True)
    return "" if tried.returncode == 0 else f"network namespaces are not permitted here: {tried.stderr.strip()}"


def postgres() -> Path | None:
    """Folder of PostgreSQL's programs."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None


def wait_for(condition, seconds: float, what: str):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"{what} did not happen in {seconds:.0f} s"
        time.sleep(0.1)
    return found


def answers(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
        return True
    return False


@dataclass
class Host:
    """One namespace."""

    name: str
    ip: str
    own: Path  # its temporary folder
    network: "Network"

    def start(self, *arguments: str, log: Path, **environment: str) -> subprocess.Popen:
        """A process of this host, with a process group of its own."""
        mounted = 'mount --bind "$0" "$1" && shift && exec "$@"'
        inside = ["unshare", "-m", "--propagation", "slave", "sh", "-c", mounted, str(self.own), str(self.network.temp)]
        with open(log, "a") as output:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *inside, *arguments],
                stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
                env={**self.network.environment, **environment}, cwd=self.own,
            )  # fmt: skip

    def python(self, code: str, *arguments: str, log: Path, **environment: str) -> subprocess.Popen:
        return self.start(sys.executable, "-u", "-c", code, *arguments, log=log, **environment)

    def processes(self, beginning: str = "") -> list[int]:
        """Ids of its processes, of those whose title begins so."""
        asked = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True)
        found = []
        for pid in map(int, asked.stdout.split()):
            with contextlib.suppress(OSError):
                title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                if title.startswith(beginning):
                    found.append(pid)
        return found

    def kill(self, beginning: str = "") -> int:
        """SIGKILL to them; how many."""
        found = self.processes(beginning)
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(found)

    def link(self, state: str) -> None:
        """Its cable, "up" or "down"."""
        subprocess.run(["ip", "link", "set", f"v{self.name[1:]}", state], check=True)


class Network:
    """A bridge with hosts; the machine itself is 10.77.N.254."""

    def __init__(self, folder: Path):
        self.folder, self.number = folder, os.getpid() % 200
        self.bridge, self.ip = f"b{os.getpid()}", f"10.77.{self.number}.254"
        self.temp = folder / "temp"  # where every host has its own folder
        self.temp.mkdir(parents=True)
        self.hosts: dict[str, Host] = {}
        keep = {
            k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "ORCHESTRATOR_", "MLFLOW_", "OPTUNA_"))
        }
        self.environment = {
            **keep,
            "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": str(self.temp), "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true",
            "RAY_health_check_initial_delay_ms": "2000", "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "3000", "RAY_health_check_failure_threshold": "5",
        }  # fmt: skip
        _ip("link", "add", self.bridge, "type", "bridge")
        _ip("addr", "add", f"{self.ip}/24", "dev", self.bridge)
        _ip("link", "set", self.bridge, "up")

    def host(self, number: int) -> Host:
        name = f"h{os.getpid()}n{number}"
        own = self.folder / f"temp-{number}"
        own.mkdir()
        _ip("netns", "add", name)
        _ip("link", "add", f"v{name[1:]}", "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", f"v{name[1:]}", "master", self.bridge, "up")
        ip = f"10.77.{self.number}.{number}"
        for arguments in (
            ("addr", "add", f"{ip}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
            ("link", "set", "lo", "up"),
        ):
            _ip("-n", name, *arguments)
        self.hosts[name] = Host(name, ip, own, self)
        return self.hosts[name]

    def close(self) -> None:
        for host in self.hosts.values():
            host.kill()
        for host in self.hosts.values():
            wait_for(lambda host=host: not host.processes(), 20, f"the end of {host.name}")
            subprocess.run(["ip", "netns", "del", host.name])
        subprocess.run(["ip", "link", "del", self.bridge])


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@dataclass
class Cluster:
    """A Ray head without CPUs and workers of one CPU each."""

    network: Network
    head: Host
    workers: list[Host]

    @property
    def address(self) -> str:
        return f"{self.head.ip}:6379"

    def start_head(self) -> None:
        arguments = ("start", "--head", "--block", f"--node-ip-address={self.head.ip}", "--port=6379", "--num-cpus=0",
                     "--include-dashboard=false", f"--temp-dir={self.network.temp}",
                     "--object-store-memory=100000000")  # fmt: skip
        self.head.python(RAY, *arguments, log=self.head.own / "ray.log")
        wait_for(lambda: answers(self.head.ip, 6379), 60, "the start of Ray's head")

    def start_worker(self, host: Host, **environment: str) -> None:
        arguments = ("start", "--block", f"--address={self.address}", f"--node-ip-address={host.ip}", "--num-cpus=1",
                     "--object-store-memory=100000000")  # fmt: skip
        host.python(RAY, *arguments, log=host.own / "ray.log", **environment)

    def ask(self, code: str) -> str:
        """What a program on the head prints that is connected to the cluster."""
        log = self.network.folder / f"asked-{time.monotonic_ns()}.txt"
        connected = f"import ray\nray.init(address='{self.address}', log_to_driver=False, logging_level='ERROR')\n"
        process = self.head.python(connected + code, log=log)
        assert process.wait(60) == 0, log.read_text()
        return log.read_text()


def free_port() -> int:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return chosen.getsockname()[1]


@contextlib.contextmanager
def servers(folder: Path, ip: str) -> Iterator["Servers"]:
    """PostgreSQL and an MLflow server whose runs are in it, on one address."""
    found = Servers(folder, ip)
    found.start_postgres()
    found.start_mlflow()
    try:
        yield found
    finally:
        found.stop_mlflow()
        found.stop_postgres()


@dataclass
class Servers:
    folder: Path
    ip: str
    mlflow: subprocess.Popen | None = None
    database_port: int = 5432
    mlflow_port: int = 5000

    @property
    def environment(self) -> dict[str, str]:
        return {
            "MLFLOW_TRACKING_URI": f"http://{self.ip}:{self.mlflow_port}",
            "OPTUNA_STORAGE": f"postgresql+psycopg2://orchestrator@{self.ip}:{self.database_port}/optuna",
            "PGPASSWORD": "a-secret-of-the-test",
        }

    def _as_postgres(self, *command: str, check: bool = True) -> subprocess.CompletedProcess:
        done = subprocess.run(["runuser", "-u", "postgres", "--", *command], capture_output=True, text=True, cwd="/")
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def start_postgres(self) -> None:
        programs, data = postgres(), self.folder / "postgres"
        if not data.exists():
            data.mkdir()
            shutil.chown(data, "postgres")
            password = self.folder / "password"
            password.write_text("a-secret-of-the-test\n")
            shutil.chown(password, "postgres")
            self._as_postgres(str(programs / "initdb"), "-D", str(data), "-U", "orchestrator", "-A", "scram-sha-256",
                              f"--pwfile={password}", "--no-sync")  # fmt: skip
            with open(data / "pg_hba.conf", "a") as rules:
                rules.write(f"host all all {self.ip.rpartition('.')[0]}.0/24 scram-sha-256\n")
            fresh = True
        else:
            fresh = False
        options = (
            f"-c listen_addresses={self.ip} -c port={self.database_port} -c unix_socket_directories={data} -c fsync=off"
        )
        self._as_postgres(
            str(programs / "pg_ctl"), "-D", str(data), "-w", "-l", str(data / "log.txt"), "-o", options, "start"
        )
        if fresh:
            for name in ("optuna", "mlflow"):
                subprocess.run(
                    [str(programs / "createdb"), "-h", self.ip, "-p", str(self.database_port), "-U", "orchestrator",
                     name],
                    check=True, env={**os.environ, "PGPASSWORD": "a-secret-of-the-test"},
                )  # fmt: skip

    def stop_postgres(self) -> None:
        data = self.folder / "postgres"
        self._as_postgres(str(postgres() / "pg_ctl"), "-D", str(data), "-m", "immediate", "stop", check=False)

    def start_mlflow(self, more: Mapping[str, str] | None = None, artifacts: str = "") -> None:
        store = f"postgresql+psycopg2://orchestrator@{self.ip}:{self.database_port}/mlflow"
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--host", self.ip,
                   "--port", str(self.mlflow_port), "--workers", "1", "--allowed-hosts", "*", "--serve-artifacts",
                   "--artifacts-destination", artifacts or str(self.folder / "artifacts")]  # fmt: skip
        environment = {
            **os.environ, "PGPASSWORD": "a-secret-of-the-test", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true", **(more or {}),
        }  # fmt: skip
        with open(self.folder / "mlflow.log", "a") as log:
            self.mlflow = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment, cwd=self.folder
            )
        wait_for(lambda: answers(self.ip, self.mlflow_port), 90, "the start of the MLflow server")

    def stop_mlflow(self) -> None:
        if self.mlflow is not None and self.mlflow.poll() is None:
            os.killpg(self.mlflow.pid, signal.SIGKILL)
            self.mlflow.wait()


def skip_where_impossible() -> None:
    reason = can() or ("" if postgres() else "PostgreSQL is not installed (Debian: postgresql)")
    if reason:
        pytest.skip(reason)
