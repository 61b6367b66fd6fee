"""The correspondence warp alone: flashcocos's implementations against the published form and torch's attention.

    numpy, numba    arrays, what the runtime has on a CPU; with the backward pass numba gets tensors, as in training
    triton          tensors on a GPU; triton-nine-tap and triton-straightforward name the kernel of the forward pass
    reference       the published form: unfold, center, normalize, N x N matrix, softmax, product
    compiled        torch.compile of the same
    sdpa            torch's scaled_dot_product_attention on the unfolded and normalized features

A row's max_error is that of 16 queries against the softmax in float64, and with the backward pass also that of all
three gradients of 16 x 16 maps against float64's, relative to their largest. Array methods are timed turn by turn with
the bare product theta^T phi in numpy, in blocks into one buffer, so that a busy machine slows both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ...kernels import corr_row, corr_warp
from ..registry import Assets, Benchmark, Case, Sample
from .inputs import warp_inputs

ARRAYS = ("numba", "numpy")
TRITON_KERNELS = {"triton": "auto", "triton-nine-tap": "nine_tap", "triton-straightforward": "straightforward"}
BLOCK = 2048
SMALL = 16  # side of the maps that warm up and whose gradients are compared
TEMPERATURE = 0.01


def prepare(case: Case, assets: Assets) -> Benchmark:
    """The warp; its results are the warped values (1, values, size, size).

    parameters: method, size (side of the maps), patch, values, channels, inputs, dtype, backward and product (whether
    to time the bare product too).
    """
    parameters = case.parameters
    arrays = warp_inputs(parameters["size"], parameters["values"], parameters["inputs"], parameters["channels"])
    small = warp_inputs(min(SMALL, parameters["size"]), parameters["values"], "noise", parameters["channels"])
    baseline = _product(*arrays[:2]) if parameters["product"] else None
    if parameters["method"] in ARRAYS and not parameters["backward"]:
        backend, patch = parameters["method"], parameters["patch"]
        corr_warp(*small, patch=patch, backend=backend)  # compiles

        def run() -> Sample:
            return Sample(corr_warp(*arrays, patch=patch, backend=backend))

        return Benchmark(run, lambda out: {"max_error": largest_error(arrays, out, patch)}, baseline=baseline)
    return _tensors(parameters, arrays, small, assets.device)


def _tensors(
    parameters: Mapping[str, Any], arrays: tuple[np.ndarray, ...], small: tuple[np.ndarray, ...], device: str
) -> Benchmark:
    import torch

    dtype, patch, backward = getattr(torch, parameters["dtype"]), parameters["patch"], parameters["backward"]
    warp = _method(parameters["method"], patch)

    def pass_of(inputs: tuple[np.ndarray, ...], dtype: torch.dtype, device: str, warp: Any) -> Callable[[], Any]:
        leaves = [torch.from_numpy(array).to(device, dtype).requires_grad_(backward) for array in inputs]
        slope = torch.linspace(-1, 1, leaves[2].numel(), device=device, dtype=dtype).reshape(leaves[2].shape)

        def run() -> Any:
            with torch.set_grad_enabled(backward):
                out = warp(*leaves)
                return (out, torch.autograd.grad(out, leaves, slope)) if backward else (out, ())

        return run

    wrong = 0.0
    if backward:
        exact = pass_of(small, torch.float64, device, _method("reference", patch))()[1]
        for got, expected in zip(pass_of(small, dtype, device, warp)()[1], exact, strict=True):
            wrong = max(wrong, float((got.double() - expected).abs().max() / expected.abs().max()))
    else:
        pass_of(small, dtype, device, warp)()
    run = pass_of(arrays, dtype, device, warp)

    def check(out: Any) -> dict[str, float]:
        return {"max_error": max(wrong, largest_error(arrays, out.detach().float().cpu().numpy(), patch))}

    return Benchmark(lambda: Sample(run()[0]), check)


def _method(name: str, patch: int) -> Callable[..., Any]:
    """The tensor method `name`: a function of theta, phi (1, C, H, W) and values (1, V, H, W)."""
    import torch

    from ...kernels import reference

    def published(theta: Any, phi: Any, values: Any) -> Any:
        weights = reference.logits(theta, phi, patch, TEMPERATURE).softmax(-1)
        return torch.unflatten(values.flatten(2) @ weights.mT, 2, theta.shape[2:])

    def sdpa(theta: Any, phi: Any, values: Any) -> Any:
        query, key = (reference.patch_vectors(side, patch).mT[:, None] for side in (theta, phi))
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, values.flatten(2).mT[:, None], scale=1 / TEMPERATURE
        )
        return torch.unflatten(out[:, 0].mT, 2, theta.shape[2:])

    def triton(theta: Any, phi: Any, values: Any) -> Any:
        from ...kernels.gpu.triton_warp import choose_forward

        with choose_forward(TRITON_KERNELS[name]):
            return corr_warp(theta, phi, values, patch=patch, temperature=TEMPERATURE, backend="triton")

    if name == "compiled":
        compiled: Callable[..., Any] = torch.compile(published, dynamic=False)
        return compiled
    methods: dict[str, Callable[..., Any]] = {
        "reference": published,
        "sdpa": sdpa,
        "numba": functools.partial(corr_warp, patch=patch, temperature=TEMPERATURE, backend="numba"),
        **dict.fromkeys(TRITON_KERNELS, triton),
    }
    return methods[name]


def largest_error(arrays: tuple[np.ndarray, ...], out: np.ndarray, patch: int) -> float:
    """Largest difference of 16 queries of `out` from the float64 softmax."""
    theta, phi, values = arrays
    size, worst = theta.shape[2], 0.0
    wide = theta.astype(np.float64), phi.astype(np.float64)
    for y, x in np.random.default_rng(1).integers(0, size, (16, 2)):
        weights = corr_row(*wide, (int(y), int(x)), patch=patch)
        worst = max(worst, float(np.abs(np.einsum("bvhw,bhw->bv", values, weights) - out[:, :, y, x]).max()))
    return worst


def _product(theta: np.ndarray, phi: np.ndarray) -> Callable[[], None]:
    """The bare product of all queries with all keys."""
    channels = theta.shape[1]
    rows = np.ascontiguousarray(theta.reshape(channels, -1).T)
    columns = phi.reshape(channels, -1)
    buffer = np.empty((BLOCK, columns.shape[1]), np.float32)
    blocks = [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]

    def run() -> None:
        for block in blocks:
            np.matmul(block, columns, out=buffer[: len(block)])

    return run
