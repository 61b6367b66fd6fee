"""A stand-in for the packages tensorrt and tensorrt_rtx: their runtime API over a fake device.

An "engine" is a header and the ONNX graph of its stage; it runs in ONNX Runtime on the CPU, on the fake device's memory
and in the order of its queue. As strict as what it stands for: None for what it cannot deserialize, with the reason
logged; no run without every shape, address and the working memory, which a run fills with garbage.
"""

from __future__ import annotations

import functools
import json
import math
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
from fake_cuda import MIB, STREAM, Error, FakeCuda

from flashcocos.bundle import STAGES, Bundle
from flashcocos.preprocess import to_uint8
from flashcocos.runtime.gpu.engine import device_tensors
from flashcocos.runtime.gpu.store import EngineKey, EngineRecord, Profile, write_engine

VERSION = "10.9.0"
WEIGHTS, SCRATCH = MIB, 2 * MIB
SEVERITY = SimpleNamespace(INTERNAL_ERROR="internal error", ERROR="error", WARNING="warning")


def profile(height: Any = 64, width: Any = 64, batch: Any = 1) -> Profile:
    """A profile; an axis is one number, or (least, optimal, most)."""
    return Profile(*((axis,) * 3 if isinstance(axis, int) else axis for axis in (batch, height, width)))


def write_engines(
    folder: Path,
    bundle: Bundle,
    profiles: Sequence[Profile],
    *,
    variant: str = "tensorrt",
    precision: str = "float16",
    scratch: int = SCRATCH,
    header: dict[str, Any] | None = None,
    stages: Sequence[str] = STAGES,
) -> None:
    """Engines of `stages` of `bundle`; `header` changes what the engine itself says, "refuse" being why none loads."""
    manifest = bundle.manifest
    for one in profiles:
        for stage in stages:
            tensors = device_tensors(manifest.config, stage, uint8_output=True)
            sha256 = manifest.files[manifest.stages[stage].file].sha256
            key = EngineKey(stage, sha256, variant, VERSION, (86,), precision, one)
            says = {"stage": stage, "scratch": scratch, "stride": manifest.config.warp_stride, "refuse": ""}
            says["tensors"] = [[(t.name, t.dtype, t.shape) for t in side] for side in tensors]
            text = json.dumps({**says, **(header or {})}).encode()
            engine = len(text).to_bytes(4, "little") + text + bundle.read_stage(stage)
            write_engine(folder, EngineRecord(key, WEIGHTS, scratch, 0, ""), engine)


class ILogger:
    Severity = SEVERITY

    def __init__(self) -> None:
        self.initialized = True


class FakeTensorRt:
    """The module; `can_capture` is what contexts answer, None for the variant that has no such question."""

    ILogger, __version__ = ILogger, VERSION
    TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")

    def __init__(self, device: FakeCuda, can_capture: bool | None = None) -> None:
        self.device, self.can_capture = device, can_capture
        self.fails: str | None = None  # the stage whose next run fails
        self.syncs = False  # whether runs wait for the device, which cannot be captured
        self.nan = False  # whether the fine stage says that it gave NaN
        self.loaded: list[str] = []
        self.runs: list[str] = []
        self.compiled: list[str] = []
        self.engines = self.contexts = 0

    def Runtime(self, logger: Any) -> Any:
        assert logger.initialized
        return SimpleNamespace(deserialize_cuda_engine=lambda serialized: self._engine(serialized, logger))

    @staticmethod
    def nptype(dtype: str) -> Any:
        return np.dtype(dtype).type

    def _engine(self, serialized: bytes, logger: Any) -> Engine | None:
        size = int.from_bytes(serialized[:4], "little")
        header = json.loads(serialized[4 : 4 + size])
        if header["refuse"]:
            logger.log(SEVERITY.ERROR, f"IRuntime::deserializeCudaEngine: Error Code 1: {header['refuse']}\n")
            logger.log(SEVERITY.WARNING, "not an error")
            return None
        self.loaded.append(header["stage"])
        return Engine(self, logger, header, serialized[4 + size :])


