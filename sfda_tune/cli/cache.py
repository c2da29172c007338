"""``sfda-tune cache``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from sfda_tune.cli.options import CacheDir, Debug
from sfda_tune.cli.terminal import messages, output, print_table
from sfda_tune.pipelines.terminal import say, text

cache_app = typer.Typer(help="Look at the kept features, or delete them.", no_args_is_help=True)


@cache_app.command("show")
def show_cache(cache: CacheDir = None, debug: Debug = False) -> None:
    """Show where the features are kept and what they take."""
    store = _store(cache)
    totals = store.summary()
    table = Table(title=text(store.root), title_justify="left")
    for name in ("backbone", "entries", "images", "MB"):
        table.add_column(name, justify="left" if name == "backbone" else "right")
    for name, total in sorted(totals.items()):
        megabytes = f"{total['bytes'] / 1e6:.1f}"
        table.add_row(text(name), str(total["entries"]), str(total["images"]), megabytes)
    size = sum(total["bytes"] for total in totals.values()) / 1e6
    table.add_section()
    table.add_row("all", str(sum(t["entries"] for t in totals.values())), "", f"{size:.1f}")
    print_table(table)


@cache_app.command("clear")
def clear_cache(
    cache: CacheDir = None,
    older_than: Annotated[
        float | None,
        typer.Option(metavar="DAYS", min=0, help="Only features not used for so many days."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Delete kept features; they are computed again when needed."""
    store = _store(cache)
    count, size = store.clear(older_than)
    say(output, f"deleted {count} entries, {size / 1e6:.1f} MB, from {store.root}")


def _store(cache: str | None) -> Any:
    from sfda_tune.extraction.store import open_store

    store = open_store(cache)
    if isinstance(store.root, Path) and not store.root.exists():
        say(messages, f"there is no folder {store.root}")
    return store
