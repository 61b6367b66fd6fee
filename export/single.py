"""`flashcocos export --single`: the whole translation as one portable ONNX file of standard operators.

    label, exemplar (+ exemplar_label if mixing) -> image, warped_image

The stages are those of a bundle. Between them the warp is a Loop over the rows of the query map, so that memory is
O(w * M) for M key positions, never N x M. By the nine-tap identity a row of logits is a sum of shifted products of
plain channels: the loop carries the sums across the width of the last `patch - 1` rows, and each step adds one row's
matrix product. Any size divides, for the strip is one row.

Extra memory in ONNX Runtime 1.32 at N = M = 16384, C = 256, patch 3: 172 MB. The same loop over unfolded patches took
802 MB and seven times as long; the whole matrix, even without patches, 4.2 GB. A Scan does as well as the Loop, but
OpenVINO 2026.4 rejects one whose body reads values from outside.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import onnx.parser
from onnx import ModelProto, NodeProto, TensorProto, helper
from tqdm import tqdm

from ..bundle import MAX_FILE_BYTES, STAGES, TensorSpec
from ..bundle.stages import stage_tensors
from ..config import ModelConfig
from ..errors import InputError
from ..files import atomic_path
from ..train.checkpoint import load_model
from .bundle import check_precision, provenance
from .graphs import IR_VERSION, OPSET, check_graph, clean, export_stage, renamed, store_float16

FLAT_PATCH = 2.0**-20  # centered over raw mean square at which a patch is constant, to float32's rounding
_END = 2**31 - 1  # a slice's end: all the rest
# what the exemplar stage calls its inputs -> their names here, where the query has a label of its own
_EXEMPLAR = {"image": "exemplar", "label": "exemplar_label"}


def export_single(
    model_path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    precision: str = "float32",
    license: str = "",
) -> Path:
    """Export a model file to a single ONNX file.

    Configuration, license and provenance are JSON in the graph's metadata under "flashcocos".

    Args:
        model_path: Model file (.safetensors) of `flashcocos train` or `convert`.
        output: File to write; its name must end in ".onnx".
        precision: How the weights are stored, "float32" or "float16" (half the size; arithmetic stays float32).
        license: License of the weights, free text.

    Returns:
        Path of the ONNX file, `output`.

    Raises:
        InputError: A bad option, weights that do not fit float16, or a graph larger than an ONNX file can be.
        CheckpointError: A bad model file.
    """
    output = Path(output)
    if output.suffix != ".onnx":
        raise InputError(f"{output}: a single graph is an ONNX file; name it *.onnx")
    check_precision(precision)
    network = load_model(model_path)
    with tqdm(desc="export", total=len(STAGES), unit="graph", disable=None) as progress:
        stages = {}
        for stage in STAGES:
            stages[stage] = export_stage(network, stage)
            progress.update()
    model = single_graph(network.config, stages)
    if precision == "float16":
        store_float16(model)
    facts = {"config": json.loads(network.config.to_json()), "license": license, "provenance": provenance(model_path)}
    helper.set_model_props(model, {"flashcocos": json.dumps(facts)})
    if model.ByteSize() > MAX_FILE_BYTES:
        raise InputError(f"{output}: {model.ByteSize()} bytes are more than an ONNX file holds; export a bundle")
    with atomic_path(output) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))
    return output


def single_tensors(config: ModelConfig) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of the single graph; the exemplar has height and width of its own."""
    tensors = stage_tensors(config)

    def exemplar(tensor: TensorSpec) -> TensorSpec:
        axes = {"height": "exemplar_height", "width": "exemplar_width"}
        return TensorSpec(_EXEMPLAR[tensor.name], tensor.dtype, tuple(axes.get(str(a), a) for a in tensor.shape))

    inputs = (*tensors["query"][0], *map(exemplar, tensors["exemplar"][0]))
    return inputs, tensors["fine"][1]


