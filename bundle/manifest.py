"""Model bundles: one folder or one zip file holding `manifest.json` and the files it lists.

A bundle may come from anyone, so nothing in it is trusted: the manifest is validated field by field, only files that it
lists are read, by plain names without folders, no more bytes than it states, and only with the stated SHA-256.
Nothing is ever extracted to disk.

Stages of a translation, each an ONNX graph with dynamic batch, height and width (label_map = uint8 class ids
`(batch, height, width)` for "classes", float32 planes `(batch, label_channels, height, width)` for "channels"):

    query      label                        -> theta (batch, C, h, w) float32, h = height / warp_stride
    exemplar   image (+ label if mixing)    -> phi (batch, C, h, w), values (batch, V, h, w) float32
    coarse     warped (batch, V, h, w), label -> features (batch, F, height / 2, width / 2) float32
    fine       features, warped, label       -> image, warped_image (batch, 3, height, width) in [-1, 1]

The warp itself, theta x phi x values -> warped, runs after the first two in `flashcocos.kernels`. The last two are the
synthesis; with `warp_residual` they pass means (batch, label_channels, 3) on as well. The fine one looks less than
`TILE_OVERLAP` pixels around each, so it runs on a whole picture or on overlapping tiles of it, with one result.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from ..config import ModelConfig, from_fields
from ..errors import BundleError, InputError
from ..files import atomic_path

FORMAT = "flashcocos-bundle"
FORMAT_VERSION = 4
MANIFEST = "manifest.json"
STAGES = ("query", "exemplar", "coarse", "fine")
# in which the weights are stored, "int8" those of the generator; graphs take and give float32
PRECISIONS = ("float32", "float16", "int8")
MAX_MANIFEST_BYTES = 1 << 20
MAX_FILE_BYTES = 2 << 30  # protobuf's own limit for an ONNX file
MAX_BUNDLE_BYTES = 4 << 30  # of all files; the largest published network takes 0.6 GB
_MAX_RATIO = 100  # of a zip's content to its size; weights shrink little, a megabyte of zeros to a kilobyte
# what zipfile raises on damaged archives, entries and names; it names no list
_DAMAGE = (
    OSError, EOFError, NotImplementedError, RuntimeError, ValueError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_Byte = Annotated[int, msgspec.Meta(ge=0, le=255)]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One input or output of a stage: its name, numpy dtype name, and shape with named dynamic axes."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class StageSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One ONNX graph of a bundle."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class FileSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size in bytes and SHA-256 (hexadecimal) of one file of a bundle."""

    bytes: Annotated[int, msgspec.Meta(ge=0, le=MAX_FILE_BYTES)]
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a bundle says of itself.

    license, provenance: the exporter's words, shown but never acted on.
    class_names, palette: the name and the color (red, green, blue) of each class by id; both may be left out.
    """

    config: ModelConfig
    precision: str
    opset: int
    stages: dict[str, StageSpec]
    files: dict[str, FileSpec]
    license: str = ""
    provenance: dict[str, Any] = {}
    class_names: tuple[Annotated[str, msgspec.Meta(min_length=1, max_length=60)], ...] = ()
    palette: tuple[tuple[_Byte, _Byte, _Byte], ...] = ()

    def graph_file(self, stage: str) -> FileSpec:
        """Size and hash of the ONNX file of a stage."""
        return self.files[self.stages[stage].file]

    def to_json(self) -> str:
        """This manifest as a JSON object."""
        header = {"format": FORMAT, "format_version": FORMAT_VERSION}
        return json.dumps(header | msgspec.to_builtins(self), indent=2)

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Parse and validate; anything unexpected raises `BundleError`."""
        try:
            fields = msgspec.json.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BundleError(f"{MANIFEST} is not JSON: {error}") from error
        if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
            raise BundleError(f'{MANIFEST}: expected an object with "format": "{FORMAT}"')
        if (version := fields.pop("format_version", None)) != FORMAT_VERSION:
            raise BundleError(
                f"{MANIFEST}: format_version {version!r} is unknown to this flashcocos, which reads {FORMAT_VERSION}; "
                "install a matching flashcocos or export the model again"
            )
        try:
            manifest = from_fields(cls, fields)
        except InputError as error:
            raise BundleError(f"{MANIFEST}: {error}") from error
        manifest._validate()
        return manifest

    def _validate(self) -> None:
        for name in self.files:
            if not _NAME.fullmatch(name) or name == MANIFEST:
                raise BundleError(f"{MANIFEST}: file name {name!r} is not allowed in a bundle")
        for field, values in (("class_names", self.class_names), ("palette", self.palette)):
            if values and len(values) != self.config.label_channels:
                raise BundleError(
                    f"{MANIFEST}: {field}: expected one for each of {self.config.label_channels} classes, "
                    f"got {len(values)}"
                )
        if wrong := [name for name in self.class_names if not name.isprintable()]:
            raise BundleError(f"{MANIFEST}: class_names: {wrong[0]!r} is not printable")
        if self.precision not in PRECISIONS:
            raise BundleError(f"{MANIFEST}: precision {self.precision!r} is not one of {', '.join(PRECISIONS)}")
        if set(self.stages) != set(STAGES):
            raise BundleError(f"{MANIFEST}: expected the stages {STAGES}, got {sorted(self.stages)}")
        for name, stage in self.stages.items():
            if stage.file not in self.files:
                raise BundleError(f"{MANIFEST}: stage {name} names {stage.file!r}, which is not among its files")


