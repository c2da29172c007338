"""Labels of any hashable type as integers; several labels per image as a matrix of indicators."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np

__all__ = ["NOUNS", "as_indicators", "encode_labels", "find_rarest", "find_varied", "tell_unit"]

# What names are called by task, if they are not classes
NOUNS = {"ordinal": "levels", "multilabel": "labels"}
LARGEST = 1e75  # of numbers to predict, and 1/LARGEST their range: squares are finite, and not 0


def encode_labels(labels: Any) -> tuple[np.ndarray, tuple[Hashable, ...]]:
    """Encode labels of any hashable type as 0 … C−1.

    Parameters
    ----------
    labels : sequence of hashable, shape (n_samples,)
        Class labels; need not be numbers, sorted or contiguous.

    Returns
    -------
    codes : ndarray of int64, shape (n_samples,)
    classes : tuple
        ``classes[codes[n]] == labels[n]``; sorted where the labels can be compared, else in the
        order of their `repr`, so that the result never depends on the order of the rows.

    Raises
    ------
    ValueError
        If `labels` is not one-dimensional, or holds a NaN, None or an unhashable value.

    Examples
    --------
    >>> encode_labels(["dog", "cat", "dog"])
    (array([1, 0, 1]), ('cat', 'dog'))
    """
    if hasattr(labels, "detach"):  # a torch tensor, wherever it is
        labels = labels.detach().cpu().numpy()
    if isinstance(labels, np.ndarray):
        if labels.ndim != 1:
            raise ValueError(
                f"`labels` must be one-dimensional (n_samples,) but has shape {labels.shape}; "
                "pass one label per row, for one-hot rows `labels.argmax(axis=1)`; several labels "
                "per image are for Features(task='multilabel') and sfda_tune.metrics.multilabel."
            )
        labels = labels.tolist()
    try:
        # Scalars of numpy and torch become Python's own: torch's are hashed by identity.
        labels = [v.item() if getattr(v, "ndim", None) == 0 else v for v in labels]
        distinct = set(labels)
    except TypeError as error:
        raise ValueError(
            f"`labels` must be a sequence of hashable labels, one per row ({error})."
        ) from None
    missing = {label for label in distinct if _is_missing(label)}
    if missing:
        rows = [n for n, label in enumerate(labels) if _is_missing(label)]
        raise ValueError(
            f"`labels` must not hold missing values but row {rows[0]} is {labels[rows[0]]!r} "
            f"({len(rows)} such rows); drop those rows from the features too."
        )
    try:
        classes = sorted(distinct)
    except TypeError:
        classes = sorted(distinct, key=lambda label: (type(label).__name__, repr(label)))
    index = {label: code for code, label in enumerate(classes)}
    codes = np.fromiter((index[label] for label in labels), dtype=np.int64, count=len(labels))
    return codes, tuple(classes)


def as_indicators(labels: Any) -> np.ndarray:
    """Return a matrix of indicators as int8: 1 the label applies, 0 it does not, −1 not known.

    Parameters
    ----------
    labels : array-like, tensor or data frame, shape (n_samples, n_labels)
        0, 1, False, True; NaN, None or −1 for what is not known.

    Raises
    ------
    ValueError
        If it has another shape or holds anything else.

    Examples
    --------
    >>> as_indicators([[1, 0], [float("nan"), 1]]).tolist()
    [[1, 0], [-1, 1]]
    """
    if hasattr(labels, "detach"):  # a torch tensor, wherever it is
        labels = labels.detach().cpu().numpy()
    try:
        found = np.asarray(labels)
        found = found.astype(np.float64) if found.dtype.kind in "biufO" else found
    except (TypeError, ValueError):
        found = np.empty(0, dtype=object)
    if found.ndim != 2 or 0 in found.shape or found.dtype.kind != "f":
        raise ValueError(
            "`labels` must be a matrix of 0 and 1 (NaN or -1: not known) with a row per image and "
            f"a column per label but has shape {np.shape(found)} and dtype {found.dtype}; for "
            "lists of names, sklearn.preprocessing.MultiLabelBinarizer makes one."
        )
    found = np.where(np.isnan(found), -1, found)
    bad = np.argwhere(~np.isin(found, (-1, 0, 1)))
    if len(bad):
        row, column = bad[0]
        raise ValueError(
            "`labels` must hold 0, 1 and NaN or -1 (not known) only, but row "
            f"{row}, column {column} is {found[row, column]:g}; pass probabilities as "
            "labels >= 0.5."
        )
    return found.astype(np.int8)


def find_rarest(indicators: np.ndarray) -> np.ndarray:
    """Return the rarest label that each row has, by position; n_labels for rows that have none.

    >>> find_rarest(np.array([[1, 1], [1, 0], [0, 0], [-1, 1], [1, 0]])).tolist()
    [1, 0, 2, 1, 0]
    """
    has = indicators == 1
    n, L = has.sum(axis=0), has.shape[1]
    order = np.argsort(n, kind="stable")
    return np.where(has.any(axis=1), order[has[:, order].argmax(axis=1)], L)


def find_varied(indicators: np.ndarray, least: int = 1) -> np.ndarray:
    """Return which labels are known to be had, and to be lacked, by so many rows, (n_labels,).

    >>> find_varied(np.array([[1, 1, -1], [0, 1, 1], [-1, 1, -1]])).tolist()
    [True, False, False]
    """
    return np.all([(indicators == k).sum(axis=0) >= least for k in (0, 1)], axis=0)


def tell_unit(numbers: np.ndarray) -> str:
    """Tell what numbers to predict must be like, if they need another unit; else "".

    >>> tell_unit(np.array([1e-200, 2e-200]))
    'must be within ±1e+75 and range over 1e-75 or more but go from 1e-200 to 2e-200; change the \
unit'
    """
    low, high = numbers.min(initial=np.inf), numbers.max(initial=-np.inf)
    if not len(numbers) or (max(-low, high) <= LARGEST and not 0 < high - low < 1 / LARGEST):
        return ""
    return (
        f"must be within ±{LARGEST:g} and range over {1 / LARGEST:g} or more but go from {low:g} "
        f"to {high:g}; change the unit"
    )


def _is_missing(label: Any) -> bool:
    """Tell None, NaN and pandas' NA, which is neither equal nor unequal to itself."""
    try:
        return label is None or bool(label != label)
    except (TypeError, ValueError):
        return True
