"""Where and with what a number was measured; memory and percentiles."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..errors import import_extra

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("numpy", "numba", "onnxruntime", "onnxruntime-gpu", "openvino", "torch", "triton")
CHANGED = "+changes"  # ends the revision of a checkout that is not as it was committed
QUANTILES = {"p5": 0.05, "median": 0.5, "p95": 0.95, "p99": 0.99}


def provenance() -> dict[str, Any]:
    """Where and with what a number was measured: git revision, versions, processor, cores, and the GPU if any."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found = {
        "revision": _revision(),
        "python": platform.python_version(),
        "versions": versions,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(_psutil().virtual_memory().total / 2**30, 1),
    }
    gpu = _nvidia_smi("name", "driver_version", "power.limit", "clocks.max.sm")
    return {**found, "gpu": gpu} if gpu else found


def conditions() -> dict[str, Any]:
    """What changes from one case to the next: time, load, and the clocks of CPU and GPU where they can be read."""
    found: dict[str, Any] = {"time": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    if hasattr(os, "getloadavg"):
        found["load_average"] = round(os.getloadavg()[0], 2)
    psutil = _psutil()
    # some systems have no such function, others no value
    if hasattr(psutil, "cpu_freq") and (clocks := psutil.cpu_freq(percpu=True)):
        found["cpu_mhz"] = round(max(clock.current for clock in clocks))
    if gpu := _nvidia_smi("clocks.sm", "clocks.mem", "temperature.gpu"):
        found["gpu_clocks"] = gpu
    return found


def peak_rss() -> int:
    """Largest resident memory of this process so far, in bytes."""
    # psutil has no peak, and getrusage counts what the parent had at the fork
    if peak := re.search(r"^VmHWM:\s+(\d+) kB", _text("/proc/self/status"), re.MULTILINE):
        return int(peak[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_memory() -> int:
    """Resident memory of this process, in bytes."""
    return int(_psutil().Process().memory_info().rss)


def free_memory(device: str = "cpu") -> int | None:
    """Free memory of `device`, "cpu" or "cuda", in bytes; None where nvidia-smi does not report it."""
    if device == "cuda":
        free = re.match(r"(\d+) MiB", _nvidia_smi("memory.free"))
        return int(free[1]) * 2**20 if free else None
    return int(_psutil().virtual_memory().available)


def percentiles(milliseconds: Sequence[float]) -> dict[str, float]:
    """p5, median, p95 and p99; of few runs they lie between the runs' own times."""
    return {name: round(float(np.quantile(milliseconds, share)), 3) for name, share in QUANTILES.items()}


def _revision() -> str:
    """The commit of this checkout, marked where it was changed; of an installation, its version."""
    root = Path(__file__).resolve().parents[1]
    if _git("rev-parse", "--show-toplevel") != str(root):  # nothing, or the repository of whatever it is installed in
        return __version__
    # what a run and its report write is no change of what is measured
    written = [f":(exclude,top){path}" for path in ("benchmarks/results", "docs", "README.md")]
    changes = _git("status", "--porcelain", "--", "..", *written)
    return _git("rev-parse", "--short=12", "HEAD") + (CHANGED if changes else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _nvidia_smi(*fields: str) -> str:
    """Fields of the first GPU, separated by commas; nothing without one."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _processor() -> str:
    names = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", _text("/proc/cpuinfo"), re.MULTILINE))
    if not names:
        return platform.processor()
    name, family, model = names.get("model name", platform.machine()), names.get("cpu family"), names.get("model")
    flags = names.get("flags", "").split()
    vector = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{name} (family {family}, model {model}) {' '.join(vector)}"


def _psutil() -> Any:
    return import_extra("psutil", "the package psutil is missing", "cpu")


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
