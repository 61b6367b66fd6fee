"""flashcocos-avatars: the built-in paired data set, rendered on the user's machine and kept in a file.

A pair is (label, exemplar, exemplar label, target): target = structure s under look L, exemplar = structure s' under L,
so the target of the translation is exact. By share: retrieved pairs (another structure, mostly of the same style) and
pseudo pairs (the exemplar is the target, warped at random).
Coverage: a class that fills over 1 % of the target must fill over 0.4 % of the exemplar; else the exemplar is drawn
again, eight times at most, and then such classes get a fixed paint in both pictures.
Splits share no structure and no look, and training shows none of the held-out hair variants.
Every pair follows from split and index alone. Flat synthetic art: it says nothing of quality on photographs.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import random
import sqlite3
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ...errors import InputError
from ...files import cache_folder, open_database
from . import Item
from .avatars_draw import Structure, package_versions, random_structure, render_image, render_label
from .avatars_paint import CLASSES, DEFAULT_LOOK, Look, random_look
from .hand_drawn import interpolate

SPLITS = {"train": 20_000, "validation": 1_000, "test": 1_000}
FORMAT = 1  # raise it when a change of this code changes any pair
MAX_REDRAWS = 8
TARGET_SHARE, EXEMPLAR_SHARE = 0.01, 0.004
ACROSS_SHARE = 0.1  # of the retrieved pairs, those whose exemplar may be of another style
_SEED = 0  # another would be another data set
_COVERED = np.array([name != "trim" for name in CLASSES])  # the trim keeps the artist's colors under every look
_REMEDY = "the pairs are rendered again"
_CHUNK = 64  # pairs per work unit and per transaction


@dataclasses.dataclass(frozen=True)
class AvatarOptions:
    """What decides the pairs beside split and index.

    Attributes:
        size: side in pixels, 8 to 4096.
        retrieved_share: of the pairs; the others are pseudo pairs.
    """

    size: int
    retrieved_share: float


@dataclasses.dataclass(frozen=True)
class Pair:
    """One rendered pair, all uint8: labels (H, W), pictures (H, W, 3). pseudo: the exemplar is the target, warped."""

    pseudo: bool
    label: np.ndarray
    target: np.ndarray
    exemplar_label: np.ndarray
    exemplar: np.ndarray


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a pair shows, before it is drawn. `partner` is the exemplar's structure, None for a pseudo pair."""

    structure: Structure
    look: Look
    partner: Structure | None


def choose_pair(split: str, index: int, options: AvatarOptions) -> Recipe:
    """The structures and the look of one pair; draws labels, as the coverage rule needs them.

    Raises `BackendError` without the extra `avatars`.
    """
    key = f"{_SEED}/{split}/{index}"
    held_out = None if split == "test" else False
    structure = random_structure(f"{key}/structure", held_out=held_out)
    look = random_look(f"{key}/look")
    rng = random.Random(f"{key}/kind")
    kind_draw, across_draw = rng.random(), rng.random()
    if kind_draw >= options.retrieved_share:
        return Recipe(structure, look, None)
    style = None if across_draw < ACROSS_SHARE else structure.style
    label = render_label(structure, options.size)
    best, missing = None, np.ones(len(CLASSES), dtype=bool)
    for draw in range(1 + MAX_REDRAWS):
        candidate = random_structure(f"{key}/partner {draw}", style=style, held_out=held_out)
        lacking = uncovered(label, render_label(candidate, options.size))
        if best is None or lacking.sum() < missing.sum():
            best, missing = candidate, lacking
        if not missing.any():
            break
    for place in np.flatnonzero(missing):
        look = look.replace(CLASSES[place], DEFAULT_LOOK.paints[place])
    return Recipe(structure, look, best)


def uncovered(label: np.ndarray, exemplar_label: np.ndarray) -> np.ndarray:
    """Which classes of `label` the exemplar shows too little of to copy their paint; bool (12,)."""
    wanted = np.bincount(label.ravel(), minlength=len(CLASSES)) > TARGET_SHARE * label.size
    shown = np.bincount(exemplar_label.ravel(), minlength=len(CLASSES)) > EXEMPLAR_SHARE * exemplar_label.size
    lacking: np.ndarray = wanted & ~shown & _COVERED
    return lacking


