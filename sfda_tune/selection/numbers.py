"""How good predicted numbers are, or levels in an order, and how sure that is.

==========  ==========================================================================  ==========
Symbol      Meaning                                                                     Shape
==========  ==========================================================================  ==========
n           images
y, ŷ        labels and predictions                                                      (n,)
r, r̂        their ranks, ties averaged                                                  (n,)
w           how often each image is in a bootstrap sample, or 1                         (n,)
C, p        number of levels 0 … C − 1, and their probabilities                         (n, C)
k           the levels that are named: medians by p                                     (n,)
==========  ==========================================================================  ==========
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from scipy.stats import rankdata

__all__ = [
    "find_places", "measure_levels", "measure_numbers", "name_levels", "resample",
    "resample_levels", "resample_numbers",
]  # fmt: skip

DRAWS = 1000


def measure_numbers(labels: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Return R², Spearman's ρ, RMSE and MAE.

    ::

        R² = 1 − Σ(y − ŷ)² / Σ(y − ȳ)²,  RMSE = √mean (y − ŷ)²,  MAE = mean |y − ŷ|

    ρ is Pearson's correlation of r and r̂; 0 where all predictions are equal.

    Raises
    ------
    ValueError
        If all labels are equal: there is no R² then.

    Examples
    --------
    >>> measure_numbers(np.array([1.0, 2.0, 3.0]), np.array([1.5, 2.0, 2.5]))
    {'r2': 0.75, 'spearman': 1.0, 'rmse': 0.408248290463863, 'mae': 0.3333333333333333}
    """
    y = np.asarray(labels, np.float64)
    if not len(y) or y.min() == y.max():
        raise ValueError(
            f"numbers to judge predictions by must differ but all {len(y)} are equal; validate "
            "and test on more images."
        )
    found = _measure(y, np.asarray(predicted, np.float64), np.ones((1, len(y))))
    return {name: float(values[0]) for name, values in found.items()}


def resample_numbers(
    labels: np.ndarray,
    predicted: np.ndarray,
    groups: np.ndarray | None = None,
    *,
    n_draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Return the metrics of `measure_numbers` on bootstrap samples of the images, (n_draws,) each.

    Groups are drawn as a whole. Ranks are those among all images, so that ρ needs no sorting of
    each sample. Samples whose labels are all equal do not count.

    Examples
    --------
    >>> y = np.arange(50.0)
    >>> draws = resample_numbers(y, y + np.random.default_rng(0).normal(0, 5, 50))
    >>> bool(0.005 < draws["r2"].std() < 0.05)
    True
    """
    y, p = np.asarray(labels, np.float64), np.asarray(predicted, np.float64)
    return resample(lambda w: _measure(y, p, w), "r2", len(y), groups, n_draws, seed)


def find_places(p: np.ndarray) -> np.ndarray:
    """Return the mean level by its probabilities (n, C), as numbers in 0 … C − 1.

    >>> find_places(np.array([[0.5, 0.5, 0.0], [0.0, 0.2, 0.8]]))
    array([0.5, 1.8])
    """
    return p @ np.arange(p.shape[1])


def name_levels(p: np.ndarray) -> np.ndarray:
    """Return the median level by its probabilities (n, C): the least k with p_0 + … + p_k ≥ ½.

    >>> name_levels(np.array([[0.4, 0.3, 0.3], [0.0, 0.2, 0.8]]))
    array([1, 2])
    """
    return (np.cumsum(p[:, :-1], axis=1) < 0.5).sum(axis=1)


def measure_levels(labels: np.ndarray, p: np.ndarray) -> dict[str, float]:
    """Return how well levels are predicted by their probabilities (n, C).

    ::

        ρ = Spearman's, of the places ŷ = Σ_c c p_c
        κ = 1 − mean (y − k)² / (var y + var k + (ȳ − k̄)²),  MAE = mean |y − k|
        log-loss = −mean log p_y

    and the share of k = y. κ is Cohen's kappa with quadratic weights: the denominator is the mean
    of (y − k)² over all pairs of a label with the prediction of any image. ρ is below 1 even where
    all levels are right, for places differ within a level: with five levels of a fifth each it is
    at most .98, with two of which one has 90 % at most .52.

    Raises
    ------
    ValueError
        If all labels are equal.

    References
    ----------
    J. L. Fleiss, J. Cohen: The Equivalence of Weighted Kappa and the Intraclass Correlation
    Coefficient as Measures of Reliability. Educational and Psychological Measurement 33, 1973

    Examples
    --------
    >>> p = np.array([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.0, 0.3, 0.7], [0.1, 0.2, 0.7]])
    >>> found = measure_levels(np.array([0, 1, 2, 2]), p)
    >>> {name: round(value, 2) for name, value in found.items()}
    {'spearman': 0.95, 'qwk': 0.86, 'mae': 0.25, 'accuracy': 0.75, 'log_loss': 0.54}
    """
    y = np.asarray(labels)
    if not len(y) or y.min() == y.max():
        raise ValueError(
            f"levels to judge predictions by must differ but all {len(y)} are equal; validate and "
            "test on more images."
        )
    found = _measure_levels(y, p, np.ones((1, len(y))))
    return {name: float(values[0]) for name, values in found.items()}


def resample_levels(
    labels: np.ndarray,
    p: np.ndarray,
    groups: np.ndarray | None = None,
    *,
    n_draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Return the metrics of `measure_levels` on bootstrap samples, as `resample_numbers`."""
    y = np.asarray(labels)
    return resample(lambda w: _measure_levels(y, p, w), "qwk", len(y), groups, n_draws, seed)


