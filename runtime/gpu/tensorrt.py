"""TensorRT engines that `flashcocos build` wrote: found, checked, deserialized, and run on device buffers.

Both variants, the packages tensorrt and tensorrt_rtx, have one Python API for this. Working memory is handed to
TensorRT, since the stages run one after another and can share it. A stage may have several engines; the one whose
profile has a shape runs it, static ones first, and is deserialized when it is first needed. tensorrt-rtx compiles
kernels when a context is made; they are kept in a file beside the engines, for the next process.
"""

from __future__ import annotations

import collections
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle import STAGES, Bundle
from ...errors import BackendError
from ...files import atomic_path
from ..engine import EngineInfo, one_line
from .device import Device, OutOfMemory, Tensors, mebibytes
from .engine import Binding, DeviceEngine, Shape, concrete
from .store import EngineRecord, find_engines, import_variant, read_engine

_log = logging.getLogger("flashcocos.runtime")
_MAX_CACHE_BYTES = 1 << 30


class TensorRt:
    """The installed package of a variant, its runtime, its last error messages, and the kernels that it has compiled.

    folder: of the engines; the kernels, which are code and trusted as these are, lie there in a file for GPUs of
    `capability`. Raises `BackendError` where the package is missing or does not start.
    """

    def __init__(self, variant: str, folder: Path, capability: int) -> None:
        self.module: Any = import_variant(variant)
        self.variant, self.version, self.folder = variant, str(self.module.__version__), folder
        self._cache = folder / f"runtime-{self.version}-sm{capability}.cache"
        self._messages: collections.deque[str] = collections.deque(maxlen=3)
        self._logger = _logger(self.module, self._messages)
        self._compiled: Any = None
        self._first_config: Any = None
        try:
            self.runtime: Any = self.module.Runtime(self._logger)
        except (RuntimeError, TypeError) as error:  # TypeError where its factory gives nothing
            raise BackendError(f"{self} does not start: {self.complaint(error)}") from error

    def __str__(self) -> str:
        return f"{self.variant} {self.version}"

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What `function` gives; `complaint` then tells of this call and of no earlier one."""
        self._messages.clear()
        return function(*arguments)

    def complaint(self, otherwise: object = "it gives no reason") -> str:
        """What TensorRT logged as errors in the last `call`, in one line, or `otherwise`."""
        return one_line("; ".join(self._messages) or otherwise)

    def context(self, engine: Any) -> tuple[Any, Any]:
        """An execution context that works in memory of ours, None where TensorRT gives none; and what to keep with it.

        Nothing says that a context holds the settings that it was made with, or a cache those that made it.
        """
        strategy = self.module.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.variant == "tensorrt":
            return self.call(engine.create_execution_context, strategy), None
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        # kernels for a context's shapes at once: a captured graph would keep the fallback that LAZY runs meanwhile
        specialization = self.module.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = specialization.EAGER
        if self._compiled is None:
            self._compiled, self._first_config = config.create_runtime_cache(), config
            with contextlib.suppress(OSError):  # there is none yet
                if self._cache.stat().st_size <= _MAX_CACHE_BYTES:
                    self._compiled.deserialize(self._cache.read_bytes())  # False for another driver or GPU, and empty
        config.set_runtime_cache(self._compiled)
        return self.call(engine.create_execution_context, config), config

    def save_cache(self) -> None:
        """Write the compiled kernels for the next process, once; a folder that is read-only is no error."""
        compiled, self._compiled = self._compiled, None
        if compiled is not None:
            try:
                with atomic_path(self._cache) as temporary:
                    temporary.write_bytes(bytes(compiled.serialize()))
            except OSError as error:
                _log.warning("%s cannot be written: %s; the next start compiles again", self._cache, error.strerror)


class TensorRtEngine(DeviceEngine):
    """A stage of `bundle`, run by the engines of `records`; of these that of the model's own size is loaded here."""

    uint8_output = True

    def __init__(
        self, bundle: Bundle, stage: str, device: Device, tensorrt: TensorRt, records: Sequence[EngineRecord]
    ) -> None:
        super().__init__(bundle, stage, device)
        self._tensorrt, self._records = tensorrt, records
        self.info = EngineInfo(str(tensorrt), "TensorRT", "cuda", bundle.manifest.precision, records[0].arithmetic)
        self._engines: dict[str, Any] = {}
        side = self._config.image_size
        self._load(self._record((1, side, side)) or records[0])

    def why_unsupported(self, shape: Shape) -> str:
        """The profiles, the largest first, and how to build for this size; empty where one has this shape."""
        if self._record(shape) is not None:
            return ""
        profiles = sorted(
            (record.key.profile for record in self._records), key=lambda one: one.height[2] * one.width[2], reverse=True
        )
        return (
            f"the engines of stage {self._stage} run {'; '.join(dict.fromkeys(map(str, profiles)))} (the largest "
            f"first); flashcocos build {self._bundle.path} --size {shape[1]}x{shape[2]} makes others"
        )

    def bind(self, shape: Shape, addresses: Mapping[str, int]) -> Binding:
        """An execution context for `shape`."""
        record = self._record(shape)
        assert record is not None  # it was asked for
        name = f"{self._tensorrt.folder}: engine {record.key.stem}"
        inputs, outputs = (concrete(self._config, tensors, shape) for tensors in (self.inputs, self.outputs))
        return TensorRtBinding(
            self._tensorrt, self._load(record), self._device.stream, name, inputs, outputs, addresses
        )

    def close(self) -> None:
        """Free the engines, whose contexts are gone by now, and keep what they have compiled."""
        self._tensorrt.save_cache()
        self._engines.clear()

    def _record(self, shape: Shape) -> EngineRecord | None:
        return next((record for record in self._records if record.key.profile.supports(*shape)), None)

    def _load(self, record: EngineRecord) -> Any:
        """The engine of `record`, deserialized where it is not yet."""
        stem, device, tensorrt = record.key.stem, self._device, self._tensorrt
        if stem in self._engines:
            return self._engines[stem]
        free, _ = device.memory()
        if record.weight_bytes > free:
            raise OutOfMemory(
                f"the weights of engine {stem} take {mebibytes(record.weight_bytes)}, {mebibytes(free)} are free on "
                f"{device.name}; close what else uses the GPU"
            )
        engine = tensorrt.call(tensorrt.runtime.deserialize_cuda_engine, read_engine(tensorrt.folder, record))
        if engine is None:
            raise BackendError(
                f"{tensorrt.folder}: {tensorrt} cannot load engine {stem} on {device.name} (sm_{device.capability}, "
                f"CUDA {device.driver}): {tensorrt.complaint()}; it was built for another GPU or driver: "
                "run flashcocos build on this machine, or update the driver"
            )
        actual = _tensors(tensorrt.module, engine)
        sides = (("input", self.inputs), ("output", self.outputs))
        expected = {spec.name: (side, spec.dtype, len(spec.shape)) for side, specs in sides for spec in specs}
        if actual != expected:
            del engine  # which the error's frames would keep
            raise BackendError(
                f"{tensorrt.folder}: engine {stem} has the tensors {actual}, stage {self._stage} has "
                f"{expected}; remove it and run flashcocos build again"
            )
        self._engines[stem] = engine
        return engine


