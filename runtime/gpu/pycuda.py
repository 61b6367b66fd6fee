"""The device layer on pycuda, in the GPU's primary context, which TensorRT and ONNX Runtime use as well.

pycuda frees what it owns in the context that is current, and warns and leaks where there is none; so everything here
runs within `active`, which pushes the context in whatever thread calls. The context itself is given back when the
process ends, as every other CUDA library does.

Written against pycuda 2026.1 and tested with it over a driver library of stubs.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import BackendError
from .cuda_graph import CudaGraph
from .device import Box, Layout, mebibytes

INSTALL = "pip install flashcocos[tensorrt], flashcocos[rtx] or pycuda"
MIN_DRIVER = 12000  # CUDA 12.0: TensorRT 10, ONNX Runtime since 1.19 and the cubins need it, and it has all of graphs
LARGE_SHARED = 48 << 10  # bytes of dynamic shared memory above which a kernel has to ask
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: no waiting for the legacy default stream of other libraries
_contexts: dict[int, _PrimaryContext] = {}
_contexts_lock = threading.Lock()


class PycudaDevice:
    """The GPU of number `ordinal`; implements `device.Device`. install: the remedy where pycuda is missing.

    Raises `BackendError` where pycuda or a GPU is missing, and where the driver is too old.
    """

    kind = "cuda"

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
            self.ordinal, self.name, self.capability = ordinal, device.name(), 10 * major + minor
            self._context: Any = _primary_context(self._driver, ordinal)
            self._closed = False
            with self.active():
                self._stream: Any = self._driver.Stream(_NON_BLOCKING)
            self.stream = int(self._stream.handle)
        self._kernels: list[PycudaKernel] = []

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        if self._closed:
            raise BackendError(f"{self.name} is closed")
        with self._errors("the GPU cannot be used"):
            self._context.push()
        try:
            yield
        finally:
            self._driver.Context.pop()

    def memory(self) -> tuple[int, int]:
        with self._errors("the free memory is unknown"):
            free, total = self._driver.mem_get_info()
        return int(free), int(total)

    def allocate(self, size: int) -> PycudaBuffer:
        with self._errors(f"no {mebibytes(size)} of device memory; lower size, batch_size or exemplar_cache_mib"):
            return PycudaBuffer(self._driver.mem_alloc(size), size)

    def pinned_array(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> PycudaPinnedArray:
        with self._errors(f"no page-locked host memory for {shape}; lower size or batch_size"):
            return PycudaPinnedArray(self._driver.pagelocked_empty(shape, np.dtype(dtype)))

    def upload(self, target: int, source: npt.NDArray[Any]) -> None:
        with self._errors("a copy to the GPU failed"):
            self._driver.memcpy_htod_async(target, source, self._stream)

    def download(self, target: npt.NDArray[Any], source: int) -> None:
        with self._errors("a copy from the GPU failed"):
            self._driver.memcpy_dtoh_async(target, source, self._stream)

    def copy(self, target: int, source: int, size: int) -> None:
        with self._errors("a copy on the GPU failed"):
            self._driver.memcpy_dtod_async(target, source, size, self._stream)

    def copy_box(self, target: int, target_layout: Layout, source: int, source_layout: Layout, box: Box) -> None:
        with self._errors("a copy on the GPU failed"):
            copy = self._driver.Memcpy3D()
            copy.set_src_device(source)
            copy.src_pitch, copy.src_height = source_layout
            copy.set_dst_device(target)
            copy.dst_pitch, copy.dst_height = target_layout
            copy.width_in_bytes, copy.height, copy.depth = box
            copy(self._stream)

    def load(self, cubin: bytes, entry: str, formats: str, threads: int, shared_bytes: int) -> PycudaKernel:
        with self._errors(
            f"kernel {entry} cannot be loaded on {self.name}; update the driver, or build the kernels again"
        ):
            function = self._driver.module_from_buffer(cubin).get_function(entry)  # which holds the module
            if shared_bytes > LARGE_SHARED:
                limit = self._driver.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES
                function.set_attribute(limit, shared_bytes)
            function.prepare(list(formats))
            self._kernels.append(PycudaKernel(self, function, entry, threads, shared_bytes))
        return self._kernels[-1]

    def event(self) -> PycudaEvent:
        with self._errors("no event"):
            return PycudaEvent(self._driver.Event(), self._stream)

    def capture(self, work: Callable[[], None]) -> CudaGraph:
        return CudaGraph(self.stream, work)

    def synchronize(self) -> None:
        with self._errors("earlier work on the GPU failed"):
            self._stream.synchronize()

    def close(self) -> None:
        if not self._closed:
            with self.active():
                with contextlib.suppress(BackendError):  # of work that failed and was reported
                    self.synchronize()
                for kernel in self._kernels:
                    kernel.unload()
                self._stream = None
            self._closed = True

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except self._driver.Error as error:
            raise BackendError(f"{what}: {error}") from error


class PycudaBuffer:
    """Device memory; implements `device.Buffer`."""

    def __init__(self, allocation: Any, size: int) -> None:
        self._allocation, self.address, self.bytes = allocation, int(allocation), size

    def free(self) -> None:
        self._allocation.free()


class PycudaPinnedArray:
    """Page-locked host memory; implements `device.PinnedArray`."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self.array = array

    def free(self) -> None:
        self.array.base.free()  # type: ignore[union-attr]  # the allocation, which is no array


class PycudaKernel:
    """A function of a cubin; implements `device.Kernel`."""

    def __init__(self, device: PycudaDevice, function: Any, entry: str, threads: int, shared_bytes: int) -> None:
        self._device, self._function, self._entry = device, function, entry
        self._block, self._shared_bytes = (threads, 1, 1), shared_bytes

    def launch(self, grid: tuple[int, int, int], arguments: Sequence[int | float]) -> None:
        stream = self._device._stream
        with self._device._errors(f"kernel {self._entry} cannot be launched"):
            self._function.prepared_async_call(grid, self._block, stream, *arguments, shared_size=self._shared_bytes)

    def unload(self) -> None:
        """Free the function and its module, while their context is current."""
        self._function = None


class PycudaEvent:
    """An event; implements `device.Event`."""

    def __init__(self, event: Any, stream: Any) -> None:
        self._event, self._stream = event, stream

    def record(self) -> None:
        self._event.record(self._stream)

    def milliseconds_since(self, start: PycudaEvent) -> float:
        return float(self._event.time_since(start._event))


class _PrimaryContext:
    """The retained primary context of one GPU, given back when the process ends."""

    def __init__(self, context: Any) -> None:
        self.context = context
        # not in its destructor, in which pycuda treats it as a context that it has made itself
        weakref.finalize(self, context.detach)


def _primary_context(driver: Any, ordinal: int) -> Any:
    with _contexts_lock:
        if ordinal not in _contexts:
            _contexts[ordinal] = _PrimaryContext(driver.Device(ordinal).retain_primary_context())
        return _contexts[ordinal].context


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
