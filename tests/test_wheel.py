"""The wheel as a user gets it: what is in it, and that it works outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DATA = {".zip", ".safetensors", ".md", ".png", ".csv", ".toml", ".html", ".css", ".js", ".svg"}

USE = """
import contextlib, io, re, sys
import flashcocos
from flashcocos.bundle.default_model import MODEL, PAIRS
from flashcocos.cli import main

def printed(*arguments):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            main(arguments)
        except SystemExit as stop:
            assert stop.code == 0, (arguments, stop.code)
    return out.getvalue()

print(flashcocos.__file__)
commands = re.findall(r"^ +([a-z]+)  +[A-Z]", printed("--help"), re.MULTILINE)
assert {"translate", "train", "export", "bench"} <= set(commands), commands
for command in commands:
    assert f"flashcocos {command}" in printed(command, "--help")
label, exemplar, exemplar_label = PAIRS.read_text().split()[-1].split(",")
inputs = ["--input", str(PAIRS.parent / label), "--exemplar", str(PAIRS.parent / exemplar)]
inputs += ["--exemplar-label", str(PAIRS.parent / exemplar_label)]
# numpy, for a fresh environment would compile numba's kernels first
sys.exit(main(["translate", "--model", str(MODEL), *inputs, "--warp", "numpy", "-o", "picture.png"]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that nothing of an earlier build in the checkout gets into it."""
    folder = tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "training", "demo_output", "__pycache__")
    shutil.copytree(ROOT, folder / "source", ignore=unwanted)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(folder)!r})"
    run = subprocess.run([sys.executable, "-c", build], cwd=folder / "source", capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "Deprecat" not in run.stderr
    (path,) = folder.glob("flashcocos-*.whl")
    return path


def test_the_wheel_holds_the_package_and_its_data_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    source = wheel.parent / "source"
    files = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    files = {path for path in files if path.parts[0] not in {"tests", "build"}}
    code = {path for path in files if path.suffix == ".py"}
    data = {path for path in files if path.parent.name in {"models", "demo", "page", "presets"} and path.suffix in DATA}
    expected = code | {path for path in data if "sheet" not in path.name} | {Path("py.typed")}
    assert inside == {f"flashcocos/{path.as_posix()}" for path in expected}


def test_the_wheel_works_in_a_fresh_environment(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True)
    # the dependencies are borrowed from this environment; a path in a .pth file brings packages, not the editable
    # flashcocos, whose own .pth file is read in a site folder only
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    run = subprocess.run([python, "-c", USE], cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(str(packages / "flashcocos"))
    assert (tmp_path / "picture.png").stat().st_size > 1000
    version = subprocess.run(
        [environment / "bin" / "flashcocos", "--version"], env=clean, capture_output=True, text=True
    )
    assert version.stdout.split() == ["flashcocos", wheel.name.split("-")[1]]
