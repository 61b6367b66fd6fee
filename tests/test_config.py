"""ModelConfig: presets, JSON round trip, and every way to be wrong."""

from __future__ import annotations

import json

import msgspec
import pytest

from flashcocos.config import PRESETS, ModelConfig
from flashcocos.errors import InputError


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name: str) -> None:
    assert ModelConfig.from_json(PRESETS[name].to_json()) == PRESETS[name]


def test_published_tasks() -> None:
    channels = {name: PRESETS[name].label_channels for name in ("ade20k", "celebahq", "celebahqedge", "deepfashion")}
    assert channels == {"ade20k": 151, "celebahq": 19, "celebahqedge": 15, "deepfashion": 20}
    assert PRESETS["deepfashion"].warped_channels == 48
    assert PRESETS["ade20k"].warped_channels == 3


def test_preset_with_changes() -> None:
    assert ModelConfig.preset("ade20k", ngf=32) == msgspec.structs.replace(PRESETS["ade20k"], ngf=32)
    with pytest.raises(InputError, match="unknown preset 'ade'; available: ade20k"):
        ModelConfig.preset("ade")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "../x"}, "task: expected a name"),
        ({"label_kind": "rgb"}, "label_kind: expected one of classes, channels, got 'rgb'"),
        ({"label_channels": 0}, "label_channels: expected 1 to 255, got 0"),
        ({"label_channels": 256}, "label_channels"),
        ({"label_channels": True}, "config.label_channels: expected int, got True"),
        ({"label_channels": 3.5}, "config.label_channels: expected int, got 3.5"),
        ({"image_size": 100}, "image_size: expected a multiple of 32 from 64 to 8192, got 100"),
        ({"image_size": 32}, "image_size: expected a multiple of 32 from 64 to 8192, got 32"),
        ({"ngf": 0}, "config.ngf: expected 1 to 4096, got 0"),
        ({"residual_blocks": -1}, "residual_blocks"),
        ({"adaptor_kernel": 5}, "adaptor_kernel: expected 3 or 4"),
        ({"warp_stride": 8}, "warp_stride"),
        ({"patch": 2}, "patch: expected 1, 3 or 5, got 2"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"warp_upsampling": "cubic"}, "warp_upsampling"),
        ({"condition_on_label": 1}, "config.condition_on_label: expected bool, got 1"),
    ],
)
def test_invalid_field(change: dict, message: str) -> None:
    fields = {**msgspec.structs.asdict(PRESETS["tiny"]), **change}
    with pytest.raises(InputError, match=message):
        ModelConfig.from_dict(fields)


def test_integer_temperature_is_a_float() -> None:
    config = ModelConfig.preset("tiny", temperature=1)
    assert type(config.temperature) is float


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "config: expected a mapping, got \\[1\\]"),
        ("[" * 100_000, "nest|recursion"),
        ('{"task": "a"}', "config.label_kind is missing"),
        (json.dumps({"tsk": 1}), "unknown key config.tsk; known: task, "),
    ],
)
def test_invalid_json(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ModelConfig.from_json(text)
