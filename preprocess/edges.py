"""CelebA-HQ edges: 13 masks of face parts and the photograph to 15 planes.

Plane 0: contours of all parts, and the photograph's Canny edges in its background and hair. Planes 1 to 13: distance
to the contour of each part, in the order of `PARTS`. Plane 14: the contours alone.

The published network was trained with scikit-image 0.14, whose Canny smooths 8-bit pictures in 8-bit integers; later
releases smooth in floating point and mark other pixels (500 to 1300 of a 256 x 256 face). `canny="upstream"` smooths
as 0.14 did and leaves the rest to the installed scikit-image; `canny="modern"` is the installed one as it is.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image

from ..errors import InputError, import_extra
from .images import ImageSource, PathLike, UInt8Array, load_rgb
from .planes import BoolArray, contour, distance_plane, read_mask

PARTS = (
    "skin", "l_brow", "r_brow", "l_eye", "r_eye", "l_ear", "r_ear", "nose", "u_lip", "mouth", "l_lip", "eye_g", "hair",
)  # fmt: skip
CANNY = ("upstream", "modern")


def canny_edges(gray: UInt8Array, canny: str = "upstream") -> BoolArray:
    """Canny edges (H, W) of an 8-bit gray picture (H, W), sigma 1, thresholds at 10 and 20 % of the range.

    canny: "upstream" or "modern", see the module. Raises `InputError` for another, `BackendError` without scikit-image.
    """
    if canny not in CANNY:
        raise InputError(f"canny: expected one of {', '.join(CANNY)}, got {canny!r}")
    feature = import_extra("skimage.feature", "this label needs scikit-image", "prepare")
    if canny == "modern":
        return np.asarray(feature.canny(gray), bool)
    gaussian_filter = import_extra("scipy.ndimage", "this label needs scipy", "prepare").gaussian_filter
    inside = gaussian_filter(np.ones(gray.shape), 1, mode="constant")  # what of the kernel lies on the picture
    smooth = gaussian_filter(gray, 1, mode="constant") / (inside + np.finfo(float).eps)
    # sigma 0 leaves the picture as it is, and "nearest" leaves out scikit-image's own division by `inside`
    edges = feature.canny(smooth, sigma=0, low_threshold=25.5, high_threshold=51, mode="nearest")
    return np.asarray(edges, bool)


def edge_planes(gray: UInt8Array, masks: Mapping[str, BoolArray], canny: str = "upstream") -> UInt8Array:
    """The 15 planes, uint8 (15, H, W), of a gray picture (H, W) and the bool masks (H, W) of the parts it shows.

    masks: by the names of `PARTS`; a part that is left out is not visible. Raises `InputError` for an unknown part or
    a mask of another size.
    """
    for part, mask in masks.items():
        if part not in PARTS or mask.shape != gray.shape:
            raise InputError(f"mask {part!r} {mask.shape}: expected one of {', '.join(PARTS)}, of size {gray.shape}")
    nothing = np.zeros(gray.shape, bool)
    contours = {part: contour(masks[part]) if part in masks else nothing for part in PARTS}
    parts = np.logical_or.reduce(list(contours.values()))
    inner = np.logical_or.reduce([nothing, *(mask for part, mask in masks.items() if part != "hair")])
    outer = ~inner | masks.get("hair", nothing)
    everything = parts | (canny_edges(gray, canny) & outer)
    distances = [distance_plane(contours[part]) for part in PARTS]
    return np.stack([everything * np.uint8(255), *distances, parts * np.uint8(255)])


def load(
    image: ImageSource,
    masks: Mapping[str, PathLike],
    size: tuple[int, int] | None = None,
    canny: str = "upstream",
) -> UInt8Array:
    """The 15 planes of a photograph and the mask files of its parts, at `size` (height, width) or the photograph's.

    The photograph is resized BILINEAR and the masks NEAREST before edges and distances are taken.
    """
    photo = load_rgb(image, size, Image.Resampling.BILINEAR)
    gray = np.asarray(photo.convert("L"))
    height, width = gray.shape
    return edge_planes(gray, {part: read_mask(path, (height, width)) for part, path in masks.items()}, canny)
