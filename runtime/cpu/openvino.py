"""The engine over OpenVINO, for CPUs: computes in float32, or in bfloat16 where that is asked for and the CPU has it.

Its convolutions take no weights whose number only a run tells, which a bundle's graphs have: the columns of the label
classes that occur (export/inference.py). Here every class counts as occurring, to the same result by planes of zeros.
And what export/winograd.py and export/windows.py have written in another form becomes convolutions again.
"""

from __future__ import annotations

import importlib
import io
import sys
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from ...bundle import Bundle, TensorSpec
from ...bundle.graph_check import refuse_external_data
from ...bundle.stages import WINDOWS, WINOGRAD
from ...errors import BackendError, BundleError
from ..engine import CpuEngine, EngineInfo, check_tensors, one_line

_HINTS = {"float32": "f32", "bfloat16": "bf16"}
_TYPES = {"f32": "float32", "u8": "uint8", "i32": "int32", "i64": "int64"}
_TELEMETRY = "openvino_telemetry"


class OpenVinoEngine(CpuEngine):
    """A stage of `bundle` in OpenVINO on the CPU, computing in `precision`, "float32" or "bfloat16".

    num_threads: None leaves the number to OpenVINO (one per core).
    Raises `BackendError` where openvino is not there or cannot run the graph, or the CPU lacks the precision;
    `BundleError` where the graph cannot be read, has other inputs or outputs than the manifest states, or refers to
    files.
    """

    def __init__(
        self, bundle: Bundle, stage: str, *, num_threads: int | None = None, precision: str = "float32"
    ) -> None:
        openvino = _import_openvino()
        core = openvino.Core()
        if precision not in (known := _precisions(core)):
            raise BackendError(
                f"precision {precision!r}: openvino computes in {' or '.join(known)} on this CPU, "
                f"{core.get_property('CPU', 'FULL_DEVICE_NAME')}; use one of these, or a CPU with AVX-512 BF16 or AMX"
            )
        version, stored = openvino.__version__.partition("-")[0], bundle.manifest.precision
        info = EngineInfo(f"openvino {version}", "CPU", "cpu", stored, precision)
        super().__init__(bundle, stage, None, info, _openvino_errors())
        graph = self._read(bundle.read_stage(stage))
        broken: tuple[type[Exception], ...] = (KeyError, *self._errors)
        try:
            _restore_convolutions(graph)
            _restore_label_convolutions(graph)
        except broken as error:
            raise BundleError(
                f"{self._name}: a convolution has a form that flashcocos does not write; export it again"
            ) from error
        if bundle.manifest.config.label_kind == "classes":
            _let_every_class_occur(graph, bundle.manifest.config.label_channels)
        check_tensors(self._name, "inputs", self._spec.inputs, _tensors(graph.inputs, self._spec.inputs))
        check_tensors(self._name, "outputs", self._spec.outputs, _tensors(graph.outputs, self._spec.outputs))
        self._running = threading.Lock()  # it runs one request at a time anyway, and gives memory back only when idle
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": _HINTS[precision], "PERFORMANCE_HINT": "LATENCY"}
        if num_threads is not None:
            options["INFERENCE_NUM_THREADS"] = num_threads
        try:
            self._graph = core.compile_model(graph, "CPU", options)
        except self._errors as error:
            raise BackendError(
                f"{self._name}: openvino cannot run the graph: {one_line(error)}; use backend onnxruntime"
            ) from error
        used = self._graph.get_property("INFERENCE_PRECISION_HINT").to_string()
        if used != _HINTS[precision]:  # what the plugin cannot do it replaces without a word
            raise BackendError(f"precision {precision!r}: openvino would compute in {used} on this CPU")

    def _execute(self, graph: Any, inputs: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        with self._running:
            results = graph.create_infer_request().infer(inputs)
            graph.release_memory()  # else each stage keeps what its largest run took: 1 GB of 5 at 512 px
        return {tensor.name: results[tensor.name] for tensor in self._spec.outputs}

    def _read(self, model: bytes) -> Any:
        refuse_external_data(model, self._name)
        try:
            # this frontend by name, for core.read_model guesses the format from the bytes
            frontend = importlib.import_module("openvino.frontend").FrontEndManager().load_by_framework("onnx")
            return frontend.convert(frontend.load(io.BytesIO(model)))
        except self._errors as error:
            raise BundleError(f"{self._name}: openvino cannot load the graph: {one_line(error)}") from error


def cpu_precisions() -> tuple[str, ...]:
    """What the installed openvino computes in on this CPU; `BackendError` where there is no openvino."""
    return _precisions(_import_openvino().Core())


def _precisions(core: Any) -> tuple[str, ...]:
    return ("float32", "bfloat16") if "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES") else ("float32",)


