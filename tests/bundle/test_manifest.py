"""The bundle format: round trips, and everything a hostile or damaged bundle may try."""

from __future__ import annotations

import json
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from flashcocos.bundle import MANIFEST, STAGES, Bundle, Manifest, StageSpec, TensorSpec, write_bundle
from flashcocos.config import ModelConfig
from flashcocos.errors import BundleError, InputError

FILES = {f"{stage}.onnx": stage.encode() * 100 for stage in STAGES}


def manifest() -> Manifest:
    spec = (TensorSpec("x", "float32", ("batch", 3)),)
    stages = {stage: StageSpec(f"{stage}.onnx", spec, spec) for stage in STAGES}
    return Manifest(ModelConfig.preset("tiny"), "float32", 20, stages, {}, "CC0-1.0", {"model": {"epochs": 3}})


def write(path: Path) -> Path:
    return write_bundle(path, manifest(), FILES)


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest's JSON of a bundle folder."""
    fields = json.loads((bundle / MANIFEST).read_text())
    change(fields)
    (bundle / MANIFEST).write_text(json.dumps(fields))


@pytest.mark.parametrize("name", ["bundle", "bundle.zip", "new/folder/bundle.zip"])
def test_round_trip(tmp_path: Path, name: str) -> None:
    bundle = Bundle(write(tmp_path / name))
    bundle.verify()
    assert {file: bundle.read(file) for file in bundle.manifest.files} == FILES
    assert bundle.read_stage("query") == FILES["query.onnx"]
    assert bundle.manifest == Manifest.from_json(bundle.manifest.to_json())
    assert (bundle.manifest.config, bundle.manifest.stages) == (manifest().config, manifest().stages)
    assert (bundle.manifest.license, bundle.manifest.provenance) == ("CC0-1.0", {"model": {"epochs": 3}})


def test_names_and_colors_of_classes_are_optional(tmp_path: Path) -> None:
    named = msgspec.structs.replace(manifest(), class_names=("a",) * 12, palette=((1, 2, 3),) * 12)
    bundle = Bundle(write_bundle(tmp_path / "bundle", named, FILES))
    assert (bundle.manifest.class_names, bundle.manifest.palette) == (named.class_names, named.palette)
    edit(tmp_path / "bundle", lambda m: [m.pop(key) for key in ("class_names", "palette", "license", "provenance")])
    assert (Bundle(tmp_path / "bundle").manifest.class_names, Bundle(tmp_path / "bundle").manifest.palette) == ((), ())


