"""Folders of translations, behind `flashcocos translate`: resumable, atomic, and no bad file stops the rest."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..config import ModelConfig
from ..errors import FlashcocosError, InputError
from ..files import atomic_path
from ..preprocess.images import PathLike, UInt8Array, load_rgb
from ..preprocess.labels import load_label, resize_nearest
from ..preprocess.palette import label_colors
from .jobs import EXTRAS, Job, plan_jobs
from .translator import Exemplar, Size, Translation, Translator, resolve_size

CACHED_EXEMPLARS = 16  # encoded exemplars kept in memory; 5 MB each at 256 x 256, C = 256
JPEG_QUALITY = 95


@dataclasses.dataclass(frozen=True)
class Summary:
    """What became of a batch: results written, results that were there already, and (input, reason) of failures."""

    done: int
    skipped: int
    failed: tuple[tuple[Path, str], ...]


def translate_folder(
    translator: Translator,
    inputs: PathLike | None,
    exemplars: PathLike | None,
    exemplar_labels: PathLike | None,
    output: PathLike,
    *,
    pairs: PathLike | None = None,
    size: Size = None,
    save: Collection[str] = (),
    suffix: str = ".png",
    resume: bool = False,
    progress: bool = False,
) -> Summary:
    """Translate every input and write the pictures; which files belong together: `jobs.plan_jobs`.

    save: extra outputs beside each picture: "warped" and "confidence" (PNG), "matches" (.npz of the arrays `matches`,
        `confidence` and `exemplar_size`), "grid" (label, exemplar, warped and result side by side, PNG).
    suffix: ".png", or ".jpg" (quality 95), of results in a folder; resume: leave alone what has all its outputs.
    progress: show a progress bar on standard error, where it is a terminal, and a line for each job that failed.
    Every file is written whole or not at all. Raises `InputError` before any work where the arguments make no sense.
    """
    if unknown := sorted(set(save) - set(EXTRAS)):
        raise InputError(f"unknown output to save {unknown[0]!r}; available: {', '.join(EXTRAS)}")
    jobs = plan_jobs(
        _path(inputs),
        _path(exemplars),
        _path(exemplar_labels),
        Path(output),
        pairs=_path(pairs),
        suffix=suffix,
        extras=save,
    )
    resolve_size(translator.config, size, (256, 256))  # a size that is wrong for all is an error at once
    _check_exemplar_labels(translator.config, jobs)
    encode = functools.lru_cache(CACHED_EXEMPLARS)(functools.partial(_encode, translator, size))
    done, skipped = 0, 0
    failed: list[tuple[Path, str]] = []
    for job in tqdm(jobs, desc="translate", unit="image", disable=None if progress else True):
        if resume and all(path.is_file() for path in (job.output, *(job.extra(kind) for kind in save))):
            skipped += 1
        else:
            try:
                result = translator.translate(job.label, encode(job.exemplar, job.exemplar_label), size)
                _write(translator.config, job, result, save)
                done += 1
            except (FlashcocosError, OSError, MemoryError) as error:
                reason = (str(error) or type(error).__name__).replace("\n", " ")
                failed.append((job.label, reason))
                if progress:
                    line = reason if reason.startswith(str(job.label)) else f"{job.label}: {reason}"
                    tqdm.write(line, file=sys.stderr)
    return Summary(done, skipped, tuple(failed))


def _check_exemplar_labels(config: ModelConfig, jobs: list[Job]) -> None:
    for job in jobs:
        if config.condition_on_label and job.exemplar_label is None:
            raise InputError(
                f"{job.exemplar}: a model for {config.task} needs the exemplars' labels; give their folder too"
            )
        if not config.condition_on_label and job.exemplar_label is not None:
            raise InputError(
                f"{job.exemplar_label}: a model for {config.task} takes no labels for exemplars; leave them out"
            )


def _path(path: PathLike | None) -> Path | None:
    return None if path is None else Path(path)


def _encode(translator: Translator, size: Size, exemplar: Path, label: Path | None) -> Exemplar:
    return translator.encode_exemplar(exemplar, label, size)


def _write(config: ModelConfig, job: Job, result: Translation, save: Collection[str]) -> None:
    writers: dict[str, Callable[[Path], None]] = {
        "warped": lambda path: _save(path, result.warped),
        "matches": lambda path: np.savez_compressed(
            path, matches=result.matches, confidence=result.confidence, exemplar_size=result.exemplar_size
        ),
        "confidence": lambda path: _save(path, np.rint(result.confidence * 255).astype(np.uint8)),
        "grid": lambda path: _save(path, _grid(config, job, result)),
    }
    for kind in sorted(save):
        with atomic_path(job.extra(kind)) as temporary:
            writers[kind](temporary)
    with atomic_path(job.output) as temporary:  # last, for it tells that the job is done
        _save(temporary, result.image)


def _save(path: Path, pixels: UInt8Array) -> None:
    Image.fromarray(pixels).save(path, quality=JPEG_QUALITY)


def _grid(config: ModelConfig, job: Job, result: Translation) -> UInt8Array:
    """Label, exemplar, warped exemplar and result side by side."""
    size = result.image.shape[:2]
    label = resize_nearest(load_label(config, job.label), size)
    exemplar = np.asarray(load_rgb(job.exemplar, size))
    return np.concatenate([label_colors(config, label), exemplar, result.warped, result.image], axis=1)
