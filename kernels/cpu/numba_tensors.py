"""The warp by numba on float32 tensors of the CPU, which it reads as arrays, without a copy, on torch's threads."""

from __future__ import annotations

import numpy as np
import torch

from ...errors import InputError
from . import numba_backward, numba_warp
from .numpy_warp import Array


def warp_forward(
    theta: torch.Tensor, phi: torch.Tensor, values: torch.Tensor, patch: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `torch_warp.warp_forward`, for float32 alone."""
    out, lse, _ = numba_warp.warp_forward(
        _array(theta), _array(phi), _array(values), patch, temperature, threads=torch.get_num_threads()
    )
    batch, _, height, width = theta.shape
    return torch.from_numpy(out).view(batch, -1, height, width), torch.from_numpy(lse).view(batch, height, width)


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
    """As `torch_warp.warp_backward`, for float32 alone; gradients are contiguous."""
    grads = numba_backward.warp_backward(
        _array(theta), _array(phi), _array(values), _array(out), _array(lse), _array(grad_out),
        patch, temperature, needs, threads=torch.get_num_threads(),
    )  # fmt: skip
    return tuple(None if grad is None else torch.from_numpy(grad) for grad in grads)


def _array(tensor: torch.Tensor) -> Array:
    if tensor.dtype != torch.float32:
        raise InputError(f"backend 'numba' needs float32 tensors, got {tensor.dtype}; convert them, or use 'cpu'")
    return np.ascontiguousarray(tensor.detach().numpy())
