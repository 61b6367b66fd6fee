"""The import of upstream's checkpoints: names, inference of the configuration, folding, and files that are wrong."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from upstream_layout import TINY, load_upstream_state, upstream_shapes, upstream_states

from flashcocos.config import ModelConfig
from flashcocos.errors import CheckpointError, InputError
from flashcocos.train.checkpoint import load_model, read_metadata
from flashcocos.train.networks import CoCosNet
from flashcocos.train.networks.layers import add_spectral_norm
from flashcocos.train.upstream import TASKS, StateDict, convert, infer_config

DATA = Path(__file__).parents[1] / "data" / "parity_synthetic"
States = dict[str, dict[str, Tensor]]


def tiny_config(task: str = "celebahq", **changes: Any) -> ModelConfig:
    return ModelConfig.preset(task, **(TINY | changes))


def write(folder: Path, states: States) -> tuple[Path, Path]:
    paths = folder / "latest_net_Corr.pth", folder / "latest_net_G.pth"
    for path, network in zip(paths, ("Corr", "G"), strict=True):
        torch.save(states[network], path)
    return paths


@pytest.mark.parametrize("task", TASKS)
def test_names_and_shapes_are_the_published_ones(task: str) -> None:
    with torch.device("meta"):
        shapes = upstream_shapes(CoCosNet(ModelConfig.preset(task)))
    assert shapes == json.loads((DATA / f"{task}.keys.json").read_text())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("changes", [{}, {"attention": False}, {"adaptor_kernel": 3}, {"residual_blocks": 0}])
def test_configuration_is_inferred(task: str, changes: dict[str, Any]) -> None:
    config = tiny_config(task, **changes)
    states = {network: StateDict(tensors, network) for network, tensors in upstream_states(config).items()}
    assert infer_config(states, {}) == config


def test_label_mixing_is_read_off_the_shapes() -> None:
    config = tiny_config("ade20k", condition_on_label=False)
    states = {network: StateDict(tensors, network) for network, tensors in upstream_states(config).items()}
    assert infer_config(states, {}) == config


def test_own_label_channels_need_options(tmp_path: Path) -> None:
    config = ModelConfig("roads", "classes", 34, warp_upsampling="nearest", **TINY)
    paths = write(tmp_path, upstream_states(config))
    with pytest.raises(CheckpointError, match=r"34 label channels .*ade20k 151.*; say what they are: task is needed"):
        convert(*paths, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="warp_upsampling is needed"):
        convert(*paths, tmp_path / "m.safetensors", task="roads", label_kind="classes")
    with pytest.raises(CheckpointError, match="label_kind"):
        convert(*paths, tmp_path / "m.safetensors", task="roads", label_kind="wrong", warp_upsampling="nearest")
    options = {"task": "roads", "label_kind": "classes", "warp_upsampling": "nearest"}
    assert convert(*paths, tmp_path / "m.safetensors", **options) == config


def test_converted_model_equals_the_spectral_normed_one(tmp_path: Path) -> None:
    config = tiny_config()
    states = upstream_states(config)
    assert convert(
        *write(tmp_path, states), tmp_path / "m.safetensors", warp_upsampling="pixel_shuffle"
    ) == tiny_config(warp_upsampling="pixel_shuffle")
    convert(tmp_path / "latest_net_Corr.pth", tmp_path / "latest_net_G.pth", tmp_path / "m.safetensors")
    model = load_model(tmp_path / "m.safetensors")
    assert model.config == config
    normed = CoCosNet(config).eval()
    add_spectral_norm(normed)
    load_upstream_state(normed, states)
    torch.manual_seed(0)
    label, image = torch.randint(0, 19, (1, 64, 96)), torch.rand(1, 3, 64, 96) * 2 - 1
    with torch.no_grad():
        for ours, theirs in [
            (model.encode_query(label), normed.encode_query(label)),
            (model.encode_exemplar(image, label)[0], normed.encode_exemplar(image, label)[0]),
            (
                model.synthesize(model.warp_values(image), label)[0],
                normed.synthesize(model.warp_values(image), label)[0],
            ),
        ]:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_weights_are_folded_exactly(tmp_path: Path) -> None:
    states = upstream_states(tiny_config())
    convert(*write(tmp_path, states), tmp_path / "m.safetensors")
    folded = load_model(tmp_path / "m.safetensors").state_dict()
    stem = "adaptive_model_img.layer4.0.weight"
    weight, u, v = (states["Corr"][f"{stem}_{leaf}"].double().numpy() for leaf in ("orig", "u", "v"))
    expected = weight / (u @ weight.reshape(len(u), -1) @ v)
    assert np.array_equal(folded["correspondence.image_adaptor.layers.3.weight"], expected.astype(np.float32))
    scale, shift = (states["G"][f"up_3.norm_1.mlp_{part}.bias"] for part in ("gamma", "beta"))
    assert torch.equal(folded["generator.up_3.norm_1.scale_shift.bias"], torch.cat([scale, shift]))


def test_provenance_names_the_files(tmp_path: Path) -> None:
    convert(*write(tmp_path, upstream_states(tiny_config())), tmp_path / "m.safetensors")
    _, provenance = read_metadata(tmp_path / "m.safetensors")
    assert sorted(provenance["files"]) == ["latest_net_Corr.pth", "latest_net_G.pth"]
    assert all(len(digest) == 64 for digest in provenance["files"].values())


def nan_in(key: str) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        state[key].view(-1)[-1] = float("nan")

    return change


CHANGES: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "missing": ("G", lambda s: s.pop("up_2.conv_1.bias"), r"key 'up_2\.conv_1\.bias' is missing"),
    "missing before inference": ("Corr", lambda s: s.pop("theta.weight"), r"key 'theta\.weight' is missing"),
    "missing vector": (
        "Corr",
        lambda s: s.pop("adaptive_model_seg.layer3.0.weight_u"),
        "layer3.0.weight_u' is missing",
    ),
    "extra": ("Corr", lambda s: s.update(surplus=torch.zeros(1)), "key 'surplus' has no place .*1 such"),
    "misshapen": (
        "G",
        lambda s: s.update({"fc.bias": torch.zeros(5)}),
        r"key 'fc\.bias' has the shape \(5,\), expected",
    ),
    "flat": ("Corr", lambda s: s.update({"theta.weight": torch.zeros(8)}), r"'theta\.weight' .* four axes"),
    "mixed": (
        "Corr",
        lambda s: s.update({"theta.weight": torch.zeros(8, 9, 1, 1)}),
        "reads 9 channels; expected 8 .* 27",
    ),
    "not finite": ("G", nan_in("conv_img.weight"), r"key 'conv_img\.weight' holds values that are not finite"),
    "singular": (
        "G",
        lambda s: s["up_3.conv_0.weight_u"].zero_(),
        r"key 'up_3\.conv_0\.weight_orig' has spectral norm 0",
    ),
    "integer": (
        "G",
        lambda s: s.update({"fc.bias": torch.zeros(32, dtype=torch.int64)}),
        "torch.int64, expected dense",
    ),
    "sparse": ("G", lambda s: s.update({"fc.bias": torch.zeros(32).to_sparse()}), "expected dense"),
    "inflated": ("G", lambda s: s.update({"fc.bias": torch.zeros(1).expand(32)}), r"'fc\.bias' .* expected dense"),
    "not a tensor": ("G", lambda s: s.update(epoch=7), "'epoch' is a int"),
    "absurd kernel": (
        "Corr",
        lambda s: s.update({"adaptive_model_seg.layer2.0.weight_orig": torch.zeros(4, 2, 7, 7)}),
        "adaptor_kernel: expected 3 or 4, got 7",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_wrong_contents_are_named(tmp_path: Path, name: str) -> None:
    network, change, message = CHANGES[name]
    states = upstream_states(tiny_config())
    change(states[network])
    paths = write(tmp_path, states)
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(*paths, tmp_path / "m.safetensors")
    assert f"latest_net_{network}.pth" in str(caught.value)
    assert not (tmp_path / "m.safetensors").exists()


class Code:
    """A pickle that would create a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("writer", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_code_in_a_file_is_never_run(tmp_path: Path, writer: Callable[[Any, Path], None]) -> None:
    paths = write(tmp_path, upstream_states(tiny_config()))
    writer({"fc.weight": Code(tmp_path / "ran")}, paths[1])
    with pytest.raises(CheckpointError, match=r"latest_net_G\.pth .*plain tensors") as caught:
        convert(*paths, tmp_path / "m.safetensors")
    assert "weights_only" not in str(caught.value)  # no advice to switch the safety off
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"hello, this is text", b"PK\x03\x04 not a zip", bytes(1000)])
def test_files_of_another_kind(tmp_path: Path, content: bytes) -> None:
    paths = write(tmp_path, upstream_states(tiny_config()))
    paths[0].write_bytes(content)
    with pytest.raises(CheckpointError, match=r"latest_net_Corr\.pth .*not a readable checkpoint"):
        convert(*paths, tmp_path / "m.safetensors")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.99])
