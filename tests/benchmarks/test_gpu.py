"""The run on a GPU: rehearsed on the CPU, and what needs a GPU over the stand-in for one."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from fake_cuda import FakeCuda
from fake_gpu import fake_gpu, install_driver
from kernel_twins import describe, write_kernels
from tiny_bundle import CLASSES, write_tiny_bundle

from flashcocos.benchmarks import gpu, runner, worker
from flashcocos.benchmarks.__main__ import main
from flashcocos.benchmarks.gpu import PICTURE, cpu_picture, dry_cases, gpu_cases, gpu_section, run_gpu
from flashcocos.benchmarks.registry import Assets, Case, Gate, Task
from flashcocos.benchmarks.runner import read_rows
from flashcocos.benchmarks.speed import gpu as speed
from flashcocos.benchmarks.speed import machine
from flashcocos.errors import BackendError
from flashcocos.export.tensorrt import build
from flashcocos.runtime.gpu.device import Device

CASES = {case.name: case for case in gpu_cases()}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of cases find `stub_benchmarks`; what a run sets is put back."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "support"))
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Cases run here, for a process of its own takes seconds to import torch; the names of those that ran."""
    ran: list[str] = []

    def isolated(case: Case, assets: Assets, *, timed: bool = True) -> dict[str, Any]:
        ran.append(case.name)
        task = msgspec.json.decode(msgspec.json.encode(Task(case, assets, timed)), type=Task)
        row: dict[str, Any] = json.loads(json.dumps(worker.measure(task.case, task.assets, timed=timed)))
        return row

    monkeypatch.setattr(runner, "isolated", isolated)
    return ran


@pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run is for a machine without a GPU")
def test_a_dry_run(
    tmp_path: Path, in_this_process: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every case has its row, in order; what is lacking is named; the next run has nothing to do; the page shows it."""
    pytest.importorskip("triton", reason="runs the Triton kernels")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "COPY_BYTES", 2**20)
    words = ["gpu", "--dry-run", "-o", str(tmp_path / "out")]
    assert main(words) == 0
    rows = read_rows(tmp_path / "out" / "gpu.jsonl")
    cases = list(dry_cases())
    assert [row["case"] for row in rows] == [case.name for case in cases]
    by_name = {row["case"]: row for row in rows}
    for case in cases:
        row = by_name[case.name]
        lacking = [need for need in case.requires if runner._lacks(need, Assets())]
        assert row["status"] in (["skipped"] if lacking else ["timed", "measured"]), row
        for need in lacking:
            assert {"cuda": "NVIDIA GPU"}.get(need, need) in row["reason"]
    assert "cuda" in CASES["gpu/cubins-ade20k-64"].requires
    assert by_name["gpu/cubins-ade20k-64"]["status"] == "skipped"
    assert 0 < by_name["gpu/repeats"]["quality"]["max_error"] < 2e-3
    assert by_name["gpu/tests"]["facts"] == {"passed": 1, "skipped": 0, "finished": True}
    ran = list(in_this_process)
    assert main(words) == 0
    assert in_this_process == ran
    assert capsys.readouterr().out.split() == 2 * [str(tmp_path / "out" / "gpu.jsonl")]
    page = gpu_section(rows)
    assert all(row["measures"] in page for row in rows if not row["case"].startswith("warp/"))


def test_the_page_has_rates(tmp_path: Path) -> None:
    case = CASES["warp/triton-p3-n16384-v48-backward"]
    row = {"case": case.name, "measures": case.measures, "parameters": case.parameters, "status": "timed"}
    row |= {"parts_ms": {"pass": 10.0}, "device_peak_mib": 512.4, "peak_mib": 1.0, "quality": {"max_error": 3e-4}}
    # 3 x 2 x 16384^2 x (256 + 48) and (9 x 256 + 48) operations in 10 ms
    line = "| 16 384 | 48 | Triton | with gradients | 10 ms | 49 | 379 | 512 MiB | 3e-04 |"
    assert line in gpu_section([row])
    assert "torch's SDPA" not in gpu_section([row])


def test_the_cases_are_what_was_asked_for() -> None:
    for direction in ("", "-backward"):
        for positions in (64**2, 128**2, 256**2):
            for values in ("", "-v48"):
                methods = ("triton",) if direction else ("triton-nine-tap", "triton-straightforward")
                for method in (*methods, "sdpa", "reference", "compiled"):
                    assert f"warp/{method}-p3-n{positions}{values}{direction}" in CASES
    assert CASES["gpu/repeats"].parameters["repeats"] == 50
    names = list(CASES)
    assert names.index("gpu/device") == 0
    assert names.index("gpu/repeats") < names.index("gpu/memcheck") < names.index("warp/triton-nine-tap-p3-n16384")
    for case in (*CASES.values(), *dry_cases(), cpu_picture()):
        task = Task(case, Assets())
        assert msgspec.json.decode(msgspec.json.encode(task), type=Task) == task


def test_wrong_options(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "file").touch()
    for words, message in (
        (["-o", str(tmp_path / "file"), "--dry-run"], "file is a file; expected a folder"),
        (["-o", str(tmp_path), "--dry-run", "--seconds", "0"], "seconds: expected a positive number, got 0"),
        (["-o", str(tmp_path), "--dry-run", "--seconds", "nan"], "seconds: expected a positive number, got nan"),
        (["-o", str(tmp_path)], "device cuda: torch sees no GPU"),
    ):
        assert main(["gpu", *words]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "gpu.jsonl").exists()


@pytest.mark.parametrize("benchmark", ["broken", "counted"])
def test_what_fails_or_is_wrong_stops_no_other_and_ends_with_one(
    benchmark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parameters = {"value": 1, "log": str(tmp_path / "log")}
    gate = Gate("value", 2)  # which 1 does not reach
    cases = [
        Case("gpu/first", f"stub_benchmarks:{benchmark}", "wrong", parameters, gate),
        Case("gpu/second", "stub_benchmarks:facts", "right", {}),
    ]
    monkeypatch.setattr(gpu, "dry_cases", lambda: cases)
    assert main(["gpu", "--dry-run", "-o", str(tmp_path)]) == 1
    status = {"broken": "failed", "counted": "outside"}[benchmark]
    rows = read_rows(tmp_path / "gpu.jsonl")
    assert [(row["case"], row["status"]) for row in rows] == [("gpu/first", status), ("gpu/second", "measured")]
    assert "gpu/first" in capsys.readouterr().err


def test_a_run_of_a_cut_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "dry_cases", lambda: [Case("gpu/a", "stub_benchmarks:facts", "facts", {})])
    (row,) = run_gpu(tmp_path, limit=1e-6, dry_run=True)
    assert (row["status"], row["reason"]) == ("skipped", "no time left")
    (row,) = run_gpu(tmp_path, limit=60.0, dry_run=True)
    assert row["status"] == "measured"


@pytest.fixture
def assets(tmp_path: Path) -> Assets:
    return Assets(references=str(tmp_path / "files"))


@pytest.fixture
def tests_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(speed, "TESTS", tmp_path)
    monkeypatch.setattr(speed, "MARGIN", 0.0)
    return tmp_path


def test_repeats_that_differ_fail_the_case(assets: Assets, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so does a wrong result."""
    triton_warp = pytest.importorskip("flashcocos.kernels.gpu.triton_warp", reason="runs the Triton kernels")
    (case,) = [case for case in dry_cases() if case.name == "gpu/repeats"]
    calls, change = [], 1.0

    def forward(theta: Any, phi: Any, values: Any, *options: Any) -> Any:
        calls.append(1)
        return values.new_full((1, 3, 3, 4), change * len(calls)), values

    monkeypatch.setattr(triton_warp, "warp_forward", forward)
    monkeypatch.setattr(triton_warp, "match_forward", lambda *_: ())
    monkeypatch.setattr(triton_warp, "warp_backward", lambda *_: ())
    with pytest.raises(BackendError, match="straightforward in float16: 1 of 1 repeats differ in a bit"):
        worker.measure(case, assets)
    change = 0.0
    assert worker.measure(case, assets)["status"] == "outside"


def case_of_tests(limit: float) -> Case:
    return Case("gpu/tests", ".speed.gpu:kernel_tests", "tests", {"tests": ["test_it.py"]}, limit=limit)


def test_a_test_that_fails_fails_the_case(tests_folder: Path, assets: Assets) -> None:
    (tests_folder / "test_it.py").write_text("def test_a(): pass\ndef test_b(): assert 0\n")
    with pytest.raises(BackendError, match=r"1 of 2 tests failed, pytest ended with 1; tests\.log names them"):
        worker.measure(case_of_tests(60), assets)
    assert "test_it.py::test_b FAILED" in (tests_folder / "files" / "tests.log").read_text()
    (tests_folder / "test_it.py").unlink()
    with pytest.raises(BackendError, match=r"0 of 0 tests failed, pytest ended with 4"):
        worker.measure(case_of_tests(60), assets)


@pytest.mark.parametrize("form", ["a.py::test_{} {} [ 50%]", "[gw0] [ 50%] {1} a.py::test_{0}"])
def test_tests_that_take_too_long_count_until_then(form: str, assets: Assets, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without pytest-xdist, whose lines have another order."""
    outcomes = ["PASSED", "SKIPPED", "PASSED"]
    lines = [form.format(name, outcome) for name, outcome in zip("abc", outcomes, strict=True)]
    lines = ["collected 4 items", "a.py::test_c", *lines, "==== short test summary info ====", "FAILED a.py::test_d"]

    def logged(command: list[str], log: Path, limit: float, **variables: str) -> None:
        log.parent.mkdir()
        log.write_text("\n".join(lines))

    monkeypatch.setattr(speed, "_logged", logged)
    assert worker.measure(case_of_tests(60), assets)["facts"] == {"passed": 2, "skipped": 1, "finished": False}


def test_a_program_ends_with_its_limit_and_all_that_it_started(tmp_path: Path) -> None:
    log, child = tmp_path / "folder" / "log", tmp_path / "child"
    start = time.monotonic()
    assert speed._logged(["sh", "-c", f"echo begun; sleep 60 & echo $! > {child}; wait"], log, 0) is None
    assert time.monotonic() - start < 30
    assert log.read_text() == "begun\n"
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # until its new parent has noticed
            os.kill(int(child.read_text()), 0)
            time.sleep(0.1)
    assert speed._logged(["sh", "-c", "exit $STATUS"], log, 60, STATUS="3") == 3


@pytest.mark.parametrize("clean", [True, False])
def test_the_sanitizer_runs_a_small_warp(
    clean: bool, tmp_path: Path, assets: Assets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script in place of the tool keeps what it was asked for."""
    summary = f"========= ERROR SUMMARY: {0 if clean else 3} errors"
    script = tmp_path / "compute-sanitizer"
    script.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "asked = [sys.argv[1:], os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING']]\n"
        f"json.dump(asked, open({str(tmp_path / 'asked')!r}, 'w'))\n"
        f"print('========= COMPUTE-SANITIZER')\nprint({summary!r})\nsys.exit({0 if clean else 86})\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    case = CASES["gpu/racecheck"]
    if clean:
        assert worker.measure(case, assets)["facts"] == {"summary": summary}
    else:
        with pytest.raises(BackendError, match=r"racecheck ended with 86: .*3 errors; racecheck.log has all of it"):
            worker.measure(case, assets)
    (words, caching) = json.loads((tmp_path / "asked").read_text())
    assert caching == "1"
    assert words[:-1] == [
        *("--tool", "racecheck", "--error-exitcode", "86"),
        *(sys.executable, "-m", "flashcocos.benchmarks.worker"),
    ]
    task = msgspec.json.decode(words[-1], type=Task)
    assert (task.case.benchmark, task.case.parameters) == ("flashcocos.benchmarks.speed.gpu:repeats", case.parameters)


def test_cubins_are_launched_and_compared(assets: Assets, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over twins of the kernels."""
    cuda = install_driver(monkeypatch, FakeCuda(CLASSES, dtype=np.float16))

    def compile_kernels(folder: Path, architectures: list[int], **options: Any) -> Any:
        assert options == {"values": [3], "patch": 3, "channels": 16}
        write_kernels(folder, CLASSES, "float16", architectures[0])
        yield from describe(CLASSES, "float16", architectures[0]).values()

    monkeypatch.setattr("flashcocos.kernels.gpu.aot.compile_kernels", compile_kernels)
    case = dataclasses.replace(CASES["gpu/cubins-ade20k-64"], parameters={"preset": "tiny", "size": 6}, repeats=2)
    row = worker.measure(case, assets)
    assert row["status"] == "timed", row
    assert row["quality"]["max_error"] < 1e-3
    assert (row["facts"]["entry"], row["facts"]["grid"]) == ("warp_kernel", (3, 1, 1))
    assert cuda.closed
    assert cuda.live == (0, 0, 0)


@pytest.mark.parametrize("graph", [True, False])
def test_translations_with_and_without_a_graph(
    graph: bool, tmp_path: Path, assets: Assets, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny_bundle(tmp_path / "m")
    monkeypatch.setattr(Device, "capture", Device.capture)  # which the case replaces
    assets = dataclasses.replace(assets, bundles={"default": str(path)})
    known = cpu_picture()
    parameters = {**known.parameters, "size": 64}
    picture = worker.measure(dataclasses.replace(known, parameters=parameters, repeats=1), assets)
    assert picture["status"] == "timed"
    assert np.load(tmp_path / "files" / f"{PICTURE}.npy").shape == (64, 64, 3)
    fake_gpu(monkeypatch, path, "tensorrt-rtx")
    case = CASES["gpu/translate-tensorrt-rtx"]
    changed = {**case.parameters, "size": 64, "graph": graph}
    prepared = speed.translate(
        dataclasses.replace(case, parameters=changed), dataclasses.replace(assets, device="cuda")
    )
    assert prepared.run is not None
    pictures = [prepared.run().result for _ in range(3)]
    # the first label is the CPU's
    assert prepared.check(pictures[0])["psnr_db"] > 40
    assert prepared.check(pictures[1])["psnr_db"] < 40
    assert prepared.facts["cuda_graphs"] == int(graph)


def test_what_is_built_is_described(tmp_path: Path, assets: Assets, monkeypatch: pytest.MonkeyPatch) -> None:
    install_driver(monkeypatch, FakeCuda(CLASSES))
    asked = []
    monkeypatch.setattr(build, "build_kernels", lambda *arguments: asked.append(arguments) or ["pack", "warp"])
    case = CASES["gpu/build-onnxruntime"]
    facts = worker.measure(case, dataclasses.replace(assets, bundles={"default": "folder/m.zip"}))["facts"]
    assert asked == [("folder/m.zip", Path("folder/m.engines"), [86], "float32")]
    assert facts["kernels"] == 2
    assert facts["all_s"] >= facts["kernels_s"] >= 0
