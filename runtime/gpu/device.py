"""One GPU, by pycuda: memory, copies, kernels, events and CUDA graphs on one stream, on which all runs in order.

Addresses are plain integers, so that TensorRT, ONNX Runtime and our kernels share buffers. The context is the GPU's
primary one, which those libraries use as well. pycuda frees what it owns in the context that is current, and warns and
leaks where there is none; so everything runs within `active`, which pushes the context in whatever thread calls. The
context itself is given back when the process ends, as every other CUDA library does. Written against pycuda 2026.1.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
Work = Callable[[], object]  # something with all its arguments, put on the stream by calling it
Array = npt.NDArray[Any]
Tensors = Mapping[str, tuple[tuple[int, ...], Any]]  # name -> (shape, dtype)


class OutOfMemory(BackendError):
    """Device memory or page-locked host memory ran out."""


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
        self._events: list[Any] = []  # used again by every run

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

    def allocate(self, size: int) -> tuple[int, Callable[[], None]]:
        """The address of `size` uninitialized bytes, a multiple of 256, and what frees them; `OutOfMemory`."""
        with self._errors(f"no {mebibytes(size)} of device memory", OutOfMemory):
            allocation = self._driver.mem_alloc(size)
        return int(allocation), allocation.free

    def allocate_pinned(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> tuple[Array, Callable[[], None]]:
        """An uninitialized array of the host, which copies need not wait for, and what frees it; `OutOfMemory`."""
        with self._errors(f"no page-locked host memory for {shape}", OutOfMemory):
            array = self._driver.pagelocked_empty(shape, np.dtype(dtype))
        return array, array.base.free  # the allocation, which is no array

    def upload(self, target: int, source: Array) -> None:
        """Put a copy of `source`, a pinned array, to the address `target` on the stream."""
        with self._errors("a copy to the GPU failed"):
            self._driver.memcpy_htod_async(target, source, self._stream)

    def download(self, target: Array, source: int) -> None:
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

    def run(self, parts: Mapping[str, Sequence[Work]]) -> dict[str, float]:
        """Put all `parts` on the stream, one after another, and wait: the milliseconds that each took."""
        with self._errors("work cannot be timed"):
            while len(self._events) <= len(parts):
                self._events.append(self._driver.Event())
            self._events[0].record(self._stream)
            for event, part in zip(self._events[1:], parts.values(), strict=False):
                for step in part:
                    step()
                event.record(self._stream)
            self.synchronize()
            spans = zip(parts, self._events, self._events[1:], strict=False)
            return {name: float(end.time_since(start)) for name, start, end in spans}

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
                self._events.clear()
                self._stream = None
            self._closed = True

    @contextlib.contextmanager
    def _errors(self, what: str, kind: type[BackendError] = BackendError) -> Iterator[None]:
        try:
            yield
        except self._driver.Error as error:
            raise kind(f"{what}: {error}") from error


class Buffers:
    """Device memory for `tensors`, and for those of the names `pinned` an array of the host; `OutOfMemory`.

    addresses: of the device memory. pinned: the arrays, which go up or come down. bytes: of device memory.
    """

    def __init__(self, device: Device, tensors: Tensors, pinned: Iterable[str] = ()) -> None:
        self.device, self.tensors, self.bytes = device, tensors, total_bytes(tensors)
        self.addresses: dict[str, int] = {}
        self.pinned: dict[str, Array] = {}
        with contextlib.ExitStack() as stack:
            for name, tensor in tensors.items():
                self.addresses[name], free = device.allocate(nbytes(*tensor))
                stack.callback(free)
            for name in pinned:
                shape, dtype = tensors[name]
                self.pinned[name], free = device.allocate_pinned(shape or (1,), dtype)
                stack.callback(free)
            self._owned = stack.pop_all()

    def upload(self, *names: str) -> list[Work]:
        """Copies from the host."""
        return [functools.partial(self.device.upload, self.addresses[name], self.pinned[name]) for name in names]

    def download(self, *names: str) -> list[Work]:
        """Copies to the host."""
        return [functools.partial(self.device.download, self.pinned[name], self.addresses[name]) for name in names]

    @contextlib.contextmanager
    def freed_on_error(self) -> Iterator[None]:
        """Wait and free all where the block fails."""
        try:
            yield
        except BaseException:
            self.device.settle()
            self.free()
            raise

    def free(self) -> None:
        """Give everything back; no work on the stream may still use it. Twice does no harm."""
        self._owned.close()


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


def total_bytes(tensors: Tensors) -> int:
    """Device memory for all tensors, each in an allocation of its own, which the driver rounds up further."""
    return sum(-(-nbytes(*tensor) // 512) * 512 for tensor in tensors.values())


def mebibytes(size: int) -> str:
    """`size` bytes in words: "12 MiB", rounded up."""
    return f"{-(-size >> 20)} MiB"
