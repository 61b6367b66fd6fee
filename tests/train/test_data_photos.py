"""Photo data sets: the published layouts on real samples, and lists, draws, crops and messages on made-up folders."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from flashcocos.config import ModelConfig
from flashcocos.errors import InputError
from flashcocos.preprocess import load_image, load_raw, prepare_folder
from flashcocos.train.data.photos import PhotoPairs
from flashcocos.train.settings import DataSettings

CONFIG = ModelConfig("mine", "classes", 200, image_size=64)
PUBLISHED = {
    "ade20k": ("ade20k", "ade20k_ref_test.txt", "validation/ADE_val_00001232.jpg", "training/ADE_train_00004996.jpg"),
    "celebahq": ("celebahq", "celebahq_ref_test.txt", "CelebA-HQ-img/25807.jpg", "CelebA-HQ-img/23071.jpg"),
    "celebahqedge": ("celebahqedge", "celebahq_ref_test.txt", "CelebA-HQ-img/22233.jpg", "CelebA-HQ-img/2994.jpg"),
    "deepfashion": (
        "DeepFashion",
        "deepfashion_ref_test.txt",
        "img/WOMEN/Dresses/id_00000203/03_1_front.jpg",
        "img/WOMEN/Dresses/id_00002791/01_2_side.jpg",
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Nine photographs of 96 x 96 whose label is the red channel, and a list with an easy and a hard exemplar each."""
    for sub in ("images", "labels"):
        (tmp_path / sub).mkdir()
    lines = []
    for number in range(9):
        ids = np.random.default_rng(number).integers(0, 200, (96, 96), np.uint8)
        picture = np.stack([ids, np.full_like(ids, number), np.zeros_like(ids)], -1)
        Image.fromarray(picture).save(tmp_path / "images" / f"{number}.png")
        Image.fromarray(ids).save(tmp_path / "labels" / f"{number}.png")
        lines.append(f"{number}.png,images\\{(number + 1) % 9}.png,unused,{(number + 2) % 9}\n")
    (tmp_path / "pairs.txt").write_text("".join(lines))
    return tmp_path


def opened(folder: Path, config: ModelConfig = CONFIG, split: str = "train", seed: int = 0, **data: Any) -> PhotoPairs:
    paths = {"root": folder, "pairs": folder / "pairs.txt", "load_size": 96, **data}
    settings = DataSettings(**{name: str(x) if isinstance(x, Path) else x for name, x in paths.items()})
    return PhotoPairs(config, settings, split=split, seed=seed)


def number_of(picture: np.ndarray) -> int:
    return round((float(picture[1, 0, 0]) + 1) * 127.5)


@pytest.mark.parametrize("task", PUBLISHED)
def test_published_layouts_give_what_preprocessing_gives(task: str, shared: Path) -> None:
    samples = shared / "samples"
    root, pairs, photo, exemplar = PUBLISHED[task]
    config = ModelConfig.preset(task)
    data = opened(samples / root, config, "test", pairs=samples / pairs)
    names = [sample.photo.relative_to(samples / root).as_posix() for sample in data._samples]
    assert len(data) == (6 if task == "ade20k" else 4)
    item = data[names.index(photo)]
    assert not item["has_target"]
    assert item["self_reference"] == 0
    for kind, label, name in (("image", "label", photo), ("exemplar", "exemplar_label", exemplar)):
        assert np.array_equal(item[kind], load_image(samples / root / name, (256, 256)))  # type: ignore[literal-required]
        expected = load_raw(task, samples / root / name, (256, 256))
        if config.label_kind == "channels":
            expected = expected.astype(np.float32) / 255
        assert item[label].dtype == expected.dtype  # type: ignore[literal-required]
        assert np.array_equal(item[label], expected)  # type: ignore[literal-required]


