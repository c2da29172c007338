"""Images that belong together: how they are named, and that nothing tears them apart."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sfda_tune
from sfda_tune.data.checks import DatasetError
from sfda_tune.data.dataset import ImageDataset
from sfda_tune.data.groups import describe_options, read_options
from sfda_tune.data.opening import open_dataset
from sfda_tune.data.splits import hold_out, split_images, tell_shared
from sfda_tune.extraction.store import FeatureStore
from sfda_tune.finetuning.config import FinetuneConfig
from sfda_tune.finetuning.images import split
from sfda_tune.selection.diagnostics import diagnose
from sfda_tune.selection.evaluation import accuracy_interval, design_effect
from sfda_tune.selection.uncertainty import bootstrap, collapse_groups

VIDEOS = re.compile(r"(.+)_\d+\.png")


def picture(path: Path, seed: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Two classes of 4 videos of 3 frames each, in folders and as tables."""
    root = tmp_path_factory.mktemp("videos") / "frames"
    lines = ["path,label,video,wave,day"]
    for n in range(24):
        name, video = ("cat", "dog")[n // 3 % 2], n // 3
        path = picture(root / name / f"v{video}" / f"v{video}_{n}.png", n)
        part = ("fit", "fit", "fit", "Testing")[video // 2]
        lines.append(f"{path},{name},v{video},{part},2024-05-{30 - video:02}")
    (root.parent / "t.csv").write_text("\n".join(lines))
    return root


def groups_of(*args: Any, **kwargs: Any) -> list[str]:
    data = open_dataset(*args, **kwargs)
    assert data.groups is not None
    return data.groups.tolist()


def group_array(data: ImageDataset) -> np.ndarray:
    assert data.groups is not None
    return data.groups


def message(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(DatasetError) as caught:
        open_dataset(*args, **kwargs)
    return str(caught.value)


def test_every_way_to_name_groups_names_the_same(root):
    table, expected = root.parent / "t.csv", [Path(p).parent.name for p in sorted_paths(root)]
    assert groups_of(root, groups="folders") == expected
    assert groups_of(root, groups=VIDEOS) == expected
    assert groups_of(root, groups=re.compile(r"/(v\d+)/")) == expected
    assert groups_of(root, groups=lambda path: Path(path).parent.name) == expected
    assert groups_of(root, groups=expected) == expected
    assert groups_of(open_dataset(root), groups=np.array(expected)) == expected
    by_column = open_dataset(table, groups="video", split="all")
    assert by_column.groups is not None
    assert groups_of(by_column, groups=VIDEOS) == by_column.groups.tolist()
    arrays = np.zeros((4, 3, 3), np.uint8), ["a", "b"] * 2
    assert groups_of(arrays, groups=[7.0, 7, 8, 8]) == ["7", "7", "8", "8"]


def sorted_paths(root: Path) -> list[Any]:
    return list(open_dataset(root).items)


def test_columns_of_parquet_and_of_hugging_face(root, tmp_path):
    datasets = pytest.importorskip("datasets")
    import pandas as pd

    table = pd.read_csv(root.parent / "t.csv")
    table.to_parquet(tmp_path / "t.parquet")
    videos = table["video"].tolist()
    assert groups_of(tmp_path / "t.parquet", groups="video", split="all") == videos
    hf = datasets.Dataset.from_pandas(table)
    found = open_dataset(
        hf, image_column="path", groups="video", split_column="wave", time_column="day",
        split="test",
    )  # fmt: skip
    assert found.groups is not None
    assert found.times is not None
    assert found.groups.tolist() == ["v6"] * 3 + ["v7"] * 3
    assert (np.diff(found.times[[0, 3]]) == -86400).all()
    assert "must be a column" in message(hf, image_column="path", groups="film", split="all")


def test_groups_go_wherever_their_images_go(root):
    data = open_dataset(root, groups=VIDEOS)
    rows = [3, 0, 20]
    assert data.groups is not None
    assert group_array(data.subset(rows)).tolist() == data.groups[rows].tolist()
    sample = open_dataset(root, groups=VIDEOS, samples=9, seed=1)
    for item, group in zip(sample.items, group_array(sample), strict=True):
        assert Path(item).parent.name == group


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        (re.compile("nothing"), "'nothing' matches no file, for instance 'v0_0.png'"),
        (re.compile("v0.*"), "matches not 21 of 24, for instance"),
        (re.compile("v|x"), "all 24 images are of the group 'v'"),
        (["a"] * 23, "24 images and 23 groups"),
        (["a", None] * 12, "12 of 24 are missing"),
        ("video", "would be a column, or the sub-folders"),
        (7, "must be one group per image"),
    ],
)
def test_groups_that_cannot_be_are_said(root, groups, said):
    assert said in message(root, groups=groups)


def test_other_faults_of_groups(root, tmp_path):
    flat = tmp_path / "flat"
    for n in range(4):
        picture(flat / "ab"[n % 2] / f"{n}.png", n)
    assert "has none; name the groups" in message(flat, groups="folders")
    with pytest.warns(UserWarning, match="every one of the 4 images is a group of its own"):
        open_dataset(flat, groups=re.compile(r"\d"))
    arrays = np.zeros((4, 3, 3), np.uint8), ["a", "b"] * 2
    assert "4 of 4 are none" in message(arrays, groups=re.compile("x"))
    table = root.parent / "t.csv"
    assert "`group_column` must be a column" in message(table, groups="film")
    assert "must name a column with the parts" in message(table, split_column="video")
    assert "`time_column` must hold" not in message(table, split_column="nope")
    assert "must hold a time for every image" in message(table, time_column="video", split="all")


def test_a_column_of_the_users_own_names_the_parts(root):
    table = root.parent / "t.csv"
    assert len(open_dataset(table)) == 24
    assert len(open_dataset(table, split="test", split_column="wave")) == 6
    with pytest.raises(DatasetError, match="no training part"):
        open_dataset(table, split_column="wave")


def test_times_that_decide_nothing_are_said(root, tmp_path):
    import pandas as pd

    table = pd.read_csv(root.parent / "t.csv")
    table["part"] = (["train"] * 2 + ["val", "test"]) * (len(table) // 4)
    table["path"] = [str(root.parent / path) for path in table["path"]]
    table.to_csv(tmp_path / "p.csv", index=False)
    given = dict.fromkeys(("split", "image_column", "label_column", "samples", "test"))
    given |= {"dataset": tmp_path / "p.csv", "seed": 0, "time_column": "day"}
    with pytest.warns(UserWarning, match="`time_column` 'day' has no effect"):
        split_images({**given, "split_column": "part"})


# Splits -----------------------------------------------------------------------------------------
def grouped(n: int = 240, size: int = 6, classes: int = 3, seed: int = 0) -> ImageDataset:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (n, 4, 4), dtype=np.uint8)
    owner = np.arange(n) // size
    labels = rng.integers(0, classes, owner.max() + 1)[owner]
    mixed = rng.random(n) < 0.2
    labels = np.where(mixed, rng.integers(0, classes, n), labels)
    return open_dataset((pixels, labels), groups=owner)


def arguments(data: ImageDataset, **more: Any) -> dict[str, Any]:
    empty = dict.fromkeys(("split", "samples", "test", "image_column", "label_column"))
    return {"dataset": data, "seed": 0, **empty, **more}


@pytest.mark.parametrize("seed", [0, 1])
def test_no_group_is_on_two_sides_of_a_search_and_parts_are_stratified(seed):
    data = grouped()
    parts, rows, sources = split_images(arguments(data, seed=seed))
    assert set(sources.values()) == {"all images", "held out"}
    assert sorted([*rows["train"], *rows["val"], *rows["test"]]) == list(range(240))
    sets = [set(part.groups) for part in parts.values() if part.groups is not None]
    assert sum(map(len, sets)) == len(set.union(*sets)) == 40
    share = np.bincount(data.labels) / len(data)
    for name, part in parts.items():
        assert len(part) == pytest.approx({"train": 154, "val": 38, "test": 48}[name], abs=8)
        assert np.abs(np.bincount(part.labels) / len(part) - share).max() < 0.1
    assert split_images(arguments(data, seed=seed))[1] == rows


def test_copies_tie_groups_together():
    data = grouped()
    twins = np.arange(240)
    twins[239] = twins[0] = 0  # the first and the last group share an image
    for seed in range(5):
        stays, _ = hold_out(data, np.arange(240), 0.2, seed, twins)
        assert (0 in stays) == (239 in stays)
        assert (1 in stays) == (238 in stays)


def test_fine_tuning_holds_out_whole_groups():
    train, val = split(grouped(), None, FinetuneConfig(val_fraction=0.25))
    assert train.groups is not None
    assert val.groups is not None
    assert not set(train.groups) & set(val.groups)
    assert len(val) == pytest.approx(60, abs=8)


def test_the_latest_images_are_held_out(root):
    table = root.parent / "t.csv"
    data = open_dataset(table, groups="video", time_column="day", split="all")
    parts, *_ = split_images(arguments(data))
    latest = {name: np.array(part.times) for name, part in parts.items()}
    assert latest["train"].max() < latest["val"].min()
    assert latest["val"].max() < latest["test"].min()
    late = open_dataset((np.zeros((8, 2, 2), np.uint8), list("aaaaaabb")))
    late = ImageDataset(late.name, late.items, late.labels, late.classes, times=np.arange(8.0))
    with pytest.raises(DatasetError, match="time_column"):
        hold_out(late, np.arange(8), 0.25, 0, np.arange(8))


def test_a_class_in_one_group_cannot_be_split():
    data = open_dataset((np.zeros((12, 2, 2), np.uint8), list("ab") * 6), groups=list("xy") * 6)
    with pytest.raises(DatasetError, match="`groups` are too few for a split: 2 groups"):
        hold_out(data, np.arange(12), 0.2, 0, np.arange(12))


def test_groups_in_two_given_parts_are_said():
    data = grouped()
    parts = {"train": data.subset(range(200)), "val": data.subset(range(198, 220))}
    said = tell_shared(parts | {"test": data.subset(range(220, 240))})
    assert sum("of groups that the training images have" in text for text in said) == 1
    assert any("6 of 22 validation images" in text for text in said)
    said = tell_shared(parts | {"test": data.subset(range(212, 240))})
    assert any(
        "10 of 28 test images are of groups that the validation images have, too (35, 36)" in text
        for text in said
    )


# Uncertainty ------------------------------------------------------------------------------------
def test_intervals_over_groups_are_those_of_independent_groups():
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(60), 8)
    labels = owner % 3
    effect = rng.normal(size=(2, 60))
    terms = effect[:, owner] + 0.01 * rng.normal(size=(2, 480))
    narrow, wide = bootstrap(terms, labels), bootstrap(terms, labels, groups=owner)
    means = bootstrap(effect, np.arange(60) % 3)
    width = [np.ptp(c.score_interval, axis=1).mean() for c in (narrow, wide, means)]
    assert width[1] == pytest.approx(width[2], rel=0.15)
    assert width[1] > 2 * width[0]
    assert wide.score == pytest.approx(narrow.score)
    one_each = bootstrap(terms, labels, groups=range(480))
    assert one_each.resamples == pytest.approx(narrow.resamples)


