"""The metrics of photographs, which have no exact target, collected picture by picture into one set of scores."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from ...errors import InputError
from ...preprocess.images import PathLike, to_uint8
from ...train.data import Item
from .metrics import PatchSet, sliced_wasserstein_levels
from .predictors import Prediction

METRICS = ("fid", "swd", "semantic", "style")
_INCEPTION = (
    "an Inception network as TorchScript (--inception-weights PATH): NVIDIA's inception-2015-12-05.pt, which "
    "stylegan2-ada-pytorch and clean-fid use"
)


class PhotoMetrics:
    """Some of `METRICS` over the pictures that `add` gets.

    "fid" is the Frechet distance between the outputs and the data set's photographs, "swd" their sliced Wasserstein
    distance. "semantic" is the semantic consistency of output and photograph, "style" the style relevance of output and
    exemplar, color and texture.

    Args:
        names: Some of `METRICS`.
        vgg: File with the weights of VGG19, for "semantic" and "style".
        inception: File with an Inception network as TorchScript, for "fid".
        device: PyTorch's, where the networks run.

    Raises:
        InputError: A name is unknown, or a file is missing or damaged.
        BackendError: torchmetrics is missing.
    """

    def __init__(
        self,
        names: Collection[str] = METRICS,
        *,
        vgg: PathLike | None = None,
        inception: PathLike | None = None,
        device: str = "cpu",
    ) -> None:
        check_networks(names, vgg, inception)
        self.names, self.device = set(names), device
        self.patches = (PatchSet(0), PatchSet(1))
        self.rows: list[dict[str, float]] = []
        if inception is not None and "fid" in names:
            from .feature_metrics import FrechetDistance, Inception

            self.frechet = FrechetDistance(Inception(inception), device)
        if vgg is not None and {"semantic", "style"} & set(names):
            from ...train.networks.vgg_weights import load_vgg

            self.vgg = load_vgg(vgg).to(device)

    def add(self, item: Item, prediction: Prediction) -> None:
        """Count one pair."""
        photo = to_uint8(item["image"])
        if "swd" in self.names:
            self.patches[0].add(photo)
            self.patches[1].add(prediction.image)
        if "fid" in self.names:
            self.frechet.add(photo, real=True)
            self.frechet.add(prediction.image, real=False)
        self.rows.append(self._features(item, prediction) if self.names & {"semantic", "style"} else {})

    def scores(self) -> dict[str, Any]:
        """Each metric by its name in the results; those of single pairs are means over the pairs."""
        scores: dict[str, Any] = {"pairs": len(self.rows)}
        if "fid" in self.names:
            scores["fid"] = round(self.frechet.compute(), 3)
        if "swd" in self.names:
            scores["swd"] = sliced_wasserstein_levels(*self.patches)
        for name in self.rows[0]:
            scores[name] = round(float(np.mean([row[name] for row in self.rows])), 4)
        return scores

    def _features(self, item: Item, prediction: Prediction) -> dict[str, float]:
        import torch

        from .feature_metrics import semantic_consistency, style_relevance

        image = torch.as_tensor(prediction.image).permute(2, 0, 1).float() / 127.5 - 1
        pictures = (image, torch.as_tensor(item["image"]), torch.as_tensor(item["exemplar"]))
        output, photo, exemplar = (picture[None].to(self.device) for picture in pictures)
        row = {}
        with torch.inference_mode():
            if "semantic" in self.names:
                row["semantic_consistency"] = float(semantic_consistency(self.vgg, output, photo))
            if "style" in self.names:
                color, texture = style_relevance(self.vgg, output, exemplar)
                row.update(style_color=float(color), style_texture=float(texture))
        return row


def check_networks(names: Collection[str], vgg: object, inception: object) -> None:
    """Raise `InputError` for an unknown metric, for none, and for one whose network is None."""
    from ...train.networks.vgg_weights import VGG_FILES

    if unknown := sorted(set(names) - set(METRICS)) or not names:
        raise InputError(f"metrics {unknown or ''}: expected some of {', '.join(METRICS)}")
    for users, network, what in (({"fid"}, inception, _INCEPTION), ({"semantic", "style"}, vgg, VGG_FILES)):
        if network is None and (unusable := sorted(users & set(names))):
            others = ",".join(name for name in METRICS if name in names and name not in users) or "swd"
            raise InputError(f"{' and '.join(unusable)}: needs {what}; or leave it out: --metrics {others}")
