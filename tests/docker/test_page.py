"""``docker/README.md`` and the manifests: what they name exists."""

import re
import shlex

import pytest
from images import DOCKER, ROOT, compose, manifests

PAGE = (DOCKER / "README.md").read_text()
COMMANDS = [line.removeprefix("$ ").partition("   #")[0] for line in re.findall(r"^\$ .*", PAGE, re.MULTILINE)]
ENTRYPOINT = manifests("rayjob.yaml")[0]["spec"]["entrypoint"]


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", PAGE) if "://" not in link]
    assert links and [link for link in links if not (DOCKER / link).exists()] == []


def test_files_exist():
    named = {name.rstrip(".") for name in re.findall(r"docker/([\w./]+)", PAGE)} - {".env"}
    assert named and [name for name in named if not (DOCKER / name).exists()] == []


def test_every_file_of_the_folder_is_named():
    of_images = {"databases.sql", "Dockerfile.dockerignore"}  # named by compose.yaml, and by its name
    files = {path.name for path in DOCKER.iterdir() if path.is_file()} - of_images - {"README.md", ".env"}
    assert [name for name in files if name not in PAGE] == []


def test_the_table_has_what_nodes_are_told():
    rows = "".join(re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE))
    told = set(compose()["services"]["ray-head"]["environment"])
    assert set(re.findall(r"`(\w+)", rows)) == told - {"AWS_DEFAULT_REGION"}  # any value does


def test_services_and_ports_exist():
    services = compose()["services"]
    entered = [shlex.split(command) for command in COMMANDS if " exec " in command]
    assert entered and all(words[words.index("exec") + 1] in services for words in entered)
    published = {port for service in services.values() for port in service.get("ports", [])}
    pages = set(re.findall(r"<http://(127\.0\.0\.1:\d+)>", PAGE))
    assert pages and pages <= {port.rpartition(":")[0] for port in published}


@pytest.mark.parametrize(
    "command",
    [command for command in [*COMMANDS, ENTRYPOINT] if "-m orchestrator." in command],
)
def test_command_lines_exist(command):
    words = shlex.split(command)
    module, *arguments = words[words.index("-m") + 1 :]
    assert (ROOT / f"{module.replace('.', '/')}.py").exists()
    if module == "orchestrator.campaign":
        assert (ROOT / "search_spaces" / f"{arguments[0]}.py").exists()
