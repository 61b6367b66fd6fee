"""The stages of a translation in a row: on the CPU here, on a GPU in device_pipeline.py, behind one protocol.

    label -> query -> theta  \\
                              warp (flashcocos.kernels) -> synthesis: coarse -> fine -> picture
    exemplar -> phi, values  /

The fine stage runs on the whole picture or tile by tile (tiles.py).
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..bundle import Bundle
from ..bundle.stages import axis_sizes, concrete_shape, stage_tensors
from ..errors import BackendError, BundleError, InputError
from ..kernels.corr_warp import CorrMatch, warp_arrays
from ..preprocess.images import FloatArray, UInt8Array, to_uint8
from .engine import BACKENDS, DEVICES, Engine, EngineInfo, has_provider, open_engines
from .gpu.store import VARIANTS
from .tiles import check_tile, tiles

GPU_BACKENDS = tuple(VARIANTS)
WARPS = ("auto", "numba", "numpy", "cuda")
EXEMPLAR_CACHE_MIB = 512  # MiB of device memory for encoded exemplars, unless asked for otherwise
_log = logging.getLogger("flashcocos.runtime")


@dataclasses.dataclass(frozen=True, eq=False)
class Exemplar:
    """An encoded exemplar; constant, so it can serve many translations and threads at once.

    phi: (1, C, h, w) float32 and values: (1, V, h, w) float32, read-only. size: (height, width) of the picture as it
    was encoded. model: SHA-256 of the graph that encoded it; another model cannot use it.
    """

    phi: FloatArray
    values: FloatArray
    size: tuple[int, int]
    model: str


@dataclasses.dataclass(frozen=True, eq=False)
class Rendering:
    """What the stages make of one label: image and warped (H, W, 3) uint8; of each position the flat index of its best
    match (h, w) int64 and its probability (h, w) float32; and milliseconds."""

    image: UInt8Array
    warped: UInt8Array
    index: npt.NDArray[np.int64]
    probability: FloatArray
    timings: Mapping[str, float]


class Pipeline(Protocol):
    """The stages of one model, safe to share between threads."""

    def encode(self, inputs: Mapping[str, npt.NDArray[Any]]) -> tuple[FloatArray, FloatArray]:
        """phi and values of one exemplar, from the inputs of its stage."""
        ...

    def render(self, label: npt.NDArray[Any], exemplars: Sequence[Exemplar]) -> list[Rendering]:
        """A rendering for each item of the batch `label`, as its stage takes it, with the exemplar of its own."""
        ...

    def describe(self) -> dict[str, EngineInfo]:
        """What runs each stage, and the warp."""
        ...

    def close(self) -> None:
        """Free everything; what runs finishes, and what comes after raises `BackendError`."""
        ...


class HostPipeline:
    """Engines on numpy arrays, and the warp on the CPU.

    warp: "numba", "numpy", or "auto" (numba where installed). tile: side of tiles. Raises as `open_engines`.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        backend: str,
        device: str,
        threads: int | None,
        warp: str,
        precision: str,
        tile: int | None,
    ) -> None:
        self._name, self._config = bundle.path, bundle.manifest.config
        # a warp of one position: what cannot run fails here, and "auto" becomes the name of what it chose
        position = np.ones((1, 1, 1, 1), np.float32)
        self._warp = warp_arrays(position, position, position, patch=self._config.patch, backend=warp).backend
        self._tile = tile
        self._tensors = stage_tensors(self._config)
        self.engines: dict[str, Engine] = open_engines(
            bundle, backend=backend, device=device, threads=threads, precision=precision
        )

    def encode(self, inputs: Mapping[str, npt.NDArray[Any]]) -> tuple[FloatArray, FloatArray]:
        """See `Pipeline.encode`."""
        outputs = self._run("exemplar", inputs, inputs["image"].shape[2:])
        return outputs["phi"], outputs["values"]

    def render(self, label: npt.NDArray[Any], exemplars: Sequence[Exemplar]) -> list[Rendering]:
        """See `Pipeline.render`; timings are equal shares of the batch's."""
        size = label.shape[-2:]
        clock = [time.perf_counter()]
        theta = self._run("query", {"label": label}, size)["theta"]
        clock.append(time.perf_counter())
        # one warp an item: it fills the cores by itself, and exemplars may differ in size
        warps = [
            self._matched_warp(theta[index : index + 1], exemplar.phi, exemplar.values)
            for index, exemplar in enumerate(exemplars)
        ]
        clock.append(time.perf_counter())
        pictures = self._synthesize(np.concatenate([out for out, _ in warps]), label)
        clock.append(time.perf_counter())
        shares = [float(seconds) * 1e3 / len(label) for seconds in np.diff(clock)]
        timings = dict(zip(("query", "warp", "synthesis"), shares, strict=True))
        images = zip(pictures["image"], pictures["warped_image"], strict=True)
        return [
            Rendering(image, colors, match.index[0], match.probability[0], timings)
            for (image, colors), (_, match) in zip(images, warps, strict=True)
        ]

    def describe(self) -> dict[str, EngineInfo]:
        """See `Pipeline.describe`."""
        stages = {stage: engine.describe() for stage, engine in self.engines.items()}
        return {**stages, "warp": EngineInfo(self._warp, "flashcocos", "cpu", "float32", "float32")}

    def close(self) -> None:
        """See `Pipeline.close`."""
        for engine in self.engines.values():
            engine.close()

    def _synthesize(self, warped: FloatArray, label: npt.NDArray[Any]) -> dict[str, UInt8Array]:
        """image and warped_image, each (B, H, W, 3)."""
        batch, (height, width) = len(label), label.shape[-2:]
        inputs = {"warped": warped, "label": label}
        inputs |= self._run("coarse", inputs, (height, width))
        pictures = {name: np.empty((batch, height, width, 3), np.uint8) for name in ("image", "warped_image")}
        takes = self._tensors["fine"][0]
        for tile in tiles(height, width, self._tile):
            parts = {spec.name: np.ascontiguousarray(inputs[spec.name][tile.window(spec)]) for spec in takes}
            made = self._run("fine", parts, (tile.rows.size, tile.columns.size))
            for name, picture in pictures.items():
                for item, planes in zip(picture, made[name], strict=True):
                    item[tile.rows.kept, tile.columns.kept] = to_uint8(planes)[tile.rows.inner, tile.columns.inner]
        return pictures

    def _matched_warp(self, theta: FloatArray, phi: FloatArray, values: FloatArray) -> tuple[FloatArray, CorrMatch]:
        patch, temperature = self._config.patch, self._config.temperature
        result = warp_arrays(theta, phi, values, patch=patch, temperature=temperature, match=True, backend=self._warp)
        assert result.match is not None  # it was asked for
        return result.out, result.match

    def _run(self, stage: str, inputs: Mapping[str, npt.NDArray[Any]], size: tuple[int, ...]) -> dict[str, FloatArray]:
        """Run a stage; what a graph gives is as little trusted as the rest of a bundle."""
        outputs = self.engines[stage].run(inputs)
        sizes = axis_sizes(self._config, len(next(iter(inputs.values()))), *size)
        for spec in self._tensors[stage][1]:
            expected = concrete_shape(spec, sizes)
            if (actual := outputs[spec.name].shape) != expected:
                raise BundleError(f"{self._name}: stage {stage} gave {spec.name} {actual}, expected {expected}")
            require_finite(f"{self._name}: stage {stage} gave", spec.name, np.isfinite(outputs[spec.name]).all())
        return outputs


