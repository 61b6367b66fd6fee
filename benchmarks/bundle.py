"""How fast a model bundle runs here, behind `flashcocos bench`: a row for each backend, precision and size.

Each case runs in a process of its own on the inputs of translation.py and is compared with ONNX Runtime in float32
before it is timed. Rows are JSON lines, each with where and with what it was measured; a file that an earlier run began
is gone on with, and refused where bundle, machine, versions or options are others.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import Bundle
from ..errors import BackendError, InputError
from ..progress import Progress
from ..runtime.engine import BACKENDS
from ..runtime.translator import resolve_size
from .harness import peak_rss, provenance, run_isolated
from .translation import inputs, psnr

MIN_PSNR = {"float32": 50.0, "bfloat16": 30.0}  # dB between the pictures of a case and of ONNX Runtime in float32
QUANTILES = {"p5": 0.05, "median": 0.5, "p95": 0.95, "p99": 0.99}
STAGES = ("query", "warp", "synthesis")
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table."""

    backend: str
    precision: str
    size: int


def bench(
    bundle: str | os.PathLike[str],
    *,
    sizes: Sequence[int] = (),
    backends: Sequence[str] = (),
    repeats: int = 5,
    threads: int | None = None,
    output: str | os.PathLike[str] | None = None,
) -> list[Row]:
    """Measure `bundle`; the rows, with those that the JSON lines `output` holds; each is appended there as it is done.

    sizes: sides in pixels (the model's own). backends: those of `Translator` (all that are installed).
    Raises `InputError` for a bad option or where `output` was measured otherwise, `BackendError` where a case fails.
    """
    opened = Bundle(bundle)
    if repeats < 1:
        raise InputError(f"repeats: expected at least 1, got {repeats}")
    hashes = {name: spec.sha256 for name, spec in sorted(opened.manifest.files.items())}
    setup = {"model": hashes, "repeats": repeats, "threads": threads, **provenance()}
    rows = _read(output, setup) if output else []
    known = [{key: row[key] for key in ("backend", "precision", "size")} for row in rows]
    config = opened.manifest.config
    asked = cases([resolve_size(config, size, ())[0] for size in sizes] or [config.image_size], backends)
    todo = [case for case in asked if dataclasses.asdict(case) not in known]
    with tempfile.TemporaryDirectory() as folder, Progress("bench", len(asked), start=len(asked) - len(todo)) as bar:
        for case in todo:
            reference = Path(folder) / f"{case.size}.npy"
            if not reference.exists():
                _isolated(opened.path, Case("onnxruntime", "float32", case.size), reference, 0, threads)
            rows.append({**_isolated(opened.path, case, reference, repeats, threads), "setup": setup})
            if output:
                with Path(output).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
            bar.advance()
    return rows


def cases(sizes: Sequence[int], backends: Sequence[str] = ()) -> list[Case]:
    """What is measured: every backend (those installed) in every precision that it has on this CPU, at every size."""
    for backend in backends:
        if backend not in BACKENDS:
            raise InputError(f"unknown backend {backend!r}; expected some of {', '.join(BACKENDS)}")
    found = []
    for backend in backends or [name for name in BACKENDS if importlib.util.find_spec(name)]:
        precisions: tuple[str, ...] = ("float32",)
        if backend == "openvino":
            from ..runtime.openvino_engine import cpu_precisions

            precisions = cpu_precisions()
        found += [(backend, precision) for precision in precisions]
    return [Case(*one, size) for size in sizes for one in found]


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown: medians in milliseconds, the stages' of a translation with the exemplar encoded before."""
    columns = ["backend", "precision", "size", "load", "exemplar", "translation", "p5 to p95", *STAGES]
    lines = [[*columns, "peak MiB", "agreement"], ["---"] * (len(columns) + 2)]
    for row in rows:
        start = [row["backend"], row["precision"], str(row["size"])]
        if not row["timed"]:
            lines.append([*start, *["-"] * (len(columns) - 2), f"{row['psnr_db']:.1f} dB: too far off, not timed"])
            continue
        spread = f"{row['ms']['p5']:.0f} to {row['ms']['p95']:.0f}"
        times = [row["load_ms"], row["exemplar_ms"], row["ms"]["median"]]
        lines.append([*start, *(f"{value:.0f}" for value in times), spread])
        lines[-1] += [f"{row['stages_ms'][stage]:.0f}" for stage in STAGES]
        lines[-1] += [f"{row['peak_mib']:.0f}", f"{row['psnr_db']:.1f} dB"]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measure(path: str, case: Case, reference: Path, repeats: int, threads: int | None) -> Row:
    """Time one case in this process; with 0 repeats its picture becomes the `reference` instead."""
    from ..runtime import Translator

    start = time.perf_counter()
    translator = Translator(path, backend=case.backend, precision=case.precision, device="cpu", threads=threads)
    load = time.perf_counter() - start
    label, image, image_label = inputs(translator.config, case.size)
    chosen = image_label if translator.config.mask_mixing else None
    exemplar = translator.encode_exemplar(image, chosen, case.size)
    picture = translator.translate(label, exemplar, case.size).image  # the first of each is the warm-up
    if not repeats:
        np.save(reference, picture)
        return {}
    quality = psnr(picture, np.load(reference))
    row = {**dataclasses.asdict(case), "psnr_db": quality, "timed": bool(quality >= MIN_PSNR[case.precision])}
    if not row["timed"]:
        return row
    start = time.perf_counter()
    translator.encode_exemplar(image, chosen, case.size)
    encode = time.perf_counter() - start
    times, stages = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        timings = translator.translate(label, exemplar, case.size).timings
        times.append((time.perf_counter() - start) * 1e3)
        stages.append([timings[stage] for stage in STAGES])
    return {
        **row,
        "load_ms": load * 1e3,
        "exemplar_ms": encode * 1e3,
        "ms": {name: float(np.quantile(times, share)) for name, share in QUANTILES.items()},
        "stages_ms": dict(zip(STAGES, np.median(stages, axis=0).tolist(), strict=True)),
        "peak_mib": peak_rss() / 2**20,
    }


def _isolated(path: Path, case: Case, reference: Path, repeats: int, threads: int | None) -> Row:
    task = {"path": str(path), "case": dataclasses.asdict(case), "reference": str(reference)}
    try:
        return run_isolated(__spec__.name, [json.dumps({**task, "repeats": repeats, "threads": threads})])
    except RuntimeError as error:  # its last line is the error, the others are the traceback
        reason = str(error).splitlines()[-1]
        raise BackendError(f"{case.backend}, {case.precision}, {case.size} px: {reason}") from error


def _read(path: str | os.PathLike[str], setup: dict[str, Any]) -> list[Row]:
    """The rows of an earlier run with the same `setup`; none where there is no file."""
    try:
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        others = [row["setup"] for row in rows if row["setup"] != setup]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a file that flashcocos bench wrote ({error}); choose another output") from error
    if others:
        keys = [key for key in setup if others[0].get(key) != setup[key]]
        raise InputError(f"{path} was measured with other {', '.join(keys)}; choose another output or remove it")
    return rows


def _main() -> None:
    parser = argparse.ArgumentParser(description="One case, for `bench`.")
    parser.add_argument("task", type=json.loads)
    task = parser.parse_args().task
    reference = Path(task["reference"])
    print(json.dumps(measure(task["path"], Case(**task["case"]), reference, task["repeats"], task["threads"])))


if __name__ == "__main__":
    _main()
