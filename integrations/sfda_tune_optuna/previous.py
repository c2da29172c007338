"""What studies on other data say of the parameters: their levels removed, and discounted.

A trial of an earlier study enters as r = (y − level of its backbone there) / sd, what its
parameters did. How alike two studies respond is the rank correlation ρ of the r of this one with
what the neighbours in the earlier one predict, shrunk towards how alike the earlier studies are,
at most `ALIKE`, worth `ALIKE_TRIALS` trials. The earlier trials count as ρ r, and not at all where
ρ is below `LEAST`; the sampler shows them to every second trial.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import spearmanr

from sfda_tune.selection.calibration import estimate_levels
from sfda_tune.values.text import require
from sfda_tune_optuna import _compat
from sfda_tune_optuna.history import find_signs, observe, read_backbone

__all__ = ["PreviousStudy", "find_likeness", "read_all", "recall"]

ALIKE, ALIKE_TRIALS, LEAST = 0.5, 4.0, 0.3
SHOWN = 24  # trials of an earlier study, of all its levels of r
NEIGHBOURS = 3


@dataclass(frozen=True)
class PreviousStudy:
    """Complete trials of an earlier study, and what their parameters did, in sds."""

    trials: tuple[FrozenTrial, ...]
    response: np.ndarray
    alike: float = ALIKE  # ρ before the first trial


def read_previous(study: Study, param_name: str) -> PreviousStudy:
    """Read an earlier study.

    Raises
    ------
    ValueError
        If it is no study, or has several objectives.
    """
    require("previous", study, "a list of studies of Optuna", isinstance(study, Study))
    one = len(study.directions) == 1
    require("previous", study.study_name, "studies with one objective", one)
    trials, response = find_response(study, _compat.read_trials(study), param_name, {})
    order = np.argsort(response, kind="stable")
    kept = order[np.unique(np.linspace(0, len(order) - 1, min(SHOWN, len(order))).astype(int))]
    spread = float(response.std()) or 1.0
    return PreviousStudy(tuple(trials[i] for i in kept), response[kept] / spread)


def read_all(studies: Sequence[Study], param_name: str) -> list[PreviousStudy]:
    """Read earlier studies; those that not even the others predict are trusted less.

    Before the first trial ρ is what the others predict of a study, but at most `ALIKE`.
    """
    given = [read_previous(study, param_name) for study in studies]
    found = []
    for k, study in enumerate(given):
        rhos = [
            find_likeness(other, study.trials, study.response, param_name)
            for other in given[:k] + given[k + 1 :]
        ]
        alike = min(ALIKE, max(0.0, float(np.mean(rhos)))) if rhos else ALIKE
        found.append(replace(study, alike=alike))
    return found


def find_response(
    study: Study,
    trials: Sequence[FrozenTrial],
    param_name: str,
    scores: Mapping[str, float],
) -> tuple[list[FrozenTrial], np.ndarray]:
    """Return the complete trials, and their values minus the level of their backbone."""
    [sign] = find_signs(study)
    levels = estimate_levels(scores, observe(study, trials, param_name))
    found = [
        (t, sign * t.values[0] - levels[name])
        for t in trials
        if t.state == TrialState.COMPLETE and math.isfinite(t.values[0])
        if (name := read_backbone(t, param_name)) is not None
    ]
    return [t for t, _ in found], np.array([r for _, r in found], dtype=float)


def find_likeness(
    previous: PreviousStudy, trials: Sequence[FrozenTrial], response: np.ndarray, param_name: str
) -> float:
    """Return ρ: how well an earlier study predicts what the parameters do in this one."""
    pairs = [
        (predicted, r)
        for trial, r in zip(trials, response, strict=True)
        if (predicted := _predict(previous, trial, param_name)) is not None
    ]
    rho, n = 0.0, len(pairs)
    if n > 2 and all(np.ptp(column) > 0 for column in zip(*pairs, strict=True)):
        test: Any = spearmanr(np.array(pairs))
        rho = float(test.statistic)
    else:
        n = 0  # nothing was predicted to differ, or did
    return (ALIKE_TRIALS * previous.alike + n * rho) / (ALIKE_TRIALS + n)


def recall(
    previous: Sequence[PreviousStudy],
    study: Study,
    trials: Sequence[FrozenTrial],
    param_name: str,
    scores: Mapping[str, float],
    level: float,
) -> list[FrozenTrial]:
    """Return the trials of earlier studies as if of this one, of a backbone with this `level`.

    `level` is like the values, not signed.
    """
    [sign] = find_signs(study)
    complete, response = find_response(study, trials, param_name, scores)
    spread = (float(response.std()) if len(response) > 2 else 0.0) or 1.0
    shown: list[FrozenTrial] = []
    for earlier in previous:
        rho = find_likeness(earlier, complete, response, param_name)
        if rho < LEAST:
            continue
        for trial, r in zip(earlier.trials, earlier.response.tolist(), strict=True):
            value = level + sign * rho * r * spread
            shown.append(_compat.make_past(trial, -1 - len(shown), value))
    return shown


def _predict(previous: PreviousStudy, trial: FrozenTrial, param_name: str) -> float | None:
    """Return the mean response of the nearest earlier trials; None if they share no parameter."""
    distance = []
    for other in previous.trials:
        names = sorted((trial.params.keys() & other.params.keys()) - {param_name})
        if not names:
            return None
        parts = [_differ(other.distributions[n], other.params[n], trial.params[n]) for n in names]
        distance.append(sum(parts) / len(parts))
    nearest = np.argsort(distance, kind="stable")[:NEIGHBOURS]
    return float(previous.response[nearest].mean()) if distance else None


def _differ(distribution: BaseDistribution, one: Any, other: Any) -> float:
    if isinstance(distribution, CategoricalDistribution) or not all(
        isinstance(v, (int, float)) for v in (one, other)
    ):
        return float(one != other)
    low, high = distribution.low, distribution.high  # type: ignore[attr-defined]
    if distribution.log and min(one, other) > 0:  # type: ignore[attr-defined]
        low, high, one, other = (math.log(v) for v in (low, high, one, other))
    return min(1.0, abs(one - other) / ((high - low) or 1.0))
