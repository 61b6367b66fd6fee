"""Model files: round trip, folding, and files that are not what they should be."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashcocos.config import ModelConfig
from flashcocos.errors import CheckpointError, InputError
from flashcocos.train.checkpoint import load_model, read_metadata, save_model
from flashcocos.train.networks import CoCosNet
from flashcocos.train.networks.layers import add_spectral_norm

CONFIG = ModelConfig.preset("tiny", ngf=1, nef=1, feature_channels=4, spade_hidden=2)


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_model(tmp_path / "model.safetensors", CoCosNet(CONFIG), {"steps": 3})
    return tmp_path / "model.safetensors"


def rewrite(path: Path, change: Any = None, **metadata: str | None) -> None:
    """Store the file's tensors and metadata again, altered."""
    tensors = load_file(path)
    config, provenance = read_metadata(path)
    stored: dict[str, str | None] = {
        "format": "flashcocos-model",
        "format_version": "2",
        "config": config.to_json(),
        "provenance": json.dumps(provenance),
    }
    if change:
        change(tensors)
    save_file(tensors, path, {key: value for key, value in (stored | metadata).items() if value is not None})


def test_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CoCosNet(CONFIG)
    save_model(tmp_path / "new" / "model.safetensors", model, {"steps": 3})
    loaded = load_model(tmp_path / "new" / "model.safetensors")
    assert loaded.config == CONFIG
    assert not loaded.training
    assert read_metadata(tmp_path / "new" / "model.safetensors") == (CONFIG, {"steps": 3})
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_spectral_norm_is_folded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CoCosNet(CONFIG).eval()
    add_spectral_norm(model)
    save_model(tmp_path / "m.safetensors", model)
    loaded = load_model(tmp_path / "m.safetensors")
    assert not [name for name in loaded.state_dict() if "parametrizations" in name]
    label = torch.randint(0, 12, (1, 64, 64))
    with torch.no_grad():
        torch.testing.assert_close(loaded.encode_query(label), model.encode_query(label), rtol=1e-4, atol=1e-5)


def test_a_failed_save_leaves_the_old_file(model_file: Path) -> None:
    before = model_file.read_bytes()
    with pytest.raises(TypeError):
        save_model(model_file, CoCosNet(CONFIG), {"not JSON": object()})
    assert model_file.read_bytes() == before
    assert list(model_file.parent.iterdir()) == [model_file]


def test_extra_key_is_named(model_file: Path) -> None:
    rewrite(model_file, lambda tensors: tensors.update(surplus=torch.zeros(1)))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: 'surplus' is no part"):
        load_model(model_file)


def test_missing_key_is_named(model_file: Path) -> None:
    rewrite(model_file, lambda tensors: tensors.pop("generator.last.bias"))
    with pytest.raises(CheckpointError, match=r"'generator\.last\.bias' is missing \(1 of "):
        load_model(model_file)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(4), r"F32 \(4,\), expected F32 \(3,\)"),
        (torch.zeros(3, dtype=torch.float16), r"F16 \(3,\), expected F32 \(3,\)"),
        (torch.tensor([0.0, float("nan"), 0.0]), "not finite"),
        (torch.tensor([0.0, float("inf"), 0.0]), "not finite"),
    ],
)
def test_bad_tensor_is_named(model_file: Path, value: torch.Tensor, message: str) -> None:
    rewrite(model_file, lambda tensors: tensors.update({"generator.last.bias": value}))
    with pytest.raises(CheckpointError, match=rf"'generator\.last\.bias' .*{message}"):
        load_model(model_file)


def test_another_configuration_does_not_fit(model_file: Path) -> None:
    rewrite(model_file, config=ModelConfig.preset("tiny").to_json())
    with pytest.raises(CheckpointError, match="expected F32"):
        load_model(model_file)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": None}, "not of flashcocos"),
        ({"format_version": "1"}, "format version '1' is unknown"),
        ({"config": "{"}, "metadata is damaged"),
        ({"config": None}, "metadata is damaged"),
        ({"config": '{"task": "x"}'}, "config.label_kind is missing"),
        ({"config": "[" * 100_000}, "metadata is damaged"),
        ({"provenance": "{"}, "metadata is damaged"),
        ({"provenance": "[]"}, "provenance is not a JSON object"),
    ],
)
def test_bad_metadata(model_file: Path, metadata: dict[str, str | None], message: str) -> None:
    rewrite(model_file, **metadata)
    for read in (load_model, read_metadata):
        with pytest.raises(CheckpointError, match=message):
            read(model_file)


@pytest.mark.parametrize("content", [b"", b"no model at all", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}"])
def test_not_a_model_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"m\.safetensors: "):
        load_model(tmp_path / "m.safetensors")


def test_truncated_file(model_file: Path) -> None:
    model_file.write_bytes(model_file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not a readable model file"):
        load_model(model_file)


def test_what_is_no_file_is_refused_unread(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path, message in (
        (tmp_path / "absent.safetensors", "does not exist"),
        (tmp_path, "is a folder; expected a file"),
        (tmp_path / "pipe.safetensors", "expected a file"),
        (Path("/dev/zero"), "expected a file"),
    ):
        for read in (load_model, read_metadata):
            with pytest.raises(InputError, match=message):
                read(path)
