"""CelebAMask-HQ label maps: ids 0 to 18, the eyeglasses from a mask of their own.

The published data has one map of all parts but the glasses, and a mask of the glasses where there are any. A prepared
label carries the glasses as class 16, in place of the class below; the published network was trained on both at once.
"""

from __future__ import annotations

import numpy as np

from ..errors import InputError
from .images import PathLike, UInt8Array
from .labels import LabelSource, check_ids, read_ids, resize_nearest, source_name
from .planes import BoolArray, read_mask

CLASSES = 19
GLASSES = 16


def class_ids(parts: UInt8Array, glasses: BoolArray | None = None, name: str = "label") -> UInt8Array:
    """Class ids (H, W) with `glasses` (H, W) drawn in as class 16; ids above 18 raise `InputError` naming `name`."""
    check_ids(parts, CLASSES, name)
    if glasses is None:
        return parts
    if glasses.shape != parts.shape:
        raise InputError(f"{name}: glasses are {glasses.shape}, the label is {parts.shape}; expected the same size")
    return np.where(glasses, GLASSES, parts).astype(np.uint8)


def load(label: LabelSource, glasses: PathLike | None = None, size: tuple[int, int] | None = None) -> UInt8Array:
    """A raw label map and the mask file of its glasses as class ids (H, W), resized NEAREST to `size`."""
    parts = read_ids(label)
    target = parts.shape if size is None else size
    mask = None if glasses is None else read_mask(glasses, (target[0], target[1]))
    return class_ids(resize_nearest(parts, size), mask, source_name(label))
