"""The device layer: what a translation needs of a GPU, as a protocol small enough to be emulated in a test.

One stream, on which everything runs in order; memory that its owner frees; pinned host memory that the GPU reads and
writes by itself; kernels from cubins; and CUDA graphs, captured work that is replayed as a whole. Addresses are plain
integers, so that TensorRT, ONNX Runtime and our kernels share buffers. pycuda.py implements it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt


class Buffer(Protocol):
    """Memory of the device, aligned to 256 bytes."""

    @property
    def address(self) -> int: ...

    @property
    def bytes(self) -> int: ...

    def free(self) -> None:
        """Give the memory back; no work on the stream may still use it."""
        ...


class PinnedArray(Protocol):
    """Host memory that copies go through without the CPU waiting for them."""

    @property
    def array(self) -> npt.NDArray[Any]: ...

    def free(self) -> None:
        """Give the memory back; `array` is not to be used afterwards."""
        ...


class Kernel(Protocol):
    """A function of a cubin."""

    def launch(self, grid: tuple[int, int, int], arguments: Sequence[int | float]) -> None:
        """Put a launch on the stream; arguments in the function's order, pointers as addresses."""
        ...


class Event(Protocol):
    """A point in time on the stream."""

    def record(self) -> None:
        """Let this event be the point that the stream has reached."""
        ...

    def milliseconds_since(self, start: Any) -> float:
        """The time from the event `start` to this one, both of which have passed."""
        ...


class CudaGraph(Protocol):
    """Captured work; it refers to the addresses that it was captured with."""

    def replay(self) -> None:
        """Put all of it on the stream."""
        ...

    def close(self) -> None:
        """Free the graph."""
        ...


class Box(NamedTuple):
    """So many bytes of so many rows of so many planes."""

    width: int
    height: int
    depth: int


class Layout(NamedTuple):
    """How rows lie in memory: bytes from one to the next, and rows from one plane to the next."""

    pitch: int
    rows: int


class Device(Protocol):
    """One GPU. All but the attributes, `active` and `close` is to be called within `active`, in one thread at a time.

    name: of the product. kind: "cuda", as ONNX Runtime calls it. ordinal: its number among the GPUs of this process.
    capability: compute capability as 89 for 8.9. driver: the CUDA version that the driver supports, as "12.4".
    stream: the handle of the stream.
    Whatever fails raises `BackendError`: no memory, a cubin that the driver does not take, an error of earlier work.
    """

    name: str
    kind: str
    ordinal: int
    capability: int
    driver: str
    stream: int

    def active(self) -> AbstractContextManager[None]:
        """Make this the calling thread's GPU; may be nested. `BackendError` after `close`."""
        ...

    def memory(self) -> tuple[int, int]:
        """Free and total bytes."""
        ...

    def allocate(self, size: int) -> Buffer:
        """Uninitialized memory of `size` bytes."""
        ...

    def pinned_array(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> PinnedArray:
        """An uninitialized array of page-locked host memory."""
        ...

    def upload(self, target: int, source: npt.NDArray[Any]) -> None:
        """Put a copy of `source`, an array of a `PinnedArray`, to the address `target` on the stream."""
        ...

    def download(self, target: npt.NDArray[Any], source: int) -> None:
        """Put a copy from the address `source` to `target`, an array of a `PinnedArray`, on the stream."""
        ...

    def copy(self, target: int, source: int, size: int) -> None:
        """Put a copy of `size` bytes from address to address on the stream."""
        ...

    def copy_box(self, target: int, target_layout: Layout, source: int, source_layout: Layout, box: Box) -> None:
        """Put a copy of a box of bytes on the stream; the addresses are those of its first bytes."""
        ...

    def load(self, cubin: bytes, entry: str, formats: str, threads: int, shared_bytes: int) -> Kernel:
        """The function `entry`, launched with `threads` threads a block and so much dynamic shared memory.

        formats: a character an argument, "P" pointer, "i" int32, "f" float32. Loaded until `close`.
        """
        ...

    def event(self) -> Event:
        """A new event; freed with its last reference."""
        ...

    def capture(self, work: Callable[[], None]) -> CudaGraph:
        """Capture what `work` puts on the stream instead of running it; it may neither wait nor allocate."""
        ...

    def synchronize(self) -> None:
        """Wait until everything on the stream has run."""
        ...

    def close(self) -> None:
        """Unload the kernels and free the stream; buffers have to be freed before. Twice does no harm."""
        ...


def nbytes(shape: Sequence[int], dtype: npt.DTypeLike) -> int:
    """Bytes of an array."""
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


def mebibytes(size: int) -> str:
    """`size` bytes in words: "12 MiB", rounded up."""
    return f"{-(-size >> 20)} MiB"
