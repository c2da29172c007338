"""Rank pretrained image backbones on your own labelled images, before the first epoch.

>>> import sfda_tune
>>> ranking = sfda_tune.rank("digits", "demo:*", samples=200, cache=False)
>>> best = ranking.shortlist(3)

==================  =============================================================================
`rank`              images and candidates in, `Ranking` out
`search`            the whole way to the fine-tuned winner
`score`             the score of one backbone's `Features`
`open_dataset`      folders, tables, arrays, torchvision and Hugging Face data sets
`resolve_backbones` timm names and globs, hub and local checkpoints, networks of your own
`extract`           the features themselves
`select_ensemble`   which backbones to fine-tune together
`Backbone` `Features` `MetricResult` `Score` `Ranking`  the values that travel between them
==================  =============================================================================

Nothing heavy is imported until it is used: ``import sfda_tune`` loads neither torch nor timm.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfda_tune.backbones.plugins import BackboneError
    from sfda_tune.backbones.specs import resolve_backbones
    from sfda_tune.data.checks import DatasetError
    from sfda_tune.data.dataset import ImageDataset
    from sfda_tune.data.opening import open_dataset
    from sfda_tune.extraction.run import extract
    from sfda_tune.metrics.scoring import score
    from sfda_tune.pipelines.ranking import RankingInterruptedError, rank
    from sfda_tune.pipelines.search import search
    from sfda_tune.selection.ensembles import select_ensemble
    from sfda_tune.values.features import Backbone, Features, MetricResult, Score
    from sfda_tune.values.ranking import Ranking

__version__ = "0.1.0"

_HOME = {
    "Backbone": "values.features",
    "BackboneError": "backbones.plugins",
    "DatasetError": "data.checks",
    "Features": "values.features",
    "ImageDataset": "data.dataset",
    "MetricResult": "values.features",
    "Ranking": "values.ranking",
    "RankingInterruptedError": "pipelines.ranking",
    "Score": "values.features",
    "extract": "extraction.run",
    "open_dataset": "data.opening",
    "rank": "pipelines.ranking",
    "resolve_backbones": "backbones.specs",
    "score": "metrics.scoring",
    "search": "pipelines.search",
    "select_ensemble": "selection.ensembles",
}

__all__ = [
    "Backbone",
    "BackboneError",
    "DatasetError",
    "Features",
    "ImageDataset",
    "MetricResult",
    "Ranking",
    "RankingInterruptedError",
    "Score",
    "extract",
    "open_dataset",
    "rank",
    "resolve_backbones",
    "score",
    "search",
    "select_ensemble",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sfda_tune' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"sfda_tune.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
