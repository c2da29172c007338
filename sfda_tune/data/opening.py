"""Labelled images in whatever form the user has them: `open_dataset(spec)` → `ImageDataset`.

`sfda_tune.data.decoding` says how an image of any kind becomes RGB. Importing this module needs numpy
and Pillow only; whatever else a form needs is imported by it.
"""

from __future__ import annotations

import copy
import csv
import difflib
import importlib
import json
import logging
import numbers
import os
import re
import sys
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
from PIL import Image

from sfda_tune.data.decoding import (
    UNREADABLE,
    Passing,
    UnreadableImage,
    Verdict,
    decode,
    deep_to_uint8,
    digest,
    digest_pixels,
    explain,
    to_rgb,
)
from sfda_tune.data.hub import cache_only_if_unreachable
from sfda_tune.data.parts import choose, choose_rows, hint_at, part_of, read_parts
from sfda_tune.values.files import check
from sfda_tune.values.text import one_line, printable, read_csv_cell

__all__ = [
    "UNREADABLE",
    "DatasetError",
    "ImageDataset",
    "NoPartError",
    "UnreadableImage",
    "image_files",
    "open_dataset",
    "open_part",
    "to_rgb",
]

logger = logging.getLogger(__name__)

# HEIC is listed although Pillow needs the plug-in pillow-heif for it: photos that are reported as
# unreadable are better than photos that silently do not take part.
EXTENSIONS = frozenset(
    {".apng", ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg"}
    | {".jpg", ".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"}
)
IMAGE_COLUMNS = ("path", "image", "file", "filename", "filepath", "image_path", "file_name")
LABEL_COLUMNS = ("label", "class", "target", "category", "y")
_JUNK = {"__MACOSX", "@eaDir"}  # archives of macOS, thumbnails of Synology
_CHANNELS = (1, 3, 4)
_FORMS = (
    "'digits'; a folder with one sub-folder per class (or train/ and val/ with such sub-folders); "
    "a .csv, .tsv or .parquet table of paths and labels; 'hf:NAME' or 'hf:NAME:CONFIG'; a Hugging "
    "Face Dataset; a torchvision-style data set; arrays or lists (images, labels); "
    "an ImageDataset"
)


class DatasetError(ValueError):
    """The images or labels cannot be used as they are; the message says what to do."""


class NoPartError(DatasetError):
    """The data set has no such part, or comes in none."""


@dataclass(frozen=True, eq=False, repr=False)
class ImageDataset:
    """Labelled images, decoded one at a time. Made by `open_dataset`.

    Can be pickled (by `spawn` too): a folder travels as its paths, arrays as their pixels.

    Parameters
    ----------
    name : str
        Shown in the ranking.
    items : sequence of length n
        Per image a path, encoded bytes, a uint8 array ``(h, w[, c])``, a `PIL.Image.Image`, or a
        function without arguments that returns one of these.
    labels : ndarray of int64, shape (n,)
        Position of the class in `classes`; read-only.
    classes : tuple of str
        Class names; numbers in numerical, other names in natural order (``a2`` before ``a10``),
        so that they depend neither on the file system nor on the order of the rows.
    origin : ndarray of int64, shape (n,), optional
        Row number of each image in what the user gave, for messages.

    >>> data = open_dataset((np.zeros((6, 4, 5, 3), np.uint8), ["dog", "cat"] * 3))
    >>> data.classes, data.labels.tolist(), data.load(0).size, data.item_name(0)
    (('cat', 'dog'), [1, 0, 1, 0, 1, 0], (5, 4), 'row 0')
    """

    name: str
    items: Sequence[Any] | np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    origin: np.ndarray = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        labels, n, n_classes = np.asarray(self.labels), len(self.items), len(self.classes)
        integers = labels.shape == (n,) and labels.dtype.kind in "iu"
        if not integers or not np.all((labels >= 0) & (labels < n_classes)):
            raise DatasetError(
                f"`labels` must be {n} integers in 0 … {n_classes - 1} (positions in `classes`), "
                f"one per image, but is {one_line(repr(self.labels), 80)}; `open_dataset` encodes "
                "other labels."
            )
        labels = labels.astype(np.int64)
        labels.flags.writeable = False
        object.__setattr__(self, "labels", labels)
        if self.origin is None:
            object.__setattr__(self, "origin", np.arange(n))

    def __repr__(self) -> str:
        return f"ImageDataset({self.name!r}, {len(self)} images, {len(self.classes)} classes)"

    def __len__(self) -> int:
        return len(self.items)

    def load(self, row: int) -> Image.Image:
        """Decode one image, by any thread; `UnreadableImage` if missing, damaged or too large."""
        item = self.items[row]
        try:
            return decode(item)
        except Verdict as verdict:
            error: Any = verdict.__cause__
            raise UnreadableImage(self.item_name(row), explain(error, item)) from error
        except Exception as error:  # of the system, of a foreign data set
            reason = Passing(explain(error, item))
            raise UnreadableImage(self.item_name(row), reason) from error

    def item_name(self, row: int) -> str:
        """Path of an image, or ``"row 17"``: printable, also where the file name is not."""
        item = self.items[row]
        if isinstance(item, str | os.PathLike):
            return printable(os.fspath(item))
        return f"row {self.origin[row]}"

    def digest(self, row: int) -> str:
        """Fingerprint of the bytes or pixels of one image, never of its path, label or position.

        `UNREADABLE` where there is nothing to read (a damaged file has a fingerprint).
        """
        item = self.items[row]
        try:
            return digest(item)
        except Exception:  # a foreign data set may raise anything
            return UNREADABLE

    def pixel_digest(self, row: int) -> str:
        """Fingerprint of what one image shows, whatever file it is in; `UNREADABLE` if none."""
        try:
            return digest_pixels(self.load(row))
        except UnreadableImage:
            return UNREADABLE

    def digests(
        self, rows: Iterable[int] | None = None, workers: int = 8, *, pixels: bool = False
    ) -> list[str]:
        """`digest` (or `pixel_digest`) of the given rows (default: all), by `workers` threads.

        `DatasetError` if one of them stalls.
        """
        from sfda_tune.data.loader import Loader, cut

        rows = range(len(self)) if rows is None else list(rows)
        batches = [[rows[i] for i in part] for part in cut(len(rows), 64)]
        found = Loader(_Digests(self, pixels), batches, list, threads=min(workers, len(batches)))
        return [digest for _, part in found for digest in part]

    def subset(self, rows: Any) -> ImageDataset:
        """Keep the given rows, in the given order; `rows` are positions or a mask.

        `classes` stay, so a label means the same class before and after.
        """
        rows = np.arange(len(self))[list(rows)]
        items: Any = self.items
        items = items[rows] if isinstance(items, np.ndarray) else [items[row] for row in rows]
        return ImageDataset(self.name, items, self.labels[rows], self.classes, self.origin[rows])

    def sample(self, n: int, seed: int = 0) -> ImageDataset:
        """Draw `n` images, stratified by class; they keep their order.

        Classes share the places in proportion to their size, but each gets min(2, its size)
        places first (one, where `n` is too small for two). A smaller sample is part of every
        larger one of the same `seed`; which images these are depends on the order of the rows and
        of the classes. Places are dealt by the
        Sainte-Laguë rule, because with largest remainders a class may *lose* a place when `n`
        grows (Alabama paradox). `DatasetError` if `n` is less than the number of classes.

        >>> data = open_dataset((np.zeros((100, 2, 2), np.uint8), [0] * 80 + [1] * 20))
        >>> np.bincount(data.sample(10).labels)
        array([8, 2])
        """
        if not isinstance(n, numbers.Integral) or isinstance(n, bool) or n < 1:
            raise DatasetError(f"`samples` must be a positive int but is {n!r}.")
        return self if n >= len(self) else self.subset(self.sample_rows(int(n), seed))

    def sample_rows(self, n: int, seed: int = 0) -> np.ndarray:
        """Return the rows that `sample` draws, sorted."""
        classes, code, counts = np.unique(self.labels, return_inverse=True, return_counts=True)
        if n < len(classes):
            raise DatasetError(
                f"`samples` must be at least the number of classes, {len(classes)}, but is {n}; "
                "better 20 or more images per class."
            )
        rng = np.random.default_rng(seed)
        rank = np.empty(len(self), np.int64)  # position of a row in its class, shuffled
        for members in np.split(np.argsort(code, kind="stable"), np.cumsum(counts)[:-1]):
            rank[rng.permutation(members)] = np.arange(len(members))
        # one image of each class, then a second, then by Sainte-Laguë; ties to the first class
        rows = np.flatnonzero(rank < n)  # no class gets more than all places
        code, rank = code[rows], rank[rows]
        order = np.lexsort((code, (rank + 0.5) / counts[code], np.minimum(rank, 2)))
        return np.sort(rows[order[:n]])


@dataclass(frozen=True)
class _Digests:
    """The digests of a data set, for `sfda_tune.data.loader`."""

    dataset: ImageDataset
    pixels: bool

    def name(self, row: int) -> str:
        return self.dataset.item_name(row)

    def __getitem__(self, row: int) -> str:
        return self.dataset.pixel_digest(row) if self.pixels else self.dataset.digest(row)


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
        - ``"digits"``: scikit-learn's 1,797 digits, 8×8, grey levels 0 … 16 as round(255·v/16).
        - Folder ``root/<class>/**/*.jpg``, or ``root/{train,val,test}/<class>/**/*.jpg``, also
          under other names of these (``Training``, ``valid``, ``dev``, ``test_images``, …) and
          beside other folders, which are left out with a warning. Hidden files do not count, nor
          do folders that `sfda_tune.search` wrote.
        - ``.csv``, ``.tsv`` (UTF-8, with a header, separated by comma, semicolon or tab) or
          ``.parquet`` with paths, relative to the table, or encoded images, and labels. A column
          such as ``split``, ``fold``, ``subset`` or ``is_valid`` says which part a row is of.
        - ``"hf:NAME"``, ``"hf:NAME:CONFIG"``, ``"hf:folder"``, or a Hugging Face `Dataset` or
          `DatasetDict`. Its format or transform is not applied.
        - Torchvision-style data set: ``spec[i]`` → (image, label); labels from `targets`, `labels`
          or `_labels` and names from `classes`, if there are any. A transform that returns tensors
          is not applied, because each backbone has its own; one that returns images is, and must
          be deterministic. Of ImageFolder the files are read directly.
        - ``(images, labels)`` or ``{"images": …, "labels": …}``: images as array ``(n, h, w)`` or
          ``(n, h, w, c)`` with c = 1, 3, 4 (tensor: ``(n, c, h, w)``) of uint8, uint16, bool, or
          floating point in [0, 1]; or a list of such images, PIL images, paths, encoded bytes.
        - An `ImageDataset`: returned as it is.
    split : str, optional
        "train" (default), "val", "test" or "all" of a folder, table or Hugging Face data set that
        has such parts, or the name of one; for ``"hf:…"`` also a slice such as ``"train[:10%]"``.
        Rank on the training images: the validation images stay unseen then.
    samples, seed : int, optional
        Draw this many images, see `ImageDataset.sample`.
    image_column, label_column : str, optional
        Columns of a table or Hugging Face data set. Default: the only Image and the only
        ClassLabel column, else the first of path, image, file, filename, filepath, image_path,
        file_name, and of label, class, target, category, y.
    labels : sequence, optional
        Labels of the images, if `spec` is an array or list of images only.

    Raises
    ------
    DatasetError
        If the form is unknown, nothing is there, labels are missing, or there is a single class.
        A damaged or missing *image* is no error here but an `UnreadableImage` when loaded.

    Examples
    --------
    >>> open_dataset("digits", samples=500)
    ImageDataset('digits', 500 images, 10 classes)
    """
    columns = {"image_column": image_column, "label_column": label_column}
    dataset = _open(spec, 2, split=split, **columns, labels=labels)
    return dataset if samples is None else dataset.sample(samples, seed)


def open_part(spec: Any, split: str | None = None, **columns: str | None) -> ImageDataset:
    """Open images to validate or test with, which may be of a single class.

    `NoPartError` if the data set has no part of that name.
    """
    return _open(spec, 1, split=split, **columns)


def _open(spec: Any, least: int, *, labels: Any = None, **options: Any) -> ImageDataset:
    """Open a data set of at least so many classes."""
    form, opener, usable = _form(spec, labels)
    options |= {"labels": labels, "least": least}
    refused = {name: options[name] for name in options if name not in (*usable, "least")}
    _refuse(form, **refused)
    return opener(spec, **{name: options.get(name) for name in usable})


def _form(spec: Any, labels: Any) -> tuple[str, Callable[..., ImageDataset], tuple[str, ...]]:
    """Name of the form of `spec`, the function that opens it, and the options that it takes."""
    columns = ("image_column", "label_column")
    if isinstance(spec, ImageDataset):
        return "an ImageDataset", lambda dataset: dataset, ()
    if isinstance(spec, str) and spec == "digits":
        return "'digits' (a folder of that name is './digits')", _open_digits, ()
    if isinstance(spec, str) and spec.startswith("hf:"):
        return "'hf:…'", _open_hub, ("split", *columns, "least")
    if isinstance(spec, str | os.PathLike):
        path = _absolute(spec)
        if os.path.isdir(path) and os.fspath(spec):  # "" is not the current folder
            return "a folder (the labels are the folder names)", _open_folder, ("split", "least")
        suffix = os.path.splitext(path)[1].lower()
        if os.path.exists(path) and not os.path.isdir(path) and not os.path.isfile(path):
            fact = f"{str(spec)!r} is neither a file nor a folder"
        elif not os.path.isfile(path):
            fact = f"{str(spec)!r} does not exist{_close_matches(path)}"
        elif suffix in (".csv", ".tsv", ".parquet", ".pq"):
            return "a table", _open_table, ("split", *columns, "least")
        else:
            archive = suffix in (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")
            fact = f"It is the file {path!r}" + ("; unpack it first" if archive else "")
        raise DatasetError(f"{fact}. A data set is one of: {_FORMS}.")
    if hasattr(spec, "cast_column"):
        return "a Hugging Face data set", _open_hf, ("split", *columns, "least")
    arrays = isinstance(spec, list | tuple | Mapping | np.ndarray) or hasattr(spec, "detach")
    if arrays or labels is not None:
        return "arrays", _open_arrays, ("labels", "least")
    foreign = isinstance(spec, bytes | bytearray | memoryview | range) or hasattr(spec, "iloc")
    if hasattr(spec, "__getitem__") and hasattr(spec, "__len__") and not foreign:
        return "a torchvision-style data set", _open_map, ("least",)
    more = "; pass its `.dataset`" if hasattr(spec, "dataset") else ""  # of a DataLoader
    if hasattr(spec, "iloc"):
        more = "; pass (table['path'].tolist(), table['label'])"
    raise DatasetError(f"It is a {type(spec).__name__}{more}. A data set is one of: {_FORMS}.")


def _absolute(path: Any) -> str:
    return os.path.abspath(os.path.expanduser(os.fspath(path)))


def _close_matches(path: str) -> str:
    """Suggest what may be meant, at the first part of the path that is wrong."""
    while not os.path.isdir(parent := os.path.dirname(path)) and parent != path:
        path = parent
    near = []
    with suppress(OSError):
        near = difflib.get_close_matches(os.path.basename(path), os.listdir(parent))
    found = " or ".join(repr(os.path.join(parent, name)) for name in near)
    return found and f"; perhaps {found}"


# ---- helpers


def _refuse(form: str, **options: Any) -> None:
    """Raise if an option is given that means nothing for this form."""
    given = [f"`{name}`" for name, value in options.items() if value is not None]
    if given:
        kind = NoPartError if given == ["`split`"] else DatasetError
        raise kind(f"{' and '.join(given)} cannot be used with {form}; leave it out.")


def _pick(pick: Callable[..., Any], *args: Any) -> Any:
    """Pick a part, with errors of data sets."""
    try:
        return pick(*args)
    except LookupError as error:
        raise NoPartError(error.args[0]) from None
    except ValueError as error:
        raise DatasetError(str(error)) from None


def _need(module: str, purpose: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DatasetError(
            f"{purpose} needs the package {module.partition('.')[0]!r}: "
            f"pip install 'sfda-tune[data]' ({one_line(error)})"
        ) from error


def _some(values: Iterable[Any], limit: int = 5) -> str:
    """``"1, 2, 3, 4, 5 and 7 more"``."""
    values = list(values)
    more = f" and {len(values) - limit} more" if len(values) > limit else ""
    return ", ".join(map(str, values[:limit])) + more


def _natural(text: str) -> tuple[Any, ...]:
    """Sort key: ``a2`` before ``a10``."""
    parts = re.split(r"(\d+)", text)
    return [int(part) if n % 2 else part for n, part in enumerate(parts)], text


def _class_key(name: str) -> tuple[Any, ...]:
    """Sort key: numbers by value, then names in natural order."""
    number = re.fullmatch(r"-?\d+(\.\d+)?", name)
    return number is None, float(name) if number else 0.0, _natural(name)


def _is_missing(label: Any) -> bool:  # as Python, numpy and pandas write it
    return label is None or str(label).strip() in ("", "nan", "NaN", "<NA>", "NaT")


def _class_name(label: Any) -> str:
    if isinstance(label, float) and label.is_integer():
        label = int(label)  # a column of integers read as floats
    if isinstance(label, bytes):
        label = label.decode("utf-8", "backslashreplace")
    if isinstance(label, tuple):  # torchvision's ImageNet: all names of the class
        return ", ".join(map(_class_name, label))
    return printable(str(label).strip())


def _encode(
    given: Iterable[Any],
    where: str,
    *,
    names: Sequence[Any] | None = None,
    rows: Sequence[int] | None = None,
    unit: str = "row",
    hint: str = "",
    least: int = 2,
    places: np.ndarray | None = None,
    folders: bool = False,
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels of any hashable type → codes 0 … C−1 and class names; all checks are here.

    `names` are the declared names of integer labels (ClassLabel, torchvision's `classes`). With
    `places`, `given` are the different labels only, and `places` says where in them each image's
    stands.
    """
    labels: list[Any] = [v.item() if getattr(v, "ndim", None) == 0 else v for v in given]
    n = len(labels) if places is None else len(places)
    if not n:
        raise DatasetError(f"{where} must hold at least one image but is empty.")
    try:
        distinct: set[Any] = set(labels)
    except TypeError:
        raise DatasetError(
            f"{where} must hold one label per image, a number or a name, but the first is "
            f"{one_line(repr(labels[0]), 60)}; for one-hot labels pass labels.argmax(axis=1)."
        ) from None
    missing = {label for label in distinct if not folders and _is_missing(label)}
    known = distinct - missing
    if names is not None and all(isinstance(v, int) and v < len(names) for v in known):
        missing |= {label for label in known if label < 0}  # the mark of unlabelled rows
        declared = [_class_name(name) for name in names]
        count = Counter(declared)  # ImageNet has two classes called crane
        text = {v: declared[v] for v in sorted(known - missing)}
        text = {v: f"{t} ({v})" if count[t] > 1 else t for v, t in text.items()}
        classes: tuple[str, ...] = tuple(text.values())
    else:  # names already, or numbers that are not positions in `names`
        text = {label: _class_name(label) for label in known}
        classes = tuple(sorted(set(text.values()), key=_class_key))
    if missing:
        bad = [n for n, label in enumerate(labels) if label in missing]
        bad = bad if places is None else np.flatnonzero(np.isin(places, bad)).tolist()
        told = [f"{unit} {n if rows is None else rows[n]}" for n in bad]
        raise DatasetError(
            f"{where} must hold a label for every image, but {len(bad)} of {n} are "
            f"missing ({_some(told)}); fill them in or remove these images."
        )
    if len(classes) < least:
        raise DatasetError(
            f"{where} must have at least 2 classes to rank backbones, but all {n} "
            f"images are of class {', '.join(classes)!r}.{hint}"
        )
    if alike := _find_lookalikes(classes):
        warnings.warn(
            f"{where} has classes whose names differ only in case, or in how their letters are "
            f"encoded ({_some(map(ascii, alike))}); if they are the same, give them one name.",
            UserWarning,
            stacklevel=2,
        )
    code = {name: n for n, name in enumerate(classes)}
    codes = np.array([code[text[label]] for label in labels])
    return codes if places is None else codes[places], classes


def _find_lookalikes(classes: Iterable[str]) -> list[str]:
    """Return names that are one after normalisation; of letters a and A are two."""
    groups: dict[str, list[str]] = {}
    for name in classes:
        normal = unicodedata.normalize("NFC", name)
        groups.setdefault(normal if len(normal) == 1 else normal.casefold(), []).append(name)
    return [name for group in groups.values() if len(group) > 1 for name in group]


def _check_folder_names(names: Iterable[str], where: str) -> None:
    """Refuse class folders without a name of their own."""
    count = Counter(name.strip() for name in dict.fromkeys(names))
    if blank := [name for name in dict.fromkeys(names) if not name.strip()]:
        raise DatasetError(
            f"{where} must have class folders whose names are the classes, but "
            f"{_some(map(ascii, blank))} consists of white space; rename it."
        )
    if same := [name for name in dict.fromkeys(names) if count[name.strip()] > 1]:
        raise DatasetError(
            f"{where} must have one folder per class, but {_some(map(ascii, same))} differ only "
            "in white space; rename or merge them."
        )


def _check_some_exist(items: Sequence[Any], base: str, what: str) -> None:
    """Turn a wrong base folder into one error, instead of a thousand unreadable images."""
    exists = (os.path.lexists(i) if isinstance(i, str) else i is not None for i in items)
    if items and not any(exists):
        raise DatasetError(
            f"{what} must hold encoded images or names of files, but none of the {len(items)} "
            f"exists, for instance {items[0]!r}; relative paths start at {base!r}."
        )


# ---- arrays


def _as_array(value: Any, ndim: int) -> Any:
    """Turn a tensor into an array, channels last; leave anything else as it is."""
    if not hasattr(value, "detach"):
        return value
    value = value.detach().cpu()
    array = (value.float() if value.is_floating_point() else value).numpy()  # bfloat16 has none
    channels_first = array.ndim == ndim and array.shape[-3] in _CHANNELS
    return np.moveaxis(array, -3, -1) if channels_first else array


def _pixels(array: np.ndarray, what: str) -> np.ndarray:
    """One image as uint8 array ``(h, w)`` or ``(h, w, c)``."""
    shape_is_known = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in _CHANNELS)
    if array.size == 0 or not shape_is_known:
        axes = array.ndim == 3 and array.shape[0] in _CHANNELS
        raise DatasetError(
            f"{what} must have shape (h, w) or (h, w, c) with c = 1, 3 or 4 but has "
            f"{array.shape}; "
            + ("channels come last: np.moveaxis(image, 0, -1)." if axes else "reshape it.")
        )
    if array.dtype == np.uint8:
        return array
    kind, low, high = array.dtype.kind, array.min(), array.max()
    if kind == "b":
        return array * np.uint8(255)
    if array.dtype == np.uint16:
        return deep_to_uint8(array)
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


