"""The compiled kernels of the warp: which a GPU can run, and the checks of their descriptions.

`flashcocos export --aot` puts them into a bundle and `flashcocos build` into the folder of engines, under `kernels/`:
`NAME_smNN.json`, a description as `kernels/gpu/aot.py` writes it, and `NAME_smNN.cubin`. Both may come from anyone, so
of a description nothing is evaluated, every value has a range, and the arguments must be those that the kernel is known
to take. What a cubin then does on the GPU cannot be checked: like an engine, it is code.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from ...bundle import Bundle
from ...config import ModelConfig, from_fields
from ...errors import BackendError, BundleError
from ...kernels import signatures

FOLDER = "kernels"  # in a folder of engines
MAX_CUBIN_BYTES = 64 << 20
MAX_DESCRIPTION_BYTES = 1 << 20
MAX_SHARED_BYTES = 227 << 10  # of a block, on any chip so far
MAX_GRID = (2**31 - 1, 65535, 65535)
OWN_CHIP_ONLY = 90  # from here on Triton compiles for the features of one chip ("sm_90a"), which no other has
_NAME = re.compile(r"([A-Za-z0-9_]{1,80})_sm(\d{2,3})\.json")
_FORMATS = {"i32": "i", "fp32": "f", "null": "P"}
_HIDDEN = ("global_scratch", "profile_scratch")  # pointers that Triton appends and these kernels leave alone


class _Argument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    type: str


class _Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A JSON file of `kernels/gpu/aot.py`; the fields with defaults are for people."""

    revision: int
    kernel: str
    cubin: str
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
    architecture: int
    dtype: str
    entry: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}\Z")]
    threads: Annotated[int, msgspec.Meta(ge=32, le=1024, multiple_of=32)]
    shared_bytes: Annotated[int, msgspec.Meta(ge=0, le=MAX_SHARED_BYTES)]
    arguments: tuple[_Argument, ...]
    pointer_alignment: Annotated[int, msgspec.Meta(ge=1, le=256)]
    constants: dict[str, Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]]
    cuda: Annotated[str, msgspec.Meta(pattern=r"^\d{1,2}\.\d{1,2}\Z")]
    registers: int = 0
    spilled_bytes: int = 0
    triton: str = ""


@dataclasses.dataclass(frozen=True)
class Cubin:
    """A validated kernel: launched with `grid(sizes, batch)` blocks of `threads` threads.

    arguments: (name, type) in order; type is "*..." for a pointer, "i32", "fp32", or "null". cuda: the version that its
    compiler came with. code: reads the cubin and checks its hash.
    """

    name: str
    architecture: int
    dtype: str
    entry: str
    threads: int
    shared_bytes: int
    arguments: tuple[tuple[str, str], ...]
    constants: Mapping[str, int]
    cuda: str
    code: Callable[[], bytes]

    @property
    def formats(self) -> str:
        """The arguments' types, a character each, as `Device.load` takes them."""
        return "".join(_FORMATS.get(kind, "P") for _, kind in self.arguments)

    def grid(self, sizes: Mapping[str, int], batch: int) -> tuple[int, int, int]:
        """Blocks along the three axes, for arguments of these values; `BundleError` where they are out of range."""
        blocks = signatures.grid(self.name.partition("_")[0], self.constants, sizes, batch)
        if not all(1 <= count <= most for count, most in zip(blocks, MAX_GRID, strict=True)):
            raise BundleError(f"kernel {self.name}: a grid of {blocks} blocks; expected 1 to {MAX_GRID}")
        return blocks


@dataclasses.dataclass(frozen=True)
class Source:
    """Files of kernels, and of other things: where they lie, their names, and the content of one, of at most so many
    bytes."""

    where: str
    names: frozenset[str]
    read: Callable[[str, int], bytes]


def folder_kernels(path: str | os.PathLike[str]) -> Source:
    """The files in a folder, which may be missing. Reading raises `BackendError`."""
    folder = Path(path)

    def read(name: str, limit: int) -> bytes:
        try:
            with (folder / name).open("rb") as file:
                content = file.read(limit + 1)
        except OSError as error:
            raise BackendError(f"{folder / name} cannot be read: {error.strerror}; build it again") from error
        if len(content) > limit:
            raise BackendError(f"{folder / name}: over {limit} bytes; expected a kernel of flashcocos build")
        return content

    return Source(str(path), frozenset(file.name for file in folder.glob("*_sm*.json")), read)


def bundle_kernels(bundle: Bundle) -> Source:
    """The files that a bundle lists. Reading raises `BundleError`, also where one is not what the manifest states."""

    def read(name: str, limit: int) -> bytes:
        spec = bundle.manifest.files.get(name)
        if spec is not None and spec.bytes > limit:
            raise BundleError(f"{bundle.path}: {name} has {spec.bytes} bytes; expected at most {limit}")
        return bundle.read(name)

    return Source(str(bundle.path), frozenset(bundle.manifest.files), read)


def kernel_names(config: ModelConfig, dtype: str) -> dict[str, str]:
    """The name of each kernel that a model needs, by its name in `kernels/signatures.py`."""
    feature = f"p{config.patch}_c{config.feature_channels}"
    return {
        "pack": f"pack_{dtype}",
        "statistics": f"statistics_{feature}_{dtype}",
        "warp": f"warp_{feature}_v{config.warped_channels}_{dtype}",
    }


