"""The convolutions that `flashcocos quantize` put in int8, in the form that TensorRT takes.

TensorRT runs a convolution in int8 where DequantizeLinear makes its input and its weight, without zero points. The rest
of what ONNX Runtime's quantizer writes is for ONNX Runtime's kernels and undone here:

    biases in int32     float32 again, rounded as they were
    results in int8     as they are: ONNX Runtime wants them rounded to call a convolution int8; TensorRT's int8 kernels
                        give float32, and rounding that costs 2.6 dB on avatars-128, 1 dB on full-size ade20k

What is int8 is float32 around it in a network of any precision: float16 would round the scales, to nothing below 6e-8.
Casts, which TensorRT fuses with Q and with what follows the convolution, join these islands with what is half.

Source: the plans that tensorrt-rtx 1.7 makes for sm 80, 86, 89 and 120. Each of these convolutions reads int8 and an
int8 weight there, and a test takes that from the builder's log; float16 scales give the same plan. For sm 75 it makes
them float again. Which kernel computes a convolution is chosen where the engine is loaded: that int8 is faster is not
shown, and NVIDIA's table of precisions (TensorRT for RTX 1.5) has int8 for the weights of matrix products alone.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir


def is_quantized(node: ir.Node | None) -> bool:
    """Whether `node` is one of the int8 islands: quantizes, dequantizes, or is a convolution of what that gives."""
    if node is None or node.op_type != "Conv":
        return node is not None and node.op_type in ("QuantizeLinear", "DequantizeLinear")
    value = node.inputs[0]
    maker = value.producer() if value is not None else None
    return maker is not None and maker.op_type == "DequantizeLinear"


def int8_convolutions(graph: onnx.ModelProto) -> int:
    """How many convolutions of `graph` are in int8."""
    return sum(node.op_type == "Conv" and is_quantized(node) for node in ir.from_proto(graph).graph)


def prepare_int8(graph: ir.Graph) -> None:
    """Undo in `graph` what TensorRT has no use for: int8 results and int32 biases. Graphs without int8 stay as is."""
    _drop_rounding(graph, every=False)
    for node in [node for node in graph if node.op_type == "DequantizeLinear"]:
        stored, scale = (value.const_value if value is not None else None for value in node.inputs[:2])
        if stored is not None and scale is not None and stored.dtype == ir.DataType.INT32:
            name = f"{node.outputs[0].name}_restored"
            array = (stored.numpy() * scale.numpy()).astype(np.float32)
            tensor = ir.tensor(array, name=name)
            bias = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
            )
            graph.register_initializer(bias)
            ir.convenience.replace_all_uses_with(node.outputs[0], bias)
            graph.remove(node, safe=True)


def unrounded(graph: onnx.ModelProto) -> onnx.ModelProto:
    """`graph` without the rounding of activations to int8; weights stay as they are."""
    model = ir.from_proto(graph)
    _drop_rounding(model.graph, every=True)
    return ir.to_proto(model)


def _drop_rounding(graph: ir.Graph, *, every: bool) -> None:
    """Remove each QuantizeLinear with its DequantizeLinear, or those alone that no convolution reads."""
    for node in [node for node in graph if node.op_type == "QuantizeLinear"]:
        source, readers = node.inputs[0], [use.node for use in node.outputs[0].uses()]
        convolved = any(use.node.op_type == "Conv" for reader in readers for use in reader.outputs[0].uses())
        if source is None or (convolved and not every):
            continue
        for reader in readers:
            ir.convenience.replace_all_uses_with(reader.outputs[0], source)
            graph.remove(reader, safe=True)
        graph.remove(node, safe=True)
