"""The planned peak of a training step is that of the step itself, and the largest batch is the largest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flat_pairs import FlatPairs, adversarial, settings

from flashcocos.cli import main
from flashcocos.errors import InputError
from flashcocos.train import trainer as trainer_module
from flashcocos.train.memory_estimate import LiveBytes, Planner
from flashcocos.train.settings import read_settings
from flashcocos.train.trainer import Process, Trainer

PLAIN = {"spectral_norm": False, "discriminator_width": 4}  # spectral norms take long to make


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(settings())


def test_storages_count_while_they_live() -> None:
    with LiveBytes() as live:
        first = torch.zeros(200)
        view = first[:10].reshape(2, 5)
        live.assign([view], "parameters")
        second = first + 1
        del second
        assert live.peak == (1024, 0, 0, 1024)
        live.restart()
        assert live.peak == (1024, 0, 0, 0)
        del first
        small = torch.ones(1)
        assert live.peak == (1024, 0, 0, 512)
        del view
        live.restart()
        assert live.peak.total == 512
    assert small.item() == 1


def test_the_plan_is_what_a_step_takes(planner: Planner) -> None:
    planned = planner.peak([2, 2])
    assert planned == Planner(settings(), fake=False).peak([2, 2])
    assert planned.activations > planned.parameters > planned.gradients > 0 < planned.optimizer
    assert (planner.peak(2).gradients, planned.optimizer) == (0, planner.peak(2).optimizer)


def test_the_plan_of_checkpointing_and_of_adam_as_on_a_gpu() -> None:
    run = {"checkpointing": True, "device": "auto", "ema": 0.0}
    chosen = adversarial(optimizer=PLAIN, model={"preset": "tiny-channels"}, run=run)
    assert Planner(chosen).peak(3) == Planner(chosen, fake=False).peak(3)


def test_the_plan_of_the_published_objective() -> None:
    chosen = adversarial(optimizer=PLAIN, perceptual="vgg", loss={"preset": "ade20k"}, run={"ema": 0.0})
    planned, found = (Planner(chosen, fake=fake).peak(2) for fake in (True, False))
    assert planned[:3] == found[:3]  # no file of VGG19 was needed
    # the CPU's mse_loss leaves its mean in a storage as large as what it compares: r52 in place of one block
    assert planned.activations == found.activations - (2 * 512 * 4 * 4 * 4 - 512)


def test_what_does_not_matter_and_what_does(planner: Planner) -> None:
    run = {"precision": "float16"}
    planned = Planner(settings(init="missing.safetensors", schedule={"half_steps": 100}, run=run)).peak(2)
    assert planned == Planner(settings(run={"precision": "bfloat16"}), fake=False).peak(2)
    assert planned[:3] == planner.peak(2)[:3]
    assert planned.activations < 0.9 * planner.peak(2).activations


def test_the_largest_batch_is_the_largest(planner: Planner) -> None:
    three, four = planner.peak(3), planner.peak(4)
    assert planner.largest_batch(three.total) == planner.largest_batch(four.total - 1) == (3, three)
    assert planner.largest_batch(four.total) == (4, four)
    assert planner.largest_batch(planner.peak(1).total)[0] == 1
    assert planner.largest_batch(planner.peak(1).total - 1) == (0, planner.peak(1))


@pytest.mark.parametrize("budget", [0, -1.0, float("nan")])
def test_a_budget_is_positive(planner: Planner, budget: float) -> None:
    with pytest.raises(InputError, match="expected a positive number of bytes"):
        planner.largest_batch(budget)


def test_the_command_line_reads_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer_module, "open_data", None)
    config = tmp_path / "small.toml"
    config.write_text(settings(run={"batch": 2, "micro_batch": 2, "ema": 0.0}).to_toml())
    assert main(["train", str(config), "--plan", "0.001"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("avatars, 64 x 64, float32: peak memory of a training step")
    assert "0.001 GiB" in text
    rows = [line.split()[1:] for line in text.splitlines() if line.startswith("checkpointing")]
    assert [row[:2] for row in rows] == [
        ["off", "1"], ["off", "2"], ["on", "1"], ["on", "2"], ["off", "none"], ["on", "none"]
    ]  # fmt: skip
    assert float(rows[3][2]) < float(rows[1][2])
    assert "run.checkpointing false: " in text
    assert "GiB in 1 x 2 samples" in text
    assert [path.name for path in tmp_path.iterdir()] == ["small.toml"]
    for words, message in (
        (["--plan", "8", "0"], "expected a positive number of GiB, got 0"),
        (["--plan", "8", "-o", "folder"], "--plan writes nothing; leave --output out"),
        (["--set", "run.batch=5", "--plan", "8"], "run.batch: 5 is no multiple"),
    ):
        assert main(["train", str(config), *words]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, on which this has never run")
def test_the_plan_on_a_gpu(tmp_path: Path) -> None:
    changes = ["perceptual=none", "run.batch=2", "run.micro_batch=0", "run.workers=0", "schedule.steps=9"]
    chosen = read_settings("ade20k", changes)
    planned = Planner(chosen).peak(2).total
    before = torch.cuda.memory_allocated()
    running = Trainer(chosen, FlatPairs(2, 256), tmp_path, Process(device=torch.device("cuda")))
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        running.train_step(running.steps[0])
    # workspaces of the libraries, and what the warp holds, come on top
    assert planned <= torch.cuda.max_memory_allocated() - before <= 1.2 * planned
