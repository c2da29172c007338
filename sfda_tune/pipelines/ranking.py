"""`rank`: from labelled images and candidate backbones to a `Ranking`, in one call."""

from __future__ import annotations

import logging
import math
import numbers
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import numpy as np

from sfda_tune.backbones.devices import check_device, resolve_device
from sfda_tune.backbones.loading import find_license, measure_cost
from sfda_tune.backbones.plugins import load_plugin
from sfda_tune.backbones.specs import resolve_backbones
from sfda_tune.data.checks import DatasetError, absolute
from sfda_tune.data.copies import CopiesWarning, Twins, find_alike, find_twins, group_twins
from sfda_tune.data.dataset import ImageDataset
from sfda_tune.data.decoding import UNREADABLE, Passing
from sfda_tune.data.formats import list_bands
from sfda_tune.data.groups import check_classes, describe_groups, describe_options
from sfda_tune.data.labels import list_levels
from sfda_tune.data.near import Near, describe_near, find_near, with_near
from sfda_tune.data.opening import check_form, open_dataset, settle_task
from sfda_tune.extraction.fetching import Fetcher
from sfda_tune.extraction.run import extract_within, is_pending
from sfda_tune.extraction.settings import Extraction, Map, Settings
from sfda_tune.extraction.store import FeatureStore, open_cache
from sfda_tune.extraction.worker import Executor, OnDemand
from sfda_tune.metrics.priors import Facts, look_up_facts
from sfda_tune.metrics.scoring import Metric, Scorer, default_metric
from sfda_tune.pipelines.budget import Pace, RankingWatch, parse_budget, parse_weights_disk
from sfda_tune.pipelines.noting import NotingScorer
from sfda_tune.selection.diagnostics import find_leak, tell_copies, tell_near
from sfda_tune.selection.ensembles import select_ensemble
from sfda_tune.selection.forecast import (
    MODES,
    find_promise,
    is_known,
    order_by_forecast,
    simulate_forecast,
)
from sfda_tune.selection.images import judge_images
from sfda_tune.selection.racing import Judge, RaceConfig, RaceResult, make_rungs, run
from sfda_tune.values.features import Backbone, Score
from sfda_tune.values.ranking import Ranking
from sfda_tune.values.text import LARGEST_SEED, as_tuple, integer, require, some

__all__ = ["Prepared", "RankingInterruptedError", "prepare", "rank"]

logger = logging.getLogger(__name__)

TOP = 5
N_HARD = 24  # images that a ranking names as the hardest
SLICE = 0.15  # of the time that is left: candidates that are extracted together
PAYS = 1.5  # a race looks at so many times as many backbones, or there is none
PRICING = 0.1  # of a budget, at most: to see how large networks are that no table has
PARTS = ("load", "decode", "decode_work", "forward", "copy", "score")  # of the seconds
PER_IMAGE = ("decode", "forward", "copy", "score")  # of them; the rest is to open networks


class RankingInterruptedError(KeyboardInterrupt):
    """`rank` was interrupted; what was finished is in `ranking` (and in the cache, if any).

    A `KeyboardInterrupt`, so that a program that knows nothing of it stops as usual.
    """

    def __init__(self, ranking: Ranking) -> None:
        super().__init__(f"interrupted with {len(ranking) - len(ranking.failed)} backbones ranked")
        self.ranking = ranking


