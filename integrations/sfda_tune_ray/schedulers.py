"""Schedulers: trials of non-survivors never start; backbones compete only with themselves."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from sfda_tune.selection.calibration import backbone_name, scores_by_name
from sfda_tune.selection.policy import find_kept
from sfda_tune.values.text import require, some
from sfda_tune_ray import _compat
from sfda_tune_ray.searcher import SFDASearcher

__all__ = ["PerBackboneScheduler", "SFDAScheduler"]

_logger = logging.getLogger(__name__)
MANY = 3  # so many backbones, all stopped, are no chance


class _Wrapper(TrialScheduler):
    """What asks another scheduler, `_base`, and tells of it as its own."""

    def __init__(self, base: TrialScheduler, param_name: str) -> None:
        super().__init__()
        _compat.check_base_scheduler(base)
        self._base, self._path = base, param_name.split("/")

    @property
    def metric(self) -> Any:
        """The base's metric."""
        return self._base.metric

    @property
    def _metric(self) -> Any:  # some of Tune reads it directly
        return self._base.metric

    @property
    def supports_buffered_results(self) -> bool:
        """As the base."""
        return self._base.supports_buffered_results

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Pass on; the answer is the base's."""
        return self._base.set_search_properties(metric, mode, **spec)

    def _find_backbone(self, trial: Trial) -> str | None:
        value: Any = trial.config
        for part in self._path:
            value = value.get(part) if isinstance(value, Mapping) else None
        return None if value is None else backbone_name(value)


