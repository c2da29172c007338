"""Extraction: many backbones over one data set, each image decoded once.

What is in the store already is left out. The other rows are cut into *shards* of `plan.SHARD`
images. As many shards as fit into memory are decoded together, by worker processes: every
image once, resized once per distinct `Geometry`; the 8-bit result is shared by all backbones with
that geometry. A *unit* is one backbone over these shards. The units run one after the other, so
the first backbones can be ranked while the others run. A kill loses at most the shard at hand, an
interrupt the batch.

The first backbone that asks for pixels drives the decoding, so decoding overlaps its forward
passes. Every batch is as large as the others, and filled up where images are few: on one device,
with one number of threads and one batch size, the features of an image are the same bits whatever
else is computed, or was in the store.

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
import time
import uuid
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from sfda_tune import __version__
from sfda_tune.backbones import fingerprints, loading
from sfda_tune.backbones.devices import is_working, resolve_device
from sfda_tune.backbones.plugins import load_plugin
from sfda_tune.backbones.preprocessing import Geometry, Preprocessing
from sfda_tune.backbones.weights import is_here
from sfda_tune.data.checks import DatasetError
from sfda_tune.data.dataset import ImageDataset
from sfda_tune.data.decoding import UNREADABLE, Passing, UnreadableImage
from sfda_tune.data.loader import BATCH, Loader, count_workers, cut, is_in_memory
from sfda_tune.extraction.crashes import CRASH_REASON, PILLOW
from sfda_tune.extraction.fetching import Fetcher
from sfda_tune.extraction.pixels import Decoder, forget_pixels, require_memory
from sfda_tune.extraction.plan import BackboneJob, Outcome, Plan, Unit, cut_units, largest_shard
from sfda_tune.extraction.settings import Extraction, Map, Settings
from sfda_tune.extraction.store import (
    Entry,
    FeatureStore,
    RemoteStore,
    make_key,
    nothing,
    size_limit,
)
from sfda_tune.extraction.worker import (
    LANES,
    Executor,
    OnDemand,
    Turn,
    Worker,
    describe_error,
    fingerprint_pixels,
    too_many_unreadable,
)
from sfda_tune.values.features import Backbone, Features

__all__ = ["Pending", "extract", "extract_within", "find_pending", "is_pending"]

logger = logging.getLogger(__name__)
LOOK = 30.0  # seconds between two looks at the size of the store


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
    with (
        contextlib.nullcontext() if executor is None else OnDemand(executor) as demand,
        Fetcher(tell=getattr(progress, "fetch", None)) as fetcher,
    ):
        yield from extract_within(
            dataset, backbones, settings, store, map_fn, demand, progress, fetcher
        )


def extract_within(
    dataset: ImageDataset,
    backbones: Sequence[Backbone],
    settings: Settings | None,
    store: FeatureStore | None,
    map_fn: Map | None,
    executor: OnDemand | None,
    progress: Any,
    fetcher: Fetcher | None = None,
    digests: Sequence[str] | None = None,
) -> Generator[Extraction, None, None]:
    """Do as `extract` does, within what enters the executor when it must.

    A `fetcher` serves several extractions; it is for those in this process. `digests` are those of
    the images, if they are known.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(
            "a process that is being started runs the script again that started it; put the "
            "script's own work below `if __name__ == '__main__':`"
        )
    settings = settings or Settings()
    backbones = [backbone.taking(dataset.channels) for backbone in backbones]
    resolve = resolve_device if executor is None else executor.resolve_device
    n, limit, begun = len(dataset), settings.max_unreadable, time.time()
    weights_disk = None if fetcher is None else fetcher.limit
    if executor is not None or map_fn is not None:
        fetcher = None
    jobs: dict[str, BackboneJob] = {}
    for backbone in backbones:
        try:
            description, weights = _describe(backbone, store)
            require_memory(description.preprocessing, largest_shard(n))
            if weights is None and fetcher is not None:  # its features are those of nothing here
                fetcher.want([backbone])
            key = None
            if weights is not None:
                pixels = fingerprint_pixels(description.preprocessing)
                key = make_key(weights, pixels, settings.precision)
            jobs[backbone.name] = BackboneJob(description, weights, key, np.zeros(n, bool))
        except Exception as error:
            logger.debug("%s cannot be described", backbone.name, exc_info=True)
            yield Extraction(backbone, None, np.empty(0, np.int64), describe_error(error))

    images = _digest(dataset, store, digests)
    if store is not None:
        dataset = replace(dataset, contents=images)
    plan = Plan("", dataset, jobs, images, limit * n)
    plan.crashing.update(_without_content(dataset, images))
    done: list[str] = []
    known = len(plan.crashing)  # rows that somebody cannot read, so that nobody shows them

    def finish(name: str) -> Iterator[Extraction]:
        if (extraction := _finish(jobs[name], plan, store, limit)) is not None:
            done.append(name)
            yield extraction

    def finish_again() -> Iterator[Extraction]:
        nonlocal known
        if len(plan.crashing) > known:
            known = len(plan.crashing)
            for name in done[:]:
                done.remove(name)
                jobs[name].held = list(jobs[name].unkept)
                yield from finish(name)  # if nobody kept them, they are computed again

    doubtful: dict[int, list[BackboneJob]] = {}
    for name, job in jobs.items():
        found = _look_up(job, plan, store)
        doubts = _doubt(job, found, plan)
        for row in doubts:
            doubtful.setdefault(row, []).append(job)
        yield from finish_again()
        if not doubts and not job.lacks(plan.crashing).any():
            job.held = [(np.arange(n), found)]
            yield from finish(name)
        del found  # what is not whole is read again when the rest is there
    _look_again(doubtful, plan, settings)
    yield from finish_again()
    for name, job in jobs.items():
        if name not in done and not job.lacks(plan.crashing).any():
            yield from finish(name)
    plan = _plan_again(plan, done)
    rows = sum(int(mask.sum()) for mask in plan.lacking.values())
    if progress is not None:
        if hasattr(progress, "plan"):  # a user's own may not care
            progress.plan({
                name: (int(mask.sum()), _guess_cost(jobs[name].description))
                for name, mask in plan.lacking.items()
            })  # fmt: skip
        if hasattr(progress, "expect"):
            descriptions = (jobs[name].description for name in plan.lacking)
            sizes = [4 * d.n_params for d in descriptions if _is_to_come(d.backbone, fetcher)]
            if sizes:
                progress.expect(len(sizes), sum(sizes))
        progress.start(rows, len(done))
    if not plan.lacking:
        return
    if store is not None and store.has_outdated:
        logger.warning(  # nothing is wrong with this run: no warning, which some make an error
            "what an earlier version kept in %s is not used; `sfda-tune cache clear --outdated` "
            "deletes it",
            store.root,
        )
    settings = replace(settings, device=resolve(settings.device))
    here = map_fn is None and executor is None
    tell = progress.advance if progress and map_fn is None else None
    worker = Worker(settings, store, tell, fetcher=fetcher, weights_disk=weights_disk)
    outcomes: Any = ()
    is_tight = weights_disk is not None
    keeper = _Keeper(store, begun)
    try:
        while True:
            outcomes = (
                executor.run(worker, plan)
                if executor
                else (map_fn or _run_here)(worker, cut_units(plan, are_fetched=is_tight))
            )
            came = set()
            for outcome in outcomes:
                came.add(outcome.name)
                job = jobs[outcome.name]
                if progress is not None and not here:
                    progress.advance(outcome.name, outcome.n_images)
                if outcome.not_kept is not None:
                    warnings.warn(
                        f"features could not be kept in {store and store.root} "
                        f"({outcome.not_kept}); the run goes on",
                        stacklevel=2,
                    )
                rows_of = {s: plan.rows(outcome.name, s) for s in outcome.unreadable}
                for shard, unreadable in outcome.unreadable.items():
                    for position, why in unreadable.items():
                        plan.crashing.setdefault(int(rows_of[shard][position]), why)
                yield from finish_again()
                if outcome.name in plan.failed:
                    continue
                job.cached = False
                if job.key is None and store is not None and outcome.weights is not None:
                    pixels = fingerprint_pixels(job.description.preprocessing)
                    job.key = make_key(outcome.weights, pixels, settings.precision)
                    job.weights = outcome.weights
                for part, spent in outcome.seconds.items():
                    job.seconds[part] = job.seconds.get(part, 0.0) + spent
                new = {s: (rows_of[s], entry) for s, entry in outcome.entries.items()}
                unkept = [new[s] for s in new if s not in outcome.kept]
                for shard in outcome.kept:
                    job.stored[rows_of[shard]] = True
                if executor is not None or (store is not None and outcome.not_kept is None):
                    job.unkept += unkept
                job.held += new.values()
                if outcome.error is not None:
                    plan.failed.add(outcome.name)
                    yield replace(_blank(job), error=outcome.error, seconds=job.seconds)
                elif not job.lacks(plan.crashing).any():
                    yield from finish(outcome.name)
                    keeper.look()
                if outcome.name not in done:  # until the rest is done they need no memory
                    kept = [new[s][1] for s in new if s in outcome.kept]
                    job.held = [one for one in job.held if not any(one[1] is e for e in kept)]
            left = [name for name in jobs if name not in plan.failed and name not in done]
            if came.isdisjoint(left) and plan.lacking.keys() >= set(left):
                break  # else what was in the store has vanished since
            forget_pixels(plan.run)
            plan = _plan_again(plan, done)
        for name in left:
            lacks, missing = jobs[name].lacks(plan.crashing), plan.missing[name]
            absent = sum(lacks[plan.shards[shard]].any() for shard in missing)
            error = (
                f"nothing came back for {absent} of its {len(missing)} parts; look at "
                "what runs them (`map_fn`, `executor`), and rank again"
            )
            yield replace(_blank(jobs[name]), error=error, seconds=jobs[name].seconds)
    finally:
        if isinstance(outcomes, Generator):
            outcomes.close()
        forget_pixels(plan.run)
        keeper.look(last=True)


