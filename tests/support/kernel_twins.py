"""Numpy twins of the compiled kernels, and files that describe them as `kernels/gpu/aot.py` does.

A twin gets what a launch gets, arguments by name with arrays in place of pointers, and computes what the kernel's
docstring says. The "cubin" of a twin is a line of text that names it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flashcocos.config import ModelConfig
from flashcocos.kernels import signatures
from flashcocos.runtime.gpu.cubins import kernel_names

EPSILON = 2.2e-16
FLAT = 1e-10
BLOCKS = {"BN": 16, "BC": 16}

Memory = Callable[[int, Any, int], np.ndarray]  # (address, dtype, count) -> the array there


def describe(config: ModelConfig, dtype: str, architecture: int) -> dict[str, dict[str, Any]]:
    """The descriptions of all kernels of a model, by file stem."""
    feature = {"C": config.feature_channels, "PATCH": config.patch}
    values = {"V": config.warped_channels, "VP": signatures.padded_values(config.warped_channels)}
    constants = {"pack": {}, "statistics": feature, "warp": {**feature, **values}}
    described = {}
    for kernel, name in kernel_names(config, dtype).items():
        stem = f"{name}_sm{architecture}"
        described[stem] = {
            "revision": signatures.REVISION,
            "kernel": name,
            "cubin": f"{stem}.cubin",
            "sha256": hashlib.sha256(_cubin(kernel, architecture)).hexdigest(),
            "architecture": architecture,
            "dtype": dtype,
            "entry": f"{kernel}_kernel",
            "threads": 128,
            "shared_bytes": 65536 if kernel == "warp" else 8192,
            "registers": 64,
            "spilled_bytes": 0,
            "arguments": [{"name": key, "type": kind} for key, kind in signatures.arguments(kernel, dtype).items()]
            + [{"name": "global_scratch", "type": "null"}],
            "pointer_alignment": 16,
            "constants": {**BLOCKS, **constants[kernel]},
            "cuda": "12.4",
            "triton": "0-fake",
        }
    return described


def kernel_files(config: ModelConfig, dtype: str = "float32", architecture: int = 86) -> dict[str, bytes]:
    """All files of a model's kernels, name -> content."""
    files = {}
    for stem, description in describe(config, dtype, architecture).items():
        files[f"{stem}.json"] = json.dumps(description).encode()
        files[f"{stem}.cubin"] = _cubin(description["entry"].removesuffix("_kernel"), architecture)
    return files


def write_kernels(folder: Path, config: ModelConfig, dtype: str = "float32", architecture: int = 86) -> Path:
    """`kernel_files` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in kernel_files(config, dtype, architecture).items():
        (folder / name).write_bytes(content)
    return folder


def twin(cubin: bytes, entry: str) -> Callable[[tuple[int, int, int], Sequence[Any], Memory, ModelConfig, Any], None]:
    """What a launch of the twin does: (grid, arguments in the description's order, memory, model, packed dtype)."""
    kernel, _, _ = cubin.decode().partition(" ")
    assert entry == f"{kernel}_kernel"
    run = {"pack": _pack, "statistics": _statistics, "warp": _warp}[kernel]

    def launch(
        grid: tuple[int, int, int], arguments: Sequence[Any], memory: Memory, config: ModelConfig, dtype: Any
    ) -> None:
        x = Launch(kernel, arguments, memory, config, dtype)
        batch = grid[2] if kernel == "pack" else grid[1]
        assert grid == signatures.grid(kernel, BLOCKS, x.values, batch)
        run(x, batch)

    return launch


def _cubin(kernel: str, architecture: int) -> bytes:
    return f"{kernel} twin for sm_{architecture}".encode()


class Launch:
    """The arguments by name, and arrays of the memory that they point to."""

    def __init__(self, kernel: str, arguments: Sequence[Any], memory: Memory, config: ModelConfig, dtype: Any) -> None:
        assert arguments[-1] == 0, "the hidden pointer is null"
        self.values = dict(zip(signatures.arguments(kernel, "float32"), arguments[:-1], strict=True))
        self.memory, self.config, self.dtype = memory, config, dtype

    def __getattr__(self, name: str) -> Any:
        return self.values[name]

    def at(self, name: str, *shape: int, dtype: Any = np.float32) -> np.ndarray:
        """The array of this shape that the argument `name` points to."""
        return self.memory(self.values[name], dtype, int(np.prod(shape))).reshape(shape)


def _pack(x: Launch, batch: int) -> None:
    height = x.positions // x.width
    span = 1 + (batch - 1) * x.stride_b + (x.channels - 1) * x.stride_c
    span += (height - 1) * x.stride_y + (x.width - 1) * x.stride_x
    strides = [4 * stride for stride in (x.stride_b, x.stride_y, x.stride_x, x.stride_c)]
    source = np.lib.stride_tricks.as_strided(x.at("source", span), (batch, height, x.width, x.channels), strides)
    target = x.at("target", batch, x.positions, x.padded, dtype=x.dtype)
    target[..., : x.channels] = source.reshape(batch, x.positions, x.channels)
    target[..., x.channels :] = 0


def _statistics(x: Launch, batch: int) -> None:
    positions = x.height * x.width
    packed = x.at("packed", batch, x.height, x.width, x.config.feature_channels, dtype=x.dtype)
    vectors = _unfold(packed, x.config.patch)
    mean = vectors.mean(-1)
    square = ((vectors - mean[..., None]) ** 2).sum(-1)
    flat = square <= FLAT * vectors.shape[-1] * mean * mean
    x.at("mean", batch, positions)[:] = mean
    x.at("inverse", batch, positions)[:] = np.where(flat, 0, 1 / (np.sqrt(square) + EPSILON))


def _warp(x: Launch, batch: int) -> None:
    channels, count, patch = x.config.feature_channels, x.config.warped_channels, x.config.patch
    n, m = x.height_q * x.width_q, x.height_k * x.width_k
    theta = x.at("theta", batch, x.height_q, x.width_q, channels, dtype=x.dtype)
    phi = x.at("phi", batch, x.height_k, x.width_k, channels, dtype=x.dtype)
    product = _unfold(theta, patch) @ _unfold(phi, patch).transpose(0, 2, 1)
    mu, a = x.at("mu", batch, n).astype(np.float64), x.at("a", batch, n)
    nu, b = x.at("nu", batch, m).astype(np.float64), x.at("b", batch, m)
    product -= (mu * patch * patch * channels)[:, :, None] * nu[:, None]
    weights = _softmax(product * a[:, :, None] * b[:, None] * x.scale)
    values = x.at("values", batch, m, signatures.padded_values(count), dtype=x.dtype).astype(np.float64)
    x.at("out", batch, count, n)[:] = (weights @ values[..., :count]).transpose(0, 2, 1)
    x.at("index", batch, n, dtype=np.int64)[:] = weights.argmax(-1)
    x.at("probability", batch, n)[:] = weights.max(-1)


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Weights of base-2 logits."""
    weights = np.exp2(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def _unfold(packed: np.ndarray, patch: int) -> np.ndarray:
    """Patch vectors (B, positions, patch * patch * C) in float64, zero padded."""
    batch, height, width, _ = packed.shape
    half = patch // 2
    padded = np.pad(packed.astype(np.float64), ((0, 0), (half, half), (half, half), (0, 0)))
    taps = [padded[:, i : i + height, j : j + width] for i in range(patch) for j in range(patch)]
    return np.concatenate(taps, -1).reshape(batch, height * width, -1)
