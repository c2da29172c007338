"""Tables, findings and errors on the terminal."""

from __future__ import annotations

import json
import logging
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.table import Table

from sfda_tune.pipelines.terminal import Terminal, say, text
from sfda_tune.values.files import say_kind
from sfda_tune.values.labels import NOUNS
from sfda_tune.values.ranking import Ranking
from sfda_tune.values.redaction import hide_secrets
from sfda_tune.values.text import capitalize, printable, some, without_nan

if TYPE_CHECKING:
    from sfda_tune.pipelines.result import SearchResult
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
    from sfda_tune.selection.advice import recommend
    from sfda_tune.selection.diagnostics import diagnose
    from sfda_tune.selection.odds import find_odds

    info = ranking.info
    what = f"{info['n_classes']} {NOUNS.get(info.get('task', ''), 'classes')}"
    if info.get("task") == "ordinal":
        what += f" ({some(info['classes'], 8, ' < ')})"
    if target := info.get("target"):
        what = f"numbers from {target['min']:g} to {target['max']:g}"
    title = f"{info['dataset']}: {info['n_samples']} images, {what}"
    table = Table(title=text(f"{title}; {ranking.metric}"), title_justify="left")
    odds, headings = find_odds(ranking), list(ranking.headings)
    sure = {} if odds is None else _sure(odds)
    columns = headings if set(_SURE) <= set(headings) or not sure else _with_odds(headings)
    rows = [dict(zip(headings, cells, strict=True)) for cells in ranking.cells()]
    rows = [dict.fromkeys(_SURE, "") | sure.get(row["backbone"], {}) | row for row in rows]
    for score, row in zip(ranking.scores, rows, strict=True):
        unseen = score.backbone in info.get("not_looked_at", ())
        row["note"] = "not looked at" if unseen else "see below" if score.error else row["note"]
    columns = [c for c in columns if c not in _IF_ANY or any(row[c] for row in rows)]
    spare = ["because of", "images/s", "params", "width", "score", "group", "90% ranks"]
    spare += ["90% interval", "P(best)"]
    if "forecast" not in columns:  # the score is what it is ranked by
        spare.remove("score")
    if {row["note"] for row in rows} <= {"", "cached"}:
        spare.insert(1, "note")
    shown = fit_columns(columns, rows, spare)
    for name in shown:
        if name == "backbone":
            table.add_column(name, overflow="fold", min_width=12)
        else:
            left = name in ("because of", "note")
            table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(text(row[name]) for name in shown))
    print_table(table)
    say_hidden(columns, shown, "--out")
    unseen = info.get("not_looked_at", ())  # said below
    failed = {name: error for name, error in ranking.failed.items() if name not in unseen}
    for line in _join_errors(failed):
        say(output, line)
    for line in recommend(ranking, odds):
        say(output, line, fold=True)
    for diagnostic in diagnose(ranking):
        if diagnostic.kind not in ("failed", "unreadable"):  # said already
            say(messages, f"{diagnostic.severity}: {diagnostic.message}", fold=True)
    seconds = info["seconds"]
    say(
        messages,
        f"{seconds['total']:.1f} s in all on {info['device']}: "
        f"waiting for pixels {seconds['decode']:.1f} (decoding itself "
        f"{seconds['decode_work']:.1f}), forward passes {seconds['forward']:.1f}, "
        f"loading {seconds['load']:.1f}, scoring {seconds['score']:.1f}",
        fold=True,
    )


def _join_errors(failed: Mapping[str, str]) -> list[str]:
    """Say what failed, and what failed for the same reason as one.

    >>> _join_errors({"a": "no weights of a", "b": "no weights of b", "c": "out of memory"})
    ['a, b: no weights of …', 'c: out of memory']
    """
    names: dict[str, list[str]] = {}
    for name, error in failed.items():
        names.setdefault(str(error).replace(name, "…"), []).append(name)
    return [
        f"{some(who, 4)}: {what}" if len(who) > 1 else f"{who[0]}: {failed[who[0]]}"
        for what, who in names.items()
    ]


_SURE = ("90% ranks", "P(best)")
NAME = 28  # characters of a name that columns make room for
_IF_ANY = ("because of", "note")


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


def show_result(result: SearchResult) -> None:
    """Print what a search found: the winner in figures, how it came about, and what comes next."""
    best, summary = result.best, result.summary
    table = Table(title=text(f"{best['backbone']}, trial {best['trial']}"), title_justify="left")
    table.add_column(f"on {summary['n_images']['test']} test images")
    table.add_column("", justify="right", no_wrap=True)
    for name, value in result.rows():
        table.add_row(name, value)
    for name, value in best["params"].items():
        shown = f"{value:.3g}" if isinstance(value, float) else str(value or "none")
        table.add_row(text(name.replace("_", " ")), text(shown))
    print_table(table)
    say(output, capitalize(f"{summary['decision']}."), fold=True)
    if best.get("epochs") == 0:
        say(output, _explain_probe(result), fold=True)
    for note in summary.get("notes", ()):
        say(output, f"note: {note}", fold=True)
    say(output, result.images, fold=True)
    folder = shlex.quote(str(result.folder))
    todo = [f"predict {folder} IMAGES", f"report {folder}", f"export {folder}"]
    say(messages, f"Next: {'; '.join(f'sfda-tune {what}' for what in todo)}")