class Pending(NamedTuple):
    """What there is left to do for a backbone."""

    description: loading.Description
    is_local: bool  # whether its weights are here
    n_images: int  # without features


def find_pending(
    dataset: ImageDataset,
    backbones: Sequence[Backbone],
    store: FeatureStore | None,
    precision: str = "float32",
    digests: Sequence[str] | None = None,
) -> tuple[dict[str, Pending], dict[str, str]]:
    """Return what an extraction would have to do, by backbone, and who cannot be opened, and why.

    >>> from sfda_tune import open_dataset, resolve_backbones
    >>> images = open_dataset("digits").sample(30)
    >>> pending, failed = find_pending(images, resolve_backbones("demo:resnet_glyphs"), None)
    >>> pending["demo:resnet_glyphs"].n_images, failed
    (30, {})
    """
    pending: dict[str, Pending] = {}
    failed: dict[str, str] = {}
    for name, found in _look_for_pending(dataset, backbones, store, precision, digests):
        if isinstance(found, Pending):
            pending[name] = found
        else:
            failed[name] = found
    return pending, failed


def is_pending(
    dataset: ImageDataset,
    backbones: Sequence[Backbone],
    store: FeatureStore | None,
    precision: str = "float32",
    digests: Sequence[str] | None = None,
) -> bool:
    """Whether an extraction would have to show any image to any backbone.

    >>> from sfda_tune import open_dataset, resolve_backbones
    >>> images = open_dataset("digits").sample(30)
    >>> is_pending(images, resolve_backbones("demo:resnet_glyphs"), None)
    True
    """
    found = _look_for_pending(dataset, backbones, store, precision, digests)
    return any(isinstance(one, Pending) and one.n_images > 0 for _, one in found)


