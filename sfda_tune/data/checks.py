"""Errors that name the argument, and the values that were meant."""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from sfda_tune.values.text import one_line


class DatasetError(ValueError):
    """The images or labels cannot be used as they are; the message says what to do."""


class NoPartError(DatasetError):
    """The data set has no such part, or comes in none."""


def absolute(path: Any) -> str:
    """Return the absolute path; ``~`` is the home folder."""
    return os.path.abspath(os.path.expanduser(os.fspath(path)))


def close_matches(path: str) -> str:
    """Suggest what may be meant, at the first part of the path that is wrong."""
    while not os.path.isdir(parent := os.path.dirname(path)) and parent != path:
        path = parent
    near = []
    with suppress(OSError):
        near = difflib.get_close_matches(os.path.basename(path), os.listdir(parent))
    found = " or ".join(repr(os.path.join(parent, name)) for name in near)
    return found and f"; perhaps {found}"


def refuse(form: str, **options: Any) -> None:
    """Raise if an option is given that means nothing for this form."""
    given = [f"`{name}`" for name, value in options.items() if value is not None]
    if given:
        kind = NoPartError if given == ["`split`"] else DatasetError
        raise kind(f"{' and '.join(given)} cannot be used with {form}; leave it out.")


def pick(pick: Callable[..., Any], *args: Any) -> Any:
    """Pick a part, with errors of data sets."""
    try:
        return pick(*args)
    except LookupError as error:
        raise NoPartError(error.args[0]) from None
    except ValueError as error:
        raise DatasetError(str(error)) from None


def need(module: str, purpose: str) -> Any:
    """Import an optional library, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DatasetError(
            f"{purpose} needs the package {module.partition('.')[0]!r}: "
            f"pip install 'sfda-tune[data]' ({one_line(error)})"
        ) from error


def check_some_exist(items: Sequence[Any], base: str, what: str) -> None:
    """Turn a wrong base folder into one error, instead of a thousand unreadable images."""
    exists = (os.path.lexists(i) if isinstance(i, str) else i is not None for i in items)
    if items and not any(exists):
        raise DatasetError(
            f"{what} must hold encoded images or names of files, but none of the {len(items)} "
            f"exists, for instance {items[0]!r}; relative paths start at {base!r}."
        )
