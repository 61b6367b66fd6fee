"""The model that ships: what runs without a bundle being named, and that it keeps its head outside its training set."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from flashcocos.bundle import Bundle
from flashcocos.bundle.default_model import FOLDER, MODEL, NAME, NAMES, resolve_model
from flashcocos.config import ModelConfig
from flashcocos.errors import FlashcocosError, InputError
from flashcocos.preprocess.images import UInt8Array
from flashcocos.runtime import Translator

BACKGROUND, SKIN, HAIR, CLOTHES = 0, 1, 2, 7
DEMO = FOLDER / "demo"
# of 255: a class's mean color in the result against that in the exemplar; unrelated colors are 80 apart on average
COLOR_BOUND = 30


@pytest.fixture(scope="module")
def translator() -> Iterator[Translator]:
    with Translator(device="cpu") as made:
        yield made


def demo(name: str) -> tuple[UInt8Array, UInt8Array, UInt8Array]:
    """Label, exemplar and its label."""
    return tuple(np.array(Image.open(DEMO / f"{name}{part}.png")) for part in ("", "_exemplar", "_exemplar_label"))


def drawn_by_hand() -> UInt8Array:
    """A head and shoulders of four classes, as one draws them in a paint program."""
    canvas = Image.new("L", (128, 128), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((20, 100, 108, 127), fill=CLOTHES)
    draw.ellipse((36, 14, 92, 80), fill=HAIR)
    draw.ellipse((42, 30, 86, 98), fill=SKIN)
    return np.array(canvas)


def jpeg(exemplar: UInt8Array, label: UInt8Array) -> tuple[UInt8Array, UInt8Array]:
    buffer = io.BytesIO()
    Image.fromarray(exemplar).save(buffer, "JPEG", quality=15)
    return np.array(Image.open(buffer)), label


def crop(exemplar: UInt8Array, label: UInt8Array) -> tuple[UInt8Array, UInt8Array]:
    return exemplar[10:118, 6:106], label[10:118, 6:106]


def noise(exemplar: UInt8Array, label: UInt8Array) -> tuple[UInt8Array, UInt8Array]:
    grain = np.random.default_rng(0).normal(0, 25, exemplar.shape)
    return np.clip(exemplar + grain, 0, 255).astype(np.uint8), label


def mirror(exemplar: UInt8Array, label: UInt8Array) -> tuple[UInt8Array, UInt8Array]:
    return np.ascontiguousarray(exemplar[:, ::-1]), np.ascontiguousarray(label[:, ::-1])


def mean_color(picture: UInt8Array, label: UInt8Array, ids: int) -> np.ndarray:
    return picture[label == ids].mean(0)


def test_no_bundle_named_is_the_shipped_one(translator: Translator) -> None:
    assert translator.bundle.path == MODEL
    assert translator.config == ModelConfig.preset("avatars-128")


def test_an_empty_name_is_not_the_shipped_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # an empty path is the folder at hand
    with pytest.raises(FlashcocosError, match=r"manifest\.json"):
        Translator("")


def test_what_a_model_may_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_model() == resolve_model(None) == resolve_model(NAME) == MODEL
    for name in NAMES:
        assert resolve_model(name) == FOLDER / f"{name}.zip"
        assert Bundle(resolve_model(name)).manifest.config == ModelConfig.preset(name)
    assert resolve_model("own.zip") == resolve_model(Path("own.zip")) == Path("own.zip")
    (tmp_path / NAME).mkdir()
    with pytest.raises(InputError, match=r"write \./avatars-128 for what lies here"):
        resolve_model(NAME)
    assert resolve_model(f"./{NAME}") == Path(NAME)


def test_a_missing_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashcocos.bundle.default_model.MODEL", tmp_path / "gone.zip")
    with pytest.raises(InputError, match=r"has no model at .*gone\.zip; name a bundle, or install"):
        resolve_model()


@pytest.mark.parametrize("change", [jpeg, crop, noise, mirror])
@pytest.mark.parametrize("name", ["lorelei_12", "open-peeps_15"])
def test_exemplars_unlike_those_of_training(
    translator: Translator, name: str, change: Callable[..., tuple[UInt8Array, UInt8Array]]
) -> None:
    label, exemplar, exemplar_label = demo(name)
    changed, changed_label = change(exemplar, exemplar_label)
    result = translator.translate(label, translator.encode_exemplar(changed, changed_label))
    assert np.isfinite(result.confidence).all()
    for ids in (BACKGROUND, SKIN, HAIR):
        if (label == ids).sum() > 300 and (changed_label == ids).sum() > 300:
            expected = mean_color(changed, changed_label, ids)
            assert np.abs(mean_color(result.image, label, ids) - expected).max() < COLOR_BOUND


@pytest.mark.parametrize("name", ["lorelei_9", "open-peeps_15"])
def test_a_label_drawn_by_hand(translator: Translator, name: str) -> None:
    label, (_, exemplar, exemplar_label) = drawn_by_hand(), demo(name)
    result = translator.translate(label, translator.encode_exemplar(exemplar, exemplar_label))
    for ids in (BACKGROUND, SKIN, HAIR):
        if (exemplar_label == ids).sum() > 300:
            expected = mean_color(exemplar, exemplar_label, ids)
            assert np.abs(mean_color(result.image, label, ids) - expected).max() < COLOR_BOUND


@pytest.mark.parametrize("ids", [BACKGROUND, HAIR, 11])
def test_a_label_of_one_class(translator: Translator, ids: int) -> None:
    _, exemplar, exemplar_label = demo("lorelei_9")
    label = np.full((128, 128), ids, np.uint8)
    result = translator.translate(label, translator.encode_exemplar(exemplar, exemplar_label))
    assert np.isfinite(result.confidence).all()
    assert np.abs(mean_color(result.image, label, ids) - mean_color(exemplar, exemplar_label, ids)).max() < 60


def test_a_photograph_as_exemplar(translator: Translator, shared: Path) -> None:
    path = sorted((shared / "samples/celebahq/CelebA-HQ-img").glob("*.jpg"))[0]
    photo = np.array(Image.open(path).convert("RGB").resize((128, 128)))
    label = drawn_by_hand()  # a face in the middle, as that of every CelebA-HQ picture
    result = translator.translate(label, translator.encode_exemplar(photo, label))
    assert np.isfinite(result.confidence).all()
    for ids in (BACKGROUND, SKIN):
        assert np.abs(mean_color(result.image, label, ids) - mean_color(photo, label, ids)).max() < 1.5 * COLOR_BOUND
