"""A model repository without Triton Inference Server: its Python models in this process, over a stand-in for its API.

Only repositories of `--platform python` run here. `tests/export/test_triton_live.py` has the real server.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        assert array.flags.c_contiguous
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class Refusal(Exception):
    """An error response; `code` as in the server."""

    NOT_FOUND, INVALID_ARG, UNAVAILABLE = "NOT_FOUND", "INVALID_ARG", "UNAVAILABLE"

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code

    def message(self) -> str:
        return str(self)


class Response:
    def __init__(self, output_tensors: list[Tensor], error: Refusal | None = None) -> None:
        self._tensors, self._error = output_tensors, error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> Refusal | None:
        return self._error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors


class Request:
    def __init__(self, inputs: Iterable[Tensor], outputs: Iterable[str]) -> None:
        self.inputs, self._outputs = {tensor.name(): tensor for tensor in inputs}, list(outputs)

    def requested_output_names(self) -> list[str]:
        return self._outputs


class FakeServer:
    """The repository's models by name. `batches`: the sizes that each model ran. `refuse`: models that are full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, repository: Path, kinds: dict[str, str] | None = None) -> None:
        self.models: dict[str, Any] = {}
        self.batches: dict[str, list[int]] = {}
        self.refuse: set[str] = set()
        utils = ModuleType("triton_python_backend_utils")
        server = self

        class InferenceRequest(Request):
            def __init__(self, model_name: str, inputs: Any, requested_output_names: Any, **memory: Any) -> None:
                super().__init__(inputs, requested_output_names)
                self._model = model_name

            def exec(self) -> Response:
                return server.execute(self._model, [self])[0]

        members = {
            "Tensor": Tensor, "TritonError": Refusal, "InferenceResponse": Response,
            "InferenceRequest": InferenceRequest, "PreferredMemory": lambda *place: place, "TRITONSERVER_MEMORY_CPU": 0,
            "get_input_tensor_by_name": lambda request, name: request.inputs.get(name),
        }  # fmt: skip
        vars(utils).update(members)
        monkeypatch.setitem(sys.modules, utils.__name__, utils)
        for script in sorted(repository.glob("*/1/model.py")):
            name = script.parts[-3]
            spec = importlib.util.spec_from_file_location(f"model_{name}", script)
            assert spec
            assert spec.loader
            spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
            self.models[name] = module.TritonPythonModel()
            self.models[name].initialize(
                {
                    "model_name": name, "model_repository": str(repository / name), "model_version": "1",
                    "model_instance_kind": (kinds or {}).get(name, "CPU"), "model_instance_device_id": "0",
                    "model_config": '{"parameters": {"max_side": {"string_value": "128"}}}',
                }
            )  # fmt: skip

    def execute(self, model: str, requests: list[Request]) -> list[Response]:
        if model in self.refuse:
            return [Response([], Refusal("Exceeds maximum queue size", "UNAVAILABLE")) for _ in requests]
        self.batches.setdefault(model, []).append(sum(len(next(iter(r.inputs.values())).as_numpy()) for r in requests))
        return self.models[model].execute(requests)

    def ask(self, *requests: dict[str, np.ndarray], outputs: Iterable[str]) -> list[SimpleNamespace | Refusal]:
        """The answers of `translate` to requests that the server has joined: outputs as attributes, or the error."""
        made = [Request((Tensor(name, array) for name, array in inputs.items()), outputs) for inputs in requests]
        responses = self.execute("translate", made)
        return [
            response.error() or SimpleNamespace(**{t.name(): t.as_numpy() for t in response.output_tensors()})
            for response in responses
        ]
