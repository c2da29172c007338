"""`BackboneFeatures`: images → features of one frozen backbone."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from sfda_tune.backbones import loading
from sfda_tune.backbones.specs import resolve_backbones
from sfda_tune.data.dataset import ImageDataset
from sfda_tune.extraction.run import extract
from sfda_tune.extraction.settings import Settings
from sfda_tune.extraction.store import open_cache
from sfda_tune.values.features import Backbone
from sfda_tune_sklearn.images import as_dataset, read_images

__all__ = ["BackboneFeatures"]


class BackboneFeatures(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Turn images into the features of a frozen backbone, for any model of scikit-learn.

    Nothing is trained: `fit` opens the backbone and notes how X is to be read. ``backbone`` can be
    tuned like any other parameter.

    Parameters
    ----------
    backbone : str, Backbone or mapping, default "demo:resnet_glyphs"
        One backbone, see `sfda_tune.backbones.specs`; a timm name such as "resnet50.a1_in1k" for
        photos.
    image_shape : tuple of int, optional
        Shape of an image where X has one row of numbers per image: (h, w), (h, w, c), or with one
        −1 as in `numpy.reshape`. Default: a grey or an RGB square, if the row fills one.
    value_range : (low, high), optional
        What is black and white in X, unless X is uint8. See `sfda_tune_sklearn.images`.
    device, precision, batch_size, workers
        See `sfda_tune.extraction.settings.Settings`.
    cache : bool or path, default True
        Where features are kept for the next time, see `sfda_tune.rank`.
    plugins : iterable of str
        Python files or modules that register further timm architectures.

    Attributes
    ----------
    backbone_ : str
        Name of the backbone.
    image_shape_, value_range_ : tuple or None
        How X is read; None where that needs no saying.
    n_features_in_ : int
        If X has one row of numbers per image.

    Raises
    ------
    ValueError
        If X cannot be read as images, or `backbone` names several.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklearn.pipeline import make_pipeline
    >>> X, y = load_digits(return_X_y=True)
    >>> model = make_pipeline(BackboneFeatures(cache=False), LogisticRegression(max_iter=1000))
    >>> model.fit(X[:200], y[:200]).score(X[200:400], y[200:400]) > 0.85
    True
    """

    def __init__(
        self,
        backbone: Any = "demo:resnet_glyphs",
        *,
        image_shape: tuple[int, ...] | None = None,
        value_range: tuple[float, float] | None = None,
        device: str = "auto",
        precision: str = "float32",
        batch_size: int | None = None,
        workers: int | None = None,
        cache: Any = True,
        plugins: Any = (),
    ) -> None:
        self.backbone = backbone
        self.image_shape = image_shape
        self.value_range = value_range
        self.device = device
        self.precision = precision
        self.batch_size = batch_size
        self.workers = workers
        self.cache = cache
        self.plugins = plugins

    def fit(self, X: Any, y: Any = None) -> BackboneFeatures:
        """Open the backbone and note how X is to be read; `y` is ignored."""
        items = read_images(self, X, fit=True)
        backbone = self._open()
        n_dims = loading.describe(backbone).n_dims
        if n_dims is None:  # a network of the user's own
            n_dims = self._extract(as_dataset(items[:1], X)).shape[1]
        self.backbone_, self._n_features_out = backbone.name, n_dims
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Return the features, float32 of shape (n_images, n_dims), in the order of X."""
        check_is_fitted(self)
        x = self._extract(as_dataset(read_images(self, X, fit=False), X))
        if x.shape[1] != self._n_features_out:
            raise ValueError(
                f"`backbone` must give {self._n_features_out} features, as in fit, but gives "
                f"{x.shape[1]}; fit again."
            )
        return x

    def _open(self) -> Backbone:
        found = resolve_backbones(self.backbone, plugins=self.plugins)
        if len(found) > 1:
            names = ", ".join(b.name for b in found[:3])
            raise ValueError(
                f"`backbone` must name one backbone but {self.backbone!r} names {len(found)} "
                f"({names}, …); `BackboneClassifier` chooses among several."
            )
        return found[0]

    def _extract(self, images: ImageDataset) -> np.ndarray:
        # One row per image is promised, so an unreadable image is an error here.
        settings = Settings(self.device, self.precision, self.batch_size, self.workers, 0.0)
        store = open_cache(self.cache)
        (extraction,) = extract(images, [self._open()], settings, store=store)
        if extraction.features is None:
            raise ValueError(f"{extraction.backbone.name}: {extraction.error}")
        return np.array(extraction.features.x)  # that of the extraction is read-only

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags
