"""Pretrained features from the files that users bring: each layout gives the maps of its own network."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from flashcocos.errors import CheckpointError, InputError
from flashcocos.files import file_hash
from flashcocos.train.networks import vgg
from flashcocos.train.networks.vgg import COUNTS, WIDTHS, Vgg19
from flashcocos.train.networks.vgg_weights import load_vgg


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sixteenth of the widths: 80 MB of weights would teach no more."""
    monkeypatch.setattr(vgg, "WIDTHS", tuple(width // 16 for width in WIDTHS))
    torch.manual_seed(0)


def torchvision_layout() -> nn.Sequential:
    """`features` of torchvision's VGG19."""
    layers: list[nn.Module] = []
    channels = 3
    for stage, (width, count) in enumerate(zip(vgg.WIDTHS, COUNTS, strict=True)):
        layers += [nn.MaxPool2d(2)] if stage else []
        for _ in range(count):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers)


@torch.no_grad()
def test_torchvisions_file(tmp_path: Path) -> None:
    plain = torchvision_layout()
    state = {f"features.{name}": value for name, value in plain.state_dict().items()}
    torch.save(state | {"classifier.0.weight": torch.zeros(2, 2)}, tmp_path / "vgg.pth")
    digest = file_hash(tmp_path / "vgg.pth")
    path = tmp_path / f"vgg19-{digest[:8]}.pth"
    (tmp_path / "vgg.pth").rename(path)
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    normed = ((image + 1) / 2 - mean) / deviation
    network = load_vgg(path)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    found = network(image, ("r12", "r52"))
    torch.testing.assert_close(found["r12"], plain[:4](normed))
    torch.testing.assert_close(found["r52"], plain[:32](normed))
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match="damaged: its SHA-256 starts with"):
        load_vgg(path)


@torch.no_grad()
def test_upstreams_file(tmp_path: Path) -> None:
    expected = Vgg19()
    torch.save(expected.state_dict(), tmp_path / "vgg19_conv.pth")
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    found = load_vgg(tmp_path / "vgg19_conv.pth")(image, ("r42",))["r42"]
    assert torch.equal(found, expected(image, ("r42",))["r42"])


def test_files_that_are_not_vgg19(tmp_path: Path) -> None:
    path, state = tmp_path / "weights.pth", Vgg19().state_dict()
    os.mkfifo(tmp_path / "pipe-01234567.pth")  # named as if its hash were to be read
    for wrong, message in (
        (path, "does not exist"),
        (tmp_path, "is a folder; expected a file"),
        (tmp_path / "pipe-01234567.pth", "expected a file"),
        (Path("/dev/zero"), "expected a file"),
    ):
        with pytest.raises(InputError, match=message):
            load_vgg(wrong)
    path.write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match=r"file: it is damaged or holds more than tensors; give vgg = PATH"):
        load_vgg(path)
    torch.save(Vgg19(), path)  # a pickled module, which could hold code
    with pytest.raises(CheckpointError, match="not a readable weights file"):
        load_vgg(path)
    torch.save([1], path)
    with pytest.raises(CheckpointError, match="holds a list, expected a dict"):
        load_vgg(path)
    torch.save({**state, "conv1_1.bias": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=r"not VGG19's weights: .*size mismatch for conv1_1\.bias"):
        load_vgg(path)
    torch.save({**state, "conv1_1.bias": state["conv1_1.bias"] * np.inf}, path)
    with pytest.raises(CheckpointError, match="values that are not finite"):
        load_vgg(path)
    torch.save({f"features.{name}": value for name, value in torchvision_layout()[:8].state_dict().items()}, path)
    with pytest.raises(CheckpointError, match="4 convolutions below 'features', expected VGG19's 16"):
        load_vgg(path)


def test_no_file_lists_the_options() -> None:
    with pytest.raises(InputError, match=r'vgg19-dcbb9e9d\.pth .*vgg19_conv\.pth.*"none"'):
        load_vgg("")
