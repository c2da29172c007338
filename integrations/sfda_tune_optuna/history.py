"""The trials of a study as the evidence that `sfda_tune.selection.policy` decides upon."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from optuna.distributions import CategoricalDistribution
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from sfda_tune.selection.calibration import History, Observation, backbone_name
from sfda_tune.selection.policy import scalarize
from sfda_tune.values.ranking import Ranking
from sfda_tune_optuna._compat import is_feasible

GATED = "sfda:gated"  # user attribute: stopped by `SFDAPruner` or `gate`, for its backbone alone
ASKED = "sfda:asked"  # system attribute: begun under an `SFDASampler`
TOLD = "sfda:told"  # system attribute: failed, and its own worker said so
# User attributes of a trial of Ray Tune
ITERATIONS = "sfda:iterations"  # how often it has reported; fewer than others: it ended early
SECONDS = "sfda:seconds"  # that it took, without waiting
LOST = "sfda:lost"  # it failed with its machine, or before it began
REPLACES = "sfda:replaces"  # the number of the failed trial that came back as this one


def list_scored(scores: Mapping[Any, float]) -> list[str]:
    """Return the backbones that could be scored, by name: the choices of a trial."""
    failed = scores.failed if isinstance(scores, Ranking) else {}
    return sorted(backbone_name(backbone) for backbone in scores if backbone not in failed)


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


def find_signs(study: Study) -> list[float]:
    """Return what makes higher values of each objective better: 1 or −1."""
    return [-1.0 if d == StudyDirection.MINIMIZE else 1.0 for d in study.directions]


def observe(
    study: Study,
    trials: Iterable[FrozenTrial],
    param_name: str,
    *,
    weights: Sequence[float] | None = None,
    objective: int = 0,
    leave_out: int = -1,
    seen: dict[int, Observation] | None = None,
) -> History:
    """Translate trials to observations, higher values being better.

    Of the study only the directions are used; `weights` are of the objectives, see
    `sfda_tune.selection.policy.scalarize`, without them it is the one `objective`; the trial
    `leave_out` is the one being sampled; `seen` keeps what complete trials say from one call to
    the next. A trial whose worker was killed, or that failed after it had reported values, is no
    evidence. One that was stopped for its backbone alone would be stopped another time.
    """
    seen = {} if seen is None else seen
    signs = find_signs(study)
    history: dict[int, Observation] = {}
    complete, pruned, budget = [], [], 0
    for trial in trials:
        number, state = trial.number, trial.state
        backbone = None if number == leave_out else read_backbone(trial, param_name)
        if backbone is None:
            continue
        if REPLACES in trial.user_attrs:
            history.pop(trial.user_attrs[REPLACES], None)
        if state == TrialState.COMPLETE:
            if number not in seen:
                seen[number] = _observe(trial, backbone, "complete", param_name)
            history[number] = seen[number]
            complete.append(trial)
            budget = max(budget, _count_steps(trial))
        elif state == TrialState.PRUNED:
            is_gated = GATED in trial.user_attrs
            kind = "stopped" if is_gated else "pruned"
            history[number] = _observe(trial, backbone, kind, param_name)
            pruned += [] if is_gated else [trial]
        elif state == TrialState.FAIL:
            # One that began here but whose worker never said that it failed: it was killed. One
            # that has reported values does fit into memory: Ctrl-C, or a setting that diverged.
            told = ASKED not in trial.system_attrs or TOLD in trial.system_attrs
            has_reported = trial.intermediate_values or ITERATIONS in trial.user_attrs
            if told and not has_reported:
                history[number] = _observe(trial, backbone, "failed", param_name)
        elif state == TrialState.RUNNING:
            history[number] = _observe(trial, backbone, "running", param_name)
    # Tune does not say that it stopped a trial: its iterations do, once others have had more.
    early = [t for t in complete if t.user_attrs.get(ITERATIONS, budget) < budget]
    for trial in early:
        history[trial.number] = replace(history[trial.number], state="pruned")
    complete = [t for t in complete if history[t.number].state == "complete"]
    for trial in [*pruned, *early]:
        value, step = None, None
        if len(signs) == 1 and trial.value is not None and math.isfinite(trial.value):
            value = signs[0] * trial.value
        if _count_steps(trial) and budget > 1:  # else nobody knows the budget
            step = min(1.0, _count_steps(trial) / budget)
        history[trial.number] = replace(history[trial.number], value=value, step=step)
    values = [[s * v for s, v in zip(signs, t.values, strict=True)] for t in complete]
    values = values if weights is not None else [v[objective:] for v in values]
    for trial, value in zip(complete, scalarize(values, weights), strict=True):
        if history[trial.number].value != value:
            history[trial.number] = replace(history[trial.number], value=value)
            seen[trial.number] = history[trial.number]
    return History(history.values())


def _count_steps(trial: FrozenTrial) -> int:
    last = trial.last_step
    return trial.user_attrs.get(ITERATIONS, 0 if last is None else last + 1)


def _observe(trial: FrozenTrial, backbone: str, state: str, param_name: str) -> Observation:
    params = {name: value for name, value in trial.params.items() if name != param_name}
    lasted = None if trial.duration is None else trial.duration.total_seconds()
    seconds = trial.user_attrs.get(SECONDS, lasted) or None  # 0: added, by somebody else
    feasible = is_feasible(trial)
    return Observation(backbone, state, cost=seconds, feasible=feasible, params=params)
