"""What the benchmarks run on, and how similar two of their pictures are."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import numpy.typing as npt

from ...config import ModelConfig
from ..quality.metrics import psnr, ssim

UInt8Array = npt.NDArray[np.uint8]
CLASSES = 16  # of a label; the runtime's time depends on it: 4 to 21, 11 on average, in 12 labels of ADE20K


def inputs(config: ModelConfig, size: int) -> tuple[UInt8Array, UInt8Array, UInt8Array]:
    """A label, an exemplar (size, size, 3) and its label, uint8: blocks of 32 pixels with noise, from a fixed seed."""
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


def network_inputs(config: ModelConfig, size: int) -> list[np.ndarray]:
    """label, exemplar and, for models conditioned on it, the exemplar's label, batched, as the networks take them."""
    from ...preprocess import load_image, load_label

    label, image, image_label = inputs(config, size)
    arrays = [load_label(config, label)[None], load_image(image)[None]]
    return [*arrays, load_label(config, image_label)[None]] if config.condition_on_label else arrays


def differences(actual: UInt8Array, expected: UInt8Array) -> dict[str, float]:
    """psnr_db and max_abs (0 to 255) of two uint8 pictures."""
    error = np.abs(actual.astype(np.int16) - expected)
    return {"psnr_db": round(psnr(actual, expected), 2), "max_abs": float(error.max())}


def similarity(actual: UInt8Array, expected: UInt8Array) -> dict[str, float]:
    """ssim of two pictures where scikit-image is installed, else nothing, for the runtime does not need it."""
    if importlib.util.find_spec("skimage") is None:
        return {}
    return {"ssim": round(ssim(actual, expected), 5)}


def warp_inputs(size: int, values: int, kind: str, channels: int) -> tuple[npt.NDArray[Any], ...]:
    """theta, phi (1, channels, size, size) and values (1, values, size, size), float32, from a fixed seed.

    kind: "noise" has no match, so no key can be left out; in "shifted" phi is theta moved by (5, 5) plus noise.
    """
    rng = np.random.default_rng(0)
    theta, phi = (0.3 * rng.standard_normal((2, 1, channels, size, size), dtype=np.float32) + 0.1).astype(np.float32)
    if kind == "shifted":
        phi[:, :, 5:, 5:] += theta[:, :, :-5, :-5]
    return theta, phi, rng.random((1, values, size, size), dtype=np.float32)
