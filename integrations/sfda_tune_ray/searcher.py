"""The searcher: the backbone by the policy, everything else by any searcher of Tune."""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import logging
import math
import os
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from types import MappingProxyType
from typing import Any

import numpy as np
from ray.tune.search import Searcher

from sfda_tune.selection.calibration import Calibration, backbone_name
from sfda_tune.selection.policy import BackbonePolicy, find_backed_off, make_seed
from sfda_tune.values.files import check, read_json, write_text
from sfda_tune.values.formats import SEARCHER
from sfda_tune.values.text import integer, require
from sfda_tune_ray import _compat
from sfda_tune_ray.history import Record, observe, plain

__all__ = ["SFDASearcher"]

_logger = logging.getLogger(__name__)

FORMAT = "sfda_tune_ray.searcher/1"
WHOLE = "*"  # key of the base searcher that chooses the backbone, too
OWN = "of_backbone"  # where the whole space holds the parameters of single backbones


class SFDASearcher(Searcher):
    """Choose the backbone by its score and by the trials so far; leave the rest to any searcher.

    The first choices follow the scores; then every trial says how much the scores are worth here
    (`calibration`), down to nothing. A fixed share of the trials is left to the base searcher
    altogether (`sfda_tune.selection.policy.delegate_to_base_sampler`), which is then given the
    whole space, the backbone included. The same history leads to the same choices as `SFDASampler`
    makes in Optuna.

    Put `ConcurrencyLimiter` or `Repeater` outside, or set ``max_concurrent_trials``: without, Tune
    runs one trial at a time. Grid search and PBT are not for searchers.

    Parameters
    ----------
    scores : Ranking or mapping of str to float
        Higher is better. Backbones without a score are tried like average ones.
    base_searcher : Searcher, optional
        Draws all other parameters; it must not have been used. Every backbone gets a copy of its
        own, so that the n-th trials of all backbones start alike. Default: random search.
    param_name : str, default "backbone"
        The parameter that holds the backbone, nested ones as ``"model/backbone"``. In
        ``param_space`` it is a ``tune.choice``, for instance of `backbone_space`; if it is not
        there, all scored backbones are the choices.
    metric, mode : str or list of str, optional
        Needed if ``param_space`` is empty: Tune then never passes on those of ``TuneConfig``.
        Lists are several objectives, with their modes: give them here, not in ``TuneConfig``, and
        no scheduler that compares values. Every trial weighs them anew
        (`sfda_tune.selection.policy.scalarize`), so that all of the front is looked for.
    policy, prior_strength, exploration, cost_exponent
        See `sfda_tune.selection.policy.choose`. Only the policy "calibrated" leaves trials to the
        base searcher.
    survivors : int or collection of str, optional
        Mask: only the best so many, or the named ones, are tried, but for the share `exploration`
        of the trials.
    spaces : mapping of str to dict, optional
        Parameters that only some backbones have: ``{"vit": {"drop_path": tune.uniform(0, 0.3)}}``.
    conditional : bool, default True
        Whether every backbone has a copy of the base searcher; else one serves all of those
        without `spaces`.
    points_to_evaluate : sequence of dict, optional
        Tried first; the base searcher and the policy fill in what a point leaves out.
    costs : mapping of str to float, optional
        Cost of a trial of each backbone, in any unit, such as `Ranking.costs`; default:
        the times of its trials.
    max_failures : int, default 3
        A backbone that never reported anything and failed so often is not tried again; a trial
        whose machine died does not count if `SchedulerStateCallback` knows this searcher. When no
        backbone is left, the experiment ends.
    seed : int, optional
        Governs the choice and random search.

    Raises
    ------
    ValueError
        If an argument is out of range or does not fit ``param_space``.

    Notes
    -----
    ``num_samples`` counts every trial. Trials that a scheduler stopped early are lower bounds, see
    `sfda_tune_ray.history.observe`. The state is JSON; only what the base searchers save is in
    their own format, mostly pickle: restore from places you trust, as with ``Tuner.restore``.

    Examples
    --------
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
        base_searcher: Searcher | None = None,
        param_name: str = "backbone",
        metric: str | list[str] | None = None,
        mode: str | list[str] | None = None,
        policy: str = "calibrated",
        prior_strength: float = 1.0,
        survivors: int | Collection[str] | None = None,
        exploration: float = 0.05,
        spaces: Mapping[str, Mapping[str, Any]] | None = None,
        conditional: bool = True,
        points_to_evaluate: Sequence[Mapping[str, Any]] | None = None,
        costs: Mapping[str, float] | None = None,
        cost_exponent: float = 0.0,
        max_failures: int = 3,
        seed: int | None = None,
    ) -> None:
        if isinstance(metric, list) or isinstance(mode, list):
            pair = isinstance(metric, list) and isinstance(mode, list)
            rule = f"a list with one for each `metric`, which is {metric!r}"
            require("mode", mode, rule, pair and len(mode) == len(metric))  # type: ignore[arg-type]
        super().__init__(metric=metric, mode=mode)  # type: ignore[arg-type]  # it takes lists
        if base_searcher is not None:
            _compat.check_base_searcher(base_searcher)
            nested = isinstance(base_searcher, SFDASearcher)
            require("base_searcher", base_searcher, "another class than SFDASearcher", not nested)
        modes = mode if isinstance(mode, list) else [mode]
        known = bool(modes) and all(m in ("min", "max") for m in modes)
        require("mode", mode, "min, max or None, or a list of these", mode is None or known)
        is_name = isinstance(param_name, str) and all(param_name.split("/"))
        require("param_name", param_name, 'a name, nested ones as "model/backbone"', is_name)
        self._max_failures = integer("max_failures", max_failures, 1)
        points = list(points_to_evaluate or [])
        dicts = all(isinstance(point, Mapping) for point in points)
        require("points_to_evaluate", points, "a list of dicts", dicts)
        self.policy = BackbonePolicy(
            scores,
            policy=policy,
            prior_strength=prior_strength,
            survivors=survivors,
            exploration=exploration,
            costs=costs,
            cost_exponent=cost_exponent,
            seed=make_seed(seed),
        )
        self._n_objectives = len(metric) if isinstance(metric, list) else 1
        self._base = base_searcher or RandomSearcher(self.policy.seed)
        self._brings_space = _compat.brings_space(self._base)
        self.param_name = param_name
        self._path = tuple(param_name.split("/"))
        self._spaces = {backbone_name(name): dict(space) for name, space in (spaces or {}).items()}
        self._conditional = bool(conditional)
        self._points = [_compat.flatten_dict(dict(point)) for point in points]
        # Known once Tune has passed on the search space
        self._space: dict[str, Any] | None = None
        self._choices: dict[str, Any] = {}
        # What `save` saves
        self._number = 0  # of the next trial
        self._n_points = 0  # tried so far
        self._unattributed = 0
        self._records: dict[str, Record] = {}
        self._bases: dict[str, Searcher] = {}
        self._given: dict[str, dict[str, Any]] = {}  # answers, in case one is asked for twice

    @property
    def records(self) -> Mapping[str, Record]:
        """What is known of each trial, by its id."""
        return MappingProxyType(self._records)

    @property
    def base_searchers(self) -> Mapping[str, Searcher]:
        """The copies of the base searcher, by backbone; `WHOLE` chooses the backbone, too."""
        return MappingProxyType(self._bases)

    def calibration(self) -> Calibration:
        """Compare the scores with the trials so far, by the first metric.

        Values are negated if its mode is "min".
        """
        return self.policy.calibrate(observe(self._records.values()))

    # What Tune calls ------------------------------------------------------------------------
    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        """Take metric, mode and search space over from Tune; False if they are already known."""
        if self._space is not None:
            return False
        for name, given in (("metric", metric), ("mode", mode)):
            own = getattr(self, f"_{name}")
            fits = own is None or given is None or own == given
            require(name, own, f"that of TuneConfig, {given!r}, or given once", fits)
        self._metric, self._mode = metric or self._metric, mode or self._mode
        known = self._metric and (isinstance(self._mode, list) or self._mode in ("min", "max"))
        require(
            "metric and mode", (self._metric, self._mode), "given, in TuneConfig or here", known
        )
        config = copy.deepcopy(config)
        self._choices = self._find_choices(config)
        searched = [path for path, _ in _compat.parse_spec_vars(config)[1]]
        if self._brings_space and any(path != self._path for path in searched):
            return False  # Tune then says so
        self.policy.mask(list(self._choices), strict=True)
        for name in [*self._spaces, *(p.get(self.param_name) for p in self._points)]:
            of = f"backbones among the choices of {self.param_name!r}"
            known = name is None or backbone_name(name) in self._choices
            require("spaces and points_to_evaluate", name, of, known)
        self._space = config
        return True

    def suggest(self, trial_id: str) -> Any:
        """Return the parameters of the next trial, `Searcher.FINISHED` if no backbone is left."""
        if trial_id in self._given:
            return copy.deepcopy(self._given[trial_id])
        if self._space is None and not self.set_search_properties(None, None, {}):
            raise ValueError(
                "`param_space` must hold no domains if the base searcher has a space of its own."
            )
        names = self.find_candidates()
        if not names:
            _logger.warning("All backbones have failed: no more trials are suggested.")
            return Searcher.FINISHED
        number = self._number
        weights = self.policy.sample_weights(number, self._n_objectives)
        history = observe(self._records.values(), weights)
        point = self._points[self._n_points] if self._n_points < len(self._points) else {}
        backbone = backbone_name(point[self.param_name]) if self.param_name in point else None
        left = backbone is None and self.policy.delegates(history, number)
        if backbone is None and not left:
            backbone = self.policy.choose(history, number, names)
        key = WHOLE if backbone is None else self._find_key(backbone)
        base = self._open(key)
        who = f"left to {type(self._base).__name__}" if left else f"backbone {backbone} by score"
        _logger.info(f"Trial {trial_id}: {who}")
        asked = {} if base is None else base.suggest(trial_id)
        if asked is None or asked == Searcher.FINISHED:
            return asked
        config = copy.deepcopy(asked)
        own = config.pop(OWN, {})
        if backbone is None:
            backbone = backbone_name(_read(asked, self._path))
            if backbone not in names or backbone in find_backed_off(history, number):
                backbone = self.policy.choose(history, number, names)
                if self._brings_space and base is not None:  # whose other parameters may not fit
                    base.on_trial_complete(trial_id, error=True)
                    key = self._find_key(backbone)
                    base = self._open(key)
                    asked = {} if base is None else base.suggest(trial_id)
                    if asked is None or asked == Searcher.FINISHED:
                        return asked
                    config = copy.deepcopy(asked)
            for path in _find_paths(self._spaces.get(backbone, {})):
                _write(config, path, _read(own, (str(list(self._choices).index(backbone)), *path)))
        own_choice = _read(asked, self._path)
        if own_choice is not None and backbone_name(own_choice) != backbone and not point:
            raise ValueError(
                f"`base_searcher` must not choose {self.param_name!r} in a space of its own, "
                f"where a {type(base).__name__} cannot be held to {backbone!r}; use OptunaSearch, "
                "or `spaces` for parameters of some backbones only."
            )
        for name, value in point.items():
            _write(config, tuple(name.split("/")), value)
        _write(config, self._path, self._choices[backbone])
        _refuse_domains(config)
        # Only from here on the state changes.
        flat = _compat.flatten_dict(asked)
        new = _compat.flatten_dict(config)
        changed = any(new.get(n) != v for n, v in flat.items() if not n.startswith(f"{OWN}/"))
        self._number, self._n_points = number + 1, self._n_points + bool(point)
        self._records[trial_id] = Record(
            backbone,
            params=self._read_params(config, backbone),
            key=None if base is None else key,
            changed=changed,
        )
        self._given[trial_id] = config
        return copy.deepcopy(config)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Note how far a trial is; nothing depends on being told."""
        record = self._find_record(trial_id, result)
        if record is None:
            return
        iterations = int(result.get("training_iteration", record.iterations + 1))
        if iterations <= record.iterations:  # again, after a restart
            return
        values = self._read_values(result)
        seconds = result.get("time_total_s", record.seconds)
        # Begun anew after an error it may end unnoticed: ConcurrencyLimiter does not know it.
        will_end = record.state == "running" and not record.foreign
        self._records[trial_id] = replace(
            record,
            state="running" if will_end else "complete",
            iterations=iterations,
            value=values[0] if values else None,
            others=values[1:],
            seconds=seconds,
        )
        heeds = not (record.told or record.changed) and _are_finite(values)
        if record.key in self._bases and heeds:
            self._bases[record.key].on_trial_result(trial_id, result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Learn from the end of a trial: a value, an error, or neither."""
        self._given.pop(trial_id, None)
        old = self._find_record(trial_id, result or {})
        if old is None:  # an error of a trial that `Tuner.restore` began anew
            self._unattributed += 1
            return
        told = self._read_values(result or {})
        values = told or (() if error else old.values)  # stopped while it was waiting
        new = replace(old, told=True)
        if old.state == "complete" and (error or not _are_finite(values)):
            pass  # it has a value already
        elif error:
            new = replace(new, state="failed", value=None, others=())
        elif not values:
            new = replace(new, state="lost")
        else:
            known = result or {}
            iterations = int(known.get("training_iteration", old.iterations))
            seconds = known.get("time_total_s", old.seconds)
            about: dict[str, Any] = {"iterations": iterations, "seconds": seconds}
            new = replace(new, state="complete", value=values[0], others=values[1:], **about)
        self._records[trial_id] = new
        error = error or bool(told and not _are_finite(told))  # Optuna would stumble over it
        self._tell(trial_id, old, new, result if told and not error else None, error)

    def add_evaluated_point(
        self,
        parameters: dict[str, Any],
        value: float | Sequence[float],
        error: bool = False,
        pruned: bool = False,
        intermediate_values: Sequence[Any] | None = None,
    ) -> None:
        """Learn from a trial of another experiment, before the first one of this.

        Parameters
        ----------
        parameters : dict
            The searched ones, with the backbone.
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
        >>> searcher.calibration().n_trials
        1
        """
        flat = _compat.flatten_dict(dict(parameters))
        require(
            "parameters", parameters, f"a dict with {self.param_name!r}", self.param_name in flat
        )
        require("mode", self._mode, "given before trials are added", self._mode is not None)
        raw = (value,) if isinstance(value, Real) else tuple(value)  # type: ignore[arg-type]
        fits = error or len(raw) == self._n_objectives
        require("value", value, f"one for each metric, {self._metric!r}", fits)
        values = [] if error else [s * float(v) for s, v in zip(self._signs, raw, strict=True)]
        backbone = backbone_name(flat.pop(self.param_name))
        record = Record(
            backbone,
            state="failed" if error else "complete",
            value=None if error else values[0],
            others=tuple(values[1:]),
            iterations=len(intermediate_values or ()) or int(pruned),
            params={name: plain(v) for name, v in flat.items()},
            told=True,
        )
        self._records[f"evaluated-{len(self._records)}"] = record
        self._number += 1  # a choice that was made: the next draw is another
        self._share(record)

    def explain_error(self, trial_id: str, backbone: Any, *, lost: bool) -> None:
        """Take in whether a failed trial was `lost` with its process or machine.

        `SchedulerStateCallback` knows; Tune tells no searcher.
        """
        record = self._records.get(trial_id) or Record(backbone_name(backbone), "failed")
        if record.state == "failed":
            self._records[trial_id] = replace(record, state="lost" if lost else "failed")

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        """Leave the limit to the limiter."""
        return False

    def on_pause(self, trial_id: str) -> None:
        """Hand through what BOHB says."""
        self._hand_through("on_pause", trial_id)

    def on_unpause(self, trial_id: str) -> None:
        """Hand through what BOHB says."""
        self._hand_through("on_unpause", trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Write the state as JSON, atomically."""
        bases = {}
        for key, base in self._bases.items():
            with tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, "base")
                with contextlib.suppress(NotImplementedError):  # made and told anew
                    base.save(path)
                    with open(path, "rb") as file:
                        bases[key] = base64.b64encode(file.read()).decode("ascii")
        try:
            space = _compat.pack_space(self._space)
        except TypeError as error:
            _logger.warning(f"Give `param_space` to Tuner.restore: it is not saved, {error}.")
            space = None
        state = {
            "format": FORMAT,
            "metric": self._metric,
            "mode": self._mode,
            "space": space,
            "seed": self.policy.seed,
            "number": self._number,
            "points": self._n_points,
            "unattributed": self._unattributed,
            "records": {name: record.pack() for name, record in self._records.items()},
            "base_searcher": type(self._base).__name__,
            "bases": bases,
        }
        write_text(checkpoint_path, json.dumps(state, allow_nan=False))

    def restore(self, checkpoint_path: str) -> None:
        """Replace the state by a saved one; arguments and a known search space stay as they are.

        Raises
        ------
        ValueError
            If the file is not what `save` wrote, or the base searcher is of another class.
        """
        state = read_json(checkpoint_path, {str: object})
        found, name = state.get("format"), type(self._base).__name__
        require("checkpoint_path", found, f"a file of the format {FORMAT!r}", found == FORMAT)
        check(state, SEARCHER, "checkpoint_path")
        was = state["base_searcher"]
        require("base_searcher", name, f"a {was}, as when the state was saved", name == was)
        if self._space is None and state["space"] is not None:
            space = _compat.unpack_space(state["space"])  # `Tuner.restore` does not tell it again
            self.set_search_properties(state["metric"], state["mode"], space)
        if isinstance(self._base, RandomSearcher):  # for backbones opened later
            self._base = RandomSearcher(state["seed"])
        bases = {}
        for key, blob in state["bases"].items():
            bases[key] = self._make_base(key)
            with tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, "base")
                with open(path, "wb") as file:
                    file.write(base64.b64decode(blob, validate=True))
                bases[key].restore(path)
        self.policy = replace(self.policy, seed=state["seed"])
        self._number, self._n_points = state["number"], state["points"]
        self._unattributed = state["unattributed"]
        self._records = {name: Record.unpack(r) for name, r in state["records"].items()}
        self._bases, self._given = bases, {}

    # Backbones ------------------------------------------------------------------------------
    def _find_choices(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the choices by name, and see that the space holds nothing impossible."""
        _, _, grids = _compat.parse_spec_vars(config)
        if grids:
            where = "/".join(str(part) for part in grids[0][0])
            raise ValueError(
                f"`param_space` must not hold a grid_search but {where!r} is one; use tune.choice "
                "here, or the grid without a search_alg and with SFDAScheduler."
            )
        domain = _read(config, self._path)
        if domain is None:
            for path, other in _compat.parse_spec_vars(config)[1]:
                if {*map(backbone_name, getattr(other, "categories", ()))} & {*self.policy.scores}:
                    name = "/".join(map(str, path))
                    rule = f"where `param_space` has the backbones: {name!r}"
                    raise ValueError(f"`param_name` must be {rule}, but is {self.param_name!r}.")
            known = {n: s for n, s in self.policy.scores.items() if math.isfinite(s)}
            choices = sorted(known, key=lambda n: (-known[n], n))
        elif isinstance(domain, _compat.Categorical):
            choices = domain.categories
        elif isinstance(domain, (_compat.Domain, dict)):
            rule = "a tune.choice of backbones, see `backbone_space`"
            raise ValueError(f"`{self.param_name}` must be {rule}, but is {domain!r}.")
        else:
            choices = [domain]
        by_name = {backbone_name(choice): choice for choice in choices}
        if not by_name.keys() & self.policy.scores.keys():
            raise ValueError(
                f"`scores` must be for the choices of {self.param_name!r} but has none of "
                f"{sorted(by_name)[:5]}; they are for {sorted(self.policy.scores)[:5]}."
            )
        return by_name

    def find_candidates(self) -> list[str]:
        """Return the choices but those that always fail, and those outside a mask of names."""
        fails: Counter[str] = Counter()
        runs = set()
        for record in self._records.values():
            if record.iterations or record.state == "complete":
                runs.add(record.backbone)
            fails[record.backbone] += record.state == "failed"
        names = [n for n in self._choices if n in runs or fails[n] < self._max_failures]
        mask = self.policy.mask(names)
        return names if mask is None or set(names) & set(mask) else []

    # Base searchers -------------------------------------------------------------------------
    def _find_key(self, backbone: str) -> str:
        has_own = self._conditional or self._brings_space or backbone in self._spaces
        return backbone if has_own else ""

    def _find_space(self, key: str) -> dict[str, Any]:
        """Return the space that a base searcher draws from."""
        config = copy.deepcopy(self._space or {})
        if key == WHOLE:
            _write(config, self._path, _compat.Categorical(list(self._choices.values())).uniform())
            own = {str(k): self._spaces.get(backbone) for k, backbone in enumerate(self._choices)}
            own = {k: copy.deepcopy(space) for k, space in own.items() if space}
            return config | ({OWN: own} if own else {})
        if isinstance(parent := _read(config, self._path[:-1]), dict):
            parent.pop(self._path[-1], None)
        for path in _find_paths(self._spaces.get(key, {})):
            _write(config, path, copy.deepcopy(_read(self._spaces[key], path)))
        return config

    def _make_base(self, key: str) -> Searcher:
        base = _compat.copy_searcher(self._base, key)
        if self._space is not None and not self._brings_space:
            base.set_search_properties(self._metric, self._mode, self._find_space(key))
        if self._brings_space and key != WHOLE:
            _compat.fix_param(base, self.param_name, self._choices[key])
        return base

    def _open(self, key: str) -> Searcher | None:
        """Return a base searcher that knows the trials so far; None if it has nothing to draw."""
        if key not in self._bases:
            if not self._brings_space and not _compat.parse_spec_vars(self._find_space(key))[1]:
                return None
            self._bases[key] = self._make_base(key)
            for record in self._records.values():
                if record.state == "complete" and _are_finite(record.values):
                    self._add(key, record)
        return self._bases[key]

    def _tell(
        self, trial_id: str, old: Record, new: Record, result: dict[str, Any] | None, error: bool
    ) -> None:
        """Pass the end of a trial on: to the base searcher that proposed it, and to others."""
        asked = None
        if old.key is not None and not old.told and old.key in self._bases:
            if old.changed:  # not what it proposed: closed here, and added below
                self._bases[old.key].on_trial_complete(trial_id, result=None, error=True)
            else:
                asked = old.key
                self._bases[asked].on_trial_complete(trial_id, result=result, error=error)
        if old.state != "complete" or (old.foreign and not old.told):  # it is new
            self._share(new, asked)

    def _share(self, record: Record, asked: str | None = None) -> None:
        """Tell the base searchers of a value, but not the one that was asked for the trial."""
        if record.state == "complete" and _are_finite(record.values):
            for key in {self._find_key(record.backbone), WHOLE} & self._bases.keys() - {asked}:
                self._add(key, record)

    def _add(self, key: str, record: Record) -> None:
        """Tell a base searcher of a trial that it did not propose, if it can learn from it."""
        backbone = record.backbone
        if key not in (WHOLE, self._find_key(backbone)) or backbone not in self._choices:
            return
        params = dict(record.params)
        whole = params | {self.param_name: self._choices[backbone]}
        tries = [whole, params] if self._brings_space else [whole if key == WHOLE else params]
        values = [sign * v for sign, v in zip(self._signs, record.values, strict=True)]
        any(_compat.add_point(self._bases[key], point, values) for point in tries)

    def _hand_through(self, method: str, trial_id: str) -> None:
        record = self._records.get(trial_id)
        base = self._bases.get(record.key) if record and record.key is not None else None
        if hasattr(base, method):
            getattr(base, method)(trial_id)

    # Results --------------------------------------------------------------------------------
    @property
    def _signs(self) -> list[float]:
        modes: Any = self._mode if isinstance(self._mode, list) else [self._mode]
        return [-1.0 if mode == "min" else 1.0 for mode in modes]

    def _read_values(self, result: Mapping[str, Any]) -> tuple[float, ...]:
        """Return the metrics, higher is better; none if one is missing."""
        names: Any = self._metric if isinstance(self._metric, list) else [self._metric]
        raw = [result.get(name) for name in names]
        if any(value is None for value in raw):
            return ()
        return tuple(s * float(v) for s, v in zip(self._signs, raw, strict=True))  # type: ignore[arg-type]

    def _find_record(self, trial_id: str, result: Mapping[str, Any]) -> Record | None:
        """Return what is known of a trial; of a foreign one what its results say."""
        if trial_id in self._records:
            return self._records[trial_id]
        flat = _compat.flatten_dict(dict(result))
        choice = flat.get(f"config/{self.param_name}")
        if choice is None:
            return None
        config = {name[7:]: v for name, v in flat.items() if name.startswith("config/")}
        backbone = backbone_name(choice)
        self._records[trial_id] = Record(
            backbone,
            params=self._read_params(_compat.unflatten_dict(config), backbone),
            foreign=True,
        )
        return self._records[trial_id]

    def _read_params(self, config: dict[str, Any], backbone: str) -> dict[str, Any]:
        """Return the searched parameters but the backbone."""
        if self._brings_space:
            paths = [tuple(name.split("/")) for name in _compat.flatten_dict(config)]
        else:
            paths = [path for path, _ in _compat.parse_spec_vars(self._space or {})[1]]
            paths += _find_paths(self._spaces.get(backbone, {}))
        values = {"/".join(map(str, p)): _read(config, p) for p in paths if p != self._path}
        return {name: plain(value) for name, value in values.items() if value is not None}


class RandomSearcher(Searcher):
    """Random search over the domains of a space, by seed and count alone."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed, self._number = seed, 0
        self._space: dict[str, Any] = {}

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        """Take over the space."""
        self._metric, self._mode, self._space = metric, mode, config
        return True

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """Draw all domains."""
        rng = np.random.default_rng([self._seed, self._number])
        self._number += 1
        config = copy.deepcopy(self._space)
        for path, value in _compat.parse_spec_vars(self._space)[1]:
            while isinstance(value, _compat.Domain):  # choices may be domains
                value = value.sample(config, random_state=rng)
            _compat.assign_value(config, path, value)
        return config

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Learn nothing."""

    def save(self, checkpoint_path: str) -> None:
        """Write the count."""
        write_text(checkpoint_path, json.dumps({"seed": self._seed, "number": self._number}))

    def restore(self, checkpoint_path: str) -> None:
        """Read the count."""
        state = read_json(checkpoint_path, {"seed": object, "number": int})
        self._seed, self._number = state["seed"], state["number"]


# Nested configurations --------------------------------------------------------------------------
def _read(config: Any, path: Sequence[Any]) -> Any:
    for part in path:
        try:
            config = config[part]
        except (KeyError, IndexError, TypeError):
            return None
    return config


def _write(config: dict[str, Any], path: Sequence[Any], value: Any) -> None:
    for part in path[:-1]:
        config = config.setdefault(part, {})
    config[path[-1]] = value


def _find_paths(space: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [tuple(name.split("/")) for name in _compat.flatten_dict(dict(space))]


def _refuse_domains(config: Any) -> None:
    inner = config.values() if isinstance(config, dict) else config
    for value in inner if isinstance(config, (dict, list, tuple)) else ():
        _refuse_domains(value)
    if isinstance(config, _compat.Domain):
        raise ValueError(
            f"`param_space` must not nest domains, but a choice in it is {config!r}, which the "
            "base searcher cannot draw; use `spaces` for parameters of some backbones only."
        )


def _are_finite(values: Sequence[float]) -> bool:
    return bool(values) and all(map(math.isfinite, values))
