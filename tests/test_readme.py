"""The first page and the measured answers: their commands exist, those that need no data print what is shown."""

import importlib
import re
import shlex
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
from typer.testing import CliRunner

from orchestrator import find
from orchestrator.recipe import path_of

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
ANSWERS = sorted((ROOT / "search_spaces").glob("*.md"))
PAGES = [README, *ANSWERS]
RUNNABLE = {"--list", "--help", "--dry-run"}  # these train nothing
PREFIX = "python -m orchestrator."


class Shown(NamedTuple):
    """A command of a page and the lines that it shows of the output."""

    page: str
    module: str
    arguments: list[str]
    output: list[str]

    @property
    def options(self) -> list[str]:
        return [argument for argument in self.arguments if argument.startswith("--")]

    @property
    def settings(self) -> list[str]:
        pairs = zip(self.arguments, self.arguments[1:], strict=False)
        return [value.partition("=")[0] for option, value in pairs if option == "--set"]

    def __str__(self) -> str:
        return " ".join([self.page, self.module, *self.arguments])


def commands(page: Path) -> list[Shown]:
    """The commands of this project in the console blocks of a page."""
    found: list[Shown] = []
    for block in re.findall(r"^```console\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        output: list[str] = []
        for line in re.sub(r" \\\n +", " ", block).splitlines():  # a command may go on in the next line
            if not line.startswith("$ "):
                output.append(line)
                continue
            output, command = [], line.removeprefix("$ ")
            if command.startswith(PREFIX):
                module, *arguments = shlex.split(command.removeprefix(PREFIX), comments=True)
                found.append(Shown(page.name, module, arguments, output))
    return found


SHOWN = [shown for page in PAGES for shown in commands(page)]
RUN = [shown for shown in SHOWN if RUNNABLE & set(shown.arguments)]
NINE = ("sweep", "train", "teacher", "evaluate", "export", "report", "campaign", "doctor", "compare")


def command_line(module: str) -> typer.Typer:
    return importlib.import_module(f"orchestrator.{module}").main


@pytest.fixture
def invoke(tmp_path, monkeypatch):
    """Runs a command line in this process, at the root of the project, with an empty storage."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("ORCHESTRATOR_STORAGE", str(tmp_path / "runs"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def run(module: str, arguments: list[str]):
        result = CliRunner().invoke(command_line(module), arguments)
        assert not (tmp_path / "runs").exists(), "a look at a plan stores nothing"
        return result

    return run


@pytest.mark.parametrize("shown", RUN, ids=str)
def test_it_prints_what_the_page_shows(shown, invoke):
    result = invoke(shown.module, shown.arguments)
    refused = shown.output[:1] and shown.output[0].startswith("error: ")
    assert result.exit_code == (2 if refused else 0), result.output
    printed = iter(result.output.splitlines())
    for line in shown.output:  # in this order, others may be between; " …" at the end stands for the rest
        start = line.removesuffix(" …")
        same = (lambda text, start=start: text.startswith(start)) if start != line else line.__eq__
        assert any(same(text) for text in printed), f"not printed: {line}"


@pytest.mark.parametrize("module", NINE)
def test_every_command_has_help(module, invoke):
    result = invoke(module, ["--help"])
    assert result.exit_code == 0 and "--help" in result.output
    assert f"| `{module} " in README.read_text()  # a row of the table of commands


@pytest.mark.parametrize("shown", SHOWN, ids=str)
def test_names_and_options_of_every_command_exist(shown):
    known = {option for p in typer.main.get_command(command_line(shown.module)).params for option in p.opts}
    assert set(shown.options) <= known | {"--help"}
    named = [argument for argument in shown.arguments[:1] if not argument.startswith("--")]
    if not named or named == ["RUN_ID"]:
        return
    if shown.module == "campaign":
        find.campaign(named[0])
        return
    is_space = shown.module in ("sweep", "report")
    method = find.space(named[0]).method if is_space else named[0]
    benchmark = shown.arguments[shown.arguments.index("--on") + 1] if "--on" in shown.arguments else "demo"
    recipe = find.recipe(method, benchmark)
    if not shown.output[:1] or not shown.output[0].startswith("error: "):
        assert all(path_of(recipe, name) for name in shown.settings)


def test_every_make_target_exists():
    named = set(re.findall(r"(?:`|^\$ )make (\w+)", README.read_text(), re.MULTILINE))
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert named and named <= targets


def test_the_picture_of_imports_is_what_is_checked():
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    checked = [{name.rpartition(".")[2] for name in layer.split(" | ")} for layer in layers]
    drawn = re.search(r"^```\n(sweep train .*?)^```", README.read_text(), re.MULTILINE | re.DOTALL).group(1)
    assert [set(re.split(r" {2,}", line.strip())[0].split()) for line in drawn.splitlines()] == checked


def test_the_first_page_is_one_page():
    assert len(README.read_text().splitlines()) <= 200


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "tests").rglob("README.md"))], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_answer_is_linked_from_the_first_page():
    assert set(re.findall(r"\(search_spaces/(\w+)\.md\)", README.read_text())) == {page.stem for page in ANSWERS}


@pytest.mark.parametrize("page", ANSWERS, ids=lambda page: page.stem)
def test_an_answer_stands_beside_its_question(page):
    text = page.read_text()
    assert find.answer(page.stem) == page
    assert text.startswith(f"# {find.space(page.stem).question}\n")
    assert any(shown.module == "sweep" and shown.arguments[0] == page.stem for shown in commands(page))
    for fact in (r"easured on \d{4}-\d\d-\d\d with version \d+\.\d+\.\d+", "two CPU cores, no GPU", r"seeds?\b"):
        assert re.search(fact, text), fact


def test_what_was_not_measured_has_no_answer():
    assert find.answer("d3still_alpha") is None
