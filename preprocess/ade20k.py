"""ADE20K label maps (ADEChallengeData2016): ids 0 to 150, 0 = unknown, kept as they are.

Some tools write 255 for "don't care". It becomes 0 here: the public loader turns it into 150, which is the class flag.
"""

from __future__ import annotations

import numpy as np

from .images import UInt8Array
from .labels import LabelSource, check_ids, read_ids, resize_nearest, source_name

CLASSES = 151
DONT_CARE = 255


def class_ids(raw: UInt8Array, name: str = "label") -> UInt8Array:
    """Class ids (H, W), 0 to 150, of a raw label map (H, W); ids 151 to 254 raise `InputError` naming `name`."""
    ids = np.where(raw == DONT_CARE, 0, raw).astype(np.uint8)
    check_ids(ids, CLASSES, name)
    return ids


def load(label: LabelSource, size: tuple[int, int] | None = None) -> UInt8Array:
    """A raw label map as class ids (H, W), resized NEAREST to `size` (height, width)."""
    return resize_nearest(class_ids(read_ids(label), source_name(label)), size)
