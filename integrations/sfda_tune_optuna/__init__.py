"""Optuna studies that choose the backbone by its score and learn from the trials.

>>> from sfda_tune_optuna import SFDAPruner, SFDASampler

==========================  ====================================================================
`SFDASampler`               the backbone by its score and the trials, the rest by any sampler
`SFDAPruner` `gate`         stop trials of other backbones before their first epoch
`suggest_backbone`          the backbone of a trial, with choices that never change
`enqueue_top_k`             try the best k first, under any sampler
`calibrate_study`           what the scores of a study have been worth, under any sampler
`save_ranking` `load_ranking` `extend_backbones`   rankings kept in studies
`CalibrationCallback`       say every few trials what the scores are worth
`hp_space`                  Hugging Face's ``Trainer.hyperparameter_search`` over the best
`plot_backbone_ranking` `plot_proxy_calibration`   plotly; twins in `plots.matplotlib`
`publish_to_dashboard`      ranking, calibration and a note in optuna-dashboard
`BackboneSelectionProblem`  a benchmark over a table of fine-tuning runs (needs optunahub)
==========================  ====================================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING

try:
    import optuna  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "optuna":  # a broken installation is not a missing one
        raise
    raise ModuleNotFoundError(
        "sfda_tune_optuna needs Optuna: pip install 'sfda-tune[optuna]'", name="optuna"
    ) from error

from sfda_tune.values.lazy import hand_out
from sfda_tune_optuna.callbacks import CalibrationCallback
from sfda_tune_optuna.pruner import SFDAPruner, gate
from sfda_tune_optuna.sampler import SFDASampler
from sfda_tune_optuna.store import SFDAWarning, load_ranking, save_ranking
from sfda_tune_optuna.study import (
    calibrate_study,
    enqueue_top_k,
    extend_backbones,
    suggest_backbone,
)
from sfda_tune_optuna.trainer import hp_space

if TYPE_CHECKING:
    from sfda_tune_optuna.benchmark import BackboneSelectionProblem
    from sfda_tune_optuna.dashboard import publish_to_dashboard
    from sfda_tune_optuna.plots import plot_backbone_ranking, plot_proxy_calibration

__all__ = [
    "BackboneSelectionProblem", "CalibrationCallback", "SFDAPruner", "SFDASampler", "SFDAWarning",
    "calibrate_study", "enqueue_top_k", "extend_backbones", "gate", "hp_space", "load_ranking",
    "plot_backbone_ranking", "plot_proxy_calibration", "publish_to_dashboard", "save_ranking",
    "suggest_backbone",
]  # fmt: skip

# They need plotly, optuna-dashboard or optunahub, which a worker does not.
__getattr__, __dir__ = hand_out(
    __name__,
    {
        "benchmark": "BackboneSelectionProblem",
        "dashboard": "publish_to_dashboard",
        "plots": "plot_backbone_ranking plot_proxy_calibration",
    },
)
