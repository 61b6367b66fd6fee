"""Batches: their order, shares for processes and micro-batches, and augmentation that keeps a sample together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from flat_pairs import FlatPairs, settings

from flashcocos.errors import InputError
from flashcocos.train import data as data_package
from flashcocos.train.batches import Batch, Steps, open_data, repeats
from flashcocos.train.data import Item, avatars, photos


def whole(pieces: list[Batch]) -> Batch:
    return Batch(*map(torch.cat, zip(*pieces, strict=True)))


def test_an_epoch_shows_every_sample_once_and_is_told_to_the_data() -> None:
    data = FlatPairs(6)
    steps = Steps(data, settings(schedule={"steps": 0, "epochs": 2}))
    assert len(steps) == 6
    expected = torch.stack([torch.as_tensor(FlatPairs()[index]["image"]) for index in range(6)])
    orders = []
    for epoch in range(2):
        shown = torch.cat([whole(steps[3 * epoch + step]).image for step in range(3)])
        matches = torch.cdist(shown.flatten(1), expected.flatten(1)) < 1e-3
        assert matches.sum(0).tolist() == [1] * 6
        assert data.epoch == epoch
        orders.append(matches.int().argmax(1).tolist())
    assert orders[0] != orders[1]


class Labels(FlatPairs):
    """Samples whose label shows class 0 and one more class."""

    def __init__(self, classes: list[int]) -> None:
        super().__init__(len(classes))
        self.classes = classes

    def __getitem__(self, index: int) -> Item:
        item = super().__getitem__(index)
        item["label"] = np.zeros((64, 64), dtype=np.uint8)
        item["label"][3, 5] = self.classes[index]
        return item


def test_samples_with_a_rare_class_come_as_often_as_their_factor_says() -> None:
    data = Labels([1] * 12 + [2] * 3 + [3])  # in 12, 3 and 1 of 16 samples
    times = repeats(data, 12, 0.75)
    assert times[:12].tolist() == [1] * 12  # not rarer than the threshold
    assert times[12:15].tolist() == [2] * 3  # sqrt(0.75 / (3 / 16)) = 2
    assert times[15] == 3  # sqrt(0.75 / (1 / 16)) = 3.46, and no fraction before it
    assert repeats(Labels([1] * 7 + [2] * 2), 12, 0.5).sum() == 7 + 3  # sqrt(0.5 / (2 / 9)) = 1.5, twice
    steps = Steps(data, settings(data={"repeat_rare": 0.75}, schedule={"steps": 0, "epochs": 1}))
    assert len(steps) == (12 + 6 + 3) // 2
    classes = torch.cat([whole(steps[step]).label[:, 3, 5] for step in range(len(steps))])
    assert classes.bincount(minlength=4).tolist()[2:] in ([6, 3], [5, 3], [6, 2])  # the last part fills no batch


@pytest.mark.parametrize(("world", "micro_batch", "pieces"), [(1, 0, 1), (1, 2, 2), (2, 0, 1), (2, 1, 2), (4, 1, 1)])
def test_processes_and_micro_batches_share_a_batch(world: int, micro_batch: int, pieces: int) -> None:
    augmented = {"data": {"mirror": 0.5, "recolor": 0.5}}
    expected = Steps(FlatPairs(9), settings(run={"batch": 4}, **augmented))[1][0]
    shares = []
    for rank in range(world):
        own = Steps(FlatPairs(9), settings(run={"batch": 4, "micro_batch": micro_batch}, **augmented), rank, world)
        assert len(own) == 6
        assert len(own[1]) == pieces
        shares += own[1]
    together = whole(shares)
    assert all(map(torch.equal, together, expected))


def test_mirroring_and_recoloring_keep_a_sample_together() -> None:
    batch = Steps(FlatPairs(), settings(run={"batch": 5}, data={"mirror": 1.0, "recolor": 1.0}))[0][0]
    plain = Steps(FlatPairs(), settings(run={"batch": 5}))[0][0]
    assert torch.equal(batch.label, plain.label.flip(-1))
    assert torch.equal(batch.image.sort(1).values, plain.image.flip(-1).sort(1).values)
    assert not torch.equal(batch.image, plain.image.flip(-1))
    for row in range(5):
        colors = {}
        for kind, pictures, labels in (
            ("exemplar", batch.exemplar, batch.exemplar_label),
            ("image", batch.image, batch.label),
        ):
            for name in labels[row].unique().tolist():
                colors[kind, name] = pictures[row][:, labels[row] == name].mean(1)
        for name in range(4):
            torch.testing.assert_close(colors["exemplar", name], colors["image", name])


def test_low_res_steps_see_half_the_size() -> None:
    steps = Steps(FlatPairs(5, size=128), settings(schedule={"low_res_steps": 1}))
    small, large = steps[0][0], steps[1][0]
    assert small.label.shape == (2, 64, 64)
    assert small.image.shape == (2, 3, 64, 64)
    assert large.exemplar.shape == (2, 3, 128, 128)


def test_workers_give_the_same_steps() -> None:
    alone, helped = (list(Steps(FlatPairs(), settings(run={"workers": n})).loader(2)) for n in (0, 2))
    assert len(alone) == len(helped) == 4
    for one, other in zip(alone, helped, strict=True):
        assert all(map(torch.equal, one[0], other[0]))


def test_batches_that_do_not_fit() -> None:
    with pytest.raises(InputError, match=r"1 samples do not fill a batch of 2; lower run\.batch"):
        Steps(FlatPairs(1), settings())
    with pytest.raises(InputError, match=r"run\.batch: 4 is no multiple of 1 processes times run\.micro_batch 3"):
        Steps(FlatPairs(), settings(run={"batch": 4, "micro_batch": 3}))
    with pytest.raises(InputError, match=r"run\.batch: 4 is no multiple of 3 processes"):
        Steps(FlatPairs(), settings(run={"batch": 4}), 0, 3)


def test_avatars_have_targets_and_the_models_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(split: str, options: avatars.AvatarOptions, *, count: int, folder: str) -> FlatPairs:
        assert (split, options.size, count, folder) == ("train", 64, 3, str(tmp_path))
        assert options.retrieved_share == 0.8
        return FlatPairs(count)

    monkeypatch.setattr(avatars, "AvatarPairs", fake)
    chosen = {"count": 3, "cache": str(tmp_path), "retrieved_share": 0.8}
    assert len(open_data(settings(data=chosen))) == 3
    with pytest.raises(InputError, match="needs a model of 12 label classes"):
        open_data(settings(model={"label_channels": 13}))


def test_photos_get_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def fake(*positional: object, **named: object) -> data_package.PairData:
        seen.update(named, positional=positional)
        return FlatPairs()

    monkeypatch.setattr(photos, "PhotoPairs", fake)
    chosen = {"kind": "photos", "root": "here", "pairs": "list.txt", "load_size": 80}
    chosen |= {"retrieved_share": 0.5, "hard_share": 0.25}
    made = settings(data=chosen, run={"seed": 7})
    open_data(made)
    assert seen == {"positional": (made.model, made.data), "seed": 7}
    with pytest.raises(InputError, match=r"data\.root: expected the folder"):
        open_data(settings(data={"kind": "photos"}))
