"""Everything that Ray Tune does not promise, in one place. Tested with Ray 2.60.

Nothing else of the searcher, the schedulers and the spaces touches a private name of Ray, or one
of `ray.tune` that its documentation leaves out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from optuna.distributions import BaseDistribution, check_distribution_compatibility
from ray._private.dict import flatten_dict
from ray.tune.execution.tune_controller import TuneController
from ray.tune.logger import LoggerCallback
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.schedulers.trial_scheduler import FIFOScheduler
from ray.tune.search import SearchAlgorithm, Searcher
from ray.tune.search.optuna import OptunaSearch
from ray.tune.search.sample import Categorical, Domain, _BackwardsCompatibleNumpyRng
from ray.tune.search.variant_generator import parse_spec_vars

__all__ = [
    "Categorical",
    "Domain",
    "Weighted",
    "check_base_scheduler",
    "check_distributions",
    "check_options",
    "contains",
    "convert_space",
    "end_at_once",
    "flatten_dict",
    "is_lost",
    "read_scheduler",
    "stop_unstarted",
    "suggest",
    "write_scheduler",
]


# Searchers --------------------------------------------------------------------------------------
def check_options(options: Mapping[str, Any]) -> None:
    """Refuse searchers where a sampler of Optuna belongs, and say what to do instead."""
    kinds = (Searcher, SearchAlgorithm)
    for key, value in options.items():
        is_searcher = isinstance(value, kinds)
        is_searcher |= isinstance(value, type) and issubclass(value, kinds)
        if not is_searcher and key != "base_searcher":
            continue
        name = value.__name__ if isinstance(value, type) else type(value).__name__
        if hasattr(value, "searcher") and not isinstance(value, SearchAlgorithm):
            raise ValueError(
                f"`{key}` must not be a wrapper but is a {name}; put it outside: "
                f"{name}(SFDASearcher(scores), ...)."
            )
        raise ValueError(
            f"`{key}` must be a sampler of Optuna, given as `base_sampler`, but is a {name}; "
            "write SFDASearcher(scores, base_sampler=optuna.samplers.TPESampler()) or leave it "
            "out, and give define-by-run functions as `space`."
        )


def convert_space(config: Mapping[str, Any]) -> dict[str, BaseDistribution]:
    """Return the domains of a search space as distributions, nested names joined by "/"."""
    _, domains, grids = parse_spec_vars(dict(config))
    if grids:
        where = "/".join(str(part) for part in grids[0][0])
        raise ValueError(
            f"`param_space` must not hold a grid_search but {where!r} is one; use tune.choice "
            "here, or the grid without a search_alg and with SFDAScheduler."
        )
    for path, domain in domains:
        if any(isinstance(choice, Domain) for choice in getattr(domain, "categories", ())):
            raise ValueError(
                f"`param_space` must not nest domains, but a choice in it is {domain!r}; use "
                "`spaces` for parameters of some backbones only."
            )
        if not all(isinstance(part, str) for part in path):
            raise ValueError(f"`param_space` must not hold domains in lists, as at {path!r}.")
    return OptunaSearch.convert_search_space(dict(config))


def check_distributions(spaces: Sequence[Mapping[str, BaseDistribution]]) -> None:
    """Refuse a name that has two kinds of values: in one study that is an error, but later."""
    known: dict[str, BaseDistribution] = {}
    for space in spaces:
        for name, own in space.items():
            try:
                check_distribution_compatibility(known.setdefault(name, own), own)
            except ValueError as error:
                raise ValueError(
                    f"`spaces` must give {name!r} the same choices wherever it is, but one is "
                    f"{known[name]!r} and one {own!r}; give them two names."
                ) from error


def suggest(trial: Any, name: str, distribution: BaseDistribution) -> Any:
    """Return the value of a parameter of an Optuna trial; its public methods are one a kind."""
    return trial._suggest(name, distribution)


def contains(distribution: BaseDistribution, value: Any) -> bool:
    """Tell whether a parameter may have a value."""
    try:
        return distribution._contains(distribution.to_internal_repr(value))
    except (ValueError, TypeError):
        return False


class Weighted(Categorical._Uniform):
    """Draw categories with unequal probabilities; to Optuna a plain categorical."""

    def __init__(self, weights: list[float]) -> None:
        self.weights = weights

    def sample(
        self, domain: Any, config: Any = None, size: int = 1, random_state: Any = None
    ) -> Any:
        """Draw one category, or a list of `size`."""
        if not isinstance(random_state, _BackwardsCompatibleNumpyRng):
            random_state = _BackwardsCompatibleNumpyRng(random_state)
        drawn = random_state.choice(len(self.weights), size=size, p=self.weights)
        items = [domain.categories[int(i)] for i in drawn]
        return items if size > 1 else items[0]


# Trials -----------------------------------------------------------------------------------------
def stop_unstarted(controller: Any, trial: Any) -> None:
    """Stop a trial that waits, so that `ResultGrid` can show it although it never ran.

    Loggers that open a run when a trial starts (MLflow, W&B, Comet, …) know nothing of it, and
    fail when they are to close that. So they are not told of a trial that never ran; one that has
    run and waits again is opened again, as when Tune goes on with it.
    """
    trial.init_local_path()  # else its path raises
    controller = vars(controller).get("_tune_controller", controller)  # schedulers see a wrapper
    callbacks = vars(controller).get("_callbacks")
    if trial.has_reported_at_least_once:
        if callbacks is not None:
            about = {"iteration": controller._iteration, "trials": controller._trials}
            callbacks.on_trial_start(**about, trial=trial)
        controller.stop_trial(trial)
        return
    metrics = {"config": trial.config, "trial_id": trial.trial_id, "training_iteration": 0}
    trial.run_metadata.last_result = {**metrics, "sfda_pruned": True, "done": True}
    if callbacks is None:
        controller.stop_trial(trial)
        return
    others = [c for c in callbacks._callbacks if not isinstance(c, LoggerCallback)]
    try:
        controller._callbacks = type(callbacks)(others)
        controller.stop_trial(trial)
    finally:
        controller._callbacks = callbacks


def is_lost(trial: Any) -> bool:
    """Tell whether the trial's process or machine died; killed for its memory counts as failed."""
    if not trial.error_file or not os.path.exists(trial.error_file):  # get_error: where it will be
        return False
    with open(trial.error_file, encoding="utf-8", errors="replace") as file:
        last = file.read().rpartition("Failure #")[2]
    died = "The actor died unexpectedly" in last or " is unavailable: " in last
    return died and "low on memory" not in last


