"""Base samplers that try every combination once: in the order of the scores, none twice."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.study import Study
from optuna.trial import FrozenTrial

from sfda_tune.selection.calibration import backbone_name
from sfda_tune_optuna import _compat

__all__ = ["find_exhausted", "has_untried", "pick_grid_point"]


def pick_grid_point(
    points: Sequence[Mapping[str, Any]],
    study: Study,
    trial: FrozenTrial,
    param_name: str,
    untried: Collection[int],
    choose: Callable[[list[str], list[str]], str | None],
) -> str | None:
    """Give a trial one of the grid's points, an `untried` one if there is any.

    It is of the backbone that `choose` names: of all, and those with untried points. Return it;
    None if the trial keeps what it was given.
    """
    by_name: dict[str, list[int]] = {}
    for number in sorted(range(len(points)), key=lambda n: (n not in untried, n)):
        by_name.setdefault(backbone_name(points[number][param_name]), []).append(number)
    left = sorted(name for name, numbers in by_name.items() if numbers[0] in untried)
    backbone = choose(sorted(by_name), left) if left else None
    if backbone not in by_name:
        return None
    _compat.mark_trial(study, trial, "grid_id", by_name[backbone][0])
    return backbone


def find_exhausted(
    trials: Sequence[FrozenTrial], param_name: str, given: Mapping[str, Any]
) -> set[str]:
    """Return the backbones of which no combination is left, for a trial that has `given`.

    As `BruteForceSampler` does: what running trials try counts as tried.
    """
    paths: dict[str, list[list[tuple[str, Any, BaseDistribution]]]] = {}
    for trial in trials:
        if param_name in trial.params and given.items() <= trial.params.items():
            left = trial.distributions.keys() - {param_name} - given.keys()
            path = [(n, trial.params[n], d) for n, d in trial.distributions.items() if n in left]
            paths.setdefault(backbone_name(trial.params[param_name]), []).append(path)
    return {name for name, tried in paths.items() if not has_untried(tried)}


def has_untried(paths: Sequence[Sequence[tuple[str, Any, BaseDistribution]]]) -> bool:
    """Tell whether the tree of parameters, with its tried `paths`, has a leaf that was not."""
    if not paths:
        return True
    if any(not path for path in paths):
        return False
    _, _, distribution = paths[0][0]
    branches: dict[Any, list[Any]] = {}
    for (_, value, _), *rest in paths:
        branches.setdefault(value, []).append(rest)
    return len(branches) < _count(distribution) or any(map(has_untried, branches.values()))


def _count(distribution: BaseDistribution) -> float:
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices)
    if isinstance(distribution, (IntDistribution, FloatDistribution)) and distribution.step:
        return math.floor((distribution.high - distribution.low) / distribution.step + 1e-9) + 1
    return math.inf
