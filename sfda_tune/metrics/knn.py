"""kNN: accuracy of the nearest neighbours, each sample left out in turn.

==========  ==========================================================================  ==========
Symbol      Meaning                                                                     Shape
==========  ==========================================================================  ==========
x_n, y_n    features and class of sample n                                              (D,), ()
s_nm        x_n·x_m/(‖x_n‖‖x_m‖), cosine similarity                                     (N, N)
N_k(n)      the k samples m ≠ n with the largest s_nm
==========  ==========================================================================  ==========
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sfda_tune.metrics._input import encode_groups, load
from sfda_tune.values.features import MetricResult
from sfda_tune.values.text import integer

__all__ = ["find_neighbours", "knn"]

GRID = (1, 3, 5, 10, 20)
BLOCK = 2**22  # similarities at a time


def knn(
    features: Any, labels: Any, *, k: int | Sequence[int] = GRID, groups: Any = None
) -> MetricResult:
    """Score features by the leave-one-out accuracy of the k nearest neighbours.

    ::

        value = max_k (1/N) Σ_n [ y_n = majority of y_m over m in N_k(n) ]

    A tie of the majority goes to the tied class with the nearest sample.

    With `groups` no sample of the own group is a neighbour: m goes over the others only.

    **When it is wrong.** Near-duplicates in the data make it too good, unless they are groups. The
    best of several k on the same samples is optimistic, by less than a standard error. It does not
    weight dimensions: backbones with a few dominating ones look worse than a linear classifier
    finds them.

    Parameters
    ----------
    features : array-like or torch.Tensor of shape (n_samples, n_dims)
        Finite real numbers; never changed. All arithmetic is in float64, on the CPU.
    labels : sequence of hashable, shape (n_samples,)
        Class of each row, at least two classes. Names and order do not matter.
    k : int or sequence of int, default (1, 3, 5, 10, 20)
        Numbers of neighbours to choose from; those above N − 1 count as N − 1 (with `groups`, N
        less the largest group).
    groups : sequence of hashable, shape (n_samples,), optional
        Samples that may not vote for each other, two groups or more.

    Returns
    -------
    MetricResult
        ``value``: accuracy in [0, 1]. ``per_sample``: 1.0 where right, else 0.0. ``details``:
        sizes, ``k`` that was chosen (the smallest of equally good ones) and ``accuracies`` by k.

    Raises
    ------
    ValueError
        If `features` is not a finite real matrix, `labels` does not fit it or holds fewer than
        two classes, `k` holds anything but positive integers, or `groups` does not fit, holds a
        missing value or a single group.

    Notes
    -----
    Exact: all similarities are computed, in blocks of rows. A zero vector has similarity 0 to
    all. Where the k-th and the next neighbour are equally near, either may be taken: with many
    duplicates of different classes the value depends on the order of the rows.

    *Cost*: 2N²D flops; memory for 2²² similarities at a time.

    References
    ----------
    J. Puigcerver et al.: Scalable Transfer Learning with Expert Models. ICLR 2021,
    https://arxiv.org/abs/2009.13239 (kNN accuracy as a proxy)

    Examples
    --------
    >>> import numpy as np
    >>> from sfda_tune.metrics.knn import knn
    >>> rng = np.random.default_rng(0)
    >>> labels = np.repeat(["cat", "dog", "owl"], 50)
    >>> noise = rng.normal(size=(150, 8))
    >>> centres = np.repeat(2 * np.eye(3, 8), 50, axis=0)
    >>> f"{knn(noise + centres, labels).value:.3f} against {knn(noise, labels).value:.3f}"
    '0.887 against 0.307'
    """
    data = load(features, labels)
    codes = encode_groups(groups, data.N)
    g = np.arange(data.N) if codes is None else codes[data.order]
    grid, neighbours = find_neighbours(data.X, g, k)
    right = np.empty((len(grid), data.N), dtype=bool)
    for rows, nearest in neighbours:
        votes = data.y[nearest]
        for j, k_j in enumerate(grid):
            right[j, rows] = _majority(votes[:, :k_j]) == data.y[rows]
    accuracies = right.mean(axis=1)
    best = int(accuracies.argmax())
    by_k = dict(zip(map(str, grid), accuracies.tolist(), strict=True))
    return MetricResult(
        float(accuracies[best]),
        data.unsorted(right[best].astype(float)),
        data.details() | {"k": grid[best], "accuracies": by_k},
    )


def find_neighbours(
    X: np.ndarray, groups: np.ndarray, k: int | Sequence[int]
) -> tuple[list[int], Iterator[tuple[np.ndarray, np.ndarray]]]:
    """Return the numbers of neighbours that exist, and blocks of rows with the nearest of each.

    None is of the row's own group; a group may be the row alone.
    """
    grid = [integer("k", k, 1) for k in (k if isinstance(k, Sequence) else [k])]
    if not grid:
        raise ValueError(f"`k` must hold at least one integer but is {k!r}; try (1, 5, 20).")
    N = len(X)
    grid = sorted({min(k, N - int(np.bincount(groups).max())) for k in grid})

    def iterate() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        unit = X / (np.abs(X).max() or 1.0)
        norms = np.linalg.norm(unit, axis=1, keepdims=True)
        unit /= np.where(norms > 0, norms, 1)
        step = max(1, BLOCK // N)
        for i in range(0, N, step):
            rows = np.arange(i, min(i + step, N))
            s = unit[rows] @ unit.T
            s[groups[rows, None] == groups] = -np.inf
            yield rows, _nearest(s, grid[-1])

    return grid, iterate()


def _nearest(s: np.ndarray, k: int) -> np.ndarray:
    """Columns of the k largest of each row, largest first."""
    columns = np.argpartition(s, s.shape[1] - k, axis=1)[:, -k:]
    order = np.argsort(-np.take_along_axis(s, columns, axis=1), axis=1, kind="stable")
    return np.take_along_axis(columns, order, axis=1)


def _majority(votes: np.ndarray) -> np.ndarray:
    """Most frequent class of each row; of several, the one that comes first."""
    counts = np.zeros(votes.shape, dtype=np.int32)
    for column in votes.T:
        counts += votes == column[:, None]
    return votes[np.arange(len(votes)), counts.argmax(axis=1)]
