"""PARC: do samples with similar features have the same label? (Bolya et al., NeurIPS 2021).

==========  ==========================================================================  ==========
Symbol      Meaning                                                                     Shape
==========  ==========================================================================  ==========
N           samples; P = N(N − 1)/2 pairs of them
X           features, each dimension standardised                                       (N, D)
d_X         1 − Pearson correlation of the rows of X, for each pair                     (P,)
d_Y         1 − Pearson correlation of the one-hot labels, for each pair                (P,)
==========  ==========================================================================  ==========
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sfda_tune.metrics._input import load
from sfda_tune.values.features import MetricResult
from sfda_tune.values.text import integer

__all__ = ["parc"]


def parc(features: Any, labels: Any, *, max_samples: int = 2000) -> MetricResult:
    """Score features by the rank correlation of feature distances and label distances.

    ::

        value = Spearman(d_X, d_Y)

    d_Y has two values, same class or not, so this is the correlation of the ranks of d_X with
    "the classes differ"; the pairs are ranked once.

    **When it is wrong.** All distances count alike, also the many between far-away samples: with
    C balanced classes a share 1/C of the pairs is of one class, and the value of even perfect
    features falls with C. Do not compare data sets. Widths of one or two dimensions have no
    useful correlation.

    Parameters
    ----------
    features : array-like or torch.Tensor of shape (n_samples, n_dims)
        Finite real numbers; never changed. All arithmetic is in float64, on the CPU.
    labels : sequence of hashable, shape (n_samples,)
        Class of each row. Names and order do not matter.
    max_samples : int, default 2000
        Of more samples, so many are taken, of each class its share (see Notes).

    Returns
    -------
    MetricResult
        ``value``: in [−1, 1], higher is better (the authors print 100 times as much).
        ``details``: sizes and ``n_used``.

    Raises
    ------
    ValueError
        If `features` is not a finite real matrix, `labels` does not fit it, holds fewer than two
        classes or no class of two samples, or `max_samples` is not an integer > 2.

    Notes
    -----
    The correlations are rounded to 12 digits: ties stay ties. The published code also ranks the
    rounding errors of the label correlations, which shifts its value by up to some hundredths.
    A row without variance has correlation 0 to all others; constant features score 0. The subset
    is every so-many-th sample of each class, along a fixed direction in feature space: the same
    each time, but not the same images for different backbones. If that is one of each class at
    most, it is every so-many-th class.

    *Cost*: n²D + n² log n for the n = min(N, max_samples) samples used; about 40n² bytes.

    References
    ----------
    D. Bolya, R. Mittapalli, J. Hoffman: Scalable Diverse Model Selection for Accessible Transfer
    Learning. NeurIPS 2021, https://arxiv.org/abs/2111.06977

    Examples
    --------
    >>> import numpy as np
    >>> from sfda_tune.metrics.parc import parc
    >>> rng = np.random.default_rng(0)
    >>> labels = np.repeat(["cat", "dog", "owl"], 50)
    >>> noise = rng.normal(size=(150, 8))
    >>> centres = np.repeat(2 * np.eye(3, 8), 50, axis=0)
    >>> f"{parc(noise + centres, labels).value:.3f} against {parc(noise, labels).value:.3f}"
    '0.441 against -0.013'
    """
    max_samples = integer("max_samples", max_samples, 3)
    data = load(features, labels)
    X, y = data.X, data.y
    if max_samples < data.N:  # rows are sorted by class: every so-many-th takes a share of each
        kept = np.linspace(0, data.N - 1, max_samples).astype(int)
        if (
            np.diff(y[kept]) > 0
        ).all() and data.counts.max() > 1:  # one of each: take whole classes
            n_classes = max(2, max_samples // data.counts.max())
            some = np.linspace(0, data.C - 1, n_classes).astype(int)
            kept = np.flatnonzero(np.isin(y, some))
        X, y = X[kept], y[kept]
    if not (y[1:] == y[:-1]).any():
        raise ValueError(
            "`labels` must hold two samples of one class, among those that are used, but each is "
            f"of a class of its own (n_classes={data.C}, n_samples={data.N}); add samples."
        )
    X = X - X.mean(axis=0)
    spread = X.std(axis=0)
    X /= np.where(spread > 1e-14 * np.abs(data.X).max(), spread, np.inf)
    X -= X.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(X, axis=1, keepdims=True)
    X /= np.where(norm > 0, norm, 1)
    first, second = np.triu_indices(len(X), 1)
    same = y[first] == y[second]
    r = (X @ X.T)[first, second]
    value = _rank_correlation(np.round(r, 12), same)  # ties stay ties in any order of the rows
    return MetricResult(value, details=data.details() | {"n_used": len(X)})


def _rank_correlation(r: np.ndarray, same: np.ndarray) -> float:
    """Spearman correlation with a binary variable: ranks r once; 0 if all are tied."""
    from scipy.stats import rankdata

    ranks = rankdata(r)
    ranks -= (len(r) + 1) / 2
    norm = np.sqrt(np.vdot(ranks, ranks))
    p = same.mean()
    if norm == 0 or p in (0, 1):
        return 0.0
    return float(ranks[same].sum() / (norm * np.sqrt(len(r) * p * (1 - p))))
