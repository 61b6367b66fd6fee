"""The bytes of the protocol KServe v2: requests for translations as tensors, in JSON or binary, and answers.

A request is JSON, or JSON of as many bytes as the header Inference-Header-Content-Length says and then the tensors
whose parameters state a `binary_data_size`, one after the other; so is an answer. What a request may hold is
`bundle.stages.translation_tensors`, a batch of one. Whatever else it holds is refused with status 400.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from ..bundle import TensorSpec
from ..bundle.stages import translation_tensors
from ..config import ModelConfig
from ..runtime import Translation
from .errors import ApiError

HEADER = "Inference-Header-Content-Length"
_DATATYPES = {"uint8": "UINT8", "float32": "FP32", "bytes": "BYTES"}
_MAX_STRING = 256  # bytes
_Parameters = dict[str, bool | int | float | str | None]
_Byte = Annotated[int, msgspec.Meta(ge=0, le=255)]


class TensorMetadata(msgspec.Struct):
    """A tensor of the model; a side of -1 is any."""

    name: str
    datatype: str
    shape: list[int]


class ServerMetadata(msgspec.Struct):
    """What answers at /v2."""

    name: str
    version: str
    extensions: list[str]


class ModelMetadata(msgspec.Struct):
    """The model's tensors. Of the inputs, a request has label, and the exemplar or its id."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ModelReady(msgspec.Struct):
    """That the model translates."""

    name: str
    ready: bool


class InferInput(msgspec.Struct):
    """A tensor of a request; its numbers are in `data`, or behind the JSON."""

    name: str
    shape: list[int]
    datatype: str
    parameters: _Parameters = {}
    data: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)


class InferOutput(msgspec.Struct):
    """A tensor that a request asks for."""

    name: str
    parameters: _Parameters = {}


class InferRequest(msgspec.Struct):
    """The JSON of a request; without `outputs` it asks for all."""

    inputs: list[InferInput]
    outputs: list[InferOutput] = []
    id: Annotated[str, msgspec.Meta(max_length=_MAX_STRING)] = ""
    parameters: _Parameters = {}


