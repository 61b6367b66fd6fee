"""Which files belong together: inputs, exemplars, their labels and outputs, from single files, folders or a list.

A list is a CSV of `input,exemplar[,exemplar_label]` a line, with Windows or POSIX separators, as the published lists of
exemplars are; a name may carry another suffix than the file has (`a.jpg` finds the label `a.png`).
"""

from __future__ import annotations

import csv
import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path

from ..errors import InputError
from ..preprocess.images import SUFFIXES

LABEL_SUFFIXES = (".png", ".npz", ".bmp", ".tif", ".tiff", ".gif", ".webp", ".pgm")  # without JPEG, which alters ids
# a picture may lie beside its label, and then it is the JPEG
PICTURE_SUFFIXES = tuple(sorted(SUFFIXES, key=lambda suffix: suffix not in (".jpg", ".jpeg")))
OUTPUT_SUFFIXES = (".png", ".jpg", ".jpeg")
EXTRAS = {"warped": ".png", "matches": ".npz", "confidence": ".png", "grid": ".png"}


@dataclasses.dataclass(frozen=True)
class Job:
    """One translation: the label `label` in the manner of `exemplar`, written to `output`, extras beside it."""

    label: Path
    exemplar: Path
    exemplar_label: Path | None
    output: Path

    def extra(self, kind: str) -> Path:
        """Where the extra output `kind`, a key of `EXTRAS`, goes: out.png -> out.warped.png."""
        return self.output.with_name(f"{self.output.stem}.{kind}{EXTRAS[kind]}")


def plan_jobs(
    inputs: Path | None,
    exemplars: Path | None,
    exemplar_labels: Path | None,
    output: Path,
    *,
    pairs: Path | None = None,
    suffix: str = ".png",
    extras: Collection[str] = (),
) -> list[Job]:
    """All translations that the arguments of `flashcocos translate` ask for, in a stable order.

    inputs: label file or folder (searched through). exemplars: one picture for all, or a folder in which each input
    finds its own by its relative path without suffix. exemplar_labels: likewise, for the exemplars.
    pairs: a CSV list to use instead; its names are relative to the folders given, or else to the list's own folder.
    output: a file for a single input where it has an image suffix, else a folder.
    Files named but missing are left to the translation to report. Raises `InputError` where the arguments make no
    sense: nothing to do, an unreadable list, two jobs with one output, an output that would overwrite an input.
    """
    if suffix not in OUTPUT_SUFFIXES:
        raise InputError(f"output suffix {suffix!r}: expected one of {', '.join(OUTPUT_SUFFIXES)}")
    for given in (inputs, exemplars, exemplar_labels, pairs):
        if given is not None and not given.exists():
            raise InputError(f"{given} does not exist")
    if pairs is not None:
        triples = _listed(pairs, inputs, exemplars, exemplar_labels)
    elif inputs is None or exemplars is None:
        raise InputError("nothing to translate: give an input and an exemplar, or a list of pairs")
    else:
        triples = _matched(inputs, exemplars, exemplar_labels)
        if inputs.is_dir() and output.resolve().is_relative_to(inputs.resolve()):
            raise InputError(
                f"output {output} lies in the input folder {inputs}, whose files are all labels: choose another"
            )
    single = inputs is not None and inputs.is_file() and pairs is None
    if single and output.suffix.lower() in OUTPUT_SUFFIXES and not output.is_dir():
        jobs = [Job(label, exemplar, exemplar_label, output) for _, label, exemplar, exemplar_label in triples]
    elif output.is_file() or output.suffix.lower() in OUTPUT_SUFFIXES:
        raise InputError(f"output {output}: expected a folder for the results of several inputs")
    else:
        repeated = Counter(label for _, label, *_ in triples)
        jobs = []
        for relative, label, exemplar, exemplar_label in triples:
            # one input with several exemplars: each result carries the exemplar's name too
            stem = f"{relative.name}_{exemplar.stem}" if repeated[label] > 1 else relative.name
            jobs.append(Job(label, exemplar, exemplar_label, output / relative.parent / f"{stem}{suffix}"))
    _check_outputs(jobs, extras)
    return jobs


