"""The command line, `flashcocos COMMAND`; one file a family of commands."""

from __future__ import annotations

from .main import main

__all__ = ["main"]
