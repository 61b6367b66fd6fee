"""The service's routes over real sockets, with an engine that waits when told to."""

from __future__ import annotations

import base64
import io
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from fake_engine import CHANNELS, FakeEngine, painted
from live_service import Live, live
from PIL import Image

from flashcocos.errors import BackendError
from flashcocos.serve.app import build_app
from flashcocos.serve.config import read_config
from flashcocos.serve.wire import write_label, write_png

COLOR = (200, 100, 50)
PICTURE = write_png(np.full((80, 80, 3), COLOR, np.uint8))
JSON = "application/json"


def label(value: int, height: int = 64, width: int = 64) -> bytes:
    return write_png(np.full((height, width), value, np.uint8))


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def service(engine: FakeEngine) -> Iterator[Live]:
    with live(engine, read_config({"queue": "3", "batch": "2"})) as running:
        yield running


@pytest.fixture
def path(client: httpx.Client) -> str:
    """Of the translations with an exemplar of one color."""
    return f"/v1/exemplars/{put_exemplar(client)}/translate"


def put_exemplar(client: httpx.Client, picture: bytes = PICTURE, value: int = 1, **query: str) -> str:
    key = client.put("/v1/labels", content=label(value)).json()["id"]
    answer = client.put("/v1/exemplars", params={"label": key, **query}, content=picture)
    assert answer.status_code in (200, 201), answer.text
    return answer.json()["id"]


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def refusal(answer: httpx.Response) -> tuple[int, str]:
    """Status and code of an error, whose body is checked."""
    problem = answer.json()["error"]
    assert set(problem) == {"code", "message", "request_id"}
    assert problem["request_id"] == answer.headers["x-request-id"]
    assert "Traceback" not in answer.text
    return answer.status_code, problem["code"]


def test_a_label_is_translated(client: httpx.Client, path: str) -> None:
    answer = client.post(path, content=label(7))
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    assert np.array_equal(pixels(answer.content), painted(np.full((64, 64), 7), COLOR))
    assert re.fullmatch(r"[0-9a-f]{16}", answer.headers["x-request-id"])
    stages = re.findall(r"(\w+);dur=[\d.]+", answer.headers["server-timing"])
    assert stages == ["decode", "queue", "engine", "query", "warp", "synthesis", "encode"]


def test_all_of_a_translation_comes_as_json(client: httpx.Client, path: str) -> None:
    reply = client.post(path, params={"want": "all", "size": "64x96"}, content=label(7, 128, 192)).json()
    image = painted(np.full((64, 96), 7), COLOR)
    assert np.array_equal(pixels(base64.b64decode(reply["image"])), image)
    assert np.array_equal(pixels(base64.b64decode(reply["warped"])), image[::-1])
    assert (pixels(base64.b64decode(reply["confidence"])) == 128).all()
    assert np.frombuffer(base64.b64decode(reply["matches"]), "<u2").tolist() == [2] * (16 * 24 * 2)
    assert reply["map"] == {"height": 16, "width": 24, "stride": 4}
    assert (reply["size"], reply["exemplar_size"]) == ([64, 96], [64, 64])
    assert reply["timings"] == {"query": 1.0, "warp": 2.0, "synthesis": 3.0}


@pytest.mark.parametrize(
    ("asked", "size"), [(None, (64, 64)), ("96", (96, 96)), ("64x128", (64, 128)), ("input", (160, 96))]
)
def test_the_size_is_the_one_asked_for(
    client: httpx.Client, path: str, asked: str | None, size: tuple[int, int]
) -> None:
    answer = client.post(path, params={"size": asked} if asked else {}, content=label(0, 150, 100))
    assert pixels(answer.content).shape[:2] == size


