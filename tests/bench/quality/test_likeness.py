"""The likeness judge: its labelled boxes, what it was spoilt with, and its verdicts."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from hcma_fast.bench.quality.metrics.likeness.data import (
    FIGURE,
    SIDE,
    Pairs,
    chimera,
    cut,
    damage,
    doubled,
    is_colourful,
    is_lopsided,
    looks,
    mirrored_halves,
    other_colours,
    pixel_side,
    reference,
    without_parts,
)
from hcma_fast.bench.quality.metrics.likeness.labels import ASSETS, LabelledBox, read_labelled
from hcma_fast.bench.quality.metrics.likeness.model import LikenessJudge, LikenessNet, colours_of
from hcma_fast.bench.quality.metrics.likeness.training import (
    area,
    best_threshold,
    labelled_pairs,
    trains,
)
from hcma_fast.errors import InputError, WeightsError
from hcma_fast.train.data.editions import EDITIONS
from hcma_fast.train.data.emoji_scenes import CATEGORY_NAMES


@pytest.fixture(scope="module")
def judge() -> LikenessJudge:
    return LikenessJudge.load()


def test_every_box_of_the_set_has_a_label_and_a_half() -> None:
    found, pictures = read_labelled()
    labels = Counter(item.label for item in found.boxes)
    assert len(found.boxes) == 472 and set(labels) == {"right", "half", "wrong"}
    assert min(labels.values()) > 100
    assert {item.phrase for item in found.boxes} == set(CATEGORY_NAMES)
    assert pictures.shape[1:] == (64, 64, 3) and len(pictures) == 336
    assert max(item.picture for item in found.boxes) == 335
    halves = {number: item.half for item in found.boxes for number in [item.picture]}
    counts = Counter(item.half for item in found.boxes)
    assert counts == {"train": 188 + 96, "test": 188} and set(halves.values()) == {"train", "test"}
    # all boxes of a picture are in one half, and what trains is of one half alone
    for item in found.boxes:
        assert item.half == halves[item.picture]
        assert not trains(item) or item.half == "train"
        # pictures that were drawn to train on are never tested on
        assert item.half == "train" or item.picture < 240
        # the test half alone has a second label
        assert (item.second is None) == (item.half == "train")
    assert 188 < sum(map(trains, found.boxes)) < 188 + 96
    assert (ASSETS / "labelled-4.png").stat().st_size < 2e6


def test_training_sees_no_box_of_the_test_half() -> None:
    found, pictures = read_labelled()
    seen = {pair.crop.tobytes() for pair in labelled_pairs()}
    for item in found.boxes:
        assert (cut(pictures[item.picture], item.box).tobytes() in seen) == trains(item)


def test_missing_labels_are_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="labelled boxes cannot be read"):
        read_labelled(tmp_path)


def test_a_spoilt_figure_is_another_one() -> None:
    rng = np.random.default_rng(0)
    art = np.asarray(looks(2)["horse"])
    other = np.asarray(looks(2)["banana"])
    solid = (art[..., 3] > 128).sum()
    for _ in range(5):
        less = without_parts(rng, art)
        assert 0.3 < (less[..., 3] > 128).sum() / solid < 0.7
        twice = mirrored_halves(rng, art)
        assert np.array_equal(twice, twice[:, ::-1])
        for spoilt in (less, twice, doubled(rng, art), other_colours(rng, art)):
            assert spoilt.shape == art.shape and spoilt.dtype == np.uint8
            assert np.abs(spoilt.astype(int) - art).mean() > 4
        mixed = chimera(rng, art, other)
        assert min(np.abs(mixed.astype(int) - one).mean() for one in (art, other)) > 4
    assert is_lopsided(art) and not is_lopsided(np.asarray(looks(2)["suitcase"]))
    assert is_colourful(np.asarray(looks(2)["red car"]))
    assert not is_colourful(np.asarray(looks(2)["elephant"]))


def test_a_crop_and_its_reference_lie_over_each_other() -> None:
    edition = EDITIONS[2]
    for index in range(5):
        scene = edition.sample("judge", index, 128)
        picture = np.asarray(edition.render(scene, "judge", index, 128))
        item = scene.objects[-1]  # nothing covers the last
        crop = cut(picture, item.box).transpose(2, 0, 1) / 127.5 - 1
        wanted = reference(2, item.phrase, pixel_side(item.box, 128))
        assert crop.shape == (3, SIDE, SIDE) and wanted.shape == (4, SIDE, SIDE)
        error = (np.abs(crop - wanted[:3]) * wanted[3:]).sum() / (3 * wanted[3:].sum())
        assert error < 0.2, (index, error)
    assert pixel_side((0, 0, 1, 1), 128) == 64 and pixel_side((0, 0, 0.1, 0.1), 64) == 8
    assert (SIDE - FIGURE) // 2 == 3


def test_pairs_are_drawn_by_step_number_and_half_are_right() -> None:
    pairs = Pairs()
    first, second = pairs.batch(3, 24), pairs.batch(3, 24)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    crops, references, right = first
    assert crops.shape == (24, 3, SIDE, SIDE) and crops.min() >= 0 and crops.max() <= 1
    assert references.shape == (24, 4, SIDE, SIDE)
    assert set(right.tolist()) == {0.0, 1.0} and 5 < right.sum() < 19
    assert not torch.equal(pairs.batch(4, 24)[0], crops)


def test_damage_grows_with_bend_and_blur() -> None:
    crops = torch.from_numpy(reference(2, "zebra", 64)[None, :3] / 2 + 0.5).expand(3, -1, -1, -1)
    out = damage(
        crops, torch.tensor([0.0, 0.15, 0.0]), [SIDE, SIDE, 4], torch.Generator().manual_seed(0)
    )
    mild, bent, soft = ((out - crops).abs().mean((1, 2, 3))).tolist()
    assert mild < 0.06 < bent and mild < soft


def test_the_threshold_is_the_one_that_agrees_most() -> None:
    values = np.array([0.1, 0.3, 0.6, 0.9])
    right = np.array([False, False, True, True])
    assert 0.3 < best_threshold(values, right) <= 0.6
    # where nothing is right, nothing may pass
    assert best_threshold(values, right & False) > 0.9


def test_area_under_the_curve() -> None:
    values = np.array([0.1, 0.4, 0.4, 0.9])
    assert area(values, np.array([False, False, True, True])) == 0.875  # one tie of four pairs
    assert area(values, np.array([True, True, False, False])) == 0.125


def test_the_card_says_how_well_it_agrees(judge: LikenessJudge) -> None:
    card = judge.card
    assert card.labelled_train == 284 and card.labelled_test == 188
    # both measured on the half that neither was trained or chosen on
    assert card.agreement_test > card.old_agreement_test + 0.2
    boxes = [item for item in read_labelled()[0].boxes if item.half == "test"]
    for agreement, labels in (
        (card.second_agreement_test, {"right"}),
        (card.second_lenient_agreement_test, {"right", "half"}),
    ):
        same = [(b.label in labels) == (b.second in labels) for b in boxes]
        assert agreement == pytest.approx(np.mean(same), abs=1e-4)
    assert card.auc_wrong_test > 0.5 < card.auc_right_test


def test_real_figures_are_recognised_and_others_are_not(judge: LikenessJudge) -> None:
    right, wrong = [], []
    for number, edition in EDITIONS.items():
        size = edition.image_size
        for index in range(9000, 9012):
            scene = edition.sample("judge", index, size)
            picture = np.asarray(edition.render(scene, "judge", index, size))
            boxes, phrases = [o.box for o in scene.objects], [o.phrase for o in scene.objects]
            right += judge.recognised(picture, boxes, phrases, number)
            others = [
                next(p for p in edition.phrases[index % 7 :: 5] if p.split()[-1] != q.split()[-1])
                for q in phrases
            ]
            wrong += judge.recognised(picture, boxes, others, number)
    assert np.mean(right) > 0.9 and np.mean(wrong) < 0.05


def test_colours_are_told_apart(judge: LikenessJudge) -> None:
    edition = EDITIONS[2]
    seen = []
    for index in range(9000, 9040):
        scene = edition.sample("judge", index, 128)
        coloured = [o for o in scene.objects if o.phrase != o.category]
        if coloured:
            picture = np.asarray(edition.render(scene, "judge", index, 128))
            phrases = [o.phrase for o in coloured]
            found = judge.colours_seen(picture, [o.box for o in coloured], phrases)
            seen += [one == other for one, other in zip(found, phrases, strict=True)]
    assert len(seen) > 10 and np.mean(seen) > 0.8
    assert set(colours_of("red apple")) == {"apple", "red apple", "yellow apple", "green apple"}


def test_no_box_has_no_verdict(judge: LikenessJudge) -> None:
    assert judge.recognised(np.zeros((64, 64, 3), np.uint8), [], [], 1) == []


def test_damaged_files_are_said(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(ASSETS, tmp_path / "assets"))
    content = (copy / "likeness.safetensors").read_bytes()
    (copy / "likeness.safetensors").write_bytes(content[:-4] + b"abcd")
    with pytest.raises(WeightsError, match="not the ones of its card"):
        LikenessJudge.load(copy)
    (copy / "likeness.json").unlink()
    with pytest.raises(WeightsError, match="cannot be loaded"):
        LikenessJudge.load(copy)
    assert sum(p.numel() for p in LikenessNet().parameters()) < 3e5


def test_a_label_is_of_a_picture() -> None:
    item = LabelledBox(picture=3, phrase="dog", box=(0, 0, 1, 1))
    assert (
        item.label is None
        and item.half == LabelledBox(picture=3, phrase="cat", box=(0, 0, 0.5, 1)).half
    )
