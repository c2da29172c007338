"""Images in memory: arrays and lists of images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np
from PIL import Image

from sfda_tune.data.checks import DatasetError, absolute, check_some_exist
from sfda_tune.data.dataset import ImageDataset
from sfda_tune.data.formats import Reading, choose_bands, deep_to_uint8
from sfda_tune.data.labels import encode
from sfda_tune.data.several import check_labels, encode_rows
from sfda_tune.values.text import some

_CHANNELS = (1, 3, 4)


def _as_array(value: Any, ndim: int, reading: Reading | None = None) -> Any:
    """Turn a tensor into an array, channels last; leave anything else as it is."""
    if not hasattr(value, "detach"):
        return value
    value = value.detach().cpu()
    array = (value.float() if value.is_floating_point() else value).numpy()  # bfloat16 has none
    any_number = reading is not None and reading.bands is not None
    channels_first = array.ndim == ndim and (any_number or array.shape[-3] in _CHANNELS)
    return np.moveaxis(array, -3, -1) if channels_first else array


def _pixels(array: np.ndarray, what: str, reading: Reading | None = None) -> np.ndarray:
    """One image as uint8 array ``(h, w)`` or ``(h, w, c)``."""
    reading = reading or Reading()
    try:
        if reading.bands is not None:
            array = choose_bands(array, reading)
        if array.dtype == np.uint16 and array.ndim in (2, 3) and array.size:
            array = deep_to_uint8(array, reading.bit_depth)
    except ValueError as error:
        raise DatasetError(f"{what} {error}.") from None
    known = (array.shape[-1],) if reading.bands is not None else _CHANNELS
    shape_is_known = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in known)
    if array.size == 0 or not shape_is_known:
        axes = array.ndim == 3 and array.shape[0] in _CHANNELS
        raise DatasetError(
            f"{what} must have shape (h, w) or (h, w, c) with c = 1, 3 or 4 but has "
            f"{array.shape}; "
            + (
                "channels come last: np.moveaxis(image, 0, -1)."
                if axes
                else "reshape it, or choose three of its bands: bands=(4, 3, 2), or bands='all'."
            )
        )
    if array.dtype == np.uint8:
        return array
    kind, low, high = array.dtype.kind, array.min(), array.max()
    if kind == "b":
        return array * np.uint8(255)
    if kind == "f" and -1e-5 <= low <= high <= 1 + 1e-5:  # rounding of a resize
        return np.rint(np.clip(array.astype(np.float32), 0, 1) * 255).astype(np.uint8)
    if kind == "f" and not 0 <= low <= high <= 255:
        advice = "remove the normalisation (transform): each backbone applies its own"
    else:
        advice = "if they are 0 … 255, use .astype(np.uint8)"
    raise DatasetError(
        f"{what} must be uint8, uint16, bool or floating point in [0, 1] but is {array.dtype} "
        f"from {low} to {high}; {advice}."
    )


def as_item(value: Any, what: str, reading: Reading | None = None) -> Any:
    """Turn an image in memory into an item."""
    if isinstance(value, bytes | Image.Image):
        return value
    value = _as_array(value, 3, reading)
    if isinstance(value, np.ndarray):
        return _pixels(value, what, reading)
    raise DatasetError(
        f"{what} must be an array, a tensor, a PIL image, a path or the bytes of an image file "
        f"but is {type(value).__name__}."
    )


def open_arrays(
    images: Any,
    labels: Any = None,
    least: int = 2,
    name: str = "arrays",
    task: str | None = None,
    reading: Reading | None = None,
) -> ImageDataset:
    """Open images in memory, and their labels."""
    if labels is None and isinstance(images, Mapping):
        if set(images) != {"images", "labels"}:
            raise DatasetError(
                "`spec`, if a dict, must have the keys 'images' and 'labels' but has "
                f"{some(map(repr, images))}."
            )
        images, labels = images["images"], images["labels"]
    if labels is None and isinstance(images, tuple) and len(images) == 2:
        images, labels = images
    if labels is None:
        raise DatasetError(
            "`labels` must be given with images in a list or array: "
            "open_dataset((images, labels)) or open_dataset(images, labels=labels)."
        )
    images = _as_array(images, 4, reading)
    for what, given in (("`images`", images), ("`labels`", labels)):
        if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
            kind = type(given).__name__
            raise DatasetError(
                f"{what} must be a sequence with one element per image but is {kind}."
            )
    if isinstance(images, np.ndarray) and images.dtype.kind not in "OSU":
        pixels = [_pixels(image, f"`images[{n}]`", reading) for n, image in enumerate(images)]
        as_is = images.dtype == np.uint8 and (reading is None or reading.bands is None)
        items: Any = images if as_is else np.array(pixels)
    else:
        items = [
            absolute(x)
            if isinstance(x, str | os.PathLike)
            else as_item(x, f"`images[{n}]`", reading)
            for n, x in enumerate(images)
        ]
        check_some_exist(items, os.getcwd(), "`images`")
    if task == "multilabel":
        several = encode_rows(labels, "`labels`")
        _check_lengths(items, several[0])
        return ImageDataset(name, items, *check_labels(several, least, "`labels`"))
    tolist = getattr(labels, "tolist", None)  # arrays, tensors, pandas
    values: Any = tolist() if tolist else list(labels)
    _check_lengths(items, values)
    return ImageDataset(name, items, *encode(values, "`labels`", least=least, task=task))


def _check_lengths(items: Any, labels: Any) -> None:
    if len(items) != len(labels):
        raise DatasetError(
            f"`labels` must have one label per image, but there are {len(items)} images and "
            f"{len(labels)} labels."
        )


def open_digits(spec: str, task: str | None = None) -> ImageDataset:
    """Open scikit-learn's handwritten digits; as several labels, the four bits of each."""
    from sklearn.datasets import load_digits

    digits = cast("Any", load_digits())
    # 17 grey levels, 0 … 16, spread evenly over 0 … 255
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    if task == "multilabel":
        bits = digits.target[:, None] >> np.arange(4) & 1
        names = tuple(f"bit {1 << k}" for k in range(4))
        return ImageDataset(spec, images, bits.astype(np.int8), names)
    return open_arrays(images, digits.target, name=spec, task=task)
