"""One training step: the model's pass with all terms of the published objective, the discriminator's, both updates.

    tiled     as `flashcocos train` runs it: no matrix in the warp nor in the self-attention
    matrix    the same step with both matrices formed and kept for the backward pass, as published

Samples are seeded noise, VGG19 has random weights: neither changes the time. Data loading is not in it. `estimate`
reports the memory of a step, and the largest batch, without running it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ...config import ModelConfig
from ...train.data import EqualItems, Item
from ..registry import Assets, Benchmark, Case, Sample
from .inputs import inputs

if TYPE_CHECKING:
    from ...train.settings import Settings


def prepare(case: Case, assets: Assets) -> Benchmark:
    """A training step; its results are the terms of the loss.

    parameters: method, preset (of `flashcocos train`), size, batch and changes (of settings, as for --set).
    """
    import torch

    from ...train.networks import Vgg19
    from ...train.networks.layers import SelfAttention
    from ...train.trainer import Process, Trainer

    parameters = case.parameters
    settings = step_settings(parameters)
    samples = EqualItems(_sample(settings.model, parameters["size"]), parameters["batch"])
    process = Process(device=torch.device(assets.device))
    vgg = Vgg19().eval().requires_grad_(False)
    form_matrix = parameters["method"] == "matrix"
    with tempfile.TemporaryDirectory() as folder:  # where there is nothing to resume
        trainer = Trainer(settings, samples, folder, process, vgg=vgg, warp="reference" if form_matrix else "auto")
    if form_matrix and isinstance(block := trainer.model.generator.attention, SelfAttention):
        from .naive import matrix_attention

        block.attend = matrix_attention
    pieces = trainer.steps[0]

    def run() -> Sample:
        return Sample(trainer.train_step(pieces).terms)

    return Benchmark(run, lambda terms: {"largest_term": max(map(abs, terms.values()))})


def step_settings(parameters: Mapping[str, Any]) -> Settings:
    """The settings of `prepare`'s step."""
    from ...train.settings import read_settings

    changes = [f"model.image_size={parameters['size']}", f"run.batch={parameters['batch']}", "schedule.steps=1000000"]
    changes += [f"run.micro_batch={parameters['batch']}", "run.workers=0", *parameters["changes"]]
    return read_settings(parameters["preset"], changes)


def estimate(case: Case, assets: Assets) -> Benchmark:
    """Facts: MiB of one sample, and the largest batches, from a step's tensors alone; any machine gives the same.

    parameters: preset, size, checkpointing, budgets_gib and changes.
    """
    from ...train.memory_estimate import GIB, MemoryEstimate
    from ...train.settings import read_settings

    parameters = case.parameters
    changes = [
        f"model.image_size={parameters['size']}",
        f"run.checkpointing={str(parameters['checkpointing']).lower()}",
    ]
    estimate = MemoryEstimate(read_settings(parameters["preset"], [*changes, *parameters["changes"]]))
    one = estimate.peak(1)
    largest = {}
    for budget in parameters["budgets_gib"]:
        batch, peak = estimate.largest_batch(budget * GIB)
        largest[f"{budget:g}"] = {"batch": batch, "mib": _mib(peak.total)}
    parts = {name: _mib(size) for name, size in one._asdict().items()}
    return Benchmark(None, facts={"one_mib": {"total": _mib(one.total), **parts}, "largest": largest})


def _mib(size: int) -> float:
    return round(size / 2**20, 1)


def _sample(config: ModelConfig, size: int) -> Item:
    label, exemplar, exemplar_label = inputs(config, size)
    scale = 1 if config.label_kind == "classes" else np.float32(1 / 255)
    picture = exemplar.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1
    return {
        "label": label * scale,
        "exemplar_label": exemplar_label * scale,
        "image": np.roll(picture, 32, axis=-1),
        "exemplar": picture,
        "self_reference": np.float32(1),
        "has_target": False,
    }
