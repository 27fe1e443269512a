"""What cannot work ends in one line before anything is trained; ctrl-C and poor terminals end nothing badly."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from command.typed import call, error, nothing_written, settings, storage_at
from PIL import Image

import search_spaces
from orchestrator import evaluate, export, report, sweep, teacher, tracking, train
from orchestrator.launch import asked, shelf, study

OWN = """
import torch

class Means(torch.nn.Module):
    def forward(self, images):
        return images.mean((2, 3)) {tail}

def means():
    return Means()

def nothing():
    return 3

def needy(width):
    return Means()

def broken():
    return {}["no such"]

def other():
    class Two(torch.nn.Module):
        def forward(self, images, more):
            return images
    return Two()

def shared():
    same = torch.nn.Conv2d(3, 3, 3, 1, 1)
    return torch.nn.Sequential(same, torch.nn.ReLU(), same)
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """Makes a module of the user's own, whose network ends as asked; returns its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, tail: str = "") -> str:
        (tmp_path / f"{name}.py").write_text(OWN.replace("{tail}", tail))
        return name

    return write


# --- Networks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student.name": "resnet9"}, "timm has no model 'resnet9'; did you mean resnet"),
        ({"student.name": "resnet18.no_such_tag"}, "timm has no weights 'no_such_tag' of resnet18; it has "),
        ({"teacher.network.name": "resnet18.no_such_tag"}, "timm has no weights 'no_such_tag' of resnet18"),
        (
            {"student.name": "mobilenetv3_small_100", "student.width": 0.5},
            "student: width is for ResNets; mobilenetv3_small_100 has no scalable width, got 0.5",
        ),
        ({"student.pretrained": "true"}, "no pretrained weights for width 0.0625; set width to 1 or pretrained to"),
        ({"teacher.network.pretrained": "true"}, "teacher.network: there are no pretrained weights for width 0.0625"),
        ({"student.weights": "/no/such.pth"}, "weights: there is no file /no/such.pth"),
        ({"student.name": "no_such_package:net"}, "no_such_package cannot be imported"),
        ({"student.name": "os.path:join"}, "os.path is of Python's standard library, which holds no network"),
    ],
)
def test_a_network_that_cannot_be_built_is_refused(empty, data, changes, message):
    for cli, name in ((train.main, "fitnet"), (teacher.main, "fitnet")):
        assert message in error(cli, name, *data, *settings("fitnet", **changes))
    assert not list((empty / "teachers").glob("*"))


def test_a_network_of_ones_own_that_gives_no_features_is_refused(empty, data, own_module, tmp_path):
    changes = {"student.width": 1.0, "student.pixels": "imagenet"}
    flat = {"student.name": f"{own_module('own_flat', '.sum()')}:means"}
    assert "own_flat:means" in error(train.main, "fitnet", *data, *settings("fitnet", **changes, **flat))
    number = {"student.name": "own_flat:nothing"}
    assert "own_flat:nothing returns a int; expected a torch module" in error(
        train.main, "fitnet", *data, *settings("fitnet", **changes, **number)
    )
    for function, words in (("needy", "TypeError: needy() missing 1 required"), ("broken", "KeyError: 'no such'")):
        own = {"student.name": f"own_flat:{function}"}
        line = error(train.main, "fitnet", *data, *settings("fitnet", **changes, **own))
        assert f"student: own_flat:{function} cannot be called: {words}" in line
    wrong = {"student.name": "own_flat:other"}
    line = error(train.main, "fitnet", *data, *settings("fitnet", **changes, **wrong))
    assert "student: own_flat:other takes no images of 16×16 pixels: TypeError: " in line and "'more'" in line
    missing = {"student.name": "own_flat:mean"}
    assert "own_flat has no function 'mean'; did you mean means" in error(
        train.main, "fitnet", *data, *settings("fitnet", **changes, **missing)
    )
    (tmp_path / "own_wrong.py").write_text("import math\nmath.nothing\n")
    line = error(train.main, "fitnet", *data, *settings("fitnet", **changes, **{"student.name": "own_wrong:net"}))
    assert "own_wrong cannot be imported: AttributeError: module 'math' has no attribute 'nothing'" in line
    assert nothing_written(empty)


def test_a_network_that_has_a_module_twice_is_stored(data, trained, own_module):
    changes = {"student.width": 1.0, "student.pixels": "imagenet", "train.epochs": 1}
    twice = {"student.name": f"{own_module('own_shared')}:shared"}
    shown = call(train.main, "fitnet", *data, *settings("fitnet", **changes, **twice)).output
    run_id = shown.split("MLflow run ")[1].split(";")[0]
    assert "(logged" in call(evaluate.main, run_id).output


def test_a_sweep_that_is_refused_in_its_preparation_does_not_hide_the_one_before(data, swept, teachers, storage):
    before = shelf.latest("d3still_alpha").sweep
    wrong = settings("d3still", **{"labelled.identities_per_batch": 17, "mode": "repo"})
    assert "is more than the 16 identities" in error(sweep.main, "d3still_alpha", *data, "--trials", 1, *wrong)
    assert shelf.latest("d3still_alpha").sweep == before
    assert len(list(storage.glob("sweeps/d3still_alpha-folder-*"))) == len(shelf.stored("d3still_alpha"))


def test_weights_of_another_network_say_how_many_tensors_fit_before_a_teacher_is_trained(empty, data, tmp_path):
    from models.embedder import Embedder, EmbedderConfig

    other = Embedder(EmbedderConfig(backbone="resnet34", width=0.0625, embedding_dim=8, image_size=(16, 16)))
    torch.save(other.backbone.state_dict(), tmp_path / "other.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "nothing.pth")
    (tmp_path / "text.pth").write_text("not weights")
    for file, message in {
        "other.pth": "another network",
        "nothing.pth": "0 of 126 tensors fit",
        "text.pth": "text.pth cannot be read: it is no file of torch, or holds more than tensors",
    }.items():
        changes = {"student.weights": tmp_path / file, "student.width": 0.125, "train.epochs": 1}
        line = error(train.main, "supervised", *data, *settings("supervised", **changes))
        assert message in line and file in line and "student: " in line
    changes = {"teacher.network.weights": tmp_path / "nothing.pth"}
    line = error(train.main, "d3still", *data, *settings("d3still", **changes))
    assert "teacher.network: " in line and "nothing.pth holds another network" in line
    assert nothing_written(empty)


@pytest.mark.parametrize("field", ["teacher.identities_per_batch", "labelled.identities_per_batch"])
def test_a_batch_of_more_identities_than_there_are_names_the_field(empty, data, field):
    line = error(train.main, "d3still", *data, *settings("d3still", **{field: 17, "mode": "repo"}))
    assert f"{field} (17) is more than the 16 identities of the training set; lower it" in line
    assert not list(empty.glob("teachers/*")) and not list(empty.glob("cache/*"))


def test_a_teacher_file_of_another_network_is_refused(data, trained, teachers):
    changes = {"teacher.weights": teachers("d3still"), "teacher.network.name": "resnet34"}
    line = error(train.main, "d3still", *data, *settings("d3still", **changes))
    assert "holds another architecture: backbone resnet18 instead of resnet34" in line
    plan = ["--dry-run"]
    assert line in error(sweep.main, "d3still_alpha", *data, *plan, *settings("d3still", **changes))
    missing = settings("d3still", **{"teacher.weights": "/no/such.safetensors"})
    assert "teacher.weights: there is no file /no/such.safetensors" in error(train.main, "d3still", *data, *missing)


# --- Data -----------------------------------------------------------------------------------------------------------

TRAIN = [f"train/{i:02d}/{n}.png" for i in range(8) for n in range(2)]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["query/0042/0.png", "query/0043/0.png", "gallery/42/0.png", "gallery/43/0.png"], "identit"),
        ([f"{s}/{i}/{i}_c1_{n}.png" for s, n in (("query", 0), ("gallery", 1)) for i in "xy"], "camera"),
        (["gallery/x/0.png", "gallery/y/0.png"], "image"),
    ],
    ids=["other names on the two sides", "one camera for everything", "one image each"],
)
def test_data_in_which_no_query_can_find_anything_are_refused_before_a_teacher_is_trained(
    storage, trained, tmp_path, names, words
):
    known = set((storage / "teachers").iterdir())
    for number, name in enumerate([*TRAIN, *names]):
        file = tmp_path / "data" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
    arguments = ["d3still", "--on", "folder", "--data-root", tmp_path / "data", "--in-process"]
    line = error(train.main, *arguments, *settings("d3still"))
    assert "can find" in line and words in line and "same labels" not in line
    assert set((storage / "teachers").iterdir()) == known


# --- Where runs are recorded ----------------------------------------------------------------------------------------


def test_a_tracking_address_that_cannot_be_used_is_refused_at_once(tmp_path, data):
    """A folder, which MLflow refuses since 3.13, and a server that is not there."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{closed.getsockname()[1]}"
    for uri, message in (
        ("./mlruns", "MLFLOW_TRACKING_URI=./mlruns cannot be used"),
        (dead, f"{dead} does not answer"),
    ):
        with storage_at(tmp_path / "runs", MLFLOW_TRACKING_URI=uri):
            for cli, name in ((train.main, "supervised"), (teacher.main, "d3still"), (sweep.main, "d3still_alpha")):
                began = time.monotonic()
                method = "supervised" if name == "supervised" else "d3still"
                assert message in error(cli, name, *data, *settings(method))
                assert time.monotonic() - began < 30
            assert nothing_written(tmp_path / "runs")


