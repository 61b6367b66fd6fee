"""CUDA graphs through the driver library itself, for pycuda binds none of their functions.

Source of the signatures: NVIDIA's CUDA Driver API reference, sections Stream Management and Graph Management.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from typing import Any

from ...errors import BackendError

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may go on allocating
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuStreamBeginCapture_v2": (ctypes.c_void_p, ctypes.c_int),
    "cuStreamEndCapture": (ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)),
    "cuGraphInstantiateWithFlags": (ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p, ctypes.c_ulonglong),
    "cuGraphLaunch": (ctypes.c_void_p, ctypes.c_void_p),
    "cuGraphExecDestroy": (ctypes.c_void_p,),
    "cuGraphDestroy": (ctypes.c_void_p,),
    "cuGetErrorName": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
}


class CudaGraph:
    """What `work` puts on the stream of handle `stream`, captured; it refers to the addresses of that time.

    The stream's context has to be current in every call. Raises `BackendError` where the driver refuses, and lets
    through what `work` raises; the stream then captures no more.
    """

    def __init__(self, stream: int, work: Callable[[], None]) -> None:
        self._library, self._stream, self._executable = load_driver(), stream, ctypes.c_void_p()
        graph, collects = ctypes.c_void_p(), gc.isenabled()
        gc.disable()  # the collector may free device memory, and CUDA refuses that while it captures
        try:
            self._call("cuStreamBeginCapture_v2", stream, _THREAD_LOCAL)
            try:
                work()
            except BaseException:
                # its own result says only that the capture came to nothing
                self._library.cuStreamEndCapture(stream, ctypes.byref(graph))
                raise
            self._call("cuStreamEndCapture", stream, ctypes.byref(graph))
            self._call("cuGraphInstantiateWithFlags", ctypes.byref(self._executable), graph, 0)
        finally:
            if graph:
                self._library.cuGraphDestroy(graph)
            if collects:
                gc.enable()

    def replay(self) -> None:
        """Put the captured work on the stream."""
        self._call("cuGraphLaunch", self._executable, self._stream)

    def close(self) -> None:
        """Free the graph; twice does no harm."""
        if self._executable:
            self._library.cuGraphExecDestroy(self._executable)
            self._executable = ctypes.c_void_p()

    def _call(self, function: str, *arguments: Any) -> None:
        if result := getattr(self._library, function)(*arguments):
            name = ctypes.c_char_p()
            self._library.cuGetErrorName(result, ctypes.byref(name))
            raise BackendError(f"{function}: {name.value.decode() if name.value else f'error {result}'}")


def load_driver() -> Any:
    """The driver library with the signatures of what is used of it; `BackendError` where it is missing or too old."""
    try:
        library = ctypes.CDLL(_LIBRARY)
        for name, types in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = types, ctypes.c_int
    except (OSError, AttributeError) as error:
        raise BackendError(f"the CUDA driver library cannot be used ({error}); update the NVIDIA driver") from error
    return library
