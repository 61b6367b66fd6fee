"""The single graph: the warp over strips against its definition, its memory, and the whole against the network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exported import CHANNELS, CLASSES, exported_stages, model_file
from onnx import ModelProto

from flashcocos.config import ModelConfig
from flashcocos.errors import CheckpointError, InputError
from flashcocos.export.graphs import OPSET, RANDOM
from flashcocos.export.single import export_single, single_graph, warp_graph
from flashcocos.export.verify import random_inputs
from flashcocos.kernels import corr_warp
from flashcocos.train.checkpoint import load_model

CONFIGS = {"classes": CLASSES, "channels": CHANNELS}


def session(model: ModelProto | Path) -> onnxruntime.InferenceSession:
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    made = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    assert made.get_providers() == ["CPUExecutionProvider"]
    return made


@pytest.mark.parametrize(
    ("query", "keys"), [((8, 8), (8, 8)), ((8, 24), (16, 40)), ((1, 3), (2, 1))], ids=["square", "other", "smallest"]
)
@pytest.mark.parametrize("temperature", [0.01, 1.0])
@pytest.mark.parametrize("patch", [1, 3, 5])
def test_the_warp_equals_its_definition(
    patch: int, temperature: float, query: tuple[int, int], keys: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(2, 24, *query, generator=generator)
    phi = torch.randn(2, 24, *keys, generator=generator) + 0.5
    values = torch.randn(2, 5, *keys, generator=generator)
    arrays = {"theta": theta.numpy(), "phi": phi.numpy(), "values": values.numpy()}
    found = session(warp_graph(patch, temperature)).run(None, arrays)[0]
    options = {"patch": patch, "temperature": temperature, "backend": "reference"}
    expected = corr_warp(theta.double(), phi.double(), values.double(), **options).numpy()
    # rounding of a correlation is divided by the temperature; the values are of order 1
    np.testing.assert_allclose(found, expected, rtol=0, atol=max(1e-5, 4e-7 / temperature))


@pytest.mark.parametrize("patch", [1, 3])
def test_openvino_runs_the_warp_too(patch: int) -> None:
    openvino = pytest.importorskip("openvino", reason="needs the extra openvino")
    rng = np.random.default_rng(0)
    shapes = {"theta": (2, 8, 4, 6), "phi": (2, 8, 6, 5), "values": (2, 3, 6, 5)}
    arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    core = openvino.Core()
    model = core.read_model(warp_graph(patch, 0.01).SerializeToString())
    found = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(arrays)[0]
    expected = corr_warp(*arrays.values(), patch=patch, backend="numpy")
    np.testing.assert_allclose(found, expected, rtol=0, atol=4e-5)


def test_constant_patches_correlate_with_nothing() -> None:
    theta, phi = np.zeros((1, 4, 8, 8), np.float32), np.ones((1, 4, 8, 8), np.float32)
    phi[:, :, :4] = np.random.default_rng(0).standard_normal((1, 4, 4, 8))
    values = np.random.default_rng(1).standard_normal((1, 3, 8, 8)).astype(np.float32)
    for a, b in ((theta, phi), (phi, theta)):
        found = session(warp_graph(3, 0.01)).run(None, {"theta": a, "phi": b, "values": values})[0]
        expected = corr_warp(a, b, values, backend="numpy")
        np.testing.assert_allclose(found, expected, rtol=0, atol=4e-5)


_PEAK = """
import resource, sys
import numpy as np, onnxruntime
from flashcocos.export.single import warp_graph
rng = np.random.default_rng(0)
session = onnxruntime.InferenceSession(warp_graph(3, 0.01).SerializeToString(), providers=["CPUExecutionProvider"])
def run(side):
    shapes = {"theta": 16, "phi": 16, "values": 3}
    arrays = {name: rng.standard_normal((1, c, side, side), np.float32) for name, c in shapes.items()}
    session.run(None, arrays)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
small = run(16)
print((run(128) - small) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")
def test_memory_is_a_strip_not_the_matrix() -> None:
    done = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True, timeout=300)
    positions = 128 * 128
    assert int(done.stdout) < positions * positions * 4 / 6  # of one matrix; a softmax holds two


