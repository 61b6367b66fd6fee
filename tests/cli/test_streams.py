"""What the shell does to a command: pipes that close, closed and ASCII streams, Ctrl-C and SIGTERM."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flashcocos.bundle.default_model import PAIRS
from flashcocos.cli import main
from flashcocos.preprocess import save_label

COMMAND = [sys.executable, "-m", "flashcocos.cli"]


@pytest.mark.parametrize("arguments", [["--help"], ["info"]])
def test_a_pipe_that_closes_ends_a_command_quietly(arguments: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run([*COMMAND, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_translation_without_standard_error(tmp_path: Path) -> None:
    lists = PAIRS.read_text().splitlines()
    (tmp_path / "one.csv").write_text(f"{lists[-1]}\n")
    closed = ["sh", "-c", 'exec "$@" 2>&-', "sh"]
    options = [
        "--pairs",
        "one.csv",
        "--input",
        PAIRS.parent,
        "--exemplar",
        PAIRS.parent,
        "--exemplar-label",
        PAIRS.parent,
    ]
    command = [*closed, *COMMAND, "translate", *options, "--warp", "numpy", "-o", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "1 translated, 0 skipped, 0 failed: out\n")


def test_errors_without_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["info", "no.zip"]) == 1
    monkeypatch.setattr(sys, "stderr", open("/dev/full", "w", buffering=1))  # noqa: SIM115
    assert main(["info", "no.zip"]) == 1


def test_a_name_that_the_terminal_has_no_letters_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_label(tmp_path / "labels/a.png", np.ones((8, 8), np.uint8))
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    assert main(["prepare", "ade20k", str(tmp_path / "labels"), "-o", str(tmp_path / "é漢")]) == 0
    assert written.getvalue().endswith(b"\\xe9\\u6f22\n")
    assert (tmp_path / "é漢/a.png").is_file()


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_ends_a_command_and_leaves_nothing_half(
    number: signal.Signals,
    word: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def save(path: Path, _: object) -> None:
        path.write_bytes(b"half a picture")
        signal.raise_signal(number)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent may have made us ignore it
    monkeypatch.setattr("flashcocos.runtime.folder._save", save)
    try:
        assert main(["demo", "-o", str(tmp_path)]) == 128 + number
    finally:
        signal.signal(signal.SIGINT, handler)
    assert capsys.readouterr().err == f"flashcocos demo: {word}\n"
    assert [*tmp_path.iterdir()] == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
