"""`export_bundle`: what a bundle says of itself, folder and zip, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from exported import CHANNELS, CLASSES, exported_stage, model_file
from onnx import ModelProto, numpy_helper

import flashcocos
from flashcocos.bundle import STAGES, Bundle
from flashcocos.bundle.stages import check_stages
from flashcocos.errors import InputError
from flashcocos.export import bundle as export_module
from flashcocos.export.bundle import export_bundle
from flashcocos.files import file_hash
from flashcocos.train.networks import CoCosNet

MakeBundle = Callable[..., Path]


def test_what_the_manifest_says(make_bundle: MakeBundle) -> None:
    manifest = Bundle(make_bundle(CHANNELS, precision="float16")).manifest
    assert (manifest.config, manifest.precision, manifest.opset, manifest.license) == (CHANNELS, "float16", 20, "none")
    assert {stage: spec.file for stage, spec in manifest.stages.items()} == {s: f"{s}.onnx" for s in STAGES}
    check_stages(manifest)
    assert manifest.provenance == {
        "model_sha256": file_hash(model_file(CHANNELS)),
        "model": {"note": "seeded"},
        "flashcocos": flashcocos.__version__,
        "torch": torch.__version__,
        "onnx": onnx.__version__,
    }


def test_folder_and_zip_hold_the_same(make_bundle: MakeBundle) -> None:
    folder, packed = Bundle(make_bundle(CLASSES, "folder")), Bundle(make_bundle(CLASSES, "deep/packed.zip"))
    assert folder.path.is_dir()
    assert packed.path.is_file()
    assert folder.manifest == packed.manifest
    for name in folder.manifest.files:
        assert folder.read(name) == packed.read(name)


def test_exporting_again_replaces_and_gives_the_same_bytes(make_bundle: MakeBundle) -> None:
    first = {path.name: path.read_bytes() for path in make_bundle(CLASSES).iterdir()}
    second = {path.name: path.read_bytes() for path in make_bundle(CLASSES).iterdir()}
    assert first == second
    assert set(first) == {"manifest.json", "query.onnx", "exemplar.onnx", "coarse.onnx", "fine.onnx"}


def test_bad_requests_leave_nothing(tmp_path: Path, shared_graphs: None) -> None:
    with pytest.raises(InputError, match="precision 'bfloat16' is unknown; expected one of float32, float16"):
        export_bundle(model_file(CLASSES), tmp_path / "bundle", precision="bfloat16")
    with pytest.raises(InputError, match=r"absent\.safetensors"):
        export_bundle(tmp_path / "absent.safetensors", tmp_path / "bundle")
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(InputError, match="is not a model bundle"):
        export_bundle(model_file(CLASSES), tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_weights_that_do_not_fit_float16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def export_stage(model: CoCosNet, stage: str) -> ModelProto:
        graph = exported_stage(CLASSES, stage)
        weight = next(tensor for tensor in graph.graph.initializer if tensor.name.endswith("theta.weight"))
        weight.CopyFrom(numpy_helper.from_array(np.full(list(weight.dims), 1e5, np.float32), weight.name))
        return graph

    monkeypatch.setattr(export_module, "export_stage", export_stage)
    monkeypatch.setattr("flashcocos.export.graphs.FLOAT16_THRESHOLD", 64)
    with pytest.raises(InputError, match=r"theta\.weight: weights up to 100000 do not fit float16"):
        export_bundle(model_file(CLASSES), tmp_path / "bundle", precision="float16")
    assert not (tmp_path / "bundle").exists()
