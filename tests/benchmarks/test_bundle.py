"""`flashcocos bench`: compares before it times, goes on where it was stopped, and mixes no two setups in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_bundle import write_tiny_bundle

from flashcocos.benchmarks import bundle as module
from flashcocos.benchmarks.bundle import Case, bench, cases, measure, table
from flashcocos.cli import main
from flashcocos.errors import BackendError, InputError

ORT = Case("onnxruntime", "float32", 64)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "model.zip")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """The cases that were timed; a row is made up for each instead."""
    found: list[Case] = []

    def isolated(path: Path, case: Case, reference: Path, repeats: int, threads: int | None) -> dict[str, Any]:
        if repeats:
            found.append(case)
        return {"backend": case.backend, "precision": case.precision, "size": case.size, "timed": False, "psnr_db": 9.0}

    monkeypatch.setattr(module, "_isolated", isolated)
    return found


def test_a_case_in_a_process_of_its_own(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "rows.jsonl"
    words = ["bench", str(bundle), "--size", "64", "--repeats", "2", "--threads", "1", "--backend", "onnxruntime"]
    assert main([*words, "-o", str(output)]) == 0
    (row,) = map(json.loads, output.read_text().splitlines())
    assert (row["psnr_db"], row["timed"], row["setup"]["threads"]) == (99.0, True, 1)
    assert 0 < row["ms"]["p5"] <= row["ms"]["median"] <= row["ms"]["p95"] <= row["ms"]["p99"]
    assert sum(row["stages_ms"].values()) <= row["ms"]["p99"]
    assert row["peak_mib"] > 0
    assert {"model", "revision", "versions", "processor", "cores"} <= set(row["setup"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[2].startswith("| onnxruntime | float32 | 64 | ")
    assert {line.count("|") for line in printed[:3]} == {13}
    monkeypatch.setattr(module, "_isolated", lambda *arguments: pytest.fail("measured again"))
    assert main([*words, "-o", str(output)]) == 0


def test_a_picture_too_far_off_is_not_timed(bundle: Path, tmp_path: Path) -> None:
    measure(str(bundle), ORT, tmp_path / "64.npy", 0, 1)
    picture = np.load(tmp_path / "64.npy")
    assert picture.std() > 10
    np.save(tmp_path / "64.npy", picture ^ 4)
    row = measure(str(bundle), ORT, tmp_path / "64.npy", 2, 1)
    assert not row["timed"]
    assert "ms" not in row
    assert "36.1 dB: too far off, not timed |" in table([row])


@pytest.mark.usefixtures("asked")
def test_a_red_row_fails_the_command(bundle: Path) -> None:
    assert main(["bench", str(bundle), "--backend", "onnxruntime"]) == 1


def test_a_run_that_was_stopped_goes_on(bundle: Path, tmp_path: Path, asked: list[Case]) -> None:
    output = tmp_path / "rows.jsonl"
    bench(bundle, sizes=[64], backends=["onnxruntime"], output=output)
    rows = bench(bundle, sizes=[64, 96], backends=["onnxruntime"], output=output)
    assert [case.size for case in asked] == [64, 96]
    assert [row["size"] for row in rows] == [64, 96]
    assert len(output.read_text().splitlines()) == 2


@pytest.mark.usefixtures("asked")
def test_a_file_of_another_setup_is_refused(bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    bench(bundle, backends=["onnxruntime"], output=output)
    with pytest.raises(InputError, match=r"rows.jsonl was measured with other repeats, threads; choose another output"):
        bench(bundle, backends=["onnxruntime"], output=output, repeats=7, threads=3)
    with pytest.raises(InputError, match="was measured with other model"):
        bench(write_tiny_bundle(tmp_path / "b", seed=1), backends=["onnxruntime"], output=output)
    for text in ("no json\n", "{}\n", "[1]\n"):
        output.write_text(text)
        with pytest.raises(InputError, match="not a file that flashcocos bench wrote"):
            bench(bundle, output=output)


def test_bad_options(bundle: Path) -> None:
    with pytest.raises(InputError, match="repeats: expected at least 1, got 0"):
        bench(bundle, repeats=0)
    with pytest.raises(InputError, match="multiple of 32 from 64; got 100"):
        bench(bundle, sizes=[100])
    with pytest.raises(InputError, match="unknown backend 'torch'; expected some of onnxruntime, openvino"):
        bench(bundle, backends=["torch"])


def test_a_case_that_fails_is_one_line(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"^onnxruntime, float32, 64 px: flashcocos.errors.InputError: no model"):
        module._isolated(tmp_path / "absent", ORT, tmp_path / "64.npy", 0, None)


def test_every_backend_is_a_case() -> None:
    pytest.importorskip("openvino", reason="needs the extra openvino")
    from flashcocos.runtime.openvino_engine import cpu_precisions

    found = cases([64, 96])
    assert found[0] == ORT
    assert {case.precision for case in found if case.backend == "openvino"} == set(cpu_precisions())
    assert {case.size for case in found} == {64, 96}
