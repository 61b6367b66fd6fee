"""Edge planes: Canny as scikit-image 0.14 did it, contours, distances, what is left out."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashcocos.errors import BackendError, InputError
from flashcocos.preprocess import edges
from flashcocos.preprocess.planes import contour, distance_plane


def picture() -> np.ndarray:
    """Waves, blocks and noise of integer arithmetic, uint8 (96, 120)."""
    y, x = np.mgrid[:96, :120]
    waves = (x * x * 3 + y * y * 5 + x * y) // 37 % 256
    blocks = ((x // 20 + y // 16) % 2) * 90
    return ((waves + blocks) // 2 + (x * 7 + y * 13) % 11).astype(np.uint8)


def test_upstream_canny_is_that_of_scikit_image_0_14() -> None:
    # count and weighted sum of the edges that skimage/feature/_canny.py of the 0.14.2 wheel finds in this picture
    found = edges.canny_edges(picture())
    assert (int(found.sum()), int(np.flatnonzero(found).sum())) == (2487, 15810793)


def test_the_two_cannys_differ_by_the_integer_smoothing_alone() -> None:
    gray = picture()
    modern = edges.canny_edges(gray, "modern")
    assert (edges.canny_edges(gray) != modern).sum() == 584
    np.testing.assert_array_equal(edges.canny_edges(gray.astype(np.float64)), modern)


def test_planes_of_a_synthetic_face() -> None:
    gray = picture()
    skin, hair, nose = (np.zeros(gray.shape, bool) for _ in range(3))
    skin[30:80, 30:90] = hair[10:40, 25:95] = nose[50:60, 55:65] = True
    planes = edges.edge_planes(gray, {"hair": hair, "skin": skin, "nose": nose}, "modern")
    assert planes.shape == (15, *gray.shape)
    assert planes.dtype == np.uint8
    contours = contour(skin) | contour(hair) | contour(nose)
    np.testing.assert_array_equal(planes[14], contours * 255)
    background = ~(skin | nose) | hair
    np.testing.assert_array_equal(planes[0] > 0, contours | (edges.canny_edges(gray, "modern") & background))
    for index, part in enumerate(edges.PARTS):
        mask = {"hair": hair, "skin": skin, "nose": nose}.get(part)
        expected = 255 if mask is None else distance_plane(contour(mask))
        np.testing.assert_array_equal(planes[1 + index], np.broadcast_to(expected, gray.shape))


def test_without_any_part_all_of_the_picture_is_background() -> None:
    planes = edges.edge_planes(picture(), {})
    np.testing.assert_array_equal(planes[0], edges.canny_edges(picture()) * 255)
    assert (planes[1:14] == 255).all()
    assert not planes[14].any()


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (1, 40)])
def test_tiny_pictures(shape: tuple[int, int]) -> None:
    assert edges.edge_planes(np.full(shape, 9, np.uint8), {"skin": np.ones(shape, bool)}).shape == (15, *shape)


def test_files_are_resized_before_edges_are_taken(tmp_path: Path) -> None:
    photo = Image.fromarray(np.stack([picture()] * 3, 2))
    photo.save(tmp_path / "a.png")
    mask = np.zeros((48, 60), np.uint8)
    mask[10:30, 20:40] = 255
    Image.fromarray(mask).save(tmp_path / "a_hair.png")
    planes = edges.load(tmp_path / "a.png", {"hair": tmp_path / "a_hair.png"}, (24, 30))
    gray = np.asarray(photo.resize((30, 24), Image.Resampling.BILINEAR).convert("L"))
    hair = np.asarray(Image.fromarray(mask).resize((30, 24), Image.Resampling.NEAREST)) > 0
    np.testing.assert_array_equal(planes, edges.edge_planes(gray, {"hair": hair}))
    assert edges.load(tmp_path / "a.png", {}).shape == (15, 96, 120)


def test_unknown_options_parts_and_sizes_are_refused() -> None:
    gray = picture()
    with pytest.raises(InputError, match="canny: expected one of upstream, modern, got 'old'"):
        edges.canny_edges(gray, "old")
    with pytest.raises(InputError, match="mask 'beard'"):
        edges.edge_planes(gray, {"beard": np.zeros(gray.shape, bool)})
    with pytest.raises(InputError, match=r"mask 'nose' \(4, 4\)"):
        edges.edge_planes(gray, {"nose": np.zeros((4, 4), bool)})


def test_without_scikit_image_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage.feature", None)
    with pytest.raises(BackendError, match=r"scikit-image: pip install 'flashcocos\[prepare\]'"):
        edges.canny_edges(picture())
