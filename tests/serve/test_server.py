"""`flashcocos serve` as a process under load, every answer checked: small versions of the benchmarks `serving`."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from live_service import live
from tiny_bundle import write_tiny_bundle

from flashcocos.benchmarks.speed import serving
from flashcocos.cli import main
from flashcocos.serve.client import Client
from flashcocos.serve.config import read_config
from flashcocos.serve.engine import LocalEngine
from flashcocos.serve.server import _listen

DEMO = serving.PAIRS.parent


def test_batches_are_right() -> None:
    facts = serving.throughput(size=64, batch=4, clients=8, rounds=1, seconds=1, pairs=2)
    assert facts["other"] == 0
    assert facts["right"] > 0
    assert facts["items_a_batch"] > 2


def test_overload_loses_and_swaps_nothing() -> None:
    facts = serving.overload(size=64, times=10, seconds=2, queue=4, pairs=2)
    assert facts["other"] == 0
    assert facts["right"] > 0
    assert facts["refused"] > 0
    assert facts["rss_growth"] <= 0.1


def test_random_arrivals_are_answered_and_simulated() -> None:
    pytest.importorskip("simpy", reason="needs the extra bench")
    facts = serving.arrivals(size=64, load_share=0.5, seconds=2, pairs=2)
    assert facts["right"] == facts["asked"] > 0
    for share in ("p50_ms", "p99_ms"):  # how near they are is what the benchmark tells: here other tests run beside
        assert facts[share] > 0
        assert facts[f"simulated_{share}"] > 0


def test_a_soak_with_hang_ups_leaves_nothing_behind() -> None:
    facts = serving.soak(size=64, count=50, clients=4, aborts=0.4, pairs=2)
    assert facts["asked"] == 50
    assert facts["other"] == facts["queue"] == facts["more_threads"] == facts["more_files"] == 0
    assert (facts["right"], facts["aborted"]) == (30, 20)
    assert facts["rss_growth"] <= 0.1


def test_sigterm_answers_what_was_accepted_and_exits_0() -> None:
    facts = serving.drain(size=64, clients=6, times=1, pairs=2)
    assert (facts["accepted"], facts["right"], facts["exits_0"]) == (6, 6, 1)


def unfinished(server: serving.Server) -> socket.socket:
    """A request that the service has accepted and whose body does not come."""
    caller = socket.create_connection(("127.0.0.1", server.port))
    caller.sendall(b"PUT /v1/labels HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n")
    while not server.metric("inflight"):
        time.sleep(0.01)
    return caller


def test_a_second_signal_ends_it_at_once() -> None:
    with serving.Server("--set", "drain_s=60") as server, unfinished(server):
        server.terminate()
        while server.is_ready():
            time.sleep(0.01)
        server.terminate()
        assert server.wait() == 128 + signal.SIGTERM


def test_what_is_not_drained_in_time_is_told_by_the_exit_code() -> None:
    with serving.Server("--drain", "0.2", "--set", "body_s=60") as server, unfinished(server):
        server.terminate()
        assert server.wait() == 1


def test_exemplars_survive_a_restart(tmp_path: Path) -> None:
    folder = f"exemplar_folder={tmp_path / 'exemplars'}"
    picture, label = DEMO / "lorelei_9_exemplar.png", DEMO / "lorelei_9_exemplar_label.png"
    with serving.Server("--set", folder) as server, Client(server.url) as client:
        exemplar = client.encode_exemplar(picture, label, 96)
        before = client.translate(label, exemplar)
        server.terminate()
        assert server.wait() == 0
    assert [file.name for file in (tmp_path / "exemplars").iterdir()] == [f"{exemplar.id}.exemplar"]
    with serving.Server("--set", folder) as server, Client(server.url) as client:
        after = client.translate(label, exemplar)
    assert (before.image == after.image).all()


def test_a_taken_port_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        assert main(["serve", "--port", port]) == 1
    assert "cannot listen on 127.0.0.1, port" in capsys.readouterr().err
    assert gc.isenabled()


def test_garbage_is_collected_once_it_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    enabled = []

    def run(config: object, announce: Callable[[str], None]) -> int:
        enabled.append(gc.isenabled())
        announce("http://127.0.0.1:1")
        enabled.append(gc.isenabled())
        return 0

    monkeypatch.setattr("flashcocos.serve.server.run", run)
    try:
        assert main(["serve"]) == 0
    finally:
        gc.unfreeze()
    assert enabled == [False, True]


def test_answers_leave_at_once() -> None:
    with _listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP  # by which asyncio switches off the wait of 40 ms


def test_the_service_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from flashcocos.serve.server import run\n"
        "print('LOADED', sorted({'torch', 'triton', 'onnx', 'onnxscript', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "LOADED []\n"


def test_any_bundle_is_served(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "mine.zip")
    settings = read_config({"model": str(bundle), "device": "cpu"}, os.environ)
    with live(LocalEngine(settings), settings) as running, Client(running.url) as client:
        model = client.model()
        assert (model.name, model.limits.batch) == ("mine", 1)
        assert model.stages["warp"]["backend"] in ("numba", "numpy")
