"""Where the raw files of a data set lie: the published layouts of the four tasks, and two plain ones of a user's own.

A sample is named by its key: the photograph's path below its folder, without suffix, with forward slashes.

    published  ade20k        images/K.jpg with annotations/K.png, or K.jpg and K.png side by side
               celebahq      CelebA-HQ-img/N.jpg, CelebAMask-HQ-mask-anno/all_parts_except_glasses/NNNNN.png,
                             CelebAMask-HQ-mask-anno/<N // 2000>/NNNNN_eye_g.png where there are glasses
               celebahqedge  CelebA-HQ-img/N.jpg, CelebAMask-HQ-mask-anno/<N // 2000>/NNNNN_<part>.png
               deepfashion   img/K.jpg, pose/K_candidate.txt, pose/K_subset.txt
    plain      images/K.<any> with labels/K<suffix>, or both side by side; the suffixes are those of `ROLES`
"""

from __future__ import annotations

import dataclasses
from pathlib import Path, PurePosixPath

from ..errors import InputError
from ..files import read_text
from ..remote import list_files, store_errors, to_path
from .edges import PARTS
from .images import SUFFIXES, PathLike

# role -> how the name of its file ends
ROLES: dict[str, dict[str, str]] = {
    "avatars": {"label": ".png"},
    "ade20k": {"label": ".png"},
    "celebahq": {"label": ".png", "glasses": "_eye_g.png"},
    "celebahqedge": {part: f"_{part}.png" for part in PARTS},
    "deepfashion": {"candidate": "_candidate.txt", "subset": "_subset.txt"},
}
_IMAGE_FOLDERS = ("CelebA-HQ-img", "img", "images")
_MERGED = "all_parts_except_glasses"
MAX_LIST_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Sample:
    """One photograph (None where there is none) and the raw label files found for it, by role."""

    task: str
    key: str
    images: tuple[Path, ...]
    files: dict[str, Path]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The folders of a data set; `numbered` is CelebAMask-HQ's way of naming label files."""

    task: str
    images: Path
    labels: Path
    numbered: bool = False

    def __post_init__(self) -> None:
        if self.task not in ROLES:
            raise InputError(f"task {self.task!r} has no raw data to prepare; expected one of {', '.join(ROLES)}")

    def key(self, file: Path, root: Path, suffix: str) -> str:
        """The key of a photograph or label `file` below `root`, its name less `suffix`."""
        stem = file.name[: -len(suffix)]
        if self.numbered:
            return str(int(stem)) if stem.isascii() and stem.isdecimal() else stem
        return (PurePosixPath(file.parent.relative_to(root).as_posix()) / stem).as_posix()

    def label_file(self, key: str, role: str) -> Path:
        """Where the label file of `role` belongs for the sample `key`."""
        suffix = ROLES[self.task][role]
        if not (self.numbered and key.isdecimal()):
            return self.labels / f"{key}{suffix}"
        folder = _MERGED if role == "label" else str(int(key) // 2000)
        return self.labels / folder / f"{int(key):05}{suffix}"

    def sample(self, key: str, images: tuple[Path, ...]) -> Sample:
        """The sample `key` with those of its label files that exist."""
        expected = {role: self.label_file(key, role) for role in ROLES[self.task]}
        return Sample(self.task, key, images, {role: file for role, file in expected.items() if file.is_file()})

    def samples(self) -> list[Sample]:
        """Every sample that has a photograph or a label file, sorted by key."""
        suffixes = sorted(ROLES[self.task].values(), key=len, reverse=True)
        images: dict[str, list[Path]] = {}
        for file in list_files(self.labels):
            suffix = next((suffix for suffix in suffixes if file.name.endswith(suffix)), None)
            if suffix is not None:
                key = self.key(file, self.labels, suffix)
                if not self.numbered or key.isdecimal():
                    images.setdefault(key, [])
        for file in list_files(self.images):
            beside_labels = self.images == self.labels and file.name.endswith(tuple(suffixes))
            if file.suffix.lower() in SUFFIXES and not beside_labels:
                images.setdefault(self.key(file, self.images, file.suffix), []).append(file)
        return [self.sample(key, tuple(sorted(images[key]))) for key in sorted(images)]


def find_layout(task: str, folder: PathLike) -> Layout:
    """The layout of the data set in `folder`; `InputError` for an unknown task or a missing folder."""
    root = to_path(folder)
    with store_errors(root, root):
        numbered = Layout(task, root / "CelebA-HQ-img", root / "CelebAMask-HQ-mask-anno", numbered=True)
        if not root.is_dir():
            raise InputError(f"{root}: not a folder")
        if task.startswith("celebahq") and (numbered.images.is_dir() or numbered.labels.is_dir()):
            return numbered
        if task == "deepfashion" and (root / "pose").is_dir():
            return Layout(task, root / "img", root / "pose")
        for labels in ("labels", "annotations"):
            if (root / labels).is_dir():
                return Layout(task, root / "images", root / labels)
        return Layout(task, root, root)


def find_sample(task: str, image: PathLike) -> Sample:
    """The sample of one photograph, with the label files that the layout it lies in has for it."""
    image = to_path(image)
    for parent in image.parents:
        if parent.name in _IMAGE_FOLDERS:
            layout = find_layout(task, parent.parent)
            if layout.images == parent:
                break
    else:
        layout = Layout(task, image.parent, image.parent)
    return layout.sample(layout.key(image, layout.images, image.suffix), (image,))


def read_list(path: PathLike) -> list[tuple[str, ...]]:
    """The lines of a list file as tuples of names: comma separated, Windows or POSIX paths, blank lines left out.

    Names come back with forward slashes. Raises `InputError` for an unreadable or absurdly large file.
    """
    text = read_text(path, MAX_LIST_BYTES, "utf-8-sig")  # Windows editors add a byte order mark
    lines = ([name.strip().replace("\\", "/") for name in line.split(",")] for line in text.splitlines())
    return [tuple(filter(None, names)) for names in lines if any(names)]


def select(samples: list[Sample], names: list[str]) -> tuple[list[Sample], list[str]]:
    """Those of `samples` that `names` mean, and the names that mean none.

    A name means every sample whose key it ends with, or that ends with it, whole path components compared and the
    suffix of a picture ignored; leading zeros of a number do not count.
    """
    by_last: dict[str, list[Sample]] = {}
    for sample in samples:
        by_last.setdefault(_plain(sample.key)[-1], []).append(sample)
    chosen: dict[str, Sample] = {}
    unknown = []
    for name in names:
        path = PurePosixPath(name)
        parts = _plain(str(path.with_suffix("")) if path.suffix.lower() in SUFFIXES else name)
        found = False
        for sample in by_last.get(parts[-1], []):
            key = _plain(sample.key)
            shared = min(len(key), len(parts))
            if key[-shared:] == parts[-shared:]:
                chosen[sample.key] = sample
                found = True
        if not found:
            unknown.append(name)
    return [chosen[key] for key in sorted(chosen)], unknown


def _plain(path: str) -> tuple[str, ...]:
    *folders, last = PurePosixPath(path).parts or ("",)
    return (*folders, last.lstrip("0") or "0" if last.isdecimal() else last)
