"""How long a search has taken, and signs of life: by a clock that nobody sets.

The time of day jumps, when it is set and between machines, so no two times of day are subtracted.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from sfda_tune.values.files import AtLeast, read_json, write_text

__all__ = ["Beat", "Clock", "counting"]

logger = logging.getLogger(__name__)
_BEGUN: ContextVar[float | None] = ContextVar("_BEGUN", default=None)


@contextmanager
def counting() -> Iterator[None]:
    """Have a `Clock` that is made inside count from here: to import torch takes seconds.

    Of several the outermost holds: for who types a command, its time begins there.
    """
    token = _BEGUN.set(_BEGUN.get() or time.monotonic())
    try:
        yield
    finally:
        _BEGUN.reset(token)


class Beat:
    """Call a function now and every so many seconds, in a thread of its own, within a `with`.

    A call that fails is said once; the next one is made all the same.
    """

    def __init__(self, call: Callable[[], object], every: float) -> None:
        self._call, self._every, self._over = call, every, threading.Event()
        self._thread = threading.Thread(target=self._run, name="beat", daemon=True)

    def __enter__(self) -> Beat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(timeout=10)  # a database may be out of reach

    def _run(self) -> None:
        told = False
        while True:
            try:
                self._call()
            except Exception as error:
                if not told:
                    logger.warning("a sign of life failed, and is tried again: %r", error)
                told = True
            if self._over.wait(self._every):
                return


class Clock:
    """Seconds that a search has taken, in all processes that were part of it, without pauses.

    They stand in a file, so that who goes on, or joins, begins where the others are: to the
    second, if `write` is called that often, also after a kill. `known` are seconds that are known
    from elsewhere.
    """

    def __init__(self, file: Path, known: float = 0.0) -> None:
        self._file, self._begun = file, _BEGUN.get() or time.monotonic()
        self._before = max(known, self._read())

    def __call__(self) -> float:
        """Return the seconds so far."""
        return self._before + time.monotonic() - self._begun

    def write(self) -> None:
        """Write them down."""
        if self._file.parent.is_dir() and self() > self._read():
            write_text(self._file, json.dumps({"seconds": round(self(), 3)}))

    def _read(self) -> float:
        with suppress(OSError, ValueError):  # none yet, or a damaged one
            return float(read_json(self._file, {"seconds": AtLeast(0)})["seconds"])
        return 0.0
