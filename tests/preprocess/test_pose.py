"""Keypoint files and the planes drawn from them."""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from flashcocos.errors import BackendError, InputError
from flashcocos.preprocess import pose
from flashcocos.preprocess.planes import distance_plane


def write(folder: Path, points: list[list[float]], persons: list[list[float]]) -> tuple[Path, Path]:
    for name, rows in (("candidate", points), ("subset", persons)):
        (folder / f"a_{name}.txt").write_text("\n".join(" ".join(f"{cell:.6e}" for cell in row) for row in rows))
    return folder / "a_candidate.txt", folder / "a_subset.txt"


def person(**joints: int) -> list[float]:
    """A subset line with keypoint numbers by joint, `j1=0` and so on; the others are not seen."""
    return [joints.get(f"j{joint}", -1) for joint in range(18)] + [20.0, len(joints)]


def only(*joints: tuple[int, float, float]) -> np.ndarray:
    table = np.full((18, 2), np.nan)
    for joint, x, y in joints:
        table[joint] = x, y
    return table


def test_keypoints_are_looked_up_by_number(tmp_path: Path) -> None:
    points = [[10.5, 20, 0.9, 0], [30, 40, 0.8, 1], [50, 60, 0.7, 2]]
    joints = pose.read_keypoints(*write(tmp_path, points, [person(j0=2, j17=0)]))
    np.testing.assert_array_equal(joints, only((0, 50, 60), (17, 10.5, 20)))


def test_one_keypoint_is_enough(tmp_path: Path) -> None:
    joints = pose.read_keypoints(*write(tmp_path, [[1, 2, 1, 0]], [person(j1=0)]))
    np.testing.assert_array_equal(joints, only((1, 1, 2)))


@pytest.mark.parametrize(
    ("points", "persons", "message"),
    [
        ([[1, 2, 1, 0]], [], "0 persons; expected exactly one"),
        ([[1, 2, 1, 0]], [person(j0=0), person(j0=0)], "2 persons; expected exactly one"),
        ([[1, 2, 1, 0]], [person(j0=1)], "keypoint number 1; expected -1 to 0"),
        ([[1, 2, 1, 0]], [person(j0=-2)], "keypoint number -2"),
        ([], [person()], "no joint that is seen"),
        ([[1, 2, 1]], [person(j0=0)], "lines of 4 finite numbers"),
        ([[1, 2, 1, 0]], [[1.0] * 19], "lines of 20 finite numbers"),
        ([[np.nan, 2, 1, 0]], [person(j0=0)], "lines of 4 finite numbers"),
        ([[1, 2, 1, 0], [1, 2]], [person(j0=0)], "not a readable keypoint file"),
    ],
)
def test_bad_keypoint_files_are_named(
    tmp_path: Path, points: list[list[float]], persons: list[list[float]], message: str
) -> None:
    with pytest.raises(InputError, match=rf"a_(candidate|subset)\.txt: .*{message}"):
        pose.read_keypoints(*write(tmp_path, points, persons))


@pytest.mark.parametrize("data", [b"words and words", b"\xff\xfe\x00", b"1 " * (1 << 20)])
def test_damaged_keypoint_files_are_named(tmp_path: Path, data: bytes) -> None:
    candidate, subset = write(tmp_path, [[1, 2, 1, 0]], [person(j0=0)])
    candidate.write_bytes(data)
    with pytest.raises(InputError, match=r"a_candidate\.txt"):
        pose.read_keypoints(candidate, subset)


def test_a_limb_is_drawn_and_measured() -> None:
    planes = pose.pose_planes(only((1, 20, 30), (2, 60, 30)), (64, 80))  # neck to right shoulder: limb 0
    assert planes.shape == (20, 64, 80)
    assert planes.dtype == np.uint8
    ellipse = np.zeros((64, 80), np.uint8)
    cv2.fillConvexPoly(ellipse, cv2.ellipse2Poly((40, 30), (20, 4), 180, 0, 360, 1), 255)
    limb = planes[3] == 0
    np.testing.assert_array_equal(planes[3], distance_plane(ellipse > 0))
    assert limb[30, 20:61].all()
    assert not limb[:24].any()
    assert not limb[37:].any()
    assert (planes[4:] == 255).all()
    # limb 0 is blue, blended at 0.6 over the background, and over the disc of joint 1 (0, 85, 255)
    np.testing.assert_array_equal(planes[:3, 30, 40], [0, 0, 153])
    np.testing.assert_array_equal(planes[:3, 30, 22], [0, 34, 255])
    np.testing.assert_array_equal(planes[:3, 30, 16], [0, 85, 255])


def test_joints_off_the_canvas_are_clipped() -> None:
    planes = pose.pose_planes(only((0, -50.0, 5.0), (1, 500.0, 5.0)), (32, 32))
    assert (planes[3 + 12, 5] == 0).all()  # limb 12: neck to nose crosses the whole row


def test_size_resizes_the_skeleton_nearest_and_the_distances_bilinear() -> None:
    joints = only((1, 20, 30), (2, 60, 31), (8, 25, 60))
    native, small = pose.pose_planes(joints, (64, 80)), pose.pose_planes(joints, (64, 80), (32, 48))
    for index, plane in enumerate(native):
        method = Image.Resampling.NEAREST if index < 3 else Image.Resampling.BILINEAR
        np.testing.assert_array_equal(small[index], np.asarray(Image.fromarray(plane).resize((48, 32), method)))


def test_bad_joints_and_sizes_are_refused() -> None:
    with pytest.raises(InputError, match=r"\(18, 2\)"):
        pose.pose_planes(np.zeros((17, 2)), (32, 32))
    with pytest.raises(InputError, match="coordinate 1e\\+09"):
        pose.pose_planes(only((0, 1e9, 0)), (32, 32))
    with pytest.raises(InputError, match="canvas"):
        pose.pose_planes(only((0, 1, 1)), (0, 32))


def test_without_opencv_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(BackendError, match=r"opencv-python-headless: pip install 'flashcocos\[prepare\]'"):
        pose.pose_planes(only((0, 1, 1)), (8, 8))
