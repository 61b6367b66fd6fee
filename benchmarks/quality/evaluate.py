"""How good a model is: behind `flashcocos evaluate`.

On pairs with an exact target, as the avatars are, the measure to beat is the class-mean baseline
(`metrics.class_mean_baseline`). Photographs have no target: see `photo_metrics`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import msgspec
from tqdm import tqdm

from ...errors import InputError
from ...preprocess.images import PathLike, to_uint8
from ...train.data import Item, PairData
from .contact_sheet import ContactSheet
from .metrics import ExactSums, correspondence_accuracy, class_mean_baseline
from .photo_metrics import METRICS, PhotoMetrics, check_networks, open_metrics
from .predictors import Predictor, open_predictor, torch_device


@dataclasses.dataclass(frozen=True)
class ExactScores:
    """Means over the pairs, pictures as 8 bits a color. PSNR in dB; l1 and color errors for colors in [0, 1].

    psnr, psnr_warped, psnr_baseline: of the image, of the warped exemplar, of the class-mean baseline. ssim: of the image.
    correspondence: share of positions whose best match in the exemplar is of the same class.
    psnr_by_class: over all pixels of the class; color_error_by_class: L1 of its mean color. Only classes that occur.
    """

    pairs: int
    psnr: float
    psnr_warped: float
    psnr_baseline: float
    ssim: float
    l1: float
    correspondence: float
    psnr_by_class: dict[str, float]
    color_error_by_class: dict[str, float]


def evaluate_exact(
    predictor: Predictor, pairs: PairData, class_names: Sequence[str], *, count: int | None = None, sheet: ContactSheet | None = None
) -> ExactScores:
    """Score the first `count` pairs (all by default) against their targets; `sheet` gets the pictures.

    Raises `InputError` for a pair without target, for labels that are planes, and for a count out of range.
    """
    config, classes = source.config, len(class_names)
    if (config.label_kind, config.label_channels) != ("classes", classes):
        raise InputError(
            f"a model for {config.task} takes labels of {config.label_channels} {config.label_kind}; "
            f"the pairs have {classes} classes"
        )
    sums = ExactSums(classes)
    for index, item in _items(pairs, count):
        if not item["has_target"]:
            raise InputError(f"pair {index} has no exact target to be scored against")
        drawing, target, exemplar = source.predict(item), to_uint8(item["image"]), to_uint8(item["exemplar"])
        label, exemplar_label = item["label"], item["exemplar_label"]
        baseline = class_mean_baseline(label, exemplar, exemplar_label, classes)
        found = correspondence_accuracy(label, exemplar_label, drawing.matches, classes)
        sums.add(label, target, drawing.image, drawing.warped, baseline, found)
        if sheet is not None:
            sheet.add(item, drawing)
    by_class = sums.psnr_by_class(class_names), sums.color_error_by_class(class_names)
    return ExactScores(len(sums.rows), **sums.means(), psnr_by_class=by_class[0], color_error_by_class=by_class[1])


def evaluate_photos(
    predictor: Predictor, pairs: PairData, measures: PhotoMetrics, *, count: int | None = None, sheet: ContactSheet | None = None
) -> dict[str, Any]:
    """Score the first `count` pairs of photographs (all by default); `sheet` gets the pictures."""
    for _, item in _items(pairs, count):
        drawing = source.predict(item)
        measures.add(item, drawing)
        if sheet is not None:
            sheet.add(item, drawing)
    return measures.scores()


def evaluate_model(
    model: PathLike,
    data: PathLike,
    *,
    split: str = "test",
    count: int | None = None,
    task: str | None = None,
    pairs: PathLike | None = None,
    labels: PathLike | None = None,
    metrics: Collection[str] = METRICS,
    vgg: PathLike | None = None,
    inception: PathLike | None = None,
    sheet: PathLike | None = None,
    backend: str = "onnxruntime",
    device: str = "auto",
    precision: str = "float32",
    warp: str = "auto",
    num_threads: int | None = None,
) -> dict[str, Any]:
    """Score the bundle or model file `model`; a JSON object of what was scored and the scores.

    data: "avatars", rendered where the cache lacks them, or the folder of a photo data set with its retrieval list
    `pairs` and, if they are prepared, its `labels`; task: whose layout that folder has, by default the model's own.
    metrics, vgg, inception: for photographs, see `photo_metrics`. sheet: where to write a picture of the first pairs.
    backend, device, precision, warp, num_threads: as for the runtime's `Translator`.
    """
    exact = str(data) == "avatars"
    if not exact:
        check_networks(metrics, vgg, inception)
        if split != "test":
            raise InputError(f"split {split!r}: a folder of photographs is scored as a test; its list says which")
    source = open_predictor(model, backend=backend, device=device, precision=precision, warp=warp, num_threads=num_threads)
    drawn = None if sheet is None else ContactSheet(source.config)
    if exact:
        from ...train.data.avatars import AvatarOptions, AvatarPairs
        from ...train.data.avatars_paint import CLASSES

        options = AvatarOptions(size=source.config.image_size, retrieved=1.0, pseudo=0.0)
        exact_pairs = AvatarPairs(split, options, count=count)
        scores = dataclasses.asdict(evaluate_exact(source, exact_pairs, CLASSES, sheet=drawn))
    else:
        from ...train.data.photos import PhotoPairs

        config = msgspec.structs.replace(source.config, task=task or source.config.task)
        photos = PhotoPairs(config, data, pairs, split="test", labels=labels)
        measures = open_metrics(metrics, vgg, inception, torch_device(device) if vgg or inception else "cpu")
        scores = evaluate_photos(source, photos, measures, count=count, sheet=drawn)
    if sheet is not None and drawn is not None:
        drawn.write(sheet)
    return {"model": str(model), "data": str(data), "split": split, **scores}


def _items(pairs: PairData, count: int | None) -> Iterator[tuple[int, Item]]:
    total = len(pairs) if count is None else count
    if not 1 <= total <= len(pairs):
        raise InputError(f"count: expected 1 to {len(pairs)} pairs, got {count}")
    with tqdm(desc="evaluate", total=total, unit="pair", disable=None) as progress:
        for index in range(total):
            yield index, pairs[index]
            progress.update()
