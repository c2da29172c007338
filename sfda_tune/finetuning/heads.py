"""How the linear head on a backbone starts: as logistic, or as ridge regression."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from scipy.optimize import brentq
from scipy.special import log_softmax

__all__ = ["Fit", "find_factor", "fit_head", "fit_labels", "fit_numbers", "start_head"]

Fit = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, float]]
PROBE_IMAGES = 2000  # the penalty of the logistic regression is chosen on at most so many
LEAST_FACTOR = 0.25  # a head of zeros would pass no gradient on to the backbone


def start_head(layers: list[Any], x: np.ndarray, y: np.ndarray, fit: Fit) -> float | None:
    """Make a regression on features, `fit`, the start of the last layers, if they are linear.

    Return the sharpness with which its training begins, see `fit_head`; None if they are not.
    """
    import torch

    fits = [
        isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
        and layer.bias is not None
        and layer.weight[0].numel() == x.shape[1]
        for layer in layers
    ]
    if not all(fits):
        return None
    weight, bias, sharpness = fit(x, y)
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(torch.tensor(weight).view_as(layer.weight))
            layer.bias.copy_(torch.tensor(bias))
    return sharpness


def fit_head(x: np.ndarray, y: np.ndarray, n_classes: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Fit logistic regression; return weight (n_classes, n_dims), bias, and its sharpness.

    The features are standardised, and that is folded into the weight. The penalty is the one that
    `linear_probe` finds by cross-validation on the first `PROBE_IMAGES` of a fixed shuffle.

    In more dimensions than there are images, the regression is as good as certain of the images
    that it was fitted to: their gradients are noise, which Adam scales up to full steps, and the
    backbone is lost within the first ten. So training begins with logits times the sharpness: √f
    of the factor f that makes the mean loss of those images what cross-validation found on images
    held out. (With f itself, the loss has so much to gain by a sharper head that it moves the
    backbone too far where the features were good already.) Decisions stay the same.
    """
    from sfda_tune.metrics._linear import fit_softmax
    from sfda_tune.metrics.linear_probe import linear_probe

    some = np.random.default_rng(0).permutation(len(x))[:PROBE_IMAGES]
    probe = linear_probe(x[some], y[some]).details
    C = probe["C"]
    mean, scale = _find_scale(x)
    z = (x - mean) / scale
    theta, _ = fit_softmax(z, y, n_classes, 1 / (C * len(x)), tolerance=1e-4, max_iter=200)
    f = find_factor(z @ theta[:-1] + theta[-1], y, -probe["log_likelihood"])
    return *_unscale(theta, mean, scale), f**0.5


def fit_labels(x: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Fit logistic regression to each of several labels, each against the rest, as `fit_head`.

    One penalty for all, that of `linear_probe_multilabel`; what is not known does not count.
    """
    from sfda_tune.metrics._linear import fit_logistic
    from sfda_tune.metrics.multilabel import linear_probe_multilabel

    some = np.random.default_rng(0).permutation(len(x))[:PROBE_IMAGES]
    probe = linear_probe_multilabel(x[some], labels[some]).details
    mean, scale = _find_scale(x)
    z = (x - mean) / scale
    theta, _ = fit_logistic(z, labels, 1 / (probe["C"] * len(x)), tolerance=1e-4, max_iter=200)
    logits, judged = z @ theta[:-1] + theta[-1], labels >= 0
    judged[:, probe["left_out"]] = False  # as in the loss that was held out
    # −log σ(±logit) is −log softmax of (0, logit)
    pairs = np.stack([np.zeros(int(judged.sum())), logits[judged]], axis=1)
    f = find_factor(pairs, labels[judged], -probe["log_likelihood"])
    return *_unscale(theta, mean, scale), f**0.5


def _find_scale(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of features; ∞ of those that are constant."""
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale[scale <= 1e-6 * np.abs(mean)] = np.inf  # but for float32's rounding
    return mean, scale


def _unscale(
    theta: np.ndarray, mean: np.ndarray, scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return weight and bias for features that are not standardised."""
    weight = (theta[:-1] / scale[:, None]).T
    return weight, theta[-1] - weight @ mean


def fit_numbers(x: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Fit ridge regression to standardised numbers; return weight (1, n_dims), bias, sharpness.

    Its penalty is chosen by the residuals left out one by one, in closed form.
    """
    from sfda_tune.metrics.regression import fit_ridge

    constant = x.std(axis=0) <= 1e-6 * np.abs(x.mean(axis=0))  # but for float32's rounding
    weight, bias, _ = fit_ridge(np.where(constant, 0.0, x), z)
    return weight[None], np.array([bias]), 1.0


def find_factor(logits: np.ndarray, y: np.ndarray, loss: float) -> float:
    """Return the factor ≤ 1 that gives logits (n, n_classes) this mean loss, or comes nearest.

    The mean loss is convex in the factor, so it falls all the way from log n_classes at 0.

    >>> logits, y = np.array([[5.0, 0.0], [0.0, 5.0]]), np.array([0, 1])
    >>> round(find_factor(logits, y, np.log1p(np.exp(-2.5))), 6)
    0.5
    """
    rows = np.arange(len(y))

    def excess(factor: float) -> float:
        return loss + float(log_softmax(factor * logits, axis=1)[rows, y].mean())

    if excess(1.0) <= 0:
        return 1.0
    if excess(LEAST_FACTOR) >= 0:
        return LEAST_FACTOR
    return float(cast(float, brentq(excess, LEAST_FACTOR, 1.0, xtol=1e-9)))
