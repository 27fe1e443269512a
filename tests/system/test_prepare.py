"""Preparation: each need is met once, a trial opens what is ready and builds nothing, tables may be made in shards."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import met

from orchestrator import cache, find, tables
from orchestrator.datasets.folder import Folder
from orchestrator.families.retrieval import data
from orchestrator.fit import fit
from orchestrator.method import Where
from orchestrator.needs import Need

CPU = torch.device("cpu")
FAMILY = ["d3still", "sureid", "supervised"]


def raises(*arguments, **named):
    raise AssertionError("looked at an image, a file's time, or made something")


@pytest.mark.parametrize("method", find.methods())
def test_what_is_ready_is_not_made_again(method, tiny_recipe, prepared, tiny_place, monkeypatch):
    recipe = tiny_recipe(method)
    first = prepared(method, recipe)
    monkeypatch.setattr(type(find.method(method)), "make", raises)
    monkeypatch.setattr(cache, "_write", raises)
    assert met(method, recipe, tiny_place).plain() == first.plain()
    needs = find.method(method).needs(recipe, tiny_place)
    assert all(Need.of(need.plain()).key == need.key for need in needs.values() if need.trial is None)
    assert json.loads(json.dumps(first.plain())) == first.plain()  # workers are sent plain values


@pytest.mark.parametrize("method", FAMILY)
def test_a_trial_opens_what_is_ready_and_looks_at_no_image(method, tiny_recipe, prepared, tiny_place, monkeypatch):
    """Pixels are cached: neither training, evaluation, scoring nor pictures read an image or a file's time."""
    recipe = tiny_recipe(method, **{"train.epochs": 1, "run.pixel_cache": "on"})
    ready, where = prepared(method, recipe), Where(tiny_place, 0, 1, CPU)
    for name in ("read", "stamp"):
        monkeypatch.setattr(Folder, name, raises)
    monkeypatch.setattr(cache, "ensure", raises)
    monkeypatch.setattr(find, "dataset", raises)
    monkeypatch.setattr(find, "listed", raises)
    found = find.method(method)
    experiment = found.experiment(recipe, ready, where)
    history, evaluation = fit(experiment, CPU)
    scored = found.score(experiment.task.student, recipe, ready, where)
    assert scored.metrics == evaluation.metrics and "train/loss" in history[0]
    assert "retrieval" in found.pictures(experiment.task.student, recipe, ready, scored, where)


def test_without_a_pixel_cache_images_are_decoded(tiny_recipe, prepared, tiny_place, monkeypatch):
    """The counterpart: the readers above do raise where they are asked."""
    recipe = tiny_recipe("d3still", **{"run.pixel_cache": "off"})
    ready = prepared("d3still", recipe)
    assert not any("pixels" in role for role in ready)
    experiment = find.method("d3still").experiment(recipe, ready, Where(tiny_place, 0, 1, CPU))
    plain = find.method("d3still").experiment(
        tiny_recipe(), prepared("d3still", tiny_recipe()), Where(tiny_place, 0, 1, CPU)
    )
    decoded, cached = (next(iter(made.batches(1)))["distill"] for made in (experiment, plain))
    assert torch.equal(decoded["frames"], cached["frames"])
    monkeypatch.setattr(Folder, "read", raises)
    with pytest.raises(OSError, match="folder/train: cannot read image 'train/"):
        next(iter(experiment.batches(1)))


@pytest.mark.parametrize("method", FAMILY)
def test_scoring_needs_no_training_image_and_no_teacher_s_file(method, tiny_recipe, tiny_place):
    roles = set(find.method(method).needs(tiny_recipe(method), tiny_place, "score"))
    assert {"query", "gallery", "query pixels"} <= roles
    assert not roles & {"train", "train pixels", "teacher", "classifier", "targets", "occluders", "references"}


def test_methods_of_the_family_share_what_is_the_same(tiny_recipe, tiny_place):
    def keys(method, **changes):
        needs = find.method(method).needs(tiny_recipe(method, **changes), tiny_place)
        return {role: need.key for role, need in needs.items()}

    plain = ("d3still", "fitnet", "rkd", "pkt", "spkd", "cckd", "raml", "aml")
    assert all(keys(method) == keys("d3still") for method in plain)
    vanilla, ugd, csd = keys("vanillakd"), keys("ugd"), keys("csd", neighbours="train")
    assert vanilla["classifier"] == ugd["classifier"] and "classifier" not in keys("fitnet")
    assert vanilla["targets"] == keys("fitnet")["targets"] != ugd["targets"]
    assert csd == keys("rop", neighbours="train") and "neighbours" not in keys("csd")
    assert csd["clean targets"] == csd["targets"] == keys("fitnet")["targets"]
    assert keys("csd", neighbours="train", top_k=5) == keys("csd", neighbours="train", top_k=30)
    sizes = [keys("ugd", **{"student.size": size})["targets"] for size in ("16x16", "64x64")]
    assert sizes[0] != sizes[1]  # its local features are as many as the student's
    everything = [keys(method)["gallery embeddings"] for method in (*plain, "vanillakd", "ugd", "csd", "rop")]
    assert len(set(everything)) == 1


def test_a_preparation_that_is_damaged_is_named_and_made_again(tiny_recipe, own_place):
    recipe = tiny_recipe("fitnet")
    first = met("fitnet", recipe, own_place)
    data_file = Path(first.path("targets")) / "data.arrow"
    whole = data_file.read_bytes()
    data_file.write_bytes(whole[:-3] + b"xyz")
    with pytest.warns(UserWarning, match=r"the content of data\.arrow has changed; building it again"):
        again = met("fitnet", recipe, own_place)
    assert again.plain() == first.plain() and data_file.read_bytes() == whole


