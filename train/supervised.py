"""Terms for samples whose exact target is known: no discriminator, no pretrained features.

L1 and squared error of the image, L1 of the warped exemplar against the target, L1 of the mean color of each class, and
the negative log-likelihood of the label under the warped exemplar label (arXiv 2004.05571, section 3.3, gives the idea
of supervising the warp). The terms by class let an eye of thirty pixels count as much as the background. They are a
fast start for the published objective, and enough for the small model that ships.
"""

from __future__ import annotations

import msgspec
import torch.nn.functional as F
from torch import Tensor

from .losses import Weight


class SupervisedWeights(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Weight of each term; a term of weight 0 is not computed. Only `label` counts samples that have no target.

    Attributes:
        image: L1 of the image, colors in [-1, 1].
        squared: mean squared error of the image.
        class_image: L1 of the image, averaged over each class's pixels first.
        class_color: L1 of the mean color of each class.
        warp: L1 of the warped exemplar.
        class_warp: the same, averaged over each class's pixels first.
        label: negative log-likelihood of the label under the warped exemplar label.
    """

    image: Weight = 0.0
    squared: Weight = 0.0
    class_image: Weight = 0.0
    class_color: Weight = 0.0
    warp: Weight = 0.0
    class_warp: Weight = 0.0
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
    warped_label: the exemplar's planes at the size of the map (`class_shares`), warped along; only the term `label`
    needs it.
    """
    terms = {}
    known = has_target.to(image.dtype)
    if weights.image:
        terms["image"] = weights.image * _mean((image - target).abs(), known)
    if weights.squared:
        terms["squared"] = weights.squared * _mean((image - target).square(), known)
    if weights.class_image:
        terms["class_image"] = weights.class_image * class_mean((image - target).abs(), label, known)
    if weights.class_color:
        terms["class_color"] = weights.class_color * class_mean(image - target, label, known)
    if weights.warp:
        terms["warp"] = weights.warp * _mean((warped_image - target).abs(), known)
    if weights.class_warp:
        terms["class_warp"] = weights.class_warp * class_mean((warped_image - target).abs(), label, known)
    if weights.label:
        assert warped_label is not None
        likelihood = (
            class_shares(label, label.shape[2] // warped_label.shape[2]) * (warped_label.clamp_min(0) + 1e-4).log()
        )
        terms["label"] = weights.label * -likelihood.sum(1).mean()
    return terms


def class_shares(label: Tensor, stride: int) -> Tensor:
    """Label planes (B, nc, H, W) -> the share of each class in the area of each map position (B, nc, h, w)."""
    return F.avg_pool2d(label, stride)


def class_mean(error: Tensor, label: Tensor, known: Tensor) -> Tensor:
    """The size of `error`'s mean over each class, every class that is present in a sample counting alike.

    error: (B, 3, H, W); of a signed one the size of the mean is what counts, so errors within a class can cancel.
    label: planes (B, nc, H, W). known (B,): 1 for the samples that count, 0 for the others.
    """
    area = label.sum((2, 3))  # (B, nc)
    means = (label.flatten(2) @ error.flatten(2).mT) / area.clamp_min(1)[..., None]  # (B, nc, 3)
    counted = (area > 0) * known[:, None]
    return (means.abs().mean(2) * counted).sum() / counted.sum().clamp_min(1)


def _mean(error: Tensor, known: Tensor) -> Tensor:
    return (error.mean((1, 2, 3)) * known).sum() / known.sum().clamp_min(1)
