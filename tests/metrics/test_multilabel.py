"""Metrics of several labels per image, against one metric of two classes after the other."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from sfda_tune.metrics.knn import find_neighbours
from sfda_tune.metrics.logme import logme
from sfda_tune.metrics.multilabel import (
    LAMBDAS,
    MULTILABEL,
    _deal,
    knn_multilabel,
    linear_probe_multilabel,
    logme_multilabel,
    sfda_multilabel,
)
from sfda_tune.metrics.sfda import sfda


def sample(seed: int, missing: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return features on several scales, one constant, labels from rare to frequent, groups."""
    rng = np.random.default_rng(seed)
    n, d, k = int(rng.integers(20, 120)), int(rng.integers(3, 150)), int(rng.integers(4, 9))
    y = (rng.random((n, k)) < rng.uniform(0.05, 0.95, k)).astype(float)
    x = rng.normal(size=(n, d)) * rng.lognormal(size=d) + 5
    x[:, : min(k, d)] += rng.uniform(0, 2) * x.std(axis=0)[: min(k, d)] * y[:, :d]
    x[:, 0] = 7.5
    y[rng.random(n) < missing, :2] = np.nan  # known of the same images
    y[rng.random(n) < missing, 2] = np.nan
    x *= 10.0 ** rng.integers(-180, 50)
    return x, y, rng.permutation(np.arange(n) // int(rng.integers(1, 9)))


@pytest.mark.parametrize("seed", range(24))
def test_is_what_sfda_says_of_each_label(seed):
    x, y, groups = sample(seed, missing=0.3 * (seed % 4 == 3))
    lam, g = (0.003, 0.03, 0.5, 1.0)[seed // 6], groups if seed % 2 else None
    found = sfda_multilabel(x, y, shrinkage=lam, groups=g)
    n, value, per_sample = len(x), [], np.zeros(len(x))
    left_out = found.details["left_out"]
    for k in range(y.shape[1]):
        rows = np.isfinite(y[:, k])
        if k in left_out:
            assert found.details["label_values"][k] is None
            few = min(len(set((np.arange(n) if g is None else g)[y[:, k] == c])) for c in (0, 1))
            assert few < 2
            continue
        one = sfda(x[rows], y[rows, k], shrinkage=lam, groups=None if g is None else g[rows])
        assert found.details["label_values"][k] == pytest.approx(one.value, rel=0, abs=1e-9)
        p = np.where(y[rows, k] == 1, one.per_sample, 1 - one.per_sample)
        if p.min() > 1e-9 and p.max() < 1 - 1e-9:  # else some are tied here, but not there
            assert found.details["average_precisions"][k] == pytest.approx(
                average_precision_score(y[rows, k], p), abs=1e-9
            )
        value.append(one.value)
        per_sample[rows] += (one.per_sample - one.value) * n / rows.sum()
    assert found.details["n_shared"] >= (0 if seed % 4 == 3 else 3)
    assert found.value == pytest.approx(np.mean(value), rel=0, abs=1e-9)
    expected = found.value + per_sample / len(value)
    np.testing.assert_allclose(found.per_sample, expected, rtol=0, atol=1e-9)
    assert found.per_sample.mean() == pytest.approx(found.value, rel=0, abs=1e-12)


def test_labels_that_separate_without_error_and_features_without_any():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, (60, 5))
    x = rng.normal(size=(60, 30))
    x[:, :4] = y[:, :4] + 1e-9 * x[:, :4]
    x[:, 4:] *= 1e-9 * y[:, :1]  # nothing varies within the classes of the first label
    found = sfda_multilabel(x, y, shrinkage=0.5)
    expected = [sfda(x, column).value for column in y.T]
    assert found.details["label_values"] == pytest.approx(expected, rel=0, abs=1e-9)
    constant = sfda_multilabel(np.ones((60, 3)), y)
    expected = [sfda(np.ones((60, 3)), column).value for column in y.T]
    assert constant.details["label_values"] == pytest.approx(expected, rel=0, abs=1e-12)


def test_shrinkage_is_the_one_that_leave_one_out_finds_best():
    x, y, groups = sample(9)
    for g in (None, groups):
        found = sfda_multilabel(x, y, groups=g)
        one = [sfda_multilabel(x, y, groups=g, shrinkage=lam).value for lam in LAMBDAS]
        assert list(found.details["by_lambda"].values()) == pytest.approx(one, rel=0, abs=1e-12)
        assert found.details["lambda"] == LAMBDAS[np.argmax(one)]
        assert found.value == pytest.approx(max(one), rel=0, abs=1e-12)


def test_weights_order_of_rows_and_kinds_of_missing_values():
    x, y, _ = sample(2, missing=0.2)
    found = sfda_multilabel(x, y)
    values = np.array(found.details["label_values"], dtype=float)
    assert found.value == pytest.approx(values.mean())
    share = np.nanmean(y, axis=0)
    lam = found.details["lambda"]
    weighed = sfda_multilabel(x, y, weights="prevalence", shrinkage=lam)
    assert weighed.value == pytest.approx(values @ share / share.sum())
    only = sfda_multilabel(x, y, weights=np.eye(y.shape[1])[1], shrinkage=lam)
    assert only.value == pytest.approx(values[1])
    order = np.random.default_rng(0).permutation(len(x))
    coded = np.where(np.isnan(y), -1, y).astype(np.int8)
    turned = sfda_multilabel(x[order], coded[order][:, ::-1])
    assert turned.value == pytest.approx(found.value, rel=0, abs=1e-12)
    np.testing.assert_allclose(turned.per_sample, found.per_sample[order], atol=1e-9)


def test_logme_of_indicators_is_that_of_classes():
    x, _, _ = sample(4)
    classes = np.arange(len(x)) % 5
    one_hot = np.eye(5)[classes]
    assert logme_multilabel(x, one_hot).value == pytest.approx(logme(x, classes).value, rel=1e-6)
    some = one_hot.copy()
    some[:9, 2] = np.nan
    found = logme_multilabel(x, some).details["label_values"]
    whole = logme_multilabel(x, one_hot).details["label_values"]
    assert found[:2] + found[3:] == pytest.approx(whole[:2] + whole[3:], rel=1e-12)
    assert found[2] == pytest.approx(
        logme_multilabel(x[9:], one_hot[9:]).details["label_values"][2], rel=1e-9
    )


@pytest.mark.parametrize("grouped", [False, True])
def test_neighbours_vote_for_each_label(grouped):
    x, y, groups = sample(7, missing=0.2)
    groups = groups if grouped else np.arange(len(x))
    found = knn_multilabel(x, y, k=(3, 5), groups=groups if grouped else None)
    _, blocks = find_neighbours(x, groups, 5)
    nearest = np.concatenate([near for _, near in blocks])
    for k, value in found.details["by_k"].items():
        precisions = []
        for label in range(y.shape[1]):
            if label in found.details["left_out"]:
                continue
            rows = np.isfinite(y[:, label])
            with np.errstate(invalid="ignore"):
                votes = y[nearest[:, : int(k)], label]
                share = [np.nanmean(v) if np.isfinite(v).any() else np.nan for v in votes]
            share = np.nan_to_num(share, nan=np.nanmean(y[:, label]))
            precisions.append(average_precision_score(y[rows, label], share[rows]))
        assert value == pytest.approx(np.mean(precisions))
    assert found.value == max(found.details["by_k"].values())


@pytest.mark.parametrize("grouped", [False, True])
def test_linear_probe_is_scikit_learns_of_each_label(grouped):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(90, 12)), rng.integers(0, 2, (90, 3)).astype(float)
    x[:, :3] += y
    y[:11, 1] = np.nan
    groups = np.arange(90) // 6 if grouped else None
    found = linear_probe_multilabel(x, y, grid=[0.1], groups=groups)
    folds = _deal(x, np.nan_to_num(y, nan=-1), groups, 5)
    assert sum(f.astype(int) for f in folds).tolist() == [1] * 90
    if grouped:
        assert all(f.reshape(15, 6).all(axis=1).sum() * 6 == f.sum() for f in folds)
    logits = np.empty(y.shape)
    for test in folds:
        z = (x - x[~test].mean(axis=0)) / x[~test].std(axis=0)
        for k in range(3):
            rows = ~test & np.isfinite(y[:, k])
            fit = LogisticRegression(C=0.1, tol=1e-9, max_iter=1000).fit(z[rows], y[rows, k])
            logits[test, k] = fit.decision_function(z[test])
    known = np.isfinite(y)
    expected = [average_precision_score(y[r, k], logits[r, k]) for k, r in enumerate(known.T)]
    assert found.value == pytest.approx(np.mean(expected), abs=2e-3)
    loss = np.where(known, np.logaddexp(0, logits) - np.nan_to_num(y) * logits, 0).sum()
    assert found.details["log_likelihood"] == pytest.approx(-loss / known.sum(), abs=1e-4)


@pytest.mark.parametrize("metric", MULTILABEL.values())
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.arange(30) % 2, "must be a matrix of 0 and 1"),
        (np.full((30, 2), 0.5), "must hold 0, 1 and NaN or -1"),
        (np.ones((29, 2)), "one row per row of `features`"),
        (np.eye(30, 2), "two images .* have and two do not, but none of the 2"),
        (np.full((30, 2), np.nan), "none of the 2"),
        ([["a", "b"]] * 30, "MultiLabelBinarizer"),
        ([["a"], ["b", "c"]], "must be a matrix"),
    ],
)
def test_bad_labels_are_refused(metric, labels, message):
    with pytest.raises(ValueError, match=message):
        metric(np.random.default_rng(0).normal(size=(30, 4)), labels)


def test_bad_options_are_refused():
    x, y, _ = sample(0)
    for options in ({"shrinkage": 1e-4}, {"weights": "rare"}, {"weights": [1, 2]}):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}` must be"):
            sfda_multilabel(x, y, **options)
    with pytest.raises(ValueError, match="two groups"):
        sfda_multilabel(x, y, groups=np.arange(len(x)) < 1)