class TensorRtBinding(Binding):
    """An execution context at one shape, on the stream of this handle. name: of the engine, for messages."""

    def __init__(
        self,
        tensorrt: TensorRt,
        engine: Any,
        stream: int,
        name: str,
        inputs: Tensors,
        outputs: Tensors,
        addresses: Mapping[str, int],
    ) -> None:
        self._tensorrt, self._stream, self._name = tensorrt, stream, name
        self.scratch = int(engine.device_memory_size_v2)
        context, self._config = tensorrt.context(engine)
        if context is None:  # the shapes come later, so that memory is the likely reason
            raise OutOfMemory(f"{name}: no execution context: {tensorrt.complaint()}")
        self._context: Any = context
        for tensor, (shape, _) in inputs.items():
            self._require(tensorrt.call(context.set_input_shape, tensor, shape), f"takes no {tensor} {shape}")
        self._require(not tensorrt.call(context.infer_shapes), "lacks the shape of an input")
        for tensor, (shape, _) in outputs.items():
            actual = tuple(context.get_tensor_shape(tensor))
            self._require(actual == shape, f"gives {tensor} {actual}, expected {shape}")
        for tensor in (*inputs, *outputs):
            taken = tensorrt.call(context.set_tensor_address, tensor, addresses[tensor])
            self._require(taken, f"takes no address for {tensor}")

    @property
    def can_capture(self) -> bool:
        """After a first run with TensorRT proper, and tensorrt-rtx is asked."""
        return self._tensorrt.variant == "tensorrt" or bool(self._context.is_stream_capturable(self._stream))

    def use_scratch(self, address: int, size: int) -> None:
        """Hand the shared working memory to the context."""
        self._context.set_device_memory(address, size)

    def enqueue(self) -> None:
        """Run on the device's stream."""
        self._require(self._tensorrt.call(self._context.execute_async_v3, self._stream), "failed to run")

    def close(self) -> None:
        """Free the context."""
        self._context = self._config = None

    def _require(self, ok: bool, what: str) -> None:
        if not ok:
            raise BackendError(f"{self._name} {what}: {self._tensorrt.complaint()}; run flashcocos build again")


def open_tensorrt(
    bundle: Bundle, device: Device, *, variant: str, folder: Path, precision: str | None
) -> dict[str, TensorRtEngine]:
    """A stage's engines by its name, for every stage.

    precision: as `store.find_engines` takes it. Raises `BackendError` where TensorRT or a fitting engine is
    missing, or does not load: of each stage one is loaded here.
    """
    tensorrt, gpu = TensorRt(variant, folder, device.capability), device.capability
    records = find_engines(
        bundle, folder, variant=variant, version=tensorrt.version, architecture=gpu, precision=precision
    )
    engines: dict[str, TensorRtEngine] = {}
    try:
        for stage in STAGES:
            own = [record for record in records if record.key.stage == stage]
            engines[stage] = TensorRtEngine(bundle, stage, device, tensorrt, own)
    except BaseException:
        for engine in engines.values():
            engine.close()
        raise
    return engines


def _tensors(module: Any, engine: Any) -> dict[str, tuple[str, str, int]]:
    """name -> ("input" or "output", dtype, number of axes): what must be equal, whether or not the sides are fixed."""
    tensors = {}
    for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
        side = "input" if engine.get_tensor_mode(name) == module.TensorIOMode.INPUT else "output"
        kind = engine.get_tensor_dtype(name)
        with contextlib.suppress(TypeError):  # numpy has no such type
            kind = np.dtype(module.nptype(kind))
        tensors[name] = side, str(kind), len(engine.get_tensor_shape(name))
    return tensors


def _logger(module: Any, messages: collections.deque[str]) -> Any:
    """A logger that keeps errors instead of printing them; its base class comes from the module."""

    class Logger(module.ILogger):  # type: ignore[misc]  # of either variant's module, which has no type
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (module.ILogger.Severity.INTERNAL_ERROR, module.ILogger.Severity.ERROR):
                messages.append(message)

    return Logger()
