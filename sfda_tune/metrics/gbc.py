"""GBC: Gaussian Bhattacharyya overlap of the classes (Pándy et al., CVPR 2022).

==========  ==========================================================================  ==========
Symbol      Meaning                                                                     Shape
==========  ==========================================================================  ==========
K           dimensions after PCA, at most 64
μ_c, s_c    mean of class c in these, and its variance, averaged over the dimensions    (K,), ()
s_ij        (s_i + s_j)/2
D_B(i, j)   Bhattacharyya distance of N(μ_i, s_i I) and N(μ_j, s_j I)                   (C, C)
==========  ==========================================================================  ==========
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sfda_tune.metrics._input import load, pca
from sfda_tune.values.features import MetricResult
from sfda_tune.values.text import integer

__all__ = ["gbc"]

FLOOR = 1e-4  # of s_c, relative to the mean variance of all samples


def gbc(features: Any, labels: Any, *, n_components: int = 64) -> MetricResult:
    """Score features by the overlap of the classes, each a spherical Gaussian.

    ::

        value = −Σ_{i≠j} exp(−D_B(i, j))

        D_B = ‖μ_i − μ_j‖²/(8 s_ij) + (K/2) log( s_ij / √(s_i s_j) )

    **When it is wrong.** Spheres: correlated features overlap more, or less, than it says. With
    many or far-apart classes all terms vanish and the ranking is one of numbers near 0. Published
    re-runs disagree widely (mean τ_w .007 to .457).

    Parameters
    ----------
    features : array-like or torch.Tensor of shape (n_samples, n_dims)
        Finite real numbers; never changed. All arithmetic is in float64, on the CPU.
    labels : sequence of hashable, shape (n_samples,)
        Class of each row, at least two classes. Names and order do not matter.
    n_components : int, default 64
        Principal components kept, if there are so many.

    Returns
    -------
    MetricResult
        ``value``: in [−C(C−1), 0], higher is better. ``details``: sizes and ``n_components``.

    Raises
    ------
    ValueError
        If `features` is not a finite real matrix, `labels` does not fit it or holds fewer than
        two classes, or `n_components` is not a positive integer.

    Notes
    -----
    s_c is kept ≥ 1e-4 of the mean variance of all samples (a class of one sample has none); the
    published code has an absolute floor of 1e-4 and leaves out the factor K of the second term,
    against its own formula. Constant features score −C(C−1): all classes coincide. The value
    does not depend on the scale of the features, nor on rotation.

    *Cost*: PCA, ND·min(N, D), then O(NK + C²K).

    References
    ----------
    M. Pándy, A. Agostinelli, J. Uijlings, V. Ferrari, T. Mensink: Transferability Estimation using
    Bhattacharyya Class Separability. CVPR 2022, https://arxiv.org/abs/2111.12780

    Examples
    --------
    >>> import numpy as np
    >>> from sfda_tune.metrics.gbc import gbc
    >>> rng = np.random.default_rng(0)
    >>> labels = np.repeat(["cat", "dog", "owl"], 50)
    >>> noise = rng.normal(size=(150, 8))
    >>> centres = np.repeat(2 * np.eye(3, 8), 50, axis=0)
    >>> f"{gbc(noise + centres, labels).value:.3f} against {gbc(noise, labels).value:.3f}"
    '-1.876 against -5.871'
    """
    n_components = integer("n_components", n_components, 1)
    data = load(features, labels)
    X, variances = pca(data.X - data.X.mean(axis=0), n_components)
    K = X.shape[1]
    M = data.means(X)
    s = data.sums(np.sum((X - M[data.y]) ** 2, axis=1)) / data.counts / K  # (C,)
    s = np.maximum(s, FLOOR * variances.mean() or 1.0)
    s_ij = (s[:, None] + s) / 2
    M2 = np.sum(M**2, axis=1)
    squared = np.maximum(M2[:, None] + M2 - 2 * M @ M.T, 0)  # ‖μ_i − μ_j‖²
    D_B = squared / (8 * s_ij) + K / 2 * np.log(s_ij / np.sqrt(s[:, None] * s))
    overlap = np.exp(-D_B)
    np.fill_diagonal(overlap, 0)
    return MetricResult(-float(overlap.sum()), details=data.details() | {"n_components": K})
