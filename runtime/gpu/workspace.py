"""Workspaces of the GPU pipeline: the buffers of one shape, allocated once, and the work that is put on the stream.

A translation that can be captured runs once as it is, is captured at its second run and replayed from then on. What
differs from run to run, the label and the exemplars, is copied into the workspace's own buffers before, so a CUDA graph
refers to no exemplar.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...bundle import TensorSpec
from ...bundle.stages import stage_tensors
from ...config import ModelConfig
from ...errors import BackendError
from ..tiles import Tile, is_cut, placed, tile_size, tiles
from .device import Buffer, CudaGraph, Device, Event, PinnedArray, nbytes
from .engine import Binding, DeviceEngine, Shape, concrete, device_tensors
from .warp import Addresses, DeviceWarp, Tensors, WarpTensors, total_bytes

_log = logging.getLogger("flashcocos.runtime")
Engines = Mapping[str, DeviceEngine]
Work = Callable[[], object]


class Workspace:
    """Device memory, pinned arrays and bound stages with one owner; `free` gives all of it back."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._owned = contextlib.ExitStack()
        self._bindings: list[Binding] = []
        self._scratch = 0  # the address that the bindings were given
        self.pinned: dict[str, npt.NDArray[Any]] = {}

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

    def _pin(self, tensors: Tensors, names: Iterable[str]) -> None:
        for name in names:
            shape, dtype = tensors[name]
            pinned: PinnedArray = self._device.pinned_array(shape or (1,), dtype)
            self._owned.callback(pinned.free)
            self.pinned[name] = pinned.array

    def _bind(self, engine: DeviceEngine, shape: Shape, addresses: Addresses) -> Binding:
        binding = engine.bind(shape, addresses)
        self._owned.callback(binding.close)
        self._bindings.append(binding)
        return binding

    @contextlib.contextmanager
    def _building(self) -> Iterator[None]:
        """Free what was allocated where building the workspace fails."""
        try:
            yield
        except BaseException:
            self.free()
            raise


class DeviceExemplar(Workspace):
    """The packed state of one exemplar on the device: an entry of the cache."""

    def __init__(self, device: Device, warp: DeviceWarp, key_map: tuple[int, int]) -> None:
        super().__init__(device)
        tensors = warp.tensors.keys(1, *key_map)
        self.sizes = {name: nbytes(*tensor) for name, tensor in tensors.items()}
        self.bytes = total_bytes([tensors])
        with self._building():
            self.addresses = self._allocate(tensors)


class UploadWorkspace(Workspace):
    """Brings an exemplar's phi and values, float32 maps of one size, from the host and packs them."""

    def __init__(self, device: Device, warp: DeviceWarp, config: ModelConfig, key_map: tuple[int, int]) -> None:
        super().__init__(device)
        self._warp, self._key_map = warp, key_map
        tensors = self.tensors(config, key_map)
        with self._building():
            self._addresses = self._allocate(tensors)
            self._pin(tensors, tensors)

    @staticmethod
    def tensors(config: ModelConfig, key_map: tuple[int, int]) -> Tensors:
        """The tensors of the workspace."""
        channels = {"phi": config.feature_channels, "values": config.warped_channels}
        return {name: ((1, count, *key_map), np.float32) for name, count in channels.items()}

    def run(self, phi: npt.NDArray[np.float32], values: npt.NDArray[np.float32], keys: DeviceExemplar) -> None:
        """Upload and pack into `keys`, and wait for it."""
        for name, array in (("phi", phi), ("values", values)):
            self.pinned[name][...] = array
            self._device.upload(self._addresses[name], self.pinned[name])
        for launch in self._warp.pack_keys(
            self._addresses["phi"], self._addresses["values"], keys.addresses, 1, *self._key_map
        ):
            launch()
        self._device.synchronize()


