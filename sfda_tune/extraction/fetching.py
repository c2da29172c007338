"""Weights of the next networks, fetched while others compute, and removed where there is no room.

Two threads download; what they have fetched and nobody has used yet is at most `AHEAD` networks.
With a limit on the disk, what was used is removed when there is no room for the next, the latest
first: whoever goes over the same networks again finds the others. Only what came here during the
run is ever removed, and never while another process opens it; and what cut downloads of the same
networks have left.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sfda_tune.backbones import loading, weights
from sfda_tune.data.loader import patience
from sfda_tune.extraction.plan import Unit
from sfda_tune.values.features import Backbone
from sfda_tune.values.text import format_bytes

__all__ = ["Fetcher", "sweep"]

logger = logging.getLogger(__name__)
STREAMS, AHEAD = 2, 4  # downloads at a time; networks that are here, or coming, and not used yet
TRIES = 3  # of weights that another process removes
STALL = 10  # times the patience with images: the client tells of ten megabytes at a time
Tell = Callable[[str, int, "int | None"], None]  # backbone, bytes that are here, of how many


class EndedError(Exception):
    """The run has ended."""


@dataclass(eq=False)
class _Item:
    """The weights of one network."""

    backbone: Backbone
    state: str = "wanted"  # coming, here, used, gone, failed
    size: int | None = None  # bytes that they take of the disk, or will
    file: str | None = None  # that is to be removed one day
    error: Exception | None = None
    moved: float = 0.0  # when something last came


class Fetcher:
    """Fetches weights in the background.

    Parameters
    ----------
    limit : int, optional
        Bytes on the disk that may be taken at a time.
    tell : callable, optional
        Receives each backbone, the bytes of it that are here, and of how many.
    ledger : Path, optional
        A file for the names of the files that came, one a line, and of the folders where some
        may have been cut; for who has to remove them in the place of this process, see `sweep`.

    Examples
    --------
    >>> from sfda_tune import resolve_backbones
    >>> with Fetcher() as fetcher:  # nothing to be done for weights that are here
    ...     fetcher.want(resolve_backbones("demo:resnet_glyphs"))
    ...     fetcher.is_ready("demo:resnet_glyphs")
    True
    """

    def __init__(
        self, limit: int | None = None, tell: Tell | None = None, ledger: Path | None = None
    ) -> None:
        self.limit, self.tell, self.ledger = limit, tell, ledger
        self.share = 1  # processes that the disk was divided among
        self._items: dict[str, _Item] = {}
        self._used: list[str] = []  # in the order of their use
        self._awaited: set[str] = set()  # somebody waits for these
        self._change = threading.Condition()
        self._stop = False
        self._n_threads = 0  # at work

    def __enter__(self) -> Fetcher:
        return self

    def __exit__(self, *error: object) -> None:
        """Stop, and remove what came here if the disk is limited."""
        with self._change:
            self._stop = True
            self._change.notify_all()
            owned = [item for item in self._items.values() if item.file is not None]
        for item in owned if self.limit is not None else ():
            if not self._remove(item):
                logger.warning("%s stays: another process is opening it", item.file)

    def want(self, backbones: Iterable[Backbone]) -> None:
        """Fetch what is not here yet, in this order."""
        with self._change:
            for backbone in backbones:
                name = backbone.name
                item = self._items.get(name)
                if item is not None and item.state == "used":
                    item.state = "here"
                    self._used.remove(name)
                elif (item is None or item.state in ("gone", "failed")) and _is_remote(backbone):
                    self._items.pop(name, None)  # the order is that of these
                    self._items[name] = _Item(backbone)
            self._start()
            self._change.notify_all()

    def expect(self, backbones: Iterable[Backbone]) -> None:
        """Fetch what is not here yet of these, and nothing else any more."""
        backbones = list(backbones)
        names = {backbone.name for backbone in backbones}
        with self._change:
            for name, item in list(self._items.items()):
                if name not in names and item.state == "wanted":
                    del self._items[name]
                elif name not in names:
                    self._release(name)
        self.want(backbones)

    def is_ready(self, name: str) -> bool:
        """Whether weights are here, or will never be."""
        with self._change:
            return self._is_ready(name)

    def order(
        self, units: Iterable[Unit], tick: Callable[[str, int], None] | None = None
    ) -> Iterator[Unit]:
        """Yield units of the same images as their weights come, the first of them first.

        While none of them is here, `tick` may stop the run; it gets the first one's name, and 0.
        """
        waiting: list[Unit] = []
        for unit in units:
            if waiting and unit.number != waiting[0].number:
                yield from self._as_they_come(waiting, tick)
                waiting = []
            waiting.append(unit)
        yield from self._as_they_come(waiting, tick)

    def _as_they_come(
        self, waiting: list[Unit], tick: Callable[[str, int], None] | None
    ) -> Iterator[Unit]:
        self.want(unit.backbone for unit in waiting)
        while waiting:
            with self._change:
                ready = next((u for u in waiting if self._is_ready(u.backbone.name)), None)
                if ready is None:
                    self._await(waiting[0].backbone.name)
            if ready is not None:
                waiting.remove(ready)
                yield ready
            elif tick is not None:
                tick(waiting[0].backbone.name, 0)

    @contextmanager
    def opening(self, backbone: Backbone) -> Iterator[bool]:
        """Wait for the weights of a backbone, which is opened inside, and then no more for now.

        Hands out whether they were not here before.

        Raises
        ------
        Exception
            What kept them from coming.
        """
        held = None
        for _ in range(TRIES):
            self._wait_for(backbone)
            if (file := _find_file(backbone)) is not None and (held := weights.hold(file)):
                break
            if not _is_remote(backbone):
                break
            self.want([backbone])  # another process has removed them
        try:
            yield self.has_fetched(backbone.name)
        finally:
            if held is not None:
                held.close()
            self.release(backbone.name)

    def _wait_for(self, backbone: Backbone) -> None:
        with self._change:
            while not self._is_ready(backbone.name) and not self._stop:
                self._await(backbone.name)
            item = self._items.get(backbone.name)
        if item is not None and item.error is not None:
            raise item.error

    def _await(self, name: str) -> None:
        """Wait a moment for weights, which come before all others."""
        self._check_stalls()
        self._awaited.add(name)
        self._change.notify_all()
        self._change.wait(0.2)
        self._awaited.discard(name)

    def release(self, name: str) -> None:
        """Receive that a backbone will be no more for now."""
        with self._change:
            self._release(name)

    def _release(self, name: str) -> None:
        item = self._items.get(name)
        if item is not None and item.state == "here":
            item.state = "used"
            self._used.append(name)
            self._change.notify_all()

    def has_fetched(self, name: str) -> bool:
        """Whether the weights of a backbone were not here before."""
        item = self._items.get(name)
        return item is not None and item.file is not None

    def _is_ready(self, name: str) -> bool:
        item = self._items.get(name)
        return item is None or item.state not in ("wanted", "coming")

    def _start(self) -> None:
        """Have as many threads as there is work for; one whose download has stalled counts not."""
        states = [item.state for item in self._items.values()]
        while self._n_threads < min(STREAMS, states.count("wanted") + states.count("coming")):
            self._n_threads += 1
            threading.Thread(target=self._run, name="weights", daemon=True).start()

    def _run(self) -> None:
        while (item := self._next()) is not None:
            try:
                self._fetch(item)
            except Exception as error:
                with self._change:
                    if item.state == "failed":  # it had stalled: another thread took its place
                        return
                    item.state, item.error, item.size = "failed", error, None
                    self._change.notify_all()
                if self.tell is not None and not self._stop:
                    self.tell(item.backbone.name, 0, 0)  # of this one nothing more will come

    def _next(self) -> _Item | None:
        with self._change:
            while not self._stop:
                states = [item.state for item in self._items.values()]
                wanted = [item for item in self._items.values() if item.state == "wanted"]
                wanted.sort(key=lambda item: item.backbone.name not in self._awaited)
                is_urgent = wanted and wanted[0].backbone.name in self._awaited
                if is_urgent or (wanted and states.count("coming") + states.count("here") < AHEAD):
                    wanted[0].state, wanted[0].moved = "coming", time.monotonic()
                    return wanted[0]
                self._change.wait()
        return None

    def _fetch(self, item: _Item) -> None:
        backbone = item.backbone
        name = loading.timm_name(backbone.spec)
        if self.limit is not None:
            loading.check_bounded(backbone)
            self._make_room(item, weights.look_up_sizes([name])[name])
            self._remove_cut(name)

        def tell(done: int, total: int | None) -> None:
            with self._change:
                item.moved = time.monotonic()
                if self._stop or item.state != "coming":
                    raise EndedError
            if self.limit is not None and total and total != item.size:
                self._make_room(item, total)  # the hub had not told it, or something else
            if self.tell is not None:
                self.tell(backbone.name, done, total)

        try:
            file, fetched = loading.fetch(backbone, tell)
        except Exception:
            if self.limit is not None:
                self._remove_cut(name)
            raise
        with self._change:
            if file is not None and fetched:
                item.file, item.size = file, os.path.getsize(file)
                self._enter(file)
            if self._stop and self.limit is not None:
                self._remove(item)
            if item.state == "coming":
                item.state = "here"
            self._change.notify_all()

    def _remove_cut(self, name: str) -> None:
        """Remove what is left of cut downloads of weights that are about to come, or did not."""
        if (folder := weights.find_blobs(name)) is not None:
            with self._change:
                self._enter(str(folder))
            weights.remove_cut(folder)

    def _enter(self, path: str) -> None:
        if self.ledger is not None:
            with self.ledger.open("a", encoding="utf-8") as ledger:
                ledger.write(f"{path}\n")

    def _make_room(self, item: _Item, size: int | None) -> None:
        """Wait until there is room on the disk, and remove what was used for it."""
        if (size or 0) > (self.limit or 0):
            among = f" to each of {self.share} actors on a machine" * (self.share > 1)
            raise loading.BackboneError(
                f"its weights take {format_bytes(size or 0)}, and `weights_disk` allows "
                f"{format_bytes(self.limit or 0)}{among}"
            )
        with self._change:
            while not self._stop:
                taken = sum(i.size or 0 for i in self._items.values() if i is not item)
                if taken + (size or 0) <= (self.limit or 0) or not taken:
                    item.size, item.moved = size or 0, time.monotonic()
                    return
                owned = [self._items[n] for n in self._used]
                if item.backbone.name in self._awaited:  # then for what is ahead of its time, too
                    owned = [i for i in self._items.values() if i.state == "here"] + owned
                owned = [one for one in owned if one.file is not None]
                if not any(self._remove(one) for one in reversed(owned)):
                    item.moved = time.monotonic()
                    self._change.wait(0.2)
        raise EndedError

    def _remove(self, item: _Item) -> bool:
        """Remove what came; return whether it is gone."""
        if item.file is not None:
            try:
                if not weights.remove_unused(item.file):
                    return False
            except OSError as error:
                logger.warning("%s could not be removed: %s", item.file, error)
        item.file, item.size, item.state = None, None, "gone"
        if item.backbone.name in self._used:
            self._used.remove(item.backbone.name)
        return True

    def _check_stalls(self) -> None:
        """Give up the downloads of which nothing has come for long; the client may not."""
        longest = STALL * patience()
        for item in self._items.values():
            if item.state == "coming" and time.monotonic() - item.moved > longest:
                item.state, item.size, self._n_threads = "failed", None, self._n_threads - 1
                item.error = loading.BackboneError(
                    f"nothing of its weights came for {longest:.0f} s; SFDA_TUNE_PATIENCE "
                    f"(seconds) waits {STALL} times as long as it says"
                )
                self._start()
                self._change.notify_all()


def sweep(ledgers: Iterable[Path]) -> list[str]:
    """Remove what came here, for processes that have ended; return what cannot be."""
    left = []
    for ledger in ledgers:
        for path in dict.fromkeys(ledger.read_text(encoding="utf-8").splitlines()):
            with suppress(OSError):
                if os.path.isdir(path):
                    weights.remove_cut(Path(path))
                    continue
                if weights.remove_unused(path):
                    continue
            left.append(path)
        ledger.unlink(missing_ok=True)
    return left


def _find_file(backbone: Backbone) -> str | None:
    return None if backbone.load else weights.find_cached(loading.timm_name(backbone.spec))


def _is_remote(backbone: Backbone) -> bool:
    """Whether weights are to be fetched: from the hub, or by timm from an address."""
    if backbone.load is not None:
        return False
    source, _ = weights.find_source(loading.timm_name(backbone.spec))
    return source in ("hf-hub", "url") and _find_file(backbone) is None
