"""A GPU made of numpy arrays, as strict as the real one is unforgiving.

Work is put on a queue and runs when someone waits, so that what reads too early reads old data. Memory has a budget and
is filled with garbage; freeing twice, freeing what queued work still uses, and using what was freed are errors, and
`live` counts what leaked. Launches run the twins of kernel_twins.py. While work is captured, waiting, allocating and
freeing are errors, as they are for CUDA.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import kernel_twins
import numpy as np

from flashcocos.errors import BackendError
from flashcocos.runtime.gpu.device import Box, Layout

MIB = 1 << 20


class FakeBuffer:
    """Memory that knows whether it lives."""

    def __init__(self, device: FakeDevice, size: int) -> None:
        self.device, self.bytes, self.alive = device, size, True
        padded = np.full(size + 512, 0xC5, np.uint8)
        start = -padded.ctypes.data % 256
        self.array = padded[start : start + size]
        self.address = self.array.ctypes.data

    def free(self) -> None:
        self.device._require("free")
        assert self.alive, "freed twice"
        assert not self.device.queue, "freed while queued work may use it"
        self.alive = False
        self.array[:] = 0xDD
        self.device.buffers.remove(self)


class FakePinnedArray:
    """Host memory, accounted for likewise."""

    def __init__(self, device: FakeDevice, shape: tuple[int, ...], dtype: Any) -> None:
        self.device, self.alive = device, True
        self.array = np.empty(shape, dtype)
        self.array.view(np.uint8)[...] = 0xC5

    def free(self) -> None:
        self.device._require("free")
        assert self.alive, "freed twice"
        assert not self.device.queue, "freed while queued work may use it"
        self.alive = False
        self.device.pinned_arrays.remove(self)


class FakeEvent:
    def __init__(self, device: FakeDevice) -> None:
        self.device, self.time = device, None

    def record(self) -> None:
        assert not self.device.capturing, "an event within a capture cannot be read"
        self.time = None
        self.device.put(self._pass)

    def _pass(self) -> None:
        self.time = time.perf_counter()

    def milliseconds_since(self, start: FakeEvent) -> float:
        assert self.time is not None, "the event has not passed"
        assert start.time is not None, "the event has not passed"
        return 1e3 * (self.time - start.time)


class FakeKernel:
    def __init__(self, device: FakeDevice, run: Callable[..., None], formats: str, constants: Any) -> None:
        self.device, self.run, self.formats, self.constants = device, run, formats, constants

    def launch(self, grid: tuple[int, int, int], arguments: Sequence[int | float]) -> None:
        assert len(arguments) == len(self.formats)
        for kind, argument in zip(self.formats, arguments, strict=True):
            assert type(argument) is (float if kind == "f" else int), f"{argument!r} for {kind}"
            assert kind != "i" or 0 <= argument < 2**31
        memory, dtype = _Memory(self.device, self.constants), self.device.dtype
        self.device.put(lambda: self.run(grid, arguments, memory, dtype))
        self.device.launches += 1


class _Memory:
    """What a twin sees: arrays at addresses, and the constants that it was compiled with."""

    def __init__(self, device: FakeDevice, constants: dict[str, Any]) -> None:
        self.device, self.constants = device, constants

    def __call__(self, address: int, dtype: Any, count: int) -> np.ndarray:
        return self.device.view(address, dtype, count)


class FakeCudaGraph:
    def __init__(self, device: FakeDevice, work: list[Callable[[], None]]) -> None:
        self.device, self.work, self.alive = device, work, True
        device.graphs.append(self)

    def replay(self) -> None:
        assert self.alive, "replayed after close"
        self.device._require("replay")
        for one in self.work:
            self.device.put(one)
        self.device.replays += 1

    def close(self) -> None:
        assert self.alive, "closed twice"
        self.alive = False
        self.device.graphs.remove(self)


class FakeDevice:
    """`Device` without a GPU; `config` and `dtype` are those of the kernels that will be loaded."""

    def __init__(self, config: Any, *, total: int = 64 * MIB, capability: int = 86, dtype: Any = np.float32) -> None:
        self.name, self.kind, self.ordinal, self.driver = "Fake RTX", "cuda", 0, "12.4"
        self.capability, self.stream, self.total, self.dtype, self.config = capability, 0x57EA, total, dtype, config
        self.queue: list[Callable[[], None]] = []
        self.captured: list[Callable[[], None]] = []
        self.capturing = self.closed = False
        self.buffers: list[FakeBuffer] = []
        self.pinned_arrays: list[FakePinnedArray] = []
        self.graphs: list[FakeCudaGraph] = []
        self.kernels = self.launches = self.replays = self.allocations = self.copies = self.uploaded = (
            self.downloaded
        ) = 0
        self.fail_at: int | None = None  # so many operations from now, one raises
        self._active: dict[int, int] = {}  # thread -> depth

    @property
    def live(self) -> tuple[int, int, int]:
        """Buffers, pinned arrays and graphs that nobody has freed."""
        return len(self.buffers), len(self.pinned_arrays), len(self.graphs)

    @property
    def used(self) -> int:
        return sum(buffer.bytes for buffer in self.buffers)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        if self.closed:
            raise BackendError("the GPU is closed")
        thread = threading.get_ident()
        assert not set(self._active) - {thread}, "two threads at a time"
        self._active[thread] = self._active.get(thread, 0) + 1
        try:
            yield
        finally:
            self._active[thread] -= 1
            if not self._active[thread]:
                del self._active[thread]

    def _require(self, what: str) -> None:
        assert self._active.get(threading.get_ident()), f"{what} without the device being active in this thread"
        if self.capturing:
            raise BackendError(f"{what} while work is captured")

    def memory(self) -> tuple[int, int]:
        self._require("memory")
        return self.total - self.used, self.total

    def allocate(self, size: int) -> FakeBuffer:
        self._require("allocate")
        assert size > 0
        if size > self.total - self.used:
            raise BackendError(f"out of device memory: {size} bytes")
        buffer = FakeBuffer(self, size)
        self.buffers.append(buffer)
        self.allocations += 1
        return buffer

    def pinned_array(self, shape: tuple[int, ...], dtype: Any) -> FakePinnedArray:
        self._require("pinned_array")
        pinned = FakePinnedArray(self, shape, dtype)
        self.pinned_arrays.append(pinned)
        return pinned

    def upload(self, target: int, source: np.ndarray) -> None:
        self._staged(source)
        self.put(lambda: self._write(target, source))
        self.uploaded += source.nbytes

    def download(self, target: np.ndarray, source: int) -> None:
        self._staged(target)
        self.put(lambda: np.copyto(target, self.view(source, target.dtype, target.size).reshape(target.shape)))
        self.downloaded += target.nbytes

    def copy(self, target: int, source: int, size: int) -> None:
        self.copies += 1
        self.put(lambda: np.copyto(self.view(target, np.uint8, size), self.view(source, np.uint8, size)))

    def copy_box(self, target: int, target_layout: Layout, source: int, source_layout: Layout, box: Box) -> None:
        self.copies += 1

        def rows(address: int, layout: Layout) -> np.ndarray:
            assert box.width <= layout.pitch
            assert box.height <= layout.rows
            # to the last byte of the last row, and not the whole planes, whose end may lie beyond the buffer
            last = ((box.depth - 1) * layout.rows + box.height - 1) * layout.pitch + box.width
            strides = (layout.rows * layout.pitch, layout.pitch, 1)
            shape = (box.depth, box.height, box.width)
            return np.lib.stride_tricks.as_strided(self.view(address, np.uint8, last), shape, strides)

        self.put(lambda: np.copyto(rows(target, target_layout), rows(source, source_layout)))

    def load(self, cubin: bytes, entry: str, formats: str, threads: int, shared_bytes: int) -> FakeKernel:
        self._require("load")
        assert threads == 128
        constants = {"C": self.config.feature_channels, "PATCH": self.config.patch, "V": self.config.warped_channels}
        constants["VP"] = -(-constants["V"] // 8) * 8
        self.kernels += 1
        return FakeKernel(self, kernel_twins.twin(cubin, entry), formats, constants)

    def event(self) -> FakeEvent:
        self._require("event")
        return FakeEvent(self)

    def capture(self, work: Callable[[], None]) -> FakeCudaGraph:
        self._require("capture")
        self.capturing, self.captured = True, []
        try:
            work()
            return FakeCudaGraph(self, self.captured)
        finally:
            self.capturing, self.captured = False, []

    def synchronize(self) -> None:
        self._require("synchronize")
        self.flush()

    def close(self) -> None:
        if not self.closed:
            self.flush()
            assert self.live == (0, 0, 0), "closed before everything was given back"
            self.closed = True

    def put(self, operation: Callable[[], None]) -> None:
        """Put an operation on the queue, or into what is being captured."""
        assert self._active.get(threading.get_ident()), "work without the device being active in this thread"
        if self.fail_at is not None:
            self.fail_at -= 1
            if self.fail_at < 0:
                self.fail_at = None
                raise BackendError("the launch failed, as the test asked for")
        (self.captured if self.capturing else self.queue).append(operation)

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

    def _staged(self, array: np.ndarray) -> None:
        assert any(array is one.array or array.base is one.array for one in self.pinned_arrays), "not pinned memory"

    def _write(self, target: int, source: np.ndarray) -> None:
        self.view(target, source.dtype, source.size)[:] = source.ravel()
