"""NLEEP: LEEP with Gaussian clusters in place of the source classes (Li et al., CVPR 2021).

==========  ==========================================================================  ==========
Symbol      Meaning                                                                     Shape
==========  ==========================================================================  ==========
X           features, reduced by PCA to 80 % of their variance                          (N, K)
z           component of a Gaussian mixture fitted to X; 5 per class
θ_n         p(z|x_n), the responsibilities                                              (5C,)
P(y|z)      from (1/N) Σ_{n: y_n = y} θ_nz, as in LEEP                                  (C, 5C)
==========  ==========================================================================  ==========
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sfda_tune.metrics._input import load, narrow, pca
from sfda_tune.metrics._mixture import fit_mixture
from sfda_tune.metrics.leep import log_expected_prediction
from sfda_tune.values.features import MetricResult
from sfda_tune.values.text import integer, require

__all__ = ["nleep"]


def nleep(
    features: Any,
    labels: Any,
    *,
    components_per_class: int = 5,
    covariance: str = "full",
    seed: int = 0,
) -> MetricResult:
    """Score features by how well unsupervised clusters of them predict the classes.

    ::

        value = (1/N) Σ_n log Σ_z P(y_n|z) p(z|x_n)

    **When it is wrong.** With 5C components and few samples per class each component fits a
    handful of samples; P(y|z) is then near 0 or 1 whatever the features. The mixture is a local
    optimum: another seed gives another value, more so with many classes. The slowest of the
    closed metrics.

    Parameters
    ----------
    features : array-like or torch.Tensor of shape (n_samples, n_dims)
        Finite real numbers; never changed. All arithmetic is in float64, on the CPU.
    labels : sequence of hashable, shape (n_samples,)
        Class of each row, at least two classes. Names and order do not matter.
    components_per_class : int, default 5
        Components of the mixture per class; at most one per sample in all. The authors take 1
        for data sets with many samples.
    covariance : {"full", "diag", "spherical"}, default "full"
        Of the components; ``"full"`` is the published choice, ``"diag"`` much faster.
    seed : int, default 0
        Of the initial clusters.

    Returns
    -------
    MetricResult
        ``value``: ≤ 0, higher is better. ``per_sample``: its terms. ``details``: sizes,
        ``n_components`` of the mixture, ``n_pca``, ``n_iter`` and ``converged``.

    Raises
    ------
    ValueError
        If `features` is not a finite real matrix, `labels` does not fit it or holds fewer than
        two classes, or an option is not a valid one.

    Notes
    -----
    The mixture is that of scikit-learn, on features divided by one common scale, so that its
    regularisation (1e-6) does not depend on theirs. The published code drops the logarithm.
    Constant features: one component, the value is Σ_c q_c log q_c.

    *Cost*: PCA, then EM. A component of m < K rows has a covariance of rank m beside its
    regularisation, so a step with full covariances is O(N·K·Σm), where Σm ≈ N with few rows for
    each component, and not O(N·5C·K²).

    References
    ----------
    Y. Li, X. Jia, R. Sang, Y. Zhu, B. Green, L. Wang, B. Gong: Ranking Neural Checkpoints.
    CVPR 2021, https://arxiv.org/abs/2011.11200

    Examples
    --------
    >>> import numpy as np
    >>> from sfda_tune.metrics.nleep import nleep
    >>> rng = np.random.default_rng(0)
    >>> labels = np.repeat(["cat", "dog", "owl"], 50)
    >>> noise = rng.normal(size=(150, 8))
    >>> centres = np.repeat(4 * np.eye(3, 8), 50, axis=0)
    >>> nleep(noise + centres, labels).value > nleep(noise, labels).value
    True
    """
    components_per_class = integer("components_per_class", components_per_class, 1)
    is_known = covariance in ("full", "diag", "spherical")
    require("covariance", covariance, "one of 'full', 'diag', 'spherical'", is_known)
    data = load(features, labels)
    X, variances = pca(narrow(data.X - data.X.mean(axis=0)), min(data.N, data.D))
    kept = int(np.searchsorted(np.cumsum(variances), 0.8 * variances.sum())) + 1
    X = X[:, :kept]
    scale = np.sqrt(variances[0])
    constant = scale <= 1e-14 * np.abs(data.X).max()
    n_components = 1 if constant else min(components_per_class * data.C, data.N)
    rows = np.zeros_like(X) if constant else X / scale
    theta, n_iter, converged = fit_mixture(rows, n_components, covariance, seed)
    terms = log_expected_prediction(data, theta)
    details = {
        "n_components": n_components,
        "n_pca": kept,
        "n_iter": n_iter,
        "converged": converged,
    }
    return MetricResult(float(terms.mean()), data.unsorted(terms), data.details() | details)
