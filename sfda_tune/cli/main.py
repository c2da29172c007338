"""The command line: ``sfda-tune rank``, ``sfda-tune backbones``, ``sfda-tune cache``."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import traceback
import warnings
from contextlib import suppress
from typing import Annotated, Any, NoReturn

import typer

from sfda_tune import __version__
from sfda_tune.cli.cache import cache_app
from sfda_tune.cli.config import take_config
from sfda_tune.cli.doctor import diagnose
from sfda_tune.cli.export import export
from sfda_tune.cli.options import Command, Group, arrange, spread_lists
from sfda_tune.cli.predict import predict
from sfda_tune.cli.rank import rank
from sfda_tune.cli.reports import compare_rankings, evaluate_scores, list_backbones, report_on
from sfda_tune.cli.search import search
from sfda_tune.cli.terminal import (
    PrintableFormatter,
    Told,
    UsageError,
    hide,
    messages,
    output,
    print_error,
    print_json,
    show_warning,
)
from sfda_tune.pipelines.clock import counting
from sfda_tune.pipelines.terminal import hang_up, say, spell_out


class _Commands(Group):
    """Says that Ctrl-C was heard: some versions of typer make a silent exit of it."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            say(messages, "Interrupted.")
            raise typer.Exit(130) from None


app = typer.Typer(
    name="sfda-tune",
    cls=_Commands,
    help="Rank pretrained image backbones on your own labelled images, before the first epoch.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cache_app, name="cache")


for name, command in {
    "rank": rank, "search": search, "predict": predict, "export": export,
    "backbones": list_backbones, "evaluate": evaluate_scores, "compare": compare_rankings,
    "report": report_on, "doctor": diagnose,
}.items():  # fmt: skip
    app.command(name, cls=Command)(arrange(command))


def _version(show: bool) -> None:
    if show:
        say(output, f"sfda-tune {__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Rank pretrained image backbones on your own labelled images, before the first epoch."""


def _on_terminate(signum: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; errors are one line, and a traceback with ``--debug``."""
    Told.documents, Told.error = 0, ""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        _run(words)
    except SystemExit as end:
        if end.code and not Told.documents and _wants_json(words):
            print_json({"error": Told.error or "interrupted"})
        if arguments is not None:
            raise
        _leave(int(end.code or 0))


def _wants_json(words: list[str]) -> bool:
    """Whether a program reads the standard output: also what failed is then one document."""
    options = words[: words.index("--")] if "--" in words else words
    with suppress(Exception):  # it may be what failed
        settings = take_config(words, app)[1]
        return "--json" in options or any(s.get("as_json") for s in settings.values())
    return "--json" in options


def _leave(code: int) -> NoReturn:
    """End this process; to free object by object what torch has loaded takes seconds."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # closed, or nobody reads it
            stream.flush()
    os._exit(code)


def _run(arguments: list[str]) -> NoReturn:
    debug = "--debug" in arguments
    spell_out()
    level, others = logging.DEBUG if debug else logging.ERROR, logging.getLogger().handlers[:]
    logging.basicConfig(level=level)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(PrintableFormatter(logging.BASIC_FORMAT))
        if handler not in others:  # --verbose has its own
            handler.setLevel(level)
    if not debug:
        warnings.showwarning = show_warning
    for name in ("SIGTERM", "SIGHUP"):  # `kill`, a closed terminal: as Ctrl-C, unless `nohup`
        sign = getattr(signal, name, None)  # Windows has no SIGHUP
        if sign is not None and signal.getsignal(sign) != signal.SIG_IGN:
            signal.signal(sign, _on_terminate)
    try:
        with counting():
            words, settings = take_config(arguments, app)
            code = app(
                spread_lists(words),
                prog_name="sfda-tune",
                standalone_mode=False,
                default_map=settings,
            )
    except UsageError as error:
        print_error(f"{error.format_message()} (see `sfda-tune --help`)")
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        say(messages, "Interrupted.")
        sys.exit(130)
    except Exception as error:
        if debug:
            for line in hide(traceback.format_exc()).splitlines():
                say(messages, line)
        known = str(error) if isinstance(error, (ValueError, OSError)) else ""
        hint = "" if debug else " (--debug shows the traceback)"
        print_error(known or f"{type(error).__name__}: {error}{hint}")
        sys.exit(1)
    try:
        if sys.stdout is not None:  # closed by `>&-`
            sys.stdout.flush()
    except BrokenPipeError:  # `sfda-tune … | head`
        hang_up(sys.stdout)
    sys.exit(code or 0)
