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
μ', S_W',…  the same from the other N − 1 samples, the one in question left out
==========  ==========================================================================  ==========

The equations of the paper, with its numbers, which stand as ``# (7)`` on the lines that compute
them here and in ``_fisher.py``:

(1)  score = Σ_n log p(y_n | x_n)
(2)  U = argmax |UᵀS_B U| / |UᵀS̃U|,  S̃ = (1−λ)S_W + λI
(3)  λ = exp(−a·σ(S_W))
(4)  S_B u = v S̃ u, the D' = min(D, C−1) leading u;  x̂ = Uᵀx
(5)  δ_c(x) = xᵀUUᵀμ_c − ½ μ_cᵀUUᵀμ_c + log q_c
(6)  p(c|x) = softmax_c δ_c(x)
(7)  x̃_n = p(y_n|x_n)·x̂_n + (1 − p(y_n|x_n))·m_{y_n}  (ConfMix); then (2)–(6) again

The published code deviates from them in every step but (6); `sfda` documents both as variants, and
a third one that judges each sample by the fit without it.

Evidence for the defaults
-------------------------
Mean weighted τ (and the accuracy lost by taking the first) on real weights and images: 16 small
backbones, scored on 500 training images of each of three data sets. *Frozen*: truth is the
accuracy of a linear head on the validation part; by it, with a fourth data set, normalisation and
summary were chosen. *Fine-tuned*: all weights, 6 epochs, three learning rates; *best*: that or the
frozen head, whichever is better on held-out images; both were looked at afterwards. *Demo*: eight
fine-tuned backbones, 500 images of ``digits``. ``tests/benchmarks/real_zoo.py --report --truth
real_zoo_sgd.json`` prints the first three, whose fine-tuning began at a random head.

================================  =============  =============  =============  =====
metric                            frozen         best           fine-tuned     demo
================================  =============  =============  =============  =====
"loo", standardised, λ = .5       .83 (.005)     .51 (.019)     .35 (.041)     .67
"loo", standardised, λ by loo     .80 (.008)     .48 (.022)     .32 (.029)     .45
"loo", raw features, λ = .5       .76 (.005)     .56 (.019)     .34 (.041)     .58
"loo", l2, λ = .5                 .72 (.009)     .56 (.020)     .42 (.038)     .58
"loo" with challenge              .69 (.017)     .34 (.029)     .40 (.021)     .67
"official"                        .65 (.071)     .58 (.039)     .52 (.035)     .32
linear probe, cross-validated     .78 (.008)     .49 (.022)     .32 (.029)     .69
================================  =============  =============  =============  =====

So "loo" predicts the accuracy of frozen features far better than the published form, and its
first choice always costs less or about the same: up to nine backbones tie at 1.0 for "official".
But where fine-tuning rebuilds the features (hand signs: .722 frozen, .990 fine-tuned for the best
network) no score of frozen features knew the order: the accuracy of a linear head on the very
validation images has τ −.15 with it. What helps there is capacity, which "official" rewards by its
fault, and which a prior may bring in knowingly (``sfda + params``). Differences below .05 are
noise. The summaries of "loo" (mean probability, accuracy, temperature-scaled log-probability,
Brier score) were within .04 of each other; the mean probability is a mean over images, which
`sfda_tune.selection.uncertainty` needs, and has no further parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from sfda_tune.metrics._fisher import Array, Discriminants, Samples, Scatter, load
from sfda_tune.values.features import MetricResult
from sfda_tune.values.text import is_number

__all__ = ["VARIANTS", "sfda"]

A = 5.0  # a of (3): the published code's; the paper says only a > 0
FLOOR = 1e-10  # of λ, from the published code
LAM = 0.5  # λ of "loo"
CONFUSIONS = 30  # pairs of classes that are kept
TEMPERATURES = (0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.45, 0.7, 1.0)
LAMBDAS = (0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.8, 0.95)  # tried by shrinkage="loo"
RULES = ("ledoit-wolf", "oas", "loo")
NORMALIZATIONS = ("standardize", "l2", "none")  # the first is the default


