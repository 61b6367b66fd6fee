"""One generator pass and one discriminator pass with every term of CoCosNet's objective.

Source: arXiv 2004.05571 section 3.3; the terms are in `losses`. The warp and its cycles run through
`flashcocos.kernels.corr_warp`, so no pass forms a matrix of all pairs of positions.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import corr_warp
from . import losses
from .batches import Batch
from .losses import LossWeights
from .networks import CoCosNet, Discriminator, Vgg19
from .networks.layers import subsample


class GeneratorPass(NamedTuple):
    """Weighted terms by name, whose sum is the generator's loss, and the images."""

    terms: dict[str, Tensor]
    image: Tensor  # (B, 3, H, W)
    warped_image: Tensor  # (B, 3, H, W)
    carried: Tensor | None  # (B, K, h, w): `carry`, warped as the exemplar is


def generator_pass(
    model: CoCosNet,
    discriminator: Discriminator | None,
    vgg: Vgg19 | None,
    weights: LossWeights,
    batch: Batch,
    carry: Tensor | None = None,
    backend: str = "auto",
) -> GeneratorPass:
    """Translate a batch and weigh each term of the generator's objective.

    Args:
        model: the network to train.
        discriminator: None where no term needs it.
        vgg: the frozen feature network; None where no term needs it.
        weights: of the terms.
        batch: the samples.
        carry: planes (B, K, h, w) to warp along with the exemplar.
        backend: of `corr_warp`.

    Returns:
        The weighted terms and the pictures.
    """
    config = model.config
    warp = functools.partial(corr_warp, patch=config.patch, temperature=config.temperature, backend=backend)
    label, exemplar_label = model.label_planes(batch.label), model.label_planes(batch.exemplar_label)
    terms = {}
    features = model.correspondence.label_adaptor(label)
    theta = model.correspondence.query(features, label, label)
    phi, values = model.encode_exemplar(batch.exemplar, exemplar_label)
    if weights.domain:
        terms["domain"] = losses.domain_alignment(features, model.correspondence.image_adaptor(batch.image))
    planes, stride = [values], config.warp_stride
    if weights.warp_mask:
        planes.append(subsample(exemplar_label, stride))
    if carry is not None:
        planes.append(carry)
    warped, *others = warp(theta, phi, torch.cat(planes, 1)).split([part.shape[1] for part in planes], 1)
    if weights.warp_mask:
        terms["warp_mask"] = losses.warp_mask(others[0], subsample(label, stride), subsample(exemplar_label, stride))
    if weights.warp_cycle:
        terms["warp_cycle"] = losses.warp_cycle(warp(phi, theta, warped), values)
    if weights.warp_two_cycle:
        true_values = model.warp_values(batch.image)
        at_exemplar = warp(phi, theta, true_values)
        terms["warp_two_cycle"] = losses.warp_cycle(warp(theta, phi, at_exemplar), true_values)
    image, warped_image = model.synthesize(warped, label)
    pairs = losses.pseudo_weights(batch.self_reference, weights.upstream_batch_scale)
    if weights.warp_self:
        terms["warp_self"] = losses.warp_self(warped_image, batch.image, pairs)
    terms |= _vgg_terms(vgg, weights, image, batch, pairs)
    terms |= _discriminator_terms(discriminator, weights, label, image, batch.image)
    weighted = {name: getattr(weights, name) * term for name, term in terms.items()}
    return GeneratorPass(weighted, image, warped_image, None if carry is None else others[-1])


def discriminator_pass(
    discriminator: Discriminator, weights: LossWeights, label: Tensor, fake: Tensor, real: Tensor
) -> dict[str, Tensor]:
    """Weighted terms of the discriminator's objective for label planes, detached fakes and true images."""
    scores = [maps[-1] for maps in discriminator(torch.cat([label, label]), torch.cat([fake.detach(), real]))]
    fake_scores, real_scores = zip(*(score.chunk(2) for score in scores), strict=True)
    fake_term, real_term = losses.adversarial_discriminator(fake_scores, real_scores)
    return {"fake": weights.adversarial * fake_term, "real": weights.adversarial * real_term}


def _vgg_terms(
    vgg: Vgg19 | None, weights: LossWeights, image: Tensor, batch: Batch, pairs: Tensor
) -> dict[str, Tensor]:
    if not (weights.pseudo_features or weights.perceptual or weights.contextual):
        return {}
    assert vgg is not None
    names = tuple(losses.FEATURE_WEIGHTS)
    fake = vgg(image, names)
    with torch.no_grad():
        real, exemplar = vgg(batch.image, names), vgg(batch.exemplar, names)
    terms = {}
    if weights.pseudo_features:
        terms["pseudo_features"] = losses.pseudo_features(fake, real, pairs)
    if weights.perceptual:
        terms["perceptual"] = losses.perceptual(fake[weights.perceptual_layer], real[weights.perceptual_layer])
    if weights.contextual:
        terms["contextual"] = losses.contextual(fake, exemplar)
    return terms


def _discriminator_terms(
    discriminator: Discriminator | None, weights: LossWeights, label: Tensor, image: Tensor, real: Tensor
) -> dict[str, Tensor]:
    if not (weights.adversarial or weights.discriminator_features):
        return {}
    assert discriminator is not None
    terms = {}
    maps = discriminator(torch.cat([label, label]), torch.cat([image, real]))
    halves = [[part.chunk(2) for part in scale] for scale in maps]
    fake_maps, real_maps = ([[part[side] for part in scale] for scale in halves] for side in (0, 1))
    if weights.adversarial:
        terms["adversarial"] = losses.adversarial([scale[-1] for scale in fake_maps])
    if weights.discriminator_features:
        terms["discriminator_features"] = losses.discriminator_features(fake_maps, real_maps)
    return terms
