"""Options that several commands have."""

from __future__ import annotations

import re
from typing import Annotated

import typer

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
