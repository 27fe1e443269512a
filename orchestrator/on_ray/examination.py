"""All checks of a cluster in their order: asks every node, and hands the answers to those who judge them.

A check that fails itself is a finding. A node that does not answer within a minute is asked nothing more.
"""

import contextlib
import dataclasses
import os
import secrets
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from orchestrator import mlflow_store, tracking
from orchestrator.on_ray import checkup, cluster, findings
from orchestrator.on_ray.findings import Finding
from orchestrator.on_ray.trial import reason

SECONDS = 60.0  # for an answer
_SECRETS = ("PASSWORD", "TOKEN", "SECRET_ACCESS_KEY")  # ends of names of environment variables


@dataclass(frozen=True)
class Asked:
    """What a person wants to know about."""

    storage: str  # absolute path, or an address with "://"
    concurrent: int | None  # trials at once; None = what fits
    workers: int  # of one trial
    gpus_per_worker: float
    weights: Sequence[str] = ()  # networks whose pretrained weights must be on every node
    study: str = ""  # address of the study's database


@dataclass(frozen=True)
class Node:
    """A living node of the cluster."""

    id: str
    name: str  # its address; longer where several nodes share one
    gpus: float  # that Ray offers
    head: bool


def examine(asked: Asked) -> Iterator[Finding]:
    """Findings of every check on the connected cluster, one after the other; none shows a password."""
    try:
        for finding in _examine(asked):
            yield dataclasses.replace(finding, text=hidden(finding.text))
    except Exception as error:  # the cluster ended meanwhile, or Ray refuses what was asked of it
        yield Finding(
            "doctor", "bad", f"cannot go on: {hidden(_line(error))}", "look at the head's log, then start again"
        )


def _examine(asked: Asked) -> Iterator[Finding]:
    _send_by_value()
    nodes = living()
    answers, silent = ask({node: (node.gpus,) for node in nodes}, checkup.about)
    yield from findings.silent(silent)
    all_nodes, nodes = len(nodes), [node for node in nodes if node.name in answers]
    if not nodes:
        return

    def each(what: str) -> dict[str, Any]:
        return {name: answer[what] for name, answer in answers.items()}

    yield from findings.versions(checkup.versions(), each("versions"))
    yield from findings.gpus({name: findings.Gpus(**own) for name, own in each("gpus").items()})
    yield findings.dashboard(_dashboard())
    fitting, possible = _fitting(asked)
    yield fitting
    heads = [node.name for node in nodes if node.head]
    available = answers[heads[0]]["memory"] if heads else None
    yield findings.head_memory(available, asked.concurrent or possible, cluster.CONTROL_BYTES)
    yield _clocks(nodes)
    yield findings.shared_memory(each("shared_memory"))
    yield findings.open_files(each("open_files"))
    yield findings.temporary_space(each("temporary"))
    yield from _storage(asked.storage, nodes)
    yield _tracking(asked.storage, nodes, all_nodes)
    yield _study(asked.study)
    yield from _weights(asked.weights, nodes)