def rank(
    dataset: Any,
    backbones: Any = "demo:*",
    *,
    metric: Metric | None = None,
    variant: str | None = None,
    train: str | None = None,
    samples: int | None = None,
    seed: int = 0,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    groups: Any = None,
    split_column: str | None = None,
    device: str = "auto",
    precision: str = "float32",
    batch_size: int | None = None,
    workers: int | None = None,
    max_unreadable: float = 0.1,
    cache: bool | str | os.PathLike[str] | None = True,
    plugins: Iterable[str] = (),
    map_fn: Map | None = None,
    executor: Executor | None = None,
    progress: Any = None,
    race: bool | None = None,
    top: int | None = None,
    budget: str | float | None = None,
    ensemble: int | None = None,
    weights_disk: str | int | None = None,
    task: str | None = None,
    label_columns: str | Sequence[str] | None = None,
    label_delimiter: str | None = None,
    levels: str | Sequence[Any] | None = None,
    bit_depth: str | int | None = None,
    bands: str | Sequence[int] | None = None,
    threads: int | None = None,
) -> Ranking:
    """Rank backbones by what training on a labelled image data set will make of them.

    Every candidate runs once over the images; no network is trained. The score of its frozen
    features and what is known of the network make the forecast (`sfda_tune.selection.forecast`).

    Parameters
    ----------
    dataset : str, path, ImageDataset, torchvision or Hugging Face data set, or (images, labels)
        See `sfda_tune.data.opening.open_dataset`.
    backbones : str, Backbone, mapping, or an iterable of these, default "demo:*"
        See `sfda_tune.backbones.specs`.
    metric, variant
        "forecast", by default ("sfda", if a `variant` is named); or what `score` takes, to rank
        by that score alone; or several names, as ``"sfda + imagenet"`` or ``"2*sfda + knn"``: the
        weighted mean of their ranks over the backbones. ``imagenet`` and ``params`` are priors.
    train : {"full", "head"}, optional
        What the forecast is of: the fine-tuning of all weights (default), or a head on frozen
        features.
    samples : int, optional
        Use a stratified sample of so many images.
    seed : int, default 0
        Of that sample; nothing else is random.
    split : str, optional
        Which part of a data set that comes in parts; default: the training part.
    image_column, label_column : str, optional
        Of a table or a Hugging Face data set, where they have unusual names.
    groups : sequence, str, re.Pattern or callable, optional
        Which images belong together, such as the frames of one video, see `open_dataset`. Scores
        that leave images out (``sfda`` with the variant ``loo``, ``knn``, ``linear_probe``, your
        own with a parameter ``groups``) then leave out whole groups, and intervals and
        probabilities are those of groups; ``info["groups"]`` counts them, and
        ``details["value_without_groups"]`` has the score that ignores them. The notes name
        metrics that know no groups.
    split_column : str, optional
        Column that says which part a row is of, where it has an unusual name.
    device, precision, batch_size, workers, max_unreadable, threads
        See `sfda_tune.extraction.settings.Settings`.
    cache : bool or path, default True
        Where features are kept for the next run: True for
        `sfda_tune.extraction.store.default_root`, False for nowhere; a folder, or a bucket
        (``"s3://…"``, by fsspec).
    plugins : iterable of str
        Python files or modules that register further timm architectures.
    map_fn : callable, optional
        Anything called like the builtin `map`, to run the extraction elsewhere, for instance
        ``ThreadPoolExecutor(4).map``; the ranking is the same.
    executor : Executor, optional
        Runs the extraction elsewhere and plans it itself, for instance
        ``sfda_tune_ray.RayExecutor()``; needs a `cache` that all its machines reach.
        ``info["executor"]`` has what it reports.
    progress : bool or object, optional
        Whether to show a progress bar (by default in notebooks only); or an object that takes its
        part (see `extract`).
    race : bool, optional
        Show few images to all backbones and more only to those that still have a chance to be in
        the `top`, see `sfda_tune.selection.racing`: the same top as without, with probability .95.
        By default only where a `budget` does not suffice for all images and backbones, and the
        metric is a mean over images.
    top : int, optional
        How many backbones a race is to find; 5 by default.
    budget : str or float, optional
        A time such as "10m", or seconds, from the first image on: the most promising candidates
        for their price come first (by what is known of them before). Where it does not suffice
        for all, they race: as many as possible see few images, the best of them ever more; those
        that no image was shown to are ranked by what is known, and ``info["not_looked_at"]`` names
        them. With a `cache` a later call goes on from there. What is done in time depends on the
        machine. A `map_fn` is stopped only when a unit is done, which is one backbone.
    ensemble : int, optional
        Also choose so many backbones to fine-tune together, see `sfda_tune.select_ensemble`;
        ``info["ensemble"]`` has them. All features are then held in memory.
    weights_disk : str or int, optional
        How much of the disk may be taken at a time by weights that this call downloads, such as
        "50GB" (or bytes): what was used makes room for the next, and at the end all of it is
        removed. What was here before stays. With an `executor` so much of each machine, in equal
        parts for its actors; the end is that of the executor. Not for a `map_fn`.
    task : {"auto", "classification", "regression", "ordinal", "multilabel"}, optional
        What labels are: classes, numbers to predict, levels in an order, or several per image; see
        `open_dataset`.
        For "regression" the score is ``ridge``, the R² of leave-one-out ridge regression; ``knn``,
        ``linear_probe`` and ``logme`` have a form for numbers, too
        (`sfda_tune.metrics.regression`). The forecast
        takes the score for evidence, as it does for classes: it was fitted to classification
        only. ``info["target"]`` describes the numbers. For "ordinal" it is the same ridge
        regression of the levels as 0 … C − 1, and the value is the rank correlation (Spearman's ρ)
        of its leave-one-out predictions with the levels; ``info["level_counts"]`` counts them. For
        "multilabel" the score is leave-one-out SFDA of each label, averaged
        (`sfda_tune.metrics.multilabel`, which has forms of ``knn``, ``linear_probe`` and
        ``logme``, too), and the forecast takes it for evidence in the same way;
        ``info["label_counts"]`` counts the labels, and `sfda_tune.selection.labels` says which of
        them separate badly. No `ensemble` for any of these.
    label_columns, label_delimiter : optional
        Where a table has several labels per image, see `open_dataset`.
    levels : str or sequence, optional
        All levels from the lowest to the highest, where their names do not say it; means
        "ordinal".
    bit_depth, bands : optional
        How deep pixels and images of other than three bands become RGB, or networks are adapted
        to these, see `open_dataset`. ``info["channels"]`` says to how many.

    Returns
    -------
    Ranking
        Best first; failed backbones last, each with its error. A backbone that left a race has
        its score on the images it saw, plus the median gain of those that finished (at most the
        lowest of theirs, where the race was by score); ``info["race"]`` has the stages and the
        forward passes saved.

    Raises
    ------
    DatasetError, BackboneError, ValueError
        If an argument cannot be understood; before any image is read.
    RankingInterruptedError
        On Ctrl-C, with the ranking of what is finished; a race ends as it does when a budget is
        over.

    Examples
    --------
    >>> ranking = rank("digits", ["demo:*noise*", "demo:*untrained"], samples=100, cache=False)
    >>> len(ranking), ranking.info["n_samples"]
    (2, 100)
    """
    from sfda_tune.pipelines.progress import as_progress, check_progress

    check_progress(progress)
    arguments = _record_arguments(
        dataset, backbones=_name_backbones(backbones), metric=metric, variant=variant,
        train=train, samples=samples, seed=seed or None,
        split=split, image_column=image_column, label_column=label_column,
        device=None if device == "auto" else device,
        precision=None if precision == "float32" else precision,
        max_unreadable=None if max_unreadable == 0.1 else max_unreadable,
        plugins=(plugins := [*as_tuple("plugins", plugins)]) or None,
        race=race, top=top, budget=budget,
        ensemble=ensemble, split_column=split_column, task=task, bit_depth=bit_depth,
        label_delimiter=label_delimiter, levels=list_levels(levels),
        label_columns=label_columns if isinstance(label_columns, str | None) else [*label_columns],
        bands=list_bands(bands), cache=None if cache else False, **describe_options(groups),
    )  # fmt: skip
    (
        settings, store, scorer, forecasts, seconds, limit, may_race, top, ensemble, candidates,
        whole, codes, twins, images, digests,
    ) = prepare(
        dataset, backbones, metric=metric, variant=variant, train=train, samples=samples,
        seed=seed, split=split, image_column=image_column, label_column=label_column,
        groups=groups, split_column=split_column, device=device, precision=precision,
        batch_size=batch_size, workers=workers, max_unreadable=max_unreadable, cache=cache,
        plugins=plugins, map_fn=map_fn, executor=executor, race=race, top=top, budget=budget,
        ensemble=ensemble, weights_disk=weights_disk, task=task, label_columns=label_columns,
        label_delimiter=label_delimiter, levels=levels, bit_depth=bit_depth, bands=bands,
        threads=threads,
    )  # fmt: skip
    near = find_near(images, store, [digests[row] for row in twins.kept])
    if near is not None and near.equal:
        images, twins, near = _leave_out_equal(whole, codes, twins, near)
    if not callable(metric):
        _require_pair(images)
    images = with_near(images, near.pairs if near else [])

    if seconds is not None:
        import timm  # noqa: F401 - takes seconds, which are no network's price

    started = time.perf_counter()
    result, facts, why = None, None, "interrupted"
    demand = None if executor is None else OnDemand(executor)
    with (
        demand or nullcontext(),
        as_progress(progress) as bar,
        Fetcher(limit, getattr(bar, "fetch", None)) as fetcher,
    ):
        copies = _Copies(whole, codes, twins)
        run = _RankingRun(
            images, candidates, settings, store, map_fn, demand, scorer, copies, fetcher,
            [digests[row] for row in twins.kept], ensemble is not None,
        )  # fmt: skip
        try:
            pace, order = None, []
            if seconds is not None:
                facts, end = find_candidate_facts(candidates), started + PRICING * seconds
                sized = facts if is_known(facts) else measure_sizes(candidates, facts, end)
                prices = find_prices(sized)
                order = order_by_promise(facts, prices)
                pace = Pace(seconds - (time.perf_counter() - started), prices)
            if race or (may_race and len(candidates) > 1):
                judge = None
                if forecasts:
                    facts = facts or find_candidate_facts(candidates)
                    judge = partial(simulate_forecast, facts=facts, train=train or "full")
                result = run.race(RaceConfig(top, seed=seed), bar, judge, pace, order, bool(race))
            elif pace is not None:
                run.measure_within(pace, order, bar, None if ensemble is None else run.seen)
            else:
                run.measure(candidates, None, bar, None if ensemble is None else run.seen)
            if pace is not None and not run.interrupted:
                how = "did not suffice for it" if pace.room > 0 else "were over"
                why = f"the {seconds:g} s {how}"
        except KeyboardInterrupt:
            run.interrupted = True
            run.scores = run.finished()
        report = None if demand is None else demand.report()
    specs = {b.name: b.spec for b in candidates if b.name not in run.scores}
    unseen = list(specs)
    run.scores |= {
        name: Score(name, error=f"not looked at: {why}", details={"spec": spec})
        for name, spec in specs.items()
    }
    run.seconds["total"] = time.perf_counter() - started
    if run.unreadable:
        names = [images.item_name(row) for row in sorted(run.unreadable)]
        passing = [why for why in run.unreadable.values() if isinstance(why, Passing)]
        text = f"{len(names)} of {len(images)} images could not be read and were left out: "
        text += some(names)
        if passing:
            text += f"; {len(passing)} for a reason that may pass ({passing[0]}): the next run "
            text += "reads them again"
        warnings.warn(text, stacklevel=2)
    copies = run.copies.twins.describe(whole)
    if said := tell_copies(copies):
        warnings.warn("; ".join(said) + ".", CopiesWarning, stacklevel=2)
    info = run.info(samples, seed) | copies | {"arguments": arguments}
    info |= describe_near(images, near and near.pairs)
    if said := tell_near(info):
        warnings.warn(f"{said}.", CopiesWarning, stacklevel=2)
    if unseen:
        info["not_looked_at"] = unseen
    if report is not None:
        info["executor"] = report
    rungs = () if result is None else result.rungs
    if result is not None and rungs and (race or [r["images"] for r in rungs] != [len(images)]):
        info["race"] = {
            "top": top,
            "stages": list(result.rungs),
            "forward_passes": result.n_forward,
            "full_run": result.n_full,
            "images": len(images),
            "late": sorted(name for name, out in result.dropped.items() if out.get("late")),
            "interrupted": run.interrupted,
        }
    if facts is None and not run.interrupted:
        facts = find_candidate_facts(candidates)
    if facts is not None:
        known = [b for b in candidates if b.name in unseen or run.scores[b.name].error is None]
        add_sizes(run.scores, known, facts)
    add_licenses(run.scores, candidates)
    ranking = Ranking(
        tuple(scorer.combine(list(run.scores.values()))),
        scorer.label,
        None if run.rows is None else find_strata(images)[run.rows],
        info,
        None if run.rows is None else run.find_groups(run.rows),
    )
    if run.rows is not None and (hard := name_hard_images(ranking, images, run.rows)):
        ranking = replace(ranking, info={**ranking.info, "hard_images": hard})
    if drops := find_leak(ranking.scores):
        drop = float(np.median(list(drops.values())))
        with_drop = {**ranking.info["groups"], "drop": drop}
        ranking = replace(ranking, info={**ranking.info, "groups": with_drop})
    if forecasts:
        ranking = order_by_forecast(ranking, train or "full")
    if run.interrupted:
        raise RankingInterruptedError(ranking)
    if ensemble is not None:
        chosen = run.ensemble(ensemble, ranking if forecasts else None)
        ranking = replace(ranking, info={**ranking.info, "ensemble": chosen})
        if images.group_codes is not None:
            text = "`ensemble` knows no groups: what they give away counts in its choice"
            warnings.warn(text, stacklevel=2)
    return ranking