def sfda(
    features: Any,
    labels: Any,
    *,
    variant: str = "loo",
    shrinkage: float | str | None = None,
    challenge: bool = False,
    normalize: str | None = None,
    groups: Any = None,
) -> MetricResult:
    """Score features by how well a self-challenging Fisher discriminant separates the classes.

    Stage 1 fits a regularised linear discriminant. ConfMix then moves each sample the further
    towards the mean of the other classes, the less the discriminant is sure of its class. Stage 2
    fits again; the score is the posterior of the true class, on the samples of the fit. ``"loo"``,
    the default, instead scores each sample by the fit without it, and leaves the challenge to the
    caller.

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

    ``"loo"`` is the exact leave-one-out posterior, in closed form: no folds and no seed. With
    μ'_k, S_W' and n'_k of the other N − 1 samples::

        x_n ← x_n / s, with s_d the standard deviation of column d
        S̃' = (1−λ) S_W' + N/(N−1) · λ (tr S_W / D) I,  λ = 0.5
        p'(k|x_n) = softmax_k( −½ (x_n − μ'_k)ᵀ S̃'⁻¹ (x_n − μ'_k) + log n'_k )
        value = mean of p'(y_n|x_n) over the samples whose class has another one

    Normalisation, λ and the ridge are those of all N samples. With `challenge`, the samples move
    by ConfMix with p' as it is, x_n ← p'_n x_n + (1 − p'_n) m_{y_n}, and are judged once more with
    the same λ and no further normalisation; what is left out then is the mixed sample, not its
    share in the mixing of the others.

    With `groups` each sample is judged by the fit without all of its group: frames of one video,
    slides of one patient. The formulae are the same with N − m in place of N − 1, in closed form
    as well (``leave_one_out.md``).

    **When it is wrong.** The posterior of ``"official"`` and ``"paper"`` is that of the samples of
    the fit. At N ≲ D it approaches 1 for any labels: wide backbones win and the best ones tie at
    exactly 1.0. Both λ rules have units: the score changes when the features are multiplied by a
    constant. For ``"official"`` it also changes when they are rotated. A class of one sample fits
    itself perfectly.

    ``"loo"`` has none of these faults, but others. Near duplicates (frames of one video, augmented
    copies) are not held out with their twin, unless `groups` says so. All classes share one
    covariance, so that boundaries are straight, as those of a linear probe; fine-tuning may need
    neither. A few samples far out may rule S_W; ``normalize="l2"`` is proof against them, but its
    rows of length 1 have lost what their lengths tell. p' is too sure of itself where D is large:
    never rank by the plain ``log_probability``, which punishes width, but by the value, the
    ``accuracy`` or ``log_probability_scaled``. Where every sample is recognised with certainty,
    values tie at 1 here as well. A class of two samples is judged by the one that remains. With
    ``challenge=True`` and N ≪ D the value may fall far below chance, because the mixing has used
    the label of the sample that is then left out: do not compare widths by it.

    Parameters
    ----------
    features : array-like or torch.Tensor of shape (n_samples, n_dims)
        Finite real numbers of any dtype; never changed. All arithmetic is in float64. A CUDA
        tensor is processed on its device, everything else by NumPy and SciPy.
    labels : sequence of hashable, shape (n_samples,)
        Class of each row, at least two classes. Names and order of the classes do not matter.
    variant : {"loo", "official", "paper"}, default "loo"
        See above.
    shrinkage : float in (0, 1] or str, optional
        λ of both stages, instead of the rule of the variant. ``"loo"`` also takes rules, all of
        them free of units: ``"ledoit-wolf"`` and ``"oas"`` estimate λ from the deviations
        x_n − μ_{y_n}; ``"loo"`` tries 0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.8 and 0.95 and keeps that
        of the highest ``log_probability_scaled``.
    challenge : bool, default False
        For ``"loo"``: ConfMix and a second stage. The other variants always have them.
    normalize : {"standardize", "l2", "none"}, optional
        For ``"loo"``: ``"standardize"``, the default, as above, constant columns left out;
        ``"l2"`` takes (x_n − μ) / ‖x_n − μ‖, rows at the mean left at zero; ``"none"`` takes the
        features as they are. The other variants never normalise.
    groups : sequence of hashable, shape (n_samples,), optional
        For ``"loo"``: samples that are left out together, two groups or more. They may hold
        several classes. Groups of one sample each are the same as none.

    Returns
    -------
    MetricResult
        ``value``: mean posterior of the true class in [0, 1], or mean log-posterior ≤ 0 for
        ``"paper"``; higher is better. ``per_sample``: its terms, shape (n_samples,), in the order
        of the rows. ``details``: the variant and its conventions, λ, σ, ``path`` (``"primal"``:
        D × D matrices, ``"dual"``: N × N, taken if N < D), sizes, dtype, device, and ``jitter``
        and ``jitter_stage_2``, what had to be added to the ridge: 0.0 unless S̃ was singular.

        ``"loo"``: the only sample of a class has p' = 0, since its class vanishes with it; it is
        left out of the value and all other means, and counted in ``n_singletons``. So is, with
        `groups`, every sample whose class lies within its group. ``n_groups``: how many there are.
        The details
        have ``mean_probability`` (the value), ``accuracy`` (a tie counts as a hit),
        ``log_probability``, and ``log_probability_scaled``: the mean log-probability once all
        logarithms of p' are multiplied by ``temperature``, the one of 11 numbers from 0.02 to 1
        that raises it most, and normalised again; with `challenge` also
        ``mean_probability_stage_1``. ``n_guarded`` counts samples for which nothing but a bound is
        known, see the notes. ``confusions`` holds the most frequent mistakes of the ``accuracy``:
        a class, what p' takes its samples for (positions among the sorted labels), how many.

    Raises
    ------
    ValueError
        If `features` is not a finite real matrix with at least one column, or exceeds 1e75;
        if `labels` does not fit it, holds a missing value or fewer than two classes, for ``"loo"``
        also if no class has two samples (two groups); if `groups` does not fit, holds a missing
        value or a single group; if `variant`, `shrinkage`, `challenge`, `normalize` or `groups` is
        not a valid one, or does not belong to the variant.

    Notes
    -----
    *Degenerate input* has a defined, finite value. Constant features: the posterior is the prior,
    hence Σ_c q_c² (``"official"``), Σ_c q_c log q_c (``"paper"``), or the mean of
    (n_{y_n} − 1)/(N − 1) (``"loo"``). Classes without any scatter but with different means:
    S_W = 0 is replaced by a small multiple of I in ``"official"`` and ``"loo"``, so that the value
    is 1. λ = 1: S̃ is a multiple of I. Where S̃ is singular to working precision (tiny
    `shrinkage`; ``"paper"`` on features of large scale, where λI is negligible), 1e-10, or if need
    be 1e-8, … of the mean within-class variance is added to the ridge and reported as ``jitter``;
    for ``"loo"`` the ridge is never below 1e-10 of it.
    Features whose deviations from the class means all sum to zero over the columns, such as class
    probabilities, give the published σ 0/0 up to rounding; the iteration then starts from a fixed
    vector instead of the row sums. Deviations below 1e-140 count as none, except for ``"loo"``. At
    N < D with λ near its floor and classes of equal mean, ConfMix pulls these apart by rounding
    errors, which 1/λ amplifies: the value is then known to a few percent only, also that of the
    published code.

    *Exactness* of ``"loo"``, as error of log p' against refits in extended precision, N × D from
    120 × 15 to 60 × 150: at most 3e-12 for λ ≥ 0.1 and 1e-9 at 1e-3. Where N ≲ D, log p' itself
    grows like 1/λ below that; its relative error is 3e-9 at λ = 1e-6 and 5e-6 at 1e-10 on the
    primal path, 2e-12 and 3e-8 on the dual one, and p' has no error above 1e-13. For λ < 2e-8·D
    the primal path may meet samples for which rounding errors hide how far S̃ depends on them; an
    upper bound is then taken for that, and ``n_guarded`` says how many there were. With `groups`
    the same holds; p' of a group of one among larger ones differs from that without groups by
    rounding only.

    *Cost*: two symmetric rank-k updates and two Cholesky factorisations, 2ND² + ⅔D³ flops
    (2N²D + ⅔N³ if N < D), plus O(NDC); ``"paper"`` adds an eigenproblem of size C. ``"loo"``:
    2ND² + ⅓D³ (N²D + N³), twice that with `challenge`, and ND² + ⅓D³ more per λ tried; `groups` of
    m samples add Nm(m + C + D) (dual: N in place of D). *Memory*:
    one float64 copy of the features + 3 min(N, D)² + 2CD numbers at most, ``"paper"`` 2NC + 2C²
    more, ``"loo"`` 2C² and, if N < D, 2NC more.

    The published code overwrites the caller's array (and truncates, if it holds integers) and
    fails unless the labels are 0 … C−1; this one does neither.

    References
    ----------
    W. Shao, X. Zhao, Y. Ge, Z. Zhang, L. Yang, X. Wang, Y. Shan, P. Luo: Not All Models Are Equal:
    Predicting Model Transferability in a Self-challenging Fisher Space. ECCV 2022,
    https://doi.org/10.1007/978-3-031-19830-4_17

    P. A. Lachenbruch: An Almost Unbiased Method of Obtaining Confidence Intervals for the
    Probability of Misclassification in Discriminant Analysis. Biometrics 23, 1967, 639–645
    (leave-one-out discriminants by a rank-one update)

    O. Ledoit, M. Wolf: A Well-Conditioned Estimator for Large-Dimensional Covariance Matrices.
    J. Multivariate Analysis 88, 2004, https://doi.org/10.1016/S0047-259X(03)00096-4

    Y. Chen, A. Wiesel, Y. C. Eldar, A. O. Hero: Shrinkage Algorithms for MMSE Covariance
    Estimation. IEEE Trans. Signal Processing 58, 2010, https://doi.org/10.1109/TSP.2010.2053029

    Examples
    --------
    >>> import numpy as np
    >>> from sfda_tune.metrics.sfda import sfda
    >>> rng = np.random.default_rng(0)
    >>> labels = np.repeat(["cat", "dog", "owl"], 50)
    >>> noise = rng.normal(size=(150, 8))
    >>> centres = np.repeat(2 * np.eye(3, 8), 50, axis=0)
    >>> result = sfda(noise + centres, labels)
    >>> f"{result.value:.3f} against {sfda(noise, labels).value:.3f} for pure noise"
    '0.831 against 0.308 for pure noise'
    >>> result.per_sample.shape, result.details["path"], f"{result.details['accuracy']:.3f}"
    ((150,), 'primal', '0.880')
    >>> f"{sfda(noise + centres, labels, variant='official').value:.3f} as published"
    '0.658 as published'
    >>> sfda(noise, labels, variant="best")
    Traceback (most recent call last):
    ValueError: `variant` must be one of 'official', 'paper', 'loo' but is 'best'.
    """
    if variant not in tuple(_VARIANTS):  # a tuple, so that an unhashable one is refused as well
        names = ", ".join(map(repr, _VARIANTS))
        raise ValueError(f"`variant` must be one of {names} but is {variant!r}.")
    lam = _checked_shrinkage(shrinkage, variant)
    options = _checked_options(variant, challenge, normalize)
    if groups is not None and variant != "loo":
        raise ValueError(
            f"`groups` must be None for variant={variant!r}, which leaves nothing out; "
            "leave it out, or choose variant='loo'."
        )
    return _score(load(features, labels, groups=groups), variant, lam, **options)


