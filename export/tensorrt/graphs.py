"""A bundle's graphs as TensorRT takes them: the same function in the forms that it fuses, in the types it is to use.

What the graphs of a bundle do to save work on a CPU is put back, for TensorRT wants shapes that no run changes:

    classes that occur      NonZero of the classes in a label -> all classes, and their weights are constants again
    self-attention in rows  Loop -> MatMul, Softmax, MatMul over one head of equal sizes, the form of its fused kernel:
                            query and key are padded with zeros to the values' width, which adds nothing to a product
    wide convolutions       Winograd's form -> Conv, for which TensorRT has kernels of its own
    SPADE over a label      product over the windows that differ -> Conv, for their number is the label's
    sums over channels      product with a row of one number -> ReduceSum, which it joins with what is around
    pictures                image and warped_image leave as uint8 (batch, height, width, 3), rounded as `to_uint8` does,
                            with `invalid`, 1 where the network gave NaN: nothing else has to cross the bus

`float16` is declared here, tensor by tensor, and a strongly typed network keeps it: convolutions, attention and what
joins them are half; statistics stay single, for they square and sum (positional and instance norm, the vectors' lengths
with their epsilon of 2e-16, mean colors), and so do the final tanh and every input and output. What is int8 in a
bundle of `flashcocos quantize` stays so, but for the results of its convolutions (`tensorrt_int8`).

The graph's function is unchanged otherwise; tests run both forms in ONNX Runtime and compare.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from ...bundle import Bundle
from ...bundle.graph_check import refuse_external_data
from ...errors import BundleError
from ..graphs import fold_constants, replace
from ..windows import restore as restore_windows
from ..winograd import restore
from .int8 import is_quantized, prepare_int8

# they square, sum, divide or end the network: float32 at any precision
_SINGLE = {
    "AveragePool", "Clip", "Cos", "Div", "GlobalAveragePool", "InstanceNormalization", "IsNaN", "MatMul", "Max", "Pow",
    "ReduceL2", "ReduceMax", "ReduceMean", "ReduceSum", "Round", "Sigmoid", "Sin", "Sqrt", "Sub", "Tanh",
}  # fmt: skip
_HALF = {"Conv", "ConvTranspose", "Softmax"}
_ATTENTION = "attention_"  # begins the names of the fused attention's nodes, whose products are half too
_DATA_INPUTS = {"Resize": 1}  # operator -> how many of its inputs are data; the others keep their type
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def bundle_graph(bundle: Bundle, stage: str, precision: str, *, pack: bool = True) -> onnx.ModelProto:
    """`tensorrt_graph` of a stage of `bundle` in `precision`, "float32" or "float16"."""
    config = bundle.manifest.config
    classes = config.label_channels if config.label_kind == "classes" else 0
    graph = bundle.read_stage(stage)
    refuse_external_data(graph, f"{bundle.path}: stage {stage}")
    return tensorrt_graph(graph, stage, classes=classes, half=precision == "float16", pack=pack)


def tensorrt_graph(graph: bytes, stage: str, *, classes: int, half: bool, pack: bool = True) -> onnx.ModelProto:
    """The graph of `stage`, a serialized ONNX file of a bundle, rewritten; inputs keep their names, types and shapes.

    classes: of the label, 0 for one of planes. half: float16 with islands of float32, else float32 throughout. pack:
    whether pictures leave as uint8, and not as the bundle's planes.
    Raises `BundleError` where the graph is not of the form that `flashcocos export` gives it.
    """
    try:
        exported = onnx.load_model_from_string(graph)
        replace(exported.graph, *restore(exported.graph))
        replace(exported.graph, *restore_windows(exported.graph))
        model = ir.from_proto(exported)
        if classes:
            _let_every_class_occur(model.graph, classes)
            _cast_label(model.graph)
        _join_attention(model.graph)
        _sum_channels(model.graph)
        prepare_int8(model.graph)
        if stage == "fine" and pack:
            _pack_pictures(model.graph)
        fold_constants(model)
        if half:
            _declare_half(model)
            RemoveUnusedNodesPass()(model)
        proto = ir.to_proto(model)
        onnx.checker.check_model(proto, full_check=True)
    except (DecodeError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        raise BundleError(f"{stage}: the graph cannot be rewritten for TensorRT: {error}; export it again") from error
    return proto


def _let_every_class_occur(graph: ir.Graph, classes: int) -> None:
    """Put 0, 1, ... `classes` - 1 in place of the list of classes that occur: a NonZero of one flag a class."""
    for node in [node for node in graph if node.op_type == "NonZero"]:
        flags = node.inputs[0]
        made = flags.producer() if flags is not None else None
        if made is None or made.op_type not in ("ScatterElements", "Slice"):
            raise ValueError("a NonZero that is no list of classes")
        every = _constant(graph, f"{node.outputs[0].name}_every", np.arange(classes, dtype=np.int64)[None])
        ir.convenience.replace_all_uses_with(node.outputs[0], every)
        graph.remove(node, safe=True)


def _cast_label(graph: ir.Graph) -> None:
    """Let nothing but a cast read the label's uint8, which TensorRT asks for."""
    label = next(value for value in graph.inputs if value.name == "label")
    readers = [(use.node, use.idx) for use in label.uses() if use.node.op_type not in ("Cast", "Shape")]
    if readers:
        cast = ir.node("Cast", [label], {"to": ir.DataType.INT32}, name="label_int32")
        graph.insert_before(next(iter(graph)), cast)
        for node, index in readers:
            node.replace_input_with(index, cast.outputs[0])


