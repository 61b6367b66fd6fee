"""`flashcocos export-triton`: golden configurations, what the folders hold, and what is refused."""

from __future__ import annotations

import subprocess
from pathlib import Path

import onnx
import pytest
from kernel_twins import kernel_files, write_kernels
from tiny_bundle import CHANNELS, CLASSES, write_tiny_bundle

from flashcocos.bundle import STAGES, Bundle, write_bundle
from flashcocos.bundle.default_model import resolve_model
from flashcocos.cli import main
from flashcocos.errors import InputError
from flashcocos.export.triton_server import MODELS, export_triton
from flashcocos.runtime.gpu.cubins import FOLDER, available_kernels
from flashcocos.runtime.gpu.store import default_folder

GOLDEN = Path(__file__).parent / "triton_server"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_tiny_bundle(tmp_path / "m.zip")


def configurations(folder: Path) -> dict[str, str]:
    return {path.parent.name: path.read_text() for path in folder.glob("*/config.pbtxt")}


def test_the_configurations_are_the_golden_ones(tmp_path: Path) -> None:
    made = configurations(export_triton(resolve_model(), tmp_path / "models"))
    golden = {path.stem: path.read_text() for path in GOLDEN.glob("*.pbtxt")}
    assert set(made) == set(MODELS) == set(golden)
    for model, text in golden.items():
        assert made[model] == text, model


def test_labels_of_planes_have_their_axis(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "m.zip", CHANNELS)
    made = configurations(export_triton(bundle, tmp_path / "models"))
    assert 'name: "label" data_type: TYPE_UINT8 dims: [ 5, -1, -1 ] }' in made["translate"]
    assert 'name: "label" data_type: TYPE_FP32 dims: [ 5, -1, -1 ] }' in made["query"]
    assert "exemplar_label" not in made["translate"]  # this model's exemplars have no label
    assert "label" not in made["exemplar"]
    assert "means" not in made["translate_ensemble"]


def test_platform_and_device_change_two_lines(tmp_path: Path, bundle: Path) -> None:
    write_kernels(default_folder(bundle) / FOLDER, CLASSES)
    plain = configurations(export_triton(bundle, tmp_path / "models"))
    python = configurations(export_triton(bundle, tmp_path / "python", platform="python", instances=3))
    tensorrt = configurations(export_triton(bundle, tmp_path / "tensorrt", platform="tensorrt", gpu=True))
    for stage in STAGES:
        cpu = plain[stage].replace("count: 1", "count: 3")
        assert python[stage] == cpu.replace('backend: "onnxruntime"', 'backend: "python"')
        gpu = plain[stage].replace("KIND_CPU", "KIND_GPU")
        assert tensorrt[stage] == gpu.replace('backend: "onnxruntime"', 'backend: "tensorrt"')
    assert python["warp"] == plain["warp"].replace("count: 1", "count: 3")
    assert tensorrt["warp"] == plain["warp"].replace("KIND_CPU", "KIND_GPU")
    for model in ("translate", "translate_ensemble"):  # the entry keeps the exemplars, in one process on the host
        assert plain[model] == python[model] == tensorrt[model]


def test_the_graphs_are_those_of_the_bundle(tmp_path: Path, bundle: Path) -> None:
    folder = export_triton(bundle, tmp_path / "models")
    for stage in STAGES:
        assert (folder / stage / "1" / "model.onnx").read_bytes() == Bundle(bundle).read_stage(stage)
    python = export_triton(bundle, tmp_path / "python", platform="python")
    for stage in STAGES:
        part = Bundle(python / stage / "1")
        assert part.manifest == Bundle(bundle).manifest
        assert part.read_stage(stage) == Bundle(bundle).read_stage(stage)


def test_tensorrt_gets_graphs_and_a_script_for_plans(tmp_path: Path, bundle: Path) -> None:
    write_kernels(default_folder(bundle) / FOLDER, CLASSES)
    folder = export_triton(bundle, tmp_path / "models", platform="tensorrt", gpu=True)
    fine = onnx.load(folder / "fine" / "1" / "model.onnx")
    outputs = {output.name: output.type.tensor_type.elem_type for output in fine.graph.output}
    assert outputs == {"image": onnx.TensorProto.FLOAT, "warped_image": onnx.TensorProto.FLOAT}
    # with a trtexec that prints what it is asked for
    (tmp_path / "trtexec").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "trtexec").chmod(0o755)
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run([folder / "build_plans.sh"], env=path, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line.split()[1] for line in lines] == [f"--saveEngine={stage}/1/model.plan" for stage in STAGES]
    assert lines[3].endswith(
        "--minShapes=features:1x16x32x32,warped:1x3x16x16,label:1x64x64 "
        "--optShapes=features:4x16x32x32,warped:4x3x16x16,label:4x64x64 "
        "--maxShapes=features:4x16x32x32,warped:4x3x16x16,label:4x64x64"
    )


def test_the_warp_on_a_gpu_has_the_kernels_of_bundle_and_engines(tmp_path: Path, bundle: Path) -> None:
    opened = Bundle(bundle)
    with pytest.raises(InputError, match=r"no compiled kernels for the warp on a GPU; flashcocos build"):
        export_triton(bundle, tmp_path / "models", gpu=True)
    files = {spec.file: opened.read(spec.file) for spec in opened.manifest.stages.values()}
    both = write_bundle(tmp_path / "both.zip", opened.manifest, files | kernel_files(CLASSES, "float16", 89))
    write_kernels(default_folder(both) / FOLDER, CLASSES, "float32", 86)
    folder = export_triton(both, tmp_path / "models", gpu=True)
    found = available_kernels([folder / "warp" / "1" / FOLDER], CLASSES)
    assert found == {"float16": [89], "float32": [86]}


def test_an_earlier_repository_is_replaced_and_nothing_else(tmp_path: Path, bundle: Path) -> None:
    folder = export_triton(bundle, tmp_path / "models", platform="python")
    export_triton(bundle, folder)
    assert not (folder / "query" / "1" / "model.py").exists()
    (folder / "resnet").mkdir()
    with pytest.raises(InputError, match=r"models holds resnet, which this would delete"):
        export_triton(bundle, folder)
    (tmp_path / "own" / "query").mkdir(parents=True)
    with pytest.raises(InputError, match="own is no repository of flashcocos export-triton"):
        export_triton(bundle, tmp_path / "own")
    with pytest.raises(InputError, match="would overwrite the input"):
        export_triton(bundle, bundle)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"platform": "openvino"}, "unknown platform 'openvino'; expected one of onnxruntime, tensorrt, python"),
        ({"platform": "tensorrt"}, "platform tensorrt runs on a GPU; add --gpu"),
        ({"platform": "python", "gpu": True}, "platform python runs on the CPU; leave --gpu out"),
        ({"instances": 0}, "instances: expected 1 to 64 of each model, got 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, bundle: Path, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        export_triton(bundle, tmp_path / "models", **options)
    assert not (tmp_path / "models").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "models"
    assert main(["export-triton", "avatars-128", "-o", str(folder), "--platform", "python", "--instances", "2"]) == 0
    assert capsys.readouterr().out == f"{folder}\n"
    readme = (folder / "README.md").read_text()
    assert readme.startswith("# avatars-128 for Triton Inference Server\n")
    for words in ("tritonserver --model-repository=/models", "needs flashcocos as a library", "- 0: background"):
        assert words in readme
