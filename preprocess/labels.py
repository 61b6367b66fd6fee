"""Prepared labels: what `flashcocos prepare` writes and everything else reads.

Two forms, by `ModelConfig.label_kind`: a map of class ids (H, W), stored as an 8-bit gray or palette PNG, or label
planes (channels, H, W) in [0, 1], stored as value * 255 in the uint8 array `label` of an .npz file. Resizing is
NEAREST, so no value appears that was not there. Files are never unpickled, and their sizes are checked before
anything is allocated.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from ..config import ModelConfig
from ..errors import InputError
from ..files import atomic_path, require_file
from ..remote import is_path
from .images import (
    MAX_PIXELS,
    FloatArray,
    PathLike,
    UInt8Array,
    check_extent,
    check_size,
    open_image,
    readable,
    reading,
)

LabelSource: TypeAlias = "str | os.PathLike[str] | Image.Image | npt.NDArray[Any]"
_PLANES_MEMBER = "label.npy"


def load_label(
    config: ModelConfig, source: LabelSource, size: tuple[int, int] | None = None
) -> UInt8Array | FloatArray:
    """A prepared label.

    Args:
        config: of the network that the label is for.
        source: a path; for "classes" also a Pillow image of mode L or P or an integer array (H, W); for "channels" an
            array (label_channels, H, W), uint8 (value * 255) or float in [0, 1].
        size: (height, width) to resize to, NEAREST; without it the label keeps its own size.

    Returns:
        Class ids uint8 (H, W), or float32 planes (label_channels, H, W) in [0, 1].

    Raises:
        InputError: a wrong mode, shape or dtype, ids or values out of range, and unreadable files.
    """
    check_size(size)
    if config.label_kind == "classes":
        ids = read_ids(source)
        check_ids(ids, config.label_channels, source_name(source))
        return resize_nearest(ids, size)
    planes = _read_planes(source)
    if planes.shape[0] != config.label_channels:
        raise InputError(
            f"{source_name(source)}: {planes.shape[0]} label planes; task {config.task} expects {config.label_channels}"
        )
    scale = np.float32(255 if planes.dtype == np.uint8 else 1)
    return resize_nearest(planes, size).astype(np.float32) / scale


def save_label(path: PathLike, label: UInt8Array) -> None:
    """Write a prepared label, whole or not at all.

    Args:
        path: .png for ids, .npz for planes.
        label: uint8 ids (H, W), or planes (channels, H, W) of value * 255.

    Raises:
        InputError: for another shape or dtype.
    """
    if label.dtype != np.uint8 or label.ndim not in (2, 3):
        raise InputError(f"label: expected uint8 (H, W) or (channels, H, W), got {label.dtype} {label.shape}")
    with atomic_path(path) as temporary:
        if label.ndim == 2:
            Image.fromarray(np.ascontiguousarray(label)).save(temporary, format="PNG")
        else:
            np.savez_compressed(temporary, label=label)


def read_ids(source: LabelSource) -> UInt8Array:
    """Class ids (H, W) as stored, of any value 0 to 255; sources and errors as for `load_label`."""
    name = source_name(source)
    if isinstance(source, np.ndarray):
        if source.ndim != 2 or source.dtype.kind not in "ui":
            raise InputError(f"{name}: expected an integer array (height, width), got {source.dtype} {source.shape}")
        check_extent(source.shape[0], source.shape[1], name)
        if source.min() < 0 or source.max() > 255:
            raise InputError(f"{name}: class ids {source.min()} to {source.max()}; expected 0 to 255")
        return source.astype(np.uint8)
    if isinstance(source, Image.Image):
        image = source
    elif is_path(source):
        image = open_image(source)
    else:
        raise InputError(f"{name}: expected a path, a Pillow image or an array, got {type(source).__name__}")
    check_extent(image.height, image.width, name)
    if image.mode not in ("L", "P"):
        raise InputError(
            f"{name}: image mode {image.mode!r}; expected class ids in an 8-bit gray (L) or palette (P) PNG; "
            "for task avatars, `flashcocos prepare avatars DRAWINGS -o labels/` makes them of drawings in the palette"
        )
    if image.format == "JPEG":
        raise InputError(f"{name}: JPEG alters class ids; expected a PNG")
    with reading(name):
        return np.asarray(ImageOps.exif_transpose(image), np.uint8)


def check_ids(ids: UInt8Array, classes: int, name: str) -> None:
    """Raise `InputError` naming the first id that is not below `classes`, and how many pixels are out of range."""
    wrong = ids >= classes
    if wrong.any():
        y, x = np.argwhere(wrong)[0]
        raise InputError(
            f"{name}: class id {ids[y, x]} at row {y}, column {x} ({int(wrong.sum())} pixels out of range); "
            f"expected 0 to {classes - 1}: was this label prepared for another task?"
        )


def resize_nearest(planes: npt.NDArray[Any], size: tuple[int, int] | None) -> npt.NDArray[Any]:
    """`planes` (..., H, W), uint8 or float32, resized to (height, width) as Pillow's NEAREST does."""
    if size is None or planes.shape[-2:] == tuple(size):
        return planes
    flat = planes.reshape(-1, *planes.shape[-2:])
    resized = [Image.fromarray(plane).resize((size[1], size[0]), Image.Resampling.NEAREST) for plane in flat]
    return np.stack([np.asarray(plane) for plane in resized]).reshape(*planes.shape[:-2], *size)