def _join_attention(graph: ir.Graph) -> None:
    """The loop over rows of `inference.loop_attention` as product, softmax and product over one head.

    The head has the values' width. The convolutions of query and key are widened to it with zeros, and not their
    results: TensorRT removes padding of these, and with it the fusion.
    """
    loops = [node for node in graph if node.op_type == "Loop"]
    if not loops:
        return
    if len(loops) > 1:
        raise ValueError(f"expected one loop, that of the self-attention; found {len(loops)}")
    (loop,) = loops
    inner = loop.attributes["body"].as_graph()
    if [node.op_type for node in inner] != ["Identity", "Gather", "MatMul", "Softmax", "MatMul"]:
        raise ValueError("the loop is not that of the self-attention that flashcocos export writes")
    body = {node.outputs[0].name: node for node in inner}
    # each is (B, D, h, w), then a Reshape to (B, D, N) and for all but the key a Transpose
    key = _producer(body["attention_logits"], 1, "Reshape")
    value = _producer(_producer(body["attention_out"], 1, "Transpose"), 0, "Reshape")
    parts = _producer(_producer(body["attention_query"], 0, "Transpose"), 0, "Reshape")
    query = _producer(_producer(parts, 0, "Transpose"), 0, "Reshape")
    (joined,) = (use.node for use in loop.outputs[0].uses())
    (reshape,) = (use.node for use in joined.outputs[0].uses())  # to (B, N, V)
    (turned,) = (use.node for use in reshape.outputs[0].uses())  # to (B, V, N), which a Reshape makes (B, V, h, w)
    width = len(_weight(_producer(_producer(value, 0, "MaxPool"), 0, "Conv")))
    for convolution in (_producer(query, 0, "Conv"), _producer(_producer(key, 0, "MaxPool"), 0, "Conv")):
        weight = _weight(convolution)
        wide = np.zeros((width, *weight.shape[1:]), weight.dtype)
        wide[: len(weight)] = weight
        convolution.replace_input_with(1, _constant(graph, f"{convolution.outputs[0].name}_wide", wide))

    nodes: list[ir.Node] = []

    def add(op: str, *inputs: ir.Value | None, name: str, **attributes: Any) -> ir.Value:
        nodes.append(ir.node(op, inputs, attributes, name=_ATTENTION + name))
        nodes[-1].outputs[0].name = f"{_ATTENTION}{name}_joined"
        return nodes[-1].outputs[0]

    head = _constant(graph, "attention_head", np.array([0, 1, width, -1], np.int64))
    columns = {
        name: add("Reshape", node.inputs[0], head, name=name)
        for name, node in (("query", query), ("key", key), ("value", value))
    }  # each (B, 1, V, N or M)
    rows, values = (
        add("Transpose", columns[name], name=f"{name}_rows", perm=[0, 1, 3, 2]) for name in ("query", "value")
    )
    weights = add("Softmax", add("MatMul", rows, columns["key"], name="logits"), name="weights", axis=-1)
    product = add("MatMul", weights, values, name="product")  # (B, 1, N, V)
    attended = add("Transpose", product, name="attended", perm=[0, 1, 3, 2])
    graph.insert_before(reshape, nodes)
    ir.convenience.replace_all_uses_with(turned.outputs[0], attended)
    for node in inner:  # else they count as users of what stands outside
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)
    for node in (turned, reshape, joined, loop):
        graph.remove(node, safe=True)


def _sum_channels(graph: ir.Graph) -> None:
    """Undo what `export/blocks.py` makes of sums: a row (1, C) of one number times (B, C, N)."""
    axis = None
    for node in [node for node in graph if node.op_type == "MatMul"]:
        row = ir.convenience.get_const_tensor(node.inputs[0]) if node.inputs[0] is not None else None
        if row is None or len(row.shape) != 2 or row.shape[0] != 1 or np.ptp(row.numpy()):
            continue
        axis = axis or _constant(graph, "channel_axis", np.array([1]))
        total = ir.node("ReduceSum", [node.inputs[1], axis], {"keepdims": 1})
        factor = _constant(graph, f"{node.outputs[0].name}_factor", row.numpy()[0, 0])
        scaled = ir.node("Mul", [total.outputs[0], factor])
        graph.insert_before(node, (total, scaled))
        ir.convenience.replace_all_uses_with(node.outputs[0], scaled.outputs[0])
        graph.remove(node, safe=True)


