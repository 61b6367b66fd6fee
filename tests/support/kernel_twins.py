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
from flashcocos.runtime.gpu.cubins import kernel_names

INTEGERS = ("width", "positions", "channels", "padded", "stride_b", "stride_c", "stride_y", "stride_x")
SIZES = ("height_q", "width_q", "height_k", "width_k")
ELEMENTS = {"float16": "*fp16", "float32": "*fp32"}
POINTERS = {"*fp16": np.float16, "*fp32": np.float32, "*i64": np.int64}
EPSILON = 2.2e-16
FLAT = 1e-10

Memory = Callable[[int, Any, int], np.ndarray]  # (address, dtype, count) -> the array there


def describe(config: ModelConfig, dtype: str, architecture: int) -> dict[str, dict[str, Any]]:
    """The descriptions of all kernels of a model, by file stem; tiles of 16 queries."""
    element = ELEMENTS[dtype]
    feature = {"C": config.feature_channels, "PATCH": config.patch, "BN": 16}
    maps = {"theta": element, "phi": element, **dict.fromkeys(("mu", "a", "nu", "b"), "*fp32")}
    sizes = {**dict.fromkeys(SIZES, "i32"), "scale": "fp32"}
    padded = -(-config.warped_channels // 8) * 8
    parts: dict[str, tuple[dict[str, str], dict[str, Any], list[str]]] = {
        "pack": (
            {"source": "*fp32", "target": element, **dict.fromkeys(INTEGERS, "i32")},
            {"BN": 16, "BC": 16},
            ["ceil(positions / 16)", "ceil(padded / 16)", "batch"],
        ),
        "statistics": (
            {"packed": element, "mean": "*fp32", "inverse": "*fp32", "height": "i32", "width": "i32"},
            feature,
            ["ceil(height * width / 16)", "batch", "1"],
        ),
        "warp": (
            {**maps, "values": element, "out": "*fp32", "lse": "*fp32", **sizes},
            {**feature, "V": config.warped_channels, "VP": padded, "MATCH": False},
            ["ceil(height_q * width_q / 16)", "batch", "1"],
        ),
        "match": (
            {**maps, "index": "*i64", "probability": "*fp32", "entropy": "*fp32", **sizes},
            {**feature, "V": 1, "MATCH": True},
            ["height_q * ceil(width_q / 16)", "batch", "1"],
        ),
    }
    described = {}
    for part, name in kernel_names(config, dtype).items():
        arguments, constants, grid = parts[part]
        stem = f"{name}_sm{architecture}"
        described[stem] = {
            "kernel": name,
            "cubin": f"{stem}.cubin",
            "sha256": hashlib.sha256(_cubin(part, architecture)).hexdigest(),
            "architecture": architecture,
            "dtype": dtype,
            "entry": f"{part}_kernel",
            "grid": grid,
            "threads": 128,
            "shared_bytes": 65536 if part == "warp" else 8192,
            "registers": 64,
            "spilled_bytes": 0,
            "arguments": [{"name": key, "type": kind} for key, kind in arguments.items()]
            + [{"name": "global_scratch", "type": "null"}],
            "pointer_alignment": 16,
            "constants": constants,
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


def twin(cubin: bytes, entry: str) -> Callable[[tuple[int, int, int], Sequence[Any], Memory], None]:
    """What a launch of the twin does: (grid, arguments in the description's order, memory)."""
    part, _, _ = cubin.decode().partition(" ")
    assert entry == f"{part}_kernel"
    return {"pack": _pack, "statistics": _statistics, "warp": _warp, "match": _match}[part]


def _cubin(part: str, architecture: int) -> bytes:
    return f"{part} twin for sm_{architecture}".encode()


class Launch:
    """The arguments by name, and arrays of the memory that they point to."""

    def __init__(self, names: Sequence[str], arguments: Sequence[Any], memory: Memory, dtype: Any) -> None:
        assert len(names) + 1 == len(arguments), "one argument each, and the hidden pointer"
        assert arguments[-1] == 0, "the hidden pointer is null"
        self.values, self.memory, self.dtype = dict(zip(names, arguments, strict=False)), memory, dtype

    def __getattr__(self, name: str) -> Any:
        return self.values[name]

    def at(self, name: str, *shape: int, dtype: Any = np.float32) -> np.ndarray:
        """The array of this shape that the argument `name` points to."""
        return self.memory(self.values[name], dtype, int(np.prod(shape))).reshape(shape)


def _pack(grid: tuple[int, int, int], arguments: Sequence[Any], memory: Memory, dtype: Any) -> None:
    x = Launch(("source", "target", *INTEGERS), arguments, memory, dtype)
    batch, height = grid[2], x.positions // x.width
    assert grid[:2] == (-(-x.positions // 16), -(-x.padded // 16))
    span = 1 + (batch - 1) * x.stride_b + (x.channels - 1) * x.stride_c
    span += (height - 1) * x.stride_y + (x.width - 1) * x.stride_x
    flat = x.at("source", span)
    strides = [4 * stride for stride in (x.stride_b, x.stride_y, x.stride_x, x.stride_c)]
    source = np.lib.stride_tricks.as_strided(flat, (batch, height, x.width, x.channels), strides)
    target = x.at("target", batch, x.positions, x.padded, dtype=dtype)
    target[..., : x.channels] = source.reshape(batch, x.positions, x.channels)
    target[..., x.channels :] = 0


def _statistics(grid: tuple[int, int, int], arguments: Sequence[Any], memory: Memory, dtype: Any) -> None:
    x = Launch(("packed", "mean", "inverse", "height", "width"), arguments, memory, dtype)
    positions = x.height * x.width
    assert grid == (-(-positions // 16), grid[1], 1)
    channels, patch = memory.constants["C"], memory.constants["PATCH"]
    packed = x.at("packed", grid[1], x.height, x.width, channels, dtype=dtype)
    vectors = _unfold(packed, patch)
    mean = vectors.mean(-1)
    square = ((vectors - mean[..., None]) ** 2).sum(-1)
    flat = square <= FLAT * vectors.shape[-1] * mean * mean
    x.at("mean", grid[1], positions)[:] = mean
    x.at("inverse", grid[1], positions)[:] = np.where(flat, 0, 1 / (np.sqrt(square) + EPSILON))


def _logits(x: Launch, batch: int, memory: Memory) -> np.ndarray:
    """In base 2, (batch, queries, keys)."""
    channels, patch = memory.constants["C"], memory.constants["PATCH"]
    n, m = x.height_q * x.width_q, x.height_k * x.width_k
    theta = x.at("theta", batch, x.height_q, x.width_q, channels, dtype=x.dtype)
    phi = x.at("phi", batch, x.height_k, x.width_k, channels, dtype=x.dtype)
    product = _unfold(theta, patch) @ _unfold(phi, patch).transpose(0, 2, 1)
    mu, a = x.at("mu", batch, n).astype(np.float64), x.at("a", batch, n)
    nu, b = x.at("nu", batch, m).astype(np.float64), x.at("b", batch, m)
    product -= (mu * patch * patch * channels)[:, :, None] * nu[:, None]
    return product * a[:, :, None] * b[:, None] * x.scale


def _warp(grid: tuple[int, int, int], arguments: Sequence[Any], memory: Memory, dtype: Any) -> None:
    names = ("theta", "phi", "mu", "a", "nu", "b", "values", "out", "lse", *SIZES, "scale")
    x = Launch(names, arguments, memory, dtype)
    n, m = x.height_q * x.width_q, x.height_k * x.width_k
    assert grid == (-(-n // 16), grid[1], 1)
    weights, total, largest = _softmax(_logits(x, grid[1], memory))
    values = x.at("values", grid[1], m, memory.constants["VP"], dtype=dtype).astype(np.float64)
    count = memory.constants["V"]
    x.at("out", grid[1], count, n)[:] = (weights @ values[..., :count]).transpose(0, 2, 1)
    x.at("lse", grid[1], n)[:] = (largest + np.log2(total)) * np.log(2)


def _match(grid: tuple[int, int, int], arguments: Sequence[Any], memory: Memory, dtype: Any) -> None:
    names = ("theta", "phi", "mu", "a", "nu", "b", "index", "probability", "entropy", *SIZES, "scale")
    x = Launch(names, arguments, memory, dtype)
    n = x.height_q * x.width_q
    assert grid == (x.height_q * -(-x.width_q // 16), grid[1], 1)
    logits = _logits(x, grid[1], memory)
    weights, _, _ = _softmax(logits)
    x.at("index", grid[1], n, dtype=np.int64)[:] = logits.argmax(-1)
    x.at("probability", grid[1], n)[:] = weights.max(-1)
    x.at("entropy", grid[1], n)[:] = -(weights * np.log(np.maximum(weights, 1e-300))).sum(-1)


def _softmax(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights of base-2 logits, their sums before division, and the largest logits."""
    largest = logits.max(-1)
    weights = np.exp2(logits - largest[..., None])
    total = weights.sum(-1)
    return weights / total[..., None], total, largest


def _unfold(packed: np.ndarray, patch: int) -> np.ndarray:
    """Patch vectors (B, positions, patch * patch * C) in float64, zero padded."""
    batch, height, width, _ = packed.shape
    half = patch // 2
    padded = np.pad(packed.astype(np.float64), ((0, 0), (half, half), (half, half), (0, 0)))
    taps = [padded[:, i : i + height, j : j + width] for i in range(patch) for j in range(patch)]
    return np.concatenate(taps, -1).reshape(batch, height * width, -1)
