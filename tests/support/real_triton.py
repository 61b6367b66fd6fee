"""A real Triton Inference Server over a model repository, out of the wheel of nvidia-pytriton in `.venv-triton`.

`make triton-server` makes that environment. The wheel has the Python backend alone, on the CPU.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

ENVIRONMENT = Path(__file__).parents[2] / ".venv-triton"


class RealServer:
    """A running server. `ready_s`: seconds from its start to readiness."""

    def __init__(self, port: int, ready_s: float) -> None:
        self.address, self.ready_s = f"127.0.0.1:{port}", ready_s

    def counts(self, model: str) -> tuple[int, int]:
        """(inferences, executions) so far: there are fewer of these where requests ran together."""
        (stats,) = httpx.get(f"http://{self.address}/v2/models/{model}/stats").json()["model_stats"]
        return stats["inference_count"], stats["execution_count"]


@contextlib.contextmanager
def real_server(repository: Path, folder: Path) -> Iterator[RealServer]:
    """Run the server until the block ends; skips the test where the environment is missing. folder: for its files."""
    if not (ENVIRONMENT / ".ready").exists():
        pytest.skip("needs Triton Inference Server in .venv-triton: make triton-server")
    library = Path(sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("INSTSONAME"))
    if not library.name.endswith(".so.1.0") or not library.exists():
        pytest.skip("needs a Python with a shared libpython, which the server's Python backend loads")
    (site,) = ENVIRONMENT.glob("lib/python3.*/site-packages")
    version = site.parent.name.removeprefix("python")
    server = site / "pytriton" / "tritonserver"
    backends = folder / "backends"
    shutil.copytree(server / "backends", backends)
    stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
    shutil.copy(stub, backends / "python" / stub.name)
    # the embedded Python looks for its environment along PATH; the stub links libpython
    libraries = f"{site / 'nvidia_pytriton.libs'}:{library.parent}"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment = clean | {"PATH": f"{ENVIRONMENT / 'bin'}:{os.environ['PATH']}", "LD_LIBRARY_PATH": libraries}
    port, metrics_port = _free_ports()
    command = [
        server / "bin" / "tritonserver", f"--model-repository={repository}", f"--backend-directory={backends}",
        "--http-address=127.0.0.1", f"--http-port={port}", "--allow-grpc=false", "--metrics-address=127.0.0.1",
        f"--metrics-port={metrics_port}", "--model-control-mode=none", "--disable-auto-complete-config",
        "--exit-timeout-secs=5", "--backend-config=python,stub-timeout-seconds=120",
    ]  # fmt: skip
    start = time.monotonic()
    with (folder / "server.log").open("wb") as log, subprocess.Popen(command, env=environment, stderr=log) as process:
        try:
            while not _is_ready(port):
                assert process.poll() is None, (folder / "server.log").read_text()[-4000:]
                assert time.monotonic() - start < 120, (folder / "server.log").read_text()[-4000:]
                time.sleep(0.02)
            yield RealServer(port, time.monotonic() - start)
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, (folder / "server.log").read_text()[-4000:]


def _free_ports() -> list[int]:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        return [listener.getsockname()[1] for listener in (one, other)]


def _is_ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/v2/health/ready").status_code == 200
    except httpx.HTTPError:
        return False
