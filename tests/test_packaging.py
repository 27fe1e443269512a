"""The wheel holds every module of the tree, and its command runs from any directory."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("orchestrator", "models", "losses", "search_spaces")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_is_complete(wheel):
    tree = {str(p.relative_to(ROOT)) for package in PACKAGES for p in (ROOT / package).rglob("*")
            if p.suffix in (".py", ".html", ".md")}  # fmt: skip
    packed = {n for n in zipfile.ZipFile(wheel).namelist() if not n.split("/")[0].endswith(".dist-info")}
    assert packed == tree


@pytest.mark.slow
def test_the_installed_command_runs_elsewhere(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site)}
    for command in (["--list"], ["d3still_beta_gamma", "--dry-run"]):
        ran = subprocess.run([sys.executable, "-m", "orchestrator.sweep", *command], cwd=elsewhere, env=environment,
                             capture_output=True, text=True)  # fmt: skip
        assert ran.returncode == 0 and "d3still_beta_gamma" in ran.stdout, ran.stderr
    where = subprocess.run([sys.executable, "-c", "import orchestrator; print(orchestrator.__file__)"], cwd=elsewhere,
                           env=environment, capture_output=True, text=True)  # fmt: skip
    assert where.stdout.startswith(str(site))


def test_somebody_s_models_folder_is_noticed(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("")
    command = [sys.executable, "-m", "orchestrator.sweep", "--list"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode != 0
