"""From options to a pipeline. What "auto" means on this machine is decided here; engines and pipelines never see it."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import logging
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ..bundle import STAGES, Bundle
from ..errors import BackendError, InputError
from ..kernels.corr_warp import warp_arrays
from .cpu.onnxruntime import OnnxRuntimeEngine, has_provider
from .cpu.openvino import OpenVinoEngine
from .cpu.pipeline import CpuPipeline
from .engine import Engine
from .gpu.pipeline import open_gpu_pipeline
from .options import CPU_BACKENDS, VARIANTS, EngineOptions
from .pipeline import Pipeline

_log = logging.getLogger("flashcocos.runtime")


def open_pipeline(bundle: Bundle, options: EngineOptions) -> Pipeline:
    """The pipeline that `options` ask for.

    Raises:
        InputError: an option is of no use where the model runs.
        BackendError: the backend, device, precision, warp, an engine or a compiled kernel is missing here.
        BundleError: a graph is damaged or hostile.
    """
    if options.backend == "auto":
        options = dataclasses.replace(options, backend=_fastest_backend(options))
    if options.backend in VARIANTS or "cuda" in (options.device, options.warp):
        _refuse(options, "num_threads", "to graphs on the CPU, and these run on the GPU")
        return open_gpu_pipeline(bundle, options)
    if options.backend == "onnxruntime" and options.device == options.warp == "auto":
        return _open_where_it_runs(bundle, options)
    return _open_cpu_pipeline(bundle, options)


def _fastest_backend(options: EngineOptions) -> str:
    """The first of `CPU_BACKENDS` that is installed; where none is, the first, whose absence is then an error."""
    on_gpu = "cuda" in (options.device, options.warp)  # which the first has alone
    installed = [name for name in CPU_BACKENDS if importlib.util.find_spec(name) is not None]
    backend = CPU_BACKENDS[0] if on_gpu or not installed else installed[0]
    if len(installed) > 1 or backend != CPU_BACKENDS[0]:
        _log.info("backend auto: %s (installed: %s)", backend, ", ".join(installed))
    return backend


def _open_where_it_runs(bundle: Bundle, options: EngineOptions) -> Pipeline:
    """All on the GPU where that starts, else all on the CPU."""
    if not has_provider("cuda"):
        _log.info("device auto: cpu (this onnxruntime has no CUDA provider)")
        return _open_cpu_pipeline(bundle, options)
    try:
        pipeline = open_gpu_pipeline(bundle, options)
        _log.info("device auto: cuda")
        return pipeline
    except BackendError as error:
        # as text, for a record that is kept would keep the error's frames and what they hold
        _log.warning("device auto: cpu, because cuda does not start: %s", str(error))
    return _open_cpu_pipeline(bundle, options)


def _open_cpu_pipeline(bundle: Bundle, options: EngineOptions) -> CpuPipeline:
    for name in ("exemplar_cache_mib", "engines"):
        _refuse(options, name, "on a GPU, and here all runs on the CPU")
    with ThreadPoolExecutor(1) as thread:  # numba takes as long to start as the graphs
        warp = thread.submit(_warp_backend, bundle.manifest.config.patch, options.warp)
        engines = open_engines(bundle, options)
        return CpuPipeline(bundle, engines, warp.result(), options.tile)


def _warp_backend(patch: int, backend: str) -> str:
    """Warp one position, so that what cannot run fails here and "auto" becomes a name."""
    position = np.ones((1, 1, 1, 1), np.float32)
    return warp_arrays(position, position, position, patch=patch, match=True, backend=backend).backend


def open_engines(bundle: Bundle, options: EngineOptions) -> dict[str, Engine]:
    """An engine of ONNX Runtime or OpenVINO on the CPU for every stage of `bundle`, by name.

    Raises as `OnnxRuntimeEngine` and `OpenVinoEngine`.
    """
    manifest, precision = bundle.manifest, options.precision or "float32"
    engines: dict[str, Engine] = {}
    # the largest first, for loading a graph takes three times its size for a moment
    for stage in sorted(STAGES, key=lambda stage: manifest.graph_file(stage).bytes, reverse=True):
        if options.backend == "openvino":
            engines[stage] = OpenVinoEngine(bundle, stage, num_threads=options.num_threads, precision=precision)
        else:
            engines[stage] = OnnxRuntimeEngine(bundle, stage, num_threads=options.num_threads)
    _return_free_memory()
    return engines


def _refuse(options: EngineOptions, name: str, where: str) -> None:
    """Raise `InputError` where the option `name` is given, which applies only elsewhere."""
    if getattr(options, name) is not None:
        raise InputError(f"{name} applies only {where}; leave it out")


def _return_free_memory() -> None:
    """Give what loading has freed back to the system, a third of the process: glibc keeps it on its own."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
