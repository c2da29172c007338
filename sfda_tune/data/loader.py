"""Batches of images, in order, made ahead by other processes or by a thread; none hangs a run.

A process gets its work and hands over its results through a pipe of its own. So there is no shared
memory, of which a container has 64 MB, and no lock that a killed process could take along. It
tells each image before it begins it: if it dies, or no word comes for `patience` seconds, the
image is known, and the run ends with an error that names it.
"""

from __future__ import annotations

import contextlib
import io
import math
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import traceback
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any

import numpy as np

from sfda_tune.data.checks import DatasetError
from sfda_tune.data.decoding import get_switches, renew_lock, set_switches
from sfda_tune.values.text import some

if TYPE_CHECKING:
    from sfda_tune.data.dataset import ImageDataset

__all__ = [
    "BATCH",
    "Loader",
    "count_cores",
    "count_workers",
    "cut",
    "is_in_memory",
    "patience",
    "telling",
]

BATCH = 16  # images that one process decodes at a time
AHEAD = 2  # batches that are made ahead, per process or thread
TICK = 1.0  # seconds between two looks at those who make them
_TELL: list[Callable[[str], object]] = []


def patience() -> float:
    """Return the seconds without a sign of life after which decoding counts as stalled.

    `SFDA_TUNE_PATIENCE`, default 120.
    """
    text = os.environ.get("SFDA_TUNE_PATIENCE") or "120"
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise ValueError(
            f"the environment variable SFDA_TUNE_PATIENCE must be a positive number of seconds "
            f"but is {text!r}."
        )
    return seconds


@contextlib.contextmanager
def telling(tell: Callable[[str], object]) -> Iterator[None]:
    """Have `tell` called with the name of each image before a thread of this process decodes it.

    And with "" when a batch is made: so others know which image this process died of.
    """
    _TELL.append(tell)
    try:
        yield
    finally:
        _TELL.remove(tell)


def is_in_memory(dataset: ImageDataset) -> bool:
    """Small arrays take longer to send to another process than to resize."""
    item = dataset.items[0] if len(dataset) else None
    return isinstance(item, np.ndarray) and item.size < 128 * 128 * 3


def count_cores() -> int:
    """Return the number of cores this process may use, at most 8."""
    import psutil

    try:
        return min(len(psutil.Process().cpu_affinity() or [0]), 8)
    except AttributeError:  # macOS
        return min(psutil.cpu_count() or 1, 8)