class EncodeWorkspace(Workspace):
    """Runs the exemplar stage at one shape, from host to host."""

    def __init__(self, device: Device, engines: Engines, config: ModelConfig, shape: Shape) -> None:
        super().__init__(device)
        self._inputs, self._outputs = tensors = self.tensors(engines, config, shape)
        with self._building():
            self._addresses: dict[str, int] = {}
            for group in tensors:
                self._addresses |= self._allocate(group)
                self._pin(group, group)
            self._binding = self._bind(engines["exemplar"], shape, self._addresses)

    @staticmethod
    def tensors(engines: Engines, config: ModelConfig, shape: Shape) -> tuple[Tensors, Tensors]:
        """The stage's inputs and outputs, which are the tensors of the workspace."""
        inputs, outputs = device_tensors(config, "exemplar", uint8_output=engines["exemplar"].uint8_output)
        return concrete(config, inputs, shape), concrete(config, outputs, shape)

    def run(self, inputs: Mapping[str, npt.NDArray[Any]]) -> None:
        """Encode what `inputs` hold, repeated over the batch; `pinned` then holds the outputs."""
        for name in self._inputs:
            self.pinned[name][...] = inputs[name]
            self._device.upload(self._addresses[name], self.pinned[name])
        self._binding.enqueue()
        for name in self._outputs:
            self._device.download(self.pinned[name], self._addresses[name])
        self._device.synchronize()


