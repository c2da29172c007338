"""PED: let overlapping classes push each other apart, then score (Li et al., ICCV 2023).

==========  ==========================================================================  ==========
Symbol      Meaning                                                                     Shape
==========  ==========================================================================  ==========
μ_c, r_c    mean of class c, and its radius √(tr Cov), of standardised features         (D,), ()
d_ij        ‖μ_i − μ_j‖                                                                 (C, C)
F_ij        max(s(r_i + r_j) − d_ij, 0), overlap of the balls of radius s·r             (C, C)
Δ_i         Σ_j min(½τ², 1)·F_ij·(μ_i − μ_j)/d_ij, motion of class i in one step        (D,)
==========  ==========================================================================  ==========
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from sfda_tune.metrics._input import Data, load
from sfda_tune.metrics.registry import get_metric
from sfda_tune.values.features import MetricResult
from sfda_tune.values.text import positive

__all__ = ["ped"]

MAX_STEPS = 6


def ped(
    features: Any,
    labels: Any,
    *,
    base: str | Callable[..., Any] = "logme",
    radius: float = 0.6,
    step: float = 0.1,
    exit_ratio: float = 0.5,
) -> MetricResult:
    """Score features by a base metric, after a few steps of repulsion between the classes.

    Each class is a ball around its mean. Where two balls overlap, fine-tuning will part them; the
    steps anticipate this motion. They end before the one whose total motion Σ|Δ| has fallen to
    `exit_ratio` of the first, or after 6. All samples of a class move with its mean::

        μ_i ← μ_i + Δ_i;  x_n ← x_n + (μ_{y_n} at the end − μ_{y_n} at the start);  value = base(x)

    **When it is wrong.** The classes are moved apart by their labels: any labels look better
    separated than they are, and features with more overlap gain more. Radius and step are tuned
    on twelve self-supervised ResNet-50; nothing is known of other hubs. A base metric that is
    saturated stays so.

    Parameters
    ----------
    features : array-like or torch.Tensor of shape (n_samples, n_dims)
        Finite real numbers; never changed. All arithmetic is in float64, on the CPU.
    labels : sequence of hashable, shape (n_samples,)
        Class of each row, at least two classes. Names and order do not matter.
    base : str or callable, default "logme"
        Metric of the moved features: a registered name, or ``f(features, labels)``.
    radius : float, default 0.6
        s, radius of the balls in standard deviations; the authors choose from 0.3 and 0.6.
    step : float, default 0.1
        τ, the time of a step.
    exit_ratio : float, default 0.5
        See above.

    Returns
    -------
    MetricResult
        ``value``: the base metric's. ``per_sample``: the base metric's. ``details``: the base
        metric's, ``base``, ``n_steps`` and ``motion``, the Σ|Δ| of all steps taken.

    Raises
    ------
    ValueError
        If `features` is not a finite real matrix, `labels` does not fit it or holds fewer than
        two classes, `base` is no metric, or another option is not a number > 0.

    Notes
    -----
    The authors standardise by mean and standard deviation of the backbone's features on ImageNet;
    these are not at hand, so the target features' own are taken (at least 1e-3 of the mean one).
    Only class means move, radii do not change: the steps are computed on means alone. Classes
    with equal means do not know where to go and stay. Constant features stay as they are.

    *Cost*: O(6(C²D) + ND) and the base metric.

    References
    ----------
    X. Li, Z. Hu, Y. Ge, Y. Shan, L.-Y. Duan: Exploring Model Transferability through the Lens of
    Potential Energy. ICCV 2023, https://arxiv.org/abs/2308.15074

    Examples
    --------
    >>> import numpy as np
    >>> from sfda_tune.metrics.logme import logme
    >>> from sfda_tune.metrics.ped import ped
    >>> rng = np.random.default_rng(0)
    >>> labels = np.repeat(["cat", "dog", "owl"], 50)
    >>> features = rng.normal(size=(150, 8)) + np.repeat(np.eye(3, 8), 50, axis=0)
    >>> f"{logme(features, labels).value:.3f}, then {ped(features, labels).value:.3f}"
    '-0.755, then -0.736'
    """
    function = get_metric(base)
    if function is ped:
        raise ValueError("`base` must be another metric than 'ped'; try 'logme' or 'sfda'.")
    radius, step = positive("radius", radius), positive("step", step)
    exit_ratio = positive("exit_ratio", exit_ratio)
    data = load(features, labels)
    X = data.X
    spread = X.std(axis=0)
    spread = np.maximum(spread, 1e-3 * spread.mean()) if spread.any() else np.ones(data.D)
    centre = X.mean(axis=0)
    shift, motion = _relax((data.means(X) - centre) / spread, _radii(data, X / spread) * radius,
                           min(0.5 * step**2, 1.0), exit_ratio)  # fmt: skip
    X += (shift * spread)[data.y]
    moved, names = np.empty_like(X), np.empty(data.N, dtype=np.int64)
    moved[data.order], names[data.order] = X, data.y
    result = function(moved, names)
    result = result if isinstance(result, MetricResult) else MetricResult(float(result))
    label = base if isinstance(base, str) else getattr(base, "__name__", "score")
    details = {"base": label, "n_steps": len(motion), "motion": motion, "dtype": data.dtype}
    return MetricResult(result.value, result.per_sample, {**result.details, **details})


def _radii(data: Data, X: np.ndarray) -> np.ndarray:
    """√(tr Cov) of each class, divisor n_c."""
    Z = X - data.means(X)[data.y]
    return np.sqrt(data.sums(np.einsum("nd,nd->n", Z, Z)) / data.counts)


def _relax(
    M: np.ndarray, r: np.ndarray, gain: float, exit_ratio: float
) -> tuple[np.ndarray, list[float]]:
    """Move the means M with balls of radius r; return where they went, and Σ|Δ| of each step."""
    start, motion = M.copy(), []
    while len(motion) < MAX_STEPS:
        squares = np.sum(M**2, axis=1)
        d = np.sqrt(np.maximum(squares[:, None] + squares - 2 * M @ M.T, 0))
        F = np.maximum(r[:, None] + r - d, 0)
        tied = d <= 1e-7 * np.sqrt(squares.max())  # equal means, the diagonal included
        W = np.where(tied, 0, gain * F / np.where(tied, 1, d))
        delta = W.sum(axis=1)[:, None] * M - W @ M  # Σ_j W_ij (μ_i − μ_j)
        moved = float(np.abs(delta).sum())
        if moved == 0 or (motion and moved <= exit_ratio * motion[0]):
            break
        M = M + delta
        motion.append(moved)
    return M - start, motion
