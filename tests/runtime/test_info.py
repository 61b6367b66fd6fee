"""`flashcocos info`: the machine and a bundle in words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_bundle import CHANNELS, write_tiny_bundle

from flashcocos import __version__
from flashcocos.errors import BackendError, BundleError, InputError
from flashcocos.runtime import info
from flashcocos.runtime.info import describe_bundle


def test_the_machine() -> None:
    text = describe_bundle()
    assert f"flashcocos  {__version__}" in text
    assert f"numpy       {np.__version__}" in text
    assert "CPUExecutionProvider" in text
    assert "bundle" not in text


def test_without_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> list[str]:
        raise BackendError("cannot be imported; pip install flashcocos[cpu]")

    monkeypatch.setattr(info, "available_providers", absent)
    monkeypatch.setattr(info, "_version", lambda package: None)
    text = describe_bundle()
    assert "providers   none: cannot be imported; pip install flashcocos[cpu]" in text
    assert "onnxruntime not installed" in text


def test_a_bundle(tmp_path: Path) -> None:
    text = describe_bundle(write_tiny_bundle(tmp_path / "b.zip", CHANNELS))
    assert "task        tiny" in text
    assert "precision   float32" in text
    assert "warp_upsampling=patch" in text
    assert "query       query.onnx: label float32[batch, 5, height, width] -> theta float32[batch, 16, h, w]" in text
    assert "license     not stated" in text
    assert text.endswith("hashes      ok (3 files)")


def test_a_damaged_bundle(tmp_path: Path) -> None:
    path = write_tiny_bundle(tmp_path / "b")
    content = bytearray((path / "exemplar.onnx").read_bytes())
    content[-1] ^= 1
    (path / "exemplar.onnx").write_bytes(content)
    assert "hashes      WRONG: " in describe_bundle(path)
    (path / "manifest.json").write_text("{}")
    with pytest.raises(BundleError, match="manifest"):
        describe_bundle(path)
    with pytest.raises(InputError, match="no model bundle at"):
        describe_bundle(tmp_path / "absent")
