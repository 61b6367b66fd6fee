"""Engines of a quantized bundle: int8 reaches TensorRT, and the picture is as good as the bundle's own or better."""

from __future__ import annotations

import re

import numpy as np
import onnx
import onnxruntime
import pytest

from flashcocos import cli
from flashcocos.bundle import STAGES, Bundle
from flashcocos.bundle.default_model import resolve_model
from flashcocos.errors import BackendError
from flashcocos.export.quantize import MIN_PSNR as QUALITY
from flashcocos.export.quantize import quantize_bundle
from flashcocos.export.tensorrt import build as build_module
from flashcocos.export.tensorrt.build import build, stage_shapes
from flashcocos.export.tensorrt.check import MIN_PSNR, agreement
from flashcocos.export.tensorrt.graphs import bundle_graph, tensorrt_graph
from flashcocos.export.tensorrt.int8 import int8_convolutions
from flashcocos.kernels.corr_warp import warp_arrays
from flashcocos.preprocess.images import load_image, to_uint8
from flashcocos.preprocess.labels import load_label
from flashcocos.runtime.cpu.onnxruntime import OnnxRuntimeEngine
from flashcocos.runtime.gpu.store import Profile, list_engines
from flashcocos.runtime.info import describe_bundle

SQUARE = Profile((1, 1, 1), (64, 64, 64), (64, 64, 64))
GENERATOR = tuple(stage for stage in STAGES if stage not in ("query", "exemplar"))
CONVOLUTIONS = 54  # of the shipped model in int8, see test_quantize.py
INPUTS = 36  # of these, for a scale and its shift are of the same features
HALF, SINGLE = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT


@pytest.fixture(scope="module")
def rtx():
    return pytest.importorskip("tensorrt_rtx", reason="needs the extra rtx")


@pytest.fixture(scope="module")
def quantized(pairs, tmp_path_factory):
    return quantize_bundle(resolve_model(), tmp_path_factory.mktemp("bundle") / "int8.zip", pairs[:4]).path


@pytest.fixture(scope="module")
def half(quantized):
    """Stage of the generator -> its graph for TensorRT in float16."""
    return {stage: bundle_graph(Bundle(quantized), stage, "float16") for stage in GENERATOR}


def run(graph, feeds):
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def warped(bundle, pair):
    """The inputs of the generator for a pair of the demonstration, by name."""
    config = bundle.manifest.config
    label, exemplar_label = (load_label(config, path)[None] for path in (pair.label, pair.exemplar_label))
    exemplar = {"image": load_image(pair.exemplar)[None], "label": exemplar_label}
    features = OnnxRuntimeEngine(bundle, "exemplar").run(exemplar)
    theta = OnnxRuntimeEngine(bundle, "query").run({"label": label})["theta"]
    arrays = theta, features["phi"], features["values"]
    return {"warped": warp_arrays(*arrays, patch=config.patch, temperature=config.temperature).out, "label": label}


def generate(bundle, arrays, run_stage):
    """The picture that the stages of the generator make of `arrays`, each run by `run_stage(stage, feeds)`."""
    for stage in GENERATOR:
        inputs = bundle.manifest.stages[stage].inputs
        arrays = arrays | run_stage(stage, {tensor.name: arrays[tensor.name] for tensor in inputs})
    return arrays["image"][0]


def psnr(found, expected):
    return 10 * np.log10(255**2 / np.mean(np.square(found.astype(float) - expected)))


def made_by(graph):
    """Name of a tensor -> the node that makes it."""
    return {name: node for node in graph.graph.node for name in node.output}


def constants(graph):
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_the_rewriting_and_float16_cost_what_they_do_without_int8(quantized, precision):
    found = agreement(Bundle(quantized), precision, 128)
    print(f"{precision}: {found:.1f} dB")
    assert found >= MIN_PSNR[precision]


def test_the_quality_bound_holds_for_what_tensorrt_is_given(quantized, half, pairs):
    """Against the float bundle, on pairs that calibration did not see."""
    small, large = Bundle(quantized), Bundle(resolve_model())
    for pair in (pairs[0], *pairs[4:]):
        arrays = warped(large, pair)
        expected, on_cpu = (
            to_uint8(generate(one, arrays, lambda stage, feeds, one=one: OnnxRuntimeEngine(one, stage).run(feeds)))
            for one in (large, small)
        )
        found = psnr(generate(small, arrays, lambda stage, feeds: run(half[stage], feeds)), expected)
        print(f"{found:.1f} dB; by ONNX Runtime {psnr(on_cpu, expected):.1f} dB")
        assert found >= 50  # measured: 55 and more
        assert found > psnr(on_cpu, expected) >= QUALITY  # the results of convolutions are not rounded here


def test_scales_are_kept_as_they_were_calibrated(quantized):
    """In float32 and bit for bit, for float16 would make nothing of the small ones; and there are no zero points."""
    kinds = []
    for stage in GENERATOR:
        graph = onnx.load_model_from_string(Bundle(quantized).read_stage(stage))
        first = next(node for node in graph.graph.node if node.op_type == "QuantizeLinear").input[1]
        tiny = onnx.numpy_helper.from_array(np.array(1e-9, np.float32), first)
        next(tensor for tensor in graph.graph.initializer if tensor.name == first).CopyFrom(tiny)
        classes = Bundle(quantized).manifest.config.label_channels
        rewritten = tensorrt_graph(graph.SerializeToString(), stage, classes=classes, half=True)
        stored, found = constants(graph), constants(rewritten)
        assert found[first] == np.float32(1e-9)
        for node in rewritten.graph.node:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                scale, zero = found[node.input[1]], found[node.input[2]]
                assert scale.dtype == np.float32
                assert (scale > 0).all()
                np.testing.assert_array_equal(scale, stored[node.input[1]])
                assert zero.dtype == np.int8
                assert not zero.any()
                kinds.append(node.op_type)
    # inputs and weights, and neither results nor biases
    assert (kinds.count("QuantizeLinear"), kinds.count("DequantizeLinear")) == (INPUTS, INPUTS + CONVOLUTIONS)


