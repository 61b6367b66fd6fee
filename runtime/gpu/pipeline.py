"""The stages of a translation on a GPU: only labels go in and pictures, matches and confidence come out.

Everything runs in order on one stream, under one lock. Each shape has a workspace, and encoded exemplars stay on the
device up to a budget, the least recently used making room; what was evicted is uploaded again. Where memory runs out,
everything is freed and the picture is tried once more.
"""

from __future__ import annotations

import collections
import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ...bundle import STAGES, Bundle
from ...errors import BackendError, InputError
from ...preprocess.images import FloatArray, UInt8Array, to_uint8
from ..engine import EngineInfo
from ..options import EXEMPLAR_CACHE_MIB, VARIANTS, EngineOptions
from ..pipeline import Exemplar, PipelineOutput, require_finite
from .cubins import FOLDER, find_kernels
from .device import Buffers, Device, OutOfMemory, mebibytes, nbytes, total_bytes
from .engine import DeviceEngine, Shape
from .store import default_folder
from .warp import DeviceWarp, Map, feature_map, key_tensors
from .workspace import GpuModel, Workspace, encode_workspace, stage_shape, translate_workspace, upload_exemplar

MAX_WORKSPACES = 16  # shapes whose buffers are kept
MAX_BATCH = 256
Result = TypeVar("Result")


