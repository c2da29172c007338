"""`BackboneRegressor`: numbers from images, with what scikit-learn does around it."""

import numpy as np
import pytest
from sfda_tune_sklearn import BackboneClassifier, BackboneRegressor
from sklearn.datasets import load_digits
from sklearn.metrics import r2_score
from sklearn.model_selection import cross_val_score

import sfda_tune

X, y = load_digits(return_X_y=True)
ONE = {"backbones": "demo:resnet_glyphs", "device": "cpu", "cache": False}


def test_ridge_on_the_features_of_the_best_backbone(tmp_path):
    values = 1000 + 2.5 * y
    both = BackboneRegressor("demo:resnet_*", finetune=False, device="cpu", cache=False)
    both.fit(X[:150], values[:150])
    assert both.backbone_ == next(iter(both.ranking_)) == "demo:resnet_glyphs"
    assert both.ranking_.info["task"] == "regression"
    found = both.predict(X[150:300])
    assert found.shape == (150,)
    assert both.score(X[150:300], values[150:300]) == r2_score(values[150:300], found) > 0.5
    again = BackboneRegressor.load(both.save(tmp_path / "model"))
    np.testing.assert_array_equal(again.predict(X[150:160]), both.predict(X[150:160]))
    assert not hasattr(both, "classes_")
    with pytest.raises(ValueError, match=r"must be written by BackboneClassifier.save"):
        BackboneClassifier.load(tmp_path / "model")


def test_a_search_fine_tunes_and_tests_it():
    options = {"epochs": 1, "keep": 1, "metric": "mae"}
    groups = np.arange(80) // 2
    model = BackboneRegressor(**ONE, n_trials=1, options=options, random_state=0)
    model.fit(X[:80], y[:80], groups=groups)
    assert set(model.result_.test) == {"r2", "spearman", "rmse", "mae"}
    assert model.result_.summary["metric"] == "mae"
    assert model.predict(X[:3]).shape == (3,)


def test_it_is_a_regressor_of_scikit_learn():
    model = BackboneRegressor(**ONE, finetune=False)
    assert cross_val_score(model, X[:120], y[:120], cv=2).min() > 0.3
    numbers = sfda_tune.open_dataset("digits", samples=60, task="regression")
    assert model.fit(numbers).score(numbers) > 0.5
    with pytest.raises(ValueError, match=r"must have numbers to predict but is .*10 classes"):
        model.fit(sfda_tune.open_dataset("digits", samples=60))
    with pytest.raises(ValueError, match=r"all are 3 \(n_samples=5\)"):
        model.fit(X[:5], np.full(5, 3))
    with pytest.raises(sfda_tune.DatasetError, match="must have classes for a classifier"):
        BackboneClassifier(**ONE).fit(numbers)
