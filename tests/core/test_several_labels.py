"""Several labels per image, through every door."""

from __future__ import annotations

import json
import pickle
import re
import tarfile

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from sfda_tune import (
    ImageDataset,
    Ranking,
    open_dataset,
    rank,
    score,
)
from sfda_tune.data.checks import DatasetError
from sfda_tune.data.copies import find_twins
from sfda_tune.metrics.multilabel import logme_multilabel, sfda_multilabel
from sfda_tune.report.html import write_report
from sfda_tune.selection.diagnostics import diagnose
from sfda_tune.selection.labels import judge_labels
from sfda_tune.selection.uncertainty import confidence
from sfda_tune.values.features import Features

NAMES = ("cat", "dog", "owl")
MATRIX = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, -1], [0, 0, 1], [1, 1, 1]], np.int8)


def write_images(folder, n=6, start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(n):
        pixels = np.random.default_rng(start + k).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")


def sets(matrix=MATRIX):
    return [[NAMES[c] for c in np.flatnonzero(row == 1)] for row in matrix]


class Pairs:
    classes = NAMES

    def __init__(self, folder):
        self.folder = folder

    def __len__(self):
        return 6

    def __getitem__(self, row):
        with Image.open(self.folder / f"{row}.png") as image:
            return image.copy(), MATRIX[row]


def form_columns_csv(folder):
    cell = {1: ("1", "true", "Yes"), 0: ("0", "False", "0.0"), -1: ("", "-1", "nan")}
    lines = ["path,id,cat,dog,owl,is_valid"]
    for k, row in enumerate(MATRIX):
        lines.append(",".join([f"{k}.png", f"{k}7", *(cell[v][k % 3] for v in row.tolist()), "0"]))
    (folder / "t.csv").write_text("\n".join(lines))
    return folder / "t.csv", {"task": "multilabel"}


def form_named_columns_parquet(folder):
    pd = pytest.importorskip("pandas")
    table = pd.DataFrame(MATRIX.astype(float), columns=NAMES).replace(-1, np.nan)
    table["path"], table["odd"] = [f"{k}.png" for k in range(6)], [True, False] * 3
    table.to_parquet(folder / "t.parquet")
    return folder / "t.parquet", {"label_columns": ["cat", "?o?", "ow*"]}


def form_delimited_csv(folder):
    rows = [f'{k}.png,"{" ; ".join(names)}"' for k, names in enumerate(sets())]
    (folder / "t.csv").write_text("\n".join(["path,tags", *rows]))
    return folder / "t.csv", {"label_delimiter": ";"}


def form_lists_parquet(folder):
    pd = pytest.importorskip("pandas")
    table = pd.DataFrame({"path": [f"{k}.png" for k in range(6)], "Tags": sets()})
    table.to_parquet(folder / "t.parquet")
    return folder / "t.parquet", {"task": "multilabel", "label_column": "Tags"}


def form_coco(folder):
    ids = {"cat": 7, "dog": 11, "owl": 90}
    found = {
        "images": [{"id": 100 + k, "file_name": f"{k}.png"} for k in range(6)],
        "categories": [{"id": v, "name": k} for k, v in reversed(ids.items())],
        "annotations": [
            {"image_id": 100 + k, "category_id": ids[name], "bbox": [0, 0, 1, 1]}
            for k, names in enumerate(sets())
            for name in names + names[:1]  # two of a kind in one image
        ],
    }
    (folder / "annotations").mkdir()
    path = folder / "annotations" / "instances_train2017.json"
    path.write_text(json.dumps(found))
    (folder / "train2017").mkdir()
    for k in range(6):
        (folder / f"{k}.png").rename(folder / "train2017" / f"{k}.png")
    return path, {"task": "multilabel"}


def form_shards(folder):
    with tarfile.open(folder / "train-000.tar", "w") as archive:
        for k, names in enumerate(sets()):
            (folder / f"{k}.json").write_text(json.dumps({"tags": names}))
            archive.add(folder / f"{k}.png", f"{k}.png")
            archive.add(folder / f"{k}.json", f"{k}.json")
    return folder / "train-000.tar", {"task": "multilabel", "label_column": "tags"}


def form_huggingface(folder):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        image=datasets.Image(), objects=datasets.Sequence(datasets.ClassLabel(names=list(NAMES)))
    )
    rows = [[NAMES.index(name) for name in names] for names in sets()]
    images = [str(folder / f"{k}.png") for k in range(6)]
    data = datasets.Dataset.from_dict({"image": images, "objects": rows}, features=features)
    return data, {"task": "multilabel"}


def form_arrays(folder):
    images = [folder / f"{k}.png" for k in range(6)]
    return (images, np.where(MATRIX < 0, np.nan, MATRIX)), {"task": "multilabel"}


