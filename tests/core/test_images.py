"""What a ranking says of the images: on the digits, with labels that were changed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import sfda_tune
from sfda_tune.data.opening import open_dataset
from sfda_tune.selection.images import judge_classes, judge_images
from sfda_tune.values.features import Score
from sfda_tune.values.ranking import Ranking


@pytest.fixture(scope="module")
def changed():
    """The rows of the digits whose labels were changed, and the ranking by the changed ones."""
    digits = open_dataset("digits", samples=600)
    rng, y = np.random.default_rng(0), digits.labels.copy()
    rows = rng.choice(len(y), 18, replace=False)
    y[rows] = (y[rows] + rng.integers(1, 10, 18)) % 10
    images = replace(digits, labels=y)
    names = ["demo:convnext_glyphs", "demo:resnet_glyphs", "demo:vit_glyphs", "demo:densenet*"]
    return images, rows, sfda_tune.rank(images, names, cache=False)


def test_changed_labels_are_found(changed):
    images, rows, ranking = changed
    evidence = judge_images(ranking)
    found = np.flatnonzero(evidence.doubtful)
    assert len(np.intersect1d(found, rows)) >= 0.8 * len(rows)
    assert len(np.intersect1d(found, rows)) >= 0.8 * len(found)
    hard = ranking.info["hard_images"]
    assert [h["p"] for h in hard] == sorted(h["p"] for h in hard)
    known = set(images.origin[rows].tolist())
    assert sum(h["row"] in known for h in hard[:12]) >= 10
    assert all(h["image"] == f"row {h['row']}" for h in hard)
    assert Ranking.from_json(ranking.to_json()).info["hard_images"] == hard


def test_classes_that_separate_worst_come_first(changed):
    _, _, ranking = changed
    evidence = judge_images(ranking)
    rows = judge_classes(evidence)
    assert [r["p"] for r in rows] == sorted(r["p"] for r in rows)
    assert sorted(r["name"] for r in rows) == [str(c) for c in range(10)]
    for r in rows:
        mine = evidence.labels == int(r["name"])
        assert r["n"] == mine.sum()
        assert r["p"] == pytest.approx(evidence.p[:, mine].mean())
        assert r["low"] <= r["p"] <= r["high"]
        assert all(0 < share <= 1 and other != r["name"] for other, share in r["taken_for"])
    each = sum(r["n"] * share for r in rows for _, share in r["taken_for"])
    accuracy = np.mean([s.details["accuracy"] for s in evidence.scores])
    assert 0 < each <= (1 - accuracy) * len(evidence.labels) + 1e-9


def test_what_is_no_probability_tells_nothing():
    y = np.arange(8) % 2
    assert judge_images(Ranking([Score("a", -2.0, np.full(8, -2.0))], "x", y)) is None
    assert judge_images(Ranking([Score("a", 0.5)], "x", y)) is None
    assert judge_images(Ranking([Score("a", 0.5, np.full(8, 0.5))], "x")) is None
    alone = Ranking([Score("a", 0.5, np.full(3, 0.5))], "x", [0, 0, 1])
    evidence = judge_images(alone)
    assert evidence.find_hardest(9) == [0, 1]  # nothing can be said of the only image of a class
    assert [r["name"] for r in judge_classes(evidence)] == ["class 0"]
