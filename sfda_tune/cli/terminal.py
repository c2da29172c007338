"""Tables, findings and errors on the terminal."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.table import Table

from sfda_tune.pipelines.terminal import Terminal, say, text
from sfda_tune.values.files import say_kind
from sfda_tune.values.ranking import HEADINGS, Ranking
from sfda_tune.values.text import printable

if TYPE_CHECKING:
    from sfda_tune.selection.uncertainty import Confidence

UsageError: Any = typer.BadParameter.__bases__[0]  # click's; recent typers bring their own click
output = Terminal()  # results, on standard output
messages = Terminal(stderr=True)  # everything else


def split_commas(specs: list[str] | None) -> list[str]:
    """Split at commas, except in the names of existing folders."""
    parts: list[str] = []
    for spec in specs or []:
        parts += [spec] if os.path.exists(spec) else [p.strip() for p in spec.split(",")]
    return parts


def show_ranking(ranking: Ranking) -> None:
    """Print the table, what is known of its order, and what makes it doubtful."""
    from sfda_tune.selection.diagnostics import diagnose
    from sfda_tune.selection.uncertainty import find_confidence

    info = ranking.info
    title = f"{info['dataset']}: {info['n_samples']} images, {info['n_classes']} classes"
    table = Table(title=text(f"{title}; {ranking.metric}"), title_justify="left")
    c = find_confidence(ranking)
    sure = {} if c is None else _sure(c)
    widths = [len(printable(name)) for name in ranking]
    shown = _columns(widths, [*HEADINGS[:3], *_SURE[: 2 * bool(sure)]])
    for name in shown:
        if name == "backbone":  # folded where the terminal is narrow
            table.add_column(name, overflow="fold", min_width=12)
        else:
            left = name == "note"
            table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for score, cells in zip(ranking.scores, ranking.cells(), strict=True):
        row: dict[str, str] = dict(zip(HEADINGS, cells, strict=True))
        row |= sure.get(score.backbone, dict.fromkeys(_SURE, ""))
        row["note"] = row["note"] if score.error is None else "see below"
        table.add_row(*(text(row[name]) for name in shown))
    print_table(table)
    for name, error in ranking.failed.items():
        say(output, f"{name}: {error}")
    for line in _findings(ranking, c):
        say(output, line)
    show_forecast(ranking)
    for diagnostic in diagnose(ranking):
        if diagnostic.kind not in ("failed", "unreadable"):  # said already
            say(messages, f"{diagnostic.severity}: {diagnostic.message}")
    seconds = info["seconds"]
    say(
        messages,
        f"{seconds['total']:.1f} s in all on {info['device']}: "
        f"waiting for pixels {seconds['decode']:.1f} (decoding itself "
        f"{seconds['decode_work']:.1f}), forward passes {seconds['forward']:.1f}, "
        f"loading {seconds['load']:.1f}, scoring {seconds['score']:.1f}",
    )


def show_forecast(ranking: Ranking, most: int = 5) -> None:
    """Print which backbones will be best once all of their weights are fine-tuned.

    Only for scores like those that the forecast was fitted to, and for networks that its table
    knows: most of them, at least.
    """
    from sfda_tune.selection.forecast import find_facts, forecast, is_known

    fitted = ranking.metric in ("sfda (loo)", "linear_probe")
    if not fitted or not is_known(find_facts(ranking)):
        return
    f = forecast(ranking)
    title = "After fine-tuning all weights (what is above is about the features as they are)"
    table = Table(title=text(title), title_justify="left")
    table.add_column("backbone", overflow="fold", min_width=12)
    for name in ("forecast", *_SURE):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("because of")
    for r in f.records()[:most]:
        cells = (f"{r['mean']:+.2f}", f"{r['rank_low']}–{r['rank_high']}", f"{r['p_best']:.2f}")
        table.add_row(*map(text, (printable(r["backbone"]), *cells, r["why"])))
    print_table(table)
    names = f.shortlist(0.95)
    if len(names) < len(f.names):
        shown = ", ".join(map(printable, names))
        say(output, f"Best after fine-tuning, with probability .95, one of: {shown}")
    else:
        say(output, "Any of them may be the best after fine-tuning.")


_SURE = ("90% ranks", "P(best)")


def _sure(c: Confidence) -> dict[str, dict[str, str]]:
    """Return the cells of the columns `_SURE`, by backbone."""
    return {
        str(name): {
            "90% ranks": f"{first}" if first == last else f"{first}–{last}",
            "P(best)": f"{best:.2f}",
        }
        for name, (first, last), best in zip(
            c.names, c.rank_interval, c.best.values(), strict=True
        )
    }


def _findings(ranking: Ranking, c: Confidence | None) -> list[str]:
    """Say what follows from the ranking: the shortlist, the race, the ensemble."""
    from sfda_tune.selection.uncertainty import shortlist

    lines = []
    if c is not None:
        names = [str(name) for name in shortlist(c)]
        if len(names) > 1:
            among = "of those that finished the race, " * ("race" in ranking.info)
            text = f"Best by this score, {among}with probability .95, one of: {', '.join(names)}"
            lines.append(text)
        groups = [", ".join(map(str, group)) for group in c.groups if len(group) > 1]
        if groups:
            lines.append(f"Not told apart by these images: {'; '.join(groups)}")
    if race := ranking.info.get("race"):
        saved = 1 - race["forward_passes"] / race["full_run"]
        lines.append(
            f"Race for the top {race['top']}: {race['forward_passes']} forward passes instead of "
            f"{race['full_run']}, {saved:.0%} saved"
        )
    if ensemble := ranking.info.get("ensemble"):
        lines.append(f"To fine-tune together: {', '.join(ensemble['backbones'])}")
    return lines


def print_table(table: Table) -> None:
    """Print a table; a file or a pipe has no width, so there nothing is folded or cut."""
    if output.is_terminal:
        output.print(table)
    else:
        wide = Terminal(width=10_000)
        Terminal(width=wide.measure(table).maximum).print(table)


def _columns(names: list[int], first: list[str]) -> list[str]:
    """Leave out the less important columns where the terminal is too narrow for all."""
    shown = [*first, *HEADINGS[3:]]
    room = 10_000 if not output.is_terminal else output.width
    for name in ("images/s", "params", "width", *_SURE):
        if name in shown and max(names, default=0) + 9 * len(shown) > room:
            shown.remove(name)
    return shown


def fail(message: str) -> NoReturn:
    """Print an error and end with status 1."""
    print_error(message)
    raise typer.Exit(1)


def print_error(message: str) -> None:
    """Print an error as one line."""
    say(messages, "error:", style="bold red", end=" ")
    say(messages, " ".join(message.split()))  # one line, whatever a plug-in or a library says


def show_warning(message: Any, category: Any, *args: Any, **kwargs: Any) -> None:
    """Print the warnings that are meant for people; what `warnings.showwarning` is set to."""
    if issubclass(category, UserWarning):
        say(messages, "warning:", style="yellow", end=" ")
        say(messages, message)


class PrintableFormatter(logging.Formatter):
    """What libraries log holds names, too."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record; nothing in it reaches the terminal as it is."""
        return "\n".join(map(printable, super().format(record).splitlines()))


def check_out(out: Path, option: str, *, replaces: bool = True) -> None:
    """Refuse before the work what could not be written after it.

    What `replaces` the file as a whole would put one in the place of a FIFO or a device.
    """
    if not out.parent.is_dir():
        fail(f"{option}: there is no folder {str(out.parent)!r}; create it first.")
    if not os.access(out.parent, os.W_OK) or out.is_dir():
        fail(f"{option}: {str(out)!r} cannot be written.")
    if replaces and out.exists() and not out.is_file():
        fail(f"{option} must be a file but {str(out)!r} {say_kind(out)}.")