def form_lists(folder):
    return ([folder / f"{k}.png" for k in range(6)], sets()), {"task": "multilabel"}


def form_torchvision(folder):
    return Pairs(folder), {"task": "multilabel"}


FORMS = {k.removeprefix("form_"): f for k, f in dict(globals()).items() if k.startswith("form_")}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_labels(form, tmp_path):
    write_images(tmp_path)
    spec, options = FORMS[form](tmp_path)
    with pytest.raises(DatasetError, match=r"multilabel|label_column"):
        open_dataset(spec)
    data = open_dataset(spec, **options)
    knows_missing = form in ("columns_csv", "named_columns_parquet", "arrays", "torchvision")
    expected = MATRIX if knows_missing else np.maximum(MATRIX, 0)
    names = tuple(f"label {k}" for k in range(3)) if form == "arrays" else NAMES
    assert (data.task, data.classes) == ("multilabel", names)
    assert data.labels.dtype == np.int8
    assert data.labels.tolist() == expected.tolist()
    assert data.load(3).size == (8, 8)
    assert data.strata.tolist() == [0, 0, 3, 1, 2, 2]
    part = pickle.loads(pickle.dumps(data.subset([4, 1])))
    assert part.labels.tolist() == expected[[4, 1]].tolist()
    assert part.task == "multilabel"
    assert repr(data).endswith("6 images, 3 labels)")
    assert open_dataset(data) is data


def test_parts_and_groups_of_a_table(tmp_path):
    write_images(tmp_path)
    lines = ["path,video,split,a,b"]
    lines += [
        f"{k}.png,v{k // 2},{'val' if k == 5 else 'train'},{k % 2},{k % 3 // 2}" for k in range(6)
    ]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    data = open_dataset(tmp_path / "t.csv", task="multilabel", groups="video")
    assert (len(data), data.classes) == (5, ("a", "b"))
    assert data.groups is not None
    assert data.groups.tolist() == ["v0", "v0", "v1", "v1", "v2"]
    whole = open_dataset(tmp_path / "t.csv", label_columns="b, a", split="all")
    assert whole.labels.T.tolist() == [[0, 0, 1, 0, 0, 1], [0, 1] * 3]


def test_digits_as_bits_and_their_samples():
    data = open_dataset("digits", task="multilabel")
    digits = load_digits().target
    assert data.classes == ("bit 1", "bit 2", "bit 4", "bit 8")
    assert (data.labels @ [1, 2, 4, 8]).tolist() == digits.tolist()
    assert data.label_name(data.labels[digits.tolist().index(9)]) == "bit 1 + bit 8"
    assert data.label_name(data.labels[digits.tolist().index(0)]) == "no label"
    rows = data.sample_rows(100)
    share = np.bincount(data.strata, minlength=5) / len(data)
    np.testing.assert_allclose(np.bincount(data.strata[rows]) / 100, share, atol=0.015)
    with pytest.raises(DatasetError, match="one label per image to train on but has several"):
        data.require_classes("to train on")


def test_copies_with_other_labels_are_told():
    pixels = np.arange(64, dtype=np.uint8).reshape(4, 4, 4)[[0, 1, 0, 2, 1]]
    labels = np.array([[1, 0], [1, 1], [1, 0], [0, 0], [0, 1]])
    found = find_twins(ImageDataset("x", pixels, labels, ("a", "b")))
    assert found.copies == {2: 0, 1: 4}
    assert found.torn == {4: ("b", "a + b")}


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("path,a,b\n0.png,1,2\n", {"label_columns": "a,b"}, "'b', must hold 0 and 1 .* holds '2'"),
        ("path,a,b\n0.png,1,0\n", {"label_columns": "a,c"}, "one of 'a', 'b', .* 'c' fits none"),
        ("path,a,b\n0.png,x,y\n", {"task": "multilabel"}, "there is none"),
        ("path,tags\n0.png,x\n", {"task": "multilabel"}, "`label_delimiter` .* say what is"),
        ("path,tags\n0.png,\n", {"label_delimiter": ";"}, "no image has any"),
        ("path,a,b\n0.png,1,1\n", {"task": "multilabel"}, "a label that some images have and"),
        ("path,a\n0.png,1\n", {"label_columns": "a", "label_delimiter": ";"}, "leave one of them"),
        ("path,a\n0.png,1\n", {"label_columns": "a", "task": "regression"}, "`task` is 'regr"),
        ("path,a\n0.png,1\n", {"label_delimiter": ""}, "`label_delimiter` must be"),
        ("path,a,b\n0.png,1,0\n1.png,0,1\n", {}, "'a', 'b' hold nothing but 0 and 1: .*--task m"),
        (
            "path,label\n0.png,cat;dog\n1.png,cat\n2.png,dog\n3.png,\n",
            {},
            "3 different ones on 4 images, such as 'cat;dog', are made of 2 parts .*"
            "--task multilabel --label-delimiter ';'.*--task classification",
        ),
    ],
)
def test_tables_that_are_not_understood(text, options, message, tmp_path):
    write_images(tmp_path)
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_dataset(tmp_path / "t.csv", **options)


