"""Callbacks for ``study.optimize(..., callbacks=[...])``."""

from __future__ import annotations

import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial

from sfda_tune.selection.calibration import Calibration
from sfda_tune.values.text import integer
from sfda_tune_optuna.store import load_ranking
from sfda_tune_optuna.study import calibrate_study, summarise

__all__ = ["CalibrationCallback"]

_logger = optuna.logging.get_logger(f"optuna.{__name__}")


class CalibrationCallback:
    """Say every few trials what the scores are worth here.

    Parameters
    ----------
    every : int, default 5
        Trials between two reports.
    dashboard : bool, default False
        Whether to refresh what `publish_to_dashboard` shows.

    Attributes
    ----------
    calibration : Calibration or None
        The latest one.

    Examples
    --------
    >>> import optuna
    >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
    >>> from sfda_tune_optuna import SFDASampler
    >>> scores = {"vit": 3.1, "resnet": 2.5, "alexnet": 0.4}
    >>> study = optuna.create_study(direction="maximize", sampler=SFDASampler(scores, seed=0))
    >>> callback = CalibrationCallback(every=6)
    >>> study.optimize(
    ...     lambda trial: scores[trial.suggest_categorical("backbone", sorted(scores))],
    ...     n_trials=6, callbacks=[callback],
    ... )
    >>> callback.calibration.n_trials
    6
    """

    def __init__(self, every: int = 5, dashboard: bool = False) -> None:
        self.every = integer("every", every, 1)
        self.dashboard = dashboard
        self.calibration: Calibration | None = None

    def __call__(self, study: Study, trial: FrozenTrial) -> None:
        """Report, if it is time."""
        if self.calibration is None:
            load_ranking(study)  # that there is none is said at once, not after hours
        if (trial.number + 1) % self.every:
            return
        self.calibration = calibrate_study(study)
        _logger.info(f"Calibration after trial {trial.number}: {summarise(self.calibration)}")
        if self.dashboard:
            from sfda_tune_optuna.dashboard import publish_to_dashboard

            publish_to_dashboard(study)
