"""The repository of the model that ships, under a real Triton Inference Server: values, refusals, batches."""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from real_triton import RealServer, real_server

from flashcocos.bundle.default_model import PAIRS, resolve_model
from flashcocos.export.triton_server import MAX_QUEUE, MODELS, export_triton
from flashcocos.preprocess.images import to_uint8
from flashcocos.runtime import Translation, Translator

http = pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")
TYPES = {"uint8": "UINT8", "float32": "FP32", "object": "BYTES"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    folder = tmp_path_factory.mktemp("triton")
    repository = export_triton(resolve_model(), folder / "models", platform="python")
    with real_server(repository, folder) as running:
        yield running


@pytest.fixture(scope="module")
def translator() -> Iterator[Translator]:
    with Translator(device="cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def pair() -> SimpleNamespace:
    label, picture, exemplar_label = PAIRS.read_text().splitlines()[1].split(",")
    read = [Image.open(PAIRS.parent / name) for name in (label, picture, exemplar_label)]
    return SimpleNamespace(
        label=np.array(read[0]), exemplar=np.array(read[1].convert("RGB")), exemplar_label=np.array(read[2])
    )


def ask(client: Any, model: str, outputs: tuple[str, ...], **inputs: np.ndarray) -> list[np.ndarray]:
    made = []
    for name, array in inputs.items():
        made.append(http.InferInput(name, (1, *array.shape), TYPES[array.dtype.name]))
        made[-1].set_data_from_numpy(array[None])
    answer = client.infer(model, made, outputs=[http.InferRequestedOutput(name) for name in outputs])
    return [answer.as_numpy(name)[0] for name in outputs]


@pytest.fixture
def client(server: RealServer) -> Iterator[Any]:
    with http.InferenceServerClient(server.address) as connection:
        yield connection


@pytest.fixture(scope="module")
def expected(translator: Translator, pair: SimpleNamespace) -> Translation:
    exemplar = translator.encode_exemplar(pair.exemplar, pair.exemplar_label, "input")
    return translator.translate(pair.label, exemplar, "input")


def test_all_models_are_ready(client: Any) -> None:
    assert [model for model in MODELS if not client.is_model_ready(model)] == []


def test_translations_are_those_of_the_translator(client: Any, pair: SimpleNamespace, expected: Translation) -> None:
    names = ("image", "warped", "confidence", "matches")
    *arrays, key = ask(client, "translate", (*names, "exemplar_id"), **vars(pair))
    for name, array in zip(names, arrays, strict=True):
        np.testing.assert_array_equal(array, getattr(expected, name), err_msg=name)
    (again,) = ask(client, "translate", ("image",), label=pair.label, exemplar_id=key)
    np.testing.assert_array_equal(again, expected.image)


def test_the_ensemble_is_the_same(
    client: Any, translator: Translator, pair: SimpleNamespace, expected: Translation
) -> None:
    exemplar = translator.encode_exemplar(pair.exemplar, pair.exemplar_label, "input")
    image, probability = ask(
        client, "translate_ensemble", ("image", "probability"),
        label=pair.label, phi=exemplar.phi[0], values=exemplar.values[0],
    )  # fmt: skip
    np.testing.assert_array_equal(to_uint8(image), expected.image)
    np.testing.assert_array_equal(probability, expected.confidence)


def test_an_exemplar_is_encoded_once(
    server: RealServer, client: Any, translator: Translator, pair: SimpleNamespace
) -> None:
    (key,) = ask(client, "translate", ("exemplar_id",), **vars(pair))
    exemplar = translator.encode_exemplar(pair.exemplar, pair.exemplar_label, "input")
    labels = [np.roll(pair.label, shift, 0) for shift in range(1, 21)]  # no two alike, for thetas are kept too
    before, bare, asked = server.counts("exemplar"), [], []
    for label in labels:
        start = time.perf_counter()
        expected = translator.translate(label, exemplar, "input").image
        bare.append(time.perf_counter() - start)
        start = time.perf_counter()
        (image,) = ask(client, "translate", ("image",), label=label, exemplar_id=key)
        asked.append(time.perf_counter() - start)
        np.testing.assert_array_equal(image, expected)
    ask(client, "translate", ("image",), **vars(pair))
    assert server.counts("exemplar") == before
    milliseconds = [1e3 * statistics.median(times) for times in (asked, bare)]
    print("ready after {:.1f} s; p50 {:.1f} ms, Translator {:.1f} ms".format(server.ready_s, *milliseconds))


def test_the_lines_of_the_docs_run(server: RealServer, tmp_path: Path, expected: Translation) -> None:
    page = (Path(__file__).parents[2] / "docs" / "triton-server.md").read_text()
    (script,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert "127.0.0.1:8000" in script
    names = PAIRS.read_text().splitlines()[1].split(",")
    for name, target in zip(names, ("label", "portrait", "portrait_label"), strict=True):
        shutil.copy(PAIRS.parent / name, tmp_path / f"{target}.png")
    command = [sys.executable, "-c", script.replace("127.0.0.1:8000", server.address)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"[0-9a-f]{32}\n", done.stdout)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "result.png")), expected.image)


