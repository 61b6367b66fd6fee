"""A larger network that starts from a trained smaller one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flashcocos.config import ModelConfig
from flashcocos.errors import InputError
from flashcocos.train.networks import CoCosNet
from flashcocos.train.networks.growth import grown_state

SMALL = {"ngf": 8, "spade_hidden": 16, "warp_stride": 4}


def grow(small: CoCosNet, **changes: Any) -> CoCosNet:
    torch.manual_seed(1)
    large = CoCosNet(ModelConfig.preset("avatars-128", **SMALL | changes)).eval()
    large.load_state_dict(grown_state(large.state_dict(), small.state_dict()))
    return large


@pytest.fixture(scope="module")
def small() -> CoCosNet:
    torch.manual_seed(0)
    return CoCosNet(ModelConfig.preset("avatars-128", **SMALL)).eval()


@torch.no_grad()
def test_a_finer_map_starts_as_the_coarse_one_between_its_positions(small: CoCosNet) -> None:
    label = torch.randint(0, 12, (1, 64, 64), dtype=torch.uint8)
    fine = grow(small, warp_stride=2)
    mixed = small.correspondence.theta.weight[:, :44]
    expected = torch.nn.functional.interpolate(
        torch.nn.functional.conv2d(features(small, label), mixed), scale_factor=2.0, mode="bilinear"
    )
    actual = torch.nn.functional.conv2d(
        torch.nn.functional.interpolate(features(fine, label), scale_factor=2.0, mode="bilinear"),
        fine.correspondence.theta.weight[:, :44],
    )
    torch.testing.assert_close(actual, expected)
    assert fine.correspondence.theta.weight[:, 60:].abs().max() == 0  # nothing reads the detail yet


def features(model: CoCosNet, label: torch.Tensor) -> torch.Tensor:
    planes = model.label_planes(label)
    adapted = model.correspondence.label_adaptor(planes)
    result: torch.Tensor = model.correspondence.residual(torch.cat([adapted, planes[:, :, ::4, ::4]], 1))
    return result


@torch.no_grad()
def test_a_wider_condition_is_the_same_function(small: CoCosNet) -> None:
    label, exemplar = torch.randint(0, 12, (1, 64, 64), dtype=torch.uint8), torch.rand(1, 3, 64, 64) * 2 - 1
    wide = grow(small, spade_hidden=24)  # no positional normalization over the hidden channels
    torch.testing.assert_close(wide(label, exemplar, label).image, small(label, exemplar, label).image)


@torch.no_grad()
def test_new_channels_are_copies_that_nothing_reads(small: CoCosNet) -> None:
    wide, old = grow(small, ngf=12), small.generator.up_1
    new = wide.generator.up_1
    assert torch.equal(new.conv_0.weight[:32, :64], old.conv_0.weight)
    assert torch.equal(new.conv_0.weight[32:, :64], old.conv_0.weight[:16])
    assert new.conv_0.weight[:, 64:].abs().max() == 0
    scale, shift = new.norm_0.scale_shift.weight.chunk(2)
    old_scale, old_shift = old.norm_0.scale_shift.weight.chunk(2)
    assert torch.equal(scale[:64], old_scale)
    assert torch.equal(shift[:64], old_shift)


def test_a_larger_network_does_not_shrink(small: CoCosNet) -> None:
    with pytest.raises(InputError, match="in the smaller network"):
        grow(small, spade_hidden=8)