class TranslateWorkspace(Workspace):
    """From labels to pictures at one shape, for exemplars whose maps have one size; the fine stage in tiles.

    `pinned` takes "label" before a run and holds the stages' outputs, "index" and "probability" after.
    """

    def __init__(
        self,
        device: Device,
        engines: Engines,
        warp: DeviceWarp,
        config: ModelConfig,
        shape: Shape,
        key_map: tuple[int, int],
        tile: int | None,
    ) -> None:
        super().__init__(device)
        batch, query_map = shape[0], (shape[1] // config.warp_stride, shape[2] // config.warp_stride)
        tensors = device_tensors(config, "fine", uint8_output=engines["fine"].uint8_output)
        stages, keys, results, parts = translate_tensors(config, warp.tensors, tensors, shape, key_map, tile)
        pictures = [tensor.name for tensor in tensors[1]]
        self._graph: CudaGraph | None = None
        self._events: list[Event] = []
        self._warm = self._tried = False  # whether it has run, and whether a capture was tried since
        self._loaded: dict[int, DeviceExemplar] = {}  # by slot: what was copied there
        with self._building():
            self._keys, self._results = self._allocate(keys), self._allocate(results)
            addresses = {**self._allocate(stages), "warped": self._results["warped"]}
            tile_addresses = self._allocate(parts)
            self._pin(stages, ("label", *pictures))
            self._pin(results, ("index", "probability"))
            query = self._bind(engines["query"], shape, addresses)
            coarse = self._bind(engines["coarse"], shape, addresses)
            fine = self._bind(engines["fine"], tile_shape(shape, tile), {**addresses, **tile_addresses})
            launches = warp.run(addresses["theta"], self._keys, self._results, batch, query_map, key_map)
            self._events += [device.event() for _ in range(4)]

        def download(name: str) -> Work:
            return functools.partial(device.download, self.pinned[name], {**self._results, **addresses}[name])

        self._steps: dict[str, list[Work]] = {
            "query": [functools.partial(device.upload, addresses["label"], self.pinned["label"]), query.enqueue],
            "warp": list(launches),
            "synthesis": [
                coarse.enqueue,
                *self._fine_steps(
                    fine,
                    tensors,
                    {**stages, **results},
                    addresses,
                    parts,
                    tile_addresses,
                    tiles(*shape[1:], tile, config.warp_stride),
                ),
                *(download(name) for name in (*pictures, "index", "probability")),
            ],
        }

    def _fine_steps(
        self,
        fine: Binding,
        specs: tuple[Sequence[TensorSpec], Sequence[TensorSpec]],
        whole: Tensors,
        addresses: Addresses,
        parts: Tensors,
        tile_addresses: Addresses,
        places: Iterable[Tile],
    ) -> Iterator[Work]:
        """The fine stage for every tile, with its inputs cut out of those of the picture and its results put back.

        whole, addresses: tensors of the picture. parts, tile_addresses: those of a tile; none where it is the picture.
        """

        def copy(spec: TensorSpec, window: tuple[slice, ...], inner: tuple[slice, ...], *, back: bool) -> Work:
            sides, dtype = whole[spec.name]
            size = np.dtype(dtype).itemsize
            start, layout, box = placed(spec, sides, size, window)
            tile_start, tile_layout, _ = placed(spec, parts[spec.name][0], size, inner)
            ends = [(addresses[spec.name] + start, layout), (tile_addresses[spec.name] + tile_start, tile_layout)]
            target, source = ends if back else ends[::-1]
            return functools.partial(self._device.copy_box, *target, *source, box)

        for number, tile in enumerate(places):
            if tile_addresses:
                for spec in specs[0]:
                    if is_cut(spec):
                        yield copy(spec, tile.window(spec), (slice(None),) * len(spec.shape), back=False)
            yield fine.enqueue
            if tile_addresses:
                for spec in specs[1]:
                    if is_cut(spec):
                        yield copy(spec, tile.kept(spec), tile.inner(spec), back=True)
                    else:  # one value a tile
                        size = nbytes(*parts[spec.name])
                        target = addresses[spec.name] + number * size
                        yield functools.partial(self._device.copy, target, tile_addresses[spec.name], size)

    def load(self, slot: int, keys: DeviceExemplar) -> None:
        """Copy an exemplar into the place of item `slot` of the batch, unless it is there from the run before."""
        if self._loaded.pop(slot, None) is not keys:
            for name, size in keys.sizes.items():
                self._device.copy(self._keys[name] + slot * size, keys.addresses[name], size)
        self._loaded[slot] = keys

    def run(self) -> dict[str, float]:
        """Put everything on the stream and wait: milliseconds of each stage, or of all as "total" when replayed."""
        if self._warm and not self._tried and all(binding.can_capture for binding in self._bindings):
            self._capture()
        if self._graph is not None:
            self._events[0].record()
            self._graph.replay()
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
        self._events.clear()
        super().free()

    def _capture(self) -> None:
        self._tried = True

        def everything() -> None:
            for steps in self._steps.values():
                for step in steps:
                    step()

        try:
            self._graph = self._device.capture(everything)
        except BackendError as error:  # the results are the same without
            _log.warning("no CUDA graph, launches one by one: %s", str(error))  # a kept error would keep its frames

    def _forget(self) -> None:
        if self._graph is not None:
            self._graph.close()
        self._graph, self._warm, self._tried = None, False, False


def translate_tensors(
    config: ModelConfig,
    warp: WarpTensors,
    fine: tuple[Sequence[TensorSpec], Sequence[TensorSpec]],
    shape: Shape,
    key_map: tuple[int, int],
    tile: int | None,
) -> tuple[Tensors, Tensors, Tensors, Tensors]:
    """The tensors of a `TranslateWorkspace`: of the stages, the exemplars, the warp, and a tile, if it has tiles.

    fine: inputs and outputs of the fine stage as its engine has them. key_map: height and width of the exemplars' maps.
    """
    stages: Tensors = {}
    for tensors in (*stage_tensors(config)["query"], *stage_tensors(config)["coarse"], fine[1]):
        stages |= concrete(config, tensors, shape)
    del stages["warped"]  # the warp's
    parts: Tensors = {}
    if (part := tile_shape(shape, tile)) != shape:
        parts = concrete(config, [*filter(is_cut, fine[0]), *fine[1]], part)
        count = sum(1 for _ in tiles(*shape[1:], tile, config.warp_stride))
        stages |= {spec.name: ((count,), spec.dtype) for spec in fine[1] if not is_cut(spec)}
    query_map = shape[1] // config.warp_stride, shape[2] // config.warp_stride
    return stages, warp.keys(shape[0], *key_map), warp.results(shape[0], *query_map), parts


def tile_shape(shape: Shape, tile: int | None) -> Shape:
    """The shape that the fine stage runs at."""
    return (shape[0], *tile_size(*shape[1:], tile))