def count_workers(dataset: ImageDataset, workers: int | None) -> int:
    """Return how many processes decode a data set, if `workers` were asked for (None: any)."""
    if workers is None:  # a pool's processes share the cores already
        pooled = multiprocessing.parent_process() is not None
        workers = 0 if pooled or is_in_memory(dataset) else count_cores()
    if multiprocessing.current_process().daemon:  # `multiprocessing.Pool`: may have no children
        workers = 0
    return min(workers, -(-len(dataset) // BATCH))


def cut(n: int, size: int = BATCH) -> list[range]:
    """Cut `n` rows into batches."""
    return [range(start, min(start + size, n)) for start in range(0, n, size)]


class Loader:
    """Yields (keys, value) of batches of items, in order; may be iterated again and again.

    ``items[key]`` makes one item, ``items.name(key)`` is what to call it in messages; `collate`
    makes one value of the items of a batch.

    `workers` processes make batches ahead; they call what is in `prepare` first, each importable
    by its name. With 0, a thread of this process makes each batch when it is asked for; or so many
    `threads` make them ahead, where there may be no processes: an actor may neither fork (CUDA,
    gRPC) nor spawn. `direct`: there is nothing to decode, so that the caller's thread makes them.
    """

    def __init__(
        self,
        items: Any,
        batches: Iterable[Sequence[Any]],
        collate: Callable[[list[Any]], Any],
        *,
        workers: int = 0,
        threads: int = 0,
        direct: bool = False,
        prepare: Sequence[Callable[[], object]] = (),
    ) -> None:
        self.items, self.batches, self.collate = items, batches, collate
        self.workers, self.threads, self.prepare = workers, threads, tuple(prepare)
        self.direct = direct
        self._hands: list[Any] = []
        self._tasks: Any = None
        self._close: Any = None

    def __iter__(self) -> Iterator[tuple[Sequence[Any], Any]]:
        if self.direct:
            for keys in self.batches:
                yield keys, self.collate([self.items[key] for key in keys])
            return
        if not self._hands:
            self._open()
        depth = AHEAD * len(self._hands) if self.workers or self.threads else 0
        ahead: deque[tuple[Sequence[Any], Future[Any]]] = deque()
        try:
            for keys in self.batches:
                future: Future[Any] = Future()
                self._tasks.put((keys, future))
                ahead.append((keys, future))
                if len(ahead) > depth:
                    yield self._take(*ahead.popleft())
            while ahead:
                yield self._take(*ahead.popleft())
        finally:
            for _, future in ahead:
                future.cancel()

    def close(self) -> None:
        """Let processes and threads go; the next iteration starts others."""
        if self._close is not None:
            self._close()
        self._hands, self._close = [], None

    def _open(self) -> None:
        hands: list[Any] = []
        if self.workers:
            hands = _start(self.items, self.collate, self.workers, self.prepare)
        if not hands:
            hands = [_Thread(self.items, self.collate) for _ in range(max(1, self.threads))]
        self._hands, self._tasks = hands, queue.SimpleQueue()
        self._close = weakref.finalize(self, _close, hands, self._tasks)
        for hand in hands:
            threading.Thread(target=_drive, args=(hand, self._tasks), daemon=True).start()

    def _take(self, keys: Sequence[Any], future: Future[Any]) -> tuple[Sequence[Any], Any]:
        """Wait for a batch, as long as anything moves."""
        # Looks are counted, not seconds: who was suspended for an hour has looked once.
        limit, beats, quiet = patience(), -1, 0.0
        look = min(TICK, limit / 2)
        try:
            while not wait([future], look).done:
                for hand in self._hands:
                    if not hand.alive:
                        raise hand.died()
                now = sum(hand.beats for hand in self._hands)
                quiet, beats = (quiet + look if now == beats else 0.0), now
                if quiet >= limit:
                    renew_lock()
                    raise self._stalled(limit)
            return keys, future.result()
        except BaseException:
            self.close()
            raise

    def _stalled(self, limit: float) -> DatasetError:
        names = [self.items.name(hand.at) for hand in self._hands if hand.at is not None]
        what = f" by {some(sorted(set(names)), 3)}" if names else ""
        return DatasetError(
            f"decoding has stalled{what}: no sign of life for {limit:g} s; look at the file and "
            "at the disk or the network it comes from, and run again (what is finished is in the "
            "cache); where images may take so long, set the environment variable "
            "SFDA_TUNE_PATIENCE to more seconds"
        )


class _Thread:
    """Makes batches in this process; `at` is the key in hand, `beats` grows with every item."""

    alive = True

    def __init__(self, items: Any, collate: Any) -> None:
        self.items, self.collate = items, collate
        self.at: Any = None
        self.beats = 0

    def __call__(self, keys: Sequence[Any]) -> Any:
        made = []
        for key in keys:
            self.at = key
            self.beats += 1
            for tell in _TELL:
                tell(self.items.name(key))
            made.append(self.items[key])
        self.at = None
        for tell in _TELL:
            tell("")
        return self.collate(made)

    def kill(self) -> None:
        """Do nothing: a thread ends when it has made its batch."""

    close = kill


class _Process:
    """Has batches made by a process; driven by one thread."""

    def __init__(self, items: Any, collate: Any, prepare: Sequence[Callable[[], object]]) -> None:
        self.items = items
        self.at: Any = None
        self.beats = 0
        self.pipe, end = multiprocessing.Pipe()
        try:
            arguments = (end, items, collate, prepare, get_switches())
            self.process = multiprocessing.Process(target=_serve, args=arguments, daemon=True)
            self.process.start()
        except BaseException:
            self.pipe.close()
            raise
        finally:
            end.close()  # so that the death of the process ends the pipe

    def wait_until_ready(self) -> bool:
        """Return whether it has started."""
        try:
            return self.pipe.poll(patience()) and self.pipe.recv() == "ready"
        except (EOFError, OSError):
            return False

    def __call__(self, keys: Sequence[Any]) -> Any:
        try:
            self.pipe.send(keys)
            while isinstance(message := self.pipe.recv(), int):
                self.at = keys[message]
                self.beats += 1
            content = self.pipe.recv_bytes()
            buffers = [bytearray(size) for size in message]
            for buffer in buffers:
                self.pipe.recv_bytes_into(buffer)
        except (EOFError, OSError) as error:
            raise self.died() from error
        self.at = None
        failed, value = pickle.loads(content, buffers=buffers)
        if failed:
            raise value
        return value

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def died(self) -> DatasetError:
        self.process.join(1.0)
        code = self.process.exitcode
        signals = {-number: number.name for number in signal.Signals}
        how = signals.get(code or 0, f"code {code}")
        where = f" while it decoded {self.items.name(self.at)}" if self.at is not None else ""
        return DatasetError(
            f"a decoding process died{where} ({how}): either this image crashes the decoder (move "
            "it away or write it anew), or memory is short (free some, or decode in fewer "
            "processes); then run again"
        )

    def kill(self) -> None:
        """End it; whoever waits for it has an error."""
        with contextlib.suppress(ValueError, AttributeError):  # it was never started
            self.process.kill()

    def close(self) -> None:
        """Let go of what is left of it."""
        self.kill()
        self.pipe.close()
        with contextlib.suppress(ValueError, AssertionError):  # nothing is left
            self.process.join(5.0)
            self.process.close()


def _start(
    items: Any, collate: Any, n: int, prepare: Sequence[Callable[[], object]]
) -> list[_Process]:
    """Start `n` processes, and return those that came up."""
    hands: list[_Process] = []
    reason = ""
    try:
        for _ in range(n):
            hands.append(_Process(items, collate, prepare))
    except OSError as error:  # too many processes or files, or no memory for one more
        reason = str(error)
    ready = [hand for hand in hands if hand.wait_until_ready()]
    for hand in hands:
        if hand not in ready:
            hand.close()
    if len(ready) < n:
        who = f"only {len(ready)} of them decode" if ready else "this process decodes"
        if not reason and multiprocessing.get_start_method() != "fork":
            reason = "a script needs its `if __name__ == '__main__':` where processes are spawned"
        warnings.warn(
            f"{n - len(ready)} of {n} decoding processes could not start"
            f"{f' ({reason})' if reason else ''}, so {who}",
            stacklevel=2,
        )
    return ready


def _drive(hand: Any, tasks: Any) -> None:
    """Hand out batches, until there is a None."""
    while (task := tasks.get()) is not None:
        keys, future = task
        if future.set_running_or_notify_cancel():
            try:
                value = hand(keys)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(value)
                del value
        del task, keys, future  # pixels need not wait here for the next task
    hand.close()


def _close(hands: list[Any], tasks: Any) -> None:
    for hand in hands:
        hand.kill()
    for _ in hands:
        tasks.put(None)


# In the other process ---------------------------------------------------------------------------
def _serve(
    pipe: Any,
    items: Any,
    collate: Any,
    prepare: Sequence[Callable[[], object]],
    switches: Mapping[str, Any],
) -> None:
    """Make batches until the other end of the pipe is closed."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    torch.set_num_threads(1)
    set_switches(switches)
    parent = os.getppid()
    for call in prepare:
        call()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        pipe.send("ready")
        while True:
            while not pipe.poll(5.0):
                if os.getppid() != parent:  # killed, with the pipe still open somewhere
                    return
            _answer(pipe, pipe.recv(), items, collate)


def _answer(pipe: Any, keys: Sequence[Any], items: Any, collate: Any) -> None:
    made: list[Any] = []
    try:
        for number, key in enumerate(keys):
            pipe.send(number)
            made.append(items[key])
        answer = _dump((False, collate(made)))
    except Exception as error:
        answer = _dump((True, _portable(error)))
    content, buffers = answer
    pipe.send([len(buffer) for buffer in buffers])
    pipe.send_bytes(content)
    for buffer in buffers:
        pipe.send_bytes(buffer)


def _portable(error: Exception) -> Exception:
    """Return the error, or one that can travel in its place; with what only this process knows."""
    error.add_note("".join(traceback.format_exception(error)).rstrip())
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _dump(value: Any) -> tuple[bytes, list[memoryview]]:
    """Pickle a value, with the memory of its arrays and tensors apart: so nobody copies it."""
    import torch

    class Pickler(pickle.Pickler):
        def reducer_override(self, obj: Any) -> Any:
            if type(obj) is torch.Tensor and obj.is_contiguous() and not obj.requires_grad:
                with contextlib.suppress(TypeError, RuntimeError):  # numpy knows no bfloat16
                    return torch.from_numpy, (obj.numpy(),)
            return NotImplemented

    buffers: list[pickle.PickleBuffer] = []
    content = io.BytesIO()
    Pickler(content, 5, buffer_callback=buffers.append).dump(value)
    return content.getvalue(), [buffer.raw() for buffer in buffers]