def test_exemplars_and_labels_are_kept_by_content(client: httpx.Client, engine: FakeEngine) -> None:
    encoded = engine.encoded
    put = client.put("/v1/labels", content=label(3))
    again = client.put("/v1/labels", content=write_png(np.full((64, 64), 3, np.uint8)))
    assert (put.status_code, again.status_code) == (201, 200)
    assert put.json() == again.json() == {"id": put.json()["id"], "size": [64, 64], "bytes": put.json()["bytes"]}
    assert np.array_equal(pixels(client.get(f"/v1/labels/{put.json()['id']}").content), np.full((64, 64), 3))
    first, second = (client.put("/v1/exemplars", params={"label": put.json()["id"]}, content=PICTURE) for _ in range(2))
    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json() == second.json()
    assert engine.encoded == encoded + 1
    keys = {first.json()["id"], put_exemplar(client, size="96"), put_exemplar(client, value=2)}
    assert len(keys) == 3
    where = f"/v1/exemplars/{first.json()['id']}"
    assert client.get(where).json() == first.json()
    assert first.json()["size"] == [64, 64]
    assert (pixels(client.get(f"{where}/image").content) == COLOR).all()
    assert pixels(client.get(f"{where}/image").content).shape == (64, 64, 3)
    assert (pixels(client.get(f"{where}/label").content) == 3).all()
    assert client.delete(where).status_code == 204
    for answer in (client.get(where), client.delete(where), client.post(f"{where}/translate", content=label(1))):
        assert refusal(answer) == (404, "exemplar_unknown")


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_pictures_may_be_of_three_formats(client: httpx.Client, kind: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (70, 90), COLOR).save(buffer, kind)
    key = put_exemplar(client, buffer.getvalue(), size="input")
    assert client.get(f"/v1/exemplars/{key}").json()["size"] == [96, 64]


def test_the_model_is_described(client: httpx.Client) -> None:
    model = client.get("/v1/model").json()
    assert model["class_names"][11] == "class 11"
    assert len(model["palette"]) == model["label_channels"] == 12
    assert model["exemplar_needs_label"] is True
    assert model["sizes"] == {"default": [64, 64], "multiple": 32, "min": 64, "max": 1024, "stride": 4}
    assert model["limits"]["queue"] == 3
    for pair in model["demo"]:
        assert client.get(f"/v1/labels/{pair['label']}").status_code == 200
        assert client.get(f"/v1/exemplars/{pair['exemplar']}/label").status_code == 200
    answer = client.post(f"/v1/exemplars/{model['demo'][0]['exemplar']}/translate", content=label(1))
    assert answer.status_code == 200


def test_services_with_one_folder_know_each_others_labels_and_exemplars(tmp_path: Path) -> None:
    config = read_config({"exemplar_folder": str(tmp_path)})
    with live(FakeEngine(), config) as one, live(FakeEngine(), config) as two, httpx.Client() as client:
        key = client.put(f"{one.url}/v1/labels", content=label(1)).json()["id"]
        assert pixels(client.get(f"{two.url}/v1/labels/{key}").content).tolist() == pixels(label(1)).tolist()
        put = client.put(f"{two.url}/v1/exemplars", params={"label": key}, content=PICTURE).json()["id"]
        answer = client.post(f"{one.url}/v1/exemplars/{put}/translate", content=label(2))
        assert np.array_equal(pixels(answer.content), painted(pixels(label(2)), COLOR))
        for other in ("../" + key, key.upper() + "x", "0" * 32):
            assert client.get(f"{two.url}/v1/labels/{other}").status_code == 404
    assert {path.suffix for path in tmp_path.iterdir()} == {".label", ".exemplar"}


def test_labels_of_planes_come_as_npz() -> None:
    planes = np.random.default_rng(0).integers(0, 255, (5, 64, 64), np.uint8)
    with live(FakeEngine(CHANNELS)) as running, httpx.Client(base_url=running.url) as client:
        assert client.get("/v1/model").json()["class_names"] == []
        key = client.put("/v1/exemplars", content=PICTURE).json()["id"]
        answer = client.post(f"/v1/exemplars/{key}/translate", content=write_label(planes))
        assert np.array_equal(pixels(answer.content), painted(planes, COLOR))
        assert refusal(client.get(f"/v1/exemplars/{key}/label")) == (404, "label_unknown")
        put = client.put("/v1/labels", content=write_label(planes)).json()["id"]
        assert client.get(f"/v1/labels/{put}").headers["content-type"] == "application/zip"
        assert refusal(client.put("/v1/exemplars", params={"label": put}, content=PICTURE)) == (422, "invalid")
        assert refusal(client.put("/v1/labels", content=label(1))) == (415, "unsupported_format")
        assert refusal(client.put("/v1/labels", content=write_label(planes[:4]))) == (422, "invalid")


