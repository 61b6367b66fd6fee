"""The store of engines: what is served, what is refused and in which words."""

from __future__ import annotations

import json
import sys

import msgspec
import pytest
from tiny_bundle import write_tiny_bundle

from flashcocos.bundle import STAGES, Bundle
from flashcocos.errors import BackendError, InputError
from flashcocos.runtime.gpu import store
from flashcocos.runtime.gpu.store import EngineKey, EngineRecord, Profile, find_engines, read_engine, write_engine
from flashcocos.runtime.tiles import tile_size

SQUARE = Profile((1, 1, 1), (64, 64, 64), (64, 64, 64))
RANGE = Profile((1, 1, 4), (64, 128, 256), (64, 128, 256))
HERE = {"variant": "tensorrt-rtx", "version": "1.7", "architecture": 89}


@pytest.fixture
def bundle(tmp_path):
    return Bundle(write_tiny_bundle(tmp_path / "model"))


def record(bundle, stage="query", **changes):
    sha256 = bundle.manifest.files[bundle.manifest.stages[stage].file].sha256
    key = EngineKey(stage, sha256, "tensorrt-rtx", "1.7", (86, 89), "float16", SQUARE)
    return EngineRecord(msgspec.structs.replace(key, **changes), 10, 20, 0, "")


def store_all(bundle, folder, **changes):
    for stage in STAGES:
        write_engine(folder, record(bundle, stage, **changes), stage.encode())


def test_what_was_written_is_found_and_read(bundle, tmp_path):
    store_all(bundle, tmp_path)
    found = find_engines(bundle, tmp_path, **HERE)
    assert {one.key.stage for one in found} == set(STAGES)
    for one in found:
        assert read_engine(tmp_path, one) == one.key.stage.encode()
        assert one.key == record(bundle, one.key.stage).key
        assert (one.weight_bytes, one.activation_bytes, one.bytes) == (10, 20, len(one.key.stage))


def test_what_is_int8_is_told_beside_the_precision(bundle, tmp_path):
    written = write_engine(tmp_path, msgspec.structs.replace(record(bundle), int8_convolutions=36), b"engine")
    assert store.list_engines(tmp_path) == [written]
    assert written.arithmetic == "int8 and float16"
    path = tmp_path / f"{written.key.stem}.json"
    fields = json.loads(path.read_text())
    del fields["int8_convolutions"]  # as flashcocos wrote before it built int8 engines
    path.write_text(json.dumps(fields))
    assert [one.arithmetic for one in store.list_engines(tmp_path)] == ["float16"]


def test_static_engines_come_first(bundle, tmp_path):
    store_all(bundle, tmp_path, profile=RANGE)
    store_all(bundle, tmp_path)
    assert [one.key.profile.static for one in find_engines(bundle, tmp_path, **HERE)] == [True] * 4 + [False] * 4


def test_the_fastest_complete_precision_is_served_unless_one_is_named(bundle, tmp_path):
    store_all(bundle, tmp_path, precision="float32")
    write_engine(tmp_path, record(bundle), b"float16 of one stage alone")
    assert {one.key.precision for one in find_engines(bundle, tmp_path, **HERE)} == {"float32"}
    store_all(bundle, tmp_path)
    assert {one.key.precision for one in find_engines(bundle, tmp_path, **HERE)} == {"float16"}
    assert {one.key.precision for one in find_engines(bundle, tmp_path, **HERE, precision="float32")} == {"float32"}


