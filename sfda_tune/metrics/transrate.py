"""TransRate: mutual information of features and labels by coding rates (Huang et al., ICML 2022).

==========  ==========================================================================  ==========
Symbol      Meaning                                                                     Shape
==========  ==========================================================================  ==========
N, D        samples, feature dimensions
Z           features, centred on the mean of all samples                                (N, D)
Z_c, n_c    the rows of class c, and their number                                       (n_c, D)
ε           distortion
R(Z)        ½ log det(I + ZᵀZ/(Nε)), rate to code a row of Z with distortion ε
==========  ==========================================================================  ==========
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.linalg import cholesky

from sfda_tune.metrics._input import load, narrow
from sfda_tune.values.features import MetricResult
from sfda_tune.values.text import positive

__all__ = ["transrate"]


def transrate(features: Any, labels: Any, *, epsilon: float = 1e-4) -> MetricResult:
    """Score features by the coding rate that knowledge of the class saves.

    ::

        value = R(Z) − Σ_c (n_c/N) R(Z_c),  R(Z) = ½ log det(I + ZᵀZ/(Nε))

    **When it is wrong.** At n_c < D, that is nearly always, R(Z_c) is limited by the rank n_c and
    R(Z) by N: the value then grows with the number of samples and dimensions rather than with
    separation, pure noise included. It changes with the scale of the features. Published
    re-runs find it close to a random ranking (mean τ_w .195 and .13).

    Parameters
    ----------
    features : array-like or torch.Tensor of shape (n_samples, n_dims)
        Finite real numbers; never changed. All arithmetic is in float64, on the CPU.
    labels : sequence of hashable, shape (n_samples,)
        Class of each row, at least two classes. Names and order do not matter.
    epsilon : float, default 1e-4
        Distortion ε > 0.

    Returns
    -------
    MetricResult
        ``value``: in nats per sample, ≥ 0 up to rounding, higher is better. ``details``: sizes,
        ``epsilon``, ``rate`` R(Z) and ``rate_given_class``.

    Raises
    ------
    ValueError
        If `features` is not a finite real matrix, `labels` does not fit it or holds fewer than
        two classes, or `epsilon` is not a positive number.

    Notes
    -----
    The classes are not centred on their own means, as published. The code printed with the paper
    weights all classes equally; for classes of equal size this is the same. Constant features
    score 0.

    *Cost*: ND·min(N, D) for R(Z) and n_c·D·min(n_c, D) for each class.

    References
    ----------
    L.-K. Huang, J. Huang, Y. Rong, Q. Yang, Y. Wei: Frustratingly Easy Transferability
    Estimation. ICML 2022, https://arxiv.org/abs/2106.09627

    Examples
    --------
    >>> import numpy as np
    >>> from sfda_tune.metrics.transrate import transrate
    >>> rng = np.random.default_rng(0)
    >>> labels = np.repeat(["cat", "dog", "owl"], 50)
    >>> noise = rng.normal(size=(150, 8))
    >>> centres = np.repeat(9 * np.eye(3, 8), 50, axis=0)
    >>> score, chance = (transrate(x, labels).value for x in (noise + centres, noise))
    >>> f"{score:.3f} against {chance:.3f}"
    '1.636 against 0.238'
    """
    epsilon = positive("epsilon", epsilon)
    data = load(features, labels)
    Z = narrow(data.X - data.X.mean(axis=0))
    rate = _rate(Z, epsilon)
    given_class = sum(q * _rate(Z[c], epsilon) for q, c in zip(data.q, data.slices(), strict=True))
    details = {"epsilon": epsilon, "rate": rate, "rate_given_class": given_class}
    return MetricResult(rate - given_class, details=data.details() | details)


def _rate(Z: np.ndarray, epsilon: float) -> float:
    """½ log det(I + ZᵀZ/(nε)), from the smaller of the two Gram matrices."""
    n, D = Z.shape
    G = (Z @ Z.T if n < D else Z.T @ Z) / (n * epsilon)
    G[np.diag_indices_from(G)] += 1
    L = cholesky(G, lower=True, overwrite_a=True, check_finite=False)
    return float(np.log(L.diagonal()).sum())