def test_int8_is_an_island_in_what_is_half(half):
    assert sum(map(int8_convolutions, half.values())) == CONVOLUTIONS
    for graph in half.values():
        maker, stored = made_by(graph), constants(graph)
        inferred = onnx.shape_inference.infer_shapes(graph).graph
        types = {value.name: value.type.tensor_type.elem_type for value in inferred.value_info}
        types |= {tensor.name: tensor.data_type for tensor in inferred.initializer}
        convolutions = [node for node in graph.graph.node if node.op_type == "Conv"]
        small = [n for n in convolutions if n.input[0] in maker and maker[n.input[0]].op_type == "DequantizeLinear"]
        assert len(small) == int8_convolutions(graph)
        for node in small:
            weight = maker[node.input[1]]
            assert weight.op_type == "DequantizeLinear"
            assert stored[weight.input[0]].dtype == np.int8
            assert [stored[bias].dtype for bias in node.input[2:]] in ([], [np.dtype(np.float32)])
        assert {types[name] for node in convolutions if node not in small for name in node.input} == {HALF}
        # float32 does not spread from the islands to what joins them
        assert {types[node.input[0]] for node in graph.graph.node if node.op_type in ("Pad", "LeakyRelu")} == {HALF}


def test_other_stages_are_those_of_the_float_bundle(quantized):
    for stage in ("query", "exemplar"):
        graphs = [bundle_graph(Bundle(path), stage, "float16") for path in (quantized, resolve_model())]
        assert graphs[0].SerializeToString(deterministic=True) == graphs[1].SerializeToString(deterministic=True)
        assert int8_convolutions(graphs[0]) == 0


def planned(rtx, bundle, graphs):
    """Types of the activation and weight that each convolution of the engines reads, by what the builder logs."""

    class Logger(rtx.ILogger):
        def __init__(self):
            rtx.ILogger.__init__(self)
            self.lines = []

        def log(self, severity, message):
            self.lines += message.splitlines()

    logger = Logger()
    for stage, graph in graphs.items():
        builder = rtx.Builder(logger)
        network = builder.create_network(1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = rtx.OnnxParser(network, logger)
        assert parser.parse(graph.SerializeToString())
        config = builder.create_builder_config()
        config.profiling_verbosity = rtx.ProfilingVerbosity.DETAILED
        build_module._set_architectures(rtx, config, (86, 89, 120))
        profile = builder.create_optimization_profile()
        for name, shape in stage_shapes(bundle, stage, SQUARE, 1).items():
            profile.set_shape(name, shape, shape, shape)
        config.add_optimization_profile(profile)
        assert builder.build_serialized_network(network, config) is not None
    layers = [line for line in logger.lines if "LayerType: correlation, " in line]
    return [tuple(re.findall(r"Datatype: (\w+)", line)[:2]) for line in layers]


def test_the_plan_of_tensorrt_has_the_convolutions_in_int8(rtx, quantized, half):
    reads = planned(rtx, Bundle(quantized), half)
    assert reads.count(("Int8", "Int8")) == CONVOLUTIONS
    assert set(reads) == {("Int8", "Int8"), ("Half", "Half")}


def test_a_failed_build_leaves_nothing_to_the_next(rtx, quantized, half, tmp_path, monkeypatch):
    """Without int8, as for sm_75, tensorrt-rtx 1.7 would make the next engine."""
    monkeypatch.setattr(build_module, "STAGES", GENERATOR)
    with pytest.raises(BackendError, match="for sm_75: the build failed: "):
        list(build(quantized, targets=[75], precision="float32", profiles=[SQUARE], output=tmp_path))
    assert planned(rtx, Bundle(quantized), half).count(("Int8", "Int8")) == CONVOLUTIONS


def test_engines_are_built_and_say_that_they_are_int8(rtx, quantized, tmp_path, monkeypatch):
    monkeypatch.setattr(build_module, "STAGES", GENERATOR)
    targets, weights = [86, 89, 120], {}
    for name, path in (("float", resolve_model()), ("int8", quantized)):
        for precision in ("float16", "float32"):
            engines = build(path, targets=targets, precision=precision, profiles=[SQUARE], output=tmp_path / name)
            records = [one.record for one in engines]
            weights[name, precision] = sum(record.weight_bytes for record in records)
            assert sum(record.int8_convolutions for record in records) == (CONVOLUTIONS if name == "int8" else 0)
    # what is not int8 takes the precision asked for
    assert weights["int8", "float16"] < 0.6 * weights["float", "float16"]
    assert weights["int8", "float32"] < 0.35 * weights["float", "float32"]
    assert {one.arithmetic for one in list_engines(tmp_path / "int8")} == {"int8 and float16", "int8 and float32"}
    assert f"engine                  {GENERATOR[0]} in int8 and float16, 64 x 64" in describe_bundle(
        quantized, tmp_path / "int8"
    )


def test_the_command_builds_and_checks(rtx, quantized, tmp_path, capsys):
    command = ["build", str(quantized), "--target", "sm_89", "--size", "64", "--check", "--no-kernels"]
    assert cli.main([*command, "-o", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "float16 against the bundle's graphs on the CPU, 128 px, int8 apart: " in printed
    assert printed.count(": built, ") == len(STAGES)
    assert printed.count(" convolutions in int8, weights ") == len(GENERATOR)
