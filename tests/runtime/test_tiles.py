"""Tiles: where they lie, and that a picture made of them is the picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_bundle import CHANNELS, CLASSES, random_label, random_picture, write_tiny_bundle

from flashcocos.bundle import TensorSpec
from flashcocos.config import TILE_OVERLAP
from flashcocos.errors import InputError
from flashcocos.runtime import Translator
from flashcocos.runtime.options import check_tile
from flashcocos.runtime.tiles import is_cut, tile_side, tile_size, tiles


@pytest.mark.parametrize("tile", [64, 96, 160, 512])
def test_every_pixel_is_kept_once_and_far_from_a_cut(tile: int) -> None:
    for side in range(64, 1100, 32):
        spans = [part.columns for part in tiles(64, side, tile, 4)]
        assert [pixel for span in spans for pixel in range(span.first, span.last)] == list(range(side))
        (size,) = {span.size for span in spans}
        assert size == tile_side(side, tile) <= min(side, tile)
        for span in spans:
            end = span.start + span.size
            assert 0 <= span.start < end <= side
            assert span.start % 4 == 0
            assert span.start == 0 or span.first - span.start >= TILE_OVERLAP
            assert end == side or end - span.last >= TILE_OVERLAP
            assert span.first < span.last
        # as few tiles as the side allows, and none larger than so many need
        assert len(spans) == 1 or (len(spans) - 1) * (tile - 2 * TILE_OVERLAP) + 2 * TILE_OVERLAP < side
        assert size == 64 or len(spans) * (size - 32 - 2 * TILE_OVERLAP) + 2 * TILE_OVERLAP < side


def test_tiles_lie_row_by_row() -> None:
    parts = list(tiles(96, 128, 64, 4))
    assert [(part.rows.start, part.columns.start) for part in parts] == [(y, x) for y in (0, 32) for x in (0, 32, 64)]
    assert [(part.rows.first, part.columns.first) for part in parts[:4]] == [(0, 0), (0, 48), (0, 80), (48, 0)]
    assert tile_size(96, 128, 64) == (64, 64)
    assert tile_size(96, 32, 64) == (64, 32)
    for tile in (None, 128, 256):
        (whole,) = tiles(96, 128, tile, 4)
        assert (whole.rows.kept, whole.columns.inner) == (slice(0, 96), slice(0, 128))
        assert tile_size(96, 128, tile) == (96, 128)


def test_windows_follow_the_axes() -> None:
    tile = list(tiles(128, 160, 96, 4))[-1]
    assert (tile.rows.start, tile.columns.start) == (32, 64)
    features = TensorSpec("features", "float32", ("batch", 8, "half_height", "half_width"))
    label = TensorSpec("label", "uint8", ("batch", "height", "width"))
    assert tile.window(features) == (slice(None), slice(None), slice(16, 64), slice(32, 80))
    assert tile.window(TensorSpec("warped", "float32", ("batch", 3, "h", "w")))[2:] == (slice(8, 32), slice(16, 40))
    assert tile._replace(warp_stride=2).window(TensorSpec("warped", "float32", ("batch", 3, "h", "w"))) == (
        slice(None), slice(None), slice(16, 64), slice(32, 80),
    )  # fmt: skip
    assert tile.window(label) == (slice(None), slice(32, 128), slice(64, 160))
    assert tile.kept(label)[1:] == (slice(80, 128), slice(80, 160))
    assert tile.inner(label)[1:] == (slice(48, 96), slice(16, 96))
    assert [is_cut(spec) for spec in (features, label, TensorSpec("means", "float32", ("batch", 5, 3)))] == [1, 1, 0]


@pytest.mark.parametrize("config", [CLASSES, CHANNELS], ids=["classes", "channels"])
def test_a_picture_in_tiles_is_the_picture(tmp_path: Path, config) -> None:
    bundle = write_tiny_bundle(tmp_path / "m", config)
    labels = [random_label(config, 160, 224, seed) for seed in range(2)]
    results = []
    for tile in (None, 64, 96, 160):
        with Translator(bundle, device="cpu", warp="numpy", num_threads=1, tile=tile) as translator:
            exemplar_label = random_label(config, 96, 64, 5) if config.condition_on_label else None
            exemplar = translator.encode_exemplar(random_picture(96, 64), exemplar_label, "input")
            fine = translator._pipeline.engines["fine"]
            shapes, run = [], fine.run
            fine.run = lambda inputs, run=run, shapes=shapes: shapes.append(inputs["label"].shape[-2:]) or run(inputs)
            results.append(translator.translate(labels, exemplar, "input"))
            assert set(shapes) == {tile_size(160, 224, tile)}
            assert len(shapes) == len(list(tiles(160, 224, tile, 4)))
    for parts in results[1:]:
        for tiled, whole in zip(parts, results[0], strict=True):
            assert np.abs(tiled.image.astype(int) - whole.image).max() <= 1  # a sum's last digit at a rounding edge
            np.testing.assert_array_equal(tiled.warped, whole.warped)
            assert whole.image.std() > 10


@pytest.mark.parametrize("tile", [0, 32, 100, -64, 64.0, "64", True])
def test_bad_tiles(tmp_path: Path, tile: object) -> None:
    with pytest.raises(InputError, match=r"tile: expected a side in pixels, a multiple of 32 from 64, or None; got"):
        Translator(write_tiny_bundle(tmp_path / "m"), tile=tile)
    check_tile(None)
    check_tile(64)