def test_truncated_file(tmp_path: Path, legacy: bool, part: float) -> None:
    paths = write(tmp_path, upstream_states(tiny_config()))
    if legacy:  # the published files are of the format before PyTorch 1.6
        torch.save(upstream_states(tiny_config())["Corr"], paths[0], _use_new_zipfile_serialization=False)
    content = paths[0].read_bytes()
    paths[0].write_bytes(content[: int(len(content) * part)])
    with pytest.raises(CheckpointError, match=r"latest_net_Corr\.pth .*not a readable checkpoint"):
        convert(*paths, tmp_path / "m.safetensors")


def test_legacy_format_is_read(tmp_path: Path) -> None:
    config = tiny_config()
    states = upstream_states(config)
    for network in states:
        torch.save(states[network], tmp_path / f"{network}.pth", _use_new_zipfile_serialization=False)
    assert convert(tmp_path / "Corr.pth", tmp_path / "G.pth", tmp_path / "m.safetensors") == config


def test_no_file_and_list(tmp_path: Path) -> None:
    paths = write(tmp_path, upstream_states(tiny_config()))
    os.mkfifo(tmp_path / "pipe.pth")
    for path, message in (
        (tmp_path / "absent.pth", "does not exist"),
        (tmp_path, "is a folder; expected a file"),
        (tmp_path / "pipe.pth", "expected a file"),
        (Path("/dev/zero"), "expected a file"),
    ):
        with pytest.raises(InputError, match=message):
            convert(path, paths[1], tmp_path / "m.safetensors")
        with pytest.raises(InputError, match=message):
            convert(paths[0], path, tmp_path / "m.safetensors")
    torch.save([torch.zeros(1)], paths[1])
    with pytest.raises(CheckpointError, match="expected a state dict, got list"):
        convert(*paths, tmp_path / "m.safetensors")


def test_swapped_files_are_refused(tmp_path: Path) -> None:
    corr, generator = write(tmp_path, upstream_states(tiny_config()))
    with pytest.raises(CheckpointError, match=r"latest_net_G\.pth \(Corr network\): key 'adaptive_model_seg"):
        convert(generator, corr, tmp_path / "m.safetensors")