class GpuPipeline:
    """The stages of `model`, whose engines and device it closes. name: of the bundle, for messages.

    budget: bytes of device memory for encoded exemplars.
    """

    def __init__(self, name: Path, model: GpuModel, budget: int) -> None:
        self._name, self._model, self._device, self._budget = name, model, model.device, budget
        self._lock = threading.RLock()
        self._closed = False
        self._workspaces: collections.OrderedDict[tuple[Any, Shape], Workspace] = collections.OrderedDict()
        self._exemplars: collections.OrderedDict[weakref.ref[Exemplar], Buffers] = collections.OrderedDict()
        self._scratch, self._scratch_bytes = Buffers(self._device, {}), 0  # the working memory of all stages

    def encode(self, inputs: Mapping[str, npt.NDArray[Any]]) -> tuple[FloatArray, FloatArray]:
        """phi and values of one exemplar, from the inputs of its stage."""
        height, width = inputs["image"].shape[2:]
        with self._running():
            shape = (self._batch(("exemplar",), 1, height, width), height, width)
            outputs = self._with_room(shape, lambda: self._encode(inputs, shape))
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
        by_size: dict[Map, list[int]] = {}
        for index, exemplar in enumerate(exemplars):
            by_size.setdefault(exemplar.phi.shape[2:], []).append(index)
        results: dict[int, PipelineOutput] = {}
        with self._running():
            for indices in by_size.values():
                while indices:
                    shape = (self._batch(("query", "coarse", "fine"), len(indices), height, width), height, width)
                    part, indices = indices[: shape[0]], indices[shape[0] :]
                    rendered = self._render(label[part], [exemplars[i] for i in part], shape)
                    results.update(zip(part, rendered, strict=True))
        return [results[index] for index in range(len(label))]

    def describe(self) -> dict[str, EngineInfo]:
        """What runs each stage, and the warp."""
        dtype, chip = self._model.warp.dtype, f"sm_{self._model.warp.architecture}"
        warp = EngineInfo(f"cubins for {chip}", "flashcocos", "cuda", dtype, dtype)
        return {**{stage: self._model.engines[stage].info for stage in STAGES}, "warp": warp}

    def close(self) -> None:
        """Free everything; a running translation finishes."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            with contextlib.ExitStack() as stack:
                stack.callback(self._device.close)
                stack.enter_context(self._device.active())
                for engine in self._model.engines.values():
                    stack.callback(engine.close)
                stack.callback(self._free_all)

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        with self._lock:
            if self._closed:
                raise BackendError(f"{self._name}: the translator is closed")
            with self._device.active():
                for key in [key for key in self._exemplars if key() is None]:  # nobody holds it any more
                    self._exemplars.pop(key).free()
                try:
                    yield
                except BaseException:
                    self._device.settle()
                    raise

    def _with_room(self, shape: Shape, run: Callable[[], Result]) -> Result:
        """What `run` gives; where memory runs out, everything is freed and it is tried once more."""
        with contextlib.suppress(OutOfMemory):
            return run()
        self._free_all()
        try:
            return run()
        except OutOfMemory as error:
            free, total = self._device.memory()
            tiles = "" if self._model.tile else ", or tile= makes pictures in parts"
            raise BackendError(
                f"batch {shape[0]} of {shape[1]} x {shape[2]} pixels does not fit on {self._device.name}: {error}; "
                f"{mebibytes(free)} of {mebibytes(total)} are free; lower size, batch_size or exemplar_cache_mib{tiles}"
                ", or close what else uses the GPU"
            ) from error

    def _encode(self, inputs: Mapping[str, npt.NDArray[Any]], shape: Shape) -> dict[str, FloatArray]:
        workspace = self._workspace(encode_workspace, shape)
        for name, array in inputs.items():
            workspace.pinned[name][...] = array  # repeated over the batch
        workspace.work[None].run()
        return {name: workspace.pinned[name][:1].copy() for name in ("phi", "values")}

    def _render(self, label: npt.NDArray[Any], exemplars: Sequence[Exemplar], shape: Shape) -> list[PipelineOutput]:
        """`render` for at most a batch, filled up with the last item, whose exemplars have one size."""
        pinned, timings = self._with_room(shape, lambda: self._translate(label, exemplars, shape))
        if "invalid" in pinned:
            self._require_finite("fine", "image", not pinned["invalid"].any())
        query_map = feature_map(self._model.config, *shape[1:])
        return [
            PipelineOutput(
                self._picture("image", pinned["image"][item]),
                self._picture("warped_image", pinned["warped_image"][item]),
                pinned["index"][item].reshape(query_map).copy(),
                pinned["probability"][item].reshape(query_map).copy(),
                {name: value / len(label) for name, value in timings.items()},
            )
            for item in range(len(label))
        ]

    def _translate(
        self, label: npt.NDArray[Any], exemplars: Sequence[Exemplar], shape: Shape
    ) -> tuple[Mapping[str, npt.NDArray[Any]], dict[str, float]]:
        """What comes down, to be copied before the next run, and milliseconds."""
        workspace = self._workspace(translate_workspace, shape)
        work = workspace.translation(exemplars[0].phi.shape[2:])
        for slot in range(shape[0]):
            item = min(slot, len(label) - 1)
            uploaded = self._uploaded(exemplars[item])
            for name, address in uploaded.addresses.items():
                size = nbytes(*uploaded.tensors[name])
                self._device.copy(work.keys.addresses[name] + slot * size, address, size)
            workspace.pinned["label"][slot] = label[item]
        return workspace.pinned, work.run()

    def _picture(self, name: str, pinned: npt.NDArray[Any]) -> UInt8Array:
        if pinned.dtype == np.uint8:
            return pinned.copy()
        self._require_finite("fine", name, np.isfinite(pinned).all())
        return to_uint8(pinned)

    def _require_finite(self, stage: str, what: str, finite: Any) -> None:
        remedy = "build it again" if self._model.engines["fine"].uint8_output else "export it again"
        require_finite(f"{self._name}: stage {stage} gave", what, finite, remedy)

    def _batch(self, stages: Sequence[str], wanted: int, height: int, width: int) -> int:
        """How many items run together: `wanted` or the next fewer that all stages support, else the next more."""
        batches: list[int] = [*range(wanted, 0, -1), *range(wanted + 1, MAX_BATCH + 1)]

        def reason(stage: str, batch: int) -> str:
            shape = stage_shape(stage, (batch, height, width), self._model.tile)
            return self._model.engines[stage].why_unsupported(shape)

        for batch in batches:
            if not any(reason(stage, batch) for stage in stages):
                return batch
        lacking = [stage for stage in stages if all(reason(stage, batch) for batch in batches)] or stages
        reasons = "; ".join(filter(None, (reason(stage, wanted) for stage in lacking)))
        raise InputError(f"{height} x {width} pixels (height x width), batch {wanted}: {reasons}")

    def _workspace(self, make: Callable[[GpuModel, Shape], Workspace], shape: Shape) -> Workspace:
        """The workspace of this kind and shape, made where it is missing, with its working memory."""
        workspace = self._workspaces.get((make, shape))
        if workspace is None:
            workspace = self._workspaces[make, shape] = make(self._model, shape)
            while len(self._workspaces) > MAX_WORKSPACES:
                self._device.synchronize()
                self._workspaces.popitem(last=False)[1].free()
        self._workspaces.move_to_end((make, shape))
        if size := workspace.scratch:
            if self._scratch_bytes < size:
                self._device.synchronize()
                self._free_scratch()
                self._scratch, self._scratch_bytes = Buffers(self._device, {"scratch": ((size,), np.uint8)}), size
            workspace.use_scratch(self._scratch.addresses["scratch"], self._scratch_bytes)
        return workspace

    def _uploaded(self, exemplar: Exemplar) -> Buffers:
        """The exemplar on the device, uploaded where it is missing."""
        key = weakref.ref(exemplar)
        if key not in self._exemplars:
            size = total_bytes(key_tensors(self._model.config, self._model.warp.dtype, 1, exemplar.phi.shape[2:]))
            if size > self._budget:
                raise InputError(
                    f"exemplar of {exemplar.size[0]} x {exemplar.size[1]} pixels takes {mebibytes(size)} on the GPU, "
                    f"more than exemplar_cache_mib, {mebibytes(self._budget)}; raise it"
                )
            while sum(kept.bytes for kept in self._exemplars.values()) + size > self._budget:
                self._device.synchronize()
                self._exemplars.popitem(last=False)[1].free()
            self._exemplars[key] = upload_exemplar(self._model, exemplar)
        self._exemplars.move_to_end(key)
        return self._exemplars[key]

    def _free_all(self) -> None:
        """Free every workspace and exemplar, and the working memory."""
        self._device.settle()
        for kept in (self._workspaces, self._exemplars):
            while kept:
                kept.popitem()[1].free()
        self._free_scratch()

    def _free_scratch(self) -> None:
        self._scratch.free()
        self._scratch_bytes = 0


def open_gpu_pipeline(bundle: Bundle, options: EngineOptions) -> GpuPipeline:
    """The pipeline over TensorRT or ONNX Runtime's CUDA provider.

    Raises `BackendError` where the GPU, pycuda, the backend, an engine or the compiled kernels are missing.
    """
    backend, precision, config = options.backend, options.precision, bundle.manifest.config
    folder = default_folder(bundle.path) if options.engines is None else Path(options.engines)
    cache_bytes = (options.exemplar_cache_mib or EXEMPLAR_CACHE_MIB) << 20
    extra = VARIANTS.get(backend, "gpu")
    device = Device(install=f"pip install flashcocos[{extra}], or choose {_other_choice(options)}")
    try:
        with device.active():
            remedy = f"flashcocos build {bundle.path} --target sm_{device.capability}"
            if backend in VARIANTS:
                remedy += f" --variant {backend}"
            cubins = find_kernels(
                (folder / FOLDER, bundle),
                config,
                ("float32", "float16") if precision == "float32" else ("float16", "float32"),
                capability=device.capability,
                driver=device.driver,
                remedy=f"{remedy}, or flashcocos export --aot, makes them",
            )
            warp = DeviceWarp(device, cubins, config)
            engines: Mapping[str, DeviceEngine]
            if backend in VARIANTS:
                from .tensorrt import open_tensorrt

                engines = open_tensorrt(bundle, device, variant=backend, folder=folder, precision=precision)
            else:
                from .onnxruntime import OnnxCudaEngine

                exact = precision == "float32"
                engines = {stage: OnnxCudaEngine(bundle, stage, device, exact=exact) for stage in STAGES}
            return GpuPipeline(bundle.path, GpuModel(config, device, engines, warp, options.tile), cache_bytes)
    except BaseException:
        device.close()
        raise


def _other_choice(options: EngineOptions) -> str:
    if options.backend in VARIANTS:
        return "backend onnxruntime"
    return "warp numba" if options.warp == "cuda" else "device cpu"
