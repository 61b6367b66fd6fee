"""Engines: one graph of a bundle each, numpy arrays in and out, behind one small protocol.

The engine here is ONNX Runtime's; OpenVINO's is in openvino_engine.py. ONNX Runtime falls back to the CPU on its own
in several places (an absent provider, a library that does not load, a failing run); all of them are switched off or
detected, so that what runs is what was asked for.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..bundle import STAGES, Bundle, StageSpec, TensorSpec
from ..bundle.graph_check import refuse_external_data
from ..bundle.stages import signature
from ..errors import BackendError, BundleError, InputError

BACKENDS = ("onnxruntime", "openvino")
ARITHMETIC = ("float32", "bfloat16")
DEVICES = ("auto", "cpu", "cuda")
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_EXTRAS = {"cpu": "pip install flashcocos[cpu]", "cuda": "pip install flashcocos[gpu]"}
_TYPES = {"tensor(float)": "float32", "tensor(uint8)": "uint8"}
_log = logging.getLogger("flashcocos.runtime")


@dataclasses.dataclass(frozen=True)
class EngineInfo:
    """What runs a graph: backend with version, provider, device, precision of the stored weights, and arithmetic."""

    backend: str
    provider: str
    device: str
    precision: str
    arithmetic: str


class Engine(Protocol):
    """One graph, ready to run. `run` may be called from several threads at once."""

    def run(self, inputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """All outputs by name; `InputError` for inputs that the graph does not take."""
        ...

    def describe(self) -> EngineInfo:
        """What runs this graph."""
        ...

    def close(self) -> None:
        """Free the graph's memory; a later `run` raises `BackendError`."""
        ...


