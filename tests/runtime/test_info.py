"""`flashcocos info`: the machine and a bundle in words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fake_device import FakeDevice
from fake_gpu import fake_gpu
from tiny_bundle import CHANNELS, CLASSES, write_tiny_bundle

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
    assert "warp_upsampling=pixel_shuffle" in text
    assert "query       query.onnx: label float32[batch, 5, height, width] -> theta float32[batch, 16, h, w]" in text
    assert "license     not stated" in text
    assert text.endswith("hashes      ok (4 files)")


def test_engines_and_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiny_bundle(tmp_path / "b")
    assert f"engines     none in {tmp_path / 'b.engines'}; flashcocos build makes them" in describe_bundle(path)
    gpu = fake_gpu(monkeypatch, path)
    text = describe_bundle(path)
    lines = [line for line in text.splitlines() if line.startswith("engine ")]
    assert len(lines) == 8
    stated = "query in float16, 64 x 64, batch 1, sm_86, tensorrt 10.9.0: 1 MiB weights, 2 MiB working memory"
    assert f"engine      {stated}" in lines
    assert "kernels     float32 for sm_86" in text
    assert "memory" not in "".join(line.split()[0] for line in text.splitlines() if line)
    (plan,) = (line for line in describe_bundle(path, size=(64, 64)).splitlines() if line.startswith("memory "))
    assert plan.startswith("memory      tensorrt 10.9.0 in float16: 64 x 64, batch 1: ")
    (refusal,) = (line for line in describe_bundle(path, size=(2048, 64)).splitlines() if line.startswith("memory "))
    assert "no engine of query for 2048 x 64, batch 1, only " in refusal
    write_tiny_bundle(path, seed=1)
    assert f"{stated}; of another bundle" in describe_bundle(path)
    gpu.folder.rename(tmp_path / "c")
    assert f"engine      {stated}" in describe_bundle(path, tmp_path / "c")
    next((tmp_path / "c").glob("query-*.json")).write_text("{}")
    assert "engines     " in describe_bundle(path, tmp_path / "c")


def test_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice(CLASSES)
    monkeypatch.setattr(info, "PycudaDevice", lambda: device)
    assert "gpu         Fake RTX, sm_86, driver for CUDA 12.4, 64 MiB of 64 MiB free" in describe_bundle()
    assert device.closed


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise BackendError("the GPU cannot be used: no device")

    monkeypatch.setattr(info, "PycudaDevice", none)
    assert "gpu         none: the GPU cannot be used: no device" in describe_bundle().splitlines()


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
