"""The translation benchmark runs, compares before it times, and says where its numbers come from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from exported import CLASSES, exported_stage, model_file, seeded_model

from flashcocos.benchmarks import harness, translation
from flashcocos.export import bundle_writer
from flashcocos.train.checkpoint import save_model


@pytest.fixture
def bundle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The bundle of `model_file(CLASSES)`."""
    monkeypatch.setattr(bundle_writer, "export_stage", lambda model, stage: exported_stage(model.config, stage))
    return bundle_writer.export_bundle(model_file(CLASSES), tmp_path / "bundle")


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch, results: Path) -> None:
    monkeypatch.setattr(harness, "RESULTS", results)
    monkeypatch.setattr("sys.argv", ["translation", *arguments])
    translation.main()


def test_every_case_runs(bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = ["--checkpoint", str(model_file(CLASSES)), "--bundle", str(bundle)]
    arguments = [*files, "--size", "64", "--repeats", "2", "--name", "smoke"]
    run(arguments, monkeypatch, tmp_path)
    content = json.loads((tmp_path / "smoke.json").read_text())
    assert [row["case"] for row in content["rows"]] == list(translation.CASES)
    assert all(row["psnr_db"] > 40 and row["peak_mib"] > 0 and row["min_ms"] > 0 for row in content["rows"])
    assert {"revision", "versions", "processor", "cores", "command"} <= set(content)


def test_a_runtime_that_differs_is_not_timed(bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_model(other, seeded_model(CLASSES, seed=1))
    arguments = ["--checkpoint", str(other), "--bundle", str(bundle), "--size", "64", "--name", "smoke"]
    with pytest.raises(RuntimeError, match="runtime differs from eager"):
        run(arguments, monkeypatch, tmp_path)
    assert not (tmp_path / "smoke.json").exists()


def test_psnr() -> None:
    black = np.zeros((4, 4, 3), np.uint8)
    assert translation.psnr(black, black) == 99.0
    assert translation.psnr(black, np.full_like(black, 255)) == pytest.approx(0.0)
    assert translation.psnr(black, np.full_like(black, 1)) == pytest.approx(48.13, abs=0.01)
