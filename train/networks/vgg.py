"""VGG's convolutional features, for the losses; no part of inference.

Source: arXiv 1409.1556, configurations D and E. The keys (`conv1_1` to `conv5_4`) are those of the Caffe-style weights
that CoCosNet trains with: BGR planes in 0..255 less their mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (64, 128, 256, 512, 512)  # of the stages, with a pooling between two
VGG19, VGG16 = (2, 2, 4, 4, 4), (2, 2, 3, 3, 3)  # convolutions of each stage
CAFFE_MEAN, CAFFE_SCALE = (0.48501961, 0.45795686, 0.40760392), (255.0, 255.0, 255.0)


class Vgg19(nn.Module):
    """Feature maps by name: "r<stage><convolution>", taken behind the ReLU, e.g. "r42".

    counts: convolutions of each stage, `VGG19` or `VGG16`. mean, scale: for R, G and B, what is subtracted from the
    picture in [0, 1] and what the rest is multiplied by; the weights decide them, Caffe's by default. The first
    convolution takes BGR.
    """

    def __init__(
        self,
        counts: Sequence[int] = VGG19,
        mean: Sequence[float] = CAFFE_MEAN,
        scale: Sequence[float] = CAFFE_SCALE,
    ) -> None:
        super().__init__()
        self.counts, self.mean, self.scale = counts, mean, scale
        channels = 3
        for stage, (width, count) in enumerate(zip(WIDTHS, counts, strict=True), 1):
            for index in range(1, count + 1):
                self.add_module(f"conv{stage}_{index}", nn.Conv2d(channels, width, 3, padding=1))
                channels = width

    def forward(self, image: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """RGB image (B, 3, H, W) in [-1, 1] -> the named maps; nothing deeper than the last of them is computed."""
        mean, scale = (image.new_tensor(numbers).reshape(1, 3, 1, 1) for numbers in (self.mean, self.scale))
        x = (((image + 1) / 2 - mean) * scale).flip(1)
        features: dict[str, Tensor] = {}
        for stage, count in enumerate(self.counts, 1):
            for index in range(1, count + 1):
                x = F.relu(self.get_submodule(f"conv{stage}_{index}")(x))
                if f"r{stage}{index}" in names:
                    features[f"r{stage}{index}"] = x
                if len(features) == len(set(names)):
                    return features
            x = F.max_pool2d(x, 2)
        raise KeyError(f"VGG has no feature map {sorted(set(names) - set(features))}")
