"""Every case runs, at the smallest size, on small models: prepared, compared within its bound, timed once."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import CLASSES, exported_stage, exported_stages, model_file, seeded_model

from flashcocos.benchmarks import worker
from flashcocos.benchmarks.__main__ import main
from flashcocos.benchmarks.cases import all_cases, warp_case
from flashcocos.benchmarks.registry import Assets, Case
from flashcocos.benchmarks.runner import References, open_assets
from flashcocos.benchmarks.speed import machine, naive, translation, warp
from flashcocos.benchmarks.speed.inputs import differences, inputs, network_inputs
from flashcocos.benchmarks.speed.naive import Published
from flashcocos.benchmarks.speed.naive import seeded_model as random_model
from flashcocos.config import ModelConfig
from flashcocos.errors import BackendError
from flashcocos.export import bundle as bundle_writer
from flashcocos.export.single import single_graph
from flashcocos.runtime.cpu.pipeline import CpuPipeline
from flashcocos.train.checkpoint import load_model, save_model
from flashcocos.train.networks import CoCosNet

# a network of 4 channels for the step of training, in place of ade20k's
SMALL_TRAINING = ["model.preset=tiny", "optimizer.discriminator_width=4"]
# and without the networks and norms beside it, for an estimate
SMALL_ESTIMATE = [
    "model.preset=tiny",
    "perceptual=none",
    "loss.adversarial=0.0",
    "loss.discriminator_features=0.0",
    "supervised.image=1.0",
    "optimizer.spectral_norm=false",
]


def shrunk(case: Case) -> Case:
    """`case` at the smallest size that its benchmark takes, once."""
    parameters: dict[str, Any] = dict(case.parameters)
    if "size" in parameters:
        parameters["size"] = 16 if case.group == "warp" else 64
    if case.group == "warp":
        parameters["channels"] = 8
    if case.group == "strides":
        parameters["preset"] = "tiny"
    if case.group == "training":
        # once with VGG19, which is large whatever the network
        parameters["changes"] = SMALL_TRAINING + ["perceptual=none"] * (parameters["method"] == "matrix")
    if case.group == "estimate":
        parameters |= {"changes": SMALL_ESTIMATE, "budgets_gib": [0.025], "checkpointing": False}
    if "batch" in parameters:
        parameters["batch"] = min(parameters["batch"], 2)
    if "side" in parameters:
        parameters["side"] = 32
    return dataclasses.replace(case, parameters=parameters, repeats=1, memory=0, warmup=False)


def distinct(cases: list[Case]) -> list[Case]:
    """One case of each benchmark and parameters."""
    found: dict[str, Case] = {}
    for case in cases:
        found.setdefault(json.dumps([case.benchmark, *sorted(case.parameters.items())]), case)
    return list(found.values())


ALL = distinct([shrunk(case) for case in all_cases(extra_bundles=["other"])])
# tests/serve/test_server.py runs those of the service
CASES = [case for case in ALL if case.parameters.get("method") != "naive-openvino" and case.group != "serving"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `benchmarks model` makes, from the exports that the tests share; the graph is not the naive one."""
    folder = tmp_path_factory.mktemp("model")
    shutil.copy(model_file(CLASSES), folder / "model.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle_writer, "export_stage", lambda model, stage: exported_stage(model.config, stage))
        bundle_writer.export_bundle(model_file(CLASSES), folder / "bundle")
    (folder / "naive.onnx").write_bytes(single_graph(CLASSES, exported_stages(CLASSES)).SerializeToString())
    return folder


@pytest.fixture(scope="module")
def assets(folder: Path) -> Assets:
    return open_assets(folder, {"other": str(folder / "bundle")}, threads=1)


@pytest.fixture(autouse=True)
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """No C++ compiler, no long copies, no repeats for the sake of a clock."""
    compiled = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(machine, "COPY_BYTES", 2**20)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_every_case_runs(case: Case, assets: Assets, monkeypatch: pytest.MonkeyPatch) -> None:
    if {"bfloat16", "openvino"} <= set(case.requires):
        pytest.skip("few CPUs have bfloat16; the runtime's tests refuse it elsewhere")
    for package in set(case.requires) & {"openvino", "numba", "packaging"}:
        pytest.importorskip(package, reason=f"needs {package}")
    if case.reference:
        known = {one.name: shrunk(one) for one in all_cases()}
        monkeypatch.setattr("flashcocos.benchmarks.runner.isolated", _here)
        assert References(known, assets).missing(case.reference) == ""
    row = worker.measure(case, assets)
    json.dumps(row)
    if row["status"] == "measured":
        assert all(row["facts"].values())
        return
    assert row["status"] == "timed", row
    assert row["ms"]["median"] > 0
    assert (case.gate is None) == (row["quality"] == {})
    if case.reference:
        rounded = "bfloat16" in case.requires
        assert row["quality"]["psnr_db"] > (30 if rounded else 60)
        assert row["quality"]["ssim"] > (0.99 if rounded else 0.999)


def _here(case: Case, assets: Assets, *, timed: bool) -> dict[str, Any]:
    return worker.measure(case, assets, timed=timed)


@pytest.mark.parametrize("method", warp.TRITON_KERNELS)
def test_the_cases_of_a_gpu_run_in_triton(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="times the Triton kernels")
    monkeypatch.setattr(warp, "SMALL", 4)
    case = warp_case(method, 64, device="cuda")
    case = dataclasses.replace(shrunk(case), parameters={**case.parameters, "size": 4, "channels": 16})
    row = worker.measure(case, Assets(device="cuda" if torch.cuda.is_available() else "cpu"))
    assert row["status"] == "timed", row
    assert 0 < row["quality"]["max_error"] < 2e-3


class StandIn(torch.nn.Module):
    """What takes a label and an exemplar to a picture of the exemplar's size, and exports in a moment."""

    def __init__(self, model: CoCosNet) -> None:
        super().__init__()
        self.mix = torch.nn.Conv2d(model.config.label_channels, 3, 3, padding=1)
        self.model = [model]

    def forward(self, label: torch.Tensor, exemplar: torch.Tensor, exemplar_label: torch.Tensor) -> torch.Tensor:
        planes = self.model[0].label_planes(label) + self.model[0].label_planes(exemplar_label)
        return torch.tanh(exemplar + self.mix(planes))


def test_the_naive_graph_has_any_size_and_runs_in_both_engines(
    assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(naive, "Published", StandIn)
    path = naive.export_naive(assets.model, tmp_path / "naive.onnx")
    graph = dataclasses.replace(assets, naive=str(path), references=str(tmp_path))
    (case,) = [one for one in ALL if one.name == "ablation/naive-openvino-256"]
    for size in (64, 96):
        parameters = {"method": "naive", "size": size}
        own = dataclasses.replace(case, parameters=parameters, gate=None, reference="", name=f"test/{size}")
        assert worker.measure(own, graph)["status"] == "timed"
        assert np.load(tmp_path / f"test/{size}.npy").shape == (size, size, 3)
        if importlib.util.find_spec("openvino"):
            parameters = {"method": "naive-openvino", "size": size}
            row = worker.measure(dataclasses.replace(case, parameters=parameters, reference=f"test/{size}"), graph)
            assert row["quality"]["psnr_db"] > 60


@pytest.mark.parametrize("label_cached", [False, True])
def test_each_run_encodes_its_label_unless_it_was_encoded(
    assets: Assets, monkeypatch: pytest.MonkeyPatch, label_cached: bool
) -> None:
    """Although a translator keeps the labels that it has encoded."""
    stages: list[str] = []
    run = CpuPipeline._run
    monkeypatch.setattr(CpuPipeline, "_run", lambda self, stage, *rest: stages.append(stage) or run(self, stage, *rest))
    (case,) = [one for one in CASES if one.name == f"ablation/runtime-{'label' if label_cached else 'cached'}-256"]
    prepared = translation.prepare(dataclasses.replace(case, reference=""), dataclasses.replace(assets, references=""))
    assert stages == ["exemplar", *["query"] * label_cached]
    pictures = [prepared.run().result for _ in range(3)]
    assert stages.count("query") == (1 if label_cached else 3)
    assert np.array_equal(pictures[0], pictures[1]) == label_cached


def test_a_picture_too_far_off_is_not_timed(assets: Assets, tmp_path: Path) -> None:
    (case,) = [one for one in CASES if one.name == "ablation/runtime-cached-256"]
    other = dataclasses.replace(assets, references=str(tmp_path))
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    (tmp_path / "ablation").mkdir()
    np.save(tmp_path / f"{case.reference}.npy", picture)
    row = worker.measure(case, other)
    assert row["status"] == "outside"
    assert row["quality"]["psnr_db"] < 20


def test_the_published_form_is_the_network(assets: Assets) -> None:
    model = seeded_model(CLASSES)
    arrays = [torch.from_numpy(array) for array in network_inputs(CLASSES, 64)]
    calls = []
    with torch.inference_mode():
        expected = model(*arrays).image
        form = Published(model).eval()
        form.model.generator.attention.register_forward_hook(lambda *_: calls.append(1))
        assert (form(*arrays) - expected).abs().max() < 1e-4
    assert len(calls) == 1
    assert form.model.generator.attention.attend is naive.matrix_attention
    assert model.generator.attention.attend is not naive.matrix_attention


def test_a_random_model_keeps_the_scale_of_its_maps(tmp_path: Path) -> None:
    model = load_model(random_model(CLASSES, tmp_path / "model.safetensors"))
    arrays = [torch.from_numpy(array) for array in network_inputs(CLASSES, 64)]
    with torch.inference_mode():
        image = model(*arrays).image
    assert 0.05 < image.std() < 0.9
    again = load_model(random_model(CLASSES, tmp_path / "again.safetensors"))
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), again.parameters(), strict=True))


