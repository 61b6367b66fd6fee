"""The stages of a translation on a GPU: only labels go in and pictures, matches and confidence come out.

Everything runs in order on one stream, under one lock. Each shape has a workspace, and encoded exemplars stay on the
device up to a budget, the least recently used making room; what was evicted is uploaded again. Whether a request fits
is checked before anything of it is launched, by the memory that the engines state and that the workspace adds up.

Tested with a device made of numpy arrays, where its pictures equal the CPU's.
"""

from __future__ import annotations

import collections
import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ...bundle import STAGES, Bundle
from ...config import SIZE_MULTIPLE
from ...errors import BackendError, InputError
from ...preprocess.images import FloatArray, UInt8Array, to_uint8
from ..engine import EngineInfo
from ..options import EXEMPLAR_CACHE_MIB, VARIANTS, EngineOptions
from ..pipeline import Exemplar, PipelineOutput, require_finite
from .cubins import FOLDER, BundleKernels, KernelFolder, find_kernels
from .device import Buffer, Device, mebibytes
from .engine import DeviceEngine, Shape, device_tensors
from .store import default_folder
from .warp import DeviceWarp, total_bytes
from .workspace import (
    DeviceExemplar,
    EncodeWorkspace,
    TranslateWorkspace,
    UploadWorkspace,
    Workspace,
    tile_shape,
    translate_tensors,
)

MAX_WORKSPACES = 16  # shapes whose buffers are kept
MAX_BATCH = 256
_TRANSLATE = ("query", "coarse", "fine")
AnyWorkspace = TypeVar("AnyWorkspace", bound=Workspace)


