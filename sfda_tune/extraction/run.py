"""Extraction: many backbones over one data set, each image decoded once.

The rows are cut into *shards* of `SHARD` images, the unit in which features are stored, and
consecutive shards into *blocks* whose decoded pixels fit into memory. Within a block every image
is decoded once, by worker processes, and resized once per distinct `Geometry`; the 8-bit result is
shared by all backbones with that geometry. Backbones run one after the other over a block, so the
first finished ones can be ranked while the others run, and a kill loses at most the shard at hand.

The first backbone that asks for pixels drives the decoding, so decoding overlaps its forward
passes. A batch never crosses a shard: the features of a row do not depend on how many rows,
workers or processes there are.

An `Executor` runs the same units elsewhere: it is handed the `Plan` of what is missing and one
`Worker`, cuts the plan into units as it sees fit, and hands back their outcomes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import multiprocessing
import pickle
import signal
import subprocess
import sys
import threading
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import numpy as np
import PIL

from sfda_tune.backbones import specs as zoo
from sfda_tune.backbones.devices import check_precision, compute, is_working, pin
from sfda_tune.backbones.preprocessing import Geometry, Preprocessing
from sfda_tune.data.decoding import UNREADABLE, Passing, get_switches, is_passing, set_switches
from sfda_tune.data.loader import BATCH, Loader, count_workers, cut, is_in_memory
from sfda_tune.data.opening import DatasetError, ImageDataset, UnreadableImage
from sfda_tune.extraction.store import Entry, FeatureStore, make_key
from sfda_tune.values.ranking import Backbone, Features

if TYPE_CHECKING:
    import torch

__all__ = [
    "PRECISIONS",
    "SHARD",
    "Executor",
    "Extraction",
    "Map",
    "Outcome",
    "Plan",
    "Settings",
    "Unit",
    "Worker",
    "extract",
    "find_poison",
]

logger = logging.getLogger(__name__)

A = TypeVar("A")
B = TypeVar("B")

SMALL = 5e5  # parameters × (pixels / 224²): below, one thread computes
SHARD = 1024  # images in one entry of the store; part of what `store.FORMAT` means
PIXEL_BYTES = 4 << 30  # at most so much memory for decoded pixels, and a quarter of what is free
PRECISIONS = ("float32", "tf32", "bfloat16", "float16")
# What lets a GPU compute all the time; `tests/benchmarks/gpu.py` measures each of them alone.
LANES = 2  # units under way: while one computes, the next one's network is opened
PIN = True  # decoded pixels lie in memory that the device reads by itself
SIDE_STREAM = True  # and are read while it computes


class Map(Protocol):
    """Anything called like the builtin `map`: serial, threads, processes or remote actors."""

    def __call__(self, fn: Callable[[A], B], items: Iterable[A], /) -> Iterable[B]:
        """Apply `fn` to every item, in any order, anywhere."""
        ...


@dataclass(frozen=True)
class Settings:
    """How to extract.

    Parameters
    ----------
    device : str, default "auto"
        Any torch device; ``"auto"`` is CUDA, else MPS, else the CPU.
    precision : {"float32", "tf32", "bfloat16", "float16"}
        Of the forward pass, see `sfda_tune.backbones.devices.compute`; ``"tf32"`` is for CUDA devices.
        Features are always returned as float32.
    batch_size : int, optional
        Default: by input size and device. Halved for as long as the memory does not suffice.
    workers : int, optional
        Decoding processes; 0 decodes in this process. Default: one per core, at most 8; 0 for
        small images that are in memory already, and within the processes of a pool.
    max_unreadable : float, default 0.1
        Fraction of unreadable images above which the data set is refused.

    Raises
    ------
    ValueError
        Naming the setting, the rule and the value.
    """

    device: str = "auto"
    precision: str = "float32"
    batch_size: int | None = None
    workers: int | None = None
    max_unreadable: float = 0.1

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"`precision` must be one of {', '.join(PRECISIONS)} but is {self.precision!r}."
            )
        check_precision(self.precision, self.device)
        for name, least in (("batch_size", 1), ("workers", 0)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, (int, np.integer)) or value < least):
                raise ValueError(f"`{name}` must be an integer ≥ {least} but is {value!r}.")
        if not 0 <= self.max_unreadable <= 1:
            raise ValueError(
                f"`max_unreadable` must lie in 0 … 1 but is {self.max_unreadable!r}; it is the "
                "fraction of images that may be unreadable."
            )


@dataclass(frozen=True, eq=False)
class Extraction:
    """What came of one backbone: its features, or the error that stopped it.

    Parameters
    ----------
    backbone : Backbone
    features : Features or None
    rows : array of int64, shape (n_samples,)
        Row of the data set behind each row of the features.
    error : str or None
    unreadable : dict of int to str
        Row of the data set → reason, for the images that could not be read.
    n_params : int or None
    input_size : (channels, height, width) or None
    images_per_second : float or None
        Forward passes only, on the device, as measured when they were made.
    peak_memory : int or None
        Bytes that the forward passes took at most beside the weights; on CUDA only.
    peak_batch : int or None
        Images in a batch then.
    cached : bool
        No forward pass was needed.
    seconds : dict of str to float
        Spent now: ``load``, ``decode`` (waiting for pixels), ``forward``; ``decode_work`` is the
        time the decoding took in the workers, ``copy`` what features took to come to the host
        with the wait for the device, most of both hidden behind the forward passes.
    """

    backbone: Backbone
    features: Features | None
    rows: np.ndarray
    error: str | None = None
    unreadable: dict[int, str] = field(default_factory=dict)
    n_params: int | None = None
    input_size: tuple[int, int, int] | None = None
    images_per_second: float | None = None
    peak_memory: int | None = None
    peak_batch: int | None = None
    cached: bool = False
    seconds: dict[str, float] = field(default_factory=dict)


@contextlib.contextmanager
def use_threads(n: int) -> Iterator[None]:
    """Let PyTorch compute with `n` threads, then with as many as before."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def few_threads(module: torch.nn.Module, preprocessing: Preprocessing) -> Iterator[None]:
    """Let PyTorch compute a small network with one thread.

    On an idle machine with two cores a second thread gained such networks at most a tenth; with
    anything else running beside, waiting for each other cost them 20 to 50 times the seconds.
    Goes by the network, not by the load, so that the same input gives the same bits.
    """
    import torch

    _, height, width = preprocessing.input_size or (3, 224, 224)
    work = sum(p.numel() for p in module.parameters()) * height * width / 224**2
    with use_threads(1 if work < SMALL else torch.get_num_threads()):
        yield


