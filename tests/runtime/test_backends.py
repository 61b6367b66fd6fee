"""From options to a pipeline: what "auto" becomes, and that what cannot run here is an error with a way out."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest
from tiny_bundle import write_tiny_bundle

from flashcocos.bundle import STAGES, Bundle
from flashcocos.errors import BackendError, InputError
from flashcocos.runtime import EngineOptions, Translator, backends
from flashcocos.runtime.cpu import onnxruntime as onnxruntime_engine

GRAPHS_ONLY = {"warp": "numpy"}  # so that nothing but ONNX Runtime's sessions may go to the GPU


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle(write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "model.zip"))


class FakeRuntime:
    """An onnxruntime that claims CUDA and, like the real one, runs on the CPU where CUDA does not start."""

    def __init__(self, starts: bool) -> None:
        self.starts, self.requested = starts, []
        self.SessionOptions, self.__version__ = onnxruntime.SessionOptions, "0-fake"

    def get_available_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def InferenceSession(self, model: bytes, options: Any, providers: list[str], enable_fallback: int) -> Any:
        self.requested.append(providers[0])
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        used = providers if self.starts or providers[0].startswith("CPU") else ["CPUExecutionProvider"]
        return SimpleNamespace(
            get_providers=lambda: used, get_inputs=session.get_inputs, get_outputs=session.get_outputs, run=session.run
        )


def use(monkeypatch: pytest.MonkeyPatch, runtime: FakeRuntime) -> FakeRuntime:
    monkeypatch.setattr(onnxruntime_engine, "import_onnxruntime", lambda: runtime)
    return runtime


def stages(translator: Translator) -> list[dict[str, str]]:
    return [info for name, info in translator.describe().items() if name != "warp"]


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged about devices."""
    return [record.message for record in caplog.records if record.message.startswith("device")]


def test_cuda_that_does_not_start_is_an_error(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeRuntime(starts=False))
    with pytest.raises(BackendError, match=r"could not start CUDAExecutionProvider and would use CPUExecutionProvider"):
        onnxruntime_engine.open_session(bundle, "query", device="cuda")


def test_auto_says_once_why_it_takes_the_cpu(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = use(monkeypatch, FakeRuntime(starts=True))
    monkeypatch.setitem(sys.modules, "pycuda", None)
    with Translator(bundle) as translator:
        assert {info["provider"] for info in stages(translator)} == {"CPUExecutionProvider"}
    assert runtime.requested == ["CPUExecutionProvider"] * len(STAGES)
    assert len(messages(caplog)) == 1
    assert "device auto: cpu, because cuda does not start: the GPU pipeline needs pycuda" in caplog.text


def test_auto_without_a_cuda_build_is_the_cpu(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    if onnxruntime_engine.has_provider("cuda"):
        pytest.skip("this onnxruntime has CUDA")
    with caplog.at_level(logging.INFO, "flashcocos"), Translator(bundle) as translator:
        assert {info["device"] for info in translator.describe().values()} == {"cpu"}
        assert translator.describe()["warp"]["backend"] in ("numba", "numpy")
    assert messages(caplog) == ["device auto: cpu (this onnxruntime has no CUDA provider)"]


def test_absent_onnxruntime_names_the_extra(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for device in ("auto", "cpu"):
        with pytest.raises(BackendError, match=r"pip install flashcocos\[cpu\].*flashcocos\[gpu\]"):
            Translator(bundle, backend="onnxruntime", device=device, **GRAPHS_ONLY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warp": "cuda"}, r"pycuda .*; pip install flashcocos\[gpu\], or choose warp numba$"),
        ({"device": "cuda"}, r"pycuda .*; pip install flashcocos\[gpu\], or choose device cpu$"),
        ({"backend": "tensorrt"}, r"pycuda .*; pip install flashcocos\[tensorrt\], or choose backend onnxruntime$"),
        ({"backend": "tensorrt-rtx"}, r"pycuda .*; pip install flashcocos\[rtx\], or choose backend onnxruntime$"),
    ],
)
def test_what_cannot_run_names_its_way_out(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setitem(sys.modules, "pycuda", None)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match=message) as caught:
        Translator(bundle, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", [{"device": "cpu"}, {"device": "auto"}, {"device": "cpu", "warp": "numpy"}])
@pytest.mark.parametrize("option", [{"exemplar_cache_mib": 64}, {"engines": "folder"}])
def test_options_of_a_gpu_are_refused_on_the_cpu(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, place: dict[str, str], option: dict[str, Any]
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(InputError, match=rf"{next(iter(option))} applies only on a GPU.*leave it out"):
        Translator(bundle, **place, **option)


@pytest.mark.parametrize("place", [{"device": "cuda"}, {"warp": "cuda"}, {"backend": "tensorrt"}])
def test_threads_are_refused_on_a_gpu(bundle: Bundle, place: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"num_threads applies only to graphs on the CPU, .*; leave it out"):
        Translator(bundle, num_threads=2, **place)


@pytest.mark.parametrize(
    ("installed", "options", "backend"),
    [
        (("onnxruntime", "openvino"), {}, "onnxruntime"),
        (("onnxruntime",), {}, "onnxruntime"),
        (("openvino",), {"device": "cpu"}, "openvino"),
        (("openvino",), {"device": "cuda"}, "onnxruntime"),
        ((), {}, "onnxruntime"),
    ],
)
def test_auto_is_the_fastest_backend_that_is_installed(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    installed: tuple[str, ...],
    options: dict[str, str],
    backend: str,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in installed else None)
    with caplog.at_level(logging.INFO, "flashcocos"):
        assert backends._fastest_backend(EngineOptions(**options)) == backend
    said = [f"backend auto: {backend} (installed: {', '.join(installed)})"]
    chosen = len(installed) > 1 or backend == "openvino"
    assert [record.message for record in caplog.records] == (said if chosen else [])


def test_without_onnxruntime_openvino_runs(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino", reason="needs the extra openvino")
    monkeypatch.setattr(backends, "_fastest_backend", lambda options: "openvino")
    with Translator(bundle, **GRAPHS_ONLY) as translator:
        assert {info["backend"].split()[0] for info in stages(translator)} == {"openvino"}


def test_the_largest_graph_is_loaded_first(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(backends, "OnnxRuntimeEngine", lambda bundle, stage, **_: loaded.append(stage))
    backends.open_engines(bundle, EngineOptions())
    sizes = [len(bundle.read_stage(stage)) for stage in loaded]
    assert sorted(loaded) == sorted(STAGES)
    assert sizes == sorted(sizes, reverse=True)
