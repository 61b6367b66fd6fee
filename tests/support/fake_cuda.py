"""A GPU made of numpy arrays, under the names of `pycuda.driver` and of the driver library's graph functions.

As strict as the real one is unforgiving. Work is put on a queue and runs when someone waits, so that what reads too
early reads old data. Memory has a budget and is filled with garbage; freeing twice, freeing what queued work still
uses, and using what was freed are errors, and `live` counts what leaked. Everything needs a current context. Launches
run the twins of kernel_twins.py. While work is captured, waiting, allocating and freeing are errors, as for CUDA.

The signatures were checked against pycuda 2026.1 itself, run with a driver library of stubs.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import kernel_twins
import numpy as np

MIB = 1 << 20
STREAM = 0x57EA


class Error(Exception):
    """Base of pycuda's exceptions."""


class Allocation:
    """Device memory, or page-locked memory of the host, that knows whether it lives."""

    def __init__(self, cuda: FakeCuda, owner: list[Allocation], size: int) -> None:
        cuda.require("allocate")
        self.cuda, self.owner, self.bytes = cuda, owner, size
        padded = np.full(size + 512, 0xC5, np.uint8)
        start = -padded.ctypes.data % 256
        self.array = padded[start : start + size]
        self.address = self.array.ctypes.data
        owner.append(self)

    def __int__(self) -> int:
        return self.address

    def free(self) -> None:
        self.cuda.require("free")
        assert self in self.owner, "freed twice"
        assert not self.cuda.queue, "freed while queued work may use it"
        self.array[:] = 0xDD
        self.owner.remove(self)
        self.cuda.freed.append(self.array)  # kept, so that no later one gets its address


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        cuda.require("event")
        self.cuda, self.time = cuda, None

    def record(self, stream: Any) -> None:
        assert not self.cuda.capturing, "an event within a capture cannot be read"
        self.time = None
        self.cuda.put(lambda: setattr(self, "time", time.perf_counter()), stream)

    def time_since(self, start: FakeEvent) -> float:
        if self.time is None or start.time is None:
            raise Error("the event has not passed")
        return 1e3 * (self.time - start.time)


class FakeFunction:
    def __init__(self, cuda: FakeCuda, code: bytes, entry: str) -> None:
        self.cuda, self.attributes = cuda, {}
        twin, config, dtype = kernel_twins.twin(code, entry), cuda.config, cuda.dtype
        self.run = lambda grid, arguments: twin(grid, arguments, cuda.view, config, dtype)
        cuda.functions.add(self)

    def set_attribute(self, attribute: int, value: int) -> None:
        self.attributes[attribute] = value

    def prepare(self, arg_types: list[str]) -> None:
        self.formats = arg_types

    def prepared_async_call(self, grid: Any, block: Any, stream: Any, *arguments: Any, shared_size: int = 0) -> None:
        assert (len(grid), block) == (3, (128, 1, 1))
        assert shared_size < (48 << 10) or self.attributes[8] == shared_size, "more than the function may use"
        for kind, argument in zip(self.formats, arguments, strict=True):
            assert type(argument) is (float if kind == "f" else int), f"{argument!r} for {kind}"
            assert kind != "i" or 0 <= argument < 2**31
        self.cuda.put(lambda: self.run(grid, arguments), stream)
        self.cuda.launches += 1


