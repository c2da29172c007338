"""Labelled images in whatever form the user has them: `open_dataset(spec)` → `ImageDataset`.

==========================================  ==============================================
`spec`                                      images and labels
==========================================  ==============================================
an `ImageDataset`                           itself
``"digits"``                                scikit-learn's 1,797 handwritten digits
``"photos/"``                               folder ``photos/<class>/**/*.jpg``, or
                                            ``photos/{train,val,test}/<class>/**/*.jpg``
``"photos.csv"`` (.tsv, .parquet)           table of paths and labels
``"hf:NAME"``, ``"hf:NAME:CONFIG"``         Hugging Face data set, by name or local folder
a `datasets.Dataset` or `DatasetDict`       its Image and its ClassLabel column
a torchvision-style data set                ``len(d)``, ``d[i]`` → (image, label)
``(images, labels)``                        arrays, or a list of arrays, images, paths, bytes;
                                            also ``{"images": …, "labels": …}``
==========================================  ==============================================

`to_rgb` turns every kind of image into 8-bit RGB:

====================================  ====================================================
RGB, grey, 1-bit, palette, CMYK,      exactly Pillow's ``convert("RGB")``, like the loaders of
YCbCr, HSV, LAB                       timm and torchvision
alpha, palette with transparency      laid over white: `convert` would show the arbitrary
                                      colours that lie below transparent pixels
16-bit grey, 32-bit integers          v / 257 (0 … 65535 → 0 … 255): `convert` would clip
floating point                        times 255 if all ≤ 1, as is if all ≤ 255, else v / 257
EXIF orientation                      applied
several frames                        the first
====================================  ====================================================

Importing this module needs numpy and Pillow only; whatever else a form needs is imported by it.
"""

from __future__ import annotations

import copy
import csv
import difflib
import hashlib
import importlib
import io
import itertools
import json
import logging
import math
import numbers
import os
import re
import stat
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any, NamedTuple, cast

import numpy as np
from PIL import Image, UnidentifiedImageError

__all__ = [
    "UNREADABLE",
    "DatasetError",
    "ImageDataset",
    "UnreadableImage",
    "open_dataset",
    "to_rgb",
]

logger = logging.getLogger(__name__)

UNREADABLE = "unreadable"
"""`ImageDataset.digest` of an image that cannot be read."""

