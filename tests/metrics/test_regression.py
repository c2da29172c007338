"""Metrics of numbers, against fits that were made again without each sample or group."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import multivariate_normal, spearmanr
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.neighbors import KNeighborsRegressor

from sfda_tune.metrics.regression import (
    ORDINAL,
    PENALTIES,
    REGRESSION,
    knn_regression,
    logme_regression,
    ridge,
    ridge_probe,
)


def sample(n: int, d: int, noise: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return correlated features on several scales, one of them constant, and targets."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) * rng.lognormal(size=d) + 3
    x[:, 0] = 7.5
    return x, 40 + 5 * (x[:, 1] + noise * x.std() * rng.normal(size=n))


def refit(x: np.ndarray, y: np.ndarray, t: float, groups: np.ndarray) -> np.ndarray:
    """Predict each group by scikit-learn's ridge regression, fitted to the others."""
    z = (x - x.mean(axis=0)) / np.where(x.std(axis=0) > 0, x.std(axis=0), 1)
    lam = t * np.square(z).sum() / min(z.shape)
    out = np.empty(len(y))
    for g in np.unique(groups):
        rest = groups != g
        fit = Ridge(alpha=lam, solver="svd").fit(z[rest], y[rest])
        out[~rest] = fit.predict(z[~rest])
    return out


@pytest.mark.parametrize(("n", "d"), [(60, 12), (40, 90)])
@pytest.mark.parametrize("sizes", [None, [1, 2, 3, 9]])
def test_ridge_is_what_refits_without_each_sample_or_group_say(n, d, sizes):
    x, y = sample(n, d)
    groups = np.arange(n) if sizes is None else np.resize(np.repeat(np.arange(4), sizes), n)
    found = ridge(x, y, groups=None if sizes is None else groups)
    r2 = {}
    for t in PENALTIES:
        r2[f"{t:g}"] = r2_score(y, refit(x, y, t, groups))
        assert found.details["r2"][f"{t:g}"] == pytest.approx(r2[f"{t:g}"], abs=1e-12)
    assert found.details["penalty"] == float(max(r2, key=r2.__getitem__))
    predicted = refit(x, y, found.details["penalty"], groups)
    assert found.per_sample is not None
    contributions = 1 - (y - predicted) ** 2 / y.var()
    np.testing.assert_allclose(found.per_sample, contributions, rtol=0, atol=1e-8)
    assert found.value == pytest.approx(found.per_sample.mean(), abs=1e-12)
    assert found.details["spearman"] == pytest.approx(spearmanr(predicted, y)[0])
    assert found.details["rmse"] == pytest.approx(np.sqrt(np.square(y - predicted).mean()))


