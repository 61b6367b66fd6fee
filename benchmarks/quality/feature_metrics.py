"""Metrics that compare pictures by the features of a pretrained network; the user supplies its weights.

Semantic consistency and style relevance are from arXiv 2004.05571, section 4. It names VGG19's layers and the cosine
similarity, but neither how the positions of a map are averaged nor how patches of output and exemplar are matched. Both
are decided here, so the numbers compare models with each other, not with the paper's tables. The Frechet distance is
torchmetrics' (arXiv 1706.08500), on an Inception network as a TorchScript file.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import InputError, import_extra
from ...preprocess.images import UInt8Array
from ...train.networks import Vgg19

SEMANTIC = ("r32", "r42", "r52")
COLOR, TEXTURE = "r12", "r22"
MATCHING = "r42"  # the layer whose positions are the patches, 8 pixels a side


def semantic_consistency(vgg: Vgg19, image: Tensor, photo: Tensor) -> Tensor:
    """Whether an output means what its label's photograph means.

    Args:
        vgg: The network.
        image: Outputs (B, 3, H, W) in [-1, 1].
        photo: Photographs (B, 3, H, W) in [-1, 1].

    Returns:
        (B,), at most 1: the cosine similarity of the features at equal positions, averaged over the positions and the
        layers `SEMANTIC`.
    """
    image_maps, photo_maps = vgg(image, SEMANTIC), vgg(photo, SEMANTIC)
    scores = [F.cosine_similarity(image_maps[name], photo_maps[name]).mean((1, 2)) for name in SEMANTIC]
    return torch.stack(scores).mean(0)


def style_relevance(vgg: Vgg19, image: Tensor, exemplar: Tensor) -> tuple[Tensor, Tensor]:
    """Whether an output looks like the exemplar where they mean the same.

    Args:
        vgg: The network.
        image: Outputs (B, 3, H, W) in [-1, 1].
        exemplar: Exemplars (B, 3, H, W) in [-1, 1].

    Returns:
        Color and texture, (B,) each, at most 1. Each patch of the output is compared with the exemplar's patch that is
        most similar in the layer `MATCHING`: the cosine similarity of their mean features of the layers `COLOR` and
        `TEXTURE`, averaged over the patches.
    """
    names = (COLOR, TEXTURE, MATCHING)
    image_maps, exemplar_maps = vgg(image, names), vgg(exemplar, names)
    query, key = (F.normalize(maps[MATCHING].flatten(2), dim=1) for maps in (image_maps, exemplar_maps))
    match = (query.mT @ key).argmax(2)  # (B, patches): the exemplar's patch of each of the output's
    color, texture = (
        F.cosine_similarity(
            _patches(image_maps, name),
            _patches(exemplar_maps, name).gather(2, match[:, None].expand(-1, image_maps[name].shape[1], -1)),
        ).mean(1)
        for name in (COLOR, TEXTURE)
    )
    return color, texture


def _patches(features: dict[str, Tensor], name: str) -> Tensor:
    """The mean features (B, C, patches) of each patch."""
    height, width = features[MATCHING].shape[2:]
    return F.adaptive_avg_pool2d(features[name], (height, width)).flatten(2)


class Inception(nn.Module):
    """An Inception network from a TorchScript file: pictures (B, 3, H, W) uint8 to features (B, n).

    NVIDIA's `inception-2015-12-05.pt` is one: it resizes by itself, as the original FID does, and returns its 2048
    pooled features with an argument. Any other file must return (B, n) without; `InputError` for what does not.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        try:
            self.network = torch.jit.load(os.fspath(path), map_location="cpu").eval()  # type: ignore[no-untyped-call] # torch's
            arguments = {argument.name for argument in self.network.forward.schema.arguments}
            self.options = {"return_features": True} if "return_features" in arguments else {}
            features = self(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
        except (OSError, ValueError, RuntimeError, AttributeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise InputError(f"{path}: not a TorchScript network of uint8 pictures ({reason})") from error
        if not isinstance(features, Tensor) or features.ndim != 2:
            raise InputError(f"{path}: expected features (batch, n) from pictures (batch, 3, height, width)")
        self.num_features = features.shape[1]

    def forward(self, pictures: Tensor) -> Tensor:
        features: Tensor = self.network(pictures, **self.options)
        return features


class FrechetDistance:
    """The Frechet distance between the features of real pictures and of outputs; device: PyTorch's."""

    def __init__(self, inception: nn.Module, device: str = "cpu") -> None:
        fid = import_extra("torchmetrics.image.fid", "FID needs torchmetrics", "eval")
        self._device = device
        self._metric = fid.FrechetInceptionDistance(feature=inception).to(device)

    def add(self, picture: UInt8Array, *, real: bool) -> None:
        """Count one picture (H, W, 3)."""
        with torch.inference_mode():
            self._metric.update(torch.as_tensor(picture).permute(2, 0, 1)[None].to(self._device), real=real)

    def compute(self) -> float:
        """The distance of at least two pictures of each kind; it means little with fewer than thousands."""
        return float(self._metric.compute())