# HEIC is listed although Pillow needs the plug-in pillow-heif for it: photos that are reported as
# unreadable are better than photos that silently do not take part.
EXTENSIONS = frozenset(
    {".apng", ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg"}
    | {".jpg", ".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"}
)
IMAGE_COLUMNS = ("path", "image", "file", "filename", "filepath", "image_path", "file_name")
LABEL_COLUMNS = ("label", "class", "target", "category", "y")

_SPLITS = (("train",), ("val", "valid", "validation"), ("test",))  # names of one split
_SPLIT_NAMES = {name for names in _SPLITS for name in names}
_JUNK = {"__MACOSX", "@eaDir"}  # archives of macOS, thumbnails of Synology
_CHANNELS = (1, 3, 4)
_ORIENTATION = 0x0112  # EXIF tag; its values 2 … 8 and how to undo them
_TRANSPOSE = dict(
    enumerate(
        (
            Image.Transpose.FLIP_LEFT_RIGHT,
            Image.Transpose.ROTATE_180,
            Image.Transpose.FLIP_TOP_BOTTOM,
            Image.Transpose.TRANSPOSE,
            Image.Transpose.ROTATE_270,
            Image.Transpose.TRANSVERSE,
            Image.Transpose.ROTATE_90,
        ),
        start=2,
    )
)
_FORMS = (
    "'digits'; a folder with one sub-folder per class (or train/ and val/ with such sub-folders); "
    "a .csv, .tsv or .parquet table of paths and labels; 'hf:NAME' or 'hf:NAME:CONFIG'; a Hugging "
    "Face Dataset; a torchvision-style data set; arrays or lists (images, labels); "
    "an ImageDataset"
)


class DatasetError(ValueError):
    """The images or labels cannot be used as they are; the message says what to do."""


class UnreadableImage(Exception):  # noqa: N818 - a fact about one image, which a sweep survives
    """One image is missing, damaged, or no image.

    Parameters
    ----------
    name : str
        The image, as `ImageDataset.item_name` has it.
    reason : str
        What is wrong with it, on one line.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


# --------------------------------------------------------------------------- the data set


@dataclass(frozen=True, eq=False, repr=False)
class ImageDataset:
    """Labelled images, decoded one at a time. Made by `open_dataset`.

    Can be pickled (by `spawn` too): a folder travels as its paths, arrays as their pixels.

    Parameters
    ----------
    name : str
        Shown in the ranking.
    items : sequence of length n
        Per image a path, encoded bytes, a uint8 array ``(h, w)`` or ``(h, w, c)``, a
        `PIL.Image.Image`, or a handle into a larger object.
    labels : ndarray of int64, shape (n,)
        Position of the class in `classes`; kept as a read-only view.
    classes : tuple of str
        Class names; numbers in numerical, other names in natural order (``a2`` before ``a10``),
        so that nothing depends on the file system or on the order of the rows.
    origin : ndarray of int64, shape (n,), optional
        Row number of each image in what the user gave, for messages.

    Examples
    --------
    >>> images = np.zeros((6, 4, 5, 3), np.uint8)
    >>> data = open_dataset((images, ["dog", "cat"] * 3))
    >>> data
    ImageDataset('arrays', 6 images, 2 classes)
    >>> data.classes, data.labels.tolist()
    (('cat', 'dog'), [1, 0, 1, 0, 1, 0])
    >>> data.load(0).size, data.item_name(0)
    ((5, 4), 'row 0')
    """

    name: str
    items: Sequence[Any] | np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    origin: np.ndarray = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        labels = np.asarray(self.labels)
        if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != len(self.items):
            raise DatasetError(
                f"`labels` must be {len(self.items)} integers, one per image, but has shape "
                f"{labels.shape} and dtype {labels.dtype}; `open_dataset` encodes other labels."
            )
        if labels.size and not 0 <= labels.min() <= labels.max() < len(self.classes):
            raise DatasetError(
                f"`labels` must lie in 0 … {len(self.classes) - 1} (positions in `classes`) but "
                f"run from {labels.min()} to {labels.max()}."
            )
        origin = np.arange(len(labels)) if self.origin is None else np.asarray(self.origin)
        object.__setattr__(self, "labels", _read_only(labels.astype(np.int64, copy=False)))
        object.__setattr__(self, "classes", tuple(self.classes))
        object.__setattr__(self, "origin", _read_only(origin))

    def __repr__(self) -> str:
        return f"ImageDataset({self.name!r}, {len(self)} images, {len(self.classes)} classes)"

    def __len__(self) -> int:
        return len(self.items)

    def load(self, row: int) -> Image.Image:
        """Decode one image: first frame, upright, RGB, 8 bit. Threads may share the data set.

        Raises
        ------
        UnreadableImage
            If it is missing, damaged, too large (Pillow's limit), or no image.
        """
        item = self.items[row]
        try:
            return _decode(item)
        except Exception as error:  # Pillow raises a dozen types on damaged files
            raise UnreadableImage(self.item_name(row), _reason(error, item)) from error

    def item_name(self, row: int) -> str:
        """Path of an image, or ``"row 17"``: printable, also where the file name is not."""
        item = self.items[row]
        if isinstance(item, str | os.PathLike):
            return _printable(os.fspath(item))
        return f"row {self.origin[row]}"

    def digest(self, row: int) -> str:
        """Fingerprint of the content of one image, as hexadecimal blake2b.

        Of the file's or the encoded bytes, or of pixels, shape and dtype; never of path, label or
        position. `UNREADABLE` where there is nothing to read (a damaged file has a fingerprint).

        Examples
        --------
        >>> images = np.zeros((4, 2, 2), np.uint8)
        >>> data = open_dataset((images, [0, 1, 0, 1]))
        >>> data.digest(0) == data.digest(3)
        True
        """
        item = self.items[row]
        try:
            return _digest(item)
        except Exception as error:  # a foreign data set may raise anything
            logger.debug("no digest of %s: %s", self.item_name(row), _reason(error, item))
            return UNREADABLE

    def digests(self, rows: Iterable[int] | None = None, workers: int = 8) -> list[str]:
        """`digest` of the given rows (default: all), by `workers` threads."""
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(self.digest, range(len(self)) if rows is None else rows))

    def subset(self, rows: Any) -> ImageDataset:
        """Keep the given rows, in the given order; `rows` are positions or a mask.

        `classes` stay, so a label means the same class before and after.
        """
        rows = np.asarray(rows)
        if rows.dtype == bool and rows.shape == self.labels.shape:
            rows = np.flatnonzero(rows)
        elif rows.ndim != 1 or (rows.dtype.kind not in "iu" and rows.size):
            raise DatasetError(
                f"`rows` must be positions or a mask of {len(self)} bool but has shape "
                f"{rows.shape} and dtype {rows.dtype}."
            )
        rows = rows.astype(np.int64)
        items: Any = self.items
        items = items[rows] if _by_array(items) else [items[row] for row in rows]
        return ImageDataset(self.name, items, self.labels[rows], self.classes, self.origin[rows])

    def sample(self, n: int, seed: int = 0) -> ImageDataset:
        """Draw `n` images, stratified by class; they keep their order.

        Classes share the places in proportion to their size, but each gets min(2, its size)
        places first (one, where `n` is too small for two). The same `seed` draws the same images,
        and a smaller sample is part of every larger one, so features of it can be reused: places
        are dealt by the Sainte-Laguë rule, because with largest remainders a class may *lose* a
        place when `n` grows (Alabama paradox).

        Raises
        ------
        DatasetError
            If `n` is less than the number of classes.

        Examples
        --------
        >>> data = open_dataset((np.zeros((100, 2, 2), np.uint8), [0] * 80 + [1] * 20))
        >>> np.bincount(data.sample(10).labels)
        array([8, 2])
        """
        n = _sample_size(n)
        if n >= len(self):
            return self
        return self.subset(_sample_rows(self.labels, n, seed))


def _by_array(items: Any) -> bool:
    return isinstance(items, np.ndarray | _Rows)


def _read_only(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view


def _sample_size(n: Any) -> int:
    if not isinstance(n, numbers.Integral) or isinstance(n, bool) or n < 1:
        raise DatasetError(f"`samples` must be a positive int but is {n!r}.")
    return int(n)


def _sample_rows(labels: np.ndarray, n: int, seed: int) -> np.ndarray:
    classes, code, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if n < len(classes):
        raise DatasetError(
            f"`samples` must be at least the number of classes, {len(classes)}, but is {n}; "
            "better 20 or more images per class."
        )
    rng = np.random.default_rng(seed)
    rank = np.empty(len(labels), np.int64)  # position of a row in its class, shuffled
    for members in np.split(np.argsort(code, kind="stable"), np.cumsum(counts)[:-1]):
        rank[rng.permutation(members)] = np.arange(len(members))
    # one image of each class, then a second, then by Sainte-Laguë; ties to the first class
    order = np.lexsort((code, (rank + 0.5) / counts[code], np.minimum(rank, 2)))
    return np.sort(order[:n])


# --------------------------------------------------------------------------- one image


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn an image of any mode into upright 8-bit RGB; the rules stand at the top of the module.

    Parameters
    ----------
    image : PIL.Image.Image
        Left as it is; of several frames, the current one counts (the first of a file just opened).

    Raises
    ------
    ValueError
        If the range of deep pixels is unknown (negative, NaN, or above 65535).

    Examples
    --------
    >>> deep = Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16))
    >>> np.asarray(to_rgb(deep))[0, :, 0]
    array([  0, 100, 255], dtype=uint8)
    """
    with _pil_warnings_ignored():
        image.load()
        try:
            method = _TRANSPOSE.get(image.getexif().get(_ORIENTATION, 1))
        except Exception:  # damaged EXIF data do not make the pixels unreadable
            method = None
        if method is not None:  # not ImageOps.exif_transpose: it also rewrites the EXIF data,
            image = image.transpose(method)  # and fails on damaged ones
        if image.mode == "F" or image.mode.startswith("I"):  # I, I;16, I;16B, …
            return Image.fromarray(_deep_to_uint8(np.asarray(image))).convert("RGB")
        if not image.has_transparency_data:
            return image.convert("RGB")
        if image.mode == "La":  # the one mode without a way to RGBA
            image = image.convert("LA")
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _deep_to_uint8(pixels: np.ndarray) -> np.ndarray:
    low, high = pixels.min(), pixels.max()
    if not 0 <= low <= high <= 65535:  # also false for NaN
        raise ValueError(
            f"pixels from {low} to {high}: known are integers 0 … 65535 and floating point "
            "0 … 1, 0 … 255 or 0 … 65535; convert the image to 8 bit"
        )
    is_float = pixels.dtype.kind == "f"
    full = 1 if is_float and high <= 1 else 255 if is_float and high <= 255 else 65535
    return np.rint(pixels * (255 / full)).astype(np.uint8)


# An entry of `warnings.filters`: action, message, category, module, line.
_IGNORE_PIL = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
_filter_lock = threading.Lock()
_decoding = 0  # threads between enter and exit


@contextmanager
def _pil_warnings_ignored() -> Iterator[None]:
    """Keep Pillow's warnings (large image, corrupt EXIF, …) from being noise, or errors under -W.

    `warnings.catch_warnings` puts back *all* filters on exit, so that threads which overlap would
    undo each other's work and the user's; here one entry goes in, and out with the last thread.
    It is put in by hand: `filterwarnings` would make every warning of "once per place" anew.
    """
    global _decoding
    filters = cast("list[Any]", warnings.filters)
    with _filter_lock:
        Image.init()  # all formats, once: not from two threads at the same time
        _decoding += 1
        if _IGNORE_PIL not in filters:
            filters.insert(0, _IGNORE_PIL)
    try:
        yield
    finally:
        with _filter_lock:
            _decoding -= 1
            if not _decoding:
                with suppress(ValueError):  # someone else restored the filters
                    cast("list[Any]", warnings.filters).remove(_IGNORE_PIL)


class _Handle(NamedTuple):
    """Image `row` of a source, which has ``fetch(row)`` → path, bytes, uint8 array or image."""

    source: Any
    row: int


@dataclass(frozen=True, eq=False)
class _Rows(Sequence[_Handle]):
    """Handles to `rows` of a source."""

    source: Any
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, np.ndarray | slice):
            return _Rows(self.source, self.rows[key])
        return _Handle(self.source, int(self.rows[key]))


# Neither a file that Pillow opened but did not decode yet, nor a foreign data set, may be used
# by two threads at a time.
_source_lock = threading.Lock()


def _resolve(item: Any) -> Any:
    """Return the path, bytes, uint8 array or loaded image behind an item."""
    if isinstance(item, _Handle):
        item = item.source.fetch(item.row)
    if item is None:
        raise ValueError("there is no image in this row")
    if isinstance(item, Image.Image):
        with _source_lock, _pil_warnings_ignored():
            return item.copy()
    return item


def _decode(item: Any) -> Image.Image:
    item = _resolve(item)
    if isinstance(item, Image.Image):
        return to_rgb(item)
    if isinstance(item, np.ndarray):
        return to_rgb(Image.fromarray(item[..., 0] if item.ndim == 3 > item.shape[2] else item))
    with _open(item) as stream, _pil_warnings_ignored(), Image.open(stream) as image:
        return to_rgb(image)


def _digest(item: Any) -> str:
    item = _resolve(item)
    result = hashlib.blake2b(digest_size=20)
    if isinstance(item, Image.Image):
        item = np.asarray(to_rgb(item))
    if isinstance(item, np.ndarray):
        result.update(f"array {item.dtype.str} {item.shape}".encode())
        result.update(np.ascontiguousarray(item).data)
    else:
        with _open(item) as stream:
            while chunk := stream.read(1 << 20):
                result.update(chunk)
    return result.hexdigest()


def _open(item: Any) -> IO[bytes]:
    if isinstance(item, bytes | bytearray | memoryview):
        return io.BytesIO(item)
    mode = os.stat(item).st_mode
    if not stat.S_ISREG(mode):  # reading a pipe or a device may never end
        raise OSError("is a directory" if stat.S_ISDIR(mode) else "is not a regular file")
    return open(item, "rb")


def _reason(error: Exception, item: Any) -> str:
    if isinstance(error, UnidentifiedImageError):  # its message holds a memory address
        head = b""
        with suppress(Exception), _open(_resolve(item)) as stream:
            head = stream.read(64)
        if not head:
            return "is empty (0 bytes)"
        if head.startswith(b"version https://git-lfs"):
            return "is a Git LFS pointer, not the image; run `git lfs pull`"
        if head[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1"):
            return "is HEIC, which Pillow cannot read; convert it to JPEG"
        return "is not an image in a format that Pillow can read"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if not isinstance(error, OSError | ValueError):
        text = f"{type(error).__name__}: {text}"
    return _one_line(text)


# --------------------------------------------------------------------------- text


def _printable(text: str) -> str:
    """`text` with line breaks, control characters and undecodable bytes escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _one_line(text: object, limit: int = 300) -> str:
    lines = str(text).strip().splitlines() or [""]
    return _printable(lines[0] if len(lines[0]) <= limit else lines[0][:limit] + " …")


def _some(values: Iterable[Any], limit: int = 5) -> str:
    """``"1, 2, 3, 4, 5 and 7 more"``."""
    values = list(values)
    more = len(values) - limit
    return ", ".join(map(str, values[:limit])) + (f" and {more} more" if more > 0 else "")


def _natural(text: str) -> tuple[Any, ...]:
    """Sort key: ``a2`` before ``a10``. Digits compare by length, then by text: no huge ints."""
    parts: list[Any] = re.split(r"([0-9]+)", text)
    for n in range(1, len(parts), 2):
        digits = parts[n].lstrip("0")
        parts[n] = (len(digits), digits)
    return tuple(parts), text  # "01" and "1" differ in the second


def _class_key(name: str) -> tuple[Any, ...]:
    """Sort key: numbers by value, then names in natural order."""
    with suppress(ValueError):
        if math.isfinite(value := float(name)):
            return 0, value, _natural(name)
    return 1, 0.0, _natural(name)


def _need(module: str, purpose: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:
            raise  # an installed but broken package must not look like a missing one
        raise DatasetError(
            f"{purpose} needs the package {package!r}: pip install 'sfda-tune[data]'"
        ) from None


def _refuse(form: str, **options: Any) -> None:
    """Raise if an option is given that means nothing for this form."""
    given = [f"`{name}`" for name, value in options.items() if value is not None]
    if given:
        raise DatasetError(f"{' and '.join(given)} cannot be used with {form}; leave it out.")


# --------------------------------------------------------------------------- labels


def _label(value: Any) -> Any:
    """Turn a numpy or torch scalar into a plain Python label."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    return value


def _is_missing(value: Any) -> bool:
    if isinstance(value, str | bytes):
        return not value.strip()
    if isinstance(value, numbers.Number):
        return bool(value != value)
    return value is None or type(value).__name__ in ("NAType", "NaTType")  # of pandas


def _class_name(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of integers read as floats
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    if isinstance(value, tuple):  # torchvision's ImageNet: all names of the class
        return ", ".join(map(_class_name, value))
    return _printable(str(value))


def _encode(
    labels: Iterable[Any],
    *,
    where: str,
    names: Sequence[Any] | None = None,
    row_name: Callable[[int], str] = lambda n: f"row {n}",
    hint: str = "",
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels of any hashable type → codes 0 … C−1 and class names; all checks are here.

    `names` are the declared names of integer labels (ClassLabel, torchvision's `classes`).
    """
    labels = [_label(value) for value in labels]
    if not labels:
        raise DatasetError(f"{where} must hold at least one image but is empty.")
    try:
        distinct = set(labels)
    except TypeError:
        raise DatasetError(
            f"{where} must hold one label per image, a number or a name, but the first is "
            f"{_one_line(repr(labels[0]), 60)}; for one-hot labels pass labels.argmax(axis=1)."
        ) from None
    missing = {value for value in distinct if _is_missing(value)}
    if names is not None:
        if all(isinstance(v, int) and v < len(names) for v in distinct - missing):
            missing |= {v for v in distinct - missing if v < 0}  # the mark of unlabelled rows
        else:
            names = None  # numbers that are not positions in `names`, or names already
    if missing:
        rows = [row_name(n) for n, value in enumerate(labels) if value in missing]
        raise DatasetError(
            f"{where} must hold a label for every image, but {len(rows)} of {len(labels)} are "
            f"missing ({_some(rows)}); fill them in or remove these images."
        )
    if names is None:
        text = {value: _class_name(value) for value in distinct}
        ordered = sorted(distinct, key=lambda value: (_class_key(text[value]), repr(value)))
        for a, b in itertools.pairwise(ordered):
            if text[a] == text[b]:
                raise DatasetError(
                    f"{where} must hold labels of one type, but {a!r} and {b!r} are different "
                    "labels of the same name; convert them all to str."
                )
    else:
        known = [_class_name(name) for name in names]
        shared = {name for name, count in Counter(known).items() if count > 1}
        ordered = sorted(distinct)
        text = {v: f"{known[v]} ({v})" if known[v] in shared else known[v] for v in ordered}
    if len(ordered) < 2:
        raise DatasetError(
            f"{where} must have at least 2 classes to rank backbones, but all {len(labels)} "
            f"images are of class {text[ordered[0]]!r}.{hint}"
        )
    code = {value: n for n, value in enumerate(ordered)}
    codes = np.fromiter((code[value] for value in labels), np.int64, len(labels))
    return codes, tuple(text[value] for value in ordered)


# --------------------------------------------------------------------------- arrays


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")  # whoever has a tensor has imported torch
    return torch is not None and isinstance(value, torch.Tensor)


def _as_array(value: Any, ndim: int) -> Any:
    """Turn a tensor into an array, channels last; leave anything else as it is."""
    if not _is_tensor(value):
        return value
    value = value.detach().cpu()
    array = (value.float() if value.is_floating_point() else value).numpy()
    if array.ndim == ndim and array.shape[-3] in _CHANNELS:
        array = np.moveaxis(array, -3, -1)
    return array


def _pixels(array: np.ndarray, what: str) -> np.ndarray:
    """One image as uint8 array ``(h, w)`` or ``(h, w, c)``."""
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in _CHANNELS):
        axes = " (channels last)" if array.ndim == 3 and array.shape[0] in _CHANNELS else ""
        raise DatasetError(
            f"{what} must have shape (h, w) or (h, w, c) with c = 1, 3 or 4{axes} but has "
            f"{array.shape}; reshape it" + (" with np.moveaxis(image, 0, -1)." if axes else ".")
        )
    if array.size == 0:
        raise DatasetError(f"{what} must have pixels but has shape {array.shape}.")
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array * np.uint8(255)
    if array.dtype == np.uint16:
        return _deep_to_uint8(array)
    low, high = array.min(), array.max()
    if array.dtype.kind == "f" and -1e-5 <= low <= high <= 1 + 1e-5:  # rounding of a resize
        return np.rint(np.clip(array.astype(np.float32), 0, 1) * 255).astype(np.uint8)
    if array.dtype.kind == "f" and not (low >= 0 and high <= 255):
        advice = "remove the normalisation (transform): each backbone applies its own"
    else:
        advice = "if they are 0 … 255, use .astype(np.uint8)"
    raise DatasetError(
        f"{what} must be uint8, uint16, bool or floating point in [0, 1] but is {array.dtype} "
        f"from {low} to {high}; {advice}."
    )


def _stack(images: np.ndarray, what: str) -> np.ndarray:
    """Images of one size as uint8 array ``(n, h, w)`` or ``(n, h, w, c)``."""
    if images.ndim not in (3, 4):
        raise DatasetError(
            f"{what} must have shape (n, h, w) or (n, h, w, c) but has {images.shape}; reshape it."
        )
    if len(images) and images.dtype == np.uint8:
        _pixels(images[0], f"{what}[0]")  # the shape; no copy of the pixels
        return _read_only(images)
    return np.array([_pixels(image, f"{what}[{n}]") for n, image in enumerate(images)], np.uint8)


def _listed(item: Any, what: str) -> Any:
    """Turn an element of a list of images into an item."""
    if isinstance(item, str | os.PathLike):
        return os.path.abspath(os.path.expanduser(os.fspath(item)))
    if isinstance(item, bytes | Image.Image):
        return item
    item = _as_array(item, 3)
    if isinstance(item, np.ndarray):
        return _read_only(_pixels(item, what))
    raise DatasetError(
        f"{what} must be an array, a tensor, a PIL image, a path or the bytes of an image file "
        f"but is {type(item).__name__}."
    )


def _check_some_exist(items: Iterable[Any], base: str, what: str) -> None:
    """Turn a wrong base folder into one error, instead of a thousand unreadable images."""
    items = list(items)
    paths = [item for item in items if isinstance(item, str)]
    if items and not any(item is not None for item in items):
        raise DatasetError(
            f"{what} must hold paths or encoded images, but none of {len(items)} is."
        )
    if paths and len(paths) == len(items) and not any(map(os.path.lexists, paths)):
        raise DatasetError(
            f"{what} must name image files, but none of the {len(paths)} exists, for instance "
            f"{paths[0]!r}; relative paths start at {base!r}."
        )


def _open_arrays(images: Any, labels: Any, name: str = "arrays") -> ImageDataset:
    if labels is None:
        raise DatasetError(
            "`labels` must be given with images in a list or array: "
            "open_dataset((images, labels)) or open_dataset(images, labels=labels)."
        )
    images = _as_array(images, 4)
    if isinstance(images, np.ndarray) and images.dtype.kind not in "OSU":
        items: Any = _stack(images, "`images`")
    elif isinstance(images, str | bytes | Mapping) or not isinstance(images, Iterable):
        raise DatasetError(
            "`images` must be an array (n, h, w), (n, h, w, c) or a list of arrays, PIL images or "
            f"paths but is {type(images).__name__}."
        )
    else:
        items = [_listed(item, f"`images[{n}]`") for n, item in enumerate(images)]
        _check_some_exist(items, os.getcwd(), "`images`")
    if isinstance(labels, str | bytes | Mapping) or not isinstance(labels, Iterable):
        raise DatasetError(
            f"`labels` must be a sequence, one label per image, but is {type(labels).__name__}."
        )
    tolist = getattr(labels, "tolist", None)  # arrays, tensors, pandas
    values: Any = tolist() if tolist else list(labels)
    if len(items) != len(values):
        raise DatasetError(
            f"`labels` must have one label per image, but there are {len(items)} images and "
            f"{len(values)} labels."
        )
    return ImageDataset(name, items, *_encode(values, where="`labels`"))


def _open_digits() -> ImageDataset:
    from sklearn.datasets import load_digits

    digits = cast("Any", load_digits())
    # 17 grey levels, 0 … 16, spread evenly over 0 … 255
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return _open_arrays(images, digits.target, "digits")


# --------------------------------------------------------------------------- folders


def _scan(folder: str) -> tuple[list[str], list[str]]:
    """Sub-folders and files of a folder, hidden ones left out, in natural order."""
    try:
        with os.scandir(folder) as entries:
            found = [e for e in entries if not e.name.startswith(".") and e.name not in _JUNK]
    except OSError as error:
        warnings.warn(f"{folder!r} is left out: {error.strerror}", UserWarning, stacklevel=2)
        return [], []
    found.sort(key=lambda entry: _natural(entry.name))
    folders, files = [], []
    for entry in found:
        # a link that leads nowhere or to itself counts as a file; DirEntry.is_dir would raise
        is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
        (folders if is_folder else files).append(entry.path)
    return folders, files


def _is_image(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in EXTENSIONS


def _walk(folder: str, above: Iterable[str]) -> Iterator[str]:
    """Files below `folder`, in natural order; links are followed, but no folder entered twice."""

    def identity(path: str) -> tuple[int, int]:
        status = os.stat(path)
        return status.st_dev, status.st_ino

    entered = {identity(path) for path in above}  # a link up would mix the classes
    waiting = [folder]
    while waiting:
        folder = waiting.pop()
        if identity(folder) in entered:
            continue
        entered.add(identity(folder))
        folders, files = _scan(folder)
        yield from files
        waiting += reversed(folders)


def _pick_split(names: Sequence[str], split: str | None, where: str) -> list[str]:
    """Names of the splits meant; default "train", or the only one there is."""
    if split == "all":
        return list(names)
    wanted = "train" if split is None else str(split).lower()
    same = next((group for group in _SPLITS if wanted in group), ())
    for name in (wanted, *same):
        for candidate in names:
            if candidate.lower() == name:
                return [candidate]
    if split is None and len(names) == 1:
        return list(names)
    raise DatasetError(
        f"`split` must be one of {', '.join(map(repr, names))} or 'all' for {where} but is "
        f"{split!r}."
    )


def _open_folder(root: str, split: str | None) -> ImageDataset:
    root = os.path.abspath(root)
    name = shown = _printable(os.path.basename(root) or root)
    where = f"Folder {root!r}"
    folders, files = _scan(root)
    by_name = {os.path.basename(folder): folder for folder in folders}
    lower = {folder.lower() for folder in by_name}
    if "train" in lower and lower <= _SPLIT_NAMES:
        chosen = _pick_split(list(by_name), split, where)
        if split is not None and [c.lower() for c in chosen] != ["train"]:
            shown = f"{name}/{split}"
        tops = [by_name[c] for c in chosen]
    elif split in (None, "all"):
        tops = [root]
    else:
        raise DatasetError(
            f"`split` can only be used if every sub-folder is a split (train, val, valid, "
            f"validation, test) and one is train, but {where} has {_some(map(repr, by_name))}; "
            "leave `split` out."
        )
    paths: list[str] = []
    labels: list[str] = []
    empty: list[str] = []
    ignored = 0
    for top in tops:
        class_folders, loose = (folders, files) if top == root else _scan(top)
        pictures = sum(map(_is_image, loose))
        if not class_folders:
            raise DatasetError(
                f"Folder {top!r} must have one sub-folder per class, like "
                f"{os.path.join(top, 'cat', '1.jpg')!r}, but has {pictures} images "
                "and no sub-folders; move the images into class folders, or pass a .csv table "
                "with the columns path and label." + _saved_hint(loose)
            )
        if pictures:
            warnings.warn(
                f"{pictures} images directly in {top!r} are left out: they are in no "
                "class folder.",
                UserWarning,
                stacklevel=2,
            )
        for folder in class_folders:
            found = list(_walk(folder, {root, top}))
            images = [path for path in found if _is_image(path)]
            ignored += len(found) - len(images)
            if not images:
                empty.append(os.path.basename(folder))
            paths += images
            labels += [os.path.basename(folder)] * len(images)
    if ignored:
        logger.debug("%s: ignored %d files that are no images", where, ignored)
    if not paths:
        raise DatasetError(
            f"{where} must hold image files, but its sub-folders ({_some(map(repr, empty))}) have "
            f"none; known are {' '.join(sorted(EXTENSIONS))}."
        )
    if empty:
        warnings.warn(
            f"{where}: {len(empty)} class folders without images are left out "
            f"({_some(map(repr, empty))}).",
            UserWarning,
            stacklevel=2,
        )
    hint = ""
    if len(tops) == 1 and len(set(labels)) == 1:
        inner = os.path.join(tops[0], labels[0])
        if len(_scan(inner)[0]) > 1:
            hint = f" Its sub-folders look like classes: try {inner!r}."
        else:
            hint = " Put the images of each class into a sub-folder of their own."
    return ImageDataset(shown, paths, *_encode(labels, where=where, hint=hint))


def _saved_hint(files: Iterable[str]) -> str:
    saved = {"dataset_dict.json", "state.json"} & {os.path.basename(file) for file in files}
    return " It looks like a saved Hugging Face data set: put 'hf:' before it." if saved else ""


# --------------------------------------------------------------------------- tables


def _column(
    columns: Sequence[str],
    given: str | None,
    defaults: Sequence[str],
    argument: str,
    where: str,
    typed: Sequence[str] = (),
) -> str:
    """Find a column by name, else as the only one of the right type, else by a usual name."""
    if given is not None:
        if given in columns:
            return given
        raise DatasetError(
            f"`{argument}` must be a column of {where}, one of {_some(map(repr, columns), 20)}, "
            f"but is {given!r}."
        )
    if len(typed) == 1:
        return typed[0]
    lower = {column.lower(): column for column in reversed(typed or columns)}
    for name in defaults:
        if name in lower:
            return lower[name]
    raise DatasetError(
        f"{where} must have a column named {', '.join(defaults)}, but its columns are "
        f"{_some(map(repr, columns), 20)}; set `{argument}`."
    )


def _cell(value: Any, base: str) -> str | bytes | None:
    """Turn what an image column holds into an item; Hugging Face: ``{"bytes": …, "path": …}``."""
    if isinstance(value, Mapping):
        data = value.get("bytes")
        value = value.get("path") if data is None else data
    if isinstance(value, str) and value:
        return os.path.join(base, value)
    return value if isinstance(value, bytes) and value else None


def _open_csv(path: str, image_column: str | None, label_column: str | None) -> ImageDataset:
    where = f"Table {path!r}"
    base = os.path.dirname(path)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            head = next((line for line in file if line.strip()), "")
            wanted = {image_column, label_column, *IMAGE_COLUMNS, *LABEL_COLUMNS}

            def fit(delimiter: str) -> tuple[int, int]:
                cells = [c.strip() for c in next(csv.reader([head], delimiter=delimiter), [])]
                return sum(c in wanted or c.lower() in wanted for c in cells), len(cells)

            delimiter = max("\t,;" if path.lower().endswith(".tsv") else ",;\t", key=fit)
            # "path, label": blanks after the delimiter belong to the layout, not to the names
            spaced = bool(re.search(re.escape(delimiter) + " ", head))
            file.seek(0)
            reader = csv.reader(file, delimiter=delimiter, skipinitialspace=spaced, strict=True)
            rows = [(reader.line_num, row) for row in reader if any(c.strip() for c in row)]
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{where} must be text in UTF-8 ({error.reason}); save it so."
        ) from None
    except csv.Error as error:
        raise DatasetError(f"{where} must be a valid CSV file: {error}.") from None
    columns = [column.strip() for column in rows[0][1]] if rows else []
    note = f"{where} (its first line must name the columns)"
    image_at = columns.index(_column(columns, image_column, IMAGE_COLUMNS, "image_column", note))
    label_at = columns.index(_column(columns, label_column, LABEL_COLUMNS, "label_column", note))
    lines = [line for line, _ in rows[1:]]
    long = [line for line, row in rows[1:] if any(row[len(columns) :])]
    if long:
        raise DatasetError(
            f"{where} must have {len(columns)} fields per line, as its header has, but line "
            f"{_some(long)} has more; put names that hold {delimiter!r} between double quotes."
        )
    cells = [row + [""] * (len(columns) - len(row)) for _, row in rows[1:]]
    # text, so a missing label is what pandas and numpy write for one; "None" may be a class
    labels = [row[label_at].strip() for row in cells]
    values = [None if label in ("nan", "NaN", "<NA>") else label for label in labels]
    column = f"{where}, column {columns[label_at]!r},"
    codes, classes = _encode(values, where=column, row_name=lambda n: f"line {lines[n]}")
    paths = [_cell(row[image_at], base) for row in cells]
    _check_some_exist(paths, base, f"{where}, column {columns[image_at]!r},")
    return ImageDataset(_stem(path), paths, codes, classes)


def _stem(path: str) -> str:
    return _printable(os.path.splitext(os.path.basename(path))[0])


def _open_parquet(
    path: str,
    image_column: str | None,
    label_column: str | None,
    samples: int | None,
    seed: int,
) -> ImageDataset:
    parquet = _need("pyarrow.parquet", "Reading .parquet")
    where = f"Table {path!r}"
    base = os.path.dirname(path)
    try:
        file = parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow.ArrowInvalid is a ValueError
        raise DatasetError(f"{where} must be a Parquet file: {_one_line(error)}") from None
    with file:
        columns = file.schema_arrow.names
        image = _column(columns, image_column, IMAGE_COLUMNS, "image_column", where)
        label = _column(columns, label_column, LABEL_COLUMNS, "label_column", where)
        names = None
        with suppress(KeyError, TypeError, ValueError):  # class names, if Hugging Face wrote it
            info = json.loads(file.schema_arrow.metadata[b"huggingface"])
            names = info["info"]["features"][label]["names"]
        labels = file.read(columns=[label]).column(label).to_pylist()
        codes, classes = _encode(labels, where=f"{where}, column {label!r},", names=names)
        rows = np.arange(len(codes))
        if samples is not None and samples < len(codes):  # do not read the bytes of all images
            rows = _sample_rows(codes, samples, seed)
        items: list[Any] = []
        start = 0
        for group in range(file.num_row_groups):
            stop = start + file.metadata.row_group(group).num_rows
            chosen = rows[(start <= rows) & (rows < stop)]
            if len(chosen):
                column = file.read_row_group(group, columns=[image]).column(image)
                cells = column.take(chosen - start).to_pylist()
                items += [_cell(cell, base) for cell in cells]
            start = stop
    _check_some_exist(items, base, f"{where}, column {image!r},")
    return ImageDataset(_stem(path), items, codes[rows], classes, rows)


# --------------------------------------------------------------------------- torchvision


@dataclass(frozen=True, eq=False)
class _MapDataset:
    """Source over ``dataset[row]`` → (image, label)."""

    dataset: Any

    def fetch(self, row: int) -> Any:
        with _source_lock:
            image = self.dataset[row][0]
        return _map_image(image, "the image")


def _map_image(image: Any, what: str) -> Any:
    if isinstance(image, Image.Image):
        return image
    array = _as_array(image, 3)
    if isinstance(array, np.ndarray):
        return _pixels(array, what)
    raise DatasetError(
        f"{what} must be a PIL image, an array or a tensor but is {type(image).__name__}."
    )


def _bare(dataset: Any, rows: Sequence[int], name: str) -> Any:
    """Check the first, middle and last image; drop a transform that returns tensors.

    A data set of the wrong form is reported now, not once per image. Each backbone has a
    preprocessing of its own, to which the user's would be added; a transform from image to image
    (a crop to the region of interest) is kept.
    """
    problem = None
    readable = not rows
    for row in dict.fromkeys(rows[n] for n in (0, len(rows) // 2, -1) if rows):
        try:
            pair = dataset[row]
        except Exception as error:  # perhaps this one image is damaged
            problem = f"raises {type(error).__name__}: {_one_line(error)}"
            continue
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise DatasetError(
                f"`spec[{row}]` must be a pair (image, label), but {name} returns "
                f"{_one_line(repr(pair), 80)}."
            )
        image, what = pair[0], f"`spec[{row}]`, an image of {name},"
        transforms = [n for n in ("transform", "transforms") if getattr(dataset, n, None)]
        plain = isinstance(image, Image.Image) or getattr(image, "dtype", None) == np.uint8
        if transforms and not plain:
            with suppress(Exception):
                copied = copy.copy(dataset)
                for attribute in transforms:
                    setattr(copied, attribute, None)
                image, dataset = _map_image(copied[row][0], what), copied
                logger.info("%s: its transform is not applied", name)
        _map_image(image, what)
        readable = True
    if not readable:
        raise DatasetError(f"`spec[row]` must be a pair (image, label), but {name} {problem}")
    return dataset


def _path_samples(dataset: Any) -> list[tuple[Any, Any]] | None:
    """(path, label) pairs of ImageFolder and its like."""
    for name in ("samples", "imgs", "_samples"):
        pairs = getattr(dataset, name, None)
        if isinstance(pairs, list | tuple) and pairs and len(pairs) == len(dataset):
            first = pairs[0]
            path = first[0] if isinstance(first, list | tuple) and len(first) == 2 else None
            if isinstance(path, str | os.PathLike) and _is_image(os.fspath(path)):
                return list(pairs)
    return None


def _map_labels(dataset: Any) -> list[Any] | None:
    """All labels, if they can be had without decoding the images."""
    for name in ("targets", "labels", "_labels"):
        labels = getattr(dataset, name, None)
        tolist = getattr(labels, "tolist", None)  # arrays and tensors
        labels = tolist() if tolist else labels
        if isinstance(labels, list | tuple) and len(labels) == len(dataset):
            return list(labels)
    return None


def _read_labels(dataset: Any, rows: Iterable[int], name: str) -> dict[int, Any]:
    """Read every image for its label; leave out those that fail."""
    logger.info("%s has no `targets`: every image is read once for its label", name)
    labels: dict[int, Any] = {}
    failed = 0
    for row in rows:
        try:
            labels[row] = dataset[row][1]
        except Exception as error:
            logger.debug("%s[%d]: %s", name, row, _one_line(error))
            failed += 1
    if failed:
        warnings.warn(
            f"{name}: {failed} images are left out, because reading them fails and only reading "
            "tells their labels; give the data set an attribute `targets` with all labels.",
            UserWarning,
            stacklevel=2,
        )
    return labels


def _open_map(dataset: Any) -> ImageDataset:
    rows = list(range(len(dataset)))
    torch = sys.modules.get("torch")
    while torch is not None and type(dataset) is torch.utils.data.Subset:
        indices = [int(index) for index in dataset.indices]
        dataset, rows = dataset.dataset, [indices[row] for row in rows]
    name = type(dataset).__name__
    convert = getattr(dataset, "target_transform", None)
    names = getattr(dataset, "classes", None) if convert is None else None
    pairs = _path_samples(dataset)
    labels = [label for _, label in pairs] if pairs else _map_labels(dataset)
    if not pairs:
        dataset = _bare(dataset, rows, name)
    if labels is None:
        read = _read_labels(dataset, rows, name)
        rows = [row for row in rows if row in read]
        values = [read[row] for row in rows]
    else:
        values = [labels[row] if convert is None else convert(labels[row]) for row in rows]
    codes, classes = _encode(
        values,
        where=f"The labels of {name}",
        names=names if isinstance(names, list | tuple) else None,
        row_name=lambda n: f"row {rows[n]}",
    )
    if pairs:
        items: Any = [os.path.abspath(os.fspath(pairs[row][0])) for row in rows]
    else:
        items = _Rows(_MapDataset(dataset), np.array(rows, np.int64))
    return ImageDataset(name, items, codes, classes, np.array(rows, np.int64))


# --------------------------------------------------------------------------- Hugging Face


@dataclass(frozen=True, eq=False)
class _HuggingFace:
    """Source over an image column that hands out files or bytes, not decoded images."""

    rows: Any
    column: str
    base: str

    def fetch(self, row: int) -> Any:
        return _cell(self.rows[row][self.column], self.base)


def _load_hf(text: str, split: str | None) -> tuple[Any, str, str | None]:
    """Load "NAME", "NAME:CONFIG" or a folder; also the name to show and a split yet to pick."""
    datasets = _need("datasets", "'hf:'")
    if not text:
        raise DatasetError("`spec` must be 'hf:NAME' or 'hf:NAME:CONFIG' but is 'hf:'.")
    local = os.path.expanduser(text)
    exists = os.path.exists(local)
    name, _, config = (local, "", "") if exists else text.partition(":")
    sliced = split if split and re.search(r"[\[+]", split) else None  # "train[:10%]"
    try:
        saved = ("dataset_dict.json", "state.json")
        if exists and any(os.path.exists(os.path.join(local, file)) for file in saved):
            data = datasets.load_from_disk(local)
            sliced = None  # it cannot: the slice is refused below
        else:
            data = datasets.load_dataset(name, config or None, split=sliced)
    except Exception as error:  # of network, file system, data set script, …
        raise DatasetError(
            f"`spec` 'hf:{_printable(text)}' cannot be loaded: {type(error).__name__}: "
            f"{_one_line(error)}"
        ) from error
    shown = _printable(os.path.basename(os.path.abspath(local)) if exists else text)
    return (data, f"{shown}/{split}", None) if sliced else (data, shown, split)


def _open_hf(
    data: Any, name: str, split: str | None, image_column: str | None, label_column: str | None
) -> ImageDataset:
    datasets = sys.modules["datasets"]
    where = f"Data set {name!r}"
    if isinstance(data, datasets.IterableDataset | datasets.IterableDatasetDict):
        raise DatasetError(
            f"{where} must not be streamed, for images are read in any order; load it without "
            "streaming=True."
        )
    if isinstance(data, datasets.DatasetDict):
        chosen = _pick_split(list(data), split, where)
        if split is not None and chosen != ["train"]:
            name = f"{name}/{split}"
        data = datasets.concatenate_datasets([data[c] for c in chosen])
    else:
        _refuse(f"{where}, which is a single split", split=split)
    features = data.features
    columns = list(features)
    kind = {column: type(feature).__name__ for column, feature in features.items()}
    images = [c for c in columns if kind[c] == "Image"]
    classes = [c for c in columns if kind[c] == "ClassLabel"]
    image = _column(columns, image_column, IMAGE_COLUMNS, "image_column", where, images)
    label = _column(columns, label_column, LABEL_COLUMNS, "label_column", where, classes)
    data = data.with_format(None)
    labels = data.select_columns([label])[:][label]
    names = features[label].names if kind[label] == "ClassLabel" else None
    codes, class_names = _encode(labels, where=f"{where}, column {label!r},", names=names)
    rows = data.select_columns([image])
    if kind[image] == "Image":
        rows = rows.cast_column(image, datasets.Image(decode=False))
    elif getattr(features[image], "dtype", None) not in (
        "string",
        "large_string",
        "binary",
        "large_binary",
    ):
        raise DatasetError(
            f"`image_column` must hold images, paths or bytes, but {image!r} of {where} is "
            f"{_one_line(features[image], 80)}; cast it to datasets.Image()."
        )
    source = _HuggingFace(rows, image, os.getcwd())
    return ImageDataset(name, _Rows(source, np.arange(len(codes))), codes, class_names)


# --------------------------------------------------------------------------- the entry


def open_dataset(
    spec: Any,
    *,
    split: str | None = None,
    samples: int | None = None,
    seed: int = 0,
    image_column: str | None = None,
    label_column: str | None = None,
    labels: Any = None,
) -> ImageDataset:
    """Open labelled images, in whatever form they are.

    Parameters
    ----------
    spec : object
        - ``"digits"``: scikit-learn's digits, 8×8, their grey levels 0 … 16 as round(255·v/16).
        - Folder ``root/<class>/…`` (nested files count, hidden ones do not), or a folder whose
          sub-folders are all called train, val, valid, validation or test, among them train.
        - ``.csv``, ``.tsv`` (UTF-8, with a header, separated by comma, semicolon or tab) or
          ``.parquet`` with paths, relative to the table, and labels; Parquet may also hold the
          encoded images, as Hugging Face writes them.
        - ``"hf:NAME"``, ``"hf:NAME:CONFIG"``, ``"hf:folder"``, or a Hugging Face `Dataset` or
          `DatasetDict`. Its format or transform is not applied.
        - Torchvision-style data set: ``spec[i]`` → (image, label), the image a PIL image, a uint8
          array or tensor, or floating point in [0, 1]; labels from `targets`, `labels` or
          `_labels` and names from `classes`, if there are any. A transform that returns tensors is
          not applied, because each backbone has its own; one that returns images is, and must be
          deterministic. Of ImageFolder the files are read directly.
        - ``(images, labels)`` or ``{"images": …, "labels": …}``: images as array ``(n, h, w)`` or
          ``(n, h, w, c)`` with c = 1, 3, 4 (tensor: ``(n, c, h, w)``) of uint8, uint16, bool, or
          floating point in [0, 1]; or a list of such images, PIL images, paths, encoded bytes.
        - An `ImageDataset`: returned as it is.
    split : str, optional
        "train" (default), "val", "test" or "all" of a folder or Hugging Face data set that has
        splits; for ``"hf:…"`` also a slice such as ``"train[:10%]"``. Rank on the training images:
        the validation images stay unseen then.
    samples, seed : int, optional
        Draw this many images, see `ImageDataset.sample`.
    image_column, label_column : str, optional
        Columns of a table or Hugging Face data set. Default: the only Image and the only
        ClassLabel column, else the first of path, image, file, filename, filepath, image_path,
        file_name, and of label, class, target, category, y.
    labels : sequence, optional
        Labels of the images, if `spec` is an array or list of images only.

    Returns
    -------
    ImageDataset

    Raises
    ------
    DatasetError
        If the form is unknown, nothing is there, labels are missing, or there is a single class.
        A damaged or missing *image* is no error here but an `UnreadableImage` when loaded.

    Examples
    --------
    >>> digits = open_dataset("digits", samples=500)
    >>> digits
    ImageDataset('digits', 500 images, 10 classes)
    >>> digits.load(0).mode, digits.load(0).size
    ('RGB', (8, 8))
    """
    if samples is not None:
        samples = _sample_size(samples)
    columns = {"image_column": image_column, "label_column": label_column}
    if isinstance(spec, str) and spec == "digits":
        _refuse(
            "'digits' (a folder of that name is './digits')", split=split, labels=labels, **columns
        )
        dataset = _open_digits()
    elif isinstance(spec, str) and spec.startswith("hf:"):
        _refuse("'hf:…'", labels=labels)
        data, name, split = _load_hf(spec[3:], split)
        dataset = _open_hf(data, name, split, image_column, label_column)
    elif _is_hugging_face(spec):
        _refuse("a Hugging Face data set", labels=labels)
        dataset = _open_hf(spec, _hf_name(spec), split, image_column, label_column)
    elif isinstance(spec, str | os.PathLike):
        dataset = _open_path(spec, split, samples, seed, labels, columns)
    elif isinstance(spec, ImageDataset):
        _refuse("an ImageDataset", split=split, labels=labels, **columns)
        dataset = spec
    elif labels is not None:
        _refuse("arrays", split=split, **columns)
        dataset = _open_arrays(spec, labels)
    elif isinstance(spec, Mapping):
        _refuse("arrays", split=split, **columns)
        if set(spec) != {"images", "labels"}:
            raise DatasetError(
                "`spec`, if a dict, must have the keys 'images' and 'labels' but has "
                f"{_some(map(repr, spec))}."
            )
        dataset = _open_arrays(spec["images"], spec["labels"])
    elif isinstance(spec, tuple) and len(spec) == 2:
        _refuse("arrays", split=split, **columns)
        dataset = _open_arrays(*spec)
    elif isinstance(spec, list | tuple | np.ndarray) or _is_tensor(spec):
        dataset = _open_arrays(spec, None)  # says that the labels are missing
    elif _is_map(spec):
        _refuse("a torchvision-style data set", split=split, **columns)
        dataset = _open_map(spec)
    else:
        more = "; pass its `.dataset`" if hasattr(spec, "dataset") else ""
        if hasattr(spec, "iloc"):  # a pandas table
            more = "; pass (table['path'].tolist(), table['label'])"
        raise DatasetError(
            f"`spec` must be one of: {_FORMS}. It is a {type(spec).__name__}{more}."
        )
    return dataset if samples is None else dataset.sample(samples, seed)


def _is_map(spec: Any) -> bool:
    if isinstance(spec, bytes | bytearray | memoryview | range) or hasattr(spec, "iloc"):
        return False  # of pandas
    return hasattr(spec, "__getitem__") and hasattr(spec, "__len__")


def _is_hugging_face(spec: Any) -> bool:
    datasets = sys.modules.get("datasets")  # whoever has a Dataset has imported it
    names = ("Dataset", "DatasetDict", "IterableDataset", "IterableDatasetDict")
    kinds = tuple(getattr(datasets, name) for name in names if hasattr(datasets, name))
    return isinstance(spec, kinds)


def _hf_name(data: Any) -> str:
    if isinstance(data, Mapping):
        data = next(iter(data.values()), None)
    return getattr(getattr(data, "info", None), "dataset_name", None) or "dataset"


def _open_path(
    spec: Any,
    split: str | None,
    samples: int | None,
    seed: int,
    labels: Any,
    columns: dict[str, str | None],
) -> ImageDataset:
    path = os.path.abspath(os.path.expanduser(os.fspath(spec)))
    exists = os.path.exists(path) and os.fspath(spec) != ""  # which is not the current folder
    if exists and os.path.isdir(path):
        _refuse("a folder (the labels are the folder names)", labels=labels, **columns)
        return _open_folder(path, split)
    if not exists or not os.path.isfile(path):
        fact = "is no file" if exists else f"does not exist{_close_matches(path)}"
        raise DatasetError(f"`spec` must be one of: {_FORMS}. {str(spec)!r} {fact}.")
    _refuse("a table", split=split, labels=labels)
    suffix = os.path.splitext(path)[1].lower()
    if suffix in (".csv", ".tsv"):
        return _open_csv(path, **columns)
    if suffix in (".parquet", ".pq"):
        return _open_parquet(path, **columns, samples=samples, seed=seed)
    more = "; unpack it first" if suffix in (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar") else ""
    raise DatasetError(f"`spec` must be one of: {_FORMS}. It is the file {path!r}{more}.")


def _close_matches(path: str) -> str:
    """Suggest what may be meant, at the first part of the path that is wrong."""
    while not os.path.isdir(parent := os.path.dirname(path)):
        if parent == path:
            return ""
        path = parent
    with suppress(OSError):
        near = difflib.get_close_matches(os.path.basename(path), os.listdir(parent))
        if near:
            found = (repr(os.path.join(parent, name)) for name in near)
            return f"; perhaps {' or '.join(found)}"
    return ""