def test_probe_predicts_folds_that_its_penalty_has_not_seen():
    x, y = sample(103, 20)
    fold = np.argsort(np.argsort(y)) % 5
    predicted = np.empty(len(y))
    found = ridge_probe(x, y)
    for f, t in enumerate(found.details["penalties"]):
        train = fold != f
        assert t == ridge(x[train], y[train]).details["penalty"]
        scale = x[train].std(axis=0)
        z = (x - x[train].mean(axis=0)) / np.where(scale > 0, scale, 1)
        fit = Ridge(alpha=t * np.square(z[train]).sum() / 20).fit(z[train], y[train])
        predicted[~train] = fit.predict(z[~train])
    assert found.value == pytest.approx(r2_score(y, predicted), abs=1e-9)
    wide = ridge_probe(*sample(40, 200), groups=np.arange(40) // 4)
    assert wide.per_sample is not None
    assert np.isfinite(wide.per_sample).all()


def test_neighbours_are_those_of_scikit_learn():
    x, y = sample(50, 6)
    found = knn_regression(x, y, k=[1, 4])
    for k in (1, 4):
        predicted = [
            KNeighborsRegressor(k, metric="cosine", algorithm="brute")
            .fit(np.delete(x, n, 0), np.delete(y, n))
            .predict(x[[n]])[0]
            for n in range(50)
        ]
        assert found.details["r2"][str(k)] == pytest.approx(r2_score(y, predicted))
    twins = np.repeat(x, 2, axis=0), np.repeat(y, 2)  # only groups keep a copy from voting
    assert knn_regression(*twins, k=1).value == pytest.approx(1)
    apart = knn_regression(*twins, k=1, groups=np.repeat(np.arange(50), 2)).value
    assert apart == pytest.approx(found.details["r2"]["1"])


@pytest.mark.parametrize(("n", "d"), [(40, 5), (12, 20)])
def test_logme_is_the_largest_evidence_of_the_standardised_targets(n, d):
    x, y = sample(n, d, 0.3)
    x = (x - 3) / x.std()
    z = (y - y.mean()) / y.std()
    found = logme_regression(x, y)
    log_p = lambda at: multivariate_normal.logpdf(  # noqa: E731
        z, cov=x @ x.T * np.exp(at[0]) + np.eye(n) * np.exp(at[1])
    )
    best = minimize(lambda at: -log_p(at), [0.0, -1.0], bounds=[(-9, 9), (-9, 9)])
    assert found.value == pytest.approx(-best.fun / n, abs=1e-5)


@pytest.mark.parametrize("name", REGRESSION)
def test_every_metric_of_numbers(name):
    metric, (x, y) = REGRESSION[name], sample(80, 10, 0.2)
    good, bad = metric(x, y).value, metric(x, np.random.default_rng(1).permutation(y)).value
    assert good > bad + 0.3
    before = x.copy(), y.copy()
    assert metric(x, 1000 - 0.01 * y).value == pytest.approx(good, abs=1e-6)  # any unit
    assert np.array_equal(x, before[0])
    assert np.array_equal(y, before[1])
    order = np.random.default_rng(2).permutation(80)
    assert metric(x[order], y[order]).value == pytest.approx(good, abs=1e-9)
    constant = metric(np.ones((80, 3)), y)
    assert constant.value <= 0.01
    for targets, message in (
        (y[1:], "one number per row"), (y.astype(str), "one number per row"),
        (np.full(80, 3.5), "all 80 are 3.5"), (np.where(y > y.min(), y, np.nan), "must be finite"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            metric(x, targets)


@pytest.mark.parametrize("name", [name for name in ORDINAL if name != "logme"])
def test_levels_are_judged_by_the_rank_correlation_of_the_same_predictions(name):
    x, numbers = sample(120, 8, seed=3)
    y = np.digitize(numbers, np.quantile(numbers, (0.5, 0.7, 0.9)))  # levels 0 … 3
    found, plain = ORDINAL[name](x, y), REGRESSION[name](x, y)
    assert found.value == pytest.approx(plain.details["spearman"], abs=1e-12)
    assert found.details == plain.details
    assert found.per_sample is not None
    assert found.per_sample.mean() == pytest.approx(found.value, abs=1e-12)
    assert ORDINAL[name](x, y, groups=np.arange(120) // 2).value != found.value
    with pytest.raises(ValueError, match="`judge` must be 'r2' or 'spearman' but is 'tau'"):
        REGRESSION[name](x, y, judge="tau")


@pytest.mark.parametrize("noise", [0.1, 0.5, 3.0])
def test_the_parts_of_a_rank_correlation_say_how_sure_it_is(noise):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 1))
    y = np.digitize(x[:, 0] + noise * rng.normal(size=400), (-0.5, 0.5, 1.5))
    found = ORDINAL["ridge"](x, y)
    predicted = x[:, 0]  # what leave-one-out predictions follow
    assert found.value == pytest.approx(spearmanr(predicted, y)[0], abs=0.02)
    rows = rng.integers(0, 400, (400, 400))
    drawn = np.std([spearmanr(predicted[r], y[r])[0] for r in rows])
    assert found.per_sample is not None
    assert found.per_sample.std() / 20 == pytest.approx(drawn, rel=0.25)