def test_a_storage_that_cannot_be_written_is_named_by_its_own_variable(tmp_path, data):
    (tmp_path / "file").write_text("no folder")
    with storage_at(tmp_path / "file" / "runs"):
        line = error(train.main, "supervised", *data, *settings("supervised"))
    assert f"nothing can be written into {tmp_path / 'file' / 'runs'}" in line and "set ORCHESTRATOR_STORAGE" in line
    with storage_at(tmp_path / "runs", MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/file/mlflow.db"):
        assert "set MLFLOW_TRACKING_URI" in error(train.main, "supervised", *data, *settings("supervised"))


@pytest.mark.parametrize("seconds", ["soon", "-1", "nan"])
def test_a_patience_that_is_no_number_is_refused_before_anything_is_away(seconds, monkeypatch, data):
    monkeypatch.setenv("ORCHESTRATOR_PATIENCE_S", seconds)
    assert f"ORCHESTRATOR_PATIENCE_S={seconds}" in error(sweep.main, "d3still_alpha", *data, "--dry-run")


@pytest.mark.parametrize("storage", ["my runs", "R&D", "it's", "a;b", "$HOME", "(1)"])
def test_the_printed_command_can_be_typed_as_it_is(storage):
    uri = tracking.tracking_uri(f"/data/{storage}")
    script = f"set -- {tracking.ui_command(uri)}\nprintf '%s\\n' \"$@\""
    typed = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert uri in typed.stdout.splitlines()


# --- A space of one's own -------------------------------------------------------------------------------------------

SIZES = """
from search_spaces._space import Choice, SearchSpace

SPACE = SearchSpace(
    method="fitnet", question="Which size?", tune={"student.size": Choice(((16, 16), (12, 20)))},
    start=({"student.size": (12, 20)},), trials=4, early_stopping=False,
)
"""


def test_a_space_of_ones_own_may_vary_a_size(data, trained, tmp_path, monkeypatch):
    """Started from a point, asked, and read back from plan.json when it is resumed."""
    (tmp_path / "own_sizes.py").write_text(SIZES)
    monkeypatch.setattr(search_spaces, "__path__", [*search_spaces.__path__, str(tmp_path)])
    assert "own_sizes" in call(sweep.main, "--list").output
    arguments = settings("fitnet", **{"student.size": None, "train.epochs": 1})
    call(sweep.main, "own_sizes", *data, "--trials", 1, *arguments)
    call(sweep.main, "own_sizes", "--on", "folder", "--resume", "--in-process", "--trials", 4)
    plan = shelf.latest("own_sizes")
    records = study.records(plan)
    assert [r.status for r in records] == ["completed"] * 4
    assert records[0].point == {"student.size": "12x20"}
    sizes = [plan.recipe_of(r.point)[1].student.size for r in records]
    assert sizes[0] == (12, 20) and set(sizes) == {(12, 20), (16, 16)}
    stored = tracking.read_record(plan.tracking_uri, records[0].run_id)
    assert stored.recipe["student.size"] == [12, 20]
    assert "(logged" in call(evaluate.main, records[0].run_id).output
    sys.modules.pop("search_spaces.own_sizes", None)


# --- Names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cli", [train.main, teacher.main], ids=["train", "teacher"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("alfa=3", "the recipe has no field 'alfa'; did you mean alpha"),
        ("width=0.5", "width is student.width or teacher.width; say which"),
        ("teacher=resnet18", "the recipe has no field 'teacher'"),
    ],
)
def test_fields_that_do_not_exist_or_are_several(empty, cli, given, message):
    assert message in error(cli, "d3still", "--in-process", "--set", given)
    assert nothing_written(empty)


