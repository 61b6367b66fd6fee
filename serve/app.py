"""`build_app`: the ASGI app of the service. Its routes are the methods of `Service`."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import numpy as np
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from PIL import __version__ as pillow_version
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from .. import __version__
from ..bundle.default_model import PAIRS
from ..config import MIN_SIDE, SIZE_MULTIPLE
from ..errors import BackendError
from ..preprocess.labels import resize_nearest
from ..runtime import Exemplar, Translation
from ..runtime.lru import LruBytes
from ..runtime.translator import resolve_size
from . import kserve, wire
from .batcher import Batcher, Ticket
from .config import ServeConfig, read_tokens
from .engine import Engine, Label
from .errors import ApiError
from .exemplars import ExemplarStore, Folder, Source, source_bytes
from .gate import Gate
from .metrics import Metrics
from .openapi import ROUTES, complete

T = TypeVar("T")
_log = logging.getLogger("flashcocos.serve")
_PILLOW = 13  # the first without CVE-2026-112403, a heap overflow in the decoder of JPEG
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_PAGE = Path(__file__).parent / "page"
_PAGE_TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript",
               ".svg": "image/svg+xml", ".png": "image/png"}  # fmt: skip
Size = Annotated[str | None, Query(description='SIDE, HEIGHTxWIDTH or "input"', examples=["128", "128x160"])]


class Service:
    """The state of one app, and its routes.

    Attributes:
        batcher: the queue in front of the engine.
        ready: whether the engine has passed its first translation.
        on_stuck: called once where a batch never ends; None to stay unready until the host restarts the process.
    """

    def __init__(self, config: ServeConfig, engine: Engine, on_stuck: Callable[[], None] | None = None) -> None:
        self.config, self.engine, self.on_stuck = config, engine, on_stuck
        self.model = engine.describe()
        self.metrics = Metrics()
        self.ready = False
        tokens = read_tokens(config.token_file) if config.token_file else {}
        self.tokens = tokens
        self.batch = config.batch or (4 if self.model.on_gpu else 1)
        self.max_pixels, self.max_body = config.mpixel << 20, config.body_mib << 20
        self.batcher = Batcher(
            self._work,
            batch=self.batch,
            workers=config.workers,
            queue=config.queue,
            max_bytes=config.queue_mib << 20,
            share=max(1, int(config.token_share * config.queue)) if len(tokens) > 1 else None,
            patience=config.watchdog_s,
            on_batch=self._count_batch,
        )
        self._codec_threads = ThreadPoolExecutor(config.codec_threads, "flashcocos-codec")
        self.labels: LruBytes[bytes] = LruBytes(config.label_mib << 20, len)
        folder = config.exemplar_folder
        self.label_folder = Folder(folder, config.label_mib << 20, bytes, ".label") if folder else None
        self.demo_labels: dict[str, bytes] = {}
        self.demo, sources = self._read_demo()
        self.exemplars = ExemplarStore(
            self._encode,
            self._codec,
            config.exemplar_mib << 20,
            Folder(folder, config.exemplar_folder_mib << 20, Source, ".exemplar") if folder else None,
            sources,
            lambda result: self.metrics.lookups.labels(result).inc(),
        )
        self._add_gauges()

    # what runs in threads

    async def _codec(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._codec_threads, function, *arguments)

    def _work(self, key: Hashable, payloads: Sequence[Any]) -> Sequence[Any]:
        """A batch of the queue: exemplars to encode, or labels of one size to translate."""
        if key == "encode":
            return [self._encode_now(source) for source in payloads]
        return self.engine.translate([label for label, _ in payloads], [exemplar for _, exemplar in payloads])

    def _encode_now(self, source: Source) -> Exemplar:
        start = time.perf_counter()
        label = None if source.label is None else wire.read_label(self.model.config, source.label, self.max_pixels)
        exemplar = self.engine.encode(wire.read_picture(source.image, self.max_pixels), label)
        self.metrics.encode_seconds.observe(time.perf_counter() - start)
        return exemplar

    async def _encode(self, source: Source) -> Exemplar:
        """Encode in turn. The ticket is no caller's own, for several may wait; each of them was admitted."""
        height, width = source.size
        megapixels = height * width / 1e6
        with Ticket(self.batcher, "", source_bytes(source), megapixels, math.inf) as ticket:
            exemplar: Exemplar = await ticket.run("encode", source)
            return exemplar

    def _count_batch(self, size: int, waited: float) -> None:
        self.metrics.batch_items.observe(size)
        self.metrics.queue_wait_seconds.observe(waited)

    # start and end

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """From the first request that can come to the last."""
        tasks = [asyncio.create_task(self._test_itself()), asyncio.create_task(self._watch())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            self.batcher.close()
            self._codec_threads.shutdown(wait=False, cancel_futures=True)

    async def _test_itself(self) -> None:
        """A first translation, which also tells how long one takes."""
        config = self.model.config
        size = config.image_size, config.image_size
        blank = np.zeros(size if config.label_kind == "classes" else (config.label_channels, *size), np.uint8)
        label = wire.write_label(blank) if config.condition_on_label else None
        source = Source(wire.write_png(np.zeros((*size, 3), np.uint8)), label, None, size)
        try:
            exemplar = await self._encode(source)
            with Ticket(self.batcher, "", 0, size[0] * size[1] / 1e6, math.inf) as ticket:
                await ticket.run(blank.shape, (blank, exemplar))
            self.ready = True
        except Exception:
            _log.exception("the first translation failed")
            self.batcher.broken = True

    async def _watch(self) -> None:
        while not self.batcher.is_stuck():
            await asyncio.sleep(1)
        _log.error("a batch takes ten times what is expected of it: the engine is stuck")
        self.batcher.broken = True
        if self.on_stuck:
            self.on_stuck()

    # admission

    def _admit(self, request: Request, size: tuple[int, int] | None) -> Ticket:
        """A place for a request, by its headers alone; `size` is that of the work, None for none."""
        length = request.headers.get("content-length")
        nbytes = int(length) if length else self.max_body  # the host has checked the number
        if nbytes > self.max_body:
            raise ApiError(413, "too_large", f"a body of {nbytes} bytes; expected at most {self.max_body}")
        seconds = self.config.deadline_s
        if wanted := request.headers.get("x-deadline-ms"):
            if not re.fullmatch("[1-9][0-9]{0,6}", wanted):
                raise ApiError(422, "invalid", "X-Deadline-Ms: expected milliseconds, a whole number from 1 to 9999999")
            seconds = min(seconds, int(wanted) / 1000)
        try:
            if not self.ready and not self.batcher.broken:
                raise ApiError(503, "starting", "the service is starting; ask again", 1)
            return self.batcher.admit(request.state.owner, nbytes, size[0] * size[1] / 1e6 if size else 0.0, seconds)
        except ApiError as error:
            self.metrics.refused.labels(error.code).inc()
            raise

    def _size(self, text: str | None, source: tuple[int, int] | None) -> tuple[int, int]:
        """The size that a request asks for, of a source that may not be known yet; within the bounds."""
        wanted = wire.parse_size(text)
        if wanted == "input" and source is None:
            wanted = None
        size = resolve_size(self.model.config, wanted, source or (0, 0))
        if max(size) > self.config.max_side and text is not None:
            raise ApiError(
                422, "invalid", f"size: {size[0]} x {size[1]}; expected at most {self.config.max_side} a side"
            )
        return size

    async def _body(self, request: Request, ticket: Ticket) -> bytes:
        """The request's body, bounded in bytes and time."""

        async def collect() -> bytes:
            parts, total = [], 0
            async for part in request.stream():
                total += len(part)
                if total > self.max_body:
                    raise ApiError(413, "too_large", f"the body is larger than {self.max_body} bytes")
                parts.append(part)
            return b"".join(parts)

        try:
            body = await asyncio.wait_for(collect(), min(self.config.body_s, max(0.001, ticket.seconds_left)))
        except ClientDisconnect:
            raise self._gone("body") from None
        except asyncio.TimeoutError:
            raise ApiError(408, "body_timeout", f"the body did not come within {self.config.body_s:g} s") from None
        if not body:
            raise ApiError(400, "malformed", "the body is empty; expected a file")
        ticket.set_bytes(len(body))
        return body

    async def _unless_gone(self, request: Request, ticket: Ticket, work: Awaitable[T]) -> T:
        """The result of `work`, which is cancelled at the deadline and where the client goes away."""
        task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(request))
        try:
            await asyncio.wait({task, gone}, timeout=max(0, ticket.seconds_left), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            where = "queue" if ticket.waits else "running"
            if gone.done():
                raise self._gone(where)
            self.metrics.cancelled.labels(where).inc()
            raise ApiError(504, "deadline", "the deadline has passed")
        finally:
            gone.cancel()
            task.cancel()

    def _gone(self, where: str) -> ApiError:
        """For the log of requests alone: nobody reads this answer."""
        self.metrics.cancelled.labels(where).inc()
        return ApiError(499, "gone", "the client went away")

    # routes

    async def put_label(self, request: Request) -> Response:
        """Keep a label, for an exemplar that needs one."""
        with self._admit(request, None) as ticket:
            body = await self._body(request, ticket)
            data, reply = await self._codec(self._make_label, body)
            known = reply.id in self.demo_labels or self.labels.get(reply.id) is not None
            if not known:
                self.labels.put(reply.id, data)
            if self.label_folder and reply.id not in self.demo_labels:  # each time, for the folder may have made room
                await self._codec(self.label_folder.write, reply.id, data)
        return _json(reply, 200 if known else 201)

    async def get_label(self, id: str) -> Response:
        """The label, as PNG of class ids or .npz of planes."""
        return _file(await self._label(id))

    async def put_exemplar(self, request: Request, label: str | None = None, size: Size = None) -> Response:
        """Encode an exemplar, for any number of translations."""
        self._require_exemplar_label(label is not None, "PUT /v1/labels, then ?label=ID")
        kept = await self._label(label) if label is not None else None
        self._size(size, None)
        with self._admit(request, None) as ticket:
            body = await self._body(request, ticket)

            async def encode() -> tuple[str, Source, bool]:
                source = await self._codec(self._make_source, body, kept, label, size)
                key = self._exemplar_id(body, source)
                ticket.waits = False  # its encoding has a ticket of its own
                _, new = await self.exemplars.put(key, source)
                return key, source, new

            key, source, new = await self._unless_gone(request, ticket, encode())
        return _json(self._exemplar_reply(key, source), 201 if new else 200)

    async def get_exemplar(self, id: str) -> Response:
        """What is known of an exemplar."""
        return _json(self._exemplar_reply(id, await self.exemplars.source(id)))

    async def delete_exemplar(self, id: str) -> Response:
        """Forget an exemplar."""
        await self.exemplars.delete(id)
        return Response(status_code=204)

    async def get_exemplar_image(self, id: str) -> Response:
        """The exemplar's picture, at the size that matches refer to."""
        return _file((await self.exemplars.source(id)).image)

    async def get_exemplar_label(self, id: str) -> Response:
        """The exemplar's label, at the same size."""
        label = (await self.exemplars.source(id)).label
        if label is None:
            raise ApiError(404, "label_unknown", "this exemplar has no label")
        return _file(label)

    async def translate(
        self, request: Request, id: str, size: Size = None, want: Literal["image", "all"] = "image"
    ) -> Response:
        """Translate a label into a picture in the look of an exemplar."""
        await self.exemplars.source(id)
        with self._admit(request, self._size(size, None)) as ticket:
            body = await self._body(request, ticket)
            return await self._unless_gone(request, ticket, self._translated(ticket, body, id, size, want))

    async def _translated(self, ticket: Ticket, body: bytes, id: str, size: str | None, want: str) -> Response:
        clock = [time.perf_counter()]
        label = await self._codec(self._fit_label, body, size)
        ticket.set_bytes(len(body) + label.nbytes)
        clock.append(time.perf_counter())
        entry = await self.exemplars.get(id)
        result = await self._run(ticket, label, entry.exemplar)
        clock.append(time.perf_counter())
        data = await self._codec(wire.translation_reply if want == "all" else _image_png, result)
        clock.append(time.perf_counter())
        timing = {
            "decode": (clock[1] - clock[0]) * 1e3,
            "queue": ticket.waited * 1e3,
            "engine": (clock[2] - clock[1] - ticket.waited) * 1e3,
            **result.timings,
            "encode": (clock[3] - clock[2]) * 1e3,
        }
        kind = "application/json" if want == "all" else "image/png"
        return Response(data, media_type=kind, headers={"server-timing": wire.server_timing(timing)})

    async def _run(self, ticket: Ticket, label: Label, exemplar: Exemplar) -> Translation:
        """Translate in turn."""
        ticket.megapixels = label.shape[-2] * label.shape[-1] / 1e6
        result: Translation = await ticket.run(label.shape, (label, exemplar))
        ticket.megapixels = 0.0
        for stage, milliseconds in result.timings.items():
            self.metrics.stage_seconds.labels(stage).observe(milliseconds / 1e3)
        return result

    async def get_model(self) -> Response:
        """The model, its classes and the bounds of the service."""
        config, model = self.model.config, self.model
        return _json(
            wire.ModelReply(
                name=model.name,
                id=model.id,
                version=__version__,
                task=config.task,
                label_kind=config.label_kind,
                label_channels=config.label_channels,
                class_names=model.class_names,
                palette=model.palette,
                exemplar_needs_label=config.condition_on_label,
                sizes=wire.Sizes(
                    (config.image_size, config.image_size),
                    SIZE_MULTIPLE,
                    MIN_SIDE,
                    self.config.max_side,
                    config.warp_stride,
                ),
                limits=wire.Limits(
                    self.max_body, self.max_pixels, self.config.queue, self.batch, self.config.deadline_s
                ),
                stages=model.stages,
                demo=self.demo,
            )
        )

    async def health(self) -> Response:
        """200 as long as the process answers."""
        return Response(b"ok", media_type="text/plain")

    async def readiness(self) -> Response:
        """200 where translations are accepted, else 503."""
        if self.is_ready():
            return Response(b"ready", media_type="text/plain")
        if self.batcher.draining:
            raise ApiError(503, "draining", "the service is shutting down", 5)
        raise ApiError(503, "engine_failed" if self.batcher.broken else "starting", "not ready", 1)

    async def v2_server(self) -> Response:
        """What answers, by the protocol KServe v2."""
        return _json(kserve.ServerMetadata("flashcocos", __version__, ["binary_tensor_data"]))

    async def v2_model(self, name: str) -> Response:
        """The model's tensors, by the protocol KServe v2."""
        self._require_model(name)
        return _json(kserve.metadata(self.model.config, name, __version__))

    async def v2_model_ready(self, name: str) -> Response:
        """200 where the model translates, else 503, by the protocol KServe v2."""
        self._require_model(name)
        await self.readiness()
        return _json(kserve.ModelReady(name, True))

    async def v2_infer(self, request: Request, name: str) -> Response:
        """Translate a label as tensors, by the protocol KServe v2."""
        self._require_model(name)
        with self._admit(request, self._size(None, None)) as ticket:
            body = await self._body(request, ticket)
            return await self._unless_gone(
                request, ticket, self._inferred(ticket, body, request.headers.get(kserve.HEADER))
            )

    async def _inferred(self, ticket: Ticket, body: bytes, header: str | None) -> Response:
        inference = await self._codec(kserve.read_request, self.model.config, body, header)
        label, source = await self._codec(self._fit_tensors, inference.arrays)
        ticket.set_bytes(len(body) + label.nbytes)
        if source is None:
            key = inference.exemplar_id
            entry = await self.exemplars.get(key)
        else:
            key = self._exemplar_id(source.image, source)
            entry, _ = await self.exemplars.put(key, source)
        result = await self._run(ticket, label, entry.exemplar)
        reply = await self._codec(kserve.write_reply, self.model.config, self.model.name, inference, result, key)
        return Response(reply.body, media_type=reply.media_type, headers=reply.headers)

    async def get_metrics(self) -> Response:
        """In Prometheus's text format."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def is_ready(self) -> bool:
        """Whether translations are accepted."""
        return self.ready and not self.batcher.draining and not self.batcher.broken

    # helpers of the routes

    def _make_label(self, body: bytes) -> tuple[bytes, wire.LabelReply]:
        label = wire.read_label(self.model.config, body, self.max_pixels)
        data = wire.write_label(label)
        key = wire.content_id(str(label.shape).encode(), label.tobytes())
        return data, wire.LabelReply(key, (label.shape[-2], label.shape[-1]), len(data))

    def _make_source(self, body: bytes, label: bytes | None, label_id: str | None, size: str | None) -> Source:
        picture = wire.read_picture(body, self.max_pixels)
        wanted = self._size(size, (picture.height, picture.width))
        fitted = None
        if label is not None:
            fitted = wire.fit_label(wire.read_label(self.model.config, label, self.max_pixels), wanted)
        return Source(wire.fit_picture(picture, wanted), fitted, label_id, wanted)

    def _exemplar_id(self, body: bytes, source: Source) -> str:
        """The same for the same model, picture, label and size, on every replica."""
        parts = self.model.id, source.label_id or "", "{}x{}".format(*source.size)
        return wire.content_id(body, *map(str.encode, parts))

    def _fit_label(self, body: bytes, size: str | None) -> Label:
        label = wire.read_label(self.model.config, body, self.max_pixels)
        return resize_nearest(label, self._size(size, (label.shape[-2], label.shape[-1])))

    def _fit_tensors(self, arrays: Mapping[str, Any]) -> tuple[Label, Source | None]:
        """The label at the size of its result, and the exemplar, where one is given, at the size of its encoding."""
        label = wire.check_label(self.model.config, arrays["label"], self.max_pixels)
        label = resize_nearest(label, self._size("input", (label.shape[-2], label.shape[-1])))
        if "exemplar" not in arrays:
            return label, None
        own = arrays.get("exemplar_label")
        self._require_exemplar_label(own is not None, "add the input exemplar_label")
        picture = wire.check_picture(arrays["exemplar"], self.max_pixels)
        size, fitted, key = self._size("input", (picture.height, picture.width)), None, None
        if own is not None:
            fitted = wire.fit_label(wire.check_label(self.model.config, own, self.max_pixels), size)
            key = wire.content_id(fitted)
        return label, Source(wire.fit_picture(picture, size), fitted, key, size)

    def _require_exemplar_label(self, given: bool, remedy: str) -> None:
        if given != self.model.config.condition_on_label:
            text = "takes no label" if given else f"needs the exemplar's label: {remedy}"
            raise ApiError(422, "invalid", f"label: a model for {self.model.config.task} {text}")

    def _require_model(self, name: str) -> None:
        if name != self.model.name:
            raise ApiError(404, "not_found", f"no model of this name; this service has {self.model.name}")

    async def _label(self, key: str) -> bytes:
        entry = self.demo_labels.get(key) or self.labels.get(key)
        if entry is None and self.label_folder:
            entry = await self._codec(self.label_folder.read, key)
        if entry:
            return entry
        raise ApiError(404, "label_unknown", "no label of this id: put it (again, after a restart)")

    def _exemplar_reply(self, key: str, source: Source) -> wire.ExemplarReply:
        return wire.ExemplarReply(key, source.size, self.exemplars.size(key), source.label_id)

    def _read_demo(self) -> tuple[list[wire.DemoPair], dict[str, Source]]:
        """The inputs that ship with flashcocos, where the model is of their kind."""
        config = self.model.config
        pairs: list[wire.DemoPair] = []
        sources: dict[str, Source] = {}
        if (config.task, config.label_channels, config.condition_on_label) != ("avatars", 12, True):
            return pairs, sources
        for line in PAIRS.read_text().splitlines()[1:]:
            label, image, exemplar_label = ((PAIRS.parent / name).read_bytes() for name in line.split(","))
            (data, reply), (exemplar_data, exemplar_reply) = map(self._make_label, (label, exemplar_label))
            self.demo_labels |= {reply.id: data, exemplar_reply.id: exemplar_data}
            source = self._make_source(image, exemplar_data, exemplar_reply.id, None)
            key = self._exemplar_id(image, source)
            sources[key] = source
            pairs.append(wire.DemoPair(Path(line.split(",")[0]).stem, reply.id, key, exemplar_reply.id))
        return pairs, sources

    def _add_gauges(self) -> None:
        gauge, batcher = self.metrics.gauge, self.batcher
        gauge("queue_items", "Requests that wait", lambda: batcher.waiting)
        gauge("queue_bytes", "Bytes of requests in work", lambda: batcher.bytes)
        gauge("inflight", "Requests in work", lambda: batcher.tickets)
        gauge("exemplars", "Encoded exemplars", lambda: len(self.exemplars.entries))
        gauge("exemplar_bytes", "Memory of encoded exemplars", lambda: self.exemplars.entries.bytes)
        gauge("ready", "Whether translations are accepted", self.is_ready)
        backend = self.model.stages["query"]["backend"]
        self.metrics.build_info(version=__version__, model=self.model.name, backend=backend)


def build_app(config: ServeConfig, engine: Engine, on_stuck: Callable[[], None] | None = None) -> FastAPI:
    """The service as an ASGI app, for uvicorn or any other host.

    Args:
        config: all settings; those of the listener (host, port, connections) are for the host.
        engine: what translates; the caller closes it.
        on_stuck: called once where the engine hangs, to end the process.

    Returns:
        The app; its `state.service` is the `Service`.

    Raises:
        BackendError: Pillow is too old to read what strangers send.
        InputError: the token file cannot be used.
    """
    if int(pillow_version.split(".")[0]) < _PILLOW:
        raise BackendError(f"Pillow {pillow_version} has known holes in its decoders; pip install 'pillow>={_PILLOW}'")
    service = Service(config, engine, on_stuck)
    app = FastAPI(title="flashcocos", version=__version__, lifespan=service.lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    _add_routes(app, service)
    schema = app.openapi
    app.openapi = lambda: complete(schema())  # type: ignore[method-assign]
    for kind in (HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _reraise)
    hosts = config.hosts or (_LOOPBACK if config.loopback else ())
    app.add_middleware(
        Gate, tokens=service.tokens, hosts=hosts, origins=config.cors_origins, metrics=service.metrics,
        max_body=service.max_body,
    )  # fmt: skip
    if config.cors_origins:  # before the gate, for a browser asks first without its token
        app.add_middleware(
            CORSMiddleware, allow_origins=config.cors_origins, allow_methods=["*"], allow_headers=["Authorization"]
        )
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    for route in ROUTES:
        app.add_api_route(route.path, getattr(service, route.name), response_class=Response, **route.options())
    files = sorted(_PAGE.iterdir()) if _PAGE.is_dir() else []
    for file in files:
        if kind := _PAGE_TYPES.get(file.suffix):
            path = "/" if file.name == "index.html" else f"/page/{file.name}"
            answer = functools.partial(_page_file, file.read_bytes(), kind)
            app.add_api_route(path, answer, methods=["GET"], include_in_schema=False)


async def _page_file(data: bytes, kind: str) -> Response:
    return Response(data, media_type=kind, headers={"cache-control": "no-cache"})


async def _reraise(request: Request, error: Exception) -> Response:
    """FastAPI's own errors as ours."""
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        raise ApiError(422, "invalid", f"{first['loc'][-1]}: {first['msg']}")
    assert isinstance(error, HTTPException)
    codes = {404: "not_found", 405: "method_not_allowed"}
    code = codes.get(error.status_code, "malformed")
    raise ApiError(error.status_code, code, str(error.detail), headers=error.headers)


async def _disconnect(request: Request) -> None:
    """Return once the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _image_png(result: Translation) -> bytes:
    return wire.write_png(result.image)


def _json(reply: msgspec.Struct, status: int = 200) -> Response:
    return Response(msgspec.json.encode(reply), status, media_type="application/json")


def _file(data: bytes) -> Response:
    return Response(data, media_type="image/png" if data.startswith(b"\x89PNG") else "application/zip")
