"""Small models with well-conditioned weights, and their exported graphs, made once for all tests of a run.

The exporter takes tens of seconds a model whatever its size, so tests share its graphs, across processes too.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock
from onnx import ModelProto

from flashcocos.bundle import STAGES
from flashcocos.config import ModelConfig
from flashcocos.export.graphs import export_stage
from flashcocos.train.checkpoint import load_model, save_model
from flashcocos.train.networks import CoCosNet
from flashcocos.train.networks.layers import SpectralConv2d

CLASSES = ModelConfig.preset("tiny")
# with every option that `CLASSES` has not
CHANNELS = ModelConfig.preset("tiny-channels", position_frequencies=2, warp_residual=True)


def seeded_model(config: ModelConfig, seed: int = 0) -> CoCosNet:
    """A model whose every branch matters: attention weighs 0.5, and the convolutions to be normalized have norm 1."""
    generator = torch.Generator().manual_seed(seed)
    model = CoCosNet(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, (2 / parameter[0].numel()) ** 0.5, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.05, generator=generator)
            elif name.endswith("gamma"):
                parameter.fill_(0.5)
        for module in model.modules():
            if isinstance(module, SpectralConv2d):
                module.weight /= torch.linalg.matrix_norm(module.weight.flatten(1), 2)
    return model


@functools.cache
def model_file(config: ModelConfig) -> Path:
    """`seeded_model(config)` as a model file; read only."""
    return _once(f"{_key(config)}.safetensors", lambda path: save_model(path, seeded_model(config), {"note": "seeded"}))


@functools.cache
def _exported(config: ModelConfig, stage: str) -> ModelProto:
    def export(path: Path) -> None:
        path.write_bytes(export_stage(load_model(model_file(config)), stage).SerializeToString(deterministic=True))

    model = ModelProto()
    model.ParseFromString(_once(f"{_key(config)}-{stage}.onnx", export).read_bytes())
    return model


def _key(config: ModelConfig) -> str:
    return hashlib.sha256(config.to_json().encode()).hexdigest()[:16]


def _once(name: str, make: Callable[[Path], object]) -> Path:
    """The file `name` of the run's folder, made by the first process that asks while the others wait."""
    path = Path(os.environ["FLASHCOCOS_TEST_FOLDER"]) / name
    with FileLock(f"{path}.lock"):
        if not path.exists():
            make(path)
    return path


def exported_stage(config: ModelConfig, stage: str) -> ModelProto:
    """A copy of a stage of `model_file(config)`, exported at the first call."""
    copy = ModelProto()
    copy.CopyFrom(_exported(config, stage))
    return copy


def exported_stages(config: ModelConfig) -> dict[str, ModelProto]:
    """All stages of `model_file(config)` by name."""
    return {stage: exported_stage(config, stage) for stage in STAGES}
