"""Run cases, each in a fresh process, and write their rows as JSON lines, one file a group.

A run continues a file that an earlier run began, and does not measure its rows again, except those of cases that failed
or ran out of time: of two rows of a case the later one counts. It refuses the file where revision, versions, machine,
threads, model or a case's parameters differ. A case that runs out of memory gets a row that says so.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from tqdm import tqdm

from ..bundle import Bundle
from ..errors import InputError
from ..files import file_hash
from .provenance import CHANGED, conditions, free_memory, provenance
from .registry import Assets, Case, Task

Row = dict[str, Any]
GIB = 2**30
NO_TIME = "no time left"  # why a case was skipped that the next run tries
_OUT_OF_MEMORY = re.compile(r"out ?of ?memory|bad_alloc|MemoryError|alloc\w* .*memory|memory.* alloc", re.IGNORECASE)
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
TESTS = Path(__file__).parents[1] / "tests"
_ASSETS = {"model": "a model file", "naive": "a naive single graph", "bundle": "a bundle"}


def run_cases(
    cases: Sequence[Case],
    assets: Assets,
    output: str | os.PathLike[str] | None,
    *,
    known: Sequence[Case] = (),
    command: str = "",
    fresh: bool = False,
    seconds: float = math.inf,
) -> list[Row]:
    """Run `cases` and write their rows to `output`.

    Args:
        cases: What to run.
        assets: What they run on.
        output: A folder for a file of each group, or a file ending in ".jsonl", or None.
        known: Further cases, which those of `cases` may be compared with.
        command: Written in every row.
        fresh: Begin the files anew.
        seconds: From now on, after which a case that runs is ended and the others are skipped.

    Returns:
        The rows in the order of `cases`.

    Raises:
        InputError: An asset is missing, or a file was measured under other conditions.
    """
    end = time.monotonic() + seconds
    _check_assets(cases, assets)
    environment = {name: os.environ[name] for name in _THREADS if name in os.environ}
    setup = {**provenance(), "threads": assets.threads or environment or None, "device": assets.device}
    models = _hashes(assets, {name for case in cases for name in _used(case)})
    files = {case.group: _file(output, case.group) for case in cases}
    done: dict[str, Row] = {}
    for path in {path for path in files.values() if path is not None}:
        if fresh:
            path.unlink(missing_ok=True)
        done |= {row["case"]: row for row in read_rows(path, setup) if not _unfinished(row)}
    references = References({case.name: case for case in (*known, *cases)}, assets)
    rows = []
    with tqdm(desc="bench", total=len(cases), unit="case", disable=None) as bar:
        for case in cases:
            wanted = {"parameters": json.loads(json.dumps(case.parameters)), "repeats": case.repeats}
            wanted["model"] = {name: models[name] for name in _used(case)}
            row = done.get(case.name)
            if row is not None:
                if keys := [key for key in wanted if row.get(key) != wanted[key]]:
                    raise _refused(files[case.group], [f"{key} of {case.name}" for key in keys])
            else:
                now = conditions()
                row = {"case": case.name, "measures": case.measures, **wanted, **_run(case, assets, references, end)}
                row |= {"conditions": now, "setup": setup, "command": command}
                _append(files[case.group], row)
                bar.write(describe(row), file=sys.stderr)
            rows.append(row)
            bar.update()
    return rows


def open_assets(
    folder: str | os.PathLike[str] | None, bundles: Mapping[str, str], *, threads: int | None = None
) -> Assets:
    """What is in `folder`, which `python -m flashcocos.benchmarks model` filled, and further `bundles` by name.

    folder: None for the default model alone. Raises `InputError` where there is no model in it.
    """
    from ..bundle.default_model import resolve_model

    bundles = {"default": str(resolve_model()), **bundles}
    if folder is None:
        return Assets(bundles=bundles, threads=threads)
    from ..train.checkpoint import read_metadata

    folder = Path(folder)
    file, bundle, naive = folder / "model.safetensors", folder / "bundle", folder / "naive.onnx"
    if not file.exists():
        raise InputError(f"no {file}; `python -m flashcocos.benchmarks model -o {folder}` fills the folder")
    # references are of these weights and of this code
    revision = provenance()["revision"]
    pictures = folder / "references" / f"{file_hash(file)[:12]}-{revision}"
    if revision.endswith(CHANGED):
        shutil.rmtree(pictures, ignore_errors=True)
    return Assets(
        model=str(file),
        config=read_metadata(file)[0].to_json(),
        naive=str(naive) if naive.exists() else "",
        bundles={**({"model": str(bundle)} if bundle.exists() else {}), **bundles},
        references=str(pictures),
        threads=threads,
    )


def read_rows(path: Path, setup: Mapping[str, Any] | None = None) -> list[Row]:
    """The last row of each case of a results file, none where there is no file.

    Raises `InputError` for another file, and for rows of another `setup`.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        others = [row["setup"] for row in rows if setup is not None and row["setup"] != setup]
        if any(not isinstance(row["case"], str) or not isinstance(row["status"], str) for row in rows):
            raise ValueError("a row without case and status")
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a file of benchmark results ({error}); choose another output") from error
    if setup is not None and others:
        keys = [key for key in (*setup, *others[0]) if others[0].get(key) != setup.get(key)]
        raise _refused(path, dict.fromkeys(keys))
    return list({row["case"]: row for row in rows}.values())