@pytest.mark.parametrize(
    "change", [{"precision": "float32"}, {"architectures": (89,)}, {"profile": RANGE}, {"revision": 0}]
)
def test_every_part_of_the_key_makes_another_file(bundle, change):
    key = record(bundle).key
    assert msgspec.structs.replace(key, **change).stem != key.stem


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"graph_sha256": "0" * 64}, "of this bundle (it was changed since they were built)"),
        ({"revision": 0}, "of these graphs by this flashcocos"),
        ({"variant": "tensorrt"}, "of variant tensorrt-rtx"),
        ({"version": "1.6"}, "of tensorrt-rtx 1.7, which is installed, in"),
        ({"architectures": (86, 120)}, "for architecture sm_89 in"),
        ({"precision": "float32"}, "of precision float16 in"),
    ],
)
def test_what_does_not_fit_is_named_with_the_remedy(bundle, tmp_path, changes, message):
    store_all(bundle, tmp_path / "engines", **changes)
    with pytest.raises(BackendError) as caught:
        find_engines(bundle, tmp_path / "engines", **HERE, precision="float16")
    assert message in str(caught.value)
    assert f"flashcocos build {bundle.path} --variant tensorrt-rtx --target sm_89" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_engines_and_missing_stages(bundle, tmp_path):
    with pytest.raises(BackendError, match=r"no TensorRT engines in .*; flashcocos build"):
        find_engines(bundle, tmp_path / "engines", **HERE)
    write_engine(tmp_path / "engines", record(bundle), b"engine")
    with pytest.raises(BackendError, match=r"no TensorRT engines of all stages in one precision .* query in float16"):
        find_engines(bundle, tmp_path / "engines", **HERE)


@pytest.mark.parametrize("content", [b"engin", b"engine!", b"anders"])
def test_a_damaged_engine_is_refused(bundle, tmp_path, content):
    written = write_engine(tmp_path, record(bundle), b"engine")
    (tmp_path / f"{written.key.stem}.engine").write_bytes(content)
    with pytest.raises(BackendError, match="damaged or cut short; remove it"):
        read_engine(tmp_path, written)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("precision", "float32", "it does not belong to the engine of this name"),
        ("stage", "warp", r"key\.stage: expected .*query"),
        ("precision", "float8", r"key\.precision: expected .*float16"),
        ("profile", {"batch": [1]}, r"key\.profile"),
        ("architectures", None, r"key\.architectures: expected array"),
        ("extra", 1, r"unknown key key\.extra"),
    ],
)
def test_a_description_that_makes_no_sense_is_refused(bundle, tmp_path, field, value, message):
    written = write_engine(tmp_path, record(bundle), b"engine")
    path = tmp_path / f"{written.key.stem}.json"
    fields = json.loads(path.read_text())
    fields["key"][field] = value
    path.write_text(json.dumps(fields))
    with pytest.raises(BackendError, match=rf"cannot be used: {message}.*; remove it with its \.engine"):
        store.list_engines(tmp_path)
    path.unlink()
    assert store.list_engines(tmp_path) == []  # an engine without its description is none


def test_profiles_say_what_they_hold():
    assert SQUARE.static
    assert not RANGE.static
    assert [RANGE.supports(*shape) for shape in ((4, 256, 64), (5, 256, 64), (1, 288, 64))] == [True, False, False]
    assert str(SQUARE) == "64 x 64, batch 1"
    assert str(RANGE) == "64:128:256 x 64:128:256, batch 1:1:4"


def test_the_default_folder_lies_beside_the_bundle(tmp_path):
    assert store.default_folder(tmp_path / "model.zip") == tmp_path / "model.engines"
    assert store.default_folder(tmp_path / "model.v2") == tmp_path / "model.v2.engines"


@pytest.mark.parametrize(("variant", "extra"), [("tensorrt", "tensorrt"), ("tensorrt-rtx", "rtx")])
def test_a_missing_variant_names_its_extra(monkeypatch, variant, extra):
    monkeypatch.setitem(sys.modules, variant.replace("-", "_"), None)
    with pytest.raises(BackendError, match=rf"{variant} cannot be imported .*pip install flashcocos\[{extra}\]"):
        store.import_variant(variant)
    with pytest.raises(InputError, match="variant 'trt' is unknown; expected one of tensorrt, tensorrt-rtx"):
        store.import_variant("trt")


def test_the_profile_of_a_tiled_stage_holds_every_tile(bundle):
    assert SQUARE.tiled(64) == SQUARE == SQUARE.tiled(None)
    assert Profile((1, 1, 1), (512,) * 3, (1024,) * 3).tiled(512) == Profile((1, 1, 1), (512,) * 3, (384,) * 3)
    for tile in (64, 96, 160, 512):
        tiled = RANGE.tiled(tile)
        sizes = {tile_size(height, width, tile) for height in range(64, 257, 32) for width in range(64, 257, 32)}
        assert all(tiled.supports(4, *size) for size in sizes)
        assert tiled.height == (min(h for h, _ in sizes), tile_size(128, 128, tile)[0], max(h for h, _ in sizes))
