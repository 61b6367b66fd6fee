"""The command line: help, one-line errors, exit codes, and that nothing heavy loads before a command runs."""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

import flashcocos
from flashcocos.bundle.default_model import MODEL, PAIRS
from flashcocos.cli import main
from flashcocos.cli.arguments import parse_target
from flashcocos.errors import InputError

HEAVY = ("torch", "triton", "onnx", "onnxruntime", "numba", "numpy", "PIL", "cv2", "skimage", "tqdm")
DEMO = PAIRS.parent
INPUT, EXEMPLAR, EXEMPLAR_LABEL = (str(DEMO / f"lorelei_12{name}.png") for name in ("", "_exemplar", "_exemplar_label"))
# at least one bad input of every command
BAD_INPUTS = [
    (["translate", "--model", "no.zip", "--input", "a", "--exemplar", "b", "-o", "c"], "no model bundle at no.zip"),
    (["translate", "--input", "a", "--exemplar", "b", "-o", "c"], "a does not exist"),
    (["translate", "--input", INPUT, "-o", "c"], "give an input and an exemplar (--input, --exemplar)"),
    (["translate", "--input", INPUT, "--exemplar", EXEMPLAR, "-o", "c"], "give --exemplar-label"),
    (["translate", "--input", INPUT, "--exemplar", EXEMPLAR, "-o", "c.webp"], "ending in .png, .jpg, .jpeg"),
    (["translate", "--input", "folder", "--exemplar", EXEMPLAR, "-o", "c"], "no label files in this folder"),
    (["translate", "--input", "fifo", "--exemplar", EXEMPLAR, "-o", "c"], "fifo is a FIFO; expected a file"),
    (["translate", "--input", INPUT, "--exemplar", "socket", "-o", "c"], "socket is a socket; expected a file"),
    (["translate", "--pairs", "folder", "-o", "c"], "folder is a folder; expected a file"),
    (["demo", "-o", "file"], "output file: expected a folder, because the input"),
    (["serve", "--model", "no.zip"], "no model bundle at no.zip"),
    (["serve", "--host", "0.0.0.0"], "0.0.0.0 is reachable from other machines, which needs a token_file"),
    (["serve", "--host", "0.0.0.0", "--token-file", "no.txt"], "no.txt does not exist"),
    (["serve", "--batch", "many"], "batch: expected int, got 'many'"),
    (["serve", "--set", "queue=0"], "queue: expected int >= 1, got 0"),
    (["serve", "--set", "ques=1"], "unknown key ques"),
    (["serve", "--config", "fifo.toml"], "fifo.toml is a FIFO; expected a file"),
    (["info", "no.zip"], "no model bundle at no.zip"),
    (["verify", "no.zip"], "no model bundle at no.zip"),
    (["verify", "avatars-128", "--checkpoint", "folder"], "folder is a folder; expected a file"),
    (["prepare", "ade20k", "no_folder", "-o", "out"], "no_folder"),
    (["prepare", "ade20k", "folder", "-o", "folder"], "output folder would overwrite the input folder"),
    (["download", "ade20k", "--cache", "file"], "file"),
    (["convert", "no.pth", "no.pth", "-o", "out.safetensors"], "no.pth does not exist"),
    (["convert", "file", "fifo", "-o", "out.safetensors"], "fifo is a FIFO; expected a file"),
    (["convert", "file", "file", "-o", "link"], "output link would overwrite the input file"),
    (["export", "no.safetensors", "-o", "out"], "no.safetensors does not exist"),
    (["export", "no.safetensors", "-o", "out.onnx", "--single"], "no.safetensors does not exist"),
    (["export", "file", "-o", "out.onnx"], "a bundle is a folder or a .zip"),
    (["export", "file", "-o", "file"], "output file would overwrite the input file"),
    (["build", "no.zip"], "no model bundle at no.zip"),
    (["build", "avatars-128", "--size", "big"], "size: expected one number or least:optimal:most, got 'big'"),
    (["export-triton", "no.zip", "-o", "models"], "no model bundle at no.zip"),
    (["export-triton", "avatars-128", "-o", "models", "--gpu"], "no compiled kernels for the warp on a GPU"),
    (["export-triton", "avatars-128", "-o", "file"], "file is a file; expected a folder to write"),
    (["quantize", "avatars-128", "-o", "out.zip"], "give an input and an exemplar (--input, --exemplar)"),
    (["quantize", "file", "--pairs", str(PAIRS), "-o", "link"], "output link would overwrite the input file"),
    (["pairs", "folder", "-o", "pairs.txt", "--vgg", "no.pth"], "no.pth does not exist"),
    (["pairs", "folder", "-o", "pairs.txt"], "--vgg"),
    (["train", "no.toml"], "no.toml does not exist"),
    (["train", "fifo.toml"], "fifo.toml is a FIFO; expected a file"),
    (["train", "avatars"], "neither a .toml file nor a preset"),
    (["evaluate", "no.zip", "--data", "avatars"], "no model bundle at no.zip"),
    (["evaluate", "file", "--data", "avatars", "--sheet", "file"], "output file would overwrite the input file"),
    (["evaluate", "avatars-128", "--data", "avatars", "-o", "a", "--sheet", "a"], "overwrite the input a"),
    (["evaluate", "avatars-128", "--data", "avatars", "-o", "folder"], "folder is a folder; expected a file to write"),
    (["bench", "no.zip"], "no model bundle at no.zip"),
    (["bench", "avatars-128", "-o", "rows.txt"], "name the file *.jsonl"),
    (["bench", "--profile", "--quick"], "leave --quick out"),
]