@functools.lru_cache(16)
def _session(model: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class RuntimeConfig:
    """Of tensorrt-rtx; a cache of compiled kernels holds the names of the stages that had a context."""

    dynamic_shapes_kernel_specialization_strategy: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        assert strategy == "user managed"

    def create_runtime_cache(self) -> Any:
        cache = SimpleNamespace(kernels=set())
        cache.serialize = lambda: json.dumps(sorted(cache.kernels)).encode()
        cache.deserialize = lambda blob: cache.kernels.update(json.loads(blob))
        return cache

    def set_runtime_cache(self, cache: Any) -> None:
        self.cache = cache


class Engine:
    """Its weights are device memory until its last reference goes."""

    def __init__(self, trt: FakeTensorRt, logger: Any, header: dict[str, Any], model: bytes) -> None:
        self.trt, self.logger, self.header, self.session = trt, logger, header, _session(model)
        self.device_memory_size_v2 = header["scratch"]
        sides = zip(("input", "output"), header["tensors"], strict=True)
        self.tensors = {name: (kind, shape, mode) for mode, side in sides for name, kind, shape in side}
        self.num_io_tensors = len(self.tensors)
        weights = trt.device.mem_alloc(WEIGHTS)
        trt.engines += 1
        weakref.finalize(self, _unload, trt, weights)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_dtype(self, name: str) -> str:
        return self.tensors[name][0]

    def get_tensor_mode(self, name: str) -> str:
        return self.tensors[name][2]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(side if isinstance(side, int) else -1 for side in self.tensors[name][1])

    def create_execution_context(self, how: Any) -> Context:
        self.trt.contexts += 1
        if self.trt.can_capture is None:
            assert how == "user managed"
        else:
            assert how.dynamic_shapes_kernel_specialization_strategy == "eager"
            if self.header["stage"] not in how.cache.kernels:
                self.trt.compiled.append(self.header["stage"])
                how.cache.kernels.add(self.header["stage"])
        return Context(self)

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()


def _unload(trt: FakeTensorRt, weights: Any) -> None:
    trt.engines -= 1
    trt.device.buffers.remove(weights)


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.trt, self.device = engine, engine.trt, engine.trt.device
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch = (0, 0)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        assert stream == STREAM
        return bool(self.trt.can_capture)

    def infer_shapes(self) -> list[str]:
        inputs = [name for name, (_, _, mode) in self.engine.tensors.items() if mode == "input"]
        return [name for name in inputs if name not in self.shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        known: dict[str, int] = {}
        for key, shape in self.shapes.items():
            known |= {s: size for s, size in zip(self.engine.tensors[key][1], shape, strict=True) if isinstance(s, str)}
        if "height" in known:
            stride = self.engine.header["stride"]
            known |= {"h": known["height"] // stride, "w": known["width"] // stride}
            known |= {"half_height": known["height"] // 2, "half_width": known["width"] // 2}
        return tuple(known[side] if isinstance(side, str) else side for side in self.engine.tensors[name][1])

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % 256 == 0
        self.addresses[name] = address
        return True

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self.engine.device_memory_size_v2
        assert address % 256 == 0
        self.scratch = (address, size)

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == STREAM
        assert set(self.addresses) == set(self.engine.tensors)
        assert not self.engine.device_memory_size_v2 or self.scratch[0]
        stage = self.engine.header["stage"]
        if self.trt.fails == stage:
            self.trt.fails = None
            self.engine.logger.log(SEVERITY.ERROR, "IExecutionContext::enqueueV3: Error Code 7: no")
            return False
        if self.trt.syncs and self.device.capturing:
            self.engine.logger.log(SEVERITY.ERROR, "waits while work is captured")
            return False
        addresses, scratch = dict(self.addresses), self.scratch
        try:
            self.device.put(lambda: self._run(stage, addresses, scratch))
        except Error as error:
            self.engine.logger.log(SEVERITY.ERROR, str(error))
            return False
        return True

    def _run(self, stage: str, addresses: dict[str, int], scratch: tuple[int, int]) -> None:
        self.trt.runs.append(stage)
        if scratch[0]:
            self.device.view(scratch[0], np.uint8, scratch[1])[:] = 0xA5

        def view(name: str) -> np.ndarray:
            shape = self.get_tensor_shape(name)
            return self.device.view(addresses[name], self.engine.tensors[name][0], math.prod(shape)).reshape(shape)

        session = self.engine.session
        names = [output.name for output in session.get_outputs()]
        results = dict(zip(names, session.run(names, {name: view(name) for name in self.shapes}), strict=True))
        for name, array in results.items():
            packed = stage == "fine"
            view(name)[...] = np.stack([to_uint8(one) for one in array]) if packed else array
        if stage == "fine":
            view("invalid")[...] = float(self.trt.nan)
