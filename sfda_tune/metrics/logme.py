"""LogME: maximum evidence of a Bayesian linear model of the labels (You et al., ICML 2021).

==========  ==========================================================================  ==========
Symbol      Meaning                                                                     Shape
==========  ==========================================================================  ==========
N, D, C     samples, feature dimensions, classes
F           features, not centred                                                       (N, D)
y_k         indicator of class k                                                        (N,)
w           model: w ~ N(0, α⁻¹I), y_k ~ N(Fw, β⁻¹I)                                    (D,)
A           αI + βFᵀF, precision of w given y_k                                         (D, D)
m           βA⁻¹Fᵀy_k, mean of w given y_k                                              (D,)
F = USVᵀ    singular value decomposition; σ = S²                                        (K,)
z_k         Uᵀy_k                                                                       (K,)
t           α/β                                                                         (C,)
γ           Σ σ/(σ + t), the effective number of dimensions                             (C,)
==========  ==========================================================================  ==========
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.linalg import eigh

from sfda_tune.metrics._input import EPS, load
from sfda_tune.values.features import MetricResult

__all__ = ["find_spectrum", "logme", "maximise_evidence"]

FLOOR = 1e-6  # of the noise variance, relative to the mean square of y_k
TOLERANCE = 1e-6
MAX_ITER = 300


def logme(features: Any, labels: Any) -> MetricResult:
    """Score features by the evidence of a Bayesian linear regression on each class indicator.

    ::

        value = (1/C) Σ_k max_{α,β} log p(y_k | F, α, β) / N

        log p = ½ (N log β + D log α − log|A| − β‖Fm − y_k‖² − α‖m‖² − N log 2π)

    The maximum is found by the fixed point α = γ/‖m‖², β = (N − γ)/‖Fm − y_k‖², from α = β = 1.

    **When it is wrong.** The classes are treated as independent regressions with Gaussian noise:
    many classes make the value large by their number alone (an indicator that is almost always 0
    is easy to predict), so that values of different data sets cannot be compared. It is the score
    of a linear model on frozen features, and follows fine-tuning badly where the backbone moves.

    Parameters
    ----------
    features : array-like or torch.Tensor of shape (n_samples, n_dims)
        Finite real numbers; never changed. All arithmetic is in float64, on the CPU.
    labels : sequence of hashable, shape (n_samples,)
        Class of each row, at least two classes. Names and order do not matter.

    Returns
    -------
    MetricResult
        ``value``: mean log-evidence per sample, higher is better, of either sign. ``details``:
        sizes, ``n_iter`` of the fixed point, ``converged``, and ``gamma``, the mean γ.

    Raises
    ------
    ValueError
        If `features` is not a finite real matrix, or `labels` does not fit it or holds fewer than
        two classes.

    Notes
    -----
    *Degenerate input*: where the classes are fitted without error, β would be infinite; the noise
    variance is kept ≥ 1e-6 of the mean square of y_k. Constant zero features explain nothing:
    the value is that of pure noise. Directions with σ below rounding error are left out.

    *Cost*: one symmetric eigenproblem of size K = min(N, D), ND·K + 9K³ flops, and O(CK) a step
    for all classes together. The published code loops over the classes, adds 1e-5 to ‖m‖² and
    ‖Fm − y‖², stops at a change of 1e-3, and for N < D counts D − N directions twice.

    References
    ----------
    K. You, Y. Liu, J. Wang, M. Long: LogME: Practical Assessment of Pre-trained Models for
    Transfer Learning. ICML 2021, https://arxiv.org/abs/2102.11005; the fixed point on the
    singular values: K. You et al., Ranking and Tuning Pre-trained Models, JMLR 2022,
    https://arxiv.org/abs/2110.10545

    Examples
    --------
    >>> import numpy as np
    >>> from sfda_tune.metrics.logme import logme
    >>> rng = np.random.default_rng(0)
    >>> labels = np.repeat(["cat", "dog", "owl"], 50)
    >>> noise = rng.normal(size=(150, 8))
    >>> centres = np.repeat(2 * np.eye(3, 8), 50, axis=0)
    >>> f"{logme(noise + centres, labels).value:.3f} against {logme(noise, labels).value:.3f}"
    '-0.457 against -0.870'
    """
    data = load(features, labels)
    norms = data.counts.astype(float)
    spectrum = find_spectrum(data.X, data.sums, norms)
    evidence, about = maximise_evidence(data.N, *spectrum, norms)
    return MetricResult(float(evidence.mean()) / data.N, details=data.details() | about)


def maximise_evidence(
    N: int, sigma: np.ndarray, z2: np.ndarray, rest: np.ndarray, norms: np.ndarray
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return max log p of each y_k (C,), and how it was found; `norms` are ‖y_k‖²."""
    floor = FLOOR * norms  # of r2; β ≤ (N − γ)/floor
    t, t_max = np.ones(len(norms)), max(1e12 * sigma[-1], 1.0)

    def moments(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        s = sigma[:, None] + t  # (K, C)
        m2 = np.sum(sigma[:, None] * z2 / s**2, axis=0)  # ‖m‖²
        r2 = np.sum(z2 * (t / s) ** 2, axis=0) + rest  # ‖Fm − y‖²
        return m2, np.maximum(r2, floor)

    change = gamma = np.full(len(norms), np.inf)
    n_iter = 0
    while n_iter < MAX_ITER and change.max() > TOLERANCE:
        n_iter += 1
        m2, r2 = moments(t)
        gamma = np.sum(sigma[:, None] / (sigma[:, None] + t), axis=0)
        beta = np.maximum(N - gamma, EPS) / r2
        new = np.where(m2 * beta * t_max > gamma, gamma / np.maximum(m2 * beta, 1e-300), t_max)
        new = np.clip(new, sigma[-1] * 1e-14 + 1e-300, t_max)
        change = np.abs(np.log(new / t))
        t = new
    m2, r2 = moments(t)
    beta = N / (r2 + t * m2)  # the best β for this t
    evidence = 0.5 * (
        N * (np.log(beta / (2 * np.pi)) - 1)
        - np.sum(np.log1p(sigma[:, None] / t), axis=0)  # D log α − log|A| + …
    )
    return evidence, {
        "n_iter": n_iter,
        "converged": bool(change.max() <= TOLERANCE),
        "gamma": float(gamma.mean()),
    }


def find_spectrum(
    F: np.ndarray, project: Callable[[np.ndarray], np.ndarray], norms: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """σ > 0 ascending (K,), z_k² (K, C), and what of ‖y_k‖² is outside the span of F (C,).

    `project` returns y_kᵀA (C, …) of a matrix A, `norms` are ‖y_k‖².
    """
    N, D = F.shape
    if D < N:
        sigma, V = eigh(F.T @ F, overwrite_a=True, check_finite=False)
        kept = sigma > N * EPS * sigma[-1]
        z = (V.T @ project(F).T)[kept] / np.sqrt(sigma[kept])[:, None]  # S⁻¹VᵀFᵀY
    else:
        sigma, U = eigh(F @ F.T, overwrite_a=True, check_finite=False)
        kept = sigma > D * EPS * sigma[-1]
        z = project(U[:, kept]).T
    if not kept.any():  # zero features
        return np.zeros(1), np.zeros((1, len(norms))), norms
    rest = np.maximum(norms - np.sum(z**2, axis=0), 0)
    return sigma[kept], z**2, rest * (kept.sum() < N)
