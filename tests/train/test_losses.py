"""Each term of the objective against a plain formula."""

from __future__ import annotations

import msgspec
import pytest
import torch
import torch.nn.functional as F
from operator_log import OperatorLog

from flashcocos.errors import InputError
from flashcocos.train import losses
from flashcocos.train.losses import WEIGHTS, LossWeights


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def plain_contextual(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """arXiv 1803.02077 section 3, forward direction, with the matrix in full."""
    center = y.mean(1, keepdim=True)
    x, y = (F.normalize((t - center).flatten(2), dim=1) for t in (x, y))
    distance = 1 - torch.einsum("bci,bcj->bij", x, y)
    relative = distance / (distance.min(2, keepdim=True).values + 1e-3)
    affinity = ((1 - relative) / 0.1).exp()
    affinity = affinity / affinity.sum(2, keepdim=True)
    return -affinity.max(2).values.mean(1).log()


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_contextual_matches_the_full_matrix(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "ROW_ENTRIES", rows * 35)
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    expected = plain_contextual(x, y)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    ours = losses.contextual_distance(x, y)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), x)[0], gradient, rtol=1e-8, atol=1e-12)


def test_contextual_forms_no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "ROW_ENTRIES", 10_000)
    x, y = torch.randn(1, 4, 40, 40, requires_grad=True), torch.randn(1, 4, 40, 40)
    with OperatorLog() as log:
        losses.contextual_distance(x, y).sum().backward()
    assert log.largest <= 10_000  # the matrix has 2,560,000 entries


def test_contextual_of_equal_features_is_least() -> None:
    x = torch.randn(1, 32, 8, 8)
    assert losses.contextual_distance(x, x) < 0.01 < losses.contextual_distance(x, torch.randn(1, 32, 8, 8))


def test_hinge_terms() -> None:
    fake, real = [torch.tensor([-2.0, 0.5]), torch.tensor([0.0])], [torch.tensor([2.0, 0.5]), torch.tensor([-1.0])]
    fake_term, real_term = losses.adversarial_discriminator(fake, real)
    assert fake_term == pytest.approx(((0 + 1.5) / 2 + 1) / 2)
    assert real_term == pytest.approx(((0 + 0.5) / 2 + 2) / 2)
    assert losses.adversarial(fake) == pytest.approx(-(-0.75 + 0) / 2)


def test_discriminator_features_leave_out_the_score() -> None:
    fake = [[torch.ones(1, 2), torch.full((3,), 100.0)], [torch.zeros(1, 2), torch.zeros(1)]]
    real = [[torch.full((1, 2), 3.0), torch.zeros(3)], [torch.full((1, 2), 0.5), torch.zeros(1)]]
    assert losses.discriminator_features(fake, real) == pytest.approx((2 + 0.5) / 2)


def test_batch_scale_of_pseudo_pairs() -> None:
    pairs = torch.tensor([0.0, 1.0, 1.0, 0.0])
    torch.testing.assert_close(losses.pseudo_weights(pairs, False), pairs / 2, rtol=1e-4, atol=0)
    torch.testing.assert_close(losses.pseudo_weights(pairs, True), pairs / 8, rtol=1e-4, atol=0)
    assert torch.equal(losses.pseudo_weights(torch.zeros(2), True), torch.zeros(2))  # no pair, no term, no NaN


def test_terms_over_pseudo_pairs() -> None:
    image, target = torch.zeros(2, 3, 4, 4), torch.stack([torch.ones(3, 4, 4), torch.full((3, 4, 4), 0.5)])
    assert losses.warp_self(image, target, torch.tensor([0.0, 2.0])) == pytest.approx(1.0)
    fake = {name: torch.zeros(1, 2, 2, 2) for name in losses.FEATURE_WEIGHTS}
    real = {name: torch.ones(1, 2, 2, 2) for name in losses.FEATURE_WEIGHTS}
    expected = 1 / 32 + 1 / 16 + 1 / 8 + 1 / 4 + 1
    assert losses.pseudo_features(fake, real, torch.ones(1)) == pytest.approx(expected)


def test_warp_mask_counts_known_classes_of_the_exemplar() -> None:
    label = F.one_hot(torch.tensor([[[0, 1], [2, 3]]]), 4).permute(0, 3, 1, 2).float()
    exemplar = F.one_hot(torch.tensor([[[0, 1], [1, 3]]]), 4).permute(0, 3, 1, 2).float()  # class 2 is missing
    warped = torch.full((1, 4, 2, 2), 0.1)
    warped[0, 1, 0, 1], warped[0, 3, 1, 1] = 0.5, 0.25
    expected = -(torch.tensor(0.5).log() + torch.tensor(0.25).log()) / 2
    torch.testing.assert_close(losses.warp_mask(warped, label, exemplar), expected, rtol=1e-4, atol=0)
    assert losses.warp_mask(warped, label, torch.zeros_like(label)) == 0


def test_presets() -> None:
    """The options of upstream's training commands; four terms are shared."""
    shared = {"domain": 10, "adversarial": 10, "discriminator_features": 10, "contextual": 10, "warp_two_cycle": 0}
    tasks = {
        "ade20k": (1, 0.01, "r52", 0, 0, 100),
        "celebahq": (10, 0.001, "r42", 0.1, 0, 100),
        "celebahqedge": (10, 0.001, "r42", 1, 0, 0),
        "deepfashion": (10, 0.001, "r42", 0, 100, 0),
    }
    names = ("pseudo_features", "perceptual", "perceptual_layer", "warp_cycle", "warp_self", "warp_mask")
    assert set(WEIGHTS) == set(tasks)
    for task, values in tasks.items():
        expected = {**shared, **dict(zip(names, values, strict=True)), "upstream_batch_scale": True}
        assert msgspec.structs.asdict(LossWeights.preset(task)) == expected
    with pytest.raises(InputError, match="no loss weights for task 'cats'; available: ade20k"):
        LossWeights.preset("cats")
