"""What follows from the trials of a search: the best, the front, the summary. No state, no files.

`metric` is that of the search; costs are by backbone, as search.json has them. Trials without a
value count nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sfda_tune.finetuning.tasks import KINDS
from sfda_tune.pipelines.engines import Trial
from sfda_tune.values.metrics import signed

__all__ = [
    "best_epoch", "estimate_everything", "find_best", "find_front", "find_near", "of_backbone",
    "seconds_per_epoch", "summarise",
]  # fmt: skip

TIES = tuple(dict.fromkeys(kind.tie for kind in KINDS.values()))  # what an epoch may tell


def find_near(trials: Iterable[Trial], metric: str, n_val: int) -> list[Trial]:
    """Return the trials that may be the best, by the lowest log-loss at their values.

    Those whose value is at most one standard error below the highest, √(p(1 − p)/n), or what the
    epoch tells (of numbers, by a bootstrap of their errors): of many trials the one with the
    highest value was lucky with its validation images, too. Their log-loss (of numbers, their
    RMSE) tells more of those that are close. On 180 fine-tunings of zoo networks on 8 data sets
    (150 validation images), of 6, 12 and 20 random ones, the best on test images was missed by
    .0074, .0062 and .0063, and by .0081, .0094 and .0134 where the highest value decided.
    """
    known = [t for t in trials if t.value is not None]
    values = [signed(float(t.value or 0.0), metric) for t in known]
    top = max(values, default=0.0)
    error = math.sqrt(top * (1 - top) / n_val) if 0 < top < 1 else 0.0
    if known:
        first = best_epoch(known[values.index(top)], metric)
        error = first.get("error", error)
    near = [t for t, value in zip(known, values, strict=True) if value >= top - error]
    return sorted(near, key=lambda t: (_loss(t), -signed(t.value or 0.0, metric), t.number))


def find_best(trials: Iterable[Trial], metric: str, n_val: int) -> Trial | None:
    """Return the first of `find_near`; None if no trial has a value."""
    return next(iter(find_near(trials, metric, n_val)), None)


def _loss(trial: Trial) -> float:
    """Return the lowest log-loss, or RMSE, at the value of a trial."""
    return min(_tie(e) for e in trial.epochs if e["value"] == trial.value)


def _tie(epoch: Mapping[str, Any]) -> float:
    return next((epoch[name] for name in TIES if name in epoch), math.inf)


def best_epoch(trial: Trial, metric: str) -> dict[str, Any]:
    """Return the epoch that a trial has its value from."""
    return max(trial.epochs, key=lambda e: (signed(e["value"], metric), -_tie(e)))


def of_backbone(trials: Iterable[Trial], backbone: str) -> list[Trial]:
    """Return the trials of one backbone that have a value."""
    return [t for t in trials if t.backbone == backbone and t.value is not None]


def summarise(trial: Trial, metric: str, costs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry "best" of search.json, before the test."""
    at = best_epoch(trial, metric)
    return {
        "trial": trial.number,
        "backbone": trial.backbone,
        "params": dict(trial.params),
        "val": {metric: trial.value} | {k: at[k] for k in TIES if k in at},
        "epochs": at["number"],
        "test": None,
        **{k: costs[trial.backbone][k] for k in ("latency_ms", "n_params")},
    }


def find_front(trials: Iterable[Trial], directions: Sequence[str]) -> list[int]:
    """Return the numbers of the trials that no other one beats in all objectives.

    >>> trials = [Trial(0, "a", {}, value=0.9, values=(0.9, 5.0)),
    ...           Trial(1, "b", {}, value=0.8, values=(0.8, 3.0)),
    ...           Trial(2, "b", {}, value=0.8, values=(0.8, 4.0))]
    >>> find_front(trials, ("maximize", "minimize"))
    [0, 1]
    """
    if len(directions) == 1:
        return []
    signs = np.array([1.0 if d == "maximize" else -1.0 for d in directions])
    points = {t.number: signs * np.array(t.values) for t in trials if t.value is not None}
    return [
        n
        for n, p in points.items()
        if not any((q >= p).all() and (q > p).any() for q in points.values())
    ]


def seconds_per_epoch(trials: Iterable[Trial], backbone: str) -> float | None:
    """Return the mean over the epochs of a backbone; None if it had none."""
    spent = [e["seconds"] for t in of_backbone(trials, backbone) for e in t.epochs[1:]]
    return float(np.mean(spent)) if spent else None


def estimate_everything(
    trials: Iterable[Trial], costs: Mapping[str, Any], speeds: Mapping[str, float | None]
) -> float | None:
    """Return what as many epochs for every candidate as the longest trial had would take.

    A backbone that was not tuned: by its forward speed, compared with those that were.
    """
    longest = max((t.epochs[-1]["number"] for t in trials if t.value is not None), default=0)
    known = {n: c["seconds_per_epoch"] for n, c in costs.items() if c["seconds_per_epoch"]}
    ratios = [seconds * speed for n, seconds in known.items() if (speed := speeds.get(n))]
    if not ratios:
        return None
    each = [known.get(n, np.median(ratios) / s) for n, s in speeds.items() if n in known or s]
    return float(longest * sum(each))