def commands() -> list[str]:
    """Every command that the parser has."""
    parser = importlib.import_module("flashcocos.cli.main")._parser()
    return [
        name for action in parser._actions if isinstance(action, argparse._SubParsersAction) for name in action.choices
    ]


@pytest.mark.parametrize("command", commands())
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: flashcocos {command} ")
    assert f"example:\n  flashcocos {command}" in text


def test_every_command_is_tested_and_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert {arguments[0] for arguments, _ in BAD_INPUTS} == {*commands()}
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert [line.split()[0] for line in text.splitlines() if line.startswith("  ")][: len(commands())] == commands()
    assert max(map(len, text.splitlines())) <= 80


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from flashcocos.cli import main\n"
        "try: main(['translate', '--help'])\n"
        f"except SystemExit: print('LOADED', sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("LOADED []\n")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with one of each kind of file in it."""
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").write_bytes(b"no model")
    Path("link").symlink_to("file")
    os.mkfifo("fifo")
    os.mkfifo("fifo.toml")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    return tmp_path


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUTS)
def test_an_error_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    before = sorted(folder.rglob("*"))
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"flashcocos {arguments[0]}: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert sorted(folder.rglob("*")) == before
    assert Path("file").read_bytes() == b"no model"


def test_debug_raises(tmp_path: Path) -> None:
    from flashcocos.errors import InputError

    with pytest.raises(InputError):
        main(["info", str(tmp_path / "no.zip"), "--debug"])


@pytest.mark.parametrize(
    ("arguments", "function", "package", "extra"),
    [
        (["convert", "file", "file", "-o", "c.safetensors"], "train.upstream.convert", "torch", "export"),
        (["train", "avatars-128", "-o", "training"], "train.trainer.train", "torch", "train"),
        (["evaluate", "avatars-128", "--data", "avatars"], "benchmarks.quality.evaluate.evaluate_model",
         "torchmetrics.image", "eval"),
        (["evaluate", "avatars-128", "--data", "avatars"], "benchmarks.quality.evaluate.evaluate_model",
         "dicebear", "eval"),
        (["bench"], "benchmarks.speed.bundle.bench", "onnxruntime", "cpu"),
    ],
)  # fmt: skip
def test_a_missing_package_names_its_extra(
    arguments: list[str],
    function: str,
    package: str,
    extra: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    folder: Path,
) -> None:
    def lacks(*_: object, **__: object) -> None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr(f"flashcocos.{function}", lacks)
    assert main(arguments) == 1
    expected = f"error: the package {package} is missing; pip install 'flashcocos[{extra}]'\n"
    assert capsys.readouterr().err == f"flashcocos {arguments[0]}: {expected}"
    metadata = tomllib.loads((Path(flashcocos.__file__).parent / "pyproject.toml").read_text())
    assert extra in metadata["project"]["optional-dependencies"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *((["prepare", "ade20k", "x", "-o", "y", f"--size={text}"], "expected SIDE or HEIGHTxWIDTH")
          for text in ("0", "-32", "axb", "1x2x3", "", "256x")),
        *(([command, "x", *more, f"--threads={text}"], "expected 1 to 256 threads, got")
          for command, more in (("translate", ["-o", "y"]), ("evaluate", ["--data", "avatars"]), ("bench", []))
          for text in ("0", "257", "100000", "-1", "two", "²")),
        (["translate", "--inptu\x1b[31m", "x", "-o", "y"], r"--inptu\x1b[31m"),
        (["nothing"], "invalid choice: 'nothing'"),
        ([], "required: COMMAND"),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("flashcocos")
    assert message in error
    assert error.count("\n") == 1


def test_no_model_is_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = folder / "m.png"
    shutil.copy(MODEL, model)
    what = ["--input", INPUT, "--exemplar", EXEMPLAR, "--exemplar-label", EXEMPLAR_LABEL]
    for arguments in (
        ["translate", "--model", "m.png", *what, "-o", "m.png"],
        ["translate", "--model", "m.png", *what, "-o", str(folder / "folder" / ".." / "m.png")],
        ["quantize", "m.png", *what, "-o", "m.png"],
        ["evaluate", "m.png", "--data", "avatars", "-o", "m.png"],
        ["bench", "m.png", "-o", "m.png"],
        ["build", "m.png", "--target", "sm_89", "-o", "m.png"],
    ):
        assert main(arguments) == 1
        assert "m.png would overwrite the input" in capsys.readouterr().err
    assert model.read_bytes() == MODEL.read_bytes()


def test_names_reach_the_terminal_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "a\x1b[2Jb\n\u202e.zip"]) == 1
    assert r"no model bundle at a\x1b[2Jb \u202e.zip" in capsys.readouterr().err


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


@pytest.mark.parametrize(
    ("text", "capability"), [("sm_89", 89), ("SM120", 120), ("86", 86), ("8.9", 89), ("12.0", 120)]
)
def test_targets_are_read_in_their_usual_forms(text, capability):
    assert parse_target(text) == capability


@pytest.mark.parametrize("text", ["", "ada", "sm_8", "sm_8900", "-89"])
def test_other_targets_are_refused(text):
    with pytest.raises(InputError, match="expected a compute capability as sm_89"):
        parse_target(text)
