"""Retrieval lists: for each picture of a folder, the most similar others, behind `flashcocos pairs`.

Source: the recipe of CoCosNet's author (github.com/microsoft/CoCosNet, issue 10): the features of VGG19 behind its last
pooling, the cosine similarity, the K most similar. The features of a trained model's image adaptor do as well.
Features are kept in a file beside the list, so an interrupted run goes on where it stopped, and a second one with more
pictures computes those alone.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..errors import InputError
from ..files import atomic_path, file_hash, open_database
from ..preprocess.images import PathLike, load_image
from .checkpoint import load_model
from .data.photos import find_photos
from .device import torch_device
from .networks.vgg_weights import VGG_FILES, load_vgg

_ROWS = 512  # pictures whose similarities to all others are held at once


@dataclasses.dataclass(frozen=True)
class Extractor:
    """Pictures (B, 3, side, side) in [-1, 1] on `device` to features (B, D); `name` is of network and weights."""

    name: str
    side: int
    features: Callable[[Tensor], Tensor]
    device: str = "cpu"


@dataclasses.dataclass(frozen=True)
class Summary:
    """What became of a folder: lines written, and (name, reason) of the pictures that were left out."""

    written: int
    failed: tuple[tuple[str, str], ...]


def write_pairs(
    folder: PathLike,
    output: PathLike,
    extractor: Extractor,
    *,
    exemplars: PathLike | None = None,
    count: int = 10,
    batch: int = 8,
) -> Summary:
    """Write a line `name,most similar,...,less similar` for each picture of a folder.

    Names are relative to their folders. Of two files of one name the JPEG is the picture. Features take 2 D bytes a
    picture in memory and on disk (49 KiB for VGG19). Pictures that cannot be read are left out and reported.

    Args:
        folder: pictures, searched through.
        output: the list to write; features are kept beside it.
        extractor: what pictures are compared by.
        exemplars: the folder to retrieve from, `folder` by default; a picture is never its own exemplar.
        count: exemplars a picture.
        batch: pictures that run together.

    Returns:
        What was written and what was left out.

    Raises:
        InputError: an option is out of range, a folder is missing, or fewer than two pictures are left.
    """
    if count < 1 or batch < 1:
        raise InputError(f"pairs: expected at least 1 exemplar and 1 picture a batch, got {count} and {batch}")
    failed: dict[str, str] = {}
    queries = _pictures(Path(folder), failed)
    keys = queries if exemplars is None else _pictures(Path(exemplars), failed)
    cache = Path(f"{output}.features.sqlite")
    paths, matrix = _features(extractor, sorted({*queries, *keys}), cache, batch, failed)
    shown, others = ([index for index, path in enumerate(paths) if path in part] for part in (queries, keys))
    if not shown or len(others) <= bool({*shown} & {*others}):
        raise InputError(f"{folder}: {len(shown)} readable pictures, and {len(others)} to retrieve; expected more")
    with (
        atomic_path(output) as temporary,
        temporary.open("w", encoding="utf-8") as file,
        tqdm(desc="retrieve", total=len(shown), unit="image", disable=None) as progress,
    ):
        for start in range(0, len(shown), _ROWS):
            part = shown[start : start + _ROWS]
            for index, best in zip(part, nearest(matrix, part, others, count, extractor.device), strict=True):
                names = [queries[paths[index]], *(keys[paths[other]] for other in best)]
                file.write(",".join(names) + "\n")
            progress.update(len(part))
    return Summary(len(shown), tuple(sorted(failed.items())))


def nearest(
    matrix: Tensor, rows: Sequence[int], others: Sequence[int], count: int, device: str = "cpu"
) -> list[list[int]]:
    """For each of `rows` of `matrix` (N, D), whose rows have length 1: the `count` best of `others`, in order.

    None is its own. All are numbers of rows of `matrix`.
    """
    queries, keys = matrix[rows].to(device).float(), torch.tensor(others)
    parts = torch.split(keys, 8 * _ROWS)
    similarity = torch.cat([queries @ matrix[part].to(device).float().T for part in parts], dim=1)
    similarity[torch.tensor(rows)[:, None].to(device) == keys.to(device)] = -torch.inf
    best = keys[similarity.topk(min(count + 1, len(others)), dim=1).indices.cpu()].tolist()
    return [[index for index in line if index != row][:count] for line, row in zip(best, rows, strict=True)]


def open_extractor(vgg: PathLike | None, model: PathLike | None, device: str = "auto") -> Extractor:
    """What pictures are compared by: one of two networks.

    Args:
        vgg: VGG19's weights: 512 x 7 x 7 features of a picture of 224 x 224.
        model: a model file: the features of its image adaptor, averaged to 8 x 8.
        device: "auto", "cpu" or "cuda".

    Raises:
        InputError: both or none of the networks are given, or its file is missing.
        CheckpointError: the file is damaged or of another network.
        BackendError: there is no such device.
    """
    if (vgg is None) == (model is None):
        raise InputError(
            f"pairs: give one network to compare pictures by: {VGG_FILES}; or a model file (--model PATH.safetensors)"
        )
    place = torch_device(device)
    if vgg is not None:
        network = load_vgg(vgg).to(place)
        return Extractor(
            f"vgg19-pool5-{file_hash(vgg)}",
            224,
            lambda pictures: F.max_pool2d(network(pictures, ["r54"])["r54"], 2).flatten(1),
            place,
        )
    assert model is not None  # one of the two is given
    trained = load_model(model).to(place)
    adaptor = trained.correspondence.image_adaptor
    return Extractor(
        f"adaptor-{file_hash(model)}",
        trained.config.image_size,
        lambda pictures: F.adaptive_avg_pool2d(adaptor(pictures), 8).flatten(1),
        place,
    )


def _pictures(folder: Path, failed: dict[str, str]) -> dict[Path, str]:
    """The pictures below `folder`: names by absolute path."""
    if not folder.is_dir():
        raise InputError(f"{folder}: not a folder")
    pictures = {}
    for files in find_photos(folder).values():
        photos = [file for file in files if file.suffix.lower() in (".jpg", ".jpeg")] or files
        name = photos[0].relative_to(folder).as_posix()
        if len(photos) > 1:
            failed[str(photos[0])] = f"several pictures of one name: {', '.join(file.name for file in photos)}"
        elif "," in name:
            failed[str(photos[0])] = "the name contains a comma, which separates the names of a list: rename it"
        else:
            pictures[Path(os.path.abspath(photos[0]))] = name
    return pictures


def _features(
    extractor: Extractor, pictures: list[Path], cache: Path, batch: int, failed: dict[str, str]
) -> tuple[list[Path], Tensor]:
    """The readable pictures and their features, float16 (N, D) of length 1, from the file `cache` as far as it goes."""
    with open_database(cache, "the features are computed again") as database:
        database.execute(
            "CREATE TABLE IF NOT EXISTS features "
            "(extractor TEXT, path TEXT, stamp TEXT, feature BLOB, PRIMARY KEY (extractor, path))"
        )
        stamps = {str(path): _stamp(path) for path in pictures}
        rows = database.execute("SELECT path, stamp, feature FROM features WHERE extractor = ?", (extractor.name,))
        known = {
            Path(path): np.frombuffer(feature, np.float16) for path, stamp, feature in rows if stamps.get(path) == stamp
        }
        missing = [path for path in pictures if path not in known]
        with tqdm(desc="features", total=len(missing), unit="image", disable=None) as progress:
            for start in range(0, len(missing), batch):
                part = missing[start : start + batch]
                loaded = {}
                for path in part:
                    try:
                        loaded[path] = load_image(path, (extractor.side, extractor.side))
                    except InputError as error:
                        failed[str(path)] = str(error)
                if loaded:
                    known.update(zip(loaded, _extract(extractor, list(loaded.values())), strict=True))
                    database.executemany(
                        "INSERT OR REPLACE INTO features VALUES (?, ?, ?, ?)",
                        [(extractor.name, str(path), stamps[str(path)], known[path].tobytes()) for path in loaded],
                    )
                    database.commit()
                progress.update(len(part))
    paths = sorted(known)
    return paths, torch.from_numpy(np.stack([known.pop(path) for path in paths]) if paths else np.zeros((0, 0)))


def _extract(extractor: Extractor, pictures: list[np.ndarray]) -> np.ndarray:
    with torch.inference_mode():
        features = extractor.features(torch.from_numpy(np.stack(pictures)).to(extractor.device))
        return F.normalize(features.float(), dim=1).half().cpu().numpy()


def _stamp(path: Path) -> str:
    """What changes when the file does; empty for a link to nowhere, which reading reports."""
    if not path.exists():
        return ""
    state = path.stat()
    return f"{state.st_size}-{state.st_mtime_ns}"
