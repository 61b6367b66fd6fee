"""Photographs with labels and exemplars: the four published data sets, and a folder of the user's own.

A retrieval list says which exemplars suit a photograph: lines of `name,easy,...,hard`, as the published `*_ref.txt` are
and `flashcocos pairs` writes them. Training draws the hard exemplar, the easy one, or the photograph itself; a test
takes the easy one. Source of the shares, sizes and flips: the options that the published networks were trained with
(arXiv 2004.05571, section 4, and its public README).

    published  the layouts of `preprocess.layouts`, whose raw label files are prepared as they are read;
               ade20k: exemplars come from `training/`, for the samples of `validation/` too
               celebahq, celebahqedge, deepfashion: `train.txt` and `val.txt` name the samples
    own        images/NAME.<any> with labels/NAME.png or .npz, as `flashcocos prepare` writes them
"""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...config import ModelConfig
from ...errors import InputError
from ...preprocess.images import SUFFIXES, PathLike, load_image
from ...preprocess.labels import load_label
from ...preprocess.layouts import ROLES, find_layout, read_list
from ...preprocess.prepare import load_raw
from ...remote import list_files
from . import Item

if TYPE_CHECKING:
    from ..settings import DataSettings

_LISTS = {"train": "train.txt", "test": "val.txt"}
_FOLDERS = {"ade20k": {"train": "training", "test": "validation"}}


