"""Search spaces and resources from a ranking, for any searcher."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ray.tune import PlacementGroupFactory

from sfda_tune.selection.calibration import backbone_name, scores_by_name
from sfda_tune.selection.policy import survivors
from sfda_tune.values.ranking import Ranking
from sfda_tune.values.text import integer
from sfda_tune_ray import _compat

__all__ = ["backbone_resources", "backbone_space"]

# Bytes for fine-tuning. A parameter: itself, its gradient and two moments of Adam, float32 each.
# What is kept for the backward pass, per pixel: the most of twelve networks of timm at 224²
# (ResNet-18 440, ResNet-50 1700, ViT-B/16 2400, ConvNeXt-T 2200, DenseNet-121 2600).
PARAMETER, PIXEL = 16, 2600


def backbone_space(
    scores: Mapping[Any, float], top_k: int | None = None, *, temperature: float | None = None
) -> _compat.Categorical:
    """Return a ``tune.choice`` of the best backbones, best first.

    Parameters
    ----------
    scores : Ranking or mapping of str to float
    top_k : int, optional
        How many; default: all that could be scored.
    temperature : float > 0, optional
        Draw backbone k with P(k) ∝ exp(score_k / T). Random search obeys it; to model-based
        searchers it is a plain choice.

    Raises
    ------
    ValueError
        If nothing could be scored or an argument is out of range.

    Examples
    --------
    >>> backbone_space({"vit": 3.1, "resnet": 2.5, "alexnet": 0.4}, 2).categories
    ['vit', 'resnet']
    """
    scores = scores_by_name(scores, "scores")
    names = list(survivors(scores, None if top_k is None else integer("top_k", top_k, 1)))
    if not names:
        raise ValueError("`scores` must hold at least one scored backbone, but holds none.")
    space = _compat.Categorical(names).uniform()
    if temperature is not None:
        if not 0 < temperature < math.inf:
            raise ValueError(f"`temperature` must be a number > 0, but is {temperature!r}.")
        values = np.array([scores[name] for name in names])
        weights = np.exp((values - values.max()) / temperature)
        weighted = _compat.Weighted((weights / weights.sum()).tolist())
        space.set_sampler(weighted, allow_override=True)
    return space


def backbone_resources(
    ranking: Ranking,
    *,
    cpus: float = 1,
    gpu_memory: float | None = None,
    batch_size: int | str = 32,
    headroom: float = 1.3,
    fractions: Sequence[float] = (1, 0.5, 0.25),
    param_name: str = "backbone",
) -> Callable[[Mapping[str, Any]], PlacementGroupFactory]:
    """Return what a trial of each backbone needs, for ``tune.with_resources``.

    The smallest fraction of a GPU that holds ``headroom · (16 n_params + batch_size · A)`` bytes,
    with A = 2600 bytes per input pixel, or ``peak_memory / peak_batch`` of the score's details if
    the extraction measured it, times three for the backward pass. This is an estimate: watch the
    first trials. Ray only counts fractions; a process may take more, unless it calls
    ``torch.cuda.set_per_process_memory_fraction``.

    Parameters
    ----------
    ranking : Ranking
        With ``n_params`` and ``input_size`` in its scores' details, as `sfda_tune.rank` gives.
    cpus : float, default 1
        For every trial.
    gpu_memory : float, optional
        Bytes of one GPU. Default: no GPU is asked for.
    batch_size : int or str, default 32
        Of the fine-tuning, or the parameter that holds it.
    headroom : float ≥ 1, default 1.3
    fractions : sequence of float, default (1, 0.5, 0.25)
        What may be asked for; 1/n, as other fractions can stall. A backbone that needs more than
        the largest gets the largest.
    param_name : str, default "backbone"

    Examples
    --------
    >>> from sfda_tune.values.features import Score
    >>> details = {"n_params": 25_600_000, "input_size": (3, 224, 224)}
    >>> ranking = Ranking([Score("resnet50", 0.9, details=details)])
    >>> need = backbone_resources(ranking, cpus=2, gpu_memory=24e9)
    >>> need({"backbone": "resnet50"}).required_resources
    {'CPU': 2.0, 'GPU': 0.25}
    """
    if not (headroom >= 1 and fractions and all(0 < f <= 1 for f in fractions)):
        raise ValueError(
            "`headroom` must be ≥ 1 and `fractions` numbers in (0, 1], but they are "
            f"{headroom!r} and {fractions!r}."
        )
    details = {score.backbone: dict(score.details) for score in ranking.scores}
    sizes = sorted(fractions)

    def require(config: Mapping[str, Any]) -> PlacementGroupFactory:
        if gpu_memory is None:
            return PlacementGroupFactory([{"CPU": cpus}])
        flat = _compat.flatten_dict(dict(config))
        known = details.get(backbone_name(flat.get(param_name)), {})
        batch = int(flat[batch_size] if isinstance(batch_size, str) else batch_size)
        pixels = math.prod(list(known.get("input_size") or (3, 224, 224))[-2:])
        image = PIXEL * pixels
        if known.get("peak_memory") and known.get("peak_batch"):
            image = 3 * known["peak_memory"] / known["peak_batch"]
        need = headroom * (PARAMETER * (known.get("n_params") or 1e8) + batch * image)
        fitting = [f for f in sizes if need <= f * gpu_memory]
        share = fitting[0] if fitting else sizes[-1]
        return PlacementGroupFactory([{"CPU": cpus, "GPU": share}])

    return require
