"""What every way to run a bundle has in common: the picture of the CPU, in any batch, size, thread and order."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fake_gpu import fake_gpu
from real_gpu import real_translator
from tiny_bundle import CHANNELS, CLASSES, FINE, random_label, random_picture, write_tiny_bundle

from flashcocos.config import ModelConfig
from flashcocos.errors import BackendError, InputError
from flashcocos.runtime import Exemplar, Translation, Translator

FAKE = ("tensorrt", "tensorrt-rtx", "onnxruntime")
WHOLE = ("cpu", *(f"fake {backend}" for backend in FAKE), *(f"real {backend}" for backend in FAKE))
WAYS = (*WHOLE, *(f"{way} in tiles" for way in ("cpu", "fake tensorrt", "real tensorrt")))


CONFIGS = {"classes": CLASSES, "channels": CHANNELS, "fine": FINE}


@pytest.fixture(params=["classes", "channels"])
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return CONFIGS[request.param]


@pytest.fixture
def reference(tmp_path: Path, config: ModelConfig) -> Translator:
    return Translator(write_tiny_bundle(tmp_path / "m", config), device="cpu", warp="numpy", num_threads=1)


@pytest.fixture(params=WAYS)
def translator(
    request: pytest.FixtureRequest, tmp_path: Path, reference: Translator, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Translator]:
    """Over each way; afterwards nothing of it may be left on the device."""
    way = request.param.removesuffix(" in tiles")
    tile = None if way == request.param else 64
    kind, _, backend = way.partition(" ")
    if kind == "cpu":
        with Translator(tmp_path / "m", device="cpu", warp="numpy", num_threads=1, tile=tile) as opened:
            yield opened
    elif kind == "real":
        with real_translator(tmp_path / "m", backend, tile=tile) as opened:
            yield opened
    else:
        gpu = fake_gpu(monkeypatch, tmp_path / "m", backend)
        opened = gpu.translator(tile=tile)
        yield opened
        opened.close()
        gc.collect()
        assert gpu.device.live == (0, 0, 0)
        assert gpu.trt.engines == 0
        assert gpu.device.closed


def exemplar_of(translator: Translator, size: tuple[int, int] = (64, 64), seed: int = 0) -> Exemplar:
    label = random_label(translator.config, *size, seed + 10) if translator.config.condition_on_label else None
    return translator.encode_exemplar(random_picture(*size, seed), label, size)


def assert_same(result: Translation, expected: Translation) -> None:
    for name in ("image", "warped"):
        difference = np.abs(getattr(result, name).astype(int) - getattr(expected, name))
        assert difference.max() <= 1, name
    differs = (result.matches != expected.matches).any(-1)
    assert result.confidence[differs].max(initial=0) <= 0.501  # where two positions match equally well
    assert differs.mean() < 0.05  # a finer map has more equal positions
    np.testing.assert_allclose(result.confidence, expected.confidence, atol=1e-5)
    assert result.exemplar_size == expected.exemplar_size
    assert result.image.std() > 10  # a flat picture would prove nothing


@pytest.fixture(scope="module")
def expected() -> dict[ModelConfig, list[Translation]]:
    """The results of `reference`, which every way is compared with."""
    return {}


@pytest.mark.parametrize("config", CONFIGS, indirect=True)
def test_pictures_are_those_of_the_cpu(
    translator: Translator, reference: Translator, expected: dict[ModelConfig, list[Translation]]
) -> None:
    """At sizes that change from run to run, each often enough to be recorded and replayed."""

    def translations(of: Translator) -> list[Translation]:
        exemplars = [exemplar_of(of, size) for size in ((64, 64), (96, 64))]
        jobs = itertools.product(range(4), ((64, 64), (64, 96)), exemplars)
        return [of.translate(random_label(of.config, *size, seed), exemplar, size) for seed, size, exemplar in jobs]

    if translator.config not in expected:
        expected[translator.config] = translations(reference)
    for result, other in zip(translations(translator), expected[translator.config], strict=True):
        assert_same(result, other)


def test_fields_and_their_types(translator: Translator) -> None:
    exemplar = exemplar_of(translator, (64, 96))
    assert (exemplar.phi.shape, exemplar.phi.dtype) == ((1, 16, 16, 24), np.float32)
    assert exemplar.values.shape == (1, translator.config.warped_channels, 16, 24)
    results = [translator.translate(random_label(translator.config, 64, 64), exemplar) for _ in range(3)]
    for result in results:
        assert (result.image.dtype, result.image.shape) == (np.uint8, (64, 64, 3))
        assert (result.warped.dtype, result.warped.shape) == (np.uint8, (64, 64, 3))
        assert (result.confidence.dtype, result.confidence.shape) == (np.float32, (16, 16))
        assert (result.matches.dtype, result.matches.shape) == (np.float32, (16, 16, 2))
        assert result.exemplar_size == (64, 96)
        assert set(result.timings) in ({"query", "warp", "synthesis"}, {"total"})
        assert min(result.timings.values()) >= 0
    before = results[0].image.copy()
    translator.translate(random_label(translator.config, 64, 64, 7), exemplar)
    np.testing.assert_array_equal(results[0].image, before)  # a result is the caller's own


def test_batches_equal_singles(translator: Translator) -> None:
    """With exemplars of several sizes, and more labels than run together."""
    sizes = [(64, 64), (64, 96), (64, 64), (64, 64), (64, 96), (64, 64), (64, 64)]
    exemplars = [exemplar_of(translator, size, seed) for seed, size in enumerate(((64, 64), (64, 64), (96, 64)))]
    labels = [random_label(translator.config, *size, seed) for seed, size in enumerate(sizes)]
    mixed = [exemplars[index % 3] for index in range(len(labels))]
    singles = [translator.translate(*pair, "input") for pair in zip(labels, mixed, strict=True)]
    for batch_size in (2, 8):
        batch = translator.translate(labels, mixed, "input", batch_size=batch_size)
        for result, single in zip(batch, singles, strict=True):
            assert_same(result, single)


def test_threads_share_a_translator(translator: Translator) -> None:
    exemplars = [exemplar_of(translator, (64, 64 + 32 * seed), seed) for seed in range(2)]
    work = [
        (random_label(translator.config, 64, 64, seed), exemplars[seed % 2], (64, 64 + 32 * (seed % 2)))
        for seed in range(6)
    ]
    alone = [translator.translate(*arguments) for arguments in work]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda arguments: translator.translate(*arguments), work * 2))
    for index, result in enumerate(together):
        assert_same(result, alone[index % 6])


def test_exemplars_of_the_cpu_serve(translator: Translator, reference: Translator) -> None:
    label, exemplar = random_label(translator.config, 64, 64), exemplar_of(reference)
    assert_same(translator.translate(label, exemplar), reference.translate(label, exemplar))


def test_encoded_labels(translator: Translator, reference: Translator) -> None:
    """One with several exemplars, in a batch beside plain labels, and one that the CPU has encoded."""
    exemplars = [exemplar_of(translator, (64, 64 + 32 * seed), seed) for seed in range(3)]
    label, other = (random_label(translator.config, 64, 96, seed) for seed in range(2))
    encoded = translator.encode_label(label, "input")
    assert encoded.size == (64, 96)
    plain = [translator.translate(label, exemplar, "input") for exemplar in exemplars]
    for exemplar, expected in zip(exemplars, plain, strict=True):
        assert_same(translator.translate(encoded, exemplar), expected)
    mixed = translator.translate([encoded, other, encoded], exemplars, "input")
    for result, expected in zip(mixed, (plain[0], None, plain[2]), strict=True):
        assert_same(result, expected or translator.translate(other, exemplars[1], "input"))
    assert_same(translator.translate(reference.encode_label(label, "input"), exemplars[0]), plain[0])
    assert_same(reference.translate(encoded, exemplars[0]), plain[0])


def test_describe(translator: Translator) -> None:
    described = translator.describe()
    assert set(described) == {"query", "exemplar", "coarse", "fine", "warp"}
    assert len({info["device"] for info in described.values()}) == 1
    assert all(set(info) == {"backend", "provider", "device", "precision", "arithmetic"} for info in described.values())


def test_wrong_requests_are_refused_and_harm_nothing(translator: Translator) -> None:
    exemplar, label = exemplar_of(translator), random_label(translator.config, 64, 64)
    for bad in (np.zeros((3, 3, 3, 3)), "absent.png", None):
        with pytest.raises(InputError):
            translator.translate(bad, exemplar)
    for size in (33, (64, 64, 64), 8224):
        with pytest.raises(InputError, match="size: "):
            translator.translate(label, exemplar, size)
    translator.translate(label, exemplar)


def test_closed(translator: Translator) -> None:
    exemplar, label = exemplar_of(translator), random_label(translator.config, 64, 64)
    translator.translate(label, exemplar)
    translator.close()
    translator.close()
    calls = (
        lambda: translator.translate(label, exemplar),
        lambda: exemplar_of(translator),
        lambda: translator.encode_label(label),
    )
    for call in calls:
        with pytest.raises(BackendError, match="closed"):
            call()
