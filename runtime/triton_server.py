"""What runs inside Triton Inference Server: the Python models of the repository that `flashcocos export-triton` writes.

This has nothing to do with Triton, the language of kernels. The `model.py` of a model there is one of the classes below
with the server's module `triton_python_backend_utils` as its `utils`; the folder of its version is a bundle, with the
files that this model needs.

    Stage      a stage of the bundle in ONNX Runtime on the CPU, for servers without a backend for ONNX
    Warp       the warp, on the CPU or by compiled kernels on a GPU, as the instance's kind says
    Translate  the entry: a `Translator` whose stages are the other models of the repository
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..bundle import Bundle
from ..bundle.stages import stage_tensors, translation_tensors
from ..config import ModelConfig
from ..errors import BackendError, FlashcocosError, InputError
from ..kernels.corr_warp import warp_arrays
from ..preprocess.images import FloatArray, to_uint8
from .cpu.onnxruntime import OnnxRuntimeEngine
from .engine import EngineInfo
from .lru import LruBytes
from .options import EXEMPLAR_CACHE_MIB
from .pipeline import EncodedLabel, Exemplar, PipelineOutput, require_finite
from .translator import Translation, Translator

Arrays = dict[str, npt.NDArray[Any]]


class _Batched:
    """A model that joins the requests of a batch, runs once, and takes the results apart."""

    utils: Any  # the server's module
    inputs: Sequence[str]
    run: Callable[[Arrays], Mapping[str, npt.NDArray[Any]]]

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """A response for each request, whose tensors the server made equal but for their batch."""
        read = self.utils.get_input_tensor_by_name
        parts = [{name: read(request, name).as_numpy() for name in self.inputs} for request in requests]
        try:
            results = self.run({name: np.concatenate([part[name] for part in parts]) for name in self.inputs})
        except FlashcocosError as error:
            return [_refusal(self.utils, error) for _ in requests]
        ends = np.cumsum([len(part[self.inputs[0]]) for part in parts])[:-1]
        rows = {name: np.split(array, ends) for name, array in results.items()}
        return [
            _response(self.utils, {name: arrays[index] for name, arrays in rows.items()})
            for index in range(len(requests))
        ]


class Stage(_Batched):
    """The stage that the model's folder is named after."""

    def initialize(self, arguments: Mapping[str, str]) -> None:
        """Load the graph; the server calls this first."""
        bundle, stage = _bundle(arguments), arguments["model_name"]
        self.inputs = [spec.name for spec in bundle.manifest.stages[stage].inputs]
        self.run = OnnxRuntimeEngine(bundle, stage).run


class Warp(_Batched):
    """theta, phi and values -> warped, and for each position the best match's index and probability."""

    inputs = ("theta", "phi", "values")

    def initialize(self, arguments: Mapping[str, str]) -> None:
        """Load or compile the kernels; the server calls this first."""
        bundle = _bundle(arguments)
        config = bundle.manifest.config
        if arguments["model_instance_kind"] == "GPU":
            from .gpu.warp import HostWarp

            self.run = HostWarp(bundle, int(arguments["model_instance_device_id"])).run
        else:
            self.run = lambda arrays: _warp(config, arrays)
        channels = {"theta": config.feature_channels, "phi": config.feature_channels, "values": config.warped_channels}
        self.run({name: np.ones((1, count, 1, 1), np.float32) for name, count in channels.items()})


