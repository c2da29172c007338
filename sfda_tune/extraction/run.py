"""Extraction: many backbones over one data set, each image decoded once.

The rows are cut into *shards* of `SHARD` images, in which features are stored. As many shards as
fit into memory are decoded together, by worker processes: every image once, resized once per
distinct `Geometry`; the 8-bit result is shared by all backbones with that geometry. A *unit* is
one backbone over these shards. The units run one after the other, so the first backbones can be
ranked while the others run, and a kill loses at most the shard at hand.

The first backbone that asks for pixels drives the decoding, so decoding overlaps its forward
passes. A batch never crosses a shard: the features of a row do not depend on how many rows,
workers or processes there are.

An `Executor` runs the same units elsewhere: it is handed the `Plan` of what is missing and one
`Worker`, cuts the plan into units as it sees fit, and hands back their outcomes.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import multiprocessing
import pickle
import threading
import uuid
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np

from sfda_tune.backbones import fingerprints, loading
from sfda_tune.backbones.devices import is_working, resolve_device
from sfda_tune.backbones.plugins import load_plugin
from sfda_tune.backbones.preprocessing import Preprocessing
from sfda_tune.data.checks import DatasetError
from sfda_tune.data.dataset import ImageDataset
from sfda_tune.data.decoding import UNREADABLE, Passing, UnreadableImage
from sfda_tune.data.loader import BATCH, Loader, count_workers, cut, is_in_memory
from sfda_tune.extraction.crashes import CRASH_REASON, PILLOW
from sfda_tune.extraction.pixels import Decoder, forget_pixels, require_memory
from sfda_tune.extraction.plan import (
    BackboneJob,
    Outcome,
    Plan,
    Unit,
    cut_shards,
    cut_units,
    length,
)
from sfda_tune.extraction.settings import Extraction, Map, Settings
from sfda_tune.extraction.store import Entry, FeatureStore, make_key
from sfda_tune.extraction.worker import (
    LANES,
    Executor,
    Turn,
    Worker,
    describe_error,
    fingerprint_pixels,
    too_many_unreadable,
)
from sfda_tune.values.features import Backbone, Features

__all__ = ["extract"]

logger = logging.getLogger(__name__)


def extract(
    dataset: ImageDataset,
    backbones: Sequence[Backbone],
    settings: Settings | None = None,
    *,
    store: FeatureStore | None = None,
    map_fn: Map | None = None,
    executor: Executor | None = None,
    progress: Any = None,
) -> Generator[Extraction, None, None]:
    """Run every backbone over the data set; yield each one's features as soon as they are whole.

    Parameters
    ----------
    dataset : ImageDataset
    backbones : sequence of Backbone
        With unique names.
    settings : Settings, optional
    store : FeatureStore, optional
        Where features are looked up and kept; without it nothing is written.
    map_fn : callable, optional
        Anything called like the builtin `map` (thread pool, process pool, …); it is given one
        unit at a time. Default: one after the other in this process.
    executor : Executor, optional
        Runs the units elsewhere, for instance `sfda_tune_ray.RayExecutor`; needs a `store` that
        its workers reach.
    progress : object, optional
        With methods ``start(n_images, n_cached)`` and ``advance(backbone, n_images)``.

    Yields
    ------
    Extraction
        One per backbone; a failed one carries its error and stops nothing. One comes again,
        without the row, if an executor learns later that an image ends the process.

    Raises
    ------
    DatasetError
        If too many images cannot be read.
    ValueError
        If `executor` comes without a store, or with a `map_fn`.

    Examples
    --------
    >>> from sfda_tune.backbones.specs import resolve_backbones
    >>> from sfda_tune.data.opening import open_dataset
    >>> digits = open_dataset("digits", samples=40)
    >>> for e in extract(digits, resolve_backbones("demo:*noise*"), Settings(device="cpu")):
    ...     print(e.backbone.name, e.features.n_samples)
    demo:resnet_noise 40
    """
    if executor is not None and (store is None or map_fn is not None):
        raise ValueError(
            "`executor` needs a `store` and no `map_fn`: its workers leave the features in a "
            "folder that all machines share, and this process reads them there."
        )
    with executor or contextlib.nullcontext():
        yield from _extract(dataset, backbones, settings, store, map_fn, executor, progress)


def _extract(
    dataset: ImageDataset,
    backbones: Sequence[Backbone],
    settings: Settings | None,
    store: FeatureStore | None,
    map_fn: Map | None,
    executor: Executor | None,
    progress: Any,
) -> Generator[Extraction, None, None]:
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(
            "a process that is being started runs the script again that started it; put the "
            "script's own work below `if __name__ == '__main__':`"
        )
    settings = settings or Settings()
    resolve = resolve_device if executor is None else executor.resolve_device
    settings = replace(settings, device=resolve(settings.device))
    shards = cut_shards(len(dataset))
    jobs: dict[str, BackboneJob] = {}
    for backbone in backbones:
        try:
            description = loading.describe(backbone)
            require_memory(description.preprocessing, length(shards[0]))
            weights = fingerprints.fingerprint(backbone) if store is not None else None
            jobs[backbone.name] = BackboneJob(description, weights)
        except Exception as error:
            logger.debug("%s cannot be described", backbone.name, exc_info=True)
            yield Extraction(backbone, None, np.empty(0, np.int64), describe_error(error))

    images = dataset.digests() if store is not None else [""] * len(dataset)
    most = settings.max_unreadable * len(dataset)
    plan = Plan(uuid.uuid4().hex, dataset, jobs, shards, images, {}, most)
    plan.crashing.update(_without_content(dataset, images))
    done: list[str] = []
    known = len(plan.crashing)  # rows that somebody cannot read, so that nobody shows them
    everything = frozenset(range(len(shards)))

    def finish_again() -> Iterator[Extraction]:
        nonlocal known
        if len(plan.crashing) > known:
            known = len(plan.crashing)
            for name in done[:]:
                job = jobs[name]
                _look_up(job, plan, store, settings)
                job.entries.update(job.unkept)
                if everything <= job.entries.keys():
                    yield _finish(job, plan, settings, store)
                else:  # nobody kept them: they are computed again
                    done.remove(name)

    doubtful: dict[int, list[BackboneJob]] = {}
    for name, job in jobs.items():
        _look_up(job, plan, store, settings)
        doubts = _doubt(job, plan)
        for row in doubts:
            doubtful.setdefault(row, []).append(job)
        yield from finish_again()
        if not doubts and everything <= job.entries.keys():
            done.append(name)
            yield _finish(job, plan, settings, store)
        elif job.keys:  # entries are read again when the others are there
            job.entries = {shard: job.keys[shard] for shard in job.entries}
    _look_again(doubtful, plan, settings)
    yield from finish_again()
    for name, job in jobs.items():
        plan.missing[name] = frozenset() if name in done else everything.difference(job.entries)
        if name not in done and not plan.missing[name]:
            done.append(name)
            yield _finish(job, plan, settings, store)
    if progress is not None:
        rows = sum(length(shards[s]) for absent in plan.missing.values() for s in absent)
        progress.start(rows, len(done))

    tell = progress.advance if progress and map_fn is None and executor is None else None
    worker = Worker(settings, store, tell)
    outcomes: Any = ()
    try:
        while True:
            outcomes = (
                executor.run(worker, plan)
                if executor
                else (map_fn or _run_here)(worker, cut_units(plan))
            )
            came = set()
            for outcome in outcomes:
                came.add(outcome.name)
                job = jobs[outcome.name]
                if progress is not None and tell is None:
                    progress.advance(outcome.name, outcome.n_images)
                if outcome.not_kept is not None:
                    warnings.warn(
                        f"features could not be kept in {store and store.root} "
                        f"({outcome.not_kept}); the run goes on",
                        stacklevel=2,
                    )
                for shard, unreadable in outcome.unreadable.items():
                    for row, why in unreadable.items():
                        plan.crashing.setdefault(shards[shard][0] + int(row), why)
                yield from finish_again()
                if outcome.name in plan.failed:
                    continue
                job.cached = False
                job.weights = job.weights or outcome.weights
                job.entries.update(outcome.entries)
                for part, spent in outcome.seconds.items():
                    job.seconds[part] = job.seconds.get(part, 0.0) + spent
                if executor is not None:
                    job.entries.update(outcome.keys)  # what is in the store did not travel
                if executor is not None or (store is not None and outcome.not_kept is None):
                    unkept = outcome.entries.keys() - outcome.keys.keys()
                    job.unkept.update((shard, outcome.entries[shard]) for shard in unkept)
                if outcome.error is not None:
                    plan.failed.add(outcome.name)
                    yield replace(_blank(job), error=outcome.error, seconds=job.seconds)
                elif len(job.entries) == len(shards):
                    done.append(outcome.name)
                    yield _finish(job, plan, settings, store)
                else:  # until its other shards are done the features need no memory
                    job.entries.update(outcome.keys)
            left = [name for name in jobs if name not in plan.failed and name not in done]
            again = {name: everything.difference(jobs[name].entries) for name in left}
            if came.isdisjoint(left):
                break
            forget_pixels(plan.run)
            plan = replace(plan, run=uuid.uuid4().hex, missing=dict.fromkeys(jobs, frozenset()))
            plan.missing.update(again)
        for name in left:
            error = (
                f"nothing came back for {len(again[name])} of its {len(shards)} parts; look at "
                "what runs them (`map_fn`, `executor`), and rank again"
            )
            yield replace(_blank(jobs[name]), error=error, seconds=jobs[name].seconds)
    finally:
        if isinstance(outcomes, Generator):
            outcomes.close()
        forget_pixels(plan.run)


def _without_content(dataset: ImageDataset, images: Sequence[str]) -> dict[int, str]:
    """Return the rows without a digest, and why; their features would belong to nothing."""
    found = {}
    for row in (row for row, digest in enumerate(images) if digest == UNREADABLE):
        why = "its content could not be read"
        try:
            dataset.load(row)
        except UnreadableImage as error:
            why = error.reason
        found[row] = Passing(why)
    return found


def _look_up(job: BackboneJob, plan: Plan, store: FeatureStore | None, settings: Settings) -> None:
    """Find the entries that there are."""
    if store is None or job.weights is None:
        return
    pixels = fingerprint_pixels(job.description.preprocessing)
    job.keys = [
        make_key(plan.images[a:b], job.weights, pixels, settings.precision) for a, b in plan.shards
    ]
    found = {shard: store.get(key) for shard, key in enumerate(job.keys)}
    job.entries = {shard: entry for shard, entry in found.items() if entry is not None}


def _doubt(job: BackboneJob, plan: Plan) -> list[int]:
    """Return the rows that entries call unreadable, and that may be readable by now.

    What a decoder makes of bytes depends on its version and on the formats it knows. An image that
    crashes it is believed to do so where it is the same; another decoder has to try it anew, where
    a crash does no harm.
    """
    rows: list[int] = []
    for shard, entry in cast(dict[int, Entry], dict(job.entries)).items():
        for position, why in entry.unreadable.items():
            row = plan.shards[shard][0] + int(position)
            if why.startswith(CRASH_REASON) and why.endswith(PILLOW):
                plan.crashing.setdefault(row, why)
            elif why.startswith(CRASH_REASON) and row not in plan.crashing:
                job.entries.pop(shard, None)
            elif row not in plan.crashing:
                rows.append(row)
    return rows


def _look_again(
    doubtful: Mapping[int, Sequence[BackboneJob]], plan: Plan, settings: Settings
) -> None:
    """Read doubtful rows again; drop the entries of those that somebody can read by now."""
    rows = sorted(doubtful.keys() - plan.crashing.keys())
    if not rows:
        return
    jobs = {id(job): job for row in rows for job in doubtful[row]}.values()
    distinct = {job.description.preprocessing.key: job.description.preprocessing for job in jobs}
    found = (p for job in jobs for p in job.description.backbone.plugins)
    loader = Loader(
        Decoder(plan.dataset, list(distinct.values()), {}),
        [[rows[i] for i in part] for part in cut(len(rows))],
        _problems,
        workers=min(count_workers(plan.dataset, settings.workers), -(-len(rows) // BATCH)),
        direct=is_in_memory(plan.dataset),
        prepare=[partial(load_plugin, plugin) for plugin in dict.fromkeys(found)],
    )
    for keys, problems in loader:
        pairs = zip(keys, problems, strict=True)
        plan.crashing.update((row, why) for row, why in pairs if why is not None)
    loader.close()
    for row in rows:
        if row not in plan.crashing:
            for job in doubtful[row]:
                job.entries.pop(row // length(plan.shards[0]), None)


def _problems(items: list[tuple[list[Any], str | None, float]]) -> list[str | None]:
    return [problem for _, problem, _ in items]


def _run_here(worker: Worker, units: Iterable[Unit]) -> Generator[Outcome, None, None]:
    """Run units in this process; if a network breaks the device's context, the rest in others."""
    waiting: deque[Unit] = deque()
    units = iter(units)

    def given() -> Iterator[Unit]:
        for unit in units:
            waiting.append(unit)
            yield unit

    on_gpu = worker.settings.device.startswith("cuda")
    outcomes = _overlap(worker, given(), LANES) if on_gpu and LANES > 1 else map(worker, given())
    try:
        for outcome in outcomes:
            if outcome.error is not None and not is_working(worker.settings.device):
                break
            waiting.popleft()
            yield outcome
        else:
            return
    finally:
        if isinstance(outcomes, Generator):
            outcomes.close()
    logger.warning("%s left %s unusable; the others go on in a fresh process",
                   outcome.name, worker.settings.device)  # fmt: skip
    yield from _run_apart(worker, itertools.chain(waiting, units))


