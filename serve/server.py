"""`run`: the app under uvicorn, with an end that answers what was accepted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from .app import Service, build_app
from .config import ServeConfig
from .engine import LocalEngine

_EXIT_STUCK = 70  # of sysexits: an internal error; a supervisor starts the service anew


class _Server(uvicorn.Server):
    """uvicorn that drains at the first signal and leaves at the second."""

    def __init__(
        self, config: uvicorn.Config, service: Service, drain_s: float, announce: Callable[[str], None]
    ) -> None:
        super().__init__(config)
        self._service, self._drain_s, self._announce = service, drain_s, announce
        self._end: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop, number)
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        self._announce(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    def _stop(self, number: int) -> None:
        if self._end is not None:
            os._exit(128 + number)
        self._end = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._service.batcher.drain(), self._drain_s)
        self.should_exit = True


def run(config: ServeConfig, announce: Callable[[str], None]) -> int:
    """Serve until SIGTERM or Ctrl-C.

    Args:
        config: all settings.
        announce: called with the address once the service listens.

    Returns:
        The exit code: 0.

    Raises:
        FlashcocosError: the model or a setting cannot be used.
    """
    engine = LocalEngine(config)
    app = build_app(config, engine, on_stuck=lambda: os._exit(_EXIT_STUCK))
    settings = uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=config.connections,
        timeout_graceful_shutdown=5,
    )
    _Server(settings, app.state.service, config.drain_s, announce).run()
    engine.close()
    return 0
