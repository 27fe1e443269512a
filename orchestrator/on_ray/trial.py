"""One trial as a Ray Train job. Every process of a trial loads this file, so it imports next to nothing."""

import contextlib
import json
import os
import socket
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator import patience, store
from orchestrator.on_ray import faults
from orchestrator.on_ray.faults import reason

_ATTEMPTS = 10  # of a trial whose nodes, processes or disks fail


def run(config: dict[str, Any]) -> None:
    """The Tune function of a trial: launches Ray Train and says how it ended.

    What failed around it, such as a node, is no fault of the trial: it goes on from its last checkpoint. What its
    own code raises would be raised again.
    """
    import ray.tune

    job = json.loads(config["job"])
    job["claim"] = ray.tune.get_context().get_trial_id()
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            final = train(job)
        except Exception as error:  # whatever ends a trial must not end the sweep; the reason goes to its record
            final = {"failed": reason(error)}
            if attempt == _ATTEMPTS or not (faults.is_around(error, job["train_storage"]) or faults.away(job)):
                break
            ray.tune.report(
                {
                    "epoch": 0,
                    "happened": f"{faults.said(error, job['train_storage'])}; goes on from its last checkpoint",
                }
            )
            faults.cleared(job)
        else:
            break
    ray.tune.report({"epoch": 0, **final, "ended": True})


def train(job: dict[str, Any]) -> dict[str, Any]:
    """One Ray Train run, from its last checkpoint if its folder has any; returns what rank 0 returned.

    Departs from ``TorchTrainer``, which imports torch in the trial's process: 8 s and 0.5 GB. The workers join their
    process group themselves.
    """
    import ray.train

    from orchestrator.on_ray.internals import Rendezvous, Told, Trainer

    files, folder = store.for_ray(job["train_storage"])
    resources = {"CPU": 1, "GPU": job["gpus_per_worker"]} if job["gpus_per_worker"] else {"CPU": job["threads"]}
    trainer = Trainer(
        worker,
        train_loop_config=job,
        backend_config=Rendezvous(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=job["workers"], use_gpu=job["gpus_per_worker"] > 0, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=job["name"],
            storage_path=folder,
            storage_filesystem=files,
            callbacks=[Told()],
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            failure_config=ray.train.FailureConfig(max_failures=0),  # every failure is looked at: run
            logging_config=ray.train.LoggingConfig("ERROR"),
        ),
    )
    return trainer.fit().return_value


def worker(job: dict[str, Any]) -> dict[str, Any]:
    """What every Ray Train worker of a trial runs."""
    import ray.train

    from orchestrator import checkpoint, mirror
    from orchestrator.launch import trial
    from orchestrator.needs import Place
    from orchestrator.on_ray.internals import claim_placement_group

    place = Place(**job["place"])
    mirror.check(place)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = "cuda:0" if job["gpus_per_worker"] else "cpu"
    claim_placement_group(job["claim"], rank)
    resume = None
    stored = ray.train.get_checkpoint()
    if stored is not None:
        with stored.as_directory() as folder:
            resume = checkpoint.load(Path(folder) / "state.pt")

    def report(epoch: int, metrics: dict[str, float], state: Callable[[], dict[str, Any]] | None) -> None:
        told: dict[str, Any] = {"epoch": epoch, **metrics}
        if waited := patience.heard():
            told["happened"] = waited
        if state is None or rank != 0:
            behind(partial(ray.train.report, told))
        else:
            behind(partial(stored_and_told, told, state()))

    def stored_and_told(told: dict[str, Any], state: dict[str, Any]) -> None:
        mirror.check(place)  # else the checkpoint would go to an empty folder where the storage is not mounted
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(Path(folder) / "state.pt", state)
            ray.train.report(told, checkpoint=ray.train.Checkpoint.from_directory(folder))

    # Ray's report waits for the other ranks and for the disk: behind the training, in the same order on every rank.
    with _process_group(rank, world, device), checkpoint.Behind() as behind:
        return trial.work(job, device, rank, world, resume, report)


@contextlib.contextmanager
def _process_group(rank: int, world: int, device: str) -> Any:
    """Joins the workers of a trial; one worker alone needs nobody."""
    if world == 1:
        yield
        return
    import torch.distributed as dist

    backend = "nccl" if device != "cpu" else "gloo"
    dist.init_process_group(backend, init_method="env://", rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def free_address() -> tuple[str, int]:
    """Host and a free port of this process, where the others meet."""
    with socket.socket() as chosen:
        chosen.bind(("", 0))
        return socket.gethostbyname(socket.gethostname()), chosen.getsockname()[1]


def meet_at(host: str, port: int) -> None:
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = host, str(port)
