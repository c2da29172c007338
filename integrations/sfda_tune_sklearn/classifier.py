"""`BackboneClassifier`: from images to a classifier, with the backbone chosen on the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from sklearn.base import ClassifierMixin
from sklearn.metrics import accuracy_score
from sklearn.utils import check_array, check_consistent_length, column_or_1d
from sklearn.utils.multiclass import check_classification_targets

from sfda_tune.data.dataset import ImageDataset
from sfda_tune.data.opening import open_dataset
from sfda_tune.values.formats import CLASSIFIER
from sfda_tune_sklearn.estimator import BackboneEstimator
from sfda_tune_sklearn.images import read_images

__all__ = ["BackboneClassifier"]


class BackboneClassifier(ClassifierMixin, BackboneEstimator):
    """Classify images with the backbone that suits them best.

    `fit` ranks the backbones by their scores. Then it tunes and fine-tunes the best ones
    (`sfda_tune.search`), or with ``finetune=False`` only trains logistic regression, its penalty
    chosen by cross-validation, on the features of the first: seconds instead of minutes.

    Parameters
    ----------
    backbones : str, Backbone, mapping, or an iterable of these, default "demo:*"
        The candidates, see `sfda_tune.backbones.specs`.
    finetune : bool, default True
        Needs an engine, ``pip install 'sfda-tune[optuna]'``. A fifth of the images is held out for
        the test, ``result_.test``.
    n_trials : int, optional
        How many fine-tunings; default 12 if there is no `time_budget`.
    time_budget : str or float, optional
        Time for all of `fit`, in seconds or as "45m", where it fine-tunes.
    options : mapping, optional
        Further arguments of `sfda_tune.search` (keep, epochs, objective, metric, engine, out, …),
        or with ``finetune=False`` of `sfda_tune.rank` (metric, samples, …).
    image_shape, value_range
        How X is read, see `BackboneFeatures`.
    device, precision
        See `sfda_tune.extraction.settings.Settings`.
    cache : bool or path, default True
        Where features are kept for the next time, see `sfda_tune.rank`.
    plugins : iterable of str
        Python files or modules that register further timm architectures.
    random_state : int, RandomState or None
        Of all that is random.

    Attributes
    ----------
    classes_ : array of shape (n_classes,)
    ranking_ : Ranking
    result_ : SearchResult or None
        What the search found. Its folder is only there if `options` has ``out``.
    backbone_ : str
        Name of the winner.
    model_ : sfda_tune.finetuning.models.Model
        Network, preprocessing and class names.
    n_features_in_ : int
        If X has one row of numbers per image.

    Raises
    ------
    ValueError
        If X cannot be read as images, if there is a single class, or if every backbone failed.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> X, y = load_digits(return_X_y=True)
    >>> model = BackboneClassifier("demo:*glyphs", finetune=False, cache=False)
    >>> model.fit(X[:200], y[:200]).score(X[200:400], y[200:400]) > 0.8
    True
    """

    _kind: ClassVar[str] = "classifier"
    _task: ClassVar[str | None] = None
    _state: ClassVar[dict[Any, Any]] = CLASSIFIER

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return probabilities, float64 of shape (n_images, n_classes), in the order of X."""
        p = self._predict(X)
        return p[:, [self.model_.classes.index(str(c)) for c in self.classes_]]

    def predict(self, X: Any) -> np.ndarray:
        """Return the most probable class of each image."""
        p = self.predict_proba(X)
        return self.classes_[p.argmax(axis=1)]

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Return the accuracy; `y` may be left out where it may be in `fit`."""
        if y is None:
            dataset = open_dataset(X)
            X, y = dataset, np.array(dataset.classes)[dataset.labels]
        return float(accuracy_score(y, self.predict(X), sample_weight=sample_weight))

    def _label(self, X: Any, y: Any, groups: Any = None) -> ImageDataset:
        """Check images and labels; learn the classes."""
        if y is None:
            dataset = self._open(X, groups)
            dataset.require_classes("for a classifier")
            read_images(self, dataset, fit=True)
            self.classes_ = np.array(dataset.classes)
            return dataset
        items = read_images(self, X, fit=True)
        any_type: Any = None
        y = check_array(y, ensure_2d=False, dtype=any_type, input_name="y")
        if np.ndim(y) == 2 and np.shape(y)[1] > 1:
            raise ValueError(
                f"`y` should be a 1d array, one class per image, but has the shape {np.shape(y)}; "
                "with several labels per image: sfda_tune.search((images, y), task='multilabel')."
            )
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        check_consistent_length(items, y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                "`y` must hold two classes or more to choose a backbone but holds one class, "
                f"{self.classes_[0]!r}."
            )
        dataset = ImageDataset("X", items, codes, tuple(map(str, self.classes_)))
        return dataset if groups is None else open_dataset(dataset, groups=groups)

    def _describe(self) -> dict[str, Any]:
        return {"classes": self.classes_.tolist(), "dtype": self.classes_.dtype.str}

    def _restore(self, state: Mapping[str, Any]) -> None:
        dtype = np.dtype(state["dtype"])
        # not with the width of texts that stands there: any number does
        self.classes_ = np.array(state["classes"], np.str_ if dtype.kind == "U" else dtype)
        if dtype.kind not in "biufUO" or self.classes_.ndim != 1:
            raise ValueError(f"its classes are of type {dtype}")
