"""The model file of the shipped model: exported, it is the shipped bundle."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from flashcocos.bundle.default_model import MODEL, PAIRS, SOURCE
from flashcocos.export.bundle import export_bundle
from flashcocos.runtime import Translator


def test_the_exported_model_file_makes_the_shipped_pictures(tmp_path: Path) -> None:
    path = export_bundle(SOURCE, tmp_path / "again.zip", precision="float16")
    pairs = list(csv.DictReader(PAIRS.read_text(encoding="utf-8").splitlines()))
    assert len(pairs) == 6
    with Translator(MODEL, device="cpu") as shipped, Translator(path, device="cpu") as again:
        assert again.config == shipped.config
        assert again.bundle.manifest.class_names == shipped.bundle.manifest.class_names
        assert again.bundle.manifest.palette == shipped.bundle.manifest.palette
        for pair in pairs:
            label, exemplar, exemplar_label = (
                PAIRS.parent / pair[key] for key in ("input", "exemplar", "exemplar_label")
            )
            images = [
                translator.translate(label, translator.encode_exemplar(exemplar, exemplar_label)).image
                for translator in (shipped, again)
            ]
            np.testing.assert_array_equal(*images)