def _checked_shrinkage(shrinkage: Any, variant: str) -> float | str | None:
    if shrinkage is None:
        return None
    if is_number(shrinkage) and 0 < shrinkage <= 1:
        return float(shrinkage)
    hint = "None chooses it by the rule of the variant"
    rules = ", ".join(map(repr, RULES))
    if variant == "loo":
        hint += f", other rules are {rules}"
    if isinstance(shrinkage, str) and shrinkage in RULES:
        if variant == "loo":
            return shrinkage
        hint = f"the rules {rules} belong to variant='loo'"
    raise ValueError(f"`shrinkage` must be a number in (0, 1] but is {shrinkage!r}; {hint}.")


def _checked_options(variant: str, challenge: Any, normalize: Any) -> dict[str, Any]:
    if not isinstance(challenge, bool | np.bool_):
        raise ValueError(f"`challenge` must be True or False but is {challenge!r}.")
    if normalize is not None and normalize not in NORMALIZATIONS:
        names = ", ".join(map(repr, NORMALIZATIONS))
        raise ValueError(
            f"`normalize` must be one of {names} but is {normalize!r}; None is the variant's own."
        )
    if variant == "loo":
        return {"challenge": bool(challenge), "normalize": normalize or NORMALIZATIONS[0]}
    if challenge:
        raise ValueError(
            f"`challenge` must be False for variant={variant!r}, which always challenges; "
            "leave it out, or choose variant='loo'."
        )
    if normalize is not None:
        raise ValueError(
            f"`normalize` must be None for variant={variant!r} but is {normalize!r}; "
            "scale the features yourself, or choose variant='loo'."
        )
    return {}


