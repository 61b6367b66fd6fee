"""The compiled kernels of the warp: which a GPU can run, and the checks of their descriptions.

`flashcocos export --aot` puts them into a bundle and `flashcocos build` into the folder of engines, under `kernels/`:
`NAME_smNN.json`, a description as `kernels/gpu/aot.py` writes it, and `NAME_smNN.cubin`. Both may come from anyone, so
of a description nothing is evaluated, every value has a range, and the arguments must be those that the kernel is known
to take. What a cubin then does on the GPU cannot be checked: like an engine, it is code.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
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
OWN_CHIP_ONLY = 90  # from here on Triton compiles for the features of one chip ("sm_90a"), which no other has
_NAME = re.compile(r"([A-Za-z0-9_]{1,80})_sm(\d{2,3})\.json")
_FORMATS = {"i32": "i", "fp32": "f"}

Source = Path | Bundle  # where kernels lie: a folder, which may be missing, or a bundle's own


class Cubin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A kernel and its description, a JSON file of `kernels/gpu/aot.py`.

    arguments: name and type of each in order; type is "*..." for a pointer, "i32", "fp32", or "null". cuda: the version
    that its compiler came with. registers, spilled_bytes, triton: for people. code: of the file `cubin`.
    """

    revision: int
    kernel: str
    cubin: str
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
    architecture: int
    dtype: str
    entry: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}\Z")]
    threads: Annotated[int, msgspec.Meta(ge=32, le=1024, multiple_of=32)]
    shared_bytes: Annotated[int, msgspec.Meta(ge=0, le=MAX_SHARED_BYTES)]
    arguments: tuple[dict[str, str], ...]
    pointer_alignment: Annotated[int, msgspec.Meta(ge=1, le=256)]
    constants: dict[str, Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]]
    cuda: Annotated[str, msgspec.Meta(pattern=r"^\d{1,2}\.\d{1,2}\Z")]
    registers: int = 0
    spilled_bytes: int = 0
    triton: str = ""
    code: Annotated[bytes, msgspec.Meta(max_length=0)] = b""  # a description has none

    @property
    def formats(self) -> str:
        """The arguments' types, a character each, as `Device.load` takes them."""
        return "".join(_FORMATS.get(argument["type"], "P") for argument in self.arguments)

    def grid(self, sizes: Mapping[str, int], batch: int) -> tuple[int, int, int]:
        """Blocks along the three axes, for arguments of these values."""
        return signatures.grid(_base(self.kernel), self.constants, sizes, batch)


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
    found = [_NAME.fullmatch(name) for source in sources for name in _names(source)]
    files = {(match[1], int(match[2])) for match in found if match}
    complete = {}
    for dtype in signatures.ELEMENTS:
        names = kernel_names(config, dtype).values()
        if common := [sm for sm in sorted({sm for _, sm in files}) if files.issuperset((name, sm) for name in names)]:
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
                        f"kernel {cubin.kernel} for sm_{cubin.architecture} was compiled by CUDA {cubin.cuda}, the "
                        f"NVIDIA driver supports CUDA {driver}; update the driver"
                    )
            return cubins
    known = "; ".join(f"{dtype} for {', '.join(f'sm_{sm}' for sm in sms)}" for dtype, sms in available.items())
    wanted = f"{' or '.join(dtypes)}, sm_{capability}, patch {config.patch}, C = {config.feature_channels}"
    raise BackendError(
        f"no compiled warp kernels for {wanted}, V = {config.warped_channels} in "
        f"{' or '.join(map(_where, sources))} (there are: {known or 'none'}); {remedy}"
    )


def _base(name: str) -> str:
    """ "warp" of "warp_p3_c64_v48_float16"."""
    return name.partition("_")[0]


def _major(version: str) -> int:
    return int(version.partition(".")[0])


def _runs(architecture: int, capability: int) -> bool:
    if architecture >= OWN_CHIP_ONLY:
        return architecture == capability
    return architecture // 10 == capability // 10 and architecture <= capability


