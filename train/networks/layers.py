"""Layers that the networks share: SPADE with positional normalization, its residual block, and self-attention.

Sources: SPADE, arXiv 1903.07291 equation 1; positional normalization, arXiv 1907.04312; self-attention, arXiv
1805.08318 section 3. Read from the smallest part up.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

LEAKY_SLOPE = 0.2
POSITIONAL_EPS = 1e-5
NORM_EPS = 2.2e-16  # float64's machine epsilon, as upstream adds it to each vector's length


class SpectralConv2d(nn.Conv2d):
    """A convolution whose weight training keeps at spectral norm 1 (`add_spectral_norm`); otherwise a plain one."""


def add_spectral_norm(model: nn.Module) -> None:
    """Parametrize every `SpectralConv2d` of `model` by its spectral norm; the weights of a folded model have norm 1."""
    for module in list(model.modules()):
        if isinstance(module, SpectralConv2d):
            parametrizations.spectral_norm(module)


def fold_spectral_norm(weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """weight / (u^T W v), W being `weight` (out, ...) as a matrix: divided in float64, returned in float32.

    u and v are the estimates that training kept, not re-estimated, so the folded layer equals the trained one.
    """
    matrix = weight.double().flatten(1)
    return (weight.double() / (u.double() @ matrix @ v.double())).float()


def folded_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that `model` would have without `add_spectral_norm`, its layers' functions unchanged."""
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, SpectralConv2d) and parametrize.is_parametrized(module):
            prefix = f"{name}.parametrizations.weight"
            weight, u, v = (state.pop(f"{prefix}.{leaf}") for leaf in ("original", "0._u", "0._v"))
            state[f"{name}.weight"] = fold_spectral_norm(weight, u, v)
    return state


def subsample(planes: Tensor, step: int) -> Tensor:
    """Every `step`-th pixel of (B, C, H, W): what nearest-neighbor resizing by 1 / step does, without its rounding."""
    return planes[:, :, ::step, ::step] if step > 1 else planes


def double(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, C, 2 h, 2 w), each pixel four times."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def positional_norm(x: Tensor) -> Tensor:
    """(B, C, H, W) with mean 0 and unbiased variance 1 over the channels of each position."""
    wide = _widened(x)
    # two passes: the one-pass formula loses all digits where the mean is large against the deviation
    centered = wide - wide.mean(1, keepdim=True)
    variance = centered.square().sum(1, keepdim=True) / (x.shape[1] - 1)
    return (centered / (variance + POSITIONAL_EPS).sqrt()).to(x.dtype)


def unit_length(x: Tensor) -> Tensor:
    """(B, C, ...) divided by its length at each position; a vector of zeros stays one."""
    wide = _widened(x)
    unit: Tensor = wide / (torch.linalg.vector_norm(wide, dim=1, keepdim=True) + NORM_EPS)
    return unit.to(x.dtype)


def _widened(x: Tensor) -> Tensor:
    """x in float32 if it has 16 bits, whose squares leave the range of float16: CUDA's autocast leaves them 16-bit."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class Spade(nn.Module):
    """A scale and a shift of positionally normalized features, predicted at every position from `condition`."""

    def __init__(self, channels: int, condition_channels: int, hidden: int) -> None:
        super().__init__()
        self.shared = nn.Conv2d(condition_channels, hidden, 3, padding=1, padding_mode="reflect")
        self.scale_shift = nn.Conv2d(hidden, 2 * channels, 3, padding=1, padding_mode="reflect")

    def forward(self, normal: Tensor, condition: Tensor) -> Tensor:
        hidden = F.relu(self.shared(condition))  # (B, hidden, h, w)
        scale, shift = self.scale_shift(hidden).chunk(2, 1)  # each (B, C, h, w)
        result: Tensor = normal * (1 + scale) + shift
        return result


class SpadeBlock(nn.Module):
    """Two SPADE-normalized convolutions with a shortcut, itself normalized and convolved where the channels change."""

    def __init__(self, in_channels: int, out_channels: int, condition_channels: int, hidden: int) -> None:
        super().__init__()
        middle = min(in_channels, out_channels)
        self.norm_0 = Spade(in_channels, condition_channels, hidden)
        self.conv_0 = SpectralConv2d(in_channels, middle, 3, padding=1, padding_mode="reflect")
        self.norm_1 = Spade(middle, condition_channels, hidden)
        self.conv_1 = SpectralConv2d(middle, out_channels, 3, padding=1, padding_mode="reflect")
        self.learned_shortcut = in_channels != out_channels
        if self.learned_shortcut:
            self.norm_s = Spade(in_channels, condition_channels, hidden)
            self.conv_s = SpectralConv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor, condition: Tensor, *, enlarge: bool = False) -> Tensor:
        """x (B, in, h, w), condition (B, condition, h, w) -> (B, out, h, w); with `enlarge` x is of half the size."""
        normal = positional_norm(x)  # once for both that need it, and before it is enlarged
        if enlarge:
            normal, x = double(normal), double(x)
        y = self.conv_0(F.leaky_relu(self.norm_0(normal, condition), LEAKY_SLOPE))  # (B, middle, h, w)
        y = self.conv_1(F.leaky_relu(self.norm_1(positional_norm(y), condition), LEAKY_SLOPE))  # (B, out, h, w)
        result: Tensor = y + (self.conv_s(self.norm_s(normal, condition)) if self.learned_shortcut else x)
        return result


def fused_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query key^T) value, no matrix formed: (B, N, D), (B, M, D), (B, M, V >= D) -> (B, N, V)."""
    # zero-padded to the values' width: only with equal widths do the fused kernels run
    pad = (0, value.shape[-1] - key.shape[-1])
    query, key, value = (t[:, None].contiguous() for t in (F.pad(query, pad), F.pad(key, pad), value))
    return F.scaled_dot_product_attention(query, key, value, scale=1.0)[:, 0]


class SelfAttention(nn.Module):
    """Every position attends to a 2x2 max-pooled map; `gamma` weighs the result against the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        key_channels, self.value_channels = max(1, channels // 8), max(1, channels // 2)
        self.query = SpectralConv2d(channels, key_channels, 1, bias=False)
        self.key = SpectralConv2d(channels, key_channels, 1, bias=False)
        self.value = SpectralConv2d(channels, self.value_channels, 1, bias=False)
        self.output = SpectralConv2d(self.value_channels, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(()))
        self.attend = fused_attention  # an export puts another in its place

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, h, w) -> the same shape."""
        query = self.query(x).flatten(2).mT  # (B, h w, C / 8)
        key = F.max_pool2d(self.key(x), 2).flatten(2).mT  # (B, h w / 4, C / 8)
        value = F.max_pool2d(self.value(x), 2).flatten(2).mT  # (B, h w / 4, C / 2)
        # (B, C / 2, h, w)
        attended = self.attend(query, key, value).mT.unflatten(2, x.shape[2:])  # type: ignore[no-untyped-call]
        result: Tensor = x + self.gamma * self.output(attended)
        return result
