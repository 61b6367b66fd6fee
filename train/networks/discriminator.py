"""The multi-scale patch discriminator, for training only.

Source: pix2pixHD, arXiv 1711.11585 section 3.2, with the self-attention that CoCosNet adds before the fourth layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import ModelConfig
from .layers import LEAKY_SLOPE, SelfAttention, SpectralConv2d


class PatchDiscriminator(nn.Module):
    """(B, nc + 3, H, W) -> the maps behind every layer; the last, of one channel, scores overlapping patches."""

    def __init__(self, in_channels: int, ndf: int, attention: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, ndf, 4, stride=2, padding=1)
        self.middle = nn.ModuleList(
            [
                SpectralConv2d(ndf, 2 * ndf, 4, stride=2, padding=1, bias=False),
                SpectralConv2d(2 * ndf, 4 * ndf, 4, stride=2, padding=1, bias=False),
                SpectralConv2d(4 * ndf, 8 * ndf, 4, stride=1, padding=1, bias=False),
            ]
        )
        self.attention = SelfAttention(4 * ndf) if attention else nn.Identity()
        self.last = nn.Conv2d(8 * ndf, 1, 4, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [F.leaky_relu(self.first(x), LEAKY_SLOPE)]
        for index, layer in enumerate(self.middle):
            x = self.attention(maps[-1]) if index == 2 else maps[-1]
            maps.append(F.leaky_relu(F.instance_norm(layer(x)), LEAKY_SLOPE))
        return [*maps, self.last(maps[-1])]


class Discriminator(nn.Module):
    """One patch discriminator at full and one at half the resolution."""

    def __init__(self, config: ModelConfig, ndf: int = 64) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            PatchDiscriminator(config.label_channels + 3, ndf, config.attention) for _ in range(2)
        )

    def forward(self, label: Tensor, image: Tensor) -> list[list[Tensor]]:
        """Label planes (B, nc, H, W) and images (B, 3, H, W) -> for each scale the maps of `PatchDiscriminator`."""
        x = torch.cat([label, image], 1)
        results = []
        for index, discriminator in enumerate(self.scales):
            if index:
                x = F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False)
            results.append(discriminator(x))
        return results
