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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

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
from .engine import Binding, DeviceEngine, Shape, concrete, device_tensors
from .warp import DeviceWarp, Map, Tensors, Work, key_tensors, query_tensors

_log = logging.getLogger("flashcocos.runtime")
Steps = Mapping[str, Sequence[Work]]  # name of a part that is timed -> what it puts on the stream
MAX_KEY_MAPS = 4  # sizes of exemplars' maps whose work a workspace keeps
_PART = "tile "  # begins the names of a tile's own tensors


@dataclasses.dataclass(frozen=True)
class GpuModel:
    """What all workspaces share. tile: side of the fine stage's tiles, None for whole pictures."""

    config: ModelConfig
    device: Device
    engines: Mapping[str, DeviceEngine]
    warp: DeviceWarp
    tile: int | None

    def map(self, shape: Shape) -> Map:
        """Size of the feature maps of pictures of `shape`."""
        return shape[1] // self.config.warp_stride, shape[2] // self.config.warp_stride

    def fine(self) -> tuple[Sequence[TensorSpec], Sequence[TensorSpec]]:
        """Inputs and outputs of the fine stage as its engine has them."""
        return device_tensors(self.config, "fine", uint8_output=self.engines["fine"].uint8_output)

    def tensors(self, shape: Shape) -> tuple[Tensors, Tensors, Tensors]:
        """`translate_tensors` of pictures of `shape`."""
        return translate_tensors(self.config, self.warp.dtype, self.fine(), shape, self.tile)


@dataclasses.dataclass(frozen=True)
class DeviceExemplar:
    """Exemplars as the warp takes them, of one size: one in the cache, or a batch that a translation reads.

    sizes: bytes that one exemplar has of each tensor.
    """

    addresses: Mapping[str, int]
    sizes: Mapping[str, int]
    free: Callable[[], None]


