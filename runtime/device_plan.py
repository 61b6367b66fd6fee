"""Plans of the GPU pipeline: the buffers of one shape, allocated once, and the work that is put on the stream.

A plan of a shape that can be recorded runs once as it is, is recorded at its second run and replayed from then on. What
differs from run to run, the label and the exemplars, is copied into the plan's own buffers before; so a recording
refers to no exemplar.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import ModelConfig
from ..errors import BackendError
from .device import Buffer, Device, Event, Recording, Staging, nbytes
from .device_engine import Binding, DeviceEngine, Shape, concrete, device_tensors
from .device_warp import Addresses, DeviceWarp, Tensors, WarpTensors, total_bytes

_log = logging.getLogger("flashcocos.runtime")
Engines = Mapping[str, DeviceEngine]
Work = Callable[[], object]


class Plan:
    """Device memory, staging and bound stages with one owner; `free` gives all of it back."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._owned = contextlib.ExitStack()
        self._bindings: list[Binding] = []
        self._scratch = 0  # the address that the bindings were given
        self.staged: dict[str, npt.NDArray[Any]] = {}

    @property
    def scratch(self) -> int:
        """Bytes of working memory that the stages share."""
        return max((binding.scratch for binding in self._bindings), default=0)

    def use_scratch(self, buffer: Buffer) -> None:
        """Let the stages work in `buffer`."""
        if self._scratch != buffer.address:
            self._forget()
            for binding in self._bindings:
                binding.use_scratch(buffer.address, buffer.bytes)
            self._scratch = buffer.address

    def free(self) -> None:
        """Give everything back; no work on the stream may still use it."""
        self._forget()
        self._owned.close()

    def _forget(self) -> None:
        """Drop what refers to addresses that will change."""

    def _allocate(self, tensors: Tensors) -> dict[str, int]:
        addresses = {}
        for name, (shape, dtype) in tensors.items():
            buffer = self._device.allocate(nbytes(shape, dtype))
            self._owned.callback(buffer.free)
            addresses[name] = buffer.address
        return addresses

    def _stage(self, tensors: Tensors, names: Iterable[str]) -> None:
        for name in names:
            shape, dtype = tensors[name]
            staging: Staging = self._device.staging(shape or (1,), dtype)
            self._owned.callback(staging.free)
            self.staged[name] = staging.array

    def _bind(self, engine: DeviceEngine, shape: Shape, addresses: Addresses) -> Binding:
        binding = engine.bind(shape, addresses)
        self._owned.callback(binding.close)
        self._bindings.append(binding)
        return binding

    @contextlib.contextmanager
    def _building(self) -> Iterator[None]:
        """Free what was allocated where building the plan fails."""
        try:
            yield
        except BaseException:
            self.free()
            raise


class KeyPlan(Plan):
    """The packed state of one exemplar on the device: an entry of the cache."""

    def __init__(self, device: Device, warp: DeviceWarp, key_map: tuple[int, int]) -> None:
        super().__init__(device)
        tensors = warp.tensors.keys(1, *key_map)
        self.sizes = {name: nbytes(*tensor) for name, tensor in tensors.items()}
        self.bytes = total_bytes([tensors])
        with self._building():
            self.addresses = self._allocate(tensors)


class UploadPlan(Plan):
    """Brings an exemplar's phi and values, float32 maps of one size, from the host and packs them."""

    def __init__(self, device: Device, warp: DeviceWarp, config: ModelConfig, key_map: tuple[int, int]) -> None:
        super().__init__(device)
        self._warp, self._key_map = warp, key_map
        tensors = self.tensors(config, key_map)
        with self._building():
            self._addresses = self._allocate(tensors)
            self._stage(tensors, tensors)

    @staticmethod
    def tensors(config: ModelConfig, key_map: tuple[int, int]) -> Tensors:
        """What it holds."""
        channels = {"phi": config.feature_channels, "values": config.warped_channels}
        return {name: ((1, count, *key_map), np.float32) for name, count in channels.items()}

    def run(self, phi: npt.NDArray[np.float32], values: npt.NDArray[np.float32], keys: KeyPlan) -> None:
        """Upload and pack into `keys`, and wait for it."""
        for name, array in (("phi", phi), ("values", values)):
            self.staged[name][...] = array
            self._device.upload(self._addresses[name], self.staged[name])
        for launch in self._warp.pack_keys(
            self._addresses["phi"], self._addresses["values"], keys.addresses, 1, *self._key_map
        ):
            launch()
        self._device.synchronize()