def resolve_device(device: str) -> str:
    """Return the torch device behind ``"auto"``, or check the given one.

    Raises
    ------
    ValueError
        If torch cannot use it.
    """
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"`device` must be 'auto' or a device torch can use but is {device!r} ({reason})."
        ) from error
    return device


# The pixels of a block --------------------------------------------------------------------------
class _Decoder:
    """A torch data set: one image in, one tensor per preprocessing out."""

    def __init__(
        self,
        dataset: ImageDataset,
        halves: Sequence[Preprocessing],
        poison: Mapping[int, str],
    ) -> None:
        self.dataset, self.halves, self.poison = dataset, halves, poison
        self.transforms = [half.build() for half in halves]

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, row: int) -> str:
        return self.dataset.item_name(row)

    def __getitem__(self, row: int) -> tuple[list[Any], str | None, float]:
        started = time.perf_counter()
        tensors: list[Any] = []
        problem = None
        try:
            if row in self.poison:  # reading it would end this process
                raise UnreadableImage(self.dataset.item_name(row), self.poison[row])
            image = self.dataset.load(row)
            for half, transform in zip(self.halves, self.transforms, strict=True):
                try:
                    tensors.append(transform(image))
                except Exception as error:
                    if half.geometry is not None:  # e.g. 1 × 100,000 pixels: nobody can use it
                        why = Passing(error) if is_passing(error) else str(error)
                        raise UnreadableImage(self.dataset.item_name(row), why) from error
                    tensors.append(f"{type(error).__name__}: {error}")  # that backbone's own fault
        except UnreadableImage as error:
            problem = error.reason
        return tensors, problem, time.perf_counter() - started


def _collate(items: list[tuple[list[Any], str | None, float]]) -> tuple[Any, ...]:
    """Stack the readable images of each preprocessing; a text takes the place of a failed one."""
    import torch

    readable = [tensors for tensors, problem, _ in items if problem is None]
    stacks: list[Any] = []
    for tensors in zip(*readable, strict=True):
        faults = [t for t in tensors if isinstance(t, str)]
        try:
            stacks.append(faults[0] if faults else torch.stack(list(tensors)))
        except (RuntimeError, TypeError) as error:
            if _out_of_memory(error):  # which is not the transform's fault
                raise
            stacks.append(f"the transform's results cannot be stacked: {error}")
    return stacks, [problem for _, problem, _ in items], sum(seconds for *_, seconds in items)


