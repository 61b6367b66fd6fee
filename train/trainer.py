"""The training loop, for the published objective and for data with exact targets alike.

One step of the model, then one of the discriminator on the pictures that the first has made (arXiv 2004.05571, section
4, and the public code). A network that no term needs is not built. Runs on the CPU, one GPU or several (`torchrun`,
DistributedDataParallel). Every random choice follows from (seed, step), so a resumed run makes the choices of an
uninterrupted one: on the CPU with the same bits, on a GPU up to the order in which its libraries sum.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import math
import operator
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ..errors import CheckpointError, FlashcocosError, InputError
from ..files import atomic_path, require_file
from .batches import Batch, Steps, open_data
from .checkpoint import load_model, save_model
from .data import PairData
from .device import torch_device
from .logger import TrainLogger
from .losses import LossWeights
from .networks import CoCosNet, Discriminator, Vgg19, initialize, spectral
from .networks.correspondence import ResidualBlock
from .networks.growth import GROWABLE, grown_state
from .networks.layers import SpadeBlock, add_spectral_norm, folded_state
from .networks.vgg_weights import load_features
from .objective import GeneratorPass, discriminator_pass, generator_pass
from .settings import FRESH, Settings, read_settings
from .supervised import class_shares, supervised_terms

CHECKPOINT, MODEL, SETTINGS = "checkpoint.pt", "model.safetensors", "settings.toml"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ECHO = 2.0  # seconds within which torchrun passes on the Ctrl-C that its processes have had from the terminal
_PATIENCE = datetime.timedelta(hours=1)  # of the other processes, while the first renders the data set


class TrainingError(FlashcocosError, RuntimeError):
    """Training cannot go on: a term of the loss is no longer finite."""


class Process(NamedTuple):
    """One of `world` processes that train together, `rank` counting from 0, and its device."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")


class StepResult(NamedTuple):
    """Weighted terms, means over micro-batches and processes; this process's last micro-batch and its pictures."""

    terms: dict[str, float]
    batch: Batch
    warped_image: Tensor
    image: Tensor


def train(settings: Settings, folder: str | os.PathLike[str]) -> int:
    """Train a model, or go on with a training that was stopped.

    Args:
        settings: of the training.
        folder: gets the model file, the checkpoint, the effective settings and TensorBoard's logs. All processes of a
            training must see the same one. A checkpoint in it is where the training goes on.

    Returns:
        The number of the signal that stopped the training, or 0.

    Raises:
        InputError: data are missing, cannot be used or fill no batch.
        CheckpointError: the checkpoint or a file of weights is damaged or of another network.
        BackendError: the device or a package is missing.
        TrainingError: a term of the loss is no longer finite.
    """
    with process_group(settings.run.device) as process:
        if process.rank:
            dist.barrier()  # the first process renders, then the others read
        data = open_data(settings)
        if process.world > 1 and not process.rank:
            dist.barrier()
        return Trainer(settings, data, folder, process).run()


@contextlib.contextmanager
def process_group(device: str) -> Iterator[Process]:
    """This process's place among those that `torchrun` started, joined with them; alone without it.

    device: "auto", "cpu" or "cuda". Raises `BackendError` for "cuda" without a GPU.
    """
    kind = torch_device(device)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Process(0, 1, torch.device(kind))
        return
    place = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(place)
    backend, device_id = ("nccl", place) if kind == "cuda" else ("gloo", None)
    dist.init_process_group(backend, timeout=_PATIENCE, device_id=device_id)
    try:
        yield Process(dist.get_rank(), world, place)
    finally:
        dist.destroy_process_group()


