"""Fine-tuning on several labels per image: loss, metrics, thresholds, runs."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score

from sfda_tune import ImageDataset, open_dataset, resolve_backbones
from sfda_tune.backbones.plugins import BackboneError
from sfda_tune.data.checks import DatasetError
from sfda_tune.data.splits import join, relabel, split_images, tell_gaps
from sfda_tune.finetuning.heads import fit_labels
from sfda_tune.finetuning.models import load_model, predict
from sfda_tune.finetuning.run import FinetuneConfig, finetune
from sfda_tune.finetuning.tasks import Multilabel
from sfda_tune.selection.several import (
    choose_thresholds,
    describe_labels,
    measure_labels,
    resample_labels,
)

(GLYPHS,) = resolve_backbones("demo:resnet_glyphs")


def make_labels(n=60, seed=0):
    """Labels, some not known, one that nobody lacks; probabilities with many ties."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (n, 5)).astype(np.int8)
    p = np.clip(np.round(0.5 * labels + rng.uniform(0, 0.7, (n, 5)), 1), 0.01, 0.99)
    labels[rng.random((n, 5)) < 0.2] = -1
    labels[3] = -1
    labels[labels[:, 4] == 0, 4] = -1
    return labels, p


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_that_of_a_naive_loop_over_what_is_known(smoothing):
    labels, p = make_labels()
    task, config = Multilabel(tuple("abcde")), FinetuneConfig(label_smoothing=smoothing)
    logits = torch.tensor(np.log(p / (1 - p)))
    found = task.loss(logits, torch.tensor(task.encode(labels)), config)

    def naive(p):
        total = 0.0
        for row, q in zip(labels, p, strict=True):
            each = []
            for y, x in zip(row, q, strict=True):
                if y >= 0:
                    target = y * (1 - smoothing) + smoothing / 2
                    each.append(-target * np.log(x) - (1 - target) * np.log(1 - x))
            total += np.mean(each) if each else 0.0
        return total

    assert float(found) == pytest.approx(naive(p))
    rates = np.array([(y == 1).sum() / (y >= 0).sum() for y in labels.T]).clip(1e-6, 1 - 1e-6)
    rates = rates * (1 - smoothing) + smoothing / 2
    nothing = naive(np.tile(rates, (len(labels), 1))) / len(labels)
    assert task.ignorance(labels, config) == pytest.approx(nothing, abs=1e-6)
    if not smoothing:  # an image of which nothing is known counts for nothing
        known = (labels >= 0).any(axis=1)
        assert measure_labels(labels, p, [0.5] * 5)["log_loss"] == pytest.approx(
            naive(p) / known.sum()
        )


def test_metrics_are_those_of_scikit_learn_also_in_bootstrap_samples():
    labels, p = make_labels()
    thresholds = [0.3, 0.5, 0.6, 0.4, 0.5]
    rows = describe_labels(labels, p, thresholds, "abcde")
    for c, row in enumerate(rows[:4]):
        known = labels[:, c] >= 0
        y, q = labels[known, c], p[known, c]
        assert row["average_precision"] == pytest.approx(average_precision_score(y, q))
        assert row["f1"] == pytest.approx(f1_score(y, q >= thresholds[c]))
        assert (row["images"], row["known"]) == (y.sum(), known.sum())
    assert rows[4]["average_precision"] is rows[4]["f1"] is None
    found = measure_labels(labels, p, thresholds)
    assert found["map"] == pytest.approx(np.mean([r["average_precision"] for r in rows[:4]]))
    assert found["macro_f1"] == pytest.approx(np.mean([r["f1"] for r in rows[:4]]))
    rng, draws = np.random.default_rng(0), resample_labels(labels, p, thresholds, n_draws=20)
    w = rng.multinomial(60, np.full(60, 1 / 60), 20)
    for k in range(20):
        again = np.repeat(np.arange(60), w[k])
        for name, value in measure_labels(labels[again], p[again], thresholds).items():
            assert draws[name][k] == pytest.approx(value), name
    groups = np.repeat(np.arange(6), 10)
    whole = resample_labels(
        np.tile(labels[:10], (6, 1)), np.tile(p[:10], (6, 1)), thresholds, groups
    )
    assert whole["map"].std() < 1e-12  # all groups are the same
    with pytest.raises(ValueError, match="none of the 1 is such"):
        measure_labels(labels[:, 4:], p[:, 4:], [0.5])


