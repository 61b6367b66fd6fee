"""What the GPU pipeline keeps on the device: encoded exemplars, and for each shape its buffers, stages and work.

What differs from run to run, the label and the exemplars, is copied into the workspace's own buffers before, so that a
CUDA graph refers to nothing that may be freed. Bindings belong to a shape alone; only the warp's work depends on the
size of the exemplars' maps, too.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from ...bundle import TensorSpec
from ...bundle.stages import stage_tensors
from ...config import ModelConfig
from ...errors import BackendError
from ..pipeline import Exemplar
from ..tiles import is_cut, tile_size, tiles
from .cuda_graph import CudaGraph
from .device import Buffers, Device, Tensors, Window, Work, nbytes
from .engine import Binding, DeviceEngine, Shape, concrete
from .warp import DeviceWarp, Map, feature_map, key_tensors, query_tensors

_log = logging.getLogger("flashcocos.runtime")
MAX_KEY_MAPS = 4  # sizes of exemplars' maps whose work a workspace keeps
_TILE = "tile's "  # begins the names of what a tile has of its own


@dataclasses.dataclass(frozen=True)
class GpuModel:
    """What all workspaces share. tile: side of the fine stage's tiles, None for whole pictures."""

    config: ModelConfig
    device: Device
    engines: Mapping[str, DeviceEngine]
    warp: DeviceWarp
    tile: int | None


def upload_exemplar(model: GpuModel, exemplar: Exemplar) -> Buffers:
    """The exemplar on the device, packed; `OutOfMemory`. Waits for it."""
    planes = {"phi": exemplar.phi, "values": exemplar.values}
    key_map = exemplar.phi.shape[2:]
    staging = Buffers(model.device, {name: (array.shape, np.float32) for name, array in planes.items()}, planes)
    try:
        keys = Buffers(model.device, key_tensors(model.config, model.warp.dtype, 1, key_map))
        with keys.freed_on_error():
            for name, array in planes.items():
                staging.pinned[name][...] = array
            phi, values = (staging.addresses[name] for name in planes)
            packing = model.warp.pack_keys(phi, values, keys.addresses, 1, key_map)
            model.device.run({"exemplar": [*staging.upload(*planes), *packing]})
    finally:
        staging.free()
    return keys


class StreamWork:
    """Parts that run once as they are, are captured as one CUDA graph at the second run, and replayed from then on.

    bindings: the stages among the parts. keys: the batch of exemplars that they read, freed with the work.
    """

    def __init__(
        self, device: Device, parts: Mapping[str, Sequence[Work]], bindings: Iterable[Binding], keys: Buffers
    ) -> None:
        self._device, self._parts, self._bindings, self.keys = device, parts, list(bindings), keys
        self._graph: CudaGraph | None = None
        self._warm = self._tried = self._told = False  # whether it has run, a capture was tried, and it was logged

    def run(self) -> dict[str, float]:
        """Put everything on the stream and wait: milliseconds of each part, or of all as "total" when replayed."""
        if self._warm and not self._tried:
            self._capture()
        timings = self._device.run(self._parts if self._graph is None else {"total": [self._graph.replay]})
        self._warm = True
        return timings

    def forget(self) -> None:
        """Drop the CUDA graph, whose addresses will change."""
        if self._graph is not None:
            self._graph.close()
        self._graph, self._warm, self._tried = None, False, False

    def free(self) -> None:
        """Give everything back; no work on the stream may still use it."""
        self.forget()
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
        for part in self._parts.values():
            for step in part:
                step()

    def _tell(self, why: str) -> None:
        if not self._told:
            _log.warning("no CUDA graph, launches one by one: %s", why)
        self._told = True


class Workspace(Buffers):
    """The buffers of one shape, and the stages that are bound to them.

    work: by the size of the exemplars' maps, None where it has none.
    """

    def __init__(self, model: GpuModel, shape: Shape, tensors: Tensors, pinned: Iterable[str]) -> None:
        super().__init__(model.device, tensors, pinned)
        self.model, self.shape = model, shape
        self._scratch = 0  # the address that the bindings were given
        self.bindings: dict[str, Binding] = {}
        self.work: collections.OrderedDict[Map | None, StreamWork] = collections.OrderedDict()

    def bind(self, stage: str) -> None:
        """Bind a stage to the buffers: to those of a tile, where it has some of its own."""
        addresses = dict(self.addresses)
        if stage == "fine":
            addresses |= {key.removeprefix(_TILE): own for key, own in addresses.items() if key.startswith(_TILE)}
        shape = stage_shape(stage, self.shape, self.model.tile)
        self.bindings[stage] = binding = self.model.engines[stage].bind(shape, addresses)
        self._owned.callback(binding.close)

    @property
    def scratch(self) -> int:
        """Bytes of working memory that the stages share."""
        return max(binding.scratch for binding in self.bindings.values())

    def use_scratch(self, address: int, size: int) -> None:
        """Let the stages work in this memory."""
        if self._scratch != address:
            for work in self.work.values():
                work.forget()
            for binding in self.bindings.values():
                binding.use_scratch(address, size)
            self._scratch = address

    def translation(self, key_map: Map) -> StreamWork:
        """The work of a `translate_workspace` for exemplars with maps of `key_map`; `OutOfMemory`."""
        if key_map not in self.work:
            self._keep_work(MAX_KEY_MAPS - 1)
            keys = Buffers(self.device, key_tensors(self.model.config, self.model.warp.dtype, self.shape[0], key_map))
            with keys.freed_on_error():
                self.work[key_map] = StreamWork(
                    self.device, self._translation_parts(keys, key_map), self.bindings.values(), keys
                )
        self.work.move_to_end(key_map)
        return self.work[key_map]

    def free(self) -> None:
        """As of `Buffers`."""
        self._keep_work(0)
        super().free()

    def _keep_work(self, count: int) -> None:
        """Free all work but that of the `count` sizes of exemplars that were used last."""
        while len(self.work) > count:
            self.work.popitem(last=False)[1].free()

    def _translation_parts(self, keys: Buffers, key_map: Map) -> dict[str, list[Work]]:
        model, at, (batch, *size) = self.model, self.addresses, self.shape
        return {
            "query": [*self.upload("label"), self.bindings["query"].enqueue],
            "warp": model.warp.run(at["theta"], keys.addresses, at, batch, feature_map(model.config, *size), key_map),
            "synthesis": [
                self.bindings["coarse"].enqueue,
                *_fine_steps(self),
                *self.download(*(name for name in self.pinned if name != "label")),
            ],
        }


