"""The engine protocol over ONNX Runtime: what runs is what was asked for, and a bundle's graphs are not trusted."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hostile_graphs import HOSTILE, external_data_in_branch
from onnx import numpy_helper
from tiny_bundle import CLASSES, random_label, write_tiny_bundle

from flashcocos.bundle import STAGES, Bundle
from flashcocos.errors import BackendError, BundleError, InputError
from flashcocos.runtime import engine
from flashcocos.runtime.engine import OnnxRuntimeEngine, open_engines


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle(write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "model.zip"))


class FakeRuntime:
    """An onnxruntime that claims CUDA and, like the real one, runs on the CPU where CUDA does not start."""

    def __init__(self, starts: bool) -> None:
        self.starts, self.asked = starts, []
        self.SessionOptions, self.__version__ = onnxruntime.SessionOptions, "0-fake"

    def get_available_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def InferenceSession(self, model: bytes, options: Any, providers: list[str], enable_fallback: int) -> Any:
        self.asked.append(providers[0])
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        used = providers if self.starts or providers[0].startswith("CPU") else ["CPUExecutionProvider"]
        return SimpleNamespace(
            get_providers=lambda: used, get_inputs=session.get_inputs, get_outputs=session.get_outputs, run=session.run
        )


def use(monkeypatch: pytest.MonkeyPatch, runtime: FakeRuntime) -> FakeRuntime:
    monkeypatch.setattr(engine, "_import_onnxruntime", lambda: runtime)
    return runtime


def test_a_stage_runs(bundle: Bundle) -> None:
    query = OnnxRuntimeEngine(bundle, "query", threads=1)
    label = random_label(CLASSES, 64, 96)[None]
    theta = query.run({"label": label})["theta"]
    weights = numpy_helper.to_array(onnx.load_from_string(bundle.read_stage("query")).graph.initializer[-1])[..., 0, 0]
    one_hot = (label[:, None] == np.arange(12)[:, None, None]).reshape(1, 12, 16, 4, 24, 4).mean((3, 5))
    np.testing.assert_allclose(theta, np.einsum("cn,bnhw->bchw", weights, one_hot), atol=1e-5)
    info = query.describe()
    assert (info.provider, info.device) == ("CPUExecutionProvider", "cpu")
    assert (info.precision, info.arithmetic) == ("float32", "float32")
    assert info.backend == f"onnxruntime {onnxruntime.__version__}"


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"takes the inputs \['label'\], got \[\]"),
        ({"labels": np.zeros((1, 8, 8), np.uint8)}, r"got \['labels'\]"),
        ({"label": np.zeros((1, 8, 8), np.int64)}, "expected uint8 .* got int64"),
        ({"label": np.zeros((8, 8), np.uint8)}, r"got uint8 \(8, 8\)"),
    ],
)
def test_wrong_inputs(bundle: Bundle, inputs: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InputError, match=message):
        OnnxRuntimeEngine(bundle, "query").run(inputs)


def test_wrong_channels(bundle: Bundle) -> None:
    inputs = {"warped": np.zeros((1, 4, 8, 8), np.float32), "label": np.zeros((1, 32, 32), np.uint8)}
    with pytest.raises(InputError, match=r"warped: expected float32 \('batch', 3, 'h', 'w'\), got .*4, 8, 8"):
        OnnxRuntimeEngine(bundle, "coarse").run(inputs)


def test_a_failing_run_is_a_backend_error(bundle: Bundle) -> None:
    inputs = {"warped": np.zeros((1, 3, 8, 8), np.float32), "label": np.zeros((1, 64, 32), np.uint8)}
    with pytest.raises(BackendError, match=r"stage coarse: failed on warped \(1, 3, 8, 8\), label") as caught:
        OnnxRuntimeEngine(bundle, "coarse").run(inputs)
    assert "\n" not in str(caught.value)


def test_closed(bundle: Bundle) -> None:
    query = OnnxRuntimeEngine(bundle, "query")
    query.close()
    query.close()
    with pytest.raises(BackendError, match="closed"):
        query.run({"label": np.zeros((1, 8, 8), np.uint8)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tensorflow"}, "unknown backend 'tensorflow'; expected one of onnxruntime, openvino"),
        ({"device": "gpu"}, "unknown device 'gpu'; expected one of auto, cpu, cuda"),
        ({"precision": "half"}, "unknown precision 'half'; expected one of float32, bfloat16"),
        ({"precision": "bfloat16"}, "backend 'onnxruntime' computes in float32, got precision 'bfloat16'"),
        ({"threads": 0}, "threads: expected a whole number from 1"),
    ],
)
def test_unknown_options(bundle: Bundle, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_engines(bundle, **options)


def test_threads_reach_the_session(bundle: Bundle) -> None:
    assert OnnxRuntimeEngine(bundle, "query", threads=3)._session.get_session_options().intra_op_num_threads == 3


def test_cuda_without_its_provider_names_the_extra(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match=r"no CUDAExecutionProvider; pip install flashcocos\[gpu\]"):
        open_engines(bundle, device="cuda")


def test_cuda_that_does_not_start_is_an_error(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeRuntime(starts=False))
    with pytest.raises(BackendError, match=r"could not start CUDAExecutionProvider and would use CPUExecutionProvider"):
        open_engines(bundle, device="cuda")


def test_auto_takes_cuda_where_it_starts(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = use(monkeypatch, FakeRuntime(starts=True))
    with caplog.at_level(logging.INFO, "flashcocos"):
        engines = open_engines(bundle, device="auto")
    assert {one.describe().device for one in engines.values()} == {"cuda"}
    assert runtime.asked == ["CUDAExecutionProvider"] * len(STAGES)
    assert [record.message for record in caplog.records] == ["device auto: cuda"]


def test_auto_says_once_why_it_takes_the_cpu(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = use(monkeypatch, FakeRuntime(starts=False))
    engines = open_engines(bundle, device="auto")
    assert {one.describe().provider for one in engines.values()} == {"CPUExecutionProvider"}
    assert runtime.asked == ["CUDAExecutionProvider"] + ["CPUExecutionProvider"] * len(STAGES)
    assert len(caplog.records) == 1
    assert "cuda does not start" in caplog.text


def test_absent_onnxruntime_names_the_extra(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"pip install flashcocos\[cpu\].*flashcocos\[gpu\]"):
        open_engines(bundle)


@pytest.mark.parametrize(("change", "message"), HOSTILE, ids=[change.__name__ for change, _ in HOSTILE])
def test_hostile_graphs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, message: str) -> None:
    np.zeros(10_000, np.float32).tofile(tmp_path / "secret.bin")
    monkeypatch.chdir(tmp_path)
    path = write_tiny_bundle(
        tmp_path / "b", change=lambda stage, model: change(stage, model) if stage == "query" else None
    )
    with pytest.raises(BundleError, match=message):
        OnnxRuntimeEngine(Bundle(path), "query")


def test_onnxruntime_reads_files_when_nobody_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why the check exists."""
    np.full(1, 7, np.float32).tofile(tmp_path / "secret.bin")
    monkeypatch.chdir(tmp_path)
    hostile = write_tiny_bundle(
        tmp_path / "b", change=lambda stage, model: external_data_in_branch(stage, model) if stage == "query" else None
    )
    plain = OnnxRuntimeEngine(Bundle(write_tiny_bundle(tmp_path / "plain")), "query")
    monkeypatch.setattr(engine, "refuse_external_data", lambda model, name: None)
    try:
        leaking = OnnxRuntimeEngine(Bundle(hostile), "query")
    except BundleError as error:
        pytest.skip(f"this onnxruntime refuses by itself: {error}")
    label = {"label": random_label(CLASSES, 32, 32)[None]}
    np.testing.assert_allclose(leaking.run(label)["theta"] - plain.run(label)["theta"], 7, atol=1e-5)


@pytest.mark.parametrize("content", [b"", b"ORTM", b"not a model", bytes(100)])
def test_files_that_are_no_models(tmp_path: Path, content: bytes) -> None:
    path = write_tiny_bundle(tmp_path / "b")
    bundle = Bundle(path)
    bundle.read = lambda name: content  # type: ignore[method-assign]
    with pytest.raises(BundleError, match=r"not a readable ONNX file|cannot load the graph"):
        OnnxRuntimeEngine(bundle, "query")


def test_the_largest_graph_is_loaded_first(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(engine, "OnnxRuntimeEngine", lambda bundle, stage, **_: loaded.append(stage))
    open_engines(bundle, device="cpu")
    sizes = [len(bundle.read_stage(stage)) for stage in loaded]
    assert sorted(loaded) == sorted(STAGES)
    assert sizes == sorted(sizes, reverse=True)