def living() -> list[Node]:
    """The nodes that Ray takes for alive, the head first."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    addresses = [node["NodeManagerAddress"] for node in alive]
    found = []
    for node, address in zip(alive, addresses, strict=True):
        name = address if addresses.count(address) == 1 else f"{address}/{node['NodeID'][:6]}"
        resources = node["Resources"]
        found.append(Node(node["NodeID"], name, resources.get("GPU", 0.0), "node:__internal_head__" in resources))
    return sorted(found, key=lambda node: not node.head)


def ask(
    arguments: Mapping[Node, Sequence[Any]], function: Callable[..., Any], seconds: float = SECONDS, **options: Any
) -> tuple[dict[str, Any], dict[str, str]]:
    """Runs a function on nodes, on all at once.

    Args:
        arguments: of the function, for every node.
        function: of :mod:`orchestrator.on_ray.checkup`.
        seconds: after which a node counts as silent.
        options: of the Ray task.

    Returns:
        Name of the node -> its answer, and name of the node -> why it has none.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(function)
    waiting = {}
    for node, values in arguments.items():
        pinned = NodeAffinitySchedulingStrategy(node.id, soft=False)
        # No CPU: a node whose CPUs are all taken answers too.
        own = task.options(num_cpus=0, max_retries=0, scheduling_strategy=pinned, **options)
        waiting[own.remote(*values)] = node.name
    done, late = ray.wait(list(waiting), num_returns=len(waiting), timeout=seconds) if waiting else ([], [])
    answers, failed = {}, {waiting[task]: f"no answer within {seconds:.0f} s" for task in late}
    for finished in done:
        try:
            answers[waiting[finished]] = ray.get(finished)
        except Exception as error:  # whatever a node raises is what there is to say about it
            failed[waiting[finished]] = reason(error).removeprefix("ValueError: ")
    for task in late:
        with contextlib.suppress(Exception):  # of a node that may be gone
            ray.cancel(task, force=True)
    return answers, failed


