"""What computes a unit: one backbone over the pixels of some shards."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sfda_tune.backbones import fingerprints, loading
from sfda_tune.backbones.devices import (
    compute,
    few_threads,
    is_out_of_memory,
    lay_out,
    use_threads,
)
from sfda_tune.backbones.preprocessing import Preprocessing
from sfda_tune.backbones.weights import is_here
from sfda_tune.data.checks import DatasetError
from sfda_tune.data.dataset import ImageDataset
from sfda_tune.data.decoding import Passing, get_switches, set_switches
from sfda_tune.extraction.fetching import EndedError, Fetcher
from sfda_tune.extraction.pixels import PIN, SharedPixels, lend_pixels
from sfda_tune.extraction.plan import Outcome, Plan, Unit
from sfda_tune.extraction.settings import Settings
from sfda_tune.extraction.store import Entry, FeatureStore, make_key, nothing

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

__all__ = ["Executor", "OnDemand", "Worker"]
# What lets a GPU compute all the time; `tests/benchmarks/gpu.py` measures each of them alone.
LANES = 2  # units under way: while one computes, the next one's network is opened
SIDE_STREAM = True  # and are read while it computes
WARM_UP = True  # the next network's kernels are chosen and loaded while this one computes


class Turn:
    """Lets one unit after the other compute, in their order; entered before a unit does."""

    def __init__(self, before: Turn | None, stop: threading.Event) -> None:
        self._before, self._stop, self._over = before, stop, threading.Event()

    def __enter__(self) -> None:
        while self._before is not None and not self._before._over.wait(0.1):
            self.check()
        self._before = None  # or the turns of a long run would hang on each other
        self.check()

    def __exit__(self, *error: object) -> None:
        self._over.set()

    def check(self) -> None:
        """Raise if the run has ended; threads cannot be interrupted."""
        if self._stop.is_set():
            raise EndedError("the run has ended")


# Held while a network comes to a device or leaves it, and while a batch's memory is measured.
_MOVES = threading.RLock()


@dataclass(frozen=True, eq=False)
class Worker:
    """Runs a unit; can be sent to another process."""

    settings: Settings
    store: FeatureStore | None
    advance: Callable[[str, int], None] | None = None
    threads: int | None = None  # decode in so many threads, not in processes
    resident: dict[str, Any] | None = None  # keeps the networks from one unit to the next
    turn: Turn | None = None  # for the device, where several units are under way
    fetcher: Fetcher | None = None  # of the weights of all units
    weights_disk: int | None = (
        None  # bytes of each machine that they may take, elsewhere than here
    )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "advance": None, "resident": None, "turn": None, "fetcher": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __call__(self, unit: Unit) -> Outcome:
        """Return the outcome; only a fault of the data set is raised."""
        parts = ("load", "forward", "copy", "decode", "decode_work")
        seconds: dict[str, float] = dict.fromkeys(parts, 0.0)
        outcome = Outcome(unit.backbone.name, seconds=seconds)
        try:
            set_switches(unit.switches)
            self._run(unit, outcome)
        except DatasetError:  # the data set's fault, not the backbone's: it ends the run
            raise
        except Exception as error:
            logger.debug("%s failed", unit.backbone.name, exc_info=True)
            outcome.error = describe_error(error)
            outcome.entries, outcome.kept, outcome.unreadable = {}, set(), {}
        return outcome

    def _run(self, unit: Unit, outcome: Outcome) -> None:
        started = time.perf_counter()
        forward, outcome.weights, n_params = self._load(unit)
        outcome.seconds["load"] = time.perf_counter() - started
        on_gpu = forward.device.type == "cuda"
        kept: deque[Any] = deque()
        about = outcome, n_params, unit.dataset.name
        with ThreadPoolExecutor(1) as keeper:  # a thread starts with the first entry
            most = use_threads(self.settings.threads)
            with (
                self.turn or contextlib.nullcontext(),
                most,
                few_threads(forward.module, unit.preprocessing),
            ):
                for shard in self._forward_all(unit, outcome, forward):
                    try:
                        if on_gpu:
                            kept.append(keeper.submit(self._keep, shard, *about))
                        else:
                            self._keep(shard, *about)
                        if len(kept) > 2:
                            kept.popleft().result()
                    finally:  # whatever became of what was computed before
                        if shard.stopped is not None:
                            raise shard.stopped
            for entry in kept:
                entry.result()
        self._compact(unit, outcome)
        with _MOVES:
            del forward

    def _forward_all(self, unit: Unit, outcome: Outcome, forward: _Forward) -> Iterator[_Shard]:
        """Compute the shards of a unit, but for what is in the store by now."""
        key, pin = self._key(unit, outcome), PIN and forward.device.type == "cuda"
        look = self.store is not None and (unit.retry or unit.weights is None)
        with lend_pixels(unit, self.settings, pin=pin, threads=self.threads) as shared:
            filled = shared.filled
            try:
                for (number, rows), images in zip(unit.shards, unit.images, strict=True):
                    outcome.n_images += len(rows)
                    known = Entry(nothing(), np.empty(0, np.int64))
                    if look and self.store is not None:
                        known = self.store.get(key, images)
                    shard = self._forward(unit, outcome, forward, shared, rows, known)
                    shard.number, shard.key, shard.images = number, key, images
                    yield shard
            finally:
                outcome.n_decoded = shared.filled - filled

    def _key(self, unit: Unit, outcome: Outcome) -> str:
        pixels = fingerprint_pixels(unit.preprocessing)
        return make_key(outcome.weights or "", pixels, self.settings.precision)

    def _forward(
        self,
        unit: Unit,
        outcome: Outcome,
        forward: _Forward,
        shared: SharedPixels,
        shard: np.ndarray,
        known: Entry,
    ) -> _Shard:
        """Compute the rows of a shard beside the known ones; on a GPU only begin to.

        What is computed when the run is stopped comes with what stopped it: for a slow network, a
        shard takes longer than there may be time.
        """
        seconds = outcome.seconds
        # Who watches may stop the run: also while slow images are decoded.
        tick = None if self.advance is None else partial(self.advance, unit.backbone.name, 0)
        waited, started = seconds["decode"], time.perf_counter()
        positions = np.setdiff1d(np.arange(len(shard)), known.known)
        if self.advance is not None and len(positions) < len(shard):
            self.advance(unit.backbone.name, len(shard) - len(positions))
        done: list[tuple[torch.Tensor, np.ndarray]] = []
        peak, stopped = {}, None
        forward.begin()
        try:
            while len(positions):
                if self.turn is not None:
                    self.turn.check()
                some, positions = np.split(positions, [forward.batch_size])
                rows = shared.rows(shard[some], seconds, tick)
                if len(shared.unreadable) > unit.max_unreadable:
                    raise too_many_unreadable(
                        shared.unreadable, unit.dataset, self.settings.max_unreadable
                    )
                if len(rows):
                    pixels = shared.pixels(unit.preprocessing.key, rows)
                    good = some[np.isin(shard[some], rows)]
                    if forward.device.type == "cuda" and not done:
                        with _MOVES:
                            part, peak = forward.measure(pixels)
                    else:
                        part = forward(pixels)
                    done.append((part, good))  # at once: a signal may come anywhere
                if self.advance is not None:
                    self.advance(unit.backbone.name, len(some))
        except (KeyboardInterrupt, SystemExit, EndedError, DatasetError) as error:
            stopped = error
        features = _to_host([part for part, _ in done])
        spent = time.perf_counter() - started - (seconds["decode"] - waited)
        rows = np.concatenate([good for _, good in done] or [np.empty(0, np.int64)])
        new = np.setdiff1d(np.arange(len(shard)), known.known)
        unreadable = {int(new[p]): why for p, why in shared.reasons(shard[new]).items()}
        clock = forward.clock(spent, len(rows))
        return _Shard(features, rows, unreadable, peak, forward.batch_size, clock, known, stopped)

    def _keep(self, done: _Shard, outcome: Outcome, n_params: int, dataset: str) -> None:
        """Wait for the features of a shard and put them into the store."""
        started = time.perf_counter()
        x, forward_seconds = done.features(), done.seconds()
        outcome.seconds["copy"] += time.perf_counter() - started
        outcome.seconds["forward"] += forward_seconds
        info = {
            "backbone": outcome.name,
            "n_params": n_params,
            "forward_seconds": forward_seconds,
            "batch": done.batch,
            "device": self.settings.device,
            "dataset": dataset,
            **done.peak,
        }
        entry = Entry(x, done.rows, done.unreadable, info)
        if not np.isfinite(x).all():
            raise ValueError(
                f"its features are not finite in {self.settings.precision}"
                + ("" if self.settings.precision == "float32" else "; try float32")
            )
        outcome.entries[done.number] = _unite(done.known, entry)
        outcome.unreadable[done.number] = outcome.entries[done.number].unreadable
        if self.store is not None:
            lasting = {
                p: why for p, why in done.unreadable.items() if not isinstance(why, Passing)
            }
            try:
                self.store.put(done.key, done.images, replace(entry, unreadable=lasting))
                outcome.kept.add(done.number)
            except OSError as error:  # a full disk costs the cache, not the result
                outcome.not_kept = str(error)

    def _compact(self, unit: Unit, outcome: Outcome) -> None:
        """Join what has piled up in the store; if that fails, it stays as it is."""
        if self.store is not None and outcome.kept:
            try:
                self.store.compact(self._key(unit, outcome))
            except OSError:
                logger.debug("%s: its segments are not joined", outcome.name, exc_info=True)

    def _load(self, unit: Unit) -> tuple[_Forward, str, int]:
        import torch

        name = unit.backbone.name
        if self.resident is not None and name in self.resident:
            return self.resident[name]
        device = torch.device(self.settings.device)
        fetched = unit.backbone.load is None and not is_here(loading.timm_name(unit.backbone.spec))
        nothing_to_fetch = contextlib.nullcontext(False)
        with self.fetcher.opening(unit.backbone) if self.fetcher else nothing_to_fetch as came:
            module, preprocessing = loading.load(unit.backbone)
            weights = self._fingerprint(unit, module, fetched or came)
        n_params = sum(p.numel() for p in module.parameters())
        with _MOVES, use_threads(1):
            module = module.to(device)
            forward = _Forward(module, preprocessing, device, self.settings)
            if device.type == "cuda" and self.turn is not None and WARM_UP:
                forward.warm_up()
        loaded = forward, weights, n_params
        if self.resident is not None:
            self.resident[name] = loaded
        return loaded

    def _fingerprint(self, unit: Unit, module: Any, fetched: bool) -> str:
        """Return that of the weights; note it for the next run, if they came from the hub."""
        weights = unit.weights or ""
        if self.store is not None and (fetched or not weights):
            digest = self.store.digest_file
            weights = fingerprints.fingerprint(unit.backbone, module, digest) or ""
            if unit.weights and weights != unit.weights:
                raise loading.BackboneError(
                    "its weights on the hub are no longer those that some of its features are of; "
                    "rank again"
                )
            if fetched and (known := fingerprints.stand_in(unit.backbone, digest)) is not None:
                self.store.note("weights", known, {"weights": weights})
        return weights


@dataclass(eq=False)
class _Shard:
    """What a device has computed, or is about to: `features` and `seconds` wait for it."""

    features: Callable[[], np.ndarray]
    rows: np.ndarray
    unreadable: dict[int, str]
    peak: dict[str, int]
    batch: int
    seconds: Callable[[], float]
    known: Entry  # what was in the store
    stopped: BaseException | None  # what ended the run in its midst
    number: int = 0
    key: str = ""
    images: Sequence[str] = ()


class _Forward:
    """Batches of pixels to features on the device, with as large a batch as fits."""

    def __init__(
        self, module: Any, preprocessing: Preprocessing, device: torch.device, settings: Settings
    ) -> None:
        import torch

        self.module, self.preprocessing = module, preprocessing
        self.layout = lay_out(module)
        self.device, self.precision = device, settings.precision
        self.batch_size = settings.batch_size or _default_batch(preprocessing, device)
        self._paces: dict[int, list[float]] = {}  # seconds of batches, by number of threads
        self._computed = 0  # images since `begin`
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._moved: deque[torch.Tensor] = deque(maxlen=2)  # what the device may still read
        self._copies = None
        if device.type == "cuda" and SIDE_STREAM:
            self._copies = torch.cuda.Stream(device)

    def warm_up(self) -> None:
        """Compute a batch of nothing on a GPU: kernels are chosen and loaded with the first."""
        import torch

        if self.preprocessing.input_size is None:
            return
        size = (self.batch_size, *self.preprocessing.input_size)
        with contextlib.suppress(Exception), torch.cuda.device(self.device):  # as if not tried
            self._compute(torch.zeros(size, dtype=torch.uint8, device=self.device))

    def begin(self) -> None:
        """Begin to measure the time that the device computes."""
        self._computed = 0
        self._events = self._events[-2:]
        self._first = len(self._events)

    def clock(self, spent: float, n: int) -> Callable[[], float]:
        """Return what tells how long `n` images took since `begin`, without what filled batches.

        That is what a GPU says; of others it is of the seconds `spent`.
        """
        events = self._events[self._first :]
        share = n / max(self._computed, 1)
        if self.device.type != "cuda":
            return lambda: spent * share
        return lambda: sum(a.elapsed_time(b) for a, b in events) / 1000 * share

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        import torch

        parts, start = [], 0
        alone: Any = contextlib.nullcontext()
        while start < len(pixels):
            size = min(self.batch_size, len(pixels) - start)
            try:
                with alone, self._in_threads():
                    parts.append(self._run(pixels[start : start + size]))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.device.type == "cuda" and alone is not _MOVES:
                    alone = _MOVES  # the next network's first batch may have taken it: once more
                elif self.batch_size == 1:
                    raise MemoryError("out of memory with a single image") from error
                else:
                    self.batch_size //= 2  # so large was this one, too, with what filled it up
                    logger.info("out of memory: batches of %d now", self.batch_size)
            else:
                start += size
                continue
            if self.device.type == "cuda":  # outside the handler, which keeps the tensors alive
                torch.cuda.empty_cache()
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @contextlib.contextmanager
    def _in_threads(self) -> Iterator[None]:
        """Compute a batch with one thread, or all of PyTorch's: what was faster, here and now.

        Beside other work a second thread may cost more than it brings. The first four batches try
        both; all are as large, and their features the same to the last bit whatever the threads
        (the 34 networks of the zoo and the demo, 1 and 2 threads), so the load may decide.
        """
        import torch

        most = 1 if self.device.type != "cpu" else torch.get_num_threads()
        paces = {n: self._paces.setdefault(n, []) for n in {1, most}}
        tries = [n for n in paces if len(paces[n]) < 2]
        n = (
            min(tries, key=lambda n: (len(paces[n]), -n))
            if tries
            else min(paces, key=lambda n: min(paces[n]))
        )
        started = time.perf_counter()
        with use_threads(n) if most > 1 else contextlib.nullcontext():
            yield
        if tries:
            paces[n].append(time.perf_counter() - started)

    def measure(self, pixels: torch.Tensor) -> tuple[torch.Tensor, dict[str, int]]:
        """Compute on a GPU, and return the bytes that a batch took at most beside the weights."""
        import torch

        torch.cuda.reset_peak_memory_stats(self.device)
        base = torch.cuda.memory_allocated(self.device)
        features = self(pixels)
        peak = torch.cuda.max_memory_allocated(self.device) - base
        return features, {"peak_memory": peak, "peak_batch": min(self.batch_size, len(pixels))}

    def _run(self, pixels: torch.Tensor) -> torch.Tensor:
        import torch

        if self.device.type != "cuda":
            return self._compute(pixels.to(self.device))
        with torch.cuda.device(self.device):
            if len(self._moved) == self._moved.maxlen:  # two batches ahead, no more
                self._events[-2][1].synchronize()
            moved = self._move(pixels)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            features = self._compute(moved)
            end.record()
        self._moved.append(moved)
        self._events.append((begin, end))
        return features

    def _move(self, pixels: torch.Tensor) -> torch.Tensor:
        """Copy pixels to the GPU, beside what it computes for the batch before."""
        import torch

        if self._copies is None:
            return pixels.to(self.device, non_blocking=True)
        # No `record_stream`: where a context is broken it ends the process.
        with torch.cuda.stream(self._copies):
            moved = pixels.to(self.device, non_blocking=True)
        torch.cuda.current_stream(self.device).wait_stream(self._copies)
        return moved

    def _compute(self, pixels: torch.Tensor) -> torch.Tensor:
        import torch

        n = len(pixels)
        with torch.inference_mode(), compute(self.device, self.precision):
            # Kernels differ by the size of a batch, and so do the last bits of what they give, but
            # not by the place in it: so every batch is as large, and the last image fills it up.
            if n < self.batch_size:
                rest = pixels[-1:].expand(self.batch_size - n, *pixels.shape[1:])
                pixels = torch.cat([pixels, rest])
            batch = self.preprocessing.normalize(pixels)
            features = self.module(batch.contiguous(memory_format=self.layout))
            if isinstance(features, torch.Tensor) and features.ndim == 4:
                features = features.mean((2, 3))
            got = type(features).__name__
            if isinstance(features, torch.Tensor):
                got = f"{[*features.shape]} {features.dtype}"
                if (
                    features.ndim == 2
                    and len(features) == len(batch)
                    and not features.is_complex()
                ):
                    self._computed += len(pixels)
                    return features[:n].float()
            raise ValueError(
                "a backbone must return real features (n, n_dims) or (n, n_dims, h, w) of its "
                f"n = {len(batch)} images but returned {got}"
            )


def fingerprint_pixels(preprocessing: Preprocessing) -> str:
    """Return that of the preprocessing, with Pillow's switches where they are not the usual."""
    changed = get_switches()
    text = preprocessing.fingerprint()
    return f"{text} {json.dumps(changed, sort_keys=True, default=str)}" if changed else text