def test_differences() -> None:
    black = np.zeros((4, 4, 3), np.uint8)
    assert differences(black, black) == {"psnr_db": 100.0, "max_abs": 0.0}
    assert differences(black, np.full_like(black, 255)) == {"psnr_db": 0.0, "max_abs": 255.0}
    assert differences(black, np.full_like(black, 1)) == {"psnr_db": 48.13, "max_abs": 1.0}


def test_inputs_suit_the_model() -> None:
    label, exemplar, exemplar_label = inputs(CLASSES, 96)
    assert (label.shape, exemplar.shape, label.max() < CLASSES.label_channels) == ((96, 96), (96, 96, 3), True)
    assert not np.array_equal(label, exemplar_label)
    assert inputs(ModelConfig.preset("tiny-channels"), 64)[0].shape == (5, 64, 64)


def test_requirements_follow_extras() -> None:
    pytest.importorskip("packaging", reason="needs the extra bench")
    light, heavy = (machine.requirements("flashcocos", [extra]) for extra in ("cpu", "train"))
    assert {"numpy", "pillow", "onnxruntime", "numba", "llvmlite"} <= set(light)
    assert "torch" in heavy
    assert not {"torch", "flashcocos"} & set(light)
    with pytest.raises(BackendError, match="no-such-distribution is not installed"):
        machine.requirements("no-such-distribution", [])


