"""The warp on the CPU against the bare product of its features: time as a ratio, extra peak memory, error.

    python -m flashcocos.benchmarks.corr_warp                 # the bars: C 256, patch 3, V 3, 64 x 64 and 128 x 128
    python -m flashcocos.benchmarks.corr_warp --sizes 64 --values 3 48 151 --backends numba numpy

Each case runs in a process of its own. The bare product is theta^T phi in float32, by numpy in blocks of 2048 queries
into one buffer, and measured turn by turn with the warp, so that a busy machine slows both; the ratio is that of the
fastest of each. "fresh" is the same product with a new array for each block. Inputs "noise" have no match, so that no
key can be left out; in "shifted" phi is theta moved by (5, 5) plus noise. The error is that of 16 queries against the
softmax in float64; a warp that is wrong is not timed.

    size  V   backend  inputs   warp ms   product ms  ratio (fresh)  extra MiB  error
     64    3  numba    noise       61.3         45.9   1.34 (1.24)        9.9   2.1e-06
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..kernels import corr_row, corr_warp
from .harness import run_isolated, write_results

CHANNELS, BLOCK = 256, 2048
MAX_ERROR = 1e-4
PAUSE = (
    0.08  # seconds before each run: the threads of BLAS spin for a while after a product, on the cores the next needs
)


def inputs(size: int, values: int, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """theta, phi and values (1, X, size, size) float32, from a fixed seed."""
    rng = np.random.default_rng(0)
    theta, phi = (0.3 * rng.standard_normal((2, 1, CHANNELS, size, size)) + 0.1).astype(np.float32)
    if kind == "shifted":
        phi[:, :, 5:, 5:] += theta[:, :, :-5, :-5]
    return theta, phi, rng.random((1, values, size, size), dtype=np.float32)


def error(theta: np.ndarray, phi: np.ndarray, values: np.ndarray, out: np.ndarray) -> float:
    """Largest difference of 16 queries of `out` from the float64 softmax."""
    size, worst = theta.shape[2], 0.0
    wide_theta, wide_phi = theta.astype(np.float64), phi.astype(np.float64)
    for y, x in np.random.default_rng(1).integers(0, size, (16, 2)):
        weights = corr_row(wide_theta, wide_phi, (int(y), int(x)))
        worst = max(worst, float(np.abs(np.einsum("bvhw,bhw->bv", values, weights) - out[:, :, y, x]).max()))
    return worst


def memory(field: str) -> float:
    """A field of /proc/self/status, MiB; VmHWM is the peak, VmRSS what is resident."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else float("nan")


def milliseconds(seconds: list[float]) -> dict[str, float]:
    """Smallest, 20th, 50th and 80th percentile."""
    quantiles = np.quantile(seconds, [0, 0.2, 0.5, 0.8]) * 1e3
    return dict(zip(("min", "p20", "median", "p80"), quantiles.round(2).tolist(), strict=True))


def measure(size: int, values: int, backend: str, kind: str, repeats: int) -> dict[str, Any]:
    """One case, in this process."""
    small = inputs(16, values, kind)
    corr_warp(*small, backend=backend)  # compiles
    arrays = inputs(size, values, kind)
    resident = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    out = corr_warp(*arrays, backend=backend)
    extra = memory("VmHWM") - resident - out.nbytes / 2**20
    worst = error(*arrays, out)
    if not worst < MAX_ERROR:
        raise RuntimeError(f"{backend} at {size}: error {worst:.1e}, allowed {MAX_ERROR:.0e}; not timed")
    rows = np.ascontiguousarray(arrays[0].reshape(CHANNELS, -1).T)
    columns, buffer = arrays[1].reshape(CHANNELS, -1), np.empty((BLOCK, size * size), np.float32)
    blocks = [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]

    def product() -> None:
        for block in blocks:
            np.matmul(block, columns, out=buffer[: len(block)])

    def fresh() -> None:
        for block in blocks:
            block @ columns

    runs: dict[str, Callable[[], Any]] = {
        "warp": lambda: corr_warp(*arrays, backend=backend),
        "product": product,
        "fresh": fresh,
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            run()
            if turn:  # the first warms up
                times[name].append(time.perf_counter() - start)
    fastest = {name: min(seconds) for name, seconds in times.items()}
    return {
        "size": size,
        "channels": CHANNELS,
        "values": values,
        "patch": 3,
        "backend": backend,
        "inputs": kind,
        "repeats": repeats,
        "threads": os.environ.get("NUMBA_NUM_THREADS", "all"),
        "milliseconds": {name: milliseconds(seconds) for name, seconds in times.items()},
        "ratio": round(fastest["warp"] / fastest["product"], 3),
        "ratio_fresh": round(fastest["warp"] / fastest["fresh"], 3),
        "product_gflops": round(2 * size**4 * CHANNELS / fastest["product"] / 1e9, 1),
        "extra_mib": round(extra, 1),
        "max_error": worst,
        "load_average": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    """Run the cases that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--values", type=int, nargs="+", default=[3])
    parser.add_argument("--backends", nargs="+", default=["numba", "numpy"], choices=["numba", "numpy"])
    parser.add_argument("--inputs", nargs="+", default=["noise", "shifted"], choices=["noise", "shifted"])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, help="threads of both numba and BLAS; default: one a core")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(**json.loads(options.case))))
        return
    if options.threads:  # the cases inherit it
        os.environ |= dict.fromkeys(("NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(options.threads))
    rows = []
    print("size  V   backend  inputs   warp ms   product ms  ratio (fresh)  extra MiB  error")
    for size in options.sizes:
        for values in options.values:
            for backend in options.backends:
                for kind in options.inputs:
                    case = {"size": size, "values": values, "backend": backend, "kind": kind}
                    case["repeats"] = options.repeats
                    row = run_isolated(__spec__.name, ["--case", json.dumps(case)])
                    rows.append(row)
                    times = row["milliseconds"]
                    print(
                        f"{size:4} {values:4}  {backend:8} {kind:8} {times['warp']['min']:8.1f} "
                        f"{times['product']['min']:12.1f} {row['ratio']:6.2f} ({row['ratio_fresh']:.2f}) "
                        f"{row['extra_mib']:10.1f}   {row['max_error']:.1e}",
                        flush=True,
                    )
    print(write_results("corr_warp", " ".join(["python -m", __spec__.name, *sys.argv[1:]]), rows))


if __name__ == "__main__":
    main()
