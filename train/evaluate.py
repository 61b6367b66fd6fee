"""How good a model is on pairs whose exact target is known, and a sheet of pictures to look at.

The measure to beat is the trivial answer: each class of the label painted with the exemplar's mean colour of that
class, by the exemplar's true label; a class that the exemplar lacks gets its mean colour.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..errors import InputError
from ..files import atomic_path
from ..progress import Progress
from .networks import CoCosNet
from .supervised import translate

_BATCH = 8


@dataclasses.dataclass(frozen=True)
class Scores:
    """Means over the pairs. PSNR in dB for a range of 1; l1 for images in [0, 1].

    psnr, psnr_warped, psnr_trivial: of the image, of the warped exemplar, of the trivial answer.
    correspondence: share of positions whose warped exemplar label is the label's own class, both at a quarter size.
    psnr_by_class: over all pixels of the class; colour_error_by_class: L1 of its mean colour. Only classes that occur.
    """

    pairs: int
    psnr: float
    psnr_warped: float
    psnr_trivial: float
    l1: float
    correspondence: float
    psnr_by_class: dict[str, float]
    colour_error_by_class: dict[str, float]

    def to_json(self) -> str:
        """These scores as a JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=2)


def evaluate(
    model: CoCosNet,
    pairs: Any,
    class_names: Sequence[str],
    *,
    count: int | None = None,
    sheet: str | os.PathLike[str] | None = None,
    palette: np.ndarray | None = None,
    sheet_pairs: int = 24,
    backend: str = "auto",
) -> Scores:
    """Translate the first `count` pairs (all by default) with `model` in evaluation mode and compare with the targets.

    pairs: a map-style data set as `train.data.avatars.AvatarPairs`, every pair with a target.
    sheet: where to write mask | exemplar | warped | image | target of the first `sheet_pairs` pairs, as a picture;
    palette: uint8 (classes, 3), the colours of the mask. Raises `InputError` for a pair without target.
    """
    count = len(pairs) if count is None else count
    if not 1 <= count <= len(pairs):
        raise InputError(f"count: expected 1 to {len(pairs)} pairs, got {count}")
    sums, rows = _Sums(len(class_names)), list[np.ndarray]()
    with Progress("evaluate", count, unit="pair") as progress, torch.inference_mode():
        for start in range(0, count, _BATCH):
            items = [pairs[index] for index in range(start, min(start + _BATCH, count))]
            if not all(item["has_target"] for item in items):
                raise InputError(f"pairs {start} to {start + len(items) - 1}: every pair needs a target to be scored")
            batch = {name: torch.stack([torch.as_tensor(item[name]) for item in items]) for name in items[0]}
            label, exemplar_label = (model.label_planes(batch[name]) for name in ("label", "exemplar_label"))
            exemplar, target = batch["exemplar"], batch["image"]
            image, warped_image, warped_label = translate(model, label, exemplar, exemplar_label, backend=backend)
            trivial = trivial_answer(label, exemplar, exemplar_label)
            sums.add(label, target, image, warped_image, trivial, warped_label)
            if sheet is not None and len(rows) < sheet_pairs:
                mask = _mask_picture(batch["label"], len(class_names), palette)
                pictures = [mask, *(_picture(x) for x in (exemplar, warped_image, image, target))]
                rows += [np.concatenate(row, axis=1) for row in zip(*pictures, strict=True)]
            progress.advance(len(items))
    if sheet is not None:
        with atomic_path(sheet) as temporary:
            Image.fromarray(_tile(rows[:sheet_pairs])).save(temporary)
    return sums.scores(class_names)


def trivial_answer(label: Tensor, exemplar: Tensor, exemplar_label: Tensor) -> Tensor:
    """(B, 3, H, W): label planes painted with the mean colours of the exemplar's classes."""
    area = exemplar_label.sum((2, 3))[..., None]  # (B, nc, 1)
    means = torch.einsum("bnhw,bchw->bnc", exemplar_label, exemplar) / area.clamp_min(1)
    means = torch.where(area > 0, means, exemplar.mean((2, 3))[:, None])
    return torch.einsum("bnhw,bnc->bchw", label, means)


def psnr(image: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in [-1, 1], (B,), in dB; 100 for equal pictures."""
    return _decibel((image - target).square().mean((1, 2, 3)) / 4)


class _Sums:
    def __init__(self, classes: int) -> None:
        self.means: list[Tensor] = []  # (B, 5) each
        self.area, self.error = torch.zeros(2, classes, dtype=torch.float64)
        self.colour, self.present = torch.zeros(2, classes, dtype=torch.float64)

    def add(
        self, label: Tensor, target: Tensor, image: Tensor, warped_image: Tensor, trivial: Tensor, warped_label: Tensor
    ) -> None:
        right = warped_label.argmax(1) == F.avg_pool2d(label, 4).argmax(1)
        columns = [psnr(x, target) for x in (image, warped_image, trivial)]
        columns += [(image - target).abs().mean((1, 2, 3)) / 2, right.float().mean((1, 2))]
        self.means.append(torch.stack(columns, 1))
        area = label.sum((2, 3))  # (B, nc)
        self.area += area.sum(0)
        self.error += torch.einsum("bnhw,bhw->n", label, (image - target).square().mean(1) / 4)
        shift = torch.einsum("bnhw,bchw->bnc", label, (image - target) / 2) / area.clamp_min(1)[..., None]
        self.colour += shift.abs().mean(2).sum(0)
        self.present += (area > 0).sum(0)

    def scores(self, names: Sequence[str]) -> Scores:
        means = torch.cat(self.means)
        own, warped, trivial, l1, right = (round(value, 4) for value in means.mean(0).tolist())
        by_class = _decibel(self.error / self.area.clamp_min(1)).tolist()
        colour = (self.colour / self.present.clamp_min(1)).tolist()
        found = [place for place in range(len(names)) if self.area[place] > 0]
        return Scores(
            pairs=len(means),
            psnr=own,
            psnr_warped=warped,
            psnr_trivial=trivial,
            l1=l1,
            correspondence=right,
            psnr_by_class={names[place]: round(by_class[place], 2) for place in found},
            colour_error_by_class={names[place]: round(colour[place], 4) for place in found},
        )


def _decibel(error: Tensor) -> Tensor:
    return -10 * error.clamp_min(1e-10).log10()


def _picture(image: Tensor) -> np.ndarray:
    return ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def _mask_picture(label: Tensor, classes: int, palette: np.ndarray | None) -> np.ndarray:
    if palette is None:
        palette = np.linspace(0, 255, classes).round().astype(np.uint8)[:, None].repeat(3, 1)
    return palette[label.cpu().numpy()]


def _tile(rows: list[np.ndarray]) -> np.ndarray:
    columns = 3 if len(rows) % 3 == 0 else 1
    height = len(rows) // columns
    return np.concatenate([np.concatenate(rows[i * height : (i + 1) * height]) for i in range(columns)], axis=1)
