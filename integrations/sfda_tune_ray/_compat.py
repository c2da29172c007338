"""Everything that Ray Tune does not promise, in one place. Tested with Ray 2.60.

Nothing else of the searcher, the schedulers and the spaces touches a private name of Ray, or one
of `ray.tune` that its documentation leaves out.
"""

from __future__ import annotations

import copy
import importlib.metadata
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray._private.dict import flatten_dict, unflatten_dict
from ray.tune.execution.tune_controller import TuneController
from ray.tune.logger import LoggerCallback
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.schedulers.trial_scheduler import FIFOScheduler
from ray.tune.search import Searcher, sample
from ray.tune.search.sample import Categorical, Domain, Quantized, _BackwardsCompatibleNumpyRng
from ray.tune.search.variant_generator import assign_value, parse_spec_vars

__all__ = [
    "Categorical",
    "Domain",
    "Weighted",
    "add_point",
    "assign_value",
    "brings_space",
    "check_base_scheduler",
    "check_base_searcher",
    "copy_searcher",
    "end_at_once",
    "fix_param",
    "flatten_dict",
    "is_lost",
    "pack_space",
    "parse_spec_vars",
    "read_scheduler",
    "stop_unstarted",
    "unflatten_dict",
    "unpack_space",
    "write_scheduler",
]

# Searchers of Ray 2.60 that fail with newer versions of what they wrap, from this major on.
_OUTDATED = {"AxSearch": ("ax-platform", 1), "BayesOptSearch": ("bayesian-optimization", 2)}


# Searchers --------------------------------------------------------------------------------------
def check_base_searcher(base: Any) -> None:
    """Refuse what cannot be a base searcher, and say what to do instead."""
    if not isinstance(base, Searcher):
        raise ValueError(
            "`base_searcher` must be a Searcher of Ray Tune (not a class) or None, but is "
            f"{base!r}; for random search, what BasicVariantGenerator does, leave it out."
        )
    name = type(base).__name__
    if hasattr(base, "searcher"):
        raise ValueError(
            f"`base_searcher` must not be a wrapper but is a {name}; put it outside: "
            f"{name}(SFDASearcher(scores, base_searcher=...), ...)."
        )
    package, major = _OUTDATED.get(name, ("", 0))
    if package:
        version = importlib.metadata.version(package)
        if int(version.partition(".")[0]) >= major:
            raise ValueError(
                f"`base_searcher` must work but {name} fails with {package} {version}; install "
                f"'{package}<{major}' or use OptunaSearch."
            )


def brings_space(base: Searcher) -> bool:
    """Tell whether a searcher was made with a search space of its own."""
    if type(base).set_search_properties is Searcher.set_search_properties:
        return True
    return any(bool(getattr(base, name, None)) for name in ("_space", "domain", "_dim_dict"))


def copy_searcher(base: Searcher, key: str) -> Searcher:
    """Copy a searcher that has seen nothing yet; Optuna's copies share its storage only."""
    storage = getattr(base, "_storage", None)
    fork = copy.deepcopy(base, {} if storage is None else {id(storage): storage})
    if hasattr(fork, "_study_name"):
        fork._study_name = f"{fork._study_name} {key}"  # type: ignore[attr-defined]
    return fork


def fix_param(base: Any, name: str, value: Any) -> None:
    """Let a searcher with a space of its own, maybe a conditional one, always take one value."""
    study = getattr(base, "_ot_study", None)
    if study is not None:
        from optuna.samplers import PartialFixedSampler

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is experimental
            study.sampler = PartialFixedSampler({name: value}, study.sampler)


def add_point(base: Any, params: dict[str, Any], values: list[float]) -> bool:
    """Tell a searcher of a trial that is not its own; False if it cannot take it."""
    try:
        if len(values) == 1:
            base.add_evaluated_point(params, values[0])
        else:  # of Ray's searchers only Optuna's knows several objectives, but not here
            from optuna.trial import create_trial

            trial = create_trial(values=values, params=params, distributions=base._space)
            base._ot_study.add_trial(trial)
    except Exception:  # not implemented, or outside its space; must not end the experiment
        return False
    return True


class Weighted(Categorical._Uniform):
    """Draw categories with unequal probabilities; to Optuna and HyperOpt a plain categorical."""

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


def pack_space(value: Any) -> Any:
    """Return a search space as JSON values; TypeError if it holds anything of an unknown class."""
    if isinstance(value, Domain):
        kind = type(value).__name__
        if getattr(sample, kind, None) is not type(value) or kind == "Function":
            raise TypeError(f"a {kind} cannot be saved as JSON")
        sampler, step = value.get_sampler(), None
        if isinstance(sampler, Quantized):
            sampler, step = sampler.sampler, sampler.q
        parts = {**vars(value), "sampler": type(sampler).__name__, **vars(sampler), "step": step}
        return {"$domain": kind, **{name: pack_space(part) for name, part in parts.items()}}
    if isinstance(value, dict):
        return {name: pack_space(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [pack_space(part) for part in value]
        return {"$tuple": parts} if isinstance(value, tuple) else parts
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(value)}
    if isinstance(value, (str, int, float, type(None))):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be saved as JSON")


def unpack_space(value: Any) -> Any:
    """Return the search space that `pack_space` has packed."""
    if isinstance(value, list):
        return [unpack_space(part) for part in value]
    if not isinstance(value, dict):
        return value
    if "$float" in value:
        return float(value["$float"])
    parts = {name: unpack_space(part) for name, part in value.items()}
    if "$tuple" in parts:
        return tuple(parts["$tuple"])
    if "$domain" not in parts:
        return parts
    cls, name = getattr(sample, parts["$domain"]), parts["sampler"]
    names = ("categories",) if cls is Categorical else ("lower", "upper")
    domain = cls(*(parts[n] for n in names))
    sampler = Weighted if name == "Weighted" else getattr(cls, name)
    own = [parts[n] for n in ("weights", "mean", "sd") if n in parts]
    step = parts["step"]
    sampler = sampler(*own)
    domain.set_sampler(sampler if step is None else Quantized(sampler, step), allow_override=True)
    return domain


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
