"""What the GPU pipeline keeps on the device: encoded exemplars, and for each shape its buffers, stages and work.

What differs from run to run, the label and the exemplars, is copied into the workspace's own buffers before, so that a
CUDA graph refers to nothing that may be freed. Bindings belong to a shape alone; only the warp's work depends on the
size of the exemplars' maps, too.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ...bundle import TensorSpec
from ...bundle.stages import stage_tensors
from ...config import ModelConfig
from ...errors import BackendError
from ..pipeline import Exemplar
from ..tiles import is_cut, tile_size, tiles
from .cuda_graph import CudaGraph
from .device import Buffer, Device, Window, nbytes
from .engine import Binding, DeviceEngine, Shape, Tensors, concrete, device_tensors
from .warp import DeviceWarp, Map, Work, key_tensors, query_tensors, total_bytes

_log = logging.getLogger("flashcocos.runtime")
Steps = Mapping[str, Sequence[Work]]  # name of a part that is timed -> what it puts on the stream
MAX_KEY_MAPS = 4  # sizes of exemplars' maps whose work a workspace keeps


@dataclasses.dataclass(frozen=True)
class GpuModel:
    """What all workspaces share. tile: side of the fine stage's tiles, None for whole pictures."""

    config: ModelConfig
    device: Device
    engines: Mapping[str, DeviceEngine]
    warp: DeviceWarp
    tile: int | None

    @property
    def fine(self) -> tuple[Sequence[TensorSpec], Sequence[TensorSpec]]:
        """Inputs and outputs of the fine stage as its engine has them."""
        return device_tensors(self.config, "fine", uint8_output=self.engines["fine"].uint8_output)

    @property
    def results(self) -> list[str]:
        """What a translation gives the host."""
        return [*(spec.name for spec in self.fine[1]), "index", "probability"]

    def map(self, shape: Shape) -> Map:
        """Size of the feature maps of pictures of `shape`."""
        return shape[1] // self.config.warp_stride, shape[2] // self.config.warp_stride

    def exemplar_tensors(self, batch: int, key_map: Map) -> Tensors:
        """Encoded exemplars with maps of `key_map`."""
        return key_tensors(self.config, self.warp.dtype, batch, key_map)


class Buffers:
    """Device memory for `tensors`, and for those of the names `pinned` an array of the host; `OutOfMemory`.

    addresses: of the device memory. pinned: the arrays, which go up or come down. bytes: of device memory.
    """

    def __init__(self, device: Device, tensors: Tensors, pinned: Iterable[str] = ()) -> None:
        self.device, self.tensors, self.bytes = device, tensors, total_bytes(tensors)
        self.addresses: dict[str, int] = {}
        self.pinned: dict[str, npt.NDArray[Any]] = {}
        with contextlib.ExitStack() as stack:
            for name, tensor in tensors.items():
                buffer = device.allocate(nbytes(*tensor))
                stack.callback(buffer.free)
                self.addresses[name] = buffer.address
            for name in pinned:
                shape, dtype = tensors[name]
                array = device.pinned_array(shape or (1,), dtype)
                stack.callback(device.free_pinned, array)
                self.pinned[name] = array
            self._owned = stack.pop_all()

    def upload(self, *names: str) -> list[Work]:
        """Copies from the host."""
        return [functools.partial(self.device.upload, self.addresses[name], self.pinned[name]) for name in names]

    def download(self, *names: str) -> list[Work]:
        """Copies to the host."""
        return [functools.partial(self.device.download, self.pinned[name], self.addresses[name]) for name in names]

    def window(self, spec: TensorSpec, cut: tuple[slice, ...]) -> Window:
        """Where `cut` of the tensor of `spec` lies in device memory."""
        sides, dtype = self.tensors[spec.name]
        axis = next(axis for axis, side in enumerate(spec.shape) if side in ("height", "half_height", "h"))
        rows, columns = (range(sides[place])[cut[place]] for place in (axis, axis + 1))
        item = nbytes(sides[axis + 2 :], dtype)
        pitch = item * sides[axis + 1]
        start = self.addresses[spec.name] + rows.start * pitch + columns.start * item
        return Window(start, pitch, sides[axis], (item * len(columns), len(rows), math.prod(sides[:axis])))

    def free(self) -> None:
        """Give everything back; no work on the stream may still use it. Twice does no harm."""
        self._owned.close()


Owned = TypeVar("Owned", bound=Buffers)


@contextlib.contextmanager
def freed_on_error(buffers: Owned) -> Iterator[Owned]:
    """Wait and free `buffers` where the block fails."""
    try:
        yield buffers
    except BaseException:
        buffers.device.settle()
        buffers.free()
        raise