def _where(source: Source) -> str:
    return str(source.path if isinstance(source, Bundle) else source)


def _names(source: Source) -> Iterable[str]:
    return source.manifest.files if isinstance(source, Bundle) else [path.name for path in source.glob("*_sm*.json")]


def _content(source: Source, name: str, limit: int) -> bytes:
    """A file of at most `limit` bytes, which in a bundle is what the manifest states."""
    if isinstance(source, Bundle):
        spec = source.manifest.files.get(name)
        if spec is not None and spec.bytes > limit:
            raise BundleError(f"{source.path}: {name} has {spec.bytes} bytes; expected at most {limit}")
        return source.read(name)
    try:
        with (source / name).open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise BackendError(f"{source / name} cannot be read: {error.strerror}; build it again") from error
    if len(content) > limit:
        raise BackendError(f"{source / name}: over {limit} bytes; expected a kernel of flashcocos build")
    return content


def _read(sources: Sequence[Source], name: str, architecture: int, dtype: str, config: ModelConfig) -> Cubin:
    stem = f"{name}_sm{architecture}"
    source = next(source for source in sources if f"{stem}.json" in _names(source))
    try:
        fields = msgspec.json.decode(_content(source, f"{stem}.json", MAX_DESCRIPTION_BYTES))
        revision = fields.get("revision", 1) if isinstance(fields, dict) else None
        if revision != signatures.REVISION:
            raise BundleError(f"it is of revision {revision!r:.20}, expected {signatures.REVISION}")
        cubin = from_fields(Cubin, fields)
        stated = (cubin.kernel, cubin.cubin, cubin.architecture, cubin.dtype)
        if stated != (name, f"{stem}.cubin", architecture, dtype):
            raise BundleError(f"it describes {stated}")
        _check_constants(cubin.constants, name, config)
        _check_arguments(cubin.arguments, signatures.arguments(_base(name), dtype))
    except (ValueError, RecursionError, msgspec.DecodeError) as error:  # InputError and BundleError are ValueErrors
        raise BundleError(
            f"{_where(source)}: {stem}.json cannot be used: {error}; compile the kernels again"
        ) from error
    code = _content(source, f"{stem}.cubin", MAX_CUBIN_BYTES)
    if hashlib.sha256(code).hexdigest() != cubin.sha256:
        raise BundleError(
            f"{_where(source)}: {stem}.cubin is not the cubin that its description states; compile it again"
        )
    return msgspec.structs.replace(cubin, code=code)


def _check_arguments(stated: Sequence[Mapping[str, str]], expected: Mapping[str, str]) -> None:
    """Those of the kernel in their order, and then any of the hidden ones."""
    wanted = [{"name": name, "type": kind} for name, kind in expected.items()]
    hidden = [{"name": name, "type": "null"} for name in signatures.HIDDEN]
    if list(stated[: len(wanted)]) != wanted or not all(argument in hidden for argument in stated[len(wanted) :]):
        raise BundleError(f"arguments {list(stated)!r:.200}: expected those of this kernel, {dict(expected)}")


def _check_constants(constants: Mapping[str, int], name: str, config: ModelConfig) -> None:
    kernel, values = _base(name), config.warped_channels
    needed = {} if kernel == "pack" else {"C": config.feature_channels, "PATCH": config.patch}
    if kernel == "warp":
        needed |= {"V": values, "VP": signatures.padded_values(values)}
    for key, value in needed.items():
        if constants.get(key) != value:
            raise BundleError(f"constants: expected {key} = {value}, got {constants.get(key)!r}")
    for key, least in (("BN", 3), ("BC", 1)):  # the two outermost lanes of a tile of nine taps are no queries
        if constants.get(key, 0) < least:
            raise BundleError(f"constants: expected {key} of {least} or more, got {constants.get(key)!r}")