class SFDAScheduler(_Wrapper):
    """Stop trials of non-survivors before they cost an actor; else do what another scheduler does.

    For those who keep their own search algorithm or grid; `SFDASearcher` is told of the survivors
    and does not suggest such trials. Stopped trials count in ``num_samples``; their `Result` has
    no metric, but its config and ``sfda_pruned=True``. To OptunaSearch they are pruned trials.

    Parameters
    ----------
    scores : Ranking, mapping of str to float, or collection of str
        Scores of which the best `keep` survive, or the survivors themselves.
    keep : int, optional
        How many of the scored backbones survive. Default: 5; not allowed with names.
    base_scheduler : TrialScheduler, optional
        Schedules the survivors. Default: `FIFOScheduler`. Not PBT, which copies backbones between
        trials; ResourceChangingScheduler refuses the unequal resources of `backbone_resources`.
    param_name : str, default "backbone"
        The parameter that holds the backbone, nested ones as ``"model/backbone"``. Trials without
        it pass.

    Examples
    --------
    >>> sorted(SFDAScheduler({"vit": 3.1, "resnet": 2.5, "alexnet": 0.4}, keep=2).survivors)
    ['resnet', 'vit']
    """

    def __init__(
        self,
        scores: Mapping[Any, float] | Collection[Any],
        *,
        keep: int | None = None,
        base_scheduler: TrialScheduler | None = None,
        param_name: str = "backbone",
    ) -> None:
        super().__init__(base_scheduler or FIFOScheduler(), param_name)
        self._vetoed: set[str] = set()  # trials that the base does not know
        self._scored = set(scores_by_name(scores)) if isinstance(scores, Mapping) else None
        self._seen: set[str] = set()  # backbones of trials, until names are checked
        self._is_checked = False
        self.set_survivors(find_kept(scores, keep))

    @property
    def base_scheduler(self) -> TrialScheduler:
        """What schedules the survivors."""
        return self._base

    @property
    def survivors(self) -> frozenset[str]:
        """The backbones whose trials may run."""
        return self._survivors

    def set_survivors(self, survivors: Collection[Any]) -> None:
        """Change who survives: others stop at their next report, or before they start."""
        is_many = isinstance(survivors, Collection) and not isinstance(survivors, (str, Mapping))
        some_names = is_many and len(survivors) > 0
        require("survivors", survivors, "a non-empty collection of names", some_names)
        self._survivors = find_kept(survivors)

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Note non-survivors: they cannot be stopped yet."""
        self._tell_searcher(tune_controller)
        if trial.is_finished():  # `Tuner.restore` adds these again
            return
        if self._is_out(trial):
            self._vetoed.add(trial.trial_id)
        else:
            self._base.on_trial_add(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Stop the non-survivors that wait, before an actor is asked for; then ask the base."""
        trials = list(tune_controller.get_trials())
        self._check_names(trials)
        for trial in trials:
            if trial.status in (Trial.PENDING, Trial.PAUSED) and self._is_out(trial):
                backbone, kept = self._find_backbone(trial), len(self._survivors)
                _logger.info(
                    f"Trial {trial.trial_id}: backbone {backbone} stopped before training: not "
                    f"among the {kept} kept"
                )
                _compat.stop_unstarted(tune_controller, trial)
        return self._base.choose_trial_to_run(tune_controller)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Stop a non-survivor that was running already; ask the base about the others."""
        if self._is_out(trial):
            return TrialScheduler.STOP
        return self._base.on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: Any) -> None:
        """Pass on."""
        if trial.trial_id not in self._vetoed:
            self._base.on_trial_complete(tune_controller, trial, result)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Pass on."""
        if trial.trial_id not in self._vetoed:
            self._base.on_trial_error(tune_controller, trial)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """Pass on."""
        if trial.trial_id not in self._vetoed:
            self._base.on_trial_remove(tune_controller, trial)

    def debug_string(self) -> str:
        """Describe it in one line, and the base."""
        return f"{len(self._survivors)} surviving backbones. {self._base.debug_string()}"

    def get_state(self) -> dict[str, Any]:
        """Return what `SchedulerStateCallback` saves."""
        base = _compat.read_scheduler(self._base)
        names = {"survivors": sorted(self._survivors), "vetoed": sorted(self._vetoed)}
        return {**names, "base": base}

    def set_state(self, state: dict[str, Any]) -> None:
        """Take back what `get_state` returned."""
        self._survivors, self._vetoed = frozenset(state["survivors"]), set(state["vetoed"])
        if state["base"] is not None:
            _compat.write_scheduler(self._base, state["base"])

    def _tell_searcher(self, tune_controller: Any) -> None:
        searcher = tune_controller.search_alg
        while hasattr(searcher, "searcher"):
            searcher = searcher.searcher
        if isinstance(searcher, SFDASearcher) and searcher.param_name == "/".join(self._path):
            searcher.set_survivors(self._survivors)

    def _check_names(self, trials: Sequence[Trial]) -> None:
        """Warn once where names do not fit, so that nothing would be stopped, or everything."""
        name, kept = "/".join(self._path), some(sorted(self._survivors))
        for trial in () if self._is_checked else trials:
            backbone, complaint = self._find_backbone(trial), None
            if backbone is None:
                has = some(sorted(_compat.flatten_dict(trial.config)))
                complaint = (
                    f"`param_name` must be a parameter of the trials, but is {name!r} and they "
                    f"have {has}: no trial is stopped for its backbone."
                )
            elif self._scored is not None and backbone not in self._scored:
                complaint = (
                    f"`scores` must be for the choices of {name!r}, but {backbone} has no score "
                    f"and is stopped; kept are {kept}."
                )
            elif self._scored is None and not self._seen & self._survivors:
                self._seen.add(backbone)
                fits = any(self._find_backbone(t) in self._survivors for t in trials)
                if len(self._seen) >= MANY and not fits:
                    complaint = (
                        f"`scores` must name choices of {name!r}, but names {kept}, and all "
                        f"trials so far are stopped: {some(sorted(self._seen))}."
                    )
            if complaint is not None:
                self._is_checked = True
                _logger.warning(complaint)
                return

    def _is_out(self, trial: Trial) -> bool:
        backbone = self._find_backbone(trial)
        return backbone is not None and backbone not in self._survivors


