"""``compose.yaml``: its schema, and the rules of this project for ports, health, variables and credentials."""

import os
import re
import shutil
import subprocess

import pytest
import yaml
from images import DOCKER, SECRET, compose, example, filled, variables

TEXT = (DOCKER / "compose.yaml").read_text()
SERVICES = compose()["services"]
ONE_SHOT = {"buckets"}
GIVEN = example() | {name: "filled-in" for name in example() if SECRET.search(name)}


@pytest.fixture
def checked(tmp_path):
    """Runs ``docker-compose config`` on compose files with these variables."""
    if not shutil.which("docker-compose"):
        pytest.skip("docker-compose is not installed; on Debian: apt-get install docker-compose")

    def run(given: dict[str, str], *files: str) -> subprocess.CompletedProcess[str]:
        env_file = tmp_path / "env"
        env_file.write_text("".join(f"{name}={value}\n" for name, value in given.items()))
        arguments = [part for file in files for part in ("-f", str(file))]
        command = ["docker-compose", "--env-file", str(env_file), *arguments, "config"]
        environment = {name: value for name, value in os.environ.items() if name not in given}
        return subprocess.run(command, capture_output=True, text=True, cwd=DOCKER, env=environment)

    return run


def test_compose_accepts_it(checked):
    done = checked(GIVEN, "compose.yaml")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["services"].keys() == SERVICES.keys()


def test_compose_accepts_it_with_gpus(checked):
    done = checked(GIVEN, "compose.yaml", "compose.gpu.yaml")
    assert done.returncode == 0, done.stderr
    worker = yaml.safe_load(done.stdout)["services"]["ray-worker"]
    assert worker["deploy"]["replicas"] == 1
    assert worker["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    assert worker["command"] == SERVICES["ray-worker"]["command"]


@pytest.mark.parametrize("secret", sorted(name for name in example() if SECRET.search(name)))
def test_compose_refuses_an_empty_secret(secret, checked):
    done = checked(GIVEN | {secret: ""}, "compose.yaml")
    assert done.returncode != 0 and "fill in docker/.env" in done.stderr


def test_compose_notices_a_mistake(checked, tmp_path):
    broken = tmp_path / "compose.yaml"
    broken.write_text(TEXT.replace("healthcheck:", "health_check:", 1))
    assert checked(GIVEN, str(broken)).returncode != 0


def test_the_services():
    assert SERVICES.keys() == {"postgres", "minio", "buckets", "mlflow", "ray-head", "ray-worker"}


def test_every_port_is_on_this_machine_alone():
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert published and all(re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port) for port in published)


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_watched_or_ends(name):
    service = SERVICES[name]
    if name in ONE_SHOT:
        assert "healthcheck" not in service and "restart" not in service
        return
    assert service["healthcheck"]["test"][0] == "CMD", "a list: no shell, so no quoting"
    assert service["healthcheck"].keys() == {"test", "interval", "timeout", "retries"}
    assert service["restart"] == "unless-stopped"


def test_a_service_waits_for_what_it_needs():
    waits = {name: service.get("depends_on", {}) for name, service in SERVICES.items()}
    for name, needed in waits.items():
        for other, how in needed.items():
            right = "service_completed_successfully" if other in ONE_SHOT else "service_healthy"
            assert how == {"condition": right}, f"{name} waits for {other}"
    assert waits["mlflow"].keys() == {"postgres", "buckets"}
    assert waits["ray-worker"].keys() == {"ray-head"} and waits["ray-head"].keys() == {"mlflow"}


def test_the_example_names_every_variable_and_no_other():
    assert variables(TEXT).keys() == example().keys()


def test_secrets_must_be_given_and_nothing_else():
    for name, rule in variables(TEXT).items():
        assert (rule == ":?") == bool(SECRET.search(name)), name
    filled(SERVICES, GIVEN)
    with pytest.raises(ValueError, match="is empty: fill in docker"):
        filled(SERVICES, example())


def test_no_credential_is_written_down():
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            if SECRET.search(name):
                assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), name
    assert not re.search(r"://[^/\s@]*:[^/\s@]*@", TEXT), "an address with a password: addresses are logged"


def test_nodes_are_told_the_same():
    head, worker = SERVICES["ray-head"], SERVICES["ray-worker"]
    for part in ("environment", "volumes", "shm_size", "image"):
        assert head[part] == worker[part], part
    told = head["environment"]
    assert told["OPTUNA_STORAGE"] == "postgresql+psycopg2://orchestrator@postgres/optuna"
    assert told["MLFLOW_TRACKING_URI"] == "http://mlflow:5000" and told["RAY_AUTH_MODE"] == "token"
    assert filled(told["ORCHESTRATOR_STORAGE"], {}) in [volume.partition(":")[2] for volume in head["volumes"]]


def test_no_trial_runs_beside_the_head():
    assert {"--num-cpus=0", "--num-gpus=0"} <= set(SERVICES["ray-head"]["command"])


def test_every_volume_has_a_name():
    named = {
        filled(volume, {}).partition(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])
    }
    assert {name for name in named if not name.startswith("./")} == compose()["volumes"].keys()
    assert all((DOCKER / name).exists() for name in named if name.startswith("./"))
