"""Engines on device memory: what the GPU pipeline needs of TensorRT and of ONNX Runtime's CUDA provider.

Like the engines of runtime/engine.py they load in their constructor, `describe` themselves and `close`; instead of
running numpy arrays they are bound to addresses once for each shape, and then put their work on the device's stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from ...bundle import TensorSpec
from ...bundle.stages import axis_sizes, concrete_shape, stage_tensors
from ...config import ModelConfig
from ..engine import EngineInfo

Shape = tuple[int, int, int]  # images a batch, height and width in pixels
Tensors = dict[str, tuple[tuple[int, ...], Any]]  # name -> (shape, dtype)


class Binding(Protocol):
    """A stage at one shape with all its tensors' addresses. scratch: bytes of working memory that it needs."""

    scratch: int

    @property
    def can_capture(self) -> bool | None:
        """Whether `enqueue` may be captured now, after a first run; None where it never may."""
        ...

    def use_scratch(self, address: int, size: int) -> None:
        """Work in this memory from now on; to be called before the first `enqueue` where `scratch` is not 0."""
        ...

    def enqueue(self) -> None:
        """Put one run on the stream; `BackendError` where that fails."""
        ...

    def close(self) -> None:
        """Free what belongs to the shape."""
        ...


class DeviceEngine(Protocol):
    """One stage of a bundle. uint8_output: whether pictures come as `device_tensors` says, not as float32 planes."""

    uint8_output: bool

    def why_unsupported(self, shape: Shape) -> str:
        """Why the stage does not run at this shape, at which it does, and how to get others; empty where it runs."""
        ...

    def bind(self, shape: Shape, addresses: Mapping[str, int]) -> Binding:
        """The stage at `shape`, its inputs and outputs at `addresses`; loads the graph where it is not loaded yet.

        Raises `OutOfMemory` where that is the reason, as far as it is known.
        """
        ...

    def describe(self) -> EngineInfo:
        """What runs this stage."""
        ...

    def close(self) -> None:
        """Free the graph; its bindings have to be closed before. Twice does no harm."""
        ...


def device_tensors(
    config: ModelConfig, stage: str, *, uint8_output: bool
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """(inputs, outputs) of a stage on the device: as in the bundle, but for pictures in uint8."""
    inputs, outputs = stage_tensors(config)[stage]
    if stage == "fine" and uint8_output:
        picture = ("batch", "height", "width", 3)
        images = tuple(TensorSpec(name, "uint8", picture) for name in ("image", "warped_image"))
        outputs = (*images, TensorSpec("invalid", "float32", ()))
    return inputs, outputs


def concrete(config: ModelConfig, tensors: Iterable[TensorSpec], shape: Shape) -> Tensors:
    """`tensors` with every dynamic axis in numbers."""
    sizes = axis_sizes(config, *shape)
    return {tensor.name: (concrete_shape(tensor, sizes), tensor.dtype) for tensor in tensors}