def test_what_cannot_be_used_is_refused_by_its_status(client: Any, pair: SimpleNamespace) -> None:
    def refusal(**inputs: np.ndarray) -> tuple[str, str]:
        with pytest.raises(http.InferenceServerException) as caught:
            ask(client, "translate", ("image",), **inputs)
        return caught.value.status(), caught.value.message()

    unknown = np.array([b"0" * 32], object)
    assert refusal(label=pair.label, exemplar_id=unknown)[0] == "404"
    assert refusal(label=pair.label)[0] == "400"
    status, message = refusal(**vars(pair) | {"label": np.full_like(pair.label, 99)})
    assert (status, message.partition(" at")[0]) == ("400", "label: class id 99")


def test_a_flood_is_refused_in_part_and_runs_in_batches(
    server: RealServer, client: Any, translator: Translator, pair: SimpleNamespace
) -> None:
    half = {name: np.ascontiguousarray(array[::2, ::2]) for name, array in vars(pair).items()}  # a quarter of the work
    (key,) = ask(client, "translate", ("exemplar_id",), **half)
    exemplar = translator.encode_exemplar(half["exemplar"], half["exemplar_label"], "input")
    labels = [np.roll(half["label"], shift, 0) for shift in range(4)]
    before = {model: server.counts(model) for model in ("translate", "coarse")}

    def one(index: int) -> np.ndarray | str:
        with http.InferenceServerClient(server.address, network_timeout=120) as own:  # one a thread: it is gevent's
            try:
                return ask(own, "translate", ("image",), label=labels[index % 4], exemplar_id=key)[0]
            except http.InferenceServerException as error:
                return f"{error.status()}: {error.message()}"

    count = MAX_QUEUE + 24
    with ThreadPoolExecutor(count) as threads:
        answers = list(threads.map(one, range(count)))
    right = [translator.translate(label, exemplar, "input").image for label in labels]
    refused = [answer for answer in answers if isinstance(answer, str)]
    assert refused
    assert {answer.partition(":")[0] for answer in refused} == {"503"}
    assert all("maximum queue size" in answer for answer in refused)
    for index, answer in enumerate(answers):
        if not isinstance(answer, str):
            np.testing.assert_array_equal(answer, right[index % 4])
    for model, (inferences, executions) in before.items():
        inferred, executed = (
            now - then for now, then in zip(server.counts(model), (inferences, executions), strict=True)
        )
        assert inferred == count - len(refused) >= MAX_QUEUE
        assert executed < inferred / 2, model
        print(f"{count} requests at once: {len(refused)} refused, {inferred} ran in {executed} batches of {model}")
