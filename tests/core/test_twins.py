"""Exact copies of images: found, counted, said, and without a vote."""

import shutil
import warnings

import numpy as np
import pytest
from PIL import Image

from sfda_tune import open_dataset, rank
from sfda_tune.data.copies import (
    CopiesWarning,
    find_alike,
    find_twins,
    group_twins,
    shared_images,
)
from sfda_tune.data.dataset import ImageDataset
from sfda_tune.data.splits import split_images, tell_gaps, tell_shared
from sfda_tune.finetuning.images import look_at
from sfda_tune.selection.diagnostics import diagnose, tell_copies

CPU = {"device": "cpu", "workers": 0, "cache": False}


def pixels(n, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (n, 8, 8), dtype=np.uint8)


def data(x, labels, classes="abc"):
    return ImageDataset("x", x, np.array(labels), tuple(classes))


def arguments(dataset, **more):
    names = ("split", "image_column", "label_column", "samples", "test")
    return {"dataset": dataset, "seed": 0, **dict.fromkeys(names), **more}


def test_an_image_counts_in_the_class_with_most_copies_then_in_the_smallest():
    x = pixels(5)[[0, 1, 2, 0, 0, 1, 3, 4]]
    images = data(x, [0, 0, 0, 1, 1, 2, 1, 0])
    found = find_twins(images)
    assert found.copies == {0: 3, 4: 3, 1: 5}  # 2 copies in b; c is smaller than a
    assert found.torn == {3: ("a", "b"), 5: ("a", "c")}
    assert found.kept.tolist() == [2, 3, 5, 6, 7]
    copies, torn = tell_copies(found.describe(images))
    assert copies.startswith("3 of 8 images are exact copies of others and were left out")
    assert torn.startswith("2 images stand in more than one class and counted in one only (row 3")
    assert tell_copies(find_twins(data(pixels(3), [0, 1, 2])).describe(images)) == []


def test_empty_and_broken_files_are_no_copies_of_an_image(photos, tmp_path):
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    for k, (folder, content) in enumerate(
        [("ant", b""), ("ant", b""), ("bee", b"broken"), ("ant", b"broken")]
    ):
        (root / folder / f"bad{k}.png").write_bytes(content)
    images = open_dataset(root)
    assert len(np.unique(group_twins(images))) == len(images)
    assert not find_twins(images).copies
    assert shared_images(images, images.subset(range(len(images)))) == [
        r for r in range(len(images)) if "bad" not in images.item_name(r)
    ]


@pytest.mark.parametrize("metric", ["sfda", "knn"])
def test_copies_change_neither_scores_nor_winner(photos, toy_zoo, tmp_path, metric):
    alone = rank(photos, toy_zoo, metric=metric, **CPU)
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    for file in sorted(root.glob("*/*")):
        shutil.copy(file, file.with_stem(file.stem + "_copy"))
    for file in sorted(root.glob("ant/*_copy*"))[:2]:
        shutil.copy(file, root / "bee" / f"too_{file.name}")
    with pytest.warns(CopiesWarning, match=r"38 of 74 images .* 2 images stand in more than one"):
        twice = rank(root, toy_zoo, metric=metric, **CPU)
    assert dict(twice) == pytest.approx(dict(alone), rel=1e-6)
    assert len(twice.info["copies"]) == 38
    assert [t["classes"] for t in twice.info["several_classes"]] == [["ant", "bee"]] * 2
    assert twice.info["n_samples"] == alone.info["n_samples"]
    (found,) = [d for d in diagnose(twice) if d.kind == "copies"]
    assert found.severity == "warning"
    assert "38 of 74 images are exact copies" in found.message
    again = type(twice).from_json(twice.to_json())
    assert [d.message for d in diagnose(again)] == [d.message for d in diagnose(twice)]


@pytest.mark.parametrize(
    "options", [{}, {"race": True, "top": 1}, {"ensemble": 2}, {"precision": "bfloat16"}]
)
def test_the_same_pixels_in_other_files_are_copies(photos, toy_zoo, tmp_path, options):
    alone = rank(photos, toy_zoo, **CPU, **options)
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    for k, file in enumerate(sorted(root.glob("*/*"))[::2]):
        to = file.with_name(f"{file.stem}_{'again' if k % 2 else 'anew'}")
        with Image.open(file) as image:
            image.convert("RGB").save(to.with_suffix(".bmp" if k % 2 else ".png"))
    (again,) = list(root.glob("ant/*_anew.png"))[:1]
    shutil.copy(again, root / "bee" / "other.png")
    with pytest.warns(CopiesWarning, match="images are exact copies of others") as said:
        twice = rank(root, toy_zoo, **CPU, **options)
    assert len(said) == 1
    assert len(twice.info["copies"]) == len(list(root.glob("*/*"))) - alone.info["n_samples"]
    assert [t["classes"] for t in twice.info["several_classes"]] == [["ant", "bee"]]
    assert twice.info["n_samples"] == alone.info["n_samples"]
    if not options:
        assert dict(twice) == pytest.approx(dict(alone), rel=1e-5)


def test_alike_are_rows_that_rounding_or_nothing_keeps_apart():
    x = np.random.default_rng(0).normal(size=(300, 32)).astype(np.float32)
    x[7], x[9] = x[200] * (1 + 1e-3), x[100]
    assert find_alike(x).tolist() == [7, 9, 100, 200]
    assert len(find_alike(np.ones((5, 4), np.float32))) == 5
    assert find_alike(x[:1]).tolist() == []


