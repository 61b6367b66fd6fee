"""The translator on hand-made bundles: results, sizes, batches, threads, what it refuses, and what it imports."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from PIL import Image
from tiny_bundle import CHANNELS, CLASSES, random_label, random_picture, write_tiny_bundle

from flashcocos.bundle import Bundle
from flashcocos.errors import BackendError, BundleError, InputError
from flashcocos.preprocess import save_label
from flashcocos.runtime import Exemplar, Translation, Translator
from flashcocos.runtime.cpu import pipeline as cpu_pipeline


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Translator:
    return Translator(write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "classes.zip", CLASSES), warp="numpy")


@pytest.fixture(scope="module")
def channels(tmp_path_factory: pytest.TempPathFactory) -> Translator:
    return Translator(write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "channels", CHANNELS), warp="numpy")


def exemplar_of(translator: Translator, seed: int = 0, size: Any = None) -> Exemplar:
    label = random_label(translator.config, 64, 64, seed) if translator.config.condition_on_label else None
    return translator.encode_exemplar(random_picture(64, 64, seed), label, size)


def same(result: Translation, expected: Translation) -> bool:
    return all(
        np.array_equal(getattr(result, name), getattr(expected, name)) for name in ("image", "warped", "matches")
    )


def test_a_label_finds_its_own_places(classes: Translator) -> None:
    """The exemplar's own label as input: each position matches itself, and its colors come back."""
    label = np.arange(64).reshape(8, 8).repeat(8, 0).repeat(8, 1).astype(np.uint8) * 7 % 12
    picture = random_picture(64, 64)
    result = classes.translate(label, classes.encode_exemplar(picture, label))
    assert (result.image.dtype, result.image.shape) == (np.uint8, (64, 64, 3))
    assert (result.confidence.dtype, result.confidence.shape) == (np.float32, (16, 16))
    assert (result.matches.dtype, result.matches.shape) == (np.float32, (16, 16, 2))
    assert 0 < result.confidence.min() <= result.confidence.max() <= 1
    assert result.exemplar_size == (64, 64)
    assert set(result.timings) == {"query", "warp", "synthesis"}
    x, y = result.matches[..., 0], result.matches[..., 1]
    matched_ids = label[y.astype(int), x.astype(int)]
    np.testing.assert_array_equal(matched_ids, label[2::4, 2::4])


def test_matches_are_patch_centers_in_pixels(channels: Translator) -> None:
    """All positions of a constant label look alike but for the border, whose corners are unique."""
    picture = random_picture(64, 96)
    label = random_label(CHANNELS, 64, 96)
    result = channels.translate(label, channels.encode_exemplar(picture, size="input"), size="input")
    x, y = result.matches[..., 0], result.matches[..., 1]
    assert set(np.unique(x)) <= set(np.arange(2, 96, 4))
    assert set(np.unique(y)) <= set(np.arange(2, 64, 4))
    best = np.asarray(picture)[y.astype(int), x.astype(int)].astype(float)
    confident = result.confidence > 0.9
    assert confident.sum() > 5
    # the warp is the softmax's mean color: nearly the best match's where that holds nearly all the weight
    warped = result.warped[2::4, 2::4].astype(float)
    assert np.abs(warped - best)[confident].max() <= 0.1 * 255 + 1


def test_every_kind_of_source_gives_the_same(classes: Translator, tmp_path: Path) -> None:
    picture, label = random_picture(64, 64), random_label(CLASSES, 64, 64)
    save_label(tmp_path / "label.png", label)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    sources = [
        (picture, label),
        (Image.fromarray(picture), Image.fromarray(label)),
        (tmp_path / "picture.png", tmp_path / "label.png"),
        (str(tmp_path / "picture.png"), str(tmp_path / "label.png")),
    ]
    results = [classes.translate(mask, classes.encode_exemplar(image, mask)) for image, mask in sources]
    assert all(same(results[0], result) for result in results[1:])


