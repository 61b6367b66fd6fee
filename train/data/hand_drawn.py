"""Labels as a person would paint them: outlines shifted and rounded, thin parts gone, sometimes in coarse blocks.

For training a model that people paint for, and for measuring it on such labels (`flashcocos evaluate --hand-drawn`).
"""

from __future__ import annotations

import numpy as np

BEND = 0.02  # of the side: the largest shift of an outline
BRUSH = (0.006, 0.02)  # of the side: radius of the brush, smallest and largest
BLOCKS = (2, 3, 4)  # pixels; in a third of the labels the outlines become as jagged as that
KNOTS = 9  # of the shift, along each axis


def hand_drawn(label: np.ndarray, seed: int) -> np.ndarray:
    """A label as if painted by hand.

    Args:
        label: class ids (H, W), uint8.
        seed: another seed, another painting.

    Returns:
        Class ids (H, W), uint8. No class is new, small ones can be gone.
    """
    rng = np.random.default_rng(seed)
    side = min(label.shape)
    bent = _bend(label, rng.uniform(-BEND, BEND, (2, KNOTS, KNOTS)) * side)
    painted = _paint(bent, max(1, round(rng.uniform(*BRUSH) * side)))
    if rng.random() < 1 / 3:
        block = int(rng.choice(BLOCKS))
        height, width = label.shape
        painted = painted[::block, ::block].repeat(block, 0).repeat(block, 1)[:height, :width]
    return np.ascontiguousarray(painted)


def interpolate(knots: np.ndarray, height: int, width: int) -> np.ndarray:
    """Values at a grid of knots (2, n, n) that spans a picture, bilinear between them: (2, height, width)."""
    last = knots.shape[1] - 1
    grids = [np.linspace(0, last, length) for length in (height, width)]
    low = [np.minimum(grid.astype(int), last - 1) for grid in grids]
    y, x = (grid - place for grid, place in zip(grids, low, strict=True))
    rows = knots[:, low[0]] * (1 - y)[:, None] + knots[:, low[0] + 1] * y[:, None]  # (2, height, n)
    smooth: np.ndarray = rows[:, :, low[1]] * (1 - x) + rows[:, :, low[1] + 1] * x
    return smooth


def _bend(label: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """The label (H, W), its pixels fetched from places shifted by `shifts` (2, KNOTS, KNOTS), interpolated between."""
    height, width = label.shape
    places = np.rint(np.indices(label.shape) + interpolate(shifts, height, width)).astype(int)
    bent: np.ndarray = label[places[0].clip(0, height - 1), places[1].clip(0, width - 1)]
    return bent


def _paint(label: np.ndarray, radius: int) -> np.ndarray:
    """Each pixel becomes the most frequent class of the square around it, the lowest among equals."""
    classes = np.unique(label)
    padded = np.pad(label, radius, mode="edge")
    counts = (padded == classes[:, None, None]).astype(np.int32)
    for axis in (1, 2):  # a box filter by running sums
        sums = np.cumsum(np.insert(counts, 0, 0, axis), axis)
        length = sums.shape[axis]
        window = 2 * radius + 1
        counts = sums.take(range(window, length), axis) - sums.take(range(length - window), axis)
    painted: np.ndarray = classes[counts.argmax(0)]
    return painted
