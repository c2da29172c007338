"""NCTI: how far are the features from neural collapse? (Wang et al., ICCV 2023).

==========  ==========================================================================  ==========
Symbol      Meaning                                                                     Shape
==========  ==========================================================================  ==========
X           features, centred and reduced to K ≤ 64 dimensions by PCA                   (N, K)
λ           max(exp(−variance of the first 32 dimensions), 1e-10)
S̃           (1−λ)S_W + λ(tr S_W/K)I, shrunk within-class covariance                     (K, K)
P           posterior of LDA with S̃                                                     (N, C)
P_c         the rows of class c of P                                                    (n_c, C)
Z           X projected on the min(K, C−1) Fisher directions, centred                   (N, C−1)
‖·‖_*       nuclear norm, the sum of the singular values
==========  ==========================================================================  ==========
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.linalg import svdvals

from sfda_tune.metrics._input import load, pca, triangle
from sfda_tune.metrics._linear import lda_directions, lda_log_posterior
from sfda_tune.values.features import MetricResult

__all__ = ["ncti"]


def ncti(features: Any, labels: Any) -> MetricResult:
    """Score features by three properties of a classifier trained to collapse.

    ::

        seli = ‖Z‖_*                 the classes span their space evenly
        ncc  = (1/N) Σ_n P[n, y_n]   nearest-centre decisions are right
        vc   = −log Σ_c ‖P_c‖_*      the samples of a class are alike

    As published, the score is the sum of the three after each has been scaled to [0, 1] over all
    backbones of the hub: `combine_hub` of the results. One backbone alone has only the unscaled
    sum ``value = log seli + ncc + vc``, which ranks differently.

    **When it is wrong.** The published score is relative: one added or removed backbone changes
    the others' order. vc is best where the posterior is the prior, that is for pure noise: a hub
    of poor backbones is ranked upside down by that part, as the example shows. λ depends on the
    scale of the features, and seli on λ; backbones of small scale are near λ = 1, where LDA is the
    nearest mean. On medical images it ranks at random (τ_w .07 and .11 on two of three sets); on
    natural images it is among the best.

    Parameters
    ----------
    features : array-like or torch.Tensor of shape (n_samples, n_dims)
        Finite real numbers; never changed. All arithmetic is in float64, on the CPU.
    labels : sequence of hashable, shape (n_samples,)
        Class of each row, at least two classes. Names and order do not matter.

    Returns
    -------
    MetricResult
        ``value``: see above. ``per_sample``: P[n, y_n]. ``details``: sizes, ``lambda``,
        ``n_components`` and ``hub_parts`` with seli, ncc and vc, higher each being better.

    Raises
    ------
    ValueError
        If `features` is not a finite real matrix, or `labels` does not fit it or holds fewer than
        two classes.

    Notes
    -----
    Covariances have the divisor N; the published code switches to N − C where λ is at its floor,
    and fails for fewer than 64 dimensions. Constant features: P is the prior, seli is kept
    ≥ 1e-12.

    *Cost*: PCA, ND·min(N, D), then O(NK² + NC²).

    References
    ----------
    Z. Wang, Y. Luo, L. Zheng, Z. Huang, M. Baktashmotlagh: How Far Pre-trained Models Are from
    Neural Collapse on the Target Dataset Informs their Transferability. ICCV 2023

    Examples
    --------
    >>> import numpy as np
    >>> from sfda_tune.metrics.combine import combine_hub
    >>> from sfda_tune.metrics.ncti import ncti
    >>> rng = np.random.default_rng(0)
    >>> labels = np.repeat(["cat", "dog", "owl"], 50)
    >>> noise = rng.normal(size=(150, 8))
    >>> centres = np.repeat(np.eye(3, 8), 50, axis=0)
    >>> hub = {f"{s}": ncti(noise + s * centres, labels) for s in (0, 1, 2, 4)}
    >>> {name: round(score, 3) for name, score in combine_hub(hub).items()}
    {'0': 0.333, '1': 0.198, '2': 0.399, '4': 0.805}
    """
    data = load(features, labels)
    X, variances = pca(data.X - data.X.mean(axis=0), 64)
    lam = max(math.exp(-float(variances[:32].sum())), 1e-10)
    P = np.exp(lda_log_posterior(data, X, lam))
    Z = lda_directions(data, X, lam)
    own = P[np.arange(data.N), data.y]
    parts = {
        "seli": max(_nuclear_norm(Z - Z.mean(axis=0)), 1e-12),
        "ncc": float(own.mean()),
        "vc": -math.log(sum(_nuclear_norm(P[c]) for c in data.slices())),
    }
    value = math.log(parts["seli"]) + parts["ncc"] + parts["vc"]
    details = {"lambda": lam, "n_components": X.shape[1], "hub_parts": parts}
    return MetricResult(value, data.unsorted(own), data.details() | details)


def _nuclear_norm(A: np.ndarray) -> float:
    """Sum of the singular values, of the triangular factor where A is tall."""
    A = A if A.shape[0] >= A.shape[1] else A.T
    if A.shape[0] > 2 * A.shape[1]:
        A = triangle(A)
    return float(np.sum(svdvals(A, check_finite=False)))
