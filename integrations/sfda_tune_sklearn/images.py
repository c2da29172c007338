"""What scikit-learn calls X → the items of an `ImageDataset`.

==============================  ===============================================================
X                               images
==============================  ===============================================================
(n, h, w), (n, h, w, c)         as they are; c is 1 (grey), 3 (RGB), 4 (RGB and alpha), or any
                                other number of bands, to which networks are adapted
(n, d), also a data frame       rows reshaped to `image_shape`; None: grey or RGB squares
list, 1-d array, one column     paths, encoded bytes, PIL images, or arrays (h, w[, c])
str or path                     a folder: all images below it, in order; or an `open_dataset`
`ImageDataset`                  its images
==============================  ===============================================================

Pixels of uint8 are taken as they are, True is white. Other numbers are mapped linearly from
`value_range` to 0 … 255 and clipped; by default from 0 … 1 if `fit` saw nothing but such floating
point numbers, else from the smallest and largest number that it saw.
"""

from __future__ import annotations

import math
import os
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from sklearn.utils.validation import check_array, validate_data

from sfda_tune.data.dataset import ImageDataset
from sfda_tune.data.folders import image_files
from sfda_tune.data.formats import Reading
from sfda_tune.data.opening import open_dataset

__all__ = ["as_dataset", "read_images"]

COLOURS = (1, 3, 4)
ITEMS = (str, os.PathLike, bytes, Image.Image)


def as_dataset(
    items: Any,
    X: Any,
    labels: np.ndarray | None = None,
    classes: tuple[str, ...] = ("",),
    reading: Reading | None = None,
) -> ImageDataset:
    """Give the items of X, and labels where they matter, to the functions of the core.

    They are read as X says, if it is an `ImageDataset`; arrays by the number of their channels;
    files as `reading` says.
    """
    if isinstance(X, ImageDataset):
        reading = X.reading
    elif any(isinstance(item, np.ndarray) for item in items):
        reading = _find_reading(items)
    labels = np.zeros(len(items), np.int64) if labels is None else labels
    return ImageDataset("X", items, labels, classes, reading=reading)


def _find_reading(items: Any) -> Reading | None:
    """Return that all bands are used, where there are others than grey, RGB or RGB and alpha."""
    found = {i.shape[2] if i.ndim == 3 else 1 for i in items if isinstance(i, np.ndarray)}
    others = found - set(COLOURS)
    if not others:
        return None
    n = min(others)
    if len(found) > 1 or not all(isinstance(item, np.ndarray) for item in items):
        raise ValueError(
            f"`X` must hold nothing but arrays of {n} channels, if one has so many, but holds "
            "other images, too; leave them out."
        )
    return Reading(bands=tuple(range(1, n + 1)), of=n)


def read_images(estimator: Any, X: Any, *, fit: bool) -> Any:
    """Check X as scikit-learn does and return items of an `ImageDataset`.

    With `fit` the estimator learns ``image_shape_`` and ``value_range_`` (None: not needed), and
    of a table what scikit-learn's estimators learn (``n_features_in_``); else these are checked.

    Raises
    ------
    ValueError
        If X is empty, has the wrong shape or holds NaN, or other numbers than in `fit`.
    """
    if fit:
        estimator.image_shape_ = None
    items = _find_items(X)
    if items is None:
        items = _read_numbers(estimator, X, fit)
    if fit:
        arrays = [item for item in items if isinstance(item, np.ndarray)]
        estimator.value_range_ = _find_range(estimator.value_range, arrays)
    scale = partial(_to_pixels, value_range=estimator.value_range_)
    if isinstance(items, np.ndarray):
        return scale(items)
    return [scale(item) if isinstance(item, np.ndarray) else item for item in items]


