"""A search on several labels per image: command line, page, ONNX and predictions."""

from __future__ import annotations

import csv
import json
import re

import numpy as np
import pytest
from command_lab import call, search_twice

from sfda_tune import open_dataset, search
from sfda_tune.data.checks import DatasetError
from sfda_tune.pipelines.export import export_onnx
from sfda_tune.report.html import save_plots
from sfda_tune.selection.several import measure_labels, resample_labels

ONE = "demo:resnet_glyphs"


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Digits as files, with the names of their bits in one column, and a part of their own."""
    folder = tmp_path_factory.mktemp("digits")
    digits = open_dataset("digits", samples=130, task="multilabel")
    lines = ["path,bits,writer,split"]
    for row in range(130):
        digits.load(row).save(folder / f"{row}.png")
        names = [c for c, y in zip(digits.classes, digits.labels[row], strict=True) if y]
        part = "test" if row >= 100 else "train"
        lines.append(f"{row}.png,{'; '.join(names)},w{row // 2},{part}")
    (folder / "table.csv").write_text("\n".join(lines))
    return folder / "table.csv"


@pytest.fixture(scope="module")
def run(table, tmp_path_factory):
    folder = tmp_path_factory.mktemp("search") / "run"
    command = ["search", table, "--label-column", "bits", "--label-delimiter", ";", "-b", ONE]
    command += ["--trials", 2, "--epochs", 2, "--group-column", "writer"]
    return search_twice(folder, command, {"--task", "--label-delimiter"})


def test_a_search_learns_labels_and_tests_them(run):
    with (run.folder / "test_predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 30
    classes = run.classes
    labels = np.array([[c in row["label"].split(" + ") for c in classes] for row in rows])
    named = np.array([[c in row["predicted"].split(" + ") for c in classes] for row in rows])
    p = np.array([[float(row[f"p_{c}"]) for c in classes] for row in rows])
    about = json.loads((run.folder / "model" / "provenance.json").read_text())
    thresholds = about["task"]["thresholds"]
    assert (named == (p >= thresholds)).all()
    assert run.test == pytest.approx(measure_labels(labels.astype(int), p, thresholds), abs=1e-5)
    assert run.test["map"] > 0.7
    assert list(run.intervals) == ["map", "macro_f1", "log_loss"]
    best = run.best
    trial = run.trials[best["trial"]]
    told = [e["thresholds"] for e in trial["epochs"] if "thresholds" in e]
    assert told == [thresholds]  # those of the trial, whose validation images it had not seen
    assert about["search"]["images"] == "train and val"
    assert [r["label"] for r in best["labels"]] == list(classes)
    assert [r["threshold"] for r in best["labels"]] == thresholds
    assert np.mean([r["f1"] for r in best["labels"]]) == pytest.approx(run.test["macro_f1"])
    assert [r["images"] for r in best["labels"]] == labels.sum(axis=0).tolist()
    assert (run.summary["task"], run.summary["metric"]) == ("multilabel", "map")
    assert "mAP 0." in str(run)
    assert "accuracy" not in str(run) + repr(run)
    hardest = json.loads((run.folder / "hardest" / "hardest.json").read_text())
    losses = -np.log(np.where(labels, p, 1 - p)).mean(axis=1)
    assert hardest[0]["loss"] == pytest.approx(losses.max(), rel=1e-3)


def test_the_page_speaks_of_labels(run, tmp_path):
    page = (run.folder / "report.html").read_text("utf-8")
    text = re.sub(r"<script.*?</script>|<style.*?</style>|<[^>]*>", " ", page, flags=re.S)
    text = text[: text.index("Environment")]
    text = re.sub(r"The forecast was fitted to classification only.*?alone\.", "", text)
    for word in ("accuracy", "correct", "onfusion", "alibration error", "class", "Class"):
        assert word not in text, word
    assert "with a mean average precision of 0." in text
    for record in run.best["labels"]:
        assert f"{record['threshold']:.3f}" in text
    names = {path.name for path in save_plots(run.folder, tmp_path)}
    assert not {"predictions.png", "confusion.png"} & names


@pytest.mark.filterwarnings("default:1 of 4 images cannot be read")
def test_new_images_get_labels(run, table, tmp_path, capsys):
    images = [table.parent / f"{k}.png" for k in range(3)]
    (tmp_path / "x.png").write_bytes(b"no image")
    out, lines = tmp_path / "p.csv", tmp_path / "p.jsonl"
    command = ["predict", run.folder, *images, tmp_path / "x.png", "--csv", out, "--jsonl", lines]
    assert call(*command, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert [json.loads(line) for line in lines.read_text().splitlines()] == told
    thresholds = [r["threshold"] for r in run.best["labels"]]
    p, classes = run.predict(images), run.classes
    for record, q in zip(told, p, strict=False):
        assert list(record["probabilities"].values()) == pytest.approx(q.tolist())
        named = [c for c, x, t in zip(classes, q, thresholds, strict=True) if x >= t]
        assert record["predicted"] == named
    assert "cannot be read" in told[3]["error"]
    with out.open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["item", *classes, *(f"p_{c}" for c in classes)]
    assert [c for c, one in zip(classes, rows[1][1:5], strict=True) if one == "1"] == (
        told[0]["predicted"]
    )
    assert [float(x) for x in rows[1][5:]] == pytest.approx(p[0].tolist(), rel=1e-5)
    assert rows[4][1:] == [""] * 8
    assert call("predict", run.folder, *images) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].endswith(
        ", ".join(f"{c} {told[0]['probabilities'][c]:.3f}" for c in told[0]["predicted"])
        or "no label"
    )


def test_labels_leave_as_onnx(run, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    found = export_onnx(run, tmp_path / "export")
    assert found.images == "test images"
    assert found.value == pytest.approx(run.test["map"], abs=1e-6)
    assert found.max_difference < 1e-4
    assert "its probabilities differ" in str(found)
    assert "mAP 0." in str(found)
    session = onnxruntime.InferenceSession(found.folder / "model.onnx")
    assert {o.name: o.shape[1:] for o in session.get_outputs()} == {
        "logits": [4],
        "probabilities": [4],
    }
    about = json.loads((found.folder / "preprocessing.json").read_text())
    assert about["thresholds"] == [r["threshold"] for r in run.best["labels"]]
    card = (found.folder / "README.md").read_text("utf-8")
    assert "4 labels, of which an image may have several: bit 1" in card
    assert "normalisation and\nsigmoid are in the graph" in card
    for r in run.best["labels"]:
        assert f"| {r['label']} | {r['images']} | {r['average_precision']:.4f} |" in card
    with pytest.raises(ValueError, match="must have labels for multilabel"):
        export_onnx(run, images=open_dataset("digits", samples=20))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "accuracy"}, "`metric` must be one of .*map.* for multilabel"),
        ({"objective": "accuracy"}, "`objective` must be one of .*map,latency"),
        ({"loss": "mse"}, "`loss` must be one of .*binary_cross_entropy.* for multilabel"),
        ({"space": {"mixup": [0.0, 0.2]}}, "`mixup` must be 0.0 for multilabel"),
        ({"test": open_dataset("digits", samples=20)}, "`task` must be 'classification'"),
        ({"task": "regression", "label_delimiter": ";"}, "`label_delimiter` is for several"),
        ({"label_delimiter": ";"}, "`label_delimiter` cannot be used with 'digits'"),
    ],
)
def test_what_has_no_meaning_is_refused_at_once(options, message, tmp_path):
    options = {"task": "multilabel", "cache": False, "out": tmp_path / "run"} | options
    with pytest.raises((ValueError, DatasetError), match=message):
        search("digits", ONE, **options)
    assert not (tmp_path / "run" / "search.json").exists()


def test_an_interval_is_of_the_labels_of_its_value():
    """A label of two images is lost in one resample of eight: without it the mean leaps up."""
    rng = np.random.default_rng(0)
    y = (rng.random((60, 4)) < 0.4).astype(int)
    y[:, 3] = np.arange(60) < 2
    p = np.where(y == 1, 0.9, 0.1)
    p[:, 3] = np.arange(60) / 60  # the two are found last
    value, draws = measure_labels(y, p, [0.5] * 4), resample_labels(y, p, [0.5] * 4)
    assert value["map"] < 0.8
    for name in ("map", "macro_f1"):
        low, high = np.quantile(draws[name], (0.025, 0.975))
        assert low <= value[name] <= high < 0.9
        assert len(draws[name]) == len(draws["log_loss"])
