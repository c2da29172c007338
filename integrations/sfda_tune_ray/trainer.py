"""Hugging Face: the backbone in ``Trainer.hyperparameter_search(backend="ray")``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sfda_tune.finetuning.trainer import TrainerSpace, find_specs
from sfda_tune_ray.spaces import backbone_space

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
        The parameter that holds the backbone. It is no training argument, of which the Trainer
        warns in the log.
    **other
        `TrainingArguments` by name: domains of Ray Tune, or values that stay as they are.

    Returns
    -------
    TrainerSpace
        Called it returns the configuration of ``tune.run``; ``.model_init(classes)`` makes the
        models.

    Raises
    ------
    ValueError
        If nothing could be scored or an argument is out of range.

    Examples
    --------
    >>> from ray import tune
    >>> rate = tune.loguniform(1e-5, 1e-2)
    >>> space = hp_space({"vit": 3.1, "resnet": 2.5, "alexnet": 0.4}, k=2, learning_rate=rate)
    >>> space()["backbone"].categories, space.choose({"backbone": "vit"})
    (['vit', 'resnet'], 'vit')
    """
    return _Space(find_specs(ranking, k), name, other)


class _Space(TrainerSpace):
    def __call__(self, trial: Any = None) -> dict[str, Any]:
        best_first = {backbone: -float(place) for place, backbone in enumerate(self.specs)}
        return {self.name: backbone_space(best_first), **self.other}