def _find_items(X: Any) -> Any:
    """Return images one by one; None if X is an array of numbers."""
    if isinstance(X, ImageDataset):
        return X.items
    if isinstance(X, str | os.PathLike):
        if os.path.isdir(X):
            items = list(image_files(X))
        else:  # whatever the labels are: they do not matter here
            items = open_dataset(X, task="classification").items
        if not len(items):
            raise ValueError(f"`X` must hold images but there are none below {os.fspath(X)!r}.")
        return [os.fspath(item) if isinstance(item, os.PathLike) else item for item in items]
    if hasattr(X, "iloc") or isinstance(X, np.ndarray):
        values = np.asarray(X)
        if values.dtype.kind not in "OUT":
            return None
        # a data frame of one column is what a ColumnTransformer may give
        X = list(values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values)
    if not isinstance(X, list | tuple) or not X:
        return None
    if not all(isinstance(x, ITEMS) or getattr(x, "ndim", 0) in (2, 3) for x in X):
        return None
    return [
        os.fspath(x) if isinstance(x, os.PathLike) else x if isinstance(x, ITEMS) else _check(x)
        for x in X
    ]


def _check(image: Any) -> np.ndarray:
    return _check_all(np.asarray(image)[None])[0]


def _check_all(images: Any) -> np.ndarray:
    images = check_array(images, allow_nd=True, dtype="numeric")
    if images.ndim in (3, 4) and not _has_channels_first(images.shape):
        return images
    raise ValueError(
        f"`X` must have shape (n, h, w) or (n, h, w, c) but has {images.shape}; the channels come "
        "last."
    )


def _has_channels_first(shape: tuple[int, ...]) -> bool:
    return len(shape) == 4 and shape[3] not in COLOURS and shape[1] < min(shape[2:])


def _read_numbers(estimator: Any, X: Any, fit: bool) -> np.ndarray:
    if (X.ndim if hasattr(X, "ndim") else np.asarray(X).ndim) > 2:
        return _check_all(X)
    rows: Any = validate_data(estimator, X, reset=fit, dtype="numeric")
    if fit:
        estimator.image_shape_ = _find_shape(estimator.image_shape, rows.shape[1])
    if estimator.image_shape_ is None:
        raise ValueError(
            f"`X` must hold images, as in fit, but has shape {rows.shape}; pass (n, h, w[, c])."
        )
    return rows.reshape(len(rows), *estimator.image_shape_)


def _find_shape(given: Any, d: int) -> tuple[int, ...]:
    side, rgb_side = math.isqrt(d), math.isqrt(d // 3)
    if given is None and side * side == d:
        return side, side
    if given is None and 3 * rgb_side * rgb_side == d:
        return rgb_side, rgb_side, 3
    if given is None:
        raise ValueError(
            f"`image_shape` must be given for rows of {d} values, which fill no square; pass "
            "(h, w), (h, w, 3), or (1, -1) for one line of pixels, or images as (n, h, w[, c])."
        )
    try:
        return np.empty(d, np.uint8).reshape(given).shape
    except (TypeError, ValueError):
        raise ValueError(
            f"`image_shape` must hold the {d} values of a row of `X` but is {given!r}."
        ) from None


def _find_range(given: Any, arrays: list[np.ndarray]) -> tuple[float, float] | None:
    if given is not None:
        low, high = map(float, given)
        if not low < high:
            raise ValueError(f"`value_range` must be (low, high), low < high, but is {given!r}.")
        return low, high
    numbers = [a for a in arrays if not _is_ready(a)]
    if not numbers:
        return None
    low, high = float(min(a.min() for a in numbers)), float(max(a.max() for a in numbers))
    unit = low >= 0 and high <= 1 and all(a.dtype.kind == "f" for a in numbers)
    return (0.0, 1.0) if unit else (low, high)


def _is_ready(pixels: np.ndarray) -> bool:
    return pixels.dtype == np.uint8 or pixels.dtype.kind == "b"


def _to_pixels(numbers: np.ndarray, value_range: tuple[float, float] | None) -> np.ndarray:
    if _is_ready(numbers):
        return numbers if numbers.dtype == np.uint8 else numbers * np.uint8(255)
    if value_range is None:
        raise ValueError(
            f"`X` must be uint8, as in fit, but is {numbers.dtype}; convert it, or pass "
            "`value_range=(low, high)` to the estimator."
        )
    low, high = value_range
    scale = 255 / (high - low) if high > low else 0.0
    return np.rint(((numbers - low) * scale).clip(0, 255)).astype(np.uint8)
