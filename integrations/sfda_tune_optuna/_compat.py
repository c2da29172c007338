"""Everything that Optuna does not promise, in one place: private names and version differences.

Tested with optuna 4.8 and 5.0. Nothing else in this package touches a name of Optuna that starts
with an underscore.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Container, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from optuna.distributions import CategoricalDistribution
from optuna.pruners import BasePruner, PatientPruner
from optuna.samplers import (
    BaseGASampler,
    BaseSampler,
    BruteForceSampler,
    GridSampler,
    PartialFixedSampler,
    RandomSampler,
    TPESampler,
)
from optuna.samplers._lazy_random_state import LazyRandomState
from optuna.search_space import IntersectionSearchSpace
from optuna.search_space.group_decomposed import _GroupDecomposedSearchSpace
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

# They keep state in the study (parents, grid) or read the storage directly: never on a view.
POOLED = (BaseGASampler, GridSampler, BruteForceSampler)
REDRAWN = (TPESampler, RandomSampler)  # a draw that is thrown away leaves no trace
MANY = 1000  # entries of a container from which on it holds data, not parts of a sampler


def unwrap(sampler: BaseSampler) -> BaseSampler:
    """Return what a `PartialFixedSampler` asks."""
    while isinstance(sampler, PartialFixedSampler):
        sampler = sampler._base_sampler
    return sampler


def find_pruners(study: Study) -> list[BasePruner]:
    """Return the pruner of a study and those it wraps, the outermost first."""
    found: list[BasePruner] = [study.pruner]
    while isinstance(found[-1], PatientPruner) and found[-1]._wrapped_pruner is not None:
        found.append(found[-1]._wrapped_pruner)
    return found


def make_whole_grid(grid: GridSampler, param_name: str, names: Sequence[str]) -> GridSampler:
    """Return a grid that has the backbones, too, if it does not yet."""
    space = grid._search_space
    if param_name in space or not names:
        return grid
    rng = copy.deepcopy(grid._rng).rng  # the same in all workers, which share a seed or have none
    return GridSampler({**space, param_name: list(names)}, seed=int(rng.randint(2**31)))


def read_grid(grid: Any) -> list[dict[str, Any]]:
    """Return the points of a grid, by their ids."""
    return [dict(zip(grid._param_names, point, strict=True)) for point in grid._all_grids]


def find_untried(grid: GridSampler, study: Study) -> list[int]:
    """Return the ids of the points that no trial has had, of a trial that has none yet."""
    return grid._get_unvisited_grid_ids(study)


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


def walk_parts(base: BaseSampler) -> Iterator[Any]:
    """Yield what a sampler holds, and what the samplers within it hold.

    Attributes of samplers and the entries of lists, tuples and dicts: no other objects, which are
    the user's own and may be large.
    """
    seen: set[int] = set()
    queue: list[Any] = [base]
    while queue:
        owner = queue.pop()
        if id(owner) in seen:
            continue
        seen.add(id(owner))
        held = vars(owner) if isinstance(owner, BaseSampler) else owner
        for value in list(held.values() if isinstance(held, dict) else held):
            yield value
            small = isinstance(value, (list, tuple, dict)) and len(value) < MANY
            if small or isinstance(value, BaseSampler):
                queue.append(value)


def rekey(base: BaseSampler, key: Sequence[int]) -> None:
    """Let the random numbers that a sampler draws from now on depend on `key` alone.

    So a resumed study draws as an uninterrupted one, and workers with one seed do not repeat each
    other. It reaches the generators that `walk_parts` finds; a base that hides its own elsewhere
    draws as it likes.
    """
    kinds = (LazyRandomState, np.random.RandomState, np.random.Generator, random.Random)
    found = {id(part): part for part in walk_parts(base) if isinstance(part, kinds)}
    for position, part in enumerate(found.values()):
        seeds = np.random.SeedSequence([*key, position])
        if isinstance(part, np.random.Generator):
            part.bit_generator.state = type(part.bit_generator)(seeds).state  # type: ignore[call-arg]
        elif isinstance(part, random.Random):
            part.seed(seeds.generate_state(8).tobytes())
        else:
            state = part.rng if isinstance(part, LazyRandomState) else part
            state.seed(seeds.generate_state(8))


def load_spaces(base: BaseSampler, saved: Sequence[dict[str, Any]]) -> None:
    """Give the caches of search spaces what `save_spaces` returned, or empty them.

    They go by the trial's number alone, and would return another backbone's space.
    """
    for i, part in enumerate(_find_spaces(base)):
        fresh = type(part)(include_pruned=part._include_pruned)
        vars(part).update(saved[i] if i < len(saved) else vars(fresh))


def save_spaces(base: BaseSampler) -> list[dict[str, Any]]:
    """Return what the caches of search spaces hold."""
    return [dict(vars(part)) for part in _find_spaces(base)]


def _find_spaces(base: BaseSampler) -> list[Any]:
    kinds = (IntersectionSearchSpace, _GroupDecomposedSearchSpace)
    return [part for part in walk_parts(base) if isinstance(part, kinds)]


def find_fixed(study: Study, sampler: BaseSampler, base: BaseSampler) -> dict[str, Any]:
    """Return what `PartialFixedSampler` fixes, around `sampler` in the study or as its `base`."""
    fixed: dict[str, Any] = {}
    for outer in (study.sampler, base):
        while isinstance(outer, PartialFixedSampler) and outer is not sampler:
            fixed = {**outer._fixed_params, **fixed}
            outer = outer._base_sampler
    return fixed


@lru_cache(typed=True)
def _only(value: Any) -> CategoricalDistribution:
    return CategoricalDistribution((value,))


def fix_param(trial: FrozenTrial, name: str, value: Any, shift: Sequence[float]) -> FrozenTrial:
    """Return a trial as if its parameter `name`, if it has one, had been and had to be `value`.

    Its values, also the intermediate ones, move by `shift`.
    """
    fixed = object.__new__(FrozenTrial)
    vars(fixed).update(vars(trial))
    if name in trial.params:
        fixed._params = {**trial.params, name: value}
        fixed._distributions = {**trial.distributions, name: _only(value)}
    if any(shift):
        if trial._values is not None:
            fixed._values = [v + s for v, s in zip(trial._values, shift, strict=True)]
        steps = trial.intermediate_values.items()
        fixed.intermediate_values = {step: v + shift[0] for step, v in steps}
    return fixed


class View:
    """A study with other trials.

    Samplers ask a study for its trials and its directions; everything else is handed through, so
    that it also works on the restricted study that Hyperband hands out.
    """

    def __init__(self, study: Study, trials: Sequence[FrozenTrial]) -> None:
        self._study = study
        self._trials = trials

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def _get_trials(
        self,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
        use_cache: bool = False,
    ) -> list[FrozenTrial]:
        trials = [t for t in self._trials if states is None or t.state in states]
        return copy.deepcopy(trials) if deepcopy else trials

    def get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        return self._get_trials(deepcopy, states)

    @property
    def trials(self) -> list[FrozenTrial]:
        return self._get_trials()
