"""The two options that upstream's networks do not have: position waves and the warp's way to the output."""

from __future__ import annotations

import msgspec
import pytest
import torch

from flashcocos.config import ModelConfig
from flashcocos.train.networks import CoCosNet
from flashcocos.train.networks.correspondence import position_frequencies
from flashcocos.train.networks.generator import class_means

PLAIN = ModelConfig.preset("tiny")


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    label, exemplar_label = torch.randint(0, 12, (2, 1, 64, 96), generator=generator, dtype=torch.uint8)
    return label, torch.rand(1, 3, 64, 96, generator=generator) * 2 - 1, exemplar_label


def test_both_are_off_by_default_and_add_no_weights() -> None:
    assert (PLAIN.position_frequencies, PLAIN.warp_residual) == (0, False)
    model = CoCosNet(PLAIN)
    assert model.generator.last.weight.shape[0] == 3
    assert model.correspondence.theta.weight.shape[1] == PLAIN.feature_channels + PLAIN.label_channels


def paint(image: torch.Tensor, planes: torch.Tensor) -> torch.Tensor:
    """Every pixel's color replaced by the mean of its class."""
    return torch.einsum("bkc,bkhw->bchw", class_means(image, planes), planes)


@pytest.mark.parametrize("kept", [30.0, -30.0])
def test_the_mask_of_the_skip_chooses_between_warp_and_class_means(kept: float) -> None:
    model = CoCosNet(msgspec.structs.replace(PLAIN, warp_residual=True)).eval()
    label, exemplar, exemplar_label = inputs()
    with torch.no_grad():
        model.generator.last.weight.zero_()
        model.generator.last.bias.copy_(torch.tensor([0.0, 0.0, 3.0, kept]))
        result = model(label, exemplar, exemplar_label, backend="reference")
    painted = paint(result.warped_image, model.label_planes(label))
    start = result.warped_image if kept > 0 else painted
    torch.testing.assert_close(result.image[:, :2], start[:, :2], rtol=0, atol=1e-6)
    assert (result.image[:, 2] == 1).all()  # the correction applies, and the image stays in its range
    assert not torch.allclose(result.warped_image, painted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_class_means(dtype: torch.dtype) -> None:
    label, image, _ = inputs()
    planes = torch.nn.functional.one_hot(label.long(), 14).permute(0, 3, 1, 2).to(dtype)  # two classes are absent
    painted = paint(image.to(dtype), planes).float()
    for name in range(12):
        inside = (label == name)[0]
        expected = image[0, :, inside].mean(1, keepdim=True).expand(-1, int(inside.sum()))
        tolerance = 1e-5 if dtype == torch.float32 else 2e-3
        torch.testing.assert_close(painted[0, :, inside], expected, rtol=0, atol=tolerance)


def test_position_frequencies_tell_positions_apart_at_any_size() -> None:
    waves = position_frequencies(torch.zeros(1, 1, 8, 12), 3)
    assert waves.shape == (1, 12, 8, 12)
    flat = waves[0].flatten(1)
    assert torch.cdist(flat.T, flat.T).add(torch.eye(96)).min() > 0.1
    torch.testing.assert_close(flat.square().sum(0), torch.full((96,), 6.0))
    finer = position_frequencies(torch.zeros(1, 1, 24, 36), 3)
    torch.testing.assert_close(finer[:, :, 1::3, 1::3], waves)


def test_position_frequencies_let_equal_positions_attract() -> None:
    model = CoCosNet(msgspec.structs.replace(PLAIN, position_frequencies=4)).eval()
    with torch.no_grad():
        for branch in (model.correspondence.theta, model.correspondence.phi):
            branch.weight.zero_()
            branch.weight[:, -16:] = torch.eye(16)[..., None, None]
        label, exemplar, _ = inputs()
        result = model(label, exemplar, label, backend="reference")
        expected = model.warp_values(exemplar)
    inner = (..., slice(1, -1), slice(1, -1))  # at the border the patches are cut
    torch.testing.assert_close(result.warped[inner], expected[inner], rtol=0, atol=0.05)