def single_graph(config: ModelConfig, stages: Mapping[str, ModelProto]) -> ModelProto:
    """The stages of `export_stage`, by name, joined by the warp into one checked model."""
    warp = warp_graph(config.patch, config.temperature)
    nodes: list[NodeProto] = []
    initializers = list(warp.graph.initializer)
    for stage in STAGES:
        names = {tensor.name: tensor.name for tensors in stage_tensors(config)[stage] for tensor in tensors}
        if stage == "exemplar":
            names |= _EXEMPLAR
        if stage == "coarse":
            nodes += warp.graph.node
        added, weights = renamed(stages[stage].graph, f"{stage}/", names)
        nodes += added
        initializers += weights
    initializers = _shared(nodes, initializers)
    inputs, outputs = single_tensors(config)
    graph = helper.make_graph(nodes, "flashcocos", [], [], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    clean(model, "flashcocos", inputs, outputs)
    check_graph(model, "flashcocos", inputs, outputs)
    return model


def warp_graph(patch: int, temperature: float) -> ModelProto:
    """theta (batch, C, h, w), phi (batch, C, hk, wk), values (batch, V, hk, wk) -> warped (batch, V, h, w), exact.

    Source: arXiv 2004.05571, equations 2 and 3, with `patch` x `patch` patches; float32.
    """
    half, halo = patch // 2, patch - 1
    carried = [f"across_{i}" for i in range(halo)]  # per row of the query map, oldest first
    row_type = "float[batch,w,hp,wk]"
    text = f"""
    <ir_version: {IR_VERSION}, opset_import: ["": {OPSET}]>
    warp (float[batch,C,h,w] theta, float[batch,C,hk,wk] phi, float[batch,V,hk,wk] values)
        => (float[batch,V,h,w] warped)
    <int64[1] axis_0 = {{0}}, int64[1] axis_1 = {{1}}, int64[1] rest = {{-1}}, int64[3] flat = {{0, 0, -1}},
     int64[1] first_row = {{{half}}}, int64[1] end = {{{_END}}}, int64[1] halo = {{{halo}}},
     int64[8] below = {{0, 0, 0, 0, 0, 0, {half}, 0}}, int64[8] above = {{0, 0, {half}, 0, 0, 0, 0, 0}},
     float taps = {{{patch * patch}.0}}, float flat_patch = {{{FLAT_PATCH!r}}}, float nothing = {{0.0}},
     bool always = {{1}}, float sharpness = {{{1.0 / temperature!r}}}{_shifts(patch)}>
    {{
        C = Shape<start = 1, end = 2>(phi)
        channels = Cast<to = {TensorProto.FLOAT}>(C)
        D = Mul(channels, taps)
        {_statistics("theta", patch)}
        {_statistics("phi", patch)}
        a = Mul(theta_scale, sharpness)
        center = Mul(theta_mean, D)
        a_center = Mul(a, center)
        b_nu = Mul(phi_scale, phi_mean)

        phi_flat = Reshape(phi, flat)
        b_flat = Reshape(phi_scale, flat)
        b_nu_flat = Reshape(b_nu, flat)
        values_flat = Reshape(values, flat)
        values_rows = Transpose<perm = [0, 2, 1]>(values_flat)

        batch_size = Shape<start = 0, end = 1>(theta)
        width = Shape<start = 3, end = 4>(theta)
        key_height = Shape<start = 2, end = 3>(phi)
        key_width = Shape<start = 3, end = 4>(phi)
        padded_height = Add(key_height, halo)
        product_shape = Concat<axis = 0>(batch_size, width, key_height, key_width)
        across_shape = Concat<axis = 0>(batch_size, width, padded_height, key_width)
        logits_shape = Concat<axis = 0>(batch_size, width, rest)
        zeros = ConstantOfShape(across_shape)

        theta_padded = Pad(theta, below)
        theta_rows = Transpose<perm = [2, 0, 3, 1]>(theta_padded)
        a_padded = Pad(a, above)
        a_rows = Transpose<perm = [2, 0, 3, 1]>(a_padded)
        a_center_padded = Pad(a_center, above)
        a_center_rows = Transpose<perm = [2, 0, 3, 1]>(a_center_padded)

        height = Shape<start = 2, end = 3>(theta_padded)
        steps = Squeeze(height)
        {"".join(f"last_{i}, " for i in range(halo))}rows = Loop<body = step
            (int64 row, bool going{"".join(f", {row_type} {name}" for name in carried)})
            => (bool go_on{"".join(f", {row_type} next_{i}" for i in range(halo))}, float[batch,w,V] warped_row)
        {{
            go_on = Identity(going)
            theta_row = Gather(theta_rows, row)
            a_row = Gather(a_rows, row)
            a_center_row = Gather(a_center_rows, row)
            {_step(patch, carried)}
            scaled_keys = Mul(taps_flat, b_flat)
            scaled = Mul(scaled_keys, a_row)
            means = Mul(a_center_row, b_nu_flat)
            logits = Sub(scaled, means)
            weights = Softmax<axis = -1>(logits)
            warped_row = MatMul(weights, values_rows)
        }}>(steps, always{", zeros" * halo})
        kept = Slice(rows, first_row, end, axis_0)
        warped = Transpose<perm = [1, 3, 0, 2]>(kept)
    }}"""
    return onnx.parser.parse_model(text)


def _statistics(name: str, patch: int) -> str:
    """`<name>_mean` and `<name>_scale`, the reciprocal centered norm, of the patch around each position."""
    pool = f"AveragePool<kernel_shape = [{patch}, {patch}], pads = [{', '.join([str(patch // 2)] * 4)}]"
    # a constant patch has a centered norm of rounding alone: it correlates with nothing, as in `flashcocos.kernels`
    return f"""
        {name}_sum = ReduceMean(NAME, axis_1)
        {name}_mean = {pool}, count_include_pad = 1>({name}_sum)
        {name}_square = Mul(NAME, NAME)
        {name}_square_sum = ReduceMean({name}_square, axis_1)
        {name}_power = {pool}, count_include_pad = 1>({name}_square_sum)
        {name}_mean_square = Mul({name}_mean, {name}_mean)
        {name}_variance = Sub({name}_power, {name}_mean_square)
        {name}_floor = Mul({name}_power, flat_patch)
        {name}_proper = Greater({name}_variance, {name}_floor)
        {name}_length_square = Mul({name}_variance, D)
        {name}_length = Sqrt({name}_length_square)
        {name}_reciprocal = Reciprocal({name}_length)
        {name}_scale = Where({name}_proper, {name}_reciprocal, nothing)""".replace("NAME", name)


def _shifts(patch: int) -> str:
    """Constants for `_step`: the padding of a product, and the bounds of slices that shift one axis or two by a tap."""
    half, halo = patch // 2, patch - 1
    if patch == 1:
        return ""
    constants = ["int64[1] axis_2 = {2}", "int64[2] axes_13 = {1, 3}"]
    constants.append(f"int64[8] around = {{0, {half}, {half}, {half}, 0, {half}, {half}, {half}}}")
    for tap in range(patch):
        stop = tap - halo if tap < halo else _END
        for name, bound in (("from", tap), ("to", stop)):
            constants.append(f"int64[1] {name}_{tap} = {{{bound}}}, int64[2] {name}_{tap}_2 = {{{bound}, {bound}}}")
    return ", " + ", ".join(constants)


def _step(patch: int, carried: list[str]) -> str:
    """One row of the query map: its product with all keys, the taps across, the taps down with the carried rows."""
    lines = ["product_flat = MatMul(theta_row, phi_flat)", "product = Reshape(product_flat, product_shape)"]
    if patch == 1:
        return "\n".join([*lines, "taps_flat = Reshape(product, logits_shape)"])
    # a shift along query and key columns at once; the padded key rows are for the taps down
    lines.append("padded = Pad(product, around)")
    lines += [f"column_{i} = Slice(padded, from_{i}_2, to_{i}_2, axes_13)" for i in range(patch)]
    lines += _sum("across", [f"column_{i}" for i in range(patch)])
    rows = [*carried, "across"]
    lines += [f"row_{i} = Slice({name}, from_{i}, to_{i}, axis_2)" for i, name in enumerate(rows)]
    lines += _sum("summed", [f"row_{i}" for i in range(patch)])
    lines.append("taps_flat = Reshape(summed, logits_shape)")
    # a subgraph may not give back an outer or an input name as it is
    lines += [f"next_{i} = Identity({name})" for i, name in enumerate(rows[1:])]
    return "\n".join(lines)


def _sum(name: str, terms: list[str]) -> list[str]:
    """`name` = the sum of `terms`, two or more."""
    partial = [*(f"{name}_{i}_sum" for i in range(len(terms) - 2)), name]
    lines = [f"{partial[0]} = Add({terms[0]}, {terms[1]})"]
    lines += [f"{partial[i - 1]} = Add({partial[i - 2]}, {terms[i]})" for i in range(2, len(terms))]
    return lines


def _shared(nodes: list[NodeProto], initializers: list[TensorProto]) -> list[TensorProto]:
    """`initializers` with one of each that are equal, which `nodes` now read: both encoders share residual blocks."""
    first: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    twins: dict[str, str] = {}
    kept = []
    for tensor in initializers:
        key = (tensor.data_type, tuple(tensor.dims), hashlib.sha256(tensor.raw_data).digest())
        if tensor.raw_data and key in first:
            twins[tensor.name] = first[key]
        else:
            first[key] = tensor.name
            kept.append(tensor)
    for node in nodes:
        node.input[:] = [twins.get(name, name) for name in node.input]
    return kept
