"""SFDA: self-challenging Fisher discriminant analysis (Shao et al., ECCV 2022).

How well can the classes be told apart in the features of a frozen backbone, after each sample that
is not yet classified with confidence has been moved towards the other classes?

==========  ==========================================================================  ==========
Symbol      Meaning                                                                     Shape
==========  ==========================================================================  ==========
N, D, C     samples, feature dimensions, classes
x_n, y_n    features and class of sample n                                              (D,), ()
μ_c, μ      mean of class c, mean of all samples                                        (D,)
n_c, q_c    size n_c of class c, prior q_c = n_c/N
S_W         (1/N) Σ_n (x_n − μ_{y_n})(x_n − μ_{y_n})ᵀ, biased within-class covariance   (D, D)
S_B         (1/N) Σ_c n_c (μ_c − μ)(μ_c − μ)ᵀ, between-class covariance                  (D, D)
σ           largest eigenvalue of S_W, or an estimate of it
λ           shrinkage in (0, 1]
S̃           regularised S_W                                                             (D, D)
U           Fisher directions: S_B u = v S̃ u, UᵀS̃U = I                                  (D, D')
δ_c(x)      linear discriminant of class c
p(c|x)      softmax_c δ_c(x)
m_c         unweighted mean of the other class means, (Σ_k μ_k − μ_c)/(C − 1)           (D,)
==========  ==========================================================================  ==========

The equations of the paper, with the numbers used below:

(1)  score = Σ_n log p(y_n | x_n)
(2)  U = argmax |UᵀS_B U| / |UᵀS̃U|,  S̃ = (1−λ)S_W + λI
(3)  λ = exp(−a·σ(S_W))
(4)  S_B u = v S̃ u, the D' = min(D, C−1) leading u;  x̂ = Uᵀx
(5)  δ_c(x) = xᵀUUᵀμ_c − ½ μ_cᵀUUᵀμ_c + log q_c
(6)  p(c|x) = softmax_c δ_c(x)
(7)  x̃_n = p(y_n|x_n)·x̂_n + (1 − p(y_n|x_n))·m_{y_n}  (ConfMix); then (2)–(6) again

The published code deviates from them in every step but (6); `sfda` documents both as variants.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, TypeAlias

import numpy as np

from sfda_tune.metrics._fisher import Array, Discriminants, Samples, Scatter, load
from sfda_tune.values import MetricResult

__all__ = ["VARIANTS", "sfda"]

A = 5.0  # a of eq. (3): the published code's; the paper says only a > 0
FLOOR = 1e-10  # of λ, from the published code


def sfda(
    features: Any,
    labels: Any,
    *,
    variant: str = "official",
    shrinkage: float | None = None,
) -> MetricResult:
    """Score features by how well a self-challenging Fisher discriminant separates the classes.

    Stage 1 fits a regularised linear discriminant. ConfMix then moves each sample the further
    towards the mean of the other classes, the less the discriminant is sure of its class. Stage 2
    fits again; the score is the posterior of the true class, on the samples of the fit.

    ``"official"`` gives the numbers of the published implementation::

        λ  = max(exp(−5σ), 1e-10),  σ = ‖S_W⁷·1‖ / ‖S_W⁶·1‖
        S̃  = (1−λ) S_W + λ (tr S_W / D) I
        P  = softmax_c( xᵀS̃⁻¹μ_c − ½ μ_cᵀS̃⁻¹μ_c + log q_c ),  P̃ = softmax_c(P)
        x_n ← P̃[n, y_n] x_n + (1 − P̃[n, y_n]) m_{y_n},  then S̃ and P again with the same λ
        value = (1/N) Σ_n P[n, y_n]

    ``"paper"`` follows equations (1)–(7) of the paper::

        λ  = max(exp(−5σ), 1e-10),  σ = largest eigenvalue of S_W
        S̃  = (1−λ) S_W + λI;  S_B u = v S̃ u,  x̂ = Uᵀx with D' = min(D, C−1) directions
        x̃_n = p_n x̂_n + (1 − p_n) m̂_{y_n},  p_n = p(y_n|x_n);  then λ, S̃ and p again from x̃
        value = (1/N) Σ_n log p(y_n|x̃_n)

    where the paper is silent, and is read so: S_W and S_B are divided by N (sums would drive λ to
    zero for practically every input), a = 5 and the floor of λ are those of the published code,
    m̂ is the unweighted mean of the other class means, λ of stage 2 follows eq. (3) anew, and
    directions without any separation (v = 0) are left out. The paper's sum, eq. (1), is
    ``details["log_likelihood"]``; `value` is its mean, so that it does not grow with N.

    **When it is wrong.** The posterior is that of the samples of the fit. At N ≲ D it approaches 1
    for any labels: wide backbones win and the best ones tie at exactly 1.0. Both λ rules have
    units: the score changes when the features are multiplied by a constant. For ``"official"`` it
    also changes when they are rotated. A class of one sample fits itself perfectly.

    Parameters
    ----------
    features : array-like or torch.Tensor of shape (n_samples, n_dims)
        Finite real numbers of any dtype; never changed. All arithmetic is in float64. A CUDA
        tensor is processed on its device, everything else by NumPy and SciPy.
    labels : sequence of hashable, shape (n_samples,)
        Class of each row, at least two classes. Names and order of the classes do not matter.
    variant : {"official", "paper"}, default "official"
        See above.
    shrinkage : float in (0, 1], optional
        Fixes λ of both stages instead of the rule of the variant.

    Returns
    -------
    MetricResult
        ``value``: mean posterior of the true class in (0, 1], or mean log-posterior ≤ 0 for
        ``"paper"``; higher is better. ``per_sample``: its terms, shape (n_samples,), in the order
        of the rows. ``details``: the variant and its conventions, λ, σ, ``path`` (``"primal"``:
        D × D matrices, ``"dual"``: N × N, taken if N < D), sizes, dtype, device, and ``jitter``
        and ``jitter_stage_2``, what had to be added to the ridge: 0.0 unless S̃ was singular.

    Raises
    ------
    ValueError
        If `features` is not a finite real matrix with at least one column, or exceeds 1e75;
        if `labels` does not fit it, holds a missing value or fewer than two classes; if `variant`
        or `shrinkage` is not a valid one.

    Notes
    -----
    *Degenerate input* has a defined, finite value. Constant features: the posterior is the prior,
    hence Σ_c q_c² (``"official"``) or Σ_c q_c log q_c. Classes without any scatter but with
    different means: S_W = 0 is replaced by a small multiple of I in ``"official"``, so that the
    value is 1. λ = 1: S̃ is a multiple of I. Where S̃ is singular to working precision (tiny
    `shrinkage`; ``"paper"`` on features of large scale, where λI is negligible), 1e-10, or if need
    be 1e-8, … of the mean within-class variance is added to the ridge and reported as ``jitter``.
    Features whose deviations from the class means all sum to zero over the columns, such as class
    probabilities, give the published σ 0/0 up to rounding; the iteration then starts from a fixed
    vector instead of the row sums. Deviations below 1e-140 count as none. At N < D with λ near its
    floor and classes of equal mean, ConfMix pulls these apart by rounding errors, which 1/λ
    amplifies: the value is then known to a few percent only, also that of the published code.

    *Cost*: two symmetric rank-k updates and two Cholesky factorisations, 2ND² + ⅔D³ flops
    (2N²D + ⅔N³ if N < D), plus O(NDC); ``"paper"`` adds an eigenproblem of size C. *Memory*: one
    float64 copy of the features + 3 min(N, D)² + 2CD numbers at most, ``"paper"`` 2NC + 2C² more.

    The published code overwrites the caller's array (and truncates, if it holds integers) and
    fails unless the labels are 0 … C−1; this one does neither.

    References
    ----------
    W. Shao, X. Zhao, Y. Ge, Z. Zhang, L. Yang, X. Wang, Y. Shan, P. Luo: Not All Models Are Equal:
    Predicting Model Transferability in a Self-challenging Fisher Space. ECCV 2022,
    https://doi.org/10.1007/978-3-031-19830-4_17

    Examples
    --------
    >>> import numpy as np
    >>> from sfda_tune.metrics import sfda
    >>> rng = np.random.default_rng(0)
    >>> labels = np.repeat(["cat", "dog", "owl"], 50)
    >>> noise = rng.normal(size=(150, 8))
    >>> centres = np.repeat(2 * np.eye(3, 8), 50, axis=0)
    >>> result = sfda(noise + centres, labels)
    >>> f"{result.value:.3f} against {sfda(noise, labels).value:.3f} for pure noise"
    '0.658 against 0.336 for pure noise'
    >>> result.per_sample.shape, result.details["path"]
    ((150,), 'primal')
    >>> sfda(noise, labels, variant="best")
    Traceback (most recent call last):
    ValueError: `variant` must be one of 'official', 'paper' but is 'best'.
    """
    if variant not in tuple(_VARIANTS):  # a tuple, so that an unhashable one is refused as well
        names = ", ".join(map(repr, _VARIANTS))
        raise ValueError(f"`variant` must be one of {names} but is {variant!r}.")
    return _score(load(features, labels), variant, _checked(shrinkage))


def _checked(shrinkage: Any) -> float | None:
    if shrinkage is None:
        return None
    if isinstance(shrinkage, Real) and not isinstance(shrinkage, bool):
        value = float(shrinkage)
        if 0 < value <= 1:
            return value
    raise ValueError(
        f"`shrinkage` must be a number in (0, 1] but is {shrinkage!r}; "
        "None chooses it by the rule of the variant."
    )


Outcome: TypeAlias = tuple[float, Array, dict[str, Any]]  # value, sorted per-sample terms, details


def _official(x: Samples, shrinkage: float | None) -> Outcome:
    S_W = Scatter(x)
    sigma = S_W.sigma_from_row_sums()
    lam = max(math.exp(-A * sigma), FLOOR) if shrinkage is None else shrinkage  # eq. (3)
    # Eq. (4)–(6) with all D directions: UUᵀ = S̃⁻¹.
    stage_1 = S_W.discriminants(lam, ridge=lam * S_W.trace / x.D)

    def soften(log_p: Array) -> Array:
        return x.ops.log_softmax(x.ops.exp(log_p))

    x.mix(x.ops.exp(stage_1.of_true_class(soften)))  # eq. (7) on x instead of x̂
    S_W = Scatter(x)
    stage_2 = S_W.discriminants(lam, ridge=lam * S_W.trace / x.D)  # λ of stage 1
    p = x.ops.exp(stage_2.of_true_class())
    return (
        float(p.mean()),
        p,
        {
            "lambda": lam,
            "lambda_rule": "max(exp(-5 sigma), 1e-10)" if shrinkage is None else "fixed",
            "sigma": sigma,
            "sigma_rule": "power iteration from the row sums of S_W",
            "ridge": "lambda * tr(S_W)/D",
            "jitter": stage_1.jitter,
            "jitter_stage_2": stage_2.jitter,
        },
    )


def _paper(x: Samples, shrinkage: float | None) -> Outcome:
    def fit(x: Samples) -> tuple[float, float, Discriminants]:
        S_W = Scatter(x)
        sigma = S_W.largest_eigenvalue()
        lam = max(math.exp(-A * sigma), FLOOR) if shrinkage is None else shrinkage  # eq. (3)
        return sigma, lam, S_W.discriminants(lam, ridge=lam)  # eq. (2), (4)–(6)

    sigma, lam, stage_1 = fit(x)
    x_hat = stage_1.fisher_features()  # x̂ = Uᵀx
    x_hat.mix(x.ops.exp(stage_1.of_true_class()))  # eq. (7)
    sigma_2, lam_2, stage_2 = fit(x_hat)
    log_p = stage_2.of_true_class()
    return (
        float(log_p.mean()),
        log_p,
        {
            "lambda": lam,
            "lambda_rule": "max(exp(-5 sigma), 1e-10)" if shrinkage is None else "fixed",
            "sigma": sigma,
            "sigma_rule": "largest eigenvalue of S_W",
            "lambda_stage_2": lam_2,
            "sigma_stage_2": sigma_2,
            "ridge": "lambda",
            "jitter": stage_1.jitter,
            "jitter_stage_2": stage_2.jitter,
            "log_likelihood": float(log_p.sum()),  # eq. (1)
        },
    )


_VARIANTS: dict[str, Callable[[Samples, float | None], Outcome]] = {
    "official": _official,
    "paper": _paper,
}
VARIANTS = tuple(_VARIANTS)


def _score(x: Samples, variant: str, shrinkage: float | None) -> MetricResult:
    with np.errstate(under="ignore"):  # a probability may be 0 to working precision
        value, per_sample, details = _VARIANTS[variant](x, shrinkage)
    return MetricResult(
        value,
        x.unsorted(per_sample),
        {
            "variant": variant,
            **details,
            "scatter": "S_W/N (biased, pooled within classes)",
            "path": "dual" if x.dual else "primal",
            "n_samples": x.N,
            "n_dims": x.D,
            "n_classes": x.C,
            "n_singletons": int((x.counts == 1).sum()),
            "dtype": x.dtype,
            "device": str(x.ops.device),
        },
    )
