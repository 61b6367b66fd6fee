"""The avatars data set: exact labels, one look on any structure, pairing rules, splits, and the file of pairs."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import pickle
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flashcocos.errors import BackendError, InputError
from flashcocos.train.data import avatars, avatars_draw, avatars_paint
from flashcocos.train.data.avatars import AvatarOptions, AvatarPairs, choose_pair, prepare_pairs, render_pair, uncovered
from flashcocos.train.data.avatars_draw import STYLES, hair_variants, random_structure, render_image, render_label
from flashcocos.train.data.avatars_paint import CLASSES, DEFAULT_LOOK, Paint, random_look

pytest.importorskip("dicebear", reason="needs the extra `avatars`")

RETRIEVED = AvatarOptions(size=32, retrieved_share=1.0)
PSEUDO = AvatarOptions(size=8, retrieved_share=0.0)


@pytest.fixture(autouse=True)
def one_style(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(avatars, "ACROSS_SHARE", 0.0)


def test_the_same_key_gives_the_same_bytes_in_another_process() -> None:
    code = (
        "from flashcocos.train.data.avatars import *; import hashlib;"
        "p = render_pair('train', 3, AvatarOptions(size=32, retrieved_share=0.0));"
        "print(hashlib.sha256(b''.join(a.tobytes() for a in (p.label, p.target, p.exemplar_label, p.exemplar)))"
        ".hexdigest())"
    )
    runs = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout}
    pair = render_pair("train", 3, AvatarOptions(size=32, retrieved_share=0.0))
    blob = b"".join(array.tobytes() for array in (pair.label, pair.target, pair.exemplar_label, pair.exemplar))
    assert runs == {hashlib.sha256(blob).hexdigest() + "\n"}


def test_rendering_needs_no_torch() -> None:
    code = "import sys, flashcocos.train.data.avatars; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("style", STYLES)
def test_a_paint_changes_only_its_class(style: str) -> None:
    structure = random_structure(f"{style} drawing", style=style)
    look = random_look("a look")
    label, image = render_label(structure, 96), render_image(structure, look, 96).astype(int)
    assert np.array_equal(image, render_image(structure, look, 96))
    assert label.dtype == np.uint8
    assert label.shape == (96, 96)
    assert label.max() < len(CLASSES)
    for place in [place for place in (0, 1, 2, 7) if (label == place).mean() > 0.02]:
        name = CLASSES[place]
        other = render_image(structure, look.replace(name, Paint("solid", "#ff00ff")), 96)
        changed = np.abs(other - image).max(-1) > 24
        inside = label == place
        assert changed[inside].mean() > 0.6, name
        # personas tints shaven heads with translucent hair, micah lays a translucent collar over the clothes
        leak = 0.2 if (style, name) in {("personas", "hair"), ("micah", "clothes")} else 0.03
        assert (changed & ~_grown(inside)).sum() <= leak * changed.sum() + 5, name


def test_the_trim_keeps_its_colors() -> None:
    structure = random_structure("trim", style="micah")
    look = random_look("a look")
    other = look.replace("trim", Paint("solid", "#ff00ff"))
    assert np.array_equal(render_image(structure, look, 48), render_image(structure, other, 48))


@pytest.mark.parametrize("size", [8, 31, 257])
def test_any_size(size: int) -> None:
    structure = random_structure("size", style="micah")
    assert render_label(structure, size).shape == (size, size)
    assert render_image(structure, DEFAULT_LOOK, size).shape == (size, size, 3)


@pytest.mark.parametrize("size", [0, 7, 5000])
def test_sizes_out_of_range(size: int) -> None:
    with pytest.raises(InputError, match=f"got {size}"):
        render_label(random_structure("size", style="micah"), size)


def test_every_pattern_shows_both_of_its_colors() -> None:
    structure = random_structure("pattern", style="micah")
    clear = render_label(structure, 96) == 0
    for kind in avatars_paint.KINDS[1:]:
        look = DEFAULT_LOOK.replace("background", Paint(kind, "#ff0000", "#0000ff", 0.18))
        ground = render_image(structure, look, 96)[clear].astype(int)
        for channel in (0, 2):
            assert np.ptp(ground[:, channel]) > 150, kind


def test_bad_styles() -> None:
    with pytest.raises(InputError, match="got 'bottts'"):
        random_structure("key", style="bottts")


def test_hair_variants_are_held_out_of_training_and_validation() -> None:
    held = {style: set(hair_variants(style)[1]) for style in STYLES}
    for style in STYLES:
        kept = set(hair_variants(style)[0])
        assert not kept & held[style]
        assert len(held[style]) == max(1, round(0.1 * len(kept | held[style])))
    shown = {}
    for split in ("train", "validation", "test"):
        recipes = [choose_pair(split, index, PSEUDO) for index in range(300)]
        shown[split] = sum(recipe.structure.hair in held[recipe.structure.style] for recipe in recipes)
    assert shown["train"] == shown["validation"] == 0
    assert shown["test"] > 10


def test_splits_share_no_structure_and_no_look() -> None:
    recipes = {split: [choose_pair(split, index, PSEUDO) for index in range(200)] for split in avatars.SPLITS}
    for kind in ("structure", "look"):
        sets = [{getattr(recipe, kind) for recipe in recipes[split]} for split in recipes]
        assert len(set.union(*sets)) == sum(len(one) for one in sets) == 600


def test_shares_of_the_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(avatars, "MAX_REDRAWS", 0)
    recipes = [choose_pair("train", index, AvatarOptions(size=8, retrieved_share=0.7)) for index in range(200)]
    assert 0.2 < sum(recipe.partner is None for recipe in recipes) / 200 < 0.4


def test_coverage_redraws_then_paints_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def label(structure: avatars_draw.Structure, size: int) -> np.ndarray:
        drawn.append(structure)
        plane = np.zeros((size, size), dtype=np.uint8)
        if len(drawn) in (1, answer):
            plane[:4] = CLASSES.index("hat")
        return plane

    monkeypatch.setattr(avatars, "render_label", label)
    hat = CLASSES.index("hat")
    answer = 5  # the target is the first label, so this is the fourth exemplar
    recipe = choose_pair("train", 0, RETRIEVED)
    assert len(drawn) == 5
    assert recipe.partner == drawn[-1]
    assert recipe.look == random_look("0/train/0/look")
    drawn.clear()
    answer = 0
    recipe = choose_pair("train", 0, RETRIEVED)
    assert len(drawn) == 1 + 1 + avatars.MAX_REDRAWS
    assert recipe.look.paints[hat] == DEFAULT_LOOK.paints[hat]
    assert recipe.partner is not None


def test_uncovered() -> None:
    label = np.zeros((20, 20), dtype=np.uint8)
    label[0, :5] = CLASSES.index("hair")  # 1.25 %
    label[1, :4] = CLASSES.index("eyes")  # 1 %, not over it
    label[2:4] = CLASSES.index("trim")  # bears no look
    exemplar = np.zeros((20, 20), dtype=np.uint8)
    assert np.flatnonzero(uncovered(label, exemplar)).tolist() == [CLASSES.index("hair")]
    exemplar[0, :2] = CLASSES.index("hair")  # 0.5 %
    assert not uncovered(label, exemplar).any()


def test_retrieved_pairs_keep_the_style_but_for_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = choose_pair("test", 1, RETRIEVED)
    assert recipe.partner is not None
    assert recipe.partner.style == recipe.structure.style
    monkeypatch.setattr(avatars, "ACROSS_SHARE", 1.0)
    recipes = [choose_pair("test", index, dataclasses.replace(RETRIEVED, size=8)) for index in range(6)]
    assert any(recipe.partner.style != recipe.structure.style for recipe in recipes if recipe.partner)


def test_a_pseudo_exemplar_is_the_warped_target() -> None:
    pair = render_pair("train", 3, AvatarOptions(size=64, retrieved_share=0.0))
    assert pair.pseudo
    assert not np.array_equal(pair.exemplar, pair.target)
    flow = avatars.random_flow("0/train/3/flow", 64)
    assert flow.min() >= 0
    assert flow.max() <= 63
    assert np.array_equal(pair.exemplar_label, avatars.warp_nearest(pair.label, flow))
    still = np.mgrid[:64, :64].astype(np.float32)
    assert np.array_equal(avatars.warp_bilinear(pair.target, still), pair.target)


def test_bad_requests() -> None:
    with pytest.raises(InputError, match="got 'dev'"):
        prepare_pairs("dev", PSEUDO)
    with pytest.raises(InputError, match="1 to 1000 pairs, got 1001"):
        prepare_pairs("test", PSEUDO, count=1001)


def test_items_and_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = AvatarOptions(size=32, retrieved_share=0.5)
    pairs = AvatarPairs("train", options, count=5, folder=tmp_path, workers=1)
    assert len(pairs) == 5
    rendered = [render_pair("train", index, options) for index in range(5)]
    assert {pair.pseudo for pair in rendered} == {True, False}
    for index, pair in enumerate(rendered):
        item = pairs[index]
        assert np.array_equal(item["label"], pair.label)
        assert item["exemplar"].shape == item["image"].shape == (3, 32, 32)
        assert np.array_equal(np.rint((item["exemplar"] + 1) * 127.5).transpose(1, 2, 0), pair.exemplar)
        assert item["has_target"]
        assert item["self_reference"] == pair.pseudo
    with pytest.raises(IndexError):
        pairs[5]
    monkeypatch.setattr(avatars, "render_pair", None)  # nothing may be rendered twice
    again = pickle.loads(pickle.dumps(pairs))
    assert np.array_equal(again[4]["image"], pairs[4]["image"])
    assert AvatarPairs("train", options, count=3, folder=tmp_path).path == pairs.path


def test_more_processes_and_a_longer_set_give_the_same_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(avatars, "_CHUNK", 1)
    options = PSEUDO
    first = AvatarPairs("train", options, count=2, folder=tmp_path / "one", workers=1)
    first = AvatarPairs("train", options, count=3, folder=tmp_path / "one", workers=1)
    second = AvatarPairs("train", options, count=3, folder=tmp_path / "two", workers=2)
    assert first.path.name == second.path.name
    for index in range(3):
        assert np.array_equal(first[index]["image"], second[index]["image"])


def test_the_file_is_named_after_what_decides_the_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = PSEUDO
    names = {prepare_pairs("train", options, count=1, folder=tmp_path, workers=1).name}
    for change in ({"size": 16}, {"retrieved_share": 0.1}):
        changed = dataclasses.replace(options, **change)
        names.add(prepare_pairs("train", changed, count=1, folder=tmp_path, workers=1).name)
    monkeypatch.setattr(avatars, "package_versions", lambda: {"resvg": "another"})
    names.add(prepare_pairs("train", options, count=1, folder=tmp_path, workers=1).name)
    assert len(names) == 4


def test_damaged_files_are_named(tmp_path: Path) -> None:
    options = PSEUDO
    pairs = AvatarPairs("train", options, count=2, folder=tmp_path, workers=1)
    with sqlite3.connect(pairs.path) as database:
        database.execute("UPDATE pairs SET pair = x'00' WHERE number = 0")
        database.execute("DELETE FROM pairs WHERE number = 1")
    database.close()
    with pytest.raises(InputError, match=r"is damaged .* delete it"):
        pairs[0]
    with pytest.raises(InputError, match="pair 1 is missing"):
        pairs[1]
    del pairs
    path = prepare_pairs("train", options, count=2, folder=tmp_path, workers=1)
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(InputError, match=r"is damaged .* delete it"):
        prepare_pairs("train", options, count=2, folder=tmp_path, workers=1)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without_resvg(name: str) -> object:
        if name == "resvg":
            raise ModuleNotFoundError(name)
        return real(name)

    monkeypatch.setattr(avatars_draw.importlib, "import_module", without_resvg)
    with pytest.raises(BackendError, match=r"resvg: pip install 'flashcocos\[avatars\]'"):
        render_label(random_structure("size", style="micah"), 16)
    monkeypatch.setattr(avatars_draw, "PACKAGES", ("a-package-that-is-not-there",))
    with pytest.raises(BackendError, match="a-package-that-is-not-there"):
        prepare_pairs("train", PSEUDO, count=1)


def test_the_notice_credits_every_style() -> None:
    lines = (Path(__file__).parents[2] / "NOTICE").read_text(encoding="utf-8").splitlines()
    for style in STYLES:
        meta = avatars_draw._definition(style)["meta"]
        (line,) = (line for line in lines if f'"{meta["source"]["name"]}"' in line)
        assert meta["source"]["url"] in line
        assert line.endswith(meta["license"]["name"])


def _grown(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    return np.any([padded[y : y + mask.shape[0], x : x + mask.shape[1]] for y in range(3) for x in range(3)], axis=0)
