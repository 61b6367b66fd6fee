"""SPADE blocks as a bundle computes them: the functions of `train/networks/layers.py` by fewer operations.

    shortcut    conv_s(normal scale + shift) = conv_s(normal scale) + conv_s(shift), and the last is one convolution of
                the hidden features: to O channels, where shift has C
    1 + scale   the 1 is in the bias
    sums        over channels as a product with a row of numbers, for ONNX Runtime adds slowly along such an axis

What is made of weights alone stands in the graph as operators, and whatever loads it computes it once: so the graph
holds the model's own weights, which float16 may store.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..train.networks.layers import LEAKY_SLOPE, POSITIONAL_EPS, Spade, SpadeBlock, double


def fold_blocks(part: nn.Module) -> None:
    """Put a `FoldedBlock` in place of every `SpadeBlock` of `part`."""
    for name, block in list(part.named_modules()):
        if isinstance(block, SpadeBlock):
            part.set_submodule(name, FoldedBlock(block))


class FoldedBlock(nn.Module):
    """`block` for inference, with its arguments and its weights."""

    def __init__(self, block: SpadeBlock) -> None:
        super().__init__()
        self.norm_0, self.norm_1 = FoldedSpade(block.norm_0), FoldedSpade(block.norm_1)
        self.conv_0, self.conv_1, self.learned_shortcut = block.conv_0, block.conv_1, block.learned_shortcut
        if block.learned_shortcut:
            self.norm_s, self.conv_s = FoldedSpade(block.norm_s), block.conv_s

    def forward(self, x: Tensor, condition: Tensor, *, enlarge: bool = False) -> Tensor:
        """As `SpadeBlock.forward`."""
        normal = _positional_norm(x)
        if enlarge:
            normal = double(normal)
        y = self.conv_0(F.leaky_relu(self.norm_0(normal, condition), LEAKY_SLOPE))
        y = self.conv_1(F.leaky_relu(self.norm_1(_positional_norm(y), condition), LEAKY_SLOPE))
        if self.learned_shortcut:
            x = self.norm_s(normal, condition, self.conv_s)
        elif enlarge:
            x = double(x)
        result: Tensor = y + x
        return result


class FoldedSpade(nn.Module):
    """`norm` for inference, with its weights."""

    def __init__(self, norm: Spade) -> None:
        super().__init__()
        self.shared, self.scale_shift = norm.shared, norm.scale_shift

    def forward(self, normal: Tensor, condition: Tensor, conv: nn.Conv2d | None = None) -> Tensor:
        """normal (B, C, h, w), condition (B, c, h, w) -> (B, C, h, w); with a 1x1 `conv` behind it (B, O, h, w)."""
        hidden = F.pad(F.relu(self.shared(condition)), (1, 1, 1, 1), "reflect")
        assert self.scale_shift.bias is not None
        (scale, shift), (scale_bias, shift_bias) = self.scale_shift.weight.chunk(2), self.scale_shift.bias.chunk(2)
        result = normal * F.conv2d(hidden, scale, 1 + scale_bias)
        if conv is not None:
            result, matrix = conv(result), conv.weight[:, :, 0, 0]  # (O, C)
            shift = (matrix @ shift.flatten(1)).unflatten(1, shift.shape[1:])  # type: ignore[no-untyped-call]
            shift_bias = matrix @ shift_bias
        return result + F.conv2d(hidden, shift, shift_bias)


def _positional_norm(x: Tensor) -> Tensor:
    """As `layers.positional_norm`."""
    centered = x - _channel_sum(x, 1 / x.shape[1])
    variance = _channel_sum(centered.square(), 1 / (x.shape[1] - 1))
    return centered / (variance + POSITIONAL_EPS).sqrt()


def _channel_sum(x: Tensor, factor: float) -> Tensor:
    """(B, C, h, w) -> (B, 1, h, w), the sum over channels times `factor`."""
    row = torch.full((1, x.shape[1]), factor, dtype=x.dtype)
    total: Tensor = (row @ x.flatten(2)).unflatten(2, x.shape[2:])  # type: ignore[no-untyped-call]
    return total
