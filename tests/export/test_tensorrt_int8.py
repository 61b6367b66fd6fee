"""Engines of a quantised bundle: int8 reaches TensorRT, and what the bundle gives stays what it was."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest

from flashcocos import cli
from flashcocos.bundle import STAGES, Bundle
from flashcocos.export import tensorrt_builder
from flashcocos.export.memory_estimate import estimate
from flashcocos.export.quantize import quantize_bundle
from flashcocos.export.tensorrt_builder import build, parse_profile, stage_shapes
from flashcocos.export.tensorrt_check import MIN_PSNR, agreement
from flashcocos.export.tensorrt_graphs import bundle_graph
from flashcocos.export.tensorrt_int8 import int8_convolutions
from flashcocos.runtime.engine_store import Profile, list_engines
from flashcocos.runtime.info import describe_bundle
from flashcocos.runtime.jobs import plan_jobs
from flashcocos.runtime.shipped import PAIRS, shipped_bundle

SQUARE = Profile((1, 1, 1), (64, 64, 64), (64, 64, 64))
CONVOLUTIONS = 36  # of the shipped model in int8, see test_quantize.py
HALF, SINGLE = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT


@pytest.fixture(scope="module")
def rtx():
    return pytest.importorskip("tensorrt_rtx", reason="needs the extra rtx")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    pairs = plan_jobs(None, None, None, folder / "pictures", pairs=PAIRS)
    return quantize_bundle(shipped_bundle(), folder / "int8.zip", pairs[:2]).path


@pytest.fixture(scope="module")
def half(quantized):
    return bundle_graph(Bundle(quantized), "synthesis", "float16")


def made_by(graph):
    """Name of a tensor -> the node that makes it."""
    return {name: node for node in graph.graph.node for name in node.output}


def constants(graph):
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}


@pytest.mark.parametrize(("precision", "bound"), [("float32", MIN_PSNR["float32"]), ("float16", 47.0)])
def test_the_picture_is_that_of_the_bundle(quantized, precision, bound):
    found = agreement(Bundle(quantized), precision, 128)
    print(f"{precision}: {found:.1f} dB")
    assert found >= bound >= MIN_PSNR[precision]


def test_scales_are_kept_as_they_were_calibrated(quantized, half):
    """In float32 and bit for bit, for float16 would make nothing of the small ones; and there are no zero points."""
    stored = constants(onnx.load_model_from_string(Bundle(quantized).read_stage("synthesis")))
    found, seen = constants(half), 0
    for node in half.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale, zero = found[node.input[1]], found[node.input[2]]
            assert scale.dtype == np.float32
            assert (scale > 0).all()
            np.testing.assert_array_equal(scale, stored[node.input[1]])
            assert zero.dtype == np.int8
            assert not zero.any()
            seen += node.op_type == "QuantizeLinear"
    assert seen == 2 * CONVOLUTIONS  # what a convolution reads and what it gives


def test_int8_is_an_island_in_what_is_half(half):
    maker, stored = made_by(half), constants(half)
    inferred = onnx.shape_inference.infer_shapes(half).graph
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.value_info}
    types |= {tensor.name: tensor.data_type for tensor in inferred.initializer}
    small = [n for n in half.graph.node if n.op_type == "Conv" and maker[n.input[0]].op_type == "DequantizeLinear"]
    assert len(small) == int8_convolutions(half) == CONVOLUTIONS
    for node in small:
        weight = maker[node.input[1]]
        assert weight.op_type == "DequantizeLinear"
        assert stored[weight.input[0]].dtype == np.int8
        assert [stored[bias].dtype for bias in node.input[2:]] in ([], [np.dtype(np.float32)])
    others = {types[name] for n in half.graph.node if n.op_type == "Conv" and n not in small for name in n.input}
    assert others == {HALF}
    # float32 does not spread from the islands to what joins them
    assert {types[node.input[0]] for node in half.graph.node if node.op_type in ("Pad", "LeakyRelu")} == {HALF}


def test_other_stages_are_those_of_the_float_bundle(quantized):
    for stage in ("query", "exemplar"):
        graphs = [bundle_graph(Bundle(path), stage, "float16") for path in (quantized, shipped_bundle())]
        assert graphs[0].SerializeToString(deterministic=True) == graphs[1].SerializeToString(deterministic=True)
        assert int8_convolutions(graphs[0]) == 0


def test_the_plan_of_tensorrt_has_the_convolutions_in_int8(rtx, quantized, half):
    """Int8 pictures and weights into each of them, by the layers that the builder logs; nothing runs here."""

    class Logger(rtx.ILogger):
        def __init__(self):
            rtx.ILogger.__init__(self)
            self.lines = []

        def log(self, severity, message):
            self.lines += message.splitlines()

    logger = Logger()
    builder = rtx.Builder(logger)
    network = builder.create_network(1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert rtx.OnnxParser(network, logger).parse(half.SerializeToString())
    config = builder.create_builder_config()
    config.profiling_verbosity = rtx.ProfilingVerbosity.DETAILED
    tensorrt_builder._set_architectures(rtx, config, (86, 89, 120))
    profile = builder.create_optimization_profile()
    for name, shape in stage_shapes(Bundle(quantized), "synthesis", SQUARE, 1).items():
        profile.set_shape(name, shape, shape, shape)
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None
    layers = [line for line in logger.lines if "LayerType: correlation, " in line]
    reads = [tuple(re.findall(r"Datatype: (\w+)", line)[:2]) for line in layers]  # picture and weight
    assert reads.count(("Int8", "Int8")) == CONVOLUTIONS
    assert set(reads) == {("Int8", "Int8"), ("Half", "Half")}


def test_an_engine_is_built_and_says_that_it_is_int8(rtx, quantized, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt_builder, "STAGES", ("synthesis",))
    targets, weights = [86, 89, 120], {}
    for name, path in (("float", shipped_bundle()), ("int8", quantized)):
        for precision in ("float16", "float32"):
            (one,) = build(path, targets=targets, precision=precision, profiles=[SQUARE], output=tmp_path / name)
            weights[name, precision] = one.record.weight_bytes
            assert one.record.int8_convolutions == (CONVOLUTIONS if name == "int8" else 0)
    # what is not int8, and the scales, take the precision asked for
    assert weights["int8", "float16"] < 0.6 * weights["float", "float16"]
    assert weights["int8", "float32"] < 0.35 * weights["float", "float32"]
    assert {one.arithmetic for one in list_engines(tmp_path / "int8")} == {"int8 and float16", "int8 and float32"}
    assert "engine      synthesis in int8 and float16, 64 x 64" in describe_bundle(quantized, tmp_path / "int8")


def test_the_command_builds_and_checks(rtx, quantized, tmp_path, capsys):
    command = ["build", str(quantized), "--target", "sm_89", "--size", "64", "--check", "--no-kernels"]
    assert cli.main([*command, "-o", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "float16 against the bundle's graphs on the CPU, 128 px: " in printed
    assert printed.count(": built, ") == len(STAGES)
    assert printed.count(f"{CONVOLUTIONS} convolutions in int8, weights ") == 1


def test_the_estimate_takes_int8_for_what_is_stored(quantized, half):
    graph = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20]> g (float[1,4,n,8] x) => (float[1,4,n,8] z)
        <float scale = {0.5}, int8[4,4,1,1] weight = {0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0}> {
        q = QuantizeLinear(x, scale) d = DequantizeLinear(q, scale) w = DequantizeLinear(weight, scale)
        z = Conv(d, w) }"""
    )
    # the picture beside its int8 form at first, then that beside the result
    assert estimate(graph, {"x": (1, 4, 8, 8)}, fused_attention=False) == (4 + 1) * 4 * 8 * 8
    shapes = stage_shapes(Bundle(quantized), "synthesis", parse_profile("128", "1"), 2)
    single = estimate(bundle_graph(Bundle(quantized), "synthesis", "float32"), shapes, fused_attention=True)
    assert estimate(half, shapes, fused_attention=True) < single