class GeneratorStep(nn.Module):
    """The model's pass with all its terms as one module, as DistributedDataParallel needs it.

    The frozen networks are no submodules: their gradients are none of this step's.
    """

    def __init__(
        self,
        model: CoCosNet,
        discriminator: Discriminator | None,
        vgg: Vgg19 | None,
        settings: Settings,
        warp: str = "auto",
    ) -> None:
        super().__init__()
        self.model, self.settings, self.warp = model, settings, warp
        self.frozen = (discriminator, vgg)

    def forward(self, batch: Batch) -> GeneratorPass:
        """A micro-batch on the device -> weighted terms and pictures."""
        label, exemplar_label = (self.model.label_planes(x) for x in (batch.label, batch.exemplar_label))
        batch = batch._replace(label=label, exemplar_label=exemplar_label)
        weights = self.settings.supervised
        stride = self.model.config.warp_stride
        carry = class_shares(exemplar_label, stride) if weights.label else None
        result = generator_pass(self.model, *self.frozen, self.settings.loss, batch, carry, self.warp)
        image, warped_image = result.image.float(), result.warped_image.float()
        with torch.autocast(label.device.type, enabled=False):  # sums over a picture leave the range of float16
            terms = supervised_terms(weights, label, batch.image, batch.has_target, image, warped_image, result.carried)
        return result._replace(terms=result.terms | terms)


class DiscriminatorStep(nn.Module):
    """The discriminator's pass as one module."""

    def __init__(self, discriminator: Discriminator, weights: LossWeights) -> None:
        super().__init__()
        self.discriminator, self.weights = discriminator, weights

    def forward(self, label: Tensor, fake: Tensor, real: Tensor) -> dict[str, Tensor]:
        """Label planes, detached fakes and true images -> weighted terms."""
        return discriminator_pass(self.discriminator, self.weights, label, fake, real)


