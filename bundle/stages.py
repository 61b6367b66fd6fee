"""What the stages of a bundle must take and give, by its configuration: the table in the docstring of `bundle.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy.typing as npt

from ..config import ModelConfig
from ..errors import BundleError
from . import Manifest, TensorSpec

# begin the names of the values that export/winograd.py and export/windows.py put in place of a convolution
WINOGRAD = "winograd_"
WINDOWS = "windows_"


def stage_tensors(config: ModelConfig) -> dict[str, tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]]:
    """(inputs, outputs) of every stage of a network of this configuration."""
    image, fine, coarse = ("batch", 3, "height", "width"), ("height", "width"), ("h", "w")
    if config.label_kind == "classes":
        label = TensorSpec("label", "uint8", ("batch", *fine))
    else:
        label = TensorSpec("label", "float32", ("batch", config.label_channels, *fine))

    def features(name: str, channels: int) -> TensorSpec:
        return TensorSpec(name, "float32", ("batch", channels, *coarse))

    exemplar = (TensorSpec("image", "float32", image),)
    # between the halves of the synthesis: the second can make a part of the picture alone
    between = TensorSpec("features", "float32", ("batch", config.generator_channels(4), "half_height", "half_width"))
    means = (TensorSpec("means", "float32", ("batch", config.label_channels, 3)),) if config.warp_residual else ()
    warped = features("warped", config.warped_channels)
    return {
        "query": ((label,), (features("theta", config.feature_channels),)),
        "exemplar": (
            (*exemplar, label) if config.condition_on_label else exemplar,
            (features("phi", config.feature_channels), features("values", config.warped_channels)),
        ),
        "coarse": ((warped, label), (between, *means)),
        "fine": (
            (between, warped, label, *means),
            (TensorSpec("image", "float32", image), TensorSpec("warped_image", "float32", image)),
        ),
    }


def translation_tensors(config: ModelConfig) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """(inputs, outputs) of a whole translation, as servers of the protocol KServe v2 name them.

    A request gives the exemplar as `exemplar` and, where the model wants it, `exemplar_label`, or as the `exemplar_id`
    of an earlier answer. Labels of planes are uint8, value * 255, as in files.
    """
    picture, positions = ("height", "width", 3), ("h", "w")
    planes = () if config.label_kind == "classes" else (config.label_channels,)
    exemplar_label = TensorSpec("exemplar_label", "uint8", ("batch", *planes, "exemplar_height", "exemplar_width"))
    exemplar_id = TensorSpec("exemplar_id", "bytes", ("batch", 1))
    return (
        (
            TensorSpec("label", "uint8", ("batch", *planes, "height", "width")),
            TensorSpec("exemplar", "uint8", ("batch", "exemplar_height", "exemplar_width", 3)),
            *((exemplar_label,) if config.condition_on_label else ()),
            exemplar_id,
        ),
        (
            TensorSpec("image", "uint8", ("batch", *picture)),
            TensorSpec("warped", "uint8", ("batch", *picture)),
            TensorSpec("confidence", "float32", ("batch", *positions)),
            TensorSpec("matches", "float32", ("batch", *positions, 2)),
            exemplar_id,
        ),
    )


def stage_inputs(
    config: ModelConfig, stage: str, arrays: Mapping[str, npt.NDArray[Any]]
) -> dict[str, npt.NDArray[Any]]:
    """The inputs of a stage out of `arrays`: label, image and exemplar_label, and what the stages before have given."""
    own = {"label": "exemplar_label"} if stage == "exemplar" else {}
    return {tensor.name: arrays[own.get(tensor.name, tensor.name)] for tensor in stage_tensors(config)[stage][0]}


def axis_sizes(config: ModelConfig, batch: int, height: int, width: int) -> dict[str, int]:
    """The named axes of `stage_tensors` in numbers, for images of height x width."""
    scale = config.warp_stride
    return {
        "batch": batch,
        "height": height,
        "width": width,
        "half_height": height // 2,
        "half_width": width // 2,
        "h": height // scale,
        "w": width // scale,
    }


def concrete_shape(tensor: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of `tensor` with `axis_sizes` for its named axes."""
    return tuple(sizes[side] if isinstance(side, str) else side for side in tensor.shape)


def check_stages(manifest: Manifest) -> None:
    """Raise `BundleError` where a stage's stated tensors are not those of the manifest's configuration."""
    for stage, (inputs, outputs) in stage_tensors(manifest.config).items():
        spec = manifest.stages[stage]
        for what, expected, stated in (("inputs", inputs, spec.inputs), ("outputs", outputs, spec.outputs)):
            if signature(expected) != signature(stated):
                raise BundleError(
                    f"manifest.json: stage {stage} states the {what} {signature(stated)}; "
                    f"its configuration asks for {signature(expected)}"
                )


def signature(tensors: Iterable[TensorSpec]) -> dict[str, tuple[str, tuple[int | None, ...]]]:
    """Name -> (dtype, shape with None for dynamic axes): what must agree, for the names of dynamic axes are free."""
    return {t.name: (t.dtype, tuple(side if isinstance(side, int) else None for side in t.shape)) for t in tensors}
