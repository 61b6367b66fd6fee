"""Where TensorRT engines lie and which of them are used: never one that was built for something else.

`flashcocos build` writes, `Translator(backend="tensorrt")` reads. An engine runs only on what it was built for, so
its key contains all of that: the graph's SHA-256, the variant of TensorRT and its version, the architectures, the
precision, the range of shapes, and the revision of the rewriting that `export/` does before TensorRT sees a graph.
An engine is two files named by its key, `STAGE-KEY.engine` and `STAGE-KEY.json`; the second is written last, so half
of an engine is none.
Engines are code for the machine that built them and are no part of a bundle: deserializing one from a stranger would
run it. Their inputs and outputs are those of `engine.device_tensors`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec

from ...bundle import STAGES, Bundle
from ...config import SIZE_MULTIPLE, from_fields
from ...errors import BackendError, InputError
from ...files import atomic_path
from ..options import VARIANTS
from ..tiles import tile_side

PRECISIONS = ("float32", "float16")  # from the slowest to the fastest
_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
GRAPH_REVISION = 2  # of export/tensorrt: another way to rewrite or to build gives other engines of the same bundle
MAX_ENGINE_BYTES = 16 << 30
_MAX_DESCRIPTION_BYTES = 1 << 20

Range = tuple[int, int, int]
_Bytes = Annotated[int, msgspec.Meta(ge=0)]


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The shapes that an engine takes, each axis as (least, optimal, most): images a batch, and pixels."""

    batch: Range
    height: Range
    width: Range

    def supports(self, batch: int, height: int, width: int) -> bool:
        """Whether the engine runs this shape."""
        axes = ((self.batch, batch), (self.height, height), (self.width, width))
        return all(least <= side <= most for (least, _, most), side in axes)

    def tiled(self, tile: int | None) -> Profile:
        """What the fine stage needs for pictures of this profile in tiles of side `tile`."""

        def cut(axis: Range) -> Range:
            sides = [tile_side(side, tile) for side in range(axis[0], axis[2] + 1, SIZE_MULTIPLE)]
            return min(sides), tile_side(axis[1], tile), max(sides)

        return Profile(self.batch, cut(self.height), cut(self.width))

    @property
    def static(self) -> bool:
        """Whether it is for a single shape."""
        return all(axis[0] == axis[2] for axis in (self.batch, self.height, self.width))

    def __str__(self) -> str:
        def axis(sides: Range) -> str:
            return str(sides[0]) if sides[0] == sides[2] else ":".join(map(str, sides))

        return f"{axis(self.height)} x {axis(self.width)}, batch {axis(self.batch)}"


class EngineKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that decides an engine's content. architectures: compute capabilities, 89 for 8.9; sorted."""

    stage: Annotated[str, msgspec.Meta(pattern=rf"^({'|'.join(STAGES)})\Z")]
    graph_sha256: str
    variant: str
    version: str
    architectures: tuple[int, ...]
    precision: Annotated[str, msgspec.Meta(pattern=rf"^({'|'.join(PRECISIONS)})\Z")]
    profile: Profile
    revision: int = GRAPH_REVISION

    @property
    def stem(self) -> str:
        """The name of the engine's files, without their suffix."""
        text = json.dumps(msgspec.to_builtins(self), sort_keys=True)
        return f"{self.stage}-{hashlib.sha256(text.encode()).hexdigest()[:20]}"


class EngineRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the store knows of one engine.

    weight_bytes, activation_bytes: of device memory, by TensorRT's own figures at the profile's largest shape;
    activation_bytes includes scratch. sha256, bytes: of the engine's file. int8_convolutions: how many TensorRT was
    given in int8; the rest is of the key's precision.
    """

    key: EngineKey
    weight_bytes: _Bytes
    activation_bytes: _Bytes
    bytes: Annotated[int, msgspec.Meta(ge=0, le=MAX_ENGINE_BYTES)]
    sha256: str
    int8_convolutions: int = 0

    @property
    def arithmetic(self) -> str:
        """What the engine computes in, for people."""
        return f"int8 and {self.key.precision}" if self.int8_convolutions else self.key.precision


def import_variant(variant: str) -> Any:
    """The module of `variant`; `InputError` for an unknown name, `BackendError` where it is not installed."""
    if variant not in VARIANTS:
        raise InputError(f"variant {variant!r} is unknown; expected one of {', '.join(VARIANTS)}")
    try:
        return importlib.import_module(_MODULES[variant])
    except (ImportError, OSError) as error:  # OSError where one of its libraries does not load
        raise BackendError(
            f"{variant} cannot be imported ({error}); pip install flashcocos[{VARIANTS[variant]}]"
        ) from error


def default_folder(bundle: str | os.PathLike[str]) -> Path:
    """Where the engines of the bundle at `bundle` lie unless another place is named: beside it, NAME.engines."""
    path = Path(bundle)
    return path.with_name((path.stem if path.suffix == ".zip" else path.name) + ".engines")


def write_engine(folder: str | os.PathLike[str], record: EngineRecord, engine: bytes) -> EngineRecord:
    """Store `engine` under its key; returns `record` with `bytes` and `sha256` filled in."""
    path = Path(folder) / f"{record.key.stem}.engine"
    record = msgspec.structs.replace(record, bytes=len(engine), sha256=hashlib.sha256(engine).hexdigest())
    with atomic_path(path) as temporary:
        temporary.write_bytes(engine)
    with atomic_path(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(msgspec.to_builtins(record), indent=2) + "\n", encoding="utf-8")
    return record


def read_engine(folder: str | os.PathLike[str], record: EngineRecord) -> bytes:
    """The engine of `record`; `BackendError` where its file is missing, cut short or changed."""
    path = Path(folder) / f"{record.key.stem}.engine"
    try:
        with path.open("rb") as file:
            engine = file.read(record.bytes + 1)
    except OSError as error:
        raise BackendError(f"{path} cannot be read: {error.strerror}; run flashcocos build again") from error
    if len(engine) != record.bytes or hashlib.sha256(engine).hexdigest() != record.sha256:
        raise BackendError(f"{path} is damaged or cut short; remove it and run flashcocos build again")
    return engine


def list_engines(folder: str | os.PathLike[str]) -> list[EngineRecord]:
    """The engines in `folder`, static ones first; none without the folder. `BackendError` for a damaged description."""
    paths = [path for path in sorted(Path(folder).glob("*-*.json")) if path.with_suffix(".engine").exists()]
    return sorted(map(_read_record, paths), key=lambda record: not record.key.profile.static)


def find_engines(
    bundle: Bundle,
    folder: str | os.PathLike[str],
    *,
    variant: str,
    version: str,
    architecture: int,
    precision: str | None = None,
) -> list[EngineRecord]:
    """The engines in `folder` that may run `bundle` here, at least one for each stage; static ones first.

    precision: None for the fastest available. Raises `BackendError` with the first thing that does not fit, what is
    available instead, and how to build what is missing.
    """
    manifest = bundle.manifest
    graphs = {manifest.files[manifest.stages[stage].file].sha256 for stage in STAGES}
    build = f"flashcocos build {bundle.path} --variant {variant} --target sm_{architecture}"
    records = list_engines(folder)
    if not records:
        raise BackendError(f"no TensorRT engines in {folder}; {build}")
    steps: list[tuple[str, str, Callable[[Any], bool]]] = [  # field of the key, what it says, whether it fits
        ("graph_sha256", "of this bundle (it was changed since they were built)", lambda graph: graph in graphs),
        ("revision", "of these graphs by this flashcocos", lambda revision: revision == GRAPH_REVISION),
        ("variant", f"of variant {variant}", lambda name: name == variant),
        ("version", f"of {variant} {version}, which is installed,", lambda built: built == version),
        ("architectures", f"for architecture sm_{architecture}", lambda built: architecture in built),
    ]
    if precision is not None:
        steps.append(("precision", f"of precision {precision}", lambda built: built == precision))
        build += f" --precision {precision}"
    for field, what, fits in steps:
        fitting = [record for record in records if fits(getattr(record.key, field))]
        if not fitting:
            available = ", ".join(sorted({_shown(getattr(record.key, field)) for record in records}))
            raise BackendError(f"no TensorRT engine {what} in {folder}, only {available}; {build}")
        records = fitting
    for name in reversed(PRECISIONS):
        complete = [record for record in records if record.key.precision == name]
        if {record.key.stage for record in complete} == set(STAGES):
            return complete
    available = ", ".join(sorted(f"{record.key.stage} in {record.key.precision}" for record in records))
    raise BackendError(f"no TensorRT engines of all stages in one precision in {folder}, only {available}; {build}")


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " + ".join(f"sm_{architecture}" for architecture in value)
    return str(value)[:12]


def _read_record(path: Path) -> EngineRecord:
    try:
        if path.stat().st_size > _MAX_DESCRIPTION_BYTES:
            raise ValueError("it is too large")
        record = from_fields(EngineRecord, msgspec.json.decode(path.read_bytes()))
        if record.key.stem != path.stem:
            raise ValueError("it does not belong to the engine of this name")
        return record
    except (OSError, ValueError, RecursionError, msgspec.DecodeError) as error:
        raise BackendError(
            f"{path} cannot be used: {error}; remove it with its .engine, and run flashcocos build again"
        ) from error
