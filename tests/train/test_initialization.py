"""The published models' initial weights: the deviation of each convolution, and what keeps its value."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from flashcocos.config import ModelConfig
from flashcocos.train.networks import CoCosNet, Discriminator, initialize
from flashcocos.train.networks.layers import Spade, add_spectral_norm


@pytest.mark.parametrize("spectral_norm", [True, False])
@pytest.mark.parametrize("kind", [CoCosNet, Discriminator])
def test_deviation_of_each_layer(kind: type[CoCosNet | Discriminator], spectral_norm: bool) -> None:
    network = kind(ModelConfig.preset("tiny", attention=True))
    if spectral_norm:
        add_spectral_norm(network)
    torch.manual_seed(0)
    initialize(network)
    checked = 0
    for name, parameter in network.named_parameters():
        if name.endswith("gamma"):
            assert parameter == 0
        elif "prelu" in name:
            assert parameter == 0.25
        elif name.endswith("bias"):
            assert not parameter.any()
        else:
            # upstream has a convolution each for SPADE's scale and shift
            for part in parameter.chunk(2 if "scale_shift" in name else 1):
                outputs, inputs, *kernel = part.shape
                expected = 0.02 * math.sqrt(2 / ((outputs + inputs) * math.prod(kernel)))
                # five standard errors of a normal sample's deviation
                assert part.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * part.numel())), name
                assert abs(part.mean()) < 5 * expected / math.sqrt(part.numel()), name
                checked += 1
    convolutions = sum(isinstance(module, nn.Conv2d) for module in network.modules())
    assert checked == convolutions + sum(isinstance(module, Spade) for module in network.modules())


def test_a_seed_makes_it_repeatable_and_training_starts() -> None:
    config = ModelConfig.preset("tiny", attention=True)
    first, second = CoCosNet(config), CoCosNet(config)
    for network in (first, second):
        add_spectral_norm(network)
        torch.manual_seed(3)
        initialize(network)
    for (name, one), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other), name
    first.train()
    label = torch.randint(0, config.label_channels, (1, 64, 64))
    result = first(label, torch.rand(1, 3, 64, 64) * 2 - 1, label)
    assert result.image.isfinite().all()
