"""Class names: from what tables, folders and data sets hold, in the order people expect.

Or numbers to predict, for regression; or levels, whose order counts. Without a word of the user,
numbers are classes where they look like codes of classes (`looks_like_target`), and refused where
they do not.
"""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence, Set
from contextlib import suppress
from typing import Any

import numpy as np

from sfda_tune.data.checks import DatasetError
from sfda_tune.values.text import one_line, printable, some


def natural_key(text: str) -> tuple[Any, ...]:
    """Sort key: ``a2`` before ``a10``."""
    parts = re.split(r"(\d+)", text)
    return [int(part) if n % 2 else part for n, part in enumerate(parts)], text


def _class_key(name: str) -> tuple[Any, ...]:
    """Sort key: numbers by value, then names in natural order."""
    number = re.fullmatch(r"-?\d+(\.\d+)?", name)
    return number is None, float(name) if number else 0.0, natural_key(name)


def sort_classes(names: Iterable[str]) -> list[str]:
    """Return names in the order people expect."""
    return sorted(names, key=_class_key)


def is_missing(label: Any) -> bool:
    """Tell what Python, NumPy and pandas write for nothing."""
    return label is None or str(label).strip() in ("", "nan", "NaN", "<NA>", "NaT")


def class_name(label: Any) -> str:
    """Return a label as a printable text."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)  # a column of integers read as floats
    if isinstance(label, bytes):
        label = label.decode("utf-8", "backslashreplace")
    if isinstance(label, tuple):  # torchvision's ImageNet: all names of the class
        return ", ".join(map(class_name, label))
    return printable(str(label).strip())


def encode(
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
    task: str | None = None,
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels of any hashable type → codes 0 … C−1 and class names; all checks are here.

    For the `task` "regression" → the numbers, float64, and no classes. For "ordinal" classes like
    others, which `order_levels` puts in order. Labels of the task "multilabel" are read by
    `sfda_tune.data.several`: whoever comes here has one per image.

    `names` are the declared names of integer labels (ClassLabel, torchvision's `classes`). With
    `places`, `given` are the different labels only, and `places` says where in them each image's
    stands.
    """
    if task == "multilabel":
        raise DatasetError(
            f"{where} must hold several labels per image for the task 'multilabel' but hold one; "
            "leave the task out. Several come from a table (a column of 0 and 1 for each label, "
            "or one column with `label_delimiter`), JSON like COCO's, a column of lists, or a "
            "matrix of 0 and 1."
        )
    labels: list[Any] = [v.item() if getattr(v, "ndim", None) == 0 else v for v in given]
    n = len(labels) if places is None else len(places)
    if not n:
        raise DatasetError(f"{where} must hold at least one image but is empty.")
    try:
        distinct: set[Any] = set(labels)
    except TypeError:
        raise DatasetError(
            f"{where} must hold one label per image, a number or a name, but the first is "
            f"{one_line(repr(labels[0]), 60)}; for one-hot labels pass labels.argmax(axis=1), for "
            "several labels per image task='multilabel' (--task multilabel)."
        ) from None
    missing = {label for label in distinct if not folders and is_missing(label)}
    known = distinct - missing
    if names is not None and all(isinstance(v, int) and v < len(names) for v in known):
        missing |= {label for label in known if label < 0}  # the mark of unlabelled rows
        declared = [class_name(name) for name in names]
        count = Counter(declared)  # ImageNet has two classes called crane
        text = {v: declared[v] for v in sorted(known - missing)}
        text = {v: f"{t} ({v})" if count[t] > 1 else t for v, t in text.items()}
        classes: tuple[str, ...] = tuple(text.values())
    else:  # names already, or numbers that are not positions in `names`
        text = {label: class_name(label) for label in known}
        classes = tuple(sort_classes(set(text.values())))
    unsaid = task is None and not folders and names is None and least > 1
    if unsaid:
        _refuse_lists(known, n, where)
    if missing:
        bad = [n for n, label in enumerate(labels) if label in missing]
        bad = bad if places is None else np.flatnonzero(np.isin(places, bad)).tolist()
        told = [f"{unit} {n if rows is None else rows[n]}" for n in bad]
        raise DatasetError(
            f"{where} must hold a label for every image, but {len(bad)} of {n} are "
            f"missing ({some(told)}); fill them in or remove these images."
        )
    if task == "regression":
        return _read_numbers(labels, text, where, places), ()
    if unsaid:
        _refuse_target(known, n, where)
    if len(classes) < least:
        raise DatasetError(
            f"{where} must have at least 2 classes to rank backbones, but all {n} "
            f"images are of class {', '.join(classes)!r}.{hint}"
        )
    if alike := _find_lookalikes(classes):
        warnings.warn(
            f"{where} has classes whose names differ only in case, or in how their letters are "
            f"encoded ({some(map(ascii, alike))}); if they are the same, give them one name.",
            stacklevel=2,
        )
    code = {name: n for n, name in enumerate(classes)}
    codes = np.array([code[text[label]] for label in labels])
    return codes if places is None else codes[places], classes


