"""The machine's own rates, the time to a first picture, and the size of an installation."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ...errors import BackendError
from ..provenance import peak_rss
from ..registry import Assets, Benchmark, Case, Sample, Task

COPY_BYTES = 256 * 2**20
TRIALS = 5
MIB = 2**20


def roofline(case: Case, assets: Assets) -> Benchmark:
    """Facts: copy_gb_s (bytes read and written) and gflop_s of square products by dtype, the best of `TRIALS`.

    parameters: side of the product. On a GPU the rates are torch's, in all dtypes, TF32 apart.
    """
    side = case.parameters["side"]
    if assets.device == "cuda":
        return Benchmark(None, facts=_gpu_rates(side))
    source = np.ones(COPY_BYTES // 8)
    target = np.empty_like(source)
    left, right, product = np.random.default_rng(0).random((3, side, side), dtype=np.float32)
    rates = {
        "copy_gb_s": 2 * COPY_BYTES / _fastest(lambda: np.copyto(target, source)) / 1e9,
        "float32_gflop_s": 2 * side**3 / _fastest(lambda: np.matmul(left, right, out=product)) / 1e9,
    }
    return Benchmark(None, facts={name: round(rate, 1) for name, rate in rates.items()})


def startup(case: Case, assets: Assets) -> Benchmark:
    """A fresh process, from its start to its first picture; parts: until Python runs, is ready, and has the picture.

    parameters: those of `translation`, one of whose methods the process runs.
    """
    task = msgspec.json.encode(Task(case, assets)).decode()
    command = [sys.executable, "-m", __spec__.name, task]
    facts: dict[str, float] = {}

    def run() -> Sample:
        start = time.monotonic()  # one clock for all processes of a machine
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BackendError(done.stderr.strip().splitlines()[-1])
        marks = json.loads(done.stdout.strip().splitlines()[-1])
        facts["peak_mib"] = round(marks["peak"] / MIB, 1)
        parts = {name: round(1e3 * (marks[name] - start), 1) for name in ("python", "ready", "picture")}
        return Sample(marks["mean"], parts)

    return Benchmark(run, lambda mean: {"mean": mean}, facts=facts)


def install_size(case: Case, assets: Assets) -> Benchmark:
    """Facts: MiB of the distributions that pip installs for an extra of flashcocos, itself left out, and the largest.

    parameters: extra. Raises `BackendError` where a distribution is not installed.
    """
    sizes = {name: _bytes_of(name) for name in requirements("flashcocos", (case.parameters["extra"],))}
    largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:4]
    facts = {"mib": round(sum(sizes.values()) / MIB, 1), "packages": len(sizes)}
    return Benchmark(None, facts=facts | {"largest": {name: round(sizes[name] / MIB, 1) for name in largest}})


def requirements(distribution: str, extras: Iterable[str]) -> list[str]:
    """Names of all distributions that `distribution` with `extras` needs on this machine, sorted, without itself."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    names: set[str] = set()
    todo, done = [(distribution, extra) for extra in ("", *extras)], set()
    while todo:
        name, extra = todo.pop()
        done.add((name, extra))
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError as error:
            raise BackendError(f"{name} is not installed; pip install 'flashcocos[{','.join(extras)}]'") from error
        names.add(name)
        for requirement in map(Requirement, lines):
            # without an extra only what needs none, with one only what needs it
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
                continue
            wanted = canonicalize_name(requirement.name)
            todo += [pair for part in ("", *requirement.extras) if (pair := (wanted, part)) not in done]
    return sorted(names - {distribution})


def _bytes_of(name: str) -> int:
    files = [Path(str(file.locate())) for file in metadata.files(name) or []]
    return sum(file.stat().st_size for file in files if file.is_file())


def _fastest(run: Callable[[], Any]) -> float:
    times = []
    for _ in range(TRIALS + 1):  # the first warms up
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _gpu_rates(side: int) -> dict[str, float]:
    import torch

    def rate(run: Callable[[], Any], work: float) -> float:
        def whole() -> None:
            for _ in range(10):
                run()
            torch.cuda.synchronize()

        return round(10 * work / _fastest(whole) / 1e9, 1)

    source = torch.ones(4 * COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    rates = {"copy_gb_s": rate(lambda: target.copy_(source), 8 * COPY_BYTES)}
    for name in ("float32", "tf32", "float16", "bfloat16"):
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        square = torch.rand(side, side, device="cuda", dtype=getattr(torch, name.replace("tf32", "float32")))
        rates[f"{name}_gflop_s"] = rate(functools.partial(torch.matmul, square, square), 2.0 * side**3)
    return rates


def _first_picture() -> None:
    """The process of `startup`: prints the times when Python ran, the case was ready, and the picture was there."""
    marks = {"python": time.monotonic()}
    from .translation import prepare

    task = msgspec.json.decode(sys.argv[1], type=Task)
    run = prepare(task.case, task.assets).run
    assert run is not None  # a translation always runs
    marks["ready"] = time.monotonic()
    picture = run().result
    marks["picture"] = time.monotonic()
    print(json.dumps({**marks, "mean": float(picture.mean()), "peak": peak_rss()}))


if __name__ == "__main__":
    _first_picture()
