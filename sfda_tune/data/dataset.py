"""`ImageDataset`: images and labels, the one kind that everything else takes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from sfda_tune.data.checks import DatasetError
from sfda_tune.data.decoding import (
    UNREADABLE,
    Member,
    Passing,
    Picture,
    UnreadableImage,
    Verdict,
    as_picture,
    decode,
    digest,
    digest_pixels,
    explain,
)
from sfda_tune.data.formats import Reading
from sfda_tune.values.labels import NOUNS, as_indicators, find_rarest, tell_unit
from sfda_tune.values.text import LARGEST_SEED, integer, is_integer, one_line, printable

__all__ = ["ImageDataset"]

TENTHS = 10  # strata of numbers
STRATA = {
    "classification": "classes",
    "regression": "strata of the numbers",
    "ordinal": "levels (tenths of the images, where there are more than 20)",
    "multilabel": "rarest labels of an image",
}


@dataclass(frozen=True, eq=False, repr=False)
class ImageDataset:
    """Labelled images, decoded one at a time. Made by `open_dataset`.

    Can be pickled (by `spawn` too): a folder travels as its paths, arrays as their pixels.

    Parameters
    ----------
    name : str
        Shown in the ranking.
    items : sequence of length n
        Per image a path, a file in a tar (`Member`), encoded bytes, a uint8 array
        ``(h, w[, c])``, a `PIL.Image.Image`, or a function without arguments that returns one of
        these.
    labels : ndarray of int64 or float64, shape (n,), or of int8, shape (n, n_labels)
        Position of the class in `classes`; or, without classes, the number to predict; or, of
        several labels per image, for each of `classes` 1, 0, or −1 where it is not known.
        Read-only.
    classes : tuple of str
        Class names, none for numbers to predict; names that are numbers in numerical, others in
        natural order (``a2`` before ``a10``), so that they depend neither on the file system nor
        on the order of the rows.
    origin : ndarray of int64, shape (n,), optional
        Row number of each image in what the user gave, for messages.
    groups : ndarray of str, shape (n,), optional
        What each image belongs to (`sfda_tune.data.groups`): no split puts some images of a group
        on either side.
    times : ndarray of float64, shape (n,), optional
        When each was made: what is held out comes after what is trained on.
    reading : Reading, optional
        How pixels become RGB, where the files leave it open.
    ordered : bool, default False
        Whether `classes` are levels, from the lowest to the highest.
    contents : sequence of str, optional
        What `digests` returned: an image that is another by now cannot be read. So what is kept or
        noted under a digest is never of another image.

    >>> from sfda_tune import open_dataset
    >>> data = open_dataset((np.zeros((6, 4, 5, 3), np.uint8), ["dog", "cat"] * 3))
    >>> data.classes, data.labels.tolist(), data.load(0).size, data.item_name(0)
    (('cat', 'dog'), [1, 0, 1, 0, 1, 0], (5, 4), 'row 0')
    """

    name: str
    items: Sequence[Any] | np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    origin: np.ndarray = None  # type: ignore[assignment]
    groups: np.ndarray | None = None
    times: np.ndarray | None = None
    reading: Reading | None = None
    ordered: bool = False
    contents: Sequence[str] | None = None

    def __post_init__(self) -> None:
        labels, n, n_classes = np.asarray(self.labels), len(self.items), len(self.classes)
        if labels.ndim == 2 and labels.shape == (n, n_classes):
            self._set(as_indicators(labels))
            return
        integers = labels.shape == (n,) and labels.dtype.kind in "iu"
        numbers = labels.shape == (n,) and labels.dtype.kind == "f" and not n_classes
        if numbers and not np.isfinite(labels).all():
            raise DatasetError("`labels` that are numbers to predict must be finite but are not.")
        if numbers and (told := tell_unit(labels)):
            raise DatasetError(f"`labels` that are numbers to predict {told}.")
        if not numbers and not (integers and np.all((labels >= 0) & (labels < n_classes))):
            raise DatasetError(
                f"`labels` must be {n} integers in 0 … {n_classes - 1} (positions in `classes`), "
                f"one per image, but is {one_line(repr(self.labels), 80)}; `open_dataset` encodes "
                "other labels."
            )
        self._set(labels.astype(np.float64 if numbers else np.int64))

    def _set(self, labels: np.ndarray) -> None:
        n = len(labels)
        labels.flags.writeable = False
        object.__setattr__(self, "labels", labels)
        if self.origin is None:
            object.__setattr__(self, "origin", np.arange(n))
        for name in ("groups", "times", "contents"):
            if (value := getattr(self, name)) is not None and len(value) != n:
                raise DatasetError(f"`{name}` must have {n} values but has {len(value)}.")

    @property
    def task(self) -> str:
        """What labels are: "classification", "regression", "ordinal" or "multilabel"."""
        if self.labels.ndim == 2:
            return "multilabel"
        if self.ordered:
            return "ordinal"
        return "regression" if self.labels.dtype.kind == "f" else "classification"

    @cached_property
    def strata(self) -> np.ndarray:
        """What samples are stratified by: the classes; of numbers, tenths of the images by size.

        Equal numbers are in the same tenth; so are levels, if there are more than twenty. Of
        several labels, the rarest that an image has.
        """
        few = self.task == "ordinal" and len(self.classes) <= 2 * TENTHS
        if self.task == "classification" or few:
            return self.labels
        if self.task == "multilabel":
            return find_rarest(self.labels)
        rank = np.searchsorted(np.sort(self.labels), self.labels)
        return np.unique(rank * TENTHS // max(len(self), 1), return_inverse=True)[1]

    def require_one_label(self, purpose: str) -> None:
        """Raise a DatasetError if there are several labels per image."""
        if self.task == "multilabel":
            raise DatasetError(
                f"`dataset` must have one label per image {purpose} but has several (the task "
                "'multilabel'); rank and search take these (--task multilabel)."
            )

    def require_classes(self, purpose: str) -> None:
        """Raise a DatasetError if the labels are no classes, one per image."""
        self.require_one_label(purpose)
        if self.task != "classification":
            what = "levels in an order" if self.ordered else "numbers to predict"
            raise DatasetError(
                f"`dataset` must have classes {purpose} but has {what} (the task {self.task!r}); "
                f"if each {'level' if self.ordered else 'number'} is a class, pass "
                "task='classification' (--task classification)."
            )

    def label_name(self, label: Any) -> str:
        """Return what a label is called: its class, the number, or the labels that apply."""
        if self.task == "multilabel":
            names = [c for c, one in zip(self.classes, label, strict=True) if one == 1]
            return " + ".join(names) or "no label"
        return f"{label:g}" if self.task == "regression" else self.classes[label]

    @cached_property
    def group_codes(self) -> np.ndarray | None:
        """The groups as numbers; None where there are none, or each image is its own."""
        if self.groups is None:
            return None
        names, codes = np.unique(self.groups, return_inverse=True)
        return None if len(names) == len(codes) else codes

    def __repr__(self) -> str:
        what = f"{len(self.classes)} {NOUNS.get(self.task, 'classes')}"
        if self.task == "regression":
            ends = (f"{v:g}" for v in (self.labels.min(), self.labels.max())) if len(self) else ()
            what = f"numbers {' … '.join(ends)}"
        return f"ImageDataset({self.name!r}, {len(self)} images, {what})"

    def __len__(self) -> int:
        return len(self.items)

    @property
    def channels(self) -> int:
        """What networks are shown: 3 (RGB), or as many as there are bands that are no colours."""
        return 3 if self.reading is None else self.reading.channels

    def load(self, row: int) -> Picture:
        """Decode one image, by any thread; `UnreadableImage` if missing, damaged or too large.

        RGB, or an array of uint8 (h, w, bands) where `channels` is not 3.
        """
        item = self.items[row]
        try:
            return decode(item, reading=self.reading, expected=self._content(row))
        except Verdict as verdict:
            error: Any = verdict.__cause__
            raise UnreadableImage(self.item_name(row), explain(error, item)) from error
        except Exception as error:  # of the system, of a foreign data set
            reason = Passing(explain(error, item))
            raise UnreadableImage(self.item_name(row), reason) from error

    def _content(self, row: int) -> str | None:
        return None if self.contents is None else self.contents[row]

    def picture(self, row: int) -> Image.Image:
        """One image as people are shown it: of many bands the first three in colour."""
        return as_picture(self.load(row))

    def item_name(self, row: int) -> str:
        """Path of an image, or ``"row 17"``: printable, also where the file name is not."""
        item = self.items[row]
        if isinstance(item, str | os.PathLike | Member):
            return printable(str(item))
        return f"row {self.origin[row]}"

    def digest(self, row: int) -> str:
        """Fingerprint of the bytes or pixels of one image, never of its path, label or position.

        `UNREADABLE` where there is nothing to read (a damaged file has a fingerprint).
        """
        item = self.items[row]
        try:
            return digest(item, self.reading)
        except Exception:  # a foreign data set may raise anything
            return UNREADABLE

    def pixel_digest(self, row: int) -> str:
        """Fingerprint of what one image shows, whatever file it is in; `UNREADABLE` if none."""
        try:
            return digest_pixels(self.load(row))
        except UnreadableImage:
            return UNREADABLE

    def thumbnail(self, row: int, side: int) -> np.ndarray | None:
        """One image as a square in colour; zeros for what is smaller, or cannot be read.

        None if it cannot for a reason that may pass.
        """
        try:
            image = as_picture(decode(self.items[row], 4 * side, self.reading, self._content(row)))
        except Verdict:  # `load` says why
            return np.zeros((side, side, 3), np.uint8)
        except Exception:
            return None
        if min(image.size) < side:
            return np.zeros((side, side, 3), np.uint8)
        return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))

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
        return replace(
            self,
            items=items,
            labels=self.labels[rows],
            origin=self.origin[rows],
            groups=None if self.groups is None else self.groups[rows],
            times=None if self.times is None else self.times[rows],
            contents=None if self.contents is None else [self.contents[row] for row in rows],
        )

    def sample(self, n: int, seed: int = 0) -> ImageDataset:
        """Draw `n` images, stratified by class; they keep their order.

        Numbers, and several labels per image, are stratified by `strata`.
        Classes share the places in proportion to their size, but each gets min(2, its size)
        places first (one, where `n` is too small for two). Groups are not drawn as a whole, but
        what is drawn of one stays together. A smaller sample is part of every
        larger one of the same `seed`; which images these are depends on the order of the rows and
        of the classes. Places are dealt by the
        Sainte-Laguë rule, because with largest remainders a class may *lose* a place when `n`
        grows (Alabama paradox). `DatasetError` if `n` is less than the number of classes.

        >>> from sfda_tune import open_dataset
        >>> data = open_dataset((np.zeros((100, 2, 2), np.uint8), [0] * 80 + [1] * 20))
        >>> np.bincount(data.sample(10).labels)
        array([8, 2])
        """
        if not is_integer(n, 1):
            raise DatasetError(f"`samples` must be a positive int but is {n!r}.")
        seed = integer("seed", seed, 0, LARGEST_SEED)
        return self if n >= len(self) else self.subset(self.sample_rows(int(n), seed))

    def sample_rows(self, n: int, seed: int = 0) -> np.ndarray:
        """Return the rows that `sample` draws, sorted."""
        classes, code, counts = np.unique(self.strata, return_inverse=True, return_counts=True)
        if n < len(classes):
            kind = STRATA[self.task]
            raise DatasetError(
                f"`samples` must be at least the number of {kind}, {len(classes)}, but is {n}; "
                "better 20 or more images of each."
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
