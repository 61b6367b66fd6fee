"""What both engines of the CPU do alike: they refuse inputs and graphs that are wrong, and end cleanly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_graphs import HOSTILE
from tiny_bundle import write_tiny_bundle

from flashcocos.bundle import Bundle
from flashcocos.errors import BackendError, BundleError, InputError
from flashcocos.runtime.cpu.onnxruntime import OnnxRuntimeEngine
from flashcocos.runtime.cpu.openvino import OpenVinoEngine
from flashcocos.runtime.engine import Engine

Open = Callable[[Bundle, str], Engine]


@pytest.fixture(params=["onnxruntime", "openvino"])
def open_engine(request: pytest.FixtureRequest) -> Open:
    pytest.importorskip(request.param, reason=f"needs {request.param}")
    return OnnxRuntimeEngine if request.param == "onnxruntime" else OpenVinoEngine


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle(write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "model.zip"))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"takes the inputs \['label'\], got \[\]"),
        ({"labels": np.zeros((1, 8, 8), np.uint8)}, r"got \['labels'\]"),
        ({"label": np.zeros((1, 8, 8), np.int64)}, "expected uint8 .* got int64"),
        ({"label": np.zeros((8, 8), np.uint8)}, r"got uint8 \(8, 8\)"),
    ],
)
def test_wrong_inputs(open_engine: Open, bundle: Bundle, inputs: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_engine(bundle, "query").run(inputs)


def test_wrong_channels(open_engine: Open, bundle: Bundle) -> None:
    inputs = {"warped": np.zeros((1, 4, 8, 8), np.float32), "label": np.zeros((1, 32, 32), np.uint8)}
    with pytest.raises(InputError, match=r"warped: expected float32 \('batch', 3, 'h', 'w'\), got .*4, 8, 8"):
        open_engine(bundle, "coarse").run(inputs)


def test_a_failing_run_is_a_backend_error(open_engine: Open, bundle: Bundle) -> None:
    inputs = {"warped": np.zeros((1, 3, 8, 8), np.float32), "label": np.zeros((1, 64, 32), np.uint8)}
    with pytest.raises(BackendError, match=r"stage coarse: failed on warped \(1, 3, 8, 8\), label") as caught:
        open_engine(bundle, "coarse").run(inputs)
    assert "\n" not in str(caught.value)


def test_closed(open_engine: Open, bundle: Bundle) -> None:
    query = open_engine(bundle, "query")
    query.close()
    query.close()
    with pytest.raises(BackendError, match="closed"):
        query.run({"label": np.zeros((1, 8, 8), np.uint8)})


@pytest.mark.parametrize(("change", "message"), HOSTILE, ids=[change.__name__ for change, _ in HOSTILE])
def test_hostile_graphs_are_refused(
    open_engine: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, message: str
) -> None:
    np.zeros(10_000, np.float32).tofile(tmp_path / "secret.bin")
    monkeypatch.chdir(tmp_path)
    path = write_tiny_bundle(
        tmp_path / "b", change=lambda stage, model: change(stage, model) if stage == "query" else None
    )
    with pytest.raises(BundleError, match=message):
        open_engine(Bundle(path), "query")


@pytest.mark.parametrize("content", [b"", b"ORTM", b"not a model", b"<?xml version='1.0'?><net/>", bytes(100)])
def test_files_that_are_no_models(open_engine: Open, tmp_path: Path, content: bytes) -> None:
    bundle = Bundle(write_tiny_bundle(tmp_path / "b"))
    bundle.read = lambda name: content  # type: ignore[method-assign]
    with pytest.raises(BundleError, match=r"not a readable ONNX file|cannot load the graph|the graph has \{\}"):
        open_engine(bundle, "query")
