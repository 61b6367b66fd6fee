"""Metrics of uint8 pictures (H, W, 3), in numpy.

With an exact target: PSNR, SSIM, L1, also by class, and where the exemplar's colors were fetched from (`ExactSums`).
Between two sets of pictures: the sliced Wasserstein distance. Metrics that need a pretrained network are in
`feature_metrics`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import InputError, import_extra
from ...preprocess import images
from ...preprocess.images import FloatArray, UInt8Array

PATCH, PATCHES = 7, 128  # side of a patch, and patches of an image at each level
DIRECTIONS = 512
SMALLEST_LEVEL = 16
MAX_PSNR = 100.0  # of equal pictures, so that means stay finite

Ids = npt.NDArray[Any]


def psnr(image: UInt8Array, target: UInt8Array) -> float:
    """`preprocess.images.psnr`, at most `MAX_PSNR`."""
    return min(MAX_PSNR, images.psnr(image, target))


def ssim(image: UInt8Array, target: UInt8Array) -> float:
    """Structural similarity in the Gaussian window of its authors (doi 10.1109/TIP.2003.819861), by channel.

    Args:
        image: uint8 (H, W, 3).
        target: The same.

    Returns:
        -1 to 1; 1 for equal pictures.

    Raises:
        InputError: A side is under 11 pixels.
        BackendError: scikit-image is missing.
    """
    if min(image.shape[:2]) < 11:
        raise InputError(f"SSIM: a picture of {image.shape[1]} x {image.shape[0]}; its window needs 11 x 11 pixels")
    metrics = import_extra("skimage.metrics", "SSIM needs scikit-image", "eval")
    return float(
        metrics.structural_similarity(
            image, target, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
    )


def class_mean_baseline(label: Ids, exemplar: UInt8Array, exemplar_label: Ids, classes: int) -> UInt8Array:
    """The picture to beat: each class of `label` in the exemplar's mean color of that class.

    Args:
        label: Ids (H, W) below `classes`.
        exemplar: uint8 (H, W, 3).
        exemplar_label: Its ids (H, W).
        classes: Number of classes.

    Returns:
        uint8 (H, W, 3). A class that the exemplar lacks gets the exemplar's mean color.
    """
    area = np.bincount(exemplar_label.ravel(), minlength=classes)[:, None]
    means = class_sums(exemplar_label, exemplar, classes) / np.maximum(area, 1)
    means = np.where(area > 0, means, exemplar.reshape(-1, 3).mean(0))
    return np.rint(means).astype(np.uint8)[label]


def class_sums(label: Ids, values: npt.NDArray[Any], classes: int) -> npt.NDArray[np.float64]:
    """Sums (classes, C) of the values (H, W, C) of each class's pixels."""
    ids = label.ravel()
    channels = values.reshape(ids.size, -1).T
    return np.stack([np.bincount(ids, channel, minlength=classes) for channel in channels], axis=1)


def correspondence_accuracy(label: Ids, exemplar_label: Ids, matches: npt.NDArray[np.int64], classes: int) -> float:
    """Share of positions that fetched their color from their own class of the exemplar.

    Args:
        label: Ids (H, W).
        exemplar_label: Ids (H, W).
        matches: For each position (h, w) of the map the flat index of the exemplar's position that it matches best.
        classes: Number of classes.

    Returns:
        0 to 1. A position's class is the most frequent of its pixels, the lowest among equals.
    """
    stride = len(label) // len(matches)
    fetched = coarse_label(exemplar_label, classes, stride).ravel()[matches]
    return float((coarse_label(label, classes, stride) == fetched).mean())


