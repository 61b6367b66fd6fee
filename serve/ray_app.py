"""The service on Ray Serve, for `flashcocos serve --ray` and `serve deploy`: `build_app`, one replica a device."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable
from typing import Any

import msgspec
from fastapi import FastAPI

from ..bundle import Bundle
from ..bundle.default_model import resolve_model
from ..config import from_fields
from ..errors import BackendError, InputError, printable
from ..runtime.cluster import connected, resources
from .app import Service, build_app
from .config import ServeConfig, read_tokens
from .engine import LocalEngine
from .server import EXIT_STUCK

_HEALTH_CHECK_S = 2.0  # between two; a replica that was killed is missed at the next


class Replica:
    """One process of the service; Ray builds its app once this object is there."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._service: Service | None = None

    def __serve_build_asgi_app__(self) -> FastAPI:
        os.environ["NUMBA_NUM_THREADS"] = str(self._config.threads)  # numba reads it as it is imported
        app = build_app(self._config, LocalEngine(self._config), on_stuck=lambda: os._exit(EXIT_STUCK))
        self._service = app.state.service
        return app

    async def check_health(self) -> None:
        """Ray asks before the first request, and then again and again; one that fails is replaced."""
        assert self._service is not None
        while not self._service.ready and not self._service.batcher.broken:
            await asyncio.sleep(0.05)
        if self._service.batcher.broken:
            raise RuntimeError("the engine has failed")


def app(settings: dict[str, Any]) -> Any:
    """What `serve deploy` builds: `import_path: flashcocos.serve.ray_app:app` with the settings as its `args`.

    Args:
        settings: Fields of `ServeConfig`, and `replicas` (default: 1).

    Returns:
        The application of Ray Serve.

    Raises:
        InputError: A setting is unknown or out of its bounds.
    """
    fields = dict(settings)
    replicas = fields.pop("replicas", 1)
    return application(from_fields(ServeConfig, fields), replicas)


def application(config: ServeConfig, replicas: int) -> Any:
    """The service as an application of Ray Serve, on the cluster that this process is connected to."""
    from ray import serve

    if not isinstance(replicas, int) or replicas < 1:
        raise InputError(f"replicas: expected a whole number, 1 or more, got {replicas!r}")
    if replicas > 1 and not config.exemplar_folder:
        raise InputError("replicas find exemplars in a folder that they share: --set exemplar_folder=FOLDER")
    Bundle(resolve_model(config.model or None))  # errors of these come here, and not as a replica that never starts
    if config.token_file:
        read_tokens(config.token_file)
    _, threads, reserved = resources(config.device, config.threads, replicas)
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="flashcocos",
        num_replicas=replicas,
        ray_actor_options=reserved,
        max_ongoing_requests=config.connections,  # the service's own queue refuses earlier, and says when to come back
        max_queued_requests=config.connections,
        graceful_shutdown_timeout_s=config.drain_s,
        health_check_period_s=_HEALTH_CHECK_S,
    )
    return deployment.bind(msgspec.structs.replace(config, threads=threads))


def run(config: ServeConfig, replicas: int, address: str, announce: Callable[[str], None]) -> int:
    """Serve on a Ray cluster until SIGTERM or Ctrl-C.

    Args:
        config: All settings.
        replicas: Processes that hold a model.
        address: Of the cluster, as for `runtime.cluster.connected`.
        announce: Called with the address once the service is ready.

    Returns:
        The exit code, 0.

    Raises:
        InputError: The model or a setting cannot be used.
        BackendError: There is no such cluster, or the replicas do not start on it.
    """
    if config.port == 0:
        raise InputError("port: Ray does not look for a free one; choose a --port")
    with connected(address):
        from ray import serve

        service = application(config, replicas)
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        try:
            with contextlib.suppress(KeyboardInterrupt):
                serve.start(http_options={"host": config.host, "port": config.port})
                serve.run(service, name="flashcocos", route_prefix="/", logging_config={"enable_access_log": False})
                announce(f"http://{config.host}:{config.port}")
                signal.pause()
        except (RuntimeError, ValueError) as error:
            raise BackendError(f"the replicas do not start: {printable(error)}; see Ray's logs") from error
        finally:
            serve.shutdown()
    return 0
