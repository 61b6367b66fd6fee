"""Model bundles, the contract between export and runtime: what a bundle contains, and how it is read and written.

`Bundle` opens one, `write_bundle` writes one, `Manifest` is its description. `stages` lists the inputs and outputs of
every stage, `graph_check` refuses graphs that name other files, `default_model` finds the model in this package.
"""

from __future__ import annotations

from .manifest import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    MAX_FILE_BYTES,
    MAX_MANIFEST_BYTES,
    PRECISIONS,
    STAGES,
    Bundle,
    FileSpec,
    Manifest,
    StageSpec,
    TensorSpec,
    write_bundle,
)

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "MANIFEST",
    "MAX_FILE_BYTES",
    "MAX_MANIFEST_BYTES",
    "PRECISIONS",
    "STAGES",
    "Bundle",
    "FileSpec",
    "Manifest",
    "StageSpec",
    "TensorSpec",
    "write_bundle",
]
