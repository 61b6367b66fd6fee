"""`run`: the app under uvicorn, with an end that answers what was accepted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from ..errors import InputError
from .app import Service, build_app
from .config import ServeConfig
from .engine import LocalEngine

EXIT_STUCK = 70  # of sysexits: an internal error; a supervisor starts the service anew
_LAST_BYTES_S = 5  # for answers that are on their way when the queue is empty


class _Server(uvicorn.Server):
    """uvicorn that drains at the first signal and leaves at the second."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_s: float, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._service, self._drain_s, self._announce = service, drain_s, announce
        self._end: asyncio.Task[None] | None = None
        self.cut_off = False  # whether requests were left when the time to drain was over

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._stop, number)
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._announce()

    def _stop(self, number: int) -> None:
        if self._end is not None:
            os._exit(128 + number)
        self._end = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        try:
            await asyncio.wait_for(self._service.batcher.drain(), self._drain_s)
        except asyncio.TimeoutError:
            self.cut_off = True
        self.should_exit = True


def run(config: ServeConfig, announce: Callable[[str], None]) -> int:
    """Serve until SIGTERM or Ctrl-C.

    Args:
        config: all settings.
        announce: called with the address once the service listens.

    Returns:
        The exit code: 0 where every accepted request was answered.

    Raises:
        FlashcocosError: the model or a setting cannot be used, or the address is taken.
    """
    engine = LocalEngine(config)
    app = build_app(config, engine, on_stuck=lambda: os._exit(EXIT_STUCK))
    settings = uvicorn.Config(
        app,
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=config.connections,
        timeout_graceful_shutdown=_LAST_BYTES_S,
    )
    service: Service = app.state.service
    with _listen(config.host, config.port) as listener:
        host, port = listener.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        server = _Server(settings, service, config.drain_s, lambda: announce(address))
        server.run([listener])
    if server.cut_off:
        os._exit(1)  # and not wait for the engine
    engine.close()
    return 0


def _listen(host: str, port: int) -> socket.socket:
    # with its protocol named, for asyncio only then sends an answer's last bytes without waiting for 40 ms
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise InputError(f"cannot listen on {host}, port {port}: {error.strerror}; choose another --port") from error
    return listener