# Schedulers -------------------------------------------------------------------------------------
def check_base_scheduler(base: Any) -> None:
    """Refuse what cannot be a base scheduler."""
    if not isinstance(base, TrialScheduler):
        raise ValueError(
            "`base_scheduler` must be a TrialScheduler of Ray Tune (not a class) or None but is "
            f"{base!r}."
        )
    if isinstance(base, PopulationBasedTraining):
        raise ValueError(
            f"`base_scheduler` must not be {type(base).__name__}: it copies whole configurations, "
            "the backbone too, between trials; run it once for every surviving backbone."
        )


def read_scheduler(scheduler: Any) -> dict[str, Any] | None:
    """Return what a scheduler has learnt, as plain data; None if that is not known to be safe.

    HyperBand and the median rule index by `Trial` objects, which would not be those of the
    restored experiment.
    """
    if hasattr(scheduler, "get_state"):
        return scheduler.get_state()
    if isinstance(scheduler, AsyncHyperBandScheduler):
        brackets = scheduler._brackets
        return {
            "stopped": scheduler._num_stopped,
            "rungs": [[[t, dict(seen)] for t, seen in b._rungs] for b in brackets],
            "bracket": {i: brackets.index(b) for i, b in scheduler._trial_info.items()},
        }
    return {} if type(scheduler) is FIFOScheduler else None


def write_scheduler(scheduler: Any, state: dict[str, Any]) -> None:
    """Give a scheduler back what `read_scheduler` returned."""
    if hasattr(scheduler, "set_state"):
        scheduler.set_state(state)
    elif isinstance(scheduler, AsyncHyperBandScheduler):
        scheduler._num_stopped = state["stopped"]
        for bracket, rungs in zip(scheduler._brackets, state["rungs"], strict=True):
            for (_, seen), (_, saved) in zip(bracket._rungs, rungs, strict=True):
                seen.clear()
                seen.update(saved)
        for trial_id, k in state["bracket"].items():
            scheduler._trial_info[trial_id] = scheduler._brackets[k]


# The end ----------------------------------------------------------------------------------------
@contextmanager
def end_at_once() -> Iterator[None]:
    """Have Tune kill its actors at the end of an experiment.

    It waits 5 s for all, then up to 10 s for each of those that are still starting; whoever keeps
    what trials reach in files loses nothing without.
    """
    controller: Any = TuneController
    before = controller._cleanup_trials
    controller._cleanup_trials = lambda self: self._actor_manager.cleanup()
    try:
        yield
    finally:
        controller._cleanup_trials = before