@pytest.mark.parametrize(
    ("method", "where", "body", "expected"),
    [
        ("GET", "/nothing", None, (404, "not_found")),
        ("GET", "/page/../../../etc/passwd", None, (404, "not_found")),
        ("POST", "/v1/model", None, (405, "method_not_allowed")),
        ("GET", "/v1/exemplars/..%2f..%2fetc%2fpasswd", None, (404, "not_found")),
        ("GET", "/v1/exemplars/%2e%2e", None, (404, "exemplar_unknown")),
        ("GET", "/v1/labels/x%00y", None, (404, "label_unknown")),
        ("DELETE", f"/v1/exemplars/{'f' * 32}", None, (404, "exemplar_unknown")),
        ("PUT", "/v1/labels", b"", (400, "malformed")),
        ("PUT", "/v1/labels", b"no picture", (415, "unsupported_format")),
        ("PUT", "/v1/labels", PICTURE, (422, "invalid")),  # of colors
        ("PUT", "/v1/labels", label(12), (422, "invalid")),
        ("PUT", "/v1/labels", label(1, 4096, 4096), (413, "too_large")),
        ("PUT", "/v1/labels", label(1)[:60], (400, "malformed")),
        ("PUT", "/v1/exemplars", PICTURE, (422, "invalid")),
        ("PUT", f"/v1/exemplars?label={'0' * 32}", PICTURE, (404, "label_unknown")),
        ("POST", f"/v1/exemplars/{'0' * 32}/translate", b"", (404, "exemplar_unknown")),
        ("POST", "{path}?size=65", label(1), (422, "invalid")),
        ("POST", "{path}?size=2048", label(1), (422, "invalid")),
        ("POST", "{path}?size=input", label(1, 1100, 64), (422, "invalid")),
        ("POST", "{path}?size=99999999999", label(1), (422, "invalid")),
        ("POST", "{path}?want=more", label(1), (422, "invalid")),
        ("POST", "{path}", b"GIF89a", (415, "unsupported_format")),
    ],
)
def test_errors_are_json(
    client: httpx.Client, path: str, method: str, where: str, body: bytes | None, expected: tuple[int, str]
) -> None:
    assert refusal(client.request(method, where.format(path=path), content=body)) == expected


def test_what_a_wrong_method_may_be_is_said(client: httpx.Client) -> None:
    assert client.post("/v1/model").headers["allow"] == "GET"


def test_a_model_that_fails_is_no_fault_of_the_caller(client: httpx.Client, path: str, engine: FakeEngine) -> None:
    for error, expected in (
        (BackendError("out of memory in /home/secret"), (503, "engine_failed")),
        (RuntimeError("secret"), (500, "internal")),
    ):
        engine.fail = error
        answer = client.post(path, content=label(11))
        assert refusal(answer) == expected
        assert "secret" not in answer.text
        assert client.post(path, content=label(1)).status_code == 200


def test_a_full_queue_refuses_at_once(service: Live, client: httpx.Client, path: str, engine: FakeEngine) -> None:
    engine.gate.clear()
    batcher = service.service.batcher
    with ThreadPoolExecutor(4) as threads:
        running = threads.submit(client.post, path, content=label(0))
        service.until(lambda: batcher.tickets == 1 and batcher.waiting == 0)
        waiting = [threads.submit(client.post, path, content=label(value)) for value in (1, 2, 3)]
        service.until(lambda: batcher.waiting == 3)
        answer = client.post(path, content=label(4))  # while the engine stands still
        assert refusal(answer) == (429, "queue_full")
        assert int(answer.headers["retry-after"]) >= 1
        engine.gate.set()
        for value, future in enumerate([running, *waiting]):
            assert np.array_equal(pixels(future.result().content), painted(np.full((64, 64), value), COLOR))
    assert engine.batches[-3:] == [1, 2, 1]
    text = client.get("/metrics").text
    assert 'flashcocos_refused_total{reason="queue_full"} 1.0' in text
    assert "flashcocos_queue_items 0.0" in text


