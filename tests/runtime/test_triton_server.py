"""The Python models of a repository for Triton Inference Server, in this process: as `Translator`, joined or not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fake_cuda import FakeCuda
from fake_gpu import install_driver
from fake_triton_server import FakeServer, Refusal
from kernel_twins import write_kernels
from tiny_bundle import CHANNELS, CLASSES, FINE, random_label, random_picture, write_tiny_bundle

from flashcocos.config import ModelConfig
from flashcocos.export.triton_server import export_triton
from flashcocos.runtime import Translator
from flashcocos.runtime.gpu.store import default_folder

OUTPUTS = ("image", "warped", "confidence", "matches")


class Repository:
    """A repository's models, and the `Translator` of its bundle."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, config: ModelConfig = CLASSES) -> None:
        bundle = write_tiny_bundle(folder / "m.zip", config)
        self.config, self.translator = config, Translator(bundle, device="cpu")
        self.server = FakeServer(monkeypatch, export_triton(bundle, folder / "models", platform="python"))

    def inputs(self, height: int = 64, width: int = 96, seed: int = 0, batch: int = 1) -> dict[str, np.ndarray]:
        """A request with labels of this size and exemplars of 96 x 64."""
        inputs = {
            "label": [random_label(self.config, height, width, seed + item) for item in range(batch)],
            "exemplar": [random_picture(96, 64, seed + item) for item in range(batch)],
        }
        if self.config.condition_on_label:
            inputs["exemplar_label"] = [random_label(self.config, 96, 64, seed + item + 100) for item in range(batch)]
        return {name: np.stack(arrays) for name, arrays in inputs.items()}

    def expected(self, inputs: dict[str, np.ndarray], item: int = 0) -> dict[str, np.ndarray]:
        own = {name: array[item] for name, array in inputs.items()}
        exemplar = self.translator.encode_exemplar(own["exemplar"], own.get("exemplar_label"), "input")
        result = self.translator.translate(own["label"], exemplar, "input")
        return {name: getattr(result, name) for name in OUTPUTS}


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Repository:
    return Repository(monkeypatch, tmp_path)


@pytest.mark.parametrize("config", [CLASSES, CHANNELS, FINE], ids=["classes", "channels", "stride 2"])
def test_translations_are_those_of_the_translator(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: ModelConfig
) -> None:
    repository = Repository(monkeypatch, tmp_path, config)
    inputs = repository.inputs(batch=2)
    (answer,) = repository.server.ask(inputs, outputs=[*OUTPUTS, "exemplar_id"])
    for item in range(2):
        for name, array in repository.expected(inputs, item).items():
            np.testing.assert_array_equal(getattr(answer, name)[item], array, err_msg=name)
    # the ids alone will do from now on, and nothing but what was asked for comes back
    (again,) = repository.server.ask({"label": inputs["label"], "exemplar_id": answer.exemplar_id}, outputs=["image"])
    assert set(vars(again)) == {"image"}
    np.testing.assert_array_equal(again.image, answer.image)
    assert repository.server.batches["exemplar"] == [1, 1]


def test_requests_that_the_server_joins_run_together(repository: Repository) -> None:
    requests = [repository.inputs(seed=seed) for seed in range(3)]
    answers = repository.server.ask(*requests, outputs=OUTPUTS)
    for request, answer in zip(requests, answers, strict=True):
        for name, array in repository.expected(request).items():
            np.testing.assert_array_equal(getattr(answer, name)[0], array, err_msg=name)
    for model in ("query", "warp", "coarse", "fine"):
        assert repository.server.batches[model] == [3]


def test_exemplars_of_other_sizes_run_apart(repository: Repository) -> None:
    first, second = repository.inputs(), repository.inputs(seed=1)
    for name in ("exemplar", "exemplar_label"):
        second[name] = np.ascontiguousarray(second[name][:, :64])
    answers = repository.server.ask(first, second, outputs=["image"])
    for request, answer in zip((first, second), answers, strict=True):
        np.testing.assert_array_equal(answer.image[0], repository.expected(request)["image"])
    assert repository.server.batches["warp"] == [1, 1]


