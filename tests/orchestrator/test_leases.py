"""Leases, on a folder and on object storage (fsspec's in memory): one holder, whoever dies, whatever clocks say."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
import uuid

import pytest

from orchestrator import leases, store
from orchestrator.leases import Holder, Taken, held


@pytest.fixture(params=["folder", "memory"])
def lease(request, tmp_path, monkeypatch) -> str:
    monkeypatch.setattr(leases, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(leases, "SILENT_SECONDS", 0.4)
    folder = str(tmp_path / "ready") if request.param == "folder" else f"memory://{uuid.uuid4().hex}/ready"
    return f"{folder}/teacher.lease"


def write(lease: str, holder: Holder | str, generation: int = 1) -> None:
    content = holder if isinstance(holder, str) else json.dumps(dataclasses.asdict(holder))
    store.write(f"{lease}-{generation}", content.encode())


def files(lease: str) -> list[str]:
    return store.names(lease.rpartition("/")[0])


ELSEWHERE = Holder("another-host", 77, "1", 1.0)


@pytest.mark.parametrize("error", [None, OSError("disk full")])
def test_a_lease_is_held_in_the_block_and_given_back(lease, error):
    try:
        with held(lease):
            assert leases.read(lease).pid == os.getpid() and not leases.read(lease).is_gone
            if error:
                raise error
    except OSError as raised:
        assert raised is error
    assert leases.read(lease) is None and files(lease) == ["teacher.lease-1"]


def test_who_does_not_wait_is_told_who_holds_it(lease):
    with held(lease), pytest.raises(Taken, match=rf"the sweep x is being run by process {os.getpid()} on .*, since 2"):
        with held(lease, what="the sweep x"):
            raise AssertionError("two held it")
    with held(lease):
        pass


def test_a_holder_of_this_host_that_has_ended_is_no_obstacle(lease):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here = Holder.here()
    for gone in (
        dataclasses.replace(here, pid=ended.pid, began="123"),
        dataclasses.replace(here, began="123"),  # its number is another process's now
        dataclasses.replace(here, pid=2**40),
    ):
        write(lease, gone, 1 + int((["-0", *files(lease)])[-1].rpartition("-")[2]))
        assert gone.is_gone
        with held(lease):
            assert leases.read(lease).pid == os.getpid() and not leases.read(lease).is_gone
    assert len(files(lease)) == 1


def test_a_process_that_has_ended_unburied_is_gone():
    """A zombie has a process number, but nobody works there any more."""
    unburied = subprocess.Popen([sys.executable, "-c", ""])
    began = leases._began(unburied.pid)
    assert began not in ("", "alive")
    deadline = time.monotonic() + 10
    while leases._began(unburied.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert os.path.exists(f"/proc/{unburied.pid}"), "it was not waited for"
    assert dataclasses.replace(Holder.here(), pid=unburied.pid, began=began).is_gone
    unburied.wait()


def test_another_container_of_the_same_name_is_not_looked_into():
    """Process numbers mean something within one namespace only."""
    there = dataclasses.replace(Holder.here(), space="4026531999", pid=2**40)
    assert not there.is_here and not there.is_gone


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "7",
        '{"host": 1, "pid": 2, "began": "3", "since": 4}',
        '{"host": "a", "pid": "x", "began": "", "since": 0}',
        '{"host": "a", "pid": 1, "began": "", "since": "then"}',
        '{"host": "a", "pid": 1, "began": "", "since": 1e300}',
    ],
)
def test_a_file_that_is_no_lease_is_named(lease, text):
    write(lease, text)
    with pytest.raises(Taken, match=r"teacher.lease-1 cannot be read; if nobody is at work on it, remove it"):
        with held(lease, waiting=lambda holder: None):
            raise AssertionError("nobody knows who holds it")
    assert store.read(f"{lease}-1") == text.encode()


def test_a_holder_elsewhere_that_is_silent_is_followed_whatever_its_clock_says(lease):
    """Its file says a time of next year; nothing of it is compared with a clock of this host."""
    write(lease, dataclasses.replace(ELSEWHERE, since=time.time() + 3e7))
    told, waited_for = [], []
    began = time.monotonic()
    with held(lease, waited_for.append, took_over=told.append) as own:
        assert time.monotonic() - began >= leases.SILENT_SECONDS
        own.check()
        assert leases.read(lease).pid == os.getpid()
    assert [holder.host for holder in waited_for] == ["another-host"]
    assert len(told) == 1 and "teacher was held by process 77 on another-host" in told[0] and "taken over" in told[0]
    assert len(files(lease)) == 1


def test_who_does_not_wait_looks_whether_a_holder_elsewhere_lives(lease):
    stop = threading.Event()

    def living() -> None:
        beats = 0
        while not stop.wait(0.05):
            beats += 1
            store.write(f"{lease}-1", json.dumps({**dataclasses.asdict(ELSEWHERE), "beats": beats}).encode())

    write(lease, ELSEWHERE)
    other = threading.Thread(target=living)
    other.start()
    try:
        with pytest.raises(Taken, match="is being run by process 77 on another-host"), held(lease):
            raise AssertionError("two held it")
    finally:
        stop.set()
        other.join()
    with held(lease):  # it has died since
        pass


def test_who_was_taken_for_gone_learns_it_and_removes_nothing(lease):
    with held(lease, what="the sweep x") as own:
        write(lease, ELSEWHERE, own.generation + 1)
        deadline = time.monotonic() + 5
        while not own.lost.is_set() and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(
            Taken, match=r"the sweep x was taken over by process 77 on another-host, .*; this one stops"
        ):
            own.check()
    assert leases.read(lease) == ELSEWHERE


def test_a_holder_is_heard_while_it_works(lease):
    with held(lease):
        first = store.read(f"{lease}-1")
        deadline = time.monotonic() + 5
        while store.read(f"{lease}-1") == first and time.monotonic() < deadline:
            time.sleep(0.01)
        assert store.read(f"{lease}-1") != first


def test_a_storage_that_is_away_for_a_while_costs_nobody_the_lease(tmp_path, lease, monkeypatch):
    names = store.names

    def away(*arguments):
        raise OSError("stale file handle")

    with held(lease) as own:
        for gone in (away, lambda *arguments: []):  # an error, or an empty folder where something was mounted
            monkeypatch.setattr(store, "names", gone)
            time.sleep(0.2)
        monkeypatch.setattr(store, "names", names)
        time.sleep(0.1)
        own.check()
        assert leases.read(lease) == own.holder


def test_waiting_is_told_once_of_every_holder(lease):
    told = []
    write(lease, ELSEWHERE)
    threading.Timer(0.2, store.write, [f"{lease}-1", b""]).start()
    with held(lease, waiting=told.append):
        assert [h.host for h in told] == ["another-host"]


def test_threads_of_one_process_wait_for_each_other_in_silence(lease):
    told, taken, release = [], threading.Event(), threading.Event()

    def hold():
        with held(lease):
            taken.set()
            release.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    taken.wait(10)
    threading.Timer(0.2, release.set).start()
    with held(lease, waiting=told.append):
        assert release.is_set()
    holder.join()
    assert told == []


def test_who_looked_long_ago_does_not_take_an_old_generation(lease):
    for _ in range(3):
        with held(lease):
            assert leases._claim(lease, "slow", 0) is None
    with held(lease) as own:
        assert own.generation == 4
        assert leases._claim(lease, "slow", 1) is None, "the second was removed, so it could be made again"
        assert leases.read(lease) == own.holder and files(lease) == ["teacher.lease-4"]


def test_only_one_takes_over_from_the_dead(lease, monkeypatch):
    monkeypatch.setattr(leases, "_LOOK_SECONDS", 0.0005)
    dead = dataclasses.replace(Holder.here(), began="123")
    inside, most, lost = [], [], []

    def work(start: threading.Barrier) -> None:
        start.wait(10)
        with held(lease, waiting=lambda holder: None) as own:
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.002)
            inside.pop()
            lost.append(own.lost.is_set())

    for _ in range(15):
        write(lease, dead, 1 + int((["-0", *files(lease)])[-1].rpartition("-")[2]))
        start = threading.Barrier(6)
        workers = [threading.Thread(target=work, args=(start,)) for _ in range(6)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(20)
            assert not worker.is_alive()
    assert max(most) == 1 and len(most) == 90 and not any(lost)