def render_pair(split: str, index: int, options: AvatarOptions) -> Pair:
    """Draw one pair; same arguments and package versions, same bytes."""
    recipe, size = choose_pair(split, index, options), options.size
    label = render_label(recipe.structure, size)
    target = render_image(recipe.structure, recipe.look, size)
    if recipe.partner is None:
        flow = random_flow(f"{_SEED}/{split}/{index}/flow", size)
        return Pair(True, label, target, warp_nearest(label, flow), warp_bilinear(target, flow))
    exemplar = render_image(recipe.partner, recipe.look, size)
    return Pair(False, label, target, render_label(recipe.partner, size), exemplar)


def random_flow(key: str, size: int) -> np.ndarray:
    """A smooth random warp: source position (y, x) in pixels of every output pixel, float32 (2, size, size)."""
    rng = random.Random(key)
    knots = 5
    bends = np.array([rng.uniform(-0.06, 0.06) for _ in range(2 * knots * knots)]).reshape(2, knots, knots)
    zoom, turn = rng.uniform(0.85, 1.15), rng.uniform(-0.25, 0.25)
    shift_y, shift_x = rng.uniform(-0.08, 0.08), rng.uniform(-0.08, 0.08)
    mirror = -1 if rng.random() < 0.5 else 1
    y, x = np.mgrid[:size, :size] / max(size - 1, 1) - 0.5
    cos, sin = np.cos(turn) * zoom, np.sin(turn) * zoom
    flow = np.stack([cos * y + sin * x * mirror + shift_y, cos * x * mirror - sin * y + shift_x])
    flow += interpolate(bends, size, size)
    pixels: np.ndarray = ((flow + 0.5) * (size - 1)).clip(0, size - 1).astype(np.float32)
    return pixels


