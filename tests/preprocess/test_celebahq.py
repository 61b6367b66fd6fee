"""CelebA-HQ ids and the glasses that come apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashcocos.errors import InputError
from flashcocos.preprocess import celebahq


@pytest.fixture
def parts(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 16, (8, 8), dtype=np.uint8)


@pytest.fixture
def glasses() -> np.ndarray:
    mask = np.zeros((8, 8), bool)
    mask[2:4, 1:7] = True
    return mask


def test_glasses_replace_what_they_cover(parts: np.ndarray, glasses: np.ndarray) -> None:
    label = celebahq.class_ids(parts, glasses)
    assert (label[glasses] == 16).all()
    np.testing.assert_array_equal(label[~glasses], parts[~glasses])
    np.testing.assert_array_equal(celebahq.class_ids(parts), parts)


def test_files_of_two_sizes_meet_at_the_size_asked_for(tmp_path: Path, parts: np.ndarray, glasses: np.ndarray) -> None:
    Image.fromarray(parts).save(tmp_path / "label.png")
    big = glasses.repeat(2, 0).repeat(2, 1)
    Image.fromarray(np.stack([big * np.uint8(255)] * 3, 2)).save(tmp_path / "label_eye_g.png")
    at_label_size = celebahq.load(tmp_path / "label.png", tmp_path / "label_eye_g.png")
    np.testing.assert_array_equal(at_label_size, celebahq.class_ids(parts, glasses))
    doubled = celebahq.load(tmp_path / "label.png", tmp_path / "label_eye_g.png", (16, 16))
    np.testing.assert_array_equal(doubled, at_label_size.repeat(2, 0).repeat(2, 1))


def test_wrong_ids_and_sizes_are_refused(parts: np.ndarray) -> None:
    with pytest.raises(InputError, match="same size"):
        celebahq.class_ids(parts, np.zeros((4, 4), bool))
    parts[0, 0] = 19
    with pytest.raises(InputError, match="class id 19 at row 0, column 0"):
        celebahq.class_ids(parts)
