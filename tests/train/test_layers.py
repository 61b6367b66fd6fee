"""The shared layers against plain formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from operator_log import OperatorLog

from flashcocos.train.networks.layers import (
    SelfAttention,
    SpectralConv2d,
    add_spectral_norm,
    fold_spectral_norm,
    folded_state,
    positional_norm,
    subsample,
    unit_length,
)


def test_positional_norm_matches_its_formula() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 7, 3, 5, dtype=torch.float64) * 3 + 2
    expected = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=True, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(positional_norm(x), expected, rtol=1e-12, atol=1e-12)


def test_positional_norm_survives_a_large_mean() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 64, 4, 4, dtype=torch.float64) + 4096
    error = (positional_norm(x.float()).double() - positional_norm(x)).abs().max()
    assert error < 1e-3  # float32 holds 4096 + x to 2.4e-4; E[x^2] - E[x]^2 would lose the variance altogether


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spread", [400.0, 1e-3])
def test_norms_of_16_bit_features_are_made_in_float32(dtype: torch.dtype, spread: float) -> None:
    """The square of 400 is beyond float16, that of 0.001 below it; both norms once gave zeros or infinities."""
    torch.manual_seed(0)
    x = (torch.randn(2, 64, 4, 4) * spread).to(dtype).requires_grad_()
    for norm in (positional_norm, unit_length):
        result = norm(x)
        assert result.dtype == dtype
        assert torch.equal(result, norm(x.detach().float()).to(dtype))
        (gradient,) = torch.autograd.grad(result.square().sum(), x)
        assert gradient.isfinite().all()
    assert positional_norm(x).float().std() > 0.3  # at a spread of 0.001 the epsilon counts
    torch.testing.assert_close(unit_length(x).float().norm(dim=1), torch.ones(2, 4, 4), atol=4e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_norms_of_zero_vectors_are_zero(dtype: torch.dtype) -> None:
    x = torch.zeros(1, 8, 2, 2, dtype=dtype)
    assert torch.equal(positional_norm(x), x)
    assert torch.equal(unit_length(x), x)


def test_norms_of_float32_keep_their_bits() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 64, 5, 3) * 7 + 1
    centered = x - x.mean(1, keepdim=True)
    variance = centered.square().sum(1, keepdim=True) / 63
    assert torch.equal(positional_norm(x), centered / (variance + 1e-5).sqrt())
    assert torch.equal(unit_length(x), x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 2.2e-16))


@pytest.mark.parametrize("step", [1, 2, 4, 8, 16, 32])
def test_subsample_is_nearest_resizing(step: int) -> None:
    x = torch.arange(2 * 3 * 64 * 96.0).reshape(2, 3, 64, 96)
    assert torch.equal(subsample(x, step), F.interpolate(x, size=(64 // step, 96 // step), mode="nearest"))


def test_self_attention_matches_the_plain_matrix() -> None:
    torch.manual_seed(0)
    layer = SelfAttention(16).double()
    with torch.no_grad():
        layer.gamma.fill_(0.7)
    x = torch.randn(2, 16, 6, 10, dtype=torch.float64)
    query = layer.query(x).flatten(2)  # (B, C / 8, h w)
    key = F.max_pool2d(layer.key(x), 2).flatten(2)  # (B, C / 8, h w / 4)
    value = F.max_pool2d(layer.value(x), 2).flatten(2)  # (B, C / 2, h w / 4)
    weights = (query.mT @ key).softmax(-1)  # (B, h w, h w / 4)
    expected = x + 0.7 * layer.output((value @ weights.mT).reshape(2, 8, 6, 10))
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_self_attention_forms_no_matrix() -> None:
    layer, x = SelfAttention(16), torch.randn(1, 16, 64, 48)
    with torch.no_grad(), OperatorLog() as log:
        layer(x)
    assert "_scaled_dot_product_flash_attention_for_cpu" in log.names
    assert log.largest <= x.numel()  # the matrix would have 3072 x 768 entries, 48 times as many


def test_self_attention_of_one_channel() -> None:
    assert SelfAttention(1)(torch.randn(1, 1, 4, 4)).shape == (1, 1, 4, 4)


def test_fold_divides_by_u_w_v() -> None:
    torch.manual_seed(0)
    weight, u, v = torch.randn(5, 3, 3, 3), F.normalize(torch.randn(5), dim=0), F.normalize(torch.randn(27), dim=0)
    sigma = sum(
        float(u[i]) * float(weight.reshape(5, 27)[i, j]) * float(v[j]) for i in range(5) for j in range(27)
    )  # in Python's float64
    expected = torch.tensor([float(w) / sigma for w in weight.flatten()]).reshape(5, 3, 3, 3)
    folded = fold_spectral_norm(weight, u, v)
    assert folded.dtype == torch.float32
    torch.testing.assert_close(folded, expected, rtol=2e-7, atol=0)


def test_folded_layer_equals_the_normed_one() -> None:
    torch.manual_seed(0)
    normed = torch.nn.Sequential(SpectralConv2d(3, 6, 3), torch.nn.ReLU(), torch.nn.Conv2d(6, 2, 1))
    add_spectral_norm(normed)
    normed(torch.randn(1, 3, 8, 8))  # one power iteration moves u and v
    plain = torch.nn.Sequential(SpectralConv2d(3, 6, 3), torch.nn.ReLU(), torch.nn.Conv2d(6, 2, 1))
    plain.load_state_dict(folded_state(normed))
    assert plain[0].weight.detach().flatten(1).svd().S[0] == pytest.approx(1, abs=0.1)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(plain(x), normed.eval()(x), rtol=1e-5, atol=1e-6)
