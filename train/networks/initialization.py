"""The published models' initial weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from .layers import Spade

GAIN = 0.02


@torch.no_grad()
def initialize(network: nn.Module) -> None:
    """Draw the start that upstream trains each of its networks from: Xavier's, of gain 0.02, and biases of 0.

    For a `CoCosNet` or a `Discriminator` of a published task, called once before training; not for `Vgg19`, whose
    weights are given. Every convolution's weight is normal with the deviation 0.02 sqrt(2 / (fan in + fan out)), and
    SPADE's scale and shift count as two convolutions. Under spectral norm that is the weight before its division, whose
    estimated singular vectors stay random until the first training step refines them. Whatever is no convolution keeps
    its value: `SelfAttention.gamma` 0, PReLU's slope 0.25. Xavier initialization: Glorot and Bengio, AISTATS 2010.
    """
    halved = {module.scale_shift for module in network.modules() if isinstance(module, Spade)}
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            normed = parametrize.is_parametrized(module)
            weight = module.get_parameter("parametrizations.weight.original" if normed else "weight")
            for part in weight.chunk(2 if module in halved else 1):
                nn.init.xavier_normal_(part, GAIN)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
