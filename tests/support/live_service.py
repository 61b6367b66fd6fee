"""The service on a real socket in a thread of the test, over any engine."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from flashcocos.serve.app import Service, build_app
from flashcocos.serve.config import ServeConfig, read_config
from flashcocos.serve.engine import Engine


class Live:
    """A running service: its `service`, `port` and `url`."""

    def __init__(self, service: Service, port: int) -> None:
        self.service, self.port, self.url = service, port, f"http://127.0.0.1:{port}"

    def until(self, happens: Any, seconds: float = 20) -> None:
        """Wait until `happens()` is true."""
        end = time.monotonic() + seconds
        while not happens():
            assert time.monotonic() < end, "it never happened"
            time.sleep(0.005)


@contextlib.contextmanager
def live(engine: Engine, config: ServeConfig | None = None, **options: Any) -> Iterator[Live]:
    """Run `build_app` over `engine` until the block ends; wait until it is ready."""
    app = build_app(config or read_config(), engine, **options)
    listener = socket.create_server(("127.0.0.1", 0))
    settings = uvicorn.Config(app, ws="none", log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    running = Live(app.state.service, listener.getsockname()[1])
    try:
        running.until(lambda: server.started and (running.service.ready or running.service.batcher.broken))
        yield running
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
