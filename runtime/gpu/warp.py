"""The warp on the GPU: the compiled kernels of cubins.py, launched on device buffers.

pack        theta, phi, values: float32 NCHW -> rows of channels in the kernels' dtype
statistics  mean and inverse norm of each patch of theta and of phi
warp        the values, float32 NCHW again, as the synthesis takes them; each query's best key and its probability
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ...bundle import Bundle
from ...config import ModelConfig
from ...errors import InputError
from ...kernels import signatures
from .cubins import FOLDER, Cubin, find_kernels
from .device import Buffers, Device, Launch, Tensors, Work

ITEM_SIZES = {"float16": 2, "bfloat16": 2, "float32": 4}
Addresses = Mapping[str, int]
Map = tuple[int, ...]  # height and width of a feature map


def key_tensors(config: ModelConfig, dtype: str, batch: int, key_map: Map) -> Tensors:
    """Exemplars as kernels of `dtype` take them, with maps of one size."""
    positions, packed = key_map[0] * key_map[1], _packed(dtype)
    return {
        "phi": ((batch, positions, config.feature_channels), packed),
        "values": ((batch, positions, signatures.padded_values(config.warped_channels)), packed),
        "nu": ((batch, positions), np.float32),
        "b": ((batch, positions), np.float32),
    }


def query_tensors(config: ModelConfig, dtype: str, batch: int, query_map: Map) -> Tensors:
    """Queries, and what the warp makes for them."""
    positions = query_map[0] * query_map[1]
    return {
        "packed_theta": ((batch, positions, config.feature_channels), _packed(dtype)),
        "warped": ((batch, config.warped_channels, *query_map), np.float32),
        "index": ((batch, positions), np.int64),
        **dict.fromkeys(("mu", "a", "probability"), ((batch, positions), np.float32)),
    }


class DeviceWarp:
    """The kernels `cubins` by name, loaded on `device`, for a model of `config`.

    Raises `BackendError` where the driver does not take a cubin.
    """

    def __init__(self, device: Device, cubins: Mapping[str, Cubin], config: ModelConfig) -> None:
        self._channels, self._values = config.feature_channels, config.warped_channels
        self._scale = float(np.float32(math.log2(math.e) / config.temperature))
        self._kernels: dict[str, tuple[Cubin, Launch]] = {}
        for name, cubin in cubins.items():
            launch = device.load(cubin.code, cubin.entry, cubin.formats, cubin.threads, cubin.shared_bytes)
            self._kernels[name] = cubin, launch
        self.dtype, self.architecture = cubin.dtype, cubin.architecture

    def pack_keys(self, phi: int, values: int, keys: Addresses, batch: int, key_map: Map) -> list[Work]:
        """Pack phi (batch, C, *key_map) and values (batch, V, *key_map), float32, into `key_tensors`."""
        padded = signatures.padded_values(self._values)
        return [
            self._pack(phi, keys["phi"], batch, (self._channels, self._channels), key_map),
            self._pack(values, keys["values"], batch, (self._values, padded), key_map),
            self._statistics(keys["phi"], keys["nu"], keys["b"], batch, key_map),
        ]

    def run(
        self, theta: int, keys: Addresses, results: Addresses, batch: int, query_map: Map, key_map: Map
    ) -> list[Work]:
        """Warp for theta (batch, C, *query_map) float32, into `query_tensors`."""
        packed = results["packed_theta"]
        sizes = dict(zip(("height_q", "width_q", "height_k", "width_k"), (*query_map, *key_map), strict=True))
        return [
            self._pack(theta, packed, batch, (self._channels, self._channels), query_map),
            self._statistics(packed, results["mu"], results["a"], batch, query_map),
            self._launch("warp", {**keys, **results, "theta": packed, "out": results["warped"]}, sizes, batch),
        ]

    def _pack(self, source: int, target: int, batch: int, channels: tuple[int, int], size: Map) -> Work:
        (height, width), (count, padded) = size, channels
        sizes = {"width": width, "positions": height * width, "channels": count, "padded": padded}
        sizes |= {"stride_b": count * height * width, "stride_c": height * width, "stride_y": width, "stride_x": 1}
        return self._launch("pack", {"source": source, "target": target}, sizes, batch)

    def _statistics(self, packed: int, mean: int, inverse: int, batch: int, size: Map) -> Work:
        pointers = {"packed": packed, "mean": mean, "inverse": inverse}
        return self._launch("statistics", pointers, {"height": size[0], "width": size[1]}, batch)

    def _launch(self, name: str, pointers: Addresses, sizes: Mapping[str, int], batch: int) -> Work:
        if max(sizes.values()) >= 1 << 31:
            raise InputError(f"maps of {max(sizes.values())} elements; the kernels count to {1 << 31}: lower size")
        cubin, launch = self._kernels[name]
        values: dict[str, int | float] = {**pointers, **sizes, "scale": self._scale}
        arguments = [0 if one["type"] == "null" else values[one["name"]] for one in cubin.arguments]
        return functools.partial(launch, cubin.grid(sizes, batch), arguments)


class HostWarp:
    """The warp between arrays of the host, for models of Triton Inference Server, which hand each other arrays.

    It runs the compiled kernels of `bundle`, a folder, or of the folder `kernels` in it, on the GPU of number
    `ordinal`. Raises `BackendError` where the GPU, pycuda or the kernels are missing.
    """

    def __init__(self, bundle: Bundle, ordinal: int) -> None:
        self._config = bundle.manifest.config
        self._device = device = Device(ordinal)
        with device.active():
            cubins = find_kernels(
                (bundle.path / FOLDER, bundle),
                self._config,
                ("float16", "float32"),
                capability=device.capability,
                driver=device.driver,
                remedy=f"flashcocos build --target sm_{device.capability} makes them, then export again",
            )
            self._warp = DeviceWarp(device, cubins, self._config)
            self._buffers = Buffers(device, {})  # of the latest shapes

    def run(self, arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """warped, index and probability of theta, phi and values, as `warp_arrays` has them; one call at a time."""
        inputs, outputs = [f"{name} planes" for name in arrays], ("warped", "index", "probability")
        batch, query_map, key_map = len(arrays["theta"]), arrays["theta"].shape[2:], arrays["phi"].shape[2:]
        tensors = {
            **{f"{name} planes": (array.shape, np.float32) for name, array in arrays.items()},
            **key_tensors(self._config, self._warp.dtype, batch, key_map),
            **query_tensors(self._config, self._warp.dtype, batch, query_map),
        }
        with self._device.active():
            if self._buffers.tensors != tensors:
                self._buffers.free()
                self._buffers = Buffers(self._device, {})  # where the next line fails, nothing may be left
                self._buffers = Buffers(self._device, tensors, (*inputs, *outputs))
            at, pinned = self._buffers.addresses, self._buffers.pinned
            for name, array in arrays.items():
                pinned[f"{name} planes"][...] = array
            steps = [
                *self._buffers.upload(*inputs),
                *self._warp.pack_keys(at["phi planes"], at["values planes"], at, batch, key_map),
                *self._warp.run(at["theta planes"], at, at, batch, query_map, key_map),
                *self._buffers.download(*outputs),
            ]
            self._device.run({"warp": steps})
            shapes = {"warped": pinned["warped"].shape, **dict.fromkeys(("index", "probability"), (batch, *query_map))}
            return {name: pinned[name].reshape(shape).copy() for name, shape in shapes.items()}


def feature_map(config: ModelConfig, height: int, width: int) -> Map:
    """Size of the feature maps of pictures of height x width pixels."""
    return height // config.warp_stride, width // config.warp_stride


def _packed(dtype: str) -> Any:
    return np.dtype(f"V{ITEM_SIZES[dtype]}")  # opaque: numpy has no bfloat16
