"""The warp on a GPU between arrays of the host, for models of Triton Inference Server, which hand each other arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ...bundle import Bundle
from .cubins import FOLDER, find_kernels
from .device import Device
from .engine import Tensors
from .warp import DeviceWarp, key_tensors, query_tensors
from .workspace import Buffers

_INPUTS = {"theta": "theta", "phi": "phi_planes", "values": "values_planes"}  # -> the name of its buffer
_OUTPUTS = ("warped", "index", "probability")


class HostWarp:
    """The compiled kernels of `bundle`, a folder, or of the folder `kernels` in it, on the GPU of number `ordinal`.

    Raises `BackendError` where the GPU, pycuda or the kernels are missing.
    """

    def __init__(self, bundle: Bundle, ordinal: int) -> None:
        self._config = bundle.manifest.config
        self._device = device = Device(ordinal)
        self._buffers: Buffers | None = None  # of the latest shapes
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

    def run(self, arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """warped, index and probability of theta, phi and values, as `warp_arrays` has them; one call at a time."""
        theta, phi = (arrays[name].shape for name in ("theta", "phi"))
        batch, query_map, key_map = theta[0], theta[2:], phi[2:]
        with self._device.active():
            buffers = self._room(
                {
                    **{buffer: (arrays[name].shape, np.float32) for name, buffer in _INPUTS.items()},
                    **key_tensors(self._config, self._warp.dtype, batch, key_map),
                    **query_tensors(self._config, self._warp.dtype, batch, query_map),
                }
            )
            addresses = buffers.addresses
            for name, buffer in _INPUTS.items():
                buffers.pinned[buffer][...] = arrays[name]
            for step in (
                *buffers.upload(*_INPUTS.values()),
                *self._warp.pack_keys(addresses["phi_planes"], addresses["values_planes"], addresses, batch, key_map),
                *self._warp.run(addresses["theta"], addresses, addresses, batch, query_map, key_map),
                *buffers.download(*_OUTPUTS),
            ):
                step()
            self._device.synchronize()
            results = {name: buffers.pinned[name].copy() for name in _OUTPUTS}
        return {
            name: array if name == "warped" else array.reshape(batch, *query_map) for name, array in results.items()
        }

    def _room(self, tensors: Tensors) -> Buffers:
        """Memory for these tensors; that of others before is freed."""
        if self._buffers is None or self._buffers.tensors != tensors:
            if self._buffers is not None:
                self._buffers.free()
                self._buffers = None  # where the next line fails, nothing of it may be left
            self._buffers = Buffers(self._device, tensors, (*_INPUTS.values(), *_OUTPUTS))
        return self._buffers