def available_kernels(sources: Sequence[Source], config: ModelConfig) -> dict[str, list[int]]:
    """dtype -> architectures for which all of a model's kernels are available, by their names alone."""
    files = [
        (found[1], int(found[2])) for source in sources for name in source.names if (found := _NAME.fullmatch(name))
    ]
    complete = {}
    for dtype in signatures.ELEMENTS:
        architectures = [
            {sm for kernel, sm in files if kernel == name} for name in kernel_names(config, dtype).values()
        ]
        if common := sorted(set.intersection(*architectures)):
            complete[dtype] = common
    return complete


def find_kernels(
    sources: Sequence[Source],
    config: ModelConfig,
    dtypes: Sequence[str],
    *,
    capability: int,
    driver: str,
    remedy: str,
) -> dict[str, Cubin]:
    """The kernels of the first of `dtypes` that a GPU of this compute capability can run, for the nearest architecture.

    A cubin runs on chips of its major version and of its minor version or a later one; from `OWN_CHIP_ONLY` on, on its
    own alone; and with a driver of its compiler's major version of CUDA or a later one. driver: the version that the
    driver supports, as "12.4". Raises `BackendError` naming those that exist and `remedy`, how to make others, and
    `BundleError` or `BackendError` for a description or cubin that cannot be used.
    """
    available = available_kernels(sources, config)
    for dtype in dtypes:
        if fitting := [sm for sm in available.get(dtype, ()) if _runs(sm, capability)]:
            names = kernel_names(config, dtype)
            cubins = {kernel: _read(sources, name, max(fitting), dtype, config) for kernel, name in names.items()}
            for cubin in cubins.values():
                if _major(cubin.cuda) > _major(driver):
                    raise BackendError(
                        f"kernel {cubin.name} for sm_{cubin.architecture} was compiled by CUDA {cubin.cuda}, the "
                        f"NVIDIA driver supports CUDA {driver}; update the driver"
                    )
            return cubins
    known = "; ".join(f"{dtype} for {', '.join(f'sm_{sm}' for sm in sms)}" for dtype, sms in available.items())
    wanted = f"{' or '.join(dtypes)}, sm_{capability}, patch {config.patch}, C = {config.feature_channels}"
    raise BackendError(
        f"no compiled warp kernels for {wanted}, V = {config.warped_channels} in "
        f"{' or '.join(source.where for source in sources)} (there are: {known or 'none'}); {remedy}"
    )


def _major(version: str) -> int:
    return int(version.partition(".")[0])


def _runs(architecture: int, capability: int) -> bool:
    if architecture >= OWN_CHIP_ONLY:
        return architecture == capability
    return architecture // 10 == capability // 10 and architecture <= capability


def _read(sources: Sequence[Source], name: str, architecture: int, dtype: str, config: ModelConfig) -> Cubin:
    stem = f"{name}_sm{architecture}"
    source = next(source for source in sources if f"{stem}.json" in source.names)
    try:
        fields = msgspec.json.decode(source.read(f"{stem}.json", MAX_DESCRIPTION_BYTES))
        revision = fields.get("revision", 1) if isinstance(fields, dict) else None
        if revision != signatures.REVISION:
            raise BundleError(f"it is of revision {revision!r:.20}, expected {signatures.REVISION}")
        return _validated(from_fields(_Description, fields), name, architecture, dtype, config, source)
    except (ValueError, RecursionError, msgspec.DecodeError) as error:  # InputError and BundleError are ValueErrors
        raise BundleError(f"{source.where}: {stem}.json cannot be used: {error}; compile the kernels again") from error


def _validated(
    description: _Description, name: str, architecture: int, dtype: str, config: ModelConfig, source: Source
) -> Cubin:
    stated = (description.kernel, description.cubin, description.architecture, description.dtype)
    if stated != (name, f"{name}_sm{architecture}.cubin", architecture, dtype):
        raise BundleError(f"it describes {stated}")
    _check_constants(description.constants, name, config)
    return Cubin(
        name,
        architecture,
        dtype,
        description.entry,
        description.threads,
        description.shared_bytes,
        tuple(_arguments(description.arguments, signatures.arguments(name.partition("_")[0], dtype))),
        description.constants,
        description.cuda,
        lambda: _code(source, description.cubin, description.sha256),
    )


def _arguments(stated: Sequence[_Argument], expected: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    seen = set()
    for argument in stated:
        hidden = argument.name in _HIDDEN and argument.type == "null"
        if argument.name in seen or not (hidden or expected.get(argument.name) == argument.type):
            raise BundleError(f"argument {argument!r:.80}: expected those of this kernel, {expected}")
        seen.add(argument.name)
        yield argument.name, argument.type
    if missing := set(expected) - seen:
        raise BundleError(f"it takes no argument {sorted(missing)[0]}")


def _check_constants(constants: Mapping[str, int], name: str, config: ModelConfig) -> None:
    kernel, values = name.partition("_")[0], config.warped_channels
    needed = {} if kernel == "pack" else {"C": config.feature_channels, "PATCH": config.patch}
    if kernel == "warp":
        needed |= {"V": values, "VP": signatures.padded_values(values)}
    for key, value in needed.items():
        if constants.get(key) != value:
            raise BundleError(f"constants: expected {key} = {value}, got {constants.get(key)!r}")
    for key, least in (("BN", 3), ("BC", 1)):  # the two outermost lanes of a tile of nine taps are no queries
        if constants.get(key, 0) < least:
            raise BundleError(f"constants: expected {key} of {least} or more, got {constants.get(key)!r}")


def _code(source: Source, name: str, sha256: str) -> bytes:
    code = source.read(name, MAX_CUBIN_BYTES)
    if hashlib.sha256(code).hexdigest() != sha256:
        raise BundleError(f"{source.where}: {name} is not the cubin that its description states; compile it again")
    return code
