"""Combinations of scores over the backbones of a hub.

==========  ==========================================================================  ==========
Symbol      Meaning                                                                     Shape
==========  ==========================================================================  ==========
s_mi        score m of backbone i, higher is better                                     (M, n)
w_m         weight of score m, Σ w_m = 1
==========  ==========================================================================  ==========
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sfda_tune.values.text import some

__all__ = ["combine", "combine_hub"]

METHODS = ("rank", "minmax")


def combine(
    *scores: Mapping[str, float], weights: Sequence[float] | None = None, method: str = "rank"
) -> dict[str, float]:
    """Average several scores of the same backbones, after bringing them to one scale.

    ::

        value_i = Σ_m w_m u_mi

        "rank":    u_mi = (rank of s_mi among the n backbones − 1)/(n − 1), ties averaged
        "minmax":  u_mi = (s_mi − min s_m)/(max s_m − min s_m)

    **When it is wrong.** Errors that the scores share do not average out. ``"minmax"`` hangs on
    the best and the worst backbone; ``"rank"`` ignores by how much one is better. Both are
    relative: another hub, other values.

    Parameters
    ----------
    *scores : mapping of str to float
        Backbone to score, higher is better; a `Ranking` is one.
    weights : sequence of float, optional
        One for each score, not negative; equal by default. Only their ratios count.
    method : {"rank", "minmax"}, default "rank"
        See above.

    Returns
    -------
    dict of str to float
        Backbone to value in [0, 1], in the order of first appearance. A backbone that is missing,
        NaN or infinite in any of the scores is NaN, and does not take part in the scaling. A score
        in which all are equal contributes ½ for each.

    Raises
    ------
    ValueError
        If there are no scores, no backbone has them all, `weights` does not fit, or `method` is
        not a valid one.

    Examples
    --------
    >>> from sfda_tune.metrics.combine import combine
    >>> sfda = {"resnet": 0.5, "vit": 0.9, "convnext": 0.8, "broken": float("nan")}
    >>> imagenet = {"resnet": 76.1, "vit": 81.8, "convnext": 84.1, "broken": 70.0}
    >>> combine(sfda, imagenet)
    {'resnet': 0.0, 'vit': 0.75, 'convnext': 0.75, 'broken': nan}
    >>> round(combine(sfda, imagenet, weights=[3, 1], method="minmax")["vit"], 3)
    0.928
    """
    if method not in METHODS:
        names = ", ".join(map(repr, METHODS))
        raise ValueError(f"`method` must be one of {names} but is {method!r}.")
    if not scores or not all(isinstance(score, Mapping) for score in scores):
        raise ValueError(
            "`scores` must be one or more mappings from backbone to score but are "
            f"{[type(score).__name__ for score in scores]}; pass `combine(ranking, {{...}})`."
        )
    w = _checked(weights, len(scores))
    names = list(dict.fromkeys(name for score in scores for name in score))
    s = np.array([[float(score.get(name, math.nan)) for name in names] for score in scores])
    complete = np.isfinite(s).all(axis=0)
    if not complete.any():
        raise ValueError(
            "`scores` must share at least one backbone with finite values in all of them but of "
            f"{len(names)} names ({some(names)}) none has; check the spelling."
        )
    values = np.full(len(names), np.nan)
    values[complete] = (_ranks if method == "rank" else _min_max)(s[:, complete], w)
    return dict(zip(names, values.tolist(), strict=True))


def _ranks(s: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Weighted mean of the ranks, rounded so that what is equal on paper stays a tie."""
    from scipy.stats import rankdata

    n = s.shape[1]
    if n == 1:
        return np.full(1, 0.5)
    return np.round((w @ rankdata(s, axis=1) - w.sum()) / (w.sum() * (n - 1)), 12)


def _min_max(s: np.ndarray, w: np.ndarray) -> np.ndarray:
    s = s / 2 - s.min(axis=1, keepdims=True) / 2  # halves: a difference of huge numbers overflows
    top = s.max(axis=1, keepdims=True)
    return w @ np.where(top > 0, s / np.where(top > 0, top, 1), 0.5) / w.sum()


def _checked(weights: Sequence[float] | None, n: int) -> np.ndarray:
    w = np.full(n, 1.0) if weights is None else np.asarray(weights, dtype=float)
    if w.shape != (n,) or not np.isfinite(w).all() or (w < 0).any() or w.sum() <= 0:
        raise ValueError(
            f"`weights` must be {n} numbers ≥ 0, one for each score, of which one is > 0, but is "
            f"{weights!r}."
        )
    return w


def combine_hub(
    results: Mapping[str, Any], *, weights: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Scores that are defined only within a hub, from the parts of each backbone.

    The parts of `ncti` and `etran` are scaled to [0, 1] over the backbones, and averaged; as
    `combine` with ``"minmax"``.

    Parameters
    ----------
    results : mapping of str to MetricResult or Score
        Backbone to what the metric said of it. A `Ranking` has them as
        ``{s.backbone: s for s in ranking.scores}``. Failed backbones become NaN.
    weights : mapping of str to float, optional
        Weight of each part by name; by default those that the metric recommends, else equal.

    Returns
    -------
    dict of str to float
        Backbone to value in [0, 1], higher is better; NaN if it failed.

    Raises
    ------
    ValueError
        If the results have no parts, different parts, or `weights` names others.

    Examples
    --------
    >>> from sfda_tune.metrics.combine import combine_hub
    >>> from sfda_tune.values.features import MetricResult
    >>> parts = {"a": (0.8, 11.0), "b": (0.9, 13.0), "c": (0.6, 15.0)}
    >>> hub = {
    ...     name: MetricResult(lda, details={"hub_parts": {"lda": lda, "energy": energy}})
    ...     for name, (lda, energy) in parts.items()
    ... }
    >>> combine_hub(hub, weights={"lda": 3, "energy": 1})["b"]
    0.875
    """
    parts = {name: dict(r.details.get("hub_parts", {})) for name, r in results.items()}
    keys = next((list(p) for p in parts.values() if p), [])
    different = [name for name, p in parts.items() if p and set(p) != set(keys)]
    if not keys or different:
        raise ValueError(
            "`results` must be those of one metric with parts ('ncti', 'etran') but "
            + (f"{different[0]!r} has others than {keys}." if keys else "none has any.")
        )
    recommended = (r.details.get("hub_weights") for r in results.values())
    w = weights or next(filter(None, recommended), dict.fromkeys(keys, 1.0))
    if set(w) != set(keys):
        raise ValueError(f"`weights` must name the parts {keys} but names {list(w)}.")
    columns = [{name: p.get(key, math.nan) for name, p in parts.items()} for key in keys]
    return combine(*columns, weights=[w[key] for key in keys], method="minmax")
