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
from typing import Annotated, Any

import msgspec

from ...bundle import Bundle
from ...config import ModelConfig, from_fields
from ...errors import BackendError, BundleError

FOLDER = "kernels"  # in a folder of engines
MAX_CUBIN_BYTES = 64 << 20
MAX_DESCRIPTION_BYTES = 1 << 20
MAX_SHARED_BYTES = 227 << 10  # of a block, on any chip so far
MAX_GRID = (2**31 - 1, 65535, 65535)
OWN_CHIP_ONLY = 90  # from here on Triton compiles for the features of one chip ("sm_90a"), which no other has
_NAME = re.compile(r"([A-Za-z0-9_]{1,80})_sm(\d{2,3})\.json")
_ELEMENTS = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}
_FORMATS = {"i32": "i", "fp32": "f", "null": "P"}
_HIDDEN = ("global_scratch", "profile_scratch")  # pointers that Triton appends and these kernels leave alone


class _Argument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    type: str


_Expression = Annotated[str, msgspec.Meta(max_length=300)]


class _Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A JSON file of `kernels/gpu/aot.py`; the fields with defaults are for people."""

    kernel: str
    cubin: str
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
    architecture: int
    dtype: str
    entry: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}\Z")]
    grid: tuple[_Expression, _Expression, _Expression]
    threads: Annotated[int, msgspec.Meta(ge=32, le=1024, multiple_of=32)]
    shared_bytes: Annotated[int, msgspec.Meta(ge=0, le=MAX_SHARED_BYTES)]
    arguments: tuple[_Argument, ...]
    pointer_alignment: Annotated[int, msgspec.Meta(ge=1, le=256)]
    constants: dict[str, Any]
    registers: int = 0
    spilled_bytes: int = 0
    triton: str = ""


@dataclasses.dataclass(frozen=True)
class Cubin:
    """A validated kernel: launched with `grid(sizes)` blocks of `threads` threads.

    arguments: (name, type) in order; type is "*..." for a pointer, "i32", "fp32", or "null". code: reads the cubin and
    checks its hash.
    """

    name: str
    architecture: int
    dtype: str
    entry: str
    threads: int
    shared_bytes: int
    arguments: tuple[tuple[str, str], ...]
    expressions: tuple[str, ...]
    constants: Mapping[str, int]
    code: Callable[[], bytes]

    @property
    def formats(self) -> str:
        """The arguments' types, a character each, as `Device.load` takes them."""
        return "".join(_FORMATS.get(kind, "P") for _, kind in self.arguments)

    def grid(self, sizes: Mapping[str, int]) -> tuple[int, int, int]:
        """Blocks along the three axes, for arguments of these values; `BundleError` where they are out of range."""
        blocks = tuple(evaluate(expression, sizes) for expression in self.expressions)
        if not all(1 <= count <= most for count, most in zip(blocks, MAX_GRID, strict=True)):
            raise BundleError(f"kernel {self.name}: a grid of {blocks} blocks; expected 1 to {MAX_GRID}")
        return blocks[0], blocks[1], blocks[2]


@dataclasses.dataclass(frozen=True)
class WarpKernels:
    """The kernels of one warp, all of one dtype. padded: channels of a packed row of values."""

    dtype: str
    pack: Cubin
    statistics: Cubin
    warp: Cubin
    match: Cubin

    @property
    def padded(self) -> int:
        return self.warp.constants["VP"]

    @property
    def architectures(self) -> str:
        """For what they were compiled, as "sm_86"."""
        return " + ".join(f"sm_{sm}" for sm in sorted({cubin.architecture for cubin in self.parts().values()}))

    def parts(self) -> dict[str, Cubin]:
        """The kernels by name."""
        return {"pack": self.pack, "statistics": self.statistics, "warp": self.warp, "match": self.match}


class KernelFolder:
    """A folder of kernels, or none."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.where = str(path)
        self._path = Path(path)

    def names(self) -> list[str]:
        """Its files' names."""
        return sorted(path.name for path in self._path.glob("*_sm*.json")) if self._path.is_dir() else []

    def read(self, name: str, limit: int) -> bytes:
        """A file's content; `BackendError` where it cannot be read or is larger than `limit` bytes."""
        try:
            with (self._path / name).open("rb") as file:
                content = file.read(limit + 1)
        except OSError as error:
            raise BackendError(f"{self._path / name} cannot be read: {error.strerror}; build it again") from error
        if len(content) > limit:
            raise BackendError(f"{self._path / name}: over {limit} bytes; expected a kernel of flashcocos build")
        return content


