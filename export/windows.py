"""SPADE over a label, computed once for each kind of 5x5 window of the label and not at every position.

In the query stage scale and shift depend on the label alone: a 3x3 convolution of its planes, ReLU, a 3x3 convolution.
Positions with the same classes around them have the same scale and shift, and at 256 px two thirds of the positions of
a label have such a twin. So the second convolution becomes a product over one window of each kind. The first is cheap,
for few classes occur, and stays.

Kinds are found three numbers at a time, in a row and then in a column, once for the classes and once more for what the
first convolution made of them: so each border is reflected where the network reflects it. `restore` undoes the form, by
the names of its values.
"""

from __future__ import annotations

import onnx.parser
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from ..bundle.stages import WINDOWS
from ..errors import BundleError

_STEP = 4  # SPADE sees every fourth row and column of the label
# from the second convolution back to the label
_CHAIN = ("Pad", "Relu", "Conv", "Pad", "Slice", "Slice", "Cast", "Equal")


def share_windows(graph: GraphProto) -> tuple[list[NodeProto], list[TensorProto]]:
    """Nodes and initializers of a query stage with its convolutions over a label's SPADE in this form.

    Exact for labels with at most 2^20 different windows. Stages without such convolutions stay as they are.
    """
    producers = {value: node for node in graph.node for value in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[NodeProto] = []
    added: list[TensorProto] = []
    hidden: set[str] = set()
    for node in graph.node:
        if not _is_over_label(node, producers, constants):
            nodes.append(node)
            continue
        features, weight, bias = node.input
        if not added:
            kinds = onnx.parser.parse_graph(_KINDS)
            nodes += kinds.node
            added += kinds.initializer
        if features not in hidden:
            hidden.add(features)
            nodes += onnx.parser.parse_graph(_INPUTS.format(features=features)).node
        names = {"features": features, "weight": weight, "bias": bias, "result": node.output[0]}
        nodes += onnx.parser.parse_graph(_PRODUCT.format(**names)).node
    return nodes, [*graph.initializer, *added]


def restore(graph: GraphProto) -> tuple[list[NodeProto], list[TensorProto]]:
    """Nodes and initializers of `graph` with the convolutions that `share_windows` has rewritten as they were."""
    parts = {node.output[0]: node for node in graph.node if node.output[0].startswith(WINDOWS)}
    nodes: list[NodeProto] = []
    for node in graph.node:
        result = node.output[0]
        if f"{WINDOWS}each_{result}" in parts:
            nodes.append(_restored(parts, result))
        elif result not in parts:
            nodes.append(node)
    return nodes, [tensor for tensor in graph.initializer if not tensor.name.startswith(WINDOWS)]


def _restored(parts: dict[str, NodeProto], result: str) -> NodeProto:
    try:
        inputs, _, bias = parts[f"{WINDOWS}table_{result}"].input
        weight = parts[f"{WINDOWS}weight_{result}"].input[0]
    except (KeyError, IndexError, ValueError) as error:
        raise BundleError(f"{result}: a form of windows that flashcocos does not write; export it again") from error
    read = [inputs.removeprefix(f"{WINDOWS}inputs_"), weight, bias]
    return helper.make_node("Conv", read, [result], f"node_{result}", kernel_shape=[3, 3], strides=[1, 1])


def _is_over_label(node: NodeProto, producers: dict[str, NodeProto], constants: dict[str, TensorProto]) -> bool:
    """Whether `node` is the second convolution of a SPADE over every fourth pixel of the label."""
    if node.op_type != "Conv":
        return False
    for operator in _CHAIN:
        before = producers.get(node.input[0])
        if before is None or before.op_type != operator:
            return False
        node = before
        if operator == "Slice" and numpy_helper.to_array(constants[node.input[4]]).tolist() != [_STEP]:
            return False
    return True


def _kinds_of_three(values: str, axis: int, name: str) -> str:
    """`name`_kind numbers each three neighbors of `values` in its place, `name`_first is where each kind began."""
    return f"""
        {name}_left = Slice({values}, windows_0, windows_minus_2, windows_axis_{axis})
        {name}_middle = Slice({values}, windows_1, windows_minus_1, windows_axis_{axis})
        {name}_right = Slice({values}, windows_2, windows_end, windows_axis_{axis})
        {name}_high = Mul({name}_left, windows_base)
        {name}_two = Add({name}_high, {name}_middle)
        {name}_two_high = Mul({name}_two, windows_base)
        {name}_three = Add({name}_two_high, {name}_right)
        {name}_values, {name}_first, {name}_number, {name}_count = Unique({name}_three)
        {name}_shape = Shape({name}_left)
        {name}_kind = Reshape({name}_number, {name}_shape)"""


# label -> windows_columns_2_kind, the number of each position's window; and windows_taps: for one of each kind, where
# its nine vectors lie among those of the padded features
_KINDS = f"""
    kinds (uint8[B, H, W] label) => (int64[B, h, w] windows_columns_2_kind, int64[K, 9] windows_taps)
    <int64[1] windows_0 = {{0}}, int64[1] windows_1 = {{1}}, int64[1] windows_2 = {{2}},
     int64[1] windows_end = {{{2**31}}}, int64[1] windows_minus_1 = {{-1}}, int64[1] windows_minus_2 = {{-2}},
     int64[1] windows_base = {{{2**20}}},
     int64[1] windows_axis_1 = {{1}}, int64[1] windows_axis_2 = {{2}}, int64[1] windows_step = {{{_STEP}}},
     int64[6] windows_border = {{0, 1, 1, 0, 1, 1}}, int64[9] windows_down = {{0, 0, 0, 1, 1, 1, 2, 2, 2}},
     int64[9] windows_right = {{0, 1, 2, 0, 1, 2, 0, 1, 2}}>
    {{
        windows_some_rows = Slice(label, windows_0, windows_end, windows_axis_1, windows_step)
        windows_some = Slice(windows_some_rows, windows_0, windows_end, windows_axis_2, windows_step)
        windows_classes = Cast<to = 7>(windows_some)
        windows_bordered_1 = Pad<mode = "reflect">(windows_classes, windows_border)
        {_kinds_of_three("windows_bordered_1", 2, "windows_rows_1")}
        {_kinds_of_three("windows_rows_1_kind", 1, "windows_columns_1")}
        windows_bordered_2 = Pad<mode = "reflect">(windows_columns_1_kind, windows_border)
        {_kinds_of_three("windows_bordered_2", 2, "windows_rows_2")}
        {_kinds_of_three("windows_rows_2_kind", 1, "windows_columns_2")}
        windows_height = Shape<start = 1, end = 2>(windows_classes)
        windows_width = Shape<start = 2, end = 3>(windows_classes)
        windows_row_length = Add(windows_width, windows_2)
        windows_row = Div(windows_columns_2_first, windows_width)
        windows_picture = Div(windows_row, windows_height)
        windows_rows_before = Mul(windows_row, windows_2)
        windows_corner_in_picture = Add(windows_columns_2_first, windows_rows_before)
        windows_two_rows = Mul(windows_row_length, windows_2)
        windows_pictures_before = Mul(windows_picture, windows_two_rows)
        windows_corner = Add(windows_corner_in_picture, windows_pictures_before)
        windows_corners = Unsqueeze(windows_corner, windows_1)
        windows_rows_down = Mul(windows_down, windows_row_length)
        windows_offsets = Add(windows_rows_down, windows_right)
        windows_taps = Add(windows_corners, windows_offsets)
    }}"""

# features (B, C, h + 2, w + 2) -> the windows' values (K, 9 C), in the order of a convolution's weight
_INPUTS = """
    inputs (float[B, C, h, w] {features}) => (float[K, D] windows_inputs_{features})
    {{
        windows_last_{features} = Transpose<perm = [0, 2, 3, 1]>({features})
        windows_vectors_{features} = Flatten<axis = 3>(windows_last_{features})
        windows_nine_{features} = Gather(windows_vectors_{features}, windows_taps)
        windows_turned_{features} = Transpose<perm = [0, 2, 1]>(windows_nine_{features})
        windows_inputs_{features} = Flatten<axis = 1>(windows_turned_{features})
    }}"""

_PRODUCT = """
    product (float[K, D] windows_inputs_{features}) => (float[B, O, h, w] {result})
    {{
        windows_weight_{result} = Flatten<axis = 1>({weight})
        windows_table_{result} = Gemm<transB = 1>(windows_inputs_{features}, windows_weight_{result}, {bias})
        windows_each_{result} = Gather(windows_table_{result}, windows_columns_2_kind)
        {result} = Transpose<perm = [0, 3, 1, 2]>(windows_each_{result})
    }}"""