def require_finite(where: str, what: str, finite: Any, remedy: str = "export it again") -> None:
    """Raise `BundleError` where a network gave NaN or infinity."""
    if not finite:
        raise BundleError(
            f"{where} NaN or infinity in {what}: its weights are damaged or overflow in float16; "
            f"{remedy} with precision float32"
        )


def open_pipeline(
    bundle: Bundle,
    *,
    backend: str,
    device: str,
    threads: int | None,
    warp: str,
    precision: str | None,
    engines: str | os.PathLike[str] | None,
    exemplar_cache_mib: int | None,
    tile: int | None,
) -> Pipeline:
    """The pipeline that these options of `Translator` ask for; `InputError` where they do not go together."""
    known = (*BACKENDS, *GPU_BACKENDS)
    for name, value, choices in (("backend", backend, known), ("device", device, DEVICES), ("warp", warp, WARPS)):
        if value not in choices:
            raise InputError(f"unknown {name} {value!r}; expected one of {', '.join(choices)}")
    tensorrt = backend in GPU_BACKENDS
    on_gpu = tensorrt or warp == "cuda" or (backend == "onnxruntime" and device == "cuda" and warp == "auto")
    for name, given, fits in (
        ("engines", engines is not None, on_gpu),
        ("exemplar_cache_mib", exemplar_cache_mib is not None, on_gpu or device == "auto"),
        ("threads", threads is not None, not on_gpu),
        (f"warp {warp!r}", warp in ("numba", "numpy"), not tensorrt),
        (f"warp {warp!r}", warp == "cuda", tensorrt or (backend == "onnxruntime" and device != "cpu")),
        (f"device {device!r}", device == "cpu", not tensorrt),
    ):
        if given and not fits:
            raise InputError(f"{name} does not go with backend {backend!r}, device {device!r} and warp {warp!r}")
    budget = EXEMPLAR_CACHE_MIB if exemplar_cache_mib is None else exemplar_cache_mib
    if type(budget) is not int or budget < 1:
        raise InputError(f"exemplar_cache_mib: expected MiB of device memory, from 1; got {budget!r}")
    check_tile(tile)

    def on_device() -> Pipeline:
        from .gpu.pipeline import open_device_pipeline  # not at the top, for it builds on this module

        return open_device_pipeline(
            bundle, backend=backend, precision=precision, engines=engines, budget=budget << 20, tile=tile
        )

    if on_gpu:
        return on_device()
    if backend == "onnxruntime" and device == "auto" and warp == "auto" and has_provider("cuda"):
        try:
            opened = on_device()
            _log.info("device auto: cuda")
            return opened
        except BackendError as error:
            # as text, for a record that is kept would keep the error's frames and what they hold
            _log.warning("device auto: the warp is not on the GPU: %s", str(error))
    host_precision = "float32" if precision is None else precision
    return HostPipeline(
        bundle, backend=backend, device=device, threads=threads, warp=warp, precision=host_precision, tile=tile
    )
