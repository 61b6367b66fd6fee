"""The routes of KServe v2: asked by tritonclient, equal to `Translator`, and closed to what is malformed."""

from __future__ import annotations

import itertools
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fake_engine import CHANNELS, FakeEngine, painted
from live_service import Live, live
from PIL import Image
from tiny_bundle import random_label, random_picture, write_tiny_bundle

from flashcocos.bundle.default_model import PAIRS
from flashcocos.runtime import Translator
from flashcocos.serve.config import read_config
from flashcocos.serve.engine import LocalEngine

triton = pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")
HEADER = "Inference-Header-Content-Length"
TYPES = {"uint8": "UINT8", "object": "BYTES"}
RESULTS = ("image", "warped", "confidence", "matches")


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="module")
def service(engine: FakeEngine) -> Iterator[Live]:
    with live(engine, read_config({"queue": "3", "batch": "2"})) as running:
        yield running


def tensors(binary: bool = True, **arrays: np.ndarray) -> list[Any]:
    made = []
    for name, array in arrays.items():
        made.append(triton.InferInput(name, (1, *array.shape), TYPES[array.dtype.name]))
        made[-1].set_data_from_numpy(array[None], binary_data=binary)
    return made


def request(**changes: Any) -> dict[str, Any]:
    """A request in JSON that is right but for `changes` of its label."""
    label = {"name": "label", "shape": [1, 64, 64], "datatype": "UINT8", "data": [3] * 4096}
    exemplar = {"name": "exemplar_id", "shape": [1, 1], "datatype": "BYTES", "data": ["0" * 32]}
    return {"inputs": [{**label, **changes}, exemplar]}


# what tritonclient sees


def test_metadata_and_readiness(service: Live) -> None:
    with triton.InferenceServerClient(service.url.removeprefix("http://")) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("fake")
        assert client.get_server_metadata()["name"] == "flashcocos"
        model = client.get_model_metadata("fake")
    assert [tensor["name"] for tensor in model["inputs"]] == ["label", "exemplar", "exemplar_label", "exemplar_id"]
    assert model["inputs"][1] == {"name": "exemplar", "datatype": "UINT8", "shape": [1, -1, -1, 3]}
    assert [tensor["name"] for tensor in model["outputs"]] == [*RESULTS, "exemplar_id"]
    assert model["outputs"][2] == {"name": "confidence", "datatype": "FP32", "shape": [1, -1, -1]}


def test_another_model_is_unknown(service: Live) -> None:
    with triton.InferenceServerClient(service.url.removeprefix("http://")) as client:
        assert not client.is_model_ready("other")
        with pytest.raises(triton.InferenceServerException, match="not_found: no model of this name"):
            client.infer("other", tensors(label=np.zeros((64, 64), np.uint8)))


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_results_are_those_of_the_translator(binary: bool) -> None:
    label, picture, exemplar_label = (Image.open(PAIRS.parent / n) for n in PAIRS.read_text().split()[1].split(","))
    arrays = {"exemplar": np.array(picture.convert("RGB"))[8:104], "exemplar_label": np.array(exemplar_label)[8:104]}
    ids = np.array(label)[:, 16:112]
    with Translator(device="cpu") as translator:
        expected = translator.translate(ids, translator.encode_exemplar(*arrays.values(), "input"), "input")
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in (*RESULTS, "exemplar_id")]
    with (
        live(LocalEngine(read_config({"device": "cpu"}))) as running,
        triton.InferenceServerClient(running.url.removeprefix("http://")) as client,
    ):
        answer = client.infer("avatars-128", tensors(binary, label=ids, **arrays), outputs=outputs, request_id="mine")
        assert answer.get_response()["id"] == "mine"
        for name in RESULTS:
            np.testing.assert_array_equal(answer.as_numpy(name)[0], getattr(expected, name), err_msg=name)
        (key,) = answer.as_numpy("exemplar_id").reshape(1).tolist()
        key = key if isinstance(key, str) else key.decode()
        again = client.infer(
            "avatars-128", tensors(binary, label=ids, exemplar_id=np.array([key], object))
        )  # all outputs, none named
        np.testing.assert_array_equal(again.as_numpy("image")[0], expected.image)
        # it is an exemplar like those of the other routes
        known = httpx.get(f"{running.url}/v1/exemplars/{key}")
        assert known.json()["size"] == [96, 128]


def test_labels_of_planes(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "planes.zip", CHANNELS)
    planes, picture = random_label(CHANNELS, 64, 96), random_picture(64, 64)
    with Translator(bundle, device="cpu") as translator:
        expected = translator.translate(planes, translator.encode_exemplar(picture, None, "input"), "input")
    settings = read_config({"model": str(bundle), "device": "cpu"})
    with (
        live(LocalEngine(settings), settings) as running,
        triton.InferenceServerClient(running.url.removeprefix("http://")) as client,
    ):
        assert client.get_model_metadata("planes")["inputs"][0]["shape"] == [1, 5, -1, -1]
        answer = client.infer("planes", tensors(label=planes, exemplar=picture))
    np.testing.assert_array_equal(answer.as_numpy("image")[0], expected.image)


