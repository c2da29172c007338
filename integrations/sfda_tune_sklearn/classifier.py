"""`BackboneClassifier`: from images to a classifier, with the backbone chosen on the way."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.metrics import accuracy_score
from sklearn.utils import check_array, check_consistent_length, check_random_state, column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted

import sfda_tune
from sfda_tune.data.dataset import ImageDataset
from sfda_tune.data.opening import open_dataset
from sfda_tune.finetuning.config import FinetuneConfig
from sfda_tune.finetuning.models import Model, load_model, predict, write_model
from sfda_tune.finetuning.run import finetune
from sfda_tune.values.features import Backbone
from sfda_tune.values.files import check, read_json, write_text
from sfda_tune.values.formats import CLASSIFIER
from sfda_tune.values.ranking import Ranking
from sfda_tune.values.text import json_text
from sfda_tune_sklearn.images import as_dataset, read_images

__all__ = ["BackboneClassifier"]

FORMAT = "sfda_tune_sklearn.classifier/1"


class BackboneClassifier(ClassifierMixin, BaseEstimator):
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

    def __init__(
        self,
        backbones: Any = "demo:*",
        *,
        finetune: bool = True,
        n_trials: int | None = None,
        time_budget: str | float | None = None,
        options: Mapping[str, Any] | None = None,
        image_shape: tuple[int, ...] | None = None,
        value_range: tuple[float, float] | None = None,
        device: str = "auto",
        precision: str = "float32",
        cache: Any = True,
        plugins: Any = (),
        random_state: Any = None,
    ) -> None:
        self.backbones = backbones
        self.finetune = finetune
        self.n_trials = n_trials
        self.time_budget = time_budget
        self.options = options
        self.image_shape = image_shape
        self.value_range = value_range
        self.device = device
        self.precision = precision
        self.cache = cache
        self.plugins = plugins
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None, groups: Any = None) -> BackboneClassifier:
        """Choose a backbone and train it.

        Parameters
        ----------
        X : images, see `sfda_tune_sklearn.images`; or labelled images
        y : sequence of labels, shape (n_images,)
            Left out where X is what `sfda_tune.open_dataset` opens: a folder with one sub-folder
            per class, a table, a data set by name. Of its own parts the training part is used,
            and by the fine-tuning also those for validation and test.
        groups : sequence of hashable, shape (n_images,), optional
            What images belong together (a patient, a video): scores leave out whole groups, and
            the search splits by them. Where y is left out, whatever `open_dataset` takes.
        """
        dataset = self._label(X, y, groups)
        candidates = sfda_tune.resolve_backbones(self.backbones, plugins=self.plugins)
        how = {
            "device": self.device,
            "precision": self.precision,
            "cache": self.cache,
            "seed": int(check_random_state(self.random_state).randint(2**31 - 1)),
            **(self.options or {}),
        }
        train = self._search if self.finetune else self._probe
        has_parts = self.finetune and y is None and isinstance(X, str | os.PathLike)
        if has_parts and groups is not None:
            how["groups"] = groups
        name, model = train(X if has_parts else dataset, candidates, how)
        self._backbone = next(b for b in candidates if b.name == name)
        self.backbone_, self.model_ = name, model
        return self

    def _search(
        self, dataset: Any, candidates: list[Backbone], how: dict[str, Any]
    ) -> tuple[str, Model]:
        from sfda_tune.pipelines.search import search

        with tempfile.TemporaryDirectory() as folder:
            limits = {"trials": self.n_trials, "budget": self.time_budget, "out": folder}
            found = search(dataset, candidates, **{**limits, "plugins": self.plugins, **how})
            self.result_, self.ranking_ = found, found.ranking
            name = found.best["backbone"]
            backbone = next(b for b in candidates if b.name == name)
            own = backbone if backbone.load else None
            return name, load_model(found.folder / "model", backbone=own, plugins=self.plugins)

    def _probe(
        self, dataset: Any, candidates: list[Backbone], how: dict[str, Any]
    ) -> tuple[str, Model]:
        self.result_, self.ranking_ = None, sfda_tune.rank(dataset, candidates, **how)
        best = self.ranking_.shortlist(1)
        if not best:
            raise ValueError(f"every backbone of `backbones` failed: {self.ranking_.failed}")
        backbone = next(b for b in candidates if b.name == best[0])
        config = FinetuneConfig(epochs=0, precision=self.precision, seed=how["seed"])
        # The images for validation only describe the result, so none are held out for that.
        with finetune(backbone, dataset, config, val=dataset, device=self.device) as run:
            next(run)
            return best[0], run.model()

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return probabilities, float64 of shape (n_images, n_classes), in the order of X."""
        check_is_fitted(self)
        images = as_dataset(read_images(self, X, fit=False))
        p = predict(self.model_, images, device=self.device, precision=self.precision)
        bad = np.flatnonzero(np.isnan(p).any(axis=1))
        if len(bad):
            raise ValueError(
                f"`X` must hold readable images but {len(bad)} cannot be read, the first in row "
                f"{bad[0]} ({images.item_name(int(bad[0]))}); leave them out."
            )
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

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the fitted classifier to a folder, and return it; nothing is pickled.

        ``model/`` is a timm checkpoint, which ``timm.create_model("local-dir:…/model")`` and
        `sfda_tune.finetuning.models.load_model` open; ``ranking.json`` and ``classifier.json`` are
        text.

        Raises
        ------
        ValueError
            If a parameter or a class is neither number nor text, such as a network of your own.
        """
        check_is_fitted(self)
        state = {
            "format": FORMAT,
            "version": sfda_tune.__version__,
            "params": self.get_params(deep=False),
            "classes": self.classes_.tolist(),
            "dtype": self.classes_.dtype.str,
            "backbone": self.backbone_,
            "fitted": {name: getattr(self, name) for name in _FITTED if hasattr(self, name)},
        }
        try:
            text = json_text(state, default=os.fspath)
        except TypeError as error:
            raise ValueError(
                "`save` needs parameters and classes that are numbers or text, and backbones that "
                f"are named, but: {error}."
            ) from error
        folder = Path(folder)
        (folder / "model").mkdir(parents=True, exist_ok=True)
        write_model(self._backbone, self.model_, folder / "model")
        self.ranking_.to_json(folder / "ranking.json")
        write_text(folder / "classifier.json", text + "\n")
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, plugins: Any = ()) -> BackboneClassifier:
        """Open what `save` wrote.

        Parameters
        ----------
        folder : str or path
        plugins : iterable of str
            Files or modules that register the architecture, where timm lacks it. Those that were
            saved are not run: opening a model must not run code that came with it.

        Raises
        ------
        ValueError
            If the folder holds no classifier.
        """
        folder = Path(folder)
        try:
            state = read_json(folder / "classifier.json", {str: object})
        except FileNotFoundError:
            state = {}
        if state.get("format") != FORMAT:
            raise ValueError(
                f"`folder` must be written by BackboneClassifier.save but {str(folder)!r} is not; "
                "open other models with `sfda_tune.finetuning.models.load_model`."
            )
        try:
            check(state, CLASSIFIER)
            params = {**state["params"], "plugins": tuple(plugins)}
            arguments: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in params.items()}
            self = cls(**arguments)
            for name in _FITTED:
                if name in state["fitted"]:
                    value = state["fitted"][name]
                    setattr(self, name, tuple(value) if isinstance(value, list) else value)
            dtype = np.dtype(state["dtype"])
            # not with the width of texts that stands there: any number does
            self.classes_ = np.array(state["classes"], np.str_ if dtype.kind == "U" else dtype)
            if dtype.kind not in "biufUO" or self.classes_.ndim != 1:
                raise ValueError(f"its classes are of type {dtype}")
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(
                f"{str(folder / 'classifier.json')!r} must be as BackboneClassifier.save wrote "
                f"it, but {error}."
            ) from error
        self.ranking_ = Ranking.from_json(folder / "ranking.json")
        self.model_ = load_model(folder / "model", plugins=plugins)
        spec = f"local-dir:{folder.absolute() / 'model'}"
        self._backbone = Backbone(state["backbone"], spec, plugins=tuple(plugins))
        self.backbone_, self.result_ = state["backbone"], None
        return self

    def _label(self, X: Any, y: Any, groups: Any = None) -> ImageDataset:
        """Check images and labels; learn the classes."""
        if y is None:
            if not isinstance(X, str | os.PathLike | ImageDataset):
                raise ValueError(
                    f"{type(self).__name__} requires y to be passed, but the target y is None; "
                    "only folders, tables and data sets have labels of their own."
                )
            dataset = open_dataset(X, groups=groups)
            dataset.require_classes("for a classifier")
            read_images(self, dataset, fit=True)
            self.classes_ = np.array(dataset.classes)
            return dataset
        items = read_images(self, X, fit=True)
        any_type: Any = None
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
        dataset = ImageDataset("X", items, codes, tuple(map(str, self.classes_)))
        return dataset if groups is None else open_dataset(dataset, groups=groups)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags


_FITTED = ("image_shape_", "value_range_", "n_features_in_")
