"""docs/benchmarks.md and the README's table come from the results files, and are what they say."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from flashcocos.benchmarks import report
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
            row("ablation/compiled-256", {**eager, "method": "compiled"}, status="skipped", reason="no compiler"),
            row("ablation/naive-256", naive, status="out of memory", reason="ended", needed_mib=4096),
            row(
                "ablation/runtime-256",
                {**RUNTIME, "cached": False, "batch": 1},
                ms=fast,
                first_ms=2500.0,
                quality=quality,
            ),
            row("ablation/runtime-cached-256", {**RUNTIME, "cached": True}, ms=fast, quality=quality),
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
        "estimate": [
            row("estimate/256", budgets, status="measured", facts={"one_mib": {"total": 9000.4}, "largest": largest}),
            row("estimate/512", budgets, status="failed", reason="ended"),
        ],
        "throughput": [row("throughput/runtime-batch4", {**RUNTIME, "cached": True, "batch": 4})],
        "serving": [
            row("serving/drain", {}, status="measured", facts={"right": 16, "exit_s": 0.25}),
            row("serving/soak", {}, status="failed", reason="ended"),
        ],
        "startup": [
            row("startup/runtime", RUNTIME, parts_ms={"ready": 800.0}, facts={"peak_mib": 100.0}),
            row("startup/install", {"extra": "cpu"}, status="measured", facts=installed),
        ],
        "machine": [row("machine/rates", {}, status="measured", facts={"copy_gb_s": 30.6, "float32_gflop_s": 92.4})],
    }
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return tmp_path


def test_insert_replaces_what_is_between_the_markers() -> None:
    readme = f"before\n{report.BEGIN}\nold\n{report.END}\nafter"
    assert report.insert(readme, r"new \1") == f"before\n{report.BEGIN}\n\nnew \\1\n\n{report.END}\nafter"


def test_insert_wants_markers() -> None:
    with pytest.raises(InputError, match="expected the markers"):
        report.insert("no markers", "new")


def test_every_row_has_its_line(results: Path) -> None:
    text = report.full_page(results)
    for line in (
        "| avatars-128 | ",
        " dB | 21.83 dB | ",  # the class-mean baseline of the data, whatever the model
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
        "| measure of estimate/256 | 9000 MiB | none | 3 (23000 MiB) |",
        "| measure of estimate/512 | failed: ended | | |",
        "| 4 | runtime, exemplar encoded once | 4 | 512 MiB |",
        "| measure of startup/runtime | 800 ms | 1.00 s | 100 MiB |",
        "| measure of startup/install | 372 MiB | 8 | a 9 |",
        "| measure of serving/drain | right 16, exit s 0.25 |",
        "| measure of serving/soak | failed: ended |",
        "| copy, GB/s | 31 |",
        "A CPU, 2 cores; Python 3.11.0, numpy 2.0; revision abc:\n\n```sh\nthe command\n```",
        "## What these numbers do not show",
    ):
        assert line in text
    assert set(report.SECTIONS) == set(GROUPS)


def test_the_readme_gets_five_rows_and_a_hardware_line(results: Path) -> None:
    assert report.readme_table(results).splitlines() == [
        "| | median | times as fast | peak memory | PSNR |",
        "|---|---|---|---|---|",
        "| eager PyTorch, as published | 1.00 s | 1.00 | 512 MiB | |",
        "| torch.compile, as published | skipped: no compiler | | | |",
        "| one naive ONNX graph, ONNX Runtime | out of memory | | | |",
        "| runtime, exemplar encoded each time | 250 ms | 4.00 | 512 MiB | 82.7 dB |",
        "| runtime, exemplar encoded once | 250 ms | 4.00 | 512 MiB | 82.7 dB |",
        "",
        "A CPU, 2 cores; Python 3.11.0, numpy 2.0",
    ]
    (results / "ablation.jsonl").write_text("")
    with pytest.raises(InputError, match=r"ablation.jsonl: expected the cases eager-256, .*; run them first"):
        report.readme_table(results)


def test_the_report_writes_the_page_the_table_and_the_plots(results: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra bench")
    page, readme = results / "docs" / "benchmarks.md", results / "README.md"
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    plots = [results / f"{name}.png" for name in ("ablation", "memory", "warp")]
    assert report.write_report(page, readme, results) == [*plots, page, readme]
    assert page.read_text() == report.full_page(results)
    assert report.readme_table(results) in readme.read_text()
    for path in plots:
        picture = path.read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert 5_000 < len(picture) < 100_000


def test_the_page_has_the_results() -> None:
    assert report.PAGE.read_text() == report.full_page()


def test_the_plots_of_the_page_are_there() -> None:
    links = re.findall(r"!\[.*?\]\((.*?)\)", report.PAGE.read_text())
    assert len(links) == 3
    for link in links:
        assert (report.PAGE.parent / link).is_file()


def test_the_readme_has_the_results() -> None:
    readme = report.README.read_text()
    assert report.insert(readme, report.readme_table()) == readme


def test_without_the_scores_of_the_default_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"avatars-128.json: No such file .*; run `flashcocos evaluate"):
        report.full_page(tmp_path)
