"""sfda_tune on Ray: extraction over actors, and a Tune searcher, schedulers and search spaces.

>>> from sfda_tune_ray import SFDASearcher, backbone_space

=============================  ==================================================================
`RayExecutor`                  the extraction of `sfda_tune.rank` over actors
`SFDASearcher`                 the backbone by its score and the trials, the rest by any searcher
`SFDAScheduler`                trials of other backbones never start
`PerBackboneScheduler`         slow starters are not stopped by small, fast networks
`SchedulerStateCallback`       keeps the state of a scheduler over ``Tuner.restore``
`finetune_trainable`           `sfda_tune.finetuning.run.finetune`, reporting every epoch
`hp_space`                     Hugging Face's ``Trainer.hyperparameter_search`` over the best
`backbone_space`               a ``tune.choice`` of the best, for any searcher
`backbone_resources`           what a trial of each needs, for ``tune.with_resources``
=============================  ==================================================================
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from sfda_tune.values.lazy import hand_out

if importlib.util.find_spec("ray") is None:
    raise ModuleNotFoundError("sfda_tune_ray needs Ray: pip install 'sfda-tune[ray]'", name="ray")

if TYPE_CHECKING:
    from sfda_tune_ray.callbacks import SchedulerStateCallback
    from sfda_tune_ray.executor import RayExecutor
    from sfda_tune_ray.schedulers import PerBackboneScheduler, SFDAScheduler
    from sfda_tune_ray.searcher import SFDASearcher
    from sfda_tune_ray.spaces import backbone_resources, backbone_space
    from sfda_tune_ray.trainable import finetune_trainable
    from sfda_tune_ray.trainer import hp_space

__all__ = [
    "PerBackboneScheduler", "RayExecutor", "SFDAScheduler", "SFDASearcher",
    "SchedulerStateCallback", "backbone_resources", "backbone_space", "finetune_trainable",
    "hp_space",
]  # fmt: skip

# Imported when used: extraction needs no Tune, and Ray reads its environment when it is imported.
__getattr__, __dir__ = hand_out(
    __name__,
    {
        "callbacks": "SchedulerStateCallback",
        "executor": "RayExecutor",
        "schedulers": "PerBackboneScheduler SFDAScheduler",
        "searcher": "SFDASearcher",
        "spaces": "backbone_resources backbone_space",
        "trainable": "finetune_trainable",
        "trainer": "hp_space",
    },
)