def _pack_pictures(graph: ir.Graph) -> None:
    """Let both pictures leave as uint8 (B, H, W, 3), and add `invalid`."""
    one, least = _constant(graph, "picture_one", np.float32(1)), _constant(graph, "picture_least", np.float32(-1))
    scale = _constant(graph, "picture_scale", np.float32(127.5))
    for index, picture in enumerate(list(graph.outputs)):
        name = str(picture.name)
        picture.name = f"{name}_planes"

        def add(op: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
            node = ir.node(op, inputs, attributes)  # type: ignore[arg-type]
            graph.append(node)
            return node.outputs[0]

        if name == "image":
            single = add("Cast", add("IsNaN", picture), to=ir.DataType.FLOAT)
            invalid = add("ReduceMax", single, keepdims=0)
            invalid.name, invalid.shape, invalid.dtype = "invalid", ir.Shape([]), ir.DataType.FLOAT
        shifted = add("Add", add("Clip", picture, least, one), one)
        rounded = add("Round", add("Mul", shifted, scale))
        packed = add("Cast", add("Transpose", rounded, perm=[0, 2, 3, 1]), to=ir.DataType.UINT8)
        packed.name, packed.dtype = name, ir.DataType.UINT8
        packed.shape = ir.Shape(["batch", "height", "width", 3])
        graph.outputs[index] = packed
    graph.outputs.append(invalid)


def _declare_half(model: ir.Model) -> None:
    """Give every float tensor of `model` the type that this module's docstring says, with casts between the two."""
    ShapeInferencePass()(model)
    graph = model.graph
    copies: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def as_type(value: ir.Value, dtype: ir.DataType) -> ir.Value:
        if value.dtype == dtype:
            return value
        if (value, dtype) not in copies:
            name = f"{value.name}_{dtype.name.lower()}"
            if value.const_value is not None:
                array = value.const_value.numpy()
                if not (largest := np.abs(array).max(initial=0)) <= 65504:  # the largest float16
                    raise ValueError(f"{value.name}: weights up to {largest:g} do not fit float16")
                copies[value, dtype] = _constant(graph, name, array.astype(np.float16))
            else:
                cast = ir.node("Cast", [value], {"to": dtype}, name=name)
                cast.outputs[0].name, cast.outputs[0].dtype = name, dtype
                producer = value.producer()
                if producer is None:
                    graph.insert_before(next(iter(graph)), cast)
                else:
                    graph.insert_after(producer, cast)
                copies[value, dtype] = cast.outputs[0]
        return copies[value, dtype]

    for node in list(graph):
        if node.op_type == "Cast":
            source = node.inputs[0]
            # a truth value is exact in float16, and the planes of a label are the widest tensors there are
            if source is not None and source.dtype == ir.DataType.BOOL and node.outputs[0].dtype == ir.DataType.FLOAT:
                node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT16)
                node.outputs[0].dtype = ir.DataType.FLOAT16
            continue
        data = list(_float_inputs(node))
        if not data:
            continue
        dtype = _compute_type(node, [value for _, value in data])
        for index, value in data:
            node.replace_input_with(index, as_type(value, dtype))
        for output in node.outputs:
            if output.dtype in _FLOATS:
                output.dtype = dtype
    for index, output in enumerate(list(graph.outputs)):
        if output.dtype == ir.DataType.FLOAT16:
            name, output.name = output.name, f"{output.name}_half"
            graph.outputs[index] = single = as_type(output, ir.DataType.FLOAT)
            single.name, single.shape = name, output.shape


def _float_inputs(node: ir.Node) -> Iterator[tuple[int, ir.Value]]:
    """(index, value) of the float tensors that `node` computes with."""
    for index, value in enumerate(node.inputs[: _DATA_INPUTS.get(node.op_type)]):
        if value is not None and value.dtype in _FLOATS:
            yield index, value


def _compute_type(node: ir.Node, data: list[ir.Value]) -> ir.DataType:
    if is_quantized(node):
        return ir.DataType.FLOAT
    if node.op_type in _HALF or (node.name or "").startswith(_ATTENTION):
        return ir.DataType.FLOAT16
    if node.op_type in _SINGLE:
        return ir.DataType.FLOAT
    # the others move and join: single where all that they read is, and was not int8
    variable = [value for value in data if value.const_value is None]
    single = all(v.dtype == ir.DataType.FLOAT and not is_quantized(v.producer()) for v in variable)
    return ir.DataType.FLOAT if single else ir.DataType.FLOAT16


def _constant(graph: ir.Graph, name: str, array: npt.ArrayLike) -> ir.Value:
    tensor = ir.tensor(np.asarray(array), name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(np.shape(array)), const_value=tensor)
    graph.register_initializer(value)
    return value


def _producer(node: ir.Node, index: int, op_type: str) -> ir.Node:
    """What makes input `index` of `node`: an operator `op_type`."""
    value = node.inputs[index]
    producer = value.producer() if value is not None else None
    if producer is None or producer.op_type != op_type:
        raise ValueError(f"expected {op_type} before {node.name}, in the self-attention that flashcocos export writes")
    return producer


def _weight(convolution: ir.Node) -> np.ndarray:
    value = convolution.inputs[1]
    weight = ir.convenience.get_const_tensor(value) if value is not None else None
    if weight is None:
        raise ValueError(f"the weight of {convolution.name} is no constant")
    return weight.numpy()
