"""How fast a model bundle runs on this machine, behind `flashcocos bench`: cases of `translation` for one bundle.

Every backend and precision that is installed is compared with ONNX Runtime in float32 before it is timed.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from ...bundle import Bundle
from ...errors import InputError
from ...runtime.translator import resolve_size
from ..registry import Case, Gate, Assets
from ..runner import Row, run_cases
from ..tables import table as markdown
from ..tables import unmeasured

BACKENDS = ("onnxruntime", "openvino")  # that run on a CPU
MIN_PSNR = {"float32": 50.0, "bfloat16": 30.0}  # dB between the pictures of a case and of ONNX Runtime in float32
STAGES = ("query", "warp", "synthesis")
SECONDS, QUICK_SECONDS = 60.0, 8.0  # of repeats
QUICK_TOTAL = 115.0  # seconds that all cases of a quick run share as their limits


def bench(
    bundle: str | os.PathLike[str],
    *,
    sizes: Sequence[int] = (),
    backends: Sequence[str] = (),
    repeats: int = 5,
    threads: int | None = None,
    quick: bool = False,
    output: str | os.PathLike[str] | None = None,
    fresh: bool = False,
) -> list[Row]:
    """The rows of `bundle`, with those that the JSON lines `output` holds; each is kept there as it is done.

    sizes: sides in pixels (the model's own). backends: those of `Translator` (all that are installed).
    quick: two minutes a size, for which cases may be cut off, and a batch of 4 once. fresh: begin `output` anew.
    Raises `InputError` for a bad option or where `output` was measured otherwise.
    """
    config = Bundle(bundle).manifest.config
    if repeats < 1:
        raise InputError(f"repeats: expected at least 1, got {repeats}")
    if output is not None and not os.fspath(output).endswith(".jsonl"):
        raise InputError(f"{output}: the rows are JSON lines; name the file *.jsonl")
    sides = [resolve_size(config, size, ())[0] for size in sizes] or [config.image_size]
    chosen = [case for size in sides for case in cases(size, backends, repeats=repeats, quick=quick)]
    known = [_case("onnxruntime", "float32", size) for size in sides]
    with tempfile.TemporaryDirectory() as folder:
        assets = Assets(bundles={"model": os.fspath(bundle)}, references=folder, threads=threads)
        return run_cases(chosen, assets, output, known=known, fresh=fresh)


def cases(size: int, backends: Sequence[str] = (), *, repeats: int = 5, quick: bool = False) -> Iterator[Case]:
    """What is measured at `size`: every backend (those installed) in every precision that it has on this CPU."""
    for backend in backends:
        if backend not in BACKENDS:
            raise InputError(f"unknown backend {backend!r}; expected some of {', '.join(BACKENDS)}")
    found = backends or [name for name in BACKENDS if importlib.util.find_spec(name)]
    pairs = []
    for backend in found:
        precisions: tuple[str, ...] = ("float32",)
        if backend == "openvino":
            from ...runtime.cpu.openvino import cpu_precisions

            precisions = cpu_precisions()
        pairs += [(backend, precision) for precision in precisions]
    batch = quick and "onnxruntime" in found
    limits: dict[str, Any] = {"repeats": repeats, "seconds": SECONDS}
    if quick:
        limits |= {"seconds": QUICK_SECONDS, "limit": QUICK_TOTAL / (len(pairs) + batch)}
    for backend, precision in pairs:
        yield _case(backend, precision, size, **limits)
    if batch:
        yield _case("onnxruntime", "float32", size, batch=4, **{**limits, "repeats": 1, "warmup": False})


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown: medians in milliseconds, the stages' of a translation with the exemplar encoded before."""
    columns = ["backend", "precision", "size", "batch", "load", "exemplar", "translation", "p5 to p95", *STAGES]
    lines = []
    for row in rows:
        chosen = row["parameters"]
        start = [chosen["backend"], chosen["precision"], str(chosen["size"]), str(chosen["batch"])]
        if row["status"] != "timed":
            lines.append([*start, *["-"] * (len(columns) - 3), unmeasured(row)])
            continue
        times = [row["facts"]["load_ms"], row["facts"]["exemplar_ms"], row["ms"]["median"]]
        lines.append([*start, *(f"{value:.0f}" for value in times), f"{row['ms']['p5']:.0f} to {row['ms']['p95']:.0f}"])
        lines[-1] += [f"{row['parts_ms'][stage]:.0f}" for stage in STAGES]
        quality = row["quality"].get("psnr_db")
        lines[-1] += [f"{row['peak_mib']:.0f}", "the measure" if quality is None else f"{quality:.1f} dB"]
    return markdown([*columns, "peak MiB", "agreement"], lines)


def _case(backend: str, precision: str, size: int, *, batch: int = 1, **options: Any) -> Case:
    reference = f"bundle/onnxruntime-float32-{size}"
    name = f"bundle/{backend}-{precision}-{size}" + (f"-batch{batch}" if batch > 1 else "")
    parameters = {"method": "runtime", "size": size, "bundle": "model", "backend": backend, "precision": precision}
    own = name == reference
    return Case(
        name,
        ".speed.translation:prepare",
        f"{backend} in {precision}, {size} px, batch {batch}",
        {**parameters, "cached": True, "batch": batch, "tile": None},
        None if own else Gate("psnr_db", MIN_PSNR[precision]),
        "" if own else reference,
        requires=(backend, "bundle"),
        **options,
    )
