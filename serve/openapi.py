"""The routes of the service and what /openapi.json says of them: bodies, answers, and examples that can be sent."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import msgspec

from . import kserve, wire

_ID = "0123456789abcdef0123456789abcdef"
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_TEXT = {"text/plain": {"schema": {"type": "string"}}}
_PNG = {"image/png": _BINARY}
_LABEL = {"image/png": _BINARY, "application/zip": _BINARY}
_PICTURE = {"image/png": _BINARY, "image/jpeg": _BINARY, "image/webp": _BINARY}
_REPLIES = (
    wire.ModelReply, wire.LabelReply, wire.ExemplarReply, wire.TranslationReply, wire.ErrorReply, kserve.Refusal,
    kserve.ServerMetadata, kserve.ModelMetadata, kserve.ModelReady, kserve.InferRequest, kserve.InferReply,
)  # fmt: skip
_LABEL_EXAMPLE = {"id": _ID, "size": [128, 128], "bytes": 1193}
_EXEMPLAR_EXAMPLE = {"id": _ID, "size": [128, 128], "bytes": 336012, "label": _ID}
_ERRORS = {
    400: "malformed: the body is cut or damaged, or the header Host names another service",
    401: "unauthorized: no known token",
    403: "origin: a page of another origin asks",
    404: "exemplar_unknown, label_unknown, not_found",
    408: "body_timeout: the body came too slowly",
    413: "too_large: bytes or pixels",
    415: "unsupported_format: the body is none of the formats of this request",
    422: "invalid: ids, sizes or parameters that the model does not take",
    429: "queue_full, share_full, too_busy: ask again after the seconds in Retry-After",
    503: "starting, draining, engine_failed: ask again after the seconds in Retry-After",
    504: "deadline: no answer in time",
}
_WORK = tuple(_ERRORS)  # what a request with a body may meet
_LOOK = (400, 401, 403, 404, 422)


@dataclasses.dataclass(frozen=True)
class Route:
    """One route; `name` is the method of `Service` that answers, `answers` the content by status."""

    method: str
    path: str
    name: str
    answers: Mapping[int, Mapping[str, Any]]
    errors: tuple[int, ...] = _LOOK
    body: Mapping[str, Any] | None = None

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `FastAPI.add_api_route`."""
        problem = _json(kserve.Refusal if self.path.startswith("/v2") else wire.ErrorReply)
        responses: dict[int, dict[str, Any]] = {
            status: {"description": "done", "content": dict(content)} for status, content in self.answers.items()
        }
        responses |= {status: {"description": _ERRORS[status], "content": problem} for status in self.errors}
        extra = {"requestBody": {"required": True, "content": self.body}} if self.body else {}
        success = min(self.answers)
        return {
            "methods": [self.method],
            "status_code": success,
            "response_description": "done",
            "responses": responses,
            "openapi_extra": extra,
        }


def _without_tuples(schema: Any) -> Any:
    """Tuples, all of one type here, as arrays of that type, which more tools understand than `prefixItems`."""
    if isinstance(schema, list):
        return [_without_tuples(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "prefixItems" in schema:
        schema = {name: part for name, part in schema.items() if name != "prefixItems"} | {
            "items": schema["prefixItems"][0]
        }
    return {name: _without_tuples(part) for name, part in schema.items()}


def _reference(kind: type) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}


def _json(kind: type, example: Any = None) -> dict[str, Any]:
    content: dict[str, Any] = {"schema": _reference(kind)}
    return {"application/json": content if example is None else content | {"example": example}}


_BYTES = {"application/octet-stream": _BINARY}  # JSON and, behind it, tensors
_TENSORS = _json(kserve.InferRequest) | _BYTES
_NEW_LABEL, _NEW_EXEMPLAR = _json(wire.LabelReply, _LABEL_EXAMPLE), _json(wire.ExemplarReply, _EXEMPLAR_EXAMPLE)
ROUTES = (
    Route("GET", "/v1/model", "get_model", {200: _json(wire.ModelReply)}, (400, 401, 403)),
    Route("PUT", "/v1/labels", "put_label", {200: _NEW_LABEL, 201: _NEW_LABEL}, _WORK, _LABEL),
    Route("GET", "/v1/labels/{id}", "get_label", {200: _LABEL}),
    Route("PUT", "/v1/exemplars", "put_exemplar", {200: _NEW_EXEMPLAR, 201: _NEW_EXEMPLAR}, _WORK, _PICTURE),
    Route("GET", "/v1/exemplars/{id}", "get_exemplar", {200: _NEW_EXEMPLAR}),
    Route("DELETE", "/v1/exemplars/{id}", "delete_exemplar", {204: {}}),
    Route("GET", "/v1/exemplars/{id}/image", "get_exemplar_image", {200: _PNG}),
    Route("GET", "/v1/exemplars/{id}/label", "get_exemplar_label", {200: _LABEL}),
    Route(
        "POST",
        "/v1/exemplars/{id}/translate",
        "translate",
        {200: _PNG | _json(wire.TranslationReply)},
        _WORK,
        _LABEL,
    ),
    Route("GET", "/v2", "v2_server", {200: _json(kserve.ServerMetadata)}, (400, 401, 403)),
    Route("GET", "/v2/health/live", "health", {200: _TEXT}, (400, 403)),
    Route("GET", "/v2/health/ready", "readiness", {200: _TEXT}, (400, 403, 503)),
    Route("GET", "/v2/models/{name}", "v2_model", {200: _json(kserve.ModelMetadata)}),
    Route("GET", "/v2/models/{name}/ready", "v2_model_ready", {200: _json(kserve.ModelReady)}, (*_LOOK, 503)),
    Route("POST", "/v2/models/{name}/infer", "v2_infer", {200: _json(kserve.InferReply) | _BYTES}, _WORK, _TENSORS),
    Route("GET", "/healthz", "health", {200: _TEXT}, (400, 403)),
    Route("GET", "/readyz", "readiness", {200: _TEXT}, (400, 403, 503)),
    Route("GET", "/metrics", "get_metrics", {200: _TEXT}, (400, 401, 403)),
)


def complete(document: dict[str, Any]) -> dict[str, Any]:
    """FastAPI's document with the schemas of the replies and the token."""
    components = document.setdefault("components", {})
    _, schemas = msgspec.json.schema_components(_REPLIES, ref_template="#/components/schemas/{name}")
    components["schemas"] = _without_tuples(schemas)
    components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{}, {"token": []}]
    return document
