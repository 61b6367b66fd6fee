"""`ServeConfig`: every setting and bound of the service, from a file, FLASHCOCOS_* variables and the command line."""

from __future__ import annotations

import ipaddress
import sys
import typing
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from ..config import from_fields
from ..errors import InputError
from ..files import read_text
from ..runtime.options import MAX_THREADS, EngineOptions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PREFIX = "FLASHCOCOS_"
_MAX_FILE = 1 << 20  # bytes of a settings or token file
_MIN_TOKEN = 16  # characters

Seconds = Annotated[float, Meta(gt=0, le=3600)]
Mib = Annotated[int, Meta(ge=1, le=1 << 20)]


class ServeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of the service.

    Attributes:
        model: bundle to serve; empty for the one that ships.
        host: address to listen on; beyond loopback a token file is demanded.
        port: TCP port; 0 for a free one.
        token_file: file of lines "NAME TOKEN"; empty for no tokens.
        hosts: names that a request's Host header may have; empty for loopback's names, or any beyond loopback.
        cors_origins: origins whose pages may call the service, as "https://example.org".
        backend, device, precision, warp, threads, tile: as in `EngineOptions`.
        batch: translations of one size that run together; 0 for 1 on a CPU and 4 on a GPU.
        workers: batches that run at once.
        codec_threads: threads that read and write pictures.
        queue: requests that may wait.
        queue_mib: bytes of requests in flight.
        token_share: share of the queue that one token may fill, where there are several.
        deadline_s: seconds from a request's headers to its answer.
        body_s: seconds that a request's body may take.
        drain_s: seconds that accepted requests get after SIGTERM.
        watchdog_s: seconds that a batch may always take; beyond, ten times what is expected of it.
        body_mib: largest body.
        mpixel: largest picture or label that is decoded, in 2**20 pixels.
        max_side: largest side of a result and of an encoded exemplar.
        label_mib, exemplar_mib: memory for labels and for encoded exemplars; the least recently used make room.
        exemplar_folder: folder that keeps exemplars and labels over restarts, and may be shared; empty for none.
        exemplar_folder_mib: of its exemplars; `label_mib` bounds its labels too.
        connections: open connections.
    """

    model: str = ""
    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    token_file: str = ""
    hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    backend: str = "auto"
    device: str = "auto"
    precision: str | None = None
    warp: str = "auto"
    threads: Annotated[int, Meta(ge=1, le=MAX_THREADS)] | None = None
    tile: int | None = None
    batch: Annotated[int, Meta(ge=0, le=64)] = 0
    workers: Annotated[int, Meta(ge=1, le=16)] = 1
    codec_threads: Annotated[int, Meta(ge=1, le=64)] = 2
    queue: Annotated[int, Meta(ge=1, le=4096)] = 32
    queue_mib: Mib = 256
    token_share: Annotated[float, Meta(gt=0, le=1)] = 0.5
    deadline_s: Seconds = 30.0
    body_s: Seconds = 15.0
    drain_s: Seconds = 30.0
    watchdog_s: Seconds = 60.0
    body_mib: Annotated[int, Meta(ge=1, le=64)] = 8
    mpixel: Annotated[int, Meta(ge=1, le=64)] = 4
    max_side: Annotated[int, Meta(ge=64, le=8192, multiple_of=32)] = 1024
    label_mib: Mib = 64
    exemplar_mib: Mib = 512
    exemplar_folder: str = ""
    exemplar_folder_mib: Mib = 1024
    connections: Annotated[int, Meta(ge=8, le=65536)] = 1024

    def __post_init__(self) -> None:
        if not self.loopback and not self.token_file:
            raise InputError(
                f"host: {self.host} is reachable from other machines, which needs a token_file "
                "(lines of NAME TOKEN); or listen on 127.0.0.1"
            )
        self.engine_options()

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the service."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError as error:
            raise InputError(f"host: expected an IP address or localhost, got {self.host!r}") from error

    def engine_options(self) -> EngineOptions:
        """What runs the model; `InputError` for options that exclude each other."""
        return EngineOptions(self.backend, self.device, self.precision, self.warp, self.threads, tile=self.tile)


def read_config(
    texts: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
    path: str | None = None,
) -> ServeConfig:
    """The settings of all sources; the later of file, environment and `texts` counts.

    Args:
        texts: field -> text, from the command line.
        environment: variables, of which those of a field's name count, as FLASHCOCOS_BATCH.
        path: a TOML file of fields.

    Raises:
        InputError: a source cannot be read, or a field is unknown or out of its bounds.
    """
    fields: dict[str, Any] = {}
    if path is not None:
        try:
            fields = tomllib.loads(read_text(path, _MAX_FILE))
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise InputError(f"{path}: not TOML: {error}") from error
    known = {PREFIX + name.upper(): name for name in ServeConfig.__struct_fields__}
    for name, text in (environment or {}).items():
        if name in known:
            fields[known[name]] = _parse(known[name], text)
    fields |= {name: _parse(name, text) for name, text in (texts or {}).items()}
    return from_fields(ServeConfig, fields)


def read_tokens(path: str) -> dict[str, bytes]:
    """The tokens of a file, by name; `InputError` for what is no such file."""
    tokens: dict[str, bytes] = {}
    for number, line in enumerate(read_text(path, _MAX_FILE).splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2 or len(words[1]) < _MIN_TOKEN or not line.isascii():
            raise InputError(
                f"{path}, line {number}: expected NAME TOKEN, the token of {_MIN_TOKEN} characters or more"
            )
        if words[0] in tokens:
            raise InputError(f"{path}, line {number}: {words[0]} is named twice")
        tokens[words[0]] = words[1].encode()
    if not tokens:
        raise InputError(f"{path}: no token in it; expected lines of NAME TOKEN")
    return tokens


def _parse(name: str, text: str) -> Any:
    """A text as the value that the field `name` has in TOML; what does not fit is left for `from_fields` to refuse."""
    kind = typing.get_type_hints(ServeConfig).get(name)
    if kind == tuple[str, ...]:
        return [part.strip() for part in text.split(",") if part.strip()]
    if kind in (str, typing.Union[str, None]):  # noqa: UP007
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