# --- Terminals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("charset", ["ascii", "latin-1"])
def test_letters_that_a_terminal_lacks_are_replaced(charset, data, swept, best, tmp_path):
    """Every command prints letters that ASCII has not, and none ends because of them."""
    arguments = settings("d3still")
    shown = call(sweep.main, "--list", charset=charset).stdout_bytes
    assert b"How dominant must the feature term (?) be?" in shown
    for cli, *typed in (
        (sweep.main, "d3still_alpha", *data, "--dry-run", *arguments),
        (sweep.main, "d3still_alpha", "--on", "folder", "--resume", "--in-process"),
        (teacher.main, "d3still", *data, *arguments),
        (evaluate.main, best.run_id),
        (report.main, "d3still_alpha", "--to", tmp_path),
        (export.main, best.run_id, "--to", tmp_path / "größe"),
    ):
        assert call(cli, *typed, charset=charset).stdout_bytes
    refused = call(sweep.main, "β", code=2, charset=charset)
    assert "error: there is no sweep" in refused.stderr


def test_a_whole_process_whose_output_is_ascii(storage):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    folder = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-m", "orchestrator.sweep", "--list"]
    done = subprocess.run(command, capture_output=True, env=environment, cwd=folder)
    assert done.returncode == 0 and b"(?)" in done.stdout, done.stderr


# --- Ctrl-C ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cli", "arguments", "remedy"),
    [
        (sweep.main, ["d3still_alpha"], "with --resume goes on"),
        (train.main, ["d3still"], "with --resume goes on"),
        (teacher.main, ["d3still"], "does what is left"),
        (evaluate.main, ["abc"], "does what is left"),
        (export.main, ["abc"], "does what is left"),
        (report.main, ["d3still_alpha"], "does what is left"),
    ],
)
def test_ctrl_c_is_one_line_with_the_remedy(empty, monkeypatch, cli, arguments, remedy):
    def interrupt(*values, **named):
        raise KeyboardInterrupt

    for module, name in ((asked, "resolve"), (shelf, "latest"), (tracking, "read_record")):
        monkeypatch.setattr(module, name, interrupt)
    assert error(cli, *arguments, code=130) == f"interrupted; the same command {remedy}"
