"""`pycuda.driver` and the graph functions of the driver library over a fake device: signatures and order of calls.

The signatures were checked against pycuda 2026.1 itself, run with a driver library of stubs.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import numpy as np
from fake_device import FakeCudaGraph, FakeDevice

from flashcocos.errors import BackendError
from flashcocos.runtime.gpu.device import Box, Layout


class Error(Exception):
    """Base of pycuda's exceptions."""


def _translated(function: Any) -> Any:
    def call(*arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except BackendError as error:
            raise Error(str(error)) from error

    return call


class FakeDriver:
    """The module; `count` GPUs, and a driver for CUDA `version`."""

    Error = Error
    function_attribute = SimpleNamespace(MAX_DYNAMIC_SHARED_SIZE_BYTES=8)

    def __init__(self, device: FakeDevice, count: int = 1, version: int = 12040) -> None:
        self.device, self.count, self.version = device, count, version
        self.detached, self.contexts = 0, []
        self.shared: dict[str, int] = {}
        self.Device = type("Device", (_Device,), {"driver": self, "count": staticmethod(lambda: self.count)})
        self.Context = SimpleNamespace(pop=self._pop)
        self.Stream = lambda flags: _Stream(device, flags)
        self.Event = lambda: _Event(device)
        self.Memcpy3D = lambda: _Memcpy3D(device)
        self.mem_alloc = _translated(lambda size: _Allocation(device.allocate(size)))
        self.mem_get_info = device.memory

    def init(self) -> None:
        if not self.count:
            raise Error("cuInit failed: no CUDA-capable device is detected")

    def get_driver_version(self) -> int:
        return self.version

    def _pop(self) -> None:
        self.contexts.pop().__exit__(None, None, None)

    def pagelocked_empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return np.asarray(_HostAllocation(self.device.pinned_array(shape, dtype)))

    def memcpy_htod_async(self, dest: int, src: np.ndarray, stream: Any) -> None:
        assert stream.handle == self.device.stream
        self.device.put(lambda: self.device._write(dest, src))

    def memcpy_dtoh_async(self, dest: np.ndarray, src: int, stream: Any) -> None:
        assert stream.handle == self.device.stream
        self.device.put(lambda: np.copyto(dest, self.device.view(src, dest.dtype, dest.size).reshape(dest.shape)))

    def memcpy_dtod_async(self, dest: int, src: int, size: int, stream: Any) -> None:
        assert stream.handle == self.device.stream
        self.device.copy(dest, src, size)

    def module_from_buffer(self, buffer: bytes) -> Any:
        if buffer == b"not a cubin":
            raise Error("cuModuleLoadDataEx failed: device kernel image is invalid")
        return SimpleNamespace(get_function=lambda name: _Function(self, buffer, name))


class _Device:
    driver: FakeDriver

    def __init__(self, ordinal: int) -> None:
        assert 0 <= ordinal < self.driver.count

    def name(self) -> str:
        return self.driver.device.name

    def compute_capability(self) -> tuple[int, int]:
        return divmod(self.driver.device.capability, 10)

    def retain_primary_context(self) -> Any:
        return _Context(self.driver)


class _Memcpy3D:
    """A copy of a box, as its attributes say when it is called."""

    src_pitch = src_height = dst_pitch = dst_height = width_in_bytes = height = depth = 0

    def __init__(self, device: FakeDevice) -> None:
        self.device = device

    def set_src_device(self, address: int) -> None:
        self.source = address

    def set_dst_device(self, address: int) -> None:
        self.target = address

    def __call__(self, stream: Any) -> None:
        assert stream.handle == self.device.stream
        layouts = Layout(self.dst_pitch, self.dst_height), Layout(self.src_pitch, self.src_height)
        box = Box(self.width_in_bytes, self.height, self.depth)
        self.device.copy_box(self.target, layouts[0], self.source, layouts[1], box)


class _Context:
    def __init__(self, driver: FakeDriver) -> None:
        self.driver = driver

    def push(self) -> None:
        context = contextlib.ExitStack()
        context.enter_context(self.driver.device.active())
        self.driver.contexts.append(context)

    def detach(self) -> None:
        self.driver.detached += 1


class _Stream:
    def __init__(self, device: FakeDevice, flags: int) -> None:
        assert flags == 1, "not to wait for the legacy default stream"
        self.handle, self.synchronize = device.stream, _translated(device.synchronize)


class _Event:
    def __init__(self, device: FakeDevice) -> None:
        self.real = device.event()

    def record(self, stream: Any) -> None:
        self.real.record()

    def time_since(self, start: _Event) -> float:
        return self.real.milliseconds_since(start.real)


class _Allocation:
    def __init__(self, buffer: Any) -> None:
        self.free, self._address = buffer.free, buffer.address

    def __int__(self) -> int:
        return self._address


class _HostAllocation:
    def __init__(self, pinned: Any) -> None:
        self.free = pinned.free
        self.__array_interface__ = pinned.array.__array_interface__
        self.array = pinned.array


class _Function:
    def __init__(self, driver: FakeDriver, code: bytes, name: str) -> None:
        self.driver, self.code, self.name, self.attributes = driver, code, name, {}

    def set_attribute(self, attribute: int, value: int) -> None:
        self.attributes[attribute] = value

    def prepare(self, arg_types: list[str]) -> None:
        self.formats = "".join(arg_types)
        self.kernel = self.driver.device.load(self.code, self.name, self.formats, 128, 0)

    @_translated
    def prepared_async_call(self, grid: Any, block: Any, stream: Any, *arguments: Any, shared_size: int = 0) -> None:
        assert stream.handle == self.driver.device.stream
        assert len(grid) == len(block) == 3
        assert shared_size <= max(48 << 10, self.attributes.get(8, 0)), "more than the function may use"
        self.kernel.launch(grid, arguments)


class FakeLibrary:
    """The driver library's graph functions; results are CUresult, 0 for success."""

    def __init__(self, device: FakeDevice) -> None:
        self.device, self.handles, self.graphs = device, {}, 0
        self.instantiate = 0  # what cuGraphInstantiateWithFlags gives

    def _new(self, target: Any, value: Any) -> int:
        self.handles[len(self.handles) + 1] = value
        target._obj.value = len(self.handles)
        return 0

    def cuStreamBeginCapture_v2(self, stream: int, mode: int) -> int:
        assert (stream, mode) == (self.device.stream, 1)
        self.device.capturing, self.device.captured = True, []
        return 0

    def cuStreamEndCapture(self, stream: int, graph: Any) -> int:
        work, self.device.capturing, self.device.captured = self.device.captured, False, []
        self.graphs += 1
        return self._new(graph, work)

    def cuGraphInstantiateWithFlags(self, executable: Any, graph: Any, flags: int) -> int:
        assert flags == 0
        if self.instantiate:
            return self.instantiate
        return self._new(executable, FakeCudaGraph(self.device, self.handles[graph.value]))

    def cuGraphLaunch(self, executable: Any, stream: int) -> int:
        assert stream == self.device.stream
        self.handles[executable.value].replay()
        return 0

    def cuGraphExecDestroy(self, executable: Any) -> int:
        self.handles[executable.value].close()
        return 0

    def cuGraphDestroy(self, graph: Any) -> int:
        self.graphs -= 1
        return 0

    def cuGetErrorName(self, result: int, name: Any) -> int:
        name._obj.value = b"CUDA_ERROR_OUT_OF_MEMORY"
        return 0