class PerBackboneScheduler(_Wrapper):
    """Give every backbone a scheduler of its own, so that slow starters are not stopped.

    Under one ASHA small networks, which learn fast, stop large ones at the first rung. Here trials
    compete with others of their backbone only. With few trials per backbone nothing is ever
    stopped; inside `SFDAScheduler`, which cuts across backbones, they complement each other.

    Parameters
    ----------
    factory : callable
        Returns a new scheduler, for instance ``lambda: ASHAScheduler(max_t=20)``. With several
        brackets ASHA draws a trial's bracket from NumPy's global, unseeded generator.
    param_name : str, default "backbone"
        The parameter that holds the backbone, nested ones as ``"model/backbone"``.

    Examples
    --------
    >>> from ray.tune.schedulers import ASHAScheduler
    >>> PerBackboneScheduler(lambda: ASHAScheduler(metric="acc", mode="max")).metric
    'acc'
    """

    def __init__(
        self, factory: Callable[[], TrialScheduler], *, param_name: str = "backbone"
    ) -> None:
        if not callable(factory):
            raise ValueError(
                "`factory` must return a new scheduler for each backbone but is one itself, "
                f"{factory!r}; write `lambda: {type(factory).__name__}(...)`."
            )
        super().__init__(factory(), param_name)
        self._factory = factory
        self._groups: dict[str, TrialScheduler] = {}
        self._properties: tuple[Any, Any, dict[str, Any]] | None = None

    @property
    def schedulers(self) -> Mapping[str, TrialScheduler]:
        """The schedulers, by backbone."""
        return MappingProxyType(self._groups)

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Pass on, to later ones too."""
        self._properties = (metric, mode, spec)
        return super().set_search_properties(metric, mode, **spec)

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Pass on, unless `Tuner.restore` adds a finished trial again."""
        if not trial.is_finished():
            self._ask("on_trial_add", tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Ask the backbone's scheduler."""
        return self._ask("on_trial_result", tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: Any) -> None:
        """Pass on."""
        self._ask("on_trial_complete", tune_controller, trial, result)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Pass on."""
        self._ask("on_trial_error", tune_controller, trial)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """Pass on."""
        self._ask("on_trial_remove", tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Ask the schedulers, those of which the fewest trials have begun first."""
        waits = (Trial.PENDING, Trial.PAUSED)
        begun = Counter(
            self._find_name(t)
            for t in tune_controller.get_trials()
            if t.status not in waits or t.has_reported_at_least_once
        )
        for name in sorted(self._groups, key=lambda name: (begun[name], name)):
            view: Any = _View(tune_controller, self, name)
            trial = self._groups[name].choose_trial_to_run(view)
            if trial is not None:
                return trial
        return None

    def debug_string(self) -> str:
        """Describe the schedulers, one a line."""
        lines = [f"{name}: {group.debug_string()}" for name, group in self._groups.items()]
        return "\n".join(["One scheduler per backbone.", *lines])

    def get_state(self) -> dict[str, Any]:
        """Return what `SchedulerStateCallback` saves."""
        return {name: _compat.read_scheduler(group) for name, group in self._groups.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Take back what `get_state` returned."""
        for name, group in state.items():
            if group is not None:
                _compat.write_scheduler(self._find_group(name), group)

    def _ask(self, hook: str, tune_controller: Any, trial: Trial, *rest: Any) -> Any:
        name = self._find_name(trial)
        view = _View(tune_controller, self, name)
        return getattr(self._find_group(name), hook)(view, trial, *rest)

    def _find_name(self, trial: Trial) -> str:
        return self._find_backbone(trial) or ""

    def _find_group(self, name: str) -> TrialScheduler:
        if name not in self._groups:
            self._groups[name] = self._factory()
            if self._properties is not None:
                metric, mode, spec = self._properties
                self._groups[name].set_search_properties(metric, mode, **spec)
        return self._groups[name]


class _View:
    """The controller with the trials of one backbone only."""

    def __init__(self, controller: Any, scheduler: PerBackboneScheduler, name: str) -> None:
        self._controller = controller
        self._has = lambda trial: scheduler._find_name(trial) == name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._controller, name)

    def get_trials(self) -> list[Trial]:
        return [trial for trial in self._controller.get_trials() if self._has(trial)]

    def get_live_trials(self) -> set[Trial]:
        return {trial for trial in self._controller.get_live_trials() if self._has(trial)}
