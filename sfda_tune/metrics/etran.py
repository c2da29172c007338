"""ETran: energy of the features, and separation of the classes (Gholami et al., ICCV 2023).

==========  ==========================================================================  ==========
Symbol      Meaning                                                                     Shape
==========  ==========================================================================  ==========
f_n         outputs of the source classifier for sample n, or its features              (K,)
E_n         log Σ_k exp f_nk, the negative energy                                       ()
S_W, σ      within-class covariance with divisor N, its largest eigenvalue              (D, D), ()
λ           max(exp(−5σ), 1e-10)
S̃           (1−λ)S_W + λ(tr S_W/D)I                                                     (D, D)
p(c|x)      posterior of LDA with S̃
==========  ==========================================================================  ==========
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.linalg import eigh
from scipy.special import logsumexp

from sfda_tune.metrics._input import load, load_logits, narrow
from sfda_tune.metrics._linear import lda_log_posterior, within
from sfda_tune.values.features import MetricResult

__all__ = ["etran"]


def etran(features: Any, labels: Any, *, logits: Any = None) -> MetricResult:
    """Score features by an LDA posterior; keep the energy for the comparison within a hub.

    ::

        lda    = (1/N) Σ_n p(y_n | x_n)
        energy = (1/N) Σ_n log Σ_k exp f_nk

    The energy is high where the target images look familiar to the source network. It has no
    common unit with the posterior; the published score adds the two after each has been scaled
    to [0, 1] over the backbones of the hub: `combine_hub` of the results, with weights .85 and
    .15 unless you give others. ``value`` is ``lda``.

    **When it is wrong.** ``lda`` is the posterior of the samples of the fit: at N ≲ D it
    approaches 1 for any labels, and wide backbones win. ``energy`` ignores the labels: it is a
    statement on scale and width of the outputs as much as on the images, and comparable only
    between heads trained alike; energy of features (no `logits`) is the published code's choice.

    Parameters
    ----------
    features : array-like or torch.Tensor of shape (n_samples, n_dims)
        Finite real numbers; never changed. All arithmetic is in float64, on the CPU.
    labels : sequence of hashable, shape (n_samples,)
        Class of each row, at least two classes. Names and order do not matter.
    logits : array-like or torch.Tensor of shape (n_samples, n_source_classes), optional
        Outputs of the source classifier, whose energy is taken instead of the features'.

    Returns
    -------
    MetricResult
        ``value``: ``lda`` in (0, 1], higher is better. ``per_sample``: p(y_n|x_n). ``details``:
        sizes, ``lambda``, ``energy_of`` (``"logits"`` or ``"features"``), ``hub_parts`` with lda
        and energy, and ``hub_weights``.

    Raises
    ------
    ValueError
        If `features` or `logits` is not a finite real matrix, or `labels` does not fit them or
        holds fewer than two classes.

    Notes
    -----
    The published code takes the eigenvectors of S̃⁻¹S_B as if that matrix were symmetric; this is
    the discriminant it means. It averages the energy over the 0.5 % of the samples where it is
    lowest, here over all. Constant features: the posterior is the prior.

    *Cost*: ND² + D³ flops; for N < D the features are first rotated into N dimensions.

    References
    ----------
    M. Gholami, M. Akbari, X. Wang, B. Kamranian, Y. Zhang: ETran: Energy-Based Transferability
    Estimation. ICCV 2023, https://arxiv.org/abs/2308.02027

    Examples
    --------
    >>> import numpy as np
    >>> from sfda_tune.metrics.etran import etran
    >>> rng = np.random.default_rng(0)
    >>> labels = np.repeat(["cat", "dog", "owl"], 50)
    >>> noise = rng.normal(size=(150, 8))
    >>> centres = np.repeat(2 * np.eye(3, 8), 50, axis=0)
    >>> f"{etran(noise + centres, labels).value:.3f} against {etran(noise, labels).value:.3f}"
    '0.883 against 0.350'
    """
    data = load(features, labels)
    outputs = features if logits is None else logits
    source = data if logits is None else load_logits(outputs, labels, "etran")
    energy = float(np.mean(np.asarray(logsumexp(source.X, axis=1))))
    X = narrow(data.X - data.X.mean(axis=0))
    _, S_W = within(data, X)
    top = len(S_W) - 1
    sigma = float(eigh(S_W, eigvals_only=True, subset_by_index=[top, top])[0])
    lam = max(math.exp(-5 * max(sigma, 0.0)), 1e-10)
    log_p = lda_log_posterior(data, X, lam, data.D)
    own = np.exp(log_p[np.arange(data.N), data.y])
    details = {
        "lambda": lam,
        "energy_of": "features" if logits is None else "logits",
        "hub_parts": {"lda": float(own.mean()), "energy": energy},
        "hub_weights": {"lda": 0.85, "energy": 0.15},
    }
    return MetricResult(float(own.mean()), data.unsorted(own), data.details() | details)
