"""CoCosNet as published, in PyTorch and as the one ONNX graph that torch.onnx.export makes of it.

These are what flashcocos is compared with. The warp and the generator's self-attention form their whole matrices, as
the published code does, the exemplar is encoded with every picture, and all label planes are convolved. Training's own
networks compute the same with torch's fused attention and, unless told otherwise, with the tiled warp.
"""

from __future__ import annotations

import copy
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...config import SIZE_MULTIPLE, ModelConfig
from ...files import atomic_path
from ...kernels import reference
from ...train.checkpoint import load_model, save_model
from ...train.networks import CoCosNet
from ...train.networks.layers import SelfAttention

OPSET = 20


def matrix_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query key^T) value as published, by its N x M matrix: (B, N, D), (B, M, D), (B, M, V) -> (B, N, V)."""
    return torch.softmax(query @ key.mT, -1) @ value


class Published(nn.Module):
    """`model` in the published form, sharing its weights."""

    def __init__(self, model: CoCosNet) -> None:
        super().__init__()
        self.model = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
        if isinstance(block := self.model.generator.attention, SelfAttention):
            block.attend = matrix_attention

    def forward(self, label: Tensor, exemplar: Tensor, exemplar_label: Tensor | None = None) -> Tensor:
        """Label, exemplar (B, 3, H, W) and its label -> the picture (B, 3, H, W) in [-1, 1]."""
        model, config = self.model, self.model.config
        planes = model.label_planes(label)
        theta = model.encode_query(planes)
        phi, values = model.encode_exemplar(exemplar, exemplar_label)
        weights = reference.logits(theta, phi, config.patch, config.temperature).softmax(-1)  # (B, N, M)
        warped = torch.unflatten(values.flatten(2) @ weights.mT, 2, theta.shape[2:])
        return model.synthesize(warped, planes)[0]


def export_naive(model_path: str | os.PathLike[str], output: str | os.PathLike[str]) -> Path:
    """Write the published form of a model file as one ONNX graph of any height and width.

    Args:
        model_path: The model file.
        output: The .onnx file to write.

    Returns:
        `output`.
    """
    model = load_model(model_path)
    names = ["label", "exemplar", *(["exemplar_label"] if model.config.condition_on_label else [])]
    rows, columns = torch.export.Dim("rows", min=2, max=256), torch.export.Dim("columns", min=2, max=256)
    sides = (SIZE_MULTIPLE * rows, SIZE_MULTIPLE * columns)
    examples = tuple(_example(model.config, name) for name in names)
    # the exporter warns of absent packages, of axes that share a symbol and of its own deprecated calls
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with atomic_path(output) as temporary, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Published(model).eval(),
            examples,
            temporary,
            dynamo=True,
            external_data=False,
            opset_version=OPSET,
            input_names=names,
            output_names=["image"],
            dynamic_shapes=tuple(dict(zip((x.ndim - 2, x.ndim - 1), sides, strict=True)) for x in examples),
            verbose=False,
        )
    logger.setLevel(level)
    return Path(output)


def seeded_model(config: ModelConfig, path: str | os.PathLike[str], seed: int = 0) -> Path:
    """Write a model file with random weights that keep the maps' scale from layer to layer.

    Times do not depend on weights, errors do: with the attention at one half every branch of the network counts.

    Args:
        config: Of the model.
        path: The model file to write.
        seed: Of the weights.

    Returns:
        `path`.
    """
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
    save_model(path, model, {"weights": f"random, seed {seed}"})
    return Path(path)


def _example(config: ModelConfig, name: str) -> Any:
    height, width = 64, 96
    if name == "exemplar":
        return torch.zeros(1, 3, height, width)
    if config.label_kind == "classes":
        return torch.zeros(1, height, width, dtype=torch.uint8)
    return torch.zeros(1, config.label_channels, height, width)