class BundleKernels:
    """The kernels that a bundle lists among its files."""

    def __init__(self, bundle: Bundle) -> None:
        self.where = str(bundle.path)
        self._bundle = bundle

    def names(self) -> list[str]:
        """Its files' names, of whatever kind."""
        return sorted(self._bundle.manifest.files)

    def read(self, name: str, limit: int) -> bytes:
        """A file's content; `BundleError` where it is missing, not what the manifest states, or over `limit` bytes."""
        spec = self._bundle.manifest.files.get(name)
        if spec is not None and spec.bytes > limit:
            raise BundleError(f"{self.where}: {name} has {spec.bytes} bytes; expected at most {limit}")
        return self._bundle.read(name)


Source = KernelFolder | BundleKernels


def kernel_names(config: ModelConfig, dtype: str) -> dict[str, str]:
    """The name of each kernel that a model needs, by its part in `WarpKernels`."""
    feature = f"p{config.patch}_c{config.feature_channels}"
    return {
        "pack": f"pack_{dtype}",
        "statistics": f"statistics_{feature}_{dtype}",
        "warp": f"warp_{feature}_v{config.warped_channels}_{dtype}",
        "match": f"match_{feature}_{dtype}",
    }


def available_kernels(sources: Sequence[Source], config: ModelConfig) -> dict[str, list[int]]:
    """dtype -> architectures for which all of a model's kernels are available, by their names alone."""
    files = [(match[1], int(match[2])) for source in sources for name in source.names() if (match := _match(name))]
    complete = {}
    for dtype in _ELEMENTS:
        architectures = [
            {sm for kernel, sm in files if kernel == name} for name in kernel_names(config, dtype).values()
        ]
        if common := sorted(set.intersection(*architectures)):
            complete[dtype] = common
    return complete


def find_kernels(
    sources: Sequence[Source], config: ModelConfig, capability: int, dtypes: Sequence[str], remedy: str
) -> WarpKernels:
    """The kernels of the first of `dtypes` that a GPU of this compute capability can run, for the nearest architecture.

    A cubin runs on chips of its major version and of its minor version or a later one; from `OWN_CHIP_ONLY` on, on its
    own alone. Raises `BackendError` naming those that exist and `remedy`, how to make others, and `BundleError` or
    `BackendError` for a description or cubin that cannot be used.
    """
    available = available_kernels(sources, config)
    for dtype in dtypes:
        if fitting := [sm for sm in available.get(dtype, ()) if _runs(sm, capability)]:
            cubins = {
                part: _read(sources, name, max(fitting), dtype, config)
                for part, name in kernel_names(config, dtype).items()
            }
            return WarpKernels(dtype, **cubins)
    known = "; ".join(f"{dtype} for {', '.join(f'sm_{sm}' for sm in sms)}" for dtype, sms in available.items())
    wanted = f"{' or '.join(dtypes)}, sm_{capability}, patch {config.patch}, C = {config.feature_channels}"
    raise BackendError(
        f"no compiled warp kernels for {wanted}, V = {config.warped_channels} in "
        f"{' or '.join(source.where for source in sources)} (there are: {known or 'none'}); {remedy}"
    )


def evaluate(expression: str, sizes: Mapping[str, int]) -> int:
    """The value of a grid expression: a product of names, whole numbers and ceil(product / whole number).

    Raises `BundleError` for anything else and for a name that is not in `sizes`.
    """
    tokens = re.findall(r"[A-Za-z_]\w*|\d{1,9}|\S", expression)
    value, rest = _product(tokens, sizes, expression)
    if rest:
        raise BundleError(f"grid {expression!r}: {rest[0]!r} is not expected there")
    return value


