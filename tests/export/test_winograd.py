"""Convolutions in Winograd's form: the same function, undone for whoever has a better one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from exported import CLASSES, exported_stage, model_file
from onnx import ModelProto, TensorProto, helper, numpy_helper

from flashcocos.bundle import Bundle
from flashcocos.errors import BundleError
from flashcocos.export import winograd as module
from flashcocos.export.graphs import replace
from flashcocos.export.tensorrt.graphs import bundle_graph
from flashcocos.export.verify import random_inputs, verify
from flashcocos.export.winograd import restore, winograd

MakeBundle = Callable[..., Path]
IN, OUT = 8, 7
ENCODERS = ("query", "exemplar")


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of a test have no wide convolutions."""
    monkeypatch.setattr(module, "LEAST_CHANNELS", IN)


def convolution(
    rng: np.random.Generator, *, kernel: int = 3, stride: int = 1, pad: int = 1, bias: bool = True, group: int = 1
) -> ModelProto:
    """x (B, IN, H, W) -> y, by one convolution of random weights."""
    weights = {"weight": rng.standard_normal((OUT * group, IN // group, kernel, kernel), np.float32)}
    weights |= {"bias": rng.standard_normal(OUT * group, np.float32)} if bias else {}
    attributes = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [pad] * 4, "dilations": [1, 1]}
    nodes = [helper.make_node("Conv", ["x", *weights], ["y"], "node_y", group=group, **attributes)]
    tensors = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", IN, "H", "W"])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", OUT * group, "h", "w"])]
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "test", tensors, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model: ModelProto, x: np.ndarray) -> np.ndarray:
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def kinds(model: ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("pad", [0, 1])
@pytest.mark.parametrize("sides", [(4, 4), (8, 12), (64, 4)])
@pytest.mark.parametrize("batch", [1, 3])
def test_equals_the_convolution(
    rng: np.random.Generator, batch: int, sides: tuple[int, int], pad: int, bias: bool
) -> None:
    model = convolution(rng, pad=pad, bias=bias)
    x = rng.standard_normal((batch, IN, *(side + 2 - 2 * pad for side in sides)), np.float32)
    expected = run(model, x)
    replace(model.graph, *winograd(model.graph))
    assert "DepthToSpace" in kinds(model)
    found = run(model, x)
    assert found.shape == (batch, OUT, *sides)
    # numbers grow up to a hundredfold between the transformations: 5.2e-6 at most in 360 other draws
    np.testing.assert_allclose(found, expected, rtol=0, atol=8e-6 * np.abs(expected).max())
    replace(model.graph, *restore(model.graph))
    assert kinds(model) == ["Conv"]
    assert not [tensor for tensor in model.graph.initializer if tensor.name not in ("weight", "bias")]
    np.testing.assert_array_equal(run(model, x), expected)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("options", [{"kernel": 1, "pad": 0}, {"stride": 2}, {"group": 2}])
def test_other_convolutions_stay(rng: np.random.Generator, options: dict[str, int]) -> None:
    model = convolution(rng, **options)
    assert [node.op_type for node in winograd(model.graph)[0]] == ["Conv"]


def test_narrow_convolutions_stay(rng: np.random.Generator) -> None:
    model = convolution(rng)
    nodes, initializers = winograd(model.graph)
    assert (list(nodes), list(initializers)) == (list(model.graph.node), list(model.graph.initializer))


@pytest.mark.usefixtures("narrow")
def test_another_form_of_that_name_is_refused(rng: np.random.Generator) -> None:
    model = convolution(rng)
    replace(model.graph, *winograd(model.graph))
    next(node for node in model.graph.node if node.name == "winograd_weight_y").name = "winograd_other_y"
    with pytest.raises(BundleError, match="y: a Winograd form that flashcocos does not write"):
        restore(model.graph)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_bundles_have_it_and_it_is_verified(make_bundle: MakeBundle, precision: str) -> None:
    bundle = Bundle(make_bundle(CLASSES, precision=precision))
    for stage in bundle.manifest.stages:
        graph = onnx.load_from_string(bundle.read_stage(stage))
        assert ("DepthToSpace" in kinds(graph)) == (stage in ENCODERS)
    report = verify(bundle.path, model_file(CLASSES), sizes=[(64, 96)])
    assert report.ok, report.table()


@pytest.mark.usefixtures("narrow")
def test_an_option_leaves_it_out(make_bundle: MakeBundle) -> None:
    bundle = Bundle(make_bundle(CLASSES, plain=True))
    for stage in ENCODERS:
        assert onnx.load_from_string(bundle.read_stage(stage)) == exported_stage(CLASSES, stage)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("stage", ENCODERS)
def test_tensorrt_and_openvino_get_plain_convolutions(
    make_bundle: MakeBundle, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = Bundle(make_bundle(CLASSES, "written"))
    plain = Bundle(make_bundle(CLASSES, "plain", plain=True))
    graphs = [bundle_graph(bundle, stage, "float32") for bundle in (written, plain)]
    assert sorted(kinds(graphs[0])) == sorted(kinds(graphs[1]))
    pytest.importorskip("openvino", reason="needs the extra openvino")
    from flashcocos.runtime.cpu.openvino import OpenVinoEngine

    inputs = random_inputs(CLASSES, (64, 96), 2)
    feeds = {"label": inputs["label"]}
    if stage == "exemplar":
        feeds = {"label": inputs["exemplar_label"], "image": inputs["image"]}
    engines = [OpenVinoEngine(bundle, stage, num_threads=1) for bundle in (written, plain)]
    found, expected = (engine.run(feeds) for engine in engines)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.usefixtures("narrow")
def test_a_runtime_does_not_fold_the_weights(rng: np.random.Generator, tmp_path: Path) -> None:
    model = convolution(rng)
    replace(model.graph, *winograd(model.graph))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    sizes = [np.prod(tensor.dims) for tensor in onnx.load(tmp_path / "optimized.onnx").graph.initializer]
    assert OUT * IN * 36 not in sizes
    assert OUT * IN * 9 in sizes
