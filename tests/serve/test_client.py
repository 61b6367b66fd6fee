"""The client gives what a `Translator` gives, and asks again when told to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from live_service import live
from tiny_bundle import CHANNELS, CLASSES, random_label, random_picture, write_tiny_bundle

from flashcocos import Translation, Translator
from flashcocos.config import ModelConfig
from flashcocos.serve import client as client_module
from flashcocos.serve.client import AsyncClient, Client
from flashcocos.serve.config import read_config
from flashcocos.serve.engine import LocalEngine
from flashcocos.serve.errors import ApiError


def assert_same(served: Translation, bare: Translation) -> None:
    assert np.array_equal(served.image, bare.image)
    assert np.array_equal(served.warped, bare.warped)
    assert np.array_equal(served.matches, bare.matches)
    assert np.abs(served.confidence - bare.confidence).max() <= 0.5 / 255 + 1e-6
    assert served.exemplar_size == bare.exemplar_size
    assert served.timings.keys() == bare.timings.keys()


@pytest.mark.parametrize("config", [CLASSES, CHANNELS])
def test_it_gives_what_the_translator_gives(config: ModelConfig, tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "tiny.zip", config)
    picture, exemplar_label = random_picture(100, 140), random_label(config, 100, 140, seed=1)
    label = random_label(config, 90, 70, seed=2)
    known = exemplar_label if config.condition_on_label else None
    settings = read_config({"model": str(bundle), "device": "cpu"})
    with live(LocalEngine(settings), settings) as running, Translator(bundle, device="cpu") as translator:
        with Client(running.url) as client:
            assert client.model().task == config.task
            for size in (None, 96, (64, 128), "input"):
                exemplar = client.encode_exemplar(picture, known, size)
                bare = translator.encode_exemplar(picture, known, size)
                assert exemplar.size == bare.size
                assert_same(client.translate(label, exemplar, size), translator.translate(label, bare, size))

        async def both() -> list[Translation]:
            async with AsyncClient(running.url) as client:
                exemplar = await client.encode_exemplar(picture, known)
                return list(await asyncio.gather(*(client.translate(label, exemplar.id) for _ in range(2))))

        expected = translator.translate(label, translator.encode_exemplar(picture, known))
        for served in asyncio.run(both()):
            assert_same(served, expected)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that a client would sleep."""
    slept: list[float] = []
    monkeypatch.setattr(client_module.time, "sleep", slept.append)
    return slept


def answering(client: Client, answer: Callable[[httpx.Request], httpx.Response]) -> Client:
    client._http = httpx.Client(transport=httpx.MockTransport(answer))
    return client


def error(status: int, code: str, **headers: str) -> httpx.Response:
    problem = {"error": {"code": code, "message": "not now", "request_id": "abc"}}
    return httpx.Response(status, json=problem, headers=headers)


def test_a_refused_request_is_sent_again_when_the_service_says(waits: list[float]) -> None:
    answers = [
        error(429, "queue_full", **{"Retry-After": "7"}),
        error(503, "starting"),
        httpx.Response(200, json={"id": "x", "size": [64, 64], "bytes": 1, "label": None}),
    ]
    client = answering(Client(), lambda request: answers.pop(0))
    assert client.encode_exemplar(b"picture").id == "x"
    assert len(waits) == 2
    assert 7 <= waits[0] <= 7 * 1.25
    assert 1 <= waits[1] <= 1.25


def test_it_gives_up_in_the_end(waits: list[float]) -> None:
    client = answering(Client(retries=2), lambda request: error(429, "queue_full", **{"Retry-After": "100000"}))
    with pytest.raises(ApiError, match=r"not now \(request abc\)") as refusal:
        client.model()
    assert (refusal.value.status, refusal.value.code) == (429, "queue_full")
    assert len(waits) == 2
    assert max(waits) <= 60 * 1.25


def test_other_errors_are_not_tried_again(waits: list[float]) -> None:
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["authorization"])
        return error(404, "exemplar_unknown")

    with pytest.raises(ApiError) as refusal:
        answering(Client(token="0123"), answer).translate(b"label", "0" * 32)
    assert refusal.value.code == "exemplar_unknown"
    assert (seen, waits) == (["Bearer 0123"], [])


@pytest.mark.parametrize("answer", [httpx.Response(200, text="<html>"), httpx.Response(502, json={"detail": "x"})])
def test_what_is_no_such_service_is_said(answer: httpx.Response) -> None:
    with pytest.raises(ApiError, match="is no flashcocos service"):
        answering(Client(), lambda request: answer).model()
