"""Shapes, stages, sizes and refusals of the networks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flashcocos.config import PRESETS, ModelConfig
from flashcocos.errors import InputError
from flashcocos.train.networks import CoCosNet, Discriminator, Vgg19
from flashcocos.train.networks.layers import add_spectral_norm

# million parameters (correspondence, generator) of the published networks
PUBLISHED = {
    "ade20k": (59.316, 96.664),
    "celebahq": (53.575, 92.711),
    "celebahqedge": (53.381, 92.591),
    "deepfashion": (52.847, 92.741),
}
SMALL = ("tiny", "tiny-channels", "avatars-128")


def make_model(preset: str) -> CoCosNet:
    torch.manual_seed(0)
    return CoCosNet(ModelConfig.preset(preset)).eval()


def make_label(config: ModelConfig, batch: int, height: int, width: int) -> Tensor:
    if config.label_kind == "classes":
        return torch.randint(0, config.label_channels, (batch, height, width), dtype=torch.uint8)
    return torch.rand(batch, config.label_channels, height, width)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_sizes(preset: str) -> None:
    with torch.device("meta"):
        model = CoCosNet(ModelConfig.preset(preset))
    sizes = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.correspondence, model.generator)]
    assert sizes == pytest.approx(PUBLISHED[preset], abs=5e-4)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", [(256, 256), (64, 96)])
def test_shapes_of_every_preset(preset: str, size: tuple[int, int]) -> None:
    height, width = size
    config = ModelConfig.preset(preset)
    with torch.device("meta"):  # shapes without arithmetic
        model = CoCosNet(config)
        label = make_label(config, 2, height, width)
        theta = model.encode_query(label)
        phi, values = model.encode_exemplar(torch.empty(2, 3, height, width), label)
        image, warped_image = model.synthesize(values, label)
    map_size = (height // config.warp_stride, width // config.warp_stride)
    assert theta.shape == phi.shape == (2, config.feature_channels, *map_size)
    assert values.shape == (2, config.warped_channels, *map_size)
    assert image.shape == warped_image.shape == (2, 3, height, width)


@pytest.mark.parametrize("preset", SMALL)
@torch.no_grad()
def test_stages_equal_the_whole(preset: str) -> None:
    model = make_model(preset)
    config = model.config
    label, exemplar_label = make_label(config, 1, 64, 96), make_label(config, 1, 96, 64)
    exemplar = torch.rand(1, 3, 96, 64) * 2 - 1  # another size than the label's
    whole = model(label, exemplar, exemplar_label, backend="reference")
    phi, _ = model.encode_exemplar(exemplar, exemplar_label)
    image, warped_image = model.synthesize(whole.warped, label)
    assert torch.equal(whole.theta, model.encode_query(label))
    assert torch.equal(whole.phi, phi)
    assert torch.equal(whole.image, image)
    assert torch.equal(whole.warped_image, warped_image)
    assert whole.image.shape == (1, 3, 64, 96)
    assert whole.image.abs().max() <= 1
    assert whole.image.std() > 0.01


@pytest.mark.parametrize("stride", [2, 1])
@pytest.mark.parametrize("preset", SMALL)
@torch.no_grad()
def test_a_finer_map_has_the_strides_size_and_every_pixel_of_detail(preset: str, stride: int) -> None:
    torch.manual_seed(0)
    model = CoCosNet(ModelConfig.preset(preset, warp_stride=stride)).eval()
    config = model.config
    label, exemplar_label = make_label(config, 1, 64, 96), make_label(config, 1, 96, 64)
    exemplar = torch.rand(1, 3, 96, 64) * 2 - 1
    result = model(label, exemplar, exemplar_label, backend="reference")
    assert result.theta.shape == (1, config.feature_channels, 64 // stride, 96 // stride)
    assert result.phi.shape == (1, config.feature_channels, 96 // stride, 64 // stride)
    assert result.warped.shape == (1, config.warped_channels, 64 // stride, 96 // stride)
    assert result.image.shape == result.warped_image.shape == (1, 3, 64, 96)
    assert torch.equal(result.theta, model.encode_query(label))
    # one pixel of the label that no trunk of stride 4 sees alone changes the query around it
    moved = label.clone()
    moved[..., 33, 49] = (moved[..., 33, 49] + 1) % 5
    change = (model.encode_query(moved) - result.theta).abs().amax((0, 1))
    assert change[33 // stride, 49 // stride] > 0


@pytest.mark.parametrize("preset", SMALL)
@torch.no_grad()
def test_batch_equals_single(preset: str) -> None:
    model = make_model(preset)
    label, exemplar = make_label(model.config, 2, 64, 64), torch.rand(2, 3, 64, 64) * 2 - 1
    both = model(label, exemplar, label, backend="reference")
    for index in range(2):
        part = slice(index, index + 1)
        single = model(label[part], exemplar[part], label[part], backend="reference")
        torch.testing.assert_close(single.theta, both.theta[part], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(single.image, both.image[part], rtol=0, atol=1e-3)


@torch.no_grad()
def test_ids_equal_their_one_hot_planes() -> None:
    model = make_model("tiny")
    label = make_label(model.config, 1, 64, 64)
    planes = F.one_hot(label.long(), 12).permute(0, 3, 1, 2).float().contiguous()
    assert torch.equal(model.label_planes(label), planes)
    assert torch.equal(model.label_planes(label.long()), planes)
    assert torch.equal(model.encode_query(label), model.encode_query(planes))


def test_patch_upsampling_is_fold_of_unfold() -> None:
    model = make_model("tiny-channels")
    image = torch.rand(2, 3, 64, 96)
    values = model.warp_values(image)
    assert torch.equal(values.flatten(2), F.unfold(image, 4, stride=4))
    assert torch.equal(model.upsample_warp(values), F.fold(values.flatten(2), (64, 96), 4, stride=4))
    assert torch.equal(model.upsample_warp(values), image)


def test_color_upsampling() -> None:
    image = torch.rand(1, 3, 64, 96)
    means = image.unflatten(2, (16, 4)).unflatten(4, (24, 4)).mean((3, 5))  # (1, 3, 16, 24)
    nearest = CoCosNet(ModelConfig.preset("tiny", warp_upsampling="nearest"))
    torch.testing.assert_close(nearest.warp_values(image), means)
    assert torch.equal(nearest.upsample_warp(means), means.repeat_interleave(4, 2).repeat_interleave(4, 3))
    bilinear = make_model("tiny").upsample_warp(means)
    # output pixel 5 has its center at 5.5 / 4 - 0.5 = 0.875 of the way from value 0 to value 1
    torch.testing.assert_close(bilinear[0, 0, 0, 5], 0.125 * means[0, 0, 0, 0] + 0.875 * means[0, 0, 0, 1])


def test_without_attention_the_generator_has_none() -> None:
    keys = make_model("avatars-128").state_dict()
    assert not [key for key in keys if "attention" in key]
    assert [key for key in make_model("tiny").state_dict() if "attention" in key]


def test_spectral_norm_is_kept_apart_and_trains() -> None:
    model = CoCosNet(ModelConfig.preset("tiny"))
    add_spectral_norm(model)
    keys = set(model.state_dict())
    assert "correspondence.label_adaptor.layers.0.parametrizations.weight.original" in keys
    assert "generator.first.weight" in keys  # not spectral-normed upstream either
    label, exemplar = make_label(model.config, 1, 64, 64), torch.rand(1, 3, 64, 64)
    model(label, exemplar, label, backend="reference").image.mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.encode_query(torch.zeros(1, 64, 80, dtype=torch.uint8)), r"multiples of 32 .* got \(64, 80\)"),
        (lambda m: m.encode_query(torch.zeros(1, 32, 64, dtype=torch.uint8)), "at least 64"),
        (lambda m: m.encode_query(torch.zeros(64, 64, dtype=torch.uint8)), "expected 3 dimensions"),
        (lambda m: m.encode_query(torch.zeros(1, 11, 64, 64)), "expected 12 planes, got 11"),
        (lambda m: m.encode_exemplar(torch.zeros(1, 3, 64, 64)), "give the exemplar's label"),
        (
            lambda m: m.encode_exemplar(torch.zeros(1, 3, 64, 64), torch.zeros(1, 64, 96, dtype=torch.uint8)),
            r"exemplar of \(64, 64\) has a label of \(64, 96\)",
        ),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(make_model("tiny"))


def test_ids_for_a_task_of_planes_are_refused() -> None:
    with pytest.raises(InputError, match=r"expected 5 float planes, got torch\.uint8"):
        make_model("tiny-channels").encode_query(torch.zeros(1, 64, 64, dtype=torch.uint8))


def test_discriminator_maps() -> None:
    config = ModelConfig.preset("tiny")
    with torch.device("meta"):
        full = Discriminator(ModelConfig.preset("ade20k"))
    # upstream's 6.862 million less the segmentation head that it never runs, 2 x 430,455
    assert sum(p.numel() for p in full.parameters()) / 1e6 == pytest.approx(6.862 - 2 * 0.430455, abs=5e-4)
    maps = Discriminator(config, ndf=4)(torch.rand(2, 12, 64, 96), torch.rand(2, 3, 64, 96))
    assert [[tuple(m.shape[1:]) for m in scale] for scale in maps] == [
        [(4, 32, 48), (8, 16, 24), (16, 8, 12), (32, 7, 11), (1, 6, 10)],
        [(4, 16, 24), (8, 8, 12), (16, 4, 6), (32, 3, 5), (1, 2, 4)],
    ]


def test_add_spectral_norm_leaves_other_layers() -> None:
    vgg = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))
    add_spectral_norm(vgg)
    assert list(vgg.state_dict()) == ["0.weight", "0.bias"]


def test_vgg_features() -> None:
    torch.manual_seed(0)
    vgg, image = Vgg19().eval(), torch.rand(1, 3, 32, 64) * 2 - 1
    with torch.no_grad():
        features = vgg(image, ("r12", "r42"))
    assert {name: tuple(f.shape) for name, f in features.items()} == {"r12": (1, 64, 32, 64), "r42": (1, 512, 4, 8)}
    # the first convolution sees BGR planes of 0..255 less their mean
    mean = torch.tensor([103.939, 116.779, 123.68])  # the familiar values, rounded
    planes = (image[:, [2, 1, 0]] + 1) * 127.5 - mean[:, None, None]
    first = F.relu(vgg.conv1_2(F.relu(vgg.conv1_1(planes))))
    torch.testing.assert_close(features["r12"], first, rtol=1e-3, atol=1e-2)
    with pytest.raises(KeyError, match="r61"):
        vgg(image, ("r61",))


def test_channels_last_weights_give_channels_last_features() -> None:
    model = make_model("tiny").double()
    label, image = torch.randint(0, 12, (2, 64, 96)), torch.rand(2, 3, 64, 96).double() * 2 - 1
    with torch.inference_mode():
        expected = model(label, image, label)
        found = model.to(memory_format=torch.channels_last)(label, image, label)
    # so the Triton kernels need no packed copy of them
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in (found.theta, found.phi))
    torch.testing.assert_close(found.image, expected.image, rtol=0, atol=1e-10)
