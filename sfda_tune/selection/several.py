"""How good predicted probabilities of several labels per image are, and how sure that is.

==========  ==========================================================================  ==========
Symbol      Meaning                                                                     Shape
==========  ==========================================================================  ==========
n, L        images, labels
Y           1 where a label applies, 0 where it does not, −1 where nobody knows         (n, L)
p           probability that it applies                                                 (n, L)
t           threshold: a label is named where p ≥ t                                     (L,)
w           how often each image is in a bootstrap sample, or 1                         (·, n)
==========  ==========================================================================  ==========

What is not known counts nowhere. A label is judged if some images are known to have it and others
not to have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sfda_tune.selection.numbers import DRAWS, resample
from sfda_tune.values.labels import find_varied

__all__ = [
    "choose_thresholds", "describe_labels", "label_losses", "measure_labels", "resample_labels",
]  # fmt: skip

UNDECIDED = 0.5  # the threshold of a label that cannot be judged


def choose_thresholds(labels: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Return the threshold of each label, (L,), that gives it the highest F1 on these images.

    It lies halfway between the probabilities on its two sides (0 where all images are named).
    Among several with the same F1 it is the one nearest to .5, of two as near the higher one. A
    label that cannot be judged gets .5.

    Examples
    --------
    >>> labels = np.array([[1, 0], [0, 0], [1, 0]])
    >>> choose_thresholds(labels, np.array([[0.4, 0.9], [0.1, 0.1], [0.3, 0.1]])).tolist()
    [0.2, 0.5]
    """
    found = np.full(labels.shape[1], UNDECIDED)
    for c in np.flatnonzero(find_varied(labels)):
        known = labels[:, c] >= 0
        order = np.argsort(-p[known, c], kind="stable")
        q, y = p[known, c][order], labels[known, c][order]
        ends = np.flatnonzero(np.append(np.diff(q) < 0, True))  # equal ones are named together
        f1 = 2 * np.cumsum(y)[ends] / (ends + 1 + y.sum())
        between = (q[ends] + np.append(q[ends[:-1] + 1], 0.0)) / 2
        best = between[f1 >= f1.max() * (1 - 1e-12)]
        found[c] = min(best, key=lambda t: (abs(t - 0.5), -t))
    return found