def allocate_exemplar(model: GpuModel, batch: int, key_map: Map) -> DeviceExemplar:
    """Room for `batch` exemplars with maps of `key_map`; `OutOfMemory`."""
    tensors = key_tensors(model.config, model.warp.dtype, batch, key_map)
    with contextlib.ExitStack() as stack:
        addresses = {}
        for name, tensor in tensors.items():
            buffer = model.device.allocate(nbytes(*tensor))
            stack.callback(buffer.free)
            addresses[name] = buffer.address
        sizes = {name: nbytes(*tensor) // batch for name, tensor in tensors.items()}
        return DeviceExemplar(addresses, sizes, stack.pop_all().close)


def upload_exemplar(model: GpuModel, exemplar: Exemplar) -> DeviceExemplar:
    """The exemplar on the device, packed; `OutOfMemory`. Waits for it."""
    device = model.device
    height, width = exemplar.phi.shape[2:]
    arrays = {"phi": exemplar.phi, "values": exemplar.values}
    staging = Workspace(device)
    keys = allocate_exemplar(model, 1, (height, width))
    try:
        staging.allocate({name: (array.shape, np.float32) for name, array in arrays.items()}, pinned=arrays)
        for name, array in arrays.items():
            staging.pinned[name][...] = array
            device.upload(staging.addresses[name], staging.pinned[name])
        phi, values = staging.addresses["phi"], staging.addresses["values"]
        for launch in model.warp.pack_keys(phi, values, keys.addresses, 1, (height, width)):
            launch()
        device.synchronize()
    except BaseException:
        with contextlib.suppress(BackendError):  # of the work that has just failed
            device.synchronize()
        keys.free()
        raise
    finally:
        staging.free()
    return keys


class StreamWork:
    """Steps that run once as they are, are captured as one CUDA graph at the second run, and replayed from then on.

    bindings: the stages among the steps. keys: the batch of exemplars that the steps read, freed with the work.
    """

    def __init__(
        self, device: Device, steps: Steps, bindings: Iterable[Binding], keys: DeviceExemplar | None = None
    ) -> None:
        self._device, self._steps, self._bindings, self.keys = device, steps, list(bindings), keys
        self._events = [device.event() for _ in range(len(steps) + 1)]
        self._graph: CudaGraph | None = None
        self._warm = self._tried = self._told = False  # whether it has run, a capture was tried, and it was logged

    def run(self) -> dict[str, float]:
        """Put everything on the stream and wait: milliseconds of each step, or of all as "total" when replayed."""
        if self._warm and not self._tried:
            self._capture()
        if self._graph is not None:
            self._device.record(self._events[0])
            self._graph.replay()
            self._device.record(self._events[-1])
            self._device.synchronize()
            return {"total": self._device.milliseconds(self._events[0], self._events[-1])}
        self._device.record(self._events[0])
        for event, part in zip(self._events[1:], self._steps.values(), strict=True):
            for step in part:
                step()
            self._device.record(event)
        self._device.synchronize()
        self._warm = True
        spans = zip(self._steps, self._events, self._events[1:], strict=False)
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
        if self.keys is not None:
            self.keys.free()

    def _capture(self) -> None:
        answers = [binding.can_capture for binding in self._bindings]
        if None in answers:
            self._tried = True
        elif all(answers):
            self._tried = True
            try:
                self._graph = self._device.capture(self._put_all)
            except BackendError as error:  # the results are the same without
                self._tell(str(error))  # as text, for a kept error would keep its frames
        else:
            self._tell("an engine cannot be captured yet")

    def _put_all(self) -> None:
        for part in self._steps.values():
            for step in part:
                step()

    def _tell(self, why: str) -> None:
        if not self._told:
            _log.warning("no CUDA graph, launches one by one: %s", why)
        self._told = True


class Workspace:
    """The buffers and bound stages of one shape, with one owner.

    addresses: of device memory. pinned: arrays of the host that go up or come down. work: by the size of the exemplars'
    maps, None where it has none.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._owned = contextlib.ExitStack()
        self._scratch = 0  # the address that the bindings were given
        self.addresses: dict[str, int] = {}
        self.pinned: dict[str, npt.NDArray[Any]] = {}
        self.bindings: dict[str, Binding] = {}
        self.work: collections.OrderedDict[Map | None, StreamWork] = collections.OrderedDict()

    def allocate(self, tensors: Tensors, *, pinned: Iterable[str] = ()) -> None:
        """Device memory for each tensor, and for those of the names `pinned` an array of the host; `OutOfMemory`."""
        for name, tensor in tensors.items():
            buffer = self._device.allocate(nbytes(*tensor))
            self._owned.callback(buffer.free)
            self.addresses[name] = buffer.address
        for name in pinned:
            shape, dtype = tensors[name]
            array = self._device.pinned_array(shape or (1,), dtype)
            self._owned.callback(self._device.free_pinned, array)
            self.pinned[name] = array

    def bind(self, stage: str, engine: DeviceEngine, shape: Shape, addresses: Mapping[str, int]) -> None:
        """Bind a stage to these addresses."""
        self.bindings[stage] = binding = engine.bind(shape, addresses)
        self._owned.callback(binding.close)

    def upload(self, *names: str) -> list[Work]:
        """Copies from the host."""
        return [functools.partial(self._device.upload, self.addresses[name], self.pinned[name]) for name in names]

    def download(self, *names: str) -> list[Work]:
        """Copies to the host."""
        return [functools.partial(self._device.download, self.pinned[name], self.addresses[name]) for name in names]

    @property
    def scratch(self) -> int:
        """Bytes of working memory that the stages share."""
        return max((binding.scratch for binding in self.bindings.values()), default=0)

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
        """Give everything back; no work on the stream may still use it."""
        self.keep_work(0)
        self._owned.close()


def encode_workspace(model: GpuModel, shape: Shape) -> Workspace:
    """The exemplar stage at one shape, from host to host; `OutOfMemory`."""
    inputs, outputs = (concrete(model.config, tensors, shape) for tensors in stage_tensors(model.config)["exemplar"])
    with _building(model.device) as workspace:
        workspace.allocate({**inputs, **outputs}, pinned=(*inputs, *outputs))
        workspace.bind("exemplar", model.engines["exemplar"], shape, workspace.addresses)
        steps = [*workspace.upload(*inputs), workspace.bindings["exemplar"].enqueue, *workspace.download(*outputs)]
        workspace.work[None] = StreamWork(model.device, {"exemplar": steps}, workspace.bindings.values())
    return workspace


def translate_workspace(model: GpuModel, shape: Shape) -> Workspace:
    """All from a label to its pictures at one shape, but for the exemplars; `OutOfMemory`.

    `pinned` takes "label", and then holds the pictures, "index" and "probability".
    """
    stages, results, parts = model.tensors(shape)
    with _building(model.device) as workspace:
        workspace.allocate(stages, pinned=("label", *(spec.name for spec in model.fine()[1])))
        workspace.allocate(results, pinned=("index", "probability"))
        workspace.allocate(parts)
        for stage in ("query", "coarse"):
            workspace.bind(stage, model.engines[stage], shape, workspace.addresses)
        own = {name.removeprefix(_PART): workspace.addresses[name] for name in parts}
        workspace.bind("fine", model.engines["fine"], tile_shape(shape, model.tile), {**workspace.addresses, **own})
    return workspace


def translate_work(model: GpuModel, workspace: Workspace, shape: Shape, key_map: Map) -> StreamWork:
    """The work of a `translate_workspace` for exemplars with maps of `key_map`; `OutOfMemory`."""
    if (work := workspace.work.get(key_map)) is None:
        workspace.keep_work(MAX_KEY_MAPS - 1)
        keys = allocate_exemplar(model, shape[0], key_map)
        try:
            steps = _translate_steps(model, workspace, shape, keys, key_map)
            work = workspace.work[key_map] = StreamWork(model.device, steps, workspace.bindings.values(), keys)
        except BaseException:
            keys.free()
            raise
    workspace.work.move_to_end(key_map)
    return work


def _translate_steps(model: GpuModel, workspace: Workspace, shape: Shape, keys: DeviceExemplar, key_map: Map) -> Steps:
    addresses, bindings, results = workspace.addresses, workspace.bindings, model.fine()[1]
    return {
        "query": [*workspace.upload("label"), bindings["query"].enqueue],
        "warp": model.warp.run(addresses["theta"], keys.addresses, addresses, shape[0], model.map(shape), key_map),
        "synthesis": [
            bindings["coarse"].enqueue,
            *_fine_steps(model, workspace, shape),
            *workspace.download(*(spec.name for spec in results), "index", "probability"),
        ],
    }


def load_exemplar(device: Device, work: StreamWork, slot: int, exemplar: DeviceExemplar) -> None:
    """Copy an exemplar into the place of item `slot` of the batch."""
    assert work.keys is not None
    for name, size in exemplar.sizes.items():
        device.copy(work.keys.addresses[name] + slot * size, exemplar.addresses[name], size)


def translate_tensors(
    config: ModelConfig,
    dtype: str,
    fine: tuple[Sequence[TensorSpec], Sequence[TensorSpec]],
    shape: Shape,
    tile: int | None,
) -> tuple[Tensors, Tensors, Tensors]:
    """The tensors of a `translate_workspace`: of the stages, of the warp, and of a tile, if it has tiles.

    dtype: of the warp's kernels. fine: inputs and outputs of the fine stage as its engine has them.
    """
    stages: Tensors = {}
    for tensors in (*stage_tensors(config)["query"], *stage_tensors(config)["coarse"], fine[1]):
        stages |= concrete(config, tensors, shape)
    del stages["warped"]  # the warp's
    parts: Tensors = {}
    if (part := tile_shape(shape, tile)) != shape:
        own = concrete(config, [*filter(is_cut, fine[0]), *fine[1]], part)
        parts = {_PART + name: tensor for name, tensor in own.items()}
        count = sum(1 for _ in tiles(*shape[1:], tile, config.warp_stride))
        stages |= {spec.name: ((count,), spec.dtype) for spec in fine[1] if not is_cut(spec)}
    query_map = shape[1] // config.warp_stride, shape[2] // config.warp_stride
    return stages, query_tensors(config, dtype, shape[0], query_map), parts


def tile_shape(shape: Shape, tile: int | None) -> Shape:
    """The shape that the fine stage runs at."""
    return (shape[0], *tile_size(*shape[1:], tile))


def _fine_steps(model: GpuModel, workspace: Workspace, shape: Shape) -> Iterator[Work]:
    """The fine stage; for every tile, where it has some, between copies of its inputs and of its results."""
    stages, results, parts = model.tensors(shape)
    device, addresses, enqueue = model.device, workspace.addresses, workspace.bindings["fine"].enqueue
    whole = {**stages, **results}
    if not parts:
        yield enqueue
        return

    def copy(spec: TensorSpec, outer: tuple[slice, ...], inner: tuple[slice, ...], *, back: bool) -> Work:
        picture, extent = window(spec, whole[spec.name], outer, addresses[spec.name])
        part, _ = window(spec, parts[_PART + spec.name], inner, addresses[_PART + spec.name])
        target, source = (picture, part) if back else (part, picture)
        return functools.partial(device.copy_window, target, source, extent)

    inputs, outputs = model.fine()
    for number, place in enumerate(tiles(*shape[1:], model.tile, model.config.warp_stride)):
        for spec in filter(is_cut, inputs):
            yield copy(spec, place.window(spec), (slice(None),) * len(spec.shape), back=False)
        yield enqueue
        for spec in outputs:
            if is_cut(spec):
                yield copy(spec, place.kept(spec), place.inner(spec), back=True)
            else:  # one value a tile
                size = nbytes(*parts[_PART + spec.name])
                target = addresses[spec.name] + number * size
                yield functools.partial(device.copy, target, addresses[_PART + spec.name], size)


def window(
    spec: TensorSpec, tensor: tuple[tuple[int, ...], Any], cut: tuple[slice, ...], address: int
) -> tuple[Window, tuple[int, int, int]]:
    """Where `cut` of a tensor at `address` lies in memory, and its (bytes, rows, planes)."""
    sides, dtype = tensor
    axis = next(axis for axis, side in enumerate(spec.shape) if side in ("height", "half_height", "h"))
    rows, columns = (range(sides[place])[cut[place]] for place in (axis, axis + 1))
    item = nbytes(sides[axis + 2 :], dtype)
    pitch = item * sides[axis + 1]
    start = Window(address + rows.start * pitch + columns.start * item, pitch, sides[axis])
    return start, (item * len(columns), len(rows), nbytes(sides[:axis], np.uint8))


@contextlib.contextmanager
def _building(device: Device) -> Iterator[Workspace]:
    """A new workspace, freed where building it fails."""
    workspace = Workspace(device)
    try:
        yield workspace
    except BaseException:
        workspace.free()
        raise
