"""The CPU paths, numpy and numba, against the float64 oracle, and the properties every path has."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tolerances import CPU, assert_close

from flashcocos.kernels import corr_match, corr_row, corr_warp, reference
from flashcocos.kernels.corr_warp import warp_arrays
from flashcocos.kernels.cpu import numpy_warp, tiling

SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16

# batch, C, query map, key map, V, patch: odd and prime sizes, one and many tiles, each way of summing values
CASES = {
    "one": (1, 4, (1, 1), (1, 1), 1, 3),
    "one-key": (1, 5, (3, 2), (1, 1), 3, 3),
    "row-column": (1, 16, (31, 1), (1, 40), 2, 3),
    "batch": (3, 7, (5, 7), (11, 3), 3, 3),
    "square": (1, 64, (16, 16), (16, 16), 8, 3),
    "prime": (1, 33, (17, 23), (13, 31), 48, 3),
    "wide": (2, 24, (9, 12), (10, 9), 151, 3),
    "patch1": (2, 20, (12, 11), (7, 19), 48, 1),
    "patch1-small": (1, 16, (2, 1), (1, 3), 1, 1),
    "patch5": (1, 12, (11, 9), (9, 14), 3, 5),
    "patch5-small": (1, 12, (2, 3), (3, 1), 9, 5),
    "long": (1, 20, (3, 150), (2, 200), 3, 3),
}


@pytest.fixture(params=list(CASES), ids=list(CASES))
def case(request):
    """theta, phi, values, grad of the output (float32, well mixed), and the patch."""
    batch, channels, query, key, values, patch = CASES[request.param]
    return *make(batch, channels, query, key, values), patch


def make(batch, channels, query, key, values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((channels, *query), (channels, *key), (values, *key), (values, *query))
    theta, phi, *rest = (torch.randn(batch, *shape, generator=generator) for shape in shapes)
    return theta + 0.3, phi - 0.2, *rest  # means that matter


def oracle(theta, phi, values, grad, patch, temperature=0.01):
    leaves = [tensor.detach().double().requires_grad_() for tensor in (theta, phi, values)]
    out, lse = reference.warp(*leaves, patch, temperature)
    return out.detach(), lse.detach(), torch.autograd.grad(out, leaves, grad.double())


def check_arrays(backend, theta, phi, values, patch, temperature=0.01):
    """One pass of an array backend against the oracle: warp, lse and match."""
    inputs = [tensor.numpy() for tensor in (theta, phi, values)]
    got = warp_arrays(*inputs, patch=patch, temperature=temperature, match=True, backend=backend)
    assert got.backend == backend
    logits = reference.logits(theta.double(), phi.double(), patch, temperature)
    weights = logits.softmax(-1)
    expected, lse = reference.warp(theta.double(), phi.double(), values.double(), patch, temperature)
    assert_close("out", torch.from_numpy(got.out), expected, CPU["out", SINGLE])
    assert_close("lse", torch.from_numpy(got.lse), lse, CPU["lse", SINGLE])
    grid = (theta.shape[0], *theta.shape[2:])
    probability = torch.from_numpy(got.match.probability)
    assert_close("probability", probability, weights.amax(-1).view(grid), CPU["probability", SINGLE])
    index = torch.from_numpy(got.match.index).view(grid[0], -1, 1)
    # the likeliest key, or one whose weight cannot be told from it in float32
    torch.testing.assert_close(weights.gather(2, index)[..., 0], weights.amax(-1), rtol=1e-4, atol=0)
    return got


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_arrays_equal_the_oracle(case, backend):
    theta, phi, values, _, patch = case
    check_arrays(backend, theta, phi, values, patch)


@pytest.mark.parametrize("temperature", [0.002, 1.0])
@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_arrays_at_other_temperatures(backend, temperature):
    theta, phi, values, _ = make(1, 32, (14, 15), (13, 18), 3)
    phi[:, :, :12, :15] += theta[:, :, 1:13]  # peaks, so that most keys are below the cutoff
    got = warp_arrays(*(x.numpy() for x in (theta, phi, values)), temperature=temperature, backend=backend)
    expected, _ = reference.warp(theta.double(), phi.double(), values.double(), 3, temperature)
    largest = 0.01 / temperature * CPU["out", SINGLE].largest  # a logit's error grows as the logit
    np.testing.assert_allclose(got.out, expected.numpy(), rtol=0, atol=max(largest, 1e-6) * float(values.abs().max()))


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_many_tiles_and_tasks(monkeypatch, backend):
    monkeypatch.setattr(numpy_warp, "BUDGET", 1 << 17)
    monkeypatch.setattr(tiling, "CACHE", 1 << 12)
    monkeypatch.setattr(tiling, "KEYS", 32)
    if backend == "numba":
        from numba.core import config

        monkeypatch.setattr(config, "NUMBA_NUM_THREADS", 5)
    blocks = tiling.choose_cache_blocks((29, 31), (23, 30), 3, 5, rows=6, columns=16)
    assert blocks.block < 31
    assert blocks.strip < 29
    assert tiling.fit_tiles((29, 31), (23, 30), 3, 1 << 17, buffers=2).key_rows < 23
    theta, phi, values, _ = make(2, 16, (29, 31), (23, 30), 20)
    check_arrays(backend, theta, phi, values, 3)


@pytest.mark.parametrize("dtype", [SINGLE, HALF, BRAIN], ids=str)
def test_tensors_equal_the_oracle(case, dtype):
    *inputs, grad = (tensor.to(dtype) for tensor in case[:4])
    patch = case[4]
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out, lse = corr_warp(*leaves, patch=patch, return_lse=True, backend="numba")
    grads = torch.autograd.grad(out, leaves, grad)
    expected, expected_lse, expected_grads = oracle(*inputs, grad, patch)
    assert out.dtype == dtype
    assert_close("out", out, expected, CPU["out", dtype])
    assert_close("lse", lse, expected_lse, CPU["lse", lse.dtype])
    for name, got, want in zip(("theta", "phi", "values"), grads, expected_grads, strict=True):
        assert got.dtype == dtype
        if want.abs().max() > 0.01:
            assert_close(f"grad of {name}", got, want, CPU["grad", dtype])
        else:  # one or two keys, where the softmax is saturated: a difference of equal terms
            torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-4)


def test_gradients_only_where_needed():
    inputs = make(1, 6, (4, 5), (5, 4), 3)[:3]
    expected = None
    for needed in range(3):
        leaves = [tensor.clone().requires_grad_(i == needed) for i, tensor in enumerate(inputs)]
        corr_warp(*leaves, backend="numba").square().sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [i == needed for i in range(3)]
        whole = [tensor.clone().requires_grad_() for tensor in inputs]
        corr_warp(*whole, backend="numba").square().sum().backward()
        expected = whole[needed].grad
        assert torch.equal(leaves[needed].grad, expected)


def test_strided_inputs():
    theta, phi, values, grad = make(2, 12, (7, 6), (5, 8), 5)
    expected = corr_warp(theta, phi, values, backend="numba")
    strided = [x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for x in (theta, phi, values)]
    leaves = [x.requires_grad_() for x in strided]
    out = corr_warp(*leaves, backend="numba")
    assert torch.equal(out, expected)
    grads = torch.autograd.grad(out, leaves, grad.transpose(2, 3).contiguous().transpose(2, 3))
    for got, want in zip(grads, oracle(theta, phi, values, grad, 3)[2], strict=True):
        assert_close("grad", got, want, CPU["grad", SINGLE])
    for backend in ("numpy", "numba"):
        arrays = [x.detach().numpy() for x in strided]
        assert not arrays[0].flags.c_contiguous
        np.testing.assert_array_equal(
            corr_warp(*arrays, backend=backend),
            corr_warp(*(np.ascontiguousarray(x) for x in arrays), backend=backend),
        )


def run(backend, theta, phi, values, **options):
    """An implementation for arrays, tensors in and out."""
    arrays = (x.numpy() for x in (theta, phi, values))
    return torch.from_numpy(corr_warp(*arrays, backend=backend, **options))


EVERY = pytest.mark.parametrize("backend", ["numpy", "numba"])


@EVERY
@pytest.mark.parametrize("patch", [1, 3])
def test_ones_warp_to_ones(backend, patch):
    theta, phi, _, _ = make(1, 9, (13, 14), (15, 11), 1)
    out = run(backend, theta, phi, torch.ones(1, 2, 15, 11), patch=patch)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=1e-6)


@EVERY
def test_order_of_keys_does_not_matter_to_single_positions(backend):
    theta, phi, values, _ = make(1, 16, (6, 7), (8, 9), 3)
    order = torch.randperm(72, generator=torch.Generator().manual_seed(1))
    moved = [x.flatten(2)[..., order].view_as(x) for x in (phi, values)]
    expected = run(backend, theta, phi, values, patch=1)
    assert_close("out", run(backend, theta, *moved, patch=1), expected, CPU["out", SINGLE])


@EVERY
@pytest.mark.parametrize("symmetry", [lambda x: x.flip(3), lambda x: x.transpose(2, 3), lambda x: x.flip(2, 3)])
def test_turning_all_maps_turns_the_warp(backend, symmetry):
    inputs = make(1, 16, (9, 13), (8, 11), 3)[:3]
    turned = run(backend, *(symmetry(x).contiguous() for x in inputs))
    assert_close("out", turned, symmetry(run(backend, *inputs)), CPU["out", SINGLE])


@EVERY
def test_identical_features_copy(backend):
    theta, _, values, _ = make(1, 32, (12, 13), (12, 13), 3)
    out = run(backend, theta, theta, values, temperature=1e-3)
    torch.testing.assert_close(out, values, rtol=0, atol=1e-6)


@EVERY
def test_constant_features_average(backend):
    values = make(1, 4, (5, 6), (5, 6), 3)[2]
    flat = torch.full((1, 4, 5, 6), 0.7)
    out = run(backend, flat, flat, values, patch=1)
    torch.testing.assert_close(out, values.mean((2, 3), keepdim=True).expand_as(out), rtol=0, atol=1e-6)


def test_constant_features_have_no_gradient():
    values = make(1, 4, (5, 6), (5, 6), 3)[2]
    leaves = [torch.full((1, 4, 5, 6), 0.7, requires_grad=True) for _ in range(2)]
    corr_warp(*leaves, values, patch=1, backend="numba").square().sum().backward()
    assert all(leaf.grad.abs().max() == 0 for leaf in leaves)


@EVERY
def test_nan_is_not_hidden(backend):
    theta, phi, values, _ = make(1, 8, (4, 5), (5, 4), 2)
    theta[0, 3, 2, 2] = math.nan
    out = run(backend, theta, phi, values)
    assert out[:, :, 1:4, 1:4].isnan().all()
    assert out[:, :, :, 4].isfinite().all()


def poisoned(shape, dtype=float, order="C"):
    return np.full(shape, np.nan if np.issubdtype(dtype, np.floating) else -1, dtype, order)


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_every_result_is_written(monkeypatch, backend):
    inputs = [x.numpy() for x in make(2, 5, (7, 6), (5, 9), 10)[:3]]
    expected = warp_arrays(*inputs, match=True, backend=backend)

    monkeypatch.setattr(np, "empty", poisoned)
    got = warp_arrays(*inputs, match=True, backend=backend)
    np.testing.assert_array_equal(got.out, expected.out)
    np.testing.assert_array_equal(got.lse, expected.lse)
    for name, field in vars(expected.match).items():
        np.testing.assert_array_equal(getattr(got.match, name), field)


def test_every_tensor_result_is_written(monkeypatch):
    inputs = make(2, 5, (7, 6), (5, 9), 10)[:3]
    monkeypatch.setattr(np, "empty", poisoned)
    monkeypatch.setattr(np, "empty_like", lambda array: poisoned(array.shape, array.dtype))
    torch.use_deterministic_algorithms(True)  # fills new memory with nan
    try:
        leaves = [x.requires_grad_() for x in inputs]
        out, lse = corr_warp(*leaves, return_lse=True, backend="numba")
        out.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x.isfinite().all() for x in (out, lse, *(leaf.grad for leaf in leaves)))


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_lowest_of_equal_keys(backend):
    theta = make(1, 6, (4, 5), (1, 1), 1)[0].numpy()
    key = make(1, 6, (1, 1), (1, 1), 1)[1].numpy()
    match = corr_match(theta, np.broadcast_to(key, (1, 6, 7, 9)), patch=1, backend=backend)
    assert (match.index == 0).all()
    np.testing.assert_allclose(match.probability, 1 / 63, rtol=1e-6)


def test_match_of_tensors():
    theta, phi, _, _ = make(2, 8, (6, 5), (4, 7), 1)
    match = corr_match(theta, phi, backend="numpy")
    arrays = corr_match(theta.numpy(), phi.numpy(), backend="numpy")
    for name, field in vars(arrays).items():
        assert torch.equal(getattr(match, name), torch.from_numpy(field))
    assert match.index.shape == (2, 6, 5)


@pytest.mark.parametrize("patch", [1, 3, 5])
@pytest.mark.parametrize("position", [(0, 0), (3, 2), (8, 6)])
def test_row_is_the_row_of_the_matrix(position, patch):
    theta, phi, _, _ = make(2, 8, (9, 7), (6, 5), 1)
    expected = reference.logits(theta.double(), phi.double(), patch, 0.01).softmax(-1)
    expected = expected[:, position[0] * 7 + position[1]].view(2, 6, 5)
    row = corr_row(theta, phi, position, patch=patch)
    assert row.dtype == SINGLE
    torch.testing.assert_close(row.double(), expected, rtol=0, atol=2e-5)
    row = corr_row(theta.numpy(), phi.numpy(), position, patch=patch)
    np.testing.assert_allclose(row, expected, rtol=0, atol=2e-5)
    row = corr_row(theta.double(), phi.double(), position, patch=patch)
    torch.testing.assert_close(row, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("budget", [1, 1 << 14, 1 << 18, 1 << 30])
@pytest.mark.parametrize("maps", [((1, 1), (1, 1)), ((64, 64), (64, 64)), ((7, 100), (300, 3)), ((128, 1), (1, 128))])
@pytest.mark.parametrize("patch", [1, 3, 5])
def test_tiles_fit_the_budget_and_cover_the_maps(maps, patch, budget):
    (hq, wq), (hk, wk) = maps
    tiles = tiling.fit_tiles(*maps, patch, budget, buffers=2)
    assert 1 <= tiles.query_rows <= hq
    assert 1 <= tiles.key_rows <= hk
    halo = patch - 1
    size = (tiles.query_rows + halo) * (wq + halo) * (tiles.key_rows + halo) * (wk + halo) * 4 * 2
    assert size <= budget or tiles == (1, 1)
    whole = (hq + halo) * (wq + halo) * (hk + halo) * (wk + halo) * 4 * 2
    assert (whole <= budget) == (tiles == (hq, hk)) or tiles == (1, 1)
