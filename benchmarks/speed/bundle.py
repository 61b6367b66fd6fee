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
from ...errors import BackendError, InputError
from ...runtime.options import CPU_BACKENDS
from ...runtime.translator import resolve_size
from ..cases import TRANSLATION, runtime_parameters
from ..registry import Assets, Case, Gate
from ..runner import Row, run_cases
from ..tables import table as markdown
from ..tables import unmeasured

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
    num_threads: int | None = None,
    quick: bool = False,
    output: str | os.PathLike[str] | None = None,
    fresh: bool = False,
) -> list[Row]:
    """Time a bundle on this machine's CPU.

    Args:
        bundle: A folder or a .zip.
        sizes: Sides in pixels; the model's own by default.
        backends: Some of `CPU_BACKENDS`; all that are installed by default.
        repeats: Timed translations a case.
        num_threads: CPU threads, 1 to 256; one a core by default.
        quick: Take two minutes a size at the most, for which cases may be cut off, and add a batch of 4.
        output: JSON lines; a row is written there as soon as it is measured, and rows that are there are not measured
            again.
        fresh: Begin `output` anew.

    Returns:
        The rows, as in `output`.

    Raises:
        InputError: An option is out of range, or `output` was measured under other conditions.
        BackendError: ONNX Runtime, which all others are compared with, or psutil is missing.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise BackendError("bench compares with ONNX Runtime, which is missing; pip install 'flashcocos[cpu]'")
    config = Bundle(bundle).manifest.config
    if repeats < 1:
        raise InputError(f"repeats: expected at least 1, got {repeats}")
    if output is not None and not os.fspath(output).endswith(".jsonl"):
        raise InputError(f"{output}: the rows are JSON lines; name the file *.jsonl")
    sides = [resolve_size(config, size, ())[0] for size in sizes] or [config.image_size]
    wanted = [case for size in sides for case in cases(size, backends, repeats=repeats, quick=quick)]
    known = [_case("onnxruntime", "float32", size) for size in sides]
    with tempfile.TemporaryDirectory() as folder:
        assets = Assets(bundles={"model": os.fspath(bundle)}, references=folder, threads=num_threads)
        return run_cases(wanted, assets, output, known=known, fresh=fresh)


def cases(size: int, backends: Sequence[str] = (), *, repeats: int = 5, quick: bool = False) -> Iterator[Case]:
    """Every backend at `size` pixels in every precision that it has on this CPU; arguments as for `bench`."""
    for backend in backends:
        if backend not in CPU_BACKENDS:
            raise InputError(f"unknown backend {backend!r}; expected some of {', '.join(CPU_BACKENDS)}")
    backends = backends or [name for name in CPU_BACKENDS if importlib.util.find_spec(name)]
    pairs = []
    for backend in backends:
        precisions: tuple[str, ...] = ("float32",)
        if backend == "openvino":
            from ...runtime.cpu.openvino import cpu_precisions

            precisions = cpu_precisions()
        pairs += [(backend, precision) for precision in precisions]
    batch = quick and "onnxruntime" in backends
    limits: dict[str, Any] = {"repeats": repeats, "seconds": SECONDS}
    if quick:
        limits |= {"seconds": QUICK_SECONDS, "limit": QUICK_TOTAL / (len(pairs) + batch)}
    for backend, precision in pairs:
        yield _case(backend, precision, size, **limits)
    if batch:
        yield _case("onnxruntime", "float32", size, batch=4, **{**limits, "repeats": 1, "warmup": False})


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table: medians, the stages' of a translation with the exemplar encoded before."""
    times = [f"{name}, ms" for name in ("load", "exemplar", "translation", "p5 to p95", *STAGES)]
    columns = ["backend", "precision", "size, px", "batch", *times, "peak memory, MiB", "PSNR"]
    lines = []
    for row in rows:
        parameters = row["parameters"]
        start = [str(parameters[name]) for name in ("backend", "precision", "size", "batch")]
        if row["status"] != "timed":
            lines.append([*start, *["-"] * (len(columns) - 5), unmeasured(row)])
            continue
        medians = [row["facts"]["load_ms"], row["facts"]["exemplar_ms"], row["ms"]["median"]]
        spread = f"{row['ms']['p5']:.0f} to {row['ms']['p95']:.0f}"
        parts = [row["parts_ms"][stage] for stage in STAGES]
        lines.append([*start, *(f"{ms:.0f}" for ms in medians), spread, *(f"{ms:.0f}" for ms in parts)])
        quality = row["quality"].get("psnr_db")
        lines[-1] += [f"{row['peak_mib']:.0f}", "reference" if quality is None else f"{quality:.1f} dB"]
    return markdown(columns, lines)


def _case(backend: str, precision: str, size: int, *, batch: int = 1, **options: Any) -> Case:
    reference = f"bundle/onnxruntime-float32-{size}"
    name = f"bundle/{backend}-{precision}-{size}" + (f"-batch{batch}" if batch > 1 else "")
    is_reference = name == reference
    return Case(
        name,
        TRANSLATION,
        f"{backend} in {precision}, {size} px, batch {batch}",
        runtime_parameters(size, backend=backend, precision=precision, batch=batch),
        None if is_reference else Gate("psnr_db", MIN_PSNR[precision]),
        "" if is_reference else reference,
        requires=(backend, "bundle"),
        **options,
    )
