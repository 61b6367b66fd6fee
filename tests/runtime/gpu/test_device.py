"""The device layer: one suite over a stand-in for pycuda's driver, and over the machine's own GPU."""

from __future__ import annotations

import gc
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

from flashcocos.bundle import TensorSpec
from flashcocos.errors import BackendError
from flashcocos.kernels.corr_warp import warp_arrays
from flashcocos.runtime.gpu import cuda_graph
from flashcocos.runtime.gpu import device as gpu_device
from flashcocos.runtime.gpu.cubins import find_kernels
from flashcocos.runtime.gpu.device import Device, OutOfMemory
from flashcocos.runtime.gpu.warp import DeviceWarp, key_tensors, query_tensors
from flashcocos.runtime.gpu.workspace import Buffers
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


def fill(device: Device, array: np.ndarray) -> Any:
    """A buffer with this content."""
    buffer, pinned = device.allocate(array.nbytes), device.pinned_array(array.shape, array.dtype)
    pinned[...] = array
    device.upload(buffer.address, pinned)
    device.synchronize()
    device.free_pinned(pinned)
    return buffer


def content(device: Device, address: int, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    pinned = device.pinned_array(shape, dtype)
    device.download(pinned, address)
    device.synchronize()
    array = pinned.copy()
    device.free_pinned(pinned)
    return array


def test_memory_and_copies(device: Device) -> None:
    free, total = device.memory()
    assert 0 < free <= total
    source = np.arange(3000, dtype=np.float32).reshape(3, 1000)
    first, second = fill(device, source), device.allocate(source.nbytes)
    assert first.address % 256 == second.address % 256 == 0
    assert first.bytes == source.nbytes
    device.copy(second.address + 4000, first.address, 4000)
    device.copy(second.address, first.address + 8000, 4000)
    np.testing.assert_array_equal(content(device, second.address, (2, 1000)), source[[2, 0]])
    first.free()
    second.free()
    assert device.memory()[0] == free or device.memory()[1] > 1 << 30  # a real one gives back in larger pieces


def test_captured_work_is_replayed_on_the_data_of_the_replay(device: Device) -> None:
    source, target = fill(device, np.zeros(64, np.float32)), fill(device, np.zeros(64, np.float32))
    graph = device.capture(lambda: device.copy(target.address, source.address, 256))
    assert content(device, target.address, (64,)).sum() == 0
    for value in (1.0, 2.0):
        pinned = device.pinned_array((64,), np.float32)
        pinned[...] = value
        device.upload(source.address, pinned)
        graph.replay()
        assert content(device, target.address, (64,)).sum() == 64 * value
        device.free_pinned(pinned)
    graph.close()
    for buffer in (source, target):
        buffer.free()


def test_work_that_cannot_be_captured(device: Device) -> None:
    """And the stream works on."""
    buffer = fill(device, np.ones(64, np.float32))

    def wrong() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        device.capture(wrong)
    with pytest.raises(BackendError):
        device.capture(device.synchronize)
    assert content(device, buffer.address, (64,)).sum() == 64
    buffer.free()


def test_events(device: Device) -> None:
    start, end = device.event(), device.event()
    device.record(start)
    buffer = fill(device, np.ones(1 << 16, np.float32))
    device.record(end)
    device.synchronize()
    assert 0 <= device.milliseconds(start, end) < 1e4
    buffer.free()


def test_no_memory(device: Device) -> None:
    with pytest.raises(OutOfMemory, match="memory"):
        device.allocate(1 << 45)


def test_closed(device: Device) -> None:
    device.close()
    device.close()
    with pytest.raises(BackendError, match="closed"), device.active():
        pass


@pytest.mark.parametrize("maps", [((16, 16), (16, 16)), ((7, 9), (5, 13)), ((1, 1), (3, 2))])
def test_kernels_equal_the_cpu(device: Device, tmp_path: Path, maps: Any) -> None:
    """Launched eagerly and from a CUDA graph, for a batch of two."""
    bundle = write_tiny_bundle(tmp_path / "m")
    if device.name == "Fake RTX":
        folder = write_kernels(tmp_path / "kernels", CLASSES)
    else:
        folder = compile_kernels(bundle, device.capability)
    about = {"capability": device.capability, "driver": device.driver, "remedy": ""}
    kernels = find_kernels([folder], CLASSES, ["float32"], **about)
    warp = DeviceWarp(device, kernels, CLASSES)
    hq, wq = maps[0]
    rng = np.random.default_rng(1)
    theta, phi, values = (
        rng.standard_normal((2, count, *side)).astype(np.float32)
        for count, side in ((16, maps[0]), (16, maps[1]), (3, maps[1]))
    )
    planes = {"theta": theta, "phi": phi, "values": values}
    inputs = Buffers(device, {name: (array.shape, np.float32) for name, array in planes.items()}, planes)
    tensors = {**key_tensors(CLASSES, "float32", 2, maps[1]), **query_tensors(CLASSES, "float32", 2, maps[0])}
    results = Buffers(device, tensors, ("warped", "index", "probability"))
    at, keys = inputs.addresses, results.addresses
    launches = warp.pack_keys(at["phi"], at["values"], keys, 2, maps[1])
    launches += warp.run(at["theta"], keys, keys, 2, maps[0], maps[1])
    expected = warp_arrays(theta, phi, values, patch=3, temperature=CLASSES.temperature, match=True, backend="numpy")

    def everything() -> None:
        for launch in launches:
            launch()

    for name, array in planes.items():
        inputs.pinned[name][...] = array
    for upload in inputs.upload(*planes):
        upload()
    graph = device.capture(everything)
    for run in (everything, graph.replay):
        for name in results.pinned:
            results.pinned[name][...] = 0  # not the run's before
        for step in (*results.upload(*results.pinned), run, *results.download(*results.pinned)):
            step()
        device.synchronize()
        np.testing.assert_allclose(results.pinned["warped"], expected.out, atol=2e-4)
        np.testing.assert_array_equal(results.pinned["index"].reshape(2, hq, wq), expected.match.index)
        probability = results.pinned["probability"].reshape(2, hq, wq)
        np.testing.assert_allclose(probability, expected.match.probability, atol=1e-4)
    graph.close()
    inputs.free()
    results.free()


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


def test_large_shared_memory_is_asked_for(fake_driver: FakeCuda) -> None:
    device = Device()
    with device.active():
        for shared, asked in (((48 << 10) - 16, {}), (48 << 10, {8: 48 << 10}), (64 << 10, {8: 64 << 10})):
            device.load(b"pack twin", "pack_kernel", "PPiiiiiiiiP", 128, shared)
            assert device._functions[-1].attributes == asked
    device.close()
    assert not fake_driver.functions  # freed while the context was there


def test_a_kernel_that_does_not_load(fake_driver: FakeCuda) -> None:
    device = Device()
    with (
        device.active(),
        pytest.raises(BackendError, match="kernel warp cannot be loaded on Fake RTX; update the driver"),
    ):
        device.load(b"not a cubin", "warp", "P", 128, 0)


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
    assert collects == [False]
    assert gc.isenabled()


def test_a_context_that_cannot_be_left(fake_driver: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()

    def fails() -> None:
        pop()
        raise fake_driver.Error("cuCtxPopCurrent failed: invalid device context")

    pop = fake_driver.Context.pop
    monkeypatch.setattr(fake_driver.Context, "pop", fails)
    with pytest.raises(BackendError, match="the GPU cannot be left: cuCtxPopCurrent failed"), device.active():
        pass


@pytest.mark.parametrize(
    ("axes", "sides"),
    [(("batch", "height", "width", 3), (2, 96, 128, 3)), (("batch", 5, "height", "width"), (2, 5, 96, 128))],
)
def test_windows_are_copied(device: Device, axes: tuple[int | str, ...], sides: tuple[int, ...]) -> None:
    """Tile by tile, a picture is copied into another."""
    spec, array = TensorSpec("x", "int16", axes), np.arange(np.prod(sides), dtype=np.int16).reshape(sides)
    source, target = (Buffers(device, {"x": (sides, np.int16)}, ("x",)) for _ in range(2))
    source.pinned["x"][...], target.pinned["x"][...] = array, 0
    for step in (*source.upload("x"), *target.upload("x")):
        step()
    for tile in tiles(96, 128, 64, 4):
        device.copy_window(target.window(spec, tile.kept(spec)), source.window(spec, tile.kept(spec)))
    np.testing.assert_array_equal(content(device, target.addresses["x"], sides, np.int16), array)
    source.free()
    target.free()


def test_no_gpu(fake_driver: FakeCuda) -> None:
    fake_driver.count = 0
    with pytest.raises(BackendError, match="the GPU cannot be used: cuInit failed: no CUDA-capable device"):
        Device()
    fake_driver.count = 2
    with pytest.raises(BackendError, match="GPU 2 asked for, this machine has 2"):
        Device(2)


def test_a_driver_that_is_too_old(fake_driver: FakeCuda) -> None:
    fake_driver.version = 11080
    with pytest.raises(BackendError, match=r"driver supports CUDA 11\.8, expected 12\.0 or newer; update it"):
        Device()


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
