"""The correspondence network: label and exemplar image into one feature space, in which the warp compares positions.

Source: CoCosNet, arXiv 2004.05571 section 3.1. The adaptors map each domain to features at a quarter of the image's
size; residual blocks shared by both domains and two 1x1 convolutions turn them into theta (query) and phi (key).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import ModelConfig
from .layers import LEAKY_SLOPE, SpadeBlock, SpectralConv2d, subsample

NORM_EPS = 2.2e-16  # float64's machine epsilon, as upstream adds it to each vector's length


class DomainAdaptor(nn.Module):
    """Image or label planes (B, in, H, W) -> features (B, C, H/4, W/4) of unit length at each position."""

    def __init__(self, in_channels: int, config: ModelConfig) -> None:
        super().__init__()
        nef, kernel, hidden = config.nef, config.adaptor_kernel, config.spade_hidden
        # kernel 4 with padding 1 halves an even side just as kernel 3 does; instance normalization makes a bias idle
        self.layers = nn.ModuleList(
            [
                SpectralConv2d(in_channels, nef, 3, padding=1, bias=False),
                SpectralConv2d(nef, 2 * nef, kernel, stride=2, padding=1, bias=False),
                SpectralConv2d(2 * nef, 4 * nef, 3, padding=1, bias=False),
                SpectralConv2d(4 * nef, 8 * nef, kernel, stride=2, padding=1, bias=False),
                SpectralConv2d(8 * nef, 8 * nef, 3, padding=1, bias=False),
            ]
        )
        self.blocks = nn.ModuleList(
            [
                SpadeBlock(8 * nef, 8 * nef, in_channels, hidden),
                SpadeBlock(8 * nef, 8 * nef, in_channels, hidden),
                SpadeBlock(8 * nef, config.feature_channels, in_channels, hidden),
            ]
        )

    def forward(self, planes: Tensor) -> Tensor:
        x = F.instance_norm(self.layers[0](planes))  # (B, nef, H, W)
        for layer in self.layers[1:]:
            x = F.instance_norm(layer(F.leaky_relu(x, LEAKY_SLOPE)))
        condition = subsample(planes, 4)  # (B, in, H/4, W/4)
        for block in self.blocks:
            x = block(x, condition)
        features: Tensor = x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + NORM_EPS)
        return features  # (B, C, H/4, W/4)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with instance normalization around a shortcut; one PReLU serves both activations."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect")
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect")
        self.prelu = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.prelu(F.instance_norm(self.conv1(x)))
        result: Tensor = self.prelu(x + F.instance_norm(self.conv2(y)))
        return result


class Correspondence(nn.Module):
    """Adaptors, shared residual blocks, theta and phi. Features and label planes in, raw theta or phi out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.feature_channels + (config.label_channels if config.condition_on_label else 0)
        self.condition_on_label = config.condition_on_label
        self.label_adaptor = DomainAdaptor(config.label_channels, config)
        self.image_adaptor = DomainAdaptor(3, config)
        self.residual = nn.Sequential(*(ResidualBlock(width) for _ in range(config.residual_blocks)))
        self.position_frequencies = config.position_frequencies
        self.theta = nn.Conv2d(width + 4 * config.position_frequencies, config.feature_channels, 1)
        self.phi = nn.Conv2d(width + 4 * config.position_frequencies, config.feature_channels, 1)

    def query(self, features: Tensor, label: Tensor) -> Tensor:
        """Label features (B, C, h, w) and the label's planes, k h x k w for any whole k -> theta (B, C, h, w)."""
        theta: Tensor = self.theta(self._mix(features, label))
        return theta

    def key(self, features: Tensor, label: Tensor | None) -> Tensor:
        """Exemplar features (B, C, h, w) and its label's planes likewise, used only with mask mixing -> phi."""
        phi: Tensor = self.phi(self._mix(features, label))
        return phi

    def _mix(self, features: Tensor, label: Tensor | None) -> Tensor:
        if self.condition_on_label:
            assert label is not None  # CoCosNet.encode_exemplar has refused its absence
            label = subsample(label, label.shape[2] // features.shape[2])
            features = torch.cat([features, label], 1)
        features = self.residual(features)
        if not self.position_frequencies:
            return features
        waves = position_frequencies(features, self.position_frequencies).expand(features.shape[0], -1, -1, -1)
        return torch.cat([features, waves], 1)


def position_frequencies(features: Tensor, count: int) -> Tensor:
    """Sines and cosines of each position (1, 4 count, h, w), at any size: 1, 2, 4 ... half turns along an axis."""
    waves = []
    for axis in (2, 3):
        size = features.shape[axis]
        position = (torch.arange(size, device=features.device, dtype=features.dtype) + 0.5) / size
        shape = (1, 1, size, 1) if axis == 2 else (1, 1, 1, size)
        for turn in range(count):
            angle = (position * (math.pi * 2**turn)).reshape(shape).expand(1, 1, *features.shape[2:])
            waves += [angle.sin(), angle.cos()]
    return torch.cat(waves, 1)
