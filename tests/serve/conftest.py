"""A client of the service that a file's fixture `service` runs."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from live_service import Live


@pytest.fixture
def client(service: Live) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=30) as connection:
        yield connection