def request_head(path: str, length: int, extra: str = "") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n{extra}\r\n".encode()


def test_who_hangs_up_is_never_translated(service: Live, client: httpx.Client, path: str, engine: FakeEngine) -> None:
    engine.gate.clear()
    batcher, before = service.service.batcher, len(engine.seen)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(client.post, path, content=label(1))
        service.until(lambda: batcher.tickets == 1 and batcher.waiting == 0)
        with socket.create_connection(("127.0.0.1", service.port)) as caller:
            caller.sendall(request_head(path, len(label(9))) + label(9))
            service.until(lambda: batcher.waiting == 1)
        service.until(lambda: batcher.waiting == 0)
        engine.gate.set()
        assert running.result().status_code == 200
    assert client.post(path, content=label(2)).status_code == 200
    assert engine.seen[before:] == [1, 2]
    assert 'flashcocos_cancelled_total{where="queue"} 1.0' in client.get("/metrics").text


def test_the_deadline_ends_the_wait(service: Live, client: httpx.Client, path: str, engine: FakeEngine) -> None:
    engine.gate.clear()
    before = len(engine.seen)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(client.post, path, content=label(1))
        service.until(lambda: service.service.batcher.tickets == 1 and service.service.batcher.waiting == 0)
        answer = client.post(path, content=label(9), headers={"X-Deadline-Ms": "100"})
        assert refusal(answer) == (504, "deadline")
        engine.gate.set()
        assert running.result().status_code == 200
    assert engine.seen[before:] == [1]
    for wrong in ("-1", "0", "1.5", "soon", "9" * 5000):
        answer = client.post(path, content=label(9), headers={"X-Deadline-Ms": wrong})
        assert refusal(answer) == (422, "invalid")


def test_who_hangs_up_within_the_body_frees_the_place(service: Live, client: httpx.Client, path: str) -> None:
    with socket.create_connection(("127.0.0.1", service.port)) as caller:
        caller.sendall(request_head(path, 1000) + bytes(500))
        service.until(lambda: service.service.batcher.tickets == 1)
    service.until(lambda: service.service.batcher.tickets == 0)
    assert 'flashcocos_cancelled_total{where="body"} 1.0' in client.get("/metrics").text


@pytest.mark.parametrize("head", [b"", b"\x89PNG"])
def test_a_body_that_does_not_come_is_not_waited_for(engine: FakeEngine, head: bytes) -> None:
    with live(engine, read_config({"body_s": "0.1"})) as running:
        with socket.create_connection(("127.0.0.1", running.port)) as caller:
            caller.sendall(request_head("/v1/labels", 1000).replace(b"POST", b"PUT") + head)
            caller.settimeout(30)
            assert caller.recv(1000).startswith(b"HTTP/1.1 408 ")
        running.until(lambda: running.service.batcher.tickets == 0)


def test_a_huge_body_is_refused_by_its_header(service: Live, path: str) -> None:
    with socket.create_connection(("127.0.0.1", service.port)) as caller:
        caller.sendall(request_head(path, 1 << 40, "Expect: 100-continue\r\n"))
        caller.settimeout(30)
        answer = caller.recv(4096)
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"connection: close" in answer.lower()


@pytest.mark.parametrize("length", ["-1", "x", "1e3", "9" * 5000, "5, 6"])
def test_a_length_that_is_none_is_refused(service: Live, path: str, length: str) -> None:
    with socket.create_connection(("127.0.0.1", service.port)) as caller:
        caller.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode())
        caller.settimeout(30)
        assert caller.recv(1000).startswith(b"HTTP/1.1 400 ")


def test_a_body_without_a_length_is_cut_off(service: Live, path: str) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    chunk = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
    with socket.create_connection(("127.0.0.1", service.port)) as caller:
        caller.settimeout(30)
        caller.sendall(head)
        with pytest.raises(OSError):  # the service closes the connection  # noqa: PT011
            for _ in range(64):
                caller.sendall(chunk)
    service.until(lambda: service.service.batcher.tickets == 0)


