"""``sfda-tune cache``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from sfda_tune.cli.options import AsJson, CacheDir, Command, Debug, Group
from sfda_tune.cli.terminal import messages, output, print_json, print_table
from sfda_tune.pipelines.terminal import say, text

cache_app = typer.Typer(
    cls=Group,
    help="Look at the kept features, or delete them. SFDA_TUNE_CACHE_SIZE=20GB keeps their folder "
    "below that size: what is longest unused goes.",
    no_args_is_help=True,
)


@cache_app.command("show", cls=Command)
def show_cache(cache: CacheDir = None, as_json: AsJson = False, debug: Debug = False) -> None:
    """Show what is kept of which data set and backbone, what it takes, and when it was used.

    An image that is in several data sets counts for the first one. What cut downloads of weights
    have left in the cache of the hub is told, too.

    For example:

      sfda-tune cache show
    """
    from huggingface_hub import constants

    from sfda_tune.backbones.weights import find_cut
    from sfda_tune.extraction.store import size_limit

    store, limit = _store(cache), size_limit()
    totals = store.summary()
    notes = sum(stat.st_size for _, stat in store.notes())
    cut = [stat.st_size for stat in find_cut().values()]
    if as_json:
        rows = [dict(zip(("dataset", "backbone"), n, strict=True)) | t for n, t in totals.items()]
        told = {"folder": str(store.root), "kept": rows, "notes": notes, "limit": limit}
        of = {"folder": constants.HF_HUB_CACHE, "files": len(cut), "bytes": sum(cut)}
        print_json(told | {"cut_downloads": of})
        return
    table = Table(title=text(store.root), title_justify="left")
    left = ("data set", "backbone")
    for name in (*left, "segments", "images", "MB", "unused for"):
        table.add_column(name, justify="left" if name in left else "right")
    for names, total in sorted(totals.items()):
        counts = (f"{total[name]:.0f}" for name in ("segments", "images"))
        megabytes, unused = f"{total['bytes'] / 1e6:.1f}", _span(time.time() - total["used"])
        table.add_row(*map(text, names), *counts, megabytes, unused)
    if notes:
        table.add_row("(notes on weights, networks and scores)", "", "", "", f"{notes / 1e6:.1f}")
    size = (sum(total["bytes"] for total in totals.values()) + notes) / 1e6
    table.add_section()
    segments = sum(total["segments"] for total in totals.values())
    allowed = "" if limit is None else f" of {limit / 1e6:.1f}"
    table.add_row("all", "", f"{segments:.0f}", "", f"{size:.1f}{allowed}")
    print_table(table)
    if cut:
        say(output, f"{_tell_cut(len(cut), sum(cut))} are in {constants.HF_HUB_CACHE}, too")


@cache_app.command("clear", cls=Command)
def clear_cache(
    cache: CacheDir = None,
    older_than: Annotated[
        float | None,
        typer.Option(metavar="DAYS", min=0, help="Only features not used for so many days."),
    ] = None,
    larger_than: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Only those of networks with more than that: 500MB."),
    ] = None,
    outdated: Annotated[
        bool, typer.Option("--outdated", help="Only what earlier versions kept; it is not used.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Delete kept features; they are computed again when needed. Options add up.

    What cut downloads of weights have left in the cache of the hub goes with them.

    For example:

      sfda-tune cache clear --older-than 30
    """
    from huggingface_hub import constants

    from sfda_tune.backbones.weights import remove_cut
    from sfda_tune.values.text import parse_bytes

    size = None if larger_than is None else parse_bytes("--larger-than", larger_than)
    store = _store(cache)
    count, freed = store.clear(older_than, size, outdated=outdated)
    cut = (0, 0)
    if size is None and not outdated:
        cut = remove_cut(older_than=86400 * (older_than or 0))
    if as_json:
        of = {"folder": constants.HF_HUB_CACHE, "files": cut[0], "bytes": cut[1]}
        print_json(
            {"folder": str(store.root), "files": count, "bytes": freed, "cut_downloads": of}
        )
        return
    say(output, f"deleted {count} files, {freed / 1e6:.1f} MB, from {store.root}")
    if cut[0]:
        say(output, f"and {_tell_cut(*cut)}, from {constants.HF_HUB_CACHE}")


def _tell_cut(count: int, size: float) -> str:
    return f"{count} cut downloads, {size / 1e6:.1f} MB"


def _span(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return "0 min"


def _store(cache: str | None) -> Any:
    from sfda_tune.extraction.store import open_store

    store = open_store(cache)
    if isinstance(store.root, Path) and not store.root.exists():
        say(messages, f"there is no folder {store.root}")
    return store
