"""Wide 3x3 convolutions as Winograd's F(4x4, 3x3) in standard operators, which ONNX Runtime has not of its own on x86.

For each 4x4 tile of the output a direct convolution multiplies 16 x 9 numbers a pair of channels, this form 36. Source:
arXiv 1509.09308, section 4. Tiles are transformed once a channel, not once a pair, so it pays where channels are many.

Weights are transformed in each run. Stored, or folded as a graph is loaded, they take four times the memory, and a
second of loading, to save 44 ms of 1.35 s (query of ade20k at 256 px, AMD EPYC with AVX2, 2 cores). `restore` undoes
the form, by the names of its nodes; for OpenVINO runtime/cpu/openvino.py does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from ..bundle.stages import WINOGRAD
from ..errors import BundleError

LEAST_CHANNELS = 256  # of the input, from which on it is faster
TILE = 4  # pixels a side
# interpolation at 0, 1, -1, 2, -2 and infinity
_PIXELS = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])
_TAPS = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24
_TILES = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)


def winograd(graph: GraphProto) -> tuple[list[NodeProto], list[TensorProto]]:
    """Nodes and initializers of `graph` with its wide convolutions, 3x3 of stride 1, in this form.

    The sides of their outputs must be multiples of `TILE`, as those of a quarter of every picture are.
    """
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    nodes: list[NodeProto] = []
    added: list[TensorProto] = []
    for node in graph.node:
        if _is_wide(node, shapes):
            made, constants = _convolution(node, *shapes[node.input[1]][:2])
            nodes += made
            added += constants if added else [*_shared_constants(), *constants]
        else:
            nodes.append(node)
    return nodes, [*graph.initializer, *added]


def restore(graph: GraphProto) -> tuple[list[NodeProto], list[TensorProto]]:
    """Nodes and initializers of `graph` with the convolutions that `winograd` has rewritten as they were."""
    parts = {node.name: node for node in graph.node if node.name.startswith(WINOGRAD)}
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.name not in parts:
            nodes.append(node)
        elif node.name.startswith(f"{WINOGRAD}result_"):
            nodes.append(_restored(parts, node.output[0]))
    return nodes, [tensor for tensor in graph.initializer if not tensor.name.startswith(WINOGRAD)]


def _restored(parts: dict[str, NodeProto], result: str) -> NodeProto:
    try:
        read = [parts[f"{WINOGRAD}{part}_{result}"].input[0] for part in ("input", "weight")]
        pads = _attributes(parts[f"{WINOGRAD}tiles_{result}"])["pads"]
    except (KeyError, IndexError) as error:
        raise BundleError(f"{result}: a Winograd form that flashcocos does not write; export it again") from error
    bias = parts.get(f"{WINOGRAD}bias_{result}")
    return helper.make_node("Conv", [*read, *(bias.input[:1] if bias else [])], [result], f"node_{result}", pads=pads)


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _is_wide(node: NodeProto, shapes: dict[str, tuple[int, ...]]) -> bool:
    if node.op_type != "Conv" or node.input[1] not in shapes:
        return False
    attributes = _attributes(node)
    plain = attributes["strides"] == [1, 1] and attributes["dilations"] == [1, 1] and attributes["group"] == 1
    _, channels, *kernel = shapes[node.input[1]]
    return plain and kernel == [3, 3] and channels >= LEAST_CHANNELS


def _shared_constants() -> list[TensorProto]:
    """The transformations of a tile, in both directions at once, and shapes."""
    arrays = {"pixels": np.kron(_PIXELS, _PIXELS), "taps": np.kron(_TAPS, _TAPS)}
    arrays["tiles"] = np.kron(_TILES, _TILES).reshape(36, 1, 6, 6)
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    shapes = {"nine": [9], "planes": [-1, 1, 0, 0], "points": [36], "rest": [-1], "rows": [0, 36, -1]}
    arrays |= {name: np.array(shape) for name, shape in shapes.items()}
    return [numpy_helper.from_array(array, WINOGRAD + name) for name, array in arrays.items()]


def _convolution(node: NodeProto, outputs: int, inputs: int) -> tuple[list[NodeProto], list[TensorProto]]:
    """Nodes and initializers in place of `node`, from `inputs` channels C to O; B pictures have T tiles each."""
    result, pads = node.output[0], _attributes(node)["pads"]
    nodes: list[NodeProto] = []
    constants: list[TensorProto] = []

    def add(op: str, part: str, *values: str, **attributes: Any) -> str:
        name = f"{WINOGRAD}{part}_{result}"
        nodes.append(helper.make_node(op, values, [name], name, **attributes))
        return name

    def constant(part: str, *numbers: int) -> str:
        constants.append(numpy_helper.from_array(np.array(numbers), f"{WINOGRAD}{part}_{result}"))
        return constants[-1].name

    x, weight, *bias = node.input
    batch = add("Shape", "batch", x, start=0, end=1)
    # 9, but not before there is a batch: what a runtime knows as it loads the graph it would fold
    nine = add("Add", "nine", add("Sub", "zero", batch, batch), WINOGRAD + "nine")
    taps = add("Reshape", "weight", weight, add("Concat", "weight_shape", WINOGRAD + "rest", nine, axis=0))  # (O C, 9)
    points = add("Gemm", "points", WINOGRAD + "taps", taps, transB=1)
    points = add("Reshape", "matrices", points, constant("matrices_shape", 36, outputs, inputs))  # (36, O, C)

    planes = add("Reshape", "planes", add("Transpose", "input", x, perm=[1, 0, 2, 3]), WINOGRAD + "planes")
    tiles = add("Conv", "tiles", planes, WINOGRAD + "tiles", strides=[TILE, TILE], pads=pads)  # (C B, 36, h, w)
    sides = add("Shape", "sides", tiles, start=2, end=4)
    shape = [constant("channels", inputs), batch, WINOGRAD + "points", WINOGRAD + "rest"]
    tiles = add("Reshape", "by_channel", tiles, add("Concat", "by_channel_shape", *shape, axis=0))  # (C, B, 36, T)
    tiles = add("Transpose", "by_point", tiles, perm=[1, 2, 0, 3])  # (B, 36, C, T); ONNX Runtime fuses it

    product = add("Reshape", "rows", add("MatMul", "product", points, tiles), WINOGRAD + "rows")  # (B, 36, O T)
    pixels = add("MatMul", "pixels", WINOGRAD + "pixels", product)  # (B, 16, O T)
    shape = [constant("blocks", 0, TILE * TILE * outputs), sides]
    pixels = add("Reshape", "by_tile", pixels, add("Concat", "by_tile_shape", *shape, axis=0))  # (B, 16 O, h, w)
    whole = add("DepthToSpace", "whole", pixels, blocksize=TILE, mode="DCR")  # (B, O, 4 h, 4 w)
    if bias:
        column = add("Reshape", "bias", bias[0], constant("bias_shape", 1, outputs, 1, 1))
        add("Add", "result", whole, column)
    else:
        add("Identity", "result", whole)
    nodes[-1].output[0] = result
    return nodes, constants