class FakeCuda:
    """The module and the library; `config` and `dtype` are those of the kernels that will be loaded.

    count: of GPUs. version: of CUDA, that the driver is for.
    """

    Error = Error
    function_attribute = SimpleNamespace(MAX_DYNAMIC_SHARED_SIZE_BYTES=8)

    def __init__(self, config: Any, *, total: int = 64 * MIB, capability: int = 86, dtype: Any = np.float32) -> None:
        self.config, self.total, self.capability, self.dtype = config, total, capability, dtype
        self.count, self.version, self.detached = 1, 12040, 0
        self.queue: list[Callable[[], None]] = []
        self.captured: list[Callable[[], None]] = []
        self.capturing = False
        self.buffers: list[Allocation] = []
        self.freed: list[np.ndarray] = []
        self.pinned_arrays: list[Allocation] = []
        self.functions: weakref.WeakSet[FakeFunction] = weakref.WeakSet()
        self.streams: weakref.WeakSet[Any] = weakref.WeakSet()
        self.handles: dict[int, list[Callable[[], None]]] = {}  # of graphs, executable or not
        self.instantiate = 0  # what cuGraphInstantiateWithFlags gives
        self.launches = self.replays = self.allocations = self.copies = self.uploaded = self.downloaded = 0
        self.fail_at: int | None = None  # so many operations from now, one raises
        self._current: dict[int, int] = {}  # thread -> depth of contexts
        context = SimpleNamespace(push=self._push, detach=lambda: setattr(self, "detached", self.detached + 1))
        self._device = SimpleNamespace(
            name=lambda: "Fake RTX",
            compute_capability=lambda: divmod(self.capability, 10),
            retain_primary_context=lambda: context,
        )
        self.Context = SimpleNamespace(pop=self._pop)

    @property
    def live(self) -> tuple[int, int, int]:
        """Buffers, pinned arrays and graphs that nobody has freed."""
        return len(self.buffers), len(self.pinned_arrays), len(self.handles)

    @property
    def used(self) -> int:
        return sum(buffer.bytes for buffer in self.buffers)

    @property
    def closed(self) -> bool:
        """Whether every `Device` is, and nobody has a context current."""
        return not self.streams and not self.functions and not self._current

    # what pycuda.driver has

    def init(self) -> None:
        if not self.count:
            raise Error("cuInit failed: no CUDA-capable device is detected")

    def get_driver_version(self) -> int:
        return self.version

    @property
    def Device(self) -> Any:
        ordinals = dict.fromkeys(range(self.count), self._device)
        return type("Device", (), {"count": lambda: self.count, "__new__": lambda _, ordinal: ordinals[ordinal]})

    def Stream(self, flags: int) -> Any:
        assert flags == 1, "not to wait for the legacy default stream"
        stream = type("Stream", (), {"handle": STREAM, "synchronize": lambda _: self.synchronize()})()
        self.streams.add(stream)
        return stream

    def Event(self) -> FakeEvent:
        return FakeEvent(self)

    def mem_get_info(self) -> tuple[int, int]:
        self.require("memory")
        return self.total - self.used, self.total

    def mem_alloc(self, size: int) -> Allocation:
        assert size > 0
        if size > self.total - self.used:
            raise Error(f"out of device memory: {size} bytes")
        self.allocations += 1
        return Allocation(self, self.buffers, size)

    def pagelocked_empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        pinned = Allocation(self, self.pinned_arrays, int(np.prod(shape)) * dtype.itemsize)
        pinned.__array_interface__ = pinned.array.view(dtype).reshape(shape).__array_interface__
        return np.asarray(pinned)

    def memcpy_htod_async(self, dest: int, src: np.ndarray, stream: Any) -> None:
        self._pinned(src)
        self.put(lambda: np.copyto(self.view(dest, src.dtype, src.size), src.ravel()), stream)
        self.uploaded += src.nbytes

    def memcpy_dtoh_async(self, dest: np.ndarray, src: int, stream: Any) -> None:
        self._pinned(dest)
        self.put(lambda: np.copyto(dest, self.view(src, dest.dtype, dest.size).reshape(dest.shape)), stream)
        self.downloaded += dest.nbytes

    def memcpy_dtod_async(self, dest: int, src: int, size: int, stream: Any) -> None:
        self.put(lambda: np.copyto(self.view(dest, np.uint8, size), self.view(src, np.uint8, size)), stream)
        self.copies += 1

    def Memcpy3D(self) -> Any:
        """A copy of a box, as its attributes say when it is called."""
        ends: dict[str, int] = {}
        kind = type("Memcpy3D", (), {"__call__": lambda box, stream: self._copy_box(vars(box), ends, stream)})
        copy: Any = kind()
        copy.set_src_device = lambda address: ends.update(src=address)
        copy.set_dst_device = lambda address: ends.update(dst=address)
        return copy

    def module_from_buffer(self, buffer: bytes) -> Any:
        self.require("load")
        if buffer == b"not a cubin":
            raise Error("cuModuleLoadDataEx failed: device kernel image is invalid")
        return SimpleNamespace(get_function=lambda name: FakeFunction(self, buffer, name))

    # the driver library's functions for graphs: results are CUresult, 0 for success

    def cuStreamBeginCapture_v2(self, stream: int, mode: int) -> int:
        assert (stream, mode) == (STREAM, 1)
        self.capturing, self.captured = True, []
        return 0

    def cuStreamEndCapture(self, stream: int, graph: Any) -> int:
        work, self.capturing, self.captured = self.captured, False, []
        return self._handle(graph, work)

    def cuGraphInstantiateWithFlags(self, executable: Any, graph: Any, flags: int) -> int:
        assert flags == 0
        return self.instantiate or self._handle(executable, self.handles[graph.value])

    def cuGraphLaunch(self, executable: Any, stream: int) -> int:
        assert stream == STREAM
        try:
            for one in self.handles[executable.value]:
                self.put(one)
        except Error:
            return 2
        self.replays += 1
        return 0

    def cuGraphDestroy(self, graph: Any) -> int:
        self.require("destroy")
        del self.handles[graph.value]
        return 0

    cuGraphExecDestroy = cuGraphDestroy

    def cuGetErrorName(self, result: int, name: Any) -> int:
        name._obj.value = b"CUDA_ERROR_OUT_OF_MEMORY"
        return 0

    # what is behind them

    def require(self, what: str) -> None:
        assert self._current.get(threading.get_ident()), f"{what} without a context in this thread"
        if self.capturing:
            raise Error(f"{what} while work is captured")

    def put(self, operation: Callable[[], None], stream: Any = None) -> None:
        """Put an operation on the queue, or into what is being captured."""
        assert stream is None or stream.handle == STREAM
        assert self._current.get(threading.get_ident()), "work without a context in this thread"
        if self.fail_at is not None:
            self.fail_at -= 1
            if self.fail_at < 0:
                self.fail_at = None
                raise Error("it failed, as the test asked for")
        (self.captured if self.capturing else self.queue).append(operation)

    def synchronize(self) -> None:
        self.require("synchronize")
        self.flush()

    def flush(self) -> None:
        """Run what is queued."""
        queue, self.queue = self.queue, []
        for operation in queue:
            operation()

    def view(self, address: int, dtype: Any, count: int) -> np.ndarray:
        """The array at `address`, within one buffer that lives."""
        size = count * np.dtype(dtype).itemsize
        for buffer in self.buffers:
            start = address - buffer.address
            if 0 <= start < buffer.bytes:
                assert start + size <= buffer.bytes, f"{size} bytes at {start} of a buffer of {buffer.bytes}"
                return buffer.array[start : start + size].view(dtype)
        raise AssertionError(f"{size} bytes at {address:#x}: freed, or never allocated")

    def _copy_box(self, box: dict[str, Any], ends: dict[str, int], stream: Any) -> None:
        shape = box["depth"], box["height"], box["width_in_bytes"]

        def rows(end: str) -> np.ndarray:
            pitch, height = box[f"{end}_pitch"], box[f"{end}_height"]
            assert shape[2] <= pitch
            assert shape[1] <= height
            # to the last byte of the last row, and not the whole planes, whose end may lie beyond the buffer
            last = ((shape[0] - 1) * height + shape[1] - 1) * pitch + shape[2]
            view = self.view(ends[end], np.uint8, last)
            return np.lib.stride_tricks.as_strided(view, shape, (height * pitch, pitch, 1))

        self.put(lambda: np.copyto(rows("dst"), rows("src")), stream)
        self.copies += 1

    def _handle(self, target: Any, work: list[Callable[[], None]]) -> int:
        target._obj.value = max(self.handles, default=0) + 1
        self.handles[target._obj.value] = work
        return 0

    def _push(self) -> None:
        thread = threading.get_ident()
        assert not set(self._current) - {thread}, "two threads at a time"
        self._current[thread] = self._current.get(thread, 0) + 1

    def _pop(self) -> None:
        thread = threading.get_ident()
        self._current[thread] -= 1
        if not self._current[thread]:
            del self._current[thread]

    def _pinned(self, array: np.ndarray) -> None:
        start = array.ctypes.data
        pinned = self.pinned_arrays
        assert any(one.address <= start < one.address + one.bytes for one in pinned), "not pinned memory"