class PixelBlock:
    """Decoded images of some rows, for several preprocessings, filled as far as somebody asked.

    Several threads may read it; the one that needs more rows fills it for all.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        halves: Sequence[Preprocessing],
        settings: Settings,
        plugins: Sequence[str],
        *,
        pin: bool,
        poison: Mapping[int, str],
        threads: int | None = None,
    ) -> None:
        self.n = len(dataset)
        self.keys = [half.key for half in halves]
        self.filled = self.users = 0
        self.used = 0.0  # when, last
        self.nbytes = self.n * sum(map(_pixel_bytes, halves))
        self.unreadable: dict[int, str] = {}
        self._pin = pin
        self._pixels: dict[Any, Any] = {}
        self._faults: dict[Any, str] = {}
        self._lock = threading.Lock()
        self._batches: Iterator[Any] | None = None
        self._decoder = _Decoder(dataset, halves, poison)
        workers = count_workers(dataset, settings.workers) if threads is None else 0
        self._options: dict[str, Any] = {
            "workers": workers,
            "threads": threads or 0,
            "direct": not workers and is_in_memory(dataset),
            "plugins": plugins,
        }

    def rows(
        self,
        start: int,
        stop: int,
        seconds: dict[str, float],
        tick: Callable[[], None] | None = None,
    ) -> np.ndarray:
        """Decode up to `stop` and return the readable rows in [start, stop); tick now and then.

        What the caller waited is added to ``seconds["decode"]``, and the work of the decoding that
        it brought about to ``seconds["decode_work"]``.
        """
        started = time.perf_counter()
        with self._lock:
            try:
                while self.filled < stop:
                    seconds["decode_work"] += self._fill()
                    if tick is not None:
                        tick()
            except BaseException:  # what was under way is lost; whoever asks next begins with it
                self._batches = None
                raise
            if self.filled == self.n:
                self._batches = None  # lets the workers go
        seconds["decode"] += time.perf_counter() - started
        return np.array([r for r in range(start, stop) if r not in self.unreadable], np.int64)

    def reasons(self, start: int, stop: int) -> dict[str, str]:
        """Return position from `start` → reason, for the unreadable rows in [start, stop)."""
        with self._lock:  # another thread may be adding some
            found = sorted(self.unreadable.items())
        return {str(row - start): why for row, why in found if start <= row < stop}

    def pixels(self, key: Any, rows: np.ndarray) -> torch.Tensor:
        """Return the inputs of readable rows, (len(rows), channels, height, width).

        Raises
        ------
        BackboneError
            If the backbone's own transform failed on one of the images so far.
        """
        import torch

        if key in self._faults:
            raise zoo.BackboneError(f"its transform failed: {self._faults[key]}")
        pixels = self._pixels[key]
        if len(rows) and rows[-1] - rows[0] == len(rows) - 1:  # no gap: a view, no copy
            return pixels[rows[0] : rows[-1] + 1]
        return pixels[torch.from_numpy(rows)]

    def _fill(self) -> float:
        """Take in the next batch, as a whole or not at all; return the work that it took."""
        import torch

        if self._batches is None:
            left = cut(self.n - self.filled)
            batches = [range(self.filled + part.start, self.filled + part.stop) for part in left]
            self._batches = iter(Loader(self._decoder, batches, _collate, **self._options))
        nothing: Any = (), ((), (), 0.0)
        rows, (stacks, problems, work) = next(self._batches, nothing)
        if not len(rows) or rows[0] != self.filled or len(rows) != len(problems):
            raise RuntimeError(f"the decoding went astray at row {self.filled}: got {list(rows)}")
        bad = {row: why for row, why in zip(rows, problems, strict=True) if why is not None}
        good = torch.tensor([row for row in rows if row not in bad], dtype=torch.int64)
        for key, stack in zip(self.keys, stacks, strict=False):  # no stacks: none was readable
            if key in self._faults:
                continue
            if isinstance(stack, str):
                self._faults[key] = stack
                continue
            if key not in self._pixels:
                shape = (self.n, *stack.shape[1:])
                self._pixels[key] = torch.empty(shape, dtype=stack.dtype)
                if self._pin:
                    pin(self._pixels[key])
            if stack.shape[1:] != self._pixels[key].shape[1:]:
                self._faults[key] = "its results differ in shape from image to image"
                continue
            self._pixels[key][good] = stack
        self.unreadable.update(bad)
        self.filled += len(rows)
        return work


# Run → number and pixels of the block it works on, in this process. The process of a pool is not
# told that a run has ended: it lets a block go when nobody asked for it for a while.
_BLOCKS: dict[str, tuple[int, PixelBlock]] = {}
_BLOCKS_LOCK = threading.Lock()
IDLE = 60.0  # seconds
_JANITOR: threading.Timer | None = None


def _forget_blocks(run: str) -> None:
    with _BLOCKS_LOCK:
        _BLOCKS.pop(run, None)


def _forget_idle() -> None:
    global _JANITOR
    with _BLOCKS_LOCK:
        now = time.monotonic()
        for run, (_, block) in list(_BLOCKS.items()):
            if not block.users and now - block.used >= IDLE:
                del _BLOCKS[run]
        _JANITOR = None
        _watch_idle()


def _watch_idle() -> None:
    """See to it that idle blocks are let go; with the lock held."""
    global _JANITOR
    if _JANITOR is None and _BLOCKS:
        _JANITOR = threading.Timer(IDLE, _forget_idle)
        _JANITOR.daemon = True
        _JANITOR.start()


# One unit of work: one backbone on one block ----------------------------------------------------
@dataclass(frozen=True, eq=False)
class Unit:
    """Everything a worker needs; `shards` are row ranges within `dataset`, the block's rows."""

    backbone: Backbone
    preprocessing: Preprocessing
    dataset: ImageDataset
    run: str
    block: int
    halves: tuple[Preprocessing, ...]
    shards: tuple[tuple[int, int, int], ...]  # index in the plan, start, stop
    images: tuple[tuple[str, ...], ...]  # content digests, for the key in the store
    weights: str | None
    max_unreadable: float  # images, in the whole data set
    poison: Mapping[int, str] = field(default_factory=dict)  # row of `dataset` → why not to read
    retry: bool = False  # then a part may be in the store
    switches: Mapping[str, Any] = field(default_factory=dict)  # Pillow's, see `images`


@dataclass(eq=False)
class Outcome:
    """What came of a unit; an entry that is in the store need not travel."""

    name: str
    entries: dict[int, Entry] = field(default_factory=dict)
    keys: dict[int, str] = field(default_factory=dict)  # of those the store holds now
    unreadable: dict[int, Mapping[str, str]] = field(default_factory=dict)  # of all entries
    error: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    n_images: int = 0
    n_decoded: int = 0
    weights: str | None = None  # their fingerprint, which was unknown if they had to be fetched
    not_kept: str | None = None  # why the store refused them


class _Turn:
    """Lets one unit after the other compute, in their order; entered before a unit does."""

    def __init__(self, before: _Turn | None, stop: threading.Event) -> None:
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
            raise RuntimeError("the run has ended")


# Held while a network comes to a device or leaves it, and while a batch's memory is measured.
_MOVES = threading.Lock()