class EncodePlan(Plan):
    """Runs the exemplar stage at one shape, from host to host."""

    def __init__(self, device: Device, engines: Engines, config: ModelConfig, shape: Shape) -> None:
        super().__init__(device)
        self._inputs, self._outputs = tensors = self.tensors(engines, config, shape)
        with self._building():
            self._addresses: dict[str, int] = {}
            for group in tensors:
                self._addresses |= self._allocate(group)
                self._stage(group, group)
            self._binding = self._bind(engines["exemplar"], shape, self._addresses)

    @staticmethod
    def tensors(engines: Engines, config: ModelConfig, shape: Shape) -> tuple[Tensors, Tensors]:
        """What it holds: the stage's inputs and outputs."""
        inputs, outputs = device_tensors(config, "exemplar", packed=engines["exemplar"].packed)
        return concrete(inputs, shape, config.down_scale), concrete(outputs, shape, config.down_scale)

    def run(self, inputs: Mapping[str, npt.NDArray[Any]]) -> None:
        """Encode what `inputs` hold, repeated over the batch; `staged` then holds the outputs."""
        for name in self._inputs:
            self.staged[name][...] = inputs[name]
            self._device.upload(self._addresses[name], self.staged[name])
        self._binding.enqueue()
        for name in self._outputs:
            self._device.download(self.staged[name], self._addresses[name])
        self._device.synchronize()


class TranslatePlan(Plan):
    """From labels to pictures at one shape, for exemplars whose maps have one size.

    `staged` takes "label" before a run and holds the stages' outputs, "index" and "probability" after.
    """

    def __init__(
        self,
        device: Device,
        engines: Engines,
        warp: DeviceWarp,
        config: ModelConfig,
        shape: Shape,
        key_map: tuple[int, int],
    ) -> None:
        super().__init__(device)
        batch, query_map = shape[0], (shape[1] // config.down_scale, shape[2] // config.down_scale)
        packed = engines["synthesis"].packed
        stages, keys, results = translate_tensors(config, warp.tensors, packed, shape, key_map)
        pictures = [name for name in stages if name not in ("label", "theta")]
        self._recording: Recording | None = None
        self._events: list[Event] = []
        self._warm = self._tried = False  # whether it has run, and whether recording was tried since
        self._loaded: dict[int, KeyPlan] = {}  # by slot: what was copied there
        with self._building():
            addresses = self._allocate(stages)
            self._keys, self._results = self._allocate(keys), self._allocate(results)
            self._stage(stages, ("label", *pictures))
            self._stage(results, ("index", "probability"))
            query = self._bind(engines["query"], shape, addresses)
            synthesis = self._bind(engines["synthesis"], shape, {**addresses, "warped": self._results["warped"]})
            launches = warp.run(addresses["theta"], self._keys, self._results, batch, query_map, key_map)
            self._events += [device.event() for _ in range(4)]

        def download(name: str) -> Work:
            return functools.partial(device.download, self.staged[name], {**self._results, **addresses}[name])

        self._steps: dict[str, list[Work]] = {
            "query": [functools.partial(device.upload, addresses["label"], self.staged["label"]), query.enqueue],
            "warp": list(launches),
            "synthesis": [synthesis.enqueue, *(download(name) for name in (*pictures, "index", "probability"))],
        }

    def load(self, slot: int, keys: KeyPlan) -> None:
        """Copy an exemplar into the place of item `slot` of the batch, unless it is there from the run before."""
        if self._loaded.pop(slot, None) is not keys:
            for name, size in keys.sizes.items():
                self._device.copy(self._keys[name] + slot * size, keys.addresses[name], size)
        self._loaded[slot] = keys

    def run(self) -> dict[str, float]:
        """Put everything on the stream and wait: milliseconds of each stage, or of all as "total" when replayed."""
        if self._warm and not self._tried and all(binding.capturable for binding in self._bindings):
            self._record()
        if self._recording is not None:
            self._events[0].record()
            self._recording.replay()
            self._events[-1].record()
            self._device.synchronize()
            return {"total": self._events[-1].milliseconds_since(self._events[0])}
        self._events[0].record()
        for event, steps in zip(self._events[1:], self._steps.values(), strict=True):
            for step in steps:
                step()
            event.record()
        self._device.synchronize()
        self._warm = True
        spans = zip(self._steps, self._events, self._events[1:], strict=False)
        return {stage: end.milliseconds_since(start) for stage, start, end in spans}

    def free(self) -> None:
        """See `Plan.free`."""
        self._events.clear()
        super().free()

    def _record(self) -> None:
        self._tried = True

        def everything() -> None:
            for steps in self._steps.values():
                for step in steps:
                    step()

        try:
            self._recording = self._device.record(everything)
        except BackendError as error:  # the results are the same without
            _log.warning("no CUDA graph, launches one by one: %s", str(error))  # a kept error would keep its frames

    def _forget(self) -> None:
        if self._recording is not None:
            self._recording.close()
        self._recording, self._warm, self._tried = None, False, False


def translate_tensors(
    config: ModelConfig, warp: WarpTensors, packed: bool, shape: Shape, key_map: tuple[int, int]
) -> tuple[Tensors, Tensors, Tensors]:
    """What a plan of translations holds: of the stages, of the exemplars, and of the warp.

    packed: as `DeviceEngine`. key_map: height and width of the exemplars' maps.
    """
    stages: Tensors = {}
    for stage in ("query", "synthesis"):
        for side in device_tensors(config, stage, packed=packed):
            stages |= concrete(side, shape, config.down_scale)
    del stages["warped"]  # the warp's
    query_map = shape[1] // config.down_scale, shape[2] // config.down_scale
    return stages, warp.keys(shape[0], *key_map), warp.results(shape[0], *query_map)