def test_ade20k_training_cuts_a_square_out_of_286(shared: Path, tmp_path: Path) -> None:
    training = shared / "samples" / "ade20k" / "training"
    names = sorted(path.stem for path in training.glob("*.jpg"))
    (tmp_path / "list.txt").write_text("\n".join(f"{name}.jpg,{names[0]}.jpg" for name in names))
    data = opened(training.parent, ModelConfig.preset("ade20k"), pairs=tmp_path / "list.txt", load_size=0)
    assert len(data) == 6
    for index in range(2):
        item, photo = data[index], training / f"{names[index]}.jpg"
        whole, label = load_image(photo, (286, 286)), load_raw("ade20k", photo, (286, 286))
        views = [
            (whole[:, y : y + 256, x : x + 256][:, :, ::step], label[y : y + 256, x : x + 256][:, ::step])
            for y in range(31)
            for x in range(31)
            for step in (1, -1)
        ]
        assert any(np.array_equal(item["image"], a) and np.array_equal(item["label"], b) for a, b in views)


@pytest.mark.parametrize("flat", [False, True])
def test_ade20k_as_it_is_downloaded_and_flat(flat: bool, tmp_path: Path) -> None:
    config = ModelConfig.preset("ade20k", image_size=64)
    for number, part in enumerate(("training", "validation")):
        name = "." if flat else part
        for kind, suffix, mode in (("images", ".jpg", "RGB"), ("annotations", ".png", "L")):
            file = tmp_path / kind / name / f"ADE_{part}_1{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new(mode, (80, 70), 7 * (number + 1) if mode == "L" else "gray").save(file)
    (tmp_path / "list.txt").write_text("ADE_validation_1.jpg,ADE_training_1.jpg\n")
    item = opened(tmp_path, config, "test", pairs=tmp_path / "list.txt")[0]
    assert (item["label"] == 14).all()
    assert (item["exemplar_label"] == 7).all()


def test_prepared_labels_stand_for_raw_ones(shared: Path, tmp_path: Path) -> None:
    root, pairs, *_ = PUBLISHED["celebahq"]
    samples = shared / "samples"
    prepare_folder("celebahq", samples / root, tmp_path / "labels", size=None)
    config = ModelConfig.preset("celebahq")
    raw, prepared = (
        opened(samples / root, config, "test", pairs=samples / pairs, labels=labels)[0]
        for labels in ("", tmp_path / "labels")
    )
    assert np.array_equal(raw["label"], prepared["label"])
    assert np.array_equal(raw["exemplar_label"], prepared["exemplar_label"])


def test_shares_of_easy_hard_and_self(folder: Path) -> None:
    data = opened(folder)
    counts = {0: 0, 1: 0, 2: 0}
    for epoch in range(200):
        data.set_epoch(epoch)
        for index in range(9):
            item = data[index]
            distance = (number_of(item["exemplar"]) - index) % 9
            counts[distance] += 1
            assert item["has_target"] == bool(item["self_reference"]) == (distance == 0)
    shares = [counts[distance] / 1800 for distance in (0, 1, 2)]
    assert np.allclose(shares, [0.3, 0.5, 0.2], atol=0.05)


def test_items_follow_from_seed_epoch_and_index(folder: Path) -> None:
    data = opened(folder)
    first = [data[index] for index in range(9)]
    data.set_epoch(1)
    assert any(not np.array_equal(a["image"], data[index]["image"]) for index, a in enumerate(first))
    data.set_epoch(0)
    again = pickle.loads(pickle.dumps(data))
    reseeded = opened(folder, seed=1)
    for index in (8, 0, 4):  # in any order
        for name, value in first[index].items():
            assert np.array_equal(value, again[index][name])
    assert any(not np.array_equal(a["image"], reseeded[index]["image"]) for index, a in enumerate(first))


