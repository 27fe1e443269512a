"""Object storage (fsspec's in memory) copied to hosts: whole, verified, once, and evicted by size."""

import dataclasses
import json
import os
import time
import uuid
from pathlib import Path

import numpy as np
import pytest

from orchestrator import cache, mirror, store
from orchestrator.needs import Place


@pytest.fixture
def places(tmp_path) -> tuple[Place, Place]:
    """The same storage as two hosts see it."""
    remote = f"memory://{uuid.uuid4().hex}/ours"
    return tuple(Place(str(tmp_path / name), "", remote) for name in ("one", "two"))


def table(place: Place, rows: int = 8, kind: str = "pixels") -> str:
    blocks = lambda: iter([{"value": np.arange(rows * 4, dtype=np.float32).reshape(rows, 4)}])  # noqa: E731
    made = cache.ensure(place.folder("cache"), kind, {"rows": rows}, blocks)
    return cache.folder_below(place.storage, made)


def test_what_one_host_publishes_another_fetches(places):
    one, two = places
    path = table(one)
    assert not mirror.published(one, path)
    mirror.publish(one, path)
    assert mirror.published(two, path)
    mirror.fetch(two, path)
    assert (
        cache.open_rows(two.folder(path), verify=True).all().tolist()
        == cache.open_rows(one.folder(path)).all().tolist()
    )
    mirror.fetch(one, path)  # who made it has it


def test_a_joined_table_brings_its_parts(places):
    one, two = places
    parts = [cache.open_rows(one.folder(table(one, rows))) for rows in (3, 5)]
    whole = cache.folder_below(one.storage, cache.joined(one.folder("cache"), "pixels", {"both": 1}, parts))
    mirror.publish(one, whole)
    mirror.fetch(two, whole)
    assert len(cache.open_rows(two.folder(whole)).all()) == 8


def test_files_beside_a_file_come_with_it(places):
    one, two = places
    folder = Path(one.folder("teachers", "key"))
    folder.mkdir(parents=True)
    own = ("teacher.safetensors", "teacher.classifier.safetensors", "teacher.json")
    for name in (*own, "other.json", "teacher.x.tmp-1"):
        (folder / name).write_text(name)
    mirror.publish(one, "teachers/key/teacher.safetensors")
    mirror.fetch(two, "teachers/key/teacher.safetensors")
    found = sorted(path.name for path in Path(two.folder("teachers", "key")).iterdir())
    assert found == sorted(own)


def test_what_nobody_published_says_what_to_do(places):
    with pytest.raises(FileNotFoundError, match=r"cache/none is not in memory://.*; prepare the sweep again"):
        mirror.fetch(places[1], "cache/none")


def test_what_arrives_damaged_is_not_used(places):
    one, two = places
    path = table(one)
    mirror.publish(one, path)
    data = store.joined(one.remote, "files", path, "data.arrow")
    content = store.read(data)
    store.write(data, content[:-1] + b"x")
    with pytest.raises(ValueError, match="is not what was stored there"):
        mirror.fetch(two, path)
    assert not list(Path(two.storage).rglob("data.arrow*")), "nothing half-written is left"
    store.write(data, content)
    mirror.fetch(two, path)


def test_an_interrupted_copy_is_not_taken_for_a_whole_one(places):
    one, two = places
    path = table(one)
    mirror.publish(one, path)
    mirror.fetch(two, path)
    (Path(two.folder(path)) / "data.arrow").write_bytes(b"short")
    mirror.fetch(two, path)
    cache.open_rows(two.folder(path), verify=True)


def test_a_list_may_not_name_files_outside_the_storage(places):
    one, two = places
    listed = {"../../outside": {"sha256": "0", "bytes": 1}}
    store.write(store.joined(one.remote, "lists", "cache+bad.json"), json.dumps(listed).encode())
    with pytest.raises(ValueError, match="outside of the storage"):
        mirror.fetch(two, "cache/bad")