def test_groups_of_several_classes_vary_as_simulated():
    rng = np.random.default_rng(1)
    scores = []
    for _ in range(400):  # samples of 40 groups, the truth
        owner = np.repeat(np.arange(40), 5)
        scores.append((rng.normal(size=40)[owner] + rng.normal(size=200)).mean())
    owner, labels = np.repeat(np.arange(40), 5), rng.integers(0, 3, 200)
    spread = []
    for _ in range(20):
        terms = rng.normal(size=40)[owner] + rng.normal(size=200)
        U, strata = collapse_groups(terms[None], labels, owner)
        assert not strata.any()
        assert U.mean() == pytest.approx(terms.mean())
        spread.append(U.std(ddof=1) / np.sqrt(40))
    assert np.mean(spread) == pytest.approx(np.std(scores), rel=0.15)


def test_a_test_on_few_groups_says_little():
    right = np.repeat([1, 1, 1, 0], 25).astype(bool)
    effect = design_effect(right, np.arange(100) // 25)
    low, high = accuracy_interval(75, 100, effect)
    assert effect > 20
    assert low < 0.4 < 0.95 < high
    assert accuracy_interval(75, 100, 1 + 1e-9) == pytest.approx(accuracy_interval(75, 100))


# The doors --------------------------------------------------------------------------------------
def test_rank_leaves_out_groups_and_says_what_it_changes():
    data = open_dataset("digits", samples=120)
    groups = np.arange(120) // 4
    ranking = sfda_tune.rank(data, "demo:resnet_*", groups=groups, cache=False)
    plain = sfda_tune.rank(data, "demo:resnet_*", cache=False)
    assert ranking.info["groups"]["n"] == 30
    assert ranking.groups is not None
    again = sfda_tune.Ranking.from_json(ranking.to_json())
    assert (again.groups == ranking.groups).all()
    for name in plain:
        detail = ranking.score(name).details
        assert detail["value_without_groups"] == plain.score(name).details["evidence"]
        assert detail["evidence"] != detail["value_without_groups"]
    kinds = {d.kind: d.message for d in diagnose(again)}
    assert "where whole groups are left out: 30 groups, the largest of 4 images" in kinds["groups"]
    drops = [s.details["value_without_groups"] - s.details["evidence"] for s in ranking.scores]
    assert ranking.info["groups"]["drop"] == np.median(drops)


def test_notes_of_scores_tell_groups_apart(tmp_path):
    data, backbone = open_dataset("digits", samples=80), "demo:resnet_glyphs"

    def value(groups: Any) -> float:
        ranking = sfda_tune.rank(data, backbone, groups=groups, metric="sfda", cache=tmp_path)
        return ranking[backbone]

    values = [value(None), value(np.arange(80) // 4), value(np.arange(80) // 8)]
    assert len(set(values)) == 3
    assert [value(None), value(np.arange(80) // 4), value(np.arange(80) // 8)] == values


def test_metrics_that_know_no_groups_are_named():
    data = open_dataset("digits", samples=80)
    options: dict[str, Any] = {"groups": np.arange(80) // 4, "cache": False}
    for metric, note in (("logme", "logme knows no groups"), ("knn", ""), ("sfda + logme", "lo")):
        ranking = sfda_tune.rank(data, "demo:resnet_*", metric=metric, **options)
        assert all(s.details["note"].startswith(note) for s in ranking.scores)
        assert all(bool(s.details["note"]) == bool(note) for s in ranking.scores)

    def own(features: Any, labels: Any, groups: Any = None) -> float:
        return -1.0 if groups is None else float(len(set(groups)))

    assert set(sfda_tune.rank(data, "demo:resnet_*", metric=own, **options).values()) == {20.0}


def test_classes_as_groups_are_refused_before_any_image_is_read(monkeypatch):
    data = open_dataset("digits", samples=80)
    options: dict[str, Any] = {"groups": list(data.labels), "cache": False}
    with monkeypatch.context() as patch:
        patch.setattr(ImageDataset, "digest", lambda *_: pytest.fail("an image was read"))
        for metric in (None, "knn", "sfda + logme"):
            with pytest.raises(DatasetError, match="`groups` must leave some class in two groups"):
                sfda_tune.rank(data, "demo:resnet_glyphs", metric=metric, **options)
    assert not sfda_tune.rank(data, "demo:resnet_glyphs", metric="logme", **options).failed


def test_a_race_and_lone_classes_with_groups():
    data = open_dataset("digits", samples=200)
    ranking = sfda_tune.rank(
        data, "demo:*", groups=np.arange(200) // 5, race=True, top=1, cache=False
    )
    assert len(ranking.failed) == 0
    lone = np.where(data.labels == 3, "three", np.arange(200).astype(str))
    ranking = sfda_tune.rank(data, "demo:resnet_glyphs", groups=lone, cache=False)
    kinds = {d.kind: d.message for d in diagnose(ranking)}
    assert "1 class lies within one group each (3)" in kinds["lone_classes"]


def frames(seed: int, videos: int, each: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frames of videos: one of the digits before a background of its own, with noise."""
    digits, rng = open_dataset("digits"), np.random.default_rng(seed)
    rows = np.concatenate(
        [rng.permutation(np.flatnonzero(digits.labels == c))[: videos // 10] for c in range(10)]
    )
    still = np.stack([np.asarray(digits.items[row]) for row in rows]) * 0.7
    still = np.maximum(still, rng.integers(0, 120, still.shape))
    owner = np.repeat(np.arange(videos), each)
    pixels = still[owner] + rng.normal(0, 6, (len(owner), 8, 8))
    return np.clip(pixels, 0, 255).astype(np.uint8), digits.labels[rows][owner], owner


@pytest.mark.slow
def test_grouped_scores_rank_frames_of_videos_as_new_videos_do(tmp_path):
    """The truth: a linear head on all frames, tested on videos that nobody has seen."""
    from scipy.stats import spearmanr
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rho = []
    for seed in (0, 1):
        pixels, labels, owner = frames(seed, 60, 8)
        new, truth, _ = frames(seed + 100, 300, 1)
        data = open_dataset((pixels, labels), groups=owner)
        ranking = sfda_tune.rank(data, "demo:*", metric="sfda", cache=tmp_path)
        candidates = sfda_tune.resolve_backbones("demo:*")
        accuracy = {}
        seen = sfda_tune.extract(data, candidates, store=FeatureStore(tmp_path))
        unseen = sfda_tune.extract(open_dataset((new, truth)), candidates)
        x = {e.backbone.name: e.features.x for e in seen if e.features}
        for e in unseen:
            head = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
            assert e.features is not None
            name = e.backbone.name
            accuracy[name] = head.fit(x[name], labels).score(e.features.x, truth)
        names = list(ranking)
        true = [accuracy[n] for n in names]
        grouped = [ranking[n] for n in names]
        torn = [ranking.score(n).details["value_without_groups"] for n in names]
        assert np.mean(grouped) == pytest.approx(np.mean(true), abs=0.06)
        assert np.mean(torn) > np.mean(true) + 0.3
        rho.append([spearmanr(values, true)[0] for values in (grouped, torn)])
    grouped, torn = np.mean(rho, axis=0)
    assert grouped > 0.85
    assert grouped > torn + 0.1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("groups", [None, "folders", "video", VIDEOS])
def test_groups_are_read_as_they_were_described(groups):
    assert read_options(describe_options(groups)) == groups


@pytest.mark.parametrize("flags", [re.IGNORECASE, re.VERBOSE | re.DOTALL, re.ASCII])
def test_flags_of_a_pattern_are_described(flags):
    given = re.compile(r"(A\w) _", flags)
    found = read_options(describe_options(given))
    assert found.flags == given.flags
    text = "xaé _1aA _Aé _A1_"
    assert found.findall(text) == given.findall(text)


@pytest.mark.slow
def test_a_search_by_the_command_line_keeps_videos_whole(tmp_path, monkeypatch, capsys):
    from sfda_tune.cli.main import main
    from sfda_tune.values.files import read_json

    monkeypatch.setenv("SFDA_TUNE_CACHE", str(tmp_path / "cache"))
    pixels, labels, owner = frames(0, 60, 2)
    for n, image in enumerate(pixels):
        path = tmp_path / "frames" / str(labels[n]) / f"v{owner[n]}_{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)

    def run(*words: Any) -> int:
        with pytest.raises(SystemExit) as done:
            main(list(map(str, words)))
        return int(done.value.code or 0)

    data = [tmp_path / "frames", "-b", "demo:resnet_*", "--device", "cpu", "--quiet"]
    regex = ["--group-regex", r"(v\d+)_\d+\.png"]
    assert run("rank", *data, *regex, "-o", tmp_path / "r.json") == 0
    assert "where whole groups are left out: 60 groups" in " ".join(
        "".join(capsys.readouterr()).split()
    )
    assert sfda_tune.Ranking.from_json(tmp_path / "r.json").info["groups"]["n"] == 60
    out = tmp_path / "run"
    quick = ["--trials", 1, "--epochs", 1, "--keep", 1, "-o", out]
    assert run("search", *data, *regex, *quick) == 0
    splits = read_json(out / "splits.json", {})
    names = sfda_tune.open_dataset(tmp_path / "frames").items
    videos = [
        {Path(str(names[row])).name.split("_")[0] for row in splits[part]}
        for part in ("train", "val", "test")
    ]
    assert sum(map(len, videos)) == len(set.union(*videos)) == 60
    config = read_json(out / "config.json", {})
    assert config["group_regex"] == regex[1]
    pytest.importorskip("onnxruntime")
    export = sfda_tune.export_onnx(out)  # opens the same test images again
    assert (export.images, export.n_images) == ("test images", len(splits["test"]))
    assert run("search", *data, *quick) == 1
    assert "holds a search with group_regex" in " ".join(capsys.readouterr().err.split())
    assert run("rank", *data, *regex, "--groups", "folders") == 1
    assert "exclude each other" in capsys.readouterr().err
