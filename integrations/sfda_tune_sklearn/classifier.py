"""`BackboneClassifier`: from images to a classifier, with the backbone chosen on the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from scipy.sparse import issparse
from sklearn.base import ClassifierMixin
from sklearn.metrics import accuracy_score
from sklearn.utils import check_array, check_consistent_length, column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted

from sfda_tune.data.dataset import ImageDataset
from sfda_tune.data.opening import open_dataset
from sfda_tune.data.splits import match_labels
from sfda_tune.finetuning.tasks import Multilabel
from sfda_tune.values.formats import CLASSIFIER
from sfda_tune.values.labels import as_indicators, find_varied
from sfda_tune_sklearn.estimator import BackboneEstimator
from sfda_tune_sklearn.images import as_dataset, read_images

__all__ = ["BackboneClassifier"]


class BackboneClassifier(ClassifierMixin, BackboneEstimator):
    """Classify images with the backbone that suits them best.

    `fit` ranks the backbones by their scores. Then it tunes and fine-tunes the best ones
    (`sfda_tune.search`), or with ``finetune=False`` only trains logistic regression, its penalty
    chosen by cross-validation, on the features of the first: seconds instead of minutes.

    With several labels per image y is an indicator matrix, (n_images, n_labels): 1, 0, or NaN
    where it is not known. Each label has a threshold, from which probability on it is named: the
    one with the highest F1 on images that the head was not trained on (without ``finetune`` a
    fifth of them, held out for that alone; .5 where they are too few).

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
        Of several labels what the columns are called: the names of a data frame or data set, else
        0 … n_labels − 1.
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
        If X cannot be read as images, if there is a single class (of several labels: none that two
        images have and two do not), or if every backbone failed.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> X, y = load_digits(return_X_y=True)
    >>> model = BackboneClassifier("demo:*glyphs", finetune=False, cache=False)
    >>> model.fit(X[:200], y[:200]).score(X[200:400], y[200:400]) > 0.8
    True
    >>> odd_and_large = np.stack([y % 2, y > 4], axis=1)
    >>> model.fit(X[:200], odd_and_large[:200]).predict(X[200:400]).shape
    (200, 2)
    """

    _kind: ClassVar[str] = "classifier"
    _task: ClassVar[str | None] = None
    _state: ClassVar[dict[Any, Any]] = CLASSIFIER

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return probabilities, float64 of shape (n_images, n_classes), in the order of X.

        Of several labels each is by itself, so that rows do not add up to one.
        """
        p = self._predict(X)
        if isinstance(self.model_.task, Multilabel):
            return p
        return p[:, [self.model_.classes.index(str(c)) for c in self.classes_]]

    def predict(self, X: Any) -> np.ndarray:
        """Return the most probable class of each image; of several labels 0 or 1 for each."""
        p = self.predict_proba(X)
        if isinstance(self.model_.task, Multilabel):
            return self.model_.task.decide(p).astype(np.int64)
        return self.classes_[p.argmax(axis=1)]

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Return the accuracy; `y` may be left out where it may be in `fit`.

        Of several labels it is the share of images with all of them right (subset accuracy), among
        those of which all are known.
        """
        check_is_fitted(self)
        if isinstance(self.model_.task, Multilabel):
            return self._score_labels(X, y, sample_weight)
        if y is None:
            dataset = open_dataset(X)
            X, y = dataset, np.array(dataset.classes)[dataset.labels]
        return float(accuracy_score(y, self.predict(X), sample_weight=sample_weight))

    def _score_labels(self, X: Any, y: Any, sample_weight: Any) -> float:
        if y is None:
            X = open_dataset(X)
            if X.task != "multilabel":
                raise ValueError(f"`X` must have several labels per image but is {X!r}.")
            y = match_labels(X, self.model_.classes)
        labels = _read_indicators(y)
        known = (labels >= 0).all(axis=1)
        if not known.any():
            raise ValueError("`y` must have a row in which all labels are known but has none.")
        weight = None if sample_weight is None else np.asarray(sample_weight)[known]
        predicted = self.predict(X)
        check_consistent_length(labels, predicted)
        return float(accuracy_score(labels[known], predicted[known], sample_weight=weight))

    def _label(self, X: Any, y: Any, groups: Any = None) -> ImageDataset:
        """Check images and labels; learn the classes."""
        if y is None:
            dataset = self._open(X, groups)
            if dataset.task != "multilabel":
                dataset.require_classes("for a classifier")
            read_images(self, dataset, fit=True)
            self.classes_ = np.array(dataset.classes)
            return dataset
        items = read_images(self, X, fit=True)
        any_type: Any = None
        given = check_array(
            y, accept_sparse=True, ensure_2d=False, ensure_all_finite=False, dtype=any_type,
            input_name="y",
        )  # fmt: skip
        if np.ndim(given) == 2 and np.shape(given)[1] > 1:
            labels = _read_indicators(given)
            check_consistent_length(items, labels)
            if not find_varied(labels, 2).any():
                raise ValueError(
                    "`y` must have a label that two images have and two do not, to choose a "
                    f"backbone by, but of {labels.shape[1]} none is such."
                )
            self.classes_ = np.array(getattr(y, "columns", np.arange(labels.shape[1])))
            names = tuple(map(str, self.classes_))
            dataset = as_dataset(items, X, labels, names)
            return dataset if groups is None else open_dataset(dataset, groups=groups)
        y = check_array(y, ensure_2d=False, dtype=any_type, input_name="y")
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        check_consistent_length(items, y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                "`y` must hold two classes or more to choose a backbone but holds one class, "
                f"{self.classes_[0]!r}."
            )
        dataset = as_dataset(items, X, codes, tuple(map(str, self.classes_)))
        return dataset if groups is None else open_dataset(dataset, groups=groups)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags

    def _describe(self) -> dict[str, Any]:
        return {"classes": self.classes_.tolist(), "dtype": self.classes_.dtype.str}

    def _restore(self, state: Mapping[str, Any]) -> None:
        dtype = np.dtype(state["dtype"])
        # not with the width of texts that stands there: any number does
        self.classes_ = np.array(state["classes"], np.str_ if dtype.kind == "U" else dtype)
        if dtype.kind not in "biufUO" or self.classes_.ndim != 1:
            raise ValueError(f"its classes are of type {dtype}")


def _read_indicators(y: Any) -> np.ndarray:
    """Return an indicator matrix as int8: 1, 0, or −1 where a label is not known."""
    try:
        return as_indicators(y.toarray() if issparse(y) else y)
    except ValueError as error:
        raise ValueError(str(error).replace("`labels`", "`y`")) from None
