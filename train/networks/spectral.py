"""Spectral norm as one training step needs it: estimated once a step, and in float32 under autocast.

torch's own refines its estimate at every use of a weight, so a weight would differ between the micro-batches of a step,
and between a block's forward and its recomputation under activation checkpointing. Here the estimate moves by one power
iteration a step (arXiv 1802.05957, algorithm 1, does one an update too) and stands still within it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .layers import SpectralConv2d


def prepare(network: nn.Module) -> None:
    """Let the norms that `add_spectral_norm` gave `network` run outside autocast, which cannot mix their dtypes."""
    for norm, _ in _norms(network):
        _outside_autocast(norm)


@torch.no_grad()
def refine(network: nn.Module) -> None:
    """One power iteration for every spectral norm of `network`; until the next call the estimates stay."""
    for norm, weight in _norms(network):
        norm.train()
        norm(weight)
        norm.eval()


def _norms(network: nn.Module) -> Iterator[tuple[nn.Module, Tensor]]:
    """Each spectral norm with the weight that it divides."""
    for module in network.modules():
        if isinstance(module, SpectralConv2d) and parametrize.is_parametrized(module):
            parametrized: Any = module.parametrizations
            yield parametrized.weight[0], parametrized.weight.original


def _outside_autocast(norm: nn.Module) -> None:
    forward = norm.forward

    def outside(weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            result: Tensor = forward(weight)
        return result

    norm.forward = outside
