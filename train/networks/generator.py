"""The translation network: a SPADE generator steered everywhere by the warped exemplar and the label.

Source: CoCosNet, arXiv 2004.05571 section 3.2. Only the conditions enter: there is no latent code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import SIZE_MULTIPLE, ModelConfig
from .layers import LEAKY_SLOPE, SelfAttention, SpadeBlock, double, subsample


class Generator(nn.Module):
    """warped_image (B, 3, H, W) in [-1, 1] and label planes (B, nc, H, W) -> image (B, 3, H, W) in [-1, 1].

    Its layers have c16, c8, c4, c2 and c1 channels: 16, 8 ... times ngf, but no more than `max_channels`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, self.warp_residual = config.spade_hidden, config.warp_residual
        c16, c8, c4, c2, c1 = map(config.generator_channels, (16, 8, 4, 2, 1))
        condition = (6 if config.warp_residual else 3) + config.label_channels
        self.first = nn.Conv2d(condition, c16, 3, padding=1)
        self.head = SpadeBlock(c16, c16, condition, hidden)
        self.middle_0 = SpadeBlock(c16, c16, condition, hidden)
        self.middle_1 = SpadeBlock(c16, c16, condition, hidden)
        self.up_0 = SpadeBlock(c16, c8, condition, hidden)
        self.up_1 = SpadeBlock(c8, c4, condition, hidden)
        self.attention = SelfAttention(c4) if config.attention else nn.Identity()
        self.up_2 = SpadeBlock(c4, c2, condition, hidden)
        self.up_3 = SpadeBlock(c2, c1, condition, hidden)
        self.last = nn.Conv2d(c1, 4 if config.warp_residual else 3, 3, padding=1)

    def forward(self, warped_image: Tensor, label: Tensor) -> Tensor:
        means = class_means(warped_image, label) if self.warp_residual else None
        features = self.coarse(self.condition(subsample(warped_image, 4), subsample(label, 4), means))
        return self.fine(features, self.condition(warped_image, label, means))

    def condition(self, warped_image: Tensor, label: Tensor, means: Tensor | None) -> Tensor:
        """What steers every layer: warped_image (B, 3, h, w), with the skip its class means as well, and label planes.

        means: `class_means` of the whole picture, for the skip; every tile of it takes the same.
        """
        if means is None:
            return torch.cat([warped_image, label], 1)
        painted = (means.mT @ label.flatten(2)).unflatten(2, label.shape[2:])  # type: ignore[no-untyped-call]
        return torch.cat([warped_image, painted, label], 1)  # (B, 3 + nc, h, w), with the skip 6 + nc

    def coarse(self, condition: Tensor) -> Tensor:
        """Condition at a fourth of the size (B, c, H/4, W/4) -> features (B, c4, H/2, W/2): all that looks afar."""
        x = self.first(subsample(condition, SIZE_MULTIPLE // 4))  # (B, c16, H/32, W/32)
        x = self.head(x, subsample(condition, 8))
        condition_16 = subsample(condition, 4)
        x = self.middle_0(x, condition_16, enlarge=True)
        x = self.middle_1(x, condition_16)  # (B, c16, H/16, W/16)
        x = self.up_0(x, subsample(condition, 2), enlarge=True)  # (B, c8, H/8, W/8)
        x = self.up_1(x, condition, enlarge=True)  # (B, c4, H/4, W/4)
        features: Tensor = self.attention(double(x))
        return features

    def fine(self, features: Tensor, condition: Tensor) -> Tensor:
        """Features (B, c4, H/2, W/2) and the condition (B, c, H, W) -> image (B, 3, H, W).

        No pixel depends on anything `TILE_OVERLAP` pixels away, so a picture can be made in tiles.
        """
        x = self.up_2(features, subsample(condition, 2))  # (B, c2, H/2, W/2)
        x = self.up_3(x, condition, enlarge=True)  # (B, c1, H, W)
        x = self.last(F.leaky_relu(x, LEAKY_SLOPE))  # (B, 3 or 4, H, W)
        if not self.warp_residual:
            return torch.tanh(x)
        warped_image, painted = condition[:, :3], condition[:, 3:6]
        start = painted + torch.sigmoid(x[:, 3:]) * (warped_image - painted)
        image: Tensor = (start + x[:, :3]).clamp(-1, 1)
        return image


def class_means(image: Tensor, label: Tensor) -> Tensor:
    """image (B, 3, H, W) averaged over each plane of label (B, nc, H, W): (B, nc, 3)."""
    # divided by the width before they are summed, so that no sum leaves the range of float16
    planes = label.flatten(2) / label.shape[3]  # (B, nc, H W)
    return (planes @ image.flatten(2).mT) / planes.sum(2, keepdim=True).clamp_min(1e-4)
