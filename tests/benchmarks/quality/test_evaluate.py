"""Scores of models and bundles whose answers are known, the sheet of pictures, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from flat_pairs import copying_model
from PIL import Image
from tiny_bundle import CHANNELS, CLASSES, write_tiny_bundle

from flashcocos.benchmarks.quality.contact_sheet import ContactSheet
from flashcocos.benchmarks.quality.evaluate import evaluate_exact, evaluate_model, evaluate_photos
from flashcocos.benchmarks.quality.photo_metrics import PhotoMetrics
from flashcocos.benchmarks.quality.predictors import BundlePredictor, ModelPredictor, Prediction, open_predictor
from flashcocos.bundle.default_model import resolve_model
from flashcocos.cli import main
from flashcocos.config import ModelConfig
from flashcocos.errors import BackendError, InputError
from flashcocos.preprocess import to_uint8
from flashcocos.preprocess.palette import label_colors
from flashcocos.runtime import Translator
from flashcocos.runtime.options import EngineOptions
from flashcocos.train.checkpoint import save_model
from flashcocos.train.data import Item
from flashcocos.train.networks import Vgg19

BRIGHT = 12 / 127.5  # in the range -1 to 1
NAMES = [f"class {index}" for index in range(12)]


class FlatPairs:
    """Each pair: the exemplar is the target; the left half is class 0, the right half class 1."""

    def __init__(self, has_target: bool = True) -> None:
        self.has_target = has_target

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> Item:
        label = np.zeros((64, 64), dtype=np.uint8)
        label[:, 32:] = 1
        image = np.full((3, 64, 64), -0.5, dtype=np.float32)
        image[:, :, 32:] = 0.5 + index / 100
        return {
            "label": label, "exemplar_label": label, "exemplar": image, "image": image,
            "self_reference": np.float32(1), "has_target": self.has_target,
        }  # fmt: skip

    def set_epoch(self, epoch: int) -> None: ...


@pytest.fixture(scope="module")
def copier() -> ModelPredictor:
    """A model that copies the exemplar, as equal positions alone attract each other, and is too bright by 12 of 255."""
    return ModelPredictor(copying_model(BRIGHT))


def test_scores_of_a_copy_that_is_too_bright_by_a_known_amount(copier: ModelPredictor, tmp_path: Path) -> None:
    sheet = ContactSheet(copier.config, 3)
    scores = evaluate_exact(copier, FlatPairs(), NAMES, sheet=sheet)
    assert scores["pairs"] == 9
    assert scores["psnr"] == pytest.approx(-20 * np.log10(12 / 255), abs=0.05)
    assert scores["psnr_warped"] > 35
    assert scores["psnr_baseline"] == pytest.approx(100)
    assert scores["ssim"] > 0.95
    assert scores["l1"] == pytest.approx(12 / 255, abs=1e-3)
    assert scores["correspondence"] == pytest.approx(1, abs=0.01)
    assert set(scores["psnr_by_class"]) == {"class 0", "class 1"}
    assert scores["psnr_by_class"]["class 1"] == pytest.approx(26.55, abs=0.1)
    assert scores["color_error_by_class"]["class 0"] == pytest.approx(12 / 255, abs=1e-3)
    sheet.write(tmp_path / "sheet.png")
    picture = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert picture.shape == (16 + 64, 3 * 5 * 64, 3)
    assert picture[16, 64:128].tolist() == [[64] * 3] * 32 + [[191] * 3] * 32  # the exemplar of the first pair
    assert (picture[:16] == 255).any()
    assert (picture[:16] < 128).any()  # captions


def test_a_sheet_has_no_empty_column(copier: ModelPredictor, tmp_path: Path) -> None:
    sheet = ContactSheet(copier.config)
    for index in range(4):
        sheet.add(FlatPairs()[index], copier.predict(FlatPairs()[index]))
    sheet.write(tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").size == (2 * 5 * 64, 16 + 2 * 64)


def test_what_cannot_be_scored_exactly(copier: ModelPredictor, tmp_path: Path) -> None:
    assert evaluate_exact(copier, FlatPairs(), NAMES, count=2)["pairs"] == 2
    for count in (0, 10):
        with pytest.raises(InputError, match=f"1 to 9 pairs, got {count}"):
            evaluate_exact(copier, FlatPairs(), NAMES, count=count)
    with pytest.raises(InputError, match="pair 0 has no exact target"):
        evaluate_exact(copier, FlatPairs(has_target=False), NAMES)
    with pytest.raises(InputError, match="takes labels of 12 classes; the pairs have 11 classes"):
        evaluate_exact(copier, FlatPairs(), NAMES[1:])
    planes = BundlePredictor(Translator(write_tiny_bundle(tmp_path / "planes", CHANNELS)))
    with pytest.raises(InputError, match="takes labels of 5 channels"):
        evaluate_exact(planes, FlatPairs(), NAMES)


def test_a_bundle_is_drawn_by_the_runtime(tmp_path: Path) -> None:
    item = FlatPairs()[0]
    wide = {**item, "exemplar_label": item["label"][:, ::-1].copy(), "exemplar": item["exemplar"][:, :, ::-1].copy()}
    with Translator(write_tiny_bundle(tmp_path / "bundle", CLASSES)) as translator:
        drawing = BundlePredictor(translator).predict(wide)  # type: ignore[arg-type]
        exemplar = translator.encode_exemplar(to_uint8(wide["exemplar"]), wide["exemplar_label"])
        result = translator.translate(wide["label"], exemplar)
    assert np.array_equal(drawing.image, result.image)
    assert np.array_equal(drawing.warped, result.warped)
    # equal labels match: the left half of the label fetches from the right half of the exemplar
    assert drawing.matches.shape == (16, 16)
    assert (drawing.matches[:, :7] % 16 >= 8).all()
    assert (drawing.matches[:, 9:] % 16 < 8).all()


def test_a_bundle_of_planes_without_condition_on_label(tmp_path: Path) -> None:
    planes = np.random.default_rng(0).random((5, 64, 64), np.float32)
    item = {**FlatPairs()[0], "label": planes, "exemplar_label": planes}
    with Translator(write_tiny_bundle(tmp_path / "bundle", CHANNELS)) as translator:
        drawing = BundlePredictor(translator).predict(item)  # type: ignore[arg-type]
    assert drawing.image.shape == (64, 64, 3)


def test_which_source_a_path_is(copier: ModelPredictor, tmp_path: Path) -> None:
    save_model(tmp_path / "model.safetensors", copier.model)
    opened = open_predictor(tmp_path / "model.safetensors", EngineOptions(device="cpu"))
    assert isinstance(opened, ModelPredictor)
    item = FlatPairs()[3]
    assert np.array_equal(opened.predict(item).matches, copier.predict(item).matches)
    with pytest.raises(InputError, match="in float32; backend 'openvino', precision None needs a bundle"):
        open_predictor(tmp_path / "model.safetensors", EngineOptions(backend="openvino"))
    assert isinstance(open_predictor(write_tiny_bundle(tmp_path / "bundle"), EngineOptions()), BundlePredictor)
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="sees no GPU"):
            open_predictor(tmp_path / "model.safetensors", EngineOptions(device="cuda"))


def test_measures_on_photographs(copier: ModelPredictor, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    vgg = Vgg19().eval()
    monkeypatch.setattr("flashcocos.train.networks.vgg_weights.load_vgg", lambda path: vgg)
    measures = PhotoMetrics(("semantic", "style", "swd"), vgg="vgg19.pth")
    scores = evaluate_photos(copier, FlatPairs(), measures, count=2)
    assert scores["pairs"] == 2
    assert set(scores) == {"pairs", "swd", "semantic_consistency", "style_color", "style_texture"}
    for name in ("semantic_consistency", "style_color", "style_texture"):
        assert 0.9 < scores[name] <= 1
    assert set(evaluate_photos(copier, FlatPairs(), PhotoMetrics(("semantic",), vgg="vgg19.pth"), count=1)) == {
        "pairs", "semantic_consistency",
    }  # fmt: skip


def test_measures_without_their_networks_name_the_options(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"fid: needs .*--inception-weights PATH.*--metrics swd,semantic,style"):
        PhotoMetrics(vgg="vgg19.pth")
    with pytest.raises(InputError, match=r"semantic and style: needs .*--vgg PATH.*--metrics fid,swd"):
        PhotoMetrics(inception="inception.pt")
    with pytest.raises(InputError, match=r"style: needs .*--metrics swd"):
        PhotoMetrics(["style"])
    with pytest.raises(InputError, match=r"\['ssim'\]: expected some of fid, swd, semantic, style"):
        PhotoMetrics(("ssim", "swd"))
    with pytest.raises(InputError, match="expected some of"):
        PhotoMetrics(())
    torch.save(Vgg19().state_dict(), tmp_path / "vgg19_conv.pth")
    assert not PhotoMetrics(["style"], vgg=tmp_path / "vgg19_conv.pth").vgg.training


def test_the_command_scores_photographs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for sub in ("images", "labels"):
        (tmp_path / sub).mkdir()
    for number in range(3):
        ids = np.random.default_rng(number).integers(0, 12, (8, 8), np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(label_colors(ModelConfig.preset("tiny"), ids)).save(tmp_path / "labels" / f"{number}.png")
        Image.fromarray(np.stack([ids * 20] * 3, -1)).save(tmp_path / "images" / f"{number}.jpg")
    (tmp_path / "pairs.txt").write_text("0,1\n1,2\n2,0\n")
    write_tiny_bundle(tmp_path / "bundle")
    arguments = ["evaluate", str(tmp_path / "bundle"), "--data", str(tmp_path), "--pairs", str(tmp_path / "pairs.txt")]
    assert (
        main([*arguments, "--metrics", "swd", "-o", str(tmp_path / "s.json"), "--sheet", str(tmp_path / "s.png")]) == 0
    )
    printed = capsys.readouterr().out
    scores = json.loads((tmp_path / "s.json").read_text())
    assert printed == f"{json.dumps(scores, indent=2)}\n{tmp_path / 's.json'}\n{tmp_path / 's.png'}\n"
    assert scores["pairs"] == 3
    assert list(scores["swd"]) == ["64", "32", "16", "mean"]
    assert Image.open(tmp_path / "s.png").size == (3 * 5 * 64, 16 + 64)
    assert main(arguments) == 1
    assert "--inception-weights PATH" in capsys.readouterr().err
    assert main([*arguments, "--metrics", "swd", "--split", "train"]) == 1
    assert "scored as a test" in capsys.readouterr().err


def test_the_shipped_model_beats_the_class_mean_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("dicebear", reason="needs the extra `avatars`")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    scores = evaluate_model(resolve_model(), "avatars", count=8, device="cpu", sheet=tmp_path / "sheet.png")
    assert scores["pairs"] == 8
    assert scores["psnr"] > scores["psnr_baseline"] > 15
    assert scores["correspondence"] > 0.9
    assert {"background", "skin", "hair"} <= set(scores["psnr_by_class"])
    assert Image.open(tmp_path / "sheet.png").size == (3 * 5 * 128, 16 + 3 * 128)


def test_labels_painted_by_hand_reach_the_model_alone(copier: ModelPredictor) -> None:
    seen = []

    class Recorder:
        config = copier.config

        def predict(self, item: Item) -> Prediction:
            seen.append(item["label"])
            return copier.predict(item)

    plain = evaluate_exact(copier, FlatPairs(), NAMES, count=2)
    painted = evaluate_exact(Recorder(), FlatPairs(), NAMES, count=2, repaint=True)
    assert painted["psnr_by_class"] == plain["psnr_by_class"]  # this model copies by place, and the targets stay
    assert all(0 < (label != FlatPairs()[0]["label"]).mean() < 0.1 for label in seen)
    with pytest.raises(InputError, match="no exact target"):
        evaluate_model("model.zip", "photos", hand_drawn=True)
