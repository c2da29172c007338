"""A search on numbers, from the command line to the page, and what it is refused."""

from __future__ import annotations

import csv
import json
import re

import numpy as np
import pytest
import yaml
from command_lab import call, search_twice

from sfda_tune import ImageDataset, open_dataset, search
from sfda_tune.data.checks import DatasetError
from sfda_tune.data.splits import split_images, tell_gaps
from sfda_tune.pipelines.config import SearchConfig
from sfda_tune.pipelines.engines import Trial
from sfda_tune.pipelines.export import export_onnx
from sfda_tune.pipelines.result import SearchResult
from sfda_tune.pipelines.spaces import default_space
from sfda_tune.pipelines.trials import find_near
from sfda_tune.report.html import save_plots
from sfda_tune.selection.numbers import measure_numbers

ONE = "demo:resnet_glyphs"


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Digits as files, with their value in degrees and who wrote them in a table."""
    folder = tmp_path_factory.mktemp("digits")
    digits = open_dataset("digits", samples=90)
    lines = ["path,degrees,writer"]
    for row in range(90):
        digits.load(row).save(folder / f"{row}.png")
        lines.append(f"{row}.png,{1000 + 2.5 * digits.labels[row]},w{row // 3}")
    (folder / "table.csv").write_text("\n".join(lines))
    return folder / "table.csv"


@pytest.fixture(scope="module")
def run(table, tmp_path_factory):
    folder = tmp_path_factory.mktemp("search") / "run"
    command = ["search", table, "--task", "regression", "--label-column", "degrees", "-b", ONE]
    command += ["--trials", 2, "--epochs", 2, "--group-column", "writer"]
    command += ["--loss", "huber"]
    return search_twice(folder, command, {"--task", "--loss"})


def test_a_search_learns_numbers_and_tests_them(run):
    with (run.folder / "test_predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    y, p = (np.array([float(row[key]) for row in rows]) for key in ("label", "predicted"))
    assert 1000 <= y.min() < y.max() <= 1022.5
    assert run.test == pytest.approx(measure_numbers(y, p))
    assert run.test["r2"] > 0.3
    assert [float(row["error"]) for row in rows] == pytest.approx((p - y).tolist(), abs=1e-5)
    assert list(run.intervals) == ["r2", "spearman", "rmse", "mae"]
    for name, (low, high) in run.intervals.items():
        assert low < run.test[name] < high
    assert "R² 0." in str(run)
    assert "accuracy" not in str(run) + repr(run)
    summary = run.summary
    assert (summary["task"], summary["metric"], summary["objectives"]) == (
        "regression",
        "r2",
        ["r2"],
    )
    assert [t["value"] for t in run.trials if t["state"] == "complete"] == pytest.approx(
        [o.value for o in run.history]
    )
    about = json.loads((run.folder / "model" / "provenance.json").read_text())
    assert (about["config"]["loss"], about["config"]["monitor"]) == ("huber", "r2")
    parts = json.loads((run.folder / "splits.json").read_text())
    writers = [{row // 3 for row in parts[name]} for name in ("train", "val", "test")]
    assert sum(map(len, writers)) == len(set().union(*writers)) == 30
    hardest = json.loads((run.folder / "hardest" / "hardest.json").read_text())
    assert abs(hardest[0]["error"]) == pytest.approx(np.abs(p - y).max(), abs=1e-5)


def test_the_page_speaks_of_numbers(run, tmp_path):
    page = (run.folder / "report.html").read_text("utf-8")
    text = re.sub(r"<script.*?</script>|<style.*?</style>|<[^>]*>", " ", page, flags=re.S)
    text = text[: text.index("Environment")]
    forecast = re.search(r"The forecast was fitted to classification only.*?alone\.", text)
    for word in ("accuracy", "correct", "onfusion", "alibration error", "class", "Class"):
        assert word not in text.replace(forecast[0], ""), word
    assert 'id="predicted"' in page
    assert 'id="residuals"' in page
    assert "Largest errors" in text
    assert "numbers to predict: degrees" in text
    assert re.search(r">\s*degrees\s*<", page)  # at the axis
    assert page.count('<use class="mark complete"') >= 2 * run.summary["n_images"]["test"]
    assert f"numbers of {run.summary['n_images']['test']} test images with R² " in text
    names = {path.name for path in save_plots(run.folder, tmp_path)}
    assert {"predictions.png", "predictions.svg"} <= names
    assert "confusion.png" not in names


@pytest.mark.filterwarnings("default:1 of 4 images cannot be read")
def test_new_images_get_numbers(run, table, tmp_path, capsys):
    images = [table.parent / f"{k}.png" for k in range(3)]
    (tmp_path / "x.png").write_bytes(b"no image")
    out = tmp_path / "p.csv"
    assert call("predict", run.folder, *images, tmp_path / "x.png", "--csv", out, "--json") == 0
    told, shown = json.loads((captured := capsys.readouterr()).out), captured.err
    expected = run.predict(images)
    assert [r["predicted"] for r in told[:3]] == pytest.approx(expected.tolist())
    assert "cannot be read" in told[3]["error"]
    assert "1 of 4 images cannot be read" in shown
    with out.open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["item", "predicted"]
    assert [float(row[1]) for row in rows[1:4]] == pytest.approx(expected.tolist(), rel=1e-8)
    assert rows[4][1] == ""
    assert call("predict", run.folder, images[0]) == 0
    assert capsys.readouterr().out.strip().endswith(f"  {expected[0]:.6g}")


def test_numbers_leave_as_onnx(run, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    found = export_onnx(run, tmp_path / "export")
    assert found.images == "test images"
    assert found.value == pytest.approx(run.test["r2"], abs=1e-6)
    assert found.max_difference < 1e-3
    assert "R² 0." in str(found)
    session = onnxruntime.InferenceSession(found.folder / "model.onnx")
    outputs = {o.name: o.shape[1:] for o in session.get_outputs()}
    assert outputs == {"standardised": [1], "numbers": []}
    card = (found.folder / "README.md").read_text("utf-8")
    assert 'session.run(["numbers"]' in card
    assert "class" not in card
    with pytest.raises(ValueError, match="must have labels for regression"):
        export_onnx(run, images=open_dataset("digits", samples=20))


def test_of_trials_that_are_close_the_bootstrap_tells():
    def trial(number, value, rmse, error=0.05):
        epoch = {"number": 1, "value": value, "rmse": rmse, "error": error, "seconds": 1.0}
        return Trial(number, "a", {}, value=value, epochs=(epoch,))

    trials = [trial(0, 0.7, 1.2), trial(1, 0.8, 1.0), trial(2, 0.78, 0.9), trial(3, -3.0, 9.0)]
    assert [t.number for t in find_near(trials, "spearman", 10_000)] == [2, 1]  # RMSE decides
    assert [t.number for t in find_near(trials[3:], "r2", 10)] == [3]  # worse than the mean
    trials = [trial(k, rmse, rmse, 0.2) for k, rmse in enumerate((1.2, 1.0, 1.1))]
    assert [t.number for t in find_near(trials, "rmse", 10)] == [1, 2, 0]


def test_splits_of_numbers():
    rng = np.random.default_rng(0)
    items, y = list(rng.integers(0, 256, (200, 8, 8), np.uint8)), rng.exponential(size=200)
    patient = np.repeat([f"p{k}" for k in range(40)], 5)
    arguments = {"split": None, "samples": None, "test": None, "seed": 0}
    data = ImageDataset("x", items, y, ())
    parts, rows, _ = split_images({"dataset": data, **arguments})
    assert sorted(row for part in rows.values() for row in part) == list(range(200))
    for part in parts.values():  # each has images of each tenth
        assert np.histogram(part.labels, np.quantile(y, np.linspace(0, 1, 11)))[0].min() >= 3
    grouped = ImageDataset("x", items, y, (), groups=patient)
    parts, rows, _ = split_images({"dataset": grouped, **arguments})
    assert len({p for part in parts.values() for p in set(part.groups)}) == 40
    assert sum(len(set(part.groups)) for part in parts.values()) == 40
    latest = ImageDataset("x", items, y, (), times=np.arange(200.0))
    parts, rows, _ = split_images({"dataset": latest, **arguments})
    assert max(rows["train"]) < min(rows["val"]) < max(rows["val"]) < min(rows["test"])
    rising = ImageDataset("x", items, np.arange(200.0), (), times=np.arange(200.0))
    parts, _, _ = split_images({"dataset": rising, **arguments})
    assert any("32 with numbers beyond" in note for note in tell_gaps(parts))
    assert not any("beyond" in note for note in tell_gaps({**parts, "val": rising, "train": rising}
                                                            | {"test": rising}))  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "accuracy"}, "`metric` must be one of .*r2.* for regression"),
        ({"objective": "accuracy"}, "`objective` must be one of .*r2,latency"),
        ({"loss": "cross_entropy"}, "`loss` must be one of .*huber.* for regression"),
        ({"loss": "l1", "space": {"loss": ["l1", "mse"]}}, "'l1' stands in `space`, too"),
        ({"space": {"mixup": [0.0, 0.2]}}, "`mixup` must be 0.0 for regression"),
        ({"space": {"class_weights": "balanced"}}, "`class_weights` must be None for regression"),
        ({"test": open_dataset("digits", samples=20)}, "`task` must be 'classification'"),
    ],
)
def test_what_has_no_meaning_is_refused_at_once(options, message, tmp_path):
    options = {"task": "regression", "cache": False, "out": tmp_path / "run"} | options
    with pytest.raises((ValueError, DatasetError), match=message):
        search("digits", ONE, **options)
    assert not (tmp_path / "run" / "search.json").exists()


def test_too_few_or_equal_numbers_are_refused(tmp_path):
    digits = open_dataset("digits", samples=60, task="regression")
    options = {"cache": False, "out": tmp_path / "run"}
    with pytest.raises(DatasetError, match="6 different ones; numbers need 20"):
        search(digits.subset(range(8)), ONE, **options)
    same = digits.subset(np.flatnonzero(digits.labels == 3))
    with pytest.raises(DatasetError, match="the images for test, 7, all have 3"):
        search(digits, ONE, test=same, **options)


def test_what_is_searched_by_default():
    assert [d.name for d in default_space(2000, "regression").dimensions] == [
        "lr", "layer_decay", "weight_decay",
    ]  # fmt: skip
    names = "trials budget storage keep objective metric max_params max_latency space epochs"
    names += " samples test split image_column label_column cache"
    given: dict = dict.fromkeys(names.split())
    given |= {"dataset": "digits", "backbones": ONE, "engine": "optuna", "workers": 1, "seed": 0}
    given |= {"max_unreadable": 0.1, "device": "auto", "precision": "float32", "plugins": ()}
    config = SearchConfig(**given, out="x", progress=False, task="regression")
    assert (config.metric, config.objective, config.directions) == ("r2", ("r2",), ("maximize",))
    config = SearchConfig(**given | {"metric": "mae"}, out="x", progress=False, task="regression")
    assert config.directions == ("minimize",)
    config = SearchConfig(**given, out="x", progress=False)
    assert (config.metric, config.objective) == ("accuracy", ("accuracy",))


def test_what_earlier_searches_found_is_learned_from(run, table, tmp_path):
    """Also of searches that go on; of numbers and of several labels."""
    command = ["search", table, "--task", "regression", "--label-column", "degrees", "-b", ONE]
    command += ["--previous", run.folder, "--epochs", 1, "--budget", "5m", "--out", tmp_path, "-q"]
    assert call(*command, "--trials", 1) == 0
    assert call(*command, "--trials", 2) == 0
    found = SearchResult.open(tmp_path)
    assert [t["state"] for t in found.trials] == ["complete"] * 2
    kept = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert kept["previous"] == [str(run.folder)]
    assert call("search", "--config", tmp_path / "config.yaml", "-q", "--out", tmp_path) == 0
    assert SearchResult.open(tmp_path).summary == found.summary
