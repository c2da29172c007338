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
import logging
import math
import multiprocessing
import pickle
import subprocess
import sys
import threading
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from sfda_tune import backbones as zoo
from sfda_tune.datasets import DatasetError, ImageDataset, UnreadableImage
from sfda_tune.preprocessing import Geometry, Preprocessing
from sfda_tune.store import Entry, FeatureStore, make_key
from sfda_tune.values import Backbone, Features

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
DECODE_BATCH = 16
PRECISIONS = ("float32", "bfloat16", "float16")


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
    precision : {"float32", "bfloat16", "float16"}
        Of the forward pass (autocast); features are always returned as float32.
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
        time the decoding took in the workers, most of it hidden behind the forward passes.
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
                        raise UnreadableImage(self.dataset.item_name(row), str(error)) from error
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
        self.filled = 0
        self.unreadable: dict[int, str] = {}
        self._pin = pin
        self._pixels: dict[Any, Any] = {}
        self._faults: dict[Any, str] = {}
        self._lock = threading.Lock()
        self._batches: Iterator[Any] | None = None
        decoder = _Decoder(dataset, halves, poison)
        if threads is None:
            self._start = lambda: _decode(decoder, settings, plugins)
        else:
            self._start = lambda: _decode_in_threads(decoder, threads)

    def rows(self, start: int, stop: int, seconds: dict[str, float]) -> np.ndarray:
        """Decode up to `stop` and return the readable rows in [start, stop).

        What the caller waited is added to ``seconds["decode"]``, and the work of the decoding that
        it brought about to ``seconds["decode_work"]``.
        """
        started = time.perf_counter()
        with self._lock:
            if self._batches is None:
                self._batches = self._start()
            while self.filled < stop:
                seconds["decode_work"] += self._take(next(self._batches))
            if self.filled == self.n:
                self._batches = iter(())  # lets the workers go
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

    def _take(self, batch: tuple[Any, ...]) -> float:
        import torch

        stacks, problems, work = batch
        rows = np.arange(self.filled, self.filled + len(problems))
        self.unreadable.update(
            (int(row), problem)
            for row, problem in zip(rows, problems, strict=True)
            if problem is not None
        )
        good = torch.from_numpy(rows[[problem is None for problem in problems]])
        for key, stack in zip(self.keys, stacks, strict=False):  # no stacks: none was readable
            if key in self._faults:
                continue
            if isinstance(stack, str):
                self._faults[key] = stack
                continue
            if key not in self._pixels:
                shape = (self.n, *stack.shape[1:])
                self._pixels[key] = torch.empty(shape, dtype=stack.dtype, pin_memory=self._pin)
            if stack.shape[1:] != self._pixels[key].shape[1:]:
                self._faults[key] = "its results differ in shape from image to image"
                continue
            self._pixels[key][good] = stack
        self.filled += len(problems)
        return work


