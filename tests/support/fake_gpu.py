"""A machine with a GPU, for one test: a fake device, TensorRT or ONNX Runtime on it, and a bundle's engines."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_cuda import FakeCuda
from fake_onnxruntime import FakeCudaRuntime
from fake_tensorrt import FakeTensorRt, profile, write_engines
from kernel_twins import write_kernels

from flashcocos.bundle import Bundle
from flashcocos.runtime import Translator
from flashcocos.runtime.cpu import onnxruntime as onnxruntime_engine
from flashcocos.runtime.gpu import cuda_graph
from flashcocos.runtime.gpu import device as gpu_device
from flashcocos.runtime.gpu import onnxruntime as onnxruntime_gpu
from flashcocos.runtime.gpu.store import Profile, default_folder

DYNAMIC = profile((64, 64, 128), (64, 64, 128), (1, 2, 4))


@dataclasses.dataclass
class FakeGpu:
    """device, trt, onnx: what is in place of the GPU, of TensorRT and of onnxruntime. options: for `Translator`."""

    device: FakeCuda
    trt: FakeTensorRt
    onnx: FakeCudaRuntime
    bundle: Bundle
    options: dict[str, Any]

    @property
    def folder(self) -> Path:
        return default_folder(self.bundle.path)

    def translator(self, **options: Any) -> Translator:
        return Translator(self.bundle, **{**self.options, **options})


def install_driver(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> FakeCuda:
    """`cuda` in place of pycuda's driver and of the driver library."""
    monkeypatch.setitem(sys.modules, "pycuda", SimpleNamespace(driver=cuda))
    monkeypatch.setitem(sys.modules, "pycuda.driver", cuda)
    monkeypatch.setattr(gpu_device, "_contexts", {})
    monkeypatch.setattr(cuda_graph, "load_driver", lambda: cuda)
    return cuda


def fake_gpu(
    monkeypatch: pytest.MonkeyPatch,
    bundle: Path,
    backend: str = "tensorrt",
    *,
    profiles: Sequence[Profile] = (profile(), DYNAMIC),
    kernels: bool = True,
    engines: dict[str, Any] | None = None,
    cuda: FakeCuda | None = None,
    **device: Any,
) -> FakeGpu:
    """`backend`: "tensorrt", "tensorrt-rtx" or "onnxruntime". engines: options of `write_engines`.

    cuda: a GPU to share; device: or the options of a new one.
    """
    opened = Bundle(bundle)
    config = opened.manifest.config
    gpu = cuda or FakeCuda(config, **device)
    gpu.config = config
    trt = FakeTensorRt(gpu, can_capture=True if backend == "tensorrt-rtx" else None)
    onnx = FakeCudaRuntime(gpu)
    install_driver(monkeypatch, gpu)
    monkeypatch.setitem(sys.modules, "tensorrt", trt if backend == "tensorrt" else None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", trt if backend == "tensorrt-rtx" else None)
    options: dict[str, Any] = {"backend": backend}
    if backend == "onnxruntime":
        for module in (onnxruntime_engine, onnxruntime_gpu):
            monkeypatch.setattr(module, "import_onnxruntime", lambda: onnx)
        options["device"] = "cuda"
    else:
        write_engines(default_folder(bundle), opened, profiles, variant=backend, **(engines or {}))
    if kernels:
        write_kernels(default_folder(bundle) / "kernels", config)
    return FakeGpu(gpu, trt, onnx, opened, options)
