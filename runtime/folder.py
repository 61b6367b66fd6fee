"""Translation of folders, behind `flashcocos translate`: resumable, atomic, and no bad file stops the rest."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from ..bundle import Bundle
from ..config import ModelConfig, Size
from ..errors import FlashcocosError, InputError, printable
from ..files import atomic_path, require_distinct
from ..preprocess.images import UInt8Array, load_rgb
from ..preprocess.labels import load_label, resize_nearest
from ..preprocess.palette import label_colors
from ..remote import is_remote, list_files, to_path
from .jobs import FolderRequest, Job, match_files
from .pipeline import Exemplar
from .translator import Translation, Translator, resolve_size

CACHED_EXEMPLARS = 16  # encoded exemplars kept in memory; 5 MB each at 256 x 256, C = 256
JPEG_QUALITY = 95
SCRATCH = ".flashcocos-ray"  # in the output folder: temporary files of the processes of a Ray job


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


def translate_folder(translator: Translator, request: FolderRequest, progress: bool = False) -> Summary:
    """Translate every input and write the pictures, each file whole or not at all.

    Args:
        translator: The model.
        request: The files, and what to write.
        progress: Show a progress bar on standard error, where it is a terminal, and a line for each job that failed.

    Returns:
        What was written, and what failed: a bad file does not stop the rest.

    Raises:
        InputError: The request makes no sense; nothing has been written then.
    """
    plan = plan_folder(translator.bundle, request)
    if request.resume:
        plan.clean()
    runner = JobRunner(translator, request.size, request.save)
    results = ((job, runner.run(job)) for job in plan.jobs)
    return plan.finish(results, progress)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `translate_folder` is to do, checked before anything is written.

    Attributes:
        jobs: What is to be translated.
        skipped: Number of results that are there already.
        scratch: Folder for temporary files of the processes of a Ray job; None where the output is in a store.
    """

    jobs: list[Job]
    skipped: int
    scratch: Path | None

    def clean(self) -> None:
        """Remove what killed processes of a Ray job left; none may be running."""
        if self.scratch is not None:
            shutil.rmtree(self.scratch, ignore_errors=True)

    def finish(self, results: Iterable[tuple[Job, str | None]], progress: bool) -> Summary:
        """Collect what became of each job: None, or why it failed; in any order."""
        failed: dict[Job, str] = {}
        with tqdm(
            desc="translate",
            unit="image",
            total=len(self.jobs) + self.skipped,
            initial=self.skipped,
            disable=None if progress else True,
        ) as bar:
            for job, reason in results:
                bar.update()
                if reason is not None:
                    failed[job] = reason
                    if progress:
                        _print_failure(job.label, reason)
        ordered = tuple((job.label, failed[job]) for job in self.jobs if job in failed)
        return Summary(len(self.jobs) - len(failed), self.skipped, ordered)


def plan_folder(bundle: Bundle, request: FolderRequest) -> Plan:
    """The jobs of `translate_folder`; `InputError` where the request makes no sense."""
    config, target = bundle.manifest.config, to_path(request.output)
    jobs = match_files(request)
    for job in jobs:
        _check_exemplar_label(config, job)
        for path in job.outputs(request.save):
            require_distinct(path, bundle.path)
    resolve_size(config, request.size, (256, 256))  # a size that is wrong for all is an error at once
    everything = len(jobs)
    if request.resume:
        if is_remote(target):
            list_files(target)  # once, rather than one question for each result
        jobs = [job for job in jobs if not all(path.is_file() for path in job.outputs(request.save))]
    folder = target.parent if jobs and jobs[0].output == target else target
    return Plan(jobs, everything - len(jobs), None if is_remote(target) else folder / SCRATCH)


class JobRunner:
    """Translates one job after another, and keeps what the next may share.

    Args:
        translator: The model.
        size, save: As in `FolderRequest`.
        scratch: Folder for temporary files instead of each output's own.
    """

    def __init__(self, translator: Translator, size: Size, save: Collection[str], scratch: Path | None = None) -> None:
        # the last picture only: several large ones would take much memory, and the grid follows the encoding at once
        picture = functools.lru_cache(1)(load_rgb)

        @functools.lru_cache(CACHED_EXEMPLARS)
        def encode(exemplar: Path, label: Path | None) -> Exemplar:
            return translator.encode_exemplar(picture(exemplar), label, size)

        self._translator, self._size, self._save, self._scratch = translator, size, save, scratch
        self._picture, self._encode = picture, encode

    def run(self, job: Job) -> str | None:
        """Translate and write the outputs; the reason where that fails."""
        config = self._translator.config
        try:
            job.check()
            exemplar = self._encode(job.exemplar, job.exemplar_label)
            label = load_label(config, job.label)
            result = self._translator.translate(label, exemplar, self._size)
            grid = functools.partial(_grid, config, label, job.exemplar, self._picture, result)
            _write(job, result, grid, self._save, self._scratch)
        except (FlashcocosError, OSError, MemoryError) as error:
            return (str(error) or type(error).__name__).replace("\n", " ")
        return None


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


def _write(
    job: Job, result: Translation, grid: Callable[[], UInt8Array], save: Collection[str], scratch: Path | None
) -> None:
    for kind in sorted(save):
        with atomic_path(job.extra(kind), scratch=scratch) as path:
            if kind == "warped":
                _save(path, result.warped)
            elif kind == "confidence":
                _save(path, np.rint(result.confidence * 255).astype(np.uint8))
            elif kind == "grid":
                _save(path, grid())
            else:
                arrays = {name: getattr(result, name) for name in ("matches", "confidence", "exemplar_size")}
                np.savez_compressed(path, **arrays)
    with atomic_path(job.output, scratch=scratch) as path:  # last, for `resume` takes it to mean that the job is done
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