def _item(value: Any, what: str) -> Any:
    """Turn an image in memory into an item."""
    if isinstance(value, bytes | Image.Image):
        return value
    value = _as_array(value, 3)
    if isinstance(value, np.ndarray):
        return _pixels(value, what)
    raise DatasetError(
        f"{what} must be an array, a tensor, a PIL image, a path or the bytes of an image file "
        f"but is {type(value).__name__}."
    )


def _open_arrays(
    images: Any, labels: Any = None, least: int = 2, name: str = "arrays"
) -> ImageDataset:
    if labels is None and isinstance(images, Mapping):
        if set(images) != {"images", "labels"}:
            raise DatasetError(
                "`spec`, if a dict, must have the keys 'images' and 'labels' but has "
                f"{_some(map(repr, images))}."
            )
        images, labels = images["images"], images["labels"]
    if labels is None and isinstance(images, tuple) and len(images) == 2:
        images, labels = images
    if labels is None:
        raise DatasetError(
            "`labels` must be given with images in a list or array: "
            "open_dataset((images, labels)) or open_dataset(images, labels=labels)."
        )
    images = _as_array(images, 4)
    for what, given in (("`images`", images), ("`labels`", labels)):
        if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
            kind = type(given).__name__
            raise DatasetError(
                f"{what} must be a sequence with one element per image but is {kind}."
            )
    if isinstance(images, np.ndarray) and images.dtype.kind not in "OSU":
        pixels = [_pixels(image, f"`images[{n}]`") for n, image in enumerate(images)]
        items: Any = images if images.dtype == np.uint8 else np.array(pixels)
    else:
        items = [
            _absolute(x) if isinstance(x, str | os.PathLike) else _item(x, f"`images[{n}]`")
            for n, x in enumerate(images)
        ]
        _check_some_exist(items, os.getcwd(), "`images`")
    tolist = getattr(labels, "tolist", None)  # arrays, tensors, pandas
    values: Any = tolist() if tolist else list(labels)
    if len(items) != len(values):
        raise DatasetError(
            f"`labels` must have one label per image, but there are {len(items)} images and "
            f"{len(values)} labels."
        )
    return ImageDataset(name, items, *_encode(values, "`labels`", least=least))


