"""The stages of a bundle as ONNX graphs, by torch's dynamo exporter.

The graphs hold standard operators of one pinned opset and their weights: no random nodes, no other domains.
Batch, height and width are dynamic; inputs and outputs are those of `stage_tensors`, which the manifest repeats. What
a graph says of the machine that exported it (stack traces, file names) is removed, so the same weights, exported again
by the same versions, give the same bytes.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript import optimizer
from torch import Tensor

from .. import __version__
from ..bundle import TensorSpec
from ..bundle.stages import axis_sizes, concrete_shape, stage_tensors
from ..config import SIZE_MULTIPLE, ModelConfig
from ..errors import BundleError, InputError
from ..train.networks import CoCosNet
from .inference import loop_attention, stage_module

OPSET = 20
IR_VERSION = 10  # that of ONNX 1.16, which ONNX Runtime reads from 1.18 on
FLOAT16_THRESHOLD = 1024  # values; smaller tensors, such as biases and constants, stay float32
RANDOM = {
    "Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
}  # fmt: skip
_DTYPES = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8}
# batch, height and width of the traced example; none is 1, which the exporter would take for a constant
_EXAMPLE = (2, 64, 96)


def export_stage(model: CoCosNet, stage: str) -> ModelProto:
    """One of `bundle.STAGES` of `model` as an ONNX model that `check_graph` has passed."""
    inputs, outputs = stage_tensors(model.config)[stage]
    axes, sizes = _axes(model.config), axis_sizes(model.config, *_EXAMPLE)
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            stage_module(model, stage),
            tuple(_example(tensor, sizes) for tensor in inputs),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=tuple({i: axes[a] for i, a in enumerate(t.shape) if isinstance(a, str)} for t in inputs),
            input_names=[tensor.name for tensor in inputs],
            output_names=[tensor.name for tensor in outputs],
            verbose=False,
        )
    assert program is not None  # with dynamo=True there always is one
    exported = program.model_proto
    if stage == "coarse" and model.config.attention:
        replace(exported.graph, *loop_attention(exported.graph))
    clean(exported, stage, inputs, outputs)
    check_graph(exported, stage, inputs, outputs)
    return exported


def clean(model: ModelProto, name: str, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec]) -> None:
    """Drop what names the exporting machine or repeats what a reader infers, and name all axes, in place."""
    graph = model.graph
    model.producer_name, model.producer_version, graph.name = "flashcocos", __version__, name
    model.ir_version = IR_VERSION
    del graph.value_info[:]
    for part in (model, graph, *graph.node, *graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]
    for field, tensors in ((graph.input, inputs), (graph.output, outputs)):
        del field[:]
        field.extend(value_info(tensor) for tensor in tensors)


def check_graph(model: ModelProto, name: str, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec]) -> None:
    """Raise `BundleError` unless `model` is valid ONNX of `OPSET` alone, not random, with these inputs and outputs."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BundleError(f"{name}: not a valid ONNX model: {error}") from error
    opsets = sorted((entry.domain, entry.version) for entry in model.opset_import)
    if opsets != [("", OPSET)] or model.functions:
        raise BundleError(f"{name}: expected operators of ONNX opset {OPSET} alone, got the opsets {opsets}")
    if found := RANDOM & {node.op_type for node in all_nodes(model.graph)}:
        raise BundleError(f"{name}: the operators {', '.join(sorted(found))} are random, which no translation may be")
    for what, field, tensors in (("inputs", model.graph.input, inputs), ("outputs", model.graph.output, outputs)):
        expected = [value_info(tensor) for tensor in tensors]
        if list(field) != expected:
            raise BundleError(f"{name}: expected the {what} {_listed(expected)}, got {_listed(field)}")