def encode_workspace(model: GpuModel, shape: Shape) -> Workspace:
    """The exemplar stage at one shape, from host to host; `OutOfMemory`."""
    inputs, outputs = (concrete(model.config, tensors, shape) for tensors in stage_tensors(model.config)["exemplar"])
    workspace = Workspace(model, shape, {**inputs, **outputs}, (*inputs, *outputs))
    with workspace.freed_on_error():
        workspace.bind("exemplar")
        steps = [*workspace.upload(*inputs), workspace.bindings["exemplar"].enqueue, *workspace.download(*outputs)]
        no_keys = Buffers(model.device, {})
        workspace.work[None] = StreamWork(model.device, {"exemplar": steps}, workspace.bindings.values(), no_keys)
    return workspace


def translate_workspace(model: GpuModel, shape: Shape) -> Workspace:
    """All from a label to its pictures at one shape, but for the exemplars; `OutOfMemory`.

    `pinned` takes "label", and then holds the pictures, "index" and "probability".
    """
    fine = model.engines["fine"]
    tensors = translate_tensors(model.config, model.warp.dtype, (fine.inputs, fine.outputs), shape, model.tile)
    pinned = ("label", *(spec.name for spec in fine.outputs), "index", "probability")
    workspace = Workspace(model, shape, tensors, pinned)
    with workspace.freed_on_error():
        for stage in ("query", "coarse", "fine"):
            workspace.bind(stage)
    return workspace


def translate_tensors(
    config: ModelConfig,
    dtype: str,
    fine: tuple[Sequence[TensorSpec], Sequence[TensorSpec]],
    shape: Shape,
    tile: int | None,
) -> Tensors:
    """The tensors of a `translate_workspace`; of a tile, if it has tiles, under names of its own.

    dtype: of the warp's kernels. fine: inputs and outputs of the fine stage as its engine has them.
    """
    inputs, outputs = fine
    tensors = dict(query_tensors(config, dtype, shape[0], feature_map(config, *shape[1:])))
    for specs in (*stage_tensors(config)["query"], *stage_tensors(config)["coarse"], outputs):
        tensors |= concrete(config, specs, shape)
    if (part := stage_shape("fine", shape, tile)) != shape:
        own = concrete(config, [*filter(is_cut, inputs), *outputs], part)
        tensors |= {_TILE + name: tensor for name, tensor in own.items()}
        count = sum(1 for _ in tiles(*shape[1:], tile, config.warp_stride))
        tensors |= {spec.name: ((count,), spec.dtype) for spec in outputs if not is_cut(spec)}
    return tensors


def stage_shape(stage: str, shape: Shape, tile: int | None) -> Shape:
    """The shape that a stage runs at, for pictures of `shape`: of the fine stage that of a tile."""
    return (shape[0], *tile_size(*shape[1:], tile)) if stage == "fine" else shape


def _fine_steps(workspace: Workspace) -> Iterator[Work]:
    """The fine stage; for every tile, where it has some, between copies of its inputs and of its results."""
    model, device, enqueue = workspace.model, workspace.device, workspace.bindings["fine"].enqueue
    if not any(name.startswith(_TILE) for name in workspace.tensors):
        yield enqueue
        return
    fine = model.engines["fine"]
    for number, place in enumerate(tiles(*workspace.shape[1:], model.tile, model.config.warp_stride)):
        for spec in filter(is_cut, fine.inputs):
            target = window(workspace, spec, (slice(None),) * len(spec.shape), _TILE)
            yield functools.partial(device.copy_window, target, window(workspace, spec, place.window(spec)))
        yield enqueue
        for spec in fine.outputs:
            if is_cut(spec):
                made = window(workspace, spec, place.inner(spec), _TILE)
                yield functools.partial(device.copy_window, window(workspace, spec, place.kept(spec)), made)
            else:  # one value a tile
                size = nbytes(*workspace.tensors[_TILE + spec.name])
                target_address = workspace.addresses[spec.name] + number * size
                yield functools.partial(device.copy, target_address, workspace.addresses[_TILE + spec.name], size)


def window(buffers: Buffers, spec: TensorSpec, cut: tuple[slice, ...], owner: str = "") -> Window:
    """Where `cut` of the tensor of `spec` lies in device memory. owner: begins its name there."""
    sides, dtype = buffers.tensors[owner + spec.name]
    axis = next(axis for axis, side in enumerate(spec.shape) if side in ("height", "half_height", "h"))
    rows, columns = (range(sides[place])[cut[place]] for place in (axis, axis + 1))
    item = nbytes(sides[axis + 2 :], dtype)
    pitch = item * sides[axis + 1]
    start = buffers.addresses[owner + spec.name] + rows.start * pitch + columns.start * item
    return Window(start, pitch, sides[axis], (item * len(columns), len(rows), math.prod(sides[:axis])))
