"""The engine over ONNX Runtime on the CPU, and its sessions on a GPU for the GPU pipeline.

ONNX Runtime falls back to the CPU on its own in several places (an absent provider, a library that does not load, a
failing run); all of them are switched off or detected, so that what runs is what was asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy.typing as npt

from ...bundle import Bundle, TensorSpec
from ...bundle.graph_check import refuse_external_data
from ...errors import BackendError, BundleError
from ..engine import CpuEngine, EngineInfo, check_tensors, one_line
from .denormals import denormals_as_zero

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_INSTALLS = {"cpu": "pip install flashcocos[cpu]", "cuda": "pip install flashcocos[gpu], or choose device cpu"}
_TYPES = {"tensor(float)": "float32", "tensor(uint8)": "uint8"}


class OnnxRuntimeEngine(CpuEngine):
    """A stage of `bundle` in an ONNX Runtime session on the CPU.

    num_threads: intra-op threads; None leaves the number to ONNX Runtime (one per core).
    Raises as `open_session`.
    """

    def __init__(self, bundle: Bundle, stage: str, *, num_threads: int | None = None) -> None:
        session, info = open_session(bundle, stage, num_threads=num_threads)
        super().__init__(bundle, stage, session, info, onnxruntime_errors())

    def _execute(self, graph: Any, inputs: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        names = [tensor.name for tensor in self._spec.outputs]
        with denormals_as_zero():  # this thread works too, and the session sets its own threads alone
            return dict(zip(names, graph.run(names, inputs), strict=True))


def open_session(
    bundle: Bundle,
    stage: str,
    *,
    device: str = "cpu",
    num_threads: int | None = None,
    options: Mapping[str, str] | None = None,
) -> tuple[Any, EngineInfo]:
    """ONNX Runtime's session of a stage on `device`, "cpu" or "cuda", and what it runs on. options: of the provider.

    Raises `BackendError` where onnxruntime or the device is not there, `BundleError` where the graph cannot be loaded,
    has other inputs or outputs than the manifest states, or refers to files.
    """
    runtime = import_onnxruntime()
    provider = _PROVIDERS[device]
    if provider not in runtime.get_available_providers():
        raise BackendError(f"device {device!r}: this onnxruntime has no {provider}; {_INSTALLS[device]}")
    if device == "cuda":
        getattr(runtime, "preload_dlls", lambda: None)()  # of the wheels for CUDA and cuDNN, where no system has them
    name, spec = f"{bundle.path}: stage {stage}", bundle.manifest.stages[stage]
    model = bundle.read_stage(stage)
    refuse_external_data(model, name)
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = num_threads or 0
    settings.enable_cpu_mem_arena = False  # the arena never gives back: 1 GB more at the peak, 2 GB between runs
    settings.log_severity_level = 4  # what goes wrong is raised, not printed
    # int8 products that saturate would be faster on CPUs without VNNI, and cost up to 13 dB
    settings.add_session_config_entry("session.x64quantprecision", "1")
    settings.add_session_config_entry("session.load_model_format", "ONNX")  # never guessed from the bytes
    settings.add_session_config_entry("session.set_denormal_as_zero", "1" if device == "cpu" else "0")
    providers = [(provider, dict(options)) if options else provider]

    def create() -> Any:
        return runtime.InferenceSession(model, settings, providers=providers, enable_fallback=0)

    try:
        if device == "cpu":
            # a process's first session leaves its setting for denormal numbers on in the thread that made it
            with ThreadPoolExecutor(1) as thread:
                session = thread.submit(create).result()
        else:
            session = create()
    except onnxruntime_errors() as error:
        message = f"{name}: onnxruntime cannot load the graph on {device}: {one_line(error)}"
        # on the CPU only the graph can be at fault
        raise (BundleError if device == "cpu" else BackendError)(message) from error
    session._model_bytes = None  # kept for the fallback that is switched off, and as large as the weights
    if provider not in session.get_providers():
        raise BackendError(
            f"device {device!r}: onnxruntime could not start {provider} and would use "
            f"{', '.join(session.get_providers())}; check the driver and CUDA libraries, or {_INSTALLS[device]}"
        )
    check_tensors(name, "inputs", spec.inputs, map(_tensor, session.get_inputs()))
    check_tensors(name, "outputs", spec.outputs, map(_tensor, session.get_outputs()))
    version, precision = f"onnxruntime {runtime.__version__}", bundle.manifest.precision
    return session, EngineInfo(version, provider, device, precision, "float32")


def has_provider(device: str) -> bool:
    """Whether the installed onnxruntime was built for `device`; `BackendError` where there is no onnxruntime."""
    return _PROVIDERS[device] in available_providers()


def available_providers() -> list[str]:
    """The execution providers of the installed onnxruntime; `BackendError` where there is none."""
    return list(import_onnxruntime().get_available_providers())


def import_onnxruntime() -> Any:
    """The package; `BackendError` where it is missing."""
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise BackendError(
            f"backend 'onnxruntime' cannot be imported ({error}); pip install flashcocos[cpu], or on an NVIDIA GPU "
            "pip install flashcocos[gpu]"
        ) from error


def onnxruntime_errors() -> tuple[type[Exception], ...]:
    """What onnxruntime raises: its exceptions share no base class short of Exception."""
    state = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    members = [member for member in vars(state).values() if isinstance(member, type)]
    return (*(member for member in members if issubclass(member, Exception)), RuntimeError, ValueError, MemoryError)


def _tensor(port: Any) -> TensorSpec:
    return TensorSpec(port.name, _TYPES.get(port.type, port.type), tuple(port.shape))
