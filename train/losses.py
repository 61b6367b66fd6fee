"""The terms of CoCosNet's objective, each a small function of tensors, and their weights for the published tasks.

Source: arXiv 2004.05571 section 3.3, whose symbols the docstrings name; where the public code differs from the paper,
the code's formula is the one here, since it made the published models. Every term is a mean, without its weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import msgspec
import torch
import torch.nn.functional as F
from msgspec import Meta
from msgspec.structs import replace
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..errors import InputError
from .networks.layers import unit_length

FEATURE_WEIGHTS = {"r12": 1 / 32, "r22": 1 / 16, "r32": 1 / 8, "r42": 1 / 4, "r52": 1.0}
CONTEXTUAL_WEIGHTS = {"r32": 2.0, "r42": 4.0, "r52": 8.0}
CONTEXTUAL_BANDWIDTH = 0.1
CONTEXTUAL_EPS = 1e-3
ROW_ENTRIES = 1 << 20  # of the similarity matrix that the contextual loss holds at a time


Weight = Annotated[float, Meta(ge=0, le=1e9)]


class LossWeights(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Weight of each term; a term of weight 0, the default, is not computed.

    Attributes:
        perceptual_layer: the VGG19 map that the perceptual term compares.
        upstream_batch_scale: the terms over pseudo pairs divide by the number of pairs and then, as the public code
            does, once more by the samples in the pass; False leaves the second division out. With it these terms weigh
            as they did for the published models, which had 4 samples on each GPU, only at 4 samples a pass.
    """

    domain: Weight = 0.0
    adversarial: Weight = 0.0
    discriminator_features: Weight = 0.0
    pseudo_features: Weight = 0.0
    perceptual: Weight = 0.0
    perceptual_layer: Literal["r42", "r52"] = "r42"
    contextual: Weight = 0.0
    warp_cycle: Weight = 0.0
    warp_two_cycle: Weight = 0.0
    warp_self: Weight = 0.0
    warp_mask: Weight = 0.0
    upstream_batch_scale: bool = True

    @classmethod
    def preset(cls, task: str) -> LossWeights:
        """The weights of a published task; `InputError` for another."""
        if task not in WEIGHTS:
            raise InputError(f"no loss weights for task {task!r}; available: {', '.join(WEIGHTS)}")
        return WEIGHTS[task]


_PUBLISHED = LossWeights(
    domain=10.0, adversarial=10.0, discriminator_features=10.0, pseudo_features=10.0, perceptual=0.001, contextual=10.0
)
WEIGHTS = {
    "ade20k": replace(_PUBLISHED, pseudo_features=1.0, perceptual=0.01, perceptual_layer="r52", warp_mask=100.0),
    "celebahq": replace(_PUBLISHED, warp_cycle=0.1, warp_mask=100.0),
    "celebahqedge": replace(_PUBLISHED, warp_cycle=1.0),
    "deepfashion": replace(_PUBLISHED, warp_self=100.0),
}


def domain_alignment(label_features: Tensor, image_features: Tensor) -> Tensor:
    """L_domain: L1 between the adaptors' features (B, C, h, w) of a label and of the true image of that label."""
    return F.l1_loss(label_features, image_features)


def adversarial(scores: Sequence[Tensor]) -> Tensor:
    """L_adv of the generator, hinge form: minus the mean score of the fakes, averaged over the scales."""
    return -torch.stack([score.mean() for score in scores]).mean()