def _look_for_pending(
    dataset: ImageDataset,
    backbones: Sequence[Backbone],
    store: FeatureStore | None,
    precision: str,
    digests: Sequence[str] | None = None,
) -> Iterator[tuple[str, Pending | str]]:
    """Yield what there is left to do for each backbone, or why it cannot be opened."""
    images = _digest(dataset, store, digests)
    for backbone in backbones:
        try:
            description, weights = _describe(backbone, store)
            if store is None and backbone.load is None:
                weights = fingerprints.fingerprint(backbone)
        except Exception as error:  # whatever a backbone does
            yield backbone.name, describe_error(error)
            continue
        n_missing = len(dataset)
        if store is not None and weights is not None:
            pixels = fingerprint_pixels(description.preprocessing)
            n_missing -= len(store.get(make_key(weights, pixels, precision), images).known)
        is_local = backbone.load is not None or is_here(loading.timm_name(backbone.spec))
        yield backbone.name, Pending(description, is_local, n_missing)


def _digest(
    dataset: ImageDataset, store: FeatureStore | None, known: Sequence[str] | None
) -> list[str]:
    """Return what a store knows images by; nothing without one."""
    if store is None:
        return [""] * len(dataset)
    return dataset.digests() if known is None else list(known)


def _describe(
    backbone: Backbone, store: FeatureStore | None
) -> tuple[loading.Description, str | None]:
    """Return what is known of a backbone, and the fingerprint of its weights, where it is known.

    To build a network, only to see its size, takes a second; so the store notes what came of it.
    """
    if store is None:
        return loading.describe(backbone), None
    weights = noted = None
    if backbone.load is None:
        with contextlib.suppress(Exception):  # which `describe` explains
            weights = fingerprints.fingerprint(backbone, None, store.digest_file)
            if weights is None:
                weights = store.recall_weights(fingerprints.stand_in(backbone, store.digest_file))
    if weights is not None:
        noted = store.recall("networks", _network_key(backbone, weights), NETWORK)
    if weights is not None and noted is not None:
        with contextlib.suppress(TypeError):
            geometry = Geometry(**{k: _immutable(v) for k, v in noted["geometry"].items()})
            mean, std = (tuple(map(float, noted[name])) for name in ("mean", "std"))
            n_params, n_dims = noted["n_params"], noted["n_dims"]
            preprocessing = Preprocessing(geometry, mean, std)
            return loading.Description(backbone, n_params, n_dims, preprocessing), weights
    found = loading.describe(backbone)
    if weights is None:
        weights = fingerprints.fingerprint(backbone, None, store.digest_file)
    p = found.preprocessing
    if weights is not None and p.geometry is not None and backbone.load is None:
        known = {"n_params": found.n_params, "n_dims": found.n_dims}
        known |= {"geometry": asdict(p.geometry), "mean": p.mean, "std": p.std}
        store.note("networks", _network_key(backbone, weights), known)
    return found, weights


