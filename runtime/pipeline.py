"""What every pipeline has in common: the stages of a translation in a row, and what goes in and comes out.

    label -> query -> theta  \\
                              warp (flashcocos.kernels) -> synthesis: coarse -> fine -> picture
    exemplar -> phi, values  /

The fine stage runs on the whole picture or tile by tile (tiles.py). The pipelines themselves are cpu/pipeline.py and
gpu/pipeline.py; backends.py opens the one that the options ask for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import BundleError
from ..preprocess.images import FloatArray, UInt8Array
from .engine import EngineInfo


@dataclasses.dataclass(frozen=True, eq=False)
class Exemplar:
    """An encoded exemplar; constant, so that it can serve many translations and threads at once.

    Attributes:
        phi: features (1, C, h, w) float32, read-only, of h x w positions, h = height / warp_stride.
        values: what the warp carries (1, V, h, w) float32, read-only.
        size: (height, width) in pixels of the picture as it was encoded.
        model: SHA-256 of the graph that encoded it; another model cannot use it.
    """

    phi: FloatArray
    values: FloatArray
    size: tuple[int, int]
    model: str


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedLabel:
    """An encoded label; constant, so that it can serve many translations and threads at once.

    Attributes:
        planes: class ids uint8 (H, W), or planes float32 (label_channels, H, W), read-only.
        theta: features (1, C, h, w) float32, read-only, of h x w positions, h = H / warp_stride; None where a GPU
            makes them with each picture.
        model: SHA-256 of the graph that encodes it; another model cannot use it.
    """

    planes: npt.NDArray[Any]
    theta: FloatArray | None
    model: str

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.planes.shape[-2], self.planes.shape[-1]


@dataclasses.dataclass(frozen=True, eq=False)
class PipelineOutput:
    """What the stages make of one label.

    image and warped: (H, W, 3) uint8. index and probability: for each position (h, w) the flat index of its best match,
    int64, and that match's probability, float32. timings: milliseconds.
    """

    image: UInt8Array
    warped: UInt8Array
    index: npt.NDArray[np.int64]
    probability: FloatArray
    timings: Mapping[str, float]


class Pipeline(Protocol):
    """The stages of one model, safe to share between threads."""

    def encode(self, inputs: Mapping[str, npt.NDArray[Any]]) -> tuple[FloatArray, FloatArray]:
        """phi and values of one exemplar, from the inputs of its stage."""
        ...

    def encode_label(self, label: npt.NDArray[Any]) -> FloatArray | None:
        """theta of one label, a batch of 1; None where `render` does without."""
        ...

    def render(
        self, label: npt.NDArray[Any], exemplars: Sequence[Exemplar], thetas: Sequence[FloatArray | None]
    ) -> list[PipelineOutput]:
        """The output for each item of the batch `label` with the exemplar of the same index.

        thetas: what `encode_label` gave for each item; None for one that was not encoded.
        """
        ...

    def describe(self) -> dict[str, EngineInfo]:
        """What runs each stage, and the warp."""
        ...

    def close(self) -> None:
        """Free everything; what runs finishes, and what comes after raises `BackendError`."""
        ...


def require_finite(where: str, what: str, finite: Any, remedy: str = "export it again") -> None:
    """Raise `BundleError` where a network gave NaN or infinity."""
    if not finite:
        raise BundleError(
            f"{where} NaN or infinity in {what}: its weights are damaged or overflow in float16; "
            f"{remedy} with precision float32"
        )