def within(seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns or raises here; a file system that hangs does not hang the doctor.

    Raises:
        TimeoutError: it takes longer.
    """
    answer: Future[Any] = Future()

    def run() -> None:
        try:
            answer.set_result(function(*arguments))
        except BaseException as error:  # handed to who waits
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return answer.result(timeout=seconds)
    except TimeoutError as error:
        raise error if answer.done() else TimeoutError(f"no answer within {seconds:.0f} s") from None


def hidden(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """A text without any password that the environment has, alone or in an address."""
    known: set[str] = set()
    for name, value in environment.items():
        if name.endswith(_SECRETS):
            known.add(value)
        if "://" in value:
            with contextlib.suppress(ValueError):  # no address after all
                address = urllib.parse.urlsplit(value)
                known |= {address.password or "", urllib.parse.unquote(address.password or "")}
                known |= {word for name, word in urllib.parse.parse_qsl(address.query) if "password" in name}
    for password in sorted(known - {""}, key=len, reverse=True):
        text = text.replace(password, "***")
    return text


def _send_by_value() -> None:
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[checkup.__name__])


def _dashboard() -> str:
    """Why the State API does not answer; empty when it does."""
    import ray

    try:
        from ray.util.state import list_nodes

        list_nodes(address=ray.get_runtime_context().gcs_address, timeout=10)  # others may run on this machine
    except Exception as error:  # Ray raises several kinds, by how the dashboard is away
        return _line(error)
    return ""


def _fitting(asked: Asked) -> tuple[Finding, int]:
    """A finding, and how many trials fit at once."""
    gpus = f" with {asked.gpus_per_worker:g} GPU(s)" if asked.gpus_per_worker else ""
    try:
        possible = cluster.check_resources(asked.workers, asked.gpus_per_worker, asked.concurrent)
    except ValueError as error:
        return Finding("resources", "bad", str(error), "fewer --workers or --gpus-per-worker, or more nodes"), 1
    return findings.fitting(f"{asked.workers} worker(s){gpus}", possible, asked.concurrent), possible


def _clocks(nodes: Sequence[Node]) -> Finding:
    offsets, silent = {}, {}
    for node in nodes:  # one after the other: the less a question takes, the less the doubt
        before = time.time()
        answers, failed = ask({node: ()}, checkup.clock)
        after = time.time()
        silent |= failed
        offsets |= {name: (told - (before + after) / 2, (after - before) / 2) for name, told in answers.items()}
    return findings.clocks(offsets, silent)


def _storage(storage: str, nodes: Sequence[Node]) -> list[Finding]:
    """Everybody writes a file that the other side must see; removed again, also a folder that was not there."""
    name, secret = f"doctor-{secrets.token_hex(8)}", secrets.token_bytes(32)
    own = {node.name: f"node-{node.id}" for node in nodes}
    try:
        made = within(SECONDS, _begin, storage, name, secret)
    except Exception as error:  # of any file system
        return findings.storage(storage, {}, {"this machine": _line(error)})
    try:
        asked = {node: (storage, name, secret, own[node.name]) for node in nodes}
        answers, failed = ask(asked, checkup.use_storage)
        used = {}
        for node, answer in answers.items():
            seen = answer["visible"] and _is_seen(storage, f"{name}/{own[node]}", secret)
            used[node] = findings.Used(**answer, seen=seen)
        return findings.storage(storage, used, failed)
    finally:
        with contextlib.suppress(Exception):  # what is left is a few small files with a telling name
            within(SECONDS, _end, storage, name, made)


def _begin(storage: str, name: str, secret: bytes) -> bool:
    """Writes the driver's file; returns whether the storage itself had to be made."""
    files, root = checkup.files_of(storage)
    top = root.partition("/")[0]
    if top and not files.exists(top):  # or a bucket would be made
        raise FileNotFoundError(f"there is no {top}")
    made = not files.exists(root)
    files.makedirs(f"{root}/{name}")
    checkup.write(files, f"{root}/{name}/driver", secret)
    return made


def _end(storage: str, name: str, made: bool) -> None:
    files, root = checkup.files_of(storage)
    files.invalidate_cache()
    files.rm(f"{root}/{name}", recursive=True)
    if made and not files.ls(root):
        files.rmdir(root)


def _is_seen(storage: str, path: str, secret: bytes) -> bool:
    files, root = checkup.files_of(storage)
    try:
        return within(SECONDS, checkup.read, files, f"{root}/{path}") == secret
    except Exception:  # not there, not readable, no answer: all the same to who needs it
        return False


def _tracking(storage: str, nodes: Sequence[Node], all_nodes: int) -> Finding:
    if "://" in storage and not os.environ.get("MLFLOW_TRACKING_URI"):
        return findings.tracking("", len(nodes), {})
    uri = tracking.tracking_uri(storage)
    if uri.startswith("sqlite:") and all_nodes > 1:
        return findings.tracking(uri, all_nodes, {})  # several at once could damage the file
    if (file := mlflow_store.database(uri)) is not None and not file.exists():
        return findings.tracking(uri, len(nodes), None)  # the first look would make it
    _, failed = ask({node: (uri,) for node in nodes}, checkup.reach_tracking)
    return findings.tracking(uri, len(nodes), failed)


def _study(url: str) -> Finding:
    if not url:
        return findings.study("", "")
    try:
        shown = within(SECONDS, _select, url)
    except Exception as error:  # a driver that is missing, an address nobody can read, a refusal
        return findings.study(hidden(_without_password(url)), _line(getattr(error, "orig", None) or error))
    return findings.study(shown, "")


def _select(url: str) -> str:
    """Asks the database for one number; returns its address without the password."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(url)
    try:
        with engine.connect() as connection:
            connection.execute(sqlalchemy.text("SELECT 1")).scalar_one()
    finally:
        engine.dispose()
    return engine.url.render_as_string(hide_password=True)


def _without_password(url: str) -> str:
    import sqlalchemy

    try:
        return sqlalchemy.make_url(url).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError:
        return "OPTUNA_STORAGE"  # what cannot be read cannot be shown either: it may hold a password


def _weights(names: Sequence[str], nodes: Sequence[Node]) -> list[Finding]:
    if not names:
        return []
    options = {"runtime_env": {"env_vars": {"HF_HUB_OFFLINE": "1"}}}  # read when the hub's client is imported
    asked = {node: (list(names),) for node in nodes}
    answers, silent = ask(asked, checkup.load_weights, SECONDS * len(names), **options)
    return [
        findings.weights(name, len(nodes), silent | {node: own[name] for node, own in answers.items() if own[name]})
        for name in names
    ]


def _line(error: BaseException) -> str:
    """The first line of an error with its kind."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