def _unite(old: Entry, new: Entry) -> Entry:
    """Put what was known of some images beside what was computed for the others."""
    if not len(old.known):
        return new
    if not len(new.known):
        return old
    rows = np.concatenate([old.rows, new.rows])
    x = np.concatenate([entry.x for entry in (old, new) if len(entry.rows)] or [nothing()])
    order = np.argsort(rows)
    return Entry(x[order], rows[order], {**old.unreadable, **new.unreadable}, new.info)


def _to_host(parts: list[torch.Tensor]) -> Callable[[], np.ndarray]:
    """Join a shard's features; return what waits for them and brings them to the host."""
    import torch

    if not parts:
        return nothing
    features = torch.cat(parts)
    if features.device.type != "cuda":
        return lambda: features.cpu().numpy()
    with torch.cuda.device(features.device):
        computed = torch.cuda.Event()
        computed.record()

    def fetch() -> np.ndarray:  # in a stream of its own, beside what is computed next
        with torch.cuda.device(features.device), torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_event(computed)
            return features.cpu().numpy()

    return fetch


def _default_batch(preprocessing: Preprocessing, device: torch.device) -> int:
    """Keep the pixels of a batch about constant: 16 images of 224², sixteen times that on a GPU.

    A power of two, so that it divides `plan.SHARD`; small on a CPU, where more gain nothing, and
    few images would have to fill it.
    """
    _, height, width = preprocessing.input_size or (3, 224, 224)
    few, most = (16, 7) if device.type == "cpu" else (256, 9)
    size = few * 224 * 224 // (height * width)
    return int(2 ** np.clip(np.floor(np.log2(max(size, 1))), 0, most))


