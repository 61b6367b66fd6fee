"""The warp on a GPU between arrays of the host, for models of Triton Inference Server, which hand each other arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ...bundle import Bundle
from .cubins import FOLDER, find_kernels
from .device import Device
from .warp import DeviceWarp, Tensors, key_tensors, query_tensors
from .workspace import Workspace

_INPUTS = {"theta": "theta", "phi": "phi_planes", "values": "values_planes"}  # -> the name of its buffer
_OUTPUTS = ("warped", "index", "probability")


class HostWarp:
    """The compiled kernels of `bundle`, a folder, or of the folder `kernels` in it, on the GPU of number `ordinal`.

    Raises `BackendError` where the GPU, pycuda or the kernels are missing.
    """

    def __init__(self, bundle: Bundle, ordinal: int) -> None:
        self._config = bundle.manifest.config
        self._device = device = Device(ordinal)
        self._workspace: tuple[tuple[Any, ...], Workspace] | None = None  # of the latest shapes
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
        batch, query_map, key_map = theta[0], (theta[2], theta[3]), (phi[2], phi[3])
        with self._device.active():
            workspace = self._buffers(batch, query_map, key_map)
            addresses = workspace.addresses
            for name, buffer in _INPUTS.items():
                workspace.pinned[buffer][...] = arrays[name]
            for step in (
                *workspace.upload(*_INPUTS.values()),
                *self._warp.pack_keys(addresses["phi_planes"], addresses["values_planes"], addresses, batch, key_map),
                *self._warp.run(addresses["theta"], addresses, addresses, batch, query_map, key_map),
                *workspace.download(*_OUTPUTS),
            ):
                step()
            self._device.synchronize()
            results = {name: workspace.pinned[name].copy() for name in _OUTPUTS}
        return {
            name: array if name == "warped" else array.reshape(batch, *query_map) for name, array in results.items()
        }

    def _buffers(self, batch: int, query_map: tuple[int, int], key_map: tuple[int, int]) -> Workspace:
        """Memory for these shapes; that of the shapes before is freed."""
        key = (batch, query_map, key_map)
        if self._workspace is None or self._workspace[0] != key:
            if self._workspace is not None:
                self._workspace[1].free()
                self._workspace = None  # where the next lines fail, nothing of it may be left
            workspace, config, dtype = Workspace(self._device), self._config, self._warp.dtype
            tensors: Tensors = {
                "theta": ((batch, config.feature_channels, *query_map), np.float32),
                "phi_planes": ((batch, config.feature_channels, *key_map), np.float32),
                "values_planes": ((batch, config.warped_channels, *key_map), np.float32),
                **key_tensors(config, dtype, batch, key_map),
                **query_tensors(config, dtype, batch, query_map),
            }
            try:
                workspace.allocate(tensors, pinned=(*_INPUTS.values(), *_OUTPUTS))
            except BaseException:
                workspace.free()
                raise
            self._workspace = key, workspace
        return self._workspace[1]
