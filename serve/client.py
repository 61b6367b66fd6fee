"""`Client` and `AsyncClient`: a running service, called as a `Translator` is.

    with Client("http://127.0.0.1:8000") as client:
        exemplar = client.encode_exemplar("portrait.png", "portrait_label.png")
        result = client.translate("label.png", exemplar)

Where the service is full or starting (429, 503) the request is sent again, after the time that the service itself asks.
"""

from __future__ import annotations

import asyncio
import base64
import io
import os
import random
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import httpx
import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from ..config import Size, from_fields
from ..errors import InputError
from ..runtime import Translation
from .errors import ApiError
from .wire import ErrorReply, ExemplarReply, LabelReply, ModelReply, TranslationReply, write_label, write_png

T = TypeVar("T")
Reply = TypeVar("Reply", bound=msgspec.Struct)
Source: TypeAlias = "str | os.PathLike[str] | bytes | npt.NDArray[np.uint8]"
_Flow = Generator[httpx.Request, httpx.Response, T]
_LONGEST_WAIT = 60.0  # seconds


class _Calls:
    """What both clients ask, as generators: each yields requests, is sent the answers, and returns the result."""

    def __init__(self, url: str, token: str | None, retries: int) -> None:
        self._url, self._retries = url.rstrip("/"), retries
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def _request(self, method: str, path: str, body: bytes | None = None, **query: str | None) -> httpx.Request:
        params = {name: value for name, value in query.items() if value is not None}
        return httpx.Request(method, f"{self._url}{path}", params=params, headers=self._headers, content=body)

    def _model(self) -> _Flow[ModelReply]:
        return _reply(ModelReply, (yield self._request("GET", "/v1/model")))

    def _encode(self, image: Source, label: Source | None, size: Size) -> _Flow[ExemplarReply]:
        label_id = None
        if label is not None:
            answer = yield self._request("PUT", "/v1/labels", _body(label, write_label))
            label_id = _reply(LabelReply, answer).id
        body = _body(image, write_png)
        return _reply(
            ExemplarReply, (yield self._request("PUT", "/v1/exemplars", body, label=label_id, size=_text(size)))
        )

    def _translate(self, label: Source, exemplar: ExemplarReply | str, size: Size) -> _Flow[Translation]:
        key = exemplar if isinstance(exemplar, str) else exemplar.id
        body = _body(label, write_label)
        answer = yield self._request("POST", f"/v1/exemplars/{key}/translate", body, size=_text(size), want="all")
        return _translation(_reply(TranslationReply, answer))

    def _wait(self, answer: httpx.Response, attempt: int) -> float | None:
        """Seconds until the request is sent again; None where this answer is the last."""
        if answer.status_code not in (429, 503) or attempt >= self._retries:
            return None
        text = answer.headers.get("retry-after", "1")
        seconds = float(text) if text.isdecimal() else 1.0
        return min(_LONGEST_WAIT, seconds) * random.uniform(1.0, 1.25)  # so that not all come back at once