def test_thresholds_have_the_highest_f1_of_all():
    for seed in range(20):
        labels, p = make_labels(25, seed)
        found = choose_thresholds(labels, p)
        for c in range(4):
            known = labels[:, c] >= 0
            y, q = labels[known, c], p[known, c]
            every = np.unique(np.concatenate([[0.0], (np.unique(q)[1:] + np.unique(q)[:-1]) / 2]))
            f1 = np.array([f1_score(y, q >= t) for t in [np.unique(q)[0] / 2, *every[1:]]])
            cuts = np.array([np.unique(q)[0] / 2, *every[1:]])
            best = cuts[f1 >= f1.max() - 1e-12]
            assert f1_score(y, q >= found[c]) == pytest.approx(f1.max())
            assert abs(found[c] - 0.5) == pytest.approx(np.abs(best - 0.5).min())
        assert found[4] == 0.5  # nobody lacks it


def test_the_head_starts_as_one_regression_for_each_label():
    from sklearn.linear_model import LogisticRegression

    from sfda_tune.metrics.multilabel import linear_probe_multilabel

    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 8)) * rng.uniform(0.1, 9, 8) + 5
    x[:, 7] = 3.0  # says nothing
    labels = (x[:, :3] > 5).astype(np.int8)
    labels[:30, 2] = -1
    weight, bias, sharpness = fit_labels(x, labels)
    assert 0.25 <= sharpness <= 1
    C = linear_probe_multilabel(x, labels).details["C"]
    z = (x - x.mean(axis=0)) / np.where(np.arange(8) == 7, 1, x.std(axis=0))
    for c in range(3):
        known = labels[:, c] >= 0
        theirs = LogisticRegression(C=C * 1.0, tol=1e-10, max_iter=9999).fit(
            z[known], labels[known, c]
        )
        assert x[known] @ weight[c] + bias[c] == pytest.approx(
            theirs.decision_function(z[known]), abs=2e-2
        )


def test_a_run_learns_bits_stores_its_thresholds_and_goes_on(tmp_path):
    data = open_dataset("digits", samples=120, task="multilabel")
    labels = data.labels.copy()
    labels[:10] = -1
    data = replace(data, labels=labels)
    config = FinetuneConfig(epochs=2)
    run = finetune(GLYPHS, data, config, checkpoint_dir=tmp_path / "a")
    epochs = list(run)
    assert run.best is not None
    assert epochs[0].map > 0.8
    assert all(len(e.thresholds) == 4 and e.error > 0 for e in epochs)
    assert run.config.monitor == "map"
    first = finetune(GLYPHS, data, config, checkpoint_dir=tmp_path / "b")
    for _ in range(2):
        next(first)
    first.close()
    again = finetune(GLYPHS, data, config, checkpoint_dir=tmp_path / "b")
    for e, before in zip([*again.history, *again], epochs, strict=True):
        assert (e.values, e.thresholds) == (before.values, before.thresholds)
    folder = run.save_model(tmp_path / "model")
    model = load_model(folder)
    assert model.task == Multilabel(data.classes, run.best.thresholds)
    rows = np.flatnonzero((run.val.labels >= 0).any(axis=1))
    p = predict(model, run.val)
    assert model.task.measure(run.val.labels[rows], p[rows])["macro_f1"] == pytest.approx(
        run.best.macro_f1
    )
    assert isinstance(model.task, Multilabel)
    assert (model.task.decide(p) == (p >= run.best.thresholds)).all()
    about = json.loads((folder / "provenance.json").read_text())
    about["task"]["thresholds"][0] += 0.1
    (folder / "provenance.json").write_text(json.dumps(about))
    with pytest.raises(BackboneError, match="task changed"):
        load_model(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixup": 0.2}, "`mixup` must be 0.0 for multilabel but is 0.2"),
        ({"class_weights": "balanced"}, "`class_weights` must be None for multilabel"),
        ({"monitor": "accuracy"}, "`monitor` must be one of .*map.* for multilabel"),
        ({"loss": "mse"}, "`loss` must be one of .*binary_cross_entropy.* for multilabel"),
    ],
)
def test_what_has_no_meaning_is_refused(options, message):
    data = open_dataset("digits", samples=40, task="multilabel")
    with pytest.raises(ValueError, match=message):
        finetune(GLYPHS, data, FinetuneConfig(**options))