def _decode(decoder: Any, settings: Settings, plugins: Sequence[str]) -> Iterator[Any]:
    from torch.utils.data import DataLoader

    dataset, workers = decoder.dataset, settings.workers
    if workers is None:  # a pool's processes share the cores already
        pooled = multiprocessing.parent_process() is not None
        workers = 0 if pooled or _in_memory(dataset) else _cores()
    if multiprocessing.current_process().daemon:  # `multiprocessing.Pool`: may have no children
        workers = 0
    workers = min(workers, -(-len(dataset) // DECODE_BATCH))
    options: dict[str, Any] = {"batch_size": DECODE_BATCH, "collate_fn": _collate}
    started = False
    try:
        init = _Plugins(tuple(plugins)) if workers else None
        for batch in DataLoader(decoder, num_workers=workers, worker_init_fn=init, **options):
            started = True
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        if started or multiprocessing.get_start_method() == "fork":
            raise DatasetError(
                f"a decoding process died ({' '.join(str(error).split())}); an image may crash "
                "the decoder, or memory is short: try `workers=0` (--workers 0) to see which"
            ) from error
        warnings.warn(
            "the decoding processes could not start, so this process decodes; a script needs its "
            "`if __name__ == '__main__':` where processes are spawned (macOS, Windows)",
            stacklevel=2,
        )
        yield from DataLoader(decoder, **options)


def _decode_in_threads(decoder: _Decoder, threads: int) -> Iterator[Any]:
    """Decode ahead without processes: an actor may neither fork (CUDA, gRPC) nor spawn."""

    def batch(start: int) -> tuple[Any, ...]:
        return _collate([decoder[row] for row in range(start, min(start + DECODE_BATCH, n))])

    n = len(decoder)
    if not threads or _in_memory(decoder.dataset):
        yield from map(batch, range(0, n, DECODE_BATCH))
        return
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Any] = deque()
        for start in range(0, n, DECODE_BATCH):
            ahead.append(pool.submit(batch, start))
            if len(ahead) > 2 * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


@dataclass(frozen=True)
class _Plugins:
    """Runs the plug-ins in a worker process; a class, because a closure cannot be pickled."""

    plugins: tuple[str, ...]

    def __call__(self, worker: int) -> None:
        for plugin in self.plugins:
            zoo.load_plugin(plugin)


def _in_memory(dataset: ImageDataset) -> bool:
    """Small arrays take longer to send to a worker than to resize."""
    item = dataset.items[0] if len(dataset) else None
    return isinstance(item, np.ndarray) and item.size < 128 * 128 * 3


def _cores() -> int:
    import psutil

    try:
        return min(len(psutil.Process().cpu_affinity() or [0]), 8)
    except AttributeError:  # macOS
        return min(psutil.cpu_count() or 1, 8)


# Run → number and pixels of the block it works on, in this process. A run that ends elsewhere (the
# process of a pool is not told) leaves its block behind, so the oldest of several is dropped.
_BLOCKS: dict[str, tuple[int, PixelBlock]] = {}
_BLOCKS_AT_MOST = 4
_BLOCKS_LOCK = threading.Lock()


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


@dataclass(eq=False)
class Outcome:
    """What came of a unit; an entry that is in the store need not travel."""

    name: str
    entries: dict[int, Entry] = field(default_factory=dict)
    keys: dict[int, str] = field(default_factory=dict)  # of those the store holds now
    error: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    n_images: int = 0
    n_decoded: int = 0
    weights: str | None = None  # their fingerprint, which was unknown if they had to be fetched
    not_kept: str | None = None  # why the store refused them


@dataclass(frozen=True, eq=False)
class Worker:
    """Runs a unit; can be sent to another process."""

    settings: Settings
    store: FeatureStore | None
    advance: Callable[[str, int], None] | None = None
    threads: int | None = None  # decode in so many threads, not in processes
    resident: dict[str, Any] | None = None  # keeps the networks from one unit to the next

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "advance": None, "resident": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __call__(self, unit: Unit) -> Outcome:
        """Return the outcome; only a fault of the data set is raised."""
        seconds = {"load": 0.0, "forward": 0.0, "decode": 0.0, "decode_work": 0.0}
        outcome = Outcome(unit.backbone.name, seconds=seconds)
        try:
            self._run(unit, outcome)
        except DatasetError:  # the data set's fault, not the backbone's: it ends the run
            raise
        except Exception as error:
            logger.debug("%s failed", unit.backbone.name, exc_info=True)
            outcome.error = _one_line(error)
            outcome.entries, outcome.keys = {}, {}
        return outcome

    def _run(self, unit: Unit, outcome: Outcome) -> None:
        seconds = outcome.seconds
        started = time.perf_counter()
        forward, weights, n_params = self._load(unit)
        seconds["load"] = time.perf_counter() - started
        with few_threads(forward.module, unit.preprocessing):
            self._forward(unit, outcome, forward, weights, n_params)

    def _forward(
        self, unit: Unit, outcome: Outcome, forward: _Forward, weights: str, n_params: int
    ) -> None:
        seconds = outcome.seconds
        outcome.weights = weights
        block = self._block(unit, pin=forward.device.type == "cuda")
        filled = block.filled
        half = unit.preprocessing.fingerprint()
        for (shard, start, stop), images in zip(unit.shards, unit.images, strict=True):
            key = make_key(images, weights, half, self.settings.precision)
            outcome.n_images += stop - start
            if unit.retry and self.store is not None and (entry := self.store.get(key)):
                outcome.entries[shard], outcome.keys[shard] = entry, key
                continue
            waited, started = seconds["decode"], time.perf_counter()
            base = _reset_peak(forward.device)
            parts, good = [], []
            position = start
            while position < stop:
                end = min(position + forward.batch_size, stop)
                rows = block.rows(position, end, seconds)
                if len(block.unreadable) > unit.max_unreadable:
                    raise _too_many(block.unreadable, unit.dataset, self.settings.max_unreadable)
                if len(rows):
                    parts.append(forward(block.pixels(unit.preprocessing.key, rows)))
                    good.append(rows - start)
                if self.advance is not None:
                    self.advance(unit.backbone.name, end - position)
                outcome.n_decoded = block.filled - filled
                position = end
            x = _to_numpy(parts)
            forward_seconds = time.perf_counter() - started - (seconds["decode"] - waited)
            seconds["forward"] += forward_seconds
            rows = np.concatenate(good) if good else np.empty(0, np.int64)
            entry = Entry(
                x,
                rows,
                block.reasons(start, stop),
                {
                    "backbone": unit.backbone.name,
                    "n_params": n_params,
                    "forward_seconds": forward_seconds,
                    "device": self.settings.device,
                    **_read_peak(forward, base, len(rows)),
                },
            )
            if not np.isfinite(x).all():
                raise ValueError(
                    f"its features are not finite in {self.settings.precision}"
                    + ("" if self.settings.precision == "float32" else "; try float32")
                )
            outcome.entries[shard] = entry
            if self.store is not None:
                try:
                    self.store.put(key, entry)
                    outcome.keys[shard] = key
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
        module = module.to(device).to(memory_format=torch.channels_last)
        loaded = _Forward(module, preprocessing, device, self.settings), weights, n_params
        if self.resident is not None:
            self.resident[name] = loaded
        return loaded

    def _block(self, unit: Unit, *, pin: bool) -> PixelBlock:
        with _BLOCKS_LOCK:
            number, block = _BLOCKS.get(unit.run, (-1, None))
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
                _BLOCKS[unit.run] = unit.block, block
                while len(_BLOCKS) > _BLOCKS_AT_MOST:
                    del _BLOCKS[next(iter(_BLOCKS))]
            return block


class _Forward:
    """Batches of pixels to features on the device, with as large a batch as fits."""

    def __init__(
        self, module: Any, preprocessing: Preprocessing, device: torch.device, settings: Settings
    ) -> None:
        self.module, self.preprocessing = module, preprocessing
        self.device, self.precision = device, settings.precision
        self.batch_size = settings.batch_size or _default_batch(preprocessing, device)

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

        autocast = (
            contextlib.nullcontext()
            if self.precision == "float32"
            else torch.autocast(self.device.type, getattr(torch, self.precision))
        )
        with torch.inference_mode(), autocast:
            batch = self.preprocessing.normalize(pixels.to(self.device, non_blocking=True))
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


def _reset_peak(device: torch.device) -> int:
    """Begin to watch the device's memory, where it can be; return what it holds already."""
    import torch

    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _read_peak(forward: _Forward, base: int, n: int) -> dict[str, int]:
    """Return what the forward passes took at most beyond `base`, in bytes, with which batch."""
    import torch

    if forward.device.type != "cuda" or not n:
        return {}
    peak = torch.cuda.max_memory_allocated(forward.device) - base
    return {"peak_memory": peak, "peak_batch": min(forward.batch_size, n)}


def _to_numpy(parts: list[torch.Tensor]) -> np.ndarray:
    """Collect a shard's features; on CUDA this is where the host waits for the device."""
    import torch

    if not parts:
        return np.empty((0, 0), np.float32)
    return torch.cat(parts).cpu().numpy()


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
        found[row], start = POISON + why, row + 1


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
    _Plugins(tuple(plugins))(0)
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
    unkept: dict[int, Entry | str] = field(default_factory=dict)  # what the store refused
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
    >>> from sfda_tune.backbones import resolve_backbones
    >>> from sfda_tune.datasets import open_dataset
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
    done: list[str] = []
    known = 0  # rows that end the process

    def finish_again() -> Iterator[Extraction]:
        nonlocal known
        if len(plan.poison) > known:
            known = len(plan.poison)
            for name in done:
                _look_up(jobs[name], plan, store, settings)
                jobs[name].entries.update(jobs[name].unkept)
                yield _finish(jobs[name], plan, settings, store)

    everything = frozenset(range(len(shards)))
    for name, job in jobs.items():
        _look_up(job, plan, store, settings)
        missing = everything.difference(job.entries)
        plan.missing[name] = missing if job.entries else everything
        yield from finish_again()
        if not missing:
            done.append(name)
            yield _finish(job, plan, settings, store)
    if progress is not None:
        rows = sum(_length(shards[s]) for absent in plan.missing.values() for s in absent)
        progress.start(rows, len(done))

    tell = progress.advance if progress and map_fn is None and executor is None else None
    worker = Worker(settings, store, tell)
    outcomes: Any = (
        (map_fn or map)(worker, _plan(plan)) if executor is None else executor.run(worker, plan)
    )
    try:
        for outcome in outcomes:
            job = jobs[outcome.name]
            if progress is not None and tell is None:
                progress.advance(outcome.name, outcome.n_images)
            if outcome.not_kept is not None:
                warnings.warn(
                    f"features could not be kept in {store and store.root} ({outcome.not_kept}); "
                    "the run goes on",
                    stacklevel=2,
                )
            yield from finish_again()
            if outcome.name in plan.failed:
                continue
            job.cached = False
            job.weights = job.weights or outcome.weights
            job.entries.update(outcome.entries)
            for part, spent in outcome.seconds.items():
                job.seconds[part] = job.seconds.get(part, 0.0) + spent
            if executor is not None:
                job.unkept.update(outcome.entries)  # the others did not travel
                job.entries.update(outcome.keys)
            if outcome.error is not None:
                plan.failed.add(outcome.name)
                yield replace(_blank(job), error=outcome.error, seconds=job.seconds)
            elif len(job.entries) == len(shards):
                done.append(outcome.name)
                yield _finish(job, plan, settings, store)
            else:  # until its other blocks are done the features need no memory
                job.entries.update(outcome.keys)
    finally:
        if executor is not None:
            outcomes.close()
        with _BLOCKS_LOCK:
            _BLOCKS.pop(plan.run, None)


def _look_up(job: _Job, plan: Plan, store: FeatureStore | None, settings: Settings) -> None:
    if store is None or job.weights is None:
        return
    half = job.description.preprocessing.fingerprint()
    keys = [
        make_key(plan.images[a:b], job.weights, half, settings.precision) for a, b in plan.shards
    ]
    found = {shard: store.get(key) for shard, key in enumerate(keys)}
    job.entries = {shard: entry for shard, entry in found.items() if entry is not None}
    for shard, entry in found.items():
        for row, why in (entry.unreadable if entry else {}).items():
            if why.startswith(POISON):  # then it is nothing for the others either
                plan.poison[plan.shards[shard][0] + int(row)] = why
    if len(job.entries) < len(keys):  # then they are read again when the others are there
        job.entries = {shard: keys[shard] for shard in job.entries}


def _plan(plan: Plan) -> Iterator[Unit]:
    """Yield the units, block by block; lazily, so that a failed backbone is not tried again."""
    needed = sorted(frozenset().union(*plan.missing.values()))
    users = [name for name, absent in plan.missing.items() if absent]
    per_block = shards_per_block(map(plan.preprocessing, users))
    for first in range(0, len(needed), per_block):
        yield from plan.units(users, needed[first : first + per_block], first)


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
