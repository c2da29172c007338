"""Metrics of features for numbers to predict: leave-one-out ridge regression, and three others.

==========  ==========================================================================  ==========
Symbol      Meaning                                                                     Shape
==========  ==========================================================================  ==========
N, D        samples, feature dimensions that vary
X           features, standardised: each column with mean 0 and variance 1              (N, D)
y, ȳ, v     targets, their mean and their variance (divisor N)                          (N,)
σ, Z        eigenvalues of XᵀX and XV, V its eigenvectors; K = min(N, D)                (K,), (N,K)
λ           penalty, t·σ̄ with σ̄ = ND/K, the mean eigenvalue
H           11ᵀ/N + Z diag(1/(σ + λ)) Zᵀ, the hat matrix of ridge with an intercept     (N, N)
e_n         y_n less its prediction by the model fitted without n                       (N,)
==========  ==========================================================================  ==========

All of them say R², 1 − Σ e_n² / (Nv), except LogME; or, for levels of which only the order counts
(`ORDINAL`), Spearman's ρ of predictions and levels, 0 … C − 1. The columns are standardised over
all samples, those left out among them: no target takes part in that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from scipy.linalg import eigh, helmert
from scipy.stats import rankdata

from sfda_tune.metrics._input import EPS, as_matrix, encode_groups
from sfda_tune.metrics.knn import GRID as NEIGHBOURS
from sfda_tune.metrics.knn import find_neighbours
from sfda_tune.metrics.logme import find_spectrum, maximise_evidence
from sfda_tune.values.features import MetricResult
from sfda_tune.values.labels import tell_unit
from sfda_tune.values.text import integer, positive, require

__all__ = [
    "ORDINAL", "REGRESSION", "fit_ridge", "knn_regression", "logme_regression", "ridge",
    "ridge_probe",
]  # fmt: skip

PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # t
N_FOLDS = 5


def ridge(
    features: Any,
    targets: Any,
    *,
    grid: Sequence[float] = PENALTIES,
    groups: Any = None,
    judge: str = "r2",
) -> MetricResult:
    """Score features by the R² of ridge regression, each sample predicted without itself.

    ::

        value = max_t 1 − (1/N) Σ_n e_n²/v,    e_n = (y_n − (Hy)_n) / (1 − H_nn)

    which is exact: the same as N fits on N − 1 samples, with an intercept that is not penalised.
    With `groups`, samples of a group are predicted without all of it: for its block of H,
    e_g = (I − H_gg)⁻¹ (y − Hy)_g.

    **When it is wrong.** It is the score of a linear model on frozen features. The best of several
    penalties on the same samples is optimistic, by little: a single number is chosen. One far
    target outweighs many near ones, as it does in any squared error.

    Parameters
    ----------
    features : array-like or torch.Tensor of shape (n_samples, n_dims)
        Finite real numbers; never changed. All arithmetic is in float64, on the CPU.
    targets : sequence of float, shape (n_samples,)
        Finite, not all equal.
    grid : sequence of float, default 1e-6 … 100
        Values of t to choose from.
    groups : sequence of hashable, shape (n_samples,), optional
        Samples that are left out together, two groups or more.
    judge : {"r2", "spearman"}, default "r2"
        What the value is; the penalty is chosen by R² in either case.

    Returns
    -------
    MetricResult
        ``value``: R², at most 1; below 0 where the mean of the targets would predict better.
        ``per_sample``: 1 − e_n²/v, of which it is the mean. Or ρ, whose ``per_sample`` is
        ρ + ab − ρ(a² + b²)/2 with the standardised ranks a of targets and b of predictions: its
        mean is ρ, its variance over N that of ρ in large samples (ranks taken for numbers).
        ``details``: sizes, ``penalty`` (the
        chosen t), ``r2`` by penalty, ``spearman``, the rank correlation of predictions and
        targets, and ``rmse``, in units of the target.

    Raises
    ------
    ValueError
        If `features` is not a finite real matrix, `targets` does not fit it, is not finite or
        constant, `grid` holds anything but positive numbers, `groups` does not fit, holds a
        missing value or a single group, or `judge` is neither.

    Notes
    -----
    *Cost*: ND·min(N, D) + 9 min(N, D)³ flops, 4NK a penalty, with groups n_g²K more for each.

    References
    ----------
    D. M. Allen: The Relationship between Variable Selection and Data Augmentation and a Method
    for Prediction. Technometrics 16, 1974 (the leave-one-out residual in closed form)

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(200, 8))
    >>> round(ridge(x, x[:, 0] + rng.normal(size=200)).value, 2)
    0.41
    """
    ts = _sort_grid(grid)
    X, y, dtype = _load(features, targets)
    fit = _Ridge(X, y, encode_groups(groups, len(y)), ts)
    by_t = dict(zip((f"{t:g}" for t in ts), fit.r2.tolist(), strict=True))
    details = {"penalty": ts[fit.best], "r2": by_t}
    return _result(y, y - fit.errors, {"n_dims": X.shape[1], "dtype": dtype} | details, judge)


def fit_ridge(features: Any, targets: Any) -> tuple[np.ndarray, float, float]:
    """Fit the ridge regression that `ridge` scores, to all samples.

    Returns
    -------
    tuple of ndarray of shape (n_dims,), float and float
        Weight and bias of the features as they are, and the R² of `ridge`.

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(size=(50, 2))
    >>> weight, bias, r2 = fit_ridge(x, 3 * x[:, 0] - x[:, 1] + 5)
    >>> weight.round(3), round(bias, 3), round(r2, 3)
    (array([ 3., -1.]), 5.0, 1.0)
    """
    X, y, _ = _load(features, targets)
    fit = _Ridge(X, y, None, PENALTIES)
    weight = fit.beta / fit.scale
    return weight, float(fit.middle - weight @ fit.mean), float(fit.r2[fit.best])


def _sort_grid(grid: Sequence[float]) -> list[float]:
    ts = sorted(positive("grid", t) for t in grid)
    if not ts:
        raise ValueError(f"`grid` must hold at least one number but is {grid!r}; try (0.01, 1).")
    return ts


def ridge_probe(
    features: Any,
    targets: Any,
    *,
    grid: Sequence[float] = PENALTIES,
    n_folds: int = N_FOLDS,
    groups: Any = None,
    judge: str = "r2",
) -> MetricResult:
    """Score features by the held-out R² of ridge regression: the linear probe of numbers.

    As `ridge`, but the penalty is chosen without the fold that is predicted: by leave-one-out in
    the other folds, whose mean and variance standardise the columns, too. Samples are dealt to
    folds in turn by the size of their target (groups, which stay whole, by its mean).

    **When it is wrong.** As `ridge`, but without its optimism; with N/`n_folds` fewer samples.

    Parameters
    ----------
    features, targets, grid, groups, judge
        As for `ridge`.
    n_folds : int, default 5
        At most one per sample or group.

    Returns
    -------
    MetricResult
        As that of `ridge`; ``details["penalties"]`` has those of the folds.

    Raises
    ------
    ValueError
        As `ridge`; or if `n_folds` is not an integer > 1.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(200, 8))
    >>> round(ridge_probe(x, x[:, 0] + rng.normal(size=200)).value, 2)
    0.38
    """
    n_folds, ts = integer("n_folds", n_folds, 2), _sort_grid(grid)
    X, y, dtype = _load(features, targets)
    codes = encode_groups(groups, len(y))
    units = np.arange(len(y)) if codes is None else codes
    middle = np.bincount(units, y) / np.bincount(units)
    place = np.empty(len(middle), np.int64)
    place[np.argsort(middle, kind="stable")] = np.arange(len(middle))
    fold = (place % min(n_folds, len(middle)))[units]
    predicted, chosen = np.empty(len(y)), []
    for test in (fold == f for f in np.unique(fold)):
        inner = None if codes is None else codes[~test]
        alone = inner is not None and len(np.unique(inner)) == 1  # then its samples are left out
        fit = _Ridge(X[~test], y[~test], None if alone else inner, ts)
        predicted[test] = fit.predict(X[test])
        chosen.append(ts[fit.best])
    details = {"n_dims": X.shape[1], "dtype": dtype, "penalties": chosen}
    return _result(y, predicted, details, judge)


def knn_regression(
    features: Any,
    targets: Any,
    *,
    k: int | Sequence[int] = NEIGHBOURS,
    groups: Any = None,
    judge: str = "r2",
) -> MetricResult:
    """Score features by the R² of the mean target of the k nearest neighbours, by cosine.

    As `sfda_tune.metrics.knn.knn`, with the mean in the place of the majority.

    Parameters
    ----------
    features, targets, groups, judge
        As for `ridge`.
    k : int or sequence of int, default (1, 3, 5, 10, 20)
        Numbers of neighbours to choose from; those above N − 1 count as N − 1 (with `groups`, N
        less the largest group).

    Returns
    -------
    MetricResult
        As that of `ridge`, with ``k`` in the place of ``penalty``.

    Raises
    ------
    ValueError
        As `ridge`; or if `k` holds anything but positive integers.

    Examples
    --------
    >>> angle = np.linspace(0, np.pi, 50)
    >>> knn_regression(np.stack([np.cos(angle), np.sin(angle)], axis=1), angle).value > 0.99
    True
    """
    X, y, dtype = _load(features, targets)
    codes = encode_groups(groups, len(y))
    g = np.arange(len(y)) if codes is None else codes
    grid, neighbours = find_neighbours(X, g, k)
    predicted = np.empty((len(grid), len(y)))
    for rows, nearest in neighbours:
        for j, k_j in enumerate(grid):
            predicted[j, rows] = y[nearest[:, :k_j]].mean(axis=1)
    r2 = 1 - np.square(predicted - y).mean(axis=1) / y.var()
    best = int(r2.argmax())
    by_k = dict(zip(map(str, grid), r2.tolist(), strict=True))
    about = {"n_dims": X.shape[1], "dtype": dtype, "k": grid[best], "r2": by_k}
    return _result(y, predicted[best], about, judge)


def logme_regression(features: Any, targets: Any) -> MetricResult:
    """Score features by the evidence of a Bayesian linear regression of the targets.

    LogME as in `sfda_tune.metrics.logme.logme`, with the targets, less their mean and divided by
    their standard deviation, in the place of the class indicators: the value does not depend on
    the unit.

    Parameters
    ----------
    features, targets
        As for `ridge`.

    Returns
    -------
    MetricResult
        ``value``: log-evidence per sample, higher is better, of either sign.

    Raises
    ------
    ValueError
        As `ridge`.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(200, 8))
    >>> logme_regression(x, x[:, 0]).value > logme_regression(x, rng.normal(size=200)).value
    True
    """
    X, y, dtype = _load(features, targets)
    y = (y - y.mean()) / y.std()
    norms = np.array([y @ y])
    spectrum = find_spectrum(X, lambda A: (y @ A)[None], norms)
    evidence, about = maximise_evidence(len(y), *spectrum, norms)
    sizes = {"n_samples": len(y), "n_dims": X.shape[1], "dtype": dtype}
    return MetricResult(float(evidence[0]) / len(y), details=sizes | about)


# The metrics of numbers, by the names of their like for classes
REGRESSION: dict[str, Callable[..., MetricResult]] = {
    "ridge": ridge,
    "knn": knn_regression,
    "linear_probe": ridge_probe,
    "logme": logme_regression,
}
# Those of levels, which are given as 0 … C − 1
ORDINAL: dict[str, Callable[..., MetricResult]] = {
    name: metric if name == "logme" else partial(metric, judge="spearman")
    for name, metric in REGRESSION.items()
}


class _Ridge:
    """Ridge regressions of one set of samples, for several penalties; the best by `errors`."""

    def __init__(
        self, X: np.ndarray, y: np.ndarray, groups: np.ndarray | None, ts: Sequence[float]
    ) -> None:
        N = len(X)
        self.mean, scale = X.mean(axis=0), X.std(axis=0)
        self.scale = np.where(scale > 1e-14 * np.abs(self.mean), scale, np.inf)
        self.X, self.middle = (X - self.mean) / self.scale, float(y.mean())
        wide = X.shape[1] > N
        # V: of all samples, or where there are fewer than columns of what is left of them without
        # the constant, so that I − 11ᵀ/N − H = V λ/(σ + λ) Vᵀ and nothing cancels for a small λ
        if wide:
            B = helmert(N)
            sigma, V = eigh(B @ (self.X @ self.X.T) @ B.T, check_finite=False)
            V = B.T @ V
        else:
            sigma, V = eigh(self.X.T @ self.X, check_finite=False)
        sigma = np.maximum(sigma, 0)
        # constant features predict the mean, by whatever penalty
        lam = np.array(ts) * (sigma.sum() / min(X.shape) or 1.0)
        w = 1 / (sigma[:, None] + lam)  # (K, T)
        centred = y - self.middle
        if wide:
            Z, inner = V, lam * w
            residual = V @ (inner * (V.T @ centred)[:, None])  # y − Hy (N, T)
        else:
            Z, inner = self.X @ V, -w
            residual = centred[:, None] - Z @ (w * (Z.T @ centred)[:, None])
        offset = 0.0 if wide else 1.0  # of I − 11ᵀ/N − H from Z inner Zᵀ
        errors = residual / (offset * (1 - 1 / N) + np.square(Z) @ inner)
        for rows in _rows_of_groups(groups):
            Z_g = Z[rows]
            block = offset * (np.eye(len(rows)) - 1 / N) + np.einsum(
                "nk,kt,mk->tnm", Z_g, inner, Z_g, optimize=True
            )
            errors[rows] = np.linalg.solve(block, residual[rows].T[..., None])[..., 0].T
        self.r2 = 1 - np.square(errors).mean(axis=0) / (y.var() or 1.0)
        self.best = int(self.r2.argmax())
        self.errors = errors[:, self.best]
        if wide:  # (XᵀX + λI)⁻¹ Xᵀy = Xᵀ (XXᵀ + λI)⁻¹ y
            self.beta = self.X.T @ (V @ (w[:, self.best] * (V.T @ centred)))
        else:
            self.beta = V @ (w[:, self.best] * (Z.T @ centred))

    def predict(self, X: np.ndarray) -> np.ndarray:
        return self.middle + (X - self.mean) / self.scale @ self.beta


def _rows_of_groups(groups: np.ndarray | None) -> list[np.ndarray]:
    """Return the rows of each group of two or more."""
    if groups is None:
        return []
    parts = np.split(np.argsort(groups, kind="stable"), np.cumsum(np.bincount(groups))[:-1])
    return [rows for rows in parts if len(rows) > 1]


def _load(features: Any, targets: Any) -> tuple[np.ndarray, np.ndarray, str]:
    """Return features and targets in float64, both checked, and what the features were."""
    dtype = str(getattr(features, "dtype", "")).removeprefix("torch.")
    X = as_matrix(features)
    given = targets.detach().cpu().numpy() if hasattr(targets, "detach") else targets
    y = np.asarray(given)
    if y.shape != (len(X),) or y.dtype.kind not in "fiu":
        raise ValueError(
            f"`targets` must hold one number per row of `features`, {len(X)}, but has shape "
            f"{y.shape} and dtype {y.dtype}; pass the targets of exactly these rows as numbers."
        )
    y = y.astype(np.float64)
    if not np.isfinite(y).all():
        bad = np.flatnonzero(~np.isfinite(y))
        raise ValueError(
            f"`targets` must be finite but {len(bad)} are not, the first in row {bad[0]}; drop "
            "these rows, of the features too."
        )
    if told := tell_unit(y):
        raise ValueError(f"`targets` {told}.")
    if not y.std() > EPS * np.abs(y).max():
        raise ValueError(
            f"`targets` must differ but all {len(y)} are {y[0]:g}: nothing is left to predict; "
            "pass samples with other targets, too."
        )
    return X.astype(np.float64), y, dtype or str(X.dtype)


def _result(
    y: np.ndarray, predicted: np.ndarray, details: dict[str, Any], judge: str
) -> MetricResult:
    """Say how well numbers are predicted, or their order."""
    require("judge", judge, "'r2' or 'spearman'", judge in ("r2", "spearman"))
    square = np.square(y - predicted)
    per_sample = 1 - square / y.var()
    ranks = (rankdata(v) for v in (y, predicted))
    a, b = ((r - r.mean()) / (r.std() or 1.0) for r in ranks)  # of constants 0
    rho = float((a * b).mean())
    if judge == "spearman":
        per_sample = rho + a * b - rho * (a**2 + b**2) / 2
    about = {
        "n_samples": len(y),
        "spearman": rho,
        "rmse": float(np.sqrt(square.mean())),
    }
    return MetricResult(float(per_sample.mean()), per_sample, about | details)
