"""What a training shows of labels, and the package that it needs for it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from flashcocos.errors import BackendError
from flashcocos.train.logger import TrainLogger, label_picture


def test_a_class_has_a_color_and_so_has_a_plane() -> None:
    ids = torch.arange(20, dtype=torch.uint8).reshape(1, 4, 5)
    picture = label_picture(ids)
    assert picture.shape == (1, 3, 4, 5)
    assert len(picture.flatten(2)[0].unique(dim=1)[0]) == 20
    assert torch.equal(picture[0, :, 0, 0], torch.full((3,), -1.0))
    planes = torch.zeros(1, 3, 1, 2)
    planes[0, 1, 0, 1] = 0.5  # the second plane, half set: half the color of class 2
    mixed = label_picture(planes)
    torch.testing.assert_close(mixed[0, :, 0, 1], (picture[0, :, 0, 2] + 1) / 2 - 1)
    assert torch.equal(mixed[0, :, 0, 0], torch.full((3,), -1.0))


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(BackendError, match=r"tensorboard is missing: pip install 'flashcocos\[train\]'"):
        TrainLogger(tmp_path, 0, 1, 1)