def _matched(inputs: Path, exemplars: Path, exemplar_labels: Path | None) -> list[tuple[Path, Path, Path, Path | None]]:
    """(relative path without suffix, label, exemplar, exemplar's label) of each input, paired by name."""
    labels = [inputs] if inputs.is_file() else _files(inputs, LABEL_SUFFIXES)
    if not labels:
        raise InputError(f"{inputs}: no label files in this folder (looked for {', '.join(LABEL_SUFFIXES)})")
    triples = []
    for label in labels:
        relative = Path(label.stem) if inputs.is_file() else label.relative_to(inputs).with_suffix("")
        exemplar = exemplars if exemplars.is_file() else _find(exemplars / relative, PICTURE_SUFFIXES)
        triples.append((relative, label, exemplar, _label_of(exemplar, exemplars, exemplar_labels)))
    return triples


def _listed(
    pairs: Path, inputs: Path | None, exemplars: Path | None, exemplar_labels: Path | None
) -> list[tuple[Path, Path, Path, Path | None]]:
    """As `_matched`, of each line of the list `pairs`."""
    for folder in (inputs, exemplars, exemplar_labels):
        if folder is not None and not folder.is_dir():
            raise InputError(f"{folder}: expected a folder that the names of the list {pairs} are relative to")
    try:
        with pairs.open(newline="", encoding="utf-8-sig") as file:
            rows = list(enumerate(csv.reader(file), 1))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{pairs}: not a readable list: {error}") from error
    home = pairs.parent
    triples = []
    for number, row in rows:
        cells = [cell.strip() for cell in row]
        if not any(cells) or (number == 1 and cells[:2] == ["input", "exemplar"]):
            continue
        if len(cells) not in (2, 3) or not all(cells[:2]) or "\0" in "".join(cells):
            raise InputError(f"{pairs}, line {number}: expected input,exemplar[,exemplar_label], got {','.join(row)!r}")
        label = _named(inputs or home, cells[0], LABEL_SUFFIXES)
        exemplar = _named(exemplars or home, cells[1], PICTURE_SUFFIXES)
        if len(cells) == 3 and cells[2]:
            exemplar_label: Path | None = _named(exemplar_labels or home, cells[2], LABEL_SUFFIXES)
        else:
            exemplar_label = _label_of(exemplar, exemplars or home, exemplar_labels)
        name = Path(cells[0].replace("\\", "/"))
        # an absolute name, or one that climbs, must not lead the output out of its folder
        relative = Path(name.name) if name.is_absolute() or ".." in name.parts or name.drive else name
        triples.append((relative.with_suffix(""), label, exemplar, exemplar_label))
    if not triples:
        raise InputError(f"{pairs}: the list is empty; expected lines of input,exemplar[,exemplar_label]")
    return triples


def _label_of(exemplar: Path, exemplars: Path, labels: Path | None) -> Path | None:
    if labels is None or labels.is_file():
        return labels
    inside = exemplars.is_dir() and exemplar.is_relative_to(exemplars)
    name = exemplar.relative_to(exemplars) if inside else Path(exemplar.name)
    return _find(labels / name.with_suffix(""), LABEL_SUFFIXES)


def _named(folder: Path, name: str, suffixes: Iterable[str]) -> Path:
    """The file that a list means by `name`: as it stands, with POSIX separators, or with another suffix."""
    as_stands = folder / name
    if as_stands.is_file() and as_stands.suffix.lower() in suffixes:
        return as_stands
    path = folder / name.replace("\\", "/")
    return path if path.is_file() and path.suffix.lower() in suffixes else _find(path.with_suffix(""), suffixes, path)


def _find(path: Path, suffixes: Iterable[str], missing: Path | None = None) -> Path:
    """`path` with the first suffix that exists, in lower or upper case; else `missing`, by default `path` with ".*"."""
    for suffix in suffixes:
        for spelling in (suffix, suffix.upper()):
            candidate = path.with_name(path.name + spelling)
            if candidate.is_file():
                return candidate
    return path.with_name(f"{path.name}.*") if missing is None else missing


def _files(folder: Path, suffixes: Collection[str]) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())


def _check_outputs(jobs: list[Job], extras: Collection[str]) -> None:
    sources = {path.resolve() for job in jobs for path in (job.label, job.exemplar, job.exemplar_label) if path}
    seen: dict[Path, Path] = {}
    for job in jobs:
        for target in (job.output, *(job.extra(kind) for kind in extras)):
            resolved = target.resolve()
            if resolved in sources:
                raise InputError(f"output {target} would overwrite an input; choose another output folder")
            if resolved in seen:
                raise InputError(f"{seen[resolved]} and {job.label} would both be written to {target}; rename one")
            seen[resolved] = job.label