def test_who_may_ask(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.txt"
    tokens.write_text("# of two users\nanna 0123456789abcdef\nbert fedcba9876543210\n")
    config = read_config({"token_file": str(tokens), "cors_origins": "https://friend.example"})
    with live(FakeEngine(), config) as running, httpx.Client(base_url=running.url) as client:
        assert client.get("/healthz").text == "ok"
        assert client.get("/readyz").text == "ready"
        for where in ("/v1/model", "/metrics", "/openapi.json", "/v1/nothing"):
            for header in ({}, {"Authorization": "Bearer 0123456789abcdeF"}, {"Authorization": "Basic é"}):
                answer = client.get(where, headers={name: value.encode() for name, value in header.items()})
                assert refusal(answer) == (401, "unauthorized")
                assert answer.headers["www-authenticate"] == "Bearer"
        for token in ("0123456789abcdef", "fedcba9876543210"):
            assert client.get("/v1/model", headers={"Authorization": f"Bearer {token}"}).status_code == 200
        # the token comes before the body
        with socket.create_connection(("127.0.0.1", running.port)) as caller:
            caller.sendall(request_head("/v1/exemplars/0/translate", 1000))
            assert caller.recv(1000).startswith(b"HTTP/1.1 401 ")
        allowed = {"Authorization": "Bearer 0123456789abcdef", "Origin": "https://friend.example"}
        answer = client.get("/v1/model", headers=allowed)
        assert answer.headers["access-control-allow-origin"] == "https://friend.example"
        asked = {"Origin": "https://friend.example", "Access-Control-Request-Method": "PUT"}
        assert client.options("/v1/labels", headers=asked).status_code == 200


def test_one_token_cannot_fill_the_queue(tmp_path: Path) -> None:
    tokens, engine = tmp_path / "tokens.txt", FakeEngine()
    tokens.write_text("anna 0123456789abcdef\nbert fedcba9876543210\n")
    config = read_config({"token_file": str(tokens), "queue": "2", "batch": "1"})
    anna, bert = ({"Authorization": f"Bearer {token}"} for token in ("0123456789abcdef", "fedcba9876543210"))
    with (
        live(engine, config) as running,
        httpx.Client(base_url=running.url) as client,
        ThreadPoolExecutor(3) as threads,
    ):
        key = client.get("/v1/model", headers=anna).json()["demo"][0]["exemplar"]
        path = f"/v1/exemplars/{key}/translate"
        assert client.post(path, content=label(0), headers=anna).status_code == 200
        engine.gate.clear()
        jobs = [threads.submit(client.post, path, content=label(0), headers=anna)]
        running.until(lambda: running.service.batcher.tickets == 1 and running.service.batcher.waiting == 0)
        jobs.append(threads.submit(client.post, path, content=label(0), headers=anna))
        running.until(lambda: running.service.batcher.waiting == 1)
        assert refusal(client.post(path, content=label(0), headers=anna)) == (429, "share_full")
        jobs.append(threads.submit(client.post, path, content=label(0), headers=bert))
        running.until(lambda: running.service.batcher.waiting == 2)
        engine.gate.set()
        assert [job.result().status_code for job in jobs] == [200, 200, 200]


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Host": "evil.example"}, (400, "malformed")),
        ({"Host": "localhost:1]"}, (400, "malformed")),
        ({"Host": ""}, (400, "malformed")),
        ({"Origin": "https://evil.example"}, (403, "origin")),
        ({"Origin": "null"}, (403, "origin")),
    ],
)
def test_pages_of_others_are_refused(client: httpx.Client, headers: dict[str, str], expected: tuple[int, str]) -> None:
    answer = client.get("/v1/model", headers=headers)
    assert refusal(answer) == expected
    assert "access-control-allow-origin" not in answer.headers


def test_the_own_page_may_ask(client: httpx.Client, service: Live) -> None:
    for host in (f"127.0.0.1:{service.port}", f"localhost:{service.port}", f"[::1]:{service.port}"):
        assert client.get("/v1/model", headers={"Host": host, "Origin": f"http://{host}"}).status_code == 200


