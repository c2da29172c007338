"""PACTran, Gaussian prior: a PAC-Bayes bound of a linear classifier (Ding et al., ECCV 2022).

==========  ==========================================================================  ==========
Symbol      Meaning                                                                     Shape
==========  ==========================================================================  ==========
X           centred features                                                            (N, D)
W           linear classifier: P = softmax(XW + b)                                      (D, C)
L(W, b)     (1/N) Σ_n −log P[n, y_n], cross-entropy
σ₀²         variance of the prior of each weight, s/D
β           temperature of the bound; βσ₀² = aN
H           Hessian of L + ‖W‖²/(2βσ₀²) with respect to (W, b)
==========  ==========================================================================  ==========
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.special import softmax

from sfda_tune.metrics._input import load, narrow
from sfda_tune.metrics._linear import fit_softmax
from sfda_tune.values.features import MetricResult
from sfda_tune.values.text import positive

__all__ = ["pactran"]


def pactran(features: Any, labels: Any, *, a: float = 1.0, s: float = 100.0) -> MetricResult:
    """Score features by a bound on the loss of a linear classifier: fit, size, flatness.

    ::

        value = −min_{W,b} [ L + ‖W‖²/(2βσ₀²) ] − (DC/2β) log( (βσ₀²/DC) tr H )

        βσ₀² = aN,  σ₀² = s/D,  tr H = (1/N) Σ_{n,c} P_nc(1 − P_nc)(‖x_n‖² + 1) + DC/(βσ₀²)

    **When it is wrong.** The prior has a unit: multiply the features and the score changes. a and
    s are chosen from a grid in the paper, no value fits all data sets. With aN large the fit is
    nearly unregularised: at N < D every backbone reaches a loss near 0 and only the flatness is
    left.

    Parameters
    ----------
    features : array-like or torch.Tensor of shape (n_samples, n_dims)
        Finite real numbers; never changed. All arithmetic is in float64, on the CPU.
    labels : sequence of hashable, shape (n_samples,)
        Class of each row, at least two classes. Names and order do not matter.
    a : float, default 1.0
        Strength of the fit, βσ₀²/N; published values 0.1, 1 and 10.
    s : float, default 100.0
        Prior variance times D; published values a·100 and a·10.

    Returns
    -------
    MetricResult
        ``value``: the negative bound, higher is better. ``per_sample``: log P[n, y_n].
        ``details``: sizes, ``a``, ``s``, ``loss`` L + ‖W‖²/(2βσ₀²), ``flatness`` the second term,
        and ``converged``.

    Raises
    ------
    ValueError
        If `features` is not a finite real matrix, `labels` does not fit it or holds fewer than
        two classes, or `a` or `s` is not a positive number.

    Notes
    -----
    The loss is minimised from zero to a gradient of 1e-6, or 1000 steps; the published code
    starts at random and stops after 100. It also forgets the 1/N of L in tr H. Constant
    features: L is the entropy of the class frequencies.

    *Cost*: O(NDC) a step, tens to hundreds of steps; for N < D the features are first rotated
    into N dimensions.

    References
    ----------
    N. Ding, X. Chen, T. Levinboim, S. Changpinyo, R. Soricut: PACTran: PAC-Bayesian Metrics for
    Estimating the Transferability of Pretrained Models to Classification Tasks. ECCV 2022,
    https://arxiv.org/abs/2203.05126

    Examples
    --------
    >>> import numpy as np
    >>> from sfda_tune.metrics.pactran import pactran
    >>> rng = np.random.default_rng(0)
    >>> labels = np.repeat(["cat", "dog", "owl"], 50)
    >>> noise = rng.normal(size=(150, 8))
    >>> centres = np.repeat(2 * np.eye(3, 8), 50, axis=0)
    >>> score, chance = (pactran(x, labels).value for x in (noise + centres, noise))
    >>> f"{score:.3f} against {chance:.3f}"
    '-2.550 against -4.655'
    """
    a, s = positive("a", a), positive("s", s)
    data = load(features, labels)
    X = narrow(data.X - data.X.mean(axis=0))
    N, DC, strength = data.N, data.D * data.C, a * data.N  # βσ₀²
    theta, converged = fit_softmax(X, data.y, data.C, 1 / strength, max_iter=1000)
    W, b = theta[:-1], theta[-1]
    P = softmax(X @ W + b, axis=1)
    own = np.log(np.maximum(P[np.arange(N), data.y], 1e-300))
    loss = -float(own.mean()) + 0.5 * float(np.vdot(W, W)) / strength
    curvature = np.sum(P * (1 - P), axis=1)
    trace = float(curvature @ (np.sum(X**2, axis=1) + 1)) / N + DC / strength
    flatness = 0.5 * data.C * s / strength * math.log(strength / DC * trace)  # DC/β = Cs/(βσ₀²)
    details = {"a": a, "s": s, "loss": loss, "flatness": flatness, "converged": converged}
    return MetricResult(-loss - flatness, data.unsorted(own), data.details() | details)
