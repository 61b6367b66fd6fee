"""Compiled kernels: found for the GPU at hand, refused where their description lies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kernel_twins import kernel_files, write_kernels
from tiny_bundle import CHANNELS, CLASSES, write_tiny_bundle

from flashcocos.bundle import Bundle, write_bundle
from flashcocos.errors import BackendError, BundleError
from flashcocos.kernels import signatures
from flashcocos.runtime.gpu.cubins import available_kernels, find_kernels

STATISTICS, WARP = "statistics_p3_c16_float32_sm86", "warp_p3_c16_v3_float32_sm86"


def find(
    *folders: Path, capability: int = 86, driver: str = "12.4", dtypes: tuple[str, ...] = ("float16", "float32")
) -> Any:
    return find_kernels(folders, CLASSES, dtypes, capability=capability, driver=driver, remedy="REMEDY")


def test_the_nearest_architecture_runs(tmp_path: Path) -> None:
    for architecture in (75, 80, 86, 90, 120):
        write_kernels(tmp_path, CLASSES, architecture=architecture)
    write_kernels(tmp_path, CLASSES, "float16", 80)
    chosen = {
        sm: find(tmp_path, capability=sm, dtypes=("float32",))["warp"].architecture
        for sm in (75, 80, 86, 87, 89, 90, 120)
    }
    assert chosen == {75: 75, 80: 80, 86: 86, 87: 86, 89: 86, 90: 90, 120: 120}
    assert {cubin.dtype for cubin in find(tmp_path, capability=89).values()} == {"float16"}
    assert {cubin.dtype for cubin in find(tmp_path, capability=75).values()} == {"float32"}
    assert available_kernels([tmp_path], CLASSES) == {"float16": [80], "float32": [75, 80, 86, 90, 120]}


@pytest.mark.parametrize("capability", [72, 70, 103, 121])
def test_no_kernel_for_this_architecture(tmp_path: Path, capability: int) -> None:
    """Those of other major versions do not run, nor do those that are for the features of one chip."""
    for architecture in (75, 86, 90, 120):
        write_kernels(tmp_path, CLASSES, architecture=architecture)
    with pytest.raises(BackendError, match=rf"for float16 or float32, sm_{capability}, .*sm_75, sm_86, .*; REMEDY"):
        find(tmp_path, capability=capability)


def test_kernels_of_another_model(tmp_path: Path) -> None:
    write_kernels(tmp_path, CHANNELS)  # V = 48 instead of 3
    with pytest.raises(BackendError, match=r"V = 3 in .* \(there are: none\); REMEDY"):
        find(tmp_path)
    with pytest.raises(BackendError, match=r"\(there are: none\)"):
        find(tmp_path / "absent")


def test_what_a_launch_takes(tmp_path: Path) -> None:
    warp = find(write_kernels(tmp_path, CLASSES))["warp"]
    assert warp.code == b"warp twin for sm_86"
    assert warp.grid({"height_q": 5, "width_q": 20}, 2) == (7, 2, 1)
    assert warp.formats == "PPPPPPPPPPiiiifP"


def test_kernels_that_the_driver_is_too_old_for(tmp_path: Path) -> None:
    """Minor versions of CUDA are compatible, major versions are not."""
    write_kernels(tmp_path, CLASSES)
    for path in tmp_path.glob("*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "cuda": "13.4"}))
    with pytest.raises(BackendError, match=r"compiled by CUDA 13\.4, the NVIDIA driver supports CUDA 12\.9; update"):
        find(tmp_path, driver="12.9")
    assert find(tmp_path, driver="13.0")["pack"].cuda == "13.4"


def test_kernels_of_an_earlier_revision(tmp_path: Path) -> None:
    path = write_kernels(tmp_path, CLASSES) / f"{STATISTICS}.json"
    fields = json.loads(path.read_text())
    del fields["revision"]
    path.write_text(json.dumps({**fields, "grid": ["1", "1", "1"]}))
    with pytest.raises(BundleError, match="it is of revision 1, expected 2; compile the kernels again"):
        find(tmp_path)


def test_kernels_in_a_bundle(tmp_path: Path) -> None:
    plain = Bundle(write_tiny_bundle(tmp_path / "plain"))
    files = {name: plain.read(name) for name in plain.manifest.files}
    bundle = Bundle(write_bundle(tmp_path / "b.zip", plain.manifest, {**files, **kernel_files(CLASSES)}))
    sources = [tmp_path / "absent", bundle]
    kernels = find_kernels(sources, CLASSES, ("float32",), capability=89, driver="12.4", remedy="")
    assert kernels["pack"].code == b"pack twin for sm_86"
    with pytest.raises(BackendError, match=r"in .*absent or .*b.zip \(there are: float32 for sm_86\)"):
        find_kernels(sources, CLASSES, ("float32",), capability=75, driver="12.4", remedy="")


ARGUMENTS = [{"name": name, "type": kind} for name, kind in signatures.arguments("statistics", "float32").items()]
HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"kernel": "pack_float32"}, "it describes"),
    ({"cubin": "../../etc/passwd"}, "it describes"),
    ({"architecture": 80}, "it describes"),
    ({"architecture": True}, "architecture: expected int, got True"),
    ({"dtype": ["float32"]}, "dtype: expected str"),
    ({"sha256": "0" * 63}, "sha256: expected .*64"),
    ({"entry": "a\0b"}, "entry: expected"),
    ({"entry": "x" * 129}, "entry: expected"),
    ({"threads": 100}, "threads: expected .*multiple of 32"),
    ({"threads": 2048}, "threads: expected .*1024"),
    ({"threads": 1e3}, "threads: expected int"),
    ({"shared_bytes": -1}, "shared_bytes: expected .*0"),
    ({"shared_bytes": 1 << 30}, "shared_bytes: expected .*232448"),
    ({"pointer_alignment": 4096}, "pointer_alignment: expected .*256"),
    ({"revision": True}, "it is of revision True"),
    ({"revision": [2]}, "it is of revision"),
    ({"cuda": "13"}, "cuda: expected"),
    ({"cuda": 13.0}, "cuda: expected str"),
    ({"arguments": []}, "arguments"),
    ({"arguments": ["mean"]}, r"arguments\[0\]: expected object"),
    ({"arguments": [{"name": "mean", "type": "*i64"}]}, "argument"),
    ({"arguments": [{"name": "secret", "type": "*fp32"}]}, "argument"),
    ({"arguments": [{"name": "secret", "type": "null"}]}, "argument"),
    ({"arguments": [{"name": ["mean"], "type": None}]}, r"arguments\[0\].*: expected str"),
    ({"arguments": [{"name": "mean", "type": "*fp32"}] * 2}, "argument"),
    ({"arguments": ARGUMENTS[::-1]}, "argument"),
    ({"arguments": ARGUMENTS[:-1]}, "argument"),
    ({"constants": {"C": 16}}, "expected PATCH = 3, got None"),
    ({"constants": {"C": 32, "PATCH": 3}}, "expected C = 16, got 32"),
    ({"extra": 1}, "unknown key extra; known: revision, "),
    ({"constants": []}, "constants: expected"),
    ({"constants": {"C": 16, "PATCH": 3, "BN": 0, "BC": 16}}, "constants.*expected int"),
    ({"constants": {"C": 16, "PATCH": 3, "BN": 2, "BC": 16}}, "expected BN of 3 or more, got 2"),
    ({"constants": {"C": 16, "PATCH": 3, "BN": True, "BC": 16}}, "constants.*expected int"),
    ({"constants": {"C": 16, "PATCH": 3, "BN": 16}}, "expected BC of 1 or more, got None"),
    ({"constants": {"C": 16, "PATCH": 3, "BN": 16, "BC": 16, "BAND": 0}}, "constants.*expected int"),
    ({"code": "AAAA"}, "code: expected"),
    *(({"constants": {"C": 16, "PATCH": 3, "V": 3, "VP": padded}}, "expected VP = 8") for padded in (2, 15)),
    *(({"constants": {"C": 16, "PATCH": 3, "V": 3, "VP": padded}}, "expected int") for padded in (True, None, "8")),
]


@pytest.mark.parametrize(("change", "message"), HOSTILE)
def test_hostile_descriptions(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    stem = WARP if "VP" in change.get("constants", ()) else STATISTICS
    path = write_kernels(tmp_path, CLASSES) / f"{stem}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(BundleError, match=rf"{stem}.json cannot be used: .*{message}"):
        find(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b"{}"])
def test_files_that_are_no_descriptions(tmp_path: Path, content: bytes) -> None:
    (write_kernels(tmp_path, CLASSES) / f"{STATISTICS}.json").write_bytes(content)
    with pytest.raises(BundleError, match="cannot be used"):
        find(tmp_path)


def test_files_that_are_too_large_or_changed(tmp_path: Path) -> None:
    description = write_kernels(tmp_path, CLASSES) / f"{STATISTICS}.json"
    (tmp_path / f"{STATISTICS}.cubin").write_bytes(b"another")
    with pytest.raises(BundleError, match=r"\.cubin is not the cubin that its description states"):
        find(tmp_path)
    (tmp_path / f"{STATISTICS}.cubin").unlink()
    with pytest.raises(BackendError, match=r"\.cubin cannot be read: No such file"):
        find(tmp_path)
    description.write_bytes(b" " * (1 << 21))
    with pytest.raises(BackendError, match="over 1048576 bytes"):
        find(tmp_path)


def test_what_the_compiler_writes(tmp_path: Path) -> None:
    """The real compiler, in a process of its own, because this one may have Triton in interpreter mode."""
    pytest.importorskip("triton", reason="compiling the kernels needs the triton package")
    script = (
        "from pathlib import Path; from flashcocos.kernels.gpu.aot import compile_kernels;"
        f"list(compile_kernels(Path({str(tmp_path)!r}), [86], channels=16, values=[3]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
    kernels = find(tmp_path, capability=89)
    assert [cubin.code[:4] for cubin in kernels.values()] == [b"\x7fELF"] * 3
    assert kernels["warp"].dtype == "float16"
    assert kernels["warp"].formats.startswith("PPPPPPPPPPiiiif")