@dataclass(frozen=True, eq=False)
class Worker:
    """Runs a unit; can be sent to another process."""

    settings: Settings
    store: FeatureStore | None
    advance: Callable[[str, int], None] | None = None
    threads: int | None = None  # decode in so many threads, not in processes
    resident: dict[str, Any] | None = None  # keeps the networks from one unit to the next
    turn: _Turn | None = None  # for the device, where several units are under way

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "advance": None, "resident": None, "turn": None}

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
            outcome.error = _one_line(error)
            outcome.entries, outcome.keys, outcome.unreadable = {}, {}, {}
        return outcome

    def _run(self, unit: Unit, outcome: Outcome) -> None:
        started = time.perf_counter()
        forward, outcome.weights, n_params = self._load(unit)
        outcome.seconds["load"] = time.perf_counter() - started
        on_gpu = forward.device.type == "cuda"
        kept: deque[Any] = deque()
        with ThreadPoolExecutor(1) as keeper:  # a thread starts with the first task
            threads = few_threads(forward.module, unit.preprocessing)
            with self.turn or contextlib.nullcontext(), threads:
                for shard in self._forward_all(unit, outcome, forward):
                    if not on_gpu:
                        self._keep(shard, outcome, n_params)
                        continue
                    kept.append(keeper.submit(self._keep, shard, outcome, n_params))
                    if len(kept) > 2:
                        kept.popleft().result()
            for task in kept:
                task.result()
        with _MOVES:
            del forward

    def _forward_all(self, unit: Unit, outcome: Outcome, forward: _Forward) -> Iterator[_Shard]:
        """Compute the shards of a unit, but for those that are in the store."""
        half = _fingerprint(unit.preprocessing)
        with self._block(unit, pin=forward.device.type == "cuda" and PIN) as block:
            filled = block.filled
            try:
                for (number, start, stop), images in zip(unit.shards, unit.images, strict=True):
                    key = make_key(images, outcome.weights or "", half, self.settings.precision)
                    outcome.n_images += stop - start
                    if unit.retry and self.store is not None and (entry := self.store.get(key)):
                        outcome.entries[number], outcome.keys[number] = entry, key
                        outcome.unreadable[number] = entry.unreadable
                        continue
                    shard = self._forward(unit, outcome, forward, block, range(start, stop))
                    shard.number, shard.key, shard.images = number, key, images
                    yield shard
            finally:
                outcome.n_decoded = block.filled - filled

    def _forward(
        self,
        unit: Unit,
        outcome: Outcome,
        forward: _Forward,
        block: PixelBlock,
        shard: range,
    ) -> _Shard:
        """Compute the rows of a shard; on a GPU only begin to."""
        seconds, start, stop = outcome.seconds, shard.start, shard.stop
        # Who watches may stop the run: also while slow images are decoded.
        tick = None if self.advance is None else partial(self.advance, unit.backbone.name, 0)
        waited, started = seconds["decode"], time.perf_counter()
        parts, good, peak = [], [], {}
        forward.begin()
        position = start
        while position < stop:
            if self.turn is not None:
                self.turn.check()
            end = min(position + forward.batch_size, stop)
            rows = block.rows(position, end, seconds, tick)
            if len(block.unreadable) > unit.max_unreadable:
                raise _too_many(block.unreadable, unit.dataset, self.settings.max_unreadable)
            if len(rows):
                pixels = block.pixels(unit.preprocessing.key, rows)
                if forward.device.type == "cuda" and not parts:
                    with _MOVES:
                        base = _reset_peak(forward.device)
                        parts.append(forward(pixels))
                        peak = _read_peak(forward, base, len(rows))
                else:
                    parts.append(forward(pixels))
                good.append(rows - start)
            if self.advance is not None:
                self.advance(unit.backbone.name, end - position)
            position = end
        features = _to_host(parts)
        spent = time.perf_counter() - started - (seconds["decode"] - waited)
        rows = np.concatenate(good) if good else np.empty(0, np.int64)
        unreadable = block.reasons(start, stop)
        return _Shard(features, rows, unreadable, peak, forward.clock(spent))

    def _keep(self, done: _Shard, outcome: Outcome, n_params: int) -> None:
        """Wait for the features of a shard and put them into the store."""
        started = time.perf_counter()
        x, forward_seconds = done.features(), done.seconds()
        outcome.seconds["copy"] += time.perf_counter() - started
        outcome.seconds["forward"] += forward_seconds
        info = {
            "backbone": outcome.name,
            "n_params": n_params,
            "forward_seconds": forward_seconds,
            "device": self.settings.device,
            **done.peak,
        }
        entry = Entry(x, done.rows, done.unreadable, info)
        if not np.isfinite(x).all():
            raise ValueError(
                f"its features are not finite in {self.settings.precision}"
                + ("" if self.settings.precision == "float32" else "; try float32")
            )
        outcome.entries[done.number] = entry
        outcome.unreadable[done.number] = entry.unreadable
        if self.store is not None and _is_lasting(entry, done.images):
            try:
                self.store.put(done.key, entry)
                outcome.keys[done.number] = done.key
            except OSError as error:  # a full disk costs the cache, not the result
                outcome.not_kept = str(error)

    def _load(self, unit: Unit) -> tuple[_Forward, str, int]:
        import torch

        name = unit.backbone.name
        if self.resident is not None and name in self.resident:
            return self.resident[name]
        device = torch.device(self.settings.device)
        module, preprocessing = zoo.load(unit.backbone)
        weights = unit.weights or ""
        if not weights and self.store is not None:
            weights = zoo.fingerprint(unit.backbone, module) or ""
        n_params = sum(p.numel() for p in module.parameters())
        with _MOVES:
            module = module.to(device).to(memory_format=torch.channels_last)
        loaded = _Forward(module, preprocessing, device, self.settings), weights, n_params
        if self.resident is not None:
            self.resident[name] = loaded
        return loaded

    @contextlib.contextmanager
    def _block(self, unit: Unit, *, pin: bool) -> Iterator[PixelBlock]:
        """Lend the pixels of a unit's block, made for all units that come here."""
        with _BLOCKS_LOCK:
            number, block = _BLOCKS.pop(unit.run, (-1, None))
            if block is None or number != unit.block:
                block = PixelBlock(
                    unit.dataset,
                    unit.halves,
                    self.settings,
                    unit.backbone.plugins,
                    pin=pin,
                    poison=unit.poison,
                    threads=self.threads,
                )
            _BLOCKS[unit.run] = unit.block, block  # the last used at the end
            block.users += 1
            while len(_BLOCKS) > 1 and sum(b.nbytes for _, b in _BLOCKS.values()) > PIXEL_BYTES:
                del _BLOCKS[next(iter(_BLOCKS))]
        try:
            yield block
        finally:
            with _BLOCKS_LOCK:
                block.users -= 1
                block.used = time.monotonic()
                _watch_idle()


