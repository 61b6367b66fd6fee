"""The graphs that TensorRT is given: the bundle's own function, in other forms and declared types."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from exported import CHANNELS, CLASSES, exported_stage

from flashcocos.bundle import STAGES, Bundle
from flashcocos.bundle.default_model import resolve_model
from flashcocos.bundle.stages import axis_sizes, concrete_shape, stage_inputs, stage_tensors
from flashcocos.errors import BackendError, BundleError
from flashcocos.export.tensorrt import check
from flashcocos.export.tensorrt.check import agreement, require_agreement
from flashcocos.export.tensorrt.graphs import tensorrt_graph
from flashcocos.export.verify import random_inputs
from flashcocos.preprocess.images import to_uint8

CONFIGS = [pytest.param(CLASSES, id="classes"), pytest.param(CHANNELS, id="channels")]
HALF, SINGLE = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT


def rewritten(config, stage, half):
    classes = config.label_channels if config.label_kind == "classes" else 0
    return tensorrt_graph(exported_stage(config, stage).SerializeToString(), stage, classes=classes, half=half)


def run(graph, feeds):
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def feeds_of(config, stage, rng, size=(64, 96)):
    inputs = random_inputs(config, size, 2)
    sizes = axis_sizes(config, 2, *size)
    for tensor in stage_tensors(config)[stage][0]:
        if tensor.name not in inputs:
            inputs[tensor.name] = rng.uniform(-1, 1, concrete_shape(tensor, sizes)).astype(np.float32)
    return stage_inputs(config, stage, inputs)


def types_of(graph):
    """Name -> element type of every tensor."""
    inferred = onnx.shape_inference.infer_shapes(graph).graph
    known = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.input)}
    return known | {tensor.name: tensor.data_type for tensor in inferred.initializer}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("stage", STAGES)
def test_float32_is_the_function_of_the_bundle(config, stage, rng):
    feeds = feeds_of(config, stage, rng)
    expected, found = run(exported_stage(config, stage), feeds), run(rewritten(config, stage, half=False), feeds)
    if stage == "fine":
        assert found.pop("invalid") == 0
        for name, planes in expected.items():
            pictures = np.stack([to_uint8(one) for one in planes])
            assert found[name].dtype == np.uint8
            # a rounding of float32 may fall on the other side of a half; the warped picture has the same operators
            assert np.abs(found[name].astype(int) - pictures).max() <= (name == "image")
    else:
        assert found.keys() == expected.keys()
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=2e-5 * np.abs(expected[name]).max())


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("stage", STAGES)
def test_the_forms_are_those_that_tensorrt_takes(config, stage):
    graph = rewritten(config, stage, half=True).graph
    operators = {node.op_type for node in graph.node}
    assert not operators & {"Loop", "NonZero", "ScatterElements"}
    constants = {tensor.name for tensor in graph.initializer}
    assert all(node.input[1] in constants for node in graph.node if node.op_type == "Conv")
    readers = {node.op_type for node in graph.node if "label" in node.input and config.label_kind == "classes"}
    assert readers <= {"Cast", "Shape"}


def test_the_fused_attention_has_heads_of_equal_sizes():
    """TensorRT fuses MatMul, Softmax, MatMul over (B, heads, N, D) in float16 only where D is that of the values."""
    graph = rewritten(CLASSES, "coarse", half=True)
    inferred = onnx.shape_inference.infer_shapes(graph)
    shapes = {value.name: value.type.tensor_type.shape.dim for value in inferred.graph.value_info}
    (softmax,) = (node for node in graph.graph.node if node.op_type == "Softmax")
    (scores,) = (node for node in graph.graph.node if softmax.input[0] in node.output)
    (product,) = (node for node in graph.graph.node if softmax.output[0] in node.input)
    query, key, value = (shapes[name] for name in (*scores.input, product.input[1]))
    assert [len(side) for side in (query, key, value)] == [4, 4, 4]
    width = 2 * CLASSES.ngf
    assert query[3].dim_value == key[2].dim_value == value[3].dim_value == width
    types = types_of(graph)
    assert {types[name] for name in (*scores.input, *product.input)} == {HALF}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("stage", STAGES)
def test_float16_is_declared_with_islands_of_float32(config, stage):
    graph = rewritten(config, stage, half=True)
    types = types_of(graph)
    for node in graph.graph.node:
        kinds = {types[name] for name in node.input if types.get(name) in (HALF, SINGLE)}
        if node.op_type == "Conv":
            assert kinds == {HALF}, node.name
        if node.op_type in ("ReduceMean", "ReduceSum", "Sqrt", "Div", "InstanceNormalization", "ReduceL2", "Tanh"):
            assert kinds <= {SINGLE}, node.name
    assert {types[node.input[1]] for node in graph.graph.node if node.op_type == "Conv"} == {HALF}
    float32 = rewritten(config, stage, half=False)
    assert not [t for t in float32.graph.initializer if t.data_type == HALF]
    assert [i.type for i in graph.graph.input] == [i.type for i in float32.graph.input]
    assert [o.type for o in graph.graph.output] == [o.type for o in float32.graph.output]


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_the_shipped_model_keeps_its_picture(precision):
    found = agreement(Bundle(resolve_model()), precision, 128)
    print(f"{precision}: {found:.1f} dB")
    assert found >= check.MIN_PSNR[precision]


def test_too_little_agreement_is_refused(monkeypatch):
    monkeypatch.setitem(check.MIN_PSNR, "float16", 200.0)
    with pytest.raises(BackendError, match=r"float16 gives \d+\.\d dB .* expected 200 or more; use precision float32"):
        require_agreement(Bundle(resolve_model()), "float16", 64)


def test_features_beyond_float16_are_refused(monkeypatch):
    """The graphs hold them in float32; the warp's kernels read them in float16."""
    run_graph = check._run

    def enlarged(graph, feeds):
        return {name: x * (1e6 if name == "phi" else 1) for name, x in run_graph(graph, feeds).items()}

    monkeypatch.setattr(check, "_run", enlarged)
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(BackendError, match=r"gives NaN in float16: .*features"),
    ):
        agreement(Bundle(resolve_model()), "float16", 64)


def test_nan_is_flagged(rng):
    graph = rewritten(CLASSES, "fine", half=False)
    bias = next(t for t in graph.graph.initializer if t.name.endswith("last.bias"))
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(bias.dims, np.nan, np.float32), bias.name))
    assert run(graph, feeds_of(CLASSES, "fine", rng))["invalid"] == 1


def test_weights_beyond_float16_are_refused():
    graph = exported_stage(CLASSES, "query")
    tensor = next(t for t in graph.graph.initializer if len(t.dims) == 4)
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(tensor.dims, 1e6, np.float32), tensor.name))
    with pytest.raises(BundleError, match=r"weights up to 1e\+06 do not fit float16"):
        tensorrt_graph(graph.SerializeToString(), "query", classes=CLASSES.label_channels, half=True)


def test_a_graph_of_another_form_is_refused():
    graph = exported_stage(CLASSES, "coarse")
    body = next(node for node in graph.graph.node if node.op_type == "Loop").attribute[0].g
    body.node[-1].op_type = "Add"
    with pytest.raises(BundleError, match="cannot be rewritten for TensorRT"):
        tensorrt_graph(graph.SerializeToString(), "coarse", classes=CLASSES.label_channels, half=False)
    with pytest.raises(BundleError, match="cannot be rewritten for TensorRT"):
        tensorrt_graph(b"no graph", "query", classes=1, half=False)