class Prepared(NamedTuple):
    """What a ranking is made with, once its arguments are checked."""

    settings: Settings
    store: FeatureStore | None
    scorer: Scorer
    forecasts: bool
    seconds: float | None  # of a `budget`
    limit: int | None  # bytes of downloaded weights
    may_race: bool
    top: int
    ensemble: int | None
    candidates: list[Backbone]
    whole: ImageDataset
    codes: np.ndarray  # of its rows: equal for copies
    twins: Twins
    images: ImageDataset  # the whole without copies of files
    digests: list[str]  # of the whole


def prepare(
    dataset: Any,
    backbones: Any,
    *,
    metric: Metric | None,
    variant: str | None,
    train: str | None,
    device: str,
    precision: str,
    batch_size: int | None,
    workers: int | None,
    max_unreadable: float,
    cache: bool | str | os.PathLike[str] | None,
    plugins: Iterable[str],
    map_fn: Map | None,
    executor: Executor | None,
    race: bool | None,
    top: int | None,
    budget: str | float | None,
    ensemble: int | None,
    weights_disk: str | int | None,
    threads: int | None,
    task: str | None,
    label_columns: str | Sequence[str] | None,
    label_delimiter: str | None,
    levels: str | Sequence[Any] | None,
    seed: int,
    **opening: Any,
) -> Prepared:
    """Check the arguments of `rank`, open its images and leave out copies of files.

    `opening` are further arguments of `open_dataset`; the defaults of all are those of `rank`.
    """
    seed, plugins = integer("seed", seed, 0, LARGEST_SEED), as_tuple("plugins", plugins)
    is_map = map_fn is None or callable(map_fn)
    require("map_fn", map_fn, "a function that is called like `map`, or None", is_map)
    settings = Settings(device, precision, batch_size, workers, max_unreadable, threads)
    if isinstance(executor, type):
        raise ValueError(
            f"`executor` must be an executor but is the class {executor.__name__}; call it: "
            f"{executor.__name__}()."
        )
    if executor is not None and (map_fn is not None or not cache):
        raise ValueError(
            "`executor` needs a `cache`, where its workers leave the features, and no `map_fn`; "
            "pass cache=True or a folder that all machines share."
        )
    store = open_cache(cache)
    told = settle_task(task, label_columns, label_delimiter, levels)
    if told is None:
        told = dataset.task if isinstance(dataset, ImageDataset) else "classification"
    if metric is None:
        metric = "forecast" if variant is None else "sfda"
    forecasts = isinstance(metric, str) and metric == "forecast"
    require("train", train, f"one of {', '.join(MODES)}", train in (None, *MODES))
    if train is not None and not forecasts:
        raise ValueError(
            f"`train` is for the metric 'forecast' but `metric` is {metric!r}; leave one out."
        )
    if variant is not None and forecasts:
        raise ValueError(
            f"`variant` belongs to the metric 'sfda' but `metric` is 'forecast' and `variant` "
            f"{variant!r}; pass metric='sfda', or leave it out."
        )
    for plugin in plugins:  # may register the metric
        load_plugin(plugin)
    scorer = Scorer(default_metric(told) if forecasts else metric, variant, told)
    if race and not scorer.is_mean:
        raise ValueError(
            f"`race` needs a metric that is a mean over images but `metric` is {scorer.label!r}; "
            "leave race out, or take 'sfda'."
        )
    seconds = parse_budget(budget)
    limit = parse_weights_disk(weights_disk)
    bounded = executor is None or getattr(executor, "bounds_weights", False)
    if limit is not None and (map_fn is not None or not bounded):
        raise ValueError(
            f"`weights_disk` is for downloads of this process, or of an executor that keeps to "
            f"it, but is {weights_disk!r} with {'`map_fn`' if bounded else f'{executor!r}'}; "
            "leave one out."
        )
    may_race = race or (race is None and seconds is not None and not scorer.combined)
    if top is not None and not may_race:
        raise ValueError(f"`top` is for a race but is {top!r} without one; add race=True.")
    top = integer("top", TOP if top is None else top, 1)
    check_form(dataset)
    if executor is None:
        check_device(device)
    candidates = resolve_backbones(backbones, plugins=plugins)  # timm's, and torch: seconds
    if executor is None:
        settings = replace(settings, device=resolve_device(device))
    if ensemble is not None:
        ensemble = integer("ensemble", ensemble, 1, len(candidates))
    images = open_dataset(
        dataset, task=task, label_columns=label_columns, label_delimiter=label_delimiter,
        levels=levels, seed=seed, **opening,
    )  # fmt: skip
    if not callable(metric) and any(term.knows_groups for term in scorer.terms):
        check_classes(images)
    candidates = [backbone.taking(images.channels) for backbone in candidates]
    if ensemble is not None:
        images.require_classes("for an `ensemble`")
    digests = images.digests()
    images = replace(images, contents=digests)  # whose digests are used all along
    whole, codes = images, group_twins(images, digests=digests)
    twins = find_twins(whole, codes)
    if twins.copies:
        images = images.subset(twins.kept)
    if not callable(metric):
        _require_pair(images)
    return Prepared(
        settings, store, scorer, forecasts, seconds, limit, may_race, top, ensemble, candidates,
        whole, codes, twins, images, digests,
    )  # fmt: skip