def test_copies_are_evicted_by_size_the_longest_unused_first(places, monkeypatch):
    one, two = places
    paths = [table(one, rows) for rows in (1000, 2000, 3000)]
    for path in paths:
        mirror.publish(one, path)
    sizes = [sum(f.stat().st_size for f in Path(one.folder(path)).iterdir()) for path in paths]
    monkeypatch.setenv("ORCHESTRATOR_CACHE_GB", str((sizes[1] + 100) / 1e9))
    long_ago = time.time() - 7200
    for age, path in enumerate(paths[:2]):
        mirror.fetch(two, path)
        os.utime(two.folder("fetched", path.replace("/", "+") + ".json"), (long_ago + age, long_ago + age))
    mirror.fetch(two, paths[2])
    there = [Path(two.folder(path, "data.arrow")).exists() for path in paths]
    assert there == [False, True, True], "the third came after the others were looked at"
    mirror.fetch(two, paths[0])
    assert Path(two.folder(paths[0], "data.arrow")).exists(), "fetched again"
    assert Path(two.folder(paths[2], "data.arrow")).exists(), "what was asked for a moment ago is in use"
    fourth = table(one, 7)
    mirror.publish(one, fourth)
    monkeypatch.setenv("ORCHESTRATOR_CACHE_GB", "many")
    with pytest.raises(ValueError, match="ORCHESTRATOR_CACHE_GB=many is no number of gigabytes"):
        mirror.fetch(two, fourth)


def test_a_folder_that_is_a_storage_needs_no_copies(tmp_path):
    place = Place(str(tmp_path))
    path = table(place)
    mirror.publish(place, path)
    mirror.fetch(place, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache"]


def test_a_storage_that_is_not_mounted_is_noticed(tmp_path):
    place = Place(str(tmp_path / "runs"))
    with pytest.raises(OSError, match="is not there; mount it again"):
        mirror.check(place)
    mirror.mark(place)
    mark = (tmp_path / "runs" / mirror.FILE).read_text()
    mirror.mark(place)
    mirror.probe(place)
    assert (tmp_path / "runs" / mirror.FILE).read_text() == mark
    assert [p.name for p in (tmp_path / "runs").iterdir()] == [mirror.FILE]


def test_places_are_folders_or_uris_without_secrets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mirror.place() == Place(str(tmp_path / "runs"))
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "copies"))
    found = mirror.place("data", "s3://bucket/ours/")
    assert found.remote == "s3://bucket/ours" and found.storage.startswith(str(tmp_path / "copies"))
    assert found.data_root == str(tmp_path / "data")
    assert found.address("ready", "a.json") == "s3://bucket/ours/ready/a.json"
    assert mirror.place(address="s3://bucket/theirs").storage != found.storage
    for address in ("s3://me:hunter2@bucket", "s3://bucket?secret_key=hunter2"):
        with pytest.raises(ValueError, match=r"ORCHESTRATOR_STORAGE=s3://.*holds more than") as error:
            mirror.place(address=address)
        assert "hunter2" not in str(error.value)
    assert dataclasses.asdict(Place("/a"))["remote"] == ""


def test_what_a_job_of_ray_would_lose_is_refused(tmp_path, monkeypatch):
    sent = tmp_path / "working_dir_files" / "_ray_pkg_1"
    sent.mkdir(parents=True)
    monkeypatch.chdir(sent)
    monkeypatch.delenv("ORCHESTRATOR_STORAGE", raising=False)
    with pytest.raises(ValueError, match=r"which Ray removes after the job; set ORCHESTRATOR_STORAGE"):
        mirror.place()
    monkeypatch.setenv("ORCHESTRATOR_STORAGE", str(tmp_path))
    assert mirror.place().storage == str(tmp_path)


def test_a_kind_of_storage_that_nobody_knows_is_named():
    with pytest.raises(ValueError, match=r"storage of kind nosuch:// cannot be used"):
        mirror.place(address="nosuch://bucket/folder")
    with pytest.raises(ValueError, match=r"storage of kind nosuch:// cannot be used"):
        store.read("nosuch://bucket/file")
