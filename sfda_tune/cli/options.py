"""Options that several commands have."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup
from typer.models import OptionInfo

from sfda_tune.cli.terminal import DiscreetFormatter, PrintableFormatter
from sfda_tune.data.groups import FOLDERS

Imports = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="FILE_OR_MODULE",
        help="Run this Python file (or import this module): it registers further architectures "
        "with timm. Worker processes run it too. May be repeated.",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug messages.")]
AsJson = Annotated[
    bool,
    typer.Option("--json", help="Write one JSON document to standard output instead of tables."),
]
Config = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="Options from a YAML file, by their names; those on the command line count more. "
        "Such a file is written beside each result.",
    ),
]
CacheDir = Annotated[
    str | None,
    typer.Option(
        "--cache",
        metavar="DIR",
        help="Folder of the kept features, or a bucket (s3://…). Default: ~/.cache/sfda_tune, or "
        "$SFDA_TUNE_CACHE.",
    ),
]
Groups = Annotated[
    str | None,
    typer.Option(
        "--groups",
        metavar="folders",
        help="Images that belong together are those of one sub-folder inside the class folders. "
        "Scores leave out whole groups, splits keep them together.",
    ),
]
GroupColumn = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Column of what images belong to: video, patient, animal, camera, ….",
    ),
]
GroupRegex = Annotated[
    str | None,
    typer.Option(
        metavar="PATTERN",
        help="What file names have in common that belong together, in parentheses: "
        r"'(.+)_\d+\.jpg'. A pattern with a / is searched in the path.",
    ),
]
SplitColumn = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Column of the part of each row (train, val, test). Default: split, fold, ….",
    ),
]

Threads = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="At most so many threads of the CPU compute; small networks always take one. "
        "Default: one per core.",
    ),
]
Task = Annotated[
    str,
    typer.Option(
        help="What labels are: classification; regression, numbers to predict; ordinal, levels in "
        "an order, such as grades; or multilabel, several per image. With auto numbers are "
        "classes, unless they look like a quantity, or texts like lists: then you are asked."
    ),
]
LabelColumns = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help="Columns of 0 and 1, one for each of several labels: 'cat,dog' or 'has_*'. Default, "
        "with --task multilabel: all that hold nothing else.",
    ),
]
LabelDelimiter = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="What separates several labels in the one column that holds all, such as ';'.",
    ),
]
Levels = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help="All levels from the lowest to the highest: small,medium,large. Default, with --task "
        "ordinal: by the number in each name.",
    ),
]
BitDepth = Annotated[
    str | None,
    typer.Option(
        metavar="auto|9…16",
        help="Bits of grey images with more than 8: 12 for most cameras and X-rays kept in 16. "
        "Default: auto, 16, or what the file says (DICOM).",
    ),
]
Bands = Annotated[
    str | None,
    typer.Option(
        metavar="R,G,B",
        help="Bands, counted from 1, to be shown as red, green and blue (or one, as grey): 4,3,2. "
        "Other numbers of them, or 'all': networks are adapted to so many channels. Of a TIFF "
        "samples, channels or frames.",
    ),
]


def read_groups(groups: str | None, column: str | None, regex: str | None) -> Any:
    """Return what `groups` of `rank` and `search` is for these options."""
    given = {"--groups": groups, "--group-column": column, "--group-regex": regex}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} exclude each other; leave one out.")
    if groups is not None and groups != FOLDERS:
        raise ValueError(
            f"--groups must be {FOLDERS!r} but is {groups!r}; a column is --group-column {groups}."
        )
    if regex is None:
        return groups or column
    try:
        return re.compile(regex)
    except re.error as error:
        raise ValueError(
            f"--group-regex must be a regular expression but {regex!r} is none ({error})."
        ) from None


LOGGERS = ("sfda_tune", "sfda_tune_optuna", "sfda_tune_ray")


def _log_to(handler: logging.Handler, level: int, ctx: typer.Context) -> None:
    """Let our loggers write to a handler until the command ends."""
    handler.setLevel(level)
    loggers = [(logger := logging.getLogger(name), logger.level) for name in LOGGERS]
    for logger, before in loggers:
        logger.addHandler(handler)
        logger.setLevel(min(level, before or level))

    def end() -> None:
        for logger, before in loggers:
            logger.removeHandler(handler)
            logger.setLevel(before)
        handler.close()

    ctx.call_on_close(end)


def _log_to_file(ctx: typer.Context, path: Path | None) -> Path | None:
    if path is not None:
        if str(path) == "-":
            raise typer.BadParameter("'-' is no name of a file; --verbose tells the terminal.")
        try:
            handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise typer.BadParameter(f"{path}: {error.strerror}") from None
        handler.setFormatter(DiscreetFormatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
        _log_to(handler, logging.DEBUG, ctx)
    return path


def _log_to_terminal(ctx: typer.Context, verbose: bool) -> bool:
    if verbose:
        handler = logging.StreamHandler()
        handler.setFormatter(PrintableFormatter("%(message)s"))
        _log_to(handler, logging.INFO, ctx)
    return verbose


Log = Annotated[
    Path | None,
    typer.Option(
        "--log",
        metavar="FILE",
        callback=_log_to_file,
        help="Append to this file what happens, in detail.",
    ),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", callback=_log_to_terminal, help="Say more.")
]

# What stands under which heading of the help
PANELS = {
    "Images": (
        "samples", "split", "image_column", "label_column", "groups", "group_column",
        "group_regex", "split_column", "time_column", "test", "max_unreadable", "task",
        "label_columns", "label_delimiter", "levels",
        "bit_depth", "bands",
    ),
    "Candidates": ("backbones", "imports", "weights_disk", "max_params", "max_latency"),
    "What counts": ("metric", "loss", "train", "variant", "objective", "ensemble", "seed"),
    "How much": (
        "budget", "trials", "race", "top", "dry_run", "keep", "space", "epochs", "previous",
    ),
    "Where it runs": (
        "device", "precision", "batch_size", "workers", "threads", "decoders", "engine", "storage",
        "ray", "cache", "no_cache",
    ),
    "What comes out": (
        "out", "config", "csv", "jsonl", "images", "plots", "onnx", "as_json", "quiet", "verbose",
        "log", "debug",
    ),
}  # fmt: skip


class _Plain:
    """Help that says of a flag no type: it takes no value."""

    def get_params(self, ctx: Any) -> list[Any]:
        params = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params


class Command(_Plain, TyperCommand):
    """A command of ours."""


class Group(_Plain, TyperGroup):
    """Several of them."""


def arrange(command: Callable[..., Any]) -> Callable[..., Any]:
    """Put the options of a command under headings."""
    panel = {name: title for title, names in PANELS.items() for name in names}
    hints = get_type_hints(command, include_extras=True)
    for name, hint in hints.items():
        for info in getattr(hint, "__metadata__", ()):
            if isinstance(info, OptionInfo):
                info.rich_help_panel = panel.get(name)
    command.__annotations__ = hints  # else typer reads the texts again
    return command


_ADDRESS = re.compile(r"auto|local|(ray://)?[^\s/]+:\d+")


def spread_lists(arguments: list[str]) -> list[str]:
    """Let ``--backbones a b c`` mean ``--backbones a --backbones b --backbones c``.

    And let ``--ray`` do without its address.
    """
    result: list[str] = []
    option, fresh = None, False
    for k, argument in enumerate(arguments):
        if argument == "--":
            return [*result, *arguments[k:]]
        if argument == "--ray" and not _ADDRESS.fullmatch("".join(arguments[k + 1 : k + 2])):
            option = None
            result.append("--ray=")
            continue
        if argument.startswith("-") and argument != "-":
            option = argument if argument in ("--backbones", "-b", "--import") else None
            fresh = True
            result.append(argument)
        elif option in ("--backbones", "-b") and not fresh:
            result += [option, argument]
        else:
            fresh = False
            result.append(argument)
    return result