def _record_arguments(dataset: Any, **options: Any) -> dict[str, Any]:
    """Return what `rank` was asked, as far as it is text or numbers; so that it can be repeated.

    ``only_python`` names what is neither: a data set in memory, a function as metric.
    """
    found = {"dataset": dataset, **{k: v for k, v in options.items() if v is not None}}
    if isinstance(dataset, str | os.PathLike) and dataset != "digits":
        here = os.path.exists(path := absolute(dataset))
        found["dataset"] = path if here else os.fspath(dataset)
    plain = {k: v for k, v in found.items() if _is_plain(v)}
    if str(plain.get("groups", "")).startswith("<"):  # what `describe_options` calls an object
        del plain["groups"]
    unknown = [k for k in found if k not in plain]
    return plain | ({"only_python": unknown} if unknown else {})


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return isinstance(value, str | numbers.Real)


def _name_backbones(backbones: Any) -> Any:
    """Return the specs as they were given, if they are text or stand for one."""
    given = [backbones] if isinstance(backbones, str | os.PathLike | Backbone) else backbones
    if not isinstance(given, list | tuple):
        return backbones
    specs = [b.spec or b if isinstance(b, Backbone) else b for b in given]
    return [os.fspath(s) if isinstance(s, str | os.PathLike) else s for s in specs]


def name_hard_images(
    ranking: Ranking, images: ImageDataset, rows: np.ndarray
) -> list[dict[str, Any]]:
    """Return the images whose labels the good backbones find least likely; `rows` were ranked on.

    Their names only: the pixels stay where they are.
    """
    evidence = judge_images(ranking) if images.task == "classification" else None
    if evidence is None:
        return []
    return [
        {
            "image": images.item_name(rows[i]),
            "row": int(images.origin[rows[i]]),
            "label": str(images.classes[images.labels[rows[i]]]),
            "p": float(evidence.p[:, i].mean()),
            "doubtful": bool(evidence.doubtful[i]),
        }
        for i in evidence.find_hardest(N_HARD)
    ]


