"""Levels in an order, through every door: opening, `rank`, a search and what it leaves."""

from __future__ import annotations

import csv
import json
import re
from typing import Any

import numpy as np
import pytest
from command_lab import call, search_twice
from scipy.special import softmax
from scipy.stats import spearmanr
from sklearn.metrics import accuracy_score, cohen_kappa_score, log_loss, mean_absolute_error

from sfda_tune import ImageDataset, Ranking, open_dataset, rank, resolve_backbones
from sfda_tune.data.checks import DatasetError
from sfda_tune.data.splits import split_images, tell_gaps
from sfda_tune.finetuning.config import FinetuneConfig
from sfda_tune.finetuning.models import load_model, predict
from sfda_tune.finetuning.run import finetune
from sfda_tune.finetuning.tasks import Ordinal
from sfda_tune.pipelines.export import export_onnx
from sfda_tune.report.html import write_report
from sfda_tune.selection.diagnostics import diagnose
from sfda_tune.selection.numbers import measure_levels, name_levels, resample_levels

ONE = "demo:resnet_glyphs"
THREE = [ONE, "demo:resnet_noise", "demo:vit_untrained"]
SIZES = ("small", "medium", "large")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Digits as files of three sizes, in a table."""
    folder = tmp_path_factory.mktemp("digits")
    digits = open_dataset("digits", samples=90)
    lines = ["path,size,writer"]
    for row in range(90):
        digits.load(row).save(folder / f"{row}.png")
        lines.append(f"{row}.png,{SIZES[min(digits.labels[row] // 3, 2)]},w{row // 3}")
    (folder / "table.csv").write_text("\n".join(lines))
    return folder / "table.csv"


@pytest.fixture(scope="module")
def run(table, tmp_path_factory):
    folder = tmp_path_factory.mktemp("search") / "run"
    command = ["search", table, "--levels", "small,medium,large", "--label-column", "size"]
    command += ["-b", ONE, "--trials", 1, "--epochs", 1, "--group-column", "writer"]
    return search_twice(folder, command, {"--levels", "small,medium,large", "--task", "ordinal"})


def open_levels(labels, **options):
    images = np.zeros((len(labels), 4, 4), np.uint8)
    return open_dataset((images, labels), task="ordinal", **options)


@pytest.mark.parametrize(
    ("labels", "options", "classes", "codes"),
    [
        ([3, 1, 10], {}, ("1", "3", "10"), [1, 0, 2]),
        (["0.5", "-2", "-10"], {}, ("-10", "-2", "0.5"), [2, 1, 0]),
        (["60+", "0-9", "10-19"], {}, ("0-9", "10-19", "60+"), [2, 0, 1]),
        (["grade-2", "grade-10", "grade-2"], {}, ("grade-2", "grade-10"), [0, 1, 0]),
        (["small", "large"], {"levels": SIZES}, SIZES, [0, 2]),
        (["small", "large"], {"levels": "small, medium,large"}, SIZES, [0, 2]),
        (["1.0", "3"], {"levels": [3, 2, 1]}, ("3", "2", "1"), [2, 0]),
    ],
)
def test_levels_have_the_order_that_people_mean(labels, options, classes, codes):
    data = open_levels(labels, **options)
    assert (data.task, data.classes, data.labels.tolist()) == ("ordinal", classes, codes)
    assert f"{len(classes)} levels" in repr(data)
    assert data.subset([0]).task == "ordinal"


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (["low", "high"], {}, r"must say the order of its levels.*'high', 'low'.*--levels"),
        (["<10", "10-20"], {}, "must say the order"),
        (["a1", "a1b"], {}, "must say the order"),
        (["small", "huge"], {"levels": SIZES}, r"nothing but `levels` \(small, .* has 'huge'"),
        ([0, 1], {"levels": [0, 0, 1]}, "`levels` must be two or more different names"),
        (["a", "b"], {"levels": {"a", "b"}}, "`levels` must be names from the lowest"),
        (["1", "01"], {}, "are no different numbers; pass levels"),
        ([0, 1], {"levels": "0"}, "`levels` must be two or more different names"),
        ([0, 1], {"levels": 3}, "`levels` must be a text that is not empty"),
        ([0, 0], {}, "at least 2 classes"),
        ([0, None], {}, "must hold a label for every image"),
    ],
)
def test_levels_that_say_no_order_are_refused(labels, options, message):
    with pytest.raises(ValueError, match=message):
        open_levels(labels, **options)


def test_folders_and_opened_classes_become_levels(tmp_path):
    digits = open_dataset("digits", samples=30)
    for row in range(30):
        folder = tmp_path / str(digits.labels[row] + 5)
        folder.mkdir(exist_ok=True)
        digits.load(row).save(folder / f"{row}.png")
    data = open_dataset(tmp_path, task="ordinal")
    assert data.classes == tuple(map(str, range(5, 15)))  # not 10 before 5
    turned = open_dataset(digits, levels=range(9, -1, -1))
    assert turned.labels.tolist() == (9 - digits.labels).tolist()
    assert open_dataset(turned, task="ordinal") is turned
    with pytest.raises(ValueError, match="`task` must be 'regression'"):
        open_dataset(open_dataset("digits", task="regression"), task="ordinal")
    with pytest.raises(DatasetError, match="`levels` is for levels in an order, but `task` is 'r"):
        open_dataset("digits", task="regression", levels="0,1")
    with pytest.raises(DatasetError, match="as that of grades, task='ordinal'"):
        open_dataset((np.zeros((40, 4, 4), np.uint8), np.arange(40)))


def test_digits_as_levels(tmp_path, capsys):
    cache = tmp_path / "cache"
    levels = open_dataset("digits", task="ordinal", samples=300)
    by_score = rank(levels, THREE, cache=cache, metric="ridge")
    numbers = ImageDataset("digits", levels.items, levels.labels.astype(float), ())
    numbers = rank(numbers, THREE, cache=cache, metric="ridge")
    for s in by_score.scores:  # the same regression, judged by the order alone
        assert s.value == pytest.approx(numbers.score(s.backbone).details["spearman"])
        assert s.per_sample is not None
        assert s.per_sample.mean() == pytest.approx(s.value)
    assert "task" not in {d.kind for d in diagnose(by_score)}
    out = tmp_path / "r.json"
    options = ["--task", "ordinal", "--samples", 300, "--cache", cache, "--out", out]
    assert call("rank", "digits", "-b", *THREE, *options) == 0
    shown = capsys.readouterr()
    title = "digits: 300 images, 10 levels (0 < 1 < 2 < 3 < 4 < 5 < 6 < 7 and 2 more)"
    assert title in " ".join(shown.out.split())
    assert "rank correlation (Spearman) of 0." in " ".join(shown.out.split())
    assert "An epoch over these" in shown.out  # whatever the labels are
    assert "--task ordinal --out run" in " ".join(shown.err.split())
    ranking = Ranking.from_json(out)
    assert ranking.info["task"] == "ordinal"
    assert sum(level["images"] for level in ranking.info["level_counts"]) == 300
    assert ranking.score(ONE).details["evidence"] == pytest.approx(by_score[ONE])
    kinds = {d.kind: d.message for d in diagnose(ranking)}
    assert "for levels it weighs" in kinds["task"]
    assert "small_classes" not in kinds
    page = write_report(out).read_text("utf-8")
    assert "<dt>levels</dt><dd>10</dd>" in page
    assert 'id="classes"' not in page
    assert call("rank", "digits", "-b", ONE, *options[:6], "--json") == 0
    assert json.loads(capsys.readouterr().out)["level_counts"] == ranking.info["level_counts"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "sfda"}, "'sfda' takes classes without an order; take 'ridge'"),
        ({"ensemble": 2}, "must have classes for an `ensemble` but has levels in an order"),
        ({"levels": "a,b"}, "nothing but `levels` .* has '0', '1'"),
        ({"task": "multilabel", "levels": "a,b"}, "but `task` is 'multilabel'"),
    ],
)
def test_what_has_no_meaning_for_levels_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        rank("digits", THREE, **{"task": "ordinal", "cache": False, **options})


def test_metrics_of_levels_and_their_intervals():
    rng = np.random.default_rng(0)
    y = rng.choice(5, 300, p=[0.5, 0.1, 0.2, 0.15, 0.05])
    p = softmax(-(((y + rng.normal(0, 0.8, 300))[:, None] - np.arange(5)) ** 2), axis=1)
    k = np.array([next(c for c in range(5) if q[: c + 1].sum() >= 0.5) for q in p])
    place = (p * np.arange(5)).sum(axis=1)
    found = measure_levels(y, p)
    assert found == pytest.approx({
        "spearman": spearmanr(y, place)[0],
        "qwk": cohen_kappa_score(y, k, weights="quadratic"),
        "mae": mean_absolute_error(y, k), "accuracy": accuracy_score(y, k),
        "log_loss": log_loss(y, p),
    })  # fmt: skip
    assert measure_levels(y, np.tile(p[0], (300, 1)))["qwk"] == 0
    with pytest.raises(ValueError, match="all 3 are equal"):
        measure_levels(np.ones(3, int), p[:3])
    rows = rng.integers(0, 300, (200, 300))
    by_hand = {
        "spearman": [spearmanr(y[r], place[r])[0] for r in rows],
        "qwk": [cohen_kappa_score(y[r], k[r], weights="quadratic") for r in rows],
        "mae": [mean_absolute_error(y[r], k[r]) for r in rows],
        "accuracy": [accuracy_score(y[r], k[r]) for r in rows],
    }
    draws = resample_levels(y, p)
    for name, values in by_hand.items():
        assert draws[name].std() == pytest.approx(np.std(values), rel=0.2)
        assert draws[name].mean() == pytest.approx(np.mean(values), abs=0.01)


def test_a_network_learns_levels_and_its_model_names_them(tmp_path):
    data = open_dataset("digits", task="ordinal", samples=120)
    (backbone,) = resolve_backbones(ONE)
    with finetune(backbone, data, FinetuneConfig(epochs=1)) as run:
        for _ in run:
            pass
        model = load_model(run.save_model(tmp_path / "model"))
    assert run.config.monitor == "spearman"
    assert run.best is not None
    assert set(run.best.values) == {"spearman", "qwk", "mae", "accuracy", "log_loss"}
    assert 0 < run.best.error < 0.2
    assert isinstance(model.task, Ordinal)
    assert model.classes == data.classes
    p = predict(model, run.val)
    assert model.task.measure(run.val.labels, p) == pytest.approx(run.best.values, abs=1e-4)
    few = run.val.subset(np.flatnonzero(run.val.labels > 4))
    renamed = open_dataset((list(few.items), few.labels), task="ordinal")  # without 0 … 4
    again = finetune(backbone, data, FinetuneConfig(), val=renamed).val
    assert again.labels.tolist() == few.labels.tolist()
    with pytest.raises(ValueError, match="`val` must hold levels, as `dataset`"):
        finetune(backbone, data, val=open_dataset("digits", samples=40))
    with pytest.raises(ValueError, match=r"`monitor` must be one of .*qwk.* for ordinal"):
        finetune(backbone, data, FinetuneConfig(monitor="macro_f1"))


def test_splits_hold_levels_as_well_as_they_can():
    y = np.repeat(np.arange(5), [100, 60, 30, 8, 2])
    items = list(np.random.default_rng(0).integers(0, 256, (200, 8, 8), np.uint8))
    data = ImageDataset("x", items, y, tuple("abcde"), ordered=True)
    arguments = {"split": None, "samples": None, "test": None, "seed": 0}
    parts, _, _ = split_images({"dataset": data, **arguments})
    assert [np.bincount(part.labels, minlength=5)[:4].min() >= 1 for part in parts.values()]
    assert np.bincount(parts["train"].labels)[4] == 2  # what is rare is trained on
    assert any("no test image of e" in said for said in tell_gaps(parts))
    with pytest.raises(DatasetError, match="3 different ones; levels need 20"):
        split_images({"dataset": data.subset([0, 100, 190]), **arguments})


def test_a_search_learns_levels_and_tests_them(run):
    with (run.folder / "test_predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["item", "label", "predicted", "place", *(f"p_{c}" for c in SIZES)]
    y = np.array([SIZES.index(row["label"]) for row in rows])
    p = np.array([[float(row[f"p_{c}"]) for c in SIZES] for row in rows])
    assert run.test == pytest.approx(measure_levels(y, p), abs=1e-4)
    assert run.test["spearman"] > 0.4
    assert [row["predicted"] for row in rows] == [SIZES[k] for k in name_levels(p)]
    places = np.array([float(row["place"]) for row in rows])
    assert places == pytest.approx(p @ [0, 1, 2], abs=1e-4)
    for name, (low, high) in run.intervals.items():
        assert low <= run.test[name] <= high
    assert run.classes == list(SIZES)
    assert (run.summary["task"], run.summary["metric"]) == ("ordinal", "spearman")
    told = str(run)
    assert "quadratic weighted κ" in told
    assert "Spearman's ρ 0." in told
    hardest = json.loads((run.folder / "hardest" / "hardest.json").read_text())
    assert hardest[0]["label"] in SIZES
    assert abs(hardest[0]["error"]) == pytest.approx(np.abs(places - y).max(), abs=1e-5)


def test_the_page_speaks_of_levels(run):
    page = (run.folder / "report.html").read_text("utf-8")
    text = re.sub(r"<script.*?</script>|<style.*?</style>|<[^>]*>", " ", page, flags=re.S)
    text = text[: text.rindex("Do it again")]
    forecast: Any = re.search(r"The forecast was fitted to classification only.*?alone\.", text)
    for word in ("class", "Class", "robability of the label", "alibration error"):
        assert word not in text.replace(forecast[0], ""), word
    n = run.summary["n_images"]["test"]
    assert f"orders {n} test images by level with Spearman" in " ".join(text.split())
    for word in ("Confusion matrix", "Accuracy by level", "quadratic weighted κ"):
        assert word in text


def test_new_images_get_levels(run, table, tmp_path, capsys):
    images, out = [table.parent / f"{k}.png" for k in range(3)], tmp_path / "p.csv"
    assert call("predict", run.folder, *images, "--csv", out, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    p = run.predict(images)
    names, places = [SIZES[k] for k in name_levels(p)], p @ [0, 1, 2]
    assert [r["predicted"] for r in told] == names
    assert list(told[0]["probabilities"]) == list(SIZES)
    assert [r["place"] for r in told] == pytest.approx(places.tolist())
    with out.open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["item", "predicted", "place", *(f"p_{c}" for c in SIZES)]
    assert [row[1] for row in rows[1:]] == names
    assert call("predict", run.folder, images[0]) == 0
    assert capsys.readouterr().out.strip().endswith(f"{names[0]}  {places[0]:.3f}")


@pytest.mark.slow  # that of numbers is not, and takes the same way
def test_levels_leave_as_onnx(run, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    found = export_onnx(run, tmp_path / "export")
    assert found.images == "test images"
    assert found.value == pytest.approx(run.test["spearman"], abs=1e-6)
    session = onnxruntime.InferenceSession(found.folder / "model.onnx")
    outputs = {o.name: o.shape[1:] for o in session.get_outputs()}
    assert outputs == {"logits": [3], "probabilities": [3]}
    about = json.loads((found.folder / "preprocessing.json").read_text())
    assert about["levels"] == list(SIZES)
    card = (found.folder / "README.md").read_text("utf-8")
    assert "3 levels, from the lowest to the highest: small, medium, large." in card
    assert "the median by its probabilities" in card
    assert "class" not in card.replace("image-classification", "")
