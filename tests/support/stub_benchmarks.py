"""Benchmarks for tests of the benchmarks' runner. They run in processes of their own, so nothing heavy is imported."""

from __future__ import annotations

import os
import signal
import time

from flashcocos.benchmarks.registry import Assets, Benchmark, Case, Sample


def counted(case: Case, assets: Assets) -> Benchmark:
    """Its result is the parameter `value`; every run adds a line to the file that the parameter `log` names."""

    def run() -> Sample:
        with open(case.parameters["log"], "a", encoding="utf-8") as file:
            file.write(f"{case.name}\n")
        return Sample(case.parameters["value"], {"all": 1.0})

    return Benchmark(run, lambda value: {"value": value}, lambda value: {"scored": 1.0}, lambda: None, {"fact": 1})


def greedy(case: Case, assets: Assets) -> Benchmark:
    """Takes 64 MiB for a run; 256 for the check, and for a baseline where the parameter of that name wants one."""

    def run() -> Sample:
        return Sample(bytes(bytearray(b"x" * (64 << 20)))[:1])

    def more() -> dict[str, float]:
        return {"length": len(bytearray(b"x" * (256 << 20))) * 1.0}

    return Benchmark(run, lambda result: more(), baseline=more if case.parameters["baseline"] else None)


def facts(case: Case, assets: Assets) -> Benchmark:
    """Nothing to run."""
    return Benchmark(None, facts={"answer": 42})


def part(case: Case, assets: Assets) -> Benchmark:
    """Says whether it is finished, as the parameter of that name does, and notes in `log` that it was started."""
    with open(case.parameters["log"], "a", encoding="utf-8") as file:
        file.write("started\n")
    return Benchmark(None, facts={"finished": case.parameters["finished"]})


def killed(case: Case, assets: Assets) -> Benchmark:
    """Ends as a process ends that the system's memory does not suffice for."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def hungry(case: Case, assets: Assets) -> Benchmark:
    """Asks for more memory than there is."""
    raise MemoryError("Unable to allocate 16.0 GiB")


def slow(case: Case, assets: Assets) -> Benchmark:
    """Takes longer than any limit."""
    time.sleep(60)
    raise AssertionError


def broken(case: Case, assets: Assets) -> Benchmark:
    """Fails for a reason of its own."""
    raise ValueError(f"no such thing in {assets.model}")