class TensorReply(msgspec.Struct, omit_defaults=True):
    """A tensor of an answer; its numbers are in `data`, or behind the JSON."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, int] = {}
    data: list[int | float | str] | None = None


class InferReply(msgspec.Struct, omit_defaults=True):
    """The JSON of an answer."""

    model_name: str
    outputs: list[TensorReply]
    id: str = ""


class Refusal(msgspec.Struct):
    """The body of every answer under /v2 that is no success."""

    error: str


@dataclasses.dataclass(frozen=True)
class Inference:
    """A request as read: its one item's arrays by name, the exemplar's id or "", and each output with whether it is
    to come as bytes."""

    id: str
    arrays: Mapping[str, npt.NDArray[np.uint8]]
    exemplar_id: str
    outputs: Mapping[str, bool]


class Reply(NamedTuple):
    """An answer as it is sent."""

    body: bytes
    media_type: str
    headers: dict[str, str]


def metadata(config: ModelConfig, name: str, version: str) -> ModelMetadata:
    """What /v2/models/NAME says."""
    inputs, outputs = ([_metadata(spec) for spec in part] for part in translation_tensors(config))
    return ModelMetadata(name, [version], "flashcocos", inputs, outputs)


def read_request(config: ModelConfig, body: bytes, header: str | None) -> Inference:
    """Parse and validate a body.

    Args:
        config: of the model.
        body: the whole of it.
        header: the value of `HEADER`; None where all is JSON.

    Raises:
        ApiError: 400, with what was expected.
    """
    length = len(body) if header is None else _length(header, len(body))
    try:
        request = msgspec.json.decode(body[:length], type=InferRequest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _malformed(f"the request is not the JSON of KServe v2: {str(error)[:200]}") from error
    accepted, given = (tuple(translation_tensors(config)[part]) for part in (0, 1))
    arrays: dict[str, npt.NDArray[np.uint8]] = {}
    exemplar_id, offset = "", length
    known = {spec.name: spec for spec in accepted}
    for tensor in request.inputs:
        spec = known.pop(tensor.name, None)
        if spec is None:
            raise _malformed(
                f"input {tensor.name[:40]!r}: expected each at most once of {', '.join(s.name for s in accepted)}"
            )
        _check(tensor, spec)
        size = tensor.parameters.get("binary_data_size")
        part = None
        if size is not None:
            if type(size) is not int or not 0 <= size <= len(body) - offset:
                raise _malformed(f"{tensor.name}: binary_data_size {size!r:.40}; {len(body) - offset} bytes are left")
            part, offset = body[offset : offset + size], offset + size
        if spec.dtype == "bytes":
            exemplar_id = _read_string(tensor, part)
        else:
            arrays[tensor.name] = _read_array(tensor, part)
    if offset != len(body):
        raise _malformed(f"{len(body) - offset} bytes more than the inputs state")
    if "label" not in arrays or ("exemplar" not in arrays and not exemplar_id):
        raise _malformed("inputs: expected label, and exemplar or the exemplar_id of an earlier answer")
    return Inference(request.id, arrays, exemplar_id, _wanted(request, given))


def write_reply(config: ModelConfig, name: str, inference: Inference, result: Translation, exemplar_id: str) -> Reply:
    """The answer of the model `name`: what the request wants of a translation."""
    replies, parts = [], []
    for spec in translation_tensors(config)[1]:
        if spec.name not in inference.outputs:
            continue
        value = getattr(result, spec.name, None)  # nothing has the name exemplar_id
        reply = TensorReply(spec.name, _DATATYPES[spec.dtype], [1, 1] if value is None else [1, *value.shape])
        if inference.outputs[spec.name]:
            parts.append(_string_bytes(exemplar_id) if value is None else _array_bytes(value))
            reply.parameters = {"binary_data_size": len(parts[-1])}
        else:
            reply.data = [exemplar_id] if value is None else value.ravel().tolist()
        replies.append(reply)
    head = msgspec.json.encode(InferReply(name, replies, inference.id))
    if not parts:
        return Reply(head, "application/json", {})
    return Reply(b"".join([head, *parts]), "application/octet-stream", {HEADER.lower(): str(len(head))})


def _length(header: str, size: int) -> int:
    if not re.fullmatch("[0-9]{1,10}", header) or not int(header) <= size:
        raise _malformed(f"{HEADER} {header[:40]!r}: expected the bytes of the JSON, 0 to {size}")
    return int(header)


def _check(tensor: InferInput, spec: TensorSpec) -> None:
    """Refuse what is not of the type and shape that the model takes."""
    expected = _metadata(spec)
    if tensor.datatype != expected.datatype:
        raise _malformed(f"{tensor.name}: datatype {tensor.datatype[:20]!r}; expected {expected.datatype}")
    fits = len(tensor.shape) == len(expected.shape) and all(
        side >= 1 and wanted in (-1, side) for side, wanted in zip(tensor.shape, expected.shape, strict=True)
    )
    if not fits:
        raise _malformed(
            f"{tensor.name}: shape {str(tensor.shape[:8])[:60]}; expected {expected.shape}, -1 for any side"
        )


def _read_array(tensor: InferInput, part: bytes | None) -> npt.NDArray[np.uint8]:
    """The numbers of the one item, from the bytes behind the JSON or from its list, which may be nested."""
    array = np.array(_items(tensor, list[_Byte]), np.uint8) if part is None else np.frombuffer(part, np.uint8)
    if array.size != math.prod(tensor.shape):
        raise _malformed(
            f"{tensor.name}: {array.size} numbers; its shape {str(tensor.shape[:8])[:60]} is of another count"
        )
    return array.reshape(tensor.shape[1:])


def _read_string(tensor: InferInput, part: bytes | None) -> str:
    if part is None:
        items: list[str] = _items(tensor, list[str])
    else:
        size = int.from_bytes(part[:4], "little")  # a string is its length and then its bytes
        items = [part[4:].decode(errors="replace")] if len(part) == 4 + size else []
    if len(items) != 1 or len(items[0]) > _MAX_STRING:
        raise _malformed(f"{tensor.name}: expected one string of at most {_MAX_STRING} bytes")
    return items[0]


def _items(tensor: InferInput, kind: Any) -> Any:
    """`data` without its inner brackets, which only repeat the shape."""
    text = bytes(tensor.data)
    if not text:
        raise _malformed(f"{tensor.name}: expected data, or binary_data_size and the header {HEADER}")
    try:
        return msgspec.json.decode(b"[" + text.translate(None, b"[]") + b"]", type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _malformed(f"{tensor.name}: data: {str(error)[:200]}") from error


def _wanted(request: InferRequest, given: tuple[TensorSpec, ...]) -> dict[str, bool]:
    """The outputs that a request wants, each with whether it comes as bytes."""
    names = [spec.name for spec in given]
    default = request.parameters.get("binary_data_output", False) is True
    if not request.outputs:
        return dict.fromkeys(names, default)
    if wrong := [output.name for output in request.outputs if output.name not in names]:
        raise _malformed(f"output {wrong[0][:40]!r}: expected some of {', '.join(names)}")
    return {output.name: output.parameters.get("binary_data", default) is True for output in request.outputs}


def _string_bytes(text: str) -> bytes:
    """Its length and then its bytes."""
    return len(text.encode()).to_bytes(4, "little") + text.encode()


def _array_bytes(array: npt.NDArray[Any]) -> bytes:
    return array.astype(array.dtype.newbyteorder("<")).tobytes()


def _metadata(spec: TensorSpec) -> TensorMetadata:
    shape = [side if isinstance(side, int) else -1 for side in spec.shape]
    return TensorMetadata(spec.name, _DATATYPES[spec.dtype], [1, *shape[1:]])


def _malformed(message: str) -> ApiError:
    return ApiError(400, "malformed", message)
