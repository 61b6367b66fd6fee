"""Ray: joining a cluster, and `flashcocos translate --ray`, a folder on all of its machines."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..config import Size
from ..errors import BackendError, printable
from ..preprocess.images import PathLike
from ..remote import is_remote, to_path
from .folder import JobRunner, Plan, Summary, plan_folder
from .jobs import FolderRequest, Job
from .translator import Translator

LOCAL = "local"
_OBJECT_STORE = 128 << 20  # bytes, for paths and reports alone; Ray's own choice is a third of the memory
_BLOCK = 16  # jobs that an actor takes at a time, mostly of one exemplar
_MAX_BLOCKS = 10000
_SILENCE_S = 3600  # without a finished block; Ray's pools have been seen to hang after many faults
_LOST_STARTS = 3  # actors that die in turn while they start, as with their machine, before the job fails


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """Be a driver of a Ray cluster.

    Args:
        address: HOST:PORT or "auto" for a cluster that runs; "local" to start one on this machine, until the end.

    Raises:
        BackendError: There is no cluster at `address`.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {}
    if address == LOCAL:
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray's default, of which it would warn
        options = {
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE,
            "_node_ip_address": "127.0.0.1",  # Ray binds the network's address otherwise
        }
    import ray

    host, _, port = address.rpartition(":")
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if re.fullmatch(r"[\w.-]+", host) and port.isdecimal():  # Ray would wait for a minute and more
            socket.create_connection((host, int(port)), timeout=5).close()
        ray.init(address, log_to_driver=False, logging_level=logging.WARNING, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise BackendError(
            f"no Ray cluster at {address}: {printable(error)}; start one, with RAY_AUTH_MODE and token as here"
        ) from error
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own aborts
        yield
    finally:
        ray.shutdown()


def resources(device: str, threads: int | None, processes: int = 0) -> tuple[int, int, dict[str, float]]:
    """How a connected cluster is shared out among processes that each hold a model.

    Args:
        device: As for `Translator`; "auto" is a GPU each where the cluster has any.
        threads: CPU threads of each, None for one, or for an equal share where the number of processes is given.
        processes: How many there are to be; 0 for as many as fit.

    Returns:
        Number of processes, threads of each, and what Ray reserves for each.
    """
    import ray

    total = ray.cluster_resources()
    cores = int(total.get("CPU", 1))
    largest = max(int(node["Resources"].get("CPU", 1)) for node in ray.nodes() if node["Alive"])
    threads = threads or (min(largest, max(1, cores // processes)) if processes else 1)
    if device == "cuda" or (device == "auto" and total.get("GPU")):
        return processes or max(1, int(total.get("GPU", 1))), threads, {"num_cpus": 1, "num_gpus": 1}
    return processes or max(1, cores // threads), threads, {"num_cpus": threads}


def translate_folder_on_ray(
    address: str, bundle: Bundle, options: dict[str, Any], request: FolderRequest, progress: bool = False
) -> Summary:
    """As `translate_folder`, on a Ray cluster whose machines all see the files by the same paths.

    The files are the truth and what Ray returns are reports: a process or machine that dies has its jobs done again
    elsewhere, and every file is written whole or not at all.

    Args:
        address: As for `connected`.
        bundle: The model.
        options: Of `Translator`. An actor has one thread of the CPU unless `num_threads` says otherwise, or one GPU.
        request: As for `translate_folder`.
        progress: As for `translate_folder`.

    Returns:
        What was written, and what failed.

    Raises:
        InputError: The request makes no sense; nothing has been written then.
        BackendError: There is no such cluster, or its actors cannot open the model or have stopped answering.
    """
    names = ("inputs", "exemplars", "exemplar_labels", "output", "pairs")
    paths: dict[str, Any] = {name: _everywhere(getattr(request, name)) for name in names}
    request = dataclasses.replace(request, **paths)
    plan = plan_folder(bundle, request)
    try:
        with connected(address):
            results = _run(plan, bundle, options, request) if plan.jobs else iter(())
            return plan.finish(results, progress)
    finally:
        plan.clean()


def _run(
    plan: Plan, bundle: Bundle, options: dict[str, Any], request: FolderRequest
) -> Iterator[tuple[Job, str | None]]:
    """The jobs as a Ray data set of paths, through a pool of actors."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = _SILENCE_S
    context.max_consecutive_actor_init_deaths = _LOST_STARTS
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what fails is raised, too
    jobs = sorted(plan.jobs, key=lambda job: (str(job.exemplar), str(job.exemplar_label)))  # stable within an exemplar
    rows = [{"index": index, **_row(job)} for index, job in enumerate(jobs)]
    blocks = min(_MAX_BLOCKS, -(-len(rows) // _BLOCK))
    actors, threads, reserved = resources(options["device"], options["num_threads"])
    model = {"model": str(bundle.path.absolute()), "options": {**options, "num_threads": threads}}
    reports = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
        _Actor,
        fn_constructor_kwargs={**model, "size": request.size, "save": sorted(request.save), "scratch": plan.scratch},
        compute=ray.data.ActorPoolStrategy(size=min(actors, blocks)),
        batch_size=_BLOCK,
        **reserved,
    )
    try:
        for batch in reports.iter_batches(batch_size=None, batch_format="numpy"):
            for index, reason in zip(batch["index"], batch["reason"], strict=True):
                yield jobs[index], str(reason) or None
    except (ray.exceptions.RayError, ray.data.exceptions.ExecutionTimeoutError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise BackendError(f"the Ray job failed: {reason}; what is written stays: run again with --resume") from error


class _Actor:
    """A model in a process of the cluster."""

    def __init__(self, model: str, options: dict[str, Any], size: Size, save: list[str], scratch: Path | None) -> None:
        os.environ["NUMBA_NUM_THREADS"] = str(options["num_threads"])  # numba reads it as it is imported
        self._runner = JobRunner(Translator(model, **options), size, save, scratch)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Do the jobs of a block; a report for each."""
        rows = zip(*(batch[field.name] for field in dataclasses.fields(Job)), strict=True)
        return {"index": batch["index"], "reason": [self._runner.run(_job(*row)) or "" for row in rows]}


def _row(job: Job) -> dict[str, str]:
    """A job as text; "" for no exemplar label."""
    return {name: str(path or "") for name, path in vars(job).items()}


def _job(label: str, exemplar: str, exemplar_label: str, output: str) -> Job:
    """The inverse."""
    return Job(to_path(label), to_path(exemplar), to_path(exemplar_label) if exemplar_label else None, to_path(output))


def _everywhere(path: PathLike | None) -> Path | None:
    """`path` as it means the same in every process of the cluster."""
    place = None if path is None else to_path(path)
    return place if place is None or is_remote(place) else place.absolute()
