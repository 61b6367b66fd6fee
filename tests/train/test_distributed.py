"""Processes that train together: the gradients of one process with the whole batch, one model, one signal for all."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing
from flat_pairs import PLAIN, FlatPairs, adversarial, settings

from flashcocos.train.batches import Batch
from flashcocos.train.settings import Settings
from flashcocos.train.trainer import CHECKPOINT, Process, StepResult, Trainer, process_group

WORLD = 2
# warp_mask counts pixels within a process, so that it alone of these terms differs by more than rounding
CASES = {
    "supervised": settings(supervised=PLAIN | {"class_color": 0.0}, run={"batch": 4, "micro_batch": 1}),
    "adversarial": adversarial(loss={"preset": "celebahq", "warp_mask": 0.0}, run={"batch": 4}),
}
# in float64 but for the losses' scalars; float32 networks turn the order of a sum into half a percent of a gradient
ERROR = 1e-5


def trainer(chosen: Settings, folder: Path, process: Process | None = None) -> Trainer:
    return Trainer(chosen, FlatPairs(5, dtype=np.float64), folder, process)


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """New networks have weights of float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def first_gradients(running: Trainer) -> dict[str, torch.Tensor]:
    """What the optimizers are given in the first step, by network and parameter."""
    found = {}
    for name, optimizer in running.optimizers.items():

        def note(optimizer: torch.optim.Optimizer, *_: object, name: str = name) -> None:
            for index, parameter in enumerate(optimizer.param_groups[0]["params"]):
                found[f"{name} {index}"] = parameter.grad.clone()

        optimizer.register_step_pre_hook(note)
    running.train_step(running.steps[0])
    return found


def work(rank: int, store: str, folder: Path, names: list[str]) -> None:
    """One process of `WORLD`, as `torchrun` starts it."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store}
    with process_group("cpu") as process:
        assert (process.rank, process.world) == (rank, WORLD)
        for name in names:
            running = trainer(CASES[name], folder / name, process)
            torch.save(first_gradients(running), folder / f"{name}.{rank}.pt")
            running.save()
        interrupted(trainer(settings(), folder / "signal", process))


def interrupted(running: Trainer) -> None:
    """The second process alone gets a signal in its second step; both must stop behind it."""
    step = running.train_step

    def signalled(pieces: list[Batch]) -> StepResult:
        if running.process.rank == 1 and running.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(pieces)

    running.train_step = signalled  # type: ignore[method-assign]
    assert running.run() == signal.SIGTERM
    assert running.step == 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have left what they computed."""
    path = tmp_path_factory.mktemp("distributed")
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port
    del store  # its port is free again
    torch.multiprocessing.spawn(work, (str(port), path, list(CASES)), nprocs=WORLD)
    return path


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_gradients_of_one(name: str, folder: Path, tmp_path: Path) -> None:
    expected = first_gradients(trainer(CASES[name], tmp_path))
    one, other = (torch.load(folder / f"{name}.{rank}.pt", weights_only=True) for rank in range(WORLD))
    assert one.keys() == other.keys() == expected.keys()
    for network in {key.split()[0] for key in expected}:
        keys = [key for key in expected if key.startswith(network)]
        whole = torch.stack([expected[key].norm() for key in keys]).norm()
        assert whole > 0
        for key in keys:
            assert torch.equal(one[key], other[key]), key
            assert (one[key] - expected[key]).norm() <= ERROR * expected[key].norm() + 1e-9 * whole, key


def test_the_first_process_saves(folder: Path) -> None:
    step = torch.load(folder / "adversarial" / CHECKPOINT, weights_only=True)["step"]
    assert step == 1


def test_a_signal_to_one_process_stops_all(folder: Path) -> None:
    assert torch.load(folder / "signal" / CHECKPOINT, weights_only=True)["step"] == 2


def test_resume_in_another_number_of_processes(folder: Path) -> None:
    alone = trainer(CASES["adversarial"], folder / "adversarial")
    assert alone.step == 1
    alone.train_step(alone.steps[1])