def find_strata(images: ImageDataset) -> np.ndarray:
    """Return within what images are resampled: the classes; all of them, for other tasks."""
    is_single = images.task == "classification"
    return images.labels if is_single else np.zeros(len(images), np.int64)


def _require_pair(images: ImageDataset) -> None:
    """Refuse classes of one image each before networks see them: no metric judges such."""
    if images.task == "classification" and np.bincount(images.labels).max() == 1:
        raise DatasetError(
            f"{images.name!r} must have a class of two different images, but all "
            f"{len(images)} classes have one: an image is judged by others of its class. Add "
            "images; if the classes are numbers to predict, pass task='regression' "
            "(--task regression)."
        )


def _leave_out_equal(
    whole: ImageDataset, codes: np.ndarray, twins: Twins, near: Near
) -> tuple[ImageDataset, Twins, Near]:
    """Leave out what shows the same pixels as another; changes the codes of copies."""
    for i, j in near.equal:
        codes[codes == codes[twins.kept[j]]] = codes[twins.kept[i]]
    found = find_twins(whole, codes)
    row = {int(row): n for n, row in enumerate(found.kept)}
    ends = {n: row[found.copies.get(int(k), int(k))] for n, k in enumerate(twins.kept)}
    pairs = {(min(a, b), max(a, b)) for a, b in ((ends[i], ends[j]) for i, j in near.pairs)}
    return whole.subset(found.kept), found, Near(sorted((i, j) for i, j in pairs if i != j), [])


def find_candidate_facts(candidates: list[Backbone]) -> dict[str, Facts]:
    """Return what is known of candidates; sizes are measured where the others are known."""
    found = look_up_facts(backbone.spec for backbone in candidates)
    facts = {backbone.name: found[backbone.spec] for backbone in candidates}
    return measure_sizes(candidates, facts) if is_known(facts) else facts


def measure_sizes(
    candidates: list[Backbone], facts: Mapping[str, Facts], end: float = math.inf
) -> dict[str, Facts]:
    """Return the facts with the sizes of networks that timm's tables lack, while there is time."""
    sized = dict(facts)
    for backbone in candidates:
        if not math.isfinite(facts[backbone.name].gmacs) and time.perf_counter() < end:
            gmacs, macts = measure_cost(backbone)
            sized[backbone.name] = replace(facts[backbone.name], gmacs=gmacs, macts=macts)
    return sized


def find_prices(facts: Mapping[str, Facts]) -> dict[str, float]:
    """Return about what an image costs a network, in GMACs; the median where nothing is known."""
    price = {name: fact.gmacs + fact.macts / 20 for name, fact in facts.items()}
    known = [p for p in price.values() if math.isfinite(p)]
    middle = float(np.median(known)) if known else 1.0
    return {name: p if math.isfinite(p) else middle for name, p in price.items()}


def find_first_rung(pace: Pace, names: Sequence[str], n_images: Sequence[int]) -> int:
    """Return the rung to begin at: of R rungs each has 1/R of the time, for ever more images.

    That is where most networks can be looked at, which opening them limits, too; or the last,
    unless there are `PAYS` times as many. Rungs that no network fits into do not count.

    >>> pace = Pace(60, {"a": 1.0, "b": 1.0})
    >>> pace.note(["a"], 100, seconds=2.0, opening=0.1)
    >>> find_first_rung(pace, ["a", "b"], [100, 200, 400, 800])
    0
    >>> pace.note(["b"], 100, seconds=20.0, opening=18.0)
    >>> find_first_rung(pace, ["a", "b"], [100, 200, 400, 800, 6400])
    3
    """
    fitting = [n for n in n_images if any(pace.cost(name, n) < pace.room for name in names)]
    n_images = fitting or n_images[:1]
    R = len(n_images)
    seconds = [
        (R - k) * (pace.open(names) + pace.compute(names, n)) for k, n in enumerate(n_images)
    ]
    first = int(np.argmin(seconds))
    return first if pace.is_known and PAYS * seconds[first] < seconds[-1] else R - 1


def find_share(room: float, costs: Sequence[float]) -> float:
    """Return the share of the time for the first of the rungs ahead; `costs` of one network each.

    The same for each that it fits into, but so much that it fits into the first.

    >>> find_share(60, [10, 20, 70]), find_share(60, [40, 50]), find_share(60, [70, 80])
    (0.5, 1.0, 1.0)
    """
    return 1 / max(1, sum(cost < room and k * costs[0] < room for k, cost in enumerate(costs, 1)))


def order_by_promise(
    facts: Mapping[str, Facts], price: Mapping[str, float] | None = None
) -> list[str]:
    """Return the candidates by P(best) for their price, before any image was seen.

    >>> order_by_promise(look_up_facts(["resnet18.a1_in1k", "resnet50.a1_in1k", "vgg19.tv_in1k"]))
    ['resnet50.a1_in1k', 'resnet18.a1_in1k', 'vgg19.tv_in1k']
    """
    price, best = price or find_prices(facts), dict.fromkeys(facts, 1.0)
    if is_known(facts):
        best = find_promise(facts)
    return sorted(facts, key=lambda name: -best[name] / price[name])


def add_sizes(
    scores: dict[str, Score], candidates: list[Backbone], facts: Mapping[str, Facts]
) -> None:
    """Add to details what a forecast asks of networks that timm's tables lack."""
    found = look_up_facts(backbone.spec for backbone in candidates)
    for backbone in candidates:
        fact, score = facts[backbone.name], scores[backbone.name]
        if not math.isfinite(found[backbone.spec].gmacs) and math.isfinite(fact.gmacs):
            details = {**score.details, "gmacs": fact.gmacs, "macts": fact.macts}
            scores[backbone.name] = replace(score, details=details)


def add_licenses(scores: dict[str, Score], candidates: list[Backbone]) -> None:
    """Add to details under which licence the weights come, where it is known."""
    for backbone in candidates:
        if license_ := find_license(backbone):
            score = scores[backbone.name]
            details = {**score.details, "license": license_}
            scores[backbone.name] = replace(score, details=details)


