"""The command line: help, one-line errors, exit codes, and that nothing heavy loads before a command runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flashcocos.cli import main

COMMANDS = ("translate", "demo", "info", "prepare", "download", "convert", "train", "export", "verify")
HEAVY = ("torch", "triton", "onnx", "onnxruntime", "numba", "numpy", "PIL", "cv2", "skimage")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"example:\n  flashcocos {command}" in capsys.readouterr().out


def test_every_command_is_tested(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    assert [name for name in listed if name.isalpha() and name.islower() and name in COMMANDS] == list(COMMANDS)


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from flashcocos.cli import main\n"
        "try: main(['translate', '--help'])\n"
        f"except SystemExit: print('LOADED', sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("LOADED []\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["translate", "--model", "no.zip", "--input", "a", "--exemplar", "b", "-o", "c"], "no model bundle at no.zip"),
        (["info", "no.zip"], "no model bundle at no.zip"),
        (["verify", "no.zip"], "no model bundle at no.zip"),
        (["prepare", "ade20k", "no_folder", "-o", "out"], "no_folder"),
        (["convert", "no.pth", "no.pth", "-o", "out.safetensors"], "no.pth"),
        (["export", "no.safetensors", "-o", "out"], "no.safetensors"),
        (["export", "no.safetensors", "-o", "out.onnx", "--single"], "no.safetensors"),
    ],
)
def test_an_error_is_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"flashcocos {arguments[0]}: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_debug_raises(tmp_path: Path) -> None:
    from flashcocos.errors import InputError

    with pytest.raises(InputError):
        main(["info", str(tmp_path / "no.zip"), "--debug"])


def test_a_missing_package_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "flashcocos.train.upstream", None)
    monkeypatch.delitem(sys.modules, "flashcocos.train.upstream")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["convert", "a.pth", "b.pth", "-o", str(tmp_path / "c.safetensors")]) == 1
    assert "the package torch is missing; pip install 'flashcocos[export]'" in capsys.readouterr().err
    # what `export` brings is not enough to train with
    monkeypatch.setitem(sys.modules, "flashcocos.train.trainer", None)
    monkeypatch.delitem(sys.modules, "flashcocos.train.trainer")
    assert main(["train", "avatars-128", "-o", str(tmp_path / "training")]) == 1
    assert "the package torch is missing; pip install 'flashcocos[train]'" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "-32", "axb", "1x2x3", "", "256x"])
def test_bad_size_is_wrong_usage(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["prepare", "ade20k", "x", "-o", "y", f"--size={text}"])
    assert stop.value.code == 2
    assert "expected SIDE or HEIGHTxWIDTH" in capsys.readouterr().err


def test_the_demo_translates_what_ships(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from flashcocos.preprocess import load_image

    assert main(["demo", "-o", str(tmp_path)]) == 0
    assert "6 of 6 pictures translated" in capsys.readouterr().out
    grids = sorted(tmp_path.glob("*.grid.png"))
    assert len(grids) == 6
    for path in grids:
        grid = load_image(path)
        assert grid.shape == (3, 128, 4 * 128)
        exemplar, result = grid[:, :, 128:256], grid[:, :, 384:]
        # the corners are background in every picture of the set, and take its color from the exemplar
        assert abs(exemplar[:, :8, :8].mean() - result[:, :8, :8].mean()) < 0.2
