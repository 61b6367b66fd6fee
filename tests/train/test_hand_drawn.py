"""Labels as if painted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from flashcocos.train.data.hand_drawn import hand_drawn


def circle(height: int = 96, width: int = 128) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    label = np.where((y - height / 2) ** 2 + (x - width / 2) ** 2 < 900, 3, 1).astype(np.uint8)
    label[height // 2] = 7  # a line of one pixel
    return label


@pytest.mark.parametrize("seed", range(6))
def test_large_parts_stay_and_thin_ones_go(seed: int) -> None:
    label = circle()
    painted = hand_drawn(label, seed)
    assert (painted.dtype, painted.shape) == (np.uint8, label.shape)
    assert {1, 3} <= set(np.unique(painted)) <= {1, 3, 7}
    assert (painted == 7).sum() < 0.5 * (label == 7).sum()
    assert 0.01 < (painted != label).mean() < 0.12


def test_one_seed_is_one_painting() -> None:
    label = circle()
    assert np.array_equal(hand_drawn(label, 5), hand_drawn(label, 5))
    assert not np.array_equal(hand_drawn(label, 5), hand_drawn(label, 6))


def test_a_plain_label_stays_plain() -> None:
    assert np.array_equal(hand_drawn(np.full((64, 64), 9, np.uint8), 0), np.full((64, 64), 9))
