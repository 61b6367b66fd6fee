"""docs/labels.md: its table is the palette, and its five commands make a picture."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image

import flashcocos
from flashcocos.preprocess.palette import CLASS_NAMES, hexadecimal, palette

ROOT = Path(flashcocos.__file__).parent
TEXT = (ROOT / "docs" / "labels.md").read_text(encoding="utf-8")


def test_the_table_is_the_palette() -> None:
    rows = re.findall(r"\| (\d+) \| (\w+)[^|]* \| `(#\w+)` \|", TEXT)
    stated = {int(number): (name, color) for number, name, color in rows}
    names = CLASS_NAMES["avatars"]
    assert stated == {number: (names[number], hexadecimal(color)) for number, color in enumerate(palette(12))}


def test_five_commands_from_a_drawing_to_a_picture(tmp_path: Path) -> None:
    commands = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)[0]
    assert len(commands.splitlines()) == 5
    programs = {"python": "", "flashcocos": "-m flashcocos.cli"}
    for name, module in programs.items():
        (tmp_path / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT.parent)}
    subprocess.run(["sh", "-ec", commands], cwd=tmp_path, env=environment, check=True)
    assert Image.open(tmp_path / "me.png").size == (128, 128)
