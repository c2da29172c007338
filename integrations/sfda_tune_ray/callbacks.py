"""What Tune forgets: the state of schedulers, and why a trial failed."""

from __future__ import annotations

import logging
from typing import Any

from ray.tune import Callback
from ray.tune.schedulers import TrialScheduler

from sfda_tune_ray import _compat
from sfda_tune_ray.searcher import SFDASearcher

__all__ = ["SchedulerStateCallback"]

_logger = logging.getLogger(__name__)


class SchedulerStateCallback(Callback):
    """Keep a scheduler's state over ``Tuner.restore``, and tell a searcher why trials fail.

    Tune saves the state of callbacks but not of schedulers: without, the rungs of ASHA are empty
    after a restart. Belongs into ``RunConfig.callbacks`` of the same ``Tuner``, with the very
    objects that its ``TuneConfig`` has.

    Parameters
    ----------
    scheduler : TrialScheduler, optional
        ASHA, FIFO, `SFDAScheduler` or `PerBackboneScheduler` of these. HyperBand and the median
        rule cannot be saved: they begin anew, and a warning says so.
    searcher : SFDASearcher, optional
        Is told which errors are not the backbone's fault (its machine or process died).

    Examples
    --------
    >>> from ray.tune.schedulers import ASHAScheduler
    >>> scheduler = ASHAScheduler(max_t=4)
    >>> sorted(SchedulerStateCallback(scheduler).get_state())
    ['bracket', 'rungs', 'stopped']
    """

    def __init__(
        self, scheduler: TrialScheduler | None = None, searcher: SFDASearcher | None = None
    ) -> None:
        if scheduler is not None:
            _compat.check_base_scheduler(scheduler)
        if searcher is not None and not isinstance(searcher, SFDASearcher):
            raise ValueError(
                f"`searcher` must be an SFDASearcher without its wrappers, but is {searcher!r}."
            )
        self.scheduler, self.searcher = scheduler, searcher

    def setup(self, *args: Any, **info: Any) -> None:
        """Warn if there is a scheduler that cannot be saved."""
        if self.scheduler is not None and _compat.read_scheduler(self.scheduler) is None:
            name = type(self.scheduler).__name__
            _logger.warning(f"The state of {name} is not saved; after a restore it begins anew.")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tell the searcher."""
        if self.searcher is not None:
            config = _compat.flatten_dict(trial.config)
            backbone = config.get(self.searcher.param_name)
            if backbone is not None:
                lost = _compat.is_lost(trial)
                self.searcher.explain_error(trial.trial_id, backbone, lost=lost)

    def get_state(self) -> dict[str, Any] | None:
        """Return the scheduler's state as plain data; Tune writes it."""
        return None if self.scheduler is None else _compat.read_scheduler(self.scheduler)

    def set_state(self, state: dict[str, Any]) -> None:
        """Give the scheduler its state back, before the trials are added again."""
        if self.scheduler is not None:
            _compat.write_scheduler(self.scheduler, state)
