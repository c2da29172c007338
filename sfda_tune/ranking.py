"""`rank`: from labelled images and candidate backbones to a `Ranking`, in one call."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from inspect import signature
from typing import Any

from sfda_tune.backbones import resolve_backbones
from sfda_tune.datasets import ImageDataset, open_dataset
from sfda_tune.extraction import Extraction, Map, Settings, extract, resolve_device
from sfda_tune.metrics import describe_metrics, get_metric
from sfda_tune.metrics.sfda import VARIANTS, sfda
from sfda_tune.store import FeatureStore
from sfda_tune.values import Features, MetricResult, Ranking, Score

__all__ = ["RankingInterruptedError", "rank", "score"]

logger = logging.getLogger(__name__)

Metric = str | Callable[[Any, Any], Any]


class RankingInterruptedError(KeyboardInterrupt):
    """`rank` was interrupted; what was finished is in `ranking` (and in the cache).

    A `KeyboardInterrupt`, so that a program that knows nothing of it stops as usual.
    """

    def __init__(self, ranking: Ranking) -> None:
        super().__init__(f"interrupted with {len(ranking) - len(ranking.failed)} backbones ranked")
        self.ranking = ranking


def score(features: Features, metric: Metric = "sfda", *, variant: str | None = None) -> Score:
    """Score the features of one backbone.

    Parameters
    ----------
    features : Features
    metric : str or callable, default "sfda"
        A name in `sfda_tune.metrics.METRICS`, or any ``f(x, y)`` that returns a float or a
        `MetricResult`, higher being better.
    variant : str, optional
        Of the metric ``sfda``.

    Returns
    -------
    Score
        A metric that fails gives a score with its error.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> y = np.arange(60) % 3
    >>> apart = Features(rng.normal(size=(60, 4)) + 3 * y[:, None], y, backbone="apart")
    >>> mixed = Features(rng.normal(size=(60, 4)), y, backbone="mixed")
    >>> score(apart).value > score(mixed).value
    True
    """
    _, function = _metric(metric, variant)
    started = time.perf_counter()
    try:
        result = function(features.x, features.y)
        if not isinstance(result, MetricResult):
            result = MetricResult(float(result))
    except Exception as error:
        logger.debug("%s could not be scored", features.backbone, exc_info=True)
        text = " ".join(str(error).split())
        result, problem = MetricResult(0.0), f"{type(error).__name__}: {text}"
    else:
        problem = None
    return Score(
        features.backbone,
        result.value,
        result.per_sample,
        features.n_samples,
        features.n_dims,
        result.details,
        time.perf_counter() - started,
        problem,
    )


def rank(
    dataset: Any,
    backbones: Any = "demo:*",
    *,
    metric: Metric = "sfda",
    variant: str | None = None,
    samples: int | None = None,
    seed: int = 0,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    device: str = "auto",
    precision: str = "float32",
    batch_size: int | None = None,
    workers: int | None = None,
    max_unreadable: float = 0.1,
    cache: bool | str | os.PathLike[str] | None = True,
    plugins: Iterable[str] = (),
    map_fn: Map | None = None,
    progress: Any = False,
) -> Ranking:
    """Rank backbones by how well their frozen features suit a labelled image data set.

    Every candidate runs once over the images; no network is trained.

    Parameters
    ----------
    dataset : str, path, ImageDataset, torchvision or Hugging Face data set, or (images, labels)
        See `sfda_tune.datasets.open_dataset`.
    backbones : str, Backbone, mapping, or an iterable of these, default "demo:*"
        See `sfda_tune.backbones`.
    metric, variant
        See `score`.
    samples : int, optional
        Use a stratified sample of so many images.
    seed : int, default 0
        Of that sample; nothing else is random.
    split : str, optional
        Which part of a data set that comes in parts; default: the training part.
    image_column, label_column : str, optional
        Of a table or a Hugging Face data set, where they have unusual names.
    device, precision, batch_size, workers, max_unreadable
        See `sfda_tune.extraction.Settings`.
    cache : bool or path, default True
        Where features are kept for the next run: True for `sfda_tune.store.default_root`, False
        for nowhere.
    plugins : iterable of str
        Python files or modules that register further timm architectures.
    map_fn : callable, optional
        Anything called like the builtin `map`, to run the extraction elsewhere, for instance
        ``ThreadPoolExecutor(4).map``; the ranking is the same.
    progress : bool or object, default False
        Whether to show a progress bar; or an object that takes its part (see `extract`).

    Returns
    -------
    Ranking
        Best first; failed backbones last, each with its error.

    Raises
    ------
    DatasetError, BackboneError, ValueError
        If an argument cannot be understood; before any image is read.
    RankingInterruptedError
        On Ctrl-C, with the ranking of what is finished.

    Examples
    --------
    >>> ranking = rank("digits", ["demo:*noise*", "demo:*untrained"], samples=100, cache=False)
    >>> len(ranking), ranking.info["n_samples"]
    (2, 100)
    """
    settings = Settings(device, precision, batch_size, workers, max_unreadable)
    settings = replace(settings, device=resolve_device(device))
    store = None
    if cache:
        store = FeatureStore() if cache is True else FeatureStore(cache)  # type: ignore[arg-type]
    candidates = resolve_backbones(backbones, plugins=plugins)
    label, function = _metric(metric, variant)  # which a plug-in may have registered
    images = open_dataset(
        dataset, split=split, image_column=image_column, label_column=label_column
    )
    if samples is not None:
        images = images.sample(samples, seed=seed)

    from sfda_tune.progress import as_progress

    started = time.perf_counter()
    scores: dict[str, Score] = {}
    seconds = {"load": 0.0, "decode": 0.0, "decode_work": 0.0, "forward": 0.0, "score": 0.0}
    unreadable: dict[int, str] = {}
    rows: Any = None
    interrupted = False
    with as_progress(progress) as bar:
        found = extract(images, candidates, settings, store=store, map_fn=map_fn, progress=bar)
        try:
            for extraction in found:
                for part, spent in extraction.seconds.items():
                    seconds[part] += spent
                unreadable |= extraction.unreadable
                begun = time.perf_counter()
                result = _score(extraction, function)
                seconds["score"] += time.perf_counter() - begun
                if extraction.features is not None:
                    rows = extraction.rows if rows is None else rows
                    if not _same(rows, extraction.rows):
                        result = replace(
                            result,
                            error="its images are not those of the other backbones; run "
                            "`sfda-tune cache clear` and rank again",
                        )
                scores[result.backbone] = result
                bar.finish(result)
        except KeyboardInterrupt:
            interrupted = True
            found.close()
    for backbone in candidates:
        unfinished = Score(backbone.name, error="not finished (interrupted)")
        scores.setdefault(backbone.name, unfinished)
    seconds["total"] = time.perf_counter() - started
    if unreadable:
        names = [images.item_name(row) for row in sorted(unreadable)]
        warnings.warn(
            f"{len(names)} of {len(images)} images could not be read and were left out: "
            + ", ".join(names[:5])
            + (", …" if len(names) > 5 else ""),
            stacklevel=2,
        )
    ranking = Ranking(
        tuple(scores.values()),
        label,
        None if rows is None else images.labels[rows],
        _info(images, settings, seed, samples, seconds, unreadable, rows),
    )
    if interrupted:
        raise RankingInterruptedError(ranking)
    return ranking


def _metric(metric: Metric, variant: str | None) -> tuple[str, Callable[[Any, Any], Any]]:
    """Return a metric and what it is called in the ranking."""
    function = get_metric(metric)
    name = metric if isinstance(metric, str) else getattr(metric, "__name__", "score")
    infos = {info.name: info.needs for info in describe_metrics()}
    if "features" not in infos.get(name, ("features",)):
        usable = ", ".join(key for key, needs in infos.items() if "features" in needs)
        raise ValueError(
            f"`metric` {name!r} needs {' and '.join(infos[name])}, which `rank` does not have; "
            f"choose one of {usable}, or call it yourself: sfda_tune.metrics.{name}."
        )
    if function is sfda:
        chosen = variant or signature(sfda).parameters["variant"].default
        if chosen not in VARIANTS:
            raise ValueError(f"`variant` must be one of {', '.join(VARIANTS)} but is {variant!r}.")
        return f"sfda ({chosen})", partial(sfda, variant=chosen)
    if variant is not None:
        raise ValueError(
            f"`variant` belongs to the metric 'sfda' but `metric` is {name!r} and `variant` "
            f"{variant!r}; leave it out, or pass functools.partial(your_metric, …)."
        )
    return name, function


def _score(extraction: Extraction, function: Callable[[Any, Any], Any]) -> Score:
    """Score an extraction and add to the score's details what the extraction measured."""
    name = extraction.backbone.name
    spent = sum(extraction.seconds.get(part, 0.0) for part in ("load", "decode", "forward"))
    if extraction.features is None:
        result = Score(name, error=extraction.error or "failed", seconds=spent)
    else:
        result = score(extraction.features, function)
        result = replace(result, seconds=result.seconds + spent)
    measured = {
        "spec": extraction.backbone.spec,
        "n_params": extraction.n_params,
        "input_size": extraction.input_size,
        "images_per_second": extraction.images_per_second,
        "cached": extraction.cached,
        "note": "cached" if extraction.cached else "",
    }
    return replace(result, details={**result.details, **measured})


def _same(a: Any, b: Any) -> bool:
    return len(a) == len(b) and bool((a == b).all())


def _info(
    images: ImageDataset,
    settings: Settings,
    seed: int,
    samples: int | None,
    seconds: dict[str, float],
    unreadable: dict[int, str],
    rows: Any,
) -> dict[str, Any]:
    versions = {}
    for package in ("sfda-tune", "torch", "timm", "numpy", "scipy", "pillow"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # run from a source tree
            versions[package] = "unknown"
    return {
        "dataset": images.name,
        "n_samples": len(images) if rows is None else len(rows),
        "n_classes": len(images.classes),
        "classes": list(images.classes),
        "samples": samples,
        "seed": seed,
        "device": settings.device,
        "precision": settings.precision,
        "unreadable": {images.item_name(row): why for row, why in sorted(unreadable.items())},
        "seconds": seconds,
        "versions": versions,
    }
