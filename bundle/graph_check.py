"""Refuse ONNX graphs that reach outside themselves, before a runtime sees them.

A tensor in an ONNX file may name another file as its content ("external data"). ONNX Runtime, given a model as bytes,
still opens such files, relative to the working folder (seen with 1.18 and 1.32), so a bundle from a stranger could
read files of its user. The check walks the protobuf encoding itself: the runtime does without the onnx package.
Field numbers: onnx.proto of ONNX 1.16 to 1.23; wire format: protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import BundleError

# message -> field number -> message in that field, for every way from a model down to a tensor
_CHILDREN: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {},
}
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14  # fields of TensorProto
_MAX_DEPTH = 100  # protobuf's own limit of nested messages
_MAX_FIELDS = 1 << 20  # a published network's largest stage has under 20 000; a million take about a second


def refuse_external_data(model: bytes, name: str) -> None:
    """Refuse a model that names other files.

    Args:
        model: a serialized ONNX model.
        name: what to call it in messages.

    Raises:
        BundleError: a tensor lies in another file, or this is no protobuf of sane size and depth.
    """
    try:
        _walk(memoryview(model), "ModelProto", 0, iter(range(_MAX_FIELDS)))
    except _External as error:
        raise BundleError(
            f"{name}: a tensor's content lies in another file, which no bundle may do; export the model again"
        ) from error
    except (ValueError, IndexError) as error:
        raise BundleError(f"{name}: not a readable ONNX file: {error}") from error


class _External(Exception):
    """A tensor names another file."""


def _walk(message: memoryview, kind: str, depth: int, budget: Iterator[int]) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError(f"more than {_MAX_DEPTH} nested messages")
    for number, content in _fields(message):
        if next(budget, None) is None:
            raise ValueError(f"more than {_MAX_FIELDS} fields")
        if kind == "TensorProto" and (number == _EXTERNAL_DATA or (number == _DATA_LOCATION and content != 0)):
            raise _External
        child = _CHILDREN[kind].get(number)
        if child is not None and isinstance(content, memoryview):
            _walk(content, child, depth + 1, budget)


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, integer or bytes) of each field; `ValueError` or `IndexError` where the encoding is broken."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        if not 8 <= tag < 1 << 32:  # 0 is no field; parsers differ on bits above 32, behind which a field could hide
            raise ValueError("a field number out of range")
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            value, position = _varint(message, position)
            yield number, value
            continue
        if wire_type == 2:
            size, position = _varint(message, position)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"unexpected wire type {wire_type}")  # groups: in no ONNX file
        if position + size > len(message):
            raise ValueError("cut short")
        if wire_type == 2:
            yield number, message[position : position + size]
        position += size


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number of more than 64 bits")