class Client(_Calls):
    """A service at `url`. Threads may share it; use as a context manager or call `close`.

    Args:
        url: of the service, as "http://127.0.0.1:8000".
        token: of the service's token file, where it has one.
        retries: times that a refused request is sent again.
        timeout: seconds without a byte after which a request is given up.
    """

    def __init__(
        self, url: str = "http://127.0.0.1:8000", token: str | None = None, *, retries: int = 5, timeout: float = 60.0
    ) -> None:
        super().__init__(url, token, retries)
        self._http = httpx.Client(timeout=timeout)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def model(self) -> ModelReply:
        """The model, its classes and the service's bounds."""
        return self._run(self._model())

    def encode_exemplar(self, image: Source, label: Source | None = None, size: Size = None) -> ExemplarReply:
        """Have an exemplar encoded, once for any number of translations.

        Args:
            image: path or bytes of a PNG, JPEG or WebP, or an array (H, W, 3) of uint8.
            label: path or bytes of its label, or an array, for models that want one.
            size: as for `Translator.encode_exemplar`.

        Returns:
            Its id and size. After a restart the service may not know it: `ApiError` with code "exemplar_unknown".

        Raises:
            ApiError: the service refuses it.
            httpx.HTTPError: the service cannot be reached.
        """
        return self._run(self._encode(image, label, size))

    def translate(self, label: Source, exemplar: ExemplarReply | str, size: Size = None) -> Translation:
        """Translate a label.

        Args:
            label: path or bytes of a PNG of class ids or an .npz of planes, or an array of uint8.
            exemplar: result of `encode_exemplar`, or an id.
            size: as for `Translator.translate`.

        Returns:
            What `Translator.translate` returns, its confidence in steps of 1/255.

        Raises:
            ApiError: the service refuses it.
            httpx.HTTPError: the service cannot be reached.
        """
        return self._run(self._translate(label, exemplar, size))

    def _run(self, flow: _Flow[T]) -> T:
        try:
            request = next(flow)
            while True:
                request = flow.send(self._send(request))
        except StopIteration as stop:
            result: T = stop.value
            return result

    def _send(self, request: httpx.Request) -> httpx.Response:
        attempt = 0
        while (wait := self._wait(answer := self._http.send(request), attempt)) is not None:
            time.sleep(wait)
            attempt += 1
        return answer


class AsyncClient(_Calls):
    """As `Client`, with coroutines; use as an asynchronous context manager or await `close`."""

    def __init__(
        self, url: str = "http://127.0.0.1:8000", token: str | None = None, *, retries: int = 5, timeout: float = 60.0
    ) -> None:
        super().__init__(url, token, retries)
        self._http = httpx.AsyncClient(timeout=timeout)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def model(self) -> ModelReply:
        """As `Client.model`."""
        return await self._run(self._model())

    async def encode_exemplar(self, image: Source, label: Source | None = None, size: Size = None) -> ExemplarReply:
        """As `Client.encode_exemplar`."""
        return await self._run(self._encode(image, label, size))

    async def translate(self, label: Source, exemplar: ExemplarReply | str, size: Size = None) -> Translation:
        """As `Client.translate`."""
        return await self._run(self._translate(label, exemplar, size))

    async def _run(self, flow: _Flow[T]) -> T:
        try:
            request = next(flow)
            while True:
                request = flow.send(await self._send(request))
        except StopIteration as stop:
            result: T = stop.value
            return result

    async def _send(self, request: httpx.Request) -> httpx.Response:
        attempt = 0
        while (wait := self._wait(answer := await self._http.send(request), attempt)) is not None:
            await asyncio.sleep(wait)
            attempt += 1
        return answer


def _reply(kind: type[Reply], answer: httpx.Response) -> Reply:
    """The body of an answer; `ApiError` for one that is no success."""
    try:
        fields = msgspec.json.decode(answer.content)
        if answer.is_success:
            return from_fields(kind, fields)
        problem = from_fields(ErrorReply, fields).error
    except (msgspec.DecodeError, UnicodeDecodeError, InputError) as error:
        raise ApiError(
            answer.status_code, "not_flashcocos", f"{answer.url} is no flashcocos service of this version: {error}"
        ) from error
    raise ApiError(answer.status_code, problem.code, f"{problem.message} (request {problem.request_id})")


def _translation(reply: TranslationReply) -> Translation:
    matches = np.frombuffer(base64.b64decode(reply.matches), "<u2").astype(np.float32)
    return Translation(
        image=_pixels(reply.image),
        warped=_pixels(reply.warped),
        confidence=_pixels(reply.confidence).astype(np.float32) / np.float32(255),
        matches=matches.reshape(reply.map.height, reply.map.width, 2),
        exemplar_size=reply.exemplar_size,
        timings=reply.timings,
    )


def _pixels(text: str) -> npt.NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text)), formats=("PNG",)))


def _body(source: Source, write: Any) -> bytes:
    if isinstance(source, bytes):
        return source
    data: bytes = write(source) if isinstance(source, np.ndarray) else Path(source).read_bytes()
    return data


def _text(size: Size) -> str | None:
    return "x".join(map(str, size)) if isinstance(size, tuple) else None if size is None else str(size)