def list_levels(levels: Any) -> list[str] | None:
    """Return levels as texts: a list, or one text with commas.

    >>> list_levels("small, large"), list_levels((0, 1.0))
    (['small', 'large'], ['0', '1'])
    """
    if levels is None:
        return None
    if not isinstance(levels, Iterable) or isinstance(levels, Set):  # which has no order
        raise DatasetError(
            "`levels` must be names from the lowest to the highest, such as ['small', 'large'], "
            f"but is {levels!r}."
        )
    return [class_name(v) for v in (levels.split(",") if isinstance(levels, str) else levels)]


def order_levels(
    classes: Sequence[str], levels: Iterable[Any] | None, where: str
) -> tuple[tuple[str, ...], np.ndarray]:
    """Return levels from the lowest to the highest, and which of them each class is.

    Without `levels` names that are numbers, or that begin alike and then have a number each, are
    ordered by it.

    >>> order_levels(["0-9", "10-19", "60+"], None, "`labels`")
    (('0-9', '10-19', '60+'), array([0, 1, 2]))
    >>> order_levels(["large", "small"], ["small", "medium", "large"], "`labels`")
    (('small', 'medium', 'large'), array([2, 0]))
    """
    if levels is None:
        keys = _find_order(classes)
        if keys is None:
            raise DatasetError(
                f"{where} must say the order of its levels, for {some(map(repr, classes))} are no "
                "different numbers; pass levels=['small', 'medium', …] (--levels small,medium,…), "
                "all of them from the lowest to the highest."
            )
        order = sorted(range(len(classes)), key=lambda c: keys[c])
        return tuple(classes[c] for c in order), np.argsort(order)
    names = tuple(list_levels(levels) or ())
    place = {_level_key(name): k for k, name in enumerate(names)}
    if len(place) < max(len(names), 2) or "" in names:
        raise DatasetError(
            f"`levels` must be two or more different names but are {names}; pass each once, from "
            "the lowest to the highest."
        )
    unknown = [name for name in classes if _level_key(name) not in place]
    if unknown:
        raise DatasetError(
            f"{where} must hold nothing but `levels` ({', '.join(names)}) but has "
            f"{some(map(repr, unknown))}; name all of them, from the lowest to the highest "
            "(--levels), or remove these images."
        )
    return names, np.array([place[_level_key(name)] for name in classes])


def _level_key(name: str) -> Any:
    number = _as_number(name)
    return name if number is None else number


def _find_order(names: Sequence[str]) -> list[float] | None:
    """Return the number in each name that orders them, if there is one."""
    numbers = [_as_number(name) for name in names]
    if None not in numbers and len(set(numbers)) == len(names):  # not "1" and "01"
        return numbers  # type: ignore[return-value]
    parts = [re.match(r"(\D*)(\d+(?:\.\d+)?)", name) for name in names]
    if None in parts or len({part[1] for part in parts if part}) > 1:
        return None
    found = [float(part[2]) for part in parts if part]
    return found if len(set(found)) == len(found) else None


MANY = 20  # different integers, up to which they are taken for codes of classes
DELIMITERS = (";", "|", ",")  # between several labels in one text
RARE = 3  # images of each of many integers, on average, from which they are


def looks_like_target(numbers: np.ndarray, n: int) -> bool:
    """Whether different `numbers`, on `n` images, are more like a target than codes of classes.

    They are if there are three or more and some have a fraction, or if there are more than `MANY`
    whole ones with fewer than `RARE` images each, on average.

    >>> looks_like_target(np.array([0.5, 1.0, 2.25]), 300)
    True
    >>> looks_like_target(np.arange(10), 30), looks_like_target(np.arange(36), 40)
    (False, True)
    """
    if np.any(numbers != np.floor(numbers)):
        return len(numbers) > 2
    return len(numbers) > MANY and n < RARE * len(numbers)


