"""Scores on pairs with known targets: by hand where the answer is known, and the sheet of pictures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flashcocos.config import ModelConfig
from flashcocos.errors import InputError
from flashcocos.train.evaluate import evaluate, psnr, trivial_answer
from flashcocos.train.networks import CoCosNet

NAMES = [f"class {index}" for index in range(12)]


class FlatPairs:
    """Each pair: the exemplar is the target; the left half is class 0, the right half class 1."""

    def __init__(self, has_target: bool = True) -> None:
        self.has_target = has_target

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> dict[str, Any]:
        label = np.zeros((64, 64), dtype=np.uint8)
        label[:, 32:] = 1
        image = np.full((3, 64, 64), -0.5, dtype=np.float32)
        image[:, :, 32:] = 0.5 + index / 100
        return {
            "label": label, "exemplar_label": label, "exemplar": image, "image": image, "has_target": self.has_target,
        }  # fmt: skip


@pytest.fixture(scope="module")
def copier() -> CoCosNet:
    """A model that copies the exemplar, as equal positions alone attract each other."""
    model = CoCosNet(ModelConfig.preset("tiny", position_waves=4, warp_skip=True, warp_upsampling="patch")).eval()
    with torch.no_grad():
        for branch in (model.correspondence.theta, model.correspondence.phi):
            branch.weight.zero_()
            branch.bias.zero_()
            branch.weight[:, -16:] = torch.eye(16)[..., None, None]
        model.generator.last.weight.zero_()
        model.generator.last.bias.copy_(torch.tensor([0.1, 0.1, 0.1, 30.0]))
    return model


def test_scores_of_a_copy_that_is_too_bright_by_a_known_amount(copier: CoCosNet, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    scores = evaluate(copier, FlatPairs(), NAMES, sheet=sheet, sheet_pairs=3, backend="reference")
    assert scores.pairs == 9
    assert scores.psnr == pytest.approx(-20 * np.log10(0.05), abs=0.05)
    assert scores.psnr_warped > 35
    assert scores.psnr_trivial == pytest.approx(100)
    assert scores.l1 == pytest.approx(0.05, abs=2e-3)
    assert scores.correspondence == pytest.approx(1, abs=0.01)
    assert set(scores.psnr_by_class) == {"class 0", "class 1"}
    assert scores.psnr_by_class["class 1"] == pytest.approx(26.02, abs=0.1)
    assert scores.colour_error_by_class["class 0"] == pytest.approx(0.05, abs=2e-3)
    assert json.loads(scores.to_json()) == dataclasses.asdict(scores)
    picture = np.asarray(Image.open(sheet))
    assert picture.shape == (64, 3 * 5 * 64, 3)
    assert picture[0, 64:128].tolist() == [[64] * 3] * 32 + [[191] * 3] * 32  # the exemplar of the first pair


def test_fewer_pairs(copier: CoCosNet) -> None:
    assert evaluate(copier, FlatPairs(), NAMES, count=2, backend="reference").pairs == 2
    for count in (0, 10):
        with pytest.raises(InputError, match=f"1 to 9 pairs, got {count}"):
            evaluate(copier, FlatPairs(), NAMES, count=count)
    with pytest.raises(InputError, match="needs a target"):
        evaluate(copier, FlatPairs(has_target=False), NAMES)


def test_the_trivial_answer() -> None:
    label = torch.zeros(1, 3, 4, 4)
    label[:, 2, :2], label[:, 1, 2:] = 1, 1
    exemplar_label = torch.zeros(1, 3, 4, 4)
    exemplar_label[:, 0, :1], exemplar_label[:, 1, 1:] = 1, 1
    exemplar = torch.zeros(1, 3, 4, 4)
    exemplar[:, :, 1:] = 0.4
    exemplar[:, :, 3] = 1.0
    answer = trivial_answer(label, exemplar, exemplar_label)
    torch.testing.assert_close(answer[:, :, 2:], torch.full((1, 3, 2, 4), 0.6))
    torch.testing.assert_close(answer[:, :, :2], torch.full((1, 3, 2, 4), 0.45))  # the exemplar lacks class 2


def test_psnr() -> None:
    image = torch.zeros(2, 3, 8, 8)
    other = image.clone()
    other[1] += 0.2
    torch.testing.assert_close(psnr(image, other), torch.tensor([100.0, 20.0]))