def describe_error(error: Exception) -> str:
    """Say what went wrong; our own errors (`ValueError`) need no name of their kind."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"


def too_many_unreadable(
    unreadable: dict[int, str], dataset: ImageDataset, limit: float
) -> DatasetError:
    row, reason = next(iter(unreadable.items()))
    return DatasetError(
        f"{len(unreadable)} of the {len(dataset)} images cannot be read, more than "
        f"max_unreadable={limit:g} allows; the first is {dataset.item_name(row)} ({reason})"
    )


class Executor(Protocol):
    """Runs the units of a plan on other machines; entered before the first run."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *error: Any) -> None: ...

    def resolve_device(self, device: str) -> str:
        """Return the device of the workers behind ``"auto"``."""
        ...

    def run(self, worker: Worker, plan: Plan) -> Generator[Outcome, None, None]:
        """Yield an outcome for each unit, until nothing of the plan is missing.

        An executor that calls ``worker.advance(name, 0)`` every second or so is stopped in time,
        by what that raises. One with a true attribute ``bounds_weights`` keeps to
        `Worker.weights_disk`. An attribute ``n_places`` are the units that it runs at a time, an
        attribute ``waited`` the seconds that it waited for workers to start.
        """
        ...

    def report(self) -> dict[str, Any]:
        """Return what `Ranking.info["executor"]` is to hold, as JSON values."""
        ...


