"""Whole generator and discriminator passes on tiny networks: against plain forms, their gradients, their switches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from msgspec.structs import replace
from operator_log import OperatorLog
from torch import Tensor

from flashcocos.config import ModelConfig
from flashcocos.kernels.reference import logits
from flashcocos.train import losses
from flashcocos.train.batches import Batch
from flashcocos.train.losses import LossWeights
from flashcocos.train.networks import CoCosNet, Discriminator, Vgg19
from flashcocos.train.networks.layers import add_spectral_norm
from flashcocos.train.objective import discriminator_pass, generator_pass

ALL_TERMS = replace(LossWeights.preset("celebahq"), warp_cycle=1.0, warp_two_cycle=2.0, warp_self=3.0, warp_mask=4.0)
NO_IMAGE_TERMS = replace(
    ALL_TERMS, adversarial=0.0, discriminator_features=0.0, pseudo_features=0.0, perceptual=0.0, contextual=0.0
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def make_batch(config: ModelConfig, count: int, side: int) -> Batch:
    image = torch.rand(count, 3, side, side) * 2 - 1
    if config.label_kind == "classes":
        label = torch.randint(0, config.label_channels, (count, side, side))
    else:
        label = F.softmax(4 * torch.randn(count, config.label_channels, side, side), 1)
    pairs = torch.zeros(count)
    pairs[-1] = 1
    exemplar = torch.cat([torch.rand(count - 1, 3, side, side) * 2 - 1, image[-1:]])
    return Batch(label, image, exemplar, torch.cat([label[:-1].flip(2), label[-1:]]), pairs, pairs > 0)


def in_float64(batch: Batch) -> Batch:
    return Batch(*(x.double() if x.is_floating_point() else x for x in batch))


@pytest.mark.parametrize("preset", ["tiny", "tiny-channels"])
def test_warp_terms_equal_the_plain_forms(preset: str) -> None:
    """With the matrix of all pairs formed, its rows' softmax there and its columns' softmax back."""
    config = ModelConfig.preset(preset)
    model, batch = CoCosNet(config).double(), in_float64(make_batch(config, 2, 64))
    terms = generator_pass(model, None, None, NO_IMAGE_TERMS, batch).terms

    label, exemplar_label = model.label_planes(batch.label), model.label_planes(batch.exemplar_label)
    theta, (phi, values) = model.encode_query(label), model.encode_exemplar(batch.exemplar, exemplar_label)
    scores = logits(theta, phi, config.patch, config.temperature)
    there, back = scores.softmax(2), scores.softmax(1).mT

    def apply(matrix: Tensor, planes: Tensor) -> Tensor:
        return (matrix @ planes.flatten(2).mT).mT.unflatten(2, theta.shape[2:])

    warped, truth = apply(there, values), model.warp_values(batch.image)
    chosen = label[:, :, ::4, ::4] * (exemplar_label[:, :, ::4, ::4].sum((2, 3), keepdim=True) > 0)
    likelihood = apply(there, exemplar_label[:, :, ::4, ::4])
    features = [model.correspondence.label_adaptor(label), model.correspondence.image_adaptor(batch.image)]
    expected = {
        "domain": 10 * (features[0] - features[1]).abs().mean(),
        "warp_cycle": (apply(back, warped) - values).abs().mean(),
        "warp_two_cycle": 2 * (apply(there, apply(back, truth)) - truth).abs().mean(),
        "warp_self": 3 * (model.upsample_warp(warped)[1] - batch.image[1]).abs().mean() / (1 + 1e-5) / 2,
    }
    if preset == "tiny":  # whose planes are classes
        expected["warp_mask"] = -4 * (chosen * (likelihood + 1e-10).log())[:, 1:].sum() / (chosen[:, 1:].sum() + 1e-5)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-9, atol=0, msg=name)
        gradients = [
            torch.autograd.grad(term, model.correspondence.parameters(), retain_graph=True, allow_unused=True)
            for term in (terms[name], value)
        ]
        for ours, plain in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-9, msg=name)


def test_no_pass_forms_a_matrix_of_all_pairs() -> None:
    """The operators behind the warp and the attention form none within: tests/kernels measures their memory."""
    config = ModelConfig.preset("tiny")
    model, discriminator, vgg = CoCosNet(config), Discriminator(config, ndf=4), Vgg19().requires_grad_(False)
    batch = make_batch(config, 1, 160)
    with OperatorLog() as log:
        torch.stack(list(generator_pass(model, discriminator, vgg, ALL_TERMS, batch).terms.values())).sum().backward()
    assert {"corr_warp", "corr_warp_backward"} <= log.names
    assert "_softmax" not in log.names
    assert log.largest < (40 * 40) ** 2


def test_both_passes_train_every_parameter() -> None:
    config = ModelConfig.preset("tiny")
    model, discriminator = CoCosNet(config), Discriminator(config, ndf=4)
    for network in (model, discriminator):
        add_spectral_norm(network)
    batch = make_batch(config, 2, 64)
    result = generator_pass(model, discriminator, Vgg19().requires_grad_(False), ALL_TERMS, batch)
    assert len(result.terms) == 10
    torch.stack(list(result.terms.values())).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    discriminator.zero_grad()
    terms = discriminator_pass(discriminator, ALL_TERMS, model.label_planes(batch.label), result.image, batch.image)
    torch.stack(list(terms.values())).sum().backward()
    assert [name for name, p in discriminator.named_parameters() if p.grad is None] == []


def test_a_weight_of_zero_computes_nothing() -> None:
    config = ModelConfig.preset("tiny")
    result = generator_pass(CoCosNet(config), None, None, LossWeights(), make_batch(config, 1, 64))
    assert result.terms == {}


def test_the_switch_of_the_batch_scale() -> None:
    config = ModelConfig.preset("tiny")
    model, vgg, batch = CoCosNet(config), Vgg19(), make_batch(config, 3, 64)
    weights = replace(ALL_TERMS, adversarial=0.0, discriminator_features=0.0)
    with torch.no_grad():
        upstream, plain = (
            generator_pass(model, None, vgg, replace(weights, upstream_batch_scale=on), batch).terms
            for on in (True, False)
        )
    for name, term in upstream.items():
        factor = 3 if name in ("pseudo_features", "warp_self") else 1
        torch.testing.assert_close(factor * term, plain[name], msg=name)


def test_planes_carried_along_warp_as_the_exemplar_does() -> None:
    config = ModelConfig.preset("tiny")
    model, batch = CoCosNet(config), make_batch(config, 2, 64)
    carry = model.warp_values(batch.exemplar)
    weights = replace(NO_IMAGE_TERMS, warp_cycle=0.0, warp_two_cycle=0.0, warp_self=0.0, domain=0.0)
    result = generator_pass(model, None, None, weights, batch, carry)
    torch.testing.assert_close(model.upsample_warp(result.carried), result.warped_image)


def test_contextual_stays_in_float32_under_autocast() -> None:
    fake, exemplar = ({name: torch.rand(1, 8, 6, 6) for name in losses.CONTEXTUAL_WEIGHTS} for _ in range(2))
    expected = losses.contextual(fake, exemplar)
    with torch.autocast("cpu", torch.bfloat16):
        assert losses.contextual(fake, exemplar) == expected