def test_lists_may_be_classes_and_names_with_commas_are(tmp_path):
    images = np.zeros((4, 4, 4), np.uint8)
    given = ["cat;dog", "cat", "dog", "cat"]
    assert open_dataset((images, given), task="classification").classes == (
        "cat",
        "cat;dog",
        "dog",
    )
    people = ["Doe, Jo", "Poe, Al", "Doe, Al", "Roe, Jo"]
    assert len(open_dataset((images, people)).classes) == 4
    write_images(tmp_path / "a;b")
    write_images(tmp_path / "a")
    write_images(tmp_path / "b")
    assert len(open_dataset(tmp_path).classes) == 3
    with pytest.raises(DatasetError, match="must hold several labels per image"):
        open_dataset(tmp_path, task="multilabel")
    with pytest.raises(DatasetError, match="`label_columns` cannot be used with a folder"):
        open_dataset(tmp_path, label_columns="a")
    for bad in ([0, 1, 1, 0], [[0, 1], [1], [1], [0]], [[0, 2]] * 4, np.ones((3, 2))):
        with pytest.raises(DatasetError, match="`labels` must"):
            open_dataset((images, bad), task="multilabel")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("categories"), "with images, annotations and categories"),
        (lambda d: d.pop("images"), "A table of paths and labels is a .csv"),
        (lambda d: d["annotations"].append({"image_id": 5, "category_id": 7}), "of the image 5"),
        (lambda d: d["annotations"].append({"image_id": 100, "category_id": 1}), "category 1"),
        (lambda d: d["images"].append(dict(d["images"][0])), "an id of its own"),
        (lambda d: d["annotations"].clear(), "a label that some images have"),
        (lambda d: [i.update(file_name="x" + i["file_name"]) for i in d["images"]], "none of the"),
    ],
)
def test_annotations_that_are_not_understood(change, message, tmp_path):
    write_images(tmp_path)
    path, options = form_coco(tmp_path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(DatasetError, match=message):
        open_dataset(path, **options)


def test_records_are_no_annotations_whatever_the_task(tmp_path):
    (tmp_path / "t.json").write_text('[{"path": "a.png", "label": "cat"}]')
    for task in (None, "multilabel"):
        with pytest.raises(DatasetError, match=r"must be JSON like COCO's.*is a \.csv"):
            open_dataset(tmp_path / "t.json", task=task)


# Ranking -----------------------------------------------------------------------------------------
THREE = ["demo:resnet_glyphs", "demo:resnet_noise", "demo:vit_untrained"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_digits_as_bits_are_ranked_through_files_and_page(cache, tmp_path):
    ranking = rank("digits", THREE, task="multilabel", samples=300, cache=cache)
    info = ranking.info
    assert next(iter(ranking)) == "demo:resnet_glyphs"
    assert (info["task"], info["n_classes"], len(info["label_counts"])) == ("multilabel", 4, 4)
    assert "hard_images" not in info
    kinds = {d.kind: d.message for d in diagnose(ranking)}
    assert "for several labels it weighs" in kinds["task"]
    assert not {"small_classes", "unjudged"} & set(kinds)
    by_score = rank("digits", THREE, task="multilabel", samples=300, cache=cache, metric="sfda")
    assert "task" not in {d.kind for d in diagnose(by_score)}
    data = open_dataset("digits", task="multilabel", samples=300)
    counts = [(c["positives"], c["missing"]) for c in info["label_counts"]]
    assert counts == [(n, 0) for n in (data.labels == 1).sum(axis=0).tolist()]
    for s in by_score.scores:
        assert s.per_sample is not None
        assert s.value == pytest.approx(s.per_sample.mean())
        assert s.value == ranking.score(s.backbone).details["evidence"]
    interval = dict(zip(by_score, confidence(by_score).score_interval, strict=True))
    low, high = interval["demo:resnet_glyphs"]
    assert low < by_score["demo:resnet_glyphs"] < high < low + 0.1

    rows = judge_labels(ranking)
    first = ranking.score("demo:resnet_glyphs").details
    for row in rows:
        k = info["classes"].index(row["name"])
        assert row["average_precision"] == first["average_precisions"][k]
        assert row["share"] == pytest.approx(counts[k][0] / 300)
        every = [ranking.score(name).details["average_precisions"][k] for name in ranking]
        assert row["best_average_precision"] == max(every)
    ranking.to_json(tmp_path / "r.json")
    again = Ranking.from_json(tmp_path / "r.json")
    assert judge_labels(again) == rows
    assert [*again.items()] == [*ranking.items()]
    page = re.sub("<wbr>|<.?span>", "", write_report(tmp_path / "r.json").read_text("utf-8"))
    assert 'id="labels"' in page
    assert 'id="classes"' not in page
    assert "sfda-tune search digits" in page
    assert "--task multilabel" in page
    mean = first["mean_average_precision"]
    assert f"finds the images of 4 labels with a mean average precision of {mean:.2f}" in page
    assert f"Labels that separate worst, by average precision: {rows[0]['name']}" in page
    assert "An epoch over these" in page


def test_scores_do_not_depend_on_how_labels_come(cache):
    data = open_dataset("digits", task="multilabel", samples=200)
    for metric in ("sfda", "knn", "logme", "linear_probe"):
        found = rank(data, THREE[:1], metric=metric, cache=cache)
        options = {"samples": 200, "task": "multilabel", "cache": cache}
        again = rank("digits", THREE[:1], metric=metric, **options)
        assert dict(found) == dict(again)
        assert not found.failed
    x = np.random.default_rng(0).normal(size=(200, 5))
    features = Features(x, data.labels, data.classes, task="multilabel")
    assert repr(features).endswith("n_labels=4)")
    assert score(features).value == sfda_multilabel(features.x, data.labels).value
    assert score(features, "logme").value == logme_multilabel(features.x, data.labels).value
    combined = rank(data, THREE, metric="sfda + 2*knn + params", cache=cache)
    assert len(combined.failed) == 0
    assert judge_labels(combined) == []
    mine = rank(data, THREE[:1], metric=lambda f, y: float(y.sum()), cache=cache)
    assert list(mine.values()) == [float(data.labels.sum())]


def test_groups_are_left_out_together_and_missing_labels_count_for_nothing(cache):
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(40), 5)
    images = rng.integers(0, 256, (40, 8, 8), dtype=np.uint8)[patient]
    images[:, 0] = rng.integers(0, 256, (200, 8))
    labels = rng.integers(0, 2, (40, 5))[patient].astype(float)
    labels[:60, 2] = np.nan
    labels[:, 4] = patient == 7  # of one patient only
    found = rank(
        (images, labels), THREE[:2], task="multilabel", groups=patient, metric="sfda", cache=cache
    )
    for s in found.scores:
        assert s.value < 0.65 < s.details["value_without_groups"] - 0.1
        assert s.details["left_out"] == [4]
    assert found.info["groups"]["n"] == 40
    assert found.info["label_counts"][2]["missing"] == 60
    kinds = {d.kind: d.message for d in diagnose(found)}
    assert "1 label was left out of the score, for it takes two groups" in kinds["unjudged"]
    assert "label 4 (5)" in kinds["unjudged"]
    assert judge_labels(found)[-1]["average_precision"] is None
    assert confidence(found).dof == 39


def test_race_and_budget(cache):
    data = open_dataset("digits", task="multilabel", samples=800)
    fast = ["demo:resnet_*", "demo:regnet_shapes", "demo:densenet_digits"]
    whole = rank(data, fast, metric="sfda", cache=cache)
    raced = rank(data, fast, metric="sfda", race=True, top=1, cache=cache)
    assert next(iter(raced)) == next(iter(whole))
    assert raced.info["race"]["stages"][0]["images"] < 800
    assert dict(rank(data, fast, budget=600, cache=cache)) == dict(rank(data, fast, cache=cache))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "hscore"}, "'hscore' takes one class per image; take 'sfda'"),
        ({"metric": "sfda + ridge"}, "'ridge' is unknown; take 'sfda'"),
        ({"metric": "imagenet"}, "'sfda [+] imagenet'"),
        ({"metric": "sfda", "variant": "loo"}, "`variant` must be None for several labels"),
        (
            {"metric": "knn + sfda", "race": True},
            "`race` needs a metric that is a mean over images",
        ),
        ({"ensemble": 2}, "must have one label per image for an `ensemble`"),
        ({"label_delimiter": ";"}, "`label_delimiter` cannot be used with 'digits'"),
    ],
)
def test_what_has_no_meaning_for_several_labels_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        rank("digits", THREE, **{"task": "multilabel", "cache": False, **options})


def test_a_matrix_of_labels_is_no_column_of_classes():
    x, y = np.random.default_rng(0).normal(size=(6, 4)), np.maximum(MATRIX, 0)
    with pytest.raises(ValueError, match=r"Features\(task='multilabel'\)"):
        Features(x, y)
    with pytest.raises(ValueError, match="must name the 3 columns"):
        Features(x, y, ("cat", "dog"), task="multilabel")
    with pytest.raises(ValueError, match="must hold 0, 1 and NaN or -1"):
        ImageDataset("x", x, y + 1, NAMES)
    assert Features(x, y, task="multilabel").classes == (0, 1, 2)
