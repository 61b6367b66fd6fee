"""The engine protocol over ONNX Runtime: what runs is what was asked for, and a bundle's graphs are not trusted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hostile_graphs import external_data_in_branch
from onnx import numpy_helper
from tiny_bundle import CLASSES, random_label, write_tiny_bundle

from flashcocos.bundle import Bundle
from flashcocos.errors import BundleError
from flashcocos.runtime.cpu import onnxruntime as onnxruntime_engine
from flashcocos.runtime.cpu.onnxruntime import OnnxRuntimeEngine


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle(write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "model.zip"))


def test_a_stage_runs(bundle: Bundle) -> None:
    query = OnnxRuntimeEngine(bundle, "query", num_threads=1)
    label = random_label(CLASSES, 64, 96)[None]
    theta = query.run({"label": label})["theta"]
    weights = numpy_helper.to_array(onnx.load_from_string(bundle.read_stage("query")).graph.initializer[-1])[..., 0, 0]
    one_hot = (label[:, None] == np.arange(12)[:, None, None]).reshape(1, 12, 16, 4, 24, 4).mean((3, 5))
    np.testing.assert_allclose(theta, np.einsum("cn,bnhw->bchw", weights, one_hot), atol=1e-5)
    info = query.describe()
    assert (info.provider, info.device) == ("CPUExecutionProvider", "cpu")
    assert (info.precision, info.arithmetic) == ("float32", "float32")
    assert info.backend == f"onnxruntime {onnxruntime.__version__}"


def test_threads_reach_the_session(bundle: Bundle) -> None:
    assert OnnxRuntimeEngine(bundle, "query", num_threads=3)._graph.get_session_options().intra_op_num_threads == 3


def test_onnxruntime_reads_files_when_nobody_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why the check exists."""
    np.full(1, 7, np.float32).tofile(tmp_path / "secret.bin")
    monkeypatch.chdir(tmp_path)
    hostile = write_tiny_bundle(
        tmp_path / "b", change=lambda stage, model: external_data_in_branch(stage, model) if stage == "query" else None
    )
    plain = OnnxRuntimeEngine(Bundle(write_tiny_bundle(tmp_path / "plain")), "query")
    monkeypatch.setattr(onnxruntime_engine, "refuse_external_data", lambda model, name: None)
    try:
        leaking = OnnxRuntimeEngine(Bundle(hostile), "query")
    except BundleError as error:
        pytest.skip(f"this onnxruntime refuses by itself: {error}")
    label = {"label": random_label(CLASSES, 32, 32)[None]}
    np.testing.assert_allclose(leaking.run(label)["theta"] - plain.run(label)["theta"], 7, atol=1e-5)
