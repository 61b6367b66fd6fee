"""The gradient by numba: its tiles, strips, threads and left out tiles against the oracle in float64."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerances import CPU, assert_close

from flashcocos.errors import InputError
from flashcocos.kernels import corr_warp, reference
from flashcocos.kernels.cpu import numba_backward, numba_warp, tiling

SINGLE = torch.float32


def make(batch, channels, query, key, values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((channels, *query), (channels, *key), (values, *key), (values, *query))
    theta, phi, *rest = (torch.randn(batch, *shape, generator=generator) for shape in shapes)
    return theta + 0.3, phi - 0.2, *rest  # means that matter


def expected_gradients(theta, phi, values, grad, patch=3, temperature=0.01):
    leaves = [tensor.double().requires_grad_() for tensor in (theta, phi, values)]
    return torch.autograd.grad(reference.warp(*leaves, patch, temperature)[0], leaves, grad.double())


def gradients(theta, phi, values, grad, patch=3, temperature=0.01, **options):
    arrays = [tensor.numpy() for tensor in (theta, phi, values)]
    out, lse, _ = numba_warp.warp_forward(*arrays, patch, temperature)
    results = (out.reshape(grad.shape), lse.reshape(-1, *theta.shape[2:]))
    return numba_backward.warp_backward(*arrays, *results, grad.numpy(), patch, temperature, **options)


def check(got, expected):
    for name, gradient, wanted in zip(("theta", "phi", "values"), got, expected, strict=True):
        assert_close(f"grad of {name}", torch.from_numpy(gradient), wanted, CPU["grad", SINGLE])


@pytest.mark.parametrize("values", [1, 2, 6, 7, 24, 60])
@pytest.mark.parametrize("patch", [1, 3, 5])
def test_odd_maps_equal_float64(patch, values):
    inputs = make(2, 19, (13, 21), (17, 33), values, seed=values)
    check(gradients(*inputs, patch), expected_gradients(*inputs, patch))


@pytest.mark.parametrize("patch", [1, 3, 5])
def test_blocks_and_strips(monkeypatch, patch):
    monkeypatch.setattr(tiling, "CACHE", 1)
    assert numba_backward.choose_block(31, 40, patch) < 12
    inputs = make(1, 16, (29, 31), (23, 30), 20)
    check(gradients(*inputs, patch, threads=4), expected_gradients(*inputs, patch))


@pytest.mark.parametrize("threads", [1, 2, 3, 50])
def test_threads_share_items_and_rows(threads):
    inputs = make(2, 8, (9, 14), (7, 18), 3)
    got = gradients(*inputs, threads=threads)
    check(got, expected_gradients(*inputs))
    again = gradients(*inputs, threads=threads)
    assert all(np.array_equal(a, b) for a, b in zip(got, again, strict=True))


def test_threads_that_share_no_item_change_no_bit():
    inputs = make(4, 8, (9, 14), (7, 18), 3)
    one, four = (gradients(*inputs, threads=threads) for threads in (1, 4))
    assert all(np.array_equal(a, b) for a, b in zip(one, four, strict=True))


def concentrated():
    """Features of which each query matches a few keys, as after training."""
    theta, _, values, grad = make(1, 32, (24, 40), (24, 40), 12)
    smooth = torch.nn.functional.avg_pool2d(theta, 5, 1, 2)
    noise = make(1, 32, (24, 40), (24, 40), 1, seed=1)[0]
    return smooth, smooth.roll((2, -3), (2, 3)) + 0.02 * noise, values, grad


def test_tiles_without_weight_change_nothing_that_float32_shows(monkeypatch):
    inputs = concentrated()
    got = gradients(*inputs)
    check(got, expected_gradients(*inputs))
    monkeypatch.setattr(math, "log2", lambda _: math.inf)  # nothing is left out
    whole = gradients(*inputs)
    for gradient, full in zip(got, whole, strict=True):
        assert np.abs(gradient - full).max() <= 2**-23 * np.abs(full).max()
    assert (got[2] != whole[2]).any(), "no tile was left out"


@pytest.mark.parametrize("temperature", [0.002, 0.1, 1.0])
def test_other_temperatures(temperature):
    inputs = make(1, 16, (11, 12), (14, 9), 5)
    got, expected = gradients(*inputs, temperature=temperature), expected_gradients(*inputs, temperature=temperature)
    for gradient, wanted in zip(got, expected, strict=True):
        largest = max(0.01 / temperature, 1) * CPU["grad", SINGLE].largest  # a logit's error grows as the logit
        error = (torch.from_numpy(gradient) - wanted).abs().max() / wanted.square().mean().sqrt()
        assert error <= largest


def test_nan_reaches_the_gradients():
    inputs = make(1, 8, (6, 40), (5, 40), 2)
    inputs[0][0, 3, 2, 2] = math.nan
    d_theta, d_phi, d_values = gradients(*inputs)
    assert np.isnan(d_theta[:, :, 1:4, 1:4]).all()
    assert np.isnan(d_phi).any()
    assert np.isnan(d_values).all()


def test_auto_takes_numba_but_for_float64(monkeypatch):
    ran = []
    for module, name in ((numba_warp, "warp_forward"), (numba_backward, "warp_backward"), (reference, "warp")):
        spied = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, spied=spied, n=name, **k: (ran.append(n), spied(*a, **k))[1])
    theta, phi, values, _ = make(1, 4, (3, 4), (4, 3), 2)
    for dtypes in ((SINGLE, SINGLE), (torch.float64, torch.float64), (SINGLE, torch.float16)):
        leaf = theta.to(dtypes[0]).requires_grad_()
        corr_warp(leaf, phi.to(dtypes[0]), values.to(dtypes[1])).sum().backward()
    assert ran == ["warp_forward", "warp_backward", "warp", "warp_forward", "warp_backward"]


def test_numba_by_name_refuses_float64():
    theta, phi, values, _ = make(1, 4, (3, 4), (4, 3), 2)
    with pytest.raises(InputError, match=r"backend 'numba' computes in float32, got float64"):
        corr_warp(theta.double(), phi.double(), values.double(), backend="numba")


def test_the_cache_follows_both_files():
    """One function is cached; its key has its own file and, through its closure, the file that it builds on."""
    (version,) = (cell.cell_contents for cell in numba_backward.backward_task.py_func.__closure__)
    assert version == hashlib.sha256(Path(numba_warp.__file__).read_bytes()).hexdigest()
    cached = {
        name for name, value in vars(numba_backward).items()
        if getattr(value, "__module__", "") == numba_backward.__name__ and hasattr(value, "py_func")
        and type(value._cache).__name__ != "NullCache"
    }  # fmt: skip
    assert cached == {"backward_task"}