def test_sizes_are_rounded(service: Live) -> None:
    arrays = {"exemplar": np.full((70, 90, 3), 200, np.uint8), "exemplar_label": np.zeros((70, 90), np.uint8)}
    with triton.InferenceServerClient(service.url.removeprefix("http://")) as client:
        answer = client.infer("fake", tensors(label=np.full((100, 150), 7, np.uint8), **arrays))
    np.testing.assert_array_equal(answer.as_numpy("image")[0], painted(np.full((96, 160), 7), (200, 200, 200)))


# what it refuses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [1, -64, 64]}, r"label: shape [1, -64, 64]; expected [1, -1, -1], -1 for any side"),
        ({"shape": [1, 0, 64], "data": []}, r"label: shape [1, 0, 64]; expected"),
        ({"shape": [2, 64, 32]}, "label: shape [2, 64, 32]; expected"),
        ({"shape": [1, 64, 64, 1]}, "label: shape [1, 64, 64, 1]; expected"),
        ({"shape": [4096]}, "label: shape [4096]; expected"),
        ({"shape": [1, 10**18, 10**18]}, "label: 4096 numbers; its shape"),
        ({"shape": [1, 64, 65]}, "label: 4096 numbers; its shape"),
        ({"datatype": "FP32"}, "label: datatype 'FP32'; expected UINT8"),
        ({"datatype": "INT64"}, "label: datatype 'INT64'; expected UINT8"),
        ({"data": [256] * 4096}, "label: data: Expected `int` <= 255"),
        ({"data": [-1] * 4096}, "label: data: Expected `int` >= 0"),
        ({"data": [0.5] * 4096}, "label: data: Expected `int`, got `float`"),
        ({"data": ["a"] * 4096}, "label: data: Expected `int`, got `str`"),
        ({"data": [3] * 4095}, "label: 4095 numbers; its shape"),
        ({"data": None}, "label: data: Expected `int`, got `null`"),
        ({"data": {"a": 1}}, "label: data: "),
        ({"parameters": {"binary_data_size": 4096}}, "label: binary_data_size 4096; 0 bytes are left"),
        ({"parameters": {"binary_data_size": -1}}, "label: binary_data_size -1; 0 bytes are left"),
        ({"name": "image"}, "input 'image': expected each at most once of label, exemplar"),
        ({"name": "exemplar_id", "shape": [1, 1], "datatype": "BYTES", "data": ["a"]}, "input 'exemplar_id': expected"),
    ],
)
def test_tensors_that_do_not_fit_are_malformed(client: httpx.Client, changes: dict[str, Any], message: str) -> None:
    answer = client.post("/v2/models/fake/infer", json=request(**changes))
    assert (answer.status_code, set(answer.json())) == (400, {"error"})
    assert answer.json()["error"].startswith(f"malformed: {message}")


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'{"inputs": 3}', b'{"inputs": []}', b"\xff\xfe", b'{"inputs": ' + b"[" * 100_000,
        b'{"inputs": [{"name": "label"}]}',
        b'{"inputs": [{"name": "label", "shape": [1, 64, 64], "datatype": "UINT8"}]}',
        b'{"inputs": [], "id": "' + b"a" * 300 + b'"}',
        json.dumps({**request(), "outputs": [{"name": "pixels"}]}).encode(),
        json.dumps({**request(), "parameters": {"a": {"b": 1}}}).encode(),
    ],
)  # fmt: skip
def test_bodies_that_are_no_requests_are_malformed(client: httpx.Client, body: bytes) -> None:
    answer = client.post("/v2/models/fake/infer", content=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"].startswith("malformed: ")


@pytest.mark.parametrize("header", ["-1", "1e3", "99999999999", "9" * 5000, "", "10", "0"])
def test_a_length_that_is_none_is_malformed(client: httpx.Client, header: str) -> None:
    answer = client.post("/v2/models/fake/infer", content=json.dumps(request()), headers={HEADER: header})
    assert (answer.status_code, answer.json()["error"].partition(":")[0]) == (400, "malformed")


@pytest.mark.parametrize("extra", [b"", b"a", b"\xff\xff\xff\xff" + b"a" * 32, b"\x21\0\0\0" + b"a" * 32])
def test_a_string_of_another_length_is_malformed(client: httpx.Client, extra: bytes) -> None:
    wanted = request()
    wanted["inputs"][1] = {**wanted["inputs"][1], "parameters": {"binary_data_size": len(extra)}}
    head = json.dumps(wanted).encode()
    answer = client.post("/v2/models/fake/infer", content=head + extra, headers={HEADER: str(len(head))})
    assert answer.json() == {"error": "malformed: exemplar_id: expected one string of at most 256 bytes"}
    answer = client.post("/v2/models/fake/infer", content=head + extra + b"a", headers={HEADER: str(len(head))})
    assert answer.status_code == 400


def test_what_is_well_formed_and_wrong_has_the_codes_of_the_other_routes(client: httpx.Client) -> None:
    def refusal(**changes: Any) -> tuple[int, str]:
        answer = client.post("/v2/models/fake/infer", json=request(**changes))
        return answer.status_code, answer.json()["error"].partition(":")[0]

    assert refusal() == (404, "exemplar_unknown")
    assert refusal(data=[99] * 4096) == (422, "invalid")
    assert refusal(shape=[1, 1, 4096]) == (422, "invalid")
    assert refusal(data=[[[3] * 64] * 64]) == (404, "exemplar_unknown")  # nested data is fine
    picture = {"name": "exemplar", "shape": [1, 64, 64, 3], "datatype": "UINT8", "data": [7] * 12288}
    answer = client.post("/v2/models/fake/infer", json={"inputs": [request()["inputs"][0], picture]})
    assert answer.json()["error"].startswith("invalid: label: a model for avatars needs the exemplar's label")
    wide = np.zeros((2048, 2049), np.uint8)
    body = {
        "inputs": [{**request()["inputs"][0], "shape": [1, *wide.shape], "parameters": {"binary_data_size": wide.size}}]
    }
    body["inputs"][0].pop("data")
    body["inputs"].append(request()["inputs"][1])
    head = json.dumps(body).encode()
    answer = client.post("/v2/models/fake/infer", content=head + wide.tobytes(), headers={HEADER: str(len(head))})
    assert (answer.status_code, answer.json()["error"].partition(":")[0]) == (413, "too_large")


def test_a_body_is_refused_by_its_headers_alone(service: Live) -> None:
    head = "POST /v2/models/fake/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", service.port)) as caller:
        caller.sendall(head.format(1 << 40).encode())
        answer = caller.makefile().read()  # until it is closed
    assert answer.startswith("HTTP/1.1 413 "), answer
    assert answer.endswith('{"error":"too_large: a body of 1099511627776 bytes; expected at most 8388608"}')


