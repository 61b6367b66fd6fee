"""Fixtures of the export tests: shared graphs instead of the exporter, and bundles made of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from exported import exported_stage, model_file
from onnx import ModelProto

from flashcocos.bundle.default_model import PAIRS
from flashcocos.config import ModelConfig
from flashcocos.export import bundle as export_module
from flashcocos.export import single
from flashcocos.runtime.jobs import FolderRequest, Job, match_files
from flashcocos.train.networks import CoCosNet


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[Job]:
    """The demo's."""
    return match_files(FolderRequest(None, None, None, tmp_path_factory.mktemp("pictures"), pairs=PAIRS))


@pytest.fixture
def shared_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """`export_bundle` and `export_single` take the graphs of `exported` for `export_stage`'s."""

    def export_stage(model: CoCosNet, stage: str) -> ModelProto:
        return exported_stage(model.config, stage)

    monkeypatch.setattr(export_module, "export_stage", export_stage)
    monkeypatch.setattr(single, "export_stage", export_stage)


@pytest.fixture
def make_bundle(shared_graphs: None, tmp_path: Path) -> Callable[..., Path]:
    """`make_bundle(config, name="bundle", **options)` exports `model_file(config)` under `tmp_path`."""

    def make(config: ModelConfig, name: str = "bundle", **options: Any) -> Path:
        return export_module.export_bundle(model_file(config), tmp_path / name, license="none", **options)

    return make