def test_an_unlisted_file_is_not_read(tmp_path: Path) -> None:
    bundle = Bundle(write(tmp_path / "bundle"))
    (bundle.path / "other.onnx").write_bytes(b"unlisted")
    for name in ("other.onnx", MANIFEST, "../bundle/query.onnx"):
        with pytest.raises(BundleError, match="the manifest lists no file"):
            bundle.read(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="zip"), 'expected an object with "format"'),
        (lambda m: m.update(format_version=1), "format_version 1 is unknown to this flashcocos, which reads 4"),
        (lambda m: m.pop("format_version"), "format_version None is unknown"),
        (lambda m: m.update(extra=1), "unknown key extra; known: config, "),
        (lambda m: m.pop("opset"), "opset is missing"),
        (lambda m: m.update(precision="int4"), "precision 'int4' is not one of float32, float16"),
        (lambda m: m.update(opset="20"), "opset: expected int, got '20'"),
        (lambda m: m.update(provenance=[]), "provenance: expected a mapping, got \\[\\]"),
        (lambda m: m.update(config=[]), "config: expected a mapping, got \\[\\]"),
        (lambda m: m["config"].update(ngf=-1), "config.ngf: expected 1 to 4096, got -1"),
        (lambda m: m["config"].update(surprise=1), "unknown key config.surprise; known: task, "),
        (lambda m: m.update(files=[]), MANIFEST),
        (lambda m: m["files"]["query.onnx"].update(extra=1), MANIFEST),
        (lambda m: m["files"]["query.onnx"].update(bytes=-1), r"files\[...\].bytes: expected int >= 0"),
        (lambda m: m["files"]["query.onnx"].update(bytes=1 << 40), "bytes: expected int <= 2147483648"),
        (lambda m: m["files"]["query.onnx"].update(bytes=True), "bytes: expected int, got bool"),
        (lambda m: m["files"]["query.onnx"].update(sha256="00"), "sha256: expected str matching regex"),
        (lambda m: m["files"]["query.onnx"].update(sha256=None), "sha256: expected str, got null"),
        (lambda m: m.update(class_names=["a"] * 11), "class_names: expected one for each of 12 classes, got 11"),
        (lambda m: m.update(class_names=["\x1b[2J"] * 12), "class_names: '.x1b.2J' is not printable"),
        (lambda m: m.update(class_names=["x" * 61] * 12), r"class_names\[0\]: expected str of length <= 60"),
        (lambda m: m.update(palette=[[0, 0, 0]] * 13), "palette: expected one for each of 12 classes, got 13"),
        (lambda m: m.update(palette=[[0, 0, 256]] * 12), r"palette\[0\]\[2\]: expected int <= 255"),
        (lambda m: m.update(palette=[[0, 0]] * 12), r"palette\[0\]: expected array of length 3"),
        (lambda m: m["stages"].pop("query"), "expected the stages"),
        (lambda m: m["stages"].update(more=m["stages"]["query"]), "expected the stages"),
        (lambda m: m["stages"]["query"].update(file="absent.onnx"), "which is not among its files"),
        (lambda m: m["stages"]["query"].update(inputs=3), MANIFEST),
        (lambda m: m["stages"].update(query=None), MANIFEST),
    ],
)
def test_a_manifest_that_is_not_as_it_should_be(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    write(tmp_path / "bundle")
    edit(tmp_path / "bundle", change)
    with pytest.raises(BundleError, match=message):
        Bundle(tmp_path / "bundle")


@pytest.mark.parametrize(
    "name",
    ["../query.onnx", "/etc/passwd", "a/b.onnx", "a\\b.onnx", "C:x.onnx", ".hidden", "", "a\nb", MANIFEST, "x" * 101],
)
def test_file_names_with_paths_are_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path / "bundle")

    def rename(fields: dict[str, Any]) -> None:
        fields["files"][name] = fields["files"].pop("query.onnx")
        fields["stages"]["query"]["file"] = name

    edit(tmp_path / "bundle", rename)
    with pytest.raises(BundleError, match="is not allowed in a bundle"):
        Bundle(tmp_path / "bundle")
    with pytest.raises(BundleError, match="is not allowed in a bundle"):
        write_bundle(tmp_path / "other", manifest(), {**FILES, name: b""})
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1}', "[" * 100_000, b"\xff\xfe\x00"])
def test_what_is_no_manifest(text: str | bytes) -> None:
    with pytest.raises(BundleError, match=MANIFEST):
        Manifest.from_json(text)


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize(
    "content", [b"other" * 100, b"query" * 99, b"query" * 101, b""], ids=["changed", "short", "long", "empty"]
)
def test_changed_content_is_refused(tmp_path: Path, content: bytes, packed: bool) -> None:
    folder = write(tmp_path / "bundle")
    (folder / "query.onnx").write_bytes(content)
    path = folder
    if packed:
        path = tmp_path / "bundle.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in folder.iterdir():
                archive.write(file, file.name)
    bundle = Bundle(path)
    assert bundle.read("exemplar.onnx") == FILES["exemplar.onnx"]
    for read in (lambda: bundle.read("query.onnx"), lambda: bundle.read_stage("query"), bundle.verify):
        with pytest.raises(BundleError, match=r"query\.onnx does not match the manifest"):
            read()


def test_a_missing_file(tmp_path: Path) -> None:
    folder = write(tmp_path / "bundle")
    (folder / "query.onnx").unlink()
    with pytest.raises(BundleError, match=r"query\.onnx is missing"):
        Bundle(folder).verify()
    with zipfile.ZipFile(tmp_path / "bundle.zip", "w") as archive:
        archive.write(folder / MANIFEST, MANIFEST)
    with pytest.raises(BundleError, match=r"query\.onnx is missing"):
        Bundle(tmp_path / "bundle.zip").verify()


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    folder = write(tmp_path / "bundle")
    (folder / "query.onnx").rename(tmp_path / "elsewhere")
    (folder / "query.onnx").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="not a plain file"):
        Bundle(folder).verify()


def pack(folder: Path, path: Path, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.name)
    return path


def test_an_inflating_zip_is_read_no_further_than_stated(tmp_path: Path) -> None:
    folder = write(tmp_path / "bundle")
    (folder / "query.onnx").write_bytes(bytes(64 << 20))
    bundle = Bundle(pack(folder, tmp_path / "bomb.zip"))
    assert len(bundle._bytes("query.onnx", 1000)) == 1001
    with pytest.raises(BundleError, match="does not match"):
        bundle.read("query.onnx")


