"""The stages of a translation on numpy arrays: engines of the CPU, or of a GPU that copies, and the warp on the CPU."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...bundle import Bundle
from ...bundle.stages import axis_sizes, concrete_shape, stage_tensors
from ...errors import BundleError
from ...kernels.corr_warp import CorrMatch, warp_arrays
from ...preprocess.images import FloatArray, UInt8Array, to_uint8
from ..engine import Engine, EngineInfo
from ..lru import LruBytes
from ..pipeline import Exemplar, PipelineOutput, require_finite
from ..tiles import tiles

LABEL_CACHE_BYTES = 64 << 20  # of encoded labels: 16 at 256 px and C = 256, one at 1024 px


class CpuPipeline:
    """`engines` on numpy arrays, which it closes, and the warp on the CPU: "numba" or "numpy". tile: side of tiles.

    What the latest labels were encoded to is kept, so that the same label again costs no query.
    """

    def __init__(self, bundle: Bundle, engines: Mapping[str, Engine], warp: str, tile: int | None) -> None:
        self._name, self._config = bundle.path, bundle.manifest.config
        self._warp, self._tile = warp, tile
        self._tensors = stage_tensors(self._config)
        self.engines = engines
        self._thetas: LruBytes[FloatArray] = LruBytes(LABEL_CACHE_BYTES, lambda theta: theta.nbytes)
        self._lock = threading.Lock()  # of the line above

    def encode(self, inputs: Mapping[str, npt.NDArray[Any]]) -> tuple[FloatArray, FloatArray]:
        """phi and values of one exemplar, from the inputs of its stage."""
        outputs = self._run("exemplar", inputs, inputs["image"].shape[2:])
        return outputs["phi"], outputs["values"]

    def encode_label(self, label: npt.NDArray[Any]) -> FloatArray:
        """theta of one label, a batch of 1, read-only."""
        key = hashlib.blake2b(repr(label.shape).encode() + label.tobytes()).hexdigest()
        with self._lock:
            theta = self._thetas.get(key)
        if theta is None:
            theta = self._run("query", {"label": label}, label.shape[-2:])["theta"]
            theta.flags.writeable = False
            if theta.nbytes <= LABEL_CACHE_BYTES:
                with self._lock:
                    self._thetas.put(key, theta)
        return theta

    def render(
        self, label: npt.NDArray[Any], exemplars: Sequence[Exemplar], thetas: Sequence[FloatArray | None]
    ) -> list[PipelineOutput]:
        """The output for each item of the batch `label`; timings are equal shares of the batch's."""
        clock = [time.perf_counter()]
        # one query an item: a CPU gains nothing by a batch, and theta does not depend on what else is in it
        encoded = [
            self.encode_label(label[index : index + 1]) if theta is None else theta
            for index, theta in enumerate(thetas)
        ]
        clock.append(time.perf_counter())
        # one warp an item: it fills the cores by itself, and exemplars may differ in size
        warps = [
            self._matched_warp(theta, exemplar.phi, exemplar.values)
            for theta, exemplar in zip(encoded, exemplars, strict=True)
        ]
        clock.append(time.perf_counter())
        pictures = self._synthesize(np.concatenate([out for out, _ in warps]), label)
        clock.append(time.perf_counter())
        shares = [float(seconds) * 1e3 / len(label) for seconds in np.diff(clock)]
        timings = dict(zip(("query", "warp", "synthesis"), shares, strict=True))
        images = zip(pictures["image"], pictures["warped_image"], strict=True)
        return [
            PipelineOutput(image, colors, match.index[0], match.probability[0], timings)
            for (image, colors), (_, match) in zip(images, warps, strict=True)
        ]

    def describe(self) -> dict[str, EngineInfo]:
        """What runs each stage, and the warp."""
        stages = {stage: engine.describe() for stage, engine in self.engines.items()}
        return {**stages, "warp": EngineInfo(self._warp, "flashcocos", "cpu", "float32", "float32")}

    def close(self) -> None:
        """Close the engines, and forget the labels."""
        with self._lock:
            self._thetas = LruBytes(0, len)
        for engine in self.engines.values():
            engine.close()

    def _synthesize(self, warped: FloatArray, label: npt.NDArray[Any]) -> dict[str, UInt8Array]:
        """image and warped_image, each (B, H, W, 3)."""
        batch, (height, width) = len(label), label.shape[-2:]
        inputs = {"warped": warped, "label": label}
        inputs |= self._run("coarse", inputs, (height, width))
        pictures = {name: np.empty((batch, height, width, 3), np.uint8) for name in ("image", "warped_image")}
        takes = self._tensors["fine"][0]
        for tile in tiles(height, width, self._tile, self._config.warp_stride):
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
