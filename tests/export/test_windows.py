"""SPADE over a label by kinds of windows: the same function, undone for whoever wants a convolution."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from exported import CHANNELS, CLASSES, exported_stage, model_file
from onnx import ModelProto

from flashcocos.bundle import STAGES, Bundle, write_bundle
from flashcocos.errors import BundleError
from flashcocos.export.graphs import replace
from flashcocos.export.tensorrt.graphs import bundle_graph
from flashcocos.export.verify import verify
from flashcocos.export.windows import restore, share_windows

MakeBundle = Callable[..., Path]


def shared() -> ModelProto:
    model = exported_stage(CLASSES, "query")
    replace(model.graph, *share_windows(model.graph))
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: ModelProto, label: np.ndarray, output: str = "theta") -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run([output], {"label": label})[0]


def blocks(rng: np.random.Generator, batch: int, height: int, width: int) -> np.ndarray:
    return np.kron(rng.integers(0, 9, (batch, height // 16, width // 16)), np.ones((16, 16), int)).astype(np.uint8)


@pytest.mark.parametrize("kind", ["blocks", "noise", "one class"])
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 32, 32), (3, 64, 96)])
def test_equals_the_convolutions(rng: np.random.Generator, batch: int, height: int, width: int, kind: str) -> None:
    label = {
        "blocks": blocks(rng, batch, height, width),
        "noise": rng.integers(0, 256, (batch, height, width)).astype(np.uint8),
        "one class": np.full((batch, height, width), 3, np.uint8),
    }[kind]
    model = shared()
    products = [node for node in model.graph.node if node.op_type == "Gemm"]
    assert len(products) == 14  # scale and shift of seven norms
    expected, found = (run(graph, label) for graph in (exported_stage(CLASSES, "query"), model))
    # sums in another order: 5.3e-7 at most in 12 other labels
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_one_window_of_each_kind_is_computed(rng: np.random.Generator) -> None:
    label = blocks(rng, 2, 64, 96)
    some = np.pad(label[:, ::4, ::4], ((0, 0), (1, 1), (1, 1)), "reflect")
    inner = np.lib.stride_tricks.sliding_window_view(some, (3, 3), (1, 2)).reshape(*label[:, ::4, ::4].shape, 9)
    outer = np.pad(inner, ((0, 0), (1, 1), (1, 1), (0, 0)), "reflect")
    windows = np.lib.stride_tricks.sliding_window_view(outer, (3, 3), (1, 2)).reshape(-1, 81)
    kinds = len(np.unique(windows, axis=0))
    assert 9 < kinds < len(windows)
    model = shared()
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info("windows_taps"))
    assert run(model, label, "windows_taps").shape == (kinds, 9)


def test_restoring_gives_the_graph_back() -> None:
    model, before = shared(), exported_stage(CLASSES, "query")
    replace(model.graph, *restore(model.graph))
    assert [(node.op_type, *node.input) for node in model.graph.node] == [
        (node.op_type, *node.input) for node in before.graph.node
    ]
    assert list(model.graph.initializer) == list(before.graph.initializer)
    label = np.arange(32 * 32, dtype=np.uint8).reshape(1, 32, 32)
    np.testing.assert_array_equal(run(model, label), run(before, label))


def test_another_form_of_that_name_is_refused() -> None:
    model = shared()
    node = next(node for node in model.graph.node if node.output[0].startswith("windows_table_"))
    del node.input[2]
    with pytest.raises(BundleError, match="a form of windows that flashcocos does not write"):
        restore(model.graph)


@pytest.mark.parametrize("stage", STAGES)
def test_what_sees_more_than_the_label_stays(stage: str) -> None:
    for config in (CLASSES, CHANNELS):
        if (config, stage) != (CLASSES, "query"):
            graph = exported_stage(config, stage).graph
            nodes, initializers = share_windows(graph)
            assert (list(nodes), list(initializers)) == (list(graph.node), list(graph.initializer))


def test_bundles_have_it_and_tensorrt_and_openvino_do_not(make_bundle: MakeBundle, rng: np.random.Generator) -> None:
    bundle = Bundle(make_bundle(CLASSES))
    operators = [node.op_type for node in onnx.load_from_string(bundle.read_stage("query")).graph.node]
    assert operators.count("Unique") == 4
    assert "Unique" not in [node.op_type for node in bundle_graph(bundle, "query", "float32").graph.node]
    report = verify(bundle.path, model_file(CLASSES), sizes=[(64, 96)])
    assert report.ok, report.table()
    pytest.importorskip("openvino", reason="needs the extra openvino")
    from flashcocos.runtime.cpu.openvino import OpenVinoEngine

    label = blocks(rng, 2, 64, 96)
    found = OpenVinoEngine(bundle, "query", num_threads=1).run({"label": label})["theta"]
    expected = run(exported_stage(CLASSES, "query"), label)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_openvino_refuses_another_form_of_that_name(make_bundle: MakeBundle) -> None:
    pytest.importorskip("openvino", reason="needs the extra openvino")
    from flashcocos.runtime.cpu.openvino import OpenVinoEngine

    bundle = Bundle(make_bundle(CLASSES))
    files = {name: bundle.read(name) for name in bundle.manifest.files}
    files["query.onnx"] = files["query.onnx"].replace(b"windows_table_", b"windows_other_")
    changed = write_bundle(bundle.path.parent / "changed", bundle.manifest, files)
    with pytest.raises(BundleError, match="a convolution has a form that flashcocos does not write"):
        OpenVinoEngine(Bundle(changed), "query", num_threads=1)
