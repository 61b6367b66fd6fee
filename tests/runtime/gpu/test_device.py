"""The device layer: one suite over a stand-in for pycuda's driver, and over the machine's own GPU."""

from __future__ import annotations

import functools
import gc
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import STREAM, FakeCuda
from fake_gpu import install_driver
from kernel_twins import write_kernels
from real_gpu import compile_kernels, require_gpu
from tiny_bundle import CLASSES, write_tiny_bundle

from flashcocos.bundle import Bundle, TensorSpec
from flashcocos.errors import BackendError
from flashcocos.kernels.corr_warp import warp_arrays
from flashcocos.runtime.gpu import cuda_graph
from flashcocos.runtime.gpu import device as gpu_device
from flashcocos.runtime.gpu.device import Buffers, Device, OutOfMemory
from flashcocos.runtime.gpu.warp import HostWarp
from flashcocos.runtime.gpu.workspace import window
from flashcocos.runtime.tiles import tiles


@pytest.fixture
def fake_driver(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """pycuda over a fake driver, in place of the package."""
    return install_driver(monkeypatch, FakeCuda(CLASSES))


@pytest.fixture(params=["fake", "real"])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    if request.param == "fake":
        request.getfixturevalue("fake_driver")
        opened = Device()
    else:
        opened = require_gpu()
    with opened.active():
        yield opened
    opened.close()


def fill(device: Device, array: np.ndarray) -> Buffers:
    """A buffer "x" with this content."""
    buffers = Buffers(device, {"x": (array.shape, array.dtype)}, ["x"])
    buffers.pinned["x"][...] = array
    device.run({"up": buffers.upload("x")})
    return buffers


def content(buffers: Buffers) -> np.ndarray:
    buffers.device.run({"down": buffers.download("x")})
    return buffers.pinned["x"]


def copy(source: Buffers, target: Buffers, size: int = 256, start: int = 0, to: int = 0) -> Any:
    """The work of copying bytes from `start` of one buffer to `to` of another."""
    return functools.partial(source.device.copy, target.addresses["x"] + to, source.addresses["x"] + start, size)


def test_memory_and_copies(device: Device) -> None:
    free, total = device.memory()
    assert 0 < free <= total
    array = np.arange(3000, dtype=np.float32).reshape(3, 1000)
    source, target = fill(device, array), fill(device, np.zeros((2, 1000), np.float32))
    assert source.addresses["x"] % 256 == target.addresses["x"] % 256 == 0
    device.run({"copies": [copy(source, target, 4000, to=4000), copy(source, target, 4000, start=8000)]})
    np.testing.assert_array_equal(content(target), array[[2, 0]])
    source.free()
    target.free()
    assert device.memory()[0] == free or device.memory()[1] > 1 << 30  # a real one gives back in larger pieces


def test_captured_work_is_replayed_on_the_data_of_the_replay(device: Device) -> None:
    source, target = fill(device, np.zeros(64, np.float32)), fill(device, np.zeros(64, np.float32))
    graph = device.capture(copy(source, target))
    assert content(target).sum() == 0
    for value in (1.0, 2.0):
        source.pinned["x"][...] = value
        device.run({"replay": [*source.upload("x"), graph.replay]})
        assert content(target).sum() == 64 * value
    graph.close()
    source.free()
    target.free()


def test_work_that_cannot_be_captured(device: Device) -> None:
    """And the stream works on."""
    buffers = fill(device, np.ones(64, np.float32))
    with pytest.raises(KeyError, match="absent"):
        device.capture(lambda: {}["absent"])
    with pytest.raises(BackendError):
        device.capture(device.synchronize)
    assert content(buffers).sum() == 64
    buffers.free()


def test_parts_of_work_are_timed(device: Device) -> None:
    source, target = fill(device, np.ones(1 << 16, np.float32)), fill(device, np.zeros(1 << 16, np.float32))
    work = copy(source, target, 4 << 16)
    timings = device.run({"one": [work], "two": [work, work]})
    assert list(timings) == ["one", "two"]
    assert all(0 <= milliseconds < 1e4 for milliseconds in timings.values())
    assert content(target).all()
    source.free()
    target.free()


def test_no_memory(device: Device) -> None:
    with pytest.raises(OutOfMemory, match="memory"):
        device.allocate(1 << 45)


def test_closed(device: Device) -> None:
    device.close()
    device.close()
    with pytest.raises(BackendError, match="closed"), device.active():
        pass


@pytest.mark.parametrize(
    ("axes", "sides"),
    [(("batch", "height", "width", 3), (2, 96, 128, 3)), (("batch", 5, "height", "width"), (2, 5, 96, 128))],
)
def test_windows_are_copied(device: Device, axes: tuple[int | str, ...], sides: tuple[int, ...]) -> None:
    """Tile by tile, a picture is copied into another."""
    spec, array = TensorSpec("x", "int16", axes), np.arange(np.prod(sides), dtype=np.int16).reshape(sides)
    source, target = fill(device, array), fill(device, np.zeros_like(array))
    for tile in tiles(96, 128, 64, 4):
        device.copy_window(*(window(buffers, spec, tile.kept(spec)) for buffers in (target, source)))
    np.testing.assert_array_equal(content(target), array)
    source.free()
    target.free()


@pytest.mark.parametrize("maps", [((16, 16), (16, 16)), ((7, 9), (5, 13)), ((1, 1), (3, 2))])
def test_kernels_equal_the_cpu(device: Device, tmp_path: Path, maps: Any) -> None:
    bundle = write_tiny_bundle(tmp_path / "m")
    if device.name == "Fake RTX":
        write_kernels(bundle / "kernels", CLASSES)
    else:
        shutil.copytree(compile_kernels(bundle, device.capability), bundle / "kernels")
    rng = np.random.default_rng(1)
    shapes = {"theta": (2, 16, *maps[0]), "phi": (2, 16, *maps[1]), "values": (2, 3, *maps[1])}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    expected = warp_arrays(*arrays.values(), patch=3, temperature=CLASSES.temperature, match=True, backend="numpy")
    warp = HostWarp(Bundle(bundle), 0)
    for _ in range(2):  # the second into the same buffers
        found = warp.run(arrays)
        np.testing.assert_allclose(found["warped"], expected.out, atol=2e-4)
        np.testing.assert_array_equal(found["index"], expected.match.index)
        np.testing.assert_allclose(found["probability"], expected.match.probability, atol=1e-4)


def test_what_pycuda_is_asked_for(fake_driver: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    at_the_end: list[Any] = []
    monkeypatch.setattr(gpu_device.weakref, "finalize", lambda _, call: at_the_end.append(call))
    for _ in range(2):
        device = Device()
        assert (device.name, device.capability, device.driver, device.stream) == ("Fake RTX", 86, "12.4", STREAM)
        device.close()
    assert fake_driver.closed
    assert fake_driver.detached == 0  # the context is kept for others in this process ...
    (detach,) = at_the_end
    detach()
    assert fake_driver.detached == 1  # ... until it ends


def test_kernels_are_loaded(fake_driver: FakeCuda) -> None:
    """With as much shared memory as they ask for, until the device is closed."""
    device = Device()
    with device.active():
        for shared, asked in (((48 << 10) - 16, {}), (48 << 10, {8: 48 << 10}), (64 << 10, {8: 64 << 10})):
            device.load(b"pack twin", "pack_kernel", "PPiiiiiiiiP", 128, shared)
            assert device._functions[-1].attributes == asked
        with pytest.raises(BackendError, match="kernel warp cannot be loaded on Fake RTX; update the driver"):
            device.load(b"not a cubin", "warp", "P", 128, 0)
    device.close()
    assert not fake_driver.functions  # freed while the context was there


def test_a_graph_that_cannot_be_made(fake_driver: FakeCuda) -> None:
    device = Device()
    fake_driver.instantiate = 2
    with device.active():
        with pytest.raises(BackendError, match="cuGraphInstantiateWithFlags: CUDA_ERROR_OUT_OF_MEMORY"):
            device.capture(lambda: None)
        with pytest.raises(KeyError):
            device.capture(lambda: {}["absent"])
    assert fake_driver.live == (0, 0, 0)


def test_no_garbage_is_collected_while_work_is_captured(fake_driver: FakeCuda) -> None:
    """It may free memory of another translator, which CUDA refuses then."""
    device, collects = Device(), []
    with device.active():
        device.capture(lambda: collects.append(gc.isenabled())).close()
        with pytest.raises(KeyError):
            device.capture(lambda: {}["absent"])
    assert collects == [False]
    assert gc.isenabled()


def test_a_context_that_cannot_be_left(fake_driver: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    device, pop = Device(), fake_driver.Context.pop

    def fails() -> None:
        pop()
        raise fake_driver.Error("cuCtxPopCurrent failed: invalid device context")

    monkeypatch.setattr(fake_driver.Context, "pop", fails)
    with pytest.raises(BackendError, match="the GPU cannot be left: cuCtxPopCurrent failed"), device.active():
        pass


@pytest.mark.parametrize(
    ("changes", "ordinal", "message"),
    [
        ({"count": 0}, 0, "the GPU cannot be used: cuInit failed: no CUDA-capable device"),
        ({"count": 2}, 2, "GPU 2 asked for, this machine has 2"),
        ({"version": 11080}, 0, r"driver supports CUDA 11\.8, expected 12\.0 or newer; update it"),
    ],
)
def test_no_gpu_that_can_be_used(fake_driver: FakeCuda, changes: dict[str, int], ordinal: int, message: str) -> None:
    vars(fake_driver).update(changes)
    with pytest.raises(BackendError, match=message):
        Device(ordinal)


def test_no_pycuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pycuda", None)
    with pytest.raises(BackendError, match=r"needs pycuda .* pip install flashcocos\[tensorrt\]"):
        Device()
    monkeypatch.delitem(sys.modules, "pycuda")
    (tmp_path / "pycuda").mkdir()
    (tmp_path / "pycuda/__init__.py").touch()
    (tmp_path / "pycuda/driver.py").write_text("raise ImportError('libcuda.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BackendError, match=r"pycuda does not load \(libcuda.so.1: .*is an NVIDIA driver installed"):
        Device()


def test_no_driver_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "_LIBRARY", "libabsent.so.1")
    with pytest.raises(BackendError, match=r"the CUDA driver library cannot be used \(libabsent"):
        cuda_graph.load_driver()
    monkeypatch.setattr(cuda_graph, "_LIBRARY", None)  # this process itself, which has no such functions
    with pytest.raises(BackendError, match=r"cuStreamBeginCapture_v2.*update the NVIDIA driver"):
        cuda_graph.load_driver()
