"""The searcher: `SFDASampler` of `sfda_tune_optuna` in Ray's `OptunaSearch`."""

from __future__ import annotations

import copy
import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import TrialState, create_trial
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch
from sfda_tune_optuna import SFDAPruner, SFDASampler
from sfda_tune_optuna.history import ITERATIONS, LOST, REPLACES, SECONDS, find_choices

from sfda_tune.selection.calibration import Calibration, backbone_name
from sfda_tune.values.text import integer, require, some
from sfda_tune_ray import _compat

__all__ = ["SFDASearcher"]

_logger = logging.getLogger(__name__)
POINT = "sfda:point"  # user attribute: the point to evaluate that a trial is


@dataclass
class _Adopted:
    """A trial in flight that was not suggested, or not under this number."""

    params: dict[str, Any]
    values: list[float] = field(default_factory=list)
    reports: dict[int, float] = field(default_factory=dict)
    attrs: dict[str, Any] = field(default_factory=dict)


class SFDASearcher(OptunaSearch):
    """Choose the backbone by its score and by the trials so far; leave the rest to any sampler.

    Ray's `OptunaSearch` with `SFDASampler` as its sampler, which makes all decisions: the same
    history leads to the same choices as in Optuna. Failures count as they do there.

    Put `ConcurrencyLimiter` or `Repeater` outside, or set ``max_concurrent_trials``: without, Tune
    runs one trial at a time. Grid search and PBT are not for searchers.

    Parameters
    ----------
    scores : Ranking or mapping of str to float
        Higher is better. Backbones without a score are tried like average ones.
    metric, mode : str or list of str, optional
        Needed if ``param_space`` is empty: Tune then never passes on those of ``TuneConfig``.
        Lists are several objectives, with their modes: give them here, not in ``TuneConfig``, and
        no scheduler that compares values. Every trial weighs them anew
        (`sfda_tune.selection.policy.scalarize`), so that all of the front is looked for.
    space : callable, optional
        Defines the parameters by run, as in `OptunaSearch`: takes an ``optuna.Trial`` and suggests
        them with the backbone. ``param_space`` must then hold no domains.
    spaces : mapping of str to dict, optional
        Parameters that only some backbones have: ``{"vit": {"drop_path": tune.uniform(0, 0.3)}}``.
    points_to_evaluate : sequence of dict, optional
        Tried first; the sampler fills in what a point leaves out.
    storage : optuna.storages.BaseStorage, optional
        Where the study is kept. Default: in memory, and in what Tune saves.
    max_failures : int, default 3
        When every backbone has failed so often and none has ever reported, the experiment ends. A
        trial whose machine died does not count if `SchedulerStateCallback` knows this searcher.
    **options
        Those of `SFDASampler`, with ``param_name="model/backbone"`` for a nested parameter. In
        ``param_space`` it is a ``tune.choice``, for instance of `backbone_space`; if it is not
        there, all scored backbones are the choices.

    Raises
    ------
    ValueError
        If an argument is out of range or does not fit ``param_space``.

    Notes
    -----
    ``num_samples`` counts every trial. One that ended before others had (by its iterations) is
    pruned in the study, and its value a lower bound. Tune saves the state by pickle, the study and
    the sampler with it: restore from places you trust, as with ``Tuner.restore``.

    Examples
    --------
    >>> import optuna
    >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
    >>> from ray import tune
    >>> searcher = SFDASearcher({"vit": 3.1, "resnet": 2.5}, metric="acc", mode="max", seed=0)
    >>> searcher.set_search_properties(None, None, {"lr": tune.loguniform(1e-5, 1e-1)})
    True
    >>> sorted(searcher.suggest("t1")), searcher.suggest("t2")["backbone"]
    (['backbone', 'lr'], 'vit')
    >>> searcher.on_trial_complete("t1", {"acc": 0.9})
    >>> searcher.calibration().n_trials
    1
    """

    def __init__(
        self,
        scores: Mapping[Any, float],
        *,
        metric: str | list[str] | None = None,
        mode: str | list[str] | None = None,
        space: Callable[[Any], Any] | None = None,
        spaces: Mapping[str, Mapping[str, Any]] | None = None,
        points_to_evaluate: Sequence[Mapping[str, Any]] | None = None,
        storage: BaseStorage | None = None,
        max_failures: int = 3,
        **options: Any,
    ) -> None:
        _compat.check_options(options)
        if isinstance(metric, list) or isinstance(mode, list):
            pair = isinstance(metric, list) and isinstance(mode, list)
            rule = f"a list with one for each `metric`, which is {metric!r}"
            require("mode", mode, rule, pair and len(mode) == len(metric))  # type: ignore[arg-type]
        modes = mode if isinstance(mode, list) else [mode]
        known = bool(modes) and all(m in ("min", "max") for m in modes)
        require("mode", mode, "min, max or None, or a list of these", mode is None or known)
        self.param_name = options.get("param_name", "backbone")
        is_name = isinstance(self.param_name, str) and all(self.param_name.split("/"))
        require("param_name", self.param_name, 'a name, nested ones as "model/backbone"', is_name)
        require("space", space, "a function of a trial, or None", space is None or callable(space))
        points = list(points_to_evaluate or [])
        dicts = all(isinstance(point, Mapping) for point in points)
        require("points_to_evaluate", points, "a list of dicts", dicts)
        self._max_failures = integer("max_failures", max_failures, 1)
        self.sampler = SFDASampler(scores, **options)
        own: Any = self.sampler
        super().__init__(metric=metric, mode=mode, sampler=own, storage=storage)  # type: ignore[arg-type]
        self._function = space
        self._spaces_given = {backbone_name(b): dict(own) for b, own in (spaces or {}).items()}
        self._spaces: dict[str, dict[str, BaseDistribution]] = {}
        self._points = [_compat.flatten_dict(dict(point)) for point in points]
        self._choices: dict[str, Any] = {}  # by name; none if a function defines them
        self._past: list[tuple[Any, ...]] = []  # trials of other experiments, not yet added
        self._steps: Counter[str] = Counter()  # iterations of each trial
        self._errors: list[str] = []  # trials that failed, until it is known why
        self._failed: dict[str, int] = {}  # their numbers in the study, once it has been told
        self._adopted: dict[str, _Adopted] = {}
        self._runs: set[str] = set()  # backbones that have reported
        self._fails: Counter[str] = Counter()

    @property
    def study(self) -> Study:
        """All trials, as Optuna keeps them; known once Tune has passed on the search space."""
        require("study", self._ot_study, "asked for after the first trial", self._ot_study)
        return self._ot_study  # type: ignore[return-value]

    def calibration(self) -> Calibration:
        """Compare the scores with the trials so far, by the first metric.

        Values are negated if its mode is "min".
        """
        if self._ot_study is None:
            return self.sampler.policy.calibrate(())
        self._settle()
        return self.sampler.calibration(self.study)

    def set_survivors(self, survivors: Collection[str]) -> None:
        """Propose only these backbones from now on: `SFDAScheduler` would stop others."""
        if self._ot_study is not None:
            self._ot_study.pruner = SFDAPruner(list(survivors), param_name=self.param_name)

    # What Tune calls ------------------------------------------------------------------------
    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        """Take metric, mode and search space over from Tune; False if they are already known."""
        if self._ot_study is not None:
            return False
        for name, given in (("metric", metric), ("mode", mode)):
            own = getattr(self, f"_{name}")
            fits = own is None or given is None or own == given
            require(name, own, f"that of TuneConfig, {given!r}, or given once", fits)
        metric, mode = metric or self._metric, mode or self._mode
        known = metric and (isinstance(mode, list) or mode in ("min", "max"))
        require("metric and mode", (metric, mode), "given, in TuneConfig or here", known)
        found = _compat.convert_space(config)
        if self._function is not None and found:
            return False  # Tune then says so
        if self._function is None:
            self._choices = self._find_choices(config, found)
            found[self.param_name] = CategoricalDistribution(tuple(self._choices.values()))
            self.sampler.policy.mask(list(self._choices), strict=True)
            for name in [*self._spaces_given, *(p.get(self.param_name) for p in self._points)]:
                of = f"backbones among the choices of {self.param_name!r}"
                known = name is None or backbone_name(name) in self._choices
                require("spaces and points_to_evaluate", name, of, known)
        self._spaces = {b: _compat.convert_space(own) for b, own in self._spaces_given.items()}
        _compat.check_distributions([found, *self._spaces.values()])
        self._space, self._metric, self._mode = self._function or found, metric, mode
        self._setup_study(self._mode)  # type: ignore[arg-type]
        self._settle()
        for point in self._points:
            fixed = {name: self._find_value(name, value) for name, value in point.items()}
            again = self._storage is not None  # where it may have been tried already
            self.study.enqueue_trial(fixed, user_attrs={POINT: fixed}, skip_if_exists=again)
        return True

    def suggest(self, trial_id: str) -> Any:
        """Return the parameters of the next trial, `Searcher.FINISHED` if no backbone runs."""
        if self._ot_study is None:
            self.set_search_properties(None, None, {})
        self._settle()
        if self._is_hopeless():
            _logger.warning("All backbones have failed: no more trials are suggested.")
            return Searcher.FINISHED
        config = copy.deepcopy(super().suggest(trial_id)) or {}
        trial = self._ot_trials[trial_id]
        if self.param_name not in trial.params:
            raise ValueError(f"`space` must suggest {self.param_name!r}, but does not.")
        for name, own in self._spaces.get(self._find_backbone(trial_id), {}).items():
            _write(config, name, _compat.suggest(trial, name, own))
        for name, value in trial.user_attrs.get(POINT, {}).items():
            if name not in trial.params:
                _write(config, name, value)
        return config

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Note how far a trial is; nothing depends on being told."""
        values = self._read_values(result)
        step = int(result.get("training_iteration", self._steps[trial_id] + 1))
        if values is None or any(map(math.isnan, values)) or step <= self._steps[trial_id]:
            return  # the last: again, after a restart
        if trial_id in self._errors:  # it has begun again
            self._settle()
        if self._is_live(trial_id):
            if len(values) == 1:
                self._ot_trials[trial_id].report(values[0], step)
            self._note(trial_id, self._find_backbone(trial_id), step)
        else:
            self._adopt(trial_id, values, step, result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Learn from the end of a trial: a value, an error, or neither."""
        told = result or {}
        values = self._read_values(told)
        step = int(told.get("training_iteration", self._steps[trial_id]))
        if self._is_live(trial_id):
            if not error:
                self._tell(trial_id, values, step, told)
            elif trial_id not in self._errors:
                self._errors.append(trial_id)  # `explain_error` may follow
            return
        if not error and values is not None and not any(map(math.isnan, values)):
            self._adopt(trial_id, values, step, told)
        if trial_id in self._adopted:
            self._close(trial_id)

    def add_evaluated_point(
        self,
        parameters: dict[str, Any],
        value: float | Sequence[float],
        error: bool = False,
        pruned: bool = False,
        intermediate_values: Sequence[Any] | None = None,
    ) -> None:
        """Learn from a trial of another experiment.

        Parameters
        ----------
        parameters : dict
            The searched ones, with the backbone; what this experiment does not search is left out.
        value : float or sequence of float
            The metric, or all of them.
        error, pruned : bool
            Whether it failed, or was stopped early.
        intermediate_values : list, optional
            All it has reported. Fewer than others did: it was stopped early.

        Raises
        ------
        ValueError
            If the backbone is not among the parameters, or `metric` and `mode` are not known yet.

        Examples
        --------
        >>> searcher = SFDASearcher({"vit": 3.1, "resnet": 2.5}, metric="accuracy", mode="max")
        >>> searcher.add_evaluated_point({"backbone": "vit", "lr": 1e-3}, 0.91)
        >>> _ = searcher.suggest("next")
        >>> searcher.calibration().n_trials
        1
        """
        flat = _compat.flatten_dict(dict(parameters))
        has_one = self.param_name in flat
        require("parameters", parameters, f"a dict with {self.param_name!r}", has_one)
        require("mode", self._mode, "given before trials are added", self._mode is not None)
        raw = [float(value)] if isinstance(value, Real) else [float(v) for v in value]  # type: ignore[arg-type,union-attr]
        fits = error or len(raw) == self._n_objectives
        require("value", value, f"one for each metric, {self._metric!r}", fits)
        steps = len(intermediate_values or ()) or int(pruned)
        seen = intermediate_values if self._n_objectives == 1 else None
        reports = {n: float(v) for n, v in enumerate(seen or (), 1) if isinstance(v, Real)}
        attrs = {ITERATIONS: steps} if steps else {}
        state = TrialState.FAIL if error else TrialState.COMPLETE
        if pruned and not error:
            state = TrialState.PRUNED
        self._past.append((flat, state, None if error else raw, reports, attrs))
        if self._ot_study is not None:
            self._settle()

    def explain_error(self, trial_id: str, backbone: Any, *, lost: bool) -> None:
        """Take in whether a failed trial was `lost` with its process or machine.

        `SchedulerStateCallback` knows; Tune tells no searcher.
        """
        if trial_id in self._errors:
            self._errors.remove(trial_id)
            self._fail(trial_id, lost=lost)
        elif not (lost or self._steps[trial_id] or trial_id in self._completed_trials):
            self._completed_trials.add(trial_id)  # `Tuner.restore` began it anew
            params = {self.param_name: backbone}
            self._failed[trial_id] = self._add(params, TrialState.FAIL, None, {}, {})

    def on_pause(self, trial_id: str) -> None:
        """Do nothing: `HyperBandForBOHB` says so."""

    def on_unpause(self, trial_id: str) -> None:
        """Do nothing, likewise."""

    # The trials of the study ----------------------------------------------------------------
    def _is_live(self, trial_id: str) -> bool:
        return trial_id in self._ot_trials and trial_id not in self._completed_trials

    def _find_backbone(self, trial_id: str) -> str:
        return backbone_name(self._ot_trials[trial_id].params[self.param_name])

    def _note(self, trial_id: str, backbone: str, step: int) -> None:
        self._steps[trial_id] = step
        self._runs.add(backbone)

    def _settle(self) -> None:
        """Tell the study what was waited with."""
        while self._errors:
            self._fail(self._errors.pop(0), lost=False)
        # Begun anew after an error it may end unnoticed: ConcurrencyLimiter does not know it.
        for trial_id in list(self._adopted):
            if self._steps[trial_id] >= max(self._steps.values()):
                self._close(trial_id)
        while self._past and self._find_distributions(self._past[0][0]) is not None:
            self._add(*self._past.pop(0))

    def _tell(
        self, trial_id: str, values: list[float] | None, step: int, result: dict[str, Any]
    ) -> None:
        trial, known = self._ot_trials[trial_id], self._steps[trial_id]
        if values is None and not (known and self._n_objectives == 1):
            self._fail(trial_id, lost=True)  # it never began, or never said anything
            return
        if values is not None and any(map(math.isnan, values)):
            self._fail(trial_id, lost=False)
            return
        if values is not None and step > known and len(values) == 1:
            trial.report(values[0], step)
        self._note(trial_id, self._find_backbone(trial_id), step)
        for name, about in _describe(step, result).items():
            trial.set_user_attr(name, about)
        if values is None or self._is_early(step):
            self.study.tell(trial, state=TrialState.PRUNED)
        else:
            self.study.tell(trial, values)
        self._completed_trials.add(trial_id)

    def _fail(self, trial_id: str, *, lost: bool) -> None:
        """End a trial without a value; one that was `lost` is no evidence."""
        trial, step = self._ot_trials[trial_id], self._steps[trial_id]
        for name, value in (_describe(step, {}) | ({LOST: True} if lost else {})).items():
            trial.set_user_attr(name, value)
        self.study.tell(trial, state=TrialState.FAIL)
        self._fails[self._find_backbone(trial_id)] += not (lost or step)
        self._completed_trials.add(trial_id)
        self._failed[trial_id] = trial.number

    def _adopt(
        self, trial_id: str, values: list[float], step: int, result: dict[str, Any]
    ) -> None:
        """Note what a trial has reached that `Tuner.restore` has begun anew, or a stranger."""
        if trial_id in self._completed_trials and trial_id not in self._failed:
            return
        if trial_id in self._ot_trials:
            params = dict(self._ot_trials[trial_id].params)
        else:
            flat = _compat.flatten_dict(dict(result))
            params = {name[7:]: v for name, v in flat.items() if name.startswith("config/")}
        if self.param_name not in params:
            return
        own = self._adopted.setdefault(trial_id, _Adopted(params))
        own.values, own.attrs = values, _describe(step, result)
        if trial_id in self._failed:
            own.attrs[REPLACES] = self._failed[trial_id]
        if len(values) == 1 and step:
            own.reports[step] = values[0]
        self._note(trial_id, backbone_name(params[self.param_name]), step)

    def _close(self, trial_id: str) -> None:
        own = self._adopted.pop(trial_id)
        is_early = self._is_early(self._steps[trial_id])
        state = TrialState.PRUNED if is_early else TrialState.COMPLETE
        self._add(own.params, state, own.values, own.reports, own.attrs)
        self._completed_trials.add(trial_id)
        self._failed.pop(trial_id, None)

    def _is_early(self, step: int) -> bool:
        """Tell whether a trial has ended before others; with several objectives none is pruned."""
        return self._n_objectives == 1 and 0 < step < max(self._steps.values())

    def _add(
        self,
        params: Mapping[str, Any],
        state: TrialState,
        values: list[float] | None,
        reports: Mapping[int, float],
        attrs: Mapping[str, Any],
    ) -> int:
        """Add an ended trial that was not asked for; return its number."""
        space = self._find_distributions(params) or {}
        found = {name: self._find_value(name, v) for name, v in params.items() if name in space}
        kept = {name: v for name, v in found.items() if _compat.contains(space[name], v)}
        if kept.keys() != found.keys():
            left = some(sorted(found.keys() - kept.keys()))
            _logger.warning(f"A trial with parameters outside of the space: {left} left out.")
        if any(map(math.isnan, values or ())):
            state, values = TrialState.FAIL, None
        backbone = backbone_name(params[self.param_name])
        if state == TrialState.FAIL:
            self._fails[backbone] += ITERATIONS not in attrs
        else:
            self._runs.add(backbone)
        trial = create_trial(
            state=state,
            values=values,
            params=kept,
            distributions={name: space[name] for name in kept},
            intermediate_values=dict(reports),
            user_attrs=dict(attrs),
        )
        number = len(self.study.get_trials(deepcopy=False))
        self.study.add_trial(trial)
        return number

    def _find_distributions(self, params: Mapping[str, Any]) -> dict[str, BaseDistribution] | None:
        """Return those of a backbone's parameters; None if a function has not yet shown them."""
        if isinstance(self._space, dict):
            backbone = backbone_name(params[self.param_name])
            return {**self._space, **self._spaces.get(backbone, {})}
        found: dict[str, BaseDistribution] = {}
        for trial in self.study.get_trials(deepcopy=False):
            found |= trial.distributions
        return found if self.param_name in found else None

    def _find_value(self, name: str, value: Any) -> Any:
        return self._choices.get(backbone_name(value), value) if name == self.param_name else value

    # Backbones ------------------------------------------------------------------------------
    def _find_choices(self, config: dict[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
        """Return the choices by name."""
        scores, name = self.sampler.policy.scores, self.param_name
        domain = _compat.flatten_dict(config).get(name)
        if domain is None:
            for other, own in found.items():
                if {*map(backbone_name, getattr(own, "choices", ()))} & scores.keys():
                    rule = f"where `param_space` has the backbones: {other!r}"
                    raise ValueError(f"`param_name` must be {rule}, but is {name!r}.")
            known = {n: s for n, s in scores.items() if math.isfinite(s)}
            choices = sorted(known, key=lambda n: (-known[n], n))
        elif isinstance(domain, _compat.Categorical):
            choices = domain.categories
        elif isinstance(domain, (_compat.Domain, dict)):
            rule = "a tune.choice of backbones, see `backbone_space`"
            raise ValueError(f"`{name}` must be {rule}, but is {domain!r}.")
        else:
            choices = [domain]
        by_name = {backbone_name(choice): choice for choice in choices}
        if not by_name.keys() & scores.keys():
            raise ValueError(
                f"`scores` must be for the choices of {name!r} but has none of "
                f"{sorted(by_name)[:5]}; they are for {sorted(scores)[:5]}."
            )
        return by_name

    def _is_hopeless(self) -> bool:
        """Tell whether all backbones that may be tried have always failed."""
        names = list(self._choices)
        if not names:
            trials = self.study.get_trials(deepcopy=False)
            names = [backbone_name(c) for c in find_choices(trials, self.param_name) or ()]
        names = [*(self.sampler.policy.mask(names) or names)]
        return bool(names) and not any(
            name in self._runs or self._fails[name] < self._max_failures for name in names
        )

    # Results --------------------------------------------------------------------------------
    @property
    def _n_objectives(self) -> int:
        return len(self._metric) if isinstance(self._metric, list) else 1

    def _read_values(self, result: Mapping[str, Any]) -> list[float] | None:
        """Return the metrics; None if one is missing."""
        names: Any = self._metric if isinstance(self._metric, list) else [self._metric]
        raw = [result.get(name) for name in names]
        return None if any(value is None for value in raw) else [float(v) for v in raw]  # type: ignore[arg-type]


def _describe(step: int, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the study keeps of a trial beside its values."""
    about = {ITERATIONS: step, SECONDS: result.get("time_total_s")}
    return {name: value for name, value in about.items() if value}


def _write(config: dict[str, Any], name: str, value: Any) -> None:
    *parts, last = name.split("/")
    for part in parts:
        config = config.setdefault(part, {})
    config[last] = value
