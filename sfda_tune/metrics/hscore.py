"""H-score with a Ledoit–Wolf covariance (Bao et al., ICIP 2019; Ibrahim et al., 2021).

==========  ==========================================================================  ==========
Symbol      Meaning                                                                     Shape
==========  ==========================================================================  ==========
N, D        samples, feature dimensions
X           centred features                                                            (N, D)
S           XᵀX/N                                                                       (D, D)
S_B         covariance of the class means, Σ_c (n_c/N) μ_c μ_cᵀ                         (D, D)
a           Ledoit–Wolf shrinkage in [0, 1]
S_a         (1−a)S + a(tr S/D)I                                                         (D, D)
==========  ==========================================================================  ==========
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.linalg import cholesky, solve_triangular

from sfda_tune.metrics._input import load, narrow
from sfda_tune.values.features import MetricResult
from sfda_tune.values.text import positive

__all__ = ["hscore"]


def hscore(features: Any, labels: Any, *, shrinkage: float | None = None) -> MetricResult:
    """Score features by the variance between classes relative to the regularised variance.

    ::

        value = tr( S_a⁻¹ (1−a) S_B )

    with the shrinkage a of Ledoit and Wolf, which minimises the expected squared error of S_a::

        a = min(b, d)/d,  d = ‖S − (tr S/D)I‖_F²,  b = (1/N²) Σ_n ‖x_n x_nᵀ − S‖_F²

    **When it is wrong.** Scores of backbones of different widths are hardly comparable: every
    further dimension that varies with the class by chance adds to the trace (rank correlation
    with D of .64 on published benchmarks). Wrong at N ≲ D, less so than without shrinkage. It
    measures linear separation in the mean only.

    Parameters
    ----------
    features : array-like or torch.Tensor of shape (n_samples, n_dims)
        Finite real numbers; never changed. All arithmetic is in float64, on the CPU.
    labels : sequence of hashable, shape (n_samples,)
        Class of each row, at least two classes. Names and order do not matter.
    shrinkage : float in (0, 1], optional
        Fixes a.

    Returns
    -------
    MetricResult
        ``value``: in [0, C − 1], higher is better. ``details``: sizes and ``shrinkage``.

    Raises
    ------
    ValueError
        If `features` is not a finite real matrix, `labels` does not fit it or holds fewer than
        two classes, or `shrinkage` is not in (0, 1].

    Notes
    -----
    All covariances have the divisor N (public code of S_B: N − 1). Constant features score 0. The
    value does not depend on the scale of the features, nor on rotation.

    *Cost*: ND² + ⅓D³ flops; for N < D the features are first rotated into N dimensions.

    References
    ----------
    Y. Bao et al.: An Information-Theoretic Approach to Transferability in Task Transfer Learning.
    ICIP 2019. S. Ibrahim, N. Ponomareva, R. Mazumder: Newer is not always better: Rethinking
    transferability metrics, their peculiarities, stability and performance.
    https://arxiv.org/abs/2110.06893. O. Ledoit, M. Wolf: A well-conditioned estimator for
    large-dimensional covariance matrices. J. Multivariate Analysis 88, 2004

    Examples
    --------
    >>> import numpy as np
    >>> from sfda_tune.metrics.hscore import hscore
    >>> rng = np.random.default_rng(0)
    >>> labels = np.repeat(["cat", "dog", "owl"], 50)
    >>> noise = rng.normal(size=(150, 8))
    >>> centres = np.repeat(2 * np.eye(3, 8), 50, axis=0)
    >>> f"{hscore(noise + centres, labels).value:.3f} against {hscore(noise, labels).value:.3f}"
    '1.070 against 0.010'
    """
    a = None if shrinkage is None else positive("shrinkage", shrinkage, most=1)
    data = load(features, labels)
    X = data.X - data.X.mean(axis=0)
    scale = np.abs(X).max()
    if scale <= 1e-14 * np.abs(data.X).max():  # constant, but for rounding
        return MetricResult(0.0, details=data.details() | {"shrinkage": a if a else 1.0})
    X = narrow(X / scale)
    S = X.T @ X / data.N
    mu = np.trace(S) / data.D
    if a is None:
        S2 = np.vdot(S, S)
        d = S2 - data.D * mu**2
        b = (np.sum(np.sum(X**2, axis=1) ** 2) / data.N - S2) / data.N
        a = float(np.clip(b / d, 0, 1)) if d > 1e-12 * S2 else 0.0  # S is spherical already
    S *= 1 - a
    S[np.diag_indices_from(S)] += max(a * mu, 1e-12 * mu)
    W = solve_triangular(cholesky(S, lower=True), data.means(X).T, lower=True)
    value = (1 - a) * float(np.sum(W**2 @ data.q))
    return MetricResult(value, details=data.details() | {"shrinkage": a})
