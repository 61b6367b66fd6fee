"""The small model that ships inside the package, and the inputs that `flashcocos demo` translates with it."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import InputError

FOLDER = Path(__file__).parent / "models"
MODEL = FOLDER / "avatars-128.zip"
PAIRS = FOLDER / "demo" / "pairs.csv"  # input,exemplar,exemplar_label a line, all beside it


def default_model_path() -> Path:
    """Path of the shipped model bundle; `InputError` where the installation lacks it."""
    if not MODEL.is_file():
        raise InputError(f"this installation holds no model at {MODEL}; name a bundle, or install flashcocos again")
    return MODEL


def resolve_model(model: str | os.PathLike[str] | None) -> Path:
    """The path that `model` means: None and "avatars-128" are the model that ships, anything else is a path."""
    return default_model_path() if model in (None, MODEL.stem) else Path(model)
