"""ONNX Runtime's CUDA provider on device buffers, for the GPU pipeline of users without TensorRT.

Inputs and outputs are bound to addresses (IOBinding) and the session works on the pipeline's stream, so that between
the stages nothing leaves the GPU. Graphs with loops cannot be captured, pictures come as float32 planes that the host
packs, and the session's own memory is not known before it runs.

Written against the documented API and tested on the CPU provider.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from ...bundle import Bundle
from ...errors import BackendError
from ..cpu.onnxruntime import import_onnxruntime, onnxruntime_errors, open_session
from ..engine import EngineInfo, one_line
from .device import Device
from .engine import Shape, concrete, device_tensors

TF32_FROM = 80  # compute capability whose tensor cores multiply float32 with 10 bits of mantissa, the provider's choice


class OnnxCudaEngine:
    """A stage of `bundle` in a session on `device`; any shape.

    exact: float32 products, where the provider would choose tf32. Raises as `open_session`.
    """

    uint8_output = False

    def __init__(self, bundle: Bundle, stage: str, device: Device, *, exact: bool = False) -> None:
        options = {
            "device_id": str(device.ordinal),
            "user_compute_stream": str(device.stream),
            "arena_extend_strategy": "kSameAsRequested",  # the default doubles, and would not share the GPU
        }
        if exact:
            options["use_tf32"] = "0"
        session, info = open_session(bundle, stage, device="cuda", options=options)
        rounded = not exact and device.capability >= TF32_FROM
        self._info = dataclasses.replace(info, arithmetic="tf32") if rounded else info
        self._session: Any = session
        # all that follows is on the same stream, for whose end the pipeline waits
        self._run_options = import_onnxruntime().RunOptions()
        self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._device, self._name = device, f"{bundle.path}: stage {stage}"
        self._config = bundle.manifest.config
        self._tensors = device_tensors(self._config, stage, uint8_output=False)

    def why_unsupported(self, shape: Shape) -> str:
        """Empty: the graphs are dynamic."""
        return ""

    def bind(self, shape: Shape, addresses: Mapping[str, int]) -> OnnxCudaBinding:
        """The session with its inputs and outputs at `addresses`."""
        binding = self._session.io_binding()
        for bind, tensors in zip((binding.bind_input, binding.bind_output), self._tensors, strict=True):
            for name, (sides, dtype) in concrete(self._config, tensors, shape).items():
                bind(name, "cuda", self._device.ordinal, np.dtype(dtype).type, list(sides), addresses[name])
        return OnnxCudaBinding(self._session, binding, self._run_options, f"{self._name} at {shape}")

    def describe(self) -> EngineInfo:
        """Backend, provider, device, precision and arithmetic."""
        return self._info

    def close(self) -> None:
        """Free the session."""
        self._session = None


class OnnxCudaBinding:
    """A session with bound tensors; implements `Binding`."""

    scratch = 0
    can_capture = None

    def __init__(self, session: Any, binding: Any, options: Any, name: str) -> None:
        self._session, self._binding, self._options, self._name = session, binding, options, name

    def use_scratch(self, address: int, size: int) -> None:
        """The session has memory of its own."""

    def enqueue(self) -> None:
        """Run; the session's kernels join the work on the stream."""
        try:
            self._session.run_with_iobinding(self._binding, self._options)
        except onnxruntime_errors() as error:
            raise BackendError(
                f"{self._name}: failed: {one_line(error)}; where memory ran out, lower size or batch"
            ) from error

    def close(self) -> None:
        """Free the binding."""
        self._session = self._binding = None