def _is_to_come(backbone: Backbone, fetcher: Fetcher | None) -> bool:
    """Whether weights were not here when the run began."""
    if backbone.load is not None:
        return False
    came = fetcher is not None and fetcher.has_fetched(backbone.name)
    return came or not is_here(loading.timm_name(backbone.spec))


def _network_key(backbone: Backbone, weights: str) -> str:
    adapted = "" if backbone.channels == 3 else f"{backbone.channels} channels"
    return make_key(weights, __version__, adapted)


def _immutable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


NETWORK = {"n_params": int, "n_dims": (int, None), "mean": [float], "std": [float]}
NETWORK |= {"geometry": {"input_size": [int], "interpolation": str, "crop_pct": float,
                         "crop_mode": str, "fill": [float]}}  # fmt: skip


def _plan_again(plan: Plan, done: Sequence[str]) -> Plan:
    """Return the plan of what is missing now."""
    names = [name for name in plan.jobs if name not in done and name not in plan.failed]
    lacking = {name: plan.jobs[name].lacks(plan.crashing) for name in names}
    return replace(plan, run=uuid.uuid4().hex, lacking=lacking)


class _Keeper:
    """Sees to it, now and then, that a store keeps within its limit."""

    def __init__(self, store: FeatureStore | None, begun: float) -> None:
        self.store, self.begun, self.looked = store, begun, time.monotonic()
        self.limit = None if isinstance(store, RemoteStore | None) else size_limit()

    def look(self, *, last: bool = False) -> None:
        if self.store is None or self.limit is None:
            return
        if last or time.monotonic() - self.looked > LOOK:
            with contextlib.suppress(OSError):  # a read-only store
                count, size = self.store.shrink(self.limit, self.begun)
                logger.info("%d segments, %d bytes, made room in the cache", count, size)
            self.looked = time.monotonic()


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


def _guess_cost(description: Any) -> float:
    """Return about what an image costs, before any was shown: parameters × pixels."""
    _, height, width = description.preprocessing.input_size or (3, 224, 224)
    return float(description.n_params) * height * width + 1.0