class PhotoPairs:
    """A data set of photographs, its items as the package says: `image` is the photograph that the label belongs to.

    In training pictures are resized to `load_size` and a square of the model's size is cut out; a test has that size
    and nothing random.

    Args:
        config: of the model, for its task, its size and the form of its labels.
        data: `root` is the folder, in a layout of the module, and `pairs` the retrieval list. `samples` names the
            photographs to show, by default `train.txt` or `val.txt` where the folder has it, else every line of
            `pairs`. `same` has lines of `name,another,...`, photographs of one person, as the published
            `deepfashion_self_pair.txt`: the first is shown where the photograph itself would be, and counts as it
            (`self_reference`, `has_target`). `labels` is a folder of prepared labels, named as `flashcocos prepare`
            names them; by default raw label files are prepared for the published tasks, and `labels/` is read for
            others.
        split: "train" or "test".
        seed: of what is drawn in training.

    Names in lists may have Windows separators, and need no suffix. Raises `InputError` naming the list and the
    photograph or line that is missing; label files are looked for when they are read.
    """

    def __init__(self, config: ModelConfig, data: DataSettings, *, split: str = "train", seed: int = 0) -> None:
        self.config, self.data, self.seed, self._training = config, data, seed, split == "train"
        self._load_size = data.load_size or round(config.image_size * 286 / 256)
        if self._training and data.hard_share > data.retrieved_share:
            raise InputError(
                f"photo pairs: expected hard_share <= retrieved_share, got {data.hard_share} and {data.retrieved_share}"
            )
        if self._training and self._load_size < config.image_size:
            raise InputError(f"photo pairs: expected load_size >= {config.image_size}, got {self._load_size}")
        root = Path(data.root)
        if not root.is_dir():
            raise InputError(f"{root}: not a folder")
        published = config.task in ROLES
        if published:
            self._base = find_layout(config.task, root).images
        else:
            self._base = root / "images" if (root / "images").is_dir() else root
        self._labels = Path(data.labels) if data.labels else None if published else root / "labels"
        # a raw label may lie beside its photograph, and then the photograph is the JPEG
        suffixes = (".jpg", ".jpeg") if published else SUFFIXES
        photos = find_photos(self._base / self._part(split), suffixes)
        exemplars = find_photos(self._base / self._part("train"), suffixes)
        retrieval = _Names(data.pairs, exemplars, self._base.name)
        listed = root / _LISTS[split]
        wanted = _Names(data.samples or (listed if listed.is_file() else data.pairs), photos, self._base.name)
        together = _Names(data.same, exemplars, self._base.name)
        if not wanted.lines:
            raise InputError(f"{wanted.path or root}: names no samples; give a list of `name,exemplar,...` as `pairs`")
        self._samples: list[_Sample] = []
        for name in sorted(wanted.lines):
            photo = wanted.photo(name)
            retrieved = retrieval.line(name) if data.retrieved_share or not self._training else []
            itself = together.line(name)[0] if name in together.lines else photo
            self._samples.append(_Sample(photo, itself, retrieved))
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._samples)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that exemplars, crops and flips follow from."""
        self._epoch = epoch

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self._samples):
            raise IndexError(f"item {index} of {len(self._samples)}")
        sample = self._samples[index]
        rng = random.Random(f"{self.seed}/{self._epoch}/{index}")
        exemplar = self._choose(sample, rng)
        itself = exemplar in (sample.photo, sample.itself)
        label, image = self._load(sample.photo, rng)
        exemplar_label, exemplar_image = self._load(exemplar, rng)
        return {
            "label": label,
            "exemplar_label": exemplar_label,
            "image": image,
            "exemplar": exemplar_image,
            "self_reference": np.float32(itself),
            "has_target": itself,
        }

    def _part(self, split: str) -> str:
        """The folder below that of all photographs where those of a split lie."""
        part = _FOLDERS.get(self.config.task, {}).get(split, "")
        return part if (self._base / part).is_dir() else ""

    def _choose(self, sample: _Sample, rng: random.Random) -> Path:
        if not self._training:
            return sample.retrieved[0]
        draw = rng.random()
        if draw < self.data.hard_share:
            return sample.retrieved[-1]
        return sample.retrieved[0] if draw < self.data.retrieved_share else sample.itself

    def _load(self, photo: Path, rng: random.Random) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32]]:
        """Label and picture of one file, cut and mirrored alike."""
        size = self.config.image_size
        side = self._load_size if self._training else size
        image, label = load_image(photo, (side, side)), self._label(photo, side)
        if self._training:
            top, left = rng.randint(0, side - size), rng.randint(0, side - size)
            step = -1 if self.data.flip and rng.random() < 0.5 else 1
            label, image = (x[..., top : top + size, left : left + size][..., ::step] for x in (label, image))
        return np.ascontiguousarray(label), np.ascontiguousarray(image)

    def _label(self, photo: Path, side: int) -> npt.NDArray[Any]:
        if self._labels is None:
            label = load_raw(self.config.task, photo, (side, side))
            return label if label.ndim == 2 else label.astype(np.float32) / 255
        file = (self._labels / photo.relative_to(self._base)).with_suffix(
            ".png" if self.config.label_kind == "classes" else ".npz"
        )
        if not file.is_file():
            raise InputError(f"{photo}: lacks its label {file}; `flashcocos prepare` writes it")
        return load_label(self.config, file, (side, side))


@dataclasses.dataclass(frozen=True)
class _Sample:
    """A photograph, what stands for it as its own exemplar, and its easy and its hard exemplar."""

    photo: Path
    itself: Path
    retrieved: list[Path]


class _Names:
    """The lines of a list by their first name, and the photographs that names mean."""

    def __init__(self, path: PathLike, photos: dict[str, list[Path]], folder: str) -> None:
        self.path, self.photos = path, photos
        listed = read_list(path) if path else []
        keys = [[key_of(name, folder) for name in line] for line in listed]
        self.lines: dict[str, list[str]] = {first: rest for first, *rest in keys}

    def line(self, name: str) -> list[Path]:
        """The first and the last photograph that follow `name`."""
        if not self.lines.get(name):
            raise InputError(f"{self.path or 'no retrieval list'}: no line with an exemplar for {name}")
        others = self.lines[name]
        return [self.photo(other) for other in (others[0], others[-1])]

    def photo(self, name: str) -> Path:
        """The photograph `name`."""
        files = self.photos.get(name, [])
        if len(files) != 1:
            reason = f"several photographs have that name: {', '.join(map(str, files))}" if files else "not found"
            raise InputError(f"{name}, listed in {self.path}: {reason}")
        return files[0]


def find_photos(folder: Path, suffixes: tuple[str, ...] = SUFFIXES) -> dict[str, list[Path]]:
    """The pictures below `folder` by key: path below it, without suffix, with forward slashes; sorted."""
    photos: dict[str, list[Path]] = {}
    for file in sorted(list_files(folder)):
        if file.suffix.lower() in suffixes:
            photos.setdefault(file.relative_to(folder).with_suffix("").as_posix(), []).append(file)
    return {key: photos[key] for key in sorted(photos)}


def key_of(name: str, folder: str) -> str:
    """The key that `name` of a list means: without its suffix, and without the name of the folder of photographs."""
    path = PurePosixPath(name)
    if path.suffix.lower() in SUFFIXES:
        path = path.with_suffix("")
    if len(path.parts) > 1 and path.parts[0] == folder:
        path = path.relative_to(folder)
    return path.as_posix()