class Trainer:
    """Networks, optimizers and moving average; `step` counts what is done. Resumes from `folder` if it can.

    Args:
        settings: of the training.
        data: of one size.
        folder: as of `train`.
        process: this one's place among several.
        vgg: the frozen feature network, in place of the one that the settings name.
        warp: the backend of `kernels.corr_warp`.
        clock: seconds, for saving now and then and for the second of two signals.

    Raises:
        CheckpointError: the checkpoint is damaged or of another model, or a model or VGG file does not fit.
        InputError: the data fill no batch.
    """

    def __init__(
        self,
        settings: Settings,
        data: PairData,
        folder: str | os.PathLike[str],
        process: Process | None = None,
        *,
        vgg: Vgg19 | None = None,
        warp: str = "auto",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self.settings, self.folder, self.process = settings, Path(folder), process or Process()
        self.device = self.process.device
        self.steps = Steps(data, settings, self.process.rank, self.process.world)
        self.step = 0
        torch.manual_seed(settings.run.seed)
        resumes = (self.folder / CHECKPOINT).exists()
        self.model = start_model(msgspec.structs.replace(settings, init="matched") if resumes else settings)
        self._place(self.model)
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # the shapes of a phase are fixed, so that trying pays
            # tensor cores want it, and the warp's kernels read theta and phi as they come instead of packing them
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # its stubs lack it
        self.average: CoCosNet | None = None
        if settings.run.ema_decay:
            self.average = CoCosNet(settings.model).requires_grad_(False).eval()
            self._place(self.average)
            self.average.load_state_dict(folded_state(self.model))
        self.discriminator = start_discriminator(settings) if settings.loss.adversarial else None
        vgg = (vgg or load_features(settings.perceptual, settings.vgg)) if settings.needs_vgg else None
        for network in (self.discriminator, vgg):
            if network is not None:
                self._place(network)
        self.optimizers = self._make_optimizers()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.run.precision == "float16")
        if resumes:
            self._load()
        if settings.run.checkpointing:
            recompute_blocks(self.model)
        self._model_step = self._shared(GeneratorStep(self.model, self.discriminator, vgg, settings, warp))
        if self.discriminator is not None:
            self._discriminator_step = self._shared(DiscriminatorStep(self.discriminator, settings.loss))

    def run(self) -> int:
        """Train to the end; save every `run.save_minutes`, at the end and on Ctrl-C or SIGTERM.

        A second signal, a while later, stops at once and saves nothing. Where SIGINT was ignored before, as in a
        process that a script started with `&`, it stays ignored, as Python does it; SIGTERM still stops the training.
        A training that is finished already changes nothing and says so.

        Returns:
            The number of the signal that stopped it, or 0.
        """
        if self.step >= len(self.steps):
            if not self.process.rank:
                print(self._finished(), file=sys.stderr)
            return 0
        run, saved, stopped = self.settings.run, self.clock(), 0
        with self._logger() as log, _stop_signals(self.clock) as received:
            for pieces in self.steps.loader(self.step):
                result = self.train_step(pieces)
                if log is not None:
                    log.step(result.terms, self.optimizers["model"].param_groups[0]["lr"])
                    if self.step % run.image_steps == 0 or self.step in (1, len(self.steps)):
                        log.pictures(self.settings.model, result.batch, result.warped_image, result.image)
                    if self.clock() - saved >= 60 * run.save_minutes:
                        log.flush()
                        self.save()
                        saved = self.clock()
                if stopped := self._agreed(received[0] if received else 0):
                    break
            self.save()
            if stopped and log is not None:
                log.write(f"stopped and saved at step {self.step}; the same command goes on from here")
        return stopped

    def train_step(self, pieces: list[Batch]) -> StepResult:
        """One step of the model and one of the discriminator; `TrainingError` names a term that is not finite."""
        torch.manual_seed(self.settings.run.seed * 1_000_003 + self.step)
        for name, lr in self._learning_rates().items():
            self.optimizers[name].param_groups[0]["lr"] = lr
        pieces = [Batch(*(x.to(self.device, non_blocking=True) for x in piece)) for piece in pieces]
        for network in (self.model, self.discriminator):
            if network is not None:
                spectral.refine(network)
        terms, results = self._step_model(pieces)
        if self.discriminator is not None:
            terms |= self._step_discriminator(pieces, [result.image for result in results])
        self.scaler.update()
        self.step += 1
        if self.average is not None:
            decay = min(self.settings.run.ema_decay, self.step / (self.step + 9))
            with torch.no_grad():
                for name, mean in self.average.named_parameters():
                    mean.lerp_(operator.attrgetter(name)(self.model), 1 - decay)
        return StepResult(terms, pieces[-1], results[-1].warped_image, results[-1].image)

    def save(self) -> None:
        """Write the settings, the checkpoint and the model file, each atomically; the first process does it."""
        if self.process.rank:
            return
        with atomic_path(self.folder / SETTINGS) as temporary:
            temporary.write_text(self.settings.to_toml(), encoding="utf-8")
        state = {name: part.state_dict() for name, part in self._parts().items()}
        state |= {"model_config": self.settings.model.to_json(), "step": self.step}
        with atomic_path(self.folder / CHECKPOINT) as temporary:
            torch.save(state, temporary)
        provenance: dict[str, Any] = {"step": self.step, "training": self.settings.described()}
        save_model(self.folder / MODEL, self.average or self.model, provenance)

    def _step_model(self, pieces: list[Batch]) -> tuple[dict[str, float], list[GeneratorPass]]:
        if self.discriminator is not None:
            self.discriminator.requires_grad_(False)
        sums: dict[str, Tensor] = {}
        results = []
        for index, piece in enumerate(pieces):
            with self._synchronized(self._model_step, index + 1 == len(pieces)):
                with self._autocast():
                    result = self._model_step(piece)
                self._backward(result.terms, len(pieces), sums)
            results.append(GeneratorPass({}, result.image.detach(), result.warped_image.detach(), None))
        return self._update("model", sums), results

    def _step_discriminator(self, pieces: list[Batch], fakes: list[Tensor]) -> dict[str, float]:
        assert self.discriminator is not None
        self.discriminator.requires_grad_(True)
        sums: dict[str, Tensor] = {}
        for index, (piece, fake) in enumerate(zip(pieces, fakes, strict=True)):
            with self._synchronized(self._discriminator_step, index + 1 == len(pieces)):
                with self._autocast():
                    terms = self._discriminator_step(self.model.label_planes(piece.label), fake, piece.image)
                self._backward(terms, len(pieces), sums)
        return self._update("discriminator", sums)

    def _backward(self, terms: dict[str, Tensor], count: int, sums: dict[str, Tensor]) -> None:
        """Accumulate the gradients of one of `count` micro-batches, and its terms in `sums`."""
        weighted = {name: term.float() / count for name, term in terms.items()}
        loss = self.scaler.scale(torch.stack(list(weighted.values())).sum())
        loss.backward()  # type: ignore[no-untyped-call]  # of torch
        for name, term in weighted.items():
            sums[name] = sums.get(name, 0.0) + term.detach()

    def _update(self, name: str, sums: dict[str, Tensor]) -> dict[str, float]:
        """Step the optimizer `name` unless a term, averaged over the processes, is not finite."""
        means = torch.stack(list(sums.values()))
        if self.process.world > 1:
            dist.all_reduce(means)
            means /= self.process.world
        terms = dict(zip(sums, means.tolist(), strict=True))
        for term, value in terms.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"step {self.step}: the loss term {term!r} is {value}; lower optimizer.lr"
                    f"{' or use bfloat16' if self.scaler.is_enabled() else ''}, and resume from the checkpoint"
                )
        self.scaler.step(self.optimizers[name])
        self.optimizers[name].zero_grad(set_to_none=True)
        return terms

    def _place(self, network: nn.Module) -> None:
        """Move `network`, made on the CPU, to the device; the fake tensors of `memory_estimate` cannot move."""
        if self.device.type != "cpu":
            network.to(self.device)

    def _make_optimizers(self) -> dict[str, torch.optim.Adam]:
        settings = self.settings.optimizer
        adam = functools.partial(torch.optim.Adam, betas=(settings.beta1, settings.beta2))
        optimizers = {"model": adam(self.model.parameters(), eps=settings.eps)}
        if self.discriminator is not None:
            optimizers["discriminator"] = adam(self.discriminator.parameters())
        return optimizers

    def _learning_rates(self) -> dict[str, float]:
        """The learning rate of each optimizer in this step."""
        settings = self.settings.optimizer
        lr = settings.lr * self.settings.schedule.factor(self.step, self.steps.per_epoch)
        slow, fast = (0.5, 2.0) if settings.ttur else (1.0, 1.0)
        return {name: lr * (slow if name == "model" else fast) for name in self.optimizers}

    def _autocast(self) -> torch.autocast:
        precision = self.settings.run.precision
        return torch.autocast(self.device.type, _DTYPES[precision], enabled=precision != "float32")

    def _shared(self, module: nn.Module) -> nn.Module:
        """`module`, its gradients averaged over the processes where there are several."""
        return module if self.process.world == 1 else DistributedDataParallel(module)

    def _synchronized(self, module: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients cross the processes once a step, with the last micro-batch."""
        if isinstance(module, DistributedDataParallel) and not last:
            return module.no_sync()
        return contextlib.nullcontext()

    def _agreed(self, stopped: int) -> int:
        """A signal that any of the processes has received."""
        if self.process.world == 1:
            return stopped
        flag = torch.tensor(stopped, device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return int(flag)

    def _logger(self) -> contextlib.AbstractContextManager[TrainLogger | None]:
        if self.process.rank:
            return contextlib.nullcontext()
        log = TrainLogger(self.folder, self.step, len(self.steps), self.settings.run.log_steps)
        millions = sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
        log.write(
            f"{self.settings.model.task}: {millions:.2f} million parameters, {len(self.steps.data)} samples, "
            f"{self.process.world} x {self.device.type}, steps {self.step} to {len(self.steps)}: {self.folder}"
        )
        return log

    def _finished(self) -> str:
        saved = read_settings(self.folder / SETTINGS).by_key()
        changed = [key for key, value in self.settings.by_key().items() if saved[key] != value]
        effect = f"; the changed {', '.join(changed)} had no effect" if changed else ""
        return (
            f"{self.folder}: finished already, step {self.step} of {len(self.steps)}{effect}: raise schedule.steps or "
            "schedule.epochs to train on, or give another folder to start again"
        )

    def _parts(self) -> dict[str, Any]:
        """Everything with a state, by its name in the checkpoint."""
        parts = {"model": self.model, "average": self.average, "discriminator": self.discriminator}
        optimizers = {f"optimizer of {name}": optimizer for name, optimizer in self.optimizers.items()}
        return {name: part for name, part in parts.items() if part is not None} | optimizers | {"scaler": self.scaler}

    def _load(self) -> None:
        path, parts = self.folder / CHECKPOINT, self._parts()
        try:
            require_file(path)
            state = torch.load(path, map_location=self.device, weights_only=True)
            if state["model_config"] != self.settings.model.to_json():
                raise CheckpointError(f"{path} is of another model configuration: give another folder, or delete it")
            if differing := sorted((set(state) - {"model_config", "step"}) ^ set(parts)):
                raise CheckpointError(
                    f"{path}: {differing[0]!r} is only in {'it' if differing[0] in state else 'these settings'}: give "
                    f"the settings of {self.folder / SETTINGS}, or another folder, with the model file as init"
                )
            for name, part in parts.items():
                if isinstance(part, torch.optim.Optimizer):  # its options are those of the settings
                    state[name]["param_groups"] = part.state_dict()["param_groups"]
                part.load_state_dict(state[name])
            self.step = state["step"]
        except FlashcocosError:
            raise
        except (OSError, RuntimeError, KeyError, TypeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            reason = " ".join(str(error).split())[:200]  # it can name every key
            raise CheckpointError(f"{path} cannot be resumed ({reason}): delete it to start again") from error


def start_model(settings: Settings) -> CoCosNet:
    """The model with the weights that `settings.init` asks for; `CheckpointError` for a file of another network.

    A file of a network that is narrower, or whose map is coarser, grows into it.
    """
    model = CoCosNet(settings.model)
    if settings.init == "upstream":
        initialize(model)
    elif settings.init == "matched":
        model.correspondence.phi.load_state_dict(model.correspondence.theta.state_dict())
    if settings.init not in FRESH:
        loaded = load_model(settings.init)
        given, wanted = (msgspec.structs.asdict(config) for config in (loaded.config, settings.model))
        for name in given:
            if name not in ("task", "image_size", *GROWABLE) and given[name] != wanted[name]:
                raise CheckpointError(
                    f"{settings.init}: its {name} is {given[name]!r}, expected model.{name}, {wanted[name]!r}"
                )
        try:
            model.load_state_dict(grown_state(model.state_dict(), loaded.state_dict()))
        except InputError as error:
            raise CheckpointError(f"{settings.init} cannot grow into the model of these settings: {error}") from error
    if settings.optimizer.spectral_norm:
        # after the weights, so that the estimates start from them
        add_spectral_norm(model)
        spectral.prepare(model)
    return model.train()


def start_discriminator(settings: Settings) -> Discriminator:
    """The discriminator with upstream's random weights."""
    discriminator = Discriminator(settings.model, settings.optimizer.discriminator_width)
    initialize(discriminator)
    add_spectral_norm(discriminator)
    spectral.prepare(discriminator)
    return discriminator.train()


def recompute_blocks(model: nn.Module) -> None:
    """Let the model's residual blocks keep their inputs alone and recompute the rest in the backward pass."""
    for module in model.modules():
        if isinstance(module, SpadeBlock | ResidualBlock):
            module.forward = functools.partial(  # type: ignore[method-assign]
                checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False
            )


@contextlib.contextmanager
def _stop_signals(clock: Callable[[], float]) -> Iterator[list[int]]:
    """A list that the first SIGINT or SIGTERM joins; one that comes `_ECHO` seconds later does what it always does.

    A SIGINT that is ignored stays so.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # Python takes signals in the main thread only
        return
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if usual[signal.SIGINT] is signal.SIG_IGN:
        del usual[signal.SIGINT]
    first = 0.0

    def restore() -> None:
        for number, handler in usual.items():
            signal.signal(number, handler)

    def note(number: int, _: FrameType | None) -> None:
        nonlocal first
        if not received:
            received.append(number)
            first = clock()
        elif clock() - first > _ECHO:
            restore()
            signal.raise_signal(number)

    for number in usual:
        signal.signal(number, note)
    try:
        yield received
    finally:
        restore()
