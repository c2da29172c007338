"""The pruner: a trial of a backbone that did not survive stops before its first epoch."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

import optuna
from optuna.pruners import BasePruner, NopPruner
from optuna.study import Study
from optuna.trial import FrozenTrial

from sfda_tune.selection.calibration import backbone_name
from sfda_tune.selection.policy import find_kept
from sfda_tune.values.text import some
from sfda_tune_optuna._compat import find_pruners, flag_trial, read_trials
from sfda_tune_optuna.history import GATED
from sfda_tune_optuna.store import SFDAWarning

__all__ = ["SFDAPruner", "gate"]

_logger = optuna.logging.get_logger(f"optuna.{__name__}")


class SFDAPruner(BasePruner):
    """Stop trials of non-survivors before they cost anything; else ask another pruner.

    It acts at the first ``trial.should_prune()`` after the backbone was suggested, also before any
    ``report``. With `SFDASampler` it is a safety net (enqueued trials, several hosts); with any
    other sampler it is what keeps the study to the survivors.

    Parameters
    ----------
    scores : Ranking, mapping of str to float, or collection of str
        Scores of which the best `keep` survive, or the survivors themselves.
    keep : int, optional
        How many of the scored backbones survive. Default: 5; not allowed with names.
    base_pruner : BasePruner, optional
        Decides about the survivors. Default: never prunes.
    param_name : str, default "backbone"
        The categorical parameter that holds the backbone.

    Examples
    --------
    >>> import optuna
    >>> pruner = SFDAPruner({"vit": 3.1, "resnet": 2.5, "alexnet": 0.4}, keep=2)
    >>> study = optuna.create_study(pruner=pruner)
    >>> study.enqueue_trial({"backbone": "alexnet"})
    >>> trial = study.ask()
    >>> trial.suggest_categorical("backbone", ["alexnet", "resnet", "vit"])
    'alexnet'
    >>> trial.should_prune()
    True
    """

    def __init__(
        self,
        scores: Mapping[Any, float] | Collection[Any],
        *,
        keep: int | None = None,
        base_pruner: BasePruner | None = None,
        param_name: str = "backbone",
    ) -> None:
        if base_pruner is not None and not isinstance(base_pruner, BasePruner):
            raise TypeError(
                f"`base_pruner` must be a pruner of Optuna or None but is {base_pruner!r}; "
                "pass an instance, for instance HyperbandPruner()."
            )
        self._survivors = find_kept(scores, keep)
        self._base = NopPruner() if base_pruner is None else base_pruner
        self._param_name = param_name
        self._is_checked = False

    @property
    def param_name(self) -> str:
        """The parameter that holds the backbone."""
        return self._param_name

    @property
    def survivors(self) -> frozenset[str]:
        """The backbones whose trials may run."""
        return self._survivors

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Tell whether the trial is to stop."""
        self._check_once(study)
        if not _is_stopped(trial, self._survivors, self._param_name):
            return self._base.prune(study, trial)
        # The base is not asked: it would count the trial in its rungs.
        if GATED not in trial.user_attrs:
            flag_trial(study, trial, GATED, True)
            backbone, kept = trial.params[self._param_name], len(self._survivors)
            _logger.info(
                f"Trial {trial.number}: backbone {backbone} stopped before training: not among "
                f"the {kept} kept"
            )
        return True

    def _check_once(self, study: Study) -> None:
        """Warn if no trial can be stopped: another pruner is asked first, or the name is wrong."""
        if self._is_checked:
            return
        outer = find_pruners(study)[0]
        if outer is not self and self in find_pruners(study):
            self._is_checked = True
            name = type(outer).__name__
            warnings.warn(
                f"{name} asks `SFDAPruner` only after some epochs, so that backbones that were "
                f"not kept are trained; write SFDAPruner(..., base_pruner={name}(...)).",
                SFDAWarning,
                stacklevel=3,
            )
        finished = [t for t in read_trials(study) if t.state.is_finished() and t.params]
        if finished:
            self._is_checked = True
            names = sorted({name for t in finished for name in t.params})
            if self._param_name not in names:
                warnings.warn(
                    f"`param_name` must be a parameter of the trials, but is {self._param_name!r} "
                    f"and they have {some(names)}: no trial is stopped for its backbone.",
                    SFDAWarning,
                    stacklevel=3,
                )


def gate(
    trial: Any,
    scores: Mapping[Any, float] | Collection[Any],
    *,
    keep: int | None = None,
    param_name: str = "backbone",
) -> None:
    """Raise `optuna.TrialPruned` if the trial's backbone is no survivor.

    For multi-objective studies, in which Optuna allows no ``should_prune``.

    Examples
    --------
    >>> import optuna
    >>> study = optuna.create_study(directions=["maximize", "minimize"])
    >>> study.enqueue_trial({"backbone": "alexnet"})
    >>> def objective(trial):
    ...     name = trial.suggest_categorical("backbone", ["alexnet", "vit"])
    ...     gate(trial, ["vit"])
    ...     return 0.9, 12.0
    >>> study.optimize(objective, n_trials=1)
    >>> study.trials[0].state.name
    'PRUNED'
    """
    survivors = find_kept(scores, keep)
    if _is_stopped(trial, survivors, param_name):
        if not isinstance(trial, (optuna.trial.FrozenTrial, optuna.trial.FixedTrial)):
            trial.set_user_attr(GATED, True)
        backbone = trial.params[param_name]
        raise optuna.TrialPruned(f"backbone {backbone!r} is not among the survivors")


def _is_stopped(trial: Any, survivors: Collection[str], param_name: str) -> bool:
    """Tell whether the trial has a backbone, and that did not survive."""
    backbone = trial.params.get(param_name)
    if backbone is None or backbone_name(backbone) in survivors:
        return False
    choices = getattr(trial.distributions[param_name], "choices", (backbone,))
    if not any(backbone_name(choice) in survivors for choice in choices):  # all would be stopped
        raise ValueError(
            f"`scores` must name some of the choices of {param_name!r}, "
            f"{sorted(map(backbone_name, choices))[:5]}, but names {sorted(survivors)[:5]}."
        )
    return True