Outcome: TypeAlias = tuple[float, Array, dict[str, Any]]  # value, sorted per-sample terms, details


def _official(x: Samples, shrinkage: float | None) -> Outcome:
    S_W = Scatter(x)
    sigma = S_W.sigma_from_row_sums()
    lam = max(math.exp(-A * sigma), FLOOR) if shrinkage is None else shrinkage  # (3)
    # (2), (4): all D directions, so that UUᵀ = S̃⁻¹; the ridge is λ·tr S_W/D instead of λ.
    stage_1 = S_W.discriminants(lam, ridge=lam * S_W.trace / x.D)

    def soften(log_p: Array) -> Array:
        return x.ops.log_softmax(x.ops.exp(log_p))  # (6) a second time

    x.mix(x.ops.exp(stage_1.of_true_class(soften)))  # (7) on x instead of x̂
    S_W = Scatter(x)
    stage_2 = S_W.discriminants(lam, ridge=lam * S_W.trace / x.D)  # λ of stage 1
    p = x.ops.exp(stage_2.of_true_class())
    return (
        float(p.mean()),  # instead of (1)
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
        lam = max(math.exp(-A * sigma), FLOOR) if shrinkage is None else shrinkage  # (3)
        return sigma, lam, S_W.discriminants(lam, ridge=lam)  # (2)

    sigma, lam, stage_1 = fit(x)
    x_hat = stage_1.fisher_features()  # (4)
    x_hat.mix(x.ops.exp(stage_1.of_true_class()))  # (7)
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
            "log_likelihood": float(log_p.sum()),  # (1)
        },
    )


