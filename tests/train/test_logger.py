"""The package that a training's log needs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from flashcocos.errors import BackendError
from flashcocos.train.logger import TrainLogger


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(BackendError, match=r"tensorboard is missing: pip install 'flashcocos\[train\]'"):
        TrainLogger(tmp_path, 0, 1, 1)
