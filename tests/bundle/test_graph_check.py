"""Graphs that reach for files are refused before ONNX Runtime sees them, wherever the tensor hides."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from flashcocos.bundle import graph_check
from flashcocos.bundle.graph_check import refuse_external_data
from flashcocos.errors import BundleError


def external(location: str = "secret.bin") -> onnx.TensorProto:
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[4])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def model(nodes: list[onnx.NodeProto], initializers: list[onnx.TensorProto]) -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 4]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def branch(tensor: onnx.TensorProto) -> onnx.GraphProto:
    result = helper.make_tensor_value_info("o", onnx.TensorProto.FLOAT, [4])
    return helper.make_graph([helper.make_node("Identity", ["w"], ["o"])], "branch", [], [result], [tensor])


def hiding_places() -> dict[str, onnx.ModelProto]:
    add = helper.make_node("Add", ["x", "w"], ["y"])
    condition = numpy_helper.from_array(np.array(True), "c")
    sparse = onnx.SparseTensorProto(values=external(), dims=[4])
    in_function = model([helper.make_node("F", ["x"], ["y"], domain="own")], [])
    constant = helper.make_node("Constant", [], ["w"], value=external())
    opset = [helper.make_opsetid("", 20)]
    in_function.functions.append(helper.make_function("own", "F", ["x"], ["y"], [constant, add], opset))
    sparse_initializer = model([add], [])
    sparse_initializer.graph.sparse_initializer.append(sparse)
    training = model([add], [])
    training.training_info.add().algorithm.CopyFrom(branch(external()))
    choose = helper.make_node("If", ["c"], ["y"], then_branch=branch(external()), else_branch=branch(external()))
    many = helper.make_node("Add", ["x", "w"], ["y"])
    many.attribute.append(helper.make_attribute("t", [external()]))
    return {
        "initializer": model([add], [external()]),
        "constant": model([constant, add], []),
        "subgraph": model([choose], [condition]),
        "tensor list": model([many], []),
        "sparse initializer": sparse_initializer,
        "sparse constant": model([helper.make_node("Constant", [], ["w"], sparse_value=sparse), add], []),
        "function": in_function,
        "training": training,
    }


@pytest.mark.parametrize("place", hiding_places())
def test_external_tensor_is_refused_wherever_it_is(place: str) -> None:
    with pytest.raises(BundleError, match="lies in another file"):
        refuse_external_data(hiding_places()[place].SerializeToString(), "stage query")


def test_a_location_alone_is_refused() -> None:
    tensor = numpy_helper.from_array(np.zeros(4, np.float32), "w")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    with pytest.raises(BundleError, match="lies in another file"):
        refuse_external_data(model([helper.make_node("Add", ["x", "w"], ["y"])], [tensor]).SerializeToString(), "m")


def test_plain_models_pass() -> None:
    inside = numpy_helper.from_array(np.arange(4, dtype=np.float32), "w")
    refuse_external_data(model([helper.make_node("Add", ["x", "w"], ["y"])], [inside]).SerializeToString(), "m")
    inside.data_location = onnx.TensorProto.DEFAULT
    refuse_external_data(model([helper.make_node("Add", ["x", "w"], ["y"])], [inside]).SerializeToString(), "m")


@pytest.mark.parametrize(
    "content",
    [
        b"\x0b",  # a group
        bytes(1 << 20),  # field number 0, which does not exist
        b"\x3a\x7f\x00",  # a length beyond the end
        b"\x3d\x00",  # a fixed 32-bit number cut short
        b"\xff" * 11,  # a number without an end
        b"\xba\x80\x80\x80\x10\x00",  # field 7 with a bit above 32, which some parsers drop
        b"\x3a\x80",  # a length cut short
    ],
)
def test_broken_encodings_are_refused(content: bytes) -> None:
    with pytest.raises(BundleError, match="not a readable ONNX file"):
        refuse_external_data(content, "m")


def test_endless_fields_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_check, "_MAX_FIELDS", 100)
    refuse_external_data(b"\x08\x01" * 100, "m")
    for content in (b"\x08\x01" * 101, b"\x3a\x02\x08\x01" * 51):  # of the model, and of its graphs
        with pytest.raises(BundleError, match="more than 100 fields"):
            refuse_external_data(content, "m")


def test_endless_nesting_is_refused() -> None:
    graph = b""
    for _ in range(60):  # graph { node { attribute { g { ... } } } }
        for field in (6, 5, 1):
            size, length = len(graph), b""
            while size > 0x7F:
                length, size = length + bytes([size & 0x7F | 0x80]), size >> 7
            graph = bytes([field << 3 | 2]) + length + bytes([size]) + graph
    refused = helper.make_model(helper.make_graph([], "g", [], [])).SerializeToString()
    with pytest.raises(BundleError, match="nested"):
        refuse_external_data(refused + b"\x3a" + bytes([len(graph) & 0x7F | 0x80, len(graph) >> 7]) + graph, "m")


def test_the_table_has_every_way_to_a_tensor() -> None:
    """The table of fields against onnx's own description of its messages, so that a new field cannot be missed."""
    reached: dict[str, dict[int, str]] = {}
    waiting = [onnx.ModelProto.DESCRIPTOR]
    while waiting:
        message = waiting.pop()
        if message.name not in reached:
            children = {field.number: field.message_type for field in message.fields if field.message_type}
            reached[message.name] = {number: child.name for number, child in children.items()}
            waiting += children.values()
    leads = {"TensorProto"}  # messages from which a tensor can be reached
    while grown := {kind for kind, fields in reached.items() if leads & set(fields.values())} - leads:
        leads |= grown
    expected = {kind: {number: child for number, child in reached[kind].items() if child in leads} for kind in leads}
    assert expected == graph_check._CHILDREN
    numbers = {field.name: field.number for field in onnx.TensorProto.DESCRIPTOR.fields}
    assert (numbers["external_data"], numbers["data_location"]) == (13, 14)
