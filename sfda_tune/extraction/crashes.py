"""Images that end the process that decodes them: found, named and left out."""

from __future__ import annotations

import contextlib
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import PIL

from sfda_tune.backbones.plugins import load_plugin
from sfda_tune.data.decoding import Passing
from sfda_tune.extraction.pixels import Decoder
from sfda_tune.extraction.plan import Unit

__all__ = ["find_crashing_images"]


CRASH_REASON = (
    "a process that decodes it "  # then what becomes of it; how such an image is known again
)
PILLOW = f" (Pillow {PIL.__version__})"
DONE = b"all rows are read\n"
CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGFPE}
_CHECK = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); "
    "check, *rest = pickle.load(sys.stdin.buffer); check(*rest)"
)


def find_crashing_images(
    unit: Unit, *, timeout: float, dumps: Callable[[Any], bytes] = pickle.dumps
) -> dict[int, str]:
    """Decode the rows of a unit in child processes and return those that end theirs, with why.

    A child tells each row before it reads it; when it dies the last row told is guilty, and
    another child goes on behind it. What the unit knows as `crashing` is not read again; a row
    without a word for `timeout` seconds counts as one that hangs; `dumps` must pickle the data set
    and its transforms for `pickle.load`.
    """
    found, start = dict(unit.crashing), 0
    while True:
        content = dumps(
            (_check, unit.dataset, unit.preprocessings, unit.backbone.plugins, found, start)
        )
        row, code = _watch(dumps(sys.path) + content, timeout)
        if code == 0:
            return found
        if row is None:
            raise RuntimeError(f"the images cannot be checked: a child ended with code {code}")
        why = f"hangs for more than {timeout:g} s" if code is None else f"ends with code {code}"
        crashed = code is not None and -code in CRASHES  # others may have been ended by somebody
        found[row] = f"{CRASH_REASON}{why}{PILLOW}" if crashed else Passing(CRASH_REASON + why)
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
                if line == DONE:  # to end takes seconds, on a busy machine
                    return row, 0
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


def _check(
    dataset: Any, preprocessings: Any, plugins: Any, crashing: dict[int, str], start: int
) -> None:
    for plugin in plugins:
        load_plugin(plugin)
    decoder = Decoder(dataset, preprocessings, crashing)
    for row in range(start, len(dataset)):
        sys.stdout.write(f"row {row}\n")
        sys.stdout.flush()
        decoder[row]
    sys.stdout.write(DONE.decode())
    sys.stdout.flush()