def coarse_label(label: Ids, classes: int, stride: int) -> npt.NDArray[np.int64]:
    """The most frequent class (H / stride, W / stride) of each stride x stride pixels."""
    height, width = label.shape
    blocks = label.reshape(height // stride, stride, width // stride, stride)
    counts = (blocks[..., None] == np.arange(classes)).sum((1, 3))
    coarse: npt.NDArray[np.int64] = counts.argmax(-1)
    return coarse


class ExactSums:
    """Sums over pairs with an exact target, and from them the scores."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.rows: list[dict[str, float]] = []
        self.area, self.error, self.color, self.present = np.zeros((4, classes))

    def add(
        self,
        label: Ids,
        target: UInt8Array,
        image: UInt8Array,
        warped: UInt8Array,
        baseline: UInt8Array,
        correspondence: float,
    ) -> None:
        """Count one pair: ids (H, W), four pictures (H, W, 3) and the accuracy of its correspondence."""
        difference = _unit(image) - _unit(target)
        self.rows.append(
            {
                "psnr": psnr(image, target),
                "psnr_warped": psnr(warped, target),
                "psnr_baseline": psnr(baseline, target),
                "ssim": ssim(image, target),
                "l1": float(np.abs(difference).mean()),
                "correspondence": correspondence,
            }
        )
        area = np.bincount(label.ravel(), minlength=self.classes)
        self.area += area
        self.error += class_sums(label, np.square(difference).mean(-1), self.classes)[:, 0]
        shift = class_sums(label, difference, self.classes) / np.maximum(area, 1)[:, None]
        self.color += np.abs(shift).mean(1)
        self.present += area > 0

    def means(self) -> dict[str, float]:
        """The mean of each measure over the pairs."""
        return {name: round(float(np.mean([row[name] for row in self.rows])), 4) for name in self.rows[0]}

    def psnr_by_class(self, names: Sequence[str]) -> dict[str, float]:
        """PSNR over all pixels of each class that occurs."""
        present = np.flatnonzero(self.area).tolist()
        return {names[place]: round(_decibel(self.error[place] / self.area[place]), 2) for place in present}

    def color_error_by_class(self, names: Sequence[str]) -> dict[str, float]:
        """L1 of the mean color of each class that occurs, colors in [0, 1], averaged over the pictures it is in."""
        present = np.flatnonzero(self.present).tolist()
        return {names[place]: round(float(self.color[place] / self.present[place]), 4) for place in present}


class PatchSet:
    """Random patches of the Laplacian pyramids of a set of pictures, all of one size.

    Source: arXiv 1710.10196, section 5: per picture and level 128 patches of 7 x 7, levels from the full size down to
    16 pixels. They take 75 KiB a picture and level.
    """

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._levels: dict[int, list[FloatArray]] = {}

    def add(self, image: UInt8Array) -> None:
        """Take the patches of one picture."""
        for level in laplacian_pyramid(image):
            self._levels.setdefault(min(level.shape[:2]), []).append(self._patches(level))

    def descriptors(self) -> dict[int, FloatArray]:
        """For every level, by its smaller side: patches (n, 147), each channel of mean 0 and deviation 1 over all."""
        descriptors = {}
        for side, patches in self._levels.items():
            stacked = np.concatenate(patches).reshape(-1, PATCH * PATCH, 3)
            deviation = stacked.std((0, 1))
            stacked = (stacked - stacked.mean((0, 1))) / np.where(deviation > 0, deviation, 1)
            descriptors[side] = stacked.reshape(len(stacked), -1)
        return descriptors

    def _patches(self, level: FloatArray) -> FloatArray:
        height, width = level.shape[:2]
        y = self._rng.integers(0, height - PATCH + 1, (PATCHES, 1, 1)) + np.arange(PATCH)[:, None]
        x = self._rng.integers(0, width - PATCH + 1, (PATCHES, 1, 1)) + np.arange(PATCH)
        patches: FloatArray = level[y, x]
        return patches


def laplacian_pyramid(image: UInt8Array) -> list[FloatArray]:
    """Differences between successive blurred halvings, float32 (H, W, 3), and last the smallest picture itself."""
    cv2 = import_extra("cv2", "this metric needs opencv-python-headless", "eval")
    current = image.astype(np.float32)
    levels = []
    while min(current.shape[:2]) // 2 >= SMALLEST_LEVEL:
        half = cv2.pyrDown(current)
        levels.append(current - cv2.pyrUp(half, dstsize=current.shape[1::-1]))
        current = half
    return [*levels, current]


def sliced_wasserstein(one: FloatArray, other: FloatArray, seed: int = 0) -> float:
    """Mean distance of the sorted projections of two sets of descriptors onto 512 random directions.

    Args:
        one: float32 (n, D).
        other: float32 (n, D).
        seed: Of the directions.

    Returns:
        The distance, 0 for equal sets.
    """
    directions = np.random.default_rng(seed).standard_normal((DIRECTIONS, one.shape[1]))
    directions = (directions / np.linalg.norm(directions, axis=1, keepdims=True)).astype(np.float32)
    distances = [
        np.abs(np.sort(part @ one.T) - np.sort(part @ other.T)).mean(dtype=np.float64)
        for part in np.split(directions, DIRECTIONS // 32)  # all at once would take 2 KiB a patch
    ]
    return float(np.mean(distances))


def sliced_wasserstein_levels(one: PatchSet, other: PatchSet) -> dict[str, float]:
    """The sliced Wasserstein distance times 1000 of each level.

    Each set has random patches of its own, so the distance of equal sets is not 0; it falls with their number, to 11
    for 200 pictures.

    Args:
        one: A set of pictures.
        other: Another set, of the same size in pixels.

    Returns:
        The distances by the level's side in pixels, and their "mean".
    """
    first, second = one.descriptors(), other.descriptors()
    levels = {str(side): 1e3 * sliced_wasserstein(first[side], second[side]) for side in first}
    return {name: round(value, 3) for name, value in {**levels, "mean": float(np.mean([*levels.values()]))}.items()}


def _unit(image: UInt8Array) -> FloatArray:
    return image.astype(np.float32) / np.float32(255)


def _decibel(error: float) -> float:
    """PSNR of a mean square error of colors in [0, 1]."""
    return float(min(MAX_PSNR, -10 * np.log10(error))) if error else MAX_PSNR