class Translate:
    """The entry of the repository: labels and exemplars, or ids of exemplars that came before, to pictures."""

    utils: Any  # the server's module

    def initialize(self, arguments: Mapping[str, str]) -> None:
        """Read what the model is; the server calls this first."""
        bundle = _bundle(arguments)
        self._translator = Translator.over(bundle, _ServerPipeline(bundle, self.utils))
        self._inputs, self._outputs = (
            [spec.name for spec in part] for part in translation_tensors(bundle.manifest.config)
        )
        parameters = json.loads(arguments["model_config"])["parameters"]
        self._max_side = int(parameters["max_side"]["string_value"])
        self._model = bundle.manifest.graph_file("exemplar").sha256
        self._exemplars: LruBytes[Exemplar] = LruBytes(
            EXEMPLAR_CACHE_MIB << 20, lambda exemplar: exemplar.phi.nbytes + exemplar.values.nbytes
        )

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """A response for each request; those that can be translated run together."""
        responses: list[Any] = [None] * len(requests)
        wanted: list[tuple[int, list[tuple[EncodedLabel, str, Exemplar]]]] = []
        for index, request in enumerate(requests):
            try:
                wanted.append((index, self._read(request)))
            except FlashcocosError as error:
                responses[index] = _refusal(self.utils, error)
        items = [item for _, part in wanted for item in part]
        try:
            labels, exemplars = [label for label, _, _ in items], [exemplar for _, _, exemplar in items]
            results = iter(self._translator.translate(labels, exemplars, batch_size=max(1, len(items))))
        except FlashcocosError as error:
            for index, _ in wanted:
                responses[index] = _refusal(self.utils, error)
            return responses
        for index, part in wanted:
            responses[index] = self._answer(requests[index], [(next(results), key) for _, key, _ in part])
        return responses

    def _read(self, request: Any) -> list[tuple[EncodedLabel, str, Exemplar]]:
        """The label, exemplar id and exemplar of each item of a request."""
        tensors = {name: self.utils.get_input_tensor_by_name(request, name) for name in self._inputs}
        arrays = {name: tensor.as_numpy() for name, tensor in tensors.items() if tensor is not None}
        items = [{name: array[row] for name, array in arrays.items()} for row in range(len(arrays["label"]))]
        return [(self._encode_label(item["label"]), *self._exemplar(item)) for item in items]

    def _encode_label(self, label: npt.NDArray[Any]) -> EncodedLabel:
        self._check_size("label", *label.shape[-2:])
        return self._translator.encode_label(label, "input")

    def _check_size(self, name: str, height: int, width: int) -> None:
        if max(height, width) > self._max_side:
            raise InputError(
                f"{name}: {width} x {height} pixels; expected at most {self._max_side} a side: scale it down, or raise "
                "max_side in config.pbtxt"
            )

    def _exemplar(self, item: Arrays) -> tuple[str, Exemplar]:
        """The exemplar of an item and its id, encoded where it is new."""
        picture, label = item.get("exemplar"), item.get("exemplar_label")
        if picture is None:
            if "exemplar_id" not in item:
                raise InputError("give exemplar, or the exemplar_id of an earlier answer")
            key = bytes(item["exemplar_id"][0]).decode(errors="replace")
            if (known := self._exemplars.get(key)) is None:
                raise _UnknownExemplar(
                    f"no exemplar of the id {key[:40]!r}: send the exemplar (again, after a restart)"
                )
            return key, known
        self._check_size("exemplar", *picture.shape[:2])
        digest = hashlib.sha256(self._model.encode())
        for array in (picture, label):
            if array is not None:
                digest.update(repr(array.shape).encode() + array.tobytes())
        key = digest.hexdigest()[:32]
        if (exemplar := self._exemplars.get(key)) is None:
            exemplar = self._translator.encode_exemplar(picture, label, "input")
            self._exemplars.put(key, exemplar)
        return key, exemplar

    def _answer(self, request: Any, results: Sequence[tuple[Translation, str]]) -> Any:
        """The response to a request, of what it asked for."""
        asked = set(request.requested_output_names())
        arrays = {
            name: np.stack([getattr(result, name) for result, _ in results])
            for name in self._outputs
            if name in asked and name != "exemplar_id"
        }
        if "exemplar_id" in asked:
            arrays["exemplar_id"] = np.array([[key.encode()] for _, key in results], object)
        return _response(self.utils, arrays)


class _UnknownExemplar(InputError):
    """An id that nothing in the cache has."""