def test_the_command_line_lists_and_runs(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["list", "--group", "warp", "--only", "warp/numba-p1-*"]) == 0
    assert capsys.readouterr().out.count("warp/numba-p1") == 1
    assert main(["list", "--bundle", "int8"]) == 1
    assert "--bundle: expected NAME=PATH" in capsys.readouterr().err
    assert main(["run", "--group", "ablation", "-o", str(tmp_path)]) == 1
    assert "give --model FOLDER" in capsys.readouterr().err
    bundle = f"other={folder / 'bundle'}"
    words = ["run", "--model", str(folder), "--only", "warp/numpy-p3-n1024", "--bundle", bundle, "-o", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["benchmarks", *words])
    assert main(words) == 0
    row = json.loads((tmp_path / "warp.jsonl").read_text())
    assert row["command"].startswith(
        f"python -m flashcocos.benchmarks run --model {folder.name} --only warp/numpy-p3-n1024"
    )
    assert "--bundle other=bundle" in row["command"]
    assert str(folder.parent) not in json.dumps(row)


def test_pictures_of_changed_code_are_made_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for revision, kept in (("abc", True), ("abc+changes", False)):
        monkeypatch.setattr("flashcocos.benchmarks.runner.provenance", lambda name=revision: {"revision": name})
        file = Path(open_assets(folder, {}).references) / "case.npy"
        file.parent.mkdir(parents=True)
        file.touch()
        assert Path(open_assets(folder, {}).references) == file.parent
        assert file.exists() == kept


def test_a_model_folder_is_filled_once(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "model.safetensors", seeded_model(CLASSES))
    shutil.copytree(folder / "bundle", tmp_path / "bundle")
    asked = []
    monkeypatch.setattr("flashcocos.benchmarks.speed.naive.export_naive", lambda *paths: asked.append(paths))
    assert main(["model", "-o", str(tmp_path)]) == 0
    assert asked == [(tmp_path / "model.safetensors", tmp_path / "naive.onnx")]
    assert capsys.readouterr().out.split() == [
        str(tmp_path / name) for name in ("model.safetensors", "bundle", "naive.onnx")
    ]
