"""Hugging Face: the backbone in ``Trainer.hyperparameter_search(backend="optuna")``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from sfda_tune.finetuning.trainer import TrainerSpace, find_specs

__all__ = ["hp_space"]


def hp_space(
    ranking: Mapping[str, float], k: int | None = 5, *, name: str = "backbone", **other: Any
) -> TrainerSpace:
    """Return the ``hp_space`` of a Trainer: the best backbones, and arguments of the training.

    Parameters
    ----------
    ranking : Ranking or mapping of str to float
    k : int, optional
        How many backbones; None: all that could be scored.
    name : str, default "backbone"
        The parameter that holds the backbone.
    **other
        `TrainingArguments` by name: Optuna distributions, or values that stay as they are.

    Returns
    -------
    TrainerSpace
        Called with a trial it returns the values of `other`. The backbone is in ``trial.params``;
        not in what is returned, for the Trainer would look for a training argument of that name.
        ``.model_init(classes)`` makes the models.

    Raises
    ------
    ValueError
        If nothing could be scored or an argument is out of range.

    Examples
    --------
    >>> from optuna.distributions import FloatDistribution
    >>> from optuna.trial import FixedTrial
    >>> rate = FloatDistribution(1e-5, 1e-2, log=True)
    >>> space = hp_space({"vit": 3.1, "resnet": 2.5, "alexnet": 0.4}, k=2, learning_rate=rate)
    >>> trial = FixedTrial({"backbone": "vit", "learning_rate": 1e-3})
    >>> space(trial), trial.params["backbone"]
    ({'learning_rate': 0.001}, 'vit')
    """
    return _Space(find_specs(ranking, k), name, other)


class _Space(TrainerSpace):
    def __call__(self, trial: Any = None) -> dict[str, Any]:
        self.choose(trial)
        return {name: _suggest(trial, name, value) for name, value in self.other.items()}


def _suggest(trial: Any, name: str, value: Any) -> Any:
    if isinstance(value, FloatDistribution):
        return trial.suggest_float(name, value.low, value.high, step=value.step, log=value.log)
    if isinstance(value, IntDistribution):
        return trial.suggest_int(name, value.low, value.high, step=value.step, log=value.log)
    if isinstance(value, CategoricalDistribution):
        return trial.suggest_categorical(name, value.choices)
    return value