def _product(tokens: list[str], sizes: Mapping[str, int], expression: str) -> tuple[int, list[str]]:
    """The value of the product that `tokens` start with, and the tokens after it."""
    value = 1
    while True:
        head, tokens = tokens[:1], tokens[1:]
        if head == ["ceil"] and tokens[:1] == ["("]:
            inner, tokens = _product(tokens[1:], sizes, expression)
            if len(tokens) < 3 or tokens[0] != "/" or not tokens[1].isdecimal() or int(tokens[1]) == 0:
                raise BundleError(f"grid {expression!r}: expected ceil(product / number)")
            if tokens[2] != ")":
                raise BundleError(f"grid {expression!r}: expected ) after {tokens[1]}")
            value, tokens = value * -(-inner // int(tokens[1])), tokens[3:]
        elif head and (head[0].isdecimal() or head[0] in sizes):
            value *= int(head[0]) if head[0].isdecimal() else sizes[head[0]]
        else:
            raise BundleError(f"grid {expression!r}: expected ceil, a number or one of {', '.join(sorted(sizes))}")
        if tokens[:1] != ["*"]:
            return value, tokens
        tokens = tokens[1:]


def _match(name: str) -> re.Match[str] | None:
    return _NAME.fullmatch(name)


def _runs(architecture: int, capability: int) -> bool:
    if architecture >= OWN_CHIP_ONLY:
        return architecture == capability
    return architecture // 10 == capability // 10 and architecture <= capability


def _expected(name: str, dtype: str) -> dict[str, str]:
    """The arguments of the kernel `name`: name -> type."""
    element = _ELEMENTS[dtype]
    kind = name.partition("_")[0]
    if kind == "pack":
        strides = ("stride_b", "stride_c", "stride_y", "stride_x")
        integers = ("width", "positions", "channels", "padded", *strides)
        arguments = {"source": "*fp32", "target": element, **dict.fromkeys(integers, "i32")}
    elif kind == "statistics":
        arguments = {"packed": element, "mean": "*fp32", "inverse": "*fp32", "height": "i32", "width": "i32"}
    else:
        arguments = {"theta": element, "phi": element, **dict.fromkeys(("mu", "a", "nu", "b"), "*fp32")}
        if kind == "warp":
            arguments |= {"values": element, "out": "*fp32", "lse": "*fp32"}
        else:
            arguments |= {"index": "*i64", "probability": "*fp32", "entropy": "*fp32"}
        arguments |= {**dict.fromkeys(("height_q", "width_q", "height_k", "width_k"), "i32"), "scale": "fp32"}
    return arguments


def _read(sources: Sequence[Source], name: str, architecture: int, dtype: str, config: ModelConfig) -> Cubin:
    stem = f"{name}_sm{architecture}"
    source = next(source for source in sources if f"{stem}.json" in source.names())
    where = f"{source.where}: {stem}.json"
    try:
        description = from_fields(_Description, msgspec.json.decode(source.read(f"{stem}.json", MAX_DESCRIPTION_BYTES)))
        return _validated(description, name, architecture, dtype, config, source)
    except (ValueError, RecursionError, msgspec.DecodeError) as error:  # InputError and BundleError are ValueErrors
        raise BundleError(f"{where} cannot be used: {error}; compile the kernels again") from error


def _validated(
    description: _Description, name: str, architecture: int, dtype: str, config: ModelConfig, source: Source
) -> Cubin:
    stem = f"{name}_sm{architecture}"
    stated = (description.kernel, description.cubin, description.architecture, description.dtype)
    if stated != (name, f"{stem}.cubin", architecture, dtype):
        raise BundleError(f"it describes {stated}")
    arguments = tuple(_arguments(description.arguments, _expected(name, dtype)))
    _check_constants(description.constants, name, config)
    cubin = Cubin(
        name,
        architecture,
        dtype,
        description.entry,
        description.threads,
        description.shared_bytes,
        arguments,
        description.grid,
        description.constants,
        lambda: _code(source, description.cubin, description.sha256),
    )
    cubin.grid({name: 1 for name, kind in (*arguments, ("batch", "i32")) if kind == "i32"})  # the syntax, before a run
    return cubin


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


def _check_constants(constants: dict[str, Any], name: str, config: ModelConfig) -> None:
    kind, values = name.partition("_")[0], config.warped_channels
    needed = {} if kind == "pack" else {"C": config.feature_channels, "PATCH": config.patch}
    if kind == "warp":
        needed["V"] = values
        padded = constants.get("VP")
        if type(padded) is not int or not values <= padded <= 2 * values + 8:
            raise BundleError(f"constants: expected VP, V = {values} padded, got {padded!r}")
    for key, value in needed.items():
        if constants.get(key) != value:
            raise BundleError(f"constants: expected {key} = {value}, got {constants.get(key)!r}")


def _code(source: Source, name: str, sha256: str) -> bytes:
    code = source.read(name, MAX_CUBIN_BYTES)
    if hashlib.sha256(code).hexdigest() != sha256:
        raise BundleError(f"{source.where}: {name} is not the cubin that its description states; compile it again")
    return code
