"""Changes to the graphs of a tiny bundle that every engine must refuse."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import onnx
from onnx import helper, numpy_helper


def external_data(stage: str, model: onnx.ModelProto) -> None:
    weights = model.graph.initializer[-1]
    weights.ClearField("raw_data")
    weights.data_location = onnx.TensorProto.EXTERNAL
    weights.external_data.add(key="location", value="secret.bin")


def external_data_in_branch(stage: str, model: onnx.ModelProto) -> None:
    """The place from which onnxruntime 1.18 and 1.32 do read a file, at full optimization."""
    tensor = onnx.TensorProto(name="bias", data_type=onnx.TensorProto.FLOAT, dims=[1])
    external_data(stage, SimpleNamespace(graph=SimpleNamespace(initializer=[tensor])))
    result = helper.make_tensor_value_info("o", onnx.TensorProto.FLOAT, [1])
    branch = helper.make_graph([helper.make_node("Identity", ["bias"], ["o"])], "b", [], [result], [tensor])
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    last = model.graph.node[-1]
    output, last.output[0] = last.output[0], "before"
    model.graph.node.append(helper.make_node("If", ["yes"], ["offset"], then_branch=branch, else_branch=branch))
    model.graph.node.append(helper.make_node("Add", ["before", "offset"], [output]))


def rename_output(stage: str, model: onnx.ModelProto) -> None:
    model.graph.output[0].name = model.graph.node[-1].output[0] = "other"


def retype_input(stage: str, model: onnx.ModelProto) -> None:
    model.graph.input[-1].type.tensor_type.elem_type = onnx.TensorProto.INT32
    model.graph.node.insert(0, helper.make_node("Cast", ["label"], ["as_uint8"], to=onnx.TensorProto.UINT8))
    for node in model.graph.node[1:]:
        node.input[:] = ["as_uint8" if name == "label" else name for name in node.input]


def fix_size(stage: str, model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 64


def custom_operator(stage: str, model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("evil", 1))
    model.graph.node[-1].domain = "evil"


# change of (stage, model), and what an engine says to it
HOSTILE = [
    (external_data, "lies in another file"),
    (external_data_in_branch, "lies in another file"),
    (rename_output, r"the manifest states the outputs .*theta.*the graph has .*other"),
    (retype_input, r"states the inputs .*uint8.*the graph has .*int32"),
    (fix_size, r"states the inputs .*None, None, None.*the graph has .*64"),
    (custom_operator, "cannot load the graph"),
]
