"""`flashcocos serve --ray`: the answers of the single process, from two replicas, one of which dies under load."""

from __future__ import annotations

import importlib
import os
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

from flashcocos.benchmarks.speed import serving
from flashcocos.cli.main import _parser
from flashcocos.config import from_fields
from flashcocos.serve import ray_app
from flashcocos.serve.client import Client
from flashcocos.serve.config import ServeConfig

os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}  # read as Ray is imported
ray = pytest.importorskip("ray", reason="needs Ray: make test-cluster")
psutil = pytest.importorskip("psutil")
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]
DOCS = Path(__file__).parents[2] / "docs"
DEMO = serving.PAIRS.parent


def replicas(of: Any) -> list[Any]:
    """The processes of the replicas of a service."""
    tree = psutil.Process(of.process.pid).children(recursive=True)
    return [process for process in tree if "ServeReplica" in "".join(process.cmdline())]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    folder = tmp_path_factory.mktemp("exemplars")
    options = ["--port", str(port), "--queue", "4", "--set", f"exemplar_folder={folder}", "--set", "codec_threads=1"]
    with serving.Server("--ray", "--replicas", "2", *options) as server:
        yield server
        server.terminate()
        assert server.wait() == 0


def test_every_replica_answers_with_the_same_bytes_and_knows_every_exemplar(service: Any) -> None:
    assert len(replicas(service)) == 2
    label = DEMO / "lorelei_9_exemplar_label.png"
    with Client(service.url) as client:
        exemplar = client.encode_exemplar(DEMO / "lorelei_9_exemplar.png", label, 96)
        url = f"{service.url}/v1/exemplars/{exemplar.id}/translate"
        answers = {httpx.post(url, content=label.read_bytes()).raise_for_status().content for _ in range(12)}
        for blank in range(4):  # labels that no replica has built in
            client.encode_exemplar(DEMO / "lorelei_9_exemplar.png", np.full((96, 96), blank, np.uint8), 96)
    with serving.Server("--set", "codec_threads=1") as single, Client(single.url) as client:
        exemplar = client.encode_exemplar(DEMO / "lorelei_9_exemplar.png", label, 96)
        url = f"{single.url}/v1/exemplars/{exemplar.id}/translate"
        assert answers == {httpx.post(url, content=label.read_bytes()).content}


def test_a_full_queue_refuses_and_what_is_answered_is_right(service: Any) -> None:
    questions = serving.Bare(128, 1).questions(service.url)
    counts = flood(service, questions * 60, lambda: None)
    assert set(counts) == {"right", "429"}


def test_a_killed_replica_costs_requests_in_flight_and_comes_back(service: Any) -> None:
    questions = serving.Bare(64, 2).questions(service.url)
    doomed = replicas(service)[0]
    killed = []

    def kill() -> None:
        time.sleep(1)
        doomed.kill()
        killed.append(time.monotonic())

    counts = flood(service, questions * 60, kill, clients=4)
    assert {outcome for outcome in counts if outcome != "right" and not outcome.startswith("5")} <= {"429"}
    while sum(process.pid != doomed.pid for process in replicas(service)) < 2:
        assert time.monotonic() - killed[0] < 30
        time.sleep(0.1)
    assert set(flood(service, questions * 5, lambda: None, clients=1)) == {"right"}
    assert time.monotonic() - killed[0] < 30


def test_the_page_of_the_docs_is_true() -> None:
    from ray.serve.schema import ServeDeploySchema

    deploy = ServeDeploySchema.model_validate(yaml.safe_load((DOCS / "serve.yaml").read_text()))
    (application,) = deploy.applications
    module, _, name = application.import_path.partition(":")
    assert getattr(importlib.import_module(module), name) is ray_app.app
    fields = dict(application.args)
    assert fields.pop("replicas") == 2
    assert from_fields(ServeConfig, fields).queue == 32
    lines = re.findall("^flashcocos (.*)$", (DOCS / "cluster.md").read_text(), re.MULTILINE)
    assert [_parser().parse_args(line.split()).command for line in lines] == ["translate"] * 3 + ["serve"]


def flood(service: Any, questions: list[Any], meanwhile: Any, clients: int = 30) -> Counter[str]:
    """What became of questions that `clients` ask at a time: "right", "wrong", or a status."""
    counts: Counter[str] = Counter()
    waiting = iter(questions)
    lock = threading.Lock()

    def client() -> None:
        with httpx.Client(timeout=60) as http:
            while True:
                with lock:
                    question = next(waiting, None)
                if question is None:
                    return
                answer = http.post(service.url + question.path, content=question.body)
                right = "right" if answer.content == question.answer else "wrong"
                with lock:
                    counts[right if answer.status_code == 200 else str(answer.status_code)] += 1

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    meanwhile()
    for thread in threads:
        thread.join()
    print(counts)
    return counts