def warp_nearest(label: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """The label (H, W) seen through `flow`."""
    y, x = np.rint(flow).astype(int)
    warped: np.ndarray = label[y, x]
    return warped


def warp_bilinear(image: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """The picture (H, W, 3) uint8 seen through `flow`."""
    y, x = np.minimum(flow.astype(int), np.array(image.shape[:2])[:, None, None] - 2)
    part_y, part_x = (flow - (y, x))[..., None]
    top = image[y, x] * (1 - part_x) + image[y, x + 1] * part_x
    bottom = image[y + 1, x] * (1 - part_x) + image[y + 1, x + 1] * part_x
    warped: np.ndarray = np.rint(top * (1 - part_y) + bottom * part_y).astype(np.uint8)
    return warped


def prepare_pairs(
    split: str,
    options: AvatarOptions,
    *,
    count: int | None = None,
    folder: str | os.PathLike[str] | None = None,
    workers: int | None = None,
) -> Path:
    """Render the first pairs of a split, those that are missing. An interrupted run keeps what it has done.

    Args:
        split: "train", "validation" or "test".
        options: what decides the pairs.
        count: number of pairs; all by default.
        folder: where the file is kept; `files.cache_folder()` by default.
        workers: processes that render; one per CPU by default.

    Returns:
        The SQLite file, named after everything that decides the pairs, package versions included.

    Raises:
        InputError: the file is damaged, or the split or the count does not exist.
        BackendError: a package of the extra `avatars` is missing.
    """
    if split not in SPLITS:
        raise InputError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    count = SPLITS[split] if count is None else count
    if not 1 <= count <= SPLITS[split]:
        raise InputError(f"count: {split} has 1 to {SPLITS[split]} pairs, got {count}")
    # by names and numbers under which pairs are kept already
    shares = {"retrieved": options.retrieved_share, "pseudo": round(1 - options.retrieved_share, 6)}
    identity = {"format": FORMAT, "split": split, "size": options.size, "seed": _SEED, "across": ACROSS_SHARE, **shares}
    identity |= package_versions()
    text = json.dumps(identity, sort_keys=True)
    name = f"avatars-{split}-{options.size}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.sqlite"
    path = Path(cache_folder() if folder is None else folder) / name
    with open_database(path, _REMEDY) as database:
        database.execute("CREATE TABLE IF NOT EXISTS pairs (number INTEGER PRIMARY KEY, pair BLOB NOT NULL)")
        present = {row[0] for row in database.execute("SELECT number FROM pairs WHERE number < ?", (count,))}
        missing = [index for index in range(count) if index not in present]
        chunks = [missing[start : start + _CHUNK] for start in range(0, len(missing), _CHUNK)]
        with tqdm(desc=f"render avatars ({split})", total=len(missing), unit="pair", disable=None) as progress:
            for indices, blobs in _render_chunks(split, chunks, options, workers or os.cpu_count() or 1):
                database.executemany("INSERT OR REPLACE INTO pairs VALUES (?, ?)", zip(indices, blobs, strict=True))
                database.commit()
                progress.update(len(indices))
    return path


class AvatarPairs:
    """The pairs of a split as a map-style data set, its items as the package says.

    Renders what is missing on construction, as `prepare_pairs` does and with its arguments and errors.
    """

    def __init__(
        self,
        split: str,
        options: AvatarOptions,
        *,
        count: int | None = None,
        folder: str | os.PathLike[str] | None = None,
        workers: int | None = None,
    ) -> None:
        self.options = options
        self.path = prepare_pairs(split, self.options, count=count, folder=folder, workers=workers)
        self._count = SPLITS[split] if count is None else count
        self._reader: tuple[int, sqlite3.Connection] | None = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Item:
        pair = self.pair(index)
        return {
            "label": pair.label.copy(),  # writable, as torch wants it
            "exemplar": _to_float(pair.exemplar),
            "exemplar_label": pair.exemplar_label.copy(),
            "image": _to_float(pair.target),
            "self_reference": np.float32(pair.pseudo),
            "has_target": True,
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}

    def set_epoch(self, epoch: int) -> None:
        """Nothing to do: the pairs are the same in every epoch."""

    def pair(self, index: int) -> Pair:
        """Pair number `index` as uint8 arrays; `IndexError` outside the data set, `InputError` for a damaged file."""
        if not 0 <= index < self._count:
            raise IndexError(f"pair {index} of {self._count}")
        # a connection must not cross a fork, and data loaders fork
        if self._reader is None or self._reader[0] != os.getpid():
            self._reader = (os.getpid(), sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=ro", uri=True))
        try:
            row = self._reader[1].execute("SELECT pair FROM pairs WHERE number = ?", (index,)).fetchone()
            if row is None:
                raise _damaged(self.path, f"pair {index} is missing")
            return _unpack(row[0], self.options.size)
        except (sqlite3.DatabaseError, zlib.error) as error:
            raise _damaged(self.path, str(error)) from error


def _pack(pair: Pair) -> bytes:
    arrays = (pair.label, pair.target, pair.exemplar_label, pair.exemplar)
    return zlib.compress(bytes([pair.pseudo]) + b"".join(array.tobytes() for array in arrays), 1)


def _unpack(blob: bytes, size: int) -> Pair:
    data = np.frombuffer(zlib.decompress(blob), dtype=np.uint8)
    label, target, exemplar_label, exemplar = np.split(data[1:], np.cumsum([1, 3, 1]) * size * size)
    plane, picture = (size, size), (size, size, 3)
    return Pair(
        bool(data[0]),
        label.reshape(plane),
        target.reshape(picture),
        exemplar_label.reshape(plane),
        exemplar.reshape(picture),
    )


def _to_float(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32) / 127.5 - 1


def _render_chunk(split: str, indices: list[int], options: AvatarOptions) -> list[bytes]:
    return [_pack(render_pair(split, index, options)) for index in indices]


def _render_chunks(
    split: str, chunks: list[list[int]], options: AvatarOptions, workers: int
) -> Iterator[tuple[list[int], list[bytes]]]:
    if min(workers, len(chunks)) <= 1:
        for indices in chunks:
            yield indices, _render_chunk(split, indices, options)
        return
    # spawn: a fork of a process whose libraries run threads can hang
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            futures = {pool.submit(_render_chunk, split, indices, options): indices for indices in chunks}
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(f"{path} is damaged ({reason}): delete it, and {_REMEDY}")