@dataclass
class _Fit:
    """One leave-one-out fit; the means are over samples that are not alone in their class."""

    lam: float
    p: np.ndarray  # p'(y_n|x_n) of all samples, sorted
    probability: float
    accuracy: float
    log_probability: float
    scaled: float  # the mean log-probability at
    temperature: float
    jitter: float
    n_guarded: int
    confusions: list[list[int]]  # class, what its samples were taken for, how many


def _leave_one_out(x: Samples, S_W: Scatter, lam: float, *, keep: bool = False) -> _Fit:
    fit = S_W.leave_one_out(lam, keep=keep)
    log_p, hit = np.empty(x.N), np.empty(x.N, dtype=bool)
    guess = np.empty(x.N, dtype=np.int64)
    counted = x.n_left > 0
    scaled = np.zeros(len(TEMPERATURES))
    for rows, log_posterior in fit.log_posterior():
        own = x.ops.pick(log_posterior, x.y[rows])
        hit[rows] = x.ops.to_numpy(~(log_posterior > own[:, None]).any(1))
        guess[rows] = x.ops.to_numpy(log_posterior.argmax(1))
        own = log_p[rows] = x.ops.to_numpy(own)
        for i, t in enumerate(TEMPERATURES):
            # No overflow, and the sum is at least C^-t: the largest posterior is at least 1/C.
            total = x.ops.to_numpy(x.ops.exp(t * log_posterior).sum(1))
            scaled[i] += (t * own - np.log(total))[counted[rows]].sum()
    best, p = int(scaled.argmax()), np.exp(log_p)
    return _Fit(
        lam,
        p,
        probability=float(p[counted].mean()),
        accuracy=float(hit[counted].mean()),
        log_probability=float(log_p[counted].mean()),
        scaled=float(scaled[best] / counted.sum()),
        temperature=TEMPERATURES[best],
        jitter=fit.jitter,
        n_guarded=fit.n_guarded,
        confusions=_count_confusions(x, guess, counted & ~hit),
    )