@dataclass(eq=False)
class _Shard:
    """What a device has computed, or is about to: `features` and `seconds` wait for it."""

    features: Callable[[], np.ndarray]
    rows: np.ndarray
    unreadable: dict[str, str]
    peak: dict[str, int]
    seconds: Callable[[], float]
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
        self.device, self.precision = device, settings.precision
        self.batch_size = settings.batch_size or _default_batch(preprocessing, device)
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._moved: deque[torch.Tensor] = deque(maxlen=2)  # what the device may still read
        self._copies = None
        if device.type == "cuda" and SIDE_STREAM:
            self._copies = torch.cuda.Stream(device)

    def begin(self) -> None:
        """Begin to measure the time that the device computes."""
        self._events = self._events[-2:]
        self._first = len(self._events)

    def clock(self, spent: float) -> Callable[[], float]:
        """Return what tells how long a GPU computed since `begin`; others tell the `spent`."""
        events = self._events[self._first :]
        if self.device.type != "cuda":
            return lambda: spent
        return lambda: sum(a.elapsed_time(b) for a, b in events) / 1000

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        import torch

        parts, start = [], 0
        while start < len(pixels):
            size = min(self.batch_size, len(pixels) - start)
            try:
                parts.append(self._run(pixels[start : start + size]))
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    raise
                if size == 1:
                    raise MemoryError("out of memory with a single image") from error
                self.batch_size = max(size // 2, 1)
                logger.info("out of memory: batches of %d now", self.batch_size)
            else:
                start += size
                continue
            if self.device.type == "cuda":  # outside the handler, which keeps the tensors alive
                torch.cuda.empty_cache()
        return parts[0] if len(parts) == 1 else torch.cat(parts)

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

        with torch.inference_mode(), compute(self.device, self.precision):
            batch = self.preprocessing.normalize(pixels)
            features = self.module(batch.contiguous(memory_format=torch.channels_last))
            if isinstance(features, torch.Tensor) and features.ndim == 4:
                features = features.mean((2, 3))
            if not isinstance(features, torch.Tensor) or features.ndim != 2:
                got = getattr(features, "shape", type(features).__name__)
                raise ValueError(
                    "a backbone must return features (n, n_dims) or (n, n_dims, h, w) but "
                    f"returned {got}"
                )
            return features.float()


def _fingerprint(preprocessing: Preprocessing) -> str:
    """Return that of the preprocessing, with Pillow's switches where they are not the usual."""
    changed = get_switches()
    text = preprocessing.fingerprint()
    return f"{text} {json.dumps(changed, sort_keys=True, default=str)}" if changed else text


def _is_lasting(entry: Entry, images: Sequence[str]) -> bool:
    """Whether an entry holds for its images at any time.

    It does not if one of them could not be read for a reason that may pass, except where its
    digest, which is part of the key, says so.
    """
    return not any(
        isinstance(why, Passing) and images[int(row)] != UNREADABLE
        for row, why in entry.unreadable.items()
    )


def _reset_peak(device: torch.device) -> int:
    """Begin to watch the memory of a GPU; return what it holds already."""
    import torch

    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _read_peak(forward: _Forward, base: int, n: int) -> dict[str, int]:
    """Return what a batch of `n` took at most beyond `base`, in bytes."""
    import torch

    peak = torch.cuda.max_memory_allocated(forward.device) - base
    return {"peak_memory": peak, "peak_batch": min(forward.batch_size, n)}


def _to_host(parts: list[torch.Tensor]) -> Callable[[], np.ndarray]:
    """Join a shard's features; return what waits for them and brings them to the host."""
    import torch

    if not parts:
        return lambda: np.empty((0, 0), np.float32)
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
    """Keep the pixels of a batch about constant: 32 images of 224², eight times that on a GPU."""
    _, height, width = preprocessing.input_size or (3, 224, 224)
    size = (32 if device.type == "cpu" else 256) * 224 * 224 // (height * width)
    return int(2 ** np.clip(np.floor(np.log2(max(size, 1))), 0, 9))


def _out_of_memory(error: BaseException) -> bool:
    import torch

    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        sign in text for sign in ("out of memory", "can't allocate memory", "bad_alloc")
    )


