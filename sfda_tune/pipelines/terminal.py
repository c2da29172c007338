"""What is shown on a terminal, or goes into a pipe: never markup, never an error."""

from __future__ import annotations

import codecs
import os
import sys
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.text import Text

from sfda_tune.values.text import printable

__all__ = ["Terminal", "hang_up", "say", "spell_out", "text"]

_SPELLINGS = {
    "–": "-", "—": "-", "×": "x", "…": "...", "≥": ">=", "≤": "<=", "›": ">", "\xa0": " ",
}  # fmt: skip


class Terminal(Console):
    """A console that falls silent when nobody reads it any more (``| head``)."""

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print, unless the pipe is closed; older versions of `rich` raise."""
        try:
            super().print(*args, **kwargs)
        except BrokenPipeError:
            self.on_broken_pipe()
        except OSError:  # a full disk
            if not self.stderr:  # messages only
                raise
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Go on: files are still to be written, and the exit status says how it went."""
        self.quiet = True
        hang_up(self.file)


def say(
    console: Console, what: object, *, style: str = "", end: str = "\n", fold: bool = False
) -> None:
    """Print one line of text from anywhere, as it is.

    What is for people (`fold`) goes on in the next line between words; commands, errors and what
    is no terminal are never folded.
    """
    soft = not (fold and console.is_terminal)
    console.print(Text(printable(what), style), soft_wrap=soft, end=end)


def text(what: object) -> Text:
    """Return text from anywhere for a table or a title."""
    return Text(printable(what))


def hang_up(stream: Any) -> None:
    """Let what is still written to a closed pipe vanish."""
    with suppress(OSError, ValueError, AttributeError):  # it is no file, or is closed
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def spell_out() -> None:
    """Let the standard streams show what their encoding lacks, instead of raising an error."""
    codecs.register_error("sfda_tune.spell_out", _spell)
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError, OSError):  # something else, or closed
            stream.reconfigure(errors="sfda_tune.spell_out")  # type: ignore[union-attr]


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_SPELLINGS.get(c) or ascii(c)[1:-1] for c in lacking), error.end
