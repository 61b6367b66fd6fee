"""OpenPose keypoints to 20 planes: the drawn skeleton (RGB) and the distance to each of 17 limbs.

Joints, limbs and colors are OpenPose's 18-joint body model (arXiv 1812.08008), drawn as its public Python port draws
them: discs of radius 4, then limbs as ellipses of half-width 4, each blended 0.6 over what lies below.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import InputError, import_extra
from ..files import read_text
from .images import MAX_SIDE, PathLike, UInt8Array, check_extent, check_size, open_image
from .planes import distance_plane

JOINTS = 18
# joints that each limb connects: nose 0, neck 1, right arm 2-4, left arm 5-7, right leg 8-10, left leg 11-13,
# eyes 14 15, ears 16 17
LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0),
    (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
# RGB; joint i and limb i have color i
COLORS = (
    (0, 0, 255), (0, 85, 255), (0, 170, 255), (0, 255, 255), (0, 255, 170), (0, 255, 85), (0, 255, 0), (85, 255, 0),
    (170, 255, 0), (255, 255, 0), (255, 170, 0), (255, 85, 0), (255, 0, 0), (255, 0, 85), (255, 0, 170), (255, 0, 255),
    (170, 0, 255), (85, 0, 255),
)  # fmt: skip
STICK = 4  # radius of a joint and half-width of a limb, pixels
MAX_TEXT_BYTES = 1 << 20


def read_keypoints(candidate: PathLike, subset: PathLike) -> npt.NDArray[np.float64]:
    """Joints (18, 2) as (x, y) in pixels of the photograph, NaN where not seen, from a pair of keypoint files.

    candidate: lines `x y score id`, one a keypoint; subset: one line a person, 18 keypoint numbers (-1 = not seen),
    then score and count. Raises `InputError` for damaged files and for zero or several persons.
    """
    points, persons = _read_table(candidate, 4), _read_table(subset, 20)
    if len(persons) != 1:
        raise InputError(f"{subset}: {len(persons)} persons; expected exactly one: crop the photograph to one person")
    joints = np.full((JOINTS, 2), np.nan)
    for joint, number in enumerate(persons[0, :JOINTS]):
        if number == -1:
            continue
        if not (0 <= number < len(points) and number == int(number)):
            raise InputError(
                f"{subset}: keypoint number {number:g}; expected -1 to {len(points) - 1}, as in {candidate}"
            )
        joints[joint] = points[int(number), :2]
    if np.isnan(joints).all():
        raise InputError(f"{subset}: the person has no joint that is seen")
    return joints


def pose_planes(
    joints: npt.NDArray[np.float64], canvas: tuple[int, int], size: tuple[int, int] | None = None
) -> UInt8Array:
    """The 20 planes, uint8 (20, H, W): skeleton (RGB), then distance to each limb of `LIMBS` (255 where not seen).

    joints: (18, 2) as (x, y), NaN where not seen, in pixels of a `canvas` (height, width).
    size: (height, width) that the planes are resized to, NEAREST for the skeleton and BILINEAR for the distances.
    Raises `InputError` for bad joints or sizes, `BackendError` without OpenCV.
    """
    check_extent(*canvas, "canvas")
    check_size(size)
    if joints.shape != (JOINTS, 2):
        raise InputError(f"joints: expected an array ({JOINTS}, 2) of (x, y), got {joints.shape}")
    if (np.abs(joints) > MAX_SIDE).any():  # NaN, a joint not seen, compares false
        raise InputError(f"joints: coordinate {np.nanmax(np.abs(joints)):g}; expected at most {MAX_SIDE} pixels")
    cv2 = import_extra("cv2", "this label needs opencv-python-headless", "prepare")
    skeleton = np.zeros((*canvas, 3), np.uint8)
    seen = np.isfinite(joints[:, 0] + joints[:, 1])
    for joint in np.flatnonzero(seen):
        x, y = joints[joint]
        cv2.circle(skeleton, (int(x), int(y)), STICK, COLORS[joint], thickness=-1)
    planes = []
    for (start, end), color in zip(LIMBS, COLORS, strict=False):
        limb = np.zeros(canvas, np.uint8)
        if seen[start] and seen[end]:
            outline = _limb_outline(cv2, joints[start], joints[end])
            over = skeleton.copy()
            cv2.fillConvexPoly(over, outline, color)
            skeleton = cv2.addWeighted(skeleton, 0.4, over, 0.6, 0)
            cv2.fillConvexPoly(limb, outline, 255)
        planes.append(_resize(distance_plane(limb > 0), size, Image.Resampling.BILINEAR))
    colors = _resize(skeleton, size, Image.Resampling.NEAREST).transpose(2, 0, 1)
    return np.concatenate([colors, np.stack(planes)])


def load(image: PathLike, candidate: PathLike, subset: PathLike, size: tuple[int, int] | None = None) -> UInt8Array:
    """The 20 planes of a photograph's keypoint files; the photograph gives the size of the canvas alone."""
    photo = open_image(image)
    return pose_planes(read_keypoints(candidate, subset), (photo.height, photo.width), size)


def _limb_outline(cv2: Any, start: npt.NDArray[np.float64], end: npt.NDArray[np.float64]) -> npt.NDArray[np.int32]:
    """Corners (n, 2) of the ellipse between two joints."""
    x, y = (start + end) / 2
    dx, dy = start - end
    axes = (int(math.sqrt(dx**2 + dy**2) / 2), STICK)
    angle = int(math.degrees(math.atan2(dy, dx)))
    return np.asarray(cv2.ellipse2Poly((int(x), int(y)), axes, angle, 0, 360, 1), np.int32)


def _resize(pixels: UInt8Array, size: tuple[int, int] | None, method: Image.Resampling) -> UInt8Array:
    if size is None or pixels.shape[:2] == tuple(size):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), method))


def _read_table(path: PathLike, columns: int) -> npt.NDArray[np.float64]:
    """Rows of `columns` finite numbers, (n, columns), of a text file."""
    rows = [line.split() for line in read_text(path, MAX_TEXT_BYTES, "ascii").splitlines() if line.strip()]
    try:
        table = np.array([[float(cell) for cell in row] for row in rows], np.float64)
    except ValueError as error:
        raise InputError(f"{path}: not a readable keypoint file: {error}") from error
    if not rows:
        return np.zeros((0, columns))
    if table.ndim != 2 or table.shape[1] != columns or not np.isfinite(table).all():
        raise InputError(f"{path}: expected lines of {columns} finite numbers")
    return table
