"""How sure a classifier is, against how often it is right: temperature and calibration error.

==========  ==========================================================================  ==========
Symbol      Meaning                                                                     Shape
==========  ==========================================================================  ==========
n, C        images, classes
p           probabilities of the classes, p ∝ exp(logits)                               (n, C)
T           temperature: p_T ∝ exp(logits / T) = p^(1/T)                                > 0
==========  ==========================================================================  ==========

T never changes which class is predicted. It is fitted on images that were not trained on, and
what it is worth is measured on others.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

__all__ = ["apply_temperature", "calibrate_on_test", "calibration_error", "fit_temperature"]

BINS = 15
LARGEST = 20.0  # of T and 1/T
CELLS = 2_000_000  # probabilities that T is fitted to, at most; of more images, every k-th


def apply_temperature(p: np.ndarray, temperature: float) -> np.ndarray:
    """Return p^(1/T), normalised.

    >>> apply_temperature(np.array([[0.9, 0.1]]), 2.0).round(2)
    array([[0.75, 0.25]])
    """
    log_p = np.log(np.maximum(p, np.finfo(np.float64).tiny)) / temperature
    power = np.exp(log_p - log_p.max(axis=1, keepdims=True))
    return power / power.sum(axis=1, keepdims=True)


def fit_temperature(labels: np.ndarray, p: np.ndarray) -> float:
    """Return the T in [1/20, 20] with the lowest log-loss; 1 where all images are right.

    Then any smaller T is better on these images, which says nothing of others.

    References
    ----------
    C. Guo, G. Pleiss, Y. Sun, K. Weinberger: On Calibration of Modern Neural Networks. ICML 2017,
    https://arxiv.org/abs/1706.04599

    Examples
    --------
    >>> labels, p = np.array([0, 0, 0, 1]), np.tile([0.99, 0.01], (4, 1))
    >>> f"{fit_temperature(labels, p):.1f}"  # right in three of four: T where p_T is 3/4
    '4.2'
    """
    step = max(1, math.ceil(p.size / CELLS))
    p, labels = np.asarray(p, np.float64)[::step], np.asarray(labels)[::step]
    log_p = np.log(np.maximum(p, np.finfo(np.float64).tiny))
    log_p -= log_p.max(axis=1, keepdims=True)
    own = log_p[np.arange(len(labels)), labels]
    if (own == 0).all():
        return 1.0

    def loss(log_t: float) -> float:
        b = math.exp(-log_t)
        return float((np.log(np.exp(b * log_p).sum(axis=1)) - b * own).mean())

    end = math.log(LARGEST)
    found: Any = minimize_scalar(loss, bounds=(-end, end), method="bounded")
    return math.exp(float(found.x))


def calibration_error(
    labels: np.ndarray, p: np.ndarray
) -> tuple[float, list[tuple[float, float, int]]]:
    """Return the expected calibration error, and (how sure, share right, images) of each bin.

    The images are put into 15 bins of equal width by the probability of the predicted class::

        ECE = Σ_b n_b/n · |mean probability in b − share that is right in b|

    It is biased upwards: also of a perfect model it is about Σ_b √n_b · √(2 p(1 − p)/π) / n.

    >>> calibration_error(np.array([0, 1]), np.array([[0.75, 0.25], [0.75, 0.25]]))
    (0.25, [(0.75, 0.5, 2)])
    """
    sure, right = p.max(axis=1), p.argmax(axis=1) == labels
    at = np.minimum((sure * BINS).astype(int), BINS - 1)
    bins = [
        (float(sure[at == b].mean()), float(right[at == b].mean()), int((at == b).sum()))
        for b in np.unique(at)
    ]
    return sum(n * abs(c - a) for c, a, n in bins) / len(labels), bins


def calibrate_on_test(
    labels: np.ndarray, p: np.ndarray, temperature: float, n_val: int
) -> dict[str, Any]:
    """Return what a temperature, fitted on `n_val` validation images, is worth on test images."""
    after = apply_temperature(p, temperature)
    rows = np.arange(len(labels))
    found: dict[str, Any] = {"temperature": temperature, "n_val": n_val}
    for when, q in (("before", p), ("after", after)):
        error, bins = calibration_error(labels, q)
        own = np.maximum(q[rows, labels], np.finfo(np.float64).tiny)
        found |= {f"ece_{when}": error, f"log_loss_{when}": float(-np.log(own).mean())}
        found[f"bins_{when}"] = bins
    return found
