"""The terms for samples with exact targets."""

from __future__ import annotations

import msgspec
import pytest
import torch
from flat_pairs import SUPERVISED, copying_model, settings

from flashcocos.train.batches import Batch
from flashcocos.train.supervised import SupervisedWeights, class_mean, class_shares, supervised_terms
from flashcocos.train.trainer import GeneratorStep

TARGETED = ("image", "squared", "class_image", "class_color", "warp", "class_warp")


def test_a_perfect_warp_and_image_cost_nothing() -> None:
    model = copying_model()
    with torch.no_grad():
        plane = torch.zeros(1, 64, 64, dtype=torch.uint8)
        image = torch.full((1, 3, 64, 64), 0.25)
        batch = Batch(plane, image, image, plane, torch.zeros(1), torch.ones(1, dtype=torch.bool))
        step = GeneratorStep(model, None, None, settings(model=msgspec.structs.asdict(model.config)))
        terms = step(batch).terms
        assert list(terms) == list(SUPERVISED)
        assert all(abs(float(term)) < 1e-4 for term in terms.values()), terms
        assert float(step(batch._replace(exemplar_label=plane + 1)).terms["label"]) > 0.5


def test_samples_without_a_target_count_for_the_label_alone() -> None:
    torch.manual_seed(0)
    label = torch.nn.functional.one_hot(torch.randint(0, 3, (2, 8, 8)), 3).permute(0, 3, 1, 2).float()
    target, image, warped = torch.rand(3, 2, 3, 8, 8)
    weights, known = SupervisedWeights(*[1.0] * 7), torch.tensor([True, False])
    both = supervised_terms(weights, label, target, known, image, warped, class_shares(label, 4))
    first = supervised_terms(
        weights, label[:1], target[:1], known[:1], image[:1], warped[:1], class_shares(label[:1], 4)
    )  # fmt: skip
    for name in TARGETED:
        torch.testing.assert_close(both[name], first[name])
    assert both["label"] != first["label"]
    none = supervised_terms(weights, label, target, ~known & known, image, warped, class_shares(label, 4))
    assert all(none[name] == 0 for name in TARGETED)


def test_a_term_of_weight_zero_is_not_computed() -> None:
    nothing = torch.empty(0)
    assert supervised_terms(SupervisedWeights(), nothing, nothing, nothing, nothing, nothing, None) == {}


def test_class_means_count_small_classes_like_large_ones() -> None:
    label = torch.zeros(1, 3, 8, 8)
    label[:, 0] = 1
    label[:, 0, 0, 0], label[:, 1, 0, 0] = 0, 1  # one pixel of class 1, none of class 2
    target = torch.zeros(1, 3, 8, 8)
    image = target.clone()
    image[:, :, 0, 0] = 0.5
    assert float(class_mean(image - target, label, torch.ones(1))) == pytest.approx(0.25)