def _one_line(error: Exception) -> str:
    """Say what went wrong; our own errors (`ValueError`) need no name of their kind."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"


def _too_many(unreadable: dict[int, str], dataset: ImageDataset, limit: float) -> DatasetError:
    row, reason = next(iter(unreadable.items()))
    return DatasetError(
        f"{len(unreadable)} of the {len(dataset)} images cannot be read, more than "
        f"max_unreadable={limit:g} allows; the first is {dataset.item_name(row)} ({reason})"
    )


# Images that end the process --------------------------------------------------------------------
POISON = "a process that decodes it "  # then what becomes of it; how such an image is known again
_PILLOW = f" (Pillow {PIL.__version__})"
CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGFPE}
_CHECK = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); "
    "check, *rest = pickle.load(sys.stdin.buffer); check(*rest)"
)


def find_poison(
    unit: Unit, *, timeout: float, dumps: Callable[[Any], bytes] = pickle.dumps
) -> dict[int, str]:
    """Decode the rows of a unit in child processes and return those that end theirs, with why.

    A child tells each row before it reads it; when it dies the last row told is guilty, and
    another child goes on behind it.

    Parameters
    ----------
    unit : Unit
        Its `poison` is known already and not read again.
    timeout : float
        Seconds without a word after which a row counts as one that hangs.
    dumps : callable
        Must pickle the data set and its transforms for `pickle.load`.
    """
    found, start = dict(unit.poison), 0
    while True:
        content = dumps((_check, unit.dataset, unit.halves, unit.backbone.plugins, found, start))
        row, code = _watch(dumps(sys.path) + content, timeout)
        if code == 0:
            return found
        if row is None:
            raise RuntimeError(f"the images cannot be checked: a child ended with code {code}")
        why = f"hangs for more than {timeout:g} s" if code is None else f"ends with code {code}"
        crashed = code is not None and -code in CRASHES  # others may have been ended by somebody
        found[row] = f"{POISON}{why}{_PILLOW}" if crashed else Passing(POISON + why)
        start = row + 1


def _watch(content: bytes, timeout: float) -> tuple[int | None, int | None]:
    """Return the last row that a child told, and its exit code (None: it hung)."""
    with subprocess.Popen(
        [sys.executable, "-c", _CHECK],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        row, hung = None, []
        clock = threading.Timer(timeout + 60, lambda: (hung.append(1), child.kill()))
        clock.start()  # with the time that importing torch takes
        try:
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(content)
                child.stdin.close()
            for line in child.stdout:
                if not line.startswith(b"row "):  # what the decoder prints
                    continue
                row = int(line[4:])
                clock.cancel()
                clock = threading.Timer(timeout, lambda: (hung.append(1), child.kill()))
                clock.start()
        finally:
            clock.cancel()
            child.kill()
        return row, None if hung else child.wait()


def _check(dataset: Any, halves: Any, plugins: Any, poison: dict[int, str], start: int) -> None:
    for plugin in plugins:
        zoo.load_plugin(plugin)
    decoder = _Decoder(dataset, halves, poison)
    for row in range(start, len(dataset)):
        sys.stdout.write(f"row {row}\n")
        sys.stdout.flush()
        decoder[row]


# The plan and its execution ---------------------------------------------------------------------
@dataclass(eq=False)
class _Job:
    """One backbone's state while the run goes on."""

    description: zoo.Description
    weights: str | None
    entries: dict[int, Entry | str] = field(default_factory=dict)  # or its key in the store
    unkept: dict[int, Entry | str] = field(default_factory=dict)  # what the store does not have
    keys: list[str] = field(default_factory=list)  # of all shards, if the weights are known
    cached: bool = True
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(eq=False)
class Plan:
    """What is missing: which backbones on which shards; cut into units by who runs it.

    Parameters
    ----------
    run : str
        Unique name.
    dataset : ImageDataset
    jobs : dict of str to job
        By name of the backbone.
    shards : list of (start, stop)
        Rows of the data set.
    images : list of str
        Content digests.
    missing : dict of str to frozenset of int
        Backbone → shards.
    max_unreadable : float
        So many images, in the whole data set.
    failed : set of str
        Backbones that get no further unit.
    poison : dict of int to str
        Row of the data set → why it must not be read; an executor adds those it found.
    """

    run: str
    dataset: ImageDataset
    jobs: dict[str, Any]
    shards: list[tuple[int, int]]
    images: list[str]
    missing: dict[str, frozenset[int]]
    max_unreadable: float
    failed: set[str] = field(default_factory=set)
    poison: dict[int, str] = field(default_factory=dict)

    def preprocessing(self, name: str) -> Preprocessing:
        """Return the preprocessing of a backbone; equal keys share their pixels."""
        return self.jobs[name].description.preprocessing

    def n_params(self, name: str) -> int:
        """Return the number of parameters of a backbone."""
        return self.jobs[name].description.n_params

    def units(
        self, names: Iterable[str], block: Sequence[int], number: int, *, retry: bool = False
    ) -> Iterator[Unit]:
        """Yield one unit for each backbone that lacks some of the shards in `block`.

        They share one data set, the rows of the block, and one `number`, by which a worker knows
        that they share its pixels.
        """
        names = [
            n for n in names if n not in self.failed and not self.missing[n].isdisjoint(block)
        ]
        spans = [self.shards[shard] for shard in block]
        starts = np.cumsum([0, *map(_length, spans)])
        rows = np.concatenate([np.arange(*span) for span in spans])
        halves = {self.preprocessing(n).key: self.preprocessing(n) for n in reversed(names)}
        part = self.dataset.subset(rows)
        poison = {p: self.poison[r] for p, r in enumerate(rows) if r in self.poison}
        for name in names:
            if name in self.failed:  # meanwhile
                continue
            mine = [(p, s) for p, s in enumerate(block) if s in self.missing[name]]
            yield Unit(
                self.jobs[name].description.backbone,
                self.preprocessing(name),
                part,
                self.run,
                number,
                tuple(reversed(halves.values())),
                tuple((s, int(starts[p]), int(starts[p + 1])) for p, s in mine),
                tuple(tuple(self.images[slice(*self.shards[s])]) for _, s in mine),
                self.jobs[name].weights,
                self.max_unreadable,
                poison,
                retry,
                get_switches(),
            )


