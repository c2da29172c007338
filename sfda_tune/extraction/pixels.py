"""Decoded pixels: some shards of images, resized once per geometry, for all backbones."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from sfda_tune.backbones.devices import is_out_of_memory, pin
from sfda_tune.backbones.plugins import BackboneError, load_plugin
from sfda_tune.backbones.preprocessing import Geometry, Preprocessing
from sfda_tune.data.dataset import ImageDataset
from sfda_tune.data.decoding import Passing, UnreadableImage, is_passing
from sfda_tune.data.loader import Loader, count_workers, cut, is_in_memory
from sfda_tune.extraction.settings import Settings

if TYPE_CHECKING:
    import torch

    from sfda_tune.extraction.plan import Unit

PIXEL_BYTES = 4 << 30  # at most so much memory for decoded pixels, and a quarter of what is free
PIN = True  # decoded pixels lie in memory that the device reads by itself


# One image, and the pixels of some shards -------------------------------------------------------
class Decoder:
    """A torch data set: one image in, one tensor per preprocessing out."""

    def __init__(
        self,
        dataset: ImageDataset,
        preprocessings: Sequence[Preprocessing],
        crashing: Mapping[int, str],
    ) -> None:
        self.dataset, self.preprocessings = dataset, preprocessings
        self.crashing = crashing
        self.transforms = [one.build() for one in preprocessings]

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, row: int) -> str:
        """Return what to call an image in messages."""
        return self.dataset.item_name(row)

    def __getitem__(self, row: int) -> tuple[list[Any], str | None, float]:
        started = time.perf_counter()
        tensors: list[Any] = []
        problem = None
        try:
            if row in self.crashing:  # reading it would end this process
                raise UnreadableImage(self.dataset.item_name(row), self.crashing[row])
            image = self.dataset.load(row)
            for one, transform in zip(self.preprocessings, self.transforms, strict=True):
                try:
                    tensors.append(transform(image))
                except Exception as error:
                    if one.geometry is not None:  # e.g. 1 × 100,000 pixels: nobody can use it
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
            if is_out_of_memory(error):  # which is not the transform's fault
                raise
            stacks.append(f"the transform's results cannot be stacked: {error}")
    return stacks, [problem for _, problem, _ in items], sum(seconds for *_, seconds in items)


class SharedPixels:
    """Decoded images of a unit, for its preprocessings, filled as far as somebody asked.

    Several threads may read it; the one that needs more rows fills it for all.
    """

    def __init__(
        self, unit: Unit, settings: Settings, *, pin: bool, threads: int | None = None
    ) -> None:
        dataset, preprocessings = unit.dataset, unit.preprocessings
        self.n = len(dataset)
        self.keys = [one.key for one in preprocessings]
        self.filled = self.users = 0
        self.used = 0.0  # when, last
        self.nbytes = self.n * sum(map(bytes_per_image, preprocessings))
        self.unreadable: dict[int, str] = {}
        self._pin = pin
        self._pixels: dict[Any, Any] = {}
        self._faults: dict[Any, str] = {}
        self._lock = threading.Lock()
        self._batches: Iterator[Any] | None = None
        self._decoder = Decoder(dataset, preprocessings, unit.crashing)
        workers = count_workers(dataset, settings.workers) if threads is None else 0
        self._options: dict[str, Any] = {
            "workers": workers,
            "threads": threads or 0,
            "direct": not workers and is_in_memory(dataset),
            "prepare": [partial(load_plugin, plugin) for plugin in unit.backbone.plugins],
        }

    def rows(
        self,
        rows: np.ndarray,
        seconds: dict[str, float],
        tick: Callable[[], None] | None = None,
    ) -> np.ndarray:
        """Decode as far as the last of sorted `rows`; return the readable; tick now and then.

        What the caller waited is added to ``seconds["decode"]``, and the work of the decoding that
        it brought about to ``seconds["decode_work"]``.
        """
        started = time.perf_counter()
        with self._lock:
            try:
                while self.filled <= rows[-1]:
                    seconds["decode_work"] += self._fill()
                    if tick is not None:
                        tick()
            except BaseException:  # what was under way is lost; whoever asks next begins with it
                self._batches = None
                raise
            if self.filled == self.n:
                self._batches = None  # lets the workers go
        seconds["decode"] += time.perf_counter() - started
        return rows[[r not in self.unreadable for r in rows.tolist()]]

    def reasons(self, rows: np.ndarray) -> dict[int, str]:
        """Return position in `rows` → reason, for the unreadable ones."""
        with self._lock:  # another thread may be adding some
            found = dict(self.unreadable)
        return {p: found[row] for p, row in enumerate(rows.tolist()) if row in found}

    def pixels(self, key: Any, rows: np.ndarray) -> torch.Tensor:
        """Return the inputs of readable rows, (len(rows), channels, height, width).

        Raises
        ------
        BackboneError
            If the backbone's own transform failed on one of the images so far.
        """
        import torch

        if key in self._faults:
            raise BackboneError(f"its transform failed: {self._faults[key]}")
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


# Run → number and pixels of the units it works on, in this process. The process of a pool is not
# told that a run has ended: it lets pixels go when nobody asked for them for a while.
SHARED: dict[str, tuple[int, SharedPixels]] = {}
SHARED_LOCK = threading.Lock()
IDLE = 60.0  # seconds
_JANITOR: threading.Timer | None = None


@contextlib.contextmanager
def lend_pixels(
    unit: Unit, settings: Settings, *, pin: bool, threads: int | None = None
) -> Iterator[SharedPixels]:
    """Lend the pixels of a unit, made for all units of its run and number that come here."""
    with SHARED_LOCK:
        number, shared = SHARED.pop(unit.run, (-1, None))
        if shared is None or number != unit.number:
            shared = SharedPixels(unit, settings, pin=pin, threads=threads)
        SHARED[unit.run] = unit.number, shared  # the last used at the end
        shared.users += 1
        while len(SHARED) > 1 and sum(s.nbytes for _, s in SHARED.values()) > PIXEL_BYTES:
            del SHARED[next(iter(SHARED))]
    try:
        yield shared
    finally:
        with SHARED_LOCK:
            shared.users -= 1
            shared.used = time.monotonic()
            watch_idle()


def forget_pixels(run: str) -> None:
    """Let the pixels of a run go, and the thread that watches them once none are left."""
    global _JANITOR
    with SHARED_LOCK:
        SHARED.pop(run, None)
        janitor = None if SHARED else _JANITOR
        if janitor is not None:
            janitor.cancel()
            _JANITOR = None
    if janitor is not None:  # without the lock, which it may be waiting for
        janitor.join()


def _forget_idle() -> None:
    global _JANITOR
    with SHARED_LOCK:
        now = time.monotonic()
        for run, (_, pixels) in list(SHARED.items()):
            if not pixels.users and now - pixels.used >= IDLE:
                del SHARED[run]
        _JANITOR = None
        watch_idle()


def watch_idle() -> None:
    """See to it that idle pixels are let go; with the lock held."""
    global _JANITOR
    if _JANITOR is None and SHARED:
        _JANITOR = threading.Timer(IDLE, _forget_idle)
        _JANITOR.daemon, _JANITOR.name = True, "sfda-tune janitor"
        _JANITOR.start()


def bytes_per_image(p: Preprocessing) -> int:
    """Return the memory that one decoded image takes; tries a transform of the user's own."""
    return math.prod(p.output_size) * (1 if isinstance(p.geometry, Geometry) else 4)


def require_memory(p: Preprocessing, n: int) -> None:
    """Raise, for one backbone alone, if the images of a shard can never be held at once."""
    import psutil

    needed, total = n * bytes_per_image(p), psutil.virtual_memory().total
    if needed > total / 2:
        raise ValueError(
            f"{n} images of {'×'.join(map(str, p.output_size))} take {needed / 2**30:.3g} GiB, "
            f"more than half of the {total / 2**30:.3g} GiB of this machine; choose a backbone of "
            "a smaller input size, or fewer images"
        )
