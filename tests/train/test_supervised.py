"""Supervised training: exact resume, the terms of the loss, schedules, and what happens when things go wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flashcocos.config import ModelConfig
from flashcocos.errors import CheckpointError, InputError
from flashcocos.train import supervised
from flashcocos.train.checkpoint import load_model, read_metadata
from flashcocos.train.data.avatars import AvatarOptions
from flashcocos.train.networks import CoCosNet
from flashcocos.train.supervised import (
    SupervisedConfig,
    SupervisedTrainer,
    TrainingError,
    class_colour_error,
    loss_terms,
)

TINY = ModelConfig.preset("tiny", warp_skip=True, position_waves=2)
CONFIG = SupervisedConfig(steps=6, batch=2, decay=0.5)


class FakePairs:
    """Blocks of flat colour: the target has the exemplar's colours, in its own blocks."""

    def __init__(self, count: int = 5, size: int = 64) -> None:
        self.count, self.size = count, size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng(index)
        colours = rng.uniform(-0.9, 0.9, (12, 3)).astype(np.float32)
        label, exemplar_label = rng.integers(0, 4, (2, 4, 4), dtype=np.uint8).repeat(self.size // 4, 1).repeat(
            self.size // 4, 2
        )  # fmt: skip
        return {
            "label": label,
            "exemplar_label": exemplar_label,
            "exemplar": colours[exemplar_label].transpose(2, 0, 1),
            "image": colours[label].transpose(2, 0, 1),
            "has_target": True,
            "self_reference": np.float32(0),
        }


def trainer(folder: Path, config: SupervisedConfig = CONFIG, pairs: FakePairs | None = None) -> SupervisedTrainer:
    return SupervisedTrainer(TINY, pairs or FakePairs(), config, folder)  # type: ignore[arg-type]


def test_six_steps_equal_three_a_resume_and_three(tmp_path: Path) -> None:
    straight = trainer(tmp_path / "straight")
    losses = [straight.train_step() for _ in range(6)]
    first = trainer(tmp_path / "pieces")
    for _ in range(3):
        first.train_step()
    first.save()
    torch.manual_seed(99)  # the global state must not matter
    second = trainer(tmp_path / "pieces")
    assert second.step == 3
    assert [second.train_step() for _ in range(3)] == losses[3:]
    for name in ("model", "average"):
        expected = getattr(straight, name).state_dict()
        for key, value in getattr(second, name).state_dict().items():
            assert torch.equal(value, expected[key]), f"{name}.{key}"
    moments = [state["exp_avg_sq"] for state in second.optimiser.state.values()]
    assert all(map(torch.equal, moments, [state["exp_avg_sq"] for state in straight.optimiser.state.values()]))


def test_run_learns_saves_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = trainer(tmp_path, dataclasses.replace(CONFIG, steps=30, rate=3e-3))
    first.run(log_steps=10)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[-1].startswith("step 30/30: image ")
    assert "it/s" in lines[-1]
    early, late = (float(line.split("image ")[1].split(",")[0]) for line in (lines[0], lines[-1]))
    assert late < early
    assert read_metadata(tmp_path / supervised.MODEL)[1]["step"] == 30
    shipped = load_model(tmp_path / supervised.MODEL).state_dict()
    assert all(torch.equal(shipped[name], value) for name, value in first.average.state_dict().items())
    again = trainer(tmp_path, dataclasses.replace(CONFIG, steps=31))
    again.run()
    assert again.step == 31


def test_train_avatars_takes_pairs_with_targets_of_the_presets_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(split: str, options: AvatarOptions, *, count: int, folder: Path) -> FakePairs:
        assert (split, options.size, count, folder) == ("train", 64, 3, tmp_path / "cache")
        assert options.retrieved + options.pseudo == 1
        return FakePairs(count)

    monkeypatch.setattr(supervised, "AvatarPairs", fake)
    config = SupervisedConfig(steps=1, batch=1)
    path = supervised.train_avatars(tmp_path, config, preset="tiny", pairs=3, cache=tmp_path / "cache")
    assert load_model(path).config == ModelConfig.preset("tiny")


def test_ctrl_c_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = trainer(tmp_path)
    step = running.train_step

    def interrupted() -> dict[str, float]:
        if running.step == 2:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(running, "train_step", interrupted)
    running.run()
    assert trainer(tmp_path).step == 2


def test_saves_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = trainer(tmp_path)
    saves: list[int] = []
    monkeypatch.setattr(running, "save", lambda: saves.append(running.step))
    running.run(save_minutes=0)
    assert saves == [1, 2, 3, 4, 5, 6, 6]