class Queries:
    """The labels that reach the query stage of a translator."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, translator: Translator) -> None:
        self.labels: list[np.ndarray] = []
        engine = translator._pipeline.engines["query"]
        self._run = engine.run
        monkeypatch.setattr(engine, "run", self._spy)

    def _spy(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.labels.append(inputs["label"])
        return self._run(inputs)


def test_an_encoded_label_costs_no_query(classes: Translator, monkeypatch: pytest.MonkeyPatch) -> None:
    label = random_label(CLASSES, 64, 64, 20)
    expected = classes.translate(label, exemplar_of(classes))
    queries = Queries(monkeypatch, classes)
    monkeypatch.setattr(cpu_pipeline, "LABEL_CACHE_BYTES", 0)  # nothing more is kept
    label = random_label(CLASSES, 64, 64, 21)
    encoded = classes.encode_label(label)
    assert len(queries.labels) == 1
    results = [classes.translate(encoded, exemplar_of(classes, seed)) for seed in range(2)]
    assert len(queries.labels) == 1
    assert same(results[0], classes.translate(label, exemplar_of(classes)))
    assert len(queries.labels) == 2
    assert not same(results[0], results[1])
    assert not same(results[0], expected)
    with pytest.raises(ValueError, match="read-only"):
        encoded.theta[:] = 0


def test_a_label_that_comes_again_costs_no_query(
    classes: Translator, channels: Translator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By content, whatever it comes from, alone or in a batch, at its size."""
    for translator in (classes, channels):
        queries = Queries(monkeypatch, translator)
        label, other = (random_label(translator.config, 64, 64, seed) for seed in (30, 31))
        exemplars = [exemplar_of(translator, seed) for seed in range(2)]
        first = translator.translate(label, exemplars[0])
        again = translator.translate([other, label.copy(), label], exemplars[0])
        assert same(again[1], first)
        assert same(again[2], first)
        assert len(queries.labels) == 2
        assert not same(translator.translate(label, exemplars[1]), first)
        assert len(queries.labels) == 2
        translator.translate(label, exemplars[0], 96)
        assert len(queries.labels) == 3
        label[..., 0, 0] = (label[..., 0, 0] + 1) % 12
        translator.translate(label, exemplars[0])
        assert len(queries.labels) == 4


def test_encoded_labels_are_kept_up_to_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = 16 * 16 * 16 * 4  # bytes of theta at 64 px
    monkeypatch.setattr(cpu_pipeline, "LABEL_CACHE_BYTES", 2 * one)
    with Translator(write_tiny_bundle(tmp_path / "b"), warp="numpy") as translator:
        queries = Queries(monkeypatch, translator)
        labels = [random_label(CLASSES, 64, 64, seed) for seed in range(3)]
        for label in (*labels, labels[2], labels[1], labels[0]):  # the first has made room
            translator.encode_label(label)
        assert len(queries.labels) == 4
        for _ in range(2):
            translator.encode_label(labels[0], (64, 160))  # larger than all the room
        assert len(queries.labels) == 6
        assert translator._pipeline._thetas.bytes == 2 * one


def test_a_label_that_changes_afterwards(classes: Translator) -> None:
    label = random_label(CLASSES, 64, 64, 40)
    encoded, expected = classes.encode_label(label), classes.translate(label, exemplar_of(classes))
    label[:] = 0
    assert same(classes.translate(encoded, exemplar_of(classes)), expected)


def test_encoded_labels_that_cannot_be_used(classes: Translator, channels: Translator) -> None:
    encoded = classes.encode_label(random_label(CLASSES, 64, 64))
    for size in (None, 64, "input"):
        classes.translate(encoded, exemplar_of(classes), size)
    with pytest.raises(InputError, match=r"encoded at 64 x 64 pixels, got \(64, 96\); leave size out"):
        classes.translate(encoded, exemplar_of(classes), (64, 96))
    with pytest.raises(InputError, match="label: encoded by another model"):
        channels.translate(encoded, exemplar_of(channels))


