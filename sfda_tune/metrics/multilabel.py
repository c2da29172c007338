"""Metrics for several labels per image: each label is a problem of two classes, with and without.

==========  ==========================================================================  ==========
Symbol      Meaning                                                                     Shape
==========  ==========================================================================  ==========
N, D, L     samples, feature dimensions, labels
Y           1 where a label applies, 0 where it does not, −1 where nobody knows         (N, L)
X           features, standardised: each column with mean 0 and variance 1              (N, D)
V, σ        XᵀX/N = V diag(σ) Vᵀ, the total covariance; K = min(N, D)                   (D,K), (K,)
Z           XV                                                                          (N, K)
==========  ==========================================================================  ==========

and for each label

==========  ==========================================================================  ==========
n₁, n₀      samples with and without it; q₁ = n₁/N, q₀ = n₀/N
δ           μ₁ − μ₀, difference of the class means; μ₁ = q₀δ, μ₀ = −q₁δ                 (K,)
S_W         XᵀX/N − q₁q₀ δδᵀ, the within-class covariance
T           (1−λ) diag(σ) + ρI = diag(1/w) with ρ = λ·tr S_W/D                          (K,)
S̃           (1−λ)S_W + ρI = T − c δδᵀ with c = (1−λ)q₁q₀
t           δᵀT⁻¹δ
==========  ==========================================================================  ==========

One eigendecomposition serves all labels: what differs from label to label is the ridge ρ, which is
diagonal in V, and a term of rank one. Three products with Z, for all labels at once, give
everything: ZᵀY gives δ, (Z∘Z)w gives x_nᵀT⁻¹x_n, and Z(w∘δ) gives x_nᵀT⁻¹δ. With
ζ_n = z_nᵀT⁻¹δ for the deviation z_n from the class mean,

    z_nᵀS̃⁻¹z_m = z_nᵀT⁻¹z_m + c ζ_n ζ_m/(1 − ct),   z_nᵀS̃⁻¹δ = ζ_n/(1 − ct),
    δᵀS̃⁻¹δ = t/(1 − ct)                                                                    (M1)

by the formula of Sherman and Morrison. The samples (or groups) are then left out as in
``leave_one_out.md``, (G1)–(G3), where a sample alone is a group of one.

Labels that are known of the same images share one decomposition, and so do all values of λ that
are tried. A label that the features separate so well that 1 − ct has lost its digits is computed
by `sfda_tune.metrics.sfda` alone. A label with fewer than two images (two groups) with it, or
without it, cannot be judged and is left out of every mean; ``details["left_out"]`` has it.

Evidence for the defaults
-------------------------
Eight demo backbones, 500 images of 2 or 3 digits each (ten labels; *long tail*: from .59 to .01 of
the images), against the mean average precision of logistic regression on 1,100 others: weighted τ,
and in brackets what the first choice lost (`tests/benchmarks/several_labels.py`).

==========================  =============  =============  =============
score                       two digits     three digits   long tail
==========================  =============  =============  =============
λ = .5, as for classes      .17 (.262)     .27 (.000)     .16 (.111)
λ = .01                     .75 (.000)     .80 (.000)     .88 (.000)
λ by leave-one-out          .78 (.000)     .96 (.000)     .88 (.000)
… weights by prevalence     .78 (.000)     .96 (.000)     .60 (.042)
logme                       .79 (.000)     .89 (.000)     .85 (.000)
knn                         .58 (.000)     .20 (.201)     .65 (.000)
==========================  =============  =============  =============

What separates one label varies within the classes of all others, so that a strong ridge hides it.
Weights in proportion to the images of a label cost τ in the long tail, where the mean counts all
labels alike. These are small networks, one kind of image, and frozen features: what fine-tuning
makes of them was not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from scipy.linalg import eigh
from scipy.special import expit

from sfda_tune.metrics._input import as_matrix, encode_groups
from sfda_tune.metrics._linear import fit_logistic
from sfda_tune.metrics.knn import GRID as NEIGHBOURS
from sfda_tune.metrics.knn import find_neighbours
from sfda_tune.metrics.linear_probe import GRID as STRENGTHS
from sfda_tune.metrics.linear_probe import TOLERANCE
from sfda_tune.metrics.logme import find_spectrum, maximise_evidence
from sfda_tune.metrics.sfda import sfda
from sfda_tune.values.features import MetricResult
from sfda_tune.values.labels import as_indicators, find_rarest
from sfda_tune.values.text import integer, is_number, positive, require

__all__ = [
    "MULTILABEL", "knn_multilabel", "linear_probe_multilabel", "logme_multilabel",
    "sfda_multilabel",
]  # fmt: skip

LEAST = 3e-3  # λ, below which 1 − ct and the blocks of groups lose digits
LAMBDAS = (3e-3, 0.01, 0.03, 0.1, 0.3, 0.8)
SURE = 1e-6  # 1 − ct, below which a label is computed by itself
# An eigendecomposition takes about 9 K³ flops and three products with X, a label by itself ⅓ K³
# and two: fewer labels (times values of λ) are faster one by one.
SHARED = 4
BLOCK = 2**22  # numbers at a time
WEIGHTS = ("uniform", "prevalence")


def sfda_multilabel(
    features: Any,
    labels: Any,
    *,
    shrinkage: float | None = None,
    weights: str | Sequence[float] = "uniform",
    groups: Any = None,
) -> MetricResult:
    """Score features by leave-one-out SFDA of each label against the rest.

    ::

        value = max_λ Σ_l ω_l (1/N_l) Σ_n p'_l(y_nl | x_n)

    over the N_l images of which label l is known: the mean of what `sfda` (variant ``"loo"``)
    says of each label. All labels, and all λ, together cost little more than one, see the head of
    the module.

    **When it is wrong.** A label that few images have is scored near its prior, 1 − 2q₁q₀, by any
    backbone, and hardly counts; ``details`` has average precisions, which do not depend on it.
    Labels are judged one by one: what they say of each other is not used. The best of several λ
    on the same samples is optimistic, by little: a single number is chosen.

    Parameters
    ----------
    features : array-like or torch.Tensor of shape (n_samples, n_dims)
        Finite real numbers; never changed. All arithmetic is in float64, on the CPU.
    labels : array-like of shape (n_samples, n_labels)
        1 where a label applies, else 0; NaN or −1 where it is not known. Rows of zeros are
        images without a label.
    shrinkage : float in [0.003, 1], optional
        λ, the same for all labels. By default the best of 0.003 … 0.8 by the value itself.
    weights : {"uniform", "prevalence"} or sequence of float >= 0, default "uniform"
        ω_l: all labels alike (macro), in proportion to the images that have them, or given.
    groups : sequence of hashable, shape (n_samples,), optional
        Samples that are left out together, two groups or more.

    Returns
    -------
    MetricResult
        ``value`` in [0, 1]. ``per_sample``: v + Σ_l ω_l (N/N_l)(p'_l(y_nl|x_n) − v_l) over the
        labels known of n, of which the value v is the mean (v_l that of label l): the weighted
        mean of p' where all are known. ``details``: ``lambda``, the value of each in
        ``by_lambda``, ``label_values`` (v_l) and
        ``average_precisions`` by p'_l(1|x_n), None for labels in ``left_out`` (positions);
        ``mean_average_precision`` and ``accuracy``, means over the others; ``n_shared``, how many
        of them, on average over λ, came from a shared decomposition, and sizes.

    Raises
    ------
    ValueError
        If `features` is not a finite real matrix, `labels` does not fit it or holds anything
        else, no label can be judged, or an option is not a valid one.

    Notes
    -----
    *Exactness*: against `sfda` label by label, errors of p' are below 1e-9
    (`tests/metrics/test_multilabel.py`). *Cost*: 3ND·K + 9K³ + 4NKL flops for each λ, with groups
    of m samples 2NmKL; for each set of labels known of other images again.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> y = rng.integers(0, 2, (200, 5))
    >>> x = rng.normal(size=(200, 16))
    >>> seen = x.copy()
    >>> seen[:, :5] += 2 * y
    >>> f"{sfda_multilabel(seen, y).value:.2f} against {sfda_multilabel(x, y).value:.2f}"
    '0.76 against 0.50'
    """
    valid = shrinkage is None or (is_number(shrinkage) and LEAST <= shrinkage <= 1)
    require("shrinkage", shrinkage, f"a number in [{LEAST}, 1], or None to choose it", valid)
    lams = LAMBDAS if shrinkage is None else (float(shrinkage),)
    X, Y, about = _load(features, labels)
    codes = encode_groups(groups, len(X))
    kept = _find_judged(Y, codes)
    omega = _weigh(weights, Y, kept)
    ps = np.zeros((len(lams), *Y.shape))  # p'(1|x)
    n_shared = 0
    for rows, columns in _share(Y, kept):
        g, y = None if codes is None else codes[rows], Y[np.ix_(rows, columns)] == 1
        rotated = _rotate(X[rows]) if len(columns) * len(lams) >= SHARED else None
        for t, lam in enumerate(lams):
            done = np.zeros(len(columns), bool)
            if rotated is not None:
                ps[t][np.ix_(rows, columns)], done = _leave_out(*rotated, X.shape[1], y, lam, g)
            n_shared += int(done.sum())
            for j in np.flatnonzero(~done):
                found = sfda(X[rows], y[:, j], shrinkage=lam, groups=g).per_sample
                assert found is not None
                ps[t, rows, columns[j]] = np.where(y[:, j], found, 1 - found)
    known = Y[:, kept] >= 0
    n = known.sum(axis=0)
    owns = np.where(known, np.where(Y == 1, ps, 1 - ps)[:, :, kept], 0.0)  # p'(y|x)
    values = (owns.sum(axis=1) / n) @ omega
    best = int(values.argmax())
    p, own, value = ps[best], owns[best], float(values[best])
    v = own.sum(axis=0) / n
    per_sample = value + np.where(known, (own - v) * (len(X) / n), 0.0) @ omega
    right = (own >= 0.5).sum(axis=0) / n
    return MetricResult(
        value,
        per_sample,
        {
            "variant": "loo",
            "lambda": lams[best],
            "by_lambda": dict(zip(map("{:g}".format, lams), values.tolist(), strict=True)),
            "weights": weights if isinstance(weights, str) else list(map(float, weights)),
            "label_values": _spread(v, kept, Y.shape[1]),
            **_average_precisions(Y, p, kept),
            "accuracy": float(right.mean()),
            "n_shared": n_shared // len(lams),
            **({} if codes is None else {"n_groups": int(codes.max()) + 1}),
            **about,
        },
    )


def knn_multilabel(
    features: Any, labels: Any, *, k: int | Sequence[int] = NEIGHBOURS, groups: Any = None
) -> MetricResult:
    """Score features by the mean average precision of the k nearest neighbours, by cosine.

    Images are sorted, for each label, by the share of their neighbours that have it (of those of
    which it is known); as `sfda_tune.metrics.knn.knn` otherwise.

    Parameters
    ----------
    features, labels, groups
        As for `sfda_multilabel`.
    k : int or sequence of int, default (1, 3, 5, 10, 20)
        Numbers of neighbours to choose from.

    Returns
    -------
    MetricResult
        ``value``: mean over the labels, all alike; no mean over images. ``details`` as those of
        `sfda_multilabel`, with ``k``, the best, and the value of each in ``by_k``.

    Raises
    ------
    ValueError
        As `sfda_multilabel`; or if `k` holds anything but positive integers.

    Examples
    --------
    >>> angle = np.linspace(0, np.pi, 50)
    >>> x = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    >>> knn_multilabel(x, np.stack([angle < 1, angle > 2], axis=1)).value > 0.98
    True
    """
    X, Y, about = _load(features, labels)
    codes = encode_groups(groups, len(X))
    grid, blocks = find_neighbours(X, np.arange(len(X)) if codes is None else codes, k)
    kept = _find_judged(Y, codes)
    known, has = Y >= 0, Y == 1
    prior = has.sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    share = np.empty((len(grid), *Y.shape))
    for rows, nearest in blocks:
        for j, k_j in enumerate(grid):
            near = nearest[:, :k_j]
            n = known[near].sum(axis=1)
            share[j, rows] = np.where(n > 0, has[near].sum(axis=1) / np.maximum(n, 1), prior)
    found = [_average_precisions(Y, share[j], kept) for j in range(len(grid))]
    values = [float(f["mean_average_precision"]) for f in found]
    best = int(np.argmax(values))
    by_k = dict(zip(map(str, grid), values, strict=True))
    return MetricResult(values[best], None, found[best] | about | {"k": grid[best], "by_k": by_k})


def linear_probe_multilabel(
    features: Any,
    labels: Any,
    *,
    grid: Sequence[float] = STRENGTHS,
    n_folds: int = 5,
    groups: Any = None,
) -> MetricResult:
    """Score features by the held-out mean average precision of a logistic regression per label.

    As `sfda_tune.metrics.linear_probe.linear_probe`, with a logistic function for each label in
    the place of the softmax; C, the same for all labels, is the one with the best held-out
    log-probability. Folds are stratified by the rarest label of each image.

    Parameters
    ----------
    features, labels, groups
        As for `sfda_multilabel`.
    grid : sequence of float, default (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
        Values of C.
    n_folds : int, default 5
        At most one per sample or group.

    Returns
    -------
    MetricResult
        ``value``: mean over the labels, all alike; no mean over images. ``details`` as those of
        `sfda_multilabel`, with ``C``, ``n_folds`` and ``converged``.

    Raises
    ------
    ValueError
        As `sfda_multilabel`; or if `grid` holds anything but positive numbers, or `n_folds` is
        not an integer > 1.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> y = rng.integers(0, 2, (200, 3))
    >>> linear_probe_multilabel(2 * y + rng.normal(size=(200, 3)), y).value > 0.9
    True
    """
    n_folds, Cs = integer("n_folds", n_folds, 2), sorted(positive("grid", C) for C in grid)
    if not Cs:
        raise ValueError(f"`grid` must hold at least one number but is {grid!r}; try (0.01, 1).")
    X, Y, about = _load(features, labels)
    codes = encode_groups(groups, len(X))
    kept = _find_judged(Y, codes)
    folds = [_Fold(X, Y, test) for test in _deal(X, Y, codes, n_folds)]
    best = (-np.inf, Cs[0], np.zeros(Y.shape), True)
    for C in Cs:
        logits = np.empty(Y.shape)
        done = [fold.fit(C, logits) for fold in folds]
        loss = np.where(Y >= 0, np.logaddexp(0, logits) - (Y == 1) * logits, 0)[:, kept]
        likelihood = -float(loss.sum()) / int((Y >= 0)[:, kept].sum())
        if likelihood <= best[0]:
            break
        best = likelihood, C, logits, all(done)
    found = _average_precisions(Y, best[2], kept)
    more = {"C": best[1], "n_folds": len(folds), "log_likelihood": best[0], "converged": best[3]}
    return MetricResult(found["mean_average_precision"], None, found | about | more)


def logme_multilabel(features: Any, labels: Any) -> MetricResult:
    """Score features by the evidence of a Bayesian linear regression on each label.

    LogME as in `sfda_tune.metrics.logme.logme`, which regards classes as indicators anyway: the
    mean over the labels, each over the images of which it is known.

    Parameters
    ----------
    features, labels
        As for `sfda_multilabel`.

    Returns
    -------
    MetricResult
        ``value``: mean log-evidence per sample, higher is better, of either sign; ``details``
        has those of the labels in ``label_values``.

    Raises
    ------
    ValueError
        As `sfda_multilabel`.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> y, x = rng.integers(0, 2, (200, 3)), rng.normal(size=(200, 3))
    >>> logme_multilabel(2 * y + x, y).value > logme_multilabel(x, y).value
    True
    """
    X, Y, about = _load(features, labels)
    kept = _find_judged(Y, None)
    value = np.full(Y.shape[1], np.nan)
    for rows, columns in _share(Y, kept):
        y = (Y[np.ix_(rows, columns)] == 1).astype(np.float64)
        norms = y.sum(axis=0)
        spectrum = find_spectrum(X[rows], lambda A, y=y: y.T @ A, norms)
        value[columns] = maximise_evidence(len(rows), *spectrum, norms)[0] / len(rows)
    v = value[kept]
    details = {"label_values": _spread(v, kept, Y.shape[1]), "left_out": _left_out(kept, Y)}
    return MetricResult(float(v.mean()), None, details | about)


# The metrics of several labels, by the names of their like for classes
MULTILABEL: dict[str, Callable[..., MetricResult]] = {
    "sfda": sfda_multilabel,
    "knn": knn_multilabel,
    "linear_probe": linear_probe_multilabel,
    "logme": logme_multilabel,
}


# --- input ------------------------------------------------------------------------------------


def _load(features: Any, labels: Any) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Return features in float64 and indicators in int8, both checked, and their sizes."""
    dtype = str(getattr(features, "dtype", "")).removeprefix("torch.")
    X, Y = as_matrix(features), as_indicators(labels)
    if len(X) != len(Y):
        raise ValueError(
            f"`labels` must have one row per row of `features` but there are {len(Y)} and "
            f"{len(X)}; pass the labels of exactly these rows."
        )
    sizes = {"n_samples": len(X), "n_dims": X.shape[1], "n_labels": Y.shape[1]}
    return X.astype(np.float64), Y, sizes | {"dtype": dtype or str(X.dtype)}


def _find_judged(Y: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    """Return the labels that two samples (groups) have and two do not."""
    units = np.arange(len(Y)) if groups is None else groups
    kept = [c for c, y in enumerate(Y.T) if all(len(np.unique(units[y == k])) > 1 for k in (0, 1))]
    if not kept:
        raise ValueError(
            "`labels` must have a label that two images (two groups) have and two do not, but "
            f"none of the {Y.shape[1]} is such; pass more images, or other labels."
        )
    return np.array(kept)


def _share(Y: np.ndarray, kept: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the rows of which some labels are known, and these labels: each label once."""
    patterns, of = np.unique(Y[:, kept] >= 0, axis=1, return_inverse=True)
    for k, known in enumerate(patterns.T):
        yield np.flatnonzero(known), kept[of.reshape(-1) == k]


def _weigh(weights: Any, Y: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return ω of the labels that are judged; their sum is 1."""
    if isinstance(weights, str):
        require("weights", weights, f"one of {', '.join(WEIGHTS)}", weights in WEIGHTS)
        omega = np.ones(Y.shape[1])
        if weights == "prevalence":
            omega = (Y == 1).sum(axis=0) / np.maximum((Y >= 0).sum(axis=0), 1)
    else:
        omega = np.asarray(weights, dtype=np.float64)
        fits = omega.shape == (Y.shape[1],) and np.isfinite(omega).all() and (omega >= 0).all()
        rule = f"{Y.shape[1]} numbers >= 0, one per label, or one of {', '.join(WEIGHTS)}"
        require("weights", weights, rule, fits and bool(omega[kept].any()))
    return omega[kept] / omega[kept].sum()


# --- one factorisation for all labels ---------------------------------------------------------


def _leave_out(
    Z: np.ndarray, sigma: np.ndarray, D: int, Y: np.ndarray, lam: float, groups: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return p'(1|x) (N, L), each sample without its group, and which labels it is exact for.

    `Y` holds True and False; two groups at least have each.
    """
    N = len(Z)
    n1 = Y.sum(axis=0)
    q1 = n1 / N
    delta = (Z.T @ Y) * (N / (n1 * (N - n1)))  # (K, L)
    spread = q1 * (1 - q1)
    trace = np.maximum(sigma.sum() - spread * np.square(delta).sum(axis=0), 0)  # tr S_W
    rho = np.maximum(lam * trace / D, 1e-280)
    w = 1 / ((1 - lam) * sigma[:, None] + rho)  # (K, L)
    t = (w * delta**2).sum(axis=0)
    rest = 1 - (1 - lam) * spread * t  # 1 − ct
    sure = rest > SURE
    s = Z @ (w * delta)  # x_nᵀT⁻¹δ
    p = np.zeros(Y.shape)
    units = [np.arange(N)[:, None]] if groups is None else list(_rows_by_size(groups))
    for rows in units:
        b, m = rows.shape
        step = max(1, BLOCK // max(Z.shape[1] * m, m * m))
        for part in (rows[i : i + step] for i in range(0, b, step)):
            Z_g = Z[part]
            squares = Z_g[:, 0] ** 2 @ w if m == 1 else None
            for k in np.flatnonzero(sure):
                A = (
                    squares[:, k, None, None]
                    if squares is not None
                    else (Z_g * w[:, k]) @ Z_g.swapaxes(1, 2)
                )
                label = _Label(n1[k], N, lam, t[k], rest[k])
                p[part, k] = label.leave_out(A, s[part, k], Y[part, k])
    return p, sure


def _rotate(X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return Z = XV of the standardised features, and σ."""
    X = X * 2.0 ** min(-np.frexp(np.abs(X).max())[1], 1000)  # exact; the squares do not underflow
    X -= X[0].copy()  # so that a constant column is exactly 0
    X -= X.mean(axis=0)
    scale = X.std(axis=0)
    X *= np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
    N, D = X.shape
    if N < D:
        sigma, U = eigh(X @ X.T / N, overwrite_a=True, check_finite=False)
        sigma = np.maximum(sigma, 0)
        return U * np.sqrt(N * sigma), sigma
    sigma, V = eigh(X.T @ X / N, overwrite_a=True, check_finite=False)
    return X @ V, np.maximum(sigma, 0)


def _rows_by_size(groups: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the rows of all groups of one size, (n_groups, size)."""
    order = np.argsort(groups, kind="stable")
    sizes = np.bincount(groups)
    first = np.cumsum(sizes) - sizes
    for m in np.unique(sizes[sizes > 0]).tolist():
        yield order[first[sizes == m][:, None] + np.arange(m)]


class _Label:
    """One label against the rest, its samples left out in groups of one size."""

    def __init__(self, n1: int, N: int, lam: float, t: float, rest: float) -> None:
        self.n, self.N, self.t, self.rest = (N - n1, n1), N, t, rest
        self.beta = (1 - lam) / N
        self.c = (1 - lam) * n1 * (N - n1) / N**2

    def leave_out(self, A: np.ndarray, s: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return p'(1|x) (b, m) from X_gT⁻¹X_gᵀ (b, m, m), X_gT⁻¹δ and the labels (b, m)."""
        m, one = y.shape[1], np.eye(y.shape[1])
        q0, q1 = (n / self.N for n in self.n)
        mu = np.where(y, q0, -q1)  # x_n = z_n + mu_n δ
        zeta = s - self.t * mu
        H = A - mu[:, :, None] * s[:, None, :] - zeta[:, :, None] * mu[:, None, :]  # Z_gT⁻¹Z_gᵀ
        H += self.c / self.rest * zeta[:, :, None] * zeta[:, None, :]  # (M1)
        u = zeta / self.rest  # Z_gS̃⁻¹δ
        inside = [(~y).sum(axis=1), y.sum(axis=1)]
        left = [n - k for n, k in zip(self.n, inside, strict=True)]  # n'_k
        same = (y[:, :, None] == y[:, None, :]) / np.where(y, self.n[1], self.n[0])[:, :, None]
        inner = one - same - self.beta * H  # B⁻¹ − βH
        log_p = []
        for k, n_k in enumerate(left):
            a = (y == k) / n_k[:, None]
            sign = np.where(y == k, 0, 1 - 2 * k)  # μ_y − μ_k = sign·δ
            Ha = (H @ a[:, :, None])[:, :, 0]
            v = np.einsum("bii->bi", H) + 2 * Ha + (a * Ha).sum(axis=1, keepdims=True)
            v += 2 * sign * (u + (u * a).sum(axis=1, keepdims=True))
            v += sign**2 * self.t / self.rest  # vᵀS̃⁻¹v
            U = H + Ha[:, :, None] + u[:, :, None] * sign[:, None, :]
            solved = U / inner if m == 1 else np.linalg.solve(inner, U)
            d = (self.N - m) / self.N * (v + self.beta * (U * solved).sum(axis=1))  # (G3)
            log_p.append(np.log(n_k)[:, None] - 0.5 * d)
        return expit(log_p[1] - log_p[0])


# --- folds of the linear probe ----------------------------------------------------------------


def _deal(
    X: np.ndarray, Y: np.ndarray, groups: np.ndarray | None, n_folds: int
) -> list[np.ndarray]:
    """Return masks of the rows of each fold, stratified by the rarest label of each image.

    Along a fixed direction, so that the order of the rows does not matter.
    """
    N, strata = len(X), find_rarest(Y)
    units = np.arange(N) if groups is None else groups
    along = X @ np.random.default_rng(0).normal(size=X.shape[1])
    order = np.lexsort((along, strata))
    place = {}  # of a group: that of its first row
    for unit in units[order].tolist():
        place.setdefault(unit, len(place))
    fold = np.array([place[unit] for unit in units.tolist()]) % min(n_folds, len(place))
    return [fold == k for k in range(fold.max() + 1)]


class _Fold:
    """Training and test part of a fold, standardised; remembers its last solution."""

    def __init__(self, X: np.ndarray, Y: np.ndarray, test: np.ndarray) -> None:
        self.test, self.Y = test, Y[~test]
        mean, scale = X[~test].mean(axis=0), X[~test].std(axis=0)
        scale = np.where(scale > 1e-14 * np.abs(mean), scale, np.inf)
        self.X, self.X_test = (X[~test] - mean) / scale, (X[test] - mean) / scale
        if len(self.X) < X.shape[1]:  # only the span of the training rows is ever weighted
            Q, R = np.linalg.qr(self.X.T)
            self.X, self.X_test = np.ascontiguousarray(R.T), self.X_test @ Q
        self.theta: np.ndarray | None = None

    def fit(self, C: float, logits: np.ndarray) -> bool:
        """Fill in the held-out logits; tell whether the fit converged."""
        self.theta, converged = fit_logistic(
            self.X, self.Y, 1 / (C * len(self.X)), start=self.theta, tolerance=TOLERANCE
        )
        logits[self.test] = self.X_test @ self.theta[:-1] + self.theta[-1]
        return converged


# --- what is said of each label ---------------------------------------------------------------


def _average_precisions(Y: np.ndarray, p: np.ndarray, kept: np.ndarray) -> dict[str, Any]:
    """Return the average precision of each label, sorted by `p`, and their mean."""
    from sklearn.metrics import average_precision_score

    known = {c: Y[:, c] >= 0 for c in kept}
    found = np.array(
        [average_precision_score(Y[rows, c], p[rows, c]) for c, rows in known.items()]
    )
    return {
        "average_precisions": _spread(found, kept, Y.shape[1]),
        "mean_average_precision": float(found.mean()),
        "left_out": _left_out(kept, Y),
    }


def _spread(values: np.ndarray, kept: np.ndarray, n: int) -> list[float | None]:
    """Return values of the labels that are judged among all, None for the others."""
    found: list[float | None] = [None] * n
    for c, value in zip(kept.tolist(), values.tolist(), strict=True):
        found[c] = value
    return found


def _left_out(kept: np.ndarray, Y: np.ndarray) -> list[int]:
    return np.setdiff1d(np.arange(Y.shape[1]), kept).tolist()
