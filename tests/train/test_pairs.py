"""Retrieval lists: what is most similar, what is kept and computed again, and what is left out."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from flashcocos.cli import main
from flashcocos.config import ModelConfig
from flashcocos.errors import InputError
from flashcocos.preprocess import read_list
from flashcocos.train import pairs
from flashcocos.train.checkpoint import save_model
from flashcocos.train.data.photos import PhotoPairs
from flashcocos.train.networks import CoCosNet, Vgg19
from flashcocos.train.pairs import Extractor, nearest, write_pairs
from flashcocos.train.settings import DataSettings


class Colors:
    """Mean colors as features, counting the pictures that are asked for."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, pictures: Tensor) -> Tensor:
        self.seen += len(pictures)
        return pictures.mean((2, 3)) + 1


@pytest.fixture
def colors() -> Colors:
    return Colors()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures whose hue turns from red to green."""
    pictures = tmp_path / "pictures"
    (pictures / "sub").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.png", "sub/c.png", "d.png", "e.png")):
        Image.new("RGB", (16, 16), (250 - 50 * number, 50 * number, 10)).save(pictures / name)
    return pictures


def listed(output: Path) -> dict[str, tuple[str, ...]]:
    return {first: rest for first, *rest in map(tuple, read_list(output))}


def test_the_most_alike_come_first_and_never_the_picture_itself(folder: Path, tmp_path: Path, colors: Colors) -> None:
    summary = write_pairs(folder, tmp_path / "list.txt", Extractor("colors", 8, colors), count=3, batch=2)
    assert (summary.written, summary.failed) == (5, ())
    lines = listed(tmp_path / "list.txt")
    assert list(lines["a.png"]) == ["b.png", "sub/c.png", "d.png"]
    assert list(lines["e.png"]) == ["d.png", "sub/c.png", "b.png"]
    assert set(lines["sub/c.png"][:2]) == {"b.png", "d.png"}
    write_pairs(folder, tmp_path / "all.txt", Extractor("colors", 8, colors), count=99)
    assert all(len(rest) == 4 and first not in rest for first, rest in listed(tmp_path / "all.txt").items())


def test_nearest_agrees_with_sorting_in_any_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.nn.functional.normalize(torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    rows, others = list(range(0, 40, 3)), list(range(10, 40))
    monkeypatch.setattr(pairs, "_ROWS", 1)  # columns in parts of eight
    found = nearest(matrix, rows, others, 4)
    for row, best in zip(rows, found, strict=True):
        alike = sorted(
            (other for other in others if other != row), key=lambda other: -float(matrix[row] @ matrix[other])
        )
        assert best == alike[:4]


def test_exemplars_from_another_folder_with_equal_names(folder: Path, tmp_path: Path, colors: Colors) -> None:
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (16, 16), (10, 250, 10)).save(other / "a.png")  # green, unlike a.png of the first folder
    Image.new("RGB", (16, 16), (250, 10, 10)).save(other / "red.png")
    write_pairs(folder, tmp_path / "list.txt", Extractor("colors", 8, colors), exemplars=other, count=1)
    lines = listed(tmp_path / "list.txt")
    assert list(lines["a.png"]) == ["red.png"]
    assert list(lines["e.png"]) == ["a.png"]


def test_features_are_kept_until_file_or_network_changes(folder: Path, tmp_path: Path, colors: Colors) -> None:
    output = tmp_path / "list.txt"
    extractor = Extractor("colors", 8, colors)
    write_pairs(folder, output, extractor)
    first = output.read_text()
    write_pairs(folder, output, extractor)
    assert colors.seen == 5
    assert output.read_text() == first
    Image.new("RGB", (16, 16), (255, 0, 0)).save(folder / "e.png")
    os.utime(folder / "e.png", ns=(1, 1))
    write_pairs(folder, output, extractor)
    assert colors.seen == 6
    assert listed(output)["e.png"][0] == "a.png"
    write_pairs(folder, output, Extractor("another", 8, colors))
    assert colors.seen == 11


def test_an_interrupted_run_goes_on(folder: Path, tmp_path: Path, colors: Colors) -> None:
    def stops(pictures: Tensor) -> Tensor:
        if colors.seen == 4:
            raise KeyboardInterrupt
        return colors(pictures)

    output = tmp_path / "list.txt"
    with pytest.raises(KeyboardInterrupt):
        write_pairs(folder, output, Extractor("colors", 8, stops), batch=2)
    assert not output.exists()
    write_pairs(folder, output, Extractor("colors", 8, colors), batch=2)
    assert colors.seen == 5
    assert len(listed(output)) == 5


def test_what_is_left_out_is_named(folder: Path, tmp_path: Path, colors: Colors) -> None:
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    Image.new("RGB", (16, 16)).save(folder / "x,y.png")
    Image.new("RGB", (16, 16)).save(folder / "twice.png")
    Image.new("RGB", (16, 16)).save(folder / "twice.bmp")
    Image.new("RGB", (16, 16)).save(folder / "a.jpg")  # a.png is taken for its label
    summary = write_pairs(folder, tmp_path / "list.txt", Extractor("colors", 8, colors))
    assert summary.written == 5
    assert [Path(name).name for name, _ in summary.failed] == ["broken.png", "gone.png", "twice.bmp", "x,y.png"]
    reasons = " ".join(reason for _, reason in summary.failed)
    for part in ("not a readable image", "twice.bmp, twice.png", "contains a comma"):
        assert part in reasons
    assert "a.jpg" in listed(tmp_path / "list.txt")


def test_bad_requests(folder: Path, tmp_path: Path, colors: Colors) -> None:
    extractor = Extractor("colors", 8, colors)
    with pytest.raises(InputError, match="got 0 and 8"):
        write_pairs(folder, tmp_path / "list.txt", extractor, count=0)
    with pytest.raises(InputError, match="not a folder"):
        write_pairs(tmp_path / "nowhere", tmp_path / "list.txt", extractor)
    (tmp_path / "one").mkdir()
    with pytest.raises(InputError, match="0 readable pictures"):
        write_pairs(tmp_path / "one", tmp_path / "list.txt", extractor)
    Image.new("RGB", (16, 16)).save(tmp_path / "one" / "a.png")
    with pytest.raises(InputError, match="1 readable pictures, and 1 to retrieve"):
        write_pairs(tmp_path / "one", tmp_path / "list.txt", extractor)
    (tmp_path / "list.txt.features.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(InputError, match=r"features\.sqlite is damaged .* delete it"):
        write_pairs(folder, tmp_path / "list.txt", extractor)
    with pytest.raises(InputError, match=r"--vgg PATH.*--model PATH"):
        pairs.open_extractor(None, None)


def test_the_command_writes_a_list_that_the_loader_reads(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    save_model(tmp_path / "model.safetensors", CoCosNet(ModelConfig.preset("tiny")))
    output = tmp_path / "list.txt"
    command = ["pairs", str(folder), "-o", str(output), "-k", "2", "--device", "cpu"]
    assert main([*command, "--model", str(tmp_path / "model.safetensors")]) == 0
    assert capsys.readouterr().out == f"5 listed, 0 left out: {output}\n"
    files = DataSettings(root=str(folder), pairs=str(output))
    data = PhotoPairs(ModelConfig("mine", "classes", 3, image_size=64), files)
    assert len(data) == 5
    (folder / "broken.png").write_bytes(b"no picture")
    assert main([*command, "--model", str(tmp_path / "model.safetensors")]) == 1
    assert "broken.png: not a readable image" in capsys.readouterr().err


def test_vgg_features_are_those_behind_the_last_pooling(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Vgg19()
    torch.save(network.state_dict(), tmp_path / "vgg19_conv.pth")
    extractor = pairs.open_extractor(tmp_path / "vgg19_conv.pth", None, "cpu")
    picture = torch.from_numpy(np.random.default_rng(0).random((1, 3, 224, 224), np.float32)) * 2 - 1
    with torch.inference_mode():
        features = extractor.features(picture)
        expected = torch.nn.functional.max_pool2d(network(picture, ["r54"])["r54"], 2)
    assert features.shape == (1, 512 * 7 * 7)
    assert torch.equal(features.reshape(expected.shape), expected)
