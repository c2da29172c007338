"""Labels of any hashable type as integers."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np

__all__ = ["encode_labels"]


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
                "pass one label per row, for one-hot rows `labels.argmax(axis=1)`."
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


def _is_missing(label: Any) -> bool:
    """Tell None, NaN and pandas' NA, which is neither equal nor unequal to itself."""
    try:
        return label is None or bool(label != label)
    except (TypeError, ValueError):
        return True
