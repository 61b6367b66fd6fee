"""TensorRT engines: only what was built for this bundle, GPU and version is run, and every refusal says what to do."""

from __future__ import annotations

import gc
import json
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda
from fake_gpu import FakeGpu, fake_gpu, install_driver
from fake_tensorrt import profile, write_engines
from kernel_twins import write_kernels
from tiny_bundle import CLASSES, random_label, random_picture, write_tiny_bundle

from flashcocos.errors import BackendError
from flashcocos.runtime import Translator
from flashcocos.runtime.gpu import tensorrt as tensorrt_engine
from flashcocos.runtime.gpu.store import default_folder
from flashcocos.runtime.gpu.tensorrt import TensorRt

LABEL = random_label(CLASSES, 64, 64)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_tiny_bundle(tmp_path / "m")


def refused(gpu: FakeGpu, message: str, **options: Any) -> str:
    """The message of the error that opening a translator raises, which leaves nothing on the device."""
    with pytest.raises(BackendError, match=message) as caught:
        gpu.translator(**options)
    text = str(caught.value)
    assert "\n" not in text
    del caught
    gc.collect()
    assert gpu.device.live == (0, 0, 0)
    assert gpu.device.closed
    return text


def test_static_engines_come_first(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    gpu = fake_gpu(monkeypatch, bundle)
    for path in gpu.folder.glob("fine-*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "int8_convolutions": 3}))
    with gpu.translator() as translator:
        described = translator.describe()
        assert [described[stage]["arithmetic"] for stage in ("query", "fine")] == ["float16", "int8 and float16"]
        assert gpu.trt.loaded == ["query", "exemplar", "coarse", "fine"]
        exemplar = translator.encode_exemplar(random_picture(64, 64), LABEL)
        translator.translate(LABEL, exemplar)
        assert len(gpu.trt.loaded) == 4
        translator.translate(LABEL, exemplar, (64, 96))  # the dynamic ones are loaded when they are needed
        assert gpu.trt.loaded[4:] == ["query", "coarse", "fine"]


def test_rtx_keeps_what_it_compiled(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    """Beside the engines, for the next process; and contexts do not depend on the exemplar's size."""
    gpu = fake_gpu(monkeypatch, bundle, "tensorrt-rtx")
    for compiled in (["exemplar", "query", "coarse", "fine"], []):
        gpu.trt.compiled.clear()
        gpu.trt.contexts = 0
        with gpu.translator() as translator:
            for size in ((64, 64), (64, 96), (96, 64)):
                exemplar = translator.encode_exemplar(random_picture(*size), random_label(CLASSES, *size), size)
                translator.translate(LABEL, exemplar)
        assert gpu.trt.compiled == compiled
        assert gpu.trt.contexts == 3 + 3  # three sizes of the exemplar stage, and the three others once
    assert [path.name for path in gpu.folder.glob("*.cache")] == ["runtime-10.9.0-sm86.cache"]


def test_a_folder_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gpu = fake_gpu(monkeypatch, bundle, "tensorrt-rtx")

    def fails(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tensorrt_engine, "atomic_path", fails)
    with gpu.translator() as translator:
        translator.encode_exemplar(random_picture(64, 64), LABEL)
    assert "sm86.cache cannot be written: Permission denied; the next start compiles again" in caplog.text
    assert gpu.device.closed


def test_an_earlier_message_is_no_reason(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    gpu = fake_gpu(monkeypatch, bundle)
    tensorrt = TensorRt("tensorrt", gpu.folder, 86)
    tensorrt._messages.append("tolerated")
    assert tensorrt.call(lambda: None) is None
    assert tensorrt.complaint("nothing") == "nothing"


def test_an_engine_that_does_not_load(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    gpu = fake_gpu(monkeypatch, bundle, profiles=[profile()])
    _rewrite(gpu, "query", refuse="engine was built for sm_80")
    reason = r"on Fake RTX \(sm_86, CUDA 12.4\): .*engine was built for sm_80; it"
    text = refused(gpu, rf"tensorrt 10.9.0 cannot load engine query-\w+ {reason}")
    assert "run flashcocos build on this machine, or update the driver" in text
    assert "not an error" not in text


def test_an_engine_of_other_tensors(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    gpu = fake_gpu(monkeypatch, bundle, profiles=[profile()])
    tensors = [[("label", "uint8", ("batch", "height", "width"))], [("other", "float32", ("batch", 16, "h", "w"))]]
    _rewrite(gpu, "query", tensors=tensors)
    refused(gpu, r"engine query-\w+ has the tensors .*'other'.*, stage query has .*'theta'.*flashcocos build again")


def test_shapes_that_an_engine_does_not_give(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    gpu = fake_gpu(monkeypatch, bundle, profiles=[profile()])
    wide = [[("label", "uint8", ("batch", "height", "width"))], [("theta", "float32", ("batch", 16, "h", 4))]]
    _rewrite(gpu, "query", tensors=wide)
    with gpu.translator() as translator:
        exemplar = translator.encode_exemplar(random_picture(64, 64), LABEL)
        with pytest.raises(
            BackendError, match=r"engine query-\w+ gives theta \(1, 16, 16, 4\), expected \(1, 16, 16, 16\)"
        ):
            translator.translate(LABEL, exemplar)
    gc.collect()
    assert gpu.device.live == (0, 0, 0)


def test_a_runtime_that_does_not_start(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    gpu = fake_gpu(monkeypatch, bundle)

    def fails(logger: Any) -> None:
        logger.log(logger.Severity.INTERNAL_ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(gpu.trt, "Runtime", fails)
    refused(gpu, "tensorrt 10.9.0 does not start: CUDA initialization failure with error: 35")


def test_the_real_package_has_this_api(tmp_path: Path) -> None:
    """As far as that goes without a GPU."""
    real = pytest.importorskip("tensorrt_rtx", reason="needs the extra rtx")
    used = {
        real.Runtime: "deserialize_cuda_engine",
        real.ICudaEngine: "num_io_tensors get_tensor_name get_tensor_mode get_tensor_dtype get_tensor_shape "
        "device_memory_size_v2 create_execution_context create_runtime_config",
        real.IRuntimeConfig: "set_execution_context_allocation_strategy create_runtime_cache set_runtime_cache "
        "dynamic_shapes_kernel_specialization_strategy",
        real.IRuntimeCache: "serialize deserialize",
        real.IExecutionContext: "set_input_shape infer_shapes get_tensor_shape set_tensor_address set_device_memory "
        "execute_async_v3 is_stream_capturable",
    }
    for kind, names in used.items():
        assert set(names.split()) <= set(dir(kind)), kind
    assert "EAGER" in real.DynamicShapesKernelSpecializationStrategy.__members__
    assert "USER_MANAGED" in real.ExecutionContextAllocationStrategy.__members__
    assert "INPUT" in real.TensorIOMode.__members__
    assert [np.dtype(real.nptype(kind)) for kind in (real.DataType.UINT8, real.DataType.FLOAT)] == ["uint8", "float32"]
    with pytest.raises(TypeError):
        real.nptype(real.DataType.BF16)
    messages: deque[str] = deque()
    logger = tensorrt_engine._logger(real, messages)
    logger.log(real.ILogger.Severity.ERROR, "an error")
    logger.log(real.ILogger.Severity.WARNING, "a warning")
    assert list(messages) == ["an error"]
    try:
        tensorrt = TensorRt("tensorrt-rtx", tmp_path, 86)
    except BackendError as error:
        pytest.skip(f"its runtime does not start here: {error}")
    assert tensorrt.runtime.deserialize_cuda_engine(b"not an engine" * 100) is None
    assert tensorrt.complaint("nothing") != "nothing"


def _rewrite(gpu: FakeGpu, stage: str, **header: Any) -> None:
    """Engines of one stage whose header says something else."""
    write_engines(gpu.folder, gpu.bundle, [profile()], stages=[stage], header=header)


def test_a_real_engine_gets_as_far_as_the_gpu(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    """What the real builder writes is found, checked and handed to the real runtime, which lacks a driver."""
    pytest.importorskip("tensorrt_rtx", reason="needs the extra rtx")
    from flashcocos.export.tensorrt.build import build

    list(build(bundle, targets=[86, 89], profiles=[profile()]))
    gpu = install_driver(monkeypatch, FakeCuda(CLASSES, total=1 << 30, capability=89))
    write_kernels(default_folder(bundle) / "kernels", CLASSES)
    with pytest.raises(
        BackendError, match=r"tensorrt-rtx .* cannot load engine query-\w+ on Fake RTX \(sm_89"
    ) as caught:
        Translator(bundle, backend="tensorrt-rtx")
    if "cudaError 35" not in str(caught.value):
        pytest.skip(f"this machine has a driver: {caught.value}")
    assert gpu.closed
