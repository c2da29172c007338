"""How good predicted numbers are, or levels in an order, and how sure that is.

==========  ==========================================================================  ==========
Symbol      Meaning                                                                     Shape
==========  ==========================================================================  ==========
n           images
y, ŷ        labels and predictions                                                      (n,)
r, r̂        their ranks, ties averaged                                                  (n,)
w           how often each image is in a bootstrap sample, or 1                         (n,)
C, k        number of levels, and the predicted ones: ŷ rounded to 0 … C − 1            (n,)
==========  ==========================================================================  ==========
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from scipy.stats import rankdata

__all__ = [
    "measure_levels", "measure_numbers", "name_levels", "resample", "resample_levels",
    "resample_numbers",
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


def name_levels(predicted: np.ndarray, n_levels: int) -> np.ndarray:
    """Return the levels that predictions are nearest to, int64.

    >>> name_levels(np.array([-0.4, 1.6, 9.0]), 4)
    array([0, 2, 3])
    """
    return np.clip(np.rint(predicted), 0, n_levels - 1).astype(np.int64)


def measure_levels(labels: np.ndarray, predicted: np.ndarray, n_levels: int) -> dict[str, float]:
    """Return Spearman's ρ of predictions, and how near the levels that they name are.

    ::

        κ = 1 − mean (y − k)² / (var y + var k + (ȳ − k̄)²),  MAE = mean |y − k|

    and the share of k = y. κ is Cohen's kappa with quadratic weights: the denominator is the mean
    of (y − k)² over all pairs of a label with the prediction of any image.

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
    >>> found = measure_levels(np.array([0, 1, 2, 2]), np.array([0.1, 0.4, 1.7, 1.9]), 3)
    >>> {name: round(value, 3) for name, value in found.items()}
    {'spearman': 0.949, 'qwk': 0.857, 'mae': 0.25, 'accuracy': 0.75}
    """
    measure_numbers(labels, predicted)  # refuses labels that are all equal
    found = _measure_levels(labels, predicted, np.ones((1, len(labels))), n_levels)
    return {name: float(values[0]) for name, values in found.items()}


def resample_levels(
    labels: np.ndarray,
    predicted: np.ndarray,
    n_levels: int,
    groups: np.ndarray | None = None,
    *,
    n_draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Return the metrics of `measure_levels` on bootstrap samples, as `resample_numbers`."""
    y, p = np.asarray(labels, np.float64), np.asarray(predicted, np.float64)
    return resample(
        lambda w: _measure_levels(y, p, w, n_levels), "qwk", len(y), groups, n_draws, seed
    )


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


def _measure_levels(
    y: np.ndarray, p: np.ndarray, w: np.ndarray, n_levels: int
) -> dict[str, np.ndarray]:
    """Return the metrics of levels for each row of weights (·, n)."""
    k, total = name_levels(p, n_levels), w.sum(axis=1)
    by_chance = w @ (y**2 + k**2) / total - 2 * (w @ y) * (w @ k) / total**2
    by_chance = np.where(by_chance > 1e-12, by_chance, np.nan)  # all are of one level
    return {
        "spearman": _measure(y, p, w)["spearman"],
        "qwk": 1 - w @ (y - k) ** 2 / total / by_chance,
        "mae": w @ np.abs(y - k) / total,
        "accuracy": w @ (y == k) / total,
    }
