"""Input of the metrics that are computed with NumPy: checked, copied, in an order of their own.

Rows are sorted by class; classes, and the rows of a class, by their coordinate along a fixed
direction. Results therefore depend on neither the order of the rows nor the names of the classes,
also where an algorithm itself does (folds, initial values, iterations that stop early).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.linalg import eigh

from sfda_tune.values.labels import encode_labels

__all__ = [
    "Data", "as_matrix", "encode", "encode_groups", "load", "load_logits", "narrow", "pca",
    "triangle",
]  # fmt: skip

LARGEST = 1e75  # of |feature|: the squares of squares stay finite in float64
EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Data:
    """Features and labels in the order of this module; `X` is a copy that may be overwritten."""

    X: np.ndarray  # (N, D), float64
    y: np.ndarray  # (N,), sorted codes 0 … C−1
    counts: np.ndarray  # (C,), n_c
    order: np.ndarray  # (N,), the caller's row behind each row of X
    dtype: str  # of the caller's features

    @property
    def N(self) -> int:  # noqa: N802 (the paper's letter)
        """Samples."""
        return self.X.shape[0]

    @property
    def D(self) -> int:  # noqa: N802
        """Dimensions."""
        return self.X.shape[1]

    @property
    def C(self) -> int:  # noqa: N802
        """Classes."""
        return len(self.counts)

    @property
    def q(self) -> np.ndarray:
        """Class priors n_c/N, shape (C,)."""
        return self.counts / self.N

    def slices(self) -> Iterator[slice]:
        """Rows of each class."""
        for i, j in pairwise(np.concatenate([[0], np.cumsum(self.counts)]).tolist()):
            yield slice(i, j)

    def sums(self, rows: np.ndarray) -> np.ndarray:
        """Sum an (N, …) array over the rows of each class: (C, …)."""
        return np.add.reduceat(rows, np.cumsum(self.counts) - self.counts, axis=0)

    def means(self, rows: np.ndarray) -> np.ndarray:
        """Class means of an (N, K) array: (C, K)."""
        return self.sums(rows) / self.counts[:, None]

    def unsorted(self, values: np.ndarray) -> np.ndarray:
        """Per-sample values in the order of the caller's rows."""
        out = np.empty(values.shape)
        out[self.order] = values
        return out

    def details(self) -> dict[str, Any]:
        """Sizes and dtype."""
        return {"n_samples": self.N, "n_dims": self.D, "n_classes": self.C, "dtype": self.dtype}


