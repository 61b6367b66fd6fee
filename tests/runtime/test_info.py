"""`flashcocos info`: the machine and a bundle in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from fake_cuda import FakeCuda
from fake_gpu import fake_gpu, install_driver
from tiny_bundle import CHANNELS, CLASSES, write_tiny_bundle

from flashcocos import __version__
from flashcocos.bundle import Bundle, write_bundle
from flashcocos.bundle.default_model import MODEL, PAIRS
from flashcocos.errors import BackendError, BundleError, InputError
from flashcocos.preprocess.palette import CLASS_NAMES, hexadecimal, palette
from flashcocos.runtime import info
from flashcocos.runtime.info import describe_bundle


def line(name: str, text: object) -> str:
    return f"{name:<24}{text}"


def test_the_machine() -> None:
    text = describe_bundle()
    lines = text.splitlines()
    assert line("flashcocos", __version__) in lines
    assert line("numpy", np.__version__) in lines
    assert line("default model", MODEL) in lines
    assert line("demo inputs", PAIRS.parent) in lines
    assert "CPUExecutionProvider" in text
    assert "hashes" not in text
    assert all(text[23:24] == " " and text[24:25] != " " for text in lines)  # one column, long names included


def test_without_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> list[str]:
        raise BackendError("cannot be imported; pip install flashcocos[cpu]")

    monkeypatch.setattr(info, "available_providers", absent)
    monkeypatch.setattr(info, "_version", lambda package: None)
    text = describe_bundle()
    assert line("providers", "none: cannot be imported; pip install flashcocos[cpu]") in text
    assert line("onnxruntime", "not installed") in text


def test_a_bundle(tmp_path: Path) -> None:
    text = describe_bundle(write_tiny_bundle(tmp_path / "b.zip", CHANNELS))
    assert line("task", "tiny") in text
    assert line("precision", "float32") in text
    assert "warp_upsampling=pixel_shuffle" in text
    stage = "query.onnx: label float32[batch, 5, height, width] -> theta float32[batch, 16, h, w]"
    assert line("query", stage) in text
    assert line("license", "not stated") in text
    assert "class 0" not in text
    assert text.endswith(line("hashes", "ok (4 files)"))


def rewrite(path: Path, **changes: Any) -> Path:
    bundle = Bundle(path)
    files = {name: bundle.read(name) for name in bundle.manifest.files}
    return write_bundle(path, msgspec.structs.replace(bundle.manifest, **changes), files)


def test_classes(tmp_path: Path) -> None:
    path = write_tiny_bundle(tmp_path / "b.zip", CLASSES)
    assert [text for text in describe_bundle(path).splitlines() if text.startswith("class ")] == [
        line(f"class {number}", f"{hexadecimal(color)} {name}")
        for number, (name, color) in enumerate(zip(CLASS_NAMES["avatars"], palette(12), strict=True))
    ]
    rewrite(path, class_names=tuple(f"own {number}" for number in range(12)), palette=((1, 2, 255),) * 12)
    assert line("class 11", "#0102ff own 11") in describe_bundle(path).splitlines()


def test_provenance_is_readable_and_bounded(tmp_path: Path) -> None:
    deep: dict[str, Any] = {"last": 1}
    for _ in range(300):
        deep = {"in": deep}
    provenance = {"model": {"step": 3, "parts": [1, 2]}, "by": "\x1b[2Jme", "deep": deep}
    path = rewrite(write_tiny_bundle(tmp_path / "b.zip"), provenance=provenance, license="a\x1b]0;b")
    text = describe_bundle(path)
    assert "provenance:\n  model:\n    step: 3\n    parts: [1, 2]\n  by: \\x1b[2Jme\n  deep:\n    in:\n" in text
    assert line("license", "a\\x1b]0;b") in text
    assert "\x1b" not in text
    assert text.count("in:\n") == 6


def test_memory_without_engines(tmp_path: Path) -> None:
    path = write_tiny_bundle(tmp_path / "b.zip")
    expected = line("memory", f"not known: there are no engines of this bundle in {tmp_path / 'b.engines'}, which")
    assert expected in describe_bundle(path, size=(64, 64))
    with pytest.raises(InputError, match=r"size: expected .* multiple of 32 from 64; got \(100, 100\)"):
        describe_bundle(path, size=(100, 100))
    with pytest.raises(InputError, match="size 64 x 64: it is for the engines of a bundle; give the bundle too"):
        describe_bundle(size=(64, 64))


def test_engines_and_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiny_bundle(tmp_path / "b")
    expected = line("engines", f"none in {tmp_path / 'b.engines'}; flashcocos build makes them where TensorRT")
    assert expected in describe_bundle(path)
    gpu = fake_gpu(monkeypatch, path)
    text = describe_bundle(path)
    lines = [line for line in text.splitlines() if line.startswith("engine ")]
    assert len(lines) == 8
    stated = "query in float16, 64 x 64, batch 1, sm_86, tensorrt 10.9.0: 1 MiB weights, 2 MiB working memory"
    assert line("engine", stated) in lines
    assert line("kernels", "float32 for sm_86") in text
    assert "memory" not in "".join(line.split()[0] for line in text.splitlines() if line)
    (plan,) = (line for line in describe_bundle(path, size=(64, 64)).splitlines() if line.startswith("memory "))
    assert plan.startswith(line("memory", "tensorrt 10.9.0 in float16: 64 x 64, batch 1: "))
    (refusal,) = (line for line in describe_bundle(path, size=(2048, 64)).splitlines() if line.startswith("memory "))
    assert "no engine of query for 2048 x 64, batch 1, only " in refusal
    write_tiny_bundle(path, seed=1)
    assert f"{stated}; of another bundle" in describe_bundle(path)
    gpu.folder.rename(tmp_path / "c")
    assert line("engine", stated) in describe_bundle(path, tmp_path / "c")
    next((tmp_path / "c").glob("query-*.json")).write_text("{}")
    assert line("engines", "") in describe_bundle(path, tmp_path / "c")


def test_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = install_driver(monkeypatch, FakeCuda(CLASSES))
    assert line("gpu", "Fake RTX, sm_86, driver for CUDA 12.4, 64 MiB of 64 MiB free") in describe_bundle()
    assert cuda.closed


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise BackendError("the GPU cannot be used: no device")

    monkeypatch.setattr(info, "Device", none)
    assert line("gpu", "none: the GPU cannot be used: no device") in describe_bundle().splitlines()


def test_a_damaged_bundle(tmp_path: Path) -> None:
    path = write_tiny_bundle(tmp_path / "b")
    content = bytearray((path / "exemplar.onnx").read_bytes())
    content[-1] ^= 1
    (path / "exemplar.onnx").write_bytes(content)
    assert line("hashes", "WRONG: ") in describe_bundle(path)
    (path / "manifest.json").write_text("{}")
    with pytest.raises(BundleError, match="manifest"):
        describe_bundle(path)
    with pytest.raises(InputError, match="no model bundle at"):
        describe_bundle(tmp_path / "absent")
