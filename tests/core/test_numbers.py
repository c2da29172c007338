"""Numbers to predict: fine-tuning on them, and how good predictions are."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.linear_model import Ridge
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

from sfda_tune import BackboneError, DatasetError, open_dataset, resolve_backbones
from sfda_tune.finetuning.config import FinetuneConfig
from sfda_tune.finetuning.heads import fit_numbers
from sfda_tune.finetuning.models import load_model, predict
from sfda_tune.finetuning.run import finetune
from sfda_tune.finetuning.tasks import Classification, Regression
from sfda_tune.selection.numbers import measure_numbers, resample_numbers

(GLYPHS,) = resolve_backbones("demo:resnet_glyphs")


def digits(n=60):
    return open_dataset("digits", task="regression", samples=n)


def test_a_network_learns_numbers_and_goes_on_where_it_stopped(tmp_path):
    data, config = digits(200), FinetuneConfig(epochs=3)
    whole = finetune(GLYPHS, data, config, checkpoint_dir=tmp_path / "whole")
    first, *_, last = list(whole)
    assert whole.config.monitor == "r2"
    assert 0.5 < first.r2 < last.best == whole.best.r2
    assert 0 < last.error < 0.2
    halves = tmp_path / "halves"
    with finetune(GLYPHS, data, config, checkpoint_dir=halves) as run:
        next(run), next(run)
    again = finetune(GLYPHS, data, config, checkpoint_dir=halves)
    assert [e.number for e in again] == [2, 3]
    assert [e.values for e in again.history] == [e.values for e in whole.history]

    folder = again.save_model(tmp_path / "model")
    model = load_model(folder)
    assert model.classes == ()
    y = predict(model, again.val)
    assert y.shape == (len(again.val),)
    assert measure_numbers(again.val.labels, y)["r2"] == pytest.approx(again.best.r2, abs=1e-5)
    path = folder / "provenance.json"
    about = json.loads(path.read_text())
    about["task"]["mean"] += 1  # every prediction would be off by one
    path.write_text(json.dumps(about))
    with pytest.raises(BackboneError, match="task changed or missing"):
        load_model(folder)


def test_the_unit_of_the_numbers_does_not_matter():
    data = digits()
    celsius, fahrenheit = (
        finetune(GLYPHS, replace(data, labels=labels), FinetuneConfig(epochs=1, loss="huber"))
        for labels in (data.labels, 1.8e3 * data.labels - 5e4)
    )
    for a, b in zip(celsius, fahrenheit, strict=True):
        assert b.r2 == pytest.approx(a.r2, abs=2e-3)
        assert b.mae == pytest.approx(1.8e3 * a.mae, rel=2e-3)
        assert b.spearman == pytest.approx(a.spearman, abs=2e-3)


def test_the_head_starts_as_ridge_regression_with_the_penalty_that_predicts_best():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 30)) * rng.uniform(0.1, 9, 30) + 5
    x[:, 7] = 3.0  # says nothing
    z = x[:, 0] + 2 * rng.normal(size=80)
    z = (z - z.mean()) / z.std()
    weight, bias, _ = fit_numbers(x, z)
    scale = np.where(x.std(axis=0) > 0, x.std(axis=0), 1)
    X, kept = (x - x.mean(axis=0)) / scale, np.delete(np.arange(30), 7)
    errors = {}
    for t in (1e-2, 1e-1, 1.0, 10.0):  # in the unit of the mean eigenvalue, n·29/30
        fit = Ridge(alpha=t * 80 * 29 / 30)
        left = [fit.fit(np.delete(X, n, 0), np.delete(z, n)).predict(X[[n]])[0] for n in range(80)]
        errors[t] = np.square(z - left).mean(), fit.fit(X, z).predict(X)
    best = min(errors.values(), key=lambda found: found[0])[1]
    np.testing.assert_allclose(x @ weight[0] + bias[0], best, atol=1e-9)
    assert weight[0, 7] == 0
    assert np.abs(weight[0, kept]).min() > 0


@pytest.mark.parametrize("loss", ["mse", "l1", "huber"])
def test_losses_are_of_standardised_numbers(loss):
    y, outputs = np.array([1.0, 2.0, 6.0]), np.array([0.1, -2.0, 0.5])
    task, config = Regression.of(y), FinetuneConfig(loss=loss)
    e = np.abs(outputs - (y - y.mean()) / y.std())
    huber = np.where(e < 1, e**2 / 2, e - 0.5)
    expected = {"mse": e**2, "l1": e, "huber": huber}[loss].sum()
    targets = torch.tensor(task.encode(y))
    found = task.loss(torch.tensor(outputs[:, None]).float(), targets, config)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert task.predict(torch.tensor(outputs[:, None])) == pytest.approx(3 + y.std() * outputs)
    if loss == "mse":
        assert task.ignorance(y, config) == pytest.approx(1)


def test_metrics_of_numbers_and_their_intervals():
    rng = np.random.default_rng(0)
    y = rng.normal(1e4, 3, 200)
    p = y + rng.standard_t(3, 200)
    found = measure_numbers(y, p)
    assert found == pytest.approx({
        "r2": r2_score(y, p), "spearman": spearmanr(y, p).statistic,
        "rmse": root_mean_squared_error(y, p), "mae": mean_absolute_error(y, p),
    })  # fmt: skip
    assert measure_numbers(y, np.full(200, 7.0))["spearman"] == 0
    with pytest.raises(ValueError, match="all 3 are equal"):
        measure_numbers(np.ones(3), np.arange(3.0))
    rows = rng.integers(0, 200, (500, 200))
    by_hand = {
        "r2": [r2_score(y[r], p[r]) for r in rows],
        "mae": [mean_absolute_error(y[r], p[r]) for r in rows],
        "spearman": [spearmanr(y[r], p[r]).statistic for r in rows],
    }
    draws = resample_numbers(y, p)
    intervals = Regression.of(y).find_intervals(y, p, None)
    for name, values in by_hand.items():
        assert draws[name].std() == pytest.approx(np.std(values), rel=0.15)
        assert intervals[name] == pytest.approx(np.quantile(values, (0.025, 0.975)), abs=0.05)
    # five copies of each image are no more evidence than one
    many = resample_numbers(np.repeat(y, 5), np.repeat(p, 5), np.repeat(np.arange(200), 5))
    assert many["mae"].std() == pytest.approx(draws["mae"].std(), rel=0.1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"monitor": "accuracy"}, "`monitor` must be one of .*r2.* for regression"),
        ({"loss": "cross_entropy"}, "`loss` must be one of .*mse.* for regression"),
        ({"mixup": 0.2}, "`mixup` must be 0.0 for regression but is 0.2"),
        ({"class_weights": "balanced"}, "`class_weights` must be None for regression"),
    ],
)
def test_what_has_no_meaning_for_numbers_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        finetune(GLYPHS, digits(), FinetuneConfig(**config))


def test_parts_of_numbers_are_checked():
    data, classes = digits(), open_dataset("digits", samples=40)
    same = data.subset(np.flatnonzero(data.labels == 3))
    with pytest.raises(ValueError, match="`val` must hold numbers, as `dataset`"):
        finetune(GLYPHS, data, val=classes)
    with pytest.raises(ValueError, match="at least two different numbers"):
        finetune(GLYPHS, data, val=same)
    with pytest.raises(ValueError, match="at least two numbers but has 7 of 1"):
        finetune(GLYPHS, same)
    with pytest.raises(DatasetError, match="all 7 are 3"):
        Regression.of(same.labels)
    with pytest.raises(ValueError, match=r"`loss` must be one of .*cross_entropy"):
        Classification(("a", "b")).check(FinetuneConfig(loss="l1"))
