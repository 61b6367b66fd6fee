"""One case in this process, for `runner`: prepared, compared, and only then timed.

    python -m flashcocos.benchmarks.worker TASK

takes a `registry.Task` and prints the row's fields, both as JSON. Memory is that of a process that did nothing else.
Where memory runs out, the operating system ends this process before any other.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from .provenance import peak_rss, percentiles, resident_memory
from .registry import Assets, Benchmark, Case, Task

MIB = 2**20
PAUSE = 0.08  # seconds between run and baseline: threads of BLAS spin for a while on the cores that the other needs


def measure(case: Case, assets: Assets, *, timed: bool = True) -> dict[str, Any]:
    """Run one case in this process: its `status` and what was measured, the fields of a row, JSON.

    Not `timed`: the case is prepared, run once and checked.
    """
    start = time.perf_counter()
    benchmark = _prepare(case, assets)
    row: dict[str, Any] = {"setup_ms": _since(start)}
    if benchmark.run is None:
        return {"status": "measured", **row, "facts": dict(benchmark.facts)}
    memory = _Memory(assets.device)
    elapsed, sample = _timed(benchmark.run, assets.device)
    memory.note()
    quality = benchmark.check(sample.result)
    if case.gate and not case.gate.passes(quality):
        return {"status": "outside", **row, "quality": quality}
    if not timed:
        return {"status": "checked", **row, "quality": quality}
    row["first_ms"] = elapsed
    memory.start()  # what the check took is not the case's
    row |= _repeat(case, benchmark, assets.device, [] if case.warmup else [(elapsed, sample.parts)])
    if benchmark.baseline is None:  # the baseline's is not either
        memory.note()
    row |= memory.row()
    # last, for it needs memory of its own
    row |= {"quality": quality | benchmark.score(sample.result), "facts": dict(benchmark.facts)}
    return {"status": "timed", **row}


def _prepare(case: Case, assets: Assets) -> Benchmark:
    module, _, name = case.benchmark.partition(":")
    prepare: Callable[[Case, Assets], Benchmark] = getattr(importlib.import_module(module, __package__), name)
    return prepare(case, assets)


def _repeat(case: Case, benchmark: Benchmark, device: str, runs: list[tuple[float, Any]]) -> dict[str, Any]:
    """Run until the case's repeats are done or its seconds are over."""
    assert benchmark.run is not None
    baseline: list[float] = []
    start = time.monotonic()
    while len(runs) < case.repeats and (not runs or time.monotonic() - start < case.seconds):
        if benchmark.baseline is not None:
            time.sleep(PAUSE)
            baseline.append(_timed(benchmark.baseline, device)[0])
            time.sleep(PAUSE)
        elapsed, sample = _timed(benchmark.run, device)
        runs.append((elapsed, sample.parts))
    row: dict[str, Any] = {"runs": len(runs), "ms": percentiles([elapsed for elapsed, _ in runs])}
    if names := list(runs[0][1]):
        row["parts_ms"] = {name: round(float(np.median([parts[name] for _, parts in runs])), 3) for name in names}
    if baseline:
        row["baseline_ms"] = percentiles(baseline)
        # the fastest of each: what slows a busy machine slows single runs of either
        row["ratio"] = round(min(elapsed for elapsed, _ in runs) / min(baseline), 3)
    return row


def _timed(run: Callable[[], Any], device: str) -> tuple[float, Any]:
    start = time.perf_counter()
    sample = run()
    if device == "cuda" and (torch := sys.modules.get("torch")):
        torch.cuda.synchronize()
    return _since(start), sample


def _since(start: float) -> float:
    return round(1e3 * (time.perf_counter() - start), 3)


class _Memory:
    """Peak memory in bytes: of this process, of the runs beyond the prepared case, and of the device."""

    def __init__(self, device: str) -> None:
        self._torch = sys.modules.get("torch") if device == "cuda" else None
        self._peak, self._device_peak = peak_rss(), 0
        self._highest = 0
        self._resident = self.start()

    def start(self) -> int:
        """Reset the peaks where the system can; returns what is resident now, 0 where it cannot."""
        if self._torch is not None:
            self._torch.cuda.reset_peak_memory_stats()
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return 0
        return resident_memory()

    def note(self) -> None:
        """Count the peaks since `start`."""
        self._highest = max(self._highest, peak_rss())
        self._peak = max(self._peak, self._highest)
        if self._torch is not None:
            self._device_peak = max(self._device_peak, self._torch.cuda.max_memory_allocated())

    def row(self) -> dict[str, float]:
        """The peaks noted, in MiB."""
        peaks = {"peak_mib": round(self._peak / MIB, 1)}
        if self._resident:
            peaks["extra_mib"] = round(max(0, self._highest - self._resident) / MIB, 1)
        if self._torch is not None:
            peaks["device_peak_mib"] = round(self._device_peak / MIB, 1)
        return peaks


def _end_first() -> None:
    with contextlib.suppress(OSError):  # other systems have no such file, and decide by themselves
        Path("/proc/self/oom_score_adj").write_text("1000")


def main() -> None:
    """Run the case that the command line holds and print its row."""
    _end_first()
    task = msgspec.json.decode(sys.argv[1], type=Task)
    row = measure(task.case, task.assets, timed=task.timed)
    sys.stdout.flush()
    print(json.dumps(row))


if __name__ == "__main__":
    main()