class OnDemand:
    """An executor that is entered when there is something to run, and left at the end.

    Where everything is in the store, no cluster is started, nor asked for.
    """

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.device: str | None = None
        self._entering = 0.0  # seconds
        self._stack = contextlib.ExitStack()
        self._entered = False

    def __enter__(self) -> OnDemand:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def enter(self) -> Executor:
        """Start the executor, if that has not been done; from then on `n_places` is known."""
        if not self._entered:
            started = time.perf_counter()
            self._stack.enter_context(self.executor)
            self._entering = time.perf_counter() - started
            self._entered = True
        return self.executor

    @property
    def n_places(self) -> int:
        """The units that run at a time, as far as that is known."""
        return getattr(self.executor, "n_places", 1)

    @property
    def waited(self) -> float:
        """The seconds so far until workers had started."""
        return self._entering + getattr(self.executor, "waited", 0.0)

    def resolve_device(self, device: str) -> str:
        """Return the device of the workers; it stays known as `device`."""
        self.device = self.enter().resolve_device(device)
        return self.device

    def run(self, worker: Worker, plan: Plan) -> Generator[Outcome, None, None]:
        """Run the plan."""
        return self.enter().run(worker, plan)

    def report(self) -> dict[str, Any] | None:
        """Return what the executor tells; nothing if it had nothing to run."""
        return self.executor.report() if self._entered else None