class Bundle:
    """An opened bundle: `manifest`, and `read(name)` for the verified bytes of a file it lists.

    Args:
        path: a folder or a zip file.

    Raises:
        InputError: there is nothing at `path`, or a pipe or a device.
        BundleError: it is not a readable bundle.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise InputError(f"no model bundle at {self.path}; `flashcocos export` writes one")
        if not self.path.is_dir() and not self.path.is_file():  # a pipe or a device may never end
            raise InputError(f"{self.path}: expected a model bundle, a folder or a .zip; this is a pipe or a device")
        self.manifest = Manifest.from_json(self._bytes(MANIFEST, MAX_MANIFEST_BYTES))
        limit = MAX_BUNDLE_BYTES
        if self.path.is_file():
            limit = min(limit, _MAX_RATIO * self.path.stat().st_size)
        if (total := sum(spec.bytes for spec in self.manifest.files.values())) > limit:
            raise BundleError(f"{self.path}: its manifest states {total} bytes of files; expected at most {limit}")

    def read(self, name: str) -> bytes:
        """Content of the listed file `name`; `BundleError` when its size or SHA-256 is not what the manifest states."""
        spec = self.manifest.files.get(name)
        if spec is None:
            raise BundleError(f"{self.path}: the manifest lists no file {name!r}")
        content = self._bytes(name, spec.bytes)
        if len(content) != spec.bytes or hashlib.sha256(content).hexdigest() != spec.sha256:
            raise BundleError(
                f"{self.path}: {name} does not match the manifest (damaged or changed); export or download it again"
            )
        return content

    def read_stage(self, stage: str) -> bytes:
        """The ONNX file of one of `STAGES`."""
        return self.read(self.manifest.stages[stage].file)

    def verify(self) -> None:
        """Read every listed file; raises `BundleError` at the first that does not match."""
        for name in self.manifest.files:
            self.read(name)

    def _bytes(self, name: str, limit: int) -> bytes:
        # one byte above the limit is enough to tell that a file is larger than stated
        try:
            if self.path.is_dir():
                file_path = self.path / name
                if file_path.is_symlink() or not file_path.is_file():
                    raise BundleError(f"{self.path}: {name} is missing or not a plain file")
                with file_path.open("rb") as file:
                    return file.read(limit + 1)
            with zipfile.ZipFile(self.path) as archive:
                entry = archive.getinfo(name)
                # others (LZMA) may ask for gigabytes of memory
                if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise BundleError(f"{self.path}: {name} is neither stored nor deflated; pack the zip file again")
                with archive.open(entry) as file:
                    return file.read(limit + 1)
        except KeyError as error:
            raise BundleError(f"{self.path}: {name} is missing") from error
        except BundleError:
            raise
        except _DAMAGE as error:
            raise BundleError(f"{self.path}: {name} cannot be read: {error}") from error


def write_bundle(path: str | os.PathLike[str], manifest: Manifest, files: Mapping[str, bytes]) -> Path:
    """Write a bundle, whole or not at all.

    Args:
        path: a zip file if it ends in ".zip", else a folder; an existing folder is replaced only if it is a bundle.
        manifest: its description; `manifest.files` is filled in from `files`.
        files: name -> content.

    Returns:
        The path.

    Raises:
        InputError: `path` exists and is something else.
        BundleError: the manifest or a name is not allowed.
    """
    path = Path(path)
    specs = {name: FileSpec(len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()}
    manifest = msgspec.structs.replace(manifest, files=specs)
    manifest._validate()
    content = {MANIFEST: manifest.to_json().encode(), **files}
    if path.suffix == ".zip":
        with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            for name, data in content.items():
                entry = zipfile.ZipInfo(name)  # without today's date, so that equal content gives equal bytes
                entry.external_attr = 0o644 << 16
                archive.writestr(entry, data)
        return path
    if path.exists() and not (path / MANIFEST).is_file() and (path.is_file() or any(path.iterdir())):
        raise InputError(f"{path} exists and is not a model bundle; choose another output or remove it")
    with atomic_path(path, directory=True) as temporary:
        for name, data in content.items():
            (temporary / name).write_bytes(data)
    return path