def isolated(case: Case, assets: Assets, *, timed: bool = True) -> Row:
    """The row of `case` from a process of its own; one that ends without a row gets a status and a reason."""
    task = msgspec.json.encode(Task(case, assets, timed)).decode()
    environment = dict(os.environ)
    if assets.threads is not None:
        environment |= dict.fromkeys(_THREADS, str(assets.threads))
    command = [sys.executable, "-m", f"{__package__}.worker", task]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=case.limit, env=environment)
    except subprocess.TimeoutExpired:
        return {"status": "timeout", "reason": f"not done after {case.limit:.0f} s"}
    if done.returncode == 0:
        row: Row = json.loads(done.stdout.strip().splitlines()[-1])
        return row
    reason = (done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"])[-1]
    for path in (assets.model, assets.naive, *assets.bundles.values()):
        reason = reason.replace(path, Path(path).name) if path else reason  # folders of this machine mean nothing
    reason = reason[:300]
    if done.returncode == -9:
        return {"status": "out of memory", "reason": "ended by the system (SIGKILL), as it does where memory runs out"}
    return {"status": "out of memory" if _OUT_OF_MEMORY.search(reason) else "failed", "reason": reason}


class References:
    """The pictures that cases are compared with; each is made at its first use."""

    def __init__(self, known: Mapping[str, Case], assets: Assets) -> None:
        self._known, self._assets = known, assets
        self._failed: dict[str, str] = {}

    def missing(self, name: str) -> str:
        """Why there is no picture of the case `name`; empty where there is one."""
        if (Path(self._assets.references) / f"{name}.npy").exists():
            return ""
        if name not in self._failed:
            row = isolated(self._known[name], self._assets, timed=False)
            made = row["status"] == "checked"
            self._failed[name] = "" if made else f"nothing to compare with: {name}: {row['status']}: {row['reason']}"
        return self._failed[name]


def describe(row: Row) -> str:
    """One line for the terminal."""
    start = f"{row['case']:40} "
    if row["status"] == "timed":
        quality = "  ".join(f"{name} {value:.4g}" for name, value in row["quality"].items())
        return f"{start}{row['ms']['median']:10.1f} ms  peak {row['peak_mib']:6.0f} MiB  {quality}"
    return f"{start}{row['status']}: {row.get('reason') or row.get('quality') or row.get('facts')}"


def _run(case: Case, assets: Assets, references: References, end: float) -> Row:
    """The row of `case`, which is to be there at the time `end`."""
    if lacking := list(filter(None, (_lacks(need, assets) for need in case.requires))):
        return {"status": "skipped", "reason": "; ".join(lacking)}
    free = free_memory(assets.device) if case.memory else None
    if free is not None and case.memory > free:
        reason = f"not started: its matrices take {case.memory / GIB:.1f} GiB, {free / GIB:.1f} GiB are free"
        return {"status": "out of memory", "reason": reason, "needed_mib": round(case.memory / 2**20)}
    no_time = {"status": "skipped", "reason": NO_TIME}
    if time.monotonic() >= end:
        return no_time
    if case.reference and (reason := references.missing(case.reference)):
        return {"status": "skipped", "reason": reason}
    left = end - time.monotonic()
    row = isolated(dataclasses.replace(case, limit=min(case.limit, left)), assets) if left > 0 else no_time
    return no_time if row["status"] == "timeout" and left < case.limit else row


def _unfinished(row: Row) -> bool:
    """Whether the next run is to try again."""
    return row["status"] == "failed" or row.get("reason") == NO_TIME or row.get("facts", {}).get("finished") is False


def _lacks(need: str, assets: Assets) -> str:
    """Why this machine has not what a case requires; empty where it has it."""
    compilers = map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))
    checks: dict[str, tuple[Callable[[], Any], str]] = {
        "cuda": (lambda: assets.device == "cuda", "for an NVIDIA GPU"),
        "bfloat16": (_has_bfloat16, "this CPU has neither AVX-512 BF16 nor AMX"),
        "c++": (lambda: any(compilers), "torch.compile finds no C++ compiler"),
        "onnxruntime-gpu": (_has_cuda_provider, "the package onnxruntime-gpu is not installed"),
        "compute-sanitizer": (lambda: shutil.which(need), "there is no compute-sanitizer on the PATH"),
        "tests": (TESTS.is_dir, "the tests are in a checkout alone"),
        **dict.fromkeys(_ASSETS, (lambda: True, "")),
    }
    has, reason = checks.get(need, (lambda: importlib.util.find_spec(need), f"the package {need} is not installed"))
    return "" if has() else reason