def test_requests_share_the_queue_and_its_batches(service: Live, client: httpx.Client, engine: FakeEngine) -> None:
    exemplar = service.service.demo[0].exemplar
    path, batcher = "/v2/models/fake/infer", service.service.batcher

    def wanted(value: int) -> dict[str, Any]:
        made = request(data=[value] * 4096)
        made["inputs"][1]["data"] = [exemplar]
        return made

    assert client.post(path, json=wanted(0)).status_code == 200  # it is encoded now
    engine.gate.clear()
    with ThreadPoolExecutor(4) as threads:
        running = threads.submit(client.post, path, json=wanted(1))
        service.until(lambda: batcher.tickets == 1 and batcher.waiting == 0)
        waiting = [threads.submit(client.post, path, json=wanted(value)) for value in (2, 3, 4)]
        service.until(lambda: batcher.waiting == 3)
        refused = client.post(path, json=wanted(5))
        engine.gate.set()
        answers = [future.result().json() for future in (running, *waiting)]
    assert (refused.status_code, refused.json()["error"].partition(":")[0]) == (429, "queue_full")
    assert int(refused.headers["retry-after"]) >= 1
    images = [np.array(answer["outputs"][0]["data"]).reshape(64, 64, 3) for answer in answers]
    assert engine.batches[-3:] == [1, 2, 1]
    assert all((a >= b).all() for a, b in itertools.pairwise(images))  # the fake engine paints higher ids darker
    assert not np.array_equal(images[0], images[3])


def test_tokens_guard_all_but_health(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("anna 0123456789abcdef\n")
    settings = read_config({"token_file": str(tmp_path / "tokens")})
    with live(FakeEngine(), settings) as running, httpx.Client(base_url=running.url) as client:
        for path in ("/v2", "/v2/models/fake", "/v2/models/fake/ready"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"authorization": "Bearer 0123456789abcdef"}).status_code == 200
        assert client.post("/v2/models/fake/infer", content=b"x").json() == {
            "error": "unauthorized: give a token: Authorization: Bearer TOKEN"
        }
        for path in ("/v2/health/live", "/v2/health/ready"):
            assert client.get(path).status_code == 200
        assert client.get("/v2", headers={"host": "evil.example"}).status_code == 400


def test_it_is_counted(client: httpx.Client) -> None:
    client.post("/v2/models/fake/infer", json=request())
    assert 'flashcocos_requests_total{code="404",route="/v2/models/{name}/infer"}' in client.get("/metrics").text
