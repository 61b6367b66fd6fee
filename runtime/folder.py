"""Translation of folders, behind `flashcocos translate`: resumable, atomic, and no bad file stops the rest."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from ..config import ModelConfig
from ..errors import FlashcocosError, InputError, printable
from ..files import atomic_path, require_distinct
from ..preprocess.images import PathLike, UInt8Array, load_rgb
from ..preprocess.labels import load_label, resize_nearest
from ..preprocess.palette import label_colors
from .jobs import EXTRAS, Job, match_files
from .pipeline import Exemplar
from .translator import Size, Translation, Translator, resolve_size

CACHED_EXEMPLARS = 16  # encoded exemplars kept in memory; 5 MB each at 256 x 256, C = 256
JPEG_QUALITY = 95


@dataclasses.dataclass(frozen=True)
class Summary:
    """What became of a folder.

    Attributes:
        done: Number of results written.
        skipped: Number of results that were there already.
        failed: (label file, reason) of each translation that failed.
    """

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
    """Translate every input and write the pictures, each file whole or not at all.

    Args:
        translator: The model.
        inputs: Label file or folder. It, `exemplars`, `exemplar_labels`, `output` and `pairs` are as for
            `jobs.match_files`, which decides which files belong together.
        exemplars: Picture or folder.
        exemplar_labels: Label file or folder, for models that need the exemplars' labels.
        output: Picture or folder to write.
        pairs: CSV list to use instead.
        size: As for `Translator.translate`.
        save: Extra outputs beside each picture: "warped" and "confidence" (PNG), "matches" (.npz of the arrays
            `matches`, `confidence` and `exemplar_size`), "grid" (label, exemplar, warped and result side by side, PNG).
        suffix: ".png", or ".jpg" (quality 95), of results in a folder.
        resume: Leave alone what has all its outputs.
        progress: Show a progress bar on standard error, where it is a terminal, and a line for each job that failed.

    Returns:
        What was written, and what failed: a bad file does not stop the rest.

    Raises:
        InputError: The arguments make no sense; nothing has been written then.
    """
    if unknown := sorted(set(save) - set(EXTRAS)):
        raise InputError(f"unknown output to save {unknown[0]!r}; available: {', '.join(EXTRAS)}")
    jobs = match_files(
        _path(inputs),
        _path(exemplars),
        _path(exemplar_labels),
        Path(output),
        pairs=_path(pairs),
        suffix=suffix,
        extras=save,
    )
    for job in jobs:
        _check_exemplar_label(translator.config, job)
        for path in job.outputs(save):
            require_distinct(path, translator.bundle.path)
    resolve_size(translator.config, size, (256, 256))  # a size that is wrong for all is an error at once
    # the last picture only: several large ones would take much memory, and the grid follows the encoding at once
    picture = functools.lru_cache(1)(load_rgb)

    @functools.lru_cache(CACHED_EXEMPLARS)
    def encode(exemplar: Path, label: Path | None) -> Exemplar:
        return translator.encode_exemplar(picture(exemplar), label, size)

    done, skipped = 0, 0
    failed: list[tuple[Path, str]] = []
    for job in tqdm(jobs, desc="translate", unit="image", disable=None if progress else True):
        if resume and all(path.is_file() for path in job.outputs(save)):
            skipped += 1
            continue
        try:
            job.check()
            exemplar = encode(job.exemplar, job.exemplar_label)
            label = load_label(translator.config, job.label)
            result = translator.translate(label, exemplar, size)
            _write(job, result, functools.partial(_grid, translator.config, label, job.exemplar, picture, result), save)
            done += 1
        except (FlashcocosError, OSError, MemoryError) as error:
            reason = (str(error) or type(error).__name__).replace("\n", " ")
            failed.append((job.label, reason))
            if progress:
                _print_failure(job.label, reason)
    return Summary(done, skipped, tuple(failed))


def _check_exemplar_label(config: ModelConfig, job: Job) -> None:
    if config.condition_on_label and job.exemplar_label is None:
        raise InputError(
            f"{job.exemplar}: a model for {config.task} needs the exemplars' labels; give --exemplar-label"
        )
    if not config.condition_on_label and job.exemplar_label is not None:
        raise InputError(
            f"{job.exemplar_label}: a model for {config.task} takes no exemplar labels; leave --exemplar-label out"
        )


def _print_failure(label: Path, reason: str) -> None:
    line = reason if reason.startswith(str(label)) else f"{label}: {reason}"
    with contextlib.suppress(OSError):  # standard error may be full or closed
        tqdm.write(printable(line), file=sys.stderr)


def _path(path: PathLike | None) -> Path | None:
    return None if path is None else Path(path)


def _write(job: Job, result: Translation, grid: Callable[[], UInt8Array], save: Collection[str]) -> None:
    for kind in sorted(save):
        with atomic_path(job.extra(kind)) as path:
            if kind == "warped":
                _save(path, result.warped)
            elif kind == "confidence":
                _save(path, np.rint(result.confidence * 255).astype(np.uint8))
            elif kind == "grid":
                _save(path, grid())
            else:
                arrays = {name: getattr(result, name) for name in ("matches", "confidence", "exemplar_size")}
                np.savez_compressed(path, **arrays)
    with atomic_path(job.output) as path:  # last, for `resume` takes it to mean that the job is done
        _save(path, result.image)


def _save(path: Path, pixels: UInt8Array) -> None:
    Image.fromarray(pixels).save(path, quality=JPEG_QUALITY)


def _grid(
    config: ModelConfig,
    label: npt.NDArray[Any],
    exemplar: Path,
    picture: Callable[[Path], Image.Image],
    result: Translation,
) -> UInt8Array:
    """Label, exemplar, warped exemplar and result side by side; `picture` opens the exemplar."""
    size = result.image.shape[:2]
    colors = label_colors(config, resize_nearest(label, size))
    shown = np.asarray(load_rgb(picture(exemplar), size))
    return np.concatenate([colors, shown, result.warped, result.image], axis=1)
