"""The repository's own rules: lint, import directions, what git ignores, what the commands need."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_ruff():
    checked = run(sys.executable, "-m", "ruff", "check", ".")
    assert checked.returncode == 0, checked.stdout
    formatted = run(sys.executable, "-m", "ruff", "format", "--check", ".")
    assert formatted.returncode == 0, formatted.stdout


def test_imports_point_down():
    checked = run(str(Path(sys.executable).parent / "lint-imports"), "--no-cache")
    assert checked.returncode == 0, checked.stdout


def test_git_ignores_no_source_file():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    sources = [str(p.relative_to(ROOT)) for d in ("orchestrator", "models", "losses", "search_spaces", "tests")
               for p in (ROOT / d).rglob("*.py")]  # fmt: skip
    assert run("git", "check-ignore", *sources).stdout == ""


def test_no_package_hides_a_library():
    assert not (ROOT / "docker" / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_importing_the_orchestrator_loads_nothing():
    code = "import sys, orchestrator; print([m for m in ('torch', 'ray', 'mlflow', 'pyarrow') if m in sys.modules])"
    assert run(sys.executable, "-c", code).stdout.strip() == "[]"


def test_losses_models_fit_and_methods_run_without_ray_and_mlflow():
    code = (
        "import sys, orchestrator.fit, orchestrator.methods.d3still, losses.d3still, models.embedder;"
        "print([m for m in ('ray', 'mlflow', 'optuna') if m in sys.modules])"
    )
    assert run(sys.executable, "-c", code).stdout.strip() == "[]"


@pytest.mark.parametrize("benchmark", sorted(p.name for p in (ROOT / "tests" / "benchmarks").glob("bench_*.py")))
def test_benchmarks_say_how_they_are_run(benchmark):
    text = (ROOT / "tests" / "benchmarks" / benchmark).read_text()
    assert f"python tests/benchmarks/{benchmark}" in text.split('"""')[1]
    assert run(sys.executable, f"tests/benchmarks/{benchmark}", "--help").returncode == 0