def _has_bfloat16() -> bool:
    path = Path("/proc/cpuinfo")
    return path.is_file() and not {"avx512_bf16", "amx_bf16"}.isdisjoint(path.read_text().split())


def _has_cuda_provider() -> bool:
    from ..runtime.cpu.onnxruntime import has_provider

    return importlib.util.find_spec("onnxruntime") is not None and has_provider("cuda")


def _append(path: Path | None, row: Row) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _file(output: str | os.PathLike[str] | None, group: str) -> Path | None:
    if output is None:
        return None
    path = Path(output)
    return path if path.suffix == ".jsonl" else path / f"{group}.jsonl"


def _refused(path: Path | None, keys: Iterable[str]) -> InputError:
    return InputError(
        f"{path} was measured with other {', '.join(keys)}; choose another output, or replace it with --fresh"
    )


def _used(case: Case) -> list[str]:
    """Names in `_hashes` of the files that the case runs."""
    names = [need for need in case.requires if need in ("model", "naive")]
    return names + ([f"bundle {case.parameters.get('bundle', 'model')}"] if "bundle" in case.requires else [])


def _check_assets(cases: Sequence[Case], assets: Assets) -> None:
    for case in cases:
        for need in case.requires:
            bundle = case.parameters.get("bundle", "model")
            path = assets.bundles.get(bundle) if need == "bundle" else getattr(assets, need, "")
            if need in _ASSETS and not path:
                raise InputError(
                    f"{case.name} needs {_ASSETS[need]}: give --model FOLDER, which "
                    "`python -m flashcocos.benchmarks model -o FOLDER` fills"
                )


def _hashes(assets: Assets, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of the files that `_used` names; of a bundle, of its manifest, which has those of its files."""
    hashes = {}
    for name in names:
        if name.startswith("bundle "):
            manifest = Bundle(assets.bundles[name.removeprefix("bundle ")]).manifest
            hashes[name] = hashlib.sha256(manifest.to_json().encode()).hexdigest()
        else:
            hashes[name] = file_hash(getattr(assets, name))
    return hashes