def upload_exemplar(model: GpuModel, exemplar: Exemplar) -> Buffers:
    """The exemplar on the device, packed; `OutOfMemory`. Waits for it."""
    planes = {"phi": exemplar.phi, "values": exemplar.values}
    key_map = exemplar.phi.shape[2:]
    staging = Buffers(model.device, {name: (one.shape, np.float32) for name, one in planes.items()}, planes)
    try:
        with freed_on_error(Buffers(model.device, model.exemplar_tensors(1, key_map))) as keys:
            for name, array in planes.items():
                staging.pinned[name][...] = array
            phi, values = (staging.addresses[name] for name in planes)
            packing = model.warp.pack_keys(phi, values, keys.addresses, 1, key_map)
            for step in (*staging.upload(*planes), *packing):
                step()
            model.device.synchronize()
    finally:
        staging.free()
    return keys


class StreamWork:
    """Steps that run once as they are, are captured as one CUDA graph at the second run, and replayed from then on.

    bindings: the stages among the steps. keys: the batch of exemplars that the steps read, freed with the work.
    """

    def __init__(self, device: Device, steps: Steps, bindings: Iterable[Binding], keys: Buffers) -> None:
        self._device, self._steps, self._bindings, self.keys = device, steps, list(bindings), keys
        self._events = [device.event() for _ in range(len(steps) + 1)]
        self._graph: CudaGraph | None = None
        self._warm = self._tried = self._told = False  # whether it has run, a capture was tried, and it was logged

    def run(self) -> dict[str, float]:
        """Put everything on the stream and wait: milliseconds of each step, or of all as "total" when replayed."""
        if self._warm and not self._tried:
            self._capture()
        parts = self._steps if self._graph is None else {"total": [self._graph.replay]}
        self._device.record(self._events[0])
        for event, part in zip(self._events[1:], parts.values(), strict=False):
            for step in part:
                step()
            self._device.record(event)
        self._device.synchronize()
        self._warm = True
        spans = zip(parts, self._events, self._events[1:], strict=False)
        return {name: self._device.milliseconds(start, end) for name, start, end in spans}

    def forget(self) -> None:
        """Drop the CUDA graph, whose addresses will change."""
        if self._graph is not None:
            self._graph.close()
        self._graph, self._warm, self._tried = None, False, False

    def free(self) -> None:
        """Give everything back; no work on the stream may still use it."""
        self.forget()
        self._events.clear()
        self.keys.free()

    def _capture(self) -> None:
        answers = [binding.can_capture for binding in self._bindings]
        if False in answers:
            self._tell("an engine cannot be captured yet")
            return
        self._tried = True
        if None not in answers:
            try:
                self._graph = self._device.capture(self._put_all)
            except BackendError as error:  # the results are the same without
                self._tell(str(error))  # as text, for a kept error would keep its frames

    def _put_all(self) -> None:
        for part in self._steps.values():
            for step in part:
                step()

    def _tell(self, why: str) -> None:
        if not self._told:
            _log.warning("no CUDA graph, launches one by one: %s", why)
        self._told = True


class Workspace(Buffers):
    """The buffers and bound stages of one shape.

    parts: what a tile has of its own, where there are tiles. work: by the size of the exemplars' maps, None where it
    has none.
    """

    def __init__(self, device: Device, tensors: Tensors, pinned: Iterable[str]) -> None:
        super().__init__(device, tensors, pinned)
        self.parts = Buffers(device, {})
        self._scratch = 0  # the address that the bindings were given
        self.bindings: dict[str, Binding] = {}
        self.work: collections.OrderedDict[Map | None, StreamWork] = collections.OrderedDict()

    def bind(self, stage: str, engine: DeviceEngine, shape: Shape, addresses: Mapping[str, int]) -> None:
        """Bind a stage to these addresses."""
        self.bindings[stage] = binding = engine.bind(shape, addresses)
        self._owned.callback(binding.close)

    @property
    def scratch(self) -> int:
        """Bytes of working memory that the stages share."""
        return max(binding.scratch for binding in self.bindings.values())

    def use_scratch(self, buffer: Buffer) -> None:
        """Let the stages work in `buffer`."""
        if self._scratch != buffer.address:
            for work in self.work.values():
                work.forget()
            for binding in self.bindings.values():
                binding.use_scratch(buffer.address, buffer.bytes)
            self._scratch = buffer.address

    def keep_work(self, count: int) -> None:
        """Free all work but that of the `count` sizes of exemplars that were used last."""
        while len(self.work) > count:
            self.work.popitem(last=False)[1].free()

    def free(self) -> None:
        """As of `Buffers`."""
        self.keep_work(0)
        super().free()
        self.parts.free()


