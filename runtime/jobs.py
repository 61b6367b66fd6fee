"""Which files belong together: inputs, exemplars, their labels and outputs, from single files, folders or a list.

A list is a CSV of `input,exemplar[,exemplar_label]` a line, with Windows or POSIX separators, as the published lists of
exemplars are; a name may carry another suffix than the file has (`a.jpg` finds the label `a.png`).
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path, PurePath

from ..config import Size
from ..errors import InputError
from ..files import read_text, require_file
from ..preprocess.images import SUFFIXES, PathLike
from ..remote import is_remote, list_files, store_errors, to_path

_MAX_LIST_BYTES = 64 << 20
_ANY = ".*"  # the suffix of a file that is looked for by its name alone
LABEL_SUFFIXES = (".png", ".npz", ".bmp", ".tif", ".tiff", ".gif", ".webp", ".pgm")  # without JPEG, which alters ids
# a picture may lie beside its label, and then it is the JPEG
PICTURE_SUFFIXES = tuple(sorted(SUFFIXES, key=lambda suffix: suffix not in (".jpg", ".jpeg")))
OUTPUT_SUFFIXES = (".png", ".jpg", ".jpeg")
# endings of pictures that no result is written with: an output of such a name is a mistake and no folder
_OTHER_SUFFIXES = {*SUFFIXES, ".avif", ".heic", ".jxl", ".jp2", ".svg", ".pdf"} - set(OUTPUT_SUFFIXES)
EXTRAS = {"warped": ".png", "matches": ".npz", "confidence": ".png", "grid": ".png"}


@dataclasses.dataclass(frozen=True)
class Job:
    """One translation.

    Attributes:
        label: The label file to translate.
        exemplar: The picture whose look it takes.
        exemplar_label: The exemplar's label file; None where the model needs none.
        output: The picture to write; extra outputs lie beside it.
    """

    label: Path
    exemplar: Path
    exemplar_label: Path | None
    output: Path

    def extra(self, kind: str) -> Path:
        """Where the extra output `kind`, a key of `EXTRAS`, goes: out.png -> out.warped.png."""
        return self.output.with_name(f"{self.output.stem}.{kind}{EXTRAS[kind]}")

    def outputs(self, extras: Iterable[str] = ()) -> list[Path]:
        """Every file that is written: the picture and the extra outputs `extras`."""
        return [self.output, *(self.extra(kind) for kind in extras)]

    def check(self) -> None:
        """Raise `InputError` where one of the files is missing or is no file."""
        for what, path in (("label", self.label), ("picture", self.exemplar), ("label", self.exemplar_label)):
            if path is not None and path.suffix == _ANY and not path.exists():
                raise InputError(f"no {what} named {path.stem} in {path.parent}")
            if path is not None:
                require_file(path)


@dataclasses.dataclass(frozen=True)
class FolderRequest:
    """Files to translate, and what to write of them. Paths may be those of a store (`remote`).

    Attributes:
        inputs: Label file, or folder that is searched through.
        exemplars: One picture for all, or a folder in which each input finds its own by its relative path without
            suffix.
        exemplar_labels: Likewise, for the exemplars of models that need their labels.
        output: A file for a single input where it has the suffix of a picture, else a folder.
        pairs: A CSV list to use instead; its names are relative to the folders given, or else to the list's own folder.
        size: As for `Translator.translate`.
        save: Extra outputs beside each picture: "warped" and "confidence" (PNG), "matches" (.npz of the arrays
            `matches`, `confidence` and `exemplar_size`), "grid" (label, exemplar, warped and result side by side, PNG).
        suffix: ".png", or ".jpg" (quality 95), of results in a folder.
        resume: Leave alone what has all its outputs.
    """

    inputs: PathLike | None
    exemplars: PathLike | None
    exemplar_labels: PathLike | None
    output: PathLike
    pairs: PathLike | None = None
    size: Size = None
    save: Collection[str] = ()
    suffix: str = ".png"
    resume: bool = False


def match_files(request: FolderRequest) -> list[Job]:
    """All translations that are asked for, in a stable order.

    A file that is named but missing is no error here: `Job.check` finds it.

    Raises:
        InputError: The request makes no sense: nothing to do, an unreadable list, two jobs with one output, an output
            that would overwrite an input.
    """
    if request.suffix not in OUTPUT_SUFFIXES:
        raise InputError(f"output suffix {request.suffix!r}: expected one of {', '.join(OUTPUT_SUFFIXES)}")
    if unknown := sorted(set(request.save) - set(EXTRAS)):
        raise InputError(f"unknown output to save {unknown[0]!r}; available: {', '.join(EXTRAS)}")
    given = (request.inputs, request.exemplars, request.exemplar_labels, request.pairs)
    inputs, exemplars, exemplar_labels, pairs = (None if path is None else to_path(path) for path in given)
    output, sources = to_path(request.output), (inputs, exemplars, exemplar_labels, pairs)
    with store_errors(f"{pairs or inputs} -> {output}", *sources, output):
        for path in sources:
            if path is not None and (path is pairs or not path.is_dir()):
                require_file(path)
            elif path is not None and is_remote(path):
                list_files(path)  # once, rather than one question for each name that a file may have
        jobs = _jobs(inputs, exemplars, exemplar_labels, output, pairs, request.suffix)
        _check_outputs(jobs, request.save, pairs)
    return jobs


def _jobs(
    inputs: Path | None,
    exemplars: Path | None,
    exemplar_labels: Path | None,
    output: Path,
    pairs: Path | None,
    suffix: str,
) -> list[Job]:
    if pairs is not None:
        triples = _listed(pairs, inputs, exemplars, exemplar_labels)
    elif inputs is None or exemplars is None:
        raise InputError(
            "nothing to translate: give an input and an exemplar (--input, --exemplar), or a list of pairs (--pairs)"
        )
    else:
        triples = _matched(inputs, exemplars, exemplar_labels)
        comparable = is_remote(inputs) == is_remote(output)
        if inputs.is_dir() and comparable and output.resolve().is_relative_to(inputs.resolve()):
            raise InputError(
                f"output {output} lies in the input folder {inputs}, whose files are all labels: choose another"
            )
    several = pairs or (inputs if inputs and inputs.is_dir() else None)  # also where it has one input today
    if _is_picture(output, several):
        return [Job(label, exemplar, exemplar_label, output) for _, label, exemplar, exemplar_label in triples]
    repeated = Counter(label for _, label, *_ in triples)
    jobs = []
    for relative, label, exemplar, exemplar_label in triples:
        # one input with several exemplars: each result carries the exemplar's name too
        stem = f"{relative.name}_{exemplar.stem}" if repeated[label] > 1 else relative.name
        jobs.append(Job(label, exemplar, exemplar_label, output / relative.with_name(f"{stem}{suffix}")))
    return jobs


def _is_picture(output: Path, several: Path | None) -> bool:
    """Whether `output` is one picture, and no folder; `several`: the folder or list of inputs, if there is one."""
    if output.is_dir():
        return False
    ending = output.suffix.lower()
    if several is not None and (output.exists() or ending in (*OUTPUT_SUFFIXES, *_OTHER_SUFFIXES)):
        kind = "folder" if several.is_dir() else "list"
        raise InputError(f"output {output}: expected a folder, because the input {several} is a {kind}")
    if ending in OUTPUT_SUFFIXES:
        return True
    if output.exists() or ending in _OTHER_SUFFIXES:
        raise InputError(f"output {output}: expected a folder, or a picture ending in {', '.join(OUTPUT_SUFFIXES)}")
    return False


def _matched(inputs: Path, exemplars: Path, exemplar_labels: Path | None) -> list[tuple[Path, Path, Path, Path | None]]:
    """(relative path without suffix, label, exemplar, exemplar's label) of each input, paired by name."""
    if inputs.is_file():
        labels = [inputs]
    else:
        found = (path for path in list_files(inputs) if path.suffix.lower() in LABEL_SUFFIXES)
        labels = sorted(path for path in found if path.is_file())
    if not labels:
        raise InputError(f"{inputs}: no label files in this folder (looked for {', '.join(LABEL_SUFFIXES)})")
    triples = []
    for label in labels:
        relative = Path(label.name if inputs.is_file() else str(label.relative_to(inputs))).with_suffix("")
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
    text = read_text(pairs, _MAX_LIST_BYTES, "utf-8-sig")
    try:
        rows = list(enumerate(csv.reader(io.StringIO(text)), 1))
    except csv.Error as error:
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
    name = PurePath(str(exemplar.relative_to(exemplars)) if inside else exemplar.name)
    return _find(labels / name.with_suffix(""), LABEL_SUFFIXES)


def _named(folder: Path, name: str, suffixes: Iterable[str]) -> Path:
    """The file that a list means by `name`: as it stands, with POSIX separators, or with another suffix."""
    as_stands = folder / name
    if as_stands.is_file() and as_stands.suffix.lower() in suffixes:
        return as_stands
    path = folder / name.replace("\\", "/")
    return path if path.is_file() and path.suffix.lower() in suffixes else _find(path.with_suffix(""), suffixes, path)


def _find(path: Path, suffixes: Iterable[str], missing: Path | None = None) -> Path:
    """`path` with the first suffix that exists, in lower or upper case; else `missing`, by default with `_ANY`."""
    for suffix in suffixes:
        for spelling in (suffix, suffix.upper()):
            candidate = path.with_name(path.name + spelling)
            if candidate.is_file():
                return candidate
    return path.with_name(f"{path.name}{_ANY}") if missing is None else missing


def _check_outputs(jobs: list[Job], extras: Collection[str], pairs: Path | None) -> None:
    sources = {path.resolve() for job in jobs for path in (job.label, job.exemplar, job.exemplar_label, pairs) if path}
    seen: dict[Path, Path] = {}
    for job in jobs:
        for target in job.outputs(extras):
            resolved = target.resolve()
            if resolved in sources:
                raise InputError(f"output {target} would overwrite an input; choose another output")
            if resolved in seen:
                raise InputError(f"{seen[resolved]} and {job.label} would both be written to {target}; rename one")
            seen[resolved] = job.label