class _Copies:
    """The copies of images that a ranking leaves out: equal files first, then equal pixels."""

    def __init__(self, whole: ImageDataset, codes: np.ndarray, twins: Twins) -> None:
        self.whole, self.codes, self.twins = whole, codes, twins
        self.kept = twins.kept  # rows that are extracted
        self.pixels: dict[int, str] = {}  # row of the whole → digest
        self.rows: Any = None  # that were compared last
        self.dropped: Any = ()  # of these

    def leave_out(self, extraction: Extraction) -> Extraction:
        """Return an extraction without the rows whose pixels others have as well."""
        features, rows = extraction.features, extraction.rows
        if features is None:
            return extraction
        if self.rows is None or not _same(self.rows, rows):
            self._compare(rows, features.x)
        if not len(self.dropped):
            return extraction
        stay = ~np.isin(rows, self.dropped)
        features = replace(features, x=features.x[stay], y=features.y[stay])
        return replace(extraction, features=features, rows=rows[stay])

    def _compare(self, rows: np.ndarray, x: np.ndarray) -> None:
        alike = self.kept[rows[find_alike(x)]].tolist()
        new = [row for row in alike if row not in self.pixels]
        self.pixels |= zip(new, self.whole.digests(new, pixels=True), strict=True)
        first: dict[str, int] = {}
        for row in alike:
            if (digest := self.pixels[row]) != UNREADABLE:
                same = first.setdefault(digest, int(self.codes[row]))
                self.codes[self.codes == self.codes[row]] = same
        among = self.kept[rows]
        self.twins = find_twins(self.whole, self.codes, among.tolist())
        self.rows, self.dropped = rows, rows[~np.isin(among, self.twins.kept)]


