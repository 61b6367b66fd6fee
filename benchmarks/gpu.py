"""The run on a GPU: which cases, in order of value, and their part of the report.

`python -m flashcocos.benchmarks gpu -o FOLDER` leaves a row in FOLDER/gpu.jsonl after every case, and logs, engines and
trainings in FOLDER/files. A case that the machine lacks something for is skipped, and its row names what. What there
was no time for, and what failed, runs with the same command again.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..bundle.default_model import MODEL
from ..config import ModelConfig
from ..errors import InputError
from ..files import require_target
from .cases import EXACT, ROUNDED, machine_case, runtime_parameters, training_cases, warp_case
from .registry import Assets, Case, Gate
from .runner import Row, run_cases
from .tables import WARPS, duration, grouped, memory, seconds, table, unmeasured

FILE, FILES = "gpu.jsonl", "files"
PICTURE = "gpu/cpu-picture"
ADE20K = ModelConfig.preset("ade20k")
# what the extra of each backend installs, and the precision that it is built for
BACKENDS = {
    "tensorrt-rtx": ("tensorrt_rtx", "float16"),
    "tensorrt": ("tensorrt", "float16"),
    "onnxruntime": ("onnxruntime-gpu", "float32"),
}
KERNELS = [["straightforward", "float16"], ["straightforward", "float32"], ["nine_tap", "float16"]]
SMALL_WARP: dict[str, Any] = {"query": [13, 11], "key": [12, 9], "channels": 32, "values": 5, "kernels": KERNELS}
TESTS = ["kernels/gpu/test_triton.py", "kernels/gpu/test_triton_nine_tap.py", "kernels/test_op.py"]
# parameters of a dry run, by benchmark; its training is of a small model, with no network beside it
DRY_MODEL = ("model.preset=tiny", "loss.adversarial=0.0", "loss.discriminator_features=0.0", "supervised.image=1.0")
DRY: dict[str, dict[str, Any]] = {
    "machine:roofline": {"side": 32},
    "gpu:repeats": {"query": [3, 4], "key": [4, 3], "channels": 16, "values": 3, "kernels": KERNELS[:1], "repeats": 1},
    "gpu:passes": {"size": 2, "channels": 16, "passes": 1},
    "gpu:kernel_tests": {"tests": [f"{TESTS[1]}::test_splits_fill_waves_and_leave_none_empty"]},
    "gpu:training_step": {"size": 64, "changes": [*DRY_MODEL, "optimizer.spectral_norm=false", "perceptual=none"]},
    "gpu:schedule": {
        "changes": [DRY_MODEL[0], "data.count=2", "data.repeat_rare=0", "schedule.steps=2", "run.batch=2"]
    },
}


def run_gpu(
    output: str | os.PathLike[str],
    *,
    limit: float,
    dry_run: bool = False,
    command: str = "",
    fresh: bool = False,
) -> list[Row]:
    """Run the cases of a GPU and write their rows to the file `FILE` in a folder.

    Args:
        output: The folder.
        limit: Seconds, after which the remaining cases are skipped.
        dry_run: Run them at tiny sizes on the CPU instead, the kernels in Triton's interpreter.
        command: Written in every row.
        fresh: Begin the file anew.

    Returns:
        The rows, as in the file.

    Raises:
        BackendError: There is no GPU.
        InputError: `output` is no folder or was measured under other conditions, or `limit` is not positive.
    """
    from ..train.device import torch_device

    if not limit > 0:
        raise InputError(f"seconds: expected a positive number, got {limit:g}")
    require_target(output, directory=True)
    os.environ["TRITON_INTERPRET"] = str(int(dry_run))
    device = "cpu" if dry_run else torch_device("cuda")
    files = Path(output) / FILES
    files.mkdir(parents=True, exist_ok=True)
    bundle = files / MODEL.name  # a copy, for engines lie beside it
    shutil.copyfile(MODEL, bundle)
    assets = Assets(bundles={"default": str(bundle)}, references=str(files), device=device)
    cases, known = dry_cases() if dry_run else gpu_cases(), [cpu_picture()]
    return run_cases(list(cases), assets, Path(output) / FILE, known=known, command=command, fresh=fresh, seconds=limit)


def gpu_cases() -> Iterator[Case]:
    """The cases in order of value: is it right, how fast is the warp, the rest."""
    yield _case("device", "the GPU and what is installed", requires=("torch",))
    yield machine_case(8192)
    yield _case(
        "repeats",
        "forward, match and backward by each kernel, and 50 repeats with the same bits",
        SMALL_WARP | {"query": [37, 41], "key": [40, 33], "channels": 128, "values": 48, "repeats": 50},
        gate=Gate("max_error", 5e-3, at_least=False),  # values of up to 4 and weights, rounded to 11 bits each
        repeats=1,
        warmup=False,
        requires=("torch", "triton"),
    )
    needs: tuple[str, ...] = ("cuda", "torch", "triton", "compute-sanitizer")
    for tool in ("memcheck", "racecheck"):
        text = f"compute-sanitizer's {tool} over a small warp by each kernel"
        yield _case(tool, text, {"tool": tool, **SMALL_WARP, "repeats": 0}, "sanitizer", requires=needs, limit=120.0)
    yield from _warps(128, 3)
    yield from _cubins()
    yield from _training()
    yield from _translations()
    needs = ("torch", "triton", "pytest", "tests")
    yield _case("tests", "the tests of the kernels", {"tests": TESTS}, "kernel_tests", requires=needs, limit=180.0)
    others = [(64, 3), (256, 3), (128, 48), (64, 48), (256, 48)]
    for side, values in others:
        yield from _warps(side, values)
    for side, values in [(128, 3), *others]:  # it takes its time to compile
        yield from _warps(side, values, ("compiled",), ("compiled",))
    preset, needs = {"preset": "avatars-128", "changes": []}, ("torch", "dicebear", "resvg", "tensorboard")
    yield _case("schedule", "the whole training of the default model", preset, requires=needs, limit=3600.0)


def dry_cases() -> Iterator[Case]:
    """One case of each kind at a size for a CPU; those of a GPU alone are as they are, and will be skipped."""
    done = set()
    for case in gpu_cases():
        parameters = {**case.parameters, **DRY.get(case.benchmark.removeprefix(".speed."), {})}
        kind = (case.benchmark, parameters.get("method"), parameters.get("backward"))
        if case.benchmark.removeprefix(".speed.") not in DRY:
            yield case
        elif kind not in done and parameters.get("method") not in ("compiled", "matrix"):
            done.add(kind)
            needs = tuple(need for need in case.requires if need != "cuda")
            changes: dict[str, Any] = {"parameters": parameters, "requires": needs, "memory": 0}
            yield dataclasses.replace(case, **changes, measures=f"dry run: {case.measures}", repeats=1, warmup=False)


def cpu_picture() -> Case:
    """The case whose picture those of the GPU are compared with."""
    parameters = runtime_parameters(128, bundle="default")
    return _case("cpu-picture", "the CPU's picture", parameters, "on_cpu", requires=("onnxruntime", "bundle"))


def _case(
    name: str, measures: str, parameters: Mapping[str, Any] | None = None, function: str = "", **fields: Any
) -> Case:
    fields = {"limit": 90.0, **fields}
    return Case(f"gpu/{name}", f".speed.gpu:{function or name}", measures, parameters or {}, **fields)


def _warps(
    side: int,
    values: int,
    forward: Sequence[str] = ("triton-nine-tap", "triton-straightforward", "sdpa", "reference"),
    backward: Sequence[str] = ("triton", "sdpa", "reference"),
) -> Iterator[Case]:
    for methods, gradients in ((forward, False), (backward, True)):  # the backward pass has one kernel
        for method in methods:
            case = warp_case(method, side, device="cuda", values=values, backward=gradients)
            parameters = {**case.parameters, "passes": 10}
            changes: dict[str, Any] = {"repeats": 20, "seconds": 2.0, "limit": 90.0}
            yield dataclasses.replace(case, benchmark=".speed.gpu:passes", parameters=parameters, **changes)


def _cubins() -> Iterator[Case]:
    for preset, size in (("ade20k", 64), ("ade20k", 128), ("avatars-128", 64)):
        yield _case(
            f"cubins-{preset}-{size}",
            f"the compiled kernels of {preset}'s warp through pycuda, {size} x {size} maps",
            {"preset": preset, "size": size},
            "cubins",
            gate=Gate("max_error", 2e-2, at_least=False),
            repeats=50,
            seconds=2.0,
            requires=("cuda", "pycuda", "triton"),
        )


def _training() -> Iterator[Case]:
    for case in training_cases("cuda", ADE20K):
        case = dataclasses.replace(case, benchmark=".speed.gpu:training_step", seconds=10.0, limit=150.0)
        yield case
        if case.parameters["method"] == "tiled":
            parameters = {**case.parameters, "changes": ["run.precision=bfloat16"]}
            name, measures = f"{case.name}-bfloat16", f"{case.measures}, bfloat16"
            yield dataclasses.replace(case, name=name, measures=measures, parameters=parameters)


def _translations() -> Iterator[Case]:
    for backend, (package, precision) in BACKENDS.items():
        needs, text = ("cuda", package, "pycuda", "bundle"), f"the default model on {backend} in {precision}"
        parameters = runtime_parameters(128, bundle="default", backend=backend, precision=precision)
        builders = (*needs, "triton", "onnx")
        yield _case(
            f"build-{backend}", f"engines and kernels: {text}", parameters, "build", requires=builders, limit=240.0
        )
        # the first run is the first start, for which RTX compiles, the only timed one the second
        yield dataclasses.replace(
            _case(f"start-{backend}", f"a process's start to its first picture: {text}", requires=needs),
            benchmark=".speed.machine:startup",
            parameters={**parameters, "cached": False},
            gate=Gate("mean", 1.0),
            repeats=1,
        )
        for graph in (False,) if backend == "onnxruntime" else (True, False):  # which is never captured
            yield _case(
                f"translate-{backend}{'' if graph else '-launches'}",
                f"{'with' if graph else 'without'} CUDA graphs: {text}",
                {**parameters, "graph": graph},
                "translate",
                gate=Gate("psnr_db", EXACT if precision == "float32" else ROUNDED),
                reference=PICTURE,
                repeats=50,
                seconds=5.0,
                requires=needs,
            )


def gpu_section(rows: Sequence[Row]) -> str:
    """The rows of a run on a GPU: facts, the warp, everything else that was timed, and what was not."""
    measured = [[row["measures"], _named(row["facts"])] for row in rows if row["status"] == "measured"]
    timed = [row for row in rows if row["status"] == "timed"]
    warps = [_warp_line(row) for row in timed if row["case"].startswith("warp/")]
    others = [
        [
            row["measures"],
            seconds(row["first_ms"]),
            duration(row),
            memory(row),
            _named({**row["quality"], **row["facts"]}),
        ]
        for row in timed
        if not row["case"].startswith("warp/")
    ]
    missing = [[row["measures"], unmeasured(row)] for row in rows if row["status"] not in ("measured", "timed")]
    rates = "TFLOP/s, 2 (C + V) N^2", "TFLOP/s, 2 (9 C + V) N^2"
    text = (
        "The warp, float16, 256 channels, patch 3: one pass of several in a row. Rates count the products of whole "
        "features,\nthe least there is to do, and those of patches, as published; gradients count as two passes more."
    )
    parts = ["## On a GPU"]
    for head, lines in (
        (["", "found"], measured),
        (["N", "values", "", "pass", "time", *rates, "memory", "largest error"], warps),
        (["", "first", "median", "peak memory", "found"], others),
        (["not measured", "why"], missing),
    ):
        if lines:
            parts += [text, table(head, lines)] if lines is warps else [table(head, lines)]
    return "\n\n".join(parts)


def _warp_line(row: Row) -> list[str]:
    wanted = row["parameters"]
    milliseconds, positions = row["parts_ms"]["pass"], wanted["size"] ** 2
    counts = (wanted["channels"] + wanted["values"], wanted["patch"] ** 2 * wanted["channels"] + wanted["values"])
    work = 2 * positions**2 * (3 if wanted["backward"] else 1) / milliseconds / 1e9
    return [
        grouped(positions),
        str(wanted["values"]),
        WARPS[wanted["method"]],
        "with gradients" if wanted["backward"] else "forward",
        seconds(milliseconds),
        *(f"{work * count:.3g}" for count in counts),
        memory(row),
        f"{row['quality']['max_error']:.0e}",
    ]


def _named(facts: dict[str, Any]) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {f'{value:.4g}' if isinstance(value, float) else value}"
        for name, value in facts.items()
    )
