"""`translate --ray`: the same files as without, whatever dies meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_bundle import CLASSES, random_label, random_picture, write_tiny_bundle

from flashcocos.cli import main
from flashcocos.preprocess import save_label
from flashcocos.runtime.folder import SCRATCH

os.environ |= {  # read as Ray is imported
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "0" * 64,
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_timeout_ms": "2000",
}
ray = pytest.importorskip("ray", reason="needs Ray: make test-cluster")
psutil = pytest.importorskip("psutil")
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]
FILES = 160


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labels, one of them damaged, of four exemplars in turn; and what the plain command makes of them in `plain`."""
    folder = tmp_path_factory.mktemp("work")
    write_tiny_bundle(folder / "b.zip")
    (folder / "pictures").mkdir()
    for seed in range(4):
        Image.fromarray(random_picture(64, 64, seed)).save(folder / f"pictures/{seed}.png")
        save_label(folder / f"masks/{seed}.png", random_label(CLASSES, 64, 64, 1000 + seed))
    lines = []
    for seed in range(FILES):
        save_label(folder / f"labels/{seed}.png", random_label(CLASSES, 64, 64, seed))
        lines.append(f"labels/{seed}.png,pictures/{seed % 4}.png,masks/{seed % 4}.png\n")
    (folder / "labels/7.png").write_bytes(b"not an image")
    (folder / "list.csv").write_text("".join(lines))
    assert translate(folder, "plain") == 1
    return folder


def command(work: Path, output: str, *more: str) -> list[str]:
    options = ["--model", "b.zip", "--pairs", "list.csv", "--warp", "numpy", "--save", "warped,matches"]
    return [
        "translate",
        *(str(work / text) if "." in text[1:] else text for text in options),
        "-o",
        str(work / output),
        *more,
    ]


def translate(work: Path, output: str, *more: str) -> int:
    return main(command(work, output, *more))


def content(folder: Path) -> dict[str, Any]:
    """Every file below a folder, hidden ones too; arrays of .npz, which holds the time."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.suffix != ".npz" else arrays(path)
        for path in folder.rglob("*")
        if path.is_file()
    }


def arrays(path: Path) -> dict[str, bytes]:
    with np.load(path) as stored:
        return {name: stored[name].tobytes() for name in stored}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three machines of one processor each, on this one; deaths are noticed within seconds."""
    from ray.cluster_utils import Cluster

    size = {"num_cpus": 1, "object_store_memory": 128 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**size, "include_dashboard": False})
    try:
        cluster.nodes_ = [cluster.add_node(**size) for _ in range(2)]
        cluster.wait_for_nodes()
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_killed_actors_and_machines_lose_nothing(work: Path, cluster: Any, capsys: pytest.CaptureFixture[str]) -> None:
    out = work / "killed"
    job = subprocess.Popen(
        [sys.executable, "-m", "flashcocos.cli", *command(work, "killed", "--ray", cluster.address)],
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: made(out) > 5, job)
    actors = [p for p in psutil.process_iter(["cmdline"]) if "MapWorker" in "".join(p.info["cmdline"] or [])]
    assert len(actors) > 1
    os.kill(actors[0].pid, signal.SIGKILL)
    before = made(out)
    wait_for(lambda: made(out) > before + 10, job)
    cluster.remove_node(cluster.nodes_[0], allow_graceful=False)
    assert made(out) < FILES - 1
    assert job.wait(90) == 1, job.stderr.read()  # as without Ray: one label is damaged
    assert content(out) == content(work / "plain")
    for more in (["--ray", cluster.address], []):  # gaps, and what a killed process leaves
        (out / "labels/3.png").unlink()
        (out / "labels/5.matches.npz").unlink()
        (out / SCRATCH).mkdir()
        (out / SCRATCH / ".flashcocos-12345678.png").write_bytes(b"half")
        kept = (out / "labels/4.png").stat().st_mtime_ns
        capsys.readouterr()
        assert translate(work, "killed", "--resume", *more) == 1
        assert f"2 translated, {FILES - 3} skipped, 1 failed" in capsys.readouterr().out
        assert (out / "labels/4.png").stat().st_mtime_ns == kept
        assert content(out) == content(work / "plain")


def test_what_the_actors_cannot_do_is_one_line(work: Path, cluster: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert translate(work, "out", "--ray", cluster.address, "--backend", "openvino", "--precision", "bfloat16") == 1
    assert "error: the Ray job failed: flashcocos.errors.BackendError: " in capsys.readouterr().err
    assert not (work / "out").exists()


def test_no_cluster_is_one_line(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert translate(work, "out", "--ray", "127.0.0.1:1") == 1
    assert (
        "error: no Ray cluster at 127.0.0.1:1: [Errno 111] Connection refused; start one, with "
        in capsys.readouterr().err
    )


def made(folder: Path) -> int:
    return len(list(folder.glob("labels/*.png")))


def wait_for(happens: Any, job: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 60
    while not happens():
        assert job.poll() is None, job.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.02)