@pytest.mark.parametrize(
    ("size", "exemplar_size"), [((64, 64), (64, 64)), ((64, 128), (96, 64))], ids=["square", "other"]
)
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_whole_equals_the_network(kind: str, size: tuple[int, int], exemplar_size: tuple[int, int]) -> None:
    config = CONFIGS[kind]
    label = random_inputs(config, size, 2)["label"]
    other = random_inputs(config, exemplar_size[::-1], 2)  # whose exemplar has height and width exchanged
    inputs = {"label": label, "exemplar": other["image"]}
    if config.condition_on_label:
        inputs["exemplar_label"] = other["exemplar_label"]
    with torch.inference_mode():
        tensors = [torch.from_numpy(array) for array in inputs.values()]
        expected = load_model(model_file(config))(*tensors, backend="reference")
    single = session(single_graph(config, exported_stages(config)))
    image, warped_image = single.run(["image", "warped_image"], inputs)
    for found, tensor in ((image, expected.image), (warped_image, expected.warped_image)):
        assert found.shape == (2, 3, *size)
        # the softmax at temperature 0.01 amplifies rounding of theta and phi
        np.testing.assert_allclose(found, tensor.numpy(), rtol=0, atol=1e-3)
        assert np.sqrt(np.mean(np.square(found - tensor.numpy()))) < 5e-5


@pytest.mark.parametrize(("kind", "exemplar"), [("classes", True), ("channels", False)])
def test_names_and_operators_are_pinned(kind: str, exemplar: bool) -> None:
    config = CONFIGS[kind]
    model = single_graph(config, exported_stages(config))
    axes = {info.name: [side.dim_param or side.dim_value for side in info.type.tensor_type.shape.dim]
            for info in (*model.graph.input, *model.graph.output)}  # fmt: skip
    planes = [] if kind == "classes" else [5]
    expected = {"label": ["batch", *planes, "height", "width"]}
    expected["exemplar"] = ["batch", 3, "exemplar_height", "exemplar_width"]
    if exemplar:
        expected["exemplar_label"] = ["batch", "exemplar_height", "exemplar_width"]
    expected["image"] = expected["warped_image"] = ["batch", 3, "height", "width"]
    assert axes == expected
    assert list(axes) == list(expected)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("Loop") == 2  # the warp and the self-attention
    assert not set(operators) & {*RANDOM, "Scan", "If"}


def test_weights_of_both_encoders_are_stored_once() -> None:
    stages = exported_stages(CLASSES)
    model = single_graph(CLASSES, stages)
    blocks = [t for t in stages["query"].graph.initializer if t.name.startswith("model.correspondence.residual")]
    assert blocks
    names = {tensor.name for tensor in model.graph.initializer}
    assert len([name for name in names if "correspondence.residual" in name]) == len(blocks)


def test_the_file(tmp_path: Path, shared_graphs: None) -> None:
    path = export_single(model_file(CLASSES), tmp_path / "deep" / "single.onnx", license="CC0-1.0")
    half = export_single(model_file(CLASSES), tmp_path / "half.onnx", precision="float16")
    model = onnx.load(path)
    facts = json.loads({entry.key: entry.value for entry in model.metadata_props}["flashcocos"])
    assert ModelConfig.from_dict(facts["config"]) == CLASSES
    assert facts["license"] == "CC0-1.0"
    assert len(facts["provenance"]["model_sha256"]) == 64
    assert facts["provenance"]["model"] == {"note": "seeded"}
    assert half.stat().st_size < 0.6 * path.stat().st_size
    inputs = random_inputs(CLASSES, (64, 64), 1)
    inputs["exemplar"] = inputs.pop("image")
    exact, rounded = (session(file).run(["image"], inputs)[0] for file in (path, half))
    assert np.isfinite(exact).all()
    assert 0 < np.sqrt(np.mean(np.square(exact - rounded))) < 0.02
    again = export_single(model_file(CLASSES), tmp_path / "again.onnx", license="CC0-1.0")
    assert again.read_bytes() == path.read_bytes()


def test_bad_requests_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"name it \*\.onnx"):
        export_single(model_file(CLASSES), tmp_path / "single.zip")
    with pytest.raises(InputError, match="precision 'int4' is unknown"):
        export_single(model_file(CLASSES), tmp_path / "single.onnx", precision="int4")
    (tmp_path / "no.safetensors").write_bytes(b"no model")
    with pytest.raises(CheckpointError, match=r"no\.safetensors"):
        export_single(tmp_path / "no.safetensors", tmp_path / "single.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["no.safetensors"]
