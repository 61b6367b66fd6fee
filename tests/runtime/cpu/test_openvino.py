"""The engine protocol over OpenVINO: equal to ONNX Runtime, as strict with graphs, in the precision asked for."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tiny_bundle import CHANNELS, CLASSES, random_label, random_picture, write_tiny_bundle

from flashcocos.bundle import STAGES, Bundle
from flashcocos.bundle.default_model import resolve_model
from flashcocos.bundle.stages import axis_sizes, concrete_shape, stage_inputs, stage_tensors
from flashcocos.config import ModelConfig
from flashcocos.errors import BackendError
from flashcocos.runtime import Translator
from flashcocos.runtime.cpu import openvino as openvino_engine
from flashcocos.runtime.cpu.onnxruntime import OnnxRuntimeEngine
from flashcocos.runtime.cpu.openvino import OpenVinoEngine, cpu_precisions
from flashcocos.runtime.info import describe_bundle

openvino = pytest.importorskip("openvino", reason="needs the extra openvino")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle(write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "model.zip"))


@pytest.fixture
def without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    if "bfloat16" in cpu_precisions():
        pytest.skip("this CPU computes in bfloat16")


def inputs(config: ModelConfig, stage: str, height: int, width: int, batch: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(height)
    labels = np.stack([random_label(config, height, width, seed) for seed in range(batch)])
    label = labels if config.label_kind == "classes" else labels.astype(np.float32) / 255
    image = rng.uniform(-1, 1, (batch, 3, height, width)).astype(np.float32)
    sizes = axis_sizes(config, batch, height, width)
    taken = {"label": label, "exemplar_label": label, "image": image}
    for tensor in stage_tensors(config)[stage][0]:
        if tensor.name not in taken:
            taken[tensor.name] = rng.uniform(-1, 1, concrete_shape(tensor, sizes)).astype(np.float32)
    return stage_inputs(config, stage, taken)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("model", ["classes", "channels", "shipped"])
def test_equals_onnxruntime(tmp_path: Path, model: str, stage: str) -> None:
    """At sizes that change from run to run."""
    if model == "shipped":
        opened = Bundle(resolve_model())
    else:
        opened = Bundle(write_tiny_bundle(tmp_path / "b", CLASSES if model == "classes" else CHANNELS))
    engines = OpenVinoEngine(opened, stage, num_threads=1), OnnxRuntimeEngine(opened, stage, num_threads=1)
    for height, width, batch in ((64, 64, 1), (96, 64, 2), (64, 64, 1)):
        taken = inputs(opened.manifest.config, stage, height, width, batch)
        actual, expected = (engine.run(taken) for engine in engines)
        assert list(actual) == [tensor.name for tensor in opened.manifest.stages[stage].outputs]
        for name, array in expected.items():
            assert actual[name].dtype == np.float32
            np.testing.assert_allclose(actual[name], array, rtol=0, atol=2e-5 * np.abs(array).max(), err_msg=name)


def test_translator(bundle: Bundle) -> None:
    pictures = []
    for backend in ("openvino", "onnxruntime"):
        with Translator(bundle, backend=backend, device="cpu", num_threads=1, warp="numpy") as translator:
            exemplar = translator.encode_exemplar(random_picture(64, 64), random_label(CLASSES, 64, 64, 1))
            pictures.append(translator.translate(random_label(CLASSES, 64, 64, 2), exemplar).image)
            described = translator.describe()
        assert {info["backend"].split()[0] for name, info in described.items() if name != "warp"} == {backend}
    assert np.abs(pictures[0].astype(int) - pictures[1]).max() <= 1


def test_describe(bundle: Bundle) -> None:
    info = OpenVinoEngine(bundle, "query").describe()
    assert info.backend == f"openvino {openvino.__version__.split('-')[0]}"
    assert (info.device, info.precision, info.arithmetic) == ("cpu", "float32", "float32")
    stored = OpenVinoEngine(Bundle(resolve_model()), "query").describe()
    assert (stored.precision, stored.arithmetic) == ("float16", "float32")
    assert "arithmetic              float32" in describe_bundle()


def test_one_engine_serves_many_threads(bundle: Bundle) -> None:
    engine = OpenVinoEngine(bundle, "query", num_threads=1)
    labels = [random_label(CLASSES, 64, 32 * (1 + seed % 3), seed)[None] for seed in range(12)]
    alone = [engine.run({"label": label})["theta"] for label in labels]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda label: engine.run({"label": label})["theta"], labels))
    assert all(map(np.array_equal, alone, together))


def test_threads_reach_the_graph(bundle: Bundle) -> None:
    assert OpenVinoEngine(bundle, "query", num_threads=1)._graph.get_property("INFERENCE_NUM_THREADS") == 1


@pytest.mark.usefixtures("without_bfloat16")
def test_bfloat16_without_a_cpu_for_it(bundle: Bundle) -> None:
    with pytest.raises(BackendError, match=r"'bfloat16': openvino computes in float32 on this CPU, .*AVX-512 BF16"):
        Translator(bundle, backend="openvino", precision="bfloat16", warp="numpy")


@pytest.mark.usefixtures("without_bfloat16")
def test_openvino_replaces_a_precision_when_nobody_checks(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why what it will compute in is read back."""
    monkeypatch.setattr(openvino_engine, "_precisions", lambda core: ("float32", "bfloat16"))
    with pytest.raises(BackendError, match="'bfloat16': openvino would compute in f32 on this CPU"):
        OpenVinoEngine(bundle, "query", precision="bfloat16")


def test_bfloat16(bundle: Bundle) -> None:
    if "bfloat16" not in cpu_precisions():
        pytest.skip("this CPU has no bfloat16")
    engine = OpenVinoEngine(bundle, "coarse", precision="bfloat16")
    assert engine.describe().arithmetic == "bfloat16"
    taken = inputs(CLASSES, "coarse", 64, 64, 1)
    expected = OnnxRuntimeEngine(bundle, "coarse").run(taken)
    np.testing.assert_allclose(engine.run(taken)["image"], expected["image"], rtol=0, atol=2**-6)


def test_absent_openvino_names_the_extra(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendError, match=r"pip install flashcocos\[openvino\]"):
        Translator(bundle, backend="openvino", warp="numpy")


def test_nothing_is_reported_over_the_network(bundle: Bundle) -> None:
    """And neither torch nor the onnx package is there to load a graph."""
    code = (
        "import sys; from flashcocos import Translator; "
        f"Translator({str(bundle.path)!r}, backend='openvino', warp='numpy'); "
        "print(sorted({'openvino_telemetry', 'torch', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