def test_a_term_that_is_not_finite_is_named(tmp_path: Path) -> None:
    running = trainer(tmp_path)
    with torch.no_grad():
        running.model.generator.last.bias.fill_(float("nan"))
    with pytest.raises(TrainingError, match="step 0: the loss term 'image' is nan"):
        running.train_step()
    assert running.step == 0


def test_the_learning_rate_falls_over_the_last_part(tmp_path: Path) -> None:
    running = trainer(tmp_path, SupervisedConfig(steps=10, batch=2, rate=1.0, decay=0.4))
    assert [round(running.rate(step), 3) for step in range(10)] == [1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert trainer(tmp_path, SupervisedConfig(steps=10, batch=2, rate=1.0, decay=0)).rate(9) == 1.0


def test_an_epoch_shows_every_pair_once(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, mirror=0.0, recolour=0.0)
    running = trainer(tmp_path, config, FakePairs(6))
    for epoch in range(2):
        shown = torch.cat([running.batch(3 * epoch + step)["image"] for step in range(3)])
        expected = torch.stack([torch.as_tensor(FakePairs()[index]["image"]) for index in range(6)])
        assert (torch.cdist(shown.flatten(1), expected.flatten(1)) < 1e-3).sum(0).tolist() == [1] * 6


def test_mirroring_and_recolouring_keep_a_pair_together(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, batch=5, mirror=1.0, recolour=1.0)
    batch = trainer(tmp_path, config).batch(0)
    plain = trainer(tmp_path, dataclasses.replace(config, mirror=0.0, recolour=0.0)).batch(0)
    assert torch.equal(batch["label"], plain["label"].flip(-1))
    assert torch.equal(batch["image"].sort(1).values, plain["image"].flip(-1).sort(1).values)
    assert not torch.equal(batch["image"], plain["image"].flip(-1))
    for row in range(5):
        colours = {}
        for kind, label in (("exemplar", "exemplar_label"), ("image", "label")):
            for name in batch[label][row].unique().tolist():
                colours[kind, name] = batch[kind][row][:, batch[label][row] == name].mean(1)
        for name in range(4):
            torch.testing.assert_close(colours["exemplar", name], colours["image", name])


def test_half_steps_see_half_the_size(tmp_path: Path) -> None:
    running = trainer(tmp_path, dataclasses.replace(CONFIG, half_steps=1), FakePairs(5, size=128))
    small, large = running.batch(0), running.batch(1)
    assert small["label"].shape == (2, 64, 64)
    assert small["image"].shape == (2, 3, 64, 64)
    assert large["exemplar"].shape == (2, 3, 128, 128)


def test_a_perfect_warp_and_image_cost_nothing() -> None:
    model = CoCosNet(dataclasses.replace(TINY, position_waves=4, warp_upsampling="patch")).eval()
    with torch.no_grad():
        for branch in (model.correspondence.theta, model.correspondence.phi):
            branch.weight.zero_()
            branch.bias.zero_()
            branch.weight[:, -16:] = torch.eye(16)[..., None, None]
        model.generator.last.weight.zero_()
        model.generator.last.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 30.0]))
        plane = torch.zeros(1, 64, 64, dtype=torch.uint8)
        image = torch.full((1, 3, 64, 64), 0.25)
        batch = {"label": plane, "exemplar_label": plane, "exemplar": image, "image": image}
        terms = loss_terms(model, batch, SupervisedConfig())
        assert all(abs(float(term)) < 1e-4 for term in terms.values()), terms
        batch["exemplar_label"] = plane + 1
        assert float(loss_terms(model, batch, SupervisedConfig(label_weight=1.0))["label"]) > 5


def test_class_colour_error_counts_small_classes_like_large_ones() -> None:
    label = torch.zeros(1, 3, 8, 8)
    label[:, 0] = 1
    label[:, 0, 0, 0], label[:, 1, 0, 0] = 0, 1  # one pixel of class 1, none of class 2
    target = torch.zeros(1, 3, 8, 8)
    image = target.clone()
    image[:, :, 0, 0] = 0.5
    assert float(class_colour_error(image, target, label)) == pytest.approx(0.25)


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    trainer(tmp_path).save()
    other = dataclasses.replace(TINY, ngf=5)
    with pytest.raises(CheckpointError, match="another model configuration"):
        SupervisedTrainer(other, FakePairs(), CONFIG, tmp_path)  # type: ignore[arg-type]
    path = tmp_path / supervised.CHECKPOINT
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be resumed"):
        trainer(tmp_path)


def test_bad_settings(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1 pairs do not fill a batch of 2"):
        trainer(tmp_path, pairs=FakePairs(1))
    for field, value in {"steps": 0, "batch": 0, "rate": 0.0, "ema": 1.0, "decay": 1.5, "half_steps": -1}.items():
        with pytest.raises(InputError, match=rf"SupervisedConfig\.{field}: .* got {value}"):
            SupervisedConfig(**{field: value})
