"""How good a model is: behind `flashcocos evaluate`.

Pairs of avatars have an exact target, and the picture to beat there is `metrics.class_mean_baseline`. Photographs have
no target: see `photo_metrics`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import msgspec
from tqdm import tqdm

from ...errors import InputError
from ...preprocess.images import PathLike, to_uint8
from ...runtime.options import EngineOptions
from ...train.data import Item, PairData
from ...train.data import hand_drawn as painting
from .contact_sheet import ContactSheet
from .metrics import ExactSums, class_mean_baseline, correspondence_accuracy
from .photo_metrics import METRICS, PhotoMetrics, check_networks
from .predictors import Predictor, open_predictor


def evaluate_exact(
    predictor: Predictor,
    pairs: PairData,
    class_names: Sequence[str],
    *,
    count: int | None = None,
    repaint: bool = False,
    sheet: ContactSheet | None = None,
) -> dict[str, Any]:
    """Score pairs against their exact targets.

    Args:
        predictor: What makes the pictures.
        pairs: Pairs whose labels are ids of classes.
        class_names: The classes, by id.
        count: Score the first so many; all by default.
        repaint: Give the predictor each label as if painted by hand (`train.data.hand_drawn`); the targets stay.
        sheet: Collects the pictures.

    Returns:
        "pairs", their number, and means over them, PSNR in dB, colors in [0, 1]: "psnr", "ssim" and "l1" of the image,
        "psnr_warped" of the warped exemplar, "psnr_baseline" of the class-mean baseline, "correspondence", the share of
        positions whose best match in the exemplar is of the same class; "psnr_by_class" over all pixels of each class
        that occurs, and "color_error_by_class", the L1 of its mean color.

    Raises:
        InputError: A pair has no target, the model's labels are others, or `count` is out of range.
    """
    config, classes = predictor.config, len(class_names)
    if (config.label_kind, config.label_channels) != ("classes", classes):
        raise InputError(
            f"a model for {config.task} takes labels of {config.label_channels} {config.label_kind}; "
            f"the pairs have {classes} classes"
        )
    sums = ExactSums(classes)
    for index, item in _items(pairs, count):
        if not item["has_target"]:
            raise InputError(f"pair {index} has no exact target to be scored against")
        label, exemplar_label = item["label"], item["exemplar_label"]
        if repaint:
            item["label"] = painting.hand_drawn(label, seed=index)
        prediction, target, exemplar = predictor.predict(item), to_uint8(item["image"]), to_uint8(item["exemplar"])
        baseline = class_mean_baseline(item["label"], exemplar, exemplar_label, classes)
        correspondence = correspondence_accuracy(item["label"], exemplar_label, prediction.matches, classes)
        sums.add(label, target, prediction.image, prediction.warped, baseline, correspondence)
        if sheet is not None:
            sheet.add(item, prediction)
    by_class = {
        "psnr_by_class": sums.psnr_by_class(class_names),
        "color_error_by_class": sums.color_error_by_class(class_names),
    }
    return {"pairs": len(sums.rows), **sums.means(), **by_class}


def evaluate_photos(
    predictor: Predictor,
    pairs: PairData,
    metrics: PhotoMetrics,
    *,
    count: int | None = None,
    sheet: ContactSheet | None = None,
) -> dict[str, Any]:
    """Score pairs of photographs by `metrics`; the other arguments and errors are those of `evaluate_exact`."""
    for _, item in _items(pairs, count):
        prediction = predictor.predict(item)
        metrics.add(item, prediction)
        if sheet is not None:
            sheet.add(item, prediction)
    return metrics.scores()


def evaluate_model(
    model: PathLike,
    data: PathLike,
    *,
    split: str = "test",
    count: int | None = None,
    hand_drawn: bool = False,
    task: str | None = None,
    pairs: PathLike | None = None,
    labels: PathLike | None = None,
    metrics: Collection[str] = METRICS,
    vgg: PathLike | None = None,
    inception: PathLike | None = None,
    sheet: PathLike | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Score a bundle or model file.

    Args:
        model: A bundle, or a model file to score through PyTorch.
        data: "avatars", rendered where the cache lacks them, or the folder of a photo data set.
        split: "train", "validation" or "test" of the avatars.
        count: Score the first so many pairs; all by default.
        hand_drawn: Of the avatars, give the model each label as if painted by hand; the targets stay.
        task: Whose layout the folder of photographs has; the model's own by default.
        pairs: The retrieval list of the photographs.
        labels: The folder of their prepared labels.
        metrics: For photographs, some of `photo_metrics.METRICS`.
        vgg: For photographs, a file with the weights of VGG19.
        inception: For photographs, a file with an Inception network as TorchScript.
        sheet: Where to write a contact sheet of the first pairs.
        **options: Those of `EngineOptions`.

    Returns:
        What was scored and the scores, JSON.

    Raises:
        FlashcocosError: An option, a file or a package is missing or cannot be used.
    """
    exact = str(data) == "avatars"
    if not exact:
        if hand_drawn:
            raise InputError("hand_drawn: photographs have no exact target; expected data 'avatars'")
        check_networks(metrics, vgg, inception)
        if split != "test":
            raise InputError(f"split {split!r}: a folder of photographs is scored as a test; its list says which")
    engine = EngineOptions(**options)
    predictor = open_predictor(model, engine)
    contact_sheet = None if sheet is None else ContactSheet(predictor.config)
    if exact:
        from ...train.data.avatars import AvatarOptions, AvatarPairs
        from ...train.data.avatars_paint import CLASSES

        avatars = AvatarOptions(predictor.config.image_size, retrieved_share=1.0)
        exact_pairs = AvatarPairs(split, avatars, count=count)
        scores = evaluate_exact(predictor, exact_pairs, CLASSES, repaint=hand_drawn, sheet=contact_sheet)
    else:
        from ...train.data.photos import PhotoPairs
        from ...train.device import torch_device
        from ...train.settings import DataSettings

        config = msgspec.structs.replace(predictor.config, task=task or predictor.config.task)
        files = DataSettings(root=str(data), pairs=str(pairs or ""), labels=str(labels or ""))
        photos = PhotoPairs(config, files, split="test")
        device = torch_device(engine.device) if vgg or inception else "cpu"
        photo_metrics = PhotoMetrics(metrics, vgg=vgg, inception=inception, device=device)
        scores = evaluate_photos(predictor, photos, photo_metrics, count=count, sheet=contact_sheet)
    if sheet is not None and contact_sheet is not None:
        contact_sheet.write(sheet)
    labels_of = {"labels": "hand-drawn"} if hand_drawn else {}
    return {"model": str(model), "data": str(data), "split": split, **labels_of, **scores}


def _items(pairs: PairData, count: int | None) -> Iterator[tuple[int, Item]]:
    total = len(pairs) if count is None else count
    if not 1 <= total <= len(pairs):
        raise InputError(f"count: expected 1 to {len(pairs)} pairs, got {count}")
    with tqdm(desc="evaluate", total=total, unit="pair", disable=None) as progress:
        for index in range(total):
            yield index, pairs[index]
            progress.update()