@dataclass
class _RankingRun:
    """One ranking under way: what was scored so far, and what it took."""

    images: ImageDataset
    candidates: list[Backbone]
    settings: Settings
    store: FeatureStore | None
    map_fn: Map | None
    executor: OnDemand | None
    scorer: Scorer
    copies: _Copies
    fetcher: Fetcher
    digests: Sequence[str]  # of the images
    keeps: bool  # features of all images: an ensemble is chosen of them
    scores: dict[str, Score] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    unreadable: dict[int, str] = field(default_factory=dict)
    rows: Any = None  # of the data set, behind the latest scores
    seen: dict[str, Extraction] = field(default_factory=dict)  # that is needed again
    interrupted: bool = False  # by Ctrl-C

    def measure(
        self,
        candidates: list[Backbone],
        rows: np.ndarray | None,
        bar: Any,
        seen: dict[str, Extraction] | None = None,
    ) -> None:
        """Extract and score `candidates` on `rows` (None: all), beyond what they have `seen`."""
        images = self.images if rows is None else self.images.subset(rows)
        digests = self.digests if rows is None else [self.digests[int(row)] for row in rows]
        found = extract_within(
            images, candidates, self.settings, self.store, self.map_fn, self.executor, bar,
            self.fetcher, digests,
        )  # fmt: skip
        last, self.rows = self.rows, None
        of: dict[str, Any] = {}  # rows of each; one that comes again has fewer
        before = dict(seen or {})  # one that comes again takes the place of what came first
        try:
            for extraction in found:
                for part, spent in extraction.seconds.items():
                    self.seconds[part] += spent
                if rows is not None:  # as the whole data set numbers them
                    bad = {int(rows[row]): why for row, why in extraction.unreadable.items()}
                    extraction = replace(extraction, rows=rows[extraction.rows], unreadable=bad)
                self.unreadable |= extraction.unreadable
                name = extraction.backbone.name
                if seen is not None:
                    extraction = seen[name] = _join(before.get(name), extraction)
                    n = len(extraction.rows) + len(extraction.unreadable)
                    if not self.keeps and n == len(self.images):
                        del seen[name]
                extraction = self.copies.leave_out(extraction)
                begun = time.perf_counter()
                result = _score(extraction, self.noting, self.device, self.find_groups)
                self.seconds["score"] += time.perf_counter() - begun
                if extraction.features is not None:
                    self.rows = of[name] = extraction.rows
                self.scores[name] = result
                logger.info("%s: %s", name, result.error or f"score {result.value:.4f}")
                bar.finish(result)
        except KeyboardInterrupt:  # by somebody, or since the time is over
            self.rows = last if self.rows is None else self.rows
            raise
        finally:
            found.close()
            for name in [name for name, rows in of.items() if not _same(self.rows, rows)]:
                error = "its images are not those of the other backbones; rank again"
                self.scores[name] = replace(self.scores[name], error=error)

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """End at Ctrl-C what is within; it is noted, and what was scored stays."""
        try:
            yield
        except KeyboardInterrupt:
            self.interrupted = True

    def measure_within(
        self,
        pace: Pace,
        order: Sequence[str],
        bar: Any,
        seen: dict[str, Extraction] | None = None,
        rows: np.ndarray | None = None,
        share: float = 1.0,
    ) -> list[str]:
        """Extract and score as many candidates as a share of the time suffices for, in `order`.

        Return which. Some at a time, for at most `SLICE` of the time that is left, so that a wrong
        estimate of their price costs little. An executor gets at least as many as it runs at a
        time. What is not done when all time is over is stopped.
        """
        left, by_name = list(order), {b.name: b for b in self.candidates}
        n = len(self.images) if rows is None else len(rows)
        before, reserve, demand = dict(self.scores), (1 - share) * pace.room, self.executor
        watch = RankingWatch(bar, lambda: pace.room <= 0)
        least = self.count_places(left, rows)
        while left and (room := pace.room - reserve) > 0:
            some, total = [], 0.0
            for name in left:
                cost = pace.cost(name, n)
                fits = pace.is_known and total + cost < SLICE * room
                if cost < room and (len(some) < least or fits):
                    some.append(name)
                    total += cost
            if not some:
                break
            left = [name for name in left if name not in some]
            started, parts = time.perf_counter(), dict(self.seconds)
            waited = 0.0 if demand is None else demand.waited
            try:
                self.measure([by_name[name] for name in some], rows, watch, seen)
            except KeyboardInterrupt:
                if not watch.is_over:
                    raise
                break
            new = [name for name in some if not self.scores[name].details.get("cached")]
            if new:
                spent = time.perf_counter() - started
                spent -= 0.0 if demand is None else demand.waited - waited  # but once, to start
                of_images = sum(self.seconds[part] - parts[part] for part in PER_IMAGE)
                spent = max(spent, 0.0)
                told = ((name, self.scores[name].details.get("images_per_second")) for name in new)
                speeds = {name: speed for name, speed in told if speed}
                pace.note(new, n, spent, max(spent - of_images / least, 0.0), speeds)
        return [name for name in order if self.scores.get(name) is not before.get(name)]

    def count_places(self, names: Sequence[str], rows: np.ndarray | None) -> int:
        """Return how many candidates are computed at a time, once an executor has been entered.

        If there is something to compute; else the first would be one, and other places idle.
        """
        if self.executor is None:
            return 1
        backbones = [b for b in self.candidates if b.name in names]
        images = self.images if rows is None else self.images.subset(rows)
        digests = self.digests if rows is None else [self.digests[int(row)] for row in rows]
        if is_pending(images, backbones, self.store, self.settings.precision, digests):
            self.executor.enter()
        return self.executor.n_places

    def race(
        self,
        config: RaceConfig,
        bar: Any,
        judge: Judge | None = None,
        pace: Pace | None = None,
        order: Sequence[str] = (),
        is_asked: bool = True,
    ) -> RaceResult | None:
        """Score all candidates on few images, and ever fewer of them on more.

        Within a `pace`, as many on each rung as the time suffices for, the most promising first:
        in this `order`, and then by their scores. Each of the rungs ahead has the same share of
        the time (`find_share`), and the first is where most are looked at (`find_first_rung`).
        Unless a race `is_asked` for, all go on to all images as soon as the time suffices for
        that, and there is none (but None) where the metric is no mean over images. At Ctrl-C it
        ends as it does when the time is over.
        """
        by_name = {backbone.name: backbone for backbone in self.candidates}
        past = dict.fromkeys(by_name, np.empty(0, np.int64))
        rungs, N = make_rungs(self.images, config.seed), len(self.images)
        readable, cut = self.rows, set[str]()

        def sort(names: list[str]) -> list[str]:
            known = [name for name in names if name in self.scores]
            values = np.array([self.scores[name].value for name in known], np.float64)
            if judge is not None and known:
                values = judge(known, values[None])[0]
            best = dict(zip(known, values, strict=True))
            return sorted(names, key=lambda name: -best.get(name, math.inf))

        def measure(
            names: list[str], rows: np.ndarray
        ) -> tuple[np.ndarray, dict[str, np.ndarray | None]]:
            nonlocal readable
            if self.interrupted:
                return readable, dict.fromkeys(names)
            before = dict(self.scores)
            todo = [name for name in names if len(past[name]) < len(rows)]
            with self.stopping():
                # One number, unless the first of a pace are among them, or somebody comes back.
                for n in sorted({len(past[name]) for name in todo}, reverse=True):
                    group = [name for name in todo if len(past[name]) == n]
                    new = np.setdiff1d(rows, past[group[0]])
                    if pace is None:
                        self.measure([by_name[name] for name in group], new, bar, self.seen)
                        continue
                    sizes = [len(other) - n for other in rungs if len(other) >= len(rows)]
                    costs = [min(pace.cost(name, m) for name in group) for m in sizes]
                    share = find_share(pace.room, costs)
                    self.measure_within(pace, sort(group), bar, self.seen, new, share)
            late = [name for name in todo if self.scores.get(name) is before.get(name)]
            done = [name for name in names if name not in late]
            cut.update(late if self.interrupted else ())
            past.update(dict.fromkeys(done, rows))
            readable = self.rows if done else readable
            good: dict[str, Any] = {name: self.scores[name].per_sample for name in done}
            good = {name: p for name, p in good.items() if self.scores[name].error is None}
            if any(p is None for p in good.values()):
                raise ValueError(
                    f"`race` needs a metric that is a mean over images but `metric` is "
                    f"{self.scorer.label!r}; leave race out, or take 'sfda'."
                )
            return readable, good | dict.fromkeys(late)

        def skip(names: list[str], rows: np.ndarray) -> bool:
            is_whole = len(names) <= config.top
            if pace is None:
                return is_whole
            to_all = sum(pace.cost(name, N - len(past[name])) for name in names)
            return (is_whole or not is_asked) and to_all < 0.9 * pace.room

        names, first, few = list(by_name), [], len(rungs[0])
        if pace is not None:  # what the most promising takes tells what the others will
            with self.stopping():
                at, found = self.count_places(order, rungs[0]), self.scores
                while (some := order[len(found) :][:at]) and all(s.error for s in found.values()):
                    if len(self.measure_within(pace, some, bar, self.seen, rungs[0])) < len(some):
                        break
            past.update(dict.fromkeys(self.scores, rungs[0]))
            first = [score for score in self.scores.values() if score.error is None]
            readable = self.rows
            names = [
                name for name in order if name not in self.scores or not self.scores[name].error
            ]
            if not is_asked and first and first[0].per_sample is None:
                self.seen.clear()
                for score in first:  # of few images, which others are not to be compared with
                    del self.scores[score.backbone]
                self.rows = None
                if not self.interrupted:
                    self.measure_within(pace, names, bar, self.seen if self.keeps else None)
                return None
            rungs = rungs[find_first_rung(pace, names, list(map(len, rungs))) :]
        labels, groups = find_strata(self.images), self.images.group_codes
        result = run(names, rungs, labels, measure, config, judge, groups, skip)
        self.rows = readable
        self.interrupted |= result.interrupted
        if first and not result.rungs:  # there was no time for more
            stage = {"images": few, "backbones": len(first), "dropped": []}
            result = replace(result, rungs=(stage,), n_forward=few * len(first))
        elif first and few < result.rungs[-1]["images"]:
            late = {"images": few, "p_top": 0.0, "gain": 0.0, "late": True}
            stale = [score for score in first if self.scores[score.backbone] is score]
            left = {score.backbone: {**late, "value": score.value} for score in stale}
            result = replace(result, dropped={**left, **result.dropped})
        final = [
            s.value
            for n, s in self.scores.items()
            if judge is None and n not in result.dropped and s.error is None
        ]
        for name, out in result.dropped.items():
            value = min([out["value"] + out["gain"], *final])
            what = "no time for more than" if out.get("late") else "left the race after"
            what = "interrupted after" if name in cut else what
            note = f"{what} {out['images']} images"
            old = self.scores[name]
            details = {**old.details, "race": out, "note": note}
            self.scores[name] = replace(old, value=value, per_sample=None, details=details)
        return result

    def find_groups(self, rows: np.ndarray) -> np.ndarray | None:
        """Return the group of each of these rows; None where each is its own."""
        codes = self.images.group_codes
        if codes is None or len(np.unique(codes[rows])) == len(rows):
            return None
        return codes[rows]

    @cached_property
    def noting(self) -> NotingScorer:
        """What scores, unless the store has a note of the same."""
        return NotingScorer(self.scorer, self.store)

    @cached_property
    def device(self) -> str:
        """What this process computes scores on, whoever extracts."""
        try:
            return resolve_device(self.settings.device)
        except ValueError:
            if self.executor is None:
                raise
            return "cpu"

    def finished(self) -> dict[str, Score]:
        """Return the scores on all images: an interrupted race has others, too."""
        n = len(self.images) - len(self.unreadable) - len(self.copies.dropped)
        return {name: s for name, s in self.scores.items() if s.error or s.n_samples == n}

    def info(self, samples: int | None, seed: int) -> dict[str, Any]:
        """Return what was ranked, and how."""
        images, versions = self.images, {}
        for package in ("sfda-tune", "torch", "timm", "numpy", "scipy", "pillow"):
            try:
                versions[package] = version(package)
            except PackageNotFoundError:  # run from a source tree
                versions[package] = "unknown"
        return {
            "dataset": images.name,
            "n_samples": len(images) if self.rows is None else len(self.rows),
            "n_classes": len(images.classes),
            "classes": list(images.classes),
            "samples": samples,
            "seed": seed,
            "device": (self.executor and self.executor.device) or self.device,
            "precision": self.settings.precision,
            "unreadable": {
                images.item_name(r): self.unreadable[r] for r in sorted(self.unreadable)
            },
            "seconds": self.seconds,
            "versions": versions,
            **({} if images.channels == 3 else {"channels": images.channels}),
            **describe_groups(images.groups, images.labels),
            **self.describe_target(),
        }

    def describe_target(self) -> dict[str, Any]:
        """Return that labels are numbers, levels, or several, and which; nothing of classes."""
        if self.images.task == "classification":
            return {}
        y = self.images.labels if self.rows is None else self.images.labels[self.rows]
        if self.images.task == "ordinal":
            counts = np.bincount(y, minlength=len(self.images.classes)).tolist()
            pairs = zip(self.images.classes, counts, strict=True)
            return {
                "task": "ordinal",
                "level_counts": [{"name": c, "images": n} for c, n in pairs],
            }
        if self.images.task == "multilabel":
            counts = [
                {"name": name, "positives": int((c == 1).sum()), "missing": int((c < 0).sum())}
                for name, c in zip(self.images.classes, y.T, strict=True)
            ]
            return {"task": "multilabel", "label_counts": counts}
        of = {"min": y.min(), "median": np.median(y), "max": y.max(), "mean": y.mean()}
        of |= {"sd": y.std()}
        target = {name: float(value) for name, value in of.items()}
        return {"task": "regression", "target": target}

    def ensemble(self, k: int, order: Iterable[str] | None) -> dict[str, Any]:
        """Choose `k` of the backbones that were scored on all images; `order` is a forecast's."""
        names = [
            name for name, s in self.scores.items() if s.error is None and "race" not in s.details
        ]
        hub = {name: self.copies.leave_out(self.seen[name]).features for name in names}
        if not hub:
            return {}
        order = None if order is None else [name for name in order if name in hub]
        chosen = select_ensemble(hub, None, min(k, len(hub)), order=order)
        return {f.name: getattr(chosen, f.name) for f in fields(chosen)}


