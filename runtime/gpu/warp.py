"""The warp on the GPU: the compiled kernels of cubins.py launched on device buffers, in the order that aot.py states.

    pack        theta, phi, values: float32 NCHW -> rows of channels in the kernels' dtype
    statistics  mean and inverse norm of each patch of theta and of phi
    warp        the values, float32 NCHW again, as the synthesis takes them
    match       for each query its most probable key, and its probability

Tested with numpy twins of the kernels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ...config import ModelConfig
from ...errors import InputError
from .cubins import Cubin, WarpKernels
from .device import Device, Kernel

ITEM_SIZES = {"float16": 2, "bfloat16": 2, "float32": 4}
Tensors = dict[str, tuple[tuple[int, ...], Any]]  # name -> (shape, dtype)
Addresses = Mapping[str, int]
Launch = Callable[[], None]  # a launch with all its arguments, put on the stream by calling it


class WarpTensors(NamedTuple):
    """The warp's tensors on the device: C and V of the model, channels of a packed row of values, kernels' dtype."""

    channels: int
    values: int
    padded: int
    dtype: str

    @classmethod
    def of(cls, config: ModelConfig, dtype: str) -> WarpTensors:
        """The tensors of a model with kernels of `dtype`, as `kernels/gpu/aot.py` pads."""
        return cls(config.feature_channels, config.warped_channels, -(-config.warped_channels // 8) * 8, dtype)

    def keys(self, batch: int, height: int, width: int) -> Tensors:
        """An exemplar as the warp takes it, of maps of height x width."""
        positions, packed = height * width, self._packed
        return {
            "phi": ((batch, positions, self.channels), packed),
            "values": ((batch, positions, self.padded), packed),
            "nu": ((batch, positions), np.float32),
            "b": ((batch, positions), np.float32),
        }

    def results(self, batch: int, height: int, width: int) -> Tensors:
        """Queries of maps of height x width, and what is made for them."""
        positions = height * width
        floats = ("mu", "a", "lse", "probability", "entropy")
        return {
            "theta": ((batch, positions, self.channels), self._packed),
            "warped": ((batch, self.values, height, width), np.float32),
            "index": ((batch, positions), np.int64),
            **dict.fromkeys(floats, ((batch, positions), np.float32)),
        }

    @property
    def _packed(self) -> Any:
        return np.dtype(f"V{ITEM_SIZES[self.dtype]}")  # opaque: numpy has no bfloat16


class DeviceWarp:
    """The kernels of `kernels`, loaded on `device`, for a model of `config`.

    Raises `BackendError` where the driver does not take a cubin.
    """

    def __init__(self, device: Device, kernels: WarpKernels, config: ModelConfig) -> None:
        self.kernels = kernels
        self._channels, self._values = config.feature_channels, config.warped_channels
        self.tensors = WarpTensors(self._channels, self._values, kernels.padded, kernels.dtype)
        self._scale = float(np.float32(math.log2(math.e) / config.temperature))
        self._loaded: dict[str, tuple[Cubin, Kernel]] = {}
        for part, cubin in kernels.parts().items():
            kernel = device.load(cubin.code(), cubin.entry, cubin.formats, cubin.threads, cubin.shared_bytes)
            self._loaded[part] = cubin, kernel

    def pack_keys(self, phi: int, values: int, keys: Addresses, batch: int, height: int, width: int) -> list[Launch]:
        """Pack phi (batch, C, height, width) and values (batch, V, height, width), float32, into `WarpTensors.keys`."""
        return [
            self._pack(phi, keys["phi"], batch, (self._channels, self._channels), height, width),
            self._pack(values, keys["values"], batch, (self._values, self.kernels.padded), height, width),
            self._statistics(keys["phi"], keys["nu"], keys["b"], batch, height, width),
        ]

    def run(
        self,
        theta: int,
        keys: Addresses,
        results: Addresses,
        batch: int,
        query_map: tuple[int, int],
        key_map: tuple[int, int],
    ) -> list[Launch]:
        """Warp for theta (batch, C, *query_map) float32, into `WarpTensors.results`; all exemplars have one size."""
        sizes = dict(zip(("height_q", "width_q", "height_k", "width_k"), (*query_map, *key_map), strict=True))
        pointers = {**keys, **results, "out": results["warped"]}
        return [
            self._pack(theta, results["theta"], batch, (self._channels, self._channels), *query_map),
            self._statistics(results["theta"], results["mu"], results["a"], batch, *query_map),
            self._launch("warp", pointers, sizes, batch),
            self._launch("match", pointers, sizes, batch),
        ]

    def _pack(self, source: int, target: int, batch: int, channels: tuple[int, int], height: int, width: int) -> Launch:
        positions, (count, padded) = height * width, channels
        sizes = {"width": width, "positions": positions, "channels": count, "padded": padded}
        sizes |= {"stride_b": count * positions, "stride_c": positions, "stride_y": width, "stride_x": 1}
        return self._launch("pack", {"source": source, "target": target}, sizes, batch)

    def _statistics(self, packed: int, mean: int, inverse: int, batch: int, height: int, width: int) -> Launch:
        pointers = {"packed": packed, "mean": mean, "inverse": inverse}
        return self._launch("statistics", pointers, {"height": height, "width": width}, batch)

    def _launch(self, part: str, pointers: Addresses, sizes: Mapping[str, int], batch: int) -> Launch:
        if max(sizes.values()) >= 1 << 31:
            raise InputError(f"maps of {max(sizes.values())} elements; the kernels count to {1 << 31}: lower size")
        cubin, kernel = self._loaded[part]
        values: dict[str, int | float] = {**pointers, **sizes, "scale": self._scale}
        arguments = [0 if kind == "null" else values[name] for name, kind in cubin.arguments]
        return functools.partial(kernel.launch, cubin.grid({**sizes, "batch": batch}), arguments)


def total_bytes(tensors: Sequence[Tensors]) -> int:
    """Device memory for all of them, each in an allocation of its own."""
    return sum(_aligned(shape, dtype) for group in tensors for shape, dtype in group.values())


def _aligned(shape: tuple[int, ...], dtype: Any) -> int:
    size = math.prod(shape) * int(np.dtype(dtype).itemsize)
    return -(-size // 512) * 512