def label_losses(labels: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Return −log of the probability of what is true, (n, L); NaN where it is not known."""
    own = np.where(labels == 1, p, 1 - p)
    return np.where(labels >= 0, -np.log(np.maximum(own, np.finfo(np.float64).tiny)), np.nan)


def measure_labels(
    labels: np.ndarray, p: np.ndarray, thresholds: Sequence[float] | np.ndarray
) -> dict[str, float]:
    """Return mean average precision, macro-F1 and log-loss.

    ::

        map      = mean over judged labels of Σ_k (recall_k − recall_{k−1}) · precision_k
        macro_f1 = mean over judged labels of 2·tp / (2·tp + fp + fn) at their thresholds
        log_loss = mean over images of the mean over known labels of −log p(what is true)

    Raises
    ------
    ValueError
        If no label can be judged.

    Examples
    --------
    >>> labels, p = np.array([[1, 0], [0, 1]]), np.array([[0.8, 0.2], [0.2, 0.8]])
    >>> {k: round(v, 3) for k, v in measure_labels(labels, p, [0.5, 0.5]).items()}
    {'map': 1.0, 'macro_f1': 1.0, 'log_loss': 0.223}
    """
    if not find_varied(labels).any():
        raise ValueError(
            "several labels to judge predictions by must have one that some images have and "
            f"others do not, but among {len(labels)} images none of the {labels.shape[1]} is "
            "such; validate and test on more images."
        )
    found = _measure(labels, p, thresholds, np.ones((1, len(labels))))
    return {name: float(values[0]) for name, values in found.items()}


def resample_labels(
    labels: np.ndarray,
    p: np.ndarray,
    thresholds: Sequence[float] | np.ndarray,
    groups: np.ndarray | None = None,
    *,
    n_draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Return the metrics of `measure_labels` on bootstrap samples of the images, (n_draws,) each.

    Groups are drawn as a whole; the thresholds stay. A label that a sample cannot judge, for it
    has lost its few images, has there its value in another sample, so that all are means over
    the same labels. What is said of a label by two images is rough all the same.

    Examples
    --------
    >>> labels = np.tile([[1], [0]], (50, 1))
    >>> p = np.clip(labels + np.random.default_rng(0).normal(0, 0.5, (100, 1)), 0, 1)
    >>> bool(0.01 < resample_labels(labels, p, [0.5])["map"].std() < 0.1)
    True
    """
    return resample(
        lambda w: _measure(labels, p, thresholds, w), "map", len(p), groups, n_draws, seed
    )


def describe_labels(
    labels: np.ndarray,
    p: np.ndarray,
    thresholds: Sequence[float] | np.ndarray,
    names: Sequence[str],
) -> list[dict[str, Any]]:
    """Return a record for each label: how many images have it, its metrics, its threshold.

    The metrics are None where the label cannot be judged.
    """
    w, judged, rows = np.ones((1, len(labels))), find_varied(labels), []
    for c, name in enumerate(names):
        y, q = labels[:, c], p[:, c]
        found: tuple[float | None, float | None] = (None, None)
        if judged[c]:
            found = float(_average_precision(y, q, w)[0]), float(_f1(y, q >= thresholds[c], w)[0])
        rows.append(
            {"label": name, "images": int((y == 1).sum()), "known": int((y >= 0).sum())}
            | {"average_precision": found[0], "f1": found[1], "threshold": float(thresholds[c])}
        )
    return rows


def _measure(
    labels: np.ndarray, p: np.ndarray, thresholds: Any, w: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the metrics for each row of weights (·, n)."""
    judged = np.flatnonzero(find_varied(labels))
    precisions = [_average_precision(labels[:, c], p[:, c], w) for c in judged]
    scores = [_f1(labels[:, c], p[:, c] >= thresholds[c], w) for c in judged]
    known = (labels >= 0).sum(axis=1)
    loss = np.nansum(label_losses(labels, p), axis=1) / np.maximum(known, 1)
    return {
        "map": _mean(precisions),
        "macro_f1": _mean(scores),
        "log_loss": w @ loss / np.maximum(w @ (known > 0), 1),
    }


def _mean(values: list[np.ndarray]) -> np.ndarray:
    """Return the mean over the labels, each of which counts in every sample.

    A label of few images is lost in some samples: it has there what it has in one of the others,
    by turns. Without it these would be the means of other labels, and the interval that of a
    mixture.
    """
    found = np.array(values)
    for row in found:
        lost = np.isnan(row)
        if lost.any() and not lost.all():
            row[lost] = np.resize(row[~lost], lost.sum())
    return found.mean(axis=0)


def _average_precision(y: np.ndarray, p: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Return the average precision of a label for each row of weights; NaN where not judged."""
    known = y >= 0
    order = np.flatnonzero(known)[np.argsort(-p[known], kind="stable")]
    q, weights = p[order], w[:, order]
    ends = np.flatnonzero(np.append(np.diff(q) < 0, True))  # equal ones are named together
    hits = np.cumsum(weights * (y[order] == 1), axis=1)[:, ends]
    named = np.cumsum(weights, axis=1)[:, ends]
    gained = np.diff(hits, axis=1, prepend=0.0)
    total = hits[:, -1]
    value = (gained * hits / np.maximum(named, 1)).sum(axis=1) / np.maximum(total, 1)
    return np.where((total > 0) & (named[:, -1] > total), value, np.nan)


def _f1(y: np.ndarray, named: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Return the F1 of a label for each row of weights; NaN where it is not judged."""
    have, lack = w @ (y == 1), w @ (y == 0)
    hits, false = w @ (named & (y == 1)), w @ (named & (y == 0))
    value = 2 * hits / np.maximum(hits + false + have, 1)
    return np.where((have > 0) & (lack > 0), value, np.nan)