class _ServerPipeline:
    """The stages as the other models of the repository run them. What one gives, the next takes unopened."""

    def __init__(self, bundle: Bundle, utils: Any) -> None:
        self._name, self._utils, tensors = bundle.path, utils, stage_tensors(bundle.manifest.config)
        self._takes = {stage: [spec.name for spec in inputs] for stage, (inputs, _) in tensors.items()}
        self._gives = {stage: [spec.name for spec in outputs] for stage, (_, outputs) in tensors.items()}
        self._takes["warp"], self._gives["warp"] = list(Warp.inputs), ["warped", "index", "probability"]

    def encode(self, inputs: Mapping[str, npt.NDArray[Any]]) -> tuple[FloatArray, FloatArray]:
        """phi and values of one exemplar, from the inputs of its stage."""
        outputs = self._call("exemplar", self._tensors(inputs))
        phi, values = (np.array(outputs[name].as_numpy()) for name in ("phi", "values"))
        self._require_finite("exemplar", {"phi": phi, "values": values})
        return phi, values

    def encode_label(self, label: npt.NDArray[Any]) -> None:
        """Nothing: theta is made with each picture."""

    def render(
        self, label: npt.NDArray[Any], exemplars: Sequence[Exemplar], thetas: Sequence[FloatArray | None]
    ) -> list[PipelineOutput]:
        """The output for each item of the batch `label`; items whose exemplars have one size run together."""
        by_size: dict[tuple[int, ...], list[int]] = {}
        for index, exemplar in enumerate(exemplars):
            by_size.setdefault(exemplar.size, []).append(index)
        results: dict[int, PipelineOutput] = {}
        for indices in by_size.values():
            results.update(zip(indices, self._render(label[indices], [exemplars[i] for i in indices]), strict=True))
        return [results[index] for index in range(len(label))]

    def describe(self) -> dict[str, EngineInfo]:
        """Nothing: the server's own configuration says what runs each model."""
        return {}

    def close(self) -> None:
        """Nothing: the server ends its models."""

    def _render(self, label: npt.NDArray[Any], exemplars: Sequence[Exemplar]) -> list[PipelineOutput]:
        parts = {name: np.concatenate([getattr(item, name) for item in exemplars]) for name in ("phi", "values")}
        tensors = self._tensors({"label": label, **parts})
        for model in ("query", "warp", "coarse", "fine"):
            tensors |= self._call(model, tensors)
        names = ("image", "warped_image", "index", "probability")
        arrays = {name: tensors[name].as_numpy() for name in names}
        self._require_finite("fine", {name: arrays[name] for name in names[:2]})
        return [
            PipelineOutput(to_uint8(image), to_uint8(warped), index, np.array(probability), {})
            for image, warped, index, probability in zip(*arrays.values(), strict=True)
        ]

    def _call(self, model: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """The outputs of another model of the repository, on the host where this one reads them."""
        utils, memory = self._utils, {}
        if model in ("exemplar", "fine"):
            memory["preferred_memory"] = utils.PreferredMemory(utils.TRITONSERVER_MEMORY_CPU, 0)
        request = utils.InferenceRequest(
            model_name=model,
            inputs=[tensors[name] for name in self._takes[model]],
            requested_output_names=self._gives[model],
            **memory,
        )
        response = request.exec()
        if response.has_error():
            raise BackendError(f"model {model}: {response.error().message()}")
        return {tensor.name(): tensor for tensor in response.output_tensors()}

    def _tensors(self, arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, Any]:
        return {name: _tensor(self._utils, name, array) for name, array in arrays.items()}

    def _require_finite(self, stage: str, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        for name, array in arrays.items():
            require_finite(f"{self._name}: model {stage} gave", name, np.isfinite(array).all())


def _bundle(arguments: Mapping[str, str]) -> Bundle:
    """What `initialize` was called for: the folder of the model's version."""
    return Bundle(Path(arguments["model_repository"], arguments["model_version"]))


def _warp(config: ModelConfig, arrays: Arrays) -> Arrays:
    result = warp_arrays(
        *(arrays[name] for name in Warp.inputs), patch=config.patch, temperature=config.temperature, match=True
    )
    assert result.match is not None  # it was asked for
    return {"warped": result.out, "index": result.match.index, "probability": result.match.probability}


def _tensor(utils: Any, name: str, array: npt.NDArray[Any]) -> Any:
    return utils.Tensor(name, np.ascontiguousarray(array))


def _response(utils: Any, arrays: Mapping[str, npt.NDArray[Any]]) -> Any:
    return utils.InferenceResponse(output_tensors=[_tensor(utils, name, array) for name, array in arrays.items()])


def _refusal(utils: Any, error: FlashcocosError) -> Any:
    """An error with the code that the server turns into status 404, 400 or 503."""
    codes = utils.TritonError
    if isinstance(error, _UnknownExemplar):
        code = codes.NOT_FOUND
    else:
        code = codes.INVALID_ARG if isinstance(error, InputError) else codes.UNAVAILABLE
    return utils.InferenceResponse(output_tensors=[], error=codes(str(error), code))