def _look_up(job: BackboneJob, plan: Plan, store: FeatureStore | None) -> Entry:
    """Find what there is."""
    if store is None or job.key is None:
        return Entry(nothing(), np.empty(0, np.int64))
    found = store.get(job.key, plan.images)
    job.stored[found.known] = True
    return found


def _doubt(job: BackboneJob, found: Entry, plan: Plan) -> list[int]:
    """Return the rows that are kept as unreadable, and that may be readable by now.

    What a decoder makes of bytes depends on its version and on the formats it knows. An image that
    crashes it is believed to do so where it is the same; another decoder has to try it anew, where
    a crash does no harm.
    """
    rows: list[int] = []
    for row, why in found.unreadable.items():
        if why.startswith(CRASH_REASON) and why.endswith(PILLOW):
            plan.crashing.setdefault(row, why)
        elif why.startswith(CRASH_REASON) and row not in plan.crashing:
            job.stored[row] = False
        elif row not in plan.crashing:
            rows.append(row)
    return rows


def _look_again(
    doubtful: Mapping[int, Sequence[BackboneJob]], plan: Plan, settings: Settings
) -> None:
    """Read doubtful rows again; forget what was kept of those that somebody can read by now."""
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
                job.stored[row] = False


def _problems(items: list[tuple[list[Any], str | None, float]]) -> list[str | None]:
    return [problem for _, problem, _ in items]


def _run_here(worker: Worker, units: Iterable[Unit]) -> Generator[Outcome, None, None]:
    """Run units in this process; if a network breaks the device's context, the rest in others."""
    waiting: deque[Unit] = deque()
    units = iter(units)
    if worker.fetcher is not None:
        units = worker.fetcher.order(units, worker.advance)

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
            if worker.fetcher is not None:
                worker.fetcher.release(outcome.name)
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
    job: BackboneJob, plan: Plan, store: FeatureStore | None, limit: float
) -> Extraction | None:
    """Join all that is known of one backbone; None if something is gone, which is said."""
    dataset, n = plan.dataset, len(plan.dataset)
    here, job.held = job.held, []  # the features live on with whoever takes them
    absent = np.ones(n, bool)
    for rows, entry in here:
        absent[rows[entry.known]] = False
    absent[list(plan.crashing)] = False
    if absent.any() and store is not None and job.key is not None:
        rows = np.flatnonzero(absent)
        found = store.get(job.key, [plan.images[row] for row in rows])
        absent[rows[found.known]] = False
        if absent.any():
            logger.info("%s: features of %d images vanished", _name(job), absent.sum())
            job.held = here
        here = [*here, (rows, found)]
    if absent.any():
        job.stored[absent] = False
        return None
    unreadable = {int(rows[p]): why for rows, entry in here for p, why in entry.unreadable.items()}
    unreadable = dict(sorted((unreadable | plan.crashing).items()))
    if len(unreadable) > limit * n:
        raise too_many_unreadable(unreadable, dataset, limit)
    parts = [(rows[entry.rows], entry) for rows, entry in here if len(entry.rows)]
    rows = np.concatenate([rows for rows, _ in parts]) if parts else np.empty(0, np.int64)
    infos = [entry.info for _, entry in parts]
    spent = sum(info.get("forward_seconds", 0.0) for info in infos)
    hungriest = max(infos, key=lambda info: info.get("peak_memory") or 0, default={})
    order = np.argsort(rows, kind="stable")
    order = order[~np.isin(rows[order], list(unreadable))]
    result = replace(
        _blank(job),
        rows=rows[order],
        unreadable=unreadable,
        images_per_second=len(rows) / spent if spent else None,
        batch=max((info.get("batch") or 0 for info in infos), default=0) or None,
        peak_memory=hungriest.get("peak_memory"),
        peak_batch=hungriest.get("peak_batch"),
        cached=job.cached,
        seconds=job.seconds,
    )
    try:
        x = parts[0][1].x if len(parts) == 1 else np.concatenate([e.x for _, e in parts])
        if len(order) != len(x) or (order != np.arange(len(x))).any():
            x = x[order]
        features = Features(
            x, dataset.labels[rows[order]], dataset.classes, _name(job), task=dataset.task
        )
    except ValueError as error:
        return replace(result, error=str(error))
    return replace(result, features=features)


def _name(job: BackboneJob) -> str:
    return job.description.backbone.name
