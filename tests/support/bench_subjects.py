"""Subjects for tests of the benchmarks' runner. They run in processes of their own, so nothing heavy is imported."""

from __future__ import annotations

import os
import signal
import time

from flashcocos.benchmarks.registry import Case, Material, Outcome, Subject


def counted(case: Case, material: Material) -> Subject:
    """Its result is the parameter `value`; every run adds a line to the file that the parameter `log` names."""

    def run() -> Outcome:
        with open(case.parameters["log"], "a", encoding="utf-8") as file:
            file.write(f"{case.name}\n")
        return Outcome(case.parameters["value"], {"all": 1.0})

    return Subject(run, lambda value: {"value": value}, lambda value: {"scored": 1.0}, lambda: None, {"fact": 1})


def greedy(case: Case, material: Material) -> Subject:
    """Takes 64 MiB for a run; 256 for the check, and for a yardstick where the parameter of that name wants one."""

    def run() -> Outcome:
        return Outcome(bytes(bytearray(b"x" * (64 << 20)))[:1])

    def more() -> dict[str, float]:
        return {"length": len(bytearray(b"x" * (256 << 20))) * 1.0}

    return Subject(run, lambda result: more(), yardstick=more if case.parameters["yardstick"] else None)


def facts(case: Case, material: Material) -> Subject:
    """Nothing to run."""
    return Subject(None, facts={"answer": 42})


def killed(case: Case, material: Material) -> Subject:
    """Ends as a process ends that the system's memory does not suffice for."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def hungry(case: Case, material: Material) -> Subject:
    """Asks for more memory than there is."""
    raise MemoryError("Unable to allocate 16.0 GiB")


def slow(case: Case, material: Material) -> Subject:
    """Takes longer than any limit."""
    time.sleep(60)
    raise AssertionError


def broken(case: Case, material: Material) -> Subject:
    """Fails for a reason of its own."""
    raise ValueError(f"no such thing in {material.model}")
