"""Masks, contours and distance planes, against definitions and against OpenCV."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from flashcocos.errors import InputError
from flashcocos.preprocess.planes import contour, distance_plane, read_mask


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (64, 65), (40, 1200), (1500, 3)])
@pytest.mark.parametrize("density", [0, 1e-4, 1e-2, 0.3, 1])
def test_distances_equal_opencv(rng: np.random.Generator, shape: tuple[int, int], density: float) -> None:
    mask = rng.random(shape) < density
    reference = cv2.distanceTransform(np.where(mask, 0, 255).astype(np.uint8), cv2.DIST_L1, 3) / 3
    np.testing.assert_array_equal(distance_plane(mask), np.clip(reference, 0, 255).astype(np.uint8))


def test_distance_of_one_point_is_city_block() -> None:
    mask = np.zeros((30, 40), bool)
    mask[10, 20] = True
    y, x = np.mgrid[:30, :40]
    np.testing.assert_array_equal(distance_plane(mask), (abs(y - 10) + abs(x - 20)) // 3)


def test_contour_marks_both_sides_of_each_border() -> None:
    mask = np.zeros((5, 6), bool)
    mask[2, 2:4] = True
    rows = ["......", "..##..", ".####.", "..##..", "......"]
    expected = np.array([[cell == "#" for cell in row] for row in rows])
    np.testing.assert_array_equal(contour(mask), expected)
    assert not contour(np.ones((4, 4), bool)).any()
    assert not contour(np.ones((1, 1), bool)).any()


@pytest.mark.parametrize("mode", ["L", "RGB", "1", "P"])
def test_masks_of_any_usual_mode(tmp_path: Path, mode: str) -> None:
    mask = np.zeros((4, 6), bool)
    mask[1, 2:] = True
    Image.fromarray(mask * np.uint8(255)).convert(mode).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), mask)
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png", (8, 12)), mask.repeat(2, 0).repeat(2, 1))


def test_a_mask_of_zeros_and_ones(tmp_path: Path) -> None:
    Image.fromarray(np.eye(4, dtype=np.uint8)).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), np.eye(4, dtype=bool))


@pytest.mark.parametrize("values", [[0, 254], [0, 128, 255], [0, 1, 255]])
def test_gray_masks_are_refused(tmp_path: Path, values: list[int]) -> None:
    Image.fromarray(np.array([values], np.uint8)).save(tmp_path / "mask.png")
    with pytest.raises(InputError, match=r"mask\.png: a mask with intermediate gray values"):
        read_mask(tmp_path / "mask.png")


def test_16_bit_masks_are_refused(tmp_path: Path) -> None:
    Image.new("I;16", (4, 4)).save(tmp_path / "mask.png")
    with pytest.raises(InputError, match="image mode 'I;16'"):
        read_mask(tmp_path / "mask.png")
