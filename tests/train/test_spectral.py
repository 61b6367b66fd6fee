"""Spectral norm within a step: the estimate moves only when it is told to, and is made outside autocast."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flashcocos.train.networks import spectral
from flashcocos.train.networks.layers import SpectralConv2d, add_spectral_norm


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), SpectralConv2d(4, 8, 3))
    add_spectral_norm(network)
    spectral.prepare(network)
    return network


def norm_of(network: nn.Module) -> float:
    return float(torch.linalg.matrix_norm(network[1].weight.detach().flatten(1), 2))  # type: ignore[index]


def test_the_estimate_follows_the_weight_one_iteration_a_step(network: nn.Module) -> None:
    (norm, original), image = next(spectral._norms(network)), torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        original.copy_(torch.randn_like(original))
    spectral.refine(network)
    estimates = []
    for _ in range(4):
        before = [buffer.clone() for buffer in norm.buffers()]
        network(image)
        network(image)
        assert all(map(torch.equal, before, norm.buffers()))
        estimates.append(abs(norm_of(network) - 1))
        spectral.refine(network)
        assert not torch.equal(before[0], next(norm.buffers()))
    assert estimates == sorted(estimates, reverse=True)


def test_no_autocast_within(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    norm, _ = next(spectral._norms(network))
    seen = []
    monkeypatch.setattr(
        norm, "_reshape_weight_to_matrix", lambda x: seen.append(torch.is_autocast_enabled("cpu")) or x.flatten(1)
    )
    with torch.autocast("cpu", torch.bfloat16):
        result = network(torch.rand(1, 3, 8, 8))
        assert network[1].weight.dtype == torch.float32  # type: ignore[index]
    assert result.dtype == torch.bfloat16
    assert seen
    assert not any(seen)
