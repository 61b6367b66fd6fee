"""Measures of pictures against what they must give where the answer is known in closed form."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from flashcocos.benchmarks.quality import metrics
from flashcocos.benchmarks.quality.feature_metrics import (
    FrechetDistance,
    Inception,
    semantic_consistency,
    style_relevance,
)
from flashcocos.benchmarks.quality.metrics import PatchSet
from flashcocos.errors import BackendError, InputError

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # the published file is TorchScript
VGG_LAYERS = {"r12": 16, "r22": 8, "r32": 4, "r42": 2, "r52": 1}  # side of a map of 16 pixels


def flat(value: int, side: int = 16) -> np.ndarray:
    return np.full((side, side, 3), value, np.uint8)


def noise(seed: int, side: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


def test_psnr_and_ssim_of_equal_and_of_flat_pictures() -> None:
    assert metrics.psnr(noise(0), noise(0)) == 100
    assert metrics.psnr(flat(51), flat(102)) == pytest.approx(-20 * np.log10(0.2), abs=1e-4)
    assert metrics.ssim(noise(0), noise(0)) == pytest.approx(1)
    stabiliser = (0.01 * 255) ** 2  # of flat pictures, only the term of the means is left
    expected = (2 * 50 * 100 + stabiliser) / (50**2 + 100**2 + stabiliser)
    assert metrics.ssim(flat(50), flat(100)) == pytest.approx(expected, abs=1e-6)
    assert metrics.ssim(noise(0), 255 - noise(0)) < -0.9
    with pytest.raises(InputError, match="a picture of 10 x 10;"):
        metrics.ssim(flat(0, 10), flat(0, 10))


def test_the_class_mean_baseline() -> None:
    label = np.array([[2] * 4] * 2 + [[1] * 4] * 2)
    exemplar_label = np.array([[0] * 4] + [[1] * 4] * 3)
    exemplar = np.zeros((4, 4, 3), np.uint8)
    exemplar[1:3], exemplar[3] = 60, 120
    answer = metrics.class_mean_baseline(label, exemplar, exemplar_label, 3)
    assert (answer[2:] == 80).all()
    assert (answer[:2] == 60).all()  # the exemplar lacks class 2


def test_correspondence_by_the_commonest_class_of_each_position() -> None:
    label = np.zeros((8, 8), np.uint8)
    label[:, 5:] = 1  # 12 of the right positions' 16 pixels
    label[0, 0] = 2
    assert metrics.coarse_label(label, 3, 4).tolist() == [[0, 1], [0, 1]]
    exemplar_label = label[:, ::-1]
    straight = np.arange(4).reshape(2, 2)
    assert metrics.correspondence_accuracy(label, label, straight, 3) == 1
    assert metrics.correspondence_accuracy(label, exemplar_label, straight, 3) == 0
    assert metrics.correspondence_accuracy(label, exemplar_label, straight[:, ::-1], 3) == 1
    assert metrics.correspondence_accuracy(label, exemplar_label, np.full((2, 2), 1), 3) == 0.5


def test_scores_by_class() -> None:
    label = np.zeros((16, 16), np.uint8)
    label[:, 8:] = 1
    sums = metrics.ExactSums(3)
    for bright in (51, 102):
        image = flat(0)
        image[:, 8:] = bright
        sums.add(label, flat(0), image, flat(0), flat(0), 0.75)
    names = ["left", "right", "nowhere"]
    assert sums.psnr_by_class(names) == {"left": 100.0, "right": pytest.approx(10.0, abs=0.01)}
    assert sums.color_error_by_class(names) == {"left": 0, "right": pytest.approx(0.3, abs=1e-4)}
    means = sums.means()
    assert means["l1"] == pytest.approx(0.15, abs=1e-4)
    assert means["psnr_warped"] == means["psnr_baseline"] == 100
    assert means["correspondence"] == 0.75


def test_a_pyramid_adds_up_to_its_picture() -> None:
    cv2 = pytest.importorskip("cv2")
    picture = noise(1, 70)
    *levels, current = metrics.laplacian_pyramid(picture)
    assert [level.shape[0] for level in (*levels, current)] == [70, 35, 18]
    for level in levels[::-1]:
        current = cv2.pyrUp(current, dstsize=level.shape[1::-1]) + level
    assert np.allclose(current, picture, atol=1e-3)


def test_sliced_wasserstein_distance_of_known_sets() -> None:
    rng = np.random.default_rng(0)
    points = rng.standard_normal((500, 147)).astype(np.float32)
    assert metrics.sliced_wasserstein(points, points[::-1].copy()) == pytest.approx(0, abs=1e-6)
    assert metrics.sliced_wasserstein(points[:, :1], points[:, :1] + 3) == pytest.approx(3, rel=1e-5)
    # the mean of |u . s| over random directions u is |s| sqrt(2 / (pi D)) for large D
    expected = 3 * np.sqrt(2 / np.pi)
    assert metrics.sliced_wasserstein(points, points + 3) == pytest.approx(expected, rel=0.1)


def test_sliced_wasserstein_distance_of_pictures() -> None:
    sets = [PatchSet(seed) for seed in range(4)]
    for number in range(12):
        picture = noise(number, 64) // 2
        sets[0].add(picture)
        sets[1].add(picture)
        sets[2].add(picture + 100)  # brightness is normalized away
        sets[3].add(flat(100, 64) + picture // 64 * np.uint8(number))
    equal, shifted, other = (metrics.sliced_wasserstein_levels(sets[0], one) for one in sets[1:])
    assert list(equal) == ["64", "32", "16", "mean"]
    assert equal["mean"] == pytest.approx(np.mean([equal[side] for side in ("64", "32", "16")]), abs=2e-3)
    assert max(equal["mean"], shifted["mean"]) < 70  # the distance of sampling
    assert other["mean"] > 3 * equal["mean"]
    for name, patches in sets[0].descriptors().items():
        assert patches.shape == (12 * 128, 147), name
        channels = patches.reshape(-1, 3)
        assert np.allclose(channels.mean(0), 0, atol=1e-3)
        assert np.allclose(channels.std(0), 1, atol=1e-3)


class MeanColor(torch.nn.Module):
    """Stands for Inception: the features are the mean colors."""

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        return x.float().mean((2, 3)) if return_features else x.float()


class NoFeatures(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Inception:
    path = tmp_path_factory.mktemp("inception") / "network.pt"
    torch.jit.script(MeanColor()).save(path)
    return Inception(path)


def test_frechet_distance_of_equal_sets_and_of_known_gaussians(inception: Inception) -> None:
    pytest.importorskip("torchmetrics")
    assert inception.num_features == 3
    signs = np.array(list(itertools.product((-1, 1), repeat=3)))
    colors = {real: 100 + shift + signs * spread for real, shift, spread in ((True, 0, (7, 14, 21)), (False, 5, 28))}
    equal, apart = FrechetDistance(inception), FrechetDistance(inception)
    for real, row in itertools.product((True, False), range(8)):
        apart.add(np.broadcast_to(colors[real][row], (8, 8, 3)).astype(np.uint8), real=real)
        equal.add(np.broadcast_to(colors[True][row], (8, 8, 3)).astype(np.uint8), real=real)
    assert equal.compute() == pytest.approx(0, abs=1e-3)
    deviations = np.sqrt(8 / 7) * np.array([[7, 14, 21], [28, 28, 28]])
    expected = 3 * 5**2 + np.square(deviations[0] - deviations[1]).sum()
    assert apart.compute() == pytest.approx(expected, rel=1e-5)


def test_networks_that_are_no_inception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(InputError, match=r"text\.pt: not a TorchScript network"):
        Inception(tmp_path / "text.pt")
    torch.jit.script(NoFeatures()).save(tmp_path / "maps.pt")
    with pytest.raises(InputError, match=r"maps\.pt: expected features \(batch, n\)"):
        Inception(tmp_path / "maps.pt")
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(BackendError, match=r"flashcocos\[eval\]"):
        FrechetDistance(MeanColor())


class Recorded:
    """Stands for VGG19: random maps, fixed per picture, which picture 1 holds with the patches of picture 0 turned."""

    def __call__(self, image: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        turned = bool(image.mean() > 0)
        maps = {}
        for name in names:
            side = VGG_LAYERS[name]
            own = torch.rand(1, 6, side, side, generator=torch.Generator().manual_seed(side))
            maps[name] = own.roll(side // 2, 3) if turned else own
        return maps


def test_semantic_consistency_compares_positions_and_style_compares_matched_patches() -> None:
    vgg, picture = Recorded(), torch.full((1, 3, 16, 16), -0.5)
    assert semantic_consistency(vgg, picture, picture).tolist() == pytest.approx([1])  # type: ignore[arg-type]
    turned = float(semantic_consistency(vgg, picture, -picture))  # type: ignore[arg-type]
    layers = []
    for name in ("r32", "r42", "r52"):
        own, other = (vgg(x, [name])[name][0].flatten(1).numpy() for x in (picture, -picture))
        layers.append(((own * other).sum(0) / np.linalg.norm(own, axis=0) / np.linalg.norm(other, axis=0)).mean())
    assert turned == pytest.approx(np.mean(layers), rel=1e-5)
    assert turned < 0.98
    for score in style_relevance(vgg, picture, -picture):  # type: ignore[arg-type]
        assert score.tolist() == pytest.approx([1])
