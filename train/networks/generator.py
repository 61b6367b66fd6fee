"""The translation network: a SPADE generator steered everywhere by the warped exemplar and the label.

Source: CoCosNet, arXiv 2004.05571 section 3.2. Only the conditions enter: there is no latent code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import SIZE_MULTIPLE, ModelConfig
from .layers import LEAKY_SLOPE, SelfAttention, SpadeBlock, subsample


class Generator(nn.Module):
    """warped_image (B, 3, H, W) in [-1, 1] and label planes (B, nc, H, W) -> image (B, 3, H, W) in [-1, 1]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        ngf, hidden, self.warp_residual = config.ngf, config.spade_hidden, config.warp_residual
        condition = (6 if config.warp_residual else 3) + config.label_channels
        self.first = nn.Conv2d(condition, 16 * ngf, 3, padding=1)
        self.head = SpadeBlock(16 * ngf, 16 * ngf, condition, hidden)
        self.middle_0 = SpadeBlock(16 * ngf, 16 * ngf, condition, hidden)
        self.middle_1 = SpadeBlock(16 * ngf, 16 * ngf, condition, hidden)
        self.up_0 = SpadeBlock(16 * ngf, 8 * ngf, condition, hidden)
        self.up_1 = SpadeBlock(8 * ngf, 4 * ngf, condition, hidden)
        self.attention = SelfAttention(4 * ngf) if config.attention else nn.Identity()
        self.up_2 = SpadeBlock(4 * ngf, 2 * ngf, condition, hidden)
        self.up_3 = SpadeBlock(2 * ngf, ngf, condition, hidden)
        self.last = nn.Conv2d(ngf, 4 if config.warp_residual else 3, 3, padding=1)

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
        """Condition at a fourth of the size (B, c, H/4, W/4) -> features (B, 4 ngf, H/2, W/2): all that looks afar."""
        x = self.first(subsample(condition, SIZE_MULTIPLE // 4))  # (B, 16 ngf, H/32, W/32)
        x = self.head(x, subsample(condition, 8))
        x, condition_16 = _double(x), subsample(condition, 4)
        x = self.middle_0(x, condition_16)
        x = self.middle_1(x, condition_16)  # (B, 16 ngf, H/16, W/16)
        x = self.up_0(_double(x), subsample(condition, 2))  # (B, 8 ngf, H/8, W/8)
        x = self.up_1(_double(x), condition)  # (B, 4 ngf, H/4, W/4)
        features: Tensor = self.attention(_double(x))
        return features

    def fine(self, features: Tensor, condition: Tensor) -> Tensor:
        """Features (B, 4 ngf, H/2, W/2) and the condition (B, c, H, W) -> image (B, 3, H, W).

        No pixel depends on anything `TILE_OVERLAP` pixels away, so a picture can be made in tiles.
        """
        x = self.up_2(features, subsample(condition, 2))  # (B, 2 ngf, H/2, W/2)
        x = self.up_3(_double(x), condition)  # (B, ngf, H, W)
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


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