def test_parts_are_matched_by_the_names_of_labels():
    items = list(np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8))
    labels = np.random.default_rng(1).integers(0, 2, (40, 3)).astype(np.int8)
    train = ImageDataset("x", items, labels, ("cat", "dog", "owl"))
    other = ImageDataset("y", items, labels[:, :2], ("owl", "cat"))
    found = relabel(other, train)
    assert found.labels[:, [2, 0]].tolist() == labels[:, :2].tolist()
    assert (found.labels[:, 1] == -1).all()
    assert len(join(train, found)) == 80
    more = ImageDataset("y", items, labels, ("owl", "cat", "emu"))
    with pytest.raises(DatasetError, match="classes that the training images lack: emu"):
        relabel(more, train)
    nothing = replace(more, labels=labels * np.array([1, 1, 0], np.int8))
    assert relabel(nothing, train).labels.tolist() == found.labels.tolist()
    with pytest.raises(DatasetError, match="must have labels for multilabel"):
        relabel(open_dataset("digits", samples=20), train)
    with pytest.raises(ValueError, match="`val` must have a label that some images have"):
        finetune(GLYPHS, train, val=replace(found, labels=np.ones_like(found.labels)))
    notes = tell_gaps({"train": train, "val": found, "test": train})
    assert notes == [
        "no two validation images are known of which one has and one lacks dog: validation "
        "numbers say nothing of it"
    ]


def test_splits_keep_rare_labels_and_groups():
    rng = np.random.default_rng(0)
    items = list(rng.integers(0, 256, (200, 8, 8), np.uint8))
    labels = (rng.random((200, 4)) < [0.5, 0.3, 0.1, 0.05]).astype(np.int8)
    arguments = {"split": None, "samples": None, "test": None, "seed": 0}
    data = ImageDataset("x", items, labels, tuple("abcd"))
    parts, rows, _ = split_images({"dataset": data, **arguments})
    assert sorted(row for part in rows.values() for row in part) == list(range(200))
    assert all((part.labels == 1).any(axis=0).all() for part in parts.values())
    patient = np.repeat([f"p{k}" for k in range(40)], 5)
    parts, _, _ = split_images({"dataset": replace(data, groups=patient), **arguments})
    assert sum(len(np.unique(np.array(part.groups))) for part in parts.values()) == 40
    parts, rows, _ = split_images({"dataset": replace(data, times=np.arange(200.0)), **arguments})
    assert max(rows["train"]) < min(rows["val"]) < max(rows["val"]) < min(rows["test"])
    few = data.subset(np.unique(data.strata, return_index=True)[1])
    with pytest.raises(DatasetError, match="too few images for a search: 5 different ones for 4"):
        split_images({"dataset": few, **arguments})
    with pytest.raises(DatasetError, match="among the 40 images for test there is none"):
        split_images({"dataset": data, **arguments, "test": data.subset([0] * 40)})
