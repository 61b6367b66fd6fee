"""Requests that schemathesis makes of /openapi.json: no answer of 500, and none that the schema does not know."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest
from fake_engine import FakeEngine
from live_service import Live, live

from flashcocos.benchmarks.provenance import resident_memory
from flashcocos.runtime.backends import _return_free_memory
from flashcocos.serve.config import read_config

schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis")
hypothesis = pytest.importorskip("hypothesis", reason="comes with schemathesis")

EXAMPLES = int(os.environ.get("FLASHCOCOS_TEST_EXAMPLES", "25"))  # of each route


@pytest.fixture(scope="module")
def service() -> Iterator[Live]:
    with live(FakeEngine(), read_config({"body_s": "2"})) as running:
        yield running


def test_no_request_is_an_error_of_the_service(service: Live) -> None:
    schema = schemathesis.openapi.from_url(f"{service.url}/openapi.json")
    checks = schemathesis.checks
    wanted = [
        checks.not_a_server_error,
        schemathesis.specs.openapi.checks.status_code_conformance,
        schemathesis.specs.openapi.checks.content_type_conformance,
        schemathesis.specs.openapi.checks.response_schema_conformance,
    ]
    statuses: set[int] = set()
    turns, key = itertools.count(), service.service.demo[0].exemplar
    _return_free_memory()
    before = resident_memory()

    def try_route(operation: Any) -> None:
        @hypothesis.given(case=operation.as_strategy())
        @hypothesis.settings(
            max_examples=EXAMPLES, deadline=None, database=None, derandomize=True,
            suppress_health_check=list(hypothesis.HealthCheck),
        )  # fmt: skip
        def run(case: Any) -> None:
            if "id" in (case.path_parameters or {}) and next(turns) % 2:  # one that is made up leads nowhere
                case.path_parameters["id"] = key
            if "name" in (case.path_parameters or {}) and next(turns) % 2:
                case.path_parameters["name"] = "fake"
            answer = case.call(base_url=service.url)
            statuses.add(answer.status_code)
            case.validate_response(answer, checks=wanted)

        run()

    count = 0
    for found in schema.get_all_operations():
        try_route(found.ok())
        count += 1
    assert count == 18
    assert statuses <= {200, 201, 204, 400, 404, 405, 413, 415, 422}
    assert {200, 201, 404, 422} <= statuses
    # without what earlier tests and hypothesis have freed, which the C library keeps
    gc.collect()
    _return_free_memory()
    assert resident_memory() - before < 100 << 20
    assert service.service.is_ready()
    assert service.service.batcher.tickets == 0
