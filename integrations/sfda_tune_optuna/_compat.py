"""Everything that Optuna does not promise, in one place: private names and version differences.

Tested with optuna 4.8 and 5.0. Nothing else in this package touches a name of Optuna that starts
with an underscore.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Container, Sequence
from typing import Any

import numpy as np
from optuna.samplers import (
    BaseGASampler,
    BaseSampler,
    BruteForceSampler,
    GridSampler,
    PartialFixedSampler,
)
from optuna.samplers._lazy_random_state import LazyRandomState
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

# They keep state in the study (parents, grid) or read the storage directly: never on a view.
POOLED = (BaseGASampler, GridSampler, BruteForceSampler)


def unwrap(sampler: BaseSampler) -> BaseSampler:
    """Return what a `PartialFixedSampler` asks."""
    while isinstance(sampler, PartialFixedSampler):
        sampler = sampler._base_sampler
    return sampler


def read_trials(study: Study) -> list[FrozenTrial]:
    """Return all trials as the storage has them now: not copied, so not to be changed."""
    # Read anew: the cache of `ask` may lack the trials that other workers have begun since.
    return study._get_trials(deepcopy=False, use_cache=False)


def find_storage(study: Study) -> BaseStorage:
    """Return the storage that a study lives in."""
    return study._storage


def copy_metric_names(source: Study, target: Study) -> None:
    """Copy the names of the objectives; `set_metric_names` warns that it is experimental."""
    if source.metric_names is not None:
        key = "study:metric_names"
        target._storage.set_study_system_attr(target._study_id, key, source.metric_names)


def find_study_id(study: Study) -> int:
    """Return what identifies a study in its storage."""
    return study._study_id


def find_trial_id(study: Study, trial: FrozenTrial) -> tuple[int, int]:
    """Return what identifies a trial in its storage."""
    return study._study_id, trial._trial_id


def mark_trial(study: Study, trial: FrozenTrial, key: str, value: Any) -> None:
    """Set a system attribute, which no table shows; `Trial` has no public way to."""
    study._storage.set_trial_system_attr(trial._trial_id, key, value)


def flag_trial(study: Study, trial: FrozenTrial, key: str, value: Any) -> None:
    """Set a user attribute from within a pruner, which is given a `FrozenTrial`."""
    study._storage.set_trial_user_attr(trial._trial_id, key, value)


def read_study_attrs(study: Study) -> dict[str, Any]:
    """Return the user attributes, also of the restricted study that Hyperband hands out."""
    return study._storage.get_study_user_attrs(study._study_id)


def write_study_attr(study: Study, key: str, value: Any) -> None:
    """Set a user attribute, also of the restricted study that Hyperband hands out."""
    study._storage.set_study_user_attr(study._study_id, key, value)


def is_feasible(trial: FrozenTrial) -> bool:
    """Tell whether no constraint is violated: `set_constraint` (5.0) or `constraints_func`."""
    constraints = getattr(trial, "constraints", None)  # optuna >= 5
    if constraints is not None:
        return all(value <= 0 for value in constraints.values())
    return all(value <= 0 for value in trial.system_attrs.get("constraints") or ())


def fork_sampler(base: BaseSampler, key: Sequence[int]) -> BaseSampler:
    """Return a copy of `base` whose random numbers depend on `key` alone.

    A copy shares no state with other trials: neither a cached search space of another backbone nor
    a random stream, so threads need no lock and a resumed study draws as an uninterrupted one.
    """
    copied: dict[int, Any] = {}  # deepcopy notes every object it makes: no generator escapes
    fork = copy.deepcopy(base, copied)

    def derive(kind: int, position: int) -> np.random.SeedSequence:
        return np.random.SeedSequence([*key, kind, position])

    parts = list(copied.values())
    # The lazy states come last: they hold a RandomState that is among the parts, or none yet.
    for kind, cls in enumerate((random.Random, np.random.Generator, np.random.RandomState)):
        for position, part in enumerate(p for p in parts if isinstance(p, cls)):
            words = derive(kind, position).generate_state(8)
            if isinstance(part, np.random.Generator):
                bits = part.bit_generator
                bits.state = type(bits)(derive(kind, position)).state
            elif isinstance(part, np.random.RandomState):
                part.seed(words)
            else:
                part.seed(words.tobytes())
    for position, part in enumerate(p for p in parts if isinstance(p, LazyRandomState)):
        part.rng.seed(derive(3, position).generate_state(8))
    return fork


class View:
    """A study in which only the trials with ``keep(trial)`` exist.

    Samplers ask a study for its trials and its directions; everything else is handed through, so
    that it also works on the restricted study that Hyperband hands out.
    """

    def __init__(self, study: Study, keep: Callable[[FrozenTrial], bool]) -> None:
        self._study = study
        self._keep = keep

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def _get_trials(
        self,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
        use_cache: bool = False,
    ) -> list[FrozenTrial]:
        trials = self._study._get_trials(deepcopy=False, states=states, use_cache=use_cache)
        kept = [trial for trial in trials if self._keep(trial)]
        return copy.deepcopy(kept) if deepcopy else kept

    def get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        return self._get_trials(deepcopy, states)

    @property
    def trials(self) -> list[FrozenTrial]:
        return self._get_trials()
