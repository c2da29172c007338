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
`export_onnx`       the winner of a search as ONNX, with its preprocessing and a model card
`forecast`          which of them will be best after fine-tuning, and how sure that is
`select_ensemble`   which backbones to fine-tune together
`Backbone` `Features` `MetricResult` `Score` `Ranking`  the values that travel between them
==================  =============================================================================

Nothing heavy is imported until it is used: ``import sfda_tune`` loads neither torch nor timm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sfda_tune.values.lazy import hand_out

if TYPE_CHECKING:
    from sfda_tune.backbones.plugins import BackboneError
    from sfda_tune.backbones.specs import resolve_backbones
    from sfda_tune.data.checks import DatasetError
    from sfda_tune.data.dataset import ImageDataset
    from sfda_tune.data.opening import open_dataset
    from sfda_tune.extraction.run import extract
    from sfda_tune.metrics.scoring import score
    from sfda_tune.pipelines.export import export_onnx
    from sfda_tune.pipelines.ranking import RankingInterruptedError, rank
    from sfda_tune.pipelines.search import search
    from sfda_tune.selection.ensembles import select_ensemble
    from sfda_tune.selection.forecast import Forecast, forecast
    from sfda_tune.values.features import Backbone, Features, MetricResult, Score
    from sfda_tune.values.ranking import Ranking

__version__ = "0.1.0"

__all__ = [
    "Backbone", "BackboneError", "DatasetError", "Features", "Forecast", "ImageDataset",
    "MetricResult", "Ranking", "RankingInterruptedError", "Score", "export_onnx", "extract",
    "forecast", "open_dataset", "rank", "resolve_backbones", "score", "search", "select_ensemble",
]  # fmt: skip

__getattr__, __dir__ = hand_out(
    __name__,
    {
        "backbones.plugins": "BackboneError",
        "backbones.specs": "resolve_backbones",
        "data.checks": "DatasetError",
        "data.dataset": "ImageDataset",
        "data.opening": "open_dataset",
        "extraction.run": "extract",
        "metrics.scoring": "score",
        "pipelines.export": "export_onnx",
        "pipelines.ranking": "RankingInterruptedError rank",
        "pipelines.search": "search",
        "selection.ensembles": "select_ensemble",
        "selection.forecast": "Forecast forecast",
        "values.features": "Backbone Features MetricResult Score",
        "values.ranking": "Ranking",
    },
)
