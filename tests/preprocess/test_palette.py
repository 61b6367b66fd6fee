"""The palette and the names of classes."""

from __future__ import annotations

import numpy as np
import pytest

from flashcocos.config import ModelConfig
from flashcocos.preprocess.palette import CLASS_NAMES, class_names, hexadecimal, label_colors, legend, palette

CHANNELS = ModelConfig.preset("tiny-channels")


def test_no_color_stands_for_two_classes() -> None:
    colors = palette(512)
    assert (colors.shape, colors.dtype) == ((512, 3), np.uint8)
    assert len(np.unique(colors, axis=0)) == 512
    assert [hexadecimal(color) for color in colors[:4]] == ["#000000", "#800000", "#008000", "#808000"]


@pytest.mark.parametrize("preset", ["ade20k", "celebahq", "avatars-128"])
def test_every_class_of_a_known_task_has_a_name_of_its_own(preset: str) -> None:
    config = ModelConfig.preset(preset)
    names = class_names(config)
    assert len(set(names)) == len(names) == config.label_channels
    assert names == CLASS_NAMES[config.task]


def test_places_of_names() -> None:
    ade20k, celebahq = CLASS_NAMES["ade20k"], CLASS_NAMES["celebahq"]
    assert [ade20k[place] for place in (0, 1, 13, 50, 100, 150)] == [
        "unlabeled", "wall", "person", "fireplace", "buffet", "flag",
    ]  # fmt: skip
    assert [celebahq[place] for place in (0, 1, 5, 6, 16)] == ["background", "hair", "left eye", "right eye", "glasses"]


def test_other_tasks() -> None:
    mine = ModelConfig.preset("tiny", task="mine", label_channels=3)
    assert class_names(mine) == ("class 0", "class 1", "class 2")
    assert class_names(ModelConfig.preset("celebahq", label_channels=18))[17] == "class 17"
    assert legend(mine) == (("class 0", "class 1", "class 2"), ((0, 0, 0), (128, 0, 0), (0, 128, 0)))
    assert legend(CHANNELS) == ((), ())


def test_label_colors() -> None:
    ids = np.arange(151, dtype=np.uint8).reshape(1, -1)
    colors = label_colors(ModelConfig.preset("ade20k"), ids)
    assert (colors.shape, colors.dtype) == ((1, 151, 3), np.uint8)
    assert len(np.unique(colors[0], axis=0)) == 151
    assert not colors[0, 0].any()
    planes = np.zeros((5, 2, 2), np.float32)
    planes[0], planes[4, 0, 0] = 0.5, 1
    mixed = label_colors(CHANNELS, planes)
    assert (mixed[0, 1] == mixed[1, 1]).all()
    assert mixed[0, 1].any()
    assert (mixed[0, 0] != mixed[0, 1]).any()
    pose = np.random.default_rng(0).random((20, 4, 4)).astype(np.float32)
    drawn = label_colors(ModelConfig.preset("deepfashion"), pose)
    np.testing.assert_allclose(drawn / 255, pose[:3].transpose(1, 2, 0), atol=0.5 / 255 + 1e-6)
    edges = label_colors(ModelConfig.preset("celebahqedge"), pose[:15])
    np.testing.assert_allclose(edges[..., 1] / 255, pose[0], atol=0.5 / 255 + 1e-6)
