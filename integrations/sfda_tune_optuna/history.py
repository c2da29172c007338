"""The trials of a study as the evidence that `sfda_tune.selection.policy` decides upon."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from optuna.distributions import CategoricalDistribution
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from sfda_tune.selection.calibration import Observation, backbone_name
from sfda_tune.selection.policy import scalarize
from sfda_tune_optuna._compat import is_feasible

GATED = "sfda:gated"  # user attribute: stopped by `SFDAPruner` or `gate`, for its backbone alone
ASKED = "sfda:asked"  # system attribute: begun under an `SFDASampler`
TOLD = "sfda:told"  # system attribute: failed, and its own worker said so


def read_backbone(trial: FrozenTrial, param_name: str) -> str | None:
    """Return the backbone that a trial has or, if enqueued with one, will have."""
    params = trial.params  # of a retried trial, too
    if param_name not in params:
        params = trial.system_attrs.get("fixed_params", {})
    return backbone_name(params[param_name]) if param_name in params else None


def find_choices(trials: Sequence[FrozenTrial], param_name: str) -> tuple[Any, ...] | None:
    """Return the choices that the parameter last had; None if it was never suggested.

    Optuna forbids other choices later, so these are what the next trial will be offered.
    """
    for trial in reversed(trials):
        distribution = trial.distributions.get(param_name)
        if distribution is not None:
            is_choice = isinstance(distribution, CategoricalDistribution)
            return distribution.choices if is_choice else ()
    return None


def observe(
    study: Study,
    trials: Iterable[FrozenTrial],
    param_name: str,
    *,
    weights: Sequence[float] | None = None,
    leave_out: int = -1,
) -> list[Observation]:
    """Translate trials to observations, higher values being better.

    Of the study only the directions are used; `weights` are of the objectives, see
    `sfda_tune.selection.policy.scalarize`; the trial `leave_out` is the one being sampled. A trial
    whose worker was killed, or that failed after it had reported values, is no evidence. One that
    was stopped for its backbone alone has failed: it would be stopped another time.
    """
    directions = study.directions
    signs = [-1.0 if d == StudyDirection.MINIMIZE else 1.0 for d in directions]
    known = [
        (backbone, trial)
        for trial in trials
        if trial.number != leave_out and (backbone := read_backbone(trial, param_name)) is not None
    ]
    complete = [trial for _, trial in known if trial.state == TrialState.COMPLETE]
    values = [[s * v for s, v in zip(signs, t.values, strict=True)] for t in complete]
    utilities = dict(zip([t.number for t in complete], scalarize(values, weights), strict=True))
    longest = max((_seconds(t) or 0.0 for t in complete), default=math.inf)
    last_step = max((t.last_step or 0 for t in complete), default=0)
    history = []
    for backbone, trial in known:
        params = {name: value for name, value in trial.params.items() if name != param_name}
        about = {"cost": _seconds(trial), "feasible": is_feasible(trial), "params": params}
        if trial.state == TrialState.COMPLETE:
            history.append(Observation(backbone, "complete", utilities[trial.number], **about))
        elif trial.state == TrialState.PRUNED:
            value, step = None, None
            if len(signs) == 1 and trial.value is not None and math.isfinite(trial.value):
                value = signs[0] * trial.value
            if trial.last_step is not None and last_step:  # else nobody knows the budget
                step = min(1.0, (trial.last_step + 1) / (last_step + 1))
            if GATED in trial.user_attrs:
                history.append(Observation(backbone, "failed", **about))
            else:
                history.append(Observation(backbone, "pruned", value, step=step, **about))
        elif trial.state == TrialState.FAIL:
            # One that began here but whose worker never said that it failed: it was killed. One
            # that has reported values does fit into memory: Ctrl-C, or a setting that diverged.
            told = ASKED not in trial.system_attrs or TOLD in trial.system_attrs
            if told and not trial.intermediate_values:
                history.append(Observation(backbone, "failed", **about))
        elif trial.state == TrialState.RUNNING and not _is_lost(trial, longest):
            history.append(Observation(backbone, "running", params=params))
    return history


def _seconds(trial: FrozenTrial) -> float | None:
    return None if trial.duration is None else trial.duration.total_seconds()


def _is_lost(trial: FrozenTrial, longest: float) -> bool:
    """Tell whether a running trial's worker is surely gone, where no heartbeat would tell."""
    if trial.datetime_start is None:
        return False
    return (datetime.now() - trial.datetime_start).total_seconds() > max(60.0, 5 * longest)
