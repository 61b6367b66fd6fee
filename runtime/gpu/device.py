"""One GPU, by pycuda: memory, copies, kernels, events and CUDA graphs on one stream, on which all runs in order.

Addresses are plain integers, so that TensorRT, ONNX Runtime and our kernels share buffers. The context is the GPU's
primary one, which those libraries use as well. pycuda frees what it owns in the context that is current, and warns and
leaks where there is none; so everything runs within `active`, which pushes the context in whatever thread calls. The
context itself is given back when the process ends, as every other CUDA library does.

Written against pycuda 2026.1, and tested over a stand-in for `pycuda.driver` whose calls were checked against it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...errors import BackendError
from .cuda_graph import CudaGraph

INSTALL = "pip install flashcocos[tensorrt], flashcocos[rtx] or pycuda"
MIN_DRIVER = 12000  # CUDA 12.0: TensorRT 10 and ONNX Runtime since 1.19 need it, and it has all of graphs
LARGE_SHARED = 48 << 10  # bytes of dynamic shared memory from which a kernel asks for them
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: no waiting for the legacy default stream of other libraries
_contexts: dict[int, Any] = {}
_contexts_lock = threading.Lock()

Launch = Callable[[tuple[int, int, int], Sequence[int | float]], None]  # (grid, arguments), pointers as addresses
Event = Any  # of pycuda; freed with its last reference


class OutOfMemory(BackendError):
    """Device memory or page-locked host memory ran out."""


@dataclasses.dataclass(frozen=True)
class Buffer:
    """Device memory, aligned to 256 bytes. free: gives it back, once no work on the stream still uses it."""

    address: int
    bytes: int
    free: Callable[[], None]


class Window(NamedTuple):
    """Part of an array in device memory: its first byte, bytes from row to row, rows from plane to plane; and its own
    bytes a row, rows and planes."""

    address: int
    pitch: int
    rows: int
    extent: tuple[int, int, int]


class Device:
    """The GPU of number `ordinal`. install: the remedy where pycuda is missing.

    All but the attributes, `active` and `close` is to be called within `active`, in one thread at a time. Whatever
    fails raises `BackendError`: no GPU, a driver that is too old, an error of earlier work.

    name: of the product. capability: compute capability as 89 for 8.9. driver: the CUDA version that the driver
    supports, as "12.4". stream: the handle of the stream.
    """

    def __init__(self, ordinal: int = 0, *, install: str = INSTALL) -> None:
        self._driver: Any = import_driver(install)
        with self._errors("the GPU cannot be used"):
            self._driver.init()
            count, version = self._driver.Device.count(), self._driver.get_driver_version()
            self.driver = f"{version // 1000}.{version % 1000 // 10}"
            if ordinal >= count:
                raise BackendError(f"GPU {ordinal} asked for, this machine has {count}; see CUDA_VISIBLE_DEVICES")
            if version < MIN_DRIVER:
                raise BackendError(
                    f"the NVIDIA driver supports CUDA {self.driver}, expected {MIN_DRIVER // 1000}.0 "
                    "or newer; update it"
                )
            device = self._driver.Device(ordinal)
            major, minor = device.compute_capability()
            self.ordinal, self.name = ordinal, str(device.name())
            self.capability = 10 * int(major) + int(minor)
            self._context: Any = _primary_context(self._driver, ordinal)
            self._closed = False
            with self.active():
                self._stream: Any = self._driver.Stream(_NON_BLOCKING)
            self.stream = int(self._stream.handle)
        self._functions: list[Any] = []

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Make this the calling thread's GPU; may be nested. `BackendError` after `close`."""
        if self._closed:
            raise BackendError(f"{self.name} is closed")
        with self._errors("the GPU cannot be used"):
            self._context.push()
        try:
            yield
        finally:
            with self._errors("the GPU cannot be left"):
                self._driver.Context.pop()

    def memory(self) -> tuple[int, int]:
        """Free and total bytes."""
        with self._errors("the free memory is unknown"):
            free, total = self._driver.mem_get_info()
        return int(free), int(total)

    def allocate(self, size: int) -> Buffer:
        """Uninitialized memory of `size` bytes; `OutOfMemory`."""
        with self._errors(f"no {mebibytes(size)} of device memory", OutOfMemory):
            allocation = self._driver.mem_alloc(size)
        return Buffer(int(allocation), size, allocation.free)

    def pinned_array(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An uninitialized array of page-locked host memory, which copies need not wait for; `OutOfMemory`."""
        with self._errors(f"no page-locked host memory for {shape}", OutOfMemory):
            array: npt.NDArray[Any] = self._driver.pagelocked_empty(shape, np.dtype(dtype))
        return array

    def free_pinned(self, array: npt.NDArray[Any]) -> None:
        """Give a `pinned_array` back; it is not to be used afterwards."""
        array.base.free()  # type: ignore[union-attr]  # the allocation, which is no array

    def upload(self, target: int, source: npt.NDArray[Any]) -> None:
        """Put a copy of `source`, a pinned array, to the address `target` on the stream."""
        with self._errors("a copy to the GPU failed"):
            self._driver.memcpy_htod_async(target, source, self._stream)

    def download(self, target: npt.NDArray[Any], source: int) -> None:
        """Put a copy from the address `source` to `target`, a pinned array, on the stream."""
        with self._errors("a copy from the GPU failed"):
            self._driver.memcpy_dtoh_async(target, source, self._stream)

    def copy(self, target: int, source: int, size: int) -> None:
        """Put a copy of `size` bytes from address to address on the stream."""
        with self._errors("a copy on the GPU failed"):
            self._driver.memcpy_dtod_async(target, source, size, self._stream)

    def copy_window(self, target: Window, source: Window) -> None:
        """Put a copy from window to window, of one extent, on the stream."""
        with self._errors("a copy of a tile on the GPU failed"):
            copy = self._driver.Memcpy3D()
            copy.set_src_device(source.address)
            copy.src_pitch, copy.src_height = source.pitch, source.rows
            copy.set_dst_device(target.address)
            copy.dst_pitch, copy.dst_height = target.pitch, target.rows
            copy.width_in_bytes, copy.height, copy.depth = source.extent
            copy(self._stream)

    def load(self, cubin: bytes, entry: str, formats: str, threads: int, shared_bytes: int) -> Launch:
        """The function `entry`, launched with `threads` threads a block and so much dynamic shared memory.

        formats: a character an argument, "P" pointer, "i" int32, "f" float32. Loaded until `close`.
        """
        with self._errors(
            f"kernel {entry} cannot be loaded on {self.name}; update the driver, or build the kernels again"
        ):
            function = self._driver.module_from_buffer(cubin).get_function(entry)  # which holds the module
            if shared_bytes >= LARGE_SHARED:
                limit = self._driver.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES
                function.set_attribute(limit, shared_bytes)
            function.prepare(list(formats))
        number = len(self._functions)
        self._functions.append(function)  # a launch must not keep it beyond `close`

        def launch(grid: tuple[int, int, int], arguments: Sequence[int | float]) -> None:
            with self._errors(f"kernel {entry} cannot be launched"):
                call = self._functions[number].prepared_async_call
                call(grid, (threads, 1, 1), self._stream, *arguments, shared_size=shared_bytes)

        return launch

    def event(self) -> Event:
        """A new point in time on the stream, once it is passed to `record`."""
        with self._errors("no event"):
            return self._driver.Event()

    def record(self, event: Event) -> None:
        """Let `event` be the point that the stream has reached."""
        with self._errors("an event cannot be recorded"):
            event.record(self._stream)

    def milliseconds(self, start: Event, end: Event) -> float:
        """The time between two events, both of which have passed."""
        with self._errors("an event has not passed"):
            return float(end.time_since(start))

    def capture(self, work: Callable[[], None]) -> CudaGraph:
        """Capture what `work` puts on the stream instead of running it; it may neither wait nor allocate."""
        return CudaGraph(self.stream, work)

    def synchronize(self) -> None:
        """Wait until everything on the stream has run."""
        with self._errors("earlier work on the GPU failed"):
            self._stream.synchronize()

    def settle(self) -> None:
        """Wait for what an error has left on the stream: after one of the GPU itself, waiting raises it once more."""
        with contextlib.suppress(BackendError):
            self.synchronize()

    def close(self) -> None:
        """Unload the kernels and free the stream; buffers have to be freed before. Twice does no harm."""
        if not self._closed:
            with self.active():
                self.settle()
                self._functions.clear()
                self._stream = None
            self._closed = True

    @contextlib.contextmanager
    def _errors(self, what: str, kind: type[BackendError] = BackendError) -> Iterator[None]:
        try:
            yield
        except self._driver.Error as error:
            raise kind(f"{what}: {error}") from error


def _primary_context(driver: Any, ordinal: int) -> Any:
    with _contexts_lock:
        if ordinal not in _contexts:
            _contexts[ordinal] = context = driver.Device(ordinal).retain_primary_context()
            # when the process ends: in its destructor, pycuda treats it as a context that it has made itself
            weakref.finalize(Device, context.detach)
        return _contexts[ordinal]


def import_driver(install: str) -> Any:
    """`pycuda.driver`; raises `BackendError` where pycuda or the NVIDIA driver is missing, or they do not fit."""
    try:
        return importlib.import_module("pycuda.driver")
    except ModuleNotFoundError as error:
        raise BackendError(f"the GPU pipeline needs pycuda ({error}); {install}") from error
    except ImportError as error:
        raise BackendError(
            f"pycuda does not load ({error}); is an NVIDIA driver installed, and not older than the CUDA toolkit that "
            "pycuda was built with?"
        ) from error


def nbytes(shape: Sequence[int], dtype: npt.DTypeLike) -> int:
    """Bytes of an array."""
    return math.prod(shape) * np.dtype(dtype).itemsize


def mebibytes(size: int) -> str:
    """`size` bytes in words: "12 MiB", rounded up."""
    return f"{-(-size >> 20)} MiB"