def test_a_search_splits_and_compares_by_pixels(tmp_path):
    x = np.random.default_rng(0).integers(0, 255, (30, 9, 9, 3), np.uint8)
    for k, image in enumerate(x):
        folder = tmp_path / "ab"[k % 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{k}.png")
        Image.fromarray(image).save(folder / f"{k}.bmp")
    images = open_dataset(tmp_path)
    bad, digests = look_at(images)
    codes = group_twins(images, digests)
    assert not bad
    assert len(set(codes.tolist())) == 30
    assert len(set(group_twins(images).tolist())) == 60
    everything = {"train": np.arange(60)}
    parts, rows, _ = split_images(arguments(images), lambda _: (everything, codes))
    sides = [set(codes[rows[name]]) for name in ("train", "val", "test")]
    assert sum(map(len, sides)) == 30
    of = {name: [digests[row] for row in rows[name]] for name in rows}
    assert tell_shared(parts, of) == []
    parts["test"], of["test"] = images.subset([0]), [digests[0]]
    parts["train"], of["train"] = images.subset([1, 2]), [digests[1], digests[2]]
    assert len(tell_shared(parts, of)) == 1
    assert tell_shared(parts) == []


def test_the_table_says_it_once_and_below(photos, toy_zoo, tmp_path, capsys):
    from sfda_tune.cli.main import main

    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    first = next((root / "ant").iterdir())
    shutil.copy(first, first.with_stem("again"))
    with pytest.raises(SystemExit), warnings.catch_warnings():
        main(["rank", str(root), "-b", str(toy_zoo), "--no-cache", "-q"])
    said = capsys.readouterr().err
    assert said.count("1 of 37 images is an exact copy of another and was left out") == 1


def test_splits_keep_copies_on_one_side():
    x = np.concatenate([pixels(40), pixels(40), pixels(40)[:10]])
    labels = np.concatenate([np.arange(40) % 2, np.arange(40) % 2, 1 - np.arange(10) % 2])
    images = data(x, labels, "ab")
    parts, rows, _ = split_images(arguments(images))
    assert sorted(rows["train"] + rows["val"] + rows["test"]) == list(range(90))
    codes = group_twins(images)
    sides = [set(codes[rows[name]]) for name in ("train", "val", "test")]
    assert all(sides)
    assert sum(map(len, sides)) == 40  # distinct images, each on one side
    assert tell_shared(parts) == []


def test_without_copies_the_splits_are_as_ever():
    images = data(pixels(60), np.arange(60) % 3)
    kept = images.sample_rows(48, 0)
    assert split_images(arguments(images))[1]["test"] == np.setdiff1d(range(60), kept).tolist()


def test_own_test_images_among_the_training_images_are_said():
    x, y = pixels(60), np.arange(60) % 2
    own = data(np.concatenate([x[:3], pixels(20, seed=1)]), np.arange(23) % 2, "ab")
    parts, _, sources = split_images(arguments(data(x, y, "ab"), test=own))
    assert sources["test"] == "given"
    (note,) = tell_shared(parts)
    assert "of 23 test images" in note
    assert "among the training or validation images, too (row " in note


def test_test_images_that_the_winner_is_chosen_by_are_said():
    x = pixels(60)
    train, val = data(x[:30], np.arange(30) % 3), data(x[30:50], np.arange(20) % 3)
    both = {"train": train, "val": val}
    (note,) = tell_shared(both | {"test": val})
    assert note.startswith("20 of 20 test images are among the validation images, too (row 0, …)")
    (note,) = tell_shared(both | {"test": data(x[25:60], np.arange(35) % 3)})
    assert note.startswith("25 of 35 test images are among the training or validation images")


def test_parts_that_say_little_are_named():
    train = data(pixels(30), np.arange(30) % 3)
    test = data(pixels(2, seed=1), [0, 0])
    parts = {"train": train, "val": train.subset(range(12)), "test": test}
    (shared,) = tell_shared(parts)
    assert shared.startswith("12 of 12 validation images are among the training images, too")
    assert tell_gaps(parts) == [
        "there is no test image of b, c: all 2 are of a: test numbers say nothing of them",
        "there are only 2 test images: numbers on so few are rough",
    ]


def test_too_few_images_for_a_search_are_said_in_words_of_the_data_set():
    with pytest.raises(ValueError, match="too few images for a search: 3 in 3 classes, 'a' has 1"):
        split_images(arguments(data(pixels(3), [0, 1, 2])))


def test_opening_the_parts_says_what_holds_for_all_of_them_once(tmp_path):
    for k, part in enumerate(["train", "val", "test", "notes"]):
        for c in "ab":
            (tmp_path / part / c).mkdir(parents=True)
            for i, x in enumerate(pixels(3, seed=10 * k + (c == "b"))):
                Image.fromarray(x).save(tmp_path / part / c / f"{i}.png")
    with pytest.warns(UserWarning, match="left out is what lies beside") as said:
        _, rows, _ = split_images(arguments(str(tmp_path)))
    assert {name: len(r) for name, r in rows.items()} == {"train": 6, "val": 6, "test": 6}
    assert len(said) == 1
