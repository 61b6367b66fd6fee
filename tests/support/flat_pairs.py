"""A tiny data set of flat colors, settings of tiny trainings on it, and a model that copies."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from flashcocos.config import ModelConfig
from flashcocos.train.data import Item
from flashcocos.train.networks import CoCosNet
from flashcocos.train.settings import Settings

SUPERVISED = {"image": 1.0, "class_color": 0.5, "warp": 0.5, "label": 0.1}
# terms that are plain means over the samples: micro-batches and processes make no difference but rounding
PLAIN = {"image": 1.0, "warp": 0.5, "label": 0.1}


class FlatPairs:
    """Blocks of flat color: the target has the exemplar's colors, in its own blocks."""

    def __init__(self, count: int = 5, size: int = 64, dtype: type[np.floating[Any]] = np.float32) -> None:
        self.count, self.size, self.dtype = count, size, dtype
        self.epoch = 0

    def __len__(self) -> int:
        return self.count

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> Item:
        rng = np.random.default_rng(index)
        colors = rng.uniform(-0.9, 0.9, (12, 3)).astype(self.dtype)
        blocks = rng.integers(0, 4, (2, 4, 4), dtype=np.uint8)
        label, exemplar_label = blocks.repeat(self.size // 4, 1).repeat(self.size // 4, 2)
        return {
            "label": label,
            "exemplar_label": exemplar_label,
            "exemplar": colors[exemplar_label].transpose(2, 0, 1),
            "image": colors[label].transpose(2, 0, 1),
            "has_target": True,
            "self_reference": np.float32(index % 2),
        }


def copying_model(brightness: float = 0.0) -> CoCosNet:
    """A model that copies the exemplar, as equal positions alone attract each other, and adds `brightness`."""
    model = CoCosNet(
        ModelConfig.preset("tiny", position_frequencies=4, warp_residual=True, warp_upsampling="pixel_shuffle")
    ).eval()
    with torch.no_grad():
        for branch in (model.correspondence.theta, model.correspondence.phi):
            branch.weight.zero_()
            branch.bias.zero_()
            branch.weight[:, -16:] = torch.eye(16)[..., None, None]
        model.generator.last.weight.zero_()
        model.generator.last.bias.copy_(torch.tensor([brightness, brightness, brightness, 30.0]))
    return model


_SUPERVISED: dict[str, Any] = {
    "init": "matched",
    "model": {"preset": "tiny", "warp_residual": True, "position_frequencies": 2},
    "supervised": SUPERVISED,
    "data": {"kind": "avatars"},
    "optimizer": {"lr": 1e-3, "ttur": False, "beta1": 0.9, "eps": 1e-8, "spectral_norm": False},
    "schedule": {"steps": 6},
    "run": {"batch": 2, "micro_batch": 0, "ema_decay": 0.99, "workers": 0, "device": "cpu"},
}
_ADVERSARIAL: dict[str, Any] = {
    **_SUPERVISED,
    "init": "upstream",
    "perceptual": "none",
    "model": {"preset": "tiny", "attention": True},
    "loss": {"preset": "celebahq"},
    "supervised": {},
    "optimizer": {"discriminator_width": 4},
}


def settings(**changes: dict[str, Any] | str) -> Settings:
    """A supervised training of 6 steps of 2 samples; `changes` are added to the sections, or replace strings."""
    return _changed(_SUPERVISED, changes)


def adversarial(**changes: dict[str, Any] | str) -> Settings:
    """As `settings`, of the published objective less the pretrained features, with upstream's optimizers."""
    return _changed(_ADVERSARIAL, changes)


def _changed(tables: dict[str, Any], changes: dict[str, Any]) -> Settings:
    merged = {
        name: {**tables.get(name, {}), **change} if isinstance(change, dict) else change
        for name, change in changes.items()
    }
    return Settings.from_tables({**tables, **merged})
