"""The study as the base sampler sees it while it draws the parameters of one backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial

from sfda_tune_optuna._compat import View, fix_param
from sfda_tune_optuna.history import GATED, read_backbone

__all__ = ["BackboneView", "Kinds"]


class BackboneView:
    """All trials of a study, as if they had been made with one backbone.

    The parameter that holds the backbone is fixed, and the values of other backbones move by what
    these are expected to reach less or more, so that what is left between two trials is due to the
    other parameters. What `SFDAPruner` or `gate` stopped is hidden; trials without the parameter
    belong to every backbone.

    Parameters
    ----------
    study : Study
    trials : sequence of FrozenTrial
    param_name, backbone : str
    choice : object
        The value of the parameter that is called `backbone`.
    levels : sequence of mapping of str to float
        What each backbone is expected to reach, for each objective.
    kinds : Kinds
        Of the study.
    """

    def __init__(
        self,
        study: Study,
        trials: Sequence[FrozenTrial],
        param_name: str,
        backbone: str,
        choice: Any,
        levels: Sequence[Mapping[str, float]],
        kinds: Kinds,
    ) -> None:
        self._study, self._kinds = study, kinds
        self._trials: list[FrozenTrial] = []
        self._own: list[FrozenTrial] = []
        for trial in trials:
            if GATED in trial.user_attrs:
                continue
            name = read_backbone(trial, param_name)
            if name is not None:
                shift = [of.get(backbone, 0.0) - of[name] for of in levels if name in of]
                trial = fix_param(trial, param_name, choice, shift)
            self._trials.append(trial)
            if name in (backbone, None):
                self._own.append(trial)
        self._own_ids = {id(trial) for trial in self._own}

    def of_backbone(self) -> Any:
        """Return a study of the trials that tell which parameters the backbone has."""
        is_known = any(trial.state.is_finished() for trial in self._own)
        return View(self._study, self._own if is_known else self._trials)

    def with_params(self, space: Mapping[str, BaseDistribution]) -> Any:
        """Return a study of its own trials, and of those others that have the same parameters."""
        fitting: dict[int, bool] = {}

        def fits(trial: FrozenTrial) -> bool:
            if id(trial) in self._own_ids or not trial.state.is_finished():
                return True
            kind = self._kinds.find(trial)
            if id(kind) not in fitting:
                fitting[id(kind)] = space.items() <= kind
            return fitting[id(kind)]

        return View(self._study, [t for t in self._trials if fits(t)])


class Kinds:
    """The distributions of finished trials, which share few sets of them."""

    def __init__(self, param_name: str) -> None:
        self._param_name = param_name
        self._by_number: dict[int, frozenset[tuple[str, BaseDistribution]]] = {}
        self._all: dict[Any, frozenset[tuple[str, BaseDistribution]]] = {}

    def find(self, trial: FrozenTrial) -> frozenset[tuple[str, BaseDistribution]]:
        """Return the distributions of a trial but the backbone's; equal ones as one object."""
        if trial.number not in self._by_number:
            items = trial.distributions.items()
            kind = frozenset((name, dist) for name, dist in items if name != self._param_name)
            self._by_number[trial.number] = self._all.setdefault(kind, kind)
        return self._by_number[trial.number]