def load(features: Any, labels: Any, name: str = "features") -> Data:
    """Check features and labels, copy them and put them in order.

    Raises
    ------
    ValueError
        If `features` is not a finite real matrix with at least one column, or `labels` does not
        fit it, holds a missing value or fewer than two classes. `name` is what to call them.
    """
    dtype = str(getattr(features, "dtype", "")).removeprefix("torch.")
    matrix = as_matrix(features, name)
    codes = encode(labels, len(matrix), name)
    if matrix.dtype != np.float32 or max(-matrix.min(), matrix.max()) > 1e30:
        matrix = matrix.astype(np.float64, copy=False)  # float32 would overflow when projected
    direction = np.random.default_rng(0).normal(size=matrix.shape[1])
    along = np.argsort(matrix @ direction.astype(matrix.dtype), kind="stable")
    # Number the classes by their first row along the direction, then bring their rows together.
    _, first, codes = np.unique(codes[along], return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    codes = rank[codes]
    by_class = np.argsort(codes, kind="stable")
    order = along[by_class]
    X = matrix[order].astype(np.float64, copy=False)
    return Data(X, codes[by_class], np.bincount(codes), order, dtype or str(matrix.dtype))


def load_logits(logits: Any, labels: Any, metric: str) -> Data:
    """Check the outputs of the source classifier, which take the place of the features."""
    if logits is None:
        raise ValueError(
            f"`logits` must be given: {metric} needs the outputs of the source classifier on the "
            "target images, shape (n_samples, n_source_classes), and cannot be computed from "
            f"features; call `{metric}(None, labels, logits=...)`, or choose a metric whose "
            "`needs` are features only (`describe_metrics()`)."
        )
    return load(logits, labels, "logits")


def as_matrix(features: Any, name: str = "features", *, on_device: bool = False) -> Any:
    """Return a finite, real (N, D) array, not necessarily a copy; on request a CUDA tensor stays.

    scikit-learn's `check_array` does the same, but says neither the rows nor what to do.
    """
    torch = sys.modules.get("torch")  # whoever holds a tensor has imported torch
    if torch is not None and isinstance(features, torch.Tensor):
        features = features.detach()
        on_device = on_device and features.is_cuda
        if features.is_floating_point() and features.itemsize < 4:
            features = features.float()  # bfloat16, float8: unknown to NumPy, and without `min`
        if on_device and features.dtype == torch.bool:
            features = features.float()
        if not on_device:
            features = features.numpy(force=True)
    else:
        try:
            features = np.asarray(features)
        except ValueError as error:  # ragged lists
            raise ValueError(
                f"`{name}` must be a (n_samples, n_dims) array but NumPy cannot build it from "
                f"{type(features).__name__} ({error}); give every row the same length."
            ) from None
    shape = tuple(features.shape)
    kind = "c" if "complex" in str(features.dtype) else getattr(features.dtype, "kind", "f")
    if kind not in "biuf":
        raise ValueError(
            f"`{name}` must be a dense array of real numbers but its dtype is {features.dtype}; "
            f"convert it first, for instance with `{name}.astype(float)`."
        )
    if len(shape) != 2:
        raise ValueError(
            f"`{name}` must be two-dimensional (n_samples, n_dims) but has shape {shape}; "
            "pool or flatten each sample to one row."
        )
    if 0 in shape:
        raise ValueError(
            f"`{name}` must have at least one row and one column but has shape {shape}; "
            "check the step that extracted it."
        )
    with np.errstate(invalid="ignore"):
        low, high = float(features.min()), float(features.max())  # no copy; NaN comes through
    if not (math.isfinite(low) and math.isfinite(high)):
        host = features.cpu().numpy() if hasattr(features, "cpu") else features
        rows = np.flatnonzero(~np.isfinite(host).all(axis=1))
        raise ValueError(
            f"`{name}` must be finite but {len(rows)} of {len(host)} rows hold NaN or Inf, "
            f"the first is row {rows[0]}; drop those rows (and their labels) or extract them in "
            "float32 instead of half precision."
        )
    if max(-low, high) > LARGEST:
        raise ValueError(
            f"`{name}` must not exceed {LARGEST:g} in magnitude but spans {low:g} to {high:g}; "
            "divide it by a constant, or check for a broken backbone."
        )
    return features


def encode(labels: Any, n_rows: int, name: str = "features") -> np.ndarray:
    """Return the codes 0 … C−1 of the labels of so many rows; at least two classes."""
    codes, classes = encode_labels(labels)
    if len(codes) != n_rows:
        raise ValueError(
            f"`labels` must hold one label per row of `{name}` but there are {len(codes)} "
            f"labels and {n_rows} rows; pass the labels of exactly these rows."
        )
    if not codes.any():
        raise ValueError(
            f"`labels` must hold at least two classes but every label is {classes[0]!r}; "
            "a single class has no discriminant: pass samples of the other classes too."
        )
    return codes


def encode_groups(groups: Any, n_rows: int) -> np.ndarray | None:
    """Return the codes of the groups of so many rows; None where each row is a group of its own.

    Raises
    ------
    ValueError
        If there is not one group per row, one is missing, or all rows are in the same.
    """
    if groups is None:
        return None
    try:
        codes, names = encode_labels(groups)
    except (TypeError, ValueError) as error:
        raise ValueError(str(error).replace("`labels`", "`groups`")) from None
    if len(codes) != n_rows:
        raise ValueError(
            f"`groups` must hold one group per row but there are {len(codes)} groups and "
            f"{n_rows} rows; pass the groups of exactly these rows."
        )
    if not codes.any():
        raise ValueError(
            f"`groups` must hold at least two groups but every row is in {names[0]!r}: without "
            "it nothing is left to fit; leave groups out, or name smaller ones."
        )
    return None if len(names) == n_rows else codes


def triangle(A: np.ndarray) -> np.ndarray:
    """R of A = QR, with min(A.shape) rows."""
    return np.asarray(np.linalg.qr(A, mode="r"))


def narrow(X: np.ndarray) -> np.ndarray:
    """Rotate N < D samples into the N dimensions they span; lengths and angles stay the same.

    Everything that is invariant under rotation (covariances up to zeros, distances, kernels,
    penalised linear models) can be computed there. By QR, so that no digits are lost.
    """
    N, D = X.shape
    if N >= D:
        return X
    return np.ascontiguousarray(triangle(X.T).T)  # Xᵀ = QR, hence X = RᵀQᵀ


def pca(X: np.ndarray, n_components: int) -> tuple[np.ndarray, np.ndarray]:
    """Leading principal components of centred features and their variances (divisor N − 1).

    Returns
    -------
    scores : ndarray of shape (n_samples, k)
        Largest variance first; k = min(n_components, rank).
    variances : ndarray of shape (k,)
    """
    N, D = X.shape
    n = min(N, D)
    G = X.T @ X if D <= N else X @ X.T
    kept = [n - min(n_components, n), n - 1]
    w, V = eigh(G, subset_by_index=kept, overwrite_a=True, check_finite=False)
    w, V = w[::-1], V[:, ::-1]
    rank = max(int(np.sum(w > n * EPS * w[0])), 1)  # one column of zeros if nothing varies
    w, V = np.maximum(w[:rank], 0), V[:, :rank]
    return (X @ V if D <= N else V * np.sqrt(w)), w / max(N - 1, 1)