class GpuPipeline:
    """The stages of `bundle` on `device`, which it owns and closes; so it does the engines.

    budget: bytes of device memory for encoded exemplars. tile: side of the fine stage's tiles, None for whole pictures.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: Device,
        engines: Mapping[str, DeviceEngine],
        warp: DeviceWarp,
        budget: int,
        tile: int | None = None,
    ) -> None:
        self._name, self._config = bundle.path, bundle.manifest.config
        self._device, self._engines, self._warp, self._budget = device, engines, warp, budget
        self._tile, self._uint8_output = tile, engines["fine"].uint8_output
        self._lock = threading.RLock()
        self._closed = False
        self._workspaces: collections.OrderedDict[tuple[Any, ...], Workspace] = collections.OrderedDict()
        self._exemplars: collections.OrderedDict[weakref.ref[Exemplar], DeviceExemplar] = collections.OrderedDict()
        self._forgotten: collections.deque[weakref.ref[Exemplar]] = collections.deque()
        self._scratch: Buffer | None = None
        self._busy: Workspace | None = None  # not to be evicted

    def encode(self, inputs: Mapping[str, npt.NDArray[Any]]) -> tuple[FloatArray, FloatArray]:
        """phi and values of one exemplar, from the inputs of its stage."""
        height, width = inputs["image"].shape[2:]
        with self._running():
            shape = (self._batch(("exemplar",), 1, height, width), height, width)
            tensors = EncodeWorkspace.tensors(self._engines, self._config, shape)
            workspace = self._workspace(
                ("encode", shape),
                lambda: EncodeWorkspace(self._device, self._engines, self._config, shape),
                total_bytes(tensors) + self._stages_need(("exemplar",), shape),
                shape,
            )
            workspace.run(inputs)
            outputs = {name: workspace.pinned[name][:1].copy() for name in ("phi", "values")}
        for name, array in outputs.items():
            self._require_finite("exemplar", name, np.isfinite(array).all())
        return outputs["phi"], outputs["values"]

    def encode_label(self, label: npt.NDArray[Any]) -> None:
        """Nothing: theta stays on the device, and is made with each picture."""
        if self._closed:
            raise BackendError(f"{self._name}: the translator is closed")

    def render(
        self, label: npt.NDArray[Any], exemplars: Sequence[Exemplar], thetas: Sequence[FloatArray | None] = ()
    ) -> list[PipelineOutput]:
        """A result for each label; items whose exemplars have one size run together, as many as the engines take."""
        height, width = label.shape[-2:]
        by_size: dict[tuple[int, int], list[int]] = {}
        for index, exemplar in enumerate(exemplars):
            key_height, key_width = exemplar.phi.shape[2:]
            by_size.setdefault((key_height, key_width), []).append(index)
        results: dict[int, PipelineOutput] = {}
        with self._running():
            for key_map, indices in by_size.items():
                while indices:
                    batch = self._batch(_TRANSLATE, len(indices), height, width)
                    part, indices = indices[:batch], indices[batch:]
                    rendered = self._render(label[part], [exemplars[i] for i in part], (batch, height, width), key_map)
                    results.update(zip(part, rendered, strict=True))
        return [results[index] for index in range(len(label))]

    def describe(self) -> dict[str, EngineInfo]:
        """What runs each stage, and the warp."""
        stages = {stage: self._engines[stage].describe() for stage in STAGES}
        kernels = self._warp.kernels
        warp = EngineInfo(f"cubins for {kernels.architectures}", "flashcocos", "cuda", kernels.dtype, kernels.dtype)
        return {**stages, "warp": warp}

    def close(self) -> None:
        """Free everything; a running translation finishes."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            with contextlib.ExitStack() as stack:
                stack.callback(self._device.close)
                stack.enter_context(self._device.active())
                for engine in self._engines.values():
                    stack.callback(engine.close)
                for owner in (*self._exemplars.values(), *self._workspaces.values()):
                    stack.callback(owner.free)
                if self._scratch is not None:
                    stack.callback(self._scratch.free)
                self._workspaces.clear()
                self._exemplars.clear()
                self._settle()

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        with self._lock:
            if self._closed:
                raise BackendError(f"{self._name}: the translator is closed")
            with self._device.active():
                self._drop_forgotten()
                try:
                    yield
                except BaseException:
                    self._settle()
                    raise
                finally:
                    self._busy = None

    def _render(
        self, label: npt.NDArray[Any], exemplars: Sequence[Exemplar], shape: Shape, key_map: tuple[int, int]
    ) -> list[PipelineOutput]:
        """`render` for at most a batch, filled up with the last item."""
        workspace = self._busy = self._translate_workspace(shape, key_map)
        last = len(label) - 1
        for slot in range(shape[0]):
            workspace.load(slot, self._keys(exemplars[min(slot, last)]))
            workspace.pinned["label"][slot] = label[min(slot, last)]
        timings = {name: value / len(label) for name, value in workspace.run().items()}
        pinned = workspace.pinned
        if "invalid" in pinned:
            self._require_finite("fine", "image", not pinned["invalid"].any())
        query_map = shape[1] // self._config.warp_stride, shape[2] // self._config.warp_stride
        return [
            PipelineOutput(
                self._picture("image", pinned["image"][item]),
                self._picture("warped_image", pinned["warped_image"][item]),
                pinned["index"][item].reshape(query_map).astype(np.int64),
                pinned["probability"][item].reshape(query_map).astype(np.float32),
                timings,
            )
            for item in range(len(label))
        ]

    def _picture(self, name: str, pinned: npt.NDArray[Any]) -> UInt8Array:
        if pinned.dtype == np.uint8:
            return pinned.copy()
        self._require_finite("fine", name, np.isfinite(pinned).all())
        return to_uint8(pinned)

    def _require_finite(self, stage: str, what: str, finite: Any) -> None:
        remedy = "build it again" if self._uint8_output else "export it again"
        require_finite(f"{self._name}: stage {stage} gave", what, finite, remedy)

    def _batch(self, stages: Sequence[str], wanted: int, height: int, width: int) -> int:
        """How many items run together: `wanted` or the next fewer that all stages support, else the next more."""

        def supported(batches: Iterable[int], stages: Sequence[str] = stages) -> int | None:
            shapes = ((batch, height, width) for batch in batches)
            return next((shape[0] for shape in shapes if self._supports(stages, shape)), None)

        if batch := supported(range(wanted, 0, -1)) or supported(range(wanted + 1, MAX_BATCH + 1)):
            return batch
        lacking = [stage for stage in stages if supported(range(1, MAX_BATCH + 1), [stage]) is None] or stages
        reasons = "; ".join(
            self._engines[stage].why_unsupported(*self._shape(stage, (wanted, height, width))[1:]) for stage in lacking
        )
        raise InputError(f"{height} x {width} pixels (height x width), batch {wanted}: {reasons}")

    def _translate_workspace(self, shape: Shape, key_map: tuple[int, int]) -> TranslateWorkspace:
        return self._workspace(
            ("translate", shape, key_map),
            lambda: TranslateWorkspace(
                self._device, self._engines, self._warp, self._config, shape, key_map, self._tile
            ),
            self._need(shape, key_map),
            shape,
            key_map,
        )

    def _need(self, shape: Shape, key_map: tuple[int, int]) -> int:
        """Bytes that a new workspace takes, with all that its stages still have to load."""
        fine = device_tensors(self._config, "fine", uint8_output=self._uint8_output)
        tensors = translate_tensors(self._config, self._warp.tensors, fine, shape, key_map, self._tile)
        return total_bytes(tensors) + self._stages_need(_TRANSLATE, shape)

    def _stages_need(self, stages: Sequence[str], shape: Shape) -> int:
        memory = [self._engines[stage].memory(self._shape(stage, shape)) for stage in stages]
        held = 0 if self._scratch is None else self._scratch.bytes
        return sum(stage.weights for stage in memory) + max(max(stage.scratch for stage in memory) - held, 0)

    def _workspace(
        self,
        key: tuple[Any, ...],
        make: Callable[[], AnyWorkspace],
        need: int,
        shape: Shape | None = None,
        key_map: tuple[int, int] | None = None,
    ) -> AnyWorkspace:
        """The workspace `key`, made where it is missing; then `need` bytes must be free. The rest is for messages."""
        workspace = self._workspaces.get(key)
        if workspace is None:
            self._reserve(need, shape, key_map)
            workspace = self._workspaces[key] = make()
            while len(self._workspaces) > MAX_WORKSPACES:
                self._evict()
        self._workspaces.move_to_end(key)
        if workspace.scratch:
            workspace.use_scratch(self._working_memory(workspace.scratch))
        return workspace  # type: ignore[return-value]  # a key's first part is the kind of workspace

    def _working_memory(self, size: int) -> Buffer:
        if self._scratch is None or self._scratch.bytes < size:
            self._device.synchronize()
            if self._scratch is not None:
                self._scratch.free()
                self._scratch = None  # where the next line fails, nothing of it may be left
            self._scratch = self._device.allocate(size)
        return self._scratch

    def _keys(self, exemplar: Exemplar) -> DeviceExemplar:
        """The exemplar's state on the device, uploaded where it is missing."""
        uploaded = self._exemplars.get(weakref.ref(exemplar))
        if uploaded is not None:
            self._exemplars.move_to_end(weakref.ref(exemplar))
            return uploaded
        height, width = exemplar.phi.shape[2:]
        size = total_bytes([self._warp.tensors.keys(1, height, width)])
        if size > self._budget:
            raise InputError(
                f"exemplar of {exemplar.size[0]} x {exemplar.size[1]} pixels takes {mebibytes(size)} on the GPU, more "
                f"than exemplar_cache_mib, {mebibytes(self._budget)}; raise it"
            )
        while sum(keys.bytes for keys in self._exemplars.values()) + size > self._budget:
            self._evict_exemplar()
        tensors = UploadWorkspace.tensors(self._config, (height, width))
        upload = self._workspace(
            ("upload", height, width),
            lambda: UploadWorkspace(self._device, self._warp, self._config, (height, width)),
            total_bytes([tensors]),
        )
        self._reserve(size, None)
        keys = DeviceExemplar(self._device, self._warp, (height, width))
        try:
            upload.run(exemplar.phi, exemplar.values, keys)
        except BaseException:
            self._settle()
            keys.free()
            raise
        self._exemplars[weakref.ref(exemplar, self._forgotten.append)] = keys
        return keys

    def _reserve(self, need: int, shape: Shape | None, key_map: tuple[int, int] | None = None) -> None:
        """Let `need` bytes be free, by evicting if it must be; `BackendError` where even that is not enough."""
        free, total = self._device.memory()
        while need > free:
            if not self._evict():
                what = "an exemplar" if shape is None else f"batch {shape[0]} of {shape[1]} x {shape[2]} pixels"
                advice = (
                    self._largest(free, shape, key_map) if shape and key_map else "lower size or exemplar_cache_mib"
                )
                if self._tile is None:
                    advice += ", or tile= makes pictures in parts"
                raise BackendError(
                    f"{what} needs {mebibytes(need)} more device memory; {mebibytes(free)} of {mebibytes(total)} are "
                    f"free on {self._device.name}; {advice}, or close what else uses the GPU"
                )
            free, _ = self._device.memory()

    def _largest(self, free: int, shape: Shape, key_map: tuple[int, int]) -> str:
        """The largest square and batch that `free` bytes are enough for, in words."""
        for side in range(max(shape[1:]), SIZE_MULTIPLE, -SIZE_MULTIPLE):
            for batch in range(shape[0], 0, -1):
                square = (batch, side, side)
                if self._supports(_TRANSLATE, square) and self._need(square, key_map) <= free:
                    return f"the largest square that fits is {side} x {side}, batch {batch}"
        return "no size fits: lower exemplar_cache_mib"

    def _supports(self, stages: Sequence[str], shape: Shape) -> bool:
        return all(self._engines[stage].supports(self._shape(stage, shape)) for stage in stages)

    def _shape(self, stage: str, shape: Shape) -> Shape:
        """The shape that a stage runs at for pictures of `shape`."""
        return tile_shape(shape, self._tile) if stage == "fine" else shape

    def _evict(self) -> bool:
        """Free the workspace that was not used for longest, or else such an exemplar; False where there is none."""
        key = next((key for key, workspace in self._workspaces.items() if workspace is not self._busy), None)
        if key is None:
            return bool(self._exemplars) and self._evict_exemplar()
        self._device.synchronize()
        self._workspaces.pop(key).free()
        return True

    def _evict_exemplar(self) -> bool:
        self._device.synchronize()
        self._exemplars.popitem(last=False)[1].free()
        return True

    def _drop_forgotten(self) -> None:
        """Free what belongs to exemplars that nobody holds any more."""
        while self._forgotten:
            if keys := self._exemplars.pop(self._forgotten.popleft(), None):
                keys.free()

    def _settle(self) -> None:
        """Wait for what an error has left on the stream: after one of the GPU itself, waiting raises it once more."""
        with contextlib.suppress(BackendError):
            self._device.synchronize()