def _count_confusions(x: Samples, guess: np.ndarray, wrong: np.ndarray) -> list[list[int]]:
    """Return the most frequent pairs of a class and what its samples were taken for."""
    truth = np.repeat(np.arange(x.C), x.counts)
    pairs, n = np.unique(truth[wrong] * x.C + guess[wrong], return_counts=True)
    most = np.argsort(-n, kind="stable")[:CONFUSIONS]
    return [[*divmod(int(pairs[i]), x.C), int(n[i])] for i in most]


def _best_leave_one_out(x: Samples, shrinkage: float | str) -> _Fit:
    S_W = Scatter(x)
    if shrinkage == "loo":
        fits = (_leave_one_out(x, S_W, lam, keep=True) for lam in LAMBDAS)
        return max(fits, key=lambda fit: fit.scaled)
    if isinstance(shrinkage, str):
        shrinkage = max(S_W.oas() if shrinkage == "oas" else S_W.ledoit_wolf(), FLOOR)
    return _leave_one_out(x, S_W, shrinkage)


def _loo(
    x: Samples,
    shrinkage: float | str | None,
    *,
    challenge: bool = False,
    normalize: str = "standardize",
) -> Outcome:
    if x.counts.max() == 1:
        raise ValueError(
            f"`labels` must give some class two samples but all {x.C} classes have one; "
            "the leave-one-out posterior of a class needs another sample of it."
        )
    if not x.n_left.any():
        raise ValueError(
            f"`groups` must leave some class in two groups but each of the {x.C} classes lies "
            "within one; no class has a sample to judge it by without the group. Name smaller "
            "groups, or leave groups out."
        )
    x.normalize(normalize)
    rule = "fixed" if is_number(shrinkage) else shrinkage or f"default {LAM}"
    fit = first = _best_leave_one_out(x, LAM if shrinkage is None else shrinkage)
    details: dict[str, Any] = {
        "lambda": first.lam,
        "lambda_rule": rule,
        "ridge": "lambda * tr(S_W)/D",
        "jitter": first.jitter,
        "normalize": normalize,
        "challenge": challenge,
    }
    if challenge:
        x.mix(x.ops.asarray(first.p))  # (7) on x instead of x̂, with p' instead of p
        fit = _best_leave_one_out(x, first.lam)
        details |= {"mean_probability_stage_1": first.probability, "jitter_stage_2": fit.jitter}
    details |= {
        "mean_probability": fit.probability,
        "accuracy": fit.accuracy,
        "log_probability": fit.log_probability,
        "log_probability_scaled": fit.scaled,
        "temperature": fit.temperature,
        "n_guarded": fit.n_guarded,
        "confusions": fit.confusions,
    }
    return fit.probability, x.ops.asarray(fit.p), details


_VARIANTS: dict[str, Callable[..., Outcome]] = {
    "official": _official,
    "paper": _paper,
    "loo": _loo,
}
VARIANTS = tuple(_VARIANTS)


def _score(
    x: Samples, variant: str, shrinkage: float | str | None, **options: Any
) -> MetricResult:
    with np.errstate(under="ignore"):  # a probability may be 0 to working precision
        value, per_sample, details = _VARIANTS[variant](x, shrinkage, **options)
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
            "n_singletons": int((x.n_left == 0).sum()),
            **({} if x.groups is None else {"n_groups": int(x.groups.max()) + 1}),
            "dtype": x.dtype,
            "device": str(x.ops.device),
        },
    )
