"""The GPU benchmark's script runs without one, in its smoke mode, and refuses to pretend."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the benchmark times the Triton kernels")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flashcocos.benchmarks.speed.corr_warp_gpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_smoke_measures_each_implementation_both_ways() -> None:
    done = run("--smoke")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 8
    names = ("triton  kernel nine_tap", "triton  kernel straightforward", "reference", "sdpa")
    for line, name in zip(lines[::2], names, strict=True):
        assert line.startswith(f"implementation {name}  side 4")
    for line in lines:
        fields = dict(part.split(" ", 1) for part in line.split("  "))
        assert float(fields["median_ms"]) > 0
        assert float(fields["error"]) < 0.05


def test_without_a_gpu_nothing_is_timed() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    done = run()
    assert done.returncode == 2
    assert "no CUDA GPU here; --smoke" in done.stderr
