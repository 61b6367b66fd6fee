"""The small model that ships inside the package, and the inputs that `flashcocos demo` translates with it.

Its model file, `SOURCE`, lies beside it: what `flashcocos train` goes on from and `flashcocos export` reads.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import InputError

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


def resolve_model(model: str | os.PathLike[str] | None = None) -> Path:
    """The path of the bundle that a user means.

    Args:
        model: a path, the name "avatars-128", or None for the same.

    Returns:
        The path; nothing is opened.

    Raises:
        InputError: the name is also that of a file or folder here, or the installation lacks the shipped model.
    """
    if model == NAME and Path(NAME).exists():
        raise InputError(f"{NAME} is the shipped model's name and also lies here; write ./{NAME} for what lies here")
    return default_model_path() if model is None or model == NAME else Path(model)
