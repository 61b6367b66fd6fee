"""What the cases of a translation run on, and how alike two of their pictures are."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ...config import ModelConfig

UInt8Array = npt.NDArray[np.uint8]
CLASSES = 16  # that a label holds, on which the runtime's time depends: 4 to 21, 11 on average, in 12 of ADE20K's
MOST_DB = 99.0


def inputs(config: ModelConfig, size: int) -> tuple[UInt8Array, UInt8Array, UInt8Array]:
    """A label, an exemplar (size, size, 3) and its label: blocks of 32 pixels with noise, from a fixed seed."""
    rng = np.random.default_rng(0)

    def label() -> UInt8Array:
        cells = (size // 32, size // 32)
        if config.label_kind == "classes":
            present = rng.choice(config.label_channels, min(CLASSES, config.label_channels), replace=False)
            blocks = rng.choice(present, cells)
        else:
            blocks = rng.integers(0, 256, (config.label_channels, *cells))
        return np.kron(blocks, np.ones((32, 32), int)).astype(np.uint8)

    colors = np.kron(rng.integers(0, 200, (size // 32, size // 32, 3)), np.ones((32, 32, 1), int))
    exemplar = (colors + rng.integers(0, 56, (size, size, 3))).astype(np.uint8)
    return label(), exemplar, label()


def differences(actual: UInt8Array, expected: UInt8Array) -> dict[str, float]:
    """psnr_db (at most 99) and max_abs (0 to 255) of two uint8 pictures."""
    error = actual.astype(np.float32) - expected.astype(np.float32)
    square = float(np.mean(np.square(error), dtype=np.float64))
    psnr = min(MOST_DB, 10 * float(np.log10(255**2 / square))) if square else MOST_DB
    return {"psnr_db": round(psnr, 2), "max_abs": float(np.abs(error).max())}


def similarity(actual: UInt8Array, expected: UInt8Array) -> dict[str, float]:
    """ssim of two pictures where scikit-image is installed, else nothing: it is no requirement of the runtime."""
    import importlib.util

    if importlib.util.find_spec("skimage") is None:
        return {}
    from ..quality.metrics import ssim

    return {"ssim": round(ssim(actual, expected), 5)}


def warp_inputs(size: int, values: int, kind: str, channels: int) -> tuple[npt.NDArray[Any], ...]:
    """theta, phi (1, channels, size, size) and values (1, values, size, size) float32, from a fixed seed.

    kind: "noise" has no match, so that no key can be left out; in "shifted" phi is theta moved by (5, 5) plus noise.
    """
    rng = np.random.default_rng(0)
    theta, phi = (0.3 * rng.standard_normal((2, 1, channels, size, size), dtype=np.float32) + 0.1).astype(np.float32)
    if kind == "shifted":
        phi[:, :, 5:, 5:] += theta[:, :, :-5, :-5]
    return theta, phi, rng.random((1, values, size, size), dtype=np.float32)