class Executor(Protocol):
    """Runs the units of a plan on other machines; entered before the first run."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *error: Any) -> None: ...

    def resolve_device(self, device: str) -> str:
        """Return the device of the workers behind ``"auto"``."""
        ...

    def run(self, worker: Worker, plan: Plan) -> Generator[Outcome, None, None]:
        """Yield an outcome for each backbone and block, until nothing of the plan is missing."""
        ...

    def report(self) -> dict[str, Any]:
        """Return what `Ranking.info["executor"]` is to hold, as JSON values."""
        ...


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
        item per backbone and block. Default: one after the other in this process.
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
    jobs: dict[str, _Job] = {}
    for backbone in backbones:
        try:
            description = zoo.describe(backbone)
            _require_memory(description.preprocessing, min(SHARD, len(dataset)))
            weights = zoo.fingerprint(backbone) if store is not None else None
            jobs[backbone.name] = _Job(description, weights)
        except Exception as error:
            logger.debug("%s cannot be described", backbone.name, exc_info=True)
            yield Extraction(backbone, None, np.empty(0, np.int64), _one_line(error))

    images = dataset.digests() if store is not None else [""] * len(dataset)
    shards = [(s, min(s + SHARD, len(dataset))) for s in range(0, len(dataset), SHARD)]
    most = settings.max_unreadable * len(dataset)
    plan = Plan(uuid.uuid4().hex, dataset, jobs, shards, images, {}, most)
    plan.poison.update(_without_content(dataset, images))
    done: list[str] = []
    known = len(plan.poison)  # rows that somebody cannot read, so that nobody shows them
    everything = frozenset(range(len(shards)))

    def finish_again() -> Iterator[Extraction]:
        nonlocal known
        if len(plan.poison) > known:
            known = len(plan.poison)
            for name in done[:]:
                job = jobs[name]
                _look_up(job, plan, store, settings)
                job.entries.update(job.unkept)
                if everything <= job.entries.keys():
                    yield _finish(job, plan, settings, store)
                else:  # nobody kept them: they are computed again
                    done.remove(name)

    doubtful: dict[int, list[_Job]] = {}
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
        rows = sum(_length(shards[s]) for absent in plan.missing.values() for s in absent)
        progress.start(rows, len(done))

    tell = progress.advance if progress and map_fn is None and executor is None else None
    worker = Worker(settings, store, tell)
    outcomes: Any = ()
    try:
        while True:
            outcomes = (
                executor.run(worker, plan)
                if executor
                else (map_fn or _run_here)(worker, _plan(plan))
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
                        plan.poison.setdefault(shards[shard][0] + int(row), why)
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
                else:  # until its other blocks are done the features need no memory
                    job.entries.update(outcome.keys)
            left = [name for name in jobs if name not in plan.failed and name not in done]
            again = {name: everything.difference(jobs[name].entries) for name in left}
            if came.isdisjoint(left):
                break
            _forget_blocks(plan.run)
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
        _forget_blocks(plan.run)


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


def _look_up(job: _Job, plan: Plan, store: FeatureStore | None, settings: Settings) -> None:
    """Find the entries that there are."""
    if store is None or job.weights is None:
        return
    half = _fingerprint(job.description.preprocessing)
    job.keys = [
        make_key(plan.images[a:b], job.weights, half, settings.precision) for a, b in plan.shards
    ]
    found = {shard: store.get(key) for shard, key in enumerate(job.keys)}
    job.entries = {shard: entry for shard, entry in found.items() if entry is not None}


def _doubt(job: _Job, plan: Plan) -> list[int]:
    """Return the rows that entries call unreadable, and that may be readable by now.

    What a decoder makes of bytes depends on its version and on the formats it knows. An image that
    crashes it is believed to do so where it is the same; another decoder has to try it anew, where
    a crash does no harm.
    """
    rows: list[int] = []
    for shard, entry in cast(dict[int, Entry], dict(job.entries)).items():
        for position, why in entry.unreadable.items():
            row = plan.shards[shard][0] + int(position)
            if why.startswith(POISON) and why.endswith(_PILLOW):
                plan.poison.setdefault(row, why)
            elif why.startswith(POISON) and row not in plan.poison:
                job.entries.pop(shard, None)
            elif row not in plan.poison:
                rows.append(row)
    return rows


def _look_again(doubtful: Mapping[int, Sequence[_Job]], plan: Plan, settings: Settings) -> None:
    """Read doubtful rows again; drop the entries of those that somebody can read by now."""
    rows = sorted(doubtful.keys() - plan.poison.keys())
    if not rows:
        return
    jobs = {id(job): job for row in rows for job in doubtful[row]}.values()
    halves = {job.description.preprocessing.key: job.description.preprocessing for job in jobs}
    loader = Loader(
        _Decoder(plan.dataset, list(halves.values()), {}),
        [[rows[i] for i in part] for part in cut(len(rows))],
        _problems,
        workers=min(count_workers(plan.dataset, settings.workers), -(-len(rows) // BATCH)),
        direct=is_in_memory(plan.dataset),
        plugins=[*dict.fromkeys(p for job in jobs for p in job.description.backbone.plugins)],
    )
    for keys, problems in loader:
        found = zip(keys, problems, strict=True)
        plan.poison.update((row, why) for row, why in found if why is not None)
    loader.close()
    for row in rows:
        if row not in plan.poison:
            for job in doubtful[row]:
                job.entries.pop(row // SHARD, None)


def _problems(items: list[tuple[list[Any], str | None, float]]) -> list[str | None]:
    return [problem for _, problem, _ in items]


def _plan(plan: Plan) -> Iterator[Unit]:
    """Yield the units, block by block; lazily, so that a failed backbone is not tried again."""
    needed = sorted(frozenset().union(*plan.missing.values()))
    users = [name for name, absent in plan.missing.items() if absent]
    per_block = shards_per_block(map(plan.preprocessing, users))
    for first in range(0, len(needed), per_block):
        yield from plan.units(users, needed[first : first + per_block], first)


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

    def run(unit: Unit, turn: _Turn) -> Outcome:
        try:
            return replace(worker, turn=turn)(unit)
        finally:
            turn.__exit__()  # also if it failed before its turn

    pool = ThreadPoolExecutor(lanes, "extraction")
    ahead: deque[Any] = deque()
    try:
        for unit in units:
            last = _Turn(last, stop)
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
            unit = replace(unit, halves=tuple(filter(_can_travel, unit.halves)))
            pool = pool or processes.enter_context(ProcessPoolExecutor(1, spawn))
            try:
                outcome = pool.submit(worker, unit).result()
            except DatasetError:
                raise
            except Exception as error:  # it died, or the backbone cannot be sent to it
                outcome = Outcome(unit.backbone.name, error=_one_line(error))
            if worker.advance is not None:
                worker.advance(outcome.name, outcome.n_images)
            if outcome.error is not None:
                processes.close()
                pool = None
            yield outcome


def _can_travel(half: Preprocessing) -> bool:
    try:
        return bool(pickle.dumps(half))
    except Exception:  # a transform of the user's own may raise anything
        return False


def _length(shard: tuple[int, int]) -> int:
    return shard[1] - shard[0]


def shards_per_block(preprocessings: Iterable[Preprocessing], memory: int | None = None) -> int:
    """Return how many shards of pixels a quarter of the memory holds, in bytes; default: free."""
    import psutil

    distinct = {p.key: p for p in preprocessings}
    per_image = 0
    for p in distinct.values():
        per_image += _pixel_bytes(p)
    budget = min(PIXEL_BYTES, (memory or psutil.virtual_memory().available) // 4)
    return max(1, budget // max(SHARD * per_image, 1))


def _pixel_bytes(p: Preprocessing) -> int:
    """Return the memory that one decoded image takes; tries a transform of the user's own."""
    return math.prod(p.output_size) * (1 if isinstance(p.geometry, Geometry) else 4)


