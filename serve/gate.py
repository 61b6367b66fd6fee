"""`Gate`: what every request passes first, in pure ASGI: names, tokens, headers of safety, errors as JSON, counting."""

from __future__ import annotations

import hmac
import logging
import math
import secrets
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import FlashcocosError, InputError, printable
from .errors import ApiError
from .kserve import Refusal
from .metrics import Metrics
from .wire import ErrorReply, Problem

_log = logging.getLogger("flashcocos.serve")
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_SAFETY = {
    "content-security-policy": CSP,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
_KSERVE = "/v2"
_GUARDED = ("/v1/", "/v2", "/metrics", "/openapi.json")
_OPEN = "/v2/health/"  # says no more than /readyz


class Gate:
    """Middleware around an app.

    Args:
        app: what answers.
        tokens: token by name; empty for none.
        hosts: names that the header Host may have; empty for any.
        origins: origins other than the service's own whose pages may call it.
        metrics: where answers are counted.
        max_body: bytes; the connection of a larger body is closed with the refusal.
    """

    def __init__(
        self,
        app: ASGIApp,
        tokens: Mapping[str, bytes],
        hosts: tuple[str, ...],
        origins: tuple[str, ...],
        metrics: Metrics,
        max_body: int,
    ) -> None:
        self._app, self._tokens, self._hosts, self._origins = app, tokens, hosts, origins
        self._metrics, self._max_body = metrics, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or have it answered."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, start, status = Headers(scope=scope), time.perf_counter(), 0
        request_id = secrets.token_hex(8)

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                marked = MutableHeaders(scope=message)
                marked["x-request-id"] = request_id
                for name, value in _SAFETY.items():
                    marked[name] = value
                if not self._drains(headers):
                    marked["connection"] = "close"
            await send(message)

        try:
            scope.setdefault("state", {})["owner"] = self._check(scope["path"], headers)
            await self._app(scope, receive, send_marked)
        except Exception as error:
            if status:
                raise  # an answer has begun: the host closes the connection
            await _send_error(explain(error, request_id), request_id, scope["path"].startswith(_KSERVE), send_marked)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.request_seconds.labels(route).observe(time.perf_counter() - start)

    def _check(self, path: str, headers: Headers) -> str:
        """The name of the request's token, "" where none is asked for; `ApiError` for what may not in."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._hosts and _host_name(host) not in self._hosts:
            raise ApiError(400, "malformed", "the header Host names another service; see the setting hosts")
        if origin and origin not in self._origins and origin.partition("://")[2] != host:
            raise ApiError(403, "origin", "pages of other origins may not call this service; see cors_origins")
        if not self._tokens or not path.startswith(_GUARDED) or path.startswith(_OPEN):
            return ""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        matches = [name for name, known in self._tokens.items() if hmac.compare_digest(known, token.encode())]
        if scheme.lower() != "bearer" or not matches:
            wanted = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, "unauthorized", "give a token: Authorization: Bearer TOKEN", headers=wanted)
        return matches[0]

    def _drains(self, headers: Headers) -> bool:
        """Whether the rest of a body that nobody reads is small enough to wait for."""
        return "transfer-encoding" not in headers and int(headers.get("content-length", "0")) <= self._max_body


def _host_name(host: str) -> str | None:
    """Without the port and brackets; None for what is no host."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def explain(error: Exception, request_id: str) -> ApiError:
    """What a caller is told of an exception; what is not the caller's doing goes to the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        return ApiError(422, "invalid", str(error))
    if isinstance(error, FlashcocosError | MemoryError):
        _log.error("request %s: %s", request_id, printable(error))
        return ApiError(503, "engine_failed", "the model failed on this request", 5)
    _log.exception("request %s", request_id, exc_info=error)
    return ApiError(500, "internal", "the service failed; its log has the reason under this request id")


async def _send_error(error: ApiError, request_id: str, kserve: bool, send: Send) -> None:
    """kserve: in the form of that protocol, a string, which its clients rely on."""
    reply = Refusal(f"{error.code}: {error}") if kserve else ErrorReply(Problem(error.code, str(error), request_id))
    body = msgspec.json.encode(reply)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    if error.retry_after is not None:
        headers.append((b"retry-after", str(math.ceil(error.retry_after)).encode()))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