def _open_digits(spec: str) -> ImageDataset:
    from sklearn.datasets import load_digits

    digits = cast("Any", load_digits())
    # 17 grey levels, 0 … 16, spread evenly over 0 … 255
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return _open_arrays(images, digits.target, name=spec)


# ---- folders


def _is_image(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in EXTENSIONS


def _is_run(folder: str) -> bool:
    """Tell the folder of a search (`sfda_tune.pipelines.search`)."""
    return all(os.path.isfile(os.path.join(folder, f)) for f in ("search.json", "config.json"))


def _walk(
    folder: str, entered: Iterable[str] = (), *, silent: bool = False
) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` in natural order, without hidden ones; no folder twice, nor those `entered`.

    What is left out and not hidden is said, unless `silent`.
    """

    def leave_out(name: Any, why: str | None) -> None:
        if not silent:
            warnings.warn(f"{str(name)!r} is left out: {why}", UserWarning, stacklevel=3)

    def fail(error: OSError) -> None:
        leave_out(error.filename, error.strerror)

    seen = {os.path.realpath(path) for path in entered}  # a link up would mix the classes
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        for names in folders, files:
            shown = (n for n in names if not n.startswith(".") and n not in _JUNK)
            names[:] = sorted(shown, key=_natural)
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        for run in [path for n in folders if _is_run(path := os.path.join(parent, n))]:
            folders.remove(os.path.basename(run))
            leave_out(run, "it is the folder of a search, not of images")
        yield parent, folders, files


def _list(folder: str, *, silent: bool = False) -> tuple[list[str], list[str]]:
    """Names of the sub-folders and files of a folder."""
    found = _walk(folder, silent=silent)
    return next(((folders, files) for _, folders, files in found), ([], []))


def image_files(folder: str | os.PathLike[str]) -> Iterator[str]:
    """Yield the images below a folder in the order in which a data set has them."""
    for parent, _, files in _walk(os.fspath(folder)):
        yield from (os.path.join(parent, name) for name in files if _is_image(name))


def _hidden_classes(folder: str) -> list[str]:
    """Return hidden sub-folders that hold images, but for those that programs keep there."""
    with suppress(OSError):
        hidden = [e for e in os.scandir(folder) if e.name.startswith(".") and e.is_dir()]
        return sorted(
            entry.name
            for entry in hidden
            if not re.match(
                r"\.(_|ipynb_checkpoints|thumb|trash|cache|git)", entry.name.casefold()
            )
            and any(_is_image(name) for name in os.listdir(entry))
        )
    return []


def _unwrap(folder: str) -> str:
    """Go down where a folder holds nothing but one of its own name, as archives have it."""
    folders, files = _list(folder, silent=True)
    if len(folders) == 1 and folders[0].casefold() == os.path.basename(folder).casefold():
        return folder if any(map(_is_image, files)) else _unwrap(os.path.join(folder, folders[0]))
    return folder


def _find_parts(root: str, folders: Sequence[str], split: str | None) -> dict[str, str]:
    """Return the part behind each folder that is one; none if the folders are classes.

    Folders are parts if all have names of parts, one of them "train"; beside others, if there is
    more to it than the name, which may be that of a class: class folders inside.
    """

    def classes(folder: str) -> set[str]:
        return set(_list(_unwrap(os.path.join(root, folder)), silent=True)[0])

    def holds_images(folder: str) -> bool:
        tree = _walk(os.path.join(root, folder), {root}, silent=True)
        return any(_is_image(name) for _, _, files in tree for name in files)

    exact = {f: part for f in folders if (part := part_of(f))}
    trains = [f for f, part in exact.items() if part == "train"]
    if trains and len(exact) == len(folders):
        return exact
    inside = {f: classes(f) for f in folders if hint_at(f)}
    split_up = [f for f in trains if any(holds_images(os.path.join(f, c)) for c in inside[f])]
    if split_up and (
        len(set(exact.values())) > 1
        or not any(holds_images(f) for f in folders if f not in exact)
        or (split is not None and part_of(split) == "train")
    ):
        return exact
    for named in exact, {f: part for f in folders if (part := hint_at(f))}:
        if any(
            part != other and inside[f] & inside[g]
            for f, part in named.items()
            for g, other in named.items()
        ):
            return named
    return {}


def _open_folder(spec: Any, split: str | None, least: int) -> ImageDataset:
    root = _absolute(spec)
    name, where = printable(os.path.basename(root) or root), f"Folder {root!r}"
    if _is_run(root):
        raise DatasetError(f"{where} must hold labelled images but is the folder of a search.")
    folders, files = _list(root)
    tops = [root]
    if parts := _find_parts(root, folders, split):
        chosen = _pick(choose, parts, split, where)
        if split is not None and parts[chosen[0]] != "train":
            name = f"{name}/{split}"
        elif split == "all":
            name = f"{name}/all"
        tops = [_unwrap(os.path.join(root, c)) for c in chosen]
        beside = [f for f in folders if f not in parts]
        loose = sum(map(_is_image, files))
        if beside or loose:
            what = [_some(map(repr, beside))] * bool(beside)
            what += [f"{loose} images directly in it"] * bool(loose)
            warnings.warn(
                f"{where} has the parts {_some(map(repr, parts))}; left out is what lies beside "
                f"them: {' and '.join(what)}.",
                UserWarning,
                stacklevel=2,
            )
    elif split not in (None, "all"):
        raise NoPartError(
            f"`split` can only be used if the sub-folders are parts (train, val, test, …) with "
            f"class folders inside, but {where} has {_some(map(repr, folders))}; "
            "leave `split` out."
        )
    paths: list[str] = []
    labels: list[str] = []
    empty: list[str] = []
    inside: dict[str, list[str]] = {}
    for top in tops:
        if top != root:
            folders, files = _list(top)
        loose = sum(map(_is_image, files))
        if not folders:
            raise DatasetError(
                f"Folder {top!r} must have one sub-folder per class, like "
                f"{os.path.join(top, 'cat', '1.jpg')!r}, but has {loose} images "
                "and no sub-folders; move the images into class folders, or pass a .csv table "
                "with the columns path and label."
            )
        if hidden := _hidden_classes(top):
            text = (
                f"{_some(map(repr, hidden))} in {top!r} are left out: hidden folders with images."
            )
            warnings.warn(text, UserWarning, stacklevel=2)
        if loose:
            text = f"{loose} images directly in {top!r} are left out: they are in no class folder."
            warnings.warn(text, UserWarning, stacklevel=2)
        for label in folders:
            found: list[str] = []
            folder = os.path.join(top, label)
            for at, within, names in _walk(folder, {root, top}):
                found += [os.path.join(at, n) for n in names if _is_image(n)]
                if at == folder:
                    inside[label] = list(within)
            empty += [] if found else [label]
            if not found:
                inside.pop(label, None)
            paths += found
            labels += [label] * len(found)
    if not paths:
        raise DatasetError(
            f"{where} must hold image files, but its sub-folders ({_some(map(repr, empty))}) have "
            f"none; known are {' '.join(sorted(EXTENSIONS))}."
        )
    if empty:
        text = f"class folders without images are left out ({_some(map(repr, empty))})"
        warnings.warn(f"{where}: {len(empty)} {text}.", UserWarning, stacklevel=2)
    if doubt := _doubt_classes(inside):
        warnings.warn(f"{where}: {doubt}", UserWarning, stacklevel=2)
    _check_folder_names(labels, where)
    hint = " Put the images of each class into a sub-folder of their own."
    inner = os.path.join(tops[0], labels[0])
    if len(_list(inner, silent=True)[0]) > 1:
        hint = f" Its sub-folders look like classes: try {inner!r}."
    return ImageDataset(name, paths, *_encode(labels, where, hint=hint, least=least, folders=True))


def _doubt_classes(inside: Mapping[str, Sequence[str]]) -> str:
    """Say if the class folders may be something else, for what they have `inside`."""
    count = Counter(name for names in inside.values() for name in names)
    shared = [name for name, n in count.items() if n > 1]
    if shared:
        these = [label for label, names in inside.items() if set(names) & set(shared)]
    else:
        these = [f for f, names in inside.items() if part_of(f) and len(names) > 1]
        shared = [name for f in these for name in inside[f]]
    if not these:
        return ""
    return (
        f"{_some(map(repr, these))} are taken to be classes, but hold sub-folders "
        f"{_some(map(repr, shared))}; if those are the classes, pass one of the folders, "
        "`split` if they are parts, or a .csv table of paths and labels."
    )


# ---- tables


def _column(
    argument: str, given: str | None, columns: Iterable[str], where: str, typed: Sequence[str] = ()
) -> str:
    """Find a column by name, else as the only one of the right type, else by a usual name."""
    usual = IMAGE_COLUMNS if argument == "image_column" else LABEL_COLUMNS
    wanted = usual if given is None else (given,)
    if given is None and len(typed) == 1:
        return typed[0]
    for name in wanted:
        for column in (typed if given is None else ()) or columns:
            if column == name or (given is None and column.lower() == name):
                return column
    raise DatasetError(
        f"`{argument}` must be a column of {where}, one of {_some(map(repr, columns), 20)}, "
        f"but is {given!r}; by default it is the first one called {', '.join(usual)}."
    )


def _cell(value: Any, base: str) -> str | bytes | None:
    """Turn what an image column holds into an item; Hugging Face: ``{"bytes": …, "path": …}``."""
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, str) and value:
        return os.path.join(base, value)
    return value if isinstance(value, bytes) and value else None


def _open_table(
    spec: Any,
    split: str | None,
    image_column: str | None,
    label_column: str | None,
    least: int,
) -> ImageDataset:
    path = _absolute(spec)
    where, base = f"Table {path!r}", os.path.dirname(path)
    read = _read_csv if path.lower().endswith(("csv", "tsv")) else _read_parquet
    columns, cells, labels = read(path, where)
    note = where + " (its first line must name the columns)" * (read is _read_csv)
    image = _column("image_column", image_column, columns, note)
    label = _column("label_column", label_column, columns, note)
    name = printable(os.path.splitext(os.path.basename(path))[0])
    found, rows = labels(label), None
    if split != "all":
        free = [column for column in columns if column not in (image, label)]
        named = _pick(read_parts, free, lambda column: _listed(cells(column)), where)
        if named is not None:
            rows, part = _pick(choose_rows, named, split, where)
            name += "" if split is None or part == "train" else f"/{split}"
        elif split is not None:
            raise NoPartError(
                "`split` can only be used if a column such as split, fold or is_valid names the "
                f"part of each row, but {where} has only {_some(map(repr, columns), 20)}; leave "
                "`split` out."
            )
    if rows is not None:
        found = _of_rows(found, rows)
    codes, classes = _encode(where=f"{where}, column {label!r},", least=least, **found)
    items = _Cells(cells(image), base, rows)
    _check_some_exist(items, base, f"{where}, column {image!r},")
    origin = np.arange(len(codes)) if rows is None else np.array(rows)
    return ImageDataset(name, items, codes, classes, origin)


def _of_rows(found: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """Return what `_encode` is to know of some rows of a table."""
    found = {**found, "rows": [found["rows"][row] for row in rows] if "rows" in found else rows}
    if "places" not in found:
        return {**found, "given": [found["given"][row] for row in rows]}
    used, places = np.unique(found["places"][rows], return_inverse=True)
    return {**found, "given": [found["given"][k] for k in used], "places": places}


def _listed(column: Any) -> Sequence[Any]:
    return column.to_pylist() if hasattr(column, "to_pylist") else column


def _read_csv(path: str, where: str) -> tuple[Any, ...]:
    """Columns, a function that reads one, and one that reads the labels for `_encode`."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            head = file.readline()
            delimiter = max(",;\t", key=head.count)
            # "path, label": blanks after the delimiter belong to the layout, not to the names
            layout = {"delimiter": delimiter, "skipinitialspace": f"{delimiter} " in head}
            file.seek(0)
            reader: Any = csv.DictReader(file, strict=True, restval="", **layout)
            columns = reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            lines, rows = [], []
            for row in reader:
                lines.append(reader.line_num)
                rows.append(row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{where} must be a CSV file in UTF-8: {one_line(error)}.") from None
    if long := [n for n, row in zip(lines, rows, strict=True) if any(row.get(None, ()))]:
        raise DatasetError(
            f"{where} must have {len(columns)} fields per line, as its header has, but line "
            f"{_some(long)} has more; put names that hold {delimiter!r} between double quotes."
        )

    def cells(name: str) -> list[str]:
        return [read_csv_cell(row[name]) for row in rows]

    return columns, cells, lambda name: {"given": cells(name), "rows": lines, "unit": "line"}


def _read_parquet(path: str, where: str) -> tuple[Any, ...]:
    parquet = _need("pyarrow.parquet", "Reading .parquet")
    try:
        schema = parquet.read_schema(path)
    except (OSError, ValueError) as error:  # pyarrow.ArrowInvalid is a ValueError
        raise DatasetError(f"{where} must be a Parquet file: {one_line(error)}") from None

    # A few kilobytes may stand for millions of rows, so none becomes an object before it is asked
    # for; texts are kept once each.
    def cells(name: str) -> Any:
        texts = [name] if re.fullmatch("(large_)?string", str(schema.field(name).type)) else None
        return parquet.ParquetFile(path, read_dictionary=texts).read([name]).column(name)

    def labels(name: str) -> dict[str, Any]:
        found, column = {"names": _declared(schema, name)}, cells(name)
        try:
            coded = column.dictionary_encode().combine_chunks()
        except NotImplementedError:  # lists: `_encode` says what it thinks of them
            return found | {"given": column.to_pylist()}
        coded = coded.chunk(0) if hasattr(coded, "chunk") else coded
        given = [*coded.dictionary.to_pylist(), None]  # the last for what is missing
        places = coded.indices.fill_null(len(given) - 1).to_numpy()
        used = np.unique(places)  # a dictionary may hold more than the rows use
        return found | {"given": [given[k] for k in used], "places": np.searchsorted(used, places)}

    return schema.names, cells, labels


def _declared(schema: Any, label: str) -> list[str] | None:
    """Return the class names that Hugging Face wrote into the table."""
    with suppress(KeyError, TypeError, ValueError, RecursionError):
        found = json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]["names"]
        check(found, [str])
        return found
    return None


class _Cells(Sequence[Any]):
    """The items in an image column, made as they are asked for."""

    def __init__(self, column: Any, base: str, rows: Sequence[int] | None = None) -> None:
        self.column, self.base = column, base
        self.rows = range(len(column)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: Any) -> Any:
        value = self.column[self.rows[int(row)]]
        return _cell(value.as_py() if hasattr(value, "as_py") else value, self.base)


# ---- torchvision


def _map_item(dataset: Any, row: int) -> Any:
    return _item(dataset[row][0], "the image")


def _bare(dataset: Any, rows: Sequence[int], name: str) -> Any:
    """Check the first image that can be read; drop a transform that returns tensors.

    A data set of the wrong form is reported now, not once per image. Each backbone has a
    preprocessing of its own, to which the user's would be added; a transform from image to image
    (a crop to the region of interest) is kept.
    """
    problem = None
    for row in rows:
        try:
            image, _ = dataset[row]
        except Exception as error:  # perhaps this one image is damaged
            problem = f"raises {type(error).__name__}: {one_line(error)}"
            continue
        what = f"`spec[{row}]`, an image of {name},"
        if getattr(dataset, "transform", None) and not isinstance(image, Image.Image):
            with suppress(Exception):  # its images may be none without the transform
                copied = copy.copy(dataset)
                copied.transform = copied.transforms = None
                image, dataset = _item(copied[row][0], what), copied
                logger.info("%s: its transform is not applied", name)
        _item(image, what)
        return dataset
    if problem:
        raise DatasetError(f"`spec[row]` must be a pair (image, label), but {name} {problem}")
    return dataset


def _map_labels(dataset: Any, name: str) -> Sequence[Any]:
    """All labels: of an attribute, else by reading every image."""
    for attribute in ("targets", "labels", "_labels"):
        labels: Any = getattr(dataset, attribute, None)
        labels = labels.tolist() if hasattr(labels, "tolist") else labels  # arrays and tensors
        if isinstance(labels, list | tuple) and len(labels) == len(dataset):
            return labels
    logger.info("%s has no `targets`: every image is read once for its label", name)
    try:
        return [dataset[row][1] for row in range(len(dataset))]
    except Exception as error:
        raise DatasetError(
            f"{name} must have an attribute `targets` with all labels, because reading them image "
            f"by image fails with {type(error).__name__}: {one_line(error)}"
        ) from error


def _open_map(dataset: Any, least: int) -> ImageDataset:
    rows = list(range(len(dataset)))
    torch = sys.modules.get("torch")  # whoever has a Subset has imported it
    while torch is not None and type(dataset) is torch.utils.data.Subset:
        rows = [int(dataset.indices[row]) for row in rows]
        dataset = dataset.dataset
    name = type(dataset).__name__
    pairs: Any = getattr(dataset, "samples", None)  # of ImageFolder and its like
    if (
        isinstance(pairs, list)
        and pairs
        and isinstance(pairs[0], tuple)
        and _is_image(str(pairs[0][0]))
    ):
        labels = [label for _, label in pairs]
        items: Any = [os.path.abspath(pairs[row][0]) for row in rows]
    else:
        bare = _bare(dataset, rows, name)
        labels = _map_labels(bare, name)
        items = [partial(_map_item, bare, row) for row in rows]
    names: Any = getattr(dataset, "classes", None)
    labels = [labels[row] for row in rows]
    if convert := getattr(dataset, "target_transform", None):
        names, labels = None, [convert(label) for label in labels]
    names = names if isinstance(names, list | tuple) else None
    where = f"The labels of {name}"
    codes, classes = _encode(labels, where, names=names, rows=rows, least=least)
    return ImageDataset(name, items, codes, classes, np.array(rows))


# ---- Hugging Face


def _open_hub(
    spec: str,
    split: str | None,
    image_column: str | None,
    label_column: str | None,
    least: int,
) -> ImageDataset:
    """Open "hf:NAME", "hf:NAME:CONFIG" or "hf:" and a folder."""
    datasets, text = _need("datasets", "'hf:'"), spec[3:]
    if not text:
        raise DatasetError("`spec` must be 'hf:NAME' or 'hf:NAME:CONFIG' but is 'hf:'.")
    local = os.path.expanduser(text)
    exists = os.path.exists(local)
    name, _, config = (local, "", "") if exists else text.partition(":")
    shown = printable(os.path.basename(os.path.abspath(local)) if exists else text)
    saved = ("dataset_dict.json", "state.json")
    try:
        if any(os.path.exists(os.path.join(local, file)) for file in saved):
            data = datasets.load_from_disk(local)
        else:
            part = split if split and re.search(r"[\[+]", split) else None  # "train[:10%]"
            with nullcontext() if exists else cache_only_if_unreachable():
                data = datasets.load_dataset(name, config or None, split=part)
            if part:
                shown, split = f"{shown}/{part}", None
    except Exception as error:  # of network, file system, data set script, …
        raise DatasetError(
            f"`spec` 'hf:{printable(text)}' cannot be loaded: {type(error).__name__}: "
            f"{one_line(error)}"
        ) from error
    return _open_hf(data, split, image_column, label_column, least, shown)


def _hf_item(data: Any, column: str, base: str, row: int) -> str | bytes | None:
    return _cell(data[row][column], base)


def _open_hf(
    data: Any,
    split: str | None,
    image_column: str | None,
    label_column: str | None,
    least: int,
    name: str = "",
) -> ImageDataset:
    import datasets

    first: Any = next(iter(data.values())) if isinstance(data, Mapping) else data
    name = name or first.info.dataset_name or "dataset"
    where = f"Data set {name!r}"
    if isinstance(first, datasets.IterableDataset):
        raise DatasetError(
            f"{where} must not be streamed, for images are read in any order; load it without "
            "streaming=True."
        )
    if isinstance(data, Mapping) and len(data) > 1:
        parts = {c: part_of(c) for c in data}
        chosen = _pick(choose, parts, split, where)
        name += "" if split is None or parts[chosen[0]] == "train" else f"/{split}"
        data = datasets.concatenate_datasets([data[c] for c in chosen])
        named = None
    else:
        only, data = next(iter(data.items())) if isinstance(data, Mapping) else (None, data)
        named = _name_parts(data, (image_column, label_column), split, where)
        if named is None and only is not None:
            chosen = _pick(choose, {only: part_of(only)}, split, where)
            name += "" if split is None or chosen == ["train"] else f"/{split}"
        elif named is None and split != "all":
            _refuse(f"{where}, which is a single split", split=split)
    features = data.features
    kind = {column: type(feature).__name__ for column, feature in features.items()}
    images = [column for column in kind if kind[column] == "Image"]
    classes = [column for column in kind if kind[column] == "ClassLabel"]
    image = _column("image_column", image_column, kind, where, images)
    label = _column("label_column", label_column, kind, where, classes)
    data = data.with_format(None)
    names = getattr(features[label], "names", None)
    labels = data.select_columns([label])[:][label]
    wanted = np.arange(len(labels))
    if named is not None:
        rows, part = _pick(choose_rows, named, split, where)
        name += "" if split is None or part == "train" else f"/{split}"
        wanted = np.array(rows)
    labels = [labels[row] for row in wanted]
    what = f"{where}, column {label!r},"
    codes, class_names = _encode(labels, what, names=names, rows=wanted.tolist(), least=least)
    rows = data.select_columns([image])
    if kind[image] == "Image":
        rows = rows.cast_column(image, datasets.Image(decode=False))
    elif not re.search("string|binary", str(features[image])):
        raise DatasetError(
            f"`image_column` must hold images, paths or bytes, but {image!r} of {where} is "
            f"{one_line(features[image], 80)}; cast it to datasets.Image()."
        )
    items = [partial(_hf_item, rows, image, os.getcwd(), row) for row in wanted.tolist()]
    return ImageDataset(name, items, codes, class_names, wanted)


def _name_parts(data: Any, taken: Iterable[str | None], split: str | None, where: str) -> Any:
    """Return what `read_parts` finds in the columns of numbers and text; None for all rows."""
    if split == "all":
        return None
    features = {c: f for c, f in data.features.items() if c not in taken}
    plain = [c for c, f in features.items() if type(f).__name__ in ("Value", "ClassLabel")]
    bare = data.with_format(None)

    def cells(column: str) -> list[Any]:
        names = getattr(features[column], "names", None)
        values = bare.select_columns([column])[:][column]
        return [names[v] if names and v is not None and v >= 0 else v for v in values]

    return _pick(read_parts, plain, cells, where)