def _explain_probe(result: SearchResult) -> str:
    """Say why the winner is a linear probe: training was no better, or never ended an epoch."""
    epochs = sum(e["number"] > 0 for t in result.trials for e in t.get("epochs") or ())
    if epochs:
        return (
            f"Fine-tuning did not help: none of {epochs} epochs was better on the validation "
            "images than the linear probe that the winner is."
        )
    if failed := [t["error"] for t in result.trials if t.get("error")]:
        return (
            f"No epoch of training ended, {len(failed)} of {len(result.trials)} trials failed: "
            f"the winner is a linear probe. The first failed with {failed[0]}."
        )
    return (
        "No epoch of training ended in time: the winner is a linear probe; a larger --budget, "
        "with the same --out, goes on from here."
    )


def _with_odds(headings: list[str]) -> list[str]:
    at = headings.index("score") + 1
    return [*headings[:at], *_SURE, *headings[at:]]


def describe_ranking(ranking: Ranking) -> dict[str, Any]:
    """Return what `show_ranking` prints, for programs; `Ranking.to_json` keeps everything."""
    from sfda_tune.selection.labels import judge_labels
    from sfda_tune.selection.odds import find_odds
    from sfda_tune.selection.uncertainty import shortlist

    odds, labels = find_odds(ranking), judge_labels(ranking)
    keep = (
        "dataset",
        "n_samples",
        "n_classes",
        "task",
        "target",
        "level_counts",
        "label_counts",
        "device",
        "seconds",
        "not_looked_at",
        "race",
    )
    return {
        "metric": ranking.metric,
        **{key: ranking.info[key] for key in keep if key in ranking.info},
        **({"labels": labels} if labels else {}),
        "shortlist": [] if odds is None else [str(name) for name in shortlist(odds)],
        "backbones": ranking.records(),
        "failed": dict(ranking.failed),
    }


class Told:
    """What this call has told so far: JSON documents, and the error it ends with."""

    documents, error = 0, ""


def print_json(document: Any) -> None:
    """Write one JSON document to standard output; what is no number is null, as JSON has it."""
    Told.documents += 1
    for line in json.dumps(without_nan(document), indent=1).splitlines():  # ASCII: for any pipe
        say(output, line)


def print_table(table: Table) -> None:
    """Print a table; a file or a pipe has no width, so there nothing is folded or cut."""
    if output.is_terminal:
        output.print(table)
    else:
        wide = Terminal(width=10_000)
        Terminal(width=wide.measure(table).maximum).print(table)


def fit_columns(
    columns: list[str], rows: list[dict[str, str]], spare: list[str], name: int = NAME
) -> list[str]:
    """Return the columns that a terminal has room for, without the first of `spare`.

    Names of backbones, of which the first `name` characters have room, are then cut to it.
    """
    shown = list(columns)
    room = output.width if output.is_terminal else 10_000
    wide = {c: max(len(c), *(len(r[c]) for r in rows)) + 3 for c in shown}
    full, wide["backbone"] = wide["backbone"], min(wide["backbone"], name + 3)
    for column in spare:
        if column in shown and sum(wide[c] for c in shown) + 1 > room and len(shown) > 3:
            shown.remove(column)
    left = room - 1 - sum(wide[c] for c in shown if c != "backbone")
    for row in rows:
        row["backbone"] = _shorten(row["backbone"], max(12, min(full, left) - 3))
    return shown


def say_hidden(columns: list[str], shown: list[str], option: str) -> None:
    """Say which columns there was no room for, and where they are."""
    if hidden := [name for name in columns if name not in shown]:
        said = f"No room for: {', '.join(hidden)}; a wider terminal or {option} shows them"
        say(messages, said, fold=True)


def _shorten(name: str, room: int) -> str:
    """Cut a name in its middle, where names of one family are alike.

    >>> _shorten("convnext_base.fb_in22k_ft_in1k", 16)
    'convnex…_ft_in1k'
    """
    if len(name) <= room:
        return name
    head = (room - 1) // 2
    return f"{name[:head]}…{name[len(name) - (room - 1 - head) :]}"


def fail(message: str) -> NoReturn:
    """Print an error and end with status 1."""
    print_error(message)
    raise typer.Exit(1)


def print_error(message: str) -> None:
    """Print an error as one line."""
    Told.error = hide(" ".join(message.split()))
    say(messages, "error:", style="bold red", end=" ")
    say(messages, Told.error)  # one line, whatever a plug-in or a library says


def show_warning(message: Any, category: Any, *args: Any, **kwargs: Any) -> None:
    """Print the warnings that are meant for people; what `warnings.showwarning` is set to."""
    if issubclass(category, UserWarning):
        say(messages, "warning:", style="yellow", end=" ")
        say(messages, message)


def hide(text: str) -> str:
    """Return a text of whomever without the password that the address of the hub may have."""
    return hide_secrets(text, os.environ.get("HF_ENDPOINT"))


class DiscreetFormatter(logging.Formatter):
    """What libraries log holds addresses."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record, without secrets."""
        return hide(super().format(record))


class PrintableFormatter(DiscreetFormatter):
    """What libraries log holds names, too."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record; nothing in it reaches the terminal as it is."""
        return "\n".join(map(printable, super().format(record).splitlines()))


def check_out(out: Path, option: str, *, replaces: bool = True) -> None:
    """Refuse before the work what could not be written after it.

    What `replaces` the file as a whole would put one in the place of a FIFO or a device.
    """
    if str(out) == "-":
        hint = "" if replaces else "; standard output is /dev/stdout"
        fail(f"{option} must be the name of a file but is '-'{hint}.")
    if not out.parent.is_dir():
        fail(f"{option}: there is no folder {str(out.parent)!r}; create it first.")
    if not os.access(out.parent, os.W_OK) or out.is_dir():
        fail(f"{option}: {str(out)!r} cannot be written.")
    if replaces and out.exists() and not out.is_file():
        fail(f"{option} must be a file but {str(out)!r} {say_kind(out)}.")
