"""The public functions of the warp: validation, and the choice of an implementation.

This module imports numpy alone; torch, triton and numba load when a call needs them. Every implementation computes
the same exact result (module `reference` is the definition) without forming the N x M matrix, except "reference".
Precision: logits and softmax are float32 (float64 for float64 tensors), whatever the dtype of the inputs; at
temperature 0.01 a rounding of the correlation is amplified a hundredfold, so 16-bit inputs limit the result by their
own rounding, not by the arithmetic.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import BackendError, InputError

if TYPE_CHECKING:
    import torch

ARRAY_BACKENDS = ("auto", "numba", "numpy")
TENSOR_BACKENDS = ("auto", "triton", "numba", "reference")
PATCHES = (1, 3, 5)
NUMBA_MISSING = "backend 'numba' needs numba: pip install 'flashcocos[cpu]', or use backend='{other}'"


@dataclasses.dataclass(frozen=True)
class CorrMatch:
    """The likeliest key of each query; arrays or tensors, like the inputs. All fields have the shape (B, Hq, Wq).

    Attributes:
        index: y * Wk + x of the key with the largest weight, the lowest among equals; int64.
        probability: Weight of that key, 0 to 1; float32.
    """

    index: Any
    probability: Any


@dataclasses.dataclass(frozen=True)
class ArrayWarp:
    """The results of `warp_arrays`.

    Attributes:
        out: The warp (B, V, Hq, Wq), float32.
        lse: Log-sum-exp of each query's logits (B, Hq, Wq), float32.
        match: The likeliest keys; None without `match=True`.
        backend: The implementation that ran, "numba" or "numpy".
    """

    out: npt.NDArray[np.float32]
    lse: npt.NDArray[np.float32]
    match: CorrMatch | None
    backend: str


def corr_warp(
    theta: Any,
    phi: Any,
    values: Any,
    *,
    patch: int = 3,
    temperature: float = 0.01,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """Warp `values` from the key map to the query map by the softmax of the patch correlation.

    Args:
        theta: Queries (B, C, Hq, Wq): a torch tensor (float16, bfloat16, float32, float64) or a numpy array
            (float16, float32). `phi` has its dtype, and all three are of one kind, on one device.
        phi: Keys (B, C, Hk, Wk).
        values: Values of the keys (B, V, Hk, Wk).
        patch: Side of the correlated patch, 1, 3 or 5, zero padded.
        temperature: The correlation, -1 to 1, is divided by it before the softmax.
        return_lse: Also return the log-sum-exp of each query's logits; it has no gradient.
        backend: For tensors "triton" (CUDA), "numba" (on the CPU, in float32), "reference" (the definition; forms the
            matrix) or "auto": triton on CUDA; else numba, or reference for float64. For arrays "numba", "numpy" or
            "auto" (numba where installed).

    Returns:
        The warp (B, V, Hq, Wq) in the dtype of the values, differentiable in all three tensors. With `return_lse`
        that and the lse (B, Hq, Wq), float32, or float64 for float64 tensors.

    Raises:
        InputError: Shapes, dtypes or options that do not fit.
        BackendError: The backend cannot run here.

    Source: arXiv 2004.05571, equations 2 and 3.
    """
    out: Any
    lse: Any
    if _is_tensor(theta):
        out, lse = _warp_tensors(theta, phi, values, patch, temperature, backend)
    else:
        warp = warp_arrays(theta, phi, values, patch=patch, temperature=temperature, backend=backend)
        out, lse = warp.out.astype(values.dtype, copy=False), warp.lse
    return (out, lse) if return_lse else out


def warp_arrays(
    theta: npt.NDArray[Any],
    phi: npt.NDArray[Any],
    values: npt.NDArray[Any],
    *,
    patch: int = 3,
    temperature: float = 0.01,
    match: bool = False,
    backend: str = "auto",
) -> ArrayWarp:
    """`corr_warp` for arrays, with the matches of the same pass.

    Memory beside inputs and results: at most two copies of one item's theta and phi, and the tiles: 24 MiB for numpy,
    under 2 MiB a thread (at V = 3) for numba.

    Args:
        theta: Queries (B, C, Hq, Wq), float16 or float32; the arithmetic is float32.
        phi: Keys (B, C, Hk, Wk), of theta's dtype.
        values: Values of the keys (B, V, Hk, Wk), float16 or float32.
        patch: Side of the correlated patch, 1, 3 or 5, zero padded.
        temperature: The correlation, -1 to 1, is divided by it before the softmax.
        match: Also return the likeliest key of each query.
        backend: "numba", "numpy" or "auto" (numba where installed).

    Returns:
        The warp, the lse, the matches and the backend that ran.

    Raises:
        InputError: Shapes, dtypes or options that do not fit.
        BackendError: The backend cannot run here.
    """
    _check((theta, phi, values), ("theta", "phi", "values"), patch, temperature, np.ndarray)
    return _run_arrays(theta, phi, values, patch, temperature, match, backend)


def corr_match(theta: Any, phi: Any, *, patch: int = 3, temperature: float = 0.01, backend: str = "auto") -> CorrMatch:
    """The likeliest key of each query and its probability, in one pass; no gradient.

    Args:
        theta: Queries (B, C, Hq, Wq), a tensor or an array as for `corr_warp`.
        phi: Keys (B, C, Hk, Wk).
        patch: Side of the correlated patch, 1, 3 or 5, zero padded.
        temperature: The correlation, -1 to 1, is divided by it before the softmax.
        backend: For tensors on a GPU "triton" or "auto"; for arrays, and for tensors on the CPU, which are converted
            to float32 arrays, "numba", "numpy" or "auto" (numba where installed).

    Returns:
        The matches, as tensors on theta's device or as arrays, like the inputs.

    Raises:
        InputError: Shapes, dtypes or options that do not fit.
        BackendError: The backend cannot run here.
    """
    if _is_tensor(theta):
        return _match_tensors(theta, phi, patch, temperature, backend)
    _check((theta, phi), ("theta", "phi"), patch, temperature, np.ndarray)
    nothing = np.empty((phi.shape[0], 0, *phi.shape[2:]), phi.dtype)
    match = _run_arrays(theta, phi, nothing, patch, temperature, True, backend).match
    assert match is not None
    return match


def corr_row(
    theta: Any,
    phi: Any,
    position: tuple[int, int],
    *,
    patch: int = 3,
    temperature: float = 0.01,
) -> Any:
    """The weights of all keys for one query, in O(M C) time and memory; no gradient. Tensors pass through the CPU.

    Args:
        theta: Queries (B, C, Hq, Wq), a tensor or an array as for `corr_warp`.
        phi: Keys (B, C, Hk, Wk).
        position: (y, x) of the query.
        patch: Side of the correlated patch, 1, 3 or 5, zero padded.
        temperature: The correlation, -1 to 1, is divided by it before the softmax.

    Returns:
        The weights (B, Hk, Wk), float32, or float64 for float64 tensors; their sum is 1 for each item.

    Raises:
        InputError: Shapes, dtypes, options or a position that do not fit.
    """
    tensors = _is_tensor(theta)
    if tensors:
        _check_tensors((theta, phi), ("theta", "phi"), patch, temperature)
    else:
        _check((theta, phi), ("theta", "phi"), patch, temperature, np.ndarray)
    (height, width), (y, x) = theta.shape[2:], position
    if not (0 <= y < height and 0 <= x < width):
        raise InputError(f"position: expected 0 <= y < {height} and 0 <= x < {width}, got {position}")
    from .cpu.numpy_warp import softmax_row

    crops = [
        _to_array(side) for side in (theta[:, :, max(y - patch, 0) : y + patch, max(x - patch, 0) : x + patch], phi)
    ]
    center = (min(y, patch), min(x, patch))
    rows = np.stack([softmax_row(t, p, center, patch, temperature) for t, p in zip(*crops, strict=True)])
    return sys.modules["torch"].from_numpy(rows).to(theta.device) if tensors else rows


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")  # whoever holds a tensor has imported torch
    return torch is not None and isinstance(value, torch.Tensor)


def _to_array(value: Any) -> npt.NDArray[Any]:
    """An array of float32, or float64 where the input is."""
    if _is_tensor(value):
        value = value.detach()
        value = (value if value.itemsize >= 4 else value.float()).cpu().numpy()
    return np.asarray(value, dtype=np.promote_types(value.dtype, np.float32))


def _check_tensors(inputs: Sequence[torch.Tensor], names: Sequence[str], patch: int, temperature: float) -> None:
    torch = sys.modules["torch"]
    _check(inputs, names, patch, temperature, torch.Tensor)
    for name, tensor in zip(names, inputs, strict=True):
        if not tensor.is_floating_point():
            raise InputError(f"{name}: expected a floating dtype, got {tensor.dtype}")
        if tensor.device != inputs[0].device:
            raise InputError(f"{name}: expected theta's device {inputs[0].device}, got {tensor.device}")


def _warp_tensors(
    theta: torch.Tensor, phi: torch.Tensor, values: torch.Tensor, patch: int, temperature: float, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_tensors((theta, phi, values), ("theta", "phi", "values"), patch, temperature)
    backend = _tensor_backend((theta, phi, values), backend)
    if backend == "reference":
        from . import reference

        return reference.warp(theta, phi, values, patch, temperature)
    from .op import corr_warp_op

    result: tuple[torch.Tensor, torch.Tensor] = corr_warp_op(theta, phi, values, patch, float(temperature), backend)
    return result


def _tensor_backend(inputs: Sequence[torch.Tensor], backend: str) -> str:
    """The implementation that `corr_warp` runs for theta, phi and values: `backend`, or what "auto" stands for."""
    if backend not in TENSOR_BACKENDS:
        raise InputError(f"backend for tensors: expected one of {', '.join(TENSOR_BACKENDS)}, got {backend!r}")
    device = inputs[0].device
    if backend == "auto":
        double = inputs[0].dtype == sys.modules["torch"].float64
        backend = "triton" if device.type == "cuda" else "reference" if double else "numba"
    if backend == "numba" and device.type != "cpu":
        raise BackendError(f"backend 'numba' needs tensors on the CPU, got {device}; use 'triton' or 'reference'")
    if backend == "numba" and not _has_numba():
        raise BackendError(NUMBA_MISSING.format(other="reference"))
    return backend


def _match_tensors(theta: torch.Tensor, phi: torch.Tensor, patch: int, temperature: float, backend: str) -> CorrMatch:
    _check_tensors((theta, phi), ("theta", "phi"), patch, temperature)
    if backend == "triton" or (backend == "auto" and theta.is_cuda):
        from .op import implementation

        return CorrMatch(*implementation("triton").match_forward(theta, phi, patch, float(temperature)))
    if theta.device.type != "cpu":
        raise BackendError(f"backend {backend!r} needs tensors on the CPU, got {theta.device}; use 'triton'")
    arrays = (_to_array(side).astype(np.float32, copy=False) for side in (theta, phi))
    match = corr_match(*arrays, patch=patch, temperature=temperature, backend=backend)
    return CorrMatch(*(sys.modules["torch"].from_numpy(field) for field in vars(match).values()))


def _run_arrays(
    theta: npt.NDArray[Any],
    phi: npt.NDArray[Any],
    values: npt.NDArray[Any],
    patch: int,
    temperature: float,
    match: bool,
    backend: str,
) -> ArrayWarp:
    for name, array in (("theta", theta), ("phi", phi), ("values", values)):
        if array.dtype not in (np.float32, np.float16):
            raise InputError(f"{name}: expected float32 or float16, got {array.dtype}; convert with .astype('float32')")
    backend = _array_backend(backend)
    implementation = importlib.import_module(f".cpu.{backend}_warp", __package__)
    single = [np.ascontiguousarray(array, dtype=np.float32) for array in (theta, phi, values)]
    out, lse, fields = implementation.warp_forward(*single, patch, float(temperature), match=match)
    grid = theta.shape[2:]
    shaped = CorrMatch(*(field.reshape(-1, *grid) for field in fields)) if match else None
    return ArrayWarp(out.reshape(*out.shape[:2], *grid), lse.reshape(-1, *grid), shaped, backend)


def _array_backend(backend: str) -> str:
    if backend not in ARRAY_BACKENDS:
        raise InputError(f"backend for arrays: expected one of {', '.join(ARRAY_BACKENDS)}, got {backend!r}")
    if backend == "numba" and not _has_numba():
        raise BackendError(NUMBA_MISSING.format(other="numpy"))
    return "numba" if backend != "numpy" and _has_numba() else "numpy"


def _has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None


def _check(inputs: Sequence[Any], names: Sequence[str], patch: int, temperature: float, kind: type[Any]) -> None:
    """Raise `InputError` unless theta, phi and, if given, values fit together and the options are in range."""
    for name, value in zip(names, inputs, strict=True):
        if not isinstance(value, kind):
            expected = (
                f"a {kind.__name__} like theta" if isinstance(inputs[0], kind) else "a numpy array or torch tensor"
            )
            raise InputError(f"{name}: expected {expected}, got {type(value).__name__}")
        if value.ndim != 4:
            raise InputError(
                f"{name}: expected 4 axes (batch, channels, height, width), got shape {tuple(value.shape)}"
            )
        if 0 in value.shape:
            raise InputError(f"{name}: expected no empty axis, got shape {tuple(value.shape)}")
    theta, phi = inputs[:2]
    for name, value in zip(names, inputs, strict=True):
        if value.shape[0] != theta.shape[0]:
            raise InputError(f"{name}: expected theta's batch of {theta.shape[0]}, got {value.shape[0]}")
    if theta.dtype != phi.dtype:
        raise InputError(f"theta and phi: expected one dtype, got {theta.dtype} and {phi.dtype}")
    if theta.shape[1] != phi.shape[1]:
        raise InputError(f"theta and phi: expected equal channels, got {theta.shape[1]} and {phi.shape[1]}")
    if len(inputs) > 2 and inputs[2].shape[2:] != phi.shape[2:]:
        raise InputError(f"values: expected phi's map {tuple(phi.shape[2:])}, got {tuple(inputs[2].shape[2:])}")
    if patch not in PATCHES:
        raise InputError(f"patch: expected one of {PATCHES}, got {patch!r}")
    if not 0 < temperature < float("inf"):
        raise InputError(f"temperature: expected a positive finite number, got {temperature!r}")
