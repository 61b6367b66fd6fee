"""Engines: one graph of a bundle each, numpy arrays in and out, behind a small protocol; and the checks they share."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..bundle import Bundle, StageSpec, TensorSpec
from ..bundle.stages import signature
from ..errors import BackendError, BundleError, InputError


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


class CpuEngine:
    """What the engines of the CPU do alike: `graph` is what `_execute` runs, and `errors` what that raises."""

    def __init__(
        self, bundle: Bundle, stage: str, graph: Any, info: EngineInfo, errors: tuple[type[Exception], ...]
    ) -> None:
        self._name, self._spec = f"{bundle.path}: stage {stage}", bundle.manifest.stages[stage]
        self._graph, self._info, self._errors = graph, info, errors

    def run(self, inputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """All outputs by name; see `Engine.run`. A run that fails, say out of memory, raises `BackendError`."""
        graph = self._graph  # held, so that close() in another thread cannot free it under this run
        if graph is None:
            raise BackendError(f"{self._name}: the engine is closed")
        check_inputs(self._name, self._spec, inputs)
        try:
            return self._execute(graph, dict(inputs))
        except self._errors as error:
            shapes = ", ".join(f"{name} {array.shape}" for name, array in inputs.items())
            raise BackendError(
                f"{self._name}: failed on {shapes}: {one_line(error)}; where memory ran out, lower size or batch"
            ) from error

    def describe(self) -> EngineInfo:
        """Backend, provider, device and precision."""
        return self._info

    def close(self) -> None:
        """Free the graph; closing twice does no harm."""
        self._graph = None

    def _execute(self, graph: Any, inputs: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        raise NotImplementedError


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
    in_manifest, in_graph = signature(stated), signature(actual)
    if in_graph != in_manifest:
        raise BundleError(
            f"{name}: the manifest states the {what} {in_manifest}, the graph has {in_graph}; export it again"
        )


def one_line(message: object) -> str:
    """The start of a library's error message, which may go over many lines, without OpenVINO's places in its code."""
    return " ".join(re.sub(r"Exception from \S+:\s", "", str(message)).split())[:300]
