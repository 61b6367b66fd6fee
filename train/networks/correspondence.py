"""The correspondence network: label and exemplar image into one feature space, in which the warp compares positions.

Source: CoCosNet, arXiv 2004.05571 section 3.1. The adaptors map each domain to features at a quarter of the image's
size; residual blocks shared by both domains and two 1x1 convolutions turn them into theta (query) and phi (key).
Upstream compares positions at that size (`warp_stride` 4). For a finer map the features are enlarged, and a few
convolutions over the full-size planes add the detail that the quarter has lost.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import ModelConfig
from .layers import LEAKY_SLOPE, SpadeBlock, SpectralConv2d, subsample, unit_length


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
        return unit_length(x)  # (B, C, H/4, W/4)


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


class Detail(nn.Module):
    """What a map finer than a quarter adds: planes (B, in, H, W) and coarse features -> (B, C, H / s, W / s).

    s is the `warp_stride`, 2 or 1; the coarse features are enlarged already.
    """

    def __init__(self, in_channels: int, coarse_channels: int, config: ModelConfig) -> None:
        super().__init__()
        width = config.feature_channels
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(in_channels, width, 3, stride=config.warp_stride, padding=1),
                nn.Conv2d(width, width, 3, padding=1),
            ]
        )
        self.join = nn.Conv2d(width + coarse_channels, width, 3, padding=1)

    def forward(self, planes: Tensor, coarse: Tensor) -> Tensor:
        for layer in self.layers:
            planes = F.leaky_relu(layer(planes), LEAKY_SLOPE)
        return F.leaky_relu(self.join(torch.cat([planes, coarse], 1)), LEAKY_SLOPE)


class Correspondence(nn.Module):
    """Adaptors, shared residual blocks, theta and phi. Features and planes in, raw theta or phi out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        labels = config.label_channels if config.condition_on_label else 0
        width = config.feature_channels + labels
        self.condition_on_label = config.condition_on_label
        self.label_adaptor = DomainAdaptor(config.label_channels, config)
        self.image_adaptor = DomainAdaptor(3, config)
        self.residual = nn.Sequential(*(ResidualBlock(width) for _ in range(config.residual_blocks)))
        self.position_frequencies = config.position_frequencies
        mixed = width + 4 * config.position_frequencies
        self.enlargement = 4 // config.warp_stride
        self.label_detail: Detail | None = None
        self.image_detail: Detail | None = None
        if self.enlargement > 1:
            self.label_detail = Detail(config.label_channels, mixed, config)
            self.image_detail = Detail(3 + labels, mixed, config)
            mixed += config.feature_channels
        self.theta = nn.Conv2d(mixed, config.feature_channels, 1)
        self.phi = nn.Conv2d(mixed, config.feature_channels, 1)

    def query(self, features: Tensor, label: Tensor, planes: Tensor) -> Tensor:
        """Label features -> theta (B, C, h, w), h = H / warp_stride.

        Args:
            features: of the label adaptor, (B, C, H / 4, W / 4).
            label: the label's planes (B, nc, k H / 4, k W / 4) for any whole k.
            planes: the label's planes (B, nc, H, W); the detail alone reads them.
        """
        theta: Tensor = self.theta(self._mix(features, label, self.label_detail, planes))
        return theta

    def key(self, features: Tensor, label: Tensor | None, planes: Tensor) -> Tensor:
        """Exemplar features -> phi (B, C, h, w), as `query`.

        Args:
            features: of the image adaptor, (B, C, H / 4, W / 4).
            label: for `condition_on_label` the exemplar's label planes (B, nc, k H / 4, k W / 4).
            planes: the exemplar and, for `condition_on_label`, its label's planes, (B, 3 + nc, H, W); the detail alone
                reads them.
        """
        phi: Tensor = self.phi(self._mix(features, label, self.image_detail, planes))
        return phi

    def _mix(self, features: Tensor, label: Tensor | None, detail: Detail | None, planes: Tensor) -> Tensor:
        if self.condition_on_label:
            assert label is not None  # CoCosNet.encode_exemplar has refused its absence
            label = subsample(label, label.shape[2] // features.shape[2])
            features = torch.cat([features, label], 1)
        features = self.residual(features)
        if self.enlargement > 1:
            features = F.interpolate(features, scale_factor=float(self.enlargement), mode="bilinear")
        if self.position_frequencies:
            waves = position_frequencies(features, self.position_frequencies).expand(features.shape[0], -1, -1, -1)
            features = torch.cat([features, waves], 1)
        return features if detail is None else torch.cat([features, detail(planes, features)], 1)


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
