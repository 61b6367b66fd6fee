"""`torch.ops.flashcocos.corr_warp`: the warp as one operator with fake tensors and autograd, whatever the backend.

torch.compile and torch.export see one node forward, and one (`flashcocos::corr_warp_backward`) backward; the tiles,
the Triton launches and the choice of tile sizes stay inside. `flashcocos.kernels.corr_warp` is the public way in.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendError, InputError

_MODULES = {"numba": "cpu.numba_tensors", "triton": "gpu.triton_warp"}


@torch.library.custom_op(
    "flashcocos::corr_warp",
    mutates_args=(),
    schema="(Tensor theta, Tensor phi, Tensor values, int patch, float temperature, str backend) -> (Tensor, Tensor)",
)
def corr_warp_op(
    theta: Tensor, phi: Tensor, values: Tensor, patch: int, temperature: float, backend: str
) -> tuple[Tensor, Tensor]:
    """The warp (B, V, Hq, Wq) in the dtype of the values and its lse (B, Hq, Wq), which carries no gradient.

    theta (B, C, Hq, Wq), phi (B, C, Hk, Wk), values (B, V, Hk, Wk); backend "numba" or "triton". Shapes are those
    that `flashcocos.kernels.corr_warp` has checked. Raises `BackendError` where the backend cannot run.
    """
    result: tuple[Tensor, Tensor] = implementation(backend).warp_forward(theta, phi, values, patch, temperature)
    return result


@corr_warp_op.register_fake
def _(theta: Tensor, phi: Tensor, values: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    batch, _, height, width = theta.shape
    out = values.new_empty((batch, values.shape[1], height, width))
    return out, theta.new_empty((batch, height, width), dtype=torch.promote_types(theta.dtype, torch.float32))


@torch.library.custom_op(
    "flashcocos::corr_warp_backward",
    mutates_args=(),
    schema="(Tensor theta, Tensor phi, Tensor values, Tensor out, Tensor lse, Tensor grad_out, "
    "int patch, float temperature, str backend, bool[] needs) -> Tensor[]",
)
def corr_warp_backward_op(
    theta: Tensor,
    phi: Tensor,
    values: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    patch: int,
    temperature: float,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients of theta, phi and values, of those that `needs` asks for, in that order."""
    grads = implementation(backend).warp_backward(
        theta, phi, values, out, lse, grad_out, patch, temperature, tuple(needs)
    )
    return [grad for grad in grads if grad is not None]


@corr_warp_backward_op.register_fake
def _(theta: Tensor, phi: Tensor, values: Tensor, *others: Any) -> list[Tensor]:
    *_, backend, needs = others
    like = [x.new_empty(x.shape) for x in (theta, phi, values)]
    if backend == "triton":
        like[:2] = _channels_last(theta), _channels_last(phi)
    return [grad for grad, need in zip(like, needs, strict=True) if need]


def _channels_last(features: Tensor) -> Tensor:
    batch, channels, height, width = features.shape
    return features.new_empty((batch, height, width, channels)).permute(0, 3, 1, 2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, patch, temperature, backend = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors, out, lse)
    ctx.options = patch, temperature, backend


def _backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    grads = iter(corr_warp_backward_op(*ctx.saved_tensors, grad_out, *ctx.options, needs))
    return (*(next(grads) if need else None for need in needs), None, None, None)


corr_warp_op.register_autograd(_backward, setup_context=_setup_context)


def implementation(backend: str) -> ModuleType:
    """The module of one backend; raises `InputError` for an unknown one, `BackendError` where it is not installed."""
    if backend not in _MODULES:
        raise InputError(f"backend of the operator: expected one of {', '.join(_MODULES)}, got {backend!r}")
    try:
        return importlib.import_module(f".{_MODULES[backend]}", __package__)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise BackendError(
            'backend="triton" needs the triton package, which CUDA builds of torch for Linux bring along '
            '(elsewhere: pip install triton, or triton-windows); or use backend="numba" or "reference"'
        ) from error
