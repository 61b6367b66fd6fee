"""Model files: the weights of one `CoCosNet` as safetensors, its configuration and provenance in the file's metadata.

Spectral norm is folded into the weights on saving, so a model file is ready for inference and export. A file may come
from anyone: names, shapes, dtypes and values are checked before use, and safetensors holds no code.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import struct
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config import ModelConfig
from ..errors import CheckpointError, InputError
from ..files import atomic_path, require_file
from .networks import CoCosNet
from .networks.layers import folded_state

FORMAT = "flashcocos-model"
FORMAT_VERSION = "2"
# what torch.load raises for damaged files, seen on thousands of randomly altered ones
_LOAD_ERRORS = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
    OverflowError,
    MemoryError,
    struct.error,
    pickle.UnpicklingError,
)


def save_model(path: str | os.PathLike[str], model: CoCosNet, provenance: dict[str, Any] | None = None) -> None:
    """Write a model file atomically, float32, spectral norm folded.

    Args:
        path: the file, .safetensors.
        model: the network, as it is trained or folded already.
        provenance: any JSON object, about where the weights come from.
    """
    save_state(path, model.config, folded_state(model), provenance)


def save_state(
    path: str | os.PathLike[str], config: ModelConfig, state: dict[str, Tensor], provenance: dict[str, Any] | None
) -> None:
    """`save_model` for the folded state dict of a model that need not exist."""
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": config.to_json(),
        "provenance": json.dumps(provenance or {}),
    }
    tensors = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in state.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata)


def load_model(path: str | os.PathLike[str]) -> CoCosNet:
    """Read a model file.

    Args:
        path: what `save_model` wrote.

    Returns:
        The network, in evaluation mode on the CPU.

    Raises:
        InputError: `path` is missing or no plain file.
        CheckpointError: the file is damaged, or its tensors are not those of the network that it describes.
    """
    with _opened(path) as file:
        config, _ = _metadata(path, file.metadata())
        with torch.device("meta"):  # shapes alone: nothing is allocated for a file that turns out bad
            model = CoCosNet(config)
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        _check_keys(path, list(expected), list(file.keys()))
        state = {name: _read(path, file, name, shape) for name, shape in expected.items()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def load_pickle(path: str | os.PathLike[str], message: str) -> Any:
    """What `torch.save` wrote, of plain tensors; no code in the file is ever run.

    Raises `InputError` for what is no plain file, `CheckpointError` with `message` and the reason for a damaged one.
    """
    require_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except _LOAD_ERRORS as error:
        raise CheckpointError(f"{message}: {_reason(error)}") from error


def read_metadata(path: str | os.PathLike[str]) -> tuple[ModelConfig, dict[str, Any]]:
    """Configuration and provenance of the model file `path`, without its weights; errors as `load_model`."""
    with _opened(path) as file:
        return _metadata(path, file.metadata())


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    require_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: not a readable model file ({error}); `flashcocos convert` or `train` writes one"
        ) from error


def _check_keys(path: object, expected: list[str], actual: list[str]) -> None:
    if missing := sorted(set(expected) - set(actual)):
        raise CheckpointError(f"{path}: {missing[0]!r} is missing ({len(missing)} of {len(expected)} keys are)")
    if extra := sorted(set(actual) - set(expected)):
        raise CheckpointError(f"{path}: {extra[0]!r} is no part of the network described ({len(extra)} such keys)")


def _read(path: object, file: Any, name: str, shape: tuple[int, ...]) -> Tensor:
    part = file.get_slice(name)
    if (part.get_dtype(), tuple(part.get_shape())) != ("F32", shape):
        raise CheckpointError(f"{path}: {name!r} is {part.get_dtype()} {tuple(part.get_shape())}, expected F32 {shape}")
    tensor: Tensor = file.get_tensor(name)
    if not tensor.isfinite().all():
        raise CheckpointError(f"{path}: {name!r} contains values that are not finite")
    return tensor


def _metadata(path: object, metadata: dict[str, str] | None) -> tuple[ModelConfig, dict[str, Any]]:
    metadata = metadata or {}
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path}: a safetensors file, but not of flashcocos; `flashcocos convert` makes models")
    if (version := metadata.get("format_version")) != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {version!r} is unknown to this flashcocos, which reads {FORMAT_VERSION!r}; "
            "install a matching flashcocos"
        )
    try:
        config = ModelConfig.from_json(metadata.get("config", ""))
        provenance = json.loads(metadata.get("provenance", "{}"))
    except (InputError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the metadata is damaged: {error}") from error
    if not isinstance(provenance, dict):
        raise CheckpointError(f"{path}: the provenance is not a JSON object")
    return config, provenance


def _reason(error: BaseException) -> str:
    if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"it names {code[1]}, and code in a file is never run"
    if isinstance(error, pickle.UnpicklingError):  # torch's own text suggests switching the safety off
        return "it is damaged or holds more than tensors"
    if isinstance(error, OSError):
        return str(error)
    return f"it is damaged or of another kind ({type(error).__name__}: {error})".splitlines()[0]
