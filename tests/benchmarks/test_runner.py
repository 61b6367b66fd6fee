"""The harness: compared before it is timed, gone on with after a stop, never mixed; memory that ends is a row."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from flashcocos import __version__
from flashcocos.benchmarks import provenance, worker
from flashcocos.benchmarks.cases import all_cases
from flashcocos.benchmarks.gpu import gpu_cases
from flashcocos.benchmarks.registry import Assets, Case, Gate, Task, select
from flashcocos.benchmarks.runner import _lacks, open_assets, read_rows, run_cases
from flashcocos.errors import BackendError, InputError

NOTHING = Assets(threads=1)


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes of cases find `stub_benchmarks`."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "support"))


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def case(name: str, benchmark: str = "counted", **fields: Any) -> Case:
    return Case(f"test/{name}", f"stub_benchmarks:{benchmark}", "a test", **{"parameters": {}, **fields})


def counted(name: str, log: Path, value: float = 1.0, **fields: Any) -> Case:
    gate = Gate("value", 0.5)
    return case(name, parameters={"value": value, "log": str(log)}, gate=gate, **{"repeats": 3, **fields})


def test_a_case_is_checked_then_timed(log: Path, tmp_path: Path) -> None:
    (row,) = run_cases([counted("a", log)], NOTHING, tmp_path, command="the command")
    assert row["status"] == "timed"
    assert log.read_text() == "test/a\n" * 4  # a warm-up, then the repeats
    assert row["runs"] == 3
    assert 0 < row["ms"]["p5"] <= row["ms"]["median"] <= row["ms"]["p95"] <= row["ms"]["p99"]
    assert row["quality"] == {"value": 1.0, "scored": 1.0}
    assert (row["parts_ms"], row["facts"], row["ratio"] > 0) == ({"all": 1.0}, {"fact": 1}, True)
    assert row["peak_mib"] > 5
    assert {"revision", "versions", "processor", "cores", "threads", "device"} <= set(row["setup"])
    assert {"time"} <= set(row["conditions"])
    assert json.loads((tmp_path / "test.jsonl").read_text()) == row


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets the peak start again")
@pytest.mark.parametrize("baseline", [True, False])
def test_peak_memory_is_that_of_the_runs_alone(baseline: bool) -> None:
    (row,) = run_cases([case("a", "greedy", parameters={"baseline": baseline}, repeats=2)], NOTHING, None)
    assert 60 < row["extra_mib"] < 210
    assert row["extra_mib"] < row["peak_mib"] < 250


def test_without_a_warm_up_the_first_run_is_timed(log: Path) -> None:
    (row,) = run_cases([counted("a", log, warmup=False, repeats=1)], NOTHING, None)
    assert (row["runs"], row["ms"]["median"]) == (1, row["first_ms"])
    assert log.read_text() == "test/a\n"


@pytest.mark.parametrize(
    ("value", "at_least"), [(0.2, True), (0.8, False), (float("nan"), True), (float("nan"), False)]
)
def test_what_is_outside_its_bound_is_not_timed(value: float, at_least: bool, log: Path) -> None:
    chosen = dataclasses.replace(counted("a", log, value), gate=Gate("value", 0.5, at_least))
    row = worker.measure(chosen, NOTHING)
    assert row["status"] == "outside"
    assert "ms" not in row
    assert np.isnan(value) or row["quality"] == {"value": value}
    assert log.read_text().count("\n") == 1


def test_facts_are_not_timed() -> None:
    assert worker.measure(case("a", "facts"), NOTHING)["facts"] == {"answer": 42}


def test_a_run_that_was_stopped_goes_on(log: Path, tmp_path: Path) -> None:
    first, second = counted("a", log), counted("b", log)
    run_cases([first], NOTHING, tmp_path)
    rows = run_cases([first, second], NOTHING, tmp_path)
    assert [row["case"] for row in rows] == ["test/a", "test/b"]
    assert log.read_text().count("test/a") == 4
    assert rows == read_rows(tmp_path / "test.jsonl")
    run_cases([first], NOTHING, tmp_path, fresh=True)
    assert len(read_rows(tmp_path / "test.jsonl")) == 1


def test_a_file_of_another_setup_is_refused(log: Path, tmp_path: Path) -> None:
    run_cases([counted("a", log)], NOTHING, tmp_path)
    for threads, other, found in (
        (2, counted("b", log), "other threads; choose another output"),
        (1, counted("a", log, 0.7), "other parameters of test/a"),
        (1, counted("a", log, repeats=9), "other repeats of test/a"),
    ):
        with pytest.raises(InputError, match=found):
            run_cases([other], Assets(threads=threads), tmp_path)
    for text in ("no json\n", "{}\n", "[1]\n", '{"case": 1, "status": "timed", "setup": {}}\n'):
        (tmp_path / "test.jsonl").write_text(text)
        with pytest.raises(InputError, match="not a file of benchmark results"):
            run_cases([counted("a", log)], NOTHING, tmp_path)


def test_memory_that_does_not_suffice_is_a_row(tmp_path: Path) -> None:
    large = case("large", memory=2**60, reference="test/never-made")
    rows = run_cases([case("killed", "killed"), case("hungry", "hungry"), large], NOTHING, tmp_path)
    assert [row["status"] for row in rows] == ["out of memory"] * 3
    assert "SIGKILL" in rows[0]["reason"]
    assert rows[1]["reason"] == "MemoryError: Unable to allocate 16.0 GiB"
    assert rows[2]["reason"].startswith("not started: its matrices take 1073741824.0 GiB, ")
    assert rows[2]["needed_mib"] == 2**40
    assert rows == read_rows(tmp_path / "test.jsonl")


def test_a_case_that_takes_too_long_is_a_row() -> None:
    (row,) = run_cases([case("slow", "slow", limit=1.5)], NOTHING, None)
    assert (row["status"], row["reason"]) == ("timeout", "not done after 2 s")


def test_a_case_that_fails_stops_no_other_and_is_run_again(log: Path, tmp_path: Path) -> None:
    assets = Assets(model="/a/folder/model.safetensors", threads=1)
    rows = run_cases([case("broken", "broken"), counted("a", log)], assets, tmp_path)
    assert [row["status"] for row in rows] == ["failed", "timed"]
    assert rows[0]["reason"] == "ValueError: no such thing in model.safetensors"
    assert read_rows(tmp_path / "test.jsonl") == rows
    mended = dataclasses.replace(counted("broken", log), parameters={})  # the file knows the case by its parameters
    mended = dataclasses.replace(mended, benchmark="stub_benchmarks:facts", gate=None, repeats=5)
    again = run_cases([mended, counted("a", log)], assets, tmp_path)
    assert [row["status"] for row in again] == ["measured", "timed"]
    assert log.read_text().count("test/a") == 4  # of the first run
    assert read_rows(tmp_path / "test.jsonl") == again


def test_what_time_is_left_for_runs_and_the_next_run_does_the_rest(log: Path, tmp_path: Path) -> None:
    cases = [counted("a", log), case("slow", "slow"), counted("b", log), case("c", requires=("no_such_package",))]
    rows = run_cases(cases, NOTHING, tmp_path, seconds=6.0)
    assert [row["status"] for row in rows] == ["timed", "skipped", "skipped", "skipped"]
    assert [row.get("reason") for row in rows[1:]] == ["no time left"] * 2 + [
        "the package no_such_package is not installed"
    ]
    assert read_rows(tmp_path / "test.jsonl") == rows
    assert "test/b" not in log.read_text()
    rows = run_cases([cases[0], *cases[2:]], NOTHING, tmp_path)
    assert [row["status"] for row in rows] == ["timed", "timed", "skipped"]
    assert log.read_text() == "test/a\n" * 4 + "test/b\n" * 4
    assert [row["case"] for row in read_rows(tmp_path / "test.jsonl")] == ["test/a", "test/slow", "test/b", "test/c"]


def test_what_is_not_finished_goes_on(tmp_path: Path) -> None:
    for finished, starts in ((False, 2), (True, 1)):
        part = case(f"part-{finished}", "part", parameters={"finished": finished, "log": str(tmp_path / f"{finished}")})
        for _ in range(2):
            (row,) = run_cases([part], NOTHING, tmp_path)
        assert row["facts"] == {"finished": finished}
        assert (tmp_path / f"{finished}").read_text().count("started") == starts


def test_what_is_not_here_is_skipped_with_the_reason(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    absent = counted("a", log, requires=("no_such_package",))
    gpu = counted("b", log, requires=("cuda", "onnxruntime-gpu", "compute-sanitizer", "tests"))
    compiled = counted("c", log, requires=("c++",))
    monkeypatch.setattr("flashcocos.benchmarks.runner.TESTS", Path("/no/such/folder"))
    monkeypatch.setattr("flashcocos.runtime.cpu.onnxruntime.has_provider", lambda device: False)
    rows = run_cases([absent, gpu, compiled], NOTHING, None)
    assert [row["status"] for row in rows] == ["skipped"] * 3
    assert rows[1]["reason"] == (
        "for an NVIDIA GPU; the package onnxruntime-gpu is not installed; there is no compute-sanitizer on the PATH; "
        "the tests are in a checkout alone"
    )
    assert "C++ compiler" in rows[2]["reason"]
    assert rows[0]["reason"] == "the package no_such_package is not installed"
    assert not log.exists()


def test_without_its_reference_a_case_is_skipped(tmp_path: Path) -> None:
    assets = Assets(references=str(tmp_path))
    compared = case("a", reference="test/hungry")
    (row,) = run_cases([compared], assets, None, known=[case("hungry", "hungry")])
    assert row["status"] == "skipped"
    assert row["reason"].startswith("nothing to compare with: test/hungry: out of memory: MemoryError")


def test_missing_assets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"test/a needs a naive single graph: give --model FOLDER"):
        run_cases([case("a", requires=("naive",))], NOTHING, None)
    with pytest.raises(InputError, match=r"test/a needs a bundle"):
        run_cases([case("a", requires=("bundle",))], NOTHING, None)
    with pytest.raises(InputError, match=r"no .*model.safetensors; `python -m flashcocos.benchmarks model -o"):
        open_assets(tmp_path, {})


def test_selection() -> None:
    cases = all_cases(["int8"])
    assert len({one.name for one in cases}) == len(cases)
    assert select(cases) == cases
    assert "ablation/int8-256" in [one.name for one in cases]
    assert {one.group for one in select(cases, ["warp", "startup"])} == {"warp", "startup"}
    assert all(one.name.startswith("warp/numba-p1") for one in select(cases, ["warp"], ["warp/numba-p1-*"]))
    with pytest.raises(InputError, match="unknown group 'all'"):
        select(cases, ["all"])
    with pytest.raises(InputError, match="no case matches 'wrap"):
        select(cases, only=["wrap/*"])


def test_every_case_survives_the_trip_to_its_process() -> None:
    for one in all_cases(["int8"]):
        task = Task(one, Assets(bundles={"model": "a folder"}, threads=2), timed=False)
        assert msgspec.json.decode(msgspec.json.encode(task), type=Task) == task
        assert one.reference == "" or one.reference in {other.name for other in all_cases()}


def test_what_is_not_there_is_said_and_no_error() -> None:
    needs = {need for case in (*all_cases(), *gpu_cases()) for need in case.requires}
    assert {"bfloat16", "openvino", "cuda"} <= needs
    for need in needs:
        assert isinstance(_lacks(need, NOTHING), str)


def test_the_revision_is_that_of_this_checkout_or_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"rev-parse --show-toplevel": str(Path(provenance.__file__).resolve().parents[1]), "rev-parse": "abc"}
    changed = ""

    def git(*arguments: str) -> str:
        return changed if arguments[0] == "status" else found.get(" ".join(arguments), found[arguments[0]])

    monkeypatch.setattr(provenance, "_git", git)
    assert provenance.provenance()["revision"] == "abc"
    changed = " M cli.py"
    assert provenance.provenance()["revision"] == "abc+changes"
    found["rev-parse --show-toplevel"] = "/a/repository/that/it/is/installed/in"
    assert provenance.provenance()["revision"] == __version__


def test_without_psutil_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(BackendError, match=r"the package psutil is missing: pip install 'flashcocos\[cpu\]'"):
        run_cases([case("a", "facts")], NOTHING, None)


@pytest.mark.parametrize("threads", [0, -1, 257, 100_000])
def test_a_number_of_threads_out_of_range_is_refused(threads: int) -> None:
    with pytest.raises(InputError, match=f"num_threads: expected a whole number from 1 to 256, .*; got {threads}$"):
        Assets(threads=threads)
    assert Assets(threads=256).threads == 256