def all_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """The nodes of `graph` and of the graphs in it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from all_nodes(attribute.g)


def value_info(tensor: TensorSpec) -> ValueInfoProto:
    """`tensor` as ONNX states an input or output."""
    return helper.make_tensor_value_info(tensor.name, _DTYPES[tensor.dtype], tensor.shape)


def store_float16(model: ModelProto) -> None:
    """Store the large float32 weights of `model` as float16, in place; each is cast back, so all arithmetic is float32.

    Weights are rounded by at most 2**-11 of their value (2**-25 absolute below 2**-14), and the file halves. A runtime
    folds the casts when it loads the graph. A weight outside the float16 range, or not finite, raises `InputError`.
    """
    graph, casts, stored = model.graph, [], []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) < FLOAT16_THRESHOLD:
            stored.append(tensor)
            continue
        array = numpy_helper.to_array(tensor)
        largest = float(np.abs(array).max())
        if not largest <= 65504:  # the largest float16; not "greater", so that nan is caught
            raise InputError(
                f"{tensor.name}: weights up to {largest:g} do not fit float16 (at most 65504); export with "
                'precision="float32"'
            )
        half = f"{tensor.name}.float16"
        stored.append(numpy_helper.from_array(array.astype(np.float16), half))
        casts.append(helper.make_node("Cast", [half], [tensor.name], f"cast_{tensor.name}", to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    replace(graph, nodes, stored)


def fold_constants(model: ir.Model) -> None:
    """Compute in place what depends on no input of `model`, whatever its size."""
    anything = {"input_size_limit": 1 << 40, "output_size_limit": 1 << 40}
    with _quiet():
        optimizer.fold_constants(model, **anything)
        for node in [node for node in model.graph if node.op_type == "Split"]:  # it leaves out these
            whole = ir.convenience.get_const_tensor(node.inputs[0]) if node.inputs[0] is not None else None
            if whole is None or len(node.inputs) > 1:  # only into equal parts
                continue
            parts = np.split(whole.numpy(), len(node.outputs), node.attributes.get_int("axis", 0))
            for output, part in zip(node.outputs, parts, strict=True):
                value = ir.tensor(np.ascontiguousarray(part))
                kind, name = ir.TensorType(value.dtype), f"{output.name}_folded"
                constant = ir.Value(name=name, type=kind, shape=ir.Shape(part.shape), const_value=value)
                model.graph.register_initializer(constant)
                ir.convenience.replace_all_uses_with(output, constant)
            model.graph.remove(node, safe=True)
        optimizer.fold_constants(model, **anything)
    RemoveUnusedNodesPass()(model)


def renamed(graph: GraphProto, prefix: str, names: Mapping[str, str]) -> tuple[list[NodeProto], list[TensorProto]]:
    """Nodes and initializers of `graph`; values are renamed by `names`, else get `prefix`, in its subgraphs too."""
    copy = GraphProto()
    copy.CopyFrom(graph)

    def rename(value: str) -> str:
        return names.get(value, prefix + value) if value else ""  # an empty name is an omitted optional input

    for node in all_nodes(copy):
        node.name = prefix + node.name if node.name else ""  # two of one name are refused, unnamed ones are not
        node.input[:] = [rename(value) for value in node.input]
        node.output[:] = [rename(value) for value in node.output]
        for attribute in node.attribute:
            for value in (*attribute.g.input, *attribute.g.output, *attribute.g.initializer):
                value.name = rename(value.name)
    for tensor in copy.initializer:
        tensor.name = rename(tensor.name)
    return list(copy.node), list(copy.initializer)


def replace(graph: GraphProto, nodes: list[NodeProto], initializers: list[TensorProto]) -> None:
    """Put `nodes` and `initializers` in place of those of `graph`."""
    # built apart first: the elements of a cleared protobuf field must not be read again
    fresh = helper.make_graph(nodes, graph.name, list(graph.input), list(graph.output), initializers)
    graph.CopyFrom(fresh)


def _axes(config: ModelConfig) -> dict[str, torch.export.Dim]:
    # one symbol per image axis, so that the exporter knows every side to be a multiple of SIZE_MULTIPLE
    rows, columns = torch.export.Dim("rows", min=2, max=4096), torch.export.Dim("columns", min=2, max=4096)
    positions = SIZE_MULTIPLE // config.warp_stride
    return {
        "batch": torch.export.Dim("batch", min=1, max=4096),
        "height": SIZE_MULTIPLE * rows,
        "width": SIZE_MULTIPLE * columns,
        "half_height": SIZE_MULTIPLE // 2 * rows,
        "half_width": SIZE_MULTIPLE // 2 * columns,
        "h": positions * rows,
        "w": positions * columns,
    }


def _example(tensor: TensorSpec, sizes: Mapping[str, int]) -> Tensor:
    return torch.zeros(concrete_shape(tensor, sizes), dtype=getattr(torch, tensor.dtype))


def _listed(infos: Iterable[ValueInfoProto]) -> str:
    def one(info: ValueInfoProto) -> str:
        tensor = info.type.tensor_type
        shape = ", ".join(side.dim_param or str(side.dim_value) for side in tensor.shape.dim)
        return f"{info.name} {TensorProto.DataType.Name(tensor.elem_type).lower()} ({shape})"

    return "; ".join(map(one, infos))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # the exporter warns of optional packages, of axes that share a symbol and of its own deprecated calls, and the
    # optimizer of every Split
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