def _refuse_target(labels: Iterable[Any], n: int, where: str) -> None:
    """Raise a DatasetError if labels are numbers to predict rather than codes of classes."""
    numbers = {_as_number(label) for label in labels}
    values = np.array(sorted(v for v in numbers if v is not None))
    if None in numbers or not looks_like_target(values, n):
        return
    fraction = bool(np.any(values != np.floor(values)))
    kind = "numbers with a fraction" if fraction else "whole numbers"
    rule = (
        "three or more of which some have a fraction"
        if fraction
        else f"more than {MANY} with fewer than {RARE} images each, on average"
    )
    raise DatasetError(
        f"{where} must say what its numbers are: {len(values)} different {kind} from "
        f"{values[0]:g} to {values[-1]:g} on {n} images look like a quantity to predict, not like "
        f"classes ({rule}); pass task='regression' (--task regression); if only their order "
        "counts, as that of grades, task='ordinal' (--task ordinal); or, if each number is a "
        "class, task='classification' (--task classification)."
    )


def find_delimiter(labels: Iterable[Any]) -> str | None:
    """Return what separates labels within labels, if they look like lists.

    They do if they have fewer different parts than there are different labels.

    >>> find_delimiter(["cat;dog", "cat", "dog", ""]), find_delimiter(["Doe, Jo", "Poe, Al"])
    (';', None)
    """
    names = {label for label in labels if isinstance(label, str) and label.strip()}
    for delimiter in DELIMITERS:
        parts = {part.strip() for name in names for part in name.split(delimiter)} - {""}
        if any(delimiter in name for name in names) and len(parts) < len(names):
            return delimiter
    return None


def _refuse_lists(labels: Iterable[Any], n: int, where: str) -> None:
    """Raise a DatasetError if labels are several in one text rather than classes."""
    names = [label for label in labels if isinstance(label, str)]
    if (delimiter := find_delimiter(names)) is None:
        return
    parts = {part.strip() for name in names for part in name.split(delimiter)} - {""}
    example = max(names, key=lambda name: (name.count(delimiter), name))
    raise DatasetError(
        f"{where} must say what its labels are: {len(names)} different ones on {n} images, such "
        f"as {one_line(repr(example), 60)}, are made of {len(parts)} parts with {delimiter!r} "
        "between them and look like several labels per image, not like classes; pass "
        f"task='multilabel', label_delimiter={delimiter!r} (--task multilabel --label-delimiter "
        f"{delimiter!r}), or, if each is a class, task='classification' (--task classification)."
    )


def _as_number(label: Any) -> float | None:
    """Return a label as a finite number; None if it is none."""
    if isinstance(label, bool) or not isinstance(label, str | int | float):
        return None
    with suppress(ValueError, OverflowError):
        number = float(label)
        return number if np.isfinite(number) and "_" not in str(label) else None
    return None


def _read_numbers(
    labels: Sequence[Any], known: Iterable[Any], where: str, places: np.ndarray | None
) -> np.ndarray:
    """Return labels as float64, one per image."""
    bad = sorted({str(label) for label in known if _as_number(label) is None})
    if bad:
        raise DatasetError(
            f"{where} must hold finite numbers for the task 'regression' but holds "
            f"{some(map(repr, bad))}; choose another column, or task='classification' "
            "(--task classification)."
        )
    values = np.array([float(label) for label in labels])
    values = values if places is None else values[places]
    if len(values) > 1 and values.min() == values.max():
        raise DatasetError(
            f"{where} must hold different numbers to rank backbones, but all {len(values)} are "
            f"{values[0]:g}."
        )
    return values


def _find_lookalikes(classes: Iterable[str]) -> list[str]:
    """Return names that are one after normalisation; of letters a and A are two."""
    groups: dict[str, list[str]] = {}
    for name in classes:
        normal = unicodedata.normalize("NFC", name)
        groups.setdefault(normal if len(normal) == 1 else normal.casefold(), []).append(name)
    return [name for group in groups.values() if len(group) > 1 for name in group]
