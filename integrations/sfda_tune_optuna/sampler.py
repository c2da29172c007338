"""The sampler: the backbone by the policy, everything else by any sampler of Optuna."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, BruteForceSampler, GridSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from sfda_tune.selection.calibration import Calibration, History, Observation, backbone_name
from sfda_tune.selection.policy import BackbonePolicy, find_backed_off, make_seed
from sfda_tune.values.text import require
from sfda_tune_optuna import _compat, exhaustive, store
from sfda_tune_optuna.history import (
    ASKED,
    GATED,
    LOST,
    TOLD,
    find_choices,
    find_signs,
    list_scored,
    observe,
    read_backbone,
)
from sfda_tune_optuna.previous import find_trust, pick, read_previous
from sfda_tune_optuna.pruner import SFDAPruner
from sfda_tune_optuna.views import BackboneView, Kinds

__all__ = ["SFDASampler"]

_logger = optuna.logging.get_logger(f"optuna.{__name__}")
MAX_IN_FLIGHT = 1000  # trials in flight that are remembered; asked and never told ones leak
_RELATIVE, _INDEPENDENT, _BACKBONE = 1, 2, 3  # what a random stream is for
# With trials shared between backbones few random ones suffice; see tests/benchmarks.
N_STARTUP = 4


class _Assignment(NamedTuple):
    """What a trial in flight was given."""

    backbone: str | None  # None: the base sampler proposes the backbone, too
    view: Any = None  # what the base sampler sees of the study; None after unpickling


@dataclass
class _StudyState:
    """What is known of one study."""

    kinds: Kinds
    spaces: Sequence[dict[str, Any]] = ()  # what the base's caches hold of the whole study
    is_saved: bool = False  # whether the saved ranking was compared
    is_checked: bool = False  # whether the names were
    seen: dict[int, Observation] = field(default_factory=dict)
    last: tuple[Sequence[FrozenTrial], dict[str, Any], History] | None = None  # the last read


class SFDASampler(BaseSampler):
    """Choose the backbone by its score and by the trials so far; leave the rest to any sampler.

    The first choices follow the scores; then every trial says how much the scores are worth here
    (`calibration`), down to nothing. A fixed share of the trials is left to the base sampler
    altogether (`sfda_tune.selection.policy.delegate_to_base_sampler`), so that useless scores cost
    little. What the study's `SFDAPruner` would stop is never proposed, and what `gate` stopped
    soon is not.

    Parameters
    ----------
    scores : Ranking or mapping of str to float
        Higher is better. Backbones without a score are tried like average ones.
    param_name : str, default "backbone"
        The categorical parameter that holds the backbone.
    base_sampler : BaseSampler, optional
        Draws all other parameters, of all backbones: it lives as long as this sampler, is told of
        every trial, and sees all of them as if made with the trial's backbone. Default:
        ``TPESampler(n_startup_trials=4)``. `GridSampler` (a grid without `param_name` gets all
        scored backbones) and `BruteForceSampler` try every combination once, good scores first;
        of `survivors`, and of those whom a `SFDAPruner` lets pass, if there are such.
    policy : {"calibrated", "prior", "greedy"}, default "calibrated"
        See `sfda_tune.selection.policy.choose`. Only "calibrated" leaves trials to the base
        sampler.
    prior_strength : float, default 1.0
        How many trials the scores weigh before the first trial; 0 ignores them.
    survivors : int or collection of str, optional
        Mask: only the best so many, or the named ones, are tried.
    exploration : float in [0, 1], default 0.05
        How often a trial steps outside `survivors`; 0 makes the mask strict.
    conditional : bool, default True
        Whether the base sampler sees values that are comparable between backbones: minus what
        each is expected to reach. Each backbone may then have parameters of its own, even with GP
        or CMA-ES. Else, and always for NSGA-II/III, Grid and BruteForce, it sees the study as is.
    costs : mapping of str to float, optional
        Cost of a trial of each backbone, in any unit, such as `Ranking.costs`; default:
        the durations of its trials.
    cost_exponent : float, default 0.0
        How much costs count; 0 is not at all.
    previous : sequence of Study, or of sequences of Observation, optional
        Studies on other data, with one objective and a TPE or random search as base sampler here:
        of a few draws of a parameter the one is taken that did best there, as far as the trials
        of this study bear them out (`sfda_tune_optuna.previous`). Not saved with the study.
    seed : int, optional
        Governs the choice and what the base sampler draws: before each trial the generators in
        its attributes, lists, dicts and inner samplers are seeded by the trial's number. So
        workers may share one seed, and a resumed study draws as an uninterrupted one, for all
        samplers of Optuna; not for a base with other state of its own, or hidden generators.

    Examples
    --------
    >>> import optuna
    >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
    >>> accuracy = {"vit": 0.9, "resnet": 0.8, "alexnet": 0.5}
    >>> def objective(trial):
    ...     name = trial.suggest_categorical("backbone", sorted(accuracy))
    ...     lr = trial.suggest_float("lr", 1e-5, 1e-1, log=True)
    ...     return accuracy[name] - abs(lr - 1e-3)
    >>> sampler = SFDASampler({"vit": 3.1, "resnet": 2.5, "alexnet": 0.4}, seed=0)
    >>> study = optuna.create_study(direction="maximize", sampler=sampler)
    >>> study.optimize(objective, n_trials=12)
    >>> study.best_params["backbone"]
    'vit'
    >>> sampler.calibration(study).slope > 0
    True
    """

    def __init__(
        self,
        scores: Mapping[Any, float],
        *,
        param_name: str = "backbone",
        base_sampler: BaseSampler | None = None,
        policy: str = "calibrated",
        prior_strength: float = 1.0,
        survivors: int | Collection[str] | None = None,
        exploration: float = 0.05,
        conditional: bool = True,
        costs: Mapping[str, float] | None = None,
        cost_exponent: float = 0.0,
        previous: Sequence[Study | Sequence[Observation]] = (),
        seed: int | None = None,
    ) -> None:
        is_sampler = base_sampler is None or isinstance(base_sampler, BaseSampler)
        require("base_sampler", base_sampler, "a sampler (not a class) or None", is_sampler)
        entropy = make_seed(seed)
        self._seed = None if seed is None else entropy
        self.policy = BackbonePolicy(
            scores,
            policy=policy,
            prior_strength=prior_strength,
            survivors=survivors,
            exploration=exploration,
            costs=costs,
            cost_exponent=cost_exponent,
            seed=entropy,
        )
        self._ranking = scores
        self._param_name = param_name
        if base_sampler is None:
            base_sampler = TPESampler(n_startup_trials=N_STARTUP, seed=seed)
            self._base_name = None
        else:
            self._base_name = type(base_sampler).__name__
        if isinstance(base_sampler, GridSampler):
            base_sampler = _compat.make_whole_grid(base_sampler, param_name, list_scored(scores))
        self._base = base_sampler
        self._conditional = bool(conditional)
        self._previous = [read_previous(study, param_name) for study in previous]
        redraws = isinstance(_compat.unwrap(base_sampler), _compat.REDRAWN)
        rule = "TPE or random search where `previous` is given"
        require("base_sampler", base_sampler, rule, redraws or not self._previous)
        self._trust: tuple[Any, list[float]] = (None, [])  # of a trial
        self._assignments: OrderedDict[tuple[int, int], _Assignment] = OrderedDict()
        # By storage, too: two may have one of the same name and number.
        self._studies: WeakKeyDictionary[BaseStorage, dict[int, _StudyState]] = WeakKeyDictionary()
        self._has_warned = False
        self._asked_last: Any = None  # the trial that the base sampler has inferred a space for
        self._lock = threading.RLock()  # n_jobs > 1: threads share one sampler, and its base

    @classmethod
    def from_study(
        cls, study: Study, *, base_sampler: BaseSampler | None = None, **changes: Any
    ) -> SFDASampler:
        """Make the sampler again from the ranking and the settings that are saved in a study.

        Optuna does not save samplers: ``load_study`` gives a plain `TPESampler`.

        Parameters
        ----------
        study : Study
        base_sampler : BaseSampler, optional
            To be given again, if it was not a `TPESampler`.
        **changes
            Settings that replace the saved ones.

        Examples
        --------
        >>> storage = optuna.storages.InMemoryStorage()
        >>> sampler = SFDASampler({"vit": 2.0, "resnet": 1.0}, survivors=1, seed=3)
        >>> study = optuna.create_study(storage=storage, sampler=sampler)
        >>> trial = study.ask()
        >>> again = optuna.load_study(study_name=study.study_name, storage=storage)
        >>> again.sampler = SFDASampler.from_study(again)
        >>> again.sampler.settings == sampler.settings
        True
        """
        settings = dict((store.load_record(study) or {}).get("settings", {}))
        ranking = store.load_ranking(study)
        was = settings.pop("base_sampler", None)
        if base_sampler is None and was is not None:
            warnings.warn(
                f"The study was sampled with a {was} of its own, which cannot be saved, nor can "
                "its options and constraints; the default base sampler is used instead. Pass "
                f"`base_sampler={was}(...)`.",
                store.SFDAWarning,
                stacklevel=2,
            )
        return cls(ranking, base_sampler=base_sampler, **{**settings, **changes})

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments as JSON values: what is saved in the study."""
        mask = self.policy.survivors
        return {
            "param_name": self._param_name,
            "base_sampler": self._base_name,
            "survivors": list(mask) if isinstance(mask, tuple) else mask,
            "conditional": self._conditional,
            "seed": self._seed,
            **self.policy.options,
        }

    @property
    def n_in_flight(self) -> int:
        """How many trials were given a backbone and have not ended."""
        return len(self._assignments)

    def calibration(self, study: Study) -> Calibration:
        """Compare the scores with the trials of a study, by its first objective.

        Returns
        -------
        Calibration
            Slope between standardised scores and values (≤ 0 if the scores mislead), Kendall's
            tau, a table per backbone, and a warning if the scores run against the trials.
        """
        history = observe(study, _compat.read_trials(study), self._param_name)
        return self.policy.calibrate(history)

    # What Optuna calls, in this order -------------------------------------------------------
    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Save the ranking at the study's first trial; tell the base sampler."""
        self._save_or_compare(study)
        _compat.mark_trial(study, trial, ASKED, True)
        with self._lock:
            self._assignments.pop(_compat.find_trial_id(study, trial), None)  # of another storage
            untried = self._find_untried(study, trial)
            self._base.before_trial(study, trial)
            if untried is not None:
                self._pick_grid_point(study, trial, untried)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Choose the backbone, whatever is suggested first; return the base sampler's space."""
        backbone, view = self._find_assignment(study, trial)
        space = self._infer_space(study, trial, view)
        if backbone is None:
            return space
        return {name: dist for name, dist in space.items() if name != self._param_name}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Let the base sampler draw from all trials, made comparable between backbones."""
        backbone, view = self._find_assignment(study, trial)
        shared = view.with_params(search_space) if isinstance(view, BackboneView) else view
        with self._lock:
            if self._asked_last != _compat.find_trial_id(study, trial):
                self._infer_space(study, trial, view)  # some samplers keep it for the next call
            self._rekey(trial, _RELATIVE)

            def draw() -> dict[str, Any]:
                return self._base.sample_relative(shared, trial, search_space)

            params = self._pick(study, trial, draw, lambda drawn: drawn)
        params = {name: value for name, value in params.items() if name in search_space}
        if backbone is None and self._param_name in params:  # the base sampler's own choice
            choice, dist = params[self._param_name], search_space[self._param_name]
            params[self._param_name] = self._replace_useless(study, trial, choice, dist)
        return params

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Return the chosen backbone; let the base sampler draw everything else."""
        given = self._find_assignment(study, trial)
        backbone, view = given
        if param_name == self._param_name and backbone is not None:
            if isinstance(param_distribution, CategoricalDistribution):
                return self._find_choice(study, trial, param_distribution.choices, given)
            # A number of that name.
            view = self._show(study, trial, _compat.read_trials(study), None)
        space = {param_name: param_distribution}
        shared = view.with_params(space) if isinstance(view, BackboneView) else view
        with self._lock:
            self._rekey(trial, _BACKBONE if param_name == self._param_name else _INDEPENDENT)

            def draw() -> Any:
                return self._base.sample_independent(shared, trial, param_name, param_distribution)

            value = self._pick(study, trial, draw, lambda drawn: {param_name: drawn})
        if param_name == self._param_name:
            value = self._replace_useless(study, trial, value, param_distribution)
        return value

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Tell the base sampler; forget the trial; say once if scores or names are wrong."""
        # A killed worker cannot say so: its trial is no evidence.
        if state == TrialState.FAIL and LOST not in trial.user_attrs:
            _compat.mark_trial(study, trial, TOLD, True)
        with self._lock:
            self._base.after_trial(study, trial, state, values)
            self._stop_if_done(study, trial)
            self._assignments.pop(_compat.find_trial_id(study, trial), None)
            known = self._find_state(study)
            is_first = not known.is_checked and state in (TrialState.COMPLETE, TrialState.PRUNED)
            known.is_checked |= is_first
        if is_first:
            choices = find_choices([trial], self._param_name)
            complaint = self.policy.compare_names(self._param_name, trial.params, choices)
            if complaint is not None:
                warnings.warn(complaint, store.SFDAWarning, stacklevel=2)
        if not self._has_warned and trial.number % 10 == 9:
            warning = self.calibration(study).warning
            if warning is not None:
                self._has_warned = True
                _logger.warning(warning)

    def reseed_rng(self) -> None:
        """Reseed the base sampler; our own draws depend on the trial's number alone."""
        with self._lock:
            self._base.reseed_rng()

    # Decisions ------------------------------------------------------------------------------
    def _find_assignment(self, study: Study, trial: FrozenTrial) -> _Assignment:
        key = _compat.find_trial_id(study, trial)
        with self._lock:
            given = self._assignments.get(key)
        real = read_backbone(trial, self._param_name)  # enqueued, retried or already suggested
        if real is None:
            fixed = _compat.find_fixed(study, self, self._base)
            if self._param_name in fixed:
                real = backbone_name(fixed[self._param_name])
        is_known = given is not None and (given.backbone is None or real in (None, given.backbone))
        if given is None or not is_known or given.view is None:
            trials = _compat.read_trials(study)
            if given is None or not is_known:
                given = _Assignment(self._choose(study, trial, trials) if real is None else real)
            given = given._replace(view=self._show(study, trial, trials, given.backbone))
            self._remember(key, given)
        return given

    def _choose(
        self,
        study: Study,
        trial: FrozenTrial,
        trials: Sequence[FrozenTrial],
        choices: Sequence[Any] | None = None,
        untried: Sequence[str] | None = None,
    ) -> str | None:
        """Return a backbone; None leaves it to the base sampler, never if `choices` are given.

        `untried` are those of the choices of which a grid has a point left.
        """
        may_delegate = choices is None  # else the objective asks for one of them now
        if isinstance(_compat.unwrap(self._base), GridSampler):
            may_delegate = False  # the grid's points are taken in our order
        if choices is None:
            choices = find_choices(trials, self._param_name)
        every = self.policy.scores if choices is None else map(backbone_name, choices)
        kept = self._find_kept(study, list(every))
        names = self._find_useful(study, trial, trials, kept)
        if untried is not None:
            names = [name for name in kept if name in untried] or kept
        if not names:
            return None
        weights = self.policy.sample_weights(trial.number, len(study.directions))
        options = {"leave_out": trial.number, **({} if weights is None else {"weights": weights})}
        history = self._observe(study, trials, **options)
        if may_delegate and self.policy.delegates(history, trial.number):
            _logger.info(f"Trial {trial.number}: left to {type(self._base).__name__}")
            return None
        backbone = self.policy.choose(history, trial.number, names, of=kept)
        _logger.info(f"Trial {trial.number}: backbone {backbone} by score")
        return backbone

    def _find_useful(
        self, study: Study, trial: FrozenTrial, trials: Sequence[FrozenTrial], names: list[str]
    ) -> list[str]:
        """Return those that no `SFDAPruner` would stop and that have a combination left."""
        useful = self._find_kept(study, names)
        if isinstance(_compat.unwrap(self._base), BruteForceSampler):
            given = {n: v for n, v in trial.params.items() if n != self._param_name}
            others = [t for t in trials if t.number != trial.number]
            done = exhaustive.find_exhausted(others, self._param_name, given)
            useful = [name for name in useful if name not in done] or useful
        return useful

    def _find_kept(self, study: Study, names: list[str]) -> list[str]:
        """Return those that no `SFDAPruner` would stop, if there are such."""
        for pruner in _compat.find_pruners(study):
            if isinstance(pruner, SFDAPruner) and pruner.param_name == self._param_name:
                names = [name for name in names if name in pruner.survivors] or names
        return names

    def _stop_if_done(self, study: Study, trial: FrozenTrial) -> None:
        """Stop once all combinations of those that may be tried were, if not all backbones may."""
        grid = self._base if isinstance(self._base, GridSampler) else None
        if grid is None and not isinstance(_compat.unwrap(self._base), BruteForceSampler):
            return
        trials = [] if grid else _compat.read_trials(study)
        points = _compat.read_grid(grid) if grid else []
        choices = [point.get(self._param_name) for point in points]
        names = [*map(backbone_name, choices or find_choices(trials, self._param_name) or ())]
        kept = self._find_kept(study, sorted({*names}))
        mask = self.policy.mask(kept)
        if mask is not None:
            kept = [name for name in kept if name in mask] or kept
        if {*kept} == {*names}:
            return  # then the base sampler knows itself when to stop
        if grid:
            left = {names[point] for point in _compat.find_untried(grid, study)}
        else:
            left = {*names} - exhaustive.find_exhausted(trials, self._param_name, {})
        if left and not left & {*kept}:
            with suppress(RuntimeError):  # ask and tell
                study.stop()

    def _find_choice(
        self, study: Study, trial: FrozenTrial, choices: Sequence[Any], given: _Assignment
    ) -> Any:
        """Return the one of the choices that is the trial's backbone."""
        by_name = {backbone_name(choice): choice for choice in choices}
        self.policy.mask(list(by_name), strict=True)
        trials = _compat.read_trials(study)
        # It was chosen before the choices were known, or what was drawn before left it no rest.
        if given.backbone not in self._find_useful(study, trial, trials, [*by_name]):
            backbone = self._choose(study, trial, trials, choices)
            given = _Assignment(backbone, self._show(study, trial, trials, backbone))
            self._remember(_compat.find_trial_id(study, trial), given)
        return by_name[str(given.backbone)]

    def _replace_useless(
        self, study: Study, trial: FrozenTrial, choice: Any, distribution: BaseDistribution
    ) -> Any:
        """Return the base sampler's choice, or another one if that would be of no use."""
        if not isinstance(distribution, CategoricalDistribution):
            return choice
        trials = _compat.read_trials(study)
        history = self._observe(study, trials, leave_out=trial.number)
        by_name = {backbone_name(choice): choice for choice in distribution.choices}
        useful = self._find_useful(study, trial, trials, list(by_name))
        if backbone_name(choice) in {*useful} - find_backed_off(history, trial.number):
            return choice
        return by_name[str(self._choose(study, trial, trials, distribution.choices))]

    def _find_untried(self, study: Study, trial: FrozenTrial) -> list[int] | None:
        """Return the points of the base's grid that a new trial may take; None: no such grid."""
        is_free = "fixed_params" not in trial.system_attrs and "grid_id" not in trial.system_attrs
        if isinstance(self._base, GridSampler) and is_free:
            return _compat.find_untried(self._base, study)
        return None

    def _pick_grid_point(self, study: Study, trial: FrozenTrial, untried: list[int]) -> None:
        points = _compat.read_grid(self._base)
        trials = _compat.read_trials(study)

        def choose(names: list[str], untried: list[str]) -> str | None:
            return self._choose(study, trial, trials, names, untried)

        args = (study, trial, self._param_name, untried, choose)
        backbone = exhaustive.pick_grid_point(points, *args)
        if backbone is not None:
            key = _compat.find_trial_id(study, trial)
            self._remember(key, _Assignment(backbone, self._show(study, trial, trials, backbone)))

    # What the base sampler gets -------------------------------------------------------------
    def _show(
        self, study: Study, trial: FrozenTrial, trials: Sequence[FrozenTrial], backbone: str | None
    ) -> Any:
        """Return the study as the base sampler is to see it."""
        if isinstance(_compat.unwrap(self._base), _compat.POOLED):
            return study
        if backbone is None or not self._conditional:
            return _compat.View(study, [t for t in trials if GATED not in t.user_attrs])
        choices = find_choices(trials, self._param_name) or ()
        choice = {backbone_name(c): c for c in choices}.get(backbone, backbone)
        levels = []
        for i, sign in enumerate(find_signs(study)):
            options = {"leave_out": trial.number, **({"objective": i} if i else {})}
            history = self._observe(study, trials, **options)
            found = self.policy.estimate_levels(history, follows_scores=i == 0)
            levels.append({name: sign * level for name, level in found.items()})
        kinds = self._find_state(study).kinds
        args = (self._param_name, backbone, choice, levels, kinds)
        return BackboneView(study, trials, *args)

    def _pick(
        self, study: Study, trial: FrozenTrial, draw: Callable[[], Any], name: Callable[[Any], Any]
    ) -> Any:
        """Draw once, or several times where earlier studies say which draw to take."""
        first = draw()
        drawn = {n: v for n, v in name(first).items() if n != self._param_name}
        if not self._previous or not drawn:
            return first
        require(
            "previous",
            study.directions,
            "left out with several objectives",
            len(study.directions) == 1,
        )
        key = _compat.find_trial_id(study, trial)
        if self._trust[0] != key:
            history = self._observe(study, _compat.read_trials(study), leave_out=trial.number)
            levels = self.policy.estimate_levels(history)
            self._trust = key, find_trust(self._previous, history, levels)
        before = {n: v for n, v in trial.params.items() if n != self._param_name}
        return pick(self._previous, self._trust[1], first, draw, lambda v: {**before, **name(v)})

    def _infer_space(
        self, study: Study, trial: FrozenTrial, view: Any
    ) -> dict[str, BaseDistribution]:
        is_whole = not isinstance(view, BackboneView)
        own = view if is_whole else view.of_backbone()
        with self._lock:
            known = self._find_state(study)
            _compat.load_spaces(self._base, known.spaces if is_whole else ())
            self._asked_last = _compat.find_trial_id(study, trial)
            space = self._base.infer_relative_search_space(own, trial)
            if is_whole:  # to compare thousands of choices anew takes seconds
                known.spaces = _compat.save_spaces(self._base)
            return space

    def _rekey(self, trial: FrozenTrial, stage: int) -> None:
        """Let what the base sampler draws depend on the trial alone, not on who drew before."""
        n_drawn = len(trial.params.keys() - {self._param_name})
        _compat.rekey(self._base, [self.policy.seed, trial.number, stage, n_drawn])

    def _observe(self, study: Study, trials: Sequence[FrozenTrial], **options: Any) -> History:
        known = self._find_state(study)
        if known.last is None or known.last[0] is not trials or known.last[1] != options:
            seen = known.seen if len(study.directions) == 1 else None
            history = observe(study, trials, self._param_name, seen=seen, **options)
            known.last = (trials, options, history)
            return history
        return known.last[2]

    def _remember(self, key: tuple[int, int], assigned: _Assignment) -> None:
        with self._lock:
            self._assignments[key] = assigned
            self._assignments.move_to_end(key)
            if len(self._assignments) > MAX_IN_FLIGHT:
                self._assignments.popitem(last=False)

    def _find_state(self, study: Study) -> _StudyState:
        with self._lock:
            of_storage = self._studies.setdefault(_compat.find_storage(study), {})
            return of_storage.setdefault(
                _compat.find_study_id(study), _StudyState(Kinds(self._param_name))
            )

    def _save_or_compare(self, study: Study) -> None:
        """Save the ranking, or warn once if the study holds another one."""
        with self._lock:
            known = self._find_state(study)
            if known.is_saved or not self.policy.scores:
                return
            known.is_saved = True
        record = store.load_record(study)
        difference = None if record is None else store.compare_rankings(study, self._ranking)
        if record is None or (difference is None and "policy" not in record["settings"]):
            # Nothing is there, or the user's own `save_ranking`, which knows of no settings.
            store.save_ranking(study, self._ranking, settings=self.settings)
        elif difference is not None:
            warnings.warn(
                f"Study {study.study_name!r} holds another ranking; this one {difference}. It is "
                "used from now on but not saved: `SFDASampler.from_study(study)` takes the saved "
                "one, `save_ranking(study, ranking)` replaces it.",
                store.SFDAWarning,
                stacklevel=2,
            )

    # Copies ---------------------------------------------------------------------------------
    def __getstate__(self) -> dict[str, Any]:
        """Leave out the lock and what is read again from studies."""
        with self._lock:
            assignments = OrderedDict(
                (key, d._replace(view=None)) for key, d in self._assignments.items()
            )
            left_out = ("_lock", "_studies")
            return {k: v for k, v in vars(self).items() if k not in left_out} | {
                "_assignments": assignments
            }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make a lock of its own; what is known of studies is learnt again."""
        vars(self).update(state)
        self._lock, self._studies = threading.RLock(), WeakKeyDictionary()