def _overlap(worker: Worker, units: Iterable[Unit], lanes: int) -> Generator[Outcome, None, None]:
    """Like `map`, but some units are under way at a time, of which one computes.

    The next one's network is opened meanwhile, and the last one's features come back.
    """
    stop, last = threading.Event(), None

    def run(unit: Unit, turn: Turn) -> Outcome:
        try:
            return replace(worker, turn=turn)(unit)
        finally:
            turn.__exit__()  # also if it failed before its turn

    pool = ThreadPoolExecutor(lanes, "extraction")
    ahead: deque[Any] = deque()
    try:
        for unit in units:
            last = Turn(last, stop)
            ahead.append(pool.submit(run, unit, last))
            if len(ahead) == lanes:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:  # whoever interrupts a run need not wait for the download of a network
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)


def _run_apart(worker: Worker, units: Iterable[Unit]) -> Generator[Outcome, None, None]:
    """Run units in a process of their own, and in another one after each that failed."""
    spawn = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as processes:
        pool = None
        for unit in units:  # the pixels of what cannot travel would keep the others from it
            unit = replace(unit, preprocessings=tuple(filter(_can_travel, unit.preprocessings)))
            pool = pool or processes.enter_context(ProcessPoolExecutor(1, spawn))
            try:
                outcome = pool.submit(worker, unit).result()
            except DatasetError:
                raise
            except Exception as error:  # it died, or the backbone cannot be sent to it
                outcome = Outcome(unit.backbone.name, error=describe_error(error))
            if worker.advance is not None:
                worker.advance(outcome.name, outcome.n_images)
            if outcome.error is not None:
                processes.close()
                pool = None
            yield outcome


