"""What one does with a study and a ranking: suggest, enqueue, extend, calibrate."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.study import Study
from optuna.trial import TrialState

from sfda_tune.selection import calibration
from sfda_tune.selection import policy as decisions
from sfda_tune.selection.calibration import Calibration, scores_by_name
from sfda_tune.values.features import Score
from sfda_tune.values.ranking import Ranking
from sfda_tune.values.text import integer
from sfda_tune_optuna import _compat
from sfda_tune_optuna.history import find_choices, list_scored, observe
from sfda_tune_optuna.store import load_ranking, load_record, save_ranking

__all__ = ["calibrate_study", "enqueue_top_k", "extend_backbones", "suggest_backbone"]


def suggest_backbone(trial: Any, scores: Mapping[Any, float], name: str = "backbone") -> str:
    """Suggest the backbone of a trial; works with every sampler.

    The choices are all backbones that could be scored, by name: Optuna forbids other choices in
    later trials, so a shortlist belongs into the sampler or the pruner, never here.

    Parameters
    ----------
    trial : optuna.Trial
    scores : Ranking or mapping of str to float
    name : str, default "backbone"
        Name of the parameter.

    Raises
    ------
    ValueError
        If the study was begun with other backbones; `extend_backbones` is the way out.

    Examples
    --------
    >>> import optuna
    >>> trial = optuna.trial.FixedTrial({"backbone": "vit"})
    >>> suggest_backbone(trial, {"vit": 3.1, "resnet": 2.5})
    'vit'
    """
    choices = list_scored(scores)
    if not choices:
        raise ValueError("`scores` must hold at least one scored backbone but holds none.")
    try:
        return trial.suggest_categorical(name, choices)
    except ValueError as error:
        if "dynamic value space" not in str(error):
            raise
        raise ValueError(
            f"`scores` must hold the backbones that the study's {name!r} was begun with but "
            f"holds {len(choices)} others or fewer; copy the study with "
            "`extend_backbones(study, new, study_name=...)`."
        ) from error


def enqueue_top_k(
    study: Study,
    scores: Mapping[Any, float],
    k: int = 3,
    *,
    param_name: str = "backbone",
    params: Mapping[str, Any] | None = None,
    skip_if_exists: bool = True,
) -> list[str]:
    """Let the next trials try the `k` best backbones first; works with every sampler.

    Parameters
    ----------
    study : Study
    scores : Ranking or mapping of str to float
    k : int, default 3
    param_name : str, default "backbone"
    params : mapping, optional
        Values of further parameters; those not named are drawn by the study's sampler.
    skip_if_exists : bool, default True
        Whether to leave out what was enqueued or tried with just these parameters.

    Returns
    -------
    list of str
        The backbones that were enqueued.

    Examples
    --------
    >>> import optuna
    >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
    >>> study = optuna.create_study()
    >>> enqueue_top_k(study, {"vit": 3.1, "resnet": 2.5, "alexnet": 0.4}, k=2)
    ['vit', 'resnet']
    >>> enqueue_top_k(study, {"vit": 3.1, "resnet": 2.5, "alexnet": 0.4}, k=2)
    []
    """
    enqueued = []
    for name in decisions.survivors(scores_by_name(scores, "scores"), integer("k", k, 1)):
        before = len(study.get_trials(deepcopy=False))
        study.enqueue_trial({param_name: name, **(params or {})}, skip_if_exists=skip_if_exists)
        if len(study.get_trials(deepcopy=False)) > before:
            enqueued.append(name)
    return enqueued


def extend_backbones(
    study: Study,
    new: Mapping[str, float] | Collection[str],
    *,
    study_name: str,
    storage: Any = None,
    param_name: str | None = None,
) -> Study:
    """Copy a study to one that may also choose new backbones.

    Optuna cannot change the choices of a study. All trials but the running ones are copied, with
    values, states, attributes and intermediate values, and so is the saved ranking.

    Parameters
    ----------
    study : Study
    new : Ranking, mapping of str to float, or collection of str
        The new backbones, best with their scores.
    study_name : str
        Name of the copy.
    storage : str or storage, optional
        Where the copy goes. Default: the storage of `study`.
    param_name : str, optional
        Default: as saved with the ranking, or "backbone".

    Returns
    -------
    Study
        Give it a sampler: ``SFDASampler.from_study(copy)``.

    Raises
    ------
    ValueError
        If `new` are no names, or its scores cannot stand beside the saved ones: those of another
        metric, or a forecast, which is relative to its candidates, without all of the old ones.

    Examples
    --------
    >>> import optuna
    >>> study = optuna.create_study()
    >>> _ = study.ask({"backbone": optuna.distributions.CategoricalDistribution(["resnet"])})
    >>> _ = study.tell(0, 0.3)
    >>> extended = extend_backbones(study, ["vit"], study_name="with vit")
    >>> extended.trials[0].distributions["backbone"].choices
    ('resnet', 'vit')
    """
    param_name = param_name or find_param_name(study)
    trials = study.get_trials(deepcopy=False)
    choices = {*(find_choices(trials, param_name) or ()), *new}
    if isinstance(new, str) or not all(isinstance(name, str) for name in choices):
        raise ValueError(f"`new` must be names of backbones but is {new!r}; pass [{new!r}].")
    record, merged = load_record(study), None
    if record is not None and isinstance(new, Mapping):
        merged = _merge(load_ranking(study), new)
    distribution = CategoricalDistribution(sorted(choices))
    extended = optuna.create_study(
        study_name=study_name,
        storage=_compat.find_storage(study) if storage is None else storage,
        directions=study.directions,
    )
    for key, value in study.user_attrs.items():
        extended.set_user_attr(key, value)
    _compat.copy_metric_names(study, extended)
    for trial in trials:
        if trial.state != TrialState.RUNNING:
            trial = copy.deepcopy(trial)
            if param_name in trial.params:
                trial.distributions = {**trial.distributions, param_name: distribution}
            extended.add_trial(trial)
    if record is not None and merged is not None:
        save_ranking(extended, merged, settings=record["settings"])
    return extended


def calibrate_study(
    study: Study, ranking: Mapping[Any, float] | None = None, *, param_name: str | None = None
) -> Calibration:
    """Compare a ranking, by default the saved one, with the trials of a study."""
    ranking = load_ranking(study) if ranking is None else ranking
    name = param_name or find_param_name(study)
    history = observe(study, study.get_trials(deepcopy=False), name)
    return calibration.calibrate(scores_by_name(ranking), history)


def summarise(calibration: Calibration) -> str:
    """Return one line on what the scores are worth, and the warning if there is one."""
    line = str(calibration).splitlines()[0]
    return line if calibration.warning is None else f"{line}; {calibration.warning}"


def find_param_name(study: Study) -> str:
    """Return the name of the parameter that holds the backbone: as saved, or "backbone"."""
    return (load_record(study) or {}).get("settings", {}).get("param_name", "backbone")


def _merge(old: Ranking, new: Mapping[str, float]) -> Ranking:
    metric = new.metric if isinstance(new, Ranking) else old.metric
    is_relative = metric.startswith("forecast") and not {*old} <= {*new}
    if old.metric and (metric != old.metric or is_relative):
        raise ValueError(
            f"`new` must be scored as the study's ranking is, by {old.metric!r}, but is by "
            f"{metric!r}"
            + (", which is relative to its candidates" if is_relative else "")
            + "; rank all backbones together, the study's own, too."
        )
    added = (
        new.scores
        if isinstance(new, Ranking)
        else tuple(Score(name, float(value)) for name, value in new.items())
    )
    kept = tuple(score for score in old.scores if score.backbone not in new)
    return Ranking((*kept, *added), old.metric, info=old.info)