def resample(
    measure: Callable[[np.ndarray], dict[str, np.ndarray]],
    judged: str,
    n: int,
    groups: np.ndarray | None,
    n_draws: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """Return what `measure` makes of the weights (·, n) of bootstrap samples of n images.

    Groups are drawn as a whole. Samples for which the metric `judged` is not finite do not count.
    """
    parts = [measure(w) for w in _draw_weights(n, groups, n_draws, seed)]
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    counts = np.isfinite(found[judged])
    return {name: values[counts] for name, values in found.items()}


def _draw_weights(
    n: int, groups: np.ndarray | None, n_draws: int, seed: int
) -> Iterator[np.ndarray]:
    units = np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1]
    G = int(units.max()) + 1
    step = max(1, 10_000_000 // n)  # of (n_draws, n) numbers at a time: 80 MB
    rng = np.random.default_rng(seed)
    for start in range(0, n_draws, step):
        w = rng.multinomial(G, np.full(G, 1 / G), min(step, n_draws - start))[:, units]
        yield w.astype(np.float64)


def _measure(y: np.ndarray, p: np.ndarray, w: np.ndarray) -> dict[str, np.ndarray]:
    """Return the metrics for each row of weights (·, n)."""
    y, p = y - y.mean(), p - y.mean()  # far from zero, squares would lose digits
    total, error = w.sum(axis=1), y - p
    square = w @ error**2
    variance = w @ y**2 - (w @ y) ** 2 / total
    variance = np.where(variance > 1e-12 * (w @ y**2), variance, np.nan)
    a, b = (rankdata(v) - (len(y) + 1) / 2 for v in (y, p))
    va, vb = (w @ v**2 - (w @ v) ** 2 / total for v in (a, b))
    spread = np.sqrt(np.maximum(va * vb, 0))
    cross = w @ (a * b) - (w @ a) * (w @ b) / total
    spearman = np.divide(cross, spread, out=np.zeros_like(cross), where=spread > 1e-9 * total)
    return {
        "r2": 1 - square / variance,
        "spearman": np.clip(spearman, -1, 1),
        "rmse": np.sqrt(square / total),
        "mae": w @ np.abs(error) / total,
    }


def _measure_levels(y: np.ndarray, p: np.ndarray, w: np.ndarray) -> dict[str, np.ndarray]:
    """Return the metrics of levels for each row of weights (·, n)."""
    k, total = name_levels(p), w.sum(axis=1)
    by_chance = w @ (y**2 + k**2) / total - 2 * (w @ y) * (w @ k) / total**2
    by_chance = np.where(by_chance > 1e-12, by_chance, np.nan)  # all are of one level
    right = np.maximum(p[np.arange(len(y)), y], np.finfo(np.float64).tiny)
    return {
        "spearman": _measure(y, find_places(p), w)["spearman"],
        "qwk": 1 - w @ (y - k) ** 2 / total / by_chance,
        "mae": w @ np.abs(y - k) / total,
        "accuracy": w @ (y == k) / total,
        "log_loss": w @ -np.log(right) / total,
    }
