"""The small model that ships inside the package, and the inputs that `flashcocos demo` translates with it.

Its model file, `SOURCE`, lies beside it: what `flashcocos train` goes on from and `flashcocos export` reads.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import InputError
from .manifest import Bundle

NAME = "avatars-128"
FOLDER = Path(__file__).parent / "models"
MODEL = FOLDER / f"{NAME}.zip"
SOURCE = FOLDER / f"{NAME}.safetensors"
PAIRS = FOLDER / "demo" / "pairs.csv"  # input,exemplar,exemplar_label a line, all beside it


def default_model_path() -> Path:
    """Path of the shipped model bundle; `InputError` where the installation lacks it."""
    if not MODEL.is_file():
        raise InputError(f"this installation has no model at {MODEL}; name a bundle, or install flashcocos again")
    return MODEL


def resolve_model(model: str | os.PathLike[str] | Bundle | None = None) -> Path | Bundle:
    """The bundle that a user means.

    Args:
        model: a path, an opened bundle, the name "avatars-128", or None for the same.

    Returns:
        The path of a bundle, or the opened bundle itself.

    Raises:
        InputError: `model` is of another type, the name is also that of a file here, or the installation lacks the
            shipped model.
    """
    if isinstance(model, Bundle):
        return model
    if model == NAME and Path(NAME).exists():
        raise InputError(f"{NAME} is the shipped model's name and also lies here; write ./{NAME} for what lies here")
    if model is None or model == NAME:
        return default_model_path()
    if not isinstance(model, str | os.PathLike):
        raise InputError(f"model: expected a path or {NAME!r}, got {type(model).__name__}")
    return Path(model)