def encode_workspace(model: GpuModel, shape: Shape) -> Workspace:
    """The exemplar stage at one shape, from host to host; `OutOfMemory`."""
    inputs, outputs = (concrete(model.config, tensors, shape) for tensors in stage_tensors(model.config)["exemplar"])
    with freed_on_error(Workspace(model.device, {**inputs, **outputs}, (*inputs, *outputs))) as workspace:
        workspace.bind("exemplar", model.engines["exemplar"], shape, workspace.addresses)
        steps = [*workspace.upload(*inputs), workspace.bindings["exemplar"].enqueue, *workspace.download(*outputs)]
        no_keys = Buffers(model.device, {})
        workspace.work[None] = StreamWork(model.device, {"exemplar": steps}, workspace.bindings.values(), no_keys)
    return workspace


def translate_workspace(model: GpuModel, shape: Shape) -> Workspace:
    """All from a label to its pictures at one shape, but for the exemplars; `OutOfMemory`.

    `pinned` takes "label", and then holds the pictures, "index" and "probability".
    """
    whole, parts = translate_tensors(model.config, model.warp.dtype, model.fine, shape, model.tile)
    with freed_on_error(Workspace(model.device, whole, ("label", *model.results))) as workspace:
        workspace.parts = Buffers(model.device, parts)
        for stage in ("query", "coarse"):
            workspace.bind(stage, model.engines[stage], shape, workspace.addresses)
        addresses = {**workspace.addresses, **workspace.parts.addresses}
        workspace.bind("fine", model.engines["fine"], stage_shape("fine", shape, model.tile), addresses)
    return workspace


def translate_work(model: GpuModel, workspace: Workspace, shape: Shape, key_map: Map) -> StreamWork:
    """The work of a `translate_workspace` for exemplars with maps of `key_map`; `OutOfMemory`."""
    if key_map not in workspace.work:
        workspace.keep_work(MAX_KEY_MAPS - 1)
        addresses, bindings = workspace.addresses, workspace.bindings
        with freed_on_error(Buffers(model.device, model.exemplar_tensors(shape[0], key_map))) as keys:
            warp = model.warp.run(addresses["theta"], keys.addresses, addresses, shape[0], model.map(shape), key_map)
            synthesis = [bindings["coarse"].enqueue, *_fine_steps(model, workspace, shape)]
            steps = {
                "query": [*workspace.upload("label"), bindings["query"].enqueue],
                "warp": warp,
                "synthesis": [*synthesis, *workspace.download(*model.results)],
            }
            workspace.work[key_map] = StreamWork(model.device, steps, bindings.values(), keys)
    workspace.work.move_to_end(key_map)
    return workspace.work[key_map]


def translate_tensors(
    config: ModelConfig,
    dtype: str,
    fine: tuple[Sequence[TensorSpec], Sequence[TensorSpec]],
    shape: Shape,
    tile: int | None,
) -> tuple[Tensors, Tensors]:
    """The tensors of a `translate_workspace`: of the whole picture, and of a tile, if it has tiles.

    dtype: of the warp's kernels. fine: inputs and outputs of the fine stage as its engine has them.
    """
    inputs, outputs = fine
    query_map = shape[1] // config.warp_stride, shape[2] // config.warp_stride
    whole = query_tensors(config, dtype, shape[0], query_map)
    for specs in (*stage_tensors(config)["query"], *stage_tensors(config)["coarse"], outputs):
        whole |= concrete(config, specs, shape)
    if (part := stage_shape("fine", shape, tile)) == shape:
        return whole, {}
    count = sum(1 for _ in tiles(*shape[1:], tile, config.warp_stride))
    whole |= {spec.name: ((count,), spec.dtype) for spec in outputs if not is_cut(spec)}
    return whole, concrete(config, [*filter(is_cut, inputs), *outputs], part)


def stage_shape(stage: str, shape: Shape, tile: int | None) -> Shape:
    """The shape that a stage runs at, for pictures of `shape`: of the fine stage that of a tile."""
    return (shape[0], *tile_size(*shape[1:], tile)) if stage == "fine" else shape


def _fine_steps(model: GpuModel, workspace: Workspace, shape: Shape) -> Iterator[Work]:
    """The fine stage; for every tile, where it has some, between copies of its inputs and of its results."""
    device, parts, enqueue = model.device, workspace.parts, workspace.bindings["fine"].enqueue
    if not parts.tensors:
        yield enqueue
        return
    inputs, outputs = model.fine
    for number, place in enumerate(tiles(*shape[1:], model.tile, model.config.warp_stride)):
        for spec in filter(is_cut, inputs):
            own = parts.window(spec, (slice(None),) * len(spec.shape))
            yield functools.partial(device.copy_window, own, workspace.window(spec, place.window(spec)))
        yield enqueue
        for spec in outputs:
            if is_cut(spec):
                kept = workspace.window(spec, place.kept(spec))
                yield functools.partial(device.copy_window, kept, parts.window(spec, place.inner(spec)))
            else:  # one value a tile
                size = nbytes(*parts.tensors[spec.name])
                target = workspace.addresses[spec.name] + number * size
                yield functools.partial(device.copy, target, parts.addresses[spec.name], size)