def adversarial_discriminator(fake_scores: Sequence[Tensor], real_scores: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """L_adv of the discriminator, hinge form: its terms for fakes and for true images, averaged over the scales."""
    fake = torch.stack([F.relu(1 + score).mean() for score in fake_scores]).mean()
    real = torch.stack([F.relu(1 - score).mean() for score in real_scores]).mean()
    return fake, real


def discriminator_features(fake: Sequence[Sequence[Tensor]], real: Sequence[Sequence[Tensor]]) -> Tensor:
    """L1 between the discriminator's maps of fakes and of true images, summed over layers, averaged over scales.

    As `Discriminator` gives them; the last map of each scale, the score, does not count. A term of the public code:
    L_FM of pix2pixHD, arXiv 1711.11585 section 3.2.
    """
    terms = [
        F.l1_loss(fake_map, real_map.detach())
        for fake_maps, real_maps in zip(fake, real, strict=True)
        for fake_map, real_map in zip(fake_maps[:-1], real_maps[:-1], strict=True)
    ]
    return torch.stack(terms).sum() / len(fake)


def pseudo_weights(self_reference: Tensor, upstream_batch_scale: bool) -> Tensor:
    """Weight of each sample (B,) in a sum over pseudo pairs, whose exemplar is the target itself (1, else 0)."""
    weights = self_reference / (self_reference.sum() + 1e-5)
    return weights / len(weights) if upstream_batch_scale else weights


def pseudo_features(fake: Mapping[str, Tensor], real: Mapping[str, Tensor], weights: Tensor) -> Tensor:
    """L_feat: L1 between VGG19 maps of the output and of the target, over the pseudo pairs (`pseudo_weights`)."""
    return torch.stack(
        [scale * _weighted_l1(fake[name], real[name].detach(), weights) for name, scale in FEATURE_WEIGHTS.items()]
    ).sum()


def perceptual(fake: Tensor, real: Tensor) -> Tensor:
    """L_perc: mean squared difference of one deep VGG19 map of the output and of the true image."""
    return F.mse_loss(fake, real.detach())


def contextual(fake: Mapping[str, Tensor], exemplar: Mapping[str, Tensor]) -> Tensor:
    """L_context: `contextual_distance` of three VGG19 maps of output and exemplar, the largest at half its size."""
    total = torch.zeros((), device=fake["r52"].device)
    for name, weight in CONTEXTUAL_WEIGHTS.items():
        x, y = fake[name], exemplar[name].detach()
        if name == "r32":
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):  # a 16-bit similarity would drown the contrasts near 1
            total = total + weight * contextual_distance(x.to(wide), y.to(wide)).mean()
    return total


def contextual_distance(x: Tensor, y: Tensor) -> Tensor:
    """Contextual loss (B,) of features x to y, both (B, C, H, W): arXiv 1803.02077, of its forward direction.

    With d the cosine distance and d' = d / (min over y + 1e-3), the affinity of a pair is softmax(-d' / h) over y; the
    loss is -log of the mean over x of the largest. Rows of the matrix are made a part at a time and remade in the
    backward pass.
    """
    center = y.mean(1, keepdim=True)
    x, y = (unit_length((t - center).flatten(2)) for t in (x, y))  # (B, C, N)
    rows = max(1, ROW_ENTRIES // y.shape[2])
    parts = torch.split(x, rows, 2)
    affinities = [checkpoint(_best_affinity, part, y, use_reentrant=False) for part in parts]
    return -torch.cat(affinities, 1).mean(1).log()


def warp_cycle(cycled: Tensor, values: Tensor) -> Tensor:
    """L_reg: L1 between values (B, V, h, w) and what is left of them, warped there and back.

    The exemplar's values, warped to the label and back; the public code's "two cycle" adds the true image's, warped to
    the exemplar and back.
    """
    return F.l1_loss(cycled, values)


def warp_self(warped_image: Tensor, image: Tensor, weights: Tensor) -> Tensor:
    """L1 between the warped exemplar and the true image, over the pseudo pairs; a term of the public code."""
    return _weighted_l1(warped_image, image, weights)


def warp_mask(warped: Tensor, label: Tensor, exemplar_label: Tensor) -> Tensor:
    """Negative log-likelihood of the label under the warped exemplar label; all one-hot planes (B, nc, h, w).

    A term of the public code. Class 0 ("unknown") does not count, nor does a class that the sample's exemplar lacks.
    """
    counted = label * exemplar_label.amax((2, 3), keepdim=True)
    counted[:, 0] = 0
    return -(counted * (warped + 1e-10).log()).sum() / (counted.sum() + 1e-5)


def _weighted_l1(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    return ((x - y).abs().flatten(1).mean(1) * weights).sum()


def _best_affinity(x: Tensor, y: Tensor) -> Tensor:
    distance = 1 - x.mT @ y  # (B, n, N)
    least = distance.amin(2, keepdim=True)
    logits = (least - distance) / ((least + CONTEXTUAL_EPS) * CONTEXTUAL_BANDWIDTH)  # the largest is 0
    return 1 / logits.exp().sum(2)  # (B, n)
