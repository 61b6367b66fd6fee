"""What the stages of a bundle must take and give, by its configuration: the table in the docstring of `bundle.py`."""

from __future__ import annotations

from collections.abc import Iterable

from ..bundle import Manifest, TensorSpec
from ..config import ModelConfig
from ..errors import BundleError


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
    return {
        "query": ((label,), (features("theta", config.feature_channels),)),
        "exemplar": (
            (*exemplar, label) if config.mask_mixing else exemplar,
            (features("phi", config.feature_channels), features("values", config.warped_channels)),
        ),
        "synthesis": (
            (features("warped", config.warped_channels), label),
            (TensorSpec("image", "float32", image), TensorSpec("warped_image", "float32", image)),
        ),
    }


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