def test_files_are_looked_at_once_a_listing(tiny_recipe, own_place, tmp_path, monkeypatch):
    """Every variant of a sweep has needs; a file that has changed is seen when the folder is listed again."""
    root = shutil.copytree(own_place.data_root, tmp_path / "data")
    place = replace(own_place, data_root=str(root))
    looked, stamp = [], Folder.stamp
    monkeypatch.setattr(Folder, "stamp", lambda self, keys: looked.append(len(keys)) or stamp(self, keys))

    def keys(**changes):
        needs = find.method("d3still").needs(tiny_recipe("d3still", **changes), place)
        return {role: need.key for role, need in needs.items()}

    find.listed.cache_clear()
    first = keys()
    sides = len(looked)
    assert sides == 3 and keys(beta=0.1) == keys(gamma=7.0) == first and len(looked) == sides
    changed = min(root.rglob("*.png"))
    changed.write_bytes(changed.read_bytes() + b" ")
    find.listed.cache_clear()
    assert keys() != first and len(looked) == 2 * sides


def test_another_teacher_is_another_preparation(tiny_recipe, own_place, tiny_teacher, tmp_path):
    """By its content: a copy is the same teacher, a changed one is found although its path is not new."""
    copied = [shutil.copy(file, tmp_path / f"mine{file.name.removeprefix('teacher')}")
              for file in tiny_teacher.parent.iterdir()]  # fmt: skip
    assert len(copied) == 3
    one = met("fitnet", tiny_recipe("fitnet"), own_place)
    recipe = tiny_recipe("fitnet", **{"teacher.weights": str(tmp_path / "mine.safetensors")})
    two = met("fitnet", recipe, own_place)
    assert one["teacher"].fingerprint == two["teacher"].fingerprint and one.path("targets") == two.path("targets")
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "mine.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in weights.items()}, tmp_path / "mine.safetensors")
    three = met("fitnet", recipe, own_place)
    assert three["teacher"].fingerprint != two["teacher"].fingerprint and three.path("targets") != two.path("targets")


# --- Tables in shards


@pytest.fixture
def sharded(monkeypatch):
    monkeypatch.setattr(data, "SHARD_ROWS", 40)


def embeddings_of(recipe, place) -> dict[str, cache.Rows]:
    ready = met("ugd", recipe, place)
    return {role: cache.open_rows(ready.path(role)) for role in ("targets", "gallery embeddings")}


@pytest.fixture(scope="module")
def whole_tables(tiny_recipe, prepared):
    """Made at once: 96 training images × 2 recorded views with local features, and 24 of the gallery."""
    ready = prepared("ugd", tiny_recipe("ugd", views="recorded"))
    return {role: cache.open_rows(ready.path(role)) for role in ("targets", "gallery embeddings")}


def same_rows(one: cache.Rows, other: cache.Rows) -> None:
    assert len(one) == len(other) and one.manifest["columns"].keys() == other.manifest["columns"].keys()
    for column in one.manifest["columns"]:
        rows = np.arange(len(one))
        np.testing.assert_allclose(one(rows, column), other(rows, column), rtol=1e-4, atol=1e-5, err_msg=column)
        picked = np.array([len(one) - 1, 0, 39, 40, 7])  # across the borders of shards, in any order
        np.testing.assert_array_equal(one(picked % len(one), column), one(rows, column)[picked % len(one)])


def test_a_table_of_shards_is_the_whole_one_row_by_row(tiny_recipe, own_place, whole_tables, sharded):
    found = embeddings_of(tiny_recipe("ugd", views="recorded"), own_place)
    assert len(found["targets"].manifest["parts"]) == 5 and "parts" not in found["gallery embeddings"].manifest
    assert found["targets"].manifest["fingerprint"] == whole_tables["targets"].manifest["fingerprint"]
    for role, rows in found.items():
        same_rows(rows, whole_tables[role])


def test_a_preparation_that_fails_keeps_the_shards_that_it_had_finished(
    tiny_recipe, own_place, whole_tables, sharded, monkeypatch
):
    """The third shard cannot be written; the second command makes what is missing and nothing else."""
    recipe, finished, begun, make = tiny_recipe("ugd", views="recorded"), set(), [], tables.embeddings

    def counted(made_from, embed, rows, *rest, **named):
        begun.append((len(embed.source), rows.start))
        if begun.count((96, 76)) == 1 and rows.start == 76:
            raise OSError("no space left on device")
        found = make(made_from, embed, rows, *rest, **named)
        finished.add(begun[-1])
        return found

    monkeypatch.setattr(tables, "embeddings", counted)
    with pytest.raises(OSError, match="no space left"):
        met("ugd", recipe, own_place)
    kept, before = set(finished), len(begun)
    assert {(96, 0), (96, 38)} <= kept and (96, 76) not in kept
    found = embeddings_of(recipe, own_place)
    assert (96, 76) in begun[before:] and not kept & set(begun[before:])
    same_rows(found["targets"], whole_tables["targets"])


def test_a_whole_table_that_is_there_is_used(tiny_recipe, own_place, sharded, monkeypatch):
    """As 0.3 has left it: made at once, and no ledger."""
    recipe = tiny_recipe("ugd", views="recorded")
    with monkeypatch.context() as patch:
        patch.setattr(data, "SHARD_ROWS", 10_000)
        first = embeddings_of(recipe, own_place)
    shutil.rmtree(own_place.folder("ready"))
    made = []
    monkeypatch.setattr(cache, "_write", lambda folder, *rest: made.append(folder))
    found = embeddings_of(recipe, own_place)
    assert made == [] and all(found[role].folder == rows.folder for role, rows in first.items())
    assert "parts" not in found["targets"].manifest
