"""`verify` passes what was just exported and names what is wrong with everything else."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from exported import CHANNELS, CLASSES, model_file, seeded_model
from onnx import ModelProto, TensorProto, helper, load_model_from_string, numpy_helper

from flashcocos.bundle import Bundle, write_bundle
from flashcocos.config import ModelConfig
from flashcocos.errors import BundleError, CheckpointError, InputError
from flashcocos.export.verify import BOUNDS, Bound, Report, compare, random_inputs, verify
from flashcocos.train.checkpoint import save_model

SIZES = ((64, 64), (64, 96))
MakeBundle = Callable[..., Path]


def failures(report: Report) -> list[str]:
    return [check.name for check in report.checks if not check.ok]


def rewrite(bundle: Path, stage: str, change: Callable[[ModelProto], None], **manifest: object) -> Path:
    """Change a graph, or the manifest, and write hashes that fit."""
    opened = Bundle(bundle)
    files = {name: opened.read(name) for name in opened.manifest.files}
    model = load_model_from_string(files[f"{stage}.onnx"])
    change(model)
    files[f"{stage}.onnx"] = model.SerializeToString()
    return write_bundle(bundle, msgspec.structs.replace(opened.manifest, **manifest), files)


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("config", [CLASSES, CHANNELS], ids=["classes", "channels"])
def test_an_export_equals_its_checkpoint(make_bundle: MakeBundle, config: ModelConfig, precision: str) -> None:
    report = verify(make_bundle(config, precision=precision), model_file(config), sizes=SIZES, batches=(1, 2))
    assert report.ok, report.table()
    compared = {(c.size, c.batch, c.scope, c.output) for c in report.comparisons}
    stage = ["theta", "phi", "values", "image", "warped_image"]
    assert compared == {
        (size, batch, scope, output)
        for size in SIZES
        for batch in (1, 2)
        for scope, outputs in (("stage", stage), ("end to end", stage[3:]))
        for output in outputs
    }
    # it ran, on the right weights: something differs, and by more for rounded weights
    psnr = [c.psnr for c in report.comparisons if c.output == "theta"]
    assert all(120 < p < math.inf for p in psnr) if precision == "float32" else all(50 < p < 90 for p in psnr)
    table = report.table()
    assert table.count("runs in onnxruntime") == 4
    assert table.count("on CPUExecutionProvider") == 4
    assert "64x96    2      end to end  image" in table
    assert table.endswith("\nverified")


def test_without_a_checkpoint(make_bundle: MakeBundle) -> None:
    report = verify(make_bundle(CLASSES, "bundle.zip"), sizes=SIZES, batches=(2, 1))
    assert report.ok, report.table()
    assert not report.comparisons
    names = [check.name for check in report.checks]
    assert "two runs give the same bits" in names
    assert "image at (64, 96) in batches of 2 and 1 agrees" in names


def test_one_wrong_weight_fails(make_bundle: MakeBundle) -> None:
    def flip(model: ModelProto) -> None:
        weight = next(t for t in model.graph.initializer if t.name.endswith("up_0.conv_0.weight"))
        array = numpy_helper.to_array(weight).copy()
        array[0, 0, 1, 1] *= -1
        weight.CopyFrom(numpy_helper.from_array(array, weight.name))

    report = verify(rewrite(make_bundle(CLASSES), "coarse", flip), model_file(CLASSES), sizes=SIZES[:1])
    assert not report.ok
    assert not failures(report)  # whole and valid, but not this model
    assert {(c.scope, c.output) for c in report.comparisons if not c.ok} == {
        ("stage", "image"),
        ("end to end", "image"),
    }
    assert "FAIL  64x64    1      stage       image" in report.table()
    assert report.table().endswith("\nNOT verified")


def test_other_weights_fail_everywhere(make_bundle: MakeBundle, tmp_path: Path) -> None:
    save_model(tmp_path / "other.safetensors", seeded_model(CLASSES, seed=1))
    report = verify(make_bundle(CLASSES), tmp_path / "other.safetensors", sizes=SIZES[:1], batches=(1,))
    passed = {(c.scope, c.output) for c in report.comparisons if c.ok}
    assert passed == {("stage", "values"), ("stage", "warped_image")}  # which no weight has touched


def test_another_configuration_is_not_compared(make_bundle: MakeBundle) -> None:
    report = verify(make_bundle(CHANNELS), model_file(CLASSES), sizes=SIZES[:1])
    assert failures(report) == ["configuration equals the checkpoint's"]
    assert not report.comparisons


def test_a_damaged_file_fails(make_bundle: MakeBundle) -> None:
    bundle = make_bundle(CLASSES)
    content = bytearray((bundle / "query.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / "query.onnx").write_bytes(content)
    report = verify(bundle, sizes=SIZES[:1])
    assert failures(report) == ["files match their size and SHA-256"]
    assert "query.onnx does not match the manifest" in report.table()


def rename_output(model: ModelProto) -> None:
    for node in model.graph.node:
        node.output[:] = ["other" if name == "theta" else name for name in node.output]
    model.graph.output[0].name = "other"


def add_noise(model: ModelProto) -> None:
    model.graph.node[-1].output[0] = "quiet"
    shape = helper.make_node("RandomUniformLike", ["quiet"], ["noise"])
    model.graph.node.extend([shape, helper.make_node("Add", ["quiet", "noise"], ["theta"])])


def divide_by_zero(model: ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "zero"))
    model.graph.node[-1].output[0] = "finite"
    model.graph.node.append(helper.make_node("Div", ["finite", "zero"], ["theta"]))


def break_order(model: ModelProto) -> None:
    model.graph.node.add().CopyFrom(model.graph.node[0])
    del model.graph.node[0]


def point_outside(model: ModelProto) -> None:
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="../secret")


def mark_half(model: ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.ones(4, np.float16), "half"))


@pytest.mark.parametrize(
    ("change", "check", "detail"),
    [
        (rename_output, "query: valid ONNX", "expected the outputs theta"),
        (add_noise, "query: valid ONNX", "RandomUniformLike are random"),
        (break_order, "query: valid ONNX", "not a valid ONNX model"),
        (point_outside, "query: valid ONNX", "lies in another file"),
        (mark_half, "query: valid ONNX", "states float32 weights"),
        (divide_by_zero, "finite results at (64, 64)", ""),
    ],
)
def test_a_graph_that_is_not_as_it_should_be(
    make_bundle: MakeBundle, change: Callable[[ModelProto], None], check: str, detail: str
) -> None:
    report = verify(rewrite(make_bundle(CLASSES), "query", change), sizes=SIZES[:1], batches=(1,))
    assert failures(report)[0].startswith(check)
    assert detail in next(found.detail for found in report.checks if not found.ok)


def test_a_stage_of_another_configuration(make_bundle: MakeBundle) -> None:
    other = msgspec.structs.replace(CLASSES, feature_channels=8)
    bundle = rewrite(make_bundle(CLASSES), "query", lambda model: None, config=other)
    assert failures(verify(bundle, sizes=SIZES[:1])) == ["stages are those of the configuration"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": ((256, 250),)}, r"size \(256, 250\): expected multiples of 32"),
        ({"sizes": ((32, 64),)}, "64 at least"),
        ({"sizes": ()}, "at least one of each"),
        ({"batches": (1, 0)}, "batches from 1"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        verify(tmp_path, **options)


def test_what_is_no_bundle_or_no_checkpoint(make_bundle: MakeBundle, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model bundle"):
        verify(tmp_path / "absent.zip")
    (tmp_path / "text.zip").write_text("not a zip")
    with pytest.raises(BundleError, match=r"text\.zip"):
        verify(tmp_path / "text.zip")
    with pytest.raises(CheckpointError, match=r"text\.zip"):
        verify(make_bundle(CLASSES), tmp_path / "text.zip", sizes=SIZES[:1])


def test_compare_by_hand() -> None:
    reference = np.array([0, 4, 2, 2], np.float32)
    found = compare((1, 4), 1, "stage", "x", reference + np.float32([0, 0, 0, 0.4]), reference, Bound(0.1, 26))
    assert found.max_abs_error == pytest.approx(0.4)
    assert found.error == pytest.approx(0.1)
    assert found.psnr == pytest.approx(20 * math.log10(4 / 0.2))
    assert compare((1, 4), 1, "stage", "x", reference, reference, Bound(0, 999)).ok
    bad = reference.copy()
    bad[1] = np.nan
    assert not compare((1, 4), 1, "stage", "x", bad, reference, Bound(math.inf, -math.inf)).ok
    assert not compare((1, 4), 1, "stage", "x", reference[:3], reference, Bound(1, 0)).ok


def test_every_precision_has_bounds_and_inputs_keep_their_items() -> None:
    assert set(BOUNDS) == {"float32", "float16", "int8"}
    one, two = random_inputs(CLASSES, (64, 96), 1), random_inputs(CLASSES, (64, 96), 2)
    for name, array in one.items():
        assert np.array_equal(two[name][:1], array)
        assert not np.array_equal(two[name][1:], array)
    assert one["label"].shape == (1, 64, 96)
    assert one["image"].shape == (1, 3, 96, 64)
    assert one["exemplar_label"].shape == (1, 96, 64)
    assert one["label"].max() < CLASSES.label_channels
