"""`BackboneRegressor`: from images to numbers, with the backbone chosen on the way."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from sklearn.base import RegressorMixin
from sklearn.metrics import r2_score
from sklearn.utils import check_array, check_consistent_length, column_or_1d

from sfda_tune.data.dataset import ImageDataset
from sfda_tune.data.opening import open_dataset
from sfda_tune.values.formats import REGRESSOR
from sfda_tune_sklearn.estimator import BackboneEstimator
from sfda_tune_sklearn.images import as_dataset, read_images

__all__ = ["BackboneRegressor"]


class BackboneRegressor(RegressorMixin, BackboneEstimator):
    """Predict a number of each image with the backbone that suits it best.

    `fit` ranks the backbones by leave-one-out ridge regression. Then it tunes and fine-tunes the
    best ones (`sfda_tune.search`), or with ``finetune=False`` only fits ridge regression, its
    penalty chosen by leaving out one image at a time, on the features of the first: seconds
    instead of minutes.

    Parameters
    ----------
    backbones, finetune, n_trials, time_budget, options, image_shape, value_range, device, \
precision, cache, plugins, random_state
        As for `BackboneClassifier`.

    Attributes
    ----------
    ranking_, result_, backbone_, model_, n_features_in_
        As those of `BackboneClassifier`.

    Raises
    ------
    ValueError
        If X cannot be read as images, y is not finite or all equal, or every backbone failed.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> X, y = load_digits(return_X_y=True)
    >>> model = BackboneRegressor("demo:*glyphs", finetune=False, cache=False)
    >>> model.fit(X[:200], y[:200]).score(X[200:400], y[200:400]) > 0.5
    True
    """

    _kind: ClassVar[str] = "regressor"
    _task: ClassVar[str | None] = "regression"
    _state: ClassVar[dict[Any, Any]] = REGRESSOR

    def predict(self, X: Any) -> np.ndarray:
        """Return a number for each image, float64, in the order of X."""
        return self._predict(X)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Return R²; `y` may be left out where it may be in `fit`."""
        if y is None:
            X = self._open(X, None)
            y = X.labels
        return float(r2_score(y, self.predict(X), sample_weight=sample_weight))

    def _label(self, X: Any, y: Any, groups: Any = None) -> ImageDataset:
        """Check images and numbers."""
        if y is None:
            dataset = self._open(X, groups)
            read_images(self, dataset, fit=True)
            return dataset
        items = read_images(self, X, fit=True)
        any_type: Any = "numeric"
        y = check_array(y, ensure_2d=False, dtype=any_type, input_name="y")
        y = column_or_1d(y, warn=True).astype(np.float64)
        check_consistent_length(items, y)
        if y.min() == y.max():
            raise ValueError(
                "`y` must hold different numbers to choose a backbone but all are "
                f"{y[0]:g} (n_samples={len(y)})."
            )
        dataset = as_dataset(items, X, y, ())
        return dataset if groups is None else open_dataset(dataset, groups=groups)
