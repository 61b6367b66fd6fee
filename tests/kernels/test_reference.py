"""The oracle itself, against the definition written out position by position, and its gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flashcocos.kernels import reference


def patch_vector(features, y, x, patch):
    """The zero padded, centered and normalized patch around one position of (C, H, W)."""
    half = patch // 2
    padded = np.pad(features, ((0, 0), (half, half), (half, half)))
    vector = padded[:, y : y + patch, x : x + patch].ravel()
    vector = vector - vector.mean()
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("patch", [1, 3, 5])
def test_is_the_definition(rng, patch):
    theta, phi = rng.standard_normal((6, 3, 4)), rng.standard_normal((6, 5, 2))
    values = rng.standard_normal((2, 5, 2))
    out, lse = reference.warp(*(torch.from_numpy(x)[None] for x in (theta, phi, values)), patch, 0.1)
    for y in range(3):
        for x in range(4):
            query = patch_vector(theta, y, x, patch)
            keys = [patch_vector(phi, i, j, patch) for i in range(5) for j in range(2)]
            exponentials = np.exp(np.array(keys) @ query / 0.1)
            expected = values.reshape(2, -1) @ exponentials / exponentials.sum()
            np.testing.assert_allclose(out[0, :, y, x], expected, rtol=0, atol=1e-12)
            np.testing.assert_allclose(lse[0, y, x], np.log(exponentials.sum()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("patch", [1, 3])
def test_gradients(patch):
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 3, 2, 3), (1, 3, 3, 2), (1, 2, 3, 2))
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(lambda *tensors: reference.warp(*tensors, patch, 0.2), inputs)


def test_keeps_the_dtype():
    inputs = [torch.randn(1, 3, 4, 4) for _ in range(3)]
    assert {result.dtype for result in reference.warp(*inputs)} == {torch.float32}
