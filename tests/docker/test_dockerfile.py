"""The image: what is copied exists, it does not run as root, and its versions are those that were tested."""

import re
import runpy
import subprocess
import sys
import tomllib
from importlib import metadata
from typing import Any

import pytest
from images import DOCKER, ROOT, SECRET, example
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = dict(line.split("==") for line in (DOCKER / "lock.txt").read_text().splitlines() if not line.startswith("#"))


def instructions() -> list[tuple[str, str]]:
    """Every instruction of the Dockerfile and its arguments; continued lines are joined."""
    lines = [line for line in (DOCKER / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def copied() -> list[str]:
    """What is copied from the repository."""
    found = [arguments.split() for name, arguments in instructions() if name == "COPY"]
    return [source for words in found if not words[0].startswith("--from=") for source in words[:-1]]


def test_only_known_instructions():
    known = {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in instructions()} == known


def test_what_is_copied_exists_and_is_seen_by_the_build():
    seen = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in seen, "the build sees what is named and nothing else"
    for source in copied():
        assert (ROOT / source).exists(), source
        assert f"!{source}" in seen, source


def test_the_wheel_is_built_from_all_packages():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert set(packages["packages"]) <= set(copied())


def test_the_last_user_is_not_root():
    users = [arguments for name, arguments in instructions() if name == "USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]), "a number, which Kubernetes can check"
    after = [name for name, _ in instructions()]
    assert "RUN" not in after[len(after) - after[::-1].index("USER") :]


def test_the_base_is_pinned_to_a_patch_release():
    given = dict(arguments.split("=", 1) for name, arguments in instructions() if name == "ARG" and "=" in arguments)
    assert re.fullmatch(r"3\.11\.\d+", given["PYTHON"]), "lock.txt was written with Python 3.11"
    bases = {arguments.split()[0] for name, arguments in instructions() if name == "FROM"}
    assert bases == {"python:${PYTHON}-slim-bookworm"}
    assert given["TORCH_INDEX"] == '""'


def test_no_address_of_a_package_index_is_written_down():
    for file in DOCKER.iterdir():
        if file.name != ".env":
            assert not re.search(r"pypi\.org|download\.pytorch|index-url +https?:", file.read_text()), file.name


def test_every_install_is_pinned():
    installs = [part for name, arguments in instructions() if name == "RUN" for part in re.split(r"&&|;", arguments)
                if "pip install" in part]  # fmt: skip
    assert len(installs) == 2
    assert all("--constraint /lock.txt" in part for part in installs)


def test_no_credential_is_in_the_image():
    for name, arguments in instructions():
        if name in ("ENV", "ARG"):
            assert not SECRET.search(arguments), arguments
    ignored = subprocess.run(["git", "check-ignore", "docker/.env"], cwd=ROOT, capture_output=True, text=True)
    if (ROOT / ".git").exists():
        assert ignored.stdout.strip() == "docker/.env"
    assert all(value == "" for name, value in example().items() if SECRET.search(name))


def test_a_command_can_be_given():
    by_name = dict(instructions())
    assert by_name["ENTRYPOINT"] == '["tini", "--"]'
    assert "tini" in next(arguments for name, arguments in instructions() if name == "RUN" and "apt-get" in arguments)


@pytest.fixture(scope="module")
def lock() -> dict[str, Any]:
    """The functions of ``lock.py``."""
    return runpy.run_path(str(DOCKER / "lock.py"))


def test_the_lock_satisfies_what_the_project_asks_for(lock):
    for requirement in lock["wanted"]():
        assert requirement.specifier.contains(LOCK[canonicalize_name(requirement.name)]), requirement
    assert len(LOCK) > len(lock["wanted"]()), "also what the requirements bring"


def test_the_lock_is_complete_and_agrees_with_itself(lock):
    """Asked of every package that is installed here in the locked version; others may need other things by now."""
    installed = lock["closure"](lock["wanted"]())
    same = [name for name, version in installed.items() if LOCK.get(name) == version]
    assert same, "nothing here is what was locked: renew docker/lock.txt"
    for name in same:
        for line in metadata.requires(name) or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                assert needed.specifier.contains(LOCK[canonicalize_name(needed.name)]), f"{name} needs {needed}"


def test_what_is_missing_is_named(lock):
    with pytest.raises(ValueError, match="no-such-package-at-all>=1 is not installed here; run: pip install"):
        lock["closure"]([Requirement("no-such-package-at-all>=1")])


def test_an_extra_is_followed_and_what_nobody_asked_for_is_not():
    assert "aiohttp-cors" in LOCK, "ray[default] brings it"
    assert "pytest" not in LOCK and "moto" not in LOCK


def test_pip_accepts_the_lock_as_constraints():
    checked = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--no-deps", "--quiet",
         "--disable-pip-version-check", "--constraint", str(DOCKER / "lock.txt"), "numpy"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stderr


def test_images_carry_the_version_of_the_project():
    tags = {tag for file in DOCKER.iterdir() if file.name != ".env"
            for tag in re.findall(r"retrieval-distillation-orchestrator:([\w.]+)", file.read_text())}  # fmt: skip
    assert tags == {PROJECT["version"]}