def _can_travel(preprocessing: Preprocessing) -> bool:
    try:
        return bool(pickle.dumps(preprocessing))
    except Exception:  # a transform of the user's own may raise anything
        return False


def _blank(job: BackboneJob) -> Extraction:
    return Extraction(
        job.description.backbone,
        None,
        np.empty(0, np.int64),
        n_params=job.description.n_params,
        input_size=job.description.preprocessing.input_size,
    )


def _finish(
    job: BackboneJob, plan: Plan, settings: Settings, store: FeatureStore | None
) -> Extraction:
    """Join the shards of one backbone."""
    dataset, shards = plan.dataset, plan.shards
    entries: list[Entry] = []
    for shard, (start, stop) in enumerate(shards):
        entry = job.entries.get(shard)
        if isinstance(entry, str):
            entry = store.get(entry) if store is not None else None
        if entry is None:
            return replace(_blank(job), error="its cached features vanished meanwhile; run again")
        told = np.sort([*entry.rows, *map(int, entry.unreadable)])
        if len(entry.x) != len(entry.rows) or not np.array_equal(told, np.arange(stop - start)):
            raise RuntimeError(
                f"the features of {job.description.backbone.name} do not belong to rows {start} … "
                f"{stop - 1}; run `sfda-tune cache clear` and rank again"
            )
        entries.append(_without(entry, start, stop, plan.crashing))
    job.entries = {}  # the features live on with whoever takes them
    unreadable = {
        start + int(row): why
        for entry, (start, _) in zip(entries, shards, strict=True)
        for row, why in entry.unreadable.items()
    }
    if len(unreadable) > settings.max_unreadable * len(dataset):
        raise too_many_unreadable(unreadable, dataset, settings.max_unreadable)
    rows = np.concatenate([e.rows + s for e, (s, _) in zip(entries, shards, strict=True)])
    spent = sum(e.info.get("forward_seconds", 0.0) for e in entries)
    hungriest = max((e.info for e in entries), key=lambda info: info.get("peak_memory", 0))
    result = replace(
        _blank(job),
        rows=rows,
        unreadable=unreadable,
        images_per_second=len(rows) / spent if spent else None,
        peak_memory=hungriest.get("peak_memory"),
        peak_batch=hungriest.get("peak_batch"),
        cached=job.cached,
        seconds=job.seconds,
    )
    try:
        name = job.description.backbone.name
        x = np.concatenate([e.x for e in entries if len(e.rows)])
        features = Features(x, dataset.labels[rows], dataset.classes, name)
    except ValueError as error:
        return replace(result, error=str(error))
    return replace(result, features=features)


def _without(entry: Entry, start: int, stop: int, crashing: Mapping[int, str]) -> Entry:
    """Leave out what somebody else could not read, so that all backbones see the same rows."""
    bad = {row - start: why for row, why in crashing.items() if start <= row < stop}
    if not bad:
        return entry
    keep = ~np.isin(entry.rows, list(bad))
    more = {str(row): why for row, why in bad.items()}
    return replace(
        entry, x=entry.x[keep], rows=entry.rows[keep], unreadable={**entry.unreadable, **more}
    )