def test_a_zip_that_states_what_it_cannot_hold_is_refused(tmp_path: Path) -> None:
    content = {**FILES, "query.onnx": bytes(16 << 20)}  # with the right size and hash
    write_bundle(tmp_path / "bundle", manifest(), content)
    with pytest.raises(BundleError, match=r"its manifest states 16779016 bytes of files; expected at most"):
        Bundle(pack(tmp_path / "bundle", tmp_path / "bomb.zip"))
    Bundle(pack(tmp_path / "bundle", tmp_path / "plain.zip", zipfile.ZIP_STORED)).verify()


def test_the_sum_of_all_files_is_bounded(tmp_path: Path) -> None:
    folder = write(tmp_path / "bundle")
    edit(folder, lambda m: [spec.update(bytes=2 << 30) for spec in m["files"].values()])
    with pytest.raises(BundleError, match=r"states 8589934592 bytes of files; expected at most 4294967296"):
        Bundle(folder)


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_other_compression_is_refused(tmp_path: Path, method: int) -> None:
    with pytest.raises(BundleError, match=r"manifest\.json is neither stored nor deflated"):
        Bundle(pack(write(tmp_path / "bundle"), tmp_path / "other.zip", method))


def test_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    folder = write(tmp_path / "bundle")
    (folder / "\u00e4").write_bytes(b"")
    path = pack(folder, tmp_path / "b.zip")
    path.write_bytes(path.read_bytes().replace("\u00e4".encode(), b"\xff\xfe"))
    with pytest.raises(BundleError, match=r"manifest\.json cannot be read: .*utf-8"):
        Bundle(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_no_damage_to_a_zip_raises_anything_else(tmp_path: Path, method: int) -> None:
    content = pack(write(tmp_path / "bundle"), tmp_path / "b.zip", method).read_bytes()
    chance, refused = random.Random(0), 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(len(damaged))] = chance.choice((0, 1, 0xFF, chance.randrange(256)))
        (tmp_path / "b.zip").write_bytes(damaged)
        try:
            Bundle(tmp_path / "b.zip").verify()
        except BundleError:
            refused += 1
    assert refused > 200


def test_pipes_and_devices_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(InputError, match="this is a pipe or a device"):
            Bundle(path)
    folder = write(tmp_path / "bundle")
    (folder / "query.onnx").unlink()
    os.mkfifo(folder / "query.onnx")
    with pytest.raises(BundleError, match=r"query\.onnx is missing or not a plain file"):
        Bundle(folder).verify()


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.999], ids=["empty", "10 bytes", "half", "no end"])
def test_a_truncated_zip(tmp_path: Path, keep: float) -> None:
    path = write(tmp_path / "bundle.zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(BundleError, match=r"bundle\.zip: manifest\.json cannot be read"):
        Bundle(path)


def test_an_encrypted_zip(tmp_path: Path) -> None:
    path = write(tmp_path / "bundle.zip")
    content = bytearray(path.read_bytes())
    central = content.index(b"PK\x01\x02")
    content[6] |= 1  # the flag in the local header of the first file, the manifest
    content[central + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"manifest\.json cannot be read"):
        Bundle(path)


def test_what_is_absent_or_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no model bundle at .*`flashcocos export` writes one"):
        Bundle(tmp_path / "absent")
    with pytest.raises(BundleError, match=r"manifest\.json is missing"):
        Bundle(tmp_path)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    with pytest.raises(BundleError, match="cannot be read"):
        Bundle(tmp_path / "picture.png")


def test_a_failed_write_leaves_the_old_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bundle", "bundle.zip"):
        write(tmp_path / name)

    def fail(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    monkeypatch.setattr(zipfile.ZipFile, "writestr", fail)
    for name in ("bundle", "bundle.zip"):
        with pytest.raises(OSError, match="no space left"):
            write(tmp_path / name)
        Bundle(tmp_path / name).verify()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "bundle.zip"]


def test_only_a_bundle_or_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    bundle = write(tmp_path / "bundle")
    (bundle / "stale.onnx").write_bytes(b"from before")
    write(bundle)
    assert not (bundle / "stale.onnx").exists()
    (tmp_path / "empty").mkdir()
    Bundle(write(tmp_path / "empty")).verify()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").write_bytes(b"precious")
    (tmp_path / "file").write_bytes(b"precious")
    for name in ("mine", "file"):
        with pytest.raises(InputError, match="is not a model bundle"):
            write(tmp_path / name)
    assert (tmp_path / "mine" / "photo.jpg").read_bytes() == b"precious"
    assert (tmp_path / "file").read_bytes() == b"precious"