class OnnxRuntimeEngine:
    """A stage of `bundle` in an ONNX Runtime session on `device`, "cpu" or "cuda".

    threads: intra-op threads on the CPU; None leaves the number to ONNX Runtime (one per core).
    Raises as `open_session`.
    """

    def __init__(self, bundle: Bundle, stage: str, *, device: str = "cpu", threads: int | None = None) -> None:
        self._name = f"{bundle.path}: stage {stage}"
        self._spec = bundle.manifest.stages[stage]
        self._session, self._info = open_session(bundle, stage, device=device, threads=threads)
        self._errors = onnxruntime_errors()

    def run(self, inputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """All outputs by name; see `Engine.run`. A run that fails, say out of memory, raises `BackendError`."""
        session = self._session  # held, so that close() in another thread cannot free it under this run
        if session is None:
            raise BackendError(f"{self._name}: the engine is closed")
        check_inputs(self._name, self._spec, inputs)
        names = [tensor.name for tensor in self._spec.outputs]
        try:
            return dict(zip(names, session.run(names, dict(inputs)), strict=True))
        except self._errors as error:
            shapes = ", ".join(f"{name} {array.shape}" for name, array in inputs.items())
            raise BackendError(
                f"{self._name}: failed on {shapes}: {one_line(error)}; where memory ran out, lower size or batch"
            ) from error

    def describe(self) -> EngineInfo:
        """Backend, provider, device and precision."""
        return self._info

    def close(self) -> None:
        """Free the session; closing twice does no harm."""
        self._session = None


def open_session(
    bundle: Bundle,
    stage: str,
    *,
    device: str = "cpu",
    threads: int | None = None,
    options: Mapping[str, str] | None = None,
) -> tuple[Any, EngineInfo]:
    """ONNX Runtime's session of a stage, and what it runs on. options: of the execution provider.

    Raises `BackendError` where onnxruntime or the device is not there, `BundleError` where the graph cannot be loaded,
    has other inputs or outputs than the manifest states, or refers to files.
    """
    runtime = _import_onnxruntime()
    provider = _PROVIDERS[device]
    if provider not in runtime.get_available_providers():
        raise BackendError(f"device {device!r}: this onnxruntime has no {provider}; {_EXTRAS[device]}")
    name, spec = f"{bundle.path}: stage {stage}", bundle.manifest.stages[stage]
    model = bundle.read_stage(stage)
    refuse_external_data(model, name)
    chosen = runtime.SessionOptions()
    chosen.intra_op_num_threads = threads or 0
    chosen.enable_cpu_mem_arena = False  # the arena never gives back: 1 GB more at the peak, 2 GB between runs
    chosen.log_severity_level = 4  # what goes wrong is raised, not printed
    # int8 products that saturate would be faster on CPUs without VNNI, and cost up to 13 dB
    chosen.add_session_config_entry("session.x64quantprecision", "1")
    chosen.add_session_config_entry("session.load_model_format", "ONNX")  # never guessed from the bytes
    providers = [(provider, dict(options)) if options else provider]
    try:
        session = runtime.InferenceSession(model, chosen, providers=providers, enable_fallback=0)
    except onnxruntime_errors() as error:
        message = f"{name}: onnxruntime cannot load the graph on {device}: {one_line(error)}"
        # on the CPU only the graph can be at fault
        raise (BundleError if device == "cpu" else BackendError)(message) from error
    session._model_bytes = None  # kept for the fallback that is switched off, and as large as the weights
    if provider not in session.get_providers():
        raise BackendError(
            f"device {device!r}: onnxruntime could not start {provider} and would use "
            f"{', '.join(session.get_providers())}; check the driver and CUDA libraries, or {_EXTRAS[device]}"
        )
    check_tensors(name, "inputs", spec.inputs, map(_tensor, session.get_inputs()))
    check_tensors(name, "outputs", spec.outputs, map(_tensor, session.get_outputs()))
    version, precision = f"onnxruntime {runtime.__version__}", bundle.manifest.precision
    return session, EngineInfo(version, provider, device, precision, "float32")


def open_engines(
    bundle: Bundle,
    *,
    backend: str = "onnxruntime",
    device: str = "auto",
    threads: int | None = None,
    precision: str = "float32",
) -> dict[str, Engine]:
    """An engine for every stage of `bundle`, by name, all on one device.

    device: "cpu", "cuda", or "auto": CUDA where it starts, else the CPU; the choice is logged. OpenVINO is for the CPU.
    precision: of the arithmetic, "float32", or with OpenVINO "bfloat16".
    Raises as `OnnxRuntimeEngine` and `OpenVinoEngine`, and `InputError` for options unknown or of another backend.
    """
    for name, value, known in (
        ("backend", backend, BACKENDS),
        ("device", device, DEVICES),
        ("precision", precision, ARITHMETIC),
    ):
        if value not in known:
            raise InputError(f"unknown {name} {value!r}; expected one of {', '.join(known)}")
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise InputError(f"threads: expected a whole number from 1, or None for one per core; got {threads!r}")
    if backend == "openvino":
        if device == "cuda":
            raise InputError("backend 'openvino' is for the CPU, got device 'cuda'; use backend onnxruntime")
        from .cpu.openvino import OpenVinoEngine  # not at the top, for it builds on this module

        return _open_all(bundle, lambda stage: OpenVinoEngine(bundle, stage, threads=threads, precision=precision))
    if precision != "float32":
        raise InputError(f"backend 'onnxruntime' computes in float32, got precision {precision!r}; use openvino")
    if device != "auto":
        return _open_all(bundle, lambda stage: OnnxRuntimeEngine(bundle, stage, device=device, threads=threads))
    if has_provider("cuda"):
        try:
            chosen = open_engines(bundle, backend=backend, device="cuda", threads=threads)
            _log.info("device auto: cuda")
            return chosen
        except BackendError as error:
            _log.warning("device auto: cpu, because cuda does not start: %s", error)
    else:
        _log.info("device auto: cpu (this onnxruntime has no CUDA provider)")
    return open_engines(bundle, backend=backend, device="cpu", threads=threads)


def has_provider(device: str) -> bool:
    """Whether the installed onnxruntime was built for `device`; `BackendError` where there is no onnxruntime."""
    return _PROVIDERS[device] in available_providers()


def available_providers() -> list[str]:
    """The execution providers of the installed onnxruntime; `BackendError` where there is none."""
    return list(_import_onnxruntime().get_available_providers())


def check_inputs(name: str, spec: StageSpec, inputs: Mapping[str, npt.NDArray[Any]]) -> None:
    """Raise `InputError` where `inputs` are not those of the stage `spec`, called `name` in messages."""
    expected = {tensor.name: tensor for tensor in spec.inputs}
    if set(inputs) != set(expected):
        raise InputError(f"{name}: takes the inputs {sorted(expected)}, got {sorted(inputs)}")
    for key, array in inputs.items():
        tensor = expected[key]
        fits = len(tensor.shape) == array.ndim and all(
            isinstance(side, str) or side == size for side, size in zip(tensor.shape, array.shape, strict=True)
        )
        if array.dtype != np.dtype(tensor.dtype) or not fits:
            raise InputError(f"{name}: {key}: expected {tensor.dtype} {tensor.shape}, got {array.dtype} {array.shape}")


def check_tensors(name: str, what: str, stated: Iterable[TensorSpec], actual: Iterable[TensorSpec]) -> None:
    """Raise `BundleError` where a graph's actual inputs or outputs (`what`) are not those that the manifest states."""
    expected, found = signature(stated), signature(actual)
    if found != expected:
        raise BundleError(f"{name}: the manifest states the {what} {expected}, the graph has {found}; export it again")


def one_line(message: object) -> str:
    """The start of a library's error message, which may go over many lines."""
    return " ".join(str(message).split())[:300]


def _open_all(bundle: Bundle, create: Callable[[str], Engine]) -> dict[str, Engine]:
    # the largest first, for loading a graph takes three times its size for a moment
    manifest = bundle.manifest
    sizes = {stage: manifest.files[manifest.stages[stage].file].bytes for stage in STAGES}
    engines = {stage: create(stage) for stage in sorted(STAGES, key=sizes.__getitem__, reverse=True)}
    _return_free_memory()
    return engines


def _return_free_memory() -> None:
    """Give what loading has freed back to the system, a third of the process: glibc keeps it on its own."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _import_onnxruntime() -> Any:
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise BackendError(
            f"backend 'onnxruntime' cannot be imported ({error}); {_EXTRAS['cpu']}, "
            f"or on an NVIDIA GPU {_EXTRAS['cuda']}"
        ) from error


def onnxruntime_errors() -> tuple[type[Exception], ...]:
    """What onnxruntime raises: its exceptions share no base class short of Exception."""
    state = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    members = [member for member in vars(state).values() if isinstance(member, type)]
    return (*(member for member in members if issubclass(member, Exception)), RuntimeError, ValueError, MemoryError)


def _tensor(port: Any) -> TensorSpec:
    return TensorSpec(port.name, _TYPES.get(port.type, port.type), tuple(port.shape))
