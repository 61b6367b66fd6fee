"""The warp by numba on tensors of the CPU, float32 without a copy and 16 bits converted to it, on torch's threads."""

from __future__ import annotations

import numpy as np
import torch

from ...errors import InputError
from . import numba_backward, numba_warp
from .numpy_warp import Array


def warp_forward(
    theta: torch.Tensor, phi: torch.Tensor, values: torch.Tensor, patch: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The warp (B, V, Hq, Wq) in the dtype of the values and the lse (B, Hq, Wq) float32, no autograd."""
    out, lse, _ = numba_warp.warp_forward(
        _array(theta), _array(phi), _array(values), patch, temperature, threads=torch.get_num_threads()
    )
    batch, _, height, width = theta.shape
    warped = torch.from_numpy(out).view(batch, -1, height, width).to(values.dtype)
    return warped, torch.from_numpy(lse).view(batch, height, width)


def warp_backward(
    theta: torch.Tensor,
    phi: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    patch: int,
    temperature: float,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of theta, phi and values, each in its dtype and contiguous, from that of `out`.

    None where `needs` says so.
    """
    grads = numba_backward.warp_backward(
        _array(theta), _array(phi), _array(values), _array(out), _array(lse), _array(grad_out),
        patch, temperature, needs, threads=torch.get_num_threads(),
    )  # fmt: skip
    return tuple(
        None if grad is None else torch.from_numpy(grad).to(like.dtype)
        for grad, like in zip(grads, (theta, phi, values), strict=True)
    )


def _array(tensor: torch.Tensor) -> Array:
    if tensor.dtype == torch.float64:
        raise InputError("backend 'numba' computes in float32, got float64; convert it, or use 'reference'")
    return np.ascontiguousarray(tensor.detach().float().numpy())
