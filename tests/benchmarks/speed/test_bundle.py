"""`flashcocos bench`: compares before it times, goes on where it was stopped, and tells where the time goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_bundle import write_tiny_bundle

from flashcocos.benchmarks.registry import Assets, Case
from flashcocos.benchmarks.runner import References
from flashcocos.benchmarks.speed import bundle as module
from flashcocos.benchmarks.speed import profiling
from flashcocos.benchmarks.speed.bundle import bench, cases, table
from flashcocos.benchmarks.speed.profiling import operator_times, profile, report
from flashcocos.benchmarks.worker import measure
from flashcocos.cli import main
from flashcocos.errors import BackendError, InputError


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "model.zip")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """The cases that were timed; a row is made up for each instead."""
    found: list[Case] = []

    def isolated(case: Case, assets: Assets, *, timed: bool = True) -> dict[str, Any]:
        found.append(case)
        return {"status": "outside", "quality": {"psnr_db": 9.0}}

    monkeypatch.setattr("flashcocos.benchmarks.runner.isolated", isolated)
    return found


def test_a_case_in_a_process_of_its_own(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "rows.jsonl"
    words = ["bench", str(bundle), "--quick", "--threads", "1", "--backend", "onnxruntime", "-o", str(output)]
    assert main(words) == 0
    single, batch = map(json.loads, output.read_text().splitlines())
    assert (single["status"], batch["status"]) == ("timed", "timed")
    assert single["setup"]["threads"] == 1
    assert len(single["model"]["bundle model"]) == 64
    assert 0 < single["ms"]["p5"] <= single["ms"]["median"] <= single["ms"]["p95"] <= single["ms"]["p99"]
    assert set(single["parts_ms"]) == set(module.STAGES)
    assert sum(single["parts_ms"].values()) <= single["ms"]["p99"]
    assert batch["parameters"]["batch"] == 4
    assert batch["quality"]["psnr_db"] == 100.0
    printed = capsys.readouterr().out.splitlines()
    assert "| size, px | batch | load, ms | exemplar, ms | translation, ms | p5 to p95, ms | query, ms |" in printed[0]
    assert printed[0].endswith("| synthesis, ms | peak memory, MiB | PSNR |")
    assert printed[2].startswith("| onnxruntime | float32 | 64 | 1 | ")
    assert printed[2].endswith("| reference |")
    assert {line.count("|") for line in printed[:4]} == {14}
    monkeypatch.setattr("flashcocos.benchmarks.runner.isolated", lambda *_: pytest.fail("measured again"))
    assert main(words) == 0


def test_a_picture_too_far_off_is_not_timed(bundle: Path, tmp_path: Path) -> None:
    reference, other = module._case("onnxruntime", "float32", 64), module._case("onnxruntime", "float32", 64, batch=2)
    assets = Assets(bundles={"model": str(bundle)}, references=str(tmp_path), threads=1)
    assert measure(reference, assets, timed=False)["status"] == "checked"
    file = tmp_path / f"{reference.name}.npy"
    picture = np.load(file)
    assert picture.std() > 10
    np.save(file, picture ^ 4)
    row = measure(other, assets)
    assert row["status"] == "outside"
    line = table([{**row, "parameters": other.parameters}]).splitlines()[2]
    assert "| too far off (psnr_db 36.09, max_abs 4), not timed |" in line
    assert References({}, assets).missing(reference.name) == ""


@pytest.mark.usefixtures("asked")
def test_a_red_row_fails_the_command(bundle: Path) -> None:
    assert main(["bench", str(bundle), "--backend", "onnxruntime"]) == 1


def test_a_run_that_was_stopped_goes_on(bundle: Path, tmp_path: Path, asked: list[Case]) -> None:
    output = tmp_path / "rows.jsonl"
    bench(bundle, sizes=[64], backends=["onnxruntime"], output=output)
    rows = bench(bundle, sizes=[64, 96], backends=["onnxruntime"], output=output)
    assert [case.parameters["size"] for case in asked] == [64, 96]
    assert [row["parameters"]["size"] for row in rows] == [64, 96]
    assert len(output.read_text().splitlines()) == 2


@pytest.mark.usefixtures("asked")
def test_a_file_of_another_model_is_refused(bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    bench(bundle, backends=["onnxruntime"], output=output)
    other = write_tiny_bundle(tmp_path / "b", seed=1)
    with pytest.raises(InputError, match=r"rows.jsonl was measured with other model of bundle/onnxruntime-float32-64"):
        bench(other, backends=["onnxruntime"], output=output)
    assert bench(other, backends=["onnxruntime"], output=output, fresh=True)


def test_bad_options(bundle: Path) -> None:
    with pytest.raises(InputError, match="repeats: expected at least 1, got 0"):
        bench(bundle, repeats=0)
    with pytest.raises(InputError, match="multiple of 32 from 64; got 100"):
        bench(bundle, sizes=[100])
    with pytest.raises(InputError, match="unknown backend 'torch'; expected some of onnxruntime, openvino"):
        bench(bundle, backends=["torch"])
    with pytest.raises(InputError, match=r"rows.json: the rows are JSON lines; name the file \*.jsonl"):
        bench(bundle, output="rows.json")
    with pytest.raises(InputError, match=r"num_threads: expected .* 1 to 256, .*; got 100000"):
        bench(bundle, num_threads=100_000)


def test_without_onnx_runtime_the_extra_is_named(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"ONNX Runtime, which is missing; pip install 'flashcocos\[cpu\]'"):
        bench(bundle, quick=True)


def test_every_backend_is_a_case() -> None:
    pytest.importorskip("openvino", reason="needs the extra openvino")
    from flashcocos.runtime.cpu.openvino import cpu_precisions

    found = [case.parameters for case in cases(64)]
    assert found[0]["backend"] == "onnxruntime"
    assert {one["precision"] for one in found if one["backend"] == "openvino"} == set(cpu_precisions())


def test_the_profile_tells_every_stage(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(bundle), "--profile", "--threads", "1", "--repeats", "2"]) == 0
    printed = capsys.readouterr().out
    for stage in ("exemplar", "query", "warp", "coarse", "fine"):
        assert f"| {stage} | " in printed
    assert "| Conv | 1 | " in printed
    found = profile(bundle, size=96, repeats=1, num_threads=1)
    assert all(one.milliseconds > 0 for one in found)
    # of the same unit, in another run
    assert sum(took for _, took in found[0].operators.values()) < 100 * found[0].milliseconds
    with pytest.raises(InputError, match="repeats: expected at least 1, got 0"):
        profile(bundle, repeats=0)
    with pytest.raises(InputError, match=r"num_threads: expected .* 1 to 256, .*; got 0"):
        profile(bundle, num_threads=0)


def test_the_profile_refuses_what_it_does_not_do(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(bundle), "--profile", "--backend", "openvino"]) == 1
    assert "leave --backend out" in capsys.readouterr().err


def test_a_loop_counts_without_what_it_holds() -> None:
    def event(kind: str, start: int, took: int) -> dict[str, Any]:
        return {"cat": "Node", "name": f"{kind}_kernel_time", "ts": start, "dur": took, "args": {"op_name": kind}}

    runs = [{"cat": "Session", "name": "model_run", "ts": start, "dur": 900} for start in (0, 1000, 2000)]
    warm_up = [event("Conv", 10, 800)]
    timed = [event("Loop", 1000 + start, 500) for start in (0, 1000)]
    timed += [event("MatMul", 1000 + start, 200) for start in (100, 300, 1100, 1300)]
    timed += [event("Conv", 1000 + start, 300) for start in (500, 1500)]
    found = operator_times([*runs, *warm_up, *timed], 2)
    assert found == {"MatMul": (2.0, 0.4), "Conv": (1.0, 0.3), "Loop": (1.0, pytest.approx(0.1))}
    text = report([profiling.StageProfile("query", 1.0, found)])
    assert "| MatMul | 2 | 0.4 | 40% |" in text
    assert "| between operators | 0 | 0.2 | 20% |" in text


def test_the_profile_shows_ten_kinds_and_the_rest() -> None:
    found = {f"Kind{place}": (1.0, 12.0 - place) for place in range(12)}
    text = report([profiling.StageProfile("query", 100.0, found)])
    assert "Kind9" in text
    assert "Kind10" not in text
    assert "| 2 other kinds | 2 | 3.0 | 3% |" in text