def _join(old: Extraction | None, new: Extraction) -> Extraction:
    """Put the features of two parts of the data set into the order of its rows."""
    if old is None or old.features is None or new.features is None:
        return new
    rows = np.concatenate([old.rows, new.rows])
    order = np.argsort(rows)
    x = np.concatenate([old.features.x, new.features.x])[order]
    y = np.concatenate([old.features.y, new.features.y])[order]
    features = replace(new.features, x=x, y=y)
    return replace(
        new, features=features, rows=rows[order], unreadable=old.unreadable | new.unreadable
    )


def _score(
    extraction: Extraction,
    scorer: NotingScorer,
    device: str,
    find_groups: Callable[[np.ndarray], np.ndarray | None],
) -> Score:
    """Score an extraction and add to the score's details what the extraction measured."""
    name = extraction.backbone.name
    spent = sum(extraction.seconds.get(part, 0.0) for part in ("load", "decode", "forward"))
    if extraction.features is None:
        result = Score(name, error=extraction.error or "failed", seconds=spent)
    else:
        features = replace(extraction.features, groups=find_groups(extraction.rows))
        result = scorer.score(features, device)
        result = replace(result, seconds=result.seconds + spent)
    notes = ("cached" if extraction.cached else "", str(result.details.get("note", "")))
    measured = {
        "spec": extraction.backbone.spec,
        "n_params": extraction.n_params,
        "input_size": extraction.input_size,
        "images_per_second": extraction.images_per_second,
        "batch": extraction.batch,
        "peak_memory": extraction.peak_memory,
        "peak_batch": extraction.peak_batch,
        "cached": extraction.cached,
        "note": "; ".join(filter(None, notes)),
    }
    return replace(result, details={**result.details, **measured})


def _same(a: Any, b: Any) -> bool:
    return len(a) == len(b) and bool((a == b).all())