@pytest.mark.parametrize("where", ["/v1/model", "/healthz", "/nothing"])
def test_every_answer_has_the_headers_of_safety(client: httpx.Client, where: str) -> None:
    headers = client.get(where).headers
    assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; ")
    assert headers["x-content-type-options"] == "nosniff"
    assert "server" not in headers or "uvicorn" in headers["server"]  # the host's, which `serve` switches off


def test_page_files_come_from_a_fixed_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: FakeEngine
) -> None:
    (tmp_path / "index.html").write_text("<!doctype html>")
    (tmp_path / "main.js").write_text("export {}")
    (tmp_path / "notes.txt").write_text("secret")
    monkeypatch.setattr("flashcocos.serve.app._PAGE", tmp_path)
    with live(engine) as running, httpx.Client(base_url=running.url) as client:
        assert client.get("/").headers["content-type"] == "text/html; charset=utf-8"
        assert client.get("/page/main.js").headers["content-type"].startswith("text/javascript")
        (tmp_path / "late.js").write_text("")
        for name in ("notes.txt", "late.js", "index.html", "%2e%2e/app.py"):
            assert client.get(f"/page/{name}").status_code == 404


def test_not_ready_is_said_until_the_first_translation(engine: FakeEngine) -> None:
    engine.fail = BackendError("no memory")
    engine.translate = lambda labels, exemplars: (_ for _ in ()).throw(engine.fail)  # type: ignore[method-assign]
    with live(engine) as running, httpx.Client(base_url=running.url) as client:
        assert refusal(client.get("/readyz")) == (503, "engine_failed")
        assert client.get("/healthz").status_code == 200
        answer = client.put("/v1/labels", content=label(1))
        assert refusal(answer) == (503, "engine_failed")
        assert answer.headers["retry-after"] == "10"


def test_a_stuck_engine_ends_the_service(engine: FakeEngine) -> None:
    ended: list[bool] = []
    config = read_config({"watchdog_s": "1"})
    with (
        live(engine, config, on_stuck=lambda: ended.append(True)) as running,
        httpx.Client(base_url=running.url) as client,
        ThreadPoolExecutor(1) as threads,
    ):
        path = f"/v1/exemplars/{put_exemplar(client)}/translate"
        engine.gate.clear()
        job = threads.submit(client.post, path, content=label(1))
        running.until(lambda: ended)
        assert refusal(client.get("/readyz")) == (503, "engine_failed")
        engine.gate.set()
        assert job.result().status_code == 200
    assert ended == [True]


def test_the_schema_names_every_route(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    assert document["paths"].keys() >= {"/v1/model", "/v1/labels", "/v1/exemplars", "/v1/exemplars/{id}/translate"}
    translate = document["paths"]["/v1/exemplars/{id}/translate"]["post"]
    assert {"200", "400", "401", "404", "413", "415", "422", "429", "503", "504"} <= translate["responses"].keys()
    assert document["components"]["schemas"]["ErrorReply"]
    infer = document["paths"]["/v2/models/{name}/infer"]["post"]
    assert infer["responses"]["400"]["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/Refusal"
    }
    assert {"application/json", "application/octet-stream"} == infer["requestBody"]["content"].keys()


def test_metrics_count_by_route(client: httpx.Client, path: str) -> None:
    client.post(path, content=label(1))
    client.get("/v1/exemplars/unknown-1")
    client.get("/no/such/route")
    text = client.get("/metrics").text
    assert 'flashcocos_requests_total{code="200",route="/v1/exemplars/{id}/translate"} 1.0' in text
    assert 'flashcocos_requests_total{code="404",route="/v1/exemplars/{id}"} 1.0' in text
    assert 'flashcocos_requests_total{code="404",route="other"} 1.0' in text
    assert "unknown-1" not in text
    assert "flashcocos_ready 1.0" in text


def test_an_old_pillow_is_refused(monkeypatch: pytest.MonkeyPatch, engine: FakeEngine) -> None:
    monkeypatch.setattr("flashcocos.serve.app.pillow_version", "12.9.1")
    with pytest.raises(BackendError, match="pillow>=13"):
        build_app(read_config(), engine)
