"""Supervised training on pairs whose exact target is known: no discriminator, no pretrained features.

The loss is L1 of the image and of the warped exemplar against the target, L1 of the mean colour of each class, and the
negative log-likelihood of the target's label under the warped exemplar label (arXiv 2004.05571, section 3.3, gives the
idea of supervising the warp). It is a fast start for the full objective, and enough for the small model that ships.

Every random choice follows from (seed, step), so a resumed run repeats an uninterrupted one exactly.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import ModelConfig
from ..errors import CheckpointError, FlashcocosError, InputError
from ..files import atomic_path
from ..kernels import corr_warp
from .checkpoint import save_model
from .data.avatars import AvatarOptions, AvatarPairs
from .networks import CoCosNet

CHECKPOINT, MODEL = "checkpoint.pt", "model.safetensors"
Batch = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class SupervisedConfig:
    """steps: optimiser steps in all; the learning rate is `rate`, and falls linearly to 0 over the last `decay` share.
    half_steps: first steps that see the pictures at half their size, a quarter of the work.
    mirror, recolour: chances of mirroring a whole pair and of permuting its red, green and blue.
    The last four fields weigh the terms of the loss.
    """

    steps: int = 10_000
    half_steps: int = 0
    batch: int = 8
    rate: float = 1e-3
    decay: float = 0.5
    ema: float = 0.998
    seed: int = 0
    mirror: float = 0.5
    recolour: float = 0.5
    image_weight: float = 1.0
    class_weight: float = 0.5
    warp_weight: float = 0.5
    label_weight: float = 0.1

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("half_steps", self.half_steps >= 0, "at least 0")
        self._require("rate", self.rate > 0, "more than 0")
        self._require("ema", 0 <= self.ema < 1, "from 0 to below 1")
        for name in ("decay", "mirror", "recolour"):
            self._require(name, 0 <= getattr(self, name) <= 1, "0 to 1")

    def _require(self, name: str, condition: bool, expected: str) -> None:
        if not condition:
            raise InputError(f"SupervisedConfig.{name}: expected {expected}, got {getattr(self, name)!r}")


class TrainingError(FlashcocosError, RuntimeError):
    """Training cannot go on: a term of the loss is no longer finite."""


class SupervisedTrainer:
    """A model, its optimiser and its moving average; `step` counts what is done. Resumes from `folder` if it can.

    pairs: a map-style data set as `AvatarPairs`, of one size, each pair with a target.
    Raises `CheckpointError` for a checkpoint that is damaged or of another model, `InputError` for too few pairs.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        pairs: AvatarPairs,
        config: SupervisedConfig,
        folder: str | os.PathLike[str],
        *,
        device: str = "cpu",
    ) -> None:
        if len(pairs) < config.batch:
            raise InputError(f"{len(pairs)} pairs do not fill a batch of {config.batch}")
        self.pairs, self.config, self.folder = pairs, config, Path(folder)
        self.device = torch.device(device)
        torch.manual_seed(config.seed)
        self.model = CoCosNet(model_config)
        # label and position enter both branches alike, so equal ones attract each other from the first step
        self.model.correspondence.phi.load_state_dict(self.model.correspondence.theta.state_dict())
        self.model.to(self.device)
        self.average = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=config.rate, betas=(0.9, 0.99))
        self.step = 0
        if (self.folder / CHECKPOINT).exists():
            self._load()

    def run(self, *, save_minutes: float = 10.0, log_steps: int = 20) -> None:
        """Train to `config.steps`; save every `save_minutes`, at the end and on Ctrl-C; print a line now and then."""
        saved = shown = time.monotonic()
        shown_step, sums = self.step, dict[str, float]()
        try:
            while self.step < self.config.steps:
                for name, value in self.train_step().items():
                    sums[name] = sums.get(name, 0.0) + value
                now = time.monotonic()
                if (count := self.step - shown_step) >= log_steps or self.step == self.config.steps:
                    terms = ", ".join(f"{name} {value / count:.4f}" for name, value in sums.items())
                    speed = count / (now - shown)
                    left = (self.config.steps - self.step) / speed / 60
                    print(
                        f"step {self.step}/{self.config.steps}: {terms}, {speed:.2f} it/s, {left:.0f} min left",
                        flush=True,
                    )
                    shown, shown_step, sums = now, self.step, {}
                if now - saved >= 60 * save_minutes:
                    self.save()
                    saved = now
        except KeyboardInterrupt:
            print(f"stopped at step {self.step}; the same command goes on from here", flush=True)
        self.save()

    def train_step(self) -> dict[str, float]:
        """One optimiser step; the value of each weighted term. `TrainingError` names a term that is not finite."""
        batch = self.batch(self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate(self.step)
        terms = loss_terms(self.model, batch, self.config)
        values = {name: float(term.detach()) for name, term in terms.items()}
        for name, value in values.items():
            if not torch.isfinite(torch.tensor(value)):
                raise TrainingError(
                    f"step {self.step}: the loss term {name!r} is {value}; lower `rate` and resume from the checkpoint"
                )
        self.optimiser.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        self.optimiser.step()
        self.step += 1
        decay = min(self.config.ema, self.step / (self.step + 9))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        return values

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        tail = self.config.decay * self.config.steps
        return self.config.rate * min(1.0, (self.config.steps - step) / tail if tail else 1.0)

    def batch(self, step: int) -> Batch:
        """The batch of a step, augmented, on the device."""
        config = self.config
        per_epoch = len(self.pairs) // config.batch
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(len(self.pairs), generator=_generator(config.seed, epoch))
        chosen = order[place * config.batch : (place + 1) * config.batch]
        items = [self.pairs[int(index)] for index in chosen]
        batch = {name: torch.stack([torch.as_tensor(item[name]) for item in items]) for name in items[0]}
        generator = _generator(config.seed + 1, step)
        mirrored = torch.rand(config.batch, generator=generator) < config.mirror
        for name in ("label", "exemplar_label", "exemplar", "image"):
            batch[name][mirrored] = batch[name][mirrored].flip(-1)
        for row in torch.nonzero(torch.rand(config.batch, generator=generator) < config.recolour).flatten():
            colours = torch.randperm(3, generator=generator)
            for name in ("exemplar", "image"):
                batch[name][row] = batch[name][row, colours]
        if step < config.half_steps:
            for name in ("exemplar", "image"):
                batch[name] = F.avg_pool2d(batch[name], 2)
            for name in ("label", "exemplar_label"):
                batch[name] = batch[name][:, ::2, ::2].contiguous()
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def save(self) -> None:
        """Write the checkpoint, and beside it the averaged weights as a model file, each atomically."""
        state = {
            "model_config": self.model.config.to_json(),
            "config": dataclasses.asdict(self.config),
            "step": self.step,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        with atomic_path(self.folder / CHECKPOINT) as temporary:
            torch.save(state, temporary)
        provenance: dict[str, Any] = {"step": self.step, "training": dataclasses.asdict(self.config)}
        save_model(self.folder / MODEL, self.average, provenance)

    def _load(self) -> None:
        path = self.folder / CHECKPOINT
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            if state["model_config"] != self.model.config.to_json():
                raise CheckpointError(f"{path} holds another model configuration: give another folder, or delete it")
            self.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.step = state["step"]
        except (OSError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{path} cannot be resumed ({error}): delete it to start again") from error


def train_avatars(
    folder: str | os.PathLike[str],
    config: SupervisedConfig | None = None,
    *,
    preset: str = "avatars-128",
    pairs: int = 20_000,
    cache: str | os.PathLike[str] | None = None,
    save_minutes: float = 10.0,
    device: str = "cpu",
) -> Path:
    """Train `preset` on the first `pairs` training pairs of the avatars data set; goes on where `folder` left off.

    Four of five pairs are retrieved, the others pseudo exemplars; all have a target. Renders what `cache` (the user's
    cache folder by default) lacks. Returns the model file in `folder`.
    Raises `InputError` for bad options, `BackendError` without the extra `avatars`, `CheckpointError` for a checkpoint
    of another model, `TrainingError` for a loss that is not finite.
    """
    model_config = ModelConfig.preset(preset)
    options = AvatarOptions(size=model_config.image_size, retrieved=0.8, pseudo=0.2)
    data = AvatarPairs("train", options, count=pairs, folder=cache)
    SupervisedTrainer(model_config, data, config or SupervisedConfig(), folder, device=device).run(
        save_minutes=save_minutes
    )
    return Path(folder) / MODEL


def loss_terms(model: CoCosNet, batch: Batch, config: SupervisedConfig) -> dict[str, Tensor]:
    """The weighted terms of the loss, scalars, by name."""
    label, target = model.label_planes(batch["label"]), batch["image"]
    exemplar_label = model.label_planes(batch["exemplar_label"])
    image, warped_image, warped_label = translate(model, label, batch["exemplar"], exemplar_label)
    likelihood = F.avg_pool2d(label, 4) * (warped_label.clamp_min(0) + 1e-4).log()
    return {
        "image": config.image_weight * F.l1_loss(image, target),
        "class": config.class_weight * class_colour_error(image, target, label),
        "warp": config.warp_weight * F.l1_loss(warped_image, target),
        "label": config.label_weight * -likelihood.sum(1).mean(),
    }


def translate(
    model: CoCosNet, label: Tensor, exemplar: Tensor, exemplar_label: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Image and warped image (B, 3, H, W), and the exemplar's label planes warped along, (B, nc, H/4, W/4)."""
    theta = model.encode_query(label)
    phi, values = model.encode_exemplar(exemplar, exemplar_label)
    values = torch.cat([values, F.avg_pool2d(exemplar_label, model.config.down_scale)], 1)
    warped = corr_warp(
        theta, phi, values, patch=model.config.patch, temperature=model.config.temperature, backend=backend
    )
    colours = model.config.warped_channels
    image, warped_image = model.synthesise(warped[:, :colours], label)
    return image, warped_image, warped[:, colours:]


def class_colour_error(image: Tensor, target: Tensor, label: Tensor) -> Tensor:
    """L1 between the mean colours of each class, every class that is present counting alike; label as planes."""
    area = label.sum((2, 3))  # (B, nc)
    difference = torch.einsum("bnhw,bchw->bnc", label, image - target) / area.clamp_min(1)[..., None]
    return difference.abs().mean(2).sum() / (area > 0).sum()


def _generator(seed: int, count: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + count)
