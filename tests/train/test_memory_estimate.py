"""The estimated peak of a training step is that of the step itself, and the largest batch is the largest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flat_pairs import FlatPairs, adversarial, settings

from flashcocos.cli import main
from flashcocos.errors import InputError
from flashcocos.train import trainer as trainer_module
from flashcocos.train.memory_estimate import LiveBytes, MemoryEstimate
from flashcocos.train.settings import read_settings
from flashcocos.train.trainer import Process, Trainer

PLAIN = {"spectral_norm": False, "discriminator_width": 4}  # spectral norms take long to make


@pytest.fixture(scope="module")
def estimate() -> MemoryEstimate:
    return MemoryEstimate(settings())


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


def test_the_estimate_is_what_a_step_takes(estimate: MemoryEstimate) -> None:
    estimated = estimate.peak([2, 2])
    assert estimated == MemoryEstimate(settings(), fake=False).peak([2, 2])
    assert estimated.activations > estimated.parameters > estimated.gradients > 0 < estimated.optimizer
    assert (estimate.peak(2).gradients, estimated.optimizer) == (0, estimate.peak(2).optimizer)


def test_the_estimate_of_checkpointing_and_of_adam_as_on_a_gpu() -> None:
    run = {"checkpointing": True, "device": "auto", "ema_decay": 0.0}
    chosen = adversarial(optimizer=PLAIN, model={"preset": "tiny-channels"}, run=run)
    assert MemoryEstimate(chosen).peak(3) == MemoryEstimate(chosen, fake=False).peak(3)


def test_the_estimate_of_the_published_objective() -> None:
    chosen = adversarial(optimizer=PLAIN, perceptual="vgg", loss={"preset": "ade20k"}, run={"ema_decay": 0.0})
    estimated, found = (MemoryEstimate(chosen, fake=fake).peak(2) for fake in (True, False))
    assert estimated[:3] == found[:3]  # no file of VGG19 was needed
    # the CPU's mse_loss leaves its mean in a storage as large as what it compares: r52 in place of one block
    assert estimated.activations == found.activations - (2 * 512 * 4 * 4 * 4 - 512)


def test_what_does_not_matter_and_what_does(estimate: MemoryEstimate) -> None:
    run = {"precision": "float16"}
    estimated = MemoryEstimate(settings(init="missing.safetensors", schedule={"low_res_steps": 100}, run=run)).peak(2)
    assert estimated == MemoryEstimate(settings(run={"precision": "bfloat16"}), fake=False).peak(2)
    assert estimated[:3] == estimate.peak(2)[:3]
    assert estimated.activations < 0.9 * estimate.peak(2).activations


def test_the_largest_batch_is_the_largest(estimate: MemoryEstimate) -> None:
    three, four = estimate.peak(3), estimate.peak(4)
    assert estimate.largest_batch(three.total) == estimate.largest_batch(four.total - 1) == (3, three)
    assert estimate.largest_batch(four.total) == (4, four)
    assert estimate.largest_batch(estimate.peak(1).total)[0] == 1
    assert estimate.largest_batch(estimate.peak(1).total - 1) == (0, estimate.peak(1))


@pytest.mark.parametrize("budget", [0, -1.0, float("nan")])
def test_a_budget_is_positive(estimate: MemoryEstimate, budget: float) -> None:
    with pytest.raises(InputError, match="expected a positive number of bytes"):
        estimate.largest_batch(budget)


def test_the_command_line_reads_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer_module, "open_data", None)
    config = tmp_path / "small.toml"
    config.write_text(settings(run={"batch": 2, "micro_batch": 2, "ema_decay": 0.0}).to_toml())
    assert main(["train", str(config), "--estimate-memory", "0.001"]) == 0
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
        (["--estimate-memory", "8", "0"], "expected a positive number of GiB, got 0"),
        (["--estimate-memory", "8", "-o", "folder"], "--estimate-memory writes nothing; leave --output out"),
        (["--set", "run.batch=5", "--estimate-memory", "8"], "run.batch: 5 is no multiple"),
    ):
        assert main(["train", str(config), *words]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, on which this has never run")
def test_the_estimate_on_a_gpu(tmp_path: Path) -> None:
    changes = ["perceptual=none", "run.batch=2", "run.micro_batch=0", "run.workers=0", "schedule.steps=9"]
    chosen = read_settings("ade20k", changes)
    estimated = MemoryEstimate(chosen).peak(2).total
    before = torch.cuda.memory_allocated()
    running = Trainer(chosen, FlatPairs(2, 256), tmp_path, Process(device=torch.device("cuda")))
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        running.train_step(running.steps[0])
    # workspaces of the libraries, and what the warp holds, come on top
    assert estimated <= torch.cuda.max_memory_allocated() - before <= 1.2 * estimated
