"""docs/serving.md: its commands run as they stand, and it names every setting and metric."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fake_engine import FakeEngine
from live_service import Live, live
from PIL import Image

from flashcocos.bundle.default_model import PAIRS
from flashcocos.serve.config import ServeConfig, read_config
from flashcocos.serve.engine import LocalEngine

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
HOST = "127.0.0.1:8000"
URL = f"http://{HOST}"


def block(title: str, language: str) -> str:
    found = re.search(rf"^## {title}$.*?^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert found
    assert HOST in found[1]
    return found[1]


@pytest.fixture(scope="module")
def service() -> Iterator[Live]:
    with live(LocalEngine(read_config({"device": "cpu"}))) as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the files that the page speaks of."""
    names = {"label": "lorelei_9", "portrait": "lorelei_9_exemplar", "portrait_label": "lorelei_9_exemplar_label"}
    for name, source in names.items():
        shutil.copy(PAIRS.parent / f"{source}.png", tmp_path / f"{name}.png")
    return tmp_path


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_lines_of_curl_run(service: Live, folder: Path) -> None:
    script = "set -eu\n" + block("Ask with curl", "sh").replace(URL, service.url)
    done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ready", "")
    assert Image.open(folder / "result.png").size == (128, 128)
    assert json.loads((folder / "result.json").read_text())["size"] == [96, 128]
    assert json.loads((folder / "model.json").read_text())["name"] == "avatars-128"


def test_the_lines_of_python_run(service: Live, folder: Path) -> None:
    script = block("Ask from Python", "python").replace(URL, service.url)
    subprocess.run([sys.executable, "-c", script], cwd=folder, check=True)
    assert Image.open(folder / "result.png").size == (128, 128)


def test_the_lines_of_kserve_run(service: Live, folder: Path) -> None:
    pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")
    script = block("Ask by KServe v2", "python").replace(HOST, service.url.removeprefix("http://"))
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"[0-9a-f]{32}\n", done.stdout)
    assert Image.open(folder / "result.png").size == (128, 128)


def test_every_setting_is_described() -> None:
    assert [name for name in ServeConfig.__struct_fields__ if f"`{name}`" not in PAGE] == []


def test_every_metric_is_described() -> None:
    with live(FakeEngine()) as running:
        text = httpx.get(f"{running.url}/metrics").text
    names = set(re.findall(r"^# TYPE flashcocos_(\w+) ", text, re.MULTILINE))
    assert len(names) > 10
    assert [
        name for name in sorted(names) if not name.endswith("_created") and not re.search(rf"`{name}\b", PAGE)
    ] == []


def test_every_code_is_described() -> None:
    sources = "".join(path.read_text() for path in (Path(__file__).parents[2] / "serve").glob("*.py"))
    codes = set(re.findall(r'ApiError\(\s*\d+, "(\w+)"', sources)) - {"gone"}
    assert len(codes) > 10
    assert [code for code in sorted(codes) if f"`{code}`" not in PAGE] == []
