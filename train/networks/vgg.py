"""VGG19's convolutional features, for the losses; no part of inference.

Source: arXiv 1409.1556, configuration E. The keys (`conv1_1` to `conv5_4`) are those of the Caffe-style weights that
CoCosNet trains with: BGR planes in 0..255 less their mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

STAGES = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))  # width and convolutions between two poolings
BGR_MEAN = (0.40760392, 0.45795686, 0.48501961)


class Vgg19(nn.Module):
    """Feature maps by name: "r<stage><convolution>", taken behind the ReLU, e.g. "r42"."""

    def __init__(self) -> None:
        super().__init__()
        channels = 3
        for stage, (width, count) in enumerate(STAGES, 1):
            for index in range(1, count + 1):
                self.add_module(f"conv{stage}_{index}", nn.Conv2d(channels, width, 3, padding=1))
                channels = width

    def forward(self, image: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """RGB image (B, 3, H, W) in [-1, 1] -> the named maps; nothing deeper than the last of them is computed."""
        x = ((image.flip(1) + 1) / 2 - image.new_tensor(BGR_MEAN).reshape(1, 3, 1, 1)) * 255
        features: dict[str, Tensor] = {}
        for stage, (_, count) in enumerate(STAGES, 1):
            for index in range(1, count + 1):
                x = F.relu(self.get_submodule(f"conv{stage}_{index}")(x))
                if f"r{stage}{index}" in names:
                    features[f"r{stage}{index}"] = x
                if len(features) == len(set(names)):
                    return features
            x = F.max_pool2d(x, 2)
        raise KeyError(f"VGG19 has no feature map {sorted(set(names) - set(features))}")
