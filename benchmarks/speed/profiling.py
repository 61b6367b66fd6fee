"""Where the time of a translation goes, behind `flashcocos bench --profile`: by stage, and by kind of operator.

ONNX Runtime's own profiler measures the operators. The time of a Loop excludes that of the operators in it, which count
under their own kinds; what a stage takes beyond its operators is the row "between operators".
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ...bundle import STAGES, Bundle
from ...bundle.stages import stage_inputs
from ...errors import InputError
from ...runtime.options import EngineOptions
from ...runtime.translator import resolve_size
from ..tables import table
from .inputs import network_inputs

TOP = 10
Arrays = dict[str, npt.NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class StageProfile:
    """Milliseconds of one run of a stage, the median, and by kind of operator (calls, milliseconds), largest first."""

    stage: str
    milliseconds: float
    operators: Mapping[str, tuple[float, float]]


def profile(
    bundle: str | os.PathLike[str], *, size: int | None = None, repeats: int = 3, num_threads: int | None = None
) -> list[StageProfile]:
    """Time each stage of a bundle in ONNX Runtime on the CPU, and the warp.

    Args:
        bundle: A folder or a .zip.
        size: Side in pixels; the model's own by default.
        repeats: Timed runs of each stage, after a warm-up.
        num_threads: CPU threads, 1 to 256; one a core by default.

    Returns:
        A profile of each stage, in their order.

    Raises:
        InputError: An option is out of range.
    """
    from ...kernels.corr_warp import warp_arrays

    opened = Bundle(bundle)
    config = opened.manifest.config
    side = resolve_size(config, size, ())[0]
    if repeats < 1:
        raise InputError(f"repeats: expected at least 1, got {repeats}")
    EngineOptions(num_threads=num_threads)  # checks them
    arrays: Arrays = dict(zip(("label", "image", "exemplar_label"), network_inputs(config, side), strict=False))

    def warp() -> npt.NDArray[Any]:
        sides = arrays["theta"], arrays["phi"], arrays["values"]
        return warp_arrays(*sides, patch=config.patch, temperature=config.temperature, match=True).out

    profiles = []
    with tqdm(desc="profile", total=len(STAGES) + 1, unit="stage", disable=None) as bar:
        for stage in ("exemplar", "query", "warp", "coarse", "fine"):
            if stage == "warp":
                took, arrays["warped"] = _repeated(warp, repeats)
                profiles.append(StageProfile("warp", took, {}))
            else:
                measured, outputs = _stage(opened, stage, stage_inputs(config, stage, arrays), repeats, num_threads)
                profiles.append(measured)
                arrays |= outputs
            bar.update()
    return profiles


def report(profiles: Sequence[StageProfile]) -> str:
    """The stages, then the `TOP` kinds of operators of each, as Markdown."""
    parts = [table(["stage", "ms"], [[stage.stage, f"{stage.milliseconds:.1f}"] for stage in profiles])]
    for stage in profiles:
        if not stage.operators:
            continue
        operators = list(stage.operators.items())
        lines, others = operators[:TOP], [times for _, times in operators[TOP:]]
        if others:
            calls, took = map(sum, zip(*others, strict=True))
            lines.append((f"{len(others)} other kinds", (calls, took)))
        between = stage.milliseconds - sum(took for _, (_, took) in operators)
        cells = [
            [kind, f"{calls:.0f}", f"{took:.1f}", f"{took / stage.milliseconds:.0%}"]
            for kind, (calls, took) in [*lines, ("between operators", (0.0, between))]
        ]
        parts.append(f"{stage.stage}:\n\n{table(['operator', 'calls', 'ms', 'share'], cells)}")
    return "\n\n".join(parts)


def _stage(
    bundle: Bundle, stage: str, feeds: Arrays, repeats: int, num_threads: int | None
) -> tuple[StageProfile, Arrays]:
    """The profile of one stage, and its outputs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads or 0
    options.enable_cpu_mem_arena = False  # as the runtime has it
    options.log_severity_level = 4
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / stage)
        session = onnxruntime.InferenceSession(bundle.read_stage(stage), options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        took, outputs = _repeated(lambda: session.run(names, feeds), repeats)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    operators = operator_times(events, repeats)
    return StageProfile(stage, took, operators), dict(zip(names, outputs, strict=True))


def _repeated(run: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Median milliseconds after a warm-up, and the last result."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        result = run()
        times.append(1e3 * (time.perf_counter() - start))
    return float(np.median(times[1:])), result


def operator_times(events: Sequence[Mapping[str, Any]], runs: int) -> dict[str, tuple[float, float]]:
    """Calls and milliseconds a run by kind of operator, largest first, from the events of a warm-up and `runs` runs."""
    starts = sorted(event["ts"] for event in events if event.get("name") == "model_run")
    kernels = sorted(
        (event["ts"], -event["dur"], event["args"]["op_name"])
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= starts[-runs]
    )
    totals: dict[str, tuple[float, float]] = {}
    open_ends: list[tuple[float, str]] = []  # of the operators around the current one, outermost first
    for start, negative, kind in kernels:
        while open_ends and open_ends[-1][0] <= start:
            open_ends.pop()
        took = -negative / 1e3 / runs
        if open_ends:
            outer = open_ends[-1][1]
            totals[outer] = (totals[outer][0], totals[outer][1] - took)
        calls, before = totals.get(kind, (0.0, 0.0))
        totals[kind] = (calls + 1 / runs, before + took)
        open_ends.append((start - negative, kind))
    return dict(sorted(totals.items(), key=lambda item: -item[1][1]))
