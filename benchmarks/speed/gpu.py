"""What a GPU can show beside the times of other cases: that the kernels are right on it, and what only runs there.

Everything but `cubins`, the sanitizers and the translations also runs on a CPU, the kernels in Triton's interpreter.
Logs, engines and trainings go into the folder of the reference pictures.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from ...config import ModelConfig
from ...errors import BackendError
from ..registry import Assets, Benchmark, Case, Sample, Task
from ..runner import TESTS
from . import training, translation, warp
from .inputs import warp_inputs

PACKAGES = ("torch", "triton", "pycuda", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx")
SANITIZER_STATUS = 86  # what compute-sanitizer ends with when it found something
MARGIN = 10.0  # seconds before a case's limit in which a program that it started is ended


def device(case: Case, assets: Assets) -> Benchmark:
    """Facts: the GPU as torch sees it, and what is installed."""
    import torch

    facts: dict[str, Any] = {"cuda_of_torch": torch.version.cuda}
    if assets.device == "cuda":
        cudnn: Any = torch.backends.cudnn
        found = torch.cuda.get_device_properties(0)
        facts |= {"cudnn": cudnn.version(), "name": found.name, "capability": 10 * found.major + found.minor}
        facts |= {"multiprocessors": found.multi_processor_count, "memory_mib": found.total_memory >> 20}
        facts["l2_mib"] = found.L2_cache_size >> 20
    for name in PACKAGES:
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            facts[name] = "missing"
    facts |= {tool: "there" if shutil.which(tool) else "missing" for tool in ("nvcc", "compute-sanitizer")}
    return Benchmark(None, facts=facts)


def repeats(case: Case, assets: Assets) -> Benchmark:
    """Each kernel's results again and again; the result is the largest error of each kernel's warp.

    parameters: query and key (sizes of the maps), channels, values, kernels (of the forward pass, each with the dtype
    of its maps) and repeats. A GPU without nine taps leaves those out. A run raises `BackendError` where a repeat of
    forward, match or backward differs in a bit from the first.
    """
    import torch

    from ...kernels import reference
    from ...kernels.gpu import configs, triton_warp

    wanted, temperature = case.parameters, 0.01
    torch.manual_seed(0)
    shapes = [(1, wanted["channels"], *wanted[side]) for side in ("query", "key")]
    shapes += [(1, wanted["values"], *wanted[side]) for side in ("key", "query")]
    exact: list[Any] = [torch.randn(shape) for shape in shapes]
    capability = torch.cuda.get_device_capability() if assets.device == "cuda" else (9, 0)
    nine_taps = configs.architecture(10 * capability[0] + capability[1]).nine_tap is not None

    def results(theta: Any, phi: Any, values: Any, gradient: Any) -> tuple[Any, ...]:
        forward = triton_warp.warp_forward(theta, phi, values, 3, temperature)
        match = triton_warp.match_forward(theta, phi, 3, temperature)
        return (*forward, *match, *triton_warp.warp_backward(theta, phi, values, *forward, gradient, 3, temperature))

    def run() -> Sample:
        errors = {}
        for kernel, dtype in wanted["kernels"]:
            if kernel == "nine_tap" and not nine_taps:
                continue
            inputs = [tensor.to(assets.device, getattr(torch, dtype)) for tensor in exact]
            with triton_warp.choose_forward(kernel):
                first = results(*inputs)
                same = [all(map(torch.equal, first, results(*inputs))) for _ in range(wanted["repeats"])]
            if not all(same):
                raise BackendError(f"{kernel} in {dtype}: {same.count(False)} of {len(same)} repeats differ in a bit")
            theta, phi, values, _ = (tensor.double() for tensor in inputs)
            expected = reference.warp(theta, phi, values, 3, temperature)[0]
            errors[f"{kernel}_{dtype}_error"] = float((first[0].double() - expected).abs().max())
        return Sample({"max_error": max(errors.values()), **errors})

    return Benchmark(run, lambda found: found)


def sanitizer(case: Case, assets: Assets) -> Benchmark:
    """Facts: the summary of compute-sanitizer over one run of `repeats`; `BackendError` where it found something.

    parameters: tool, and those of `repeats`.
    """
    tool = case.parameters["tool"]
    task = Task(dataclasses.replace(case, benchmark=f"{__name__}:repeats", warmup=False, repeats=1), assets)
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(SANITIZER_STATUS)]
    command += [sys.executable, "-m", f"{__package__.rpartition('.')[0]}.worker", msgspec.json.encode(task).decode()]
    log = Path(assets.references) / f"{tool}.log"
    # each tensor an allocation of its own, so that an access beyond it is seen
    status = _logged(command, log, case.limit, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    lines = log.read_text(errors="replace").splitlines()
    if status != 0:
        first = [line for line in lines if line.startswith("=========")][1:3] or lines[-1:]
        how = "took too long" if status is None else f"ended with {status}"
        raise BackendError(f"{tool} {how}: {' '.join(first)}; {log.name} has all of it")
    return Benchmark(None, facts={"summary": next((line for line in lines if "SUMMARY" in line), "none")})


def kernel_tests(case: Case, assets: Assets) -> Benchmark:
    """Facts: how many of the checkout's tests passed and were skipped; `BackendError` where one failed.

    parameters: tests, paths in the folder of tests. Where time runs out, those that were done until then count.
    """
    log = Path(assets.references) / "tests.log"
    command = [sys.executable, "-m", "pytest", "-v", *(str(TESTS / name) for name in case.parameters["tests"])]
    if assets.device == "cuda" and importlib.util.find_spec("xdist"):  # compiling is the CPU's work
        command += ["-p", "xdist.plugin", "-n", str(min(8, os.cpu_count() or 1))]
    # importing every plugin that is installed takes seconds
    variables = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    variables["PYTHONPATH"] = os.pathsep.join([str(TESTS.parents[1]), os.environ.get("PYTHONPATH", "")])
    status = _logged(command, log, case.limit, **variables)
    # what follows repeats the names of those that failed
    progress = re.split(r"^=+ (?:FAILURES|ERRORS|short test summary)", log.read_text(errors="replace"), flags=re.M)[0]
    words = (re.search(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", line) for line in progress.splitlines() if "::" in line)
    outcomes = [word[0] for word in words if word]
    failed = outcomes.count("FAILED") + outcomes.count("ERROR")
    if failed or status not in (0, None):
        raise BackendError(
            f"{failed} of {len(outcomes)} tests failed, pytest ended with {status}; {log.name} names them"
        )
    counts = {name: outcomes.count(name.upper()) for name in ("passed", "skipped")}
    return Benchmark(None, facts={**counts, "finished": status == 0})


def passes(case: Case, assets: Assets) -> Benchmark:
    """The case of `warp.prepare`, several passes one after the other, so that the GPU waits for no launch.

    parameters: those of `warp.prepare`, and passes. The part "pass" is the time of one.
    """
    import torch

    prepared, count = warp.prepare(case, assets), case.parameters["passes"]
    run_one = prepared.run
    assert run_one is not None

    def run() -> Sample:
        start = time.perf_counter()
        for _ in range(count):
            result = run_one().result
        if assets.device == "cuda":
            torch.cuda.synchronize()
        return Sample(result, {"pass": 1e3 * (time.perf_counter() - start) / count})

    return prepared._replace(run=run)


def cubins(case: Case, assets: Assets) -> Benchmark:
    """The kernels compiled ahead of time for this GPU, launched through pycuda on their own grids, as a runtime does.

    parameters: preset (of the model) and size (side of the maps). A result is the address of the warp, float32.
    """
    from ...kernels.gpu.aot import compile_kernels
    from ...runtime.gpu.cubins import find_kernels
    from ...runtime.gpu.device import Buffers, Device
    from ...runtime.gpu.warp import DeviceWarp, key_tensors, query_tensors

    config, size = ModelConfig.preset(case.parameters["preset"]), case.parameters["size"]
    maps, gpu = (size, size), Device()
    options: dict[str, Any] = {"patch": config.patch, "channels": config.feature_channels}
    folder, values = Path(assets.references) / "kernels", config.warped_channels
    described = list(compile_kernels(folder, [gpu.capability], values=[values], **options))
    about: dict[str, Any] = {"capability": gpu.capability, "driver": gpu.driver, "remedy": ""}
    kernels = find_kernels([folder], config, ["float16"], **about)
    grid = kernels["warp"].grid(dict.fromkeys(("height_q", "width_q", "height_k", "width_k"), size), 1)
    names = ("entry", "registers", "spilled_bytes", "shared_bytes", "cuda")
    facts = {"grid": grid, **{name: described[-1][name] for name in names}}
    arrays = warp_inputs(size, config.warped_channels, "noise", config.feature_channels)
    planes = dict(zip(("theta", "phi", "values"), arrays, strict=True))
    packed = {**key_tensors(config, "float16", 1, maps), **query_tensors(config, "float16", 1, maps)}
    with gpu.active():
        launched = DeviceWarp(gpu, kernels, config)
        inputs = Buffers(gpu, {name: (array.shape, array.dtype) for name, array in planes.items()}, planes)
        buffers = Buffers(gpu, packed, ("warped",))
        for name, array in planes.items():
            inputs.pinned[name][...] = array
        at, keys = inputs.addresses, buffers.addresses
        packing = launched.pack_keys(at["phi"], at["values"], keys, 1, maps)
        gpu.run({"pack": [*inputs.upload(*planes), *packing]})
        work = launched.run(at["theta"], keys, keys, 1, maps, maps)

    def run() -> Sample:
        with gpu.active():
            for launch in work:
                launch()
            gpu.synchronize()
        return Sample(keys["warped"])

    def check(_: int) -> dict[str, float]:
        with gpu.active():
            gpu.run({"download": buffers.download("warped")})
        return {"max_error": warp.largest_error(arrays, buffers.pinned["warped"], config.patch)}

    def close(_: int) -> dict[str, float]:
        with gpu.active():
            inputs.free()
            buffers.free()
        gpu.close()
        return {}

    return Benchmark(run, check, close, facts=facts)


def training_step(case: Case, assets: Assets) -> Benchmark:
    """A step of training, as `training` times it; facts on a GPU: its peak there, and the estimate of it, in MiB.

    The estimate is of the method "tiled" alone, which is what `flashcocos train` runs.
    """
    import torch

    from ...train.memory_estimate import MemoryEstimate

    if assets.device != "cuda":
        return training.prepare(case, assets)
    facts: dict[str, float] = {}
    if case.parameters["method"] == "tiled":
        estimated = MemoryEstimate(training.step_settings(case.parameters)).peak(case.parameters["batch"])
        facts["estimated_mib"] = round(estimated.total / 2**20, 1)
    prepared = training.prepare(case, assets)
    run_one = prepared.run
    assert run_one is not None

    def run() -> Sample:
        torch.cuda.reset_peak_memory_stats()
        sample = run_one()
        facts["step_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)  # the last: the first tries algorithms
        return sample

    return prepared._replace(run=run, facts=facts)


def build(case: Case, assets: Assets) -> Benchmark:
    """Facts: seconds and MiB of the engines and kernels for a backend, built beside the bundle for its own size.

    parameters: bundle, backend and precision.
    """
    from ...export.tensorrt.build import build as build_engines
    from ...export.tensorrt.build import build_kernels, current_architecture
    from ...runtime.gpu.store import default_folder
    from ...runtime.options import VARIANTS

    bundle, start = assets.bundles[case.parameters["bundle"]], time.perf_counter()
    backend, precision, target = case.parameters["backend"], case.parameters["precision"], current_architecture()
    names = build_kernels(bundle, default_folder(bundle), [target], precision)
    facts = {"kernels": len(names), "kernels_s": round(time.perf_counter() - start, 1)}
    if backend in VARIANTS:
        engines = list(build_engines(bundle, targets=[target], precision=precision, variant=backend))
        facts["engines_mib"] = round(sum(one.record.bytes for one in engines) / 2**20, 1)
    return Benchmark(None, facts={**facts, "all_s": round(time.perf_counter() - start, 1)})


def on_cpu(case: Case, assets: Assets) -> Benchmark:
    """The case of `translation.prepare` on the CPU, whatever the device of the others: what they are compared with."""
    return translation.prepare(case, dataclasses.replace(assets, device="cpu"))


def translate(case: Case, assets: Assets) -> Benchmark:
    """The case of `translation.prepare`; facts: cuda_graphs, how many CUDA graphs were captured.

    parameters: those of `translation.prepare`, and graph, whether any may be captured.
    """
    from ...runtime.gpu.device import Device

    capture = Device.capture
    facts: dict[str, Any] = {"cuda_graphs": 0}

    def counted(gpu: Device, work: Any) -> Any:
        if not case.parameters["graph"]:
            raise BackendError("the case times launches one by one")
        graph = capture(gpu, work)
        facts["cuda_graphs"] += 1
        return graph

    Device.capture = counted  # type: ignore[method-assign, assignment]
    prepared = translation.prepare(case, assets)
    facts |= prepared.facts
    return prepared._replace(facts=facts)


def schedule(case: Case, assets: Assets) -> Benchmark:
    """Facts: steps of a whole training that were done, its seconds, and those of rendering its data.

    parameters: preset and changes (of settings). What time does not suffice for is saved, and the next run goes on.
    """
    from ...train.batches import open_data
    from ...train.checkpoint import read_metadata
    from ...train.settings import read_settings
    from ...train.trainer import MODEL, train

    start, folder = time.perf_counter(), Path(assets.references) / case.parameters["preset"]
    settings = read_settings(case.parameters["preset"], [f"run.device={assets.device}", *case.parameters["changes"]])
    before = read_metadata(folder / MODEL)[1]["step"] if (folder / MODEL).exists() else 0
    open_data(settings)  # renders
    rendered = time.perf_counter()
    # as Ctrl-C does, it makes the training save and end
    alarm = threading.Timer(max(1.0, case.limit - MARGIN - (rendered - start)), signal.raise_signal, (signal.SIGTERM,))
    alarm.daemon = True
    alarm.start()
    stopped = train(settings, folder)
    alarm.cancel()
    step = read_metadata(folder / MODEL)[1]["step"]
    seconds = time.perf_counter() - rendered
    facts = {"steps": step, "steps_a_second": round((step - before) / seconds, 2), "seconds": round(seconds, 1)}
    return Benchmark(None, facts={**facts, "data_s": round(rendered - start, 1), "finished": not stopped})


def _logged(command: list[str], log: Path, limit: float, **variables: str) -> int | None:
    """Run `command` with its output in `log`; its exit status, or None where `limit` ended it with all it started."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, stdout=file, stderr=file, env={**os.environ, **variables}, start_new_session=True
        ) as process,
    ):
        try:
            return process.wait(max(1.0, limit - MARGIN))
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