def _let_every_class_occur(graph: Any, classes: int) -> None:
    """Put 0, 1, ... `classes` - 1 in place of the list of classes that occur: a NonZero of one flag a class."""
    every = importlib.import_module("openvino.op").Constant(np.arange(classes, dtype=np.int64)[None])
    for node in graph.get_ops():
        if node.get_type_name() == "NonZero" and _shape(node.input_value(0)) == (classes,):
            node.output(0).replace(every.output(0))
    graph.validate_nodes_and_infer_types()


def _values(graph: Any) -> dict[str, Any]:
    """The outputs of all operators by name."""
    return {name: value for node in graph.get_ops() for value in node.outputs() for name in value.get_names()}


def _restore_convolutions(graph: Any) -> None:
    """Undo the Winograd form of convolutions, by the names that export/winograd.py gives to its tensors."""
    operators, values = importlib.import_module("openvino.opset13"), _values(graph)
    for whole in [name for name in values if name.startswith(f"{WINOGRAD}whole_")]:
        result = whole.removeprefix(f"{WINOGRAD}whole_")
        x, weight = (values[f"{WINOGRAD}{part}_{result}"].get_node().input_value(0) for part in ("input", "weight"))
        pads = values[f"{WINOGRAD}tiles_{result}"].get_node().get_attributes()["pads_begin"]
        convolution = operators.convolution(x, weight, [1, 1], pads, pads, [1, 1])
        values[whole].replace(convolution.output(0))


def _restore_label_convolutions(graph: Any) -> None:
    """Undo the form of export/windows.py, by the names of its tensors: OpenVINO cuts its int64 numbers to 32 bits."""
    operators, values = importlib.import_module("openvino.opset13"), _values(graph)
    for each in [name for name in values if name.startswith(f"{WINDOWS}each_")]:
        result = each.removeprefix(f"{WINDOWS}each_")
        scaled, bias = values[f"{WINDOWS}table_{result}"].get_node().input_values()  # (inputs weight^T) 1 + bias
        product = scaled.get_node().input_value(0)
        (inputs,) = product.get_node().input_value(0).get_names()
        features = values[inputs.removeprefix(f"{WINDOWS}inputs_")]
        weight = values[f"{WINDOWS}weight_{result}"].get_node().input_value(0)
        convolution = operators.convolution(features, weight, [1, 1], [0, 0], [0, 0], [1, 1])
        column = operators.reshape(bias, [1, -1, 1, 1], special_zero=False)
        values[result].replace(operators.add(convolution, column).output(0))


def _tensors(ports: list[Any], stated: tuple[TensorSpec, ...]) -> list[TensorSpec]:
    """What the graph's inputs or outputs are; of a tensor's several names the stated one."""
    specs = []
    for port in ports:
        names = sorted(port.get_names())
        name = next((tensor.name for tensor in stated if tensor.name in names), names[0] if names else "")
        kind = port.get_element_type().to_string()
        specs.append(TensorSpec(name, _TYPES.get(kind, kind), _shape(port)))
    return specs


def _shape(port: Any) -> tuple[int | str, ...]:
    shape = port.get_partial_shape()
    return tuple(side.get_length() if side.is_static else "?" for side in shape) if shape.rank.is_static else ("?",)


def _import_openvino() -> Any:
    # openvino reports over the network that it was imported, unless it finds no package to do so
    silenced = "openvino" not in sys.modules and _TELEMETRY not in sys.modules
    if silenced:
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise BackendError(
            f"backend 'openvino' cannot be imported ({error}); pip install flashcocos[openvino]"
        ) from error
    finally:
        if silenced:
            del sys.modules[_TELEMETRY]


def _openvino_errors() -> tuple[type[Exception], ...]:
    # its frontends' exceptions share no base class short of Exception
    members = vars(importlib.import_module("openvino.frontend")).values()
    failures = (member for member in members if isinstance(member, type) and issubclass(member, Exception))
    return (*failures, RuntimeError, ValueError, MemoryError)
