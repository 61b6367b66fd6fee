"""The stage graphs: what they take and give, what they must not hold, and that they equal the network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from exported import CHANNELS, CLASSES, exported_stage, model_file
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor

from flashcocos.bundle import STAGES, TensorSpec
from flashcocos.bundle.stages import axis_sizes, concrete_shape, stage_tensors
from flashcocos.config import ModelConfig
from flashcocos.errors import BundleError, InputError
from flashcocos.export.graphs import (
    FLOAT16_THRESHOLD,
    OPSET,
    RANDOM,
    all_nodes,
    check_graph,
    export_stage,
    renamed,
    store_float16,
)
from flashcocos.export.verify import random_inputs
from flashcocos.train.checkpoint import load_model
from flashcocos.train.networks import CoCosNet
from flashcocos.train.networks.generator import class_means
from flashcocos.train.networks.layers import subsample

CONFIGS = {"classes": CLASSES, "channels": CHANNELS}
IMAGE, HALF, MAP = ("height", "width"), ("half_height", "half_width"), ("h", "w")
PINNED: dict[str, dict[str, list[tuple[Any, ...]]]] = {
    "classes": {
        "query": [("label", "uint8", "batch", *IMAGE), ("theta", "float32", "batch", 16, *MAP)],
        "exemplar": [
            ("image", "float32", "batch", 3, *IMAGE),
            ("label", "uint8", "batch", *IMAGE),
            ("phi", "float32", "batch", 16, *MAP),
            ("values", "float32", "batch", 3, *MAP),
        ],
        "coarse": [
            ("warped", "float32", "batch", 3, *MAP),
            ("label", "uint8", "batch", *IMAGE),
            ("features", "float32", "batch", 16, *HALF),
        ],
        "fine": [
            ("features", "float32", "batch", 16, *HALF),
            ("warped", "float32", "batch", 3, *MAP),
            ("label", "uint8", "batch", *IMAGE),
            ("image", "float32", "batch", 3, *IMAGE),
            ("warped_image", "float32", "batch", 3, *IMAGE),
        ],
    },
    "channels": {
        "query": [("label", "float32", "batch", 5, *IMAGE), ("theta", "float32", "batch", 16, *MAP)],
        "exemplar": [
            ("image", "float32", "batch", 3, *IMAGE),
            ("phi", "float32", "batch", 16, *MAP),
            ("values", "float32", "batch", 48, *MAP),
        ],
        "coarse": [
            ("warped", "float32", "batch", 48, *MAP),
            ("label", "float32", "batch", 5, *IMAGE),
            ("features", "float32", "batch", 16, *HALF),
            ("means", "float32", "batch", 5, 3),
        ],
        "fine": [
            ("features", "float32", "batch", 16, *HALF),
            ("warped", "float32", "batch", 48, *MAP),
            ("label", "float32", "batch", 5, *IMAGE),
            ("means", "float32", "batch", 5, 3),
            ("image", "float32", "batch", 3, *IMAGE),
            ("warped_image", "float32", "batch", 3, *IMAGE),
        ],
    },
}


def session(model: ModelProto) -> onnxruntime.InferenceSession:
    made = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert made.get_providers() == ["CPUExecutionProvider"]
    return made


def stage_inputs(
    config: ModelConfig, stage: str, size: tuple[int, int], batch: int
) -> dict[str, npt.NDArray[np.generic]]:
    """Inputs of `stage`, in the order of its graph."""
    inputs = random_inputs(config, size, batch)
    inputs["image"] = random_inputs(config, size[::-1], batch)["image"]  # of the label's size: (height, width)
    rng, sizes = np.random.default_rng(1), axis_sizes(config, batch, *size)
    for tensor in (*stage_tensors(config)["coarse"][0], *stage_tensors(config)["fine"][0]):
        if tensor.name not in inputs:
            inputs[tensor.name] = rng.uniform(-1, 1, concrete_shape(tensor, sizes)).astype(np.float32)
    return {tensor.name: inputs[tensor.name] for tensor in stage_tensors(config)[stage][0]}


def network_of(model: CoCosNet, stage: str) -> Callable[..., Any]:
    """What a stage computes, with all label planes and in PyTorch."""
    generator = model.generator

    def condition(warped: Tensor, label: Tensor, means: Tensor | None, step: int) -> Tensor:
        planes = model.label_planes(label)
        return generator.condition(subsample(model.upsample_warp(warped), step), subsample(planes, step), means)

    def coarse(warped: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        means = class_means(model.upsample_warp(warped), model.label_planes(label)) if generator.warp_residual else None
        features = generator.coarse(condition(warped, label, means, 4))
        return (features,) if means is None else (features, means)

    def fine(features: Tensor, warped: Tensor, label: Tensor, means: Tensor | None = None) -> tuple[Tensor, ...]:
        return generator.fine(features, condition(warped, label, means, 1)), model.upsample_warp(warped)

    return {"query": model.encode_query, "exemplar": model.encode_exemplar, "coarse": coarse, "fine": fine}[stage]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_names_types_and_axes_are_pinned(kind: str, stage: str) -> None:
    graph = exported_stage(CONFIGS[kind], stage).graph
    found = []
    for info in (*graph.input, *graph.output):
        tensor = info.type.tensor_type
        dtype = {TensorProto.FLOAT: "float32", TensorProto.UINT8: "uint8"}[tensor.elem_type]
        found.append((info.name, dtype, *(side.dim_param or side.dim_value for side in tensor.shape.dim)))
    assert found == PINNED[kind][stage]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_only_standard_operators_and_nothing_of_this_machine(kind: str, stage: str) -> None:
    model = exported_stage(CONFIGS[kind], stage)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    operators = {node.op_type for node in all_nodes(model.graph)}
    assert {node.domain for node in all_nodes(model.graph)} == {""}
    assert "Conv" in operators
    assert not operators & RANDOM
    with_graph = [node for node in model.graph.node if any(attribute.HasField("g") for attribute in node.attribute)]
    # the self-attention, and nothing else, runs in a loop
    assert [node.op_type for node in with_graph] == ["Loop"] * (stage == "coarse" and CONFIGS[kind].attention)
    content = model.SerializeToString()
    for trace in (b".py", b"site-packages", str(Path.home()).encode(), b"stack_trace"):
        assert trace not in content


@pytest.mark.parametrize("stage", STAGES)
def test_only_a_cast_reads_the_class_ids(stage: str) -> None:
    readers = [node for node in exported_stage(CLASSES, stage).graph.node if "label" in node.input]
    assert {node.op_type for node in readers} <= {"Cast", "Shape"}
    assert sum(node.op_type == "Cast" for node in readers) == 1


@pytest.mark.parametrize(("size", "batch"), [((64, 64), 1), ((96, 160), 3)], ids=["64x64x1", "96x160x3"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_equals_the_network_at_sizes_that_were_not_traced(
    kind: str, stage: str, size: tuple[int, int], batch: int
) -> None:
    config = CONFIGS[kind]
    model = load_model(model_file(config)).double()  # so that the error is the graph's alone, on every processor
    network = network_of(model, stage)
    inputs = stage_inputs(config, stage, size, batch)
    tensors = [torch.from_numpy(array) for array in inputs.values()]
    with torch.inference_mode():
        expected = network(*(tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors))
    expected = expected if isinstance(expected, tuple) else (expected,)
    found = session(exported_stage(config, stage)).run(None, inputs)
    assert len(found) == len(expected)
    for actual, tensor in zip(found, expected, strict=True):
        reference = tensor.numpy()
        assert actual.shape == reference.shape
        assert reference.std() > 0.001  # something to compare: means of noise are the least
        # float32 sums in another order, through some twenty normalized layers; features of noise are normalized worst
        bound = 3e-5 if stage == "fine" else 2e-5
        np.testing.assert_allclose(actual, reference, rtol=0, atol=bound * np.abs(reference).max())


def test_an_id_outside_the_classes_belongs_to_none() -> None:
    label = np.full((1, 64, 64), CLASSES.label_channels, np.uint8)
    label[:, 20:40] = 3
    planes = torch.zeros(1, CLASSES.label_channels, 64, 64)
    planes[:, 3, 20:40] = 1
    with torch.inference_mode():
        expected = load_model(model_file(CLASSES)).encode_query(planes).numpy()
    found = session(exported_stage(CLASSES, "query")).run(None, {"label": label})[0]
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def test_exporting_again_gives_the_same_bytes() -> None:
    again = export_stage(load_model(model_file(CHANNELS)), "fine")  # which is exported fastest
    once = exported_stage(CHANNELS, "fine")
    assert again.SerializeToString(deterministic=True) == once.SerializeToString(deterministic=True)


def relu_model(*, domain: str = "", opset: int = OPSET, operator: str = "Relu") -> ModelProto:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node(operator, ["x"], ["y"], domain=domain)], "g", values[:1], values[1:])
    imports = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def tensor(name: str, *shape: int | str, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name, dtype, shape)


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (relu_model(operator="NoSuchOperator"), [tensor("x", "batch", 3)], "not a valid ONNX model"),
        (relu_model(opset=18), [tensor("x", "batch", 3)], "opset 20 alone"),
        (relu_model(domain="com.example"), [tensor("x", "batch", 3)], "opset 20 alone"),
        (relu_model(operator="RandomNormalLike"), [tensor("x", "batch", 3)], "RandomNormalLike are random"),
        (relu_model(), [tensor("renamed", "batch", 3)], r"expected the inputs renamed float \(batch, 3\), got x"),
        (relu_model(), [tensor("x", "batch", 4)], r"got x float \(batch, 3\)"),
        (relu_model(), [tensor("x", "batch", 3, dtype="uint8")], "x uint8"),
    ],
    ids=["operator", "opset", "domain", "random", "name", "shape", "dtype"],
)
def test_a_graph_that_is_not_as_it_should_be(model: ModelProto, inputs: list[TensorSpec], message: str) -> None:
    outputs = [tensor("y", "batch", 3)]
    check_graph(relu_model(), "g", [tensor("x", "batch", 3)], outputs)
    with pytest.raises(BundleError, match=message):
        check_graph(model, "g", inputs, outputs)


def test_float16_halves_the_weights_and_rounds_each_once() -> None:
    exact = exported_stage(CLASSES, "coarse")
    half = exported_stage(CLASSES, "coarse")
    store_float16(half)
    check_graph(half, "coarse", *stage_tensors(CLASSES)["coarse"])
    assert half.ByteSize() < 0.6 * exact.ByteSize()
    stored = {t.name: t for t in half.graph.initializer}
    casts = {node.output[0]: node.input[0] for node in half.graph.node if node.name.startswith("cast_")}
    assert casts
    for weight in exact.graph.initializer:
        array = numpy_helper.to_array(weight)
        if array.dtype != np.float32 or array.size < FLOAT16_THRESHOLD:
            assert np.array_equal(numpy_helper.to_array(stored[weight.name]), array)
            continue
        rounded = numpy_helper.to_array(stored[casts[weight.name]])
        assert rounded.dtype == np.float16
        assert np.all(np.abs(rounded.astype(np.float32) - array) <= np.abs(array) * 2.0**-11 + 2.0**-25)


def test_float16_computes_in_float32() -> None:
    half = exported_stage(CLASSES, "query")
    store_float16(half)
    rounded = load_model(model_file(CLASSES))
    with torch.no_grad():
        for parameter in rounded.parameters():
            if parameter.numel() >= FLOAT16_THRESHOLD:
                parameter.copy_(parameter.half())
    inputs = stage_inputs(CLASSES, "query", (64, 96), 2)
    with torch.inference_mode():
        expected = rounded.encode_query(torch.from_numpy(inputs["label"])).numpy()
    found = session(half).run(None, inputs)[0]
    # as tight as float32 weights: only the stored values differ
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("value", [7e4, -7e4, np.inf, np.nan])
def test_weights_outside_float16_are_refused(value: float) -> None:
    array = np.zeros(FLOAT16_THRESHOLD, np.float32)
    array[5] = value
    model = relu_model()
    model.graph.initializer.append(numpy_helper.from_array(array, "large.weight"))
    with pytest.raises(InputError, match=r"large\.weight.*float16.*precision=\"float32\""):
        store_float16(model)


def test_renamed_leaves_omitted_inputs_omitted() -> None:
    node = helper.make_node("Resize", ["x", "", "scales"], ["y"], "resize")
    graph = helper.make_graph([node], "g", [], [], [numpy_helper.from_array(np.ones(4, np.float32), "scales")])
    nodes, weights = renamed(graph, "stage/", {"x": "image"})
    assert (nodes[0].name, list(nodes[0].input), list(nodes[0].output)) == (
        "stage/resize", ["image", "", "stage/scales"], ["stage/y"]
    )  # fmt: skip
    assert weights[0].name == "stage/scales"
    assert graph.node[0].input[0] == "x"  # the original is as it was


def test_the_checker_is_the_full_one() -> None:
    model = relu_model()
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.INT64  # only shape inference can tell
    with pytest.raises(BundleError, match="not a valid ONNX model"):
        check_graph(model, "g", [tensor("x", "batch", 3)], [tensor("y", "batch", 3)])
