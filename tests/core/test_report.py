"""The report of real searches: its words, its markup, and what a browser makes of it."""

from __future__ import annotations

import base64
import copy
import csv
import fcntl
import hashlib
import io
import itertools
import json
import os
import re
import select
import shlex
import shutil
import time
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from sklearn.linear_model import SGDClassifier

import sfda_tune
from sfda_tune.cli import main as cli
from sfda_tune.cli.options import spread_lists
from sfda_tune.data.opening import open_dataset
from sfda_tune.finetuning.calibration import calibrate_on_test
from sfda_tune.report import html as report
from sfda_tune.report.axes import Axis
from sfda_tune.report.commands import find_next, repeat
from sfda_tune.report.html import COLOURS, THEMES, render, save_plots, write_report
from sfda_tune.report.run import Run, read_run
from sfda_tune.selection.forecast import find_evidence
from sfda_tune.values.features import Backbone, Score
from sfda_tune.values.ranking import Ranking

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = "<script>alert('1')</script>\"&amp; 犬"
TURNING = "\u202egnp\x9b1m\x1b[31m"
NAMES = ["demo:convnext_glyphs", "demo:resnet_glyphs", "demo:regnet_shapes"]


# Real runs ---------------------------------------------------------------------------------------
def write_json(path, data):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(data, default=float), encoding="utf-8")


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A search without a tuner: heads on frozen features of the digits, epoch by epoch.

    As `sfda-tune search` writes it; one trial is stopped early, one fails (a learning rate of 0).
    """
    folder = tmp_path_factory.mktemp("searches") / "RUN"
    started = time.time()
    images = open_dataset("digits", samples=450)
    train, val, test = (np.arange(k, len(images), 3) for k in range(3))
    ranking = sfda_tune.rank(images.subset(train), NAMES, cache=False)
    features = {
        e.backbone.name: np.asarray(e.features.x)
        for e in sfda_tune.extract(images, sfda_tune.resolve_backbones(NAMES))
    }
    y, classes = images.labels, np.array(images.classes)
    trials, heads, begun = [], {}, time.time()
    plans = [*itertools.product(NAMES, (0.1, 1e-3, 1e-5)), (NAMES[0], 0.0)]
    for number, (name, rate) in enumerate(plans):
        trial = {"number": number, "backbone": name, "params": {"rate": rate}, "state": "complete",
                 "value": None, "values": None, "started": time.time(), "worker": "w0",
                 "error": None, "epochs": []}  # fmt: skip
        head = SGDClassifier("log_loss", learning_rate="constant", eta0=rate, random_state=number)
        try:
            for epoch in range(1, 6):
                head.partial_fit(features[name][train], y[train], np.arange(10))
                value = head.score(features[name][val], y[val])
                trial["epochs"].append({"number": epoch, "value": value, "train_loss": None,
                                        "seconds": 0.01})  # fmt: skip
                trial["value"] = value
                if epoch == 3 and value < 0.6:
                    trial["state"] = "pruned"
                    break
            heads[number] = head
        except ValueError as error:
            trial |= {"state": "failed", "error": " ".join(str(error).split())}
        trials.append(trial | {"seconds": time.time() - trial["started"]})
    best = max((t for t in trials if t["state"] == "complete"), key=lambda t: t["value"])
    x = features[best["backbone"]][test].astype(float)
    p = heads[best["number"]].predict_proba(x)
    predicted = p.argmax(axis=1)
    (folder / "hardest").mkdir(parents=True)
    ranking.to_json(folder / "ranking.json")
    with (folder / "test_predictions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["item", "label", "predicted", "confidence", *(f"p_{c}" for c in classes)])
        for i, row in enumerate(test):
            values = (images.item_name(row), classes[y[row]], classes[predicted[i]])
            writer.writerow([*values, p[i].max(), *p[i]])
    hardest = []
    for k, i in enumerate(np.argsort(p[np.arange(len(test)), y[test]])[:12]):
        images.load(test[i]).save(folder / "hardest" / f"{k:02d}.png")
        hardest.append({"file": f"{k:02d}.png", "item": images.item_name(test[i]),
                        "label": classes[y[test[i]]], "predicted": classes[predicted[i]],
                        "p_label": p[i, y[test[i]]]})  # fmt: skip
    write_json(folder / "hardest" / "hardest.json", hardest)
    config = {"format": 1, "dataset": "digits", "backbones": NAMES, "trials": 10, "seed": 0,
              "storage": "postgresql://me:secret@db/studies", "quiet": True, "keep": None,
              "sfda_tune": sfda_tune.__version__}  # fmt: skip
    write_json(folder / "config.json", config)
    write_json(
        folder / "environment.json",
        {"format": 1, "python": "3", "versions": {"numpy": np.__version__}},
    )
    write_json(folder / "search.json", {
        "format": 1, "status": "done", "dataset": "digits", "classes": classes.tolist(),
        "n_images": {"train": len(train), "val": len(val), "test": len(test)},
        "stages": [{"name": "rank", "started": started, "seconds": begun - started, "note": "3"},
                   {"name": "tune", "started": begun, "seconds": time.time() - begun, "note": ""}],
        "candidates": NAMES, "excluded": {"vit_giant": "1.8 G parameters > 10 M"},
        "survivors": NAMES, "separable": False, "decision": "All were kept: heads decide.",
        "objectives": ["accuracy"], "metric": "accuracy", "engine": "loop", "storage": "",
        "trials": trials, "front": [], "costs": {},
        "best": {"trial": best["number"], "backbone": best["backbone"], "params": best["params"],
                 "val": {"accuracy": best["value"]}, "latency_ms": 0.8, "n_params": 164160,
                 "calibration": calibrate_on_test(y[test], p, 0.8, len(val)),
                 "test": {"accuracy": float((predicted == y[test]).mean())}},
        "seconds": {"total": time.time() - started, "train_everything_estimate": 400.0},
    })  # fmt: skip
    return folder


@pytest.fixture
def folder(searched, tmp_path):
    """A copy of the search, to be spoilt."""
    return Path(shutil.copytree(searched, tmp_path / "RUN"))


def rewrite_predictions(folder, change):
    path = folder / "test_predictions.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = [change(i, row) for i, row in enumerate(csv.DictReader(file))]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["item", "label", "predicted"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return rows


# Markup ------------------------------------------------------------------------------------------
class Page(HTMLParser):
    """What a parser sees: elements, text, and whether every element is closed where it should."""

    VOID = ("meta", "img", "br", "circle", "path", "line", "use", "rect", "input")

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.texts, self.scripts = [], [], [], []
        self.feed(text.replace("<wbr>", ""))  # no text: only where a line may end
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.scripts if self.open[-1:] in (["script"], ["style"]) else self.texts).append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def all(self, *tags):
        return [attributes for tag, attributes in self.elements if tag in tags]


def check(text):
    """Assert what must hold of every report; return the page."""
    page = Page(text)
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for tag, a in page.elements:
        for key, value in a.items():
            assert not key.startswith("on"), (tag, a)
            assert key != "style"
            if key in ("src", "href", "xlink:href", "data", "action", "srcset"):
                assert value.startswith("data:image/jpeg;base64,") or value[1:] in ids, value
            if key in ("aria-labelledby", "aria-describedby"):
                assert set(value.split()) <= set(ids)
    assert all(a["alt"] for a in page.all("img"))
    assert all({"aria-label", "aria-labelledby", "aria-hidden"} & set(a) for a in page.all("svg"))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    assert len(page.all("script")) == len(page.all("style")) == 1
    assert page.all("html")[0]["lang"] == "en"
    assert "url(http" not in text
    assert "@import" not in text
    (policy,) = [a["content"] for a in page.all("meta") if "http-equiv" in a]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    for source in page.scripts:
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    return page


def test_a_search_is_told_in_words(searched, tmp_path):
    path = write_report(searched, tmp_path / "r.html")
    page = check(path.read_text(encoding="utf-8"))
    with (searched / "test_predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    k, n, z = sum(r["label"] == r["predicted"] for r in rows), len(rows), 1.959963985
    p = k / n  # Wilson, from his formula
    centre, half = p + z**2 / 2 / n, z * (p * (1 - p) / n + z**2 / 4 / n**2) ** 0.5
    low, high = ((centre + sign * half) / (1 + z**2 / n) for sign in (-1, 1))
    search = json.loads((searched / "search.json").read_text())
    best = search["best"]
    text = page.text
    assert f"{best['backbone']} , fine-tuned in trial {best['trial']}, names {p:.1%}"[:-1] in text
    assert f"95 % interval {low:.1%}"[:-1] in text
    assert f"{high:.1%}"[:-1] + " %" in text
    failed = next(t for t in search["trials"] if t["state"] == "failed")
    assert f"Trial {failed['number']}, {failed['backbone']}, failed: {failed['error']}" in text
    assert "Note: All were kept: heads decide." in text
    assert "vit_giant was excluded: 1.8 G parameters > 10 M." in text
    share = 100 * (1 - search["seconds"]["total"] / 400)
    assert f"about 6 min 40 s (an estimate from measured speed): {share:.1f} % saved" in text
    assert (
        "sfda-tune search digits --backbones demo:convnext_glyphs demo:resnet_glyphs "
        "demo:regnet_shapes --trials 10 --seed 0 --storage postgresql://me:***@db/studies "
        "--quiet" in text
    )
    assert "secret" not in path.read_text()
    assert len(page.all("img")) == 12
    bars = [a["class"] for a in page.all("rect") if a.get("class", "").startswith("bar")]
    states = Counter(t["state"] for t in search["trials"])
    for state, count in states.items():  # one more in the legend, two that compare the seconds
        more = 1 + (state in ("complete", "pruned"))
        assert bars.count(f"bar {state}") == count + more
    assert render(read_run(searched)) == render(read_run(searched))


def test_a_ranking_alone_leaves_out_the_search(searched, tmp_path):
    target = shutil.copy(searched / "ranking.json", tmp_path / "mine.json")
    path = write_report(target)
    assert path == tmp_path / "mine.html"
    page = check(path.read_text(encoding="utf-8"))
    assert {"search", "test"}.isdisjoint(a.get("id") for a in page.all("h2"))
    ranking = Ranking.from_json(target)
    first = next(iter(ranking))
    assert f"Fine-tune {first} first: of these 3 it will be the best with probability" in page.text
    assert "sfda-tune rank digits --backbones demo:" in page.text
    assert "Only from Python, which gave its dataset:" in page.text
    earlier = {k: v for k, v in ranking.info.items() if k != "arguments"}
    Ranking(ranking.scores, ranking.metric, ranking.labels, earlier).to_json(target)
    page = check(write_report(target).read_text(encoding="utf-8"))
    assert "--seed 0 --metric forecast --train full" in page.text
    table = page.text.partition("All scored backbones")[2]
    places = [
        table.index(
            f"{r['rank']} {r['backbone']} {r['forecast']:+.2f} {r['interval_low']:+.2f} to"
        )
        for r in ranking.records()
    ]
    assert places == sorted(places)
    scored = find_evidence(ranking)
    scored.to_json(target)
    page, first = check(write_report(target).read_text(encoding="utf-8")), next(iter(scored))
    assert f"By sfda (loo), before any training, {first} is the best of these 3:" in page.text
    assert "--metric sfda --variant loo" in page.text


def test_names_are_text_whatever_they_are(folder):
    ranking = Ranking.from_json(folder / "ranking.json")
    scores = [replace(s, backbone=HOSTILE + s.backbone) for s in ranking.scores]
    scores.append(Score(HOSTILE, error=HOSTILE))
    info = dict(ranking.info) | {"dataset": HOSTILE, "unreadable": {HOSTILE: HOSTILE}}
    Ranking(scores, HOSTILE, ranking.labels, info).to_json(folder / "ranking.json")
    search = json.loads((folder / "search.json").read_text(encoding="utf-8"))
    for trial in search["trials"]:
        trial |= {"backbone": HOSTILE + trial["backbone"], "params": {HOSTILE: HOSTILE}}
        trial["error"] = trial["error"] and HOSTILE
    search["best"]["backbone"] = "\ud800" + HOSTILE  # as of a file name that is not UTF-8
    search |= {"classes": [HOSTILE + c for c in search["classes"]], "dataset": HOSTILE}
    search |= {"decision": HOSTILE, "excluded": {HOSTILE: HOSTILE}, "metric": HOSTILE}
    write_json(folder / "search.json", search)
    rewrite_predictions(folder, lambda i, r: {k: HOSTILE + v for k, v in r.items()})
    hardest = [{"file": "&<b>.png", "item": HOSTILE, "label": HOSTILE}]
    shutil.move(folder / "hardest" / "00.png", folder / "hardest" / "&<b>.png")
    write_json(folder / "hardest" / "hardest.json", hardest)
    for name in ("config", "environment"):
        write_json(folder / f"{name}.json", {"dataset": HOSTILE, "note": HOSTILE})
    page = check(write_report(folder).read_text(encoding="utf-8"))
    assert len(page.all("img")) == 1
    assert page.all("b") == []
    assert page.text.count("<script>alert('1')</script>") > 50


def test_no_name_turns_the_text_around_it(folder):
    ranking = Ranking.from_json(folder / "ranking.json")
    scores = [replace(s, backbone=TURNING + s.backbone) for s in ranking.scores]
    Ranking(scores, TURNING, ranking.labels, ranking.info).to_json(folder / "ranking.json")
    search = json.loads((folder / "search.json").read_text(encoding="utf-8"))
    search |= {"dataset": TURNING, "classes": [TURNING + c for c in search["classes"]]}
    search["best"]["backbone"] = search["decision"] = TURNING
    write_json(folder / "search.json", search)
    rewrite_predictions(folder, lambda i, r: {k: TURNING + v for k, v in r.items()})
    page = write_report(folder).read_text(encoding="utf-8")
    assert not set("\u202e\x9b\x1b") & set(page)
    assert page.count(r"\u202egnp\x9b1m\x1b[31m") > 20
    assert "Images: trained on" in page


# Odd runs ----------------------------------------------------------------------------------------
def no_ranking(folder, search):
    (folder / "ranking.json").unlink()
    search |= {"trials": [], "best": None, "status": "ranking", "decision": None}
    return "There is no winner yet.", "the search ended before the backbones were ranked"


def no_test(folder, search):
    (folder / "test_predictions.csv").unlink()
    search["best"]["test"], search["status"] = None, "budget spent"
    return "is the best on the validation images", "No test images were predicted"


def interrupted(folder, search):
    search["trials"] = search["trials"][:2]
    search["trials"][1] |= {"state": "running", "value": None, "seconds": None}
    search |= {"status": "interrupted", "seconds": {"total": 2.0}}
    (folder / "config.json").unlink()
    return "The search is not done (state: interrupted)", "running", "The best so far"


def all_failed(folder, search):
    scores = [Score(name, error="OSError: no weights") for name in NAMES]
    Ranking(scores, "sfda (loo)").to_json(folder / "ranking.json")
    search |= {"trials": [], "best": None}
    return "There is no winner yet: no backbone could be scored", "OSError: no weights"


def one_backbone(folder, search):
    ranking = Ranking.from_json(folder / "ranking.json")
    scores = ranking.scores[:1]
    Ranking(scores, ranking.metric, ranking.labels, ranking.info).to_json(folder / "ranking.json")
    search |= {"trials": [], "best": None, "costs": {}, "stages": [], "seconds": {}}
    return f"{scores[0].backbone} has the best forecast", "No trial has given a value yet"


def without_contributions(folder, search):
    Ranking([Score("a", 0.5), Score("b", 0.5)], "my score").to_json(folder / "ranking.json")
    search["costs"] = {"a": {"latency_ms": 2.0, "n_params": 5e6}, "b": {"latency_ms": None}}
    return (
        "How certain the order is cannot be told", "2 backbones have the score 0.5 exactly",
        "a: 0.5000, 2 milliseconds per image", "a: 0.5000, 5M parameters",
    )  # fmt: skip


def an_empty_class(folder, search):
    rewrite_predictions(folder, lambda i, r: r | {"label": "1"} if r["label"] == "0" else r)
    return ("Classes without a test image: 0",)


def many_classes(folder, search):
    def change(i, row):  # of 120 classes every fifth image is taken for one of the next
        return row | {"label": f"c{i % 120}", "predicted": f"c{(i + (i % 5 == 0)) % 120}"}

    assert len(rewrite_predictions(folder, change)) > 120
    search["classes"] = [f"c{i}" for i in range(120)]
    return ("label predicted images share of the label c0 c1 2 100.0 %",)


def log_loss(folder, search):
    for trial in search["trials"]:
        trial["value"] = trial["value"] and 1 - trial["value"]
    search["metric"] = "log_loss"
    return "Log-loss over time", "best log-loss", "): the scores helped."


def one_backbone_tried(folder, search):
    search["trials"] = [t for t in search["trials"] if t["backbone"] == NAMES[0]]
    return ("of backbones: 1): so few backbones cannot tell whether the scores helped.",)


def two_objectives(folder, search):
    for trial in search["trials"]:
        trial["values"] = trial["value"] and [trial["value"], 1.5]
    search |= {"objectives": ["accuracy", "latency"], "front": [search["best"]["trial"]]}
    return f"{search['best']['trial']} (front)", "accuracy latency seconds settings", " 1.5 "


ODD = [no_ranking, no_test, interrupted, all_failed, one_backbone, without_contributions,
       an_empty_class, many_classes, log_loss, one_backbone_tried, two_objectives]  # fmt: skip


@pytest.mark.parametrize("spoil", ODD)
def test_odd_runs(folder, spoil):
    search = json.loads((folder / "search.json").read_text(encoding="utf-8"))
    sentences = spoil(folder, search)
    write_json(folder / "search.json", search)
    page = check(write_report(folder).read_text(encoding="utf-8"))
    for sentence in sentences:
        assert sentence in page.text
    assert ("not done" in page.text) == (spoil in (no_ranking, interrupted))
    assert ("matrix" in page.text) == (spoil not in (no_test, many_classes))
    if spoil in (no_ranking, many_classes):
        save_plots(folder, folder / "plots")


@pytest.mark.parametrize(
    "name", ["search.json", "ranking.json", "config.json", "hardest/hardest.json"]
)
@pytest.mark.parametrize("content", ['{"format": 1, "tri', '"text"', '{"format": 2}', "\xff"])
def test_a_broken_file_is_named(folder, name, content):
    (folder / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=re.escape(str(folder / name))):
        write_report(folder)


def test_no_network_is_slower_in_batches_than_by_the_image(folder):
    ranking = Ranking.from_json(folder / "ranking.json")
    search = json.loads((folder / "search.json").read_text(encoding="utf-8"))
    best, other, *_ = sorted(ranking, key=lambda name: name != search["best"]["backbone"])
    scores = [
        replace(s, details={**s.details, "images_per_second": 100.0, "batch": 16})
        for s in ranking.scores
    ]
    Ranking(scores, ranking.metric, ranking.labels, ranking.info).to_json(folder / "ranking.json")
    search["costs"] = {other: {"latency_ms": 20.0}}
    (folder / "search.json").write_text(json.dumps(search), encoding="utf-8")
    page = write_report(folder).read_text(encoding="utf-8")
    found = re.findall(r'data-speed="([\d.]+)"[^>]*><td[^>]*>\d+</td>(.*?)</td>', page)
    shown = {_plain(cell): float(speed) for speed, cell in found}
    assert (shown[best], shown[other]) == (1250, 100)
    assert "in batches of 16 images" in _plain(page)
    assert "one image at a time, the fastest of several" in _plain(page)


def _plain(markup):
    return re.sub(r"<[^>]*>", "", markup)


def test_what_is_no_run_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="is a folder without either"):
        write_report(tmp_path)
    search = json.loads((folder / "search.json").read_text(encoding="utf-8"))
    for wrong in (3, {"number": 0}, search["trials"][0] | {"state": "odd"},
                  search["trials"][0] | {"value": "x"}):  # fmt: skip
        write_json(folder / "search.json", search | {"trials": [*search["trials"], wrong]})
        with pytest.raises(ValueError, match=r"search\.json: `trials\[10\](\.\w+)?` must"):
            write_report(folder)
    write_json(folder / "search.json", search)
    (folder / "test_predictions.csv").write_text("item,predicted\na,b\n")
    with pytest.raises(ValueError, match=r"test_predictions\.csv: must be CSV with"):
        write_report(folder)


STRANGE = [None, True, -1, 10**25, "x", [], ["a", None], {}, {"a": {"b": []}}, [[[]]]]


def _places(value, at=()):
    """Paths to all that a JSON value holds; of a list, to its first two."""
    yield at
    inner = value.items() if isinstance(value, dict) else ()
    inner = enumerate(value[:2]) if isinstance(value, list) else inner
    for key, item in inner:
        yield from _places(item, (*at, key))


@pytest.mark.parametrize("file", ["ranking.json", "search.json", "config.json"])
def test_values_of_other_types_are_one_clear_line(folder, file):
    """Whatever stands in one of the files, the report is written or says what is wrong."""
    whole = json.loads((folder / file).read_text(encoding="utf-8"))
    places = list(_places(whole))
    rng = np.random.default_rng(0)
    for i in rng.choice(len(places), 25):
        changed = copy.deepcopy({"": whole})
        inner: Any = changed
        *way, last = ("", *places[i])
        for key in way:
            inner = inner[key]
        inner[last] = STRANGE[rng.integers(len(STRANGE))]
        write_json(folder / file, changed[""])
        problem = ""
        try:
            render(read_run(folder))
        except ValueError as error:
            problem = f"{file}: {error}"
        assert problem.count(file) != 1  # a message names the file
        assert "\n" not in problem


def test_only_images_of_the_folder_are_shown(folder):
    hardest = json.loads((folder / "hardest" / "hardest.json").read_text())
    (folder / "hardest" / "00.png").write_text("no image")
    Image.new("RGB", (900, 10)).save(folder / "hardest" / "01.png")
    Image.new("RGB", (9, 9)).save(folder / "outside.png")
    hardest[2]["file"] = "../outside.png"
    hardest[3] = "nothing"
    write_json(folder / "hardest" / "hardest.json", hardest)
    run = read_run(folder)
    assert len(run.hardest) == 9
    with Image.open(io.BytesIO(base64.b64decode(run.hardest[0]["data"]))) as image:
        assert image.width == 160
    assert "Not all thumbnails of hard images could be read." in check(render(run)).text


# Scales and colours ------------------------------------------------------------------------------
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        [0.91, 0.92],
        [1.0],
        [5e6, 3e9],
        [1e-3, 2e-3, 7e5],
        [0.5, 0.5],
        [86e6, 87e6],
        [347, 2580],
        [],
    ],
)
def test_every_axis_has_a_few_round_ticks_inside(values, log):
    axis = Axis.over(values, log)
    places = [place for place, _ in axis.ticks]
    assert 2 <= len(places) <= 12
    assert places == sorted(places)
    assert all(0 <= axis.at(v) <= 100 for v in values)
    assert all(0 <= place <= 100 for place in places)
    assert len({label for _, label in axis.ticks}) == len(places)


def luminance(rgb):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(a, b):
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", THEMES)
def test_contrast(theme):
    colours = {
        name: np.array([int(text[k : k + 2], 16) / 255 for k in (1, 3, 5)])
        for name, text in zip(COLOURS, THEMES[theme].split(), strict=True)
    }
    for ground in ("page", "card"):
        for text in ("ink", "muted", "link"):
            assert contrast(colours[text], colours[ground]) >= 4.5
    for mark in COLOURS[5:]:
        assert contrast(colours[mark], colours["page"]) >= 3.0
    for mark, level in itertools.product(("complete", "failed"), range(1, 10)):
        share = (8 + 4 * level) / 100  # as in report.css
        shade = share * colours[mark] + (1 - share) * colours["page"]
        assert contrast(colours["ink"], shade) >= 4.5
    assert "{{ 8 + 4 * level }}%" in (Path(report.__file__).parent / "report.css").read_text()


# Browser -----------------------------------------------------------------------------------------
class Browser:
    """Headless Chromium, spoken to over its DevTools pipe."""

    def __init__(self, profile):
        here, theirs = os.pipe(), os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 100) for end in (here[0], theirs[1])]
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu",
                   "--disable-dev-shm-usage", "--remote-debugging-pipe",
                   f"--user-data-dir={profile}", "about:blank"]  # fmt: skip
        actions = [(os.POSIX_SPAWN_DUP2, ends[0], 3), (os.POSIX_SPAWN_DUP2, ends[1], 4),
                   (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)]  # fmt: skip
        self.pid = os.posix_spawn(CHROMIUM, command, os.environ, file_actions=actions)
        for end in (*ends, here[0], theirs[1]):
            os.close(end)
        self.input, self.output, self.rest, self.count = here[1], theirs[0], b"", 0
        self.session, self.events = None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def read(self):
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.output], [], [], 60)
            assert ready, "Chromium said nothing for a minute"
            block = os.read(self.output, 1 << 20)
            assert block, "Chromium ended"
            self.rest += block
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def call(self, method, **params):
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.input, json.dumps(message).encode() + b"\0")
        while (answer := self.read()).get("id") != self.count:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, path, width, scheme):
        self.events.clear()
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Page.navigate", url=path.as_uri())
        while not any(e["method"] == "Page.loadEventFired" for e in self.events):
            self.events.append(self.read())

    def ask(self, expression):
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key, code, text=""):
        about = {"key": key, "windowsVirtualKeyCode": code, "text": text}
        self.call("Input.dispatchKeyEvent", type="keyDown", **about)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def close(self):
        self.session = None
        self.call("Browser.close")
        os.waitpid(self.pid, 0)
        os.close(self.input)
        os.close(self.output)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.mark.parametrize(("width", "scheme"), [(1100, "light"), (1100, "dark"), (360, "light")])
def test_a_browser_shows_it(searched, tmp_path, browser, width, scheme):
    """Looked at by hand, too: `Page.captureScreenshot`."""
    path = write_report(searched, tmp_path / "report.html")
    if width == 360:  # names without a place to break
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("glyphs", "glyphs" * 12), encoding="utf-8")
    browser.open(path, width, scheme)
    complaints = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
    assert [e for e in browser.events if e["method"] in complaints] == []
    asked = [e["params"]["request"]["url"] for e in browser.events
             if e["method"] == "Network.requestWillBeSent"]  # fmt: skip
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
    browser.ask("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert browser.ask("document.documentElement.scrollWidth") <= width  # innerWidth would grow
    outside = (
        "[...document.querySelectorAll('main *')].filter((e) => !e.closest('.scroll')).filter("
        f"(e) => {{ const r = e.getBoundingClientRect(); return r.left < 0 || r.right > {width}; "
        "}).map((e) => e.outerHTML)"
    )
    assert browser.ask(outside) == []
    ground = THEMES[scheme].split()[0]
    rgb = ", ".join(str(int(ground[k : k + 2], 16)) for k in (1, 3, 5))
    assert browser.ask("getComputedStyle(document.body).backgroundColor") == f"rgb({rgb})"
    fill = "getComputedStyle(document.querySelector('.mark.complete')).fill"
    assert browser.ask(fill) != "rgb(0, 0, 0)"


def test_by_keyboard(searched, tmp_path, browser):
    browser.open(write_report(searched, tmp_path / "report.html"), 1100, "light")
    browser.press("Tab", 9)
    assert browser.ask("document.activeElement.className") == "skip"
    assert browser.ask("document.activeElement.getBoundingClientRect().left >= 0")
    seen = set()
    for _ in range(120):
        browser.press("Tab", 9)
        seen.add(browser.ask("document.activeElement.tagName + document.activeElement.className"))
    assert {"A", "BUTTON", "SUMMARY", "DIVscroll"} <= seen
    rows = "[...document.querySelectorAll('table.sortable tbody')[0].rows]"
    column = f"{rows}.map((row) => row.cells[1].textContent)"
    ranked = browser.ask(column)
    browser.ask("document.querySelectorAll('table.sortable th button')[2].focus()")
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    browser.press("Enter", 13, "\r")
    assert browser.ask(column) == ranked[::-1]
    assert browser.ask("document.activeElement.parentElement.ariaSort") == "ascending"
    assert browser.ask(outline) == "solid"
    browser.press("Enter", 13, "\r")
    assert browser.ask(column) == ranked


def test_no_temperature_is_advised_that_makes_it_worse(searched, tmp_path):
    folder = shutil.copytree(searched, tmp_path / "run")
    state = json.loads((folder / "search.json").read_text("utf-8"))
    c = state["best"]["calibration"]
    c |= {"temperature": 0.05, "log_loss_before": 0.04, "log_loss_after": 0.33}
    (folder / "search.json").write_text(json.dumps(state))
    text = check(write_report(folder).read_text("utf-8")).text
    assert "the temperature makes the log-loss worse: take the probabilities as they are" in text
    assert "divide its logits" not in text


def test_what_was_not_looked_at_is_no_failure(tmp_path):
    scores = [Score(name, error="not looked at: interrupted") for name in ("a", "b")]
    for info, said in (({"not_looked_at": ["a", "b"]}, "was looked at"), ({}, "could be scored")):
        Ranking(scores, "knn", info=info).to_json(tmp_path / "r.json")
        text = check(write_report(tmp_path / "r.json").read_text("utf-8")).text
        assert f"There is no winner yet: no backbone {said}." in text
        assert ("Backbones that failed" in text) is (not info)
        assert ("could not be scored" in text) is (not info)


def test_only_names_are_broken_and_commands_between_words(searched, ranked, tmp_path):
    page = write_report(ranked[1], tmp_path / "r.html").read_text("utf-8")
    assert "demo:<wbr>resnet" in page
    assert not re.search(r"\d\.<wbr>\d", page)
    command = re.findall(r"<code>(.*?)</code>", page)[-1]
    assert "<span>--<wbr>backbones</span> <span>" in command


# Of a ranking ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    """The ranking of a folder of digits, some of which lie in the wrong folder, and its file."""
    digits, root = open_dataset("digits", samples=300), tmp_path_factory.mktemp("ranked")
    for i in range(len(digits)):
        label = (digits.labels[i] + 3 * (i % 60 == 7)) % 10
        (folder := root / "my photos" / f"digit <b>{label}").mkdir(parents=True, exist_ok=True)
        digits.load(i).save(folder / f"{i}.png")
    ranking = sfda_tune.rank(root / "my photos", ["demo:res*", "demo:vit*"], cache=False)
    ranking.to_json(root / "ranking.json")
    return ranking, root / "ranking.json"


def test_a_ranking_shows_its_classes_and_hardest_images(ranked, tmp_path):
    ranking, path = ranked
    page = check(write_report(path, tmp_path / "r.html").read_text(encoding="utf-8"))
    titles = {a.get("id") for a in page.all("h2")}
    assert {"winner", "ranking", "tradeoffs", "classes", "images", "again"} <= titles
    assert len(page.all("img")) == 12
    assert page.all("b") == []
    doubtful = sum(h["doubtful"] for h in ranking.info["hard_images"])
    assert 3 <= doubtful <= 8
    assert f"Of {doubtful} images ({doubtful / 3:.1f}" in page.text
    assert "taken for digit <b>" in page.text
    captions = [a["alt"] for a in page.all("img")]
    assert all(re.fullmatch(r"Image digit <b>\d/\d+\.png, labelled .*", c) for c in captions)
    for name, value in ranking.items():
        assert f"{value:+.2f}" in page.text
        assert name in page.text
    assert page.text.count(" mit ") >= 4  # the licence of the demo backbones
    again = check(write_report(path, tmp_path / "r.html", images=False).read_text("utf-8"))
    assert again.all("img") == []
    assert "no pictures: they were not asked for, or the files are not here" in again.text


@pytest.mark.parametrize(("race", "said"), [(None, ""), (True, " --race"), (False, " --no-race")])
def test_a_ranking_is_repeated_with_its_race_or_without(race, said):
    options = {"samples": 100, "device": "cpu", "cache": False, "budget": 60}
    ranking = sfda_tune.rank("digits", "demo:resnet_*", race=race, **options)
    line, _ = repeat(Run(ranking))
    assert re.sub(" --device cpu", "", line) == (
        f"sfda-tune rank digits --backbones 'demo:resnet_*' --samples 100{said} --budget 60"
    )


def test_a_search_is_repeated_with_each_earlier_run_it_learned_from():
    config = {"dataset": "digits", "backbones": ["demo:*"], "previous": ["a b", "c"]}
    run = Run(Ranking([]), {"dataset": "digits", "candidates": []}, config=config)
    line, _ = repeat(run)
    assert shlex.split(line)[-4:] == ["--previous", "a b", "--previous", "c"]


def test_its_commands_run_as_they_stand(ranked, tmp_path, capsys):
    ranking, path = ranked
    line, lacking = repeat(read_run(path))
    assert lacking == ""
    with pytest.raises(SystemExit) as stop:
        cli.main([*shlex.split(line)[1:], "--no-cache", "-q", "-o", str(tmp_path / "again.json")])
    assert stop.value.code == 0
    capsys.readouterr()
    assert dict(Ranking.from_json(tmp_path / "again.json")) == dict(ranking)
    (_, line), *_ = find_next(read_run(path))
    with pytest.raises(SystemExit) as stop:
        cli.main([*shlex.split(line)[1:], "--help"])
    assert stop.value.code == 0
    command = typer.main.get_command(cli.app).commands["search"]
    words = shlex.split(line)[2:]
    assert command.make_context("search", spread_lists(words)).params["out"] == Path("run")
    given = {"dataset": "t.csv", "backbones": ["demo:*"], "group_column": "patient"}
    given |= {"split_column": "part", "label_column": "what", "samples": 50, "only_python": ["x"]}
    grouped = Ranking([Score("demo:vit_glyphs", 0.5)], "sfda (loo)", info={"arguments": given})
    assert find_next(Run(grouped)) == [(
        "Fine-tune the first three, and keep the best:",
        "sfda-tune search t.csv --backbones demo:vit_glyphs --label-column what --group-column "
        "patient --split-column part --out run",
    )]  # fmt: skip
    scores = [Score("demo:vit_glyphs", 0.5), Score("demo:resnet_glyphs", 0.4)]
    info = {"arguments": {"dataset": "t.csv"}, "not_looked_at": ["demo:vit_glyphs"]}
    assert (
        "--backbones demo:resnet_glyphs --out"
        in find_next(Run(Ranking(scores, "x", info=info)))[0][1]
    )
    given["only_python"] = ["groups"]
    assert "(add its groups, from Python)" in find_next(Run(grouped))[0][0]
    tied = Ranking([Score("demo:vit_glyphs", 0.5), Score("demo:resnet_glyphs", 0.5)], "sfda (loo)",
                   info={"arguments": {"dataset": "a b", "split": "val"}})  # fmt: skip
    tied.to_json(tmp_path / "tied.json")
    page = check(write_report(tmp_path / "tied.json").read_text(encoding="utf-8"))
    settles = "sfda-tune rank 'a b' --backbones demo:resnet_glyphs demo:vit_glyphs --split val "
    assert page.text.count("The command that settles it") == 1
    assert f"{settles}--metric knn" in page.text
    assert page.text.count("have the score 0.5 exactly") == 1


def demo_network():
    return torch.nn.Flatten(), lambda image: torch.from_numpy(
        np.asarray(image.resize((4, 4))) / 255
    )


def test_networks_from_python_are_in_no_command(tmp_path):
    candidates = sfda_tune.resolve_backbones("demo:resnet_*")
    ranking = sfda_tune.rank("digits", candidates, samples=60, cache=False)
    assert ranking.info["arguments"]["backbones"] == ["demo:resnet_glyphs", "demo:resnet_noise"]
    candidates[0] = Backbone("mine", load=demo_network)
    ranking = sfda_tune.rank("digits", candidates, samples=60, cache=False)
    assert ranking.info["arguments"]["only_python"] == ["backbones"]
    ranking.to_json(tmp_path / "r.json")
    text = check(write_report(tmp_path / "r.json").read_text("utf-8")).text
    assert "Only from Python, which gave its backbones:" in text
    assert "(add its backbones, from Python)" in text
    assert "Backbone(" not in text


def test_numbers_in_charts_do_not_overprint_on_a_phone(tmp_path, browser):
    names = [f"net{k:02d}" for k in range(40)]
    scores = [
        Score(name, 0.5 + k / 100, details={"n_params": 1000 * 1.1**k})
        for k, name in enumerate(names)
    ]
    Ranking(scores, "knn").to_json(tmp_path / "r.json")
    page = write_report(tmp_path / "r.json")
    shown = {}
    for width in (390, 1280):
        browser.open(page, width, "light")
        boxes = browser.ask(
            "[...document.querySelectorAll('.plot g text')].map((e) => e.getBoundingClientRect())"
            ".filter((r) => r.width).map((r) => [r.left, r.right, r.top, r.bottom])"
        )
        shown[width] = len(boxes)
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                apart = a[0] >= b[1] or b[0] >= a[1]
                assert apart or a[2] + 4 >= b[3] or b[2] + 4 >= a[3]  # without ascent and descent
    assert 0 < shown[390] < shown[1280]


def test_filters_copies_and_downloads(ranked, tmp_path, browser):
    ranking, path = ranked
    page = write_report(path, tmp_path / "r.html")
    browser.open(page, 1280, "light")
    sizes = sorted(ranking.score(name).details["n_params"] for name in ranking)
    most = f"{(sizes[1] + sizes[2]) / 2e6}"
    visible = (
        "[...document.querySelectorAll('#ranking ~ .scroll tbody tr')].filter((r) => !r.hidden)"
    )
    browser.ask(
        f"const f = document.querySelector('[data-key=params]'); f.value = {most}; "
        "f.dispatchEvent(new Event('input', { bubbles: true }))"
    )
    assert browser.ask(f"{visible}.length") == 2
    assert browser.ask("document.querySelector('output').textContent") == "2 of 4"
    lanes = "[...document.querySelectorAll('.lane[data-params]')].filter((r) => !r.hidden).length"
    assert browser.ask(lanes) == 2
    browser.ask(
        "const l = document.querySelector('select[data-key=license]'); l.value = 'mit'; "
        "f.value = ''; l.dispatchEvent(new Event('input', { bubbles: true }))"
    )
    assert browser.ask(f"{visible}.length") == 4
    browser.ask(  # what would be saved
        "const saved = [], texts = [];"
        "const anchor = HTMLAnchorElement.prototype;"
        "anchor.click = function () { saved.push([this.download, this.href]) };"
        "const keep = (text) => texts.push(text);"
        "URL.createObjectURL = (blob) => { blob.text().then(keep); return 'blob:' };"
        "const press = (kind) => document.querySelector(`[data-do=${kind}]`).click();"
        "['csv', 'json', 'png'].forEach(press)"
    )
    for _ in range(100):
        if browser.ask("saved.length") == 3 and browser.ask("texts.length") == 2:
            break
        time.sleep(0.1)
    assert browser.ask("saved.map((s) => s[0])")[:2] == ["ranking.csv", "ranking.json"]
    known = Ranking.from_json(path)
    assert browser.ask("texts[0]") == known.to_csv()
    assert json.loads(browser.ask("texts[1]"))["records"] == known.records()
    name, picture = browser.ask("saved[2]")
    assert name == "Forecast_against_images_per_second.png"
    with Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))) as image:
        colours = np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)
    assert image.width > 800
    green = [int(THEMES["light"].split()[9][k : k + 2], 16) for k in (1, 3, 5)]
    assert (colours == green).all(axis=1).any()  # the front, as on the page
    browser.ask("document.querySelector('[data-do=copy]').focus()")
    browser.press("Enter", 13, "\r")  # only what a person does may copy
    assert browser.ask("document.querySelector('[data-do=copy]').textContent") == "Copied"
    complaints = ("Log.entryAdded", "Runtime.exceptionThrown")
    assert [e for e in browser.events if e["method"] in complaints] == []
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    browser.open(page, 1280, "light")
    browser.call("Emulation.setScriptExecutionDisabled", value=False)
    shown = "[...document.querySelectorAll('.tools')].filter((e) => e.offsetHeight).length"
    assert browser.ask(shown) == 0  # nothing that does nothing


# Command line ------------------------------------------------------------------------------------
def test_command_line(folder, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", str(folder), "--plots", str(folder / "figures")])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.split()
    assert lines[0] == str(folder / "report.html")
    names = ("ranking", "images_per_second", "n_params", "trials", "calibration")
    names += ("reliability", "confusion")
    assert lines[1:] == [
        str(folder / "figures" / f"{n}.{s}") for n in names for s in ("png", "svg")
    ]
    for line in lines[1::2]:
        with Image.open(line) as image:
            assert image.size == (1280, 960)
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", str(folder / "none")])
    assert stop.value.code == 1
    assert "must be a ranking.json, or the folder of a search" in capsys.readouterr().err
