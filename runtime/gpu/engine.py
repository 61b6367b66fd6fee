"""Engines on device memory: what the GPU pipeline needs of TensorRT and of ONNX Runtime's CUDA provider.

Like the engines of runtime/engine.py they load in their constructor and `close`; instead of running numpy arrays they
are bound to addresses once for each shape, and then put their work on the device's stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ...bundle import Bundle, TensorSpec
from ...bundle.stages import axis_sizes, concrete_shape, stage_tensors
from ...config import ModelConfig
from ..engine import EngineInfo
from .device import Device, Tensors

Shape = tuple[int, int, int]  # images a batch, height and width in pixels


class Binding:
    """A stage at one shape with all its tensors' addresses. scratch: bytes of working memory that it needs."""

    scratch = 0

    @property
    def can_capture(self) -> bool | None:
        """Whether `enqueue` may be captured now, after a first run; None where it never may."""
        return None

    def use_scratch(self, address: int, size: int) -> None:
        """Work in this memory from now on; to be called before the first `enqueue` where `scratch` is not 0."""

    def enqueue(self) -> None:
        """Put one run on the stream; `BackendError` where that fails."""
        raise NotImplementedError

    def close(self) -> None:
        """Free what belongs to the shape."""
        raise NotImplementedError


class DeviceEngine:
    """One stage of `bundle`. uint8_output: whether pictures come as `device_tensors` says, not as float32 planes.

    inputs, outputs: its tensors on the device. info: what runs it.
    """

    uint8_output = False
    info: EngineInfo

    def __init__(self, bundle: Bundle, stage: str, device: Device) -> None:
        self._bundle, self._stage, self._device, self._config = bundle, stage, device, bundle.manifest.config
        self.inputs, self.outputs = device_tensors(self._config, stage, uint8_output=self.uint8_output)

    def why_unsupported(self, shape: Shape) -> str:
        """Why the stage does not run at this shape, at which it does, and how to get others; empty where it runs."""
        return ""

    def bind(self, shape: Shape, addresses: Mapping[str, int]) -> Binding:
        """The stage at `shape`, its inputs and outputs at `addresses`; loads the graph where it is not loaded yet.

        Raises `OutOfMemory` where that is the reason, as far as it is known.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Free the graph; its bindings have to be closed before. Twice does no harm."""
        raise NotImplementedError


def device_tensors(
    config: ModelConfig, stage: str, *, uint8_output: bool
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """(inputs, outputs) of a stage on the device: as in the bundle, but for pictures in uint8.

    These are rounded as `preprocess.images.to_uint8` does, and `invalid` is 1 where the network gave NaN, else 0.
    """
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