def test_label_and_picture_are_cut_and_mirrored_alike_and_exemplars_apart(folder: Path) -> None:
    data = opened(folder, retrieved_share=0.0, hard_share=0.0)
    mirrored = set()
    for index in range(9):
        item = data[index]
        for kind, label in (("image", "label"), ("exemplar", "exemplar_label")):
            red = np.rint((item[kind][0] + 1) * 127.5)  # type: ignore[literal-required]
            assert np.array_equal(red, item[label])  # type: ignore[literal-required]
        whole = np.asarray(Image.open(folder / "labels" / f"{index}.png"))
        windows = np.lib.stride_tricks.sliding_window_view(whole, (64, 64)).reshape(-1, 64, 64)
        mirrored.add(
            tuple((windows == item[label][:, ::-1]).all((1, 2)).any() for label in ("label", "exemplar_label"))  # type: ignore[literal-required]
        )
    assert len(mirrored) > 2  # both, either and neither
    unflipped = opened(folder, ModelConfig("mine", "classes", 200, image_size=96), flip=False)
    assert np.array_equal(unflipped[3]["label"], np.asarray(Image.open(folder / "labels" / "3.png")))


def test_the_same_person_stands_for_the_photograph(folder: Path) -> None:
    (folder / "same.txt").write_text("0,images\\7.png,8\n")
    data = opened(folder, same=folder / "same.txt", retrieved_share=0.0, hard_share=0.0)
    assert number_of(data[0]["exemplar"]) == 7
    assert data[0]["has_target"]
    assert data[0]["self_reference"] == 1
    assert number_of(data[1]["exemplar"]) == 1


def test_data_loader_workers(folder: Path) -> None:
    data = opened(folder)
    batches = list(DataLoader(data, batch_size=3, num_workers=1))  # type: ignore[arg-type]
    assert [batch["image"].shape for batch in batches] == [(3, 3, 64, 64)] * 3
    assert batches[0]["self_reference"].tolist() == [float(data[index]["self_reference"]) for index in range(3)]
    assert np.array_equal(batches[2]["exemplar"][2], data[8]["exemplar"])


def test_which_samples_are_shown(folder: Path) -> None:
    (folder / "val.txt").write_text("3\nimages\\1.png\n")
    shown = opened(folder, split="test")
    assert [sample.photo.name for sample in shown._samples] == ["1.png", "3.png"]
    assert len(shown) == 2
    assert shown[0]["label"].shape == (64, 64)
    assert number_of(shown[0]["exemplar"]) == 2
    assert len(opened(folder)) == 9
    (folder / "few.txt").write_text("5\n")
    assert len(opened(folder, samples=folder / "few.txt")) == 1
    alone = opened(folder, pairs="", samples=folder / "few.txt", retrieved_share=0.0, hard_share=0.0)
    assert alone[0]["has_target"]


def test_what_is_missing_is_named(folder: Path) -> None:
    data = opened(folder)
    (folder / "labels" / "4.png").unlink()
    with pytest.raises(InputError, match=r"4\.png: lacks its label .*labels/4\.png; `flashcocos prepare`"):
        data[4]
    with pytest.raises(IndexError):
        data[9]
    (folder / "images" / "4.png").unlink()
    with pytest.raises(InputError, match=r"4, listed in .*pairs\.txt: not found"):
        opened(folder)
    Image.new("RGB", (64, 64)).save(folder / "images" / "3.jpg")
    (folder / "few.txt").write_text("3\n")
    with pytest.raises(InputError, match=r"3, listed in .*few\.txt: several .*3\.jpg, .*3\.png"):
        opened(folder, samples=folder / "few.txt")
    (folder / "few.txt").write_text("1\n")
    (folder / "short.txt").write_text("1\n2,1\n")
    with pytest.raises(InputError, match=r"short\.txt: no line with an exemplar for 1"):
        opened(folder, pairs=folder / "short.txt", samples=folder / "few.txt")
    with pytest.raises(InputError, match="names no samples"):
        opened(folder, pairs="")


def test_bad_options(folder: Path) -> None:
    with pytest.raises(InputError, match="not a folder"):
        opened(folder / "nowhere", pairs="")
    with pytest.raises(InputError, match=r"hard_share <= retrieved_share, got 0\.9 and 0\.7"):
        opened(folder, hard_share=0.9)
    with pytest.raises(InputError, match="load_size >= 64, got 63"):
        opened(folder, load_size=63)
