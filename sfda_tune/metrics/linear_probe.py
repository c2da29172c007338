"""Linear probe: cross-validated accuracy of an L2-regularised logistic regression.

==========  ==========================================================================  ==========
Symbol      Meaning                                                                     Shape
==========  ==========================================================================  ==========
X           features, standardised by mean and variance of the training folds           (n, D)
W           minimise C·Σ_n −log softmax_{y_n}(x_nW + b) + ½‖W‖² over W and b            (D, C)
C           inverse strength of the penalty
==========  ==========================================================================  ==========
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import log_softmax

from sfda_tune.metrics._input import Data, encode_groups, load
from sfda_tune.metrics._linear import fit_softmax
from sfda_tune.values.features import MetricResult
from sfda_tune.values.text import integer, positive

__all__ = ["linear_probe"]

GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
LEAST = np.log(1e-12)  # of a held-out log-probability: a class may be missing in the training part
TOLERANCE = 1e-4  # of the gradient of the mean loss


def linear_probe(
    features: Any,
    labels: Any,
    *,
    grid: Sequence[float] = GRID,
    n_folds: int = 5,
    groups: Any = None,
) -> MetricResult:
    """Score features by the held-out accuracy of a linear classifier.

    ::

        value = (1/N) Σ_n [ y_n = argmax_c (x_nW + b)_c ],  W, b fitted without the fold of n

    C is the one of `grid` with the best held-out log-probability. The grid is searched from
    strong to weak penalty, each fit starting from the last, and left once it gets worse.

    **When it is wrong.** It predicts the accuracy of a linear head, not of fine-tuning: backbones
    that adapt well are undervalued. C is chosen on the folds that are reported, which is slightly
    optimistic. A class of one sample is never right.

    Parameters
    ----------
    features : array-like or torch.Tensor of shape (n_samples, n_dims)
        Finite real numbers; never changed. All arithmetic is in float64, on the CPU.
    labels : sequence of hashable, shape (n_samples,)
        Class of each row, at least two classes. Names and order do not matter.
    grid : sequence of float, default (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
        Values of C, as in scikit-learn.
    n_folds : int, default 5
        Folds, stratified by class; at most one per sample.
    groups : sequence of hashable, shape (n_samples,), optional
        Samples that are in the same fold, two groups or more. The folds are then stratified as
        well as that permits (scikit-learn's `StratifiedGroupKFold`), at most one per group.

    Returns
    -------
    MetricResult
        ``value``: accuracy in [0, 1]. ``per_sample``: 1.0 where right, else 0.0. ``details``:
        sizes, ``C`` that was chosen, ``n_folds``, ``log_likelihood``, the mean held-out
        log-probability (clipped at log 1e-12) to break ties, and ``converged``.

    Raises
    ------
    ValueError
        If `features` is not a finite real matrix, `labels` does not fit it or holds fewer than
        two classes, `grid` holds anything but positive numbers, `n_folds` is not an integer > 1,
        or `groups` does not fit, holds a missing value or a single group.

    Notes
    -----
    The folds are the same each time: the samples of a class are dealt out in turn, along a fixed
    direction in feature space. Nothing is random. Constant features predict the largest class.

    *Cost*: `n_folds` · |grid| fits of tens of steps of 4NDC flops; where the training part is
    smaller than D, it is first rotated into as many dimensions.

    References
    ----------
    S. Kornblith, J. Shlens, Q. Le: Do Better ImageNet Models Transfer Better? CVPR 2019,
    https://arxiv.org/abs/1805.08974 (logistic regression on fixed features)

    Examples
    --------
    >>> import numpy as np
    >>> from sfda_tune.metrics.linear_probe import linear_probe
    >>> rng = np.random.default_rng(0)
    >>> labels = np.repeat(["cat", "dog", "owl"], 50)
    >>> noise = rng.normal(size=(150, 8))
    >>> centres = np.repeat(2 * np.eye(3, 8), 50, axis=0)
    >>> linear_probe(noise + centres, labels).value > linear_probe(noise, labels).value + 0.3
    True
    """
    n_folds = integer("n_folds", n_folds, 2)
    Cs = sorted(positive("grid", C) for C in grid)
    if not Cs:
        raise ValueError(f"`grid` must hold at least one number but is {grid!r}; try (0.01, 1).")
    data = load(features, labels)
    codes = encode_groups(groups, data.N)
    if codes is None:
        n_folds = min(n_folds, data.N)
        held_out = _held_out(data, n_folds)
    else:
        held_out = _held_out_groups(data, codes[data.order], n_folds)
        n_folds = len(held_out)
    folds = [_Fold(data, rows) for rows in held_out if rows.any()]
    best_score, best, log_p, right = -np.inf, Cs[0], np.empty(data.N), np.zeros(data.N, bool)
    converged = True
    for C in Cs:
        candidate, correct = np.empty(data.N), np.zeros(data.N, bool)
        done = [fold.fit(C, candidate, correct) for fold in folds]
        score = float(candidate.mean())
        if score <= best_score:
            break
        best_score, best, log_p, right, converged = score, C, candidate, correct, all(done)
    details = {
        "C": best,
        "n_folds": n_folds,
        "log_likelihood": float(log_p.mean()),
        "converged": converged,
    }
    return MetricResult(
        float(right.mean()), data.unsorted(right.astype(float)), data.details() | details
    )


def _held_out(data: Data, n_folds: int) -> list[np.ndarray]:
    """Masks of the rows of each fold; classes start at different folds, so that all fill."""
    place = np.concatenate([c + np.arange(n) for c, n in enumerate(data.counts)])
    return [place % n_folds == fold for fold in range(n_folds)]


def _held_out_groups(data: Data, groups: np.ndarray, n_folds: int) -> list[np.ndarray]:
    """Masks of the rows of each fold, with whole groups."""
    from sklearn.model_selection import StratifiedGroupKFold

    # By their first rows, so that neither the names of groups nor the order of rows matter.
    _, first, groups = np.unique(groups, return_index=True, return_inverse=True)
    groups = np.argsort(np.argsort(first))[groups]
    k = max(min(n_folds, len(first), int(data.counts.max())), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes smaller than the number of folds
        parts = [test for _, test in StratifiedGroupKFold(k).split(data.X, data.y, groups)]
    masks = [np.isin(np.arange(data.N), part) for part in parts]
    return [mask for mask in masks if mask.any()]


class _Fold:
    """Training and test part of a fold, standardised; remembers its last solution."""

    def __init__(self, data: Data, test: np.ndarray) -> None:
        train = ~test
        self.test, self.y_test = test, data.y[test]
        self.classes, self.y = np.unique(data.y[train], return_inverse=True)
        X = data.X[train]
        mean = X.mean(axis=0)
        X -= mean
        scale = X.std(axis=0)
        scale[scale <= 1e-14 * np.abs(mean)] = np.inf  # constant, but for rounding
        X /= scale
        X_test = (data.X[test] - mean) / scale
        if len(X) < data.D:  # only the span of the training rows is ever weighted
            Q, R = np.linalg.qr(X.T)
            X, X_test = np.ascontiguousarray(R.T), X_test @ Q
        self.X, self.X_test = X, X_test
        self.theta: np.ndarray | None = None

    def fit(self, C: float, log_p: np.ndarray, right: np.ndarray) -> bool:
        """Fill in the held-out log-probabilities and decisions; tell whether it converged."""
        n = len(self.X)
        self.theta, converged = fit_softmax(
            self.X, self.y, len(self.classes), 1 / (C * n), start=self.theta, tolerance=TOLERANCE
        )
        p = log_softmax(self.X_test @ self.theta[:-1] + self.theta[-1], axis=1)
        right[self.test] = self.classes[p.argmax(axis=1)] == self.y_test
        column = np.searchsorted(self.classes, self.y_test).clip(max=len(self.classes) - 1)
        own = np.where(self.classes[column] == self.y_test, p[np.arange(len(p)), column], LEAST)
        log_p[self.test] = np.maximum(own, LEAST)
        return converged
