"""Terms for samples whose exact target is known: no discriminator, no pretrained features.

L1 of the image and of the warped exemplar against the target, L1 of the mean color of each class, and the negative
log-likelihood of the label under the warped exemplar label (arXiv 2004.05571, section 3.3, gives the idea of
supervising the warp). They are a fast start for the published objective, and enough for the small model that ships.
"""

from __future__ import annotations

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from .losses import Weight


class SupervisedWeights(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Weight of each term; a term of weight 0 is not computed. Only `label` counts samples that have no target."""

    image: Weight = 0.0
    class_color: Weight = 0.0
    warp: Weight = 0.0
    label: Weight = 0.0


def supervised_terms(
    weights: SupervisedWeights,
    label: Tensor,
    target: Tensor,
    has_target: Tensor,
    image: Tensor,
    warped_image: Tensor,
    warped_label: Tensor | None,
) -> dict[str, Tensor]:
    """The weighted terms, scalars, by name.

    label: planes (B, nc, H, W). target, image, warped_image: (B, 3, H, W) in [-1, 1]. has_target: (B,) bool.
    warped_label: the exemplar's planes at a quarter size (`quarter`), warped along; only the term `label` needs it.
    """
    terms = {}
    known = has_target.to(image.dtype)
    if weights.image:
        terms["image"] = weights.image * _mean_l1(image, target, known)
    if weights.class_color:
        terms["class_color"] = weights.class_color * class_color_error(image, target, label, known)
    if weights.warp:
        terms["warp"] = weights.warp * _mean_l1(warped_image, target, known)
    if weights.label:
        assert warped_label is not None
        likelihood = quarter(label) * (warped_label.clamp_min(0) + 1e-4).log()
        terms["label"] = weights.label * -likelihood.sum(1).mean()
    return terms


def quarter(label: Tensor) -> Tensor:
    """Label planes (B, nc, H, W) -> the share of each class in the area of each warped position (B, nc, H/4, W/4)."""
    return F.avg_pool2d(label, 4)


def class_color_error(image: Tensor, target: Tensor, label: Tensor, known: Tensor) -> Tensor:
    """L1 between the mean colors of each class, every class that is present in a sample counting alike.

    label: planes (B, nc, H, W). known (B,): 1 for the samples that count, 0 for the others.
    """
    area = label.sum((2, 3))  # (B, nc)
    difference = torch.einsum("bnhw,bchw->bnc", label, image - target) / area.clamp_min(1)[..., None]
    counted = (area > 0) * known[:, None]
    return (difference.abs().mean(2) * counted).sum() / counted.sum().clamp_min(1)


def _mean_l1(x: Tensor, y: Tensor, known: Tensor) -> Tensor:
    return ((x - y).abs().mean((1, 2, 3)) * known).sum() / known.sum().clamp_min(1)
