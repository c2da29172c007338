"""Numbers to predict, through every door: `rank`, its files, the report, the command line."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace

import numpy as np
import pytest

from sfda_tune import ImageDataset, Ranking, open_dataset, rank, score
from sfda_tune.data.checks import DatasetError
from sfda_tune.metrics.regression import ridge
from sfda_tune.report.html import write_report
from sfda_tune.selection.diagnostics import diagnose
from sfda_tune.selection.uncertainty import confidence
from sfda_tune.values.features import Features, Score

THREE = ["demo:resnet_glyphs", "demo:resnet_noise", "demo:vit_untrained"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_digits_as_numbers(cache, tmp_path):
    ranking = rank("digits", THREE, task="regression", samples=300, cache=cache)
    assert next(iter(ranking)) == "demo:resnet_glyphs"
    assert ranking.info["task"] == "regression"
    assert ranking.info["target"]["min"] == 0
    assert ranking.info["target"]["max"] == 9
    assert ranking.info["n_classes"] == 0
    assert "hard_images" not in ranking.info
    kinds = {d.kind: d.message for d in diagnose(ranking)}
    assert "fitted to classification only" in kinds["task"]
    assert "small_classes" not in kinds
    by_score = rank("digits", THREE, task="regression", samples=300, cache=cache, metric="ridge")
    assert "task" not in {d.kind for d in diagnose(by_score)}
    for s in by_score.scores:
        assert s.per_sample is not None
        assert s.value == pytest.approx(s.per_sample.mean())
        assert s.value == pytest.approx(ranking.score(s.backbone).details["evidence"])
    interval = dict(zip(by_score, confidence(by_score).score_interval, strict=True))
    low, high = interval["demo:resnet_glyphs"]
    assert low < by_score["demo:resnet_glyphs"] < high < low + 0.3

    ranking.to_json(tmp_path / "r.json")
    again = Ranking.from_json(tmp_path / "r.json")
    assert again.info["target"] == ranking.info["target"]
    assert [*again.items()] == [*ranking.items()]
    assert again.shortlist(probability=0.95) == ranking.shortlist(probability=0.95)
    assert len([*csv.reader(io.StringIO(ranking.to_csv()))]) == 4
    page = re.sub("<wbr>|<.?span>", "", write_report(tmp_path / "r.json").read_text("utf-8"))
    assert 'id="classes"' not in page
    assert "sfda-tune search digits --backbones demo:resnet_glyphs" in page
    assert "--task regression --out run" in page
    assert "predicts numbers from 0 to 9" in page


def test_numbers_are_in_any_unit_that_can_be_squared(cache, tmp_path):
    images = open_dataset("digits", task="regression", samples=100)
    small = rank(images, THREE[:1], cache=cache)
    large = rank(replace(images, labels=images.labels * 1e44), THREE[:1], cache=cache)
    assert [*large.values()] == pytest.approx([*small.values()])
    large.to_json(tmp_path / "r.json")
    again = Ranking.from_json(tmp_path / "r.json")
    assert again.info["target"]["max"] == pytest.approx(9e44)
    for scale in (1e76, 1e200, 1e-200):
        with pytest.raises(DatasetError, match=r"must be within .* change the unit"):
            replace(images, labels=images.labels * scale)
        with pytest.raises(ValueError, match=r"`targets` must be within .* change the unit"):
            ridge(np.eye(100), images.labels * scale)
    score = Score("a", 1e200)  # which could be written, but not read
    assert score.error == "the metric's value is 1e+200"


def test_scores_of_numbers_do_not_depend_on_how_they_come(cache):
    digits = open_dataset("digits", task="regression", samples=200)
    found = rank(digits, THREE[:1], metric="ridge", cache=cache)
    again = rank("digits", THREE[:1], samples=200, task="regression", metric="ridge", cache=cache)
    assert dict(found) == dict(again)
    x = np.random.default_rng(0).normal(size=(200, 5))
    features = Features(x, digits.labels, task="regression")
    assert features.classes == ()
    assert score(features).value == ridge(features.x, digits.labels).value
    combined = rank(digits, THREE, metric="ridge + 2*knn + params", cache=cache)
    assert len(combined.failed) == 0
    assert combined.metric == "ridge + 2*knn + params"
    mine = rank(digits, THREE[:1], metric=lambda f, y: float(y.max()), cache=cache)
    assert list(mine.values()) == [9.0]


def test_groups_of_numbers_are_left_out_together(cache):
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(40), 5)
    images = rng.integers(0, 256, (40, 8, 8), dtype=np.uint8)[patient]
    images[:, 0] = rng.integers(0, 256, (200, 8))
    age = rng.normal(size=40)[patient] + 50
    found = rank(
        (images, age), THREE[:2], task="regression", groups=patient, metric="ridge", cache=cache
    )
    for s in found.scores:
        assert s.value < 0.1 < s.details["value_without_groups"] - 0.3
    assert found.info["groups"]["n"] == 40
    assert found.info["groups"]["several_classes"] == 0
    kinds = {d.kind for d in diagnose(found)}
    assert "groups" in kinds
    assert "lone_classes" not in kinds
    assert confidence(found).dof == 39


def test_race_and_budget_of_numbers(cache):
    digits = open_dataset("digits", task="regression", samples=800)
    fast = ["demo:resnet_*", "demo:regnet_shapes", "demo:densenet_digits"]
    whole = rank(digits, fast, metric="ridge", cache=cache)
    raced = rank(digits, fast, metric="ridge", race=True, top=1, cache=cache)
    assert next(iter(raced)) == next(iter(whole))
    assert raced.info["race"]["stages"][0]["images"] < 800
    late = rank(digits, fast, budget=600, cache=cache)
    assert dict(late) == dict(rank(digits, fast, cache=cache))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "sfda"}, "'sfda' is about classes; take 'ridge'"),
        ({"metric": "ridge + hscore"}, "'hscore' is about classes"),
        ({"metric": "rigde"}, "'rigde' is unknown"),
        ({"metric": "imagenet"}, "'ridge [+] imagenet'"),
        ({"variant": "loo"}, "about classes"),
        ({"ensemble": 2}, "must have classes for an `ensemble`"),
        ({"task": "ranking"}, "`task` must be one of auto, classification, regression"),
        ({"task": None, "metric": "ridge"}, "for numbers to predict: task='regression'"),
    ],
)
def test_what_has_no_meaning_for_numbers_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        rank("digits", THREE, **{"task": "regression", "cache": False, **options})


def test_image_dataset_of_numbers_is_checked():
    items = [np.zeros((2, 2), np.uint8)] * 3
    assert ImageDataset("x", items, np.array([0.5, 1, 2]), ()).task == "regression"
    for labels, classes in (([0.5, 1, np.inf], ()), ([0.5, 1, 2], ("a", "b")), ([0.5, 1], ())):
        with pytest.raises(DatasetError):
            ImageDataset("x", items, np.array(labels), classes)