def open_device(install: str) -> Device:
    """The GPU; raises `BackendError` as `PycudaDevice`."""
    from .pycuda import PycudaDevice

    return PycudaDevice(install=install)


def open_gpu_pipeline(bundle: Bundle, options: EngineOptions) -> GpuPipeline:
    """The pipeline over TensorRT or ONNX Runtime's CUDA provider.

    Raises `BackendError` where the GPU, pycuda, the backend, an engine or the compiled kernels are missing.
    """
    backend, precision = options.backend, options.precision
    tensorrt = backend in VARIANTS
    folder = default_folder(bundle.path) if options.engines is None else Path(options.engines)
    cache_bytes = (options.exemplar_cache_mib or EXEMPLAR_CACHE_MIB) << 20
    if tensorrt:
        install = f"pip install flashcocos[{VARIANTS[backend]}], or choose backend onnxruntime"
    else:
        on_cpu = "warp numba" if options.warp == "cuda" else "device cpu"
        install = f"pip install flashcocos[gpu] pycuda, or choose {on_cpu}"
    device = open_device(install)
    try:
        with device.active():
            config, sources = bundle.manifest.config, (KernelFolder(folder / FOLDER), BundleKernels(bundle))
            dtypes = ("float32", "float16") if precision == "float32" else ("float16", "float32")
            build = f"flashcocos build {bundle.path} --target sm_{device.capability}"
            if tensorrt:
                remedy = f"{build} --variant {backend}, or flashcocos export --aot, makes them"
            else:
                remedy = f'{build}, or flashcocos export --aot, makes them; or choose warp="numba", on the CPU'
            warp = DeviceWarp(device, find_kernels(sources, config, device.capability, dtypes, remedy), config)
            engines: Mapping[str, DeviceEngine]
            if tensorrt:
                from .tensorrt import open_tensorrt

                engines = open_tensorrt(bundle, device, variant=backend, folder=folder, precision=precision)
            else:
                from .onnxruntime import open_onnx_cuda

                engines = open_onnx_cuda(bundle, device, exact=precision == "float32")
            return GpuPipeline(bundle, device, engines, warp, cache_bytes, options.tile)
    except BaseException:
        device.close()
        raise
