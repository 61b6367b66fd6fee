"""How much device memory a graph's tensors take at a size, before anything is built or run.

Counted on the graph alone: operators in order, each tensor from where it is made to where it is last read, and the
largest sum of those alive at once. Views and constants cost nothing, nor does what DequantizeLinear gives, which is
fused into its reader. TensorRT fuses and reorders, so its own figure, which a build reports, differs; the estimate is
there to say no before minutes are spent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass
from onnxscript import optimizer

_VIEWS = {"DequantizeLinear", "Identity", "Reshape", "Squeeze", "Unsqueeze"}


def estimate(graph: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]], *, fused_attention: bool) -> int:
    """Bytes of activations of `graph` for inputs of `shapes`.

    fused_attention: the scores and weights of the self-attention are never stored. Raises `ValueError` where a shape
    cannot be inferred.
    """
    model = ir.from_proto(graph)
    for value in model.graph.inputs:
        value.shape = ir.Shape(shapes[str(value.name)])
    for output in model.graph.outputs:
        output.shape = None
    for node in model.graph:
        for output in node.outputs:
            output.shape = None
    optimizer.optimize_ir(model, onnx_shape_inference=True)
    ShapeInferencePass()(model)
    nodes = list(model.graph)
    last: dict[ir.Value, int] = {}
    for place, node in enumerate(nodes):
        last.update((_source(value), place) for value in node.inputs if value is not None)
    last.update((_source(value), len(nodes)) for value in model.graph.outputs)
    alive = {value: _bytes(value) for value in model.graph.inputs}
    peak = 0
    for place, node in enumerate(nodes):
        if node.op_type not in _VIEWS:
            for value in node.outputs:
                hidden = fused_attention and node.name in ("attention_logits", "attention_weights")
                alive[value] = 0 if hidden else _bytes(value)
        peak = max(peak, sum(alive.values()))
        for value in [value for value in alive if last.get(value, place) <= place]:
            del alive[value]
    return peak


def _source(value: ir.Value) -> ir.Value:
    """What a view looks at."""
    node = value.producer()
    viewed = node.inputs[0] if node is not None and node.op_type in _VIEWS else None
    return value if viewed is None else _source(viewed)


def _bytes(value: ir.Value) -> int:
    if value.const_value is not None:
        return 0
    sides = [side for side in value.shape or () if isinstance(side, int)]
    if value.shape is None or value.dtype is None or len(sides) != len(value.shape):
        raise ValueError(f"the shape of {value.name} cannot be inferred: {value.shape}")
    return math.ceil(math.prod(sides) * value.dtype.itemsize)