def test_a_request_that_cannot_be_used_harms_no_other(repository: Repository) -> None:
    good, wrong = repository.inputs(), repository.inputs()
    wrong["label"] = np.full_like(wrong["label"], 77)
    unknown = {"label": good["label"], "exemplar_id": np.array([[b"0" * 32]], object)}
    nothing = {"label": good["label"]}
    unlabeled = {name: array for name, array in good.items() if name != "exemplar_label"}
    answers = repository.server.ask(wrong, good, unknown, nothing, unlabeled, outputs=["image"])
    np.testing.assert_array_equal(answers[1].image[0], repository.expected(good)["image"])
    refusals = [answer for answer in answers if isinstance(answer, Refusal)]
    assert [refusal.code for refusal in refusals] == ["INVALID_ARG", "NOT_FOUND", "INVALID_ARG", "INVALID_ARG"]
    for refusal, words in zip(
        refusals, ("class id 77", "send the exemplar", "give exemplar, or", "needs the exemplar's label"), strict=True
    ):
        assert words in str(refusal)


@pytest.mark.parametrize("name", ["label", "exemplar"])
def test_what_is_too_large_is_refused(repository: Repository, name: str) -> None:
    inputs = repository.inputs()
    inputs[name] = inputs[name].repeat(3, 1)
    (refusal,) = repository.server.ask(inputs, outputs=["image"])
    width, height = {"label": (96, 192), "exemplar": (64, 288)}[name]
    assert str(refusal).startswith(f"{name}: {width} x {height} pixels; expected at most 128 a side: scale it down")
    assert refusal.code == "INVALID_ARG"


@pytest.mark.parametrize("name", ["label", "exemplar", "exemplar_label"])
def test_what_is_empty_is_refused(repository: Repository, name: str) -> None:
    inputs = repository.inputs()
    inputs[name] = inputs[name][:, :0]
    (refusal,) = repository.server.ask(inputs, outputs=["image"])
    assert (refusal.code, "expected at least 1 x 1" in str(refusal)) == ("INVALID_ARG", True), str(refusal)


def test_a_model_that_is_full_refuses_all_of_a_batch(repository: Repository) -> None:
    repository.server.refuse = {"coarse"}
    answers = repository.server.ask(repository.inputs(), repository.inputs(seed=1), outputs=["image"])
    assert [(answer.code, str(answer)) for answer in answers] == [
        ("UNAVAILABLE", "model coarse: Exceeds maximum queue size")
    ] * 2


def test_the_warp_runs_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "m.zip")
    write_kernels(default_folder(bundle) / "kernels", CLASSES)
    models = export_triton(bundle, tmp_path / "models", gpu=True)
    cuda = install_driver(monkeypatch, FakeCuda(CLASSES))
    (models / "translate" / "1" / "model.py").unlink()
    on_gpu = FakeServer(monkeypatch, models, {"warp": "GPU"}).models["warp"]
    on_cpu = Repository(monkeypatch, tmp_path).server.models["warp"]
    rng = np.random.default_rng(0)
    for query_map, key_map in (((16, 24), (24, 16)), ((16, 24), (24, 16)), ((8, 8), (16, 16))):
        arrays = {
            name: rng.standard_normal((2, count, *side)).astype(np.float32)
            for name, count, side in (("theta", 16, query_map), ("phi", 16, key_map), ("values", 3, key_map))
        }
        got, expected = on_gpu.run(arrays), on_cpu.run(arrays)
        np.testing.assert_allclose(got["warped"], expected["warped"], atol=2e-4)
        np.testing.assert_array_equal(got["index"], expected["index"])
        np.testing.assert_allclose(got["probability"], expected["probability"], atol=1e-4)
    assert cuda.launches > 0