def _require_memory(p: Preprocessing, n: int) -> None:
    """Raise, for one backbone alone, if the images of a shard can never be held at once."""
    import psutil

    needed, total = n * _pixel_bytes(p), psutil.virtual_memory().total
    if needed > total / 2:
        raise ValueError(
            f"{n} images of {'×'.join(map(str, p.output_size))} take {needed / 2**30:.3g} GiB, "
            f"more than half of the {total / 2**30:.3g} GiB of this machine; choose a backbone of "
            "a smaller input size, or fewer images"
        )


def _blank(job: _Job) -> Extraction:
    return Extraction(
        job.description.backbone,
        None,
        np.empty(0, np.int64),
        n_params=job.description.n_params,
        input_size=job.description.preprocessing.input_size,
    )


def _finish(job: _Job, plan: Plan, settings: Settings, store: FeatureStore | None) -> Extraction:
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
        entries.append(_without(entry, start, stop, plan.poison))
    job.entries = {}  # the features live on with whoever takes them
    unreadable = {
        start + int(row): why
        for entry, (start, _) in zip(entries, shards, strict=True)
        for row, why in entry.unreadable.items()
    }
    if len(unreadable) > settings.max_unreadable * len(dataset):
        raise _too_many(unreadable, dataset, settings.max_unreadable)
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


def _without(entry: Entry, start: int, stop: int, poison: Mapping[int, str]) -> Entry:
    """Leave out what somebody else could not read, so that all backbones see the same rows."""
    bad = {row - start: why for row, why in poison.items() if start <= row < stop}
    if not bad:
        return entry
    keep = ~np.isin(entry.rows, list(bad))
    more = {str(row): why for row, why in bad.items()}
    return replace(
        entry, x=entry.x[keep], rows=entry.rows[keep], unreadable={**entry.unreadable, **more}
    )
