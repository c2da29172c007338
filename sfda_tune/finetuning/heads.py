"""A backbone with a classifier on top: made, started as logistic regression, evaluated."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["fit_head", "start_head"]
PROBE_IMAGES = 2000  # the penalty of the logistic regression is chosen on at most so many


def start_head(layers: list[Any], x: np.ndarray, y: np.ndarray) -> bool:
    """Make logistic regression on features the start of classifier layers, if they are linear."""
    import torch

    fits = [
        isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
        and layer.bias is not None
        and layer.weight[0].numel() == x.shape[1]
        for layer in layers
    ]
    if not all(fits):
        return False
    weight, bias = fit_head(x, y, len(layers[0].weight))
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(torch.tensor(weight).view_as(layer.weight))
            layer.bias.copy_(torch.tensor(bias))
    return True


def fit_head(x: np.ndarray, y: np.ndarray, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Fit logistic regression on features; return weight (n_classes, n_dims) and bias.

    The features are standardised, and that is folded into the weight. The penalty is the one that
    `linear_probe` finds by cross-validation on the first `PROBE_IMAGES` of a fixed shuffle.
    """
    from sfda_tune.metrics._linear import fit_softmax
    from sfda_tune.metrics.linear_probe import linear_probe

    some = np.random.default_rng(0).permutation(len(x))[:PROBE_IMAGES]
    C = linear_probe(x[some], y[some]).details["C"]
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale[scale <= 1e-6 * np.abs(mean)] = np.inf  # constant, but for float32's rounding
    theta, _ = fit_softmax(
        (x - mean) / scale, y, n_classes, 1 / (C * len(x)), tolerance=1e-4, max_iter=200
    )
    weight = (theta[:-1] / scale[:, None]).T
    return weight, theta[-1] - weight @ mean
