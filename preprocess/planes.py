"""What the preparation of edge and pose labels shares: mask files, contours and distance planes.

A distance plane says how far each pixel is from the nearest set one: min(d / 3, 255) rounded down, d the city-block
distance in pixels, and 255 everywhere where nothing is set. These are the numbers that the published networks were
fed (an OpenCV 3 x 3 L1 distance transform); city-block distance separates by axis, so two passes of numpy give them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import InputError
from .images import PathLike, UInt8Array, open_image

BoolArray = npt.NDArray[np.bool_]
_MASK_MODES = ("RGB", "L", "1", "P")


def read_mask(path: PathLike, size: tuple[int, int] | None = None) -> BoolArray:
    """A two-valued mask file as bool (H, W), resized NEAREST to `size` (height, width).

    Raises `InputError` for unreadable files and for any value beside 0 and 255 (or 0 and 1).
    """
    image = open_image(path)
    if image.mode not in _MASK_MODES:
        raise InputError(f"{path}: image mode {image.mode!r}; expected a mask, 8-bit with values 0 and 255")
    gray = image.convert("L")
    values = np.asarray(gray)
    top = int(values.max())
    if top not in (0, 1, 255) or not ((values == 0) | (values == top)).all():
        raise InputError(f"{path}: a mask with intermediate gray values; expected 0 and 255 alone, in a PNG")
    if size is not None:
        gray = gray.resize((size[1], size[0]), Image.Resampling.NEAREST)
    return np.asarray(gray) > 0


def contour(mask: BoolArray) -> BoolArray:
    """Pixels (H, W) of either side of a border between set and unset, by the four neighbors."""
    edge = np.zeros_like(mask)
    across, down = mask[:, 1:] != mask[:, :-1], mask[1:] != mask[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= down
    edge[:-1] |= down
    return edge


def distance_plane(mask: BoolArray) -> UInt8Array:
    """min(city-block distance to the nearest set pixel / 3, 255) rounded down, uint8 (H, W)."""
    height, width = mask.shape
    far = height + width + 3 * 256  # beyond any real distance, and saturated after the division
    distance = np.where(mask, 0, far).astype(np.int32)
    for axis, length in ((0, height), (1, width)):
        ramp = np.arange(length, dtype=np.int32).reshape((-1, 1) if axis == 0 else (1, -1))
        before = np.minimum.accumulate(distance - ramp, axis=axis) + ramp
        after = np.flip(np.minimum.accumulate(np.flip(distance + ramp, axis), axis=axis), axis) - ramp
        distance = np.minimum(before, after)
    return np.minimum(distance // 3, 255).astype(np.uint8)
