"""The repository's own rules: lint, import directions, doors, what git ignores, what the first import costs."""

import ast
import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("orchestrator", "models", "losses", "search_spaces")
SOURCES = {str(p.relative_to(ROOT)): p.read_text() for d in PACKAGES for p in sorted((ROOT / d).rglob("*.py"))}

# Library -> the only files or folders that may import it.
DOORS = {
    "ray": ["orchestrator/on_ray/"],
    "optuna": ["orchestrator/launch/study.py"],
    "mlflow": ["orchestrator/mlflow_store.py"],
    "pyarrow": ["orchestrator/cache.py", "orchestrator/store.py"],
    "matplotlib": ["orchestrator/figures.py", "orchestrator/reporting/content.py"],
    "sklearn": ["orchestrator/families/token_pruning/pictures.py"],
    "jinja2": ["orchestrator/reporting/content.py"],
    "onnxruntime": ["orchestrator/onnx_file.py"],
    "timm": ["models/"],
    "typer": ["orchestrator/command.py", *(f"orchestrator/{name}.py" for name in (
        "sweep", "train", "teacher", "evaluate", "export", "report", "campaign", "doctor",
        "compare"))],
}  # fmt: skip
LONG = 400  # lines; a file of printed numbers may have more


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@functools.cache
def imported(source: str) -> set[str]:
    """Every module that a file imports, also inside functions and for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return found


def test_ruff():
    checked = run(sys.executable, "-m", "ruff", "check", ".")
    assert checked.returncode == 0, checked.stdout
    formatted = run(sys.executable, "-m", "ruff", "format", "--check", ".")
    assert formatted.returncode == 0, formatted.stdout


def test_imports_point_down():
    checked = run(str(Path(sys.executable).parent / "lint-imports"), "--no-cache")
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("library", DOORS)
def test_a_library_has_its_door(library):
    users = [file for file, source in SOURCES.items()
             if any(name.partition(".")[0] == library for name in imported(source))]  # fmt: skip
    assert users, "a door that nobody uses"
    assert [file for file in users if not file.startswith(tuple(DOORS[library]))] == []


def test_rooms_that_do_not_know_each_other():
    for folder, forbidden in (
        ("orchestrator/launch/", "orchestrator.on_ray"),
        ("orchestrator/reporting/", "orchestrator.on_ray"),
        ("orchestrator/families/", "orchestrator.methods"),
        ("losses/", "orchestrator"),
        ("models/", "orchestrator"),
        ("search_spaces/", "orchestrator"),
    ):
        files = {file: source for file, source in SOURCES.items() if file.startswith(folder)}
        assert files
        for file, source in files.items():
            below = [name for name in imported(source) if name == forbidden or name.startswith(f"{forbidden}.")]
            assert not below, f"{file} imports {below[0]}"


def test_losses_import_torch_alone():
    for file, source in SOURCES.items():
        if file.startswith("losses/"):
            tops = {name.partition(".")[0] for name in imported(source)} - set(sys.stdlib_module_names)
            graphs = {"scipy"} if file == "losses/first_neighbours.py" else set()  # connected components
            assert tops <= {"torch", "losses"} | graphs, file


def test_what_is_above_the_families_names_no_metric_and_no_network_s_field():
    folders = ("orchestrator/launch/", "orchestrator/on_ray/", "orchestrator/reporting/")
    for file, source in SOURCES.items():
        if file.startswith(folders) or Path(file).parent == Path("orchestrator"):
            assert not re.search(r"val/map|image_size|rank1", source), file


def test_every_method_and_benchmark_is_found_by_its_file():
    """No file above the families writes a method's name into its code."""
    methods = {Path(file).stem for file in SOURCES if file.startswith("orchestrator/methods/")} - {"__init__"}
    methods -= {"supervised"}  # who trains a teacher
    for file, source in SOURCES.items():
        if file.startswith(("orchestrator/launch/", "orchestrator/on_ray/", "orchestrator/reporting/")):
            words = {node.value for node in ast.walk(ast.parse(source))
                     if isinstance(node, ast.Constant) and isinstance(node.value, str)}  # fmt: skip
            assert not words & methods, file


def test_no_file_is_long():
    long = {file for file, source in SOURCES.items() if source.count("\n") > LONG and "/published/" not in file}
    assert not long


def test_git_ignores_no_source_file():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    sources = [*SOURCES, *(str(p.relative_to(ROOT)) for p in (ROOT / "tests").rglob("*.py"))]
    assert run("git", "check-ignore", *sources).stdout == ""


def test_no_package_hides_a_library():
    assert not (ROOT / "docker" / "__init__.py").exists()
    packages = {p.parent.name for p in (ROOT / "tests").rglob("__init__.py")}
    assert packages <= {"toy"}  # nothing beside the system that proves the contract


def test_what_an_import_loads():
    """One process after the other would cost a minute: each import is looked at before the next."""
    code = """
import json, sys, importlib
found = {}
def after(name, *libraries):
    found[name] = [library for library in libraries if library in sys.modules]
HEAVY = ("torch", "timm", "mlflow", "matplotlib", "optuna", "pyarrow", "ray", "sklearn")
import orchestrator
after("orchestrator", *HEAVY, "numpy")
from orchestrator import find
for name in find.spaces():
    find.space(name)
after("listing all spaces", *HEAVY, "numpy")
import orchestrator.on_ray, orchestrator.on_ray.trial
after("on_ray and its trial", *HEAVY)
from orchestrator.launch import plan
after("plans", "ray", "torch", "mlflow", "optuna", "timm")
import orchestrator.fit, losses.d3still, models.embedder, orchestrator.methods.d3still, orchestrator.methods.sureid
after("losses, models, the loop and methods", "ray", "mlflow", "optuna", "matplotlib", "sklearn")
from orchestrator.launch import preparing, runner, study, trial
import orchestrator.reporting.summary
after("launch and reports", "ray", "mlflow")
print(json.dumps(found))
"""
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout)
    assert len(loaded) == 6 and not any(loaded.values()), loaded


@pytest.mark.parametrize("benchmark", sorted(p.name for p in (ROOT / "tests" / "benchmarks").glob("bench_*.py")))
def test_benchmarks_say_how_they_are_run(benchmark):
    tree = ast.parse((ROOT / "tests" / "benchmarks" / benchmark).read_text())
    assert f"python tests/benchmarks/{benchmark}" in ast.get_docstring(tree)
    assert 'if __name__ == "__main__":' in (ROOT / "tests" / "benchmarks" / benchmark).read_text()
