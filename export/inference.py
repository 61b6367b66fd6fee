"""The stages of a bundle as modules: the network's functions, exactly, with less work than training has use for.

One-hot labels: most classes are absent from any one label, and their planes are zero. A stage makes the planes of the
classes that occur alone, and gathers their columns of the weights: for K classes of ade20k 3 + K input channels
instead of 154, in convolutions that are a quarter of the generator's multiply-adds.

Self-attention: its matrix has a fourth of the square of (H / 2)(W / 2) entries, 4 GiB at 512 px. `loop_attention` has a
graph form a few rows of it at a time, as many as stay in the cache. (The opset has no fused attention.)
"""

from __future__ import annotations

import copy

import onnx
import onnx.parser
import torch
from onnx import GraphProto, NodeProto, TensorProto
from torch import Tensor, nn

from ..config import SIZE_MULTIPLE
from ..errors import BundleError
from ..train.networks import CoCosNet
from ..train.networks.generator import class_means
from ..train.networks.layers import SelfAttention
from .blocks import fold_blocks

# rows at a time; every size has a multiple of as many queries, (H / 2)(W / 2) for H and W that 32 divides
ATTENTION_ROWS = (SIZE_MULTIPLE // 2) ** 2
# (more keys than, rows): 4 to 8 MiB a step, with which 512 px took half the time of 256 rows, and 1024 px two thirds
FEWER_ROWS = ((8192, 64), (32768, 32))


def stage_module(model: CoCosNet, stage: str) -> nn.Module:
    """`model`, in evaluation mode, with the inputs and outputs of `stage_tensors(model.config)[stage]`; shares weights.

    In a coarse stage with attention the matrix is formed whole; `loop_attention` mends that in its graph.
    """
    return _STAGES[stage](model).eval()


class _Stage(nn.Module):
    def __init__(self, model: CoCosNet) -> None:
        super().__init__()
        shared = {id(parameter): parameter for parameter in model.parameters()}
        self.model = copy.deepcopy(model, shared)
        self.classes = model.config.label_channels if model.config.label_kind == "classes" else 0
        self.dtype = model.correspondence.theta.weight.dtype
        self.present = _Present()
        fold_blocks(self.model)

    def sparse(self, part: nn.Module) -> None:
        """Have the convolutions over label planes in `part` take the planes of `planes` instead."""
        if not self.classes:
            return
        convolutions = [(name, m) for name, m in part.named_modules() if isinstance(m, nn.Conv2d)]
        for name, convolution in convolutions:
            if name.endswith("shared") or name in ("first", "layers.0"):
                part.set_submodule(name, _PresentConv2d(convolution, self.classes, self.present))

    def find(self, label: Tensor) -> None:
        """Let the classes that occur in `label` be those of `planes`."""
        if self.classes:
            # class 0 counts as present, so that there always is a plane; ids past the classes belong to none
            occurs = (torch.arange(self.classes + 1) == 0).to(torch.float32)
            occurs = occurs.scatter(0, label.clamp_max(self.classes).flatten().long(), 1.0)[: self.classes]
            self.present.classes = occurs.nonzero()[:, 0]

    def planes(self, label: Tensor) -> Tensor:
        """Label planes (B, nc, H, W) as they are; for class ids (B, H, W) those of the classes that `find` found."""
        if not self.classes:
            return label
        return (label[:, None] == self.present.classes.to(torch.int32).reshape(1, -1, 1, 1)).to(self.dtype)

    def read(self, label: Tensor) -> Tensor:
        """The label as the graph's other operators take it: TensorRT refuses uint8 that anything but a cast reads."""
        return label.to(torch.int32) if self.classes else label

    def every_plane(self, label: Tensor) -> Tensor:
        """All planes of a label, (B, nc, H, W)."""
        if not self.classes:
            return label
        ids = torch.arange(self.classes, dtype=torch.int32).reshape(1, -1, 1, 1)
        return (label[:, None] == ids).to(self.dtype)


class _Query(_Stage):
    def __init__(self, model: CoCosNet) -> None:
        super().__init__(model)
        self.sparse(self.model.correspondence.label_adaptor)
        if (detail := self.model.correspondence.label_detail) is not None:
            self.sparse(detail)

    def forward(self, label: Tensor) -> Tensor:
        correspondence, label = self.model.correspondence, self.read(label)
        self.find(label)
        mixed, planes = self.every_plane(quarter(label)), self.planes(label)
        return correspondence.query(correspondence.label_adaptor(planes), mixed, planes)


class _Exemplar(_Stage):
    def forward(self, image: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        correspondence, mixed, planes = self.model.correspondence, None, image
        if label is not None:
            label = self.read(label)
            mixed = self.every_plane(quarter(label))
            if correspondence.image_detail is not None:
                planes = torch.cat([image, self.every_plane(label)], 1)
        return correspondence.key(correspondence.image_adaptor(image), mixed, planes), self.model.warp_values(image)


class _Coarse(_Stage):
    def __init__(self, model: CoCosNet) -> None:
        super().__init__(model)
        self.sparse(self.model.generator)
        if isinstance(attention := self.model.generator.attention, SelfAttention):
            attention.attend = _matrix_attention

    def forward(self, warped: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        generator, label = self.model.generator, self.read(label)
        self.find(label)
        warped_image = self.model.upsample_warp(warped)
        means = class_means(warped_image, self.planes(label)) if generator.warp_residual else None
        features = generator.coarse(generator.condition(quarter(warped_image), self.planes(quarter(label)), means))
        return (features,) if means is None else (features, self._of_every_class(means))

    def _of_every_class(self, means: Tensor) -> Tensor:
        """Means (B, K, 3) of the classes that occur -> (B, nc, 3), 0 for the others."""
        if not self.classes:
            return means
        places = torch.arange(self.classes)[:, None] == self.present.classes
        return places.to(self.dtype) @ means


class _Fine(_Stage):
    def __init__(self, model: CoCosNet) -> None:
        super().__init__(model)
        self.sparse(self.model.generator)

    def forward(
        self, features: Tensor, warped: Tensor, label: Tensor, means: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        generator, label = self.model.generator, self.read(label)
        self.find(label)
        warped_image = self.model.upsample_warp(warped)
        if means is not None and self.classes:
            means = means.index_select(1, self.present.classes)
        return generator.fine(features, generator.condition(warped_image, self.planes(label), means)), warped_image


_STAGES = {"query": _Query, "exemplar": _Exemplar, "coarse": _Coarse, "fine": _Fine}


def quarter(x: Tensor) -> Tensor:
    """Every fourth pixel of images (B, C, H, W) or class ids (B, H, W)."""
    return x[..., ::4, ::4]


class _Present:
    """The classes that occur in the current label, ascending, int64 (K,)."""

    classes: Tensor


class _PresentConv2d(nn.Module):
    """`convolution` over other channels, then the planes of the classes that occur."""

    def __init__(self, convolution: nn.Conv2d, classes: int, present: _Present) -> None:
        super().__init__()
        self.convolution, self.others, self.present = convolution, convolution.in_channels - classes, present

    def forward(self, x: Tensor) -> Tensor:
        columns = torch.cat([torch.arange(self.others), self.others + self.present.classes])
        weight = self.convolution.weight.index_select(1, columns)
        result: Tensor = self.convolution._conv_forward(x, weight, self.convolution.bias)
        return result


def _matrix_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.softmax(query @ key.mT, -1) @ value


def loop_attention(graph: GraphProto) -> tuple[list[NodeProto], list[TensorProto]]:
    """Nodes and initializers of a coarse stage whose one softmax(query key^T) value is a Loop over rows instead."""
    nodes = list(graph.node)
    places = [place for place, node in enumerate(nodes) if node.op_type == "Softmax"]
    if len(places) != 1:
        raise BundleError(f"coarse: expected one softmax, that of the self-attention; found {len(places)}")
    scores, softmax, product = trio = nodes[places[0] - 1 : places[0] + 2]
    if [node.op_type for node in trio] != ["MatMul", "Softmax", "MatMul"] or product.input[0] != softmax.output[0]:
        raise BundleError("coarse: the self-attention is not the three operators that its export makes")
    names = {"query": scores.input[0], "key": scores.input[1], "value": product.input[1], "out": product.output[0]}
    loop = onnx.parser.parse_graph(_ATTENTION.format(**names))
    nodes[places[0] - 1 : places[0] + 2] = loop.node
    return nodes, [*graph.initializer, *loop.initializer]


# query (B, N, D), key (B, D, M), value (B, M, V) -> out (B, N, V); the braces' names are those of the graph
_ATTENTION = f"""
    attention (float[B,N,D] {{query}}, float[B,D,M] {{key}}, float[B,M,V] {{value}}) => (float[B,N,V] {{out}})
    <int64[2] attention_split = {{{{0, -1}}}}, int64[2] attention_join = {{{{0, -1}}}},
     int64[1] attention_most = {{{{{ATTENTION_ROWS}}}}}, int64[1] attention_many = {{{{{FEWER_ROWS[0][0]}}}}},
     int64[1] attention_fewer = {{{{{FEWER_ROWS[0][1]}}}}}, int64[1] attention_very_many = {{{{{FEWER_ROWS[1][0]}}}}},
     int64[1] attention_fewest = {{{{{FEWER_ROWS[1][1]}}}}}, bool attention_always = {{{{1}}}}>
    {{{{
        attention_keys = Shape<start = 2, end = 3>({{key}})
        attention_above = Greater(attention_keys, attention_many)
        attention_far_above = Greater(attention_keys, attention_very_many)
        attention_at_most = Where(attention_above, attention_fewer, attention_most)
        attention_at_once = Where(attention_far_above, attention_fewest, attention_at_most)
        attention_depth = Shape<start = 2, end = 3>({{query}})
        attention_split_shape = Concat<axis = 0>(attention_split, attention_at_once, attention_depth)
        attention_parts = Reshape({{query}}, attention_split_shape)
        attention_queries = Transpose<perm = [1, 0, 2, 3]>(attention_parts)
        attention_count = Shape<start = 0, end = 1>(attention_queries)
        attention_steps = Squeeze(attention_count)
        attention_rows = Loop<body = attention_step
            (int64 attention_row, bool attention_going) => (bool attention_go_on, float[B,R,V] attention_out)
        {{{{
            attention_go_on = Identity(attention_going)
            attention_query = Gather(attention_queries, attention_row)
            attention_logits = MatMul(attention_query, {{key}})
            attention_weights = Softmax<axis = -1>(attention_logits)
            attention_out = MatMul(attention_weights, {{value}})
        }}}}>(attention_steps, attention_always)
        attention_joined = Transpose<perm = [1, 0, 2, 3]>(attention_rows)
        attention_width = Shape<start = 2, end = 3>({{value}})
        attention_join_shape = Concat<axis = 0>(attention_join, attention_width)
        {{out}} = Reshape(attention_joined, attention_join_shape)
    }}}}"""
