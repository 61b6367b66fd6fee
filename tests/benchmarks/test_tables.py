"""The README's tables come from the results files, and the README holds what they say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from flashcocos.benchmarks import tables
from flashcocos.benchmarks.provenance import RESULTS
from flashcocos.benchmarks.registry import GROUPS
from flashcocos.errors import InputError

SETUP = {"revision": "abc", "python": "3.11.0", "versions": {"numpy": "2.0"}, "processor": "A CPU", "cores": 2}
RUNTIME = {"method": "runtime", "size": 256, "bundle": "model", "backend": "onnxruntime", "precision": "float32"}


def row(case: str, parameters: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A row that was timed, changed by `fields`."""
    found = {"case": case, "measures": f"measure of {case}", "parameters": parameters, "status": "timed", "runs": 3}
    found |= {"ms": {"p5": 900.0, "median": 1000.0, "p95": 1100.0, "p99": 1200.0}, "peak_mib": 512.4}
    return {**found, "quality": {}, "facts": {}, "setup": SETUP, "command": "the command", **fields}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A results file of every group, with a row of every status."""
    shutil.copy(RESULTS / "avatars-128.json", tmp_path)
    eager, naive = {"method": "eager", "size": 256, "dtype": "float32"}, {"method": "naive", "size": 256}
    quality = {"psnr_db": 82.74, "max_abs": 1.0, "ssim": 0.99999}
    fast = {"p5": 240.0, "median": 250.0, "p95": 260.0, "p99": 270.0}
    warp = {"size": 64, "patch": 3, "values": 3, "inputs": "noise", "backward": False}
    warp |= {"channels": 256, "dtype": "float32"}
    budgets = {"budgets_gib": [8, 24]}
    largest = {"8": {"batch": 0, "mib": 9000.4}, "24": {"batch": 3, "mib": 23000.4}}
    installed = {"mib": 372.0, "packages": 8, "largest": {"a": 9}}
    files = {
        "ablation": [
            row("ablation/eager-256", eager),
            row("ablation/naive-256", naive, status="out of memory", reason="ended", needed_mib=4096),
            row(
                "ablation/runtime-256",
                {**RUNTIME, "cached": False, "batch": 1},
                ms=fast,
                first_ms=2500.0,
                quality=quality,
            ),
            row("ablation/int8-256", {**RUNTIME, "bundle": "int8", "cached": True}, status="outside", quality=quality),
            row("ablation/bf16", {**RUNTIME, "backend": "openvino", "cached": True}, status="skipped", reason="no CPU"),
        ],
        "resolution": [row("resolution/eager-512", {**eager, "size": 512}, status="out of memory", needed_mib=8192)],
        "warp": [
            row("warp/numba", {**warp, "method": "numba"}, ratio=1.5, extra_mib=8.0, quality={"max_error": 3e-7}),
            row(
                "warp/sdpa-p3-n16384",
                {**warp, "method": "sdpa", "size": 128},
                status="timeout",
                reason="not done after 300 s",
            ),
            row("warp/cpu-back", {**warp, "method": "cpu", "backward": True}, quality={"max_error": 3e-7}),
        ],
        "training": [row("training/tiled-256", {"method": "tiled", "size": 256})],
        "plan": [
            row("plan/256", budgets, status="measured", facts={"one_mib": {"total": 9000.4}, "largest": largest}),
            row("plan/512", budgets, status="failed", reason="ended"),
        ],
        "throughput": [row("throughput/runtime-batch4", {**RUNTIME, "cached": True, "batch": 4})],
        "startup": [
            row("startup/runtime", RUNTIME, parts_ms={"ready": 800.0}, facts={"peak_mib": 100.0}),
            row("startup/install", {"extra": "cpu"}, status="measured", facts=installed),
        ],
        "machine": [row("machine/rates", {}, status="measured", facts={"copy_gb_s": 30.6, "float32_gflop_s": 92.4})],
    }
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return tmp_path


def test_insert_replaces_what_stands_between_the_markers() -> None:
    readme = f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter"
    assert tables.insert(readme, r"new \1") == f"before\n{tables.BEGIN}\n\nnew \\1\n\n{tables.END}\nafter"


def test_insert_wants_markers() -> None:
    with pytest.raises(InputError, match="expected the markers"):
        tables.insert("no markers", "new")


def test_every_row_has_its_line(results: Path) -> None:
    text = tables.sections(results)
    for line in (
        "| eager PyTorch, as published | | 1.00 s | 900 ms to 1.10 s | 1.00 | 512 MiB | | | |",
        "| one naive ONNX graph, ONNX Runtime | | out of memory | | | | | | |",
        "| runtime, exemplar encoded each time | 2.50 s | 250 ms | 240 ms to 260 ms | 4.00 | 512 MiB "
        "| 1 of 255 | 82.7 dB | 1.0000 |",
        "too far off (psnr_db 82.74, max_abs 1, ssim 1), not timed",
        "| runtime, OpenVINO, exemplar encoded once | | skipped: no CPU | | | | | | |",
        "| 512 px | eager PyTorch, as published | out of memory | | |",
        "| 4 096 | 1.00 s, 8 MiB | |",
        "| 16 384 | | timeout: not done after 300 s |",
        "| measure of warp/cpu-back | 1.00 s | 3e-07 |",
        "| measure of warp/numba, noise | 1.00 s | 1.50 | 3e-07 |",
        "| 4 096 | 9% |",
        "| measure of training/tiled-256 | 1.00 s | 512 MiB |",
        "| | one sample | in 8 GiB | in 24 GiB |",
        "| measure of plan/256 | 9000 MiB | none | 3 (23000 MiB) |",
        "| measure of plan/512 | failed: ended | | |",
        "| 4 | runtime, exemplar encoded once | 4 | 512 MiB |",
        "| measure of startup/runtime | 800 ms | 1.00 s | 100 MiB |",
        "| measure of startup/install | 372 MiB | 8 | a 9 |",
        "| copy, GB/s | 31 |",
        "A CPU, 2 cores; Python 3.11.0, numpy 2.0; revision abc: `the command`",
        "**What this does not show.**",
    ):
        assert line in text
    assert set(tables.SECTIONS) == set(GROUPS)


def test_the_plots_are_drawn(results: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra bench")
    readme = results / "README.md"
    readme.write_text(f"{tables.BEGIN}\n{tables.END}\n")
    tables.report(readme, results)
    assert readme.read_text() == tables.insert(f"{tables.BEGIN}\n{tables.END}\n", tables.sections(results))
    for name in ("ablation", "memory", "warp"):
        picture = (results / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert 5_000 < len(picture) < 100_000


def test_the_readme_holds_the_results() -> None:
    readme = tables.README.read_text()
    assert tables.insert(readme, tables.sections()) == readme


def test_without_the_scores_of_the_shipped_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"avatars-128.json: No such file .*; run `flashcocos evaluate"):
        tables.sections(tmp_path)