@pytest.mark.parametrize("translator_name", ["classes", "channels"])
def test_batches_equal_singles(translator_name: str, request: pytest.FixtureRequest) -> None:
    translator: Translator = request.getfixturevalue(translator_name)
    sizes = [(64, 64), (64, 96), (64, 64), (64, 64), (64, 96)]
    labels = [random_label(translator.config, *size, seed) for seed, size in enumerate(sizes)]
    exemplars = [exemplar_of(translator, seed, size) for seed, size in enumerate((64, 64, 64, (96, 64), 64))]
    singles = [translator.translate(*pair, "input") for pair in zip(labels, exemplars, strict=True)]
    assert not same(singles[0], singles[2])
    for batch_size in (2, 8):
        batch = translator.translate(labels, exemplars, "input", batch_size=batch_size)
        assert all(same(result, single) for result, single in zip(batch, singles, strict=True))
    shared = translator.translate(tuple(labels), exemplars[0], "input")
    assert same(shared[1], translator.translate(labels[1], exemplars[0], "input"))
    assert translator.translate([], exemplars[0]) == []


def test_labels_of_one_size_run_as_one_batch(classes: Translator, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []
    run = classes._pipeline.engines["fine"].run

    def spy(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        batches.append(inputs["label"].shape)
        return run(inputs)

    monkeypatch.setattr(classes._pipeline.engines["fine"], "run", spy)
    labels = [random_label(CLASSES, *size) for size in ((64, 64), (96, 64), (64, 64), (64, 64))]
    classes.translate(labels, exemplar_of(classes), "input", batch_size=2)
    assert batches == [(2, 64, 64), (1, 64, 64), (1, 96, 64)]


def test_sizes(classes: Translator) -> None:
    exemplar, label = exemplar_of(classes), random_label(CLASSES, 70, 100)
    assert classes.translate(label, exemplar).image.shape == (64, 64, 3)  # the model's own
    assert classes.translate(label, exemplar, 96).image.shape == (96, 96, 3)
    assert classes.translate(label, exemplar, (64, 128)).image.shape == (64, 128, 3)
    assert classes.translate(label, exemplar, "input").image.shape == (64, 96, 3)
    assert classes.translate(label[:5, :5], exemplar, "input").image.shape == (64, 64, 3)
    assert classes.encode_exemplar(random_picture(50, 90), label, "input").size == (64, 96)


@pytest.mark.parametrize(
    "size", [0, 30, 32, -64, (64,), (64, 64, 64), (64, 33), 64.0, True, "own", (64, "input"), 8224]
)
def test_sizes_that_no_graph_takes(classes: Translator, size: Any) -> None:
    with pytest.raises(InputError, match="size: "):
        classes.translate(random_label(CLASSES, 64, 64), exemplar_of(classes), size)
    with pytest.raises(InputError, match="size: "):
        exemplar_of(classes, size=size)


def test_a_huge_input_is_refused_at_its_own_size(classes: Translator) -> None:
    with pytest.raises(InputError, match="8256 x 64 pixels; expected at most 8192 a side"):
        classes.translate(np.zeros((32, 8250), np.uint8), exemplar_of(classes), "input")


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (np.full((64, 64), 12, np.uint8), "class id 12"),
        (np.zeros((64, 64, 3), np.uint8), r"expected an integer array \(height, width\)"),
        (np.zeros((64, 64), np.float32), "expected an integer array"),
        (np.zeros((0, 64), np.uint8), "0 pixels"),
        ("absent.png", "absent.png does not exist"),
        (None, "got NoneType"),
        (Image.new("RGB", (64, 64)), "image mode 'RGB'"),
    ],
)
def test_wrong_labels(classes: Translator, label: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        classes.translate(label, exemplar_of(classes))
    with pytest.raises(InputError, match=message if label is not None else "needs the exemplar's label"):
        classes.encode_exemplar(random_picture(64, 64), label)


def test_wrong_planes(channels: Translator, tmp_path: Path) -> None:
    exemplar = exemplar_of(channels)
    with pytest.raises(InputError, match="4 label planes; task tiny expects 5"):
        channels.translate(np.zeros((4, 64, 64), np.uint8), exemplar)
    with pytest.raises(InputError, match=r"values 0\.0 to 2\.0; expected 0 to 1"):
        channels.translate(np.linspace(0, 2, 5 * 4096).reshape(5, 64, 64), exemplar)
    save_label(tmp_path / "ids.png", random_label(CLASSES, 64, 64))
    with pytest.raises(InputError, match=r"ids.png: not a readable label .npz"):
        channels.translate(tmp_path / "ids.png", exemplar)


def test_the_exemplars_label_is_needed_exactly_where_it_is_mixed_in(classes: Translator, channels: Translator) -> None:
    with pytest.raises(InputError, match="needs the exemplar's label"):
        classes.encode_exemplar(random_picture(64, 64))
    with pytest.raises(InputError, match="takes no label"):
        channels.encode_exemplar(random_picture(64, 64), random_label(CHANNELS, 64, 64))


def test_wrong_exemplars(classes: Translator, tmp_path: Path) -> None:
    label = random_label(CLASSES, 64, 64)
    for picture in (
        np.zeros((64, 64), np.uint8),
        np.zeros((64, 64, 4), np.uint8),
        np.zeros((64, 64, 3)),
        None,
        "no.jpg",
    ):
        with pytest.raises(InputError, match=r"image: expected|no.jpg does not exist"):
            classes.encode_exemplar(picture, label)
    with pytest.raises(InputError, match="expected the result of encode_exemplar, got ndarray"):
        classes.translate(label, random_picture(64, 64))
    with pytest.raises(InputError, match="2 labels with 1 exemplars"):
        classes.translate([label, label], [exemplar_of(classes)])
    with pytest.raises(InputError, match="expected the result of encode_exemplar, got int"):
        classes.translate([label], 3)
    for batch_size in (0, -1, 2.0, "4", None, True):
        with pytest.raises(InputError, match=rf"batch_size: expected a whole number from 1, got {batch_size!r}"):
            classes.translate([label], exemplar_of(classes), batch_size=batch_size)
    other = Translator(write_tiny_bundle(tmp_path / "other", CLASSES, seed=1), warp="numpy")
    with pytest.raises(InputError, match="encoded by another model"):
        other.translate(label, exemplar_of(classes))


def test_other_proportions_are_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A turned photograph with the label of the picture as it was stored; one pixel of rounding is none."""
    with Translator(write_tiny_bundle(tmp_path / "b"), device="cpu", warp="numpy") as translator:
        for label_size in ((96, 64), (48, 32), (33, 22), (191, 128)):
            translator.encode_exemplar(random_picture(96, 64), random_label(CLASSES, *label_size))
        assert not caplog.records
        photo = Image.fromarray(random_picture(64, 96))
        photo.getexif()[0x0112] = 6  # turn right by a quarter
        photo.save(tmp_path / "photo.png", exif=photo.getexif())
        for _ in range(2):
            translator.encode_exemplar(tmp_path / "photo.png", random_label(CLASSES, 64, 96))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "exemplar of 64 x 96 pixels (width x height) with a label of 96 x 64: the proportions differ" in caplog.text


def test_an_exemplar_is_constant(classes: Translator) -> None:
    exemplar = exemplar_of(classes)
    assert (exemplar.phi.shape, exemplar.values.shape) == ((1, 16, 16, 16), (1, 3, 16, 16))
    with pytest.raises(ValueError, match="read-only"):
        exemplar.phi[0] = 0
    with pytest.raises(AttributeError):
        exemplar.size = (1, 1)  # type: ignore[misc]


@pytest.mark.parametrize("warp", ["numpy", "numba"])
def test_threads_share_a_translator(tmp_path: Path, warp: str) -> None:
    """Different labels, sizes and exemplars at the same time, each result as on its own."""
    translator = Translator(write_tiny_bundle(tmp_path / "b"), warp=warp)
    exemplars = [exemplar_of(translator, seed) for seed in range(3)]
    work = [
        (random_label(CLASSES, 64, 64, seed), exemplars[seed % 3], (64, 64 + 32 * (seed % 3))) for seed in range(12)
    ]
    alone = [translator.translate(*arguments) for arguments in work]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda arguments: translator.translate(*arguments), work * 2))
        encoded = list(pool.map(lambda seed: exemplar_of(translator, seed), [0, 1, 2] * 4))
    assert all(same(result, alone[index % 12]) for index, result in enumerate(together))
    assert all(np.array_equal(exemplar.phi, exemplars[index % 3].phi) for index, exemplar in enumerate(encoded))


def test_the_warps_agree(classes: Translator, tmp_path: Path) -> None:
    """What "auto" chooses is named, and gives the picture of the numpy warp."""
    with Translator(write_tiny_bundle(tmp_path / "b"), device="cpu") as translator:
        assert translator.describe()["warp"]["backend"] == "numba"
        label = random_label(CLASSES, 64, 96, 3)
        by_numpy, by_numba = (each.translate(label, exemplar_of(each), "input") for each in (classes, translator))
    np.testing.assert_allclose(by_numpy.confidence, by_numba.confidence, atol=1e-4)
    assert np.abs(by_numpy.image.astype(int) - by_numba.image).max() <= 1


def test_closing(tmp_path: Path) -> None:
    with Translator(write_tiny_bundle(tmp_path / "b"), warp="numpy") as translator:
        exemplar = exemplar_of(translator)
    translator.close()
    with pytest.raises(BackendError, match="closed"):
        translator.translate(random_label(CLASSES, 64, 64), exemplar)


def test_describe(classes: Translator) -> None:
    described = classes.describe()
    assert set(described) == {"query", "exemplar", "coarse", "fine", "warp"}
    assert described["query"]["provider"] == "CPUExecutionProvider"
    assert described["fine"]["device"] == "cpu"
    assert described["exemplar"]["precision"] == "float32"
    assert {info["arithmetic"] for info in described.values()} == {"float32"}
    assert described["warp"]["backend"] == "numpy"


def test_options(tmp_path: Path) -> None:
    path = write_tiny_bundle(tmp_path / "b")
    with pytest.raises(InputError, match="no model bundle at"):
        Translator(tmp_path / "absent")
    for wrong in (3, b"model.zip", ["model.zip"]):
        with pytest.raises(InputError, match="bundle: expected the path of a model bundle, a Bundle or None; got"):
            Translator(wrong)
    with Translator(Bundle(path), num_threads=1, device="cpu", warp="numpy") as translator:
        assert translator.translate(random_label(CLASSES, 64, 64), exemplar_of(translator)).image.shape == (64, 64, 3)


def nan_weights(stage: str, model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if stage == "fine" and tensor.name == "mix":
            damaged = numpy_helper.to_array(tensor) * np.float32("nan")
            tensor.CopyFrom(numpy_helper.from_array(damaged, tensor.name))


def wrong_scale(stage: str, model: onnx.ModelProto) -> None:
    if stage == "query":
        last = model.graph.node[-1]
        last.output[0] = "before"
        model.graph.node.append(helper.make_node("Identity", ["before"], ["theta"]))
        last.attribute.append(helper.make_attribute("strides", [2, 2]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wrong_scale, r"stage query gave theta \(1, 16, 8, 8\), expected \(1, 16, 16, 16\)"),
        (nan_weights, "stage fine gave NaN or infinity in image"),
    ],
)
def test_graphs_that_lie(tmp_path: Path, change: Any, message: str) -> None:
    translator = Translator(write_tiny_bundle(tmp_path / "b", change=change), warp="numpy")
    with pytest.raises(BundleError, match=message):
        translator.translate(random_label(CLASSES, 64, 64), exemplar_of(translator))


def test_the_manifest_must_fit_its_configuration(tmp_path: Path) -> None:
    path = write_tiny_bundle(tmp_path / "b")
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"feature_channels": 16', '"feature_channels": 32'))
    with pytest.raises(BundleError, match=r"stage query states the outputs .*16.*configuration asks for .*32"):
        Translator(path)


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    """A whole translation with the numpy warp, in a process of its own."""
    path = write_tiny_bundle(tmp_path / "b.zip")
    code = f"""
import sys
import flashcocos.runtime
heavy = {{"torch", "triton", "onnx", "onnxscript", "numba", "cv2", "skimage", "scipy"}}
assert not (heavy | {{"onnxruntime"}}) & set(sys.modules), heavy & set(sys.modules)
import numpy as np
with flashcocos.runtime.Translator({str(path)!r}, device="cpu", warp="numpy") as translator:
    label, picture = np.zeros((64, 64), np.uint8), np.zeros((64, 64, 3), np.uint8)
    translator.translate(label, translator.encode_exemplar(picture, label))
    translator.describe()
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
