"""The full-size networks give upstream's numbers, for all four tasks, through the real import.

Reference: what the public networks compute on the CPU with weights and inputs that `parity_weights` makes, stored in
tests/data/parity_synthetic, and on the sample pictures of the reference material, which not every machine has.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from parity_samples import SAMPLES
from parity_weights import CLASS_TASKS, make_inputs, make_state
from torch import Tensor

from flashcocos.config import ModelConfig
from flashcocos.kernels import reference
from flashcocos.preprocess import load_image, load_raw
from flashcocos.train.checkpoint import load_model
from flashcocos.train.networks import CoCosNet
from flashcocos.train.networks.cocosnet import ModelOutput
from flashcocos.train.upstream import TASKS, convert

DATA = Path(__file__).parents[1] / "data" / "parity_synthetic"
# measured with oneDNN on x86: 1e-5 and 2e-5; the temperature of 0.01 amplifies rounding between the two
FEATURE_BOUND = 1e-4  # largest error of theta and phi over their largest value
IMAGE_BOUND = 1e-3  # absolute, for 99.9 % of the values; the sample images are stored in float16, good to 2.5e-4
STATS_BOUND = 1e-4  # absolute, of mean and standard deviation


@pytest.fixture(scope="module", params=TASKS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CoCosNet]:
    """The converted full-size network of one task, made once for its tests."""
    task, folder = request.param, tmp_path_factory.mktemp("parity")
    paths = {network: folder / f"latest_net_{network}.pth" for network in ("Corr", "G")}
    for network, shapes in json.loads((DATA / f"{task}.keys.json").read_text()).items():
        torch.save({key: torch.from_numpy(value) for key, value in make_state(shapes).items()}, paths[network])
    config = convert(paths["Corr"], paths["G"], folder / "model.safetensors")
    assert config == ModelConfig.preset(task)
    yield load_model(folder / "model.safetensors")
    for file in folder.iterdir():  # 1.2 GB a task
        file.unlink()


@pytest.fixture(autouse=True)
def without_reference_warp(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast warp is compared; a call of the plain one fails."""
    monkeypatch.delattr(reference, "warp")


@torch.no_grad()
def translate(model: CoCosNet, label: Tensor, ref: Tensor, label_ref: Tensor) -> ModelOutput:
    result: ModelOutput = model(label, ref, label_ref if model.config.condition_on_label else None)
    return result


def check(result: ModelOutput, stored: Mapping[str, np.ndarray], feature_step: int, image_step: int) -> None:
    """Compare with stored results, of which features and images keep every so many-th row and column."""
    outputs = {"theta": result.theta, "phi": result.phi, "warp_out": result.warped_image, "fake_image": result.image}
    for name, tensor in outputs.items():
        ours = tensor.double().numpy()
        stats = np.array([ours.mean(), ours.std()])
        np.testing.assert_allclose(stats, stored[f"{name}_stats"], rtol=0, atol=STATS_BOUND, err_msg=name)
        if name in ("theta", "phi"):
            theirs, part = stored[f"{name}_every16"], ours[:, ::16, ::feature_step, ::feature_step]
        else:
            theirs, part = stored[name], ours[:, :, ::image_step, ::image_step]
        assert part.shape == theirs.shape
        error = np.abs(part - theirs)
        largest, most, relative = error.max(), np.quantile(error, 0.999), error.max() / np.abs(theirs).max()
        print(f"{name}: max {largest:.1e}, 99.9 % {most:.1e}, relative {relative:.1e}")
        if name in ("theta", "phi"):
            assert relative < FEATURE_BOUND, name
        else:
            assert most < IMAGE_BOUND, name


def test_synthetic_inputs(model: CoCosNet) -> None:
    task = model.config.task
    inputs = {name: torch.from_numpy(value) for name, value in make_inputs(task).items()}
    if task in CLASS_TASKS:  # the planes are one-hot: give the ids
        inputs |= {name: inputs[name].argmax(1) for name in ("label", "label_ref")}
    result = translate(model, inputs["label"], inputs["ref"], inputs["label_ref"])
    with np.load(DATA / f"{task}.npz") as stored:
        check(result, stored, feature_step=2, image_step=2)


def test_raw_sample_files(model: CoCosNet, shared: Path) -> None:
    task, size = model.config.task, (256, 256)
    labels, images = [], []
    for path in SAMPLES[task]:
        # the stored results were made with scikit-image 0.26's Canny
        label = torch.from_numpy(load_raw(task, shared / "samples" / path, size, canny="modern"))[None]
        labels.append(label if task in CLASS_TASKS else label.float() / 255)
        images.append(torch.from_numpy(load_image(shared / "samples" / path, size))[None])
    result = translate(model, labels[0], images[1], labels[1])
    with np.load(shared / "parity" / f"{task}.npz") as stored:
        check(result, stored, feature_step=1, image_step=1)
