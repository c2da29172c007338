"""What studies on other data say of the parameters: which of a few draws did best there.

The base sampler draws a parameter 1 + 8ρ times, and the draw is taken that the earlier studies
predict to be best, given the parameters before. What they predict is the kernel mean of
r = (y − level of the backbone) / sd over their trials. ρ, one for each earlier study, is the rank
correlation of that with the r of the n trials of this study, times n/(n + 2): nothing before the
third, and nothing while it is ≤ 0. All draws are the base sampler's, so an earlier study that says
nothing of this one costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from optuna.study import Study
from scipy.stats import spearmanr

from sfda_tune.selection.calibration import History, Observation, estimate_levels
from sfda_tune.values.text import require
from sfda_tune_optuna import _compat
from sfda_tune_optuna.history import observe

__all__ = ["PreviousStudy", "find_trust", "pick", "read_previous"]

T = TypeVar("T")
DRAWS, DOUBT, LEAST = 8, 2, 3  # draws at ρ = 1; ρ counts n/(n + 2), from 3 trials on
WIDTH, SHRINK = 4.0, 1.0  # of the kernel; a prior trial of response 0
LEVELS = 5  # a number with no more values than this is a category
MANY = 200  # trials, of this and of each earlier study, that are compared


@dataclass(frozen=True)
class PreviousStudy:
    """What the parameters of complete trials did, in standard deviations."""

    columns: Mapping[str, np.ndarray]  # values by name; None where a trial lacks the parameter
    response: np.ndarray

    def predict(self, params: Mapping[str, Any]) -> float:
        """Return the response that is expected of parameters."""
        names = [name for name in params if name in self.columns]
        if not names:
            return 0.0
        distance = sum(_differ(self.columns[name], params[name]) for name in names)
        weight = np.exp(-WIDTH / len(names) * np.asarray(distance))
        return float(weight @ self.response / (weight.sum() + SHRINK))


def _differ(column: np.ndarray, value: Any) -> np.ndarray:
    """Return the distance in [0, 1] of each value: of numbers by how many lie between."""
    known = [v for v in column if v is not None]
    if not all(map(_is_number, [*known, value])) or len(set(known)) <= LEVELS:
        return np.array([v != value for v in column], dtype=float)
    ordered = np.sort(np.array(known, dtype=float))
    numbers = np.array([math.nan if v is None else v for v in [*column, value]], dtype=float)
    below, upto = (np.searchsorted(ordered, numbers, side=side) for side in ("left", "right"))
    place = np.where(np.isnan(numbers), np.inf, (below + upto) / (2 * len(ordered)))
    return np.minimum(1.0, 3 * np.abs(place[:-1] - place[-1]))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_previous(study: Any, param_name: str) -> PreviousStudy:
    """Read an earlier study, or what was observed in one.

    Raises
    ------
    ValueError
        If it is no study, has several objectives, or no complete trial with the parameter.
    """
    name = study.study_name if isinstance(study, Study) else study
    if isinstance(study, Study):
        require("previous", name, "studies with one objective", len(study.directions) == 1)
        study = observe(study, _compat.read_trials(study), param_name)
    is_seen = isinstance(study, Sequence) and all(isinstance(o, Observation) for o in study)
    require("previous", name, "a list of studies of Optuna, or of their observations", is_seen)
    history = History.of(study)
    params, response = find_response(history, estimate_levels({}, history))
    rule = f"studies with complete trials that have {param_name!r}"
    require("previous", name, rule, len(params) > 0)
    names = sorted({name for of in params for name in of})
    columns = {name: np.empty(len(params), dtype=object) for name in names}
    for name, column in columns.items():
        column[:] = [of.get(name) for of in params]
    spread = float(response.std()) or 1.0
    return PreviousStudy(columns, (response - response.mean()) / spread)


def find_response(
    history: History, levels: Mapping[str, float]
) -> tuple[list[Mapping[str, Any]], np.ndarray]:
    """Return the parameters of the latest complete trials, and values minus their levels."""
    found = [
        (o.params or {}, o.value - levels[o.backbone])
        for o in history
        if o.state == "complete" and o.value is not None and math.isfinite(o.value)
    ][-MANY:]
    return [params for params, _ in found], np.array([r for _, r in found], dtype=float)


def find_trust(
    previous: Sequence[PreviousStudy], history: History, levels: Mapping[str, float]
) -> list[float]:
    """Return ρ ≥ 0 of each earlier study."""
    params, response = find_response(history, levels)
    n, trust = len(params), []
    for earlier in previous:
        predicted = [earlier.predict(of) for of in params]
        rho = 0.0
        if n >= LEAST and np.ptp(predicted) > 0 and np.ptp(response) > 0:
            test: Any = spearmanr(predicted, response)
            rho = max(0.0, float(test.statistic)) * n / (n + DOUBT)
        trust.append(rho)
    return trust


def pick(
    previous: Sequence[PreviousStudy],
    trust: Sequence[float],
    first: T,
    draw: Callable[[], T],
    describe: Callable[[T], Mapping[str, Any]],
) -> T:
    """Return the `first` draw, or a better one of those that the trust allows for."""
    more = round(DRAWS * max(trust, default=0.0))
    drawn = [first, *(draw() for _ in range(more))] if more else [first]

    def rate(value: T) -> float:
        params = describe(value)
        return sum(rho * p.predict(params) for rho, p in zip(trust, previous, strict=True) if rho)

    return max(drawn, key=rate) if more else first
