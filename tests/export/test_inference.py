"""Stages as modules: the classes that occur stand for all, and the attention's loop for its matrix."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from exported import CHANNELS, CLASSES, seeded_model
from onnx import ModelProto, TensorProto, helper

from flashcocos.config import ModelConfig
from flashcocos.errors import BundleError
from flashcocos.export.inference import ATTENTION_ROWS, loop_attention, stage_module


@pytest.mark.parametrize("ids", [(7,), (0, 3, 11), tuple(range(12))], ids=["one", "some", "all"])
@pytest.mark.parametrize(("skip", "stride"), [(False, 4), (True, 4), (True, 2)], ids=["plain", "skip", "fine"])
def test_the_classes_that_occur_give_what_all_give(ids: tuple[int, ...], skip: bool, stride: int) -> None:
    model = seeded_model(ModelConfig.preset("tiny", warp_residual=skip, warp_stride=stride)).double()
    generator = torch.Generator().manual_seed(0)
    label = torch.tensor(ids, dtype=torch.uint8)[torch.randint(0, len(ids), (2, 64, 96), generator=generator)]
    warped = torch.rand(2, 3, 64 // stride, 96 // stride, generator=generator).double()
    seen: list[int] = []
    query, coarse, fine = (stage_module(model, stage) for stage in ("query", "coarse", "fine"))
    for stage in (query, coarse, fine):
        for module in stage.modules():
            if type(module).__name__ == "_PresentConv2d":
                module.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    with torch.inference_mode():
        torch.testing.assert_close(query(label), model.encode_query(label), rtol=0, atol=1e-12)
        picture = torch.rand(2, 3, 64, 96, generator=generator).double()
        expected_phi, expected_values = model.encode_exemplar(picture, label)
        phi, values = stage_module(model, "exemplar")(picture, label)
        torch.testing.assert_close(phi, expected_phi, rtol=0, atol=1e-12)
        assert torch.equal(values, expected_values)
        features, *means = coarse(warped, label)
        made = fine(features, warped, label, *means)
        for found, expected in zip(made, model.synthesize(warped, label), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    planes = len({0, *ids})
    others = 6 if skip else 3
    # the adaptor's first convolution and seven conditions, the detail's first; the generator's first and its eighteen
    assert seen == [planes] * (8 if stride == 4 else 9) + [others + planes] * 19


def test_stages_share_the_weights_and_leave_the_model_as_it_was() -> None:
    model = seeded_model(CLASSES)
    names = [name for name, _ in model.named_modules()]
    stage = stage_module(model, "fine")
    assert [name for name, _ in model.named_modules()] == names
    assert {id(p) for p in stage.parameters()} == {id(p) for p in model.parameters()}


def test_planes_are_taken_as_they_are() -> None:
    model = seeded_model(CHANNELS).double()
    stage = stage_module(model, "query")
    assert not any(type(module).__name__ == "_PresentConv2d" for module in stage.modules())
    label = torch.rand(1, 5, 64, 64).double()
    with torch.inference_mode():
        torch.testing.assert_close(stage(label), model.encode_query(label), rtol=1e-9, atol=1e-9)


def attention_model(*operators: str) -> ModelProto:
    chains = {"MatMul": ["query", "key"], "Softmax": ["scores"]}
    nodes = [
        helper.make_node(operators[0], chains["MatMul"], ["scores"]),
        helper.make_node(operators[1], ["scores"], ["weights"]),
        helper.make_node(operators[2], ["weights", "value"], ["out"]),
    ]
    shapes = {"query": ["b", "n", 4], "key": ["b", 4, "m"], "value": ["b", "m", 6]}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["b", "n", 6])
    graph = helper.make_graph(nodes, "attention", inputs, [out])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize(("batch", "parts", "keys"), [(1, 1, 1), (3, 5, 17), (2, 1, 8193), (1, 1, 32769)])
def test_the_loop_gives_what_the_matrix_gives(batch: int, parts: int, keys: int, rng: np.random.Generator) -> None:
    whole, looped = (attention_model("MatMul", "Softmax", "MatMul") for _ in range(2))
    nodes, initializers = loop_attention(looped.graph)
    graph = helper.make_graph(nodes, "loop", looped.graph.input, looped.graph.output, initializers)
    looped = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    shapes = {"query": (batch, parts * ATTENTION_ROWS, 4), "key": (batch, 4, keys), "value": (batch, keys, 6)}
    inputs = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    expected, found = (
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, inputs)[0]
        for model in (whole, looped)
    )
    assert "Loop" in {node.op_type for node in looped.graph.node}
    looped.graph.output.append(helper.make_tensor_value_info("attention_steps", TensorProto.INT64, []))
    session = onnxruntime.InferenceSession(looped.SerializeToString(), providers=["CPUExecutionProvider"])
    rows = 32 if keys > 32768 else 64 if keys > 8192 else 256
    assert session.run(["attention_steps"], inputs)[0] == parts * ATTENTION_ROWS // rows
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("operators", [("MatMul", "Tanh", "MatMul"), ("Add", "Softmax", "MatMul")])
def test_another_attention_is_refused(operators: tuple[str, ...]) -> None:
    with pytest.raises(BundleError, match="self-attention"):
        loop_attention(attention_model(*operators).graph)
