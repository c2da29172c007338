"""What `BackboneClassifier` and `BackboneRegressor` have in common."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

import sfda_tune
from sfda_tune.data.dataset import ImageDataset
from sfda_tune.data.opening import open_dataset
from sfda_tune.finetuning.config import FinetuneConfig
from sfda_tune.finetuning.models import Model, load_model, predict, read_reading, write_model
from sfda_tune.finetuning.run import finetune
from sfda_tune.values.features import Backbone
from sfda_tune.values.files import check, read_json, write_text
from sfda_tune.values.ranking import Ranking
from sfda_tune.values.text import as_tuple, json_text
from sfda_tune_sklearn.images import as_dataset, read_images

__all__ = ["BackboneEstimator"]

_FITTED = ("image_shape_", "value_range_", "n_features_in_")


class BackboneEstimator(BaseEstimator):
    """Chooses a backbone and trains it; a subclass says what labels are."""

    _kind: ClassVar[str]  # names the file of `save`
    _task: ClassVar[str | None]  # that of `sfda_tune.search`
    _state: ClassVar[dict[Any, Any]]  # what `save` writes, see `values.formats`

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

    def fit(self, X: Any, y: Any = None, groups: Any = None) -> Any:
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
            found = search(
                dataset, candidates,
                **{**limits, "plugins": self.plugins, "task": self._task, **how},
            )  # fmt: skip
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
            model = run.model()
        if dataset.task == "multilabel":
            model = _decide_by(model, self._find_thresholds(backbone, dataset, config))
        return best[0], model

    def _find_thresholds(
        self, backbone: Backbone, dataset: ImageDataset, config: FinetuneConfig
    ) -> tuple[float, ...]:
        """Choose thresholds on held-out images; none where these are too few."""
        try:
            with finetune(backbone, dataset, config, device=self.device) as run:
                return next(run).thresholds
        except ValueError:  # no label has images on both sides
            return ()

    def _label(self, X: Any, y: Any, groups: Any = None) -> ImageDataset:
        """Check images and labels; learn what labels are."""
        raise NotImplementedError

    def _open(self, X: Any, groups: Any) -> ImageDataset:
        """Open images that have labels of their own."""
        if not isinstance(X, str | os.PathLike | ImageDataset):
            raise ValueError(
                f"{type(self).__name__} requires y to be passed, but the target y is None; "
                "only folders, tables and data sets have labels of their own."
            )
        task = None if isinstance(X, ImageDataset) else self._task
        dataset = open_dataset(X, groups=groups, task=task)
        if dataset.task != self._task and self._task is not None:
            raise ValueError(
                f"`X` must have numbers to predict but is {dataset!r}; `BackboneClassifier` takes "
                "classes."
            )
        return dataset

    def _predict(self, X: Any) -> np.ndarray:
        """Return what the network predicts, float64, in the order of X."""
        check_is_fitted(self)
        items = read_images(self, X, fit=False)
        images = as_dataset(items, X, reading=read_reading(self.model_.provenance))
        p = predict(self.model_, images, device=self.device, precision=self.precision)
        bad = np.flatnonzero(np.isnan(p.reshape(len(p), -1)).any(axis=1))
        if len(bad):
            raise ValueError(
                f"`X` must hold readable images but {len(bad)} cannot be read, the first in row "
                f"{bad[0]} ({images.item_name(int(bad[0]))}); leave them out."
            )
        return p

    def _describe(self) -> dict[str, Any]:
        """Return what `_restore` needs, as JSON values."""
        return {}

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Take what `_describe` gave."""

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the fitted estimator to a folder, and return it; nothing is pickled.

        ``model/`` is a timm checkpoint, which ``timm.create_model("local-dir:…/model")`` and
        `sfda_tune.finetuning.models.load_model` open; ``ranking.json`` and ``classifier.json`` (or
        ``regressor.json``) are text.

        Raises
        ------
        ValueError
            If a parameter or a class is neither number nor text, such as a network of your own.
        """
        check_is_fitted(self)
        state = {
            "format": f"sfda_tune_sklearn.{self._kind}/1",
            "version": sfda_tune.__version__,
            "params": self.get_params(deep=False),
            **self._describe(),
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
        write_text(folder / f"{self._kind}.json", text + "\n")
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, plugins: Any = ()) -> Self:
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
            If the folder holds no such estimator.
        """
        folder = Path(folder)
        file = folder / f"{cls._kind}.json"
        plugins = as_tuple("plugins", plugins)
        try:
            state = read_json(file, {str: object})
        except FileNotFoundError:
            state = {}
        if state.get("format") != f"sfda_tune_sklearn.{cls._kind}/1":
            raise ValueError(
                f"`folder` must be written by {cls.__name__}.save but {str(folder)!r} is not; "
                "open other models with `sfda_tune.finetuning.models.load_model`."
            )
        try:
            check(state, cls._state)
            params = {**state["params"], "plugins": plugins}
            arguments: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in params.items()}
            self = cls(**arguments)
            for name in _FITTED:
                if name in state["fitted"]:
                    value = state["fitted"][name]
                    setattr(self, name, tuple(value) if isinstance(value, list) else value)
            self._restore(state)
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(
                f"{str(file)!r} must be as {cls.__name__}.save wrote it, but {error}."
            ) from error
        self.ranking_ = Ranking.from_json(folder / "ranking.json")
        self.model_ = load_model(folder / "model", plugins=plugins)
        spec = f"local-dir:{folder.absolute() / 'model'}"
        self._backbone = Backbone(state["backbone"], spec, plugins=plugins)
        self.backbone_, self.result_ = state["backbone"], None
        return self

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags


def _decide_by(model: Model, thresholds: tuple[float, ...]) -> Model:
    """Return a model that names labels from these thresholds on."""
    task = model.task.decide_by(thresholds)
    about = {"name": task.name, **task.describe()}
    return replace(model, task=task, provenance={**model.provenance, "task": about})