def source_name(source: object) -> str:
    """How messages name a source: its path, or "label" for what has none."""
    return str(source) if is_path(source) else "label"


def _read_planes(source: LabelSource) -> npt.NDArray[Any]:
    """Planes (channels, H, W) as uint8 or float32, each value checked."""
    name = source_name(source)
    if is_path(source):
        require_file(source)
        return read_npz(readable(source), str(source))
    if not isinstance(source, np.ndarray) or source.ndim != 3:
        what = source.shape if isinstance(source, np.ndarray) else type(source).__name__
        raise InputError(f"{name}: expected an .npz path or an array (channels, height, width), got {what}")
    check_extent(source.shape[1], source.shape[2], name)
    if source.dtype == np.uint8:
        return np.ascontiguousarray(source)
    if source.dtype.kind != "f":
        raise InputError(f"{name}: expected planes of uint8 or float, got {source.dtype}")
    if source.size and not (source.min() >= 0 and source.max() <= 1):  # also catches NaN
        raise InputError(f"{name}: values {source.min()} to {source.max()}; expected 0 to 1 (uint8 planes: 0 to 255)")
    return np.ascontiguousarray(source, np.float32)


def read_npz(file: Path | BinaryIO, name: str, max_bytes: int = 4 * MAX_PIXELS) -> UInt8Array:
    """The planes of a label file.

    Args:
        file: an .npz, as `save_label` writes it.
        name: of the file, in messages.
        max_bytes: of the planes; a file that states more is refused before they are read.

    Returns:
        uint8 (channels, H, W).

    Raises:
        InputError: the file is damaged, too large, or has other content.
    """
    try:
        with zipfile.ZipFile(file) as archive, archive.open(_PLANES_MEMBER) as member:
            if archive.getinfo(_PLANES_MEMBER).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise InputError(f"{name}: label is neither stored nor deflated; run `flashcocos prepare`")
            if np.lib.format.read_magic(member) != (1, 0):
                raise InputError(f"{name}: unknown .npy version in {_PLANES_MEMBER}; run `flashcocos prepare` again")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
            if dtype != np.uint8 or len(shape) != 3 or fortran:
                raise InputError(f"{name}: label is {dtype} {shape}; expected uint8 (channels, height, width)")
            check_extent(shape[1], shape[2], name)
            count = shape[0] * shape[1] * shape[2]
            if not 0 < shape[0] <= 255 or count > max_bytes:
                raise InputError(f"{name}: label is {shape}; expected 1 to 255 planes and at most {max_bytes} bytes")
            data = member.read(count)
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"{name}: no array named 'label' in this .npz; run `flashcocos prepare`") from error
    except (OSError, ValueError, EOFError, RuntimeError, struct.error, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{name}: not a readable label .npz: {error}; run `flashcocos prepare`") from error
    if len(data) != count:
        raise InputError(f"{name}: label is cut short: {len(data)} of {count} bytes; run `flashcocos prepare` again")
    return np.frombuffer(data, np.uint8).reshape(shape)
