"""The convolutions that `flashcocos quantize` put in int8, in the form that TensorRT takes.

TensorRT runs a convolution in int8 where DequantizeLinear makes its picture and its weight, without zero points. Both
are float32 in a network of any precision, and so is the convolution that they are fused into: float16 would round the
scales, to nothing below 6e-8, and save nothing, for the sums leave the int8 kernel as float32 either way. Casts join
these islands with what is half around them. Biases, which ONNX Runtime keeps as int32, are float32 again.

Source: what tensorrt-rtx 1.7 makes of both forms. For sm 86, 89 and 120 its plan has every such convolution read int8
pictures and int8 weights, with Q and the padding before it fused into the operator that comes first; a test reads that
out of the builder's log. Which kernel does it is chosen where the engine is loaded, and none has been: no GPU was at
hand. NVIDIA's table of precisions (TensorRT for RTX 1.5) names int8 for weights of matrix products alone.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir


def is_quantized(node: ir.Node | None) -> bool:
    """Whether `node` is one of the int8 islands: quantises, dequantises, or is a convolution of what that gives."""
    if node is None or node.op_type != "Conv":
        return node is not None and node.op_type in ("QuantizeLinear", "DequantizeLinear")
    picture = node.inputs[0]
    made = picture.producer() if picture is not None else None
    return made is not None and made.op_type == "DequantizeLinear"


def restore_biases(graph: ir.Graph) -> None:
    """Replace each int32 constant and its DequantizeLinear by the float32 constant that they stand for."""
    for node in [node for node in graph if node.op_type == "DequantizeLinear"]:
        stored, scale = (value.const_value if value is not None else None for value in node.inputs[:2])
        if stored is None or scale is None or stored.dtype != ir.DataType.INT32:
            continue
        output = node.outputs[0]
        tensor = ir.tensor((stored.numpy() * scale.numpy()).astype(np.float32), name=f"{output.name}_restored")
        restored = ir.Value(
            name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape), const_value=tensor
        )
        graph.register_initializer(restored)
        ir.convenience.replace_all_uses_with(output, restored)
        graph.remove(node, safe=True)


def int8_convolutions(graph: onnx.ModelProto) -> int:
    """How many convolutions of `graph` are in int8."""
    return sum(node.op_type == "Conv" and is_quantized(node) for node in ir.from_proto(graph).graph)
