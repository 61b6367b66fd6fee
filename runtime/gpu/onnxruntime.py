"""ONNX Runtime's CUDA provider on device buffers, for the GPU pipeline of users without TensorRT.

Inputs and outputs are bound to addresses (IOBinding) and the session works on the pipeline's stream, so that between
the stages nothing leaves the GPU. Graphs with loops cannot be captured, pictures come as float32 planes that the host
packs, and the session's own memory is not known before it runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from ...bundle import Bundle
from ...errors import BackendError
from ..cpu.onnxruntime import import_onnxruntime, onnxruntime_errors, open_session
from ..engine import one_line
from .device import Device
from .engine import Binding, DeviceEngine, Shape, concrete

TF32_FROM = 80  # compute capability whose tensor cores multiply float32 with 10 bits of mantissa, the provider's choice


class OnnxCudaEngine(DeviceEngine):
    """A stage of `bundle` in a session on `device`; any shape.

    exact: float32 products, where the provider would choose tf32. Raises as `open_session`.
    """

    def __init__(self, bundle: Bundle, stage: str, device: Device, *, exact: bool = False) -> None:
        super().__init__(bundle, stage, device)
        options = {
            "device_id": str(device.ordinal),
            "user_compute_stream": str(device.stream),
            "arena_extend_strategy": "kSameAsRequested",  # the default doubles, and would not share the GPU
        }
        if exact:
            options["use_tf32"] = "0"
        self._session: Any
        self._session, self.info = open_session(bundle, stage, device="cuda", options=options)
        if not exact and device.capability >= TF32_FROM:
            self.info = dataclasses.replace(self.info, arithmetic="tf32")
        # all that follows is on the same stream, for whose end the pipeline waits
        self._run_options = import_onnxruntime().RunOptions()
        self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def bind(self, shape: Shape, addresses: Mapping[str, int]) -> Binding:
        """The session with its inputs and outputs at `addresses`."""
        binding = self._session.io_binding()
        for bind, tensors in ((binding.bind_input, self.inputs), (binding.bind_output, self.outputs)):
            for name, (sides, dtype) in concrete(self._config, tensors, shape).items():
                bind(name, "cuda", self._device.ordinal, np.dtype(dtype).type, list(sides), addresses[name])
        name = f"{self._bundle.path}: stage {self._stage} at {shape}"
        return OnnxCudaBinding(self._session, binding, self._run_options, name)

    def close(self) -> None:
        """Free the session."""
        self._session = None


class OnnxCudaBinding(Binding):
    """A session, which has working memory of its own, with bound tensors."""

    def __init__(self, session: Any, binding: Any, options: Any, name: str) -> None:
        self._session, self._binding, self._options, self._name = session, binding, options, name

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
