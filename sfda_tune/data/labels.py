"""Class names: from what tables, folders and data sets hold, in the order people expect."""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
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
        classes = tuple(sorted(set(text.values()), key=_class_key))
    if missing:
        bad = [n for n, label in enumerate(labels) if label in missing]
        bad = bad if places is None else np.flatnonzero(np.isin(places, bad)).tolist()
        told = [f"{unit} {n if rows is None else rows[n]}" for n in bad]
        raise DatasetError(
            f"{where} must hold a label for every image, but {len(bad)} of {n} are "
            f"missing ({some(told)}); fill them in or remove these images."
        )
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


def _find_lookalikes(classes: Iterable[str]) -> list[str]:
    """Return names that are one after normalisation; of letters a and A are two."""
    groups: dict[str, list[str]] = {}
    for name in classes:
        normal = unicodedata.normalize("NFC", name)
        groups.setdefault(normal if len(normal) == 1 else normal.casefold(), []).append(name)
    return [name for group in groups.values() if len(group) > 1 for name in group]
