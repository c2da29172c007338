"""Files: read only if they are regular, bounded and of the expected form; written whole or not.

What is being written has a name of its own beside its target, unique among threads, processes and
machines, and moves into place when it is whole. What a killed process leaves behind is cleared by
the next one that writes into that folder, once it is a day old.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import re
import reprlib
import shutil
import stat
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sfda_tune.values.text import csv_line, json_text, printable

__all__ = [
    "AtLeast", "Table", "check", "check_folder", "clear_leftovers", "digest_file",
    "find_disk_fault", "open_regular", "parse_csv", "parse_json", "read_json", "read_rows",
    "read_text", "replacing", "say_kind", "unfinished", "write_bytes", "write_csv", "write_json",
    "write_text",
]  # fmt: skip

PREFIX, SUFFIX = ".sfda_tune-", ".tmp"  # of the names of what is not whole yet
AGE = 86400.0  # seconds after which that is of a process that was killed
LARGEST = 1 << 32  # bytes; nothing that is read as a whole has more
LARGEST_NUMBER = 1e150  # nothing that is measured is larger, and sums of squares are finite

_KINDS = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode), "a device"),
)
# A full disk, one that cannot be written to, one that fails; Windows has no EDQUOT.
_DISK = {getattr(errno, n, errno.ENOSPC) for n in ("ENOSPC", "EDQUOT", "EROFS", "EIO")}
_CLEARED: set[str] = set()  # folders that this process has looked through
_LOCK = threading.Lock()


# Read -------------------------------------------------------------------------------------------
def open_regular(path: str | os.PathLike[str], limit: int = LARGEST) -> IO[bytes]:
    """Open a file for reading; refuse what would block, or never end.

    Raises
    ------
    OSError
        As `open`; and if it is a FIFO, socket, device or folder, or has more than `limit` bytes.
    """
    _refuse(os.stat(path), path, limit)  # first, for opening a device may do something
    # between the two it may have become a FIFO, which would wait for a writer
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _BINARY)
    try:
        _refuse(os.fstat(descriptor), path, limit)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def say_kind(path: str | os.PathLike[str]) -> str:
    """Say what is in the place of a file: "is a FIFO", "does not exist", …."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "is a link to nothing" if os.path.islink(path) else "does not exist"
    except (OSError, ValueError) as error:  # a loop of links; a name that can be none
        return f"cannot be opened ({_line(getattr(error, 'strerror', None) or str(error))})"
    if stat.S_ISDIR(mode):
        return "is a folder"
    return f"is {next((text for test, text in _KINDS if test(mode)), 'a file')}"


def check_folder(argument: str, path: str | os.PathLike[str]) -> None:
    """Refuse what is there but no folder."""
    if os.path.lexists(path) and not os.path.isdir(path):
        where = printable(os.fspath(path))
        raise ValueError(f"`{argument}` must be a folder but {where!r} {say_kind(path)}.")


_BINARY = getattr(os, "O_BINARY", 0)


def _refuse(found: os.stat_result, path: Any, limit: int) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(found.st_mode):
        what = next((text for test, text in _KINDS if test(found.st_mode)), "something else")
        raise OSError(errno.EINVAL, f"is {what}, not a file", os.fspath(path))
    if found.st_size > limit:
        size = f"{found.st_size / 2**30:.3g} GiB, more than the {limit / 2**30:.3g} expected"
        raise OSError(errno.EFBIG, f"has {size}", os.fspath(path))


def read_text(path: str | os.PathLike[str], limit: int = LARGEST, errors: str = "strict") -> str:
    """Return a text in UTF-8, with or without a mark of it; a `ValueError` if it is none.

    With the `errors` "surrogateescape" the bytes of names in other encodings become surrogates.
    """
    with open_regular(path, limit) as file:
        return file.read().decode("utf-8-sig", errors)


def digest_file(path: str | os.PathLike[str]) -> str:
    """Return Blake2b, in hexadecimal, of what a file holds, however large it is."""
    result = hashlib.blake2b(digest_size=20)
    with open_regular(path, 1 << 60) as file:
        while block := file.read(1 << 20):
            result.update(block)
    return result.hexdigest()


def read_json(path: str | os.PathLike[str], kind: Any = object, advice: str = "restore it") -> Any:
    """Read JSON of a `kind` that `check` knows.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        One line with the file, and with what in it is wrong.
    """
    try:
        return parse_json(read_text(path, errors="surrogateescape"), kind)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{_line(os.fspath(path))}: {_line(why)}; {advice}.") from error


def parse_json(text: str, kind: Any = object) -> Any:
    """Return what strict JSON holds; a `ValueError` says what in it is wrong."""
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("must be valid JSON but is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"must be valid JSON ({error})") from None
    check(data, kind)
    return data


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON's")


@dataclass(frozen=True)
class Table:
    """What a CSV file holds: `rows` by the names of `columns`, and the line on which each ends.

    `short` and `long` are the rows (0 is the first below the header) with less or more fields
    than the header; what is missing reads as "", what is too much is left out.
    """

    columns: list[str]
    rows: list[dict[str, str]]
    lines: list[int]
    delimiter: str
    short: list[int]
    long: list[int]


def parse_csv(text: str, *, foreign: bool = False, strict: bool = True) -> Table:
    r"""Read CSV that begins with the names of its columns; a `ValueError` if it is none.

    In `foreign` files a semicolon or tab may separate as well, whichever is in the first line most
    often; blanks about the names, and behind delimiters if the header has some there, belong to
    the layout. Without `strict`, stray quotes are text, and blanks behind delimiters never count.

    >>> parse_csv("path; label\na.jpg; cat\n", foreign=True).rows
    [{'path': 'a.jpg', 'label': 'cat'}]
    """
    head = io.StringIO(text, newline="").readline()
    delimiter = max(",;\t", key=head.count) if foreign else ","
    blanks = not strict or (foreign and f"{delimiter} " in head)
    options = {"delimiter": delimiter, "skipinitialspace": blanks, "strict": strict}
    lines = io.StringIO(text, newline="")  # a cell may hold a line break
    reader: Any = csv.DictReader(lines, **options)
    table = Table([], [], [], delimiter, [], [])
    try:
        names = [name.strip() if foreign else name for name in reader.fieldnames or ()]
        reader.fieldnames = names
        table.columns.extend(names)
        for number, row in enumerate(reader):
            if any(row.pop(None, ())):
                table.long.append(number)
            if None in row.values():
                table.short.append(number)
                row = {name: "" if cell is None else cell for name, cell in row.items()}
            table.rows.append(row)
            table.lines.append(reader.line_num)
    except csv.Error as error:
        raise ValueError(str(error)) from None
    return table


def read_rows(path: str | os.PathLike[str], columns: Iterable[str]) -> list[dict[str, str]]:
    """Read a CSV file in UTF-8 that has `columns`, perhaps among others; else a `ValueError`."""
    columns = list(columns)
    try:
        table = parse_csv(read_text(path, errors="surrogateescape"))
        if missing := [name for name in columns if name not in table.columns]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        if table.long:
            raise ValueError(f"row {table.long[0] + 2} has more fields than its header")
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ValueError(
            f"{_line(os.fspath(path))}: must be CSV with {', '.join(columns)}, but {_line(why)}."
        ) from error
    return table.rows


@dataclass(frozen=True)
class AtLeast:
    """A kind for `check`: a number, or an integer, that is not less."""

    least: int
    type: Any = float


def check(value: Any, kind: Any, where: str = "") -> None:
    """See that a value from a file is of the expected kind.

    A kind is ``str``, ``int``, ``float`` (or an integer), ``bool``, ``None``, ``object`` (any
    value), `AtLeast`; ``[kind]``, ``{str: kind}``, ``{"field": kind, "optional?": kind}``, where
    further fields may be anything; or a tuple of kinds, one of which it must be.

    Raises
    ------
    ValueError
        With the place of the first value that is of another kind.

    Examples
    --------
    >>> kind = {"trials": [{"value": (float, None), "error?": str}]}
    >>> check({"trials": [{"value": None}]}, kind)
    >>> check({"trials": [{"value": "x"}]}, kind)
    Traceback (most recent call last):
    ...
    ValueError: `trials[0].value` must be a number or null but is 'x'
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    fitting = [one for one in kinds if _fits(value, one)]
    name = f"`{_line(where)}`" if where else "it"
    if not fitting:
        said = " or ".join(map(_say, kinds))
        raise ValueError(f"{name} must be {said} but is {_line(reprlib.repr(value))}")
    inner = fitting[0]
    if isinstance(inner, list):
        for i, one in enumerate(value):
            check(one, inner[0], f"{where}[{i}]")
    elif isinstance(inner, dict):
        dot = f"{where}." if where else ""
        for field, one in inner.items():
            if field is str:
                for key, item in value.items():
                    check(item, one, f"{dot}{key}")
            elif (key := field.removesuffix("?")) in value:
                check(value[key], one, f"{dot}{key}")
            elif key == field:
                raise ValueError(f"{name} must have {key!r} but has {_line(reprlib.repr(value))}")


def _fits(value: Any, kind: Any) -> bool:
    if kind is object or kind is None:
        return kind is object or value is None
    if isinstance(kind, (list, dict)):
        return isinstance(value, type(kind))
    if isinstance(kind, AtLeast):
        return _fits(value, kind.type) and value >= kind.least
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, int) and kind in (int, float):
        return abs(value) < (2**63 if kind is int else LARGEST_NUMBER)
    if isinstance(value, float) and kind is float:
        return abs(value) < LARGEST_NUMBER  # false for NaN, too
    return isinstance(value, kind)


def _say(kind: Any) -> str:
    if isinstance(kind, AtLeast):
        return f"{_say(kind.type)} ≥ {kind.least}"
    if isinstance(kind, (list, dict)):
        return "a list" if isinstance(kind, list) else "an object"
    names = {str: "a text", int: "an integer", float: "a number", bool: "true or false"}
    return names.get(kind, "null")


def _line(text: str) -> str:
    from sfda_tune.values.text import one_line

    return one_line(" ".join(text.split()))


# Write ------------------------------------------------------------------------------------------
@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Hand out the path of an empty file; what it holds at the end takes the place of `path`.

    A reader sees the old file or the whole new one; after an error the old one stays. The
    permissions are those that the umask allows, whatever wrote the file.
    """
    path = Path(path)
    with unfinished(path.parent) as temporary:
        # The system applies the umask; to ask for it one would have to set it, for all threads.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = temporary.stat().st_mode
        yield temporary
        if temporary.stat().st_mode != mode:  # safetensors writes for its owner only
            temporary.chmod(stat.S_IMODE(mode))
        os.replace(temporary, path)


@contextlib.contextmanager
def unfinished(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Hand out a path in `folder` that nobody else uses; what is there at the end is deleted."""
    folder = Path(folder)
    with _LOCK:
        first = (key := os.path.abspath(folder)) not in _CLEARED
        _CLEARED.add(key)
    if first:
        clear_leftovers(folder)
    # Not with the target's name in it: that may be as long as names can be.
    temporary = folder / f"{PREFIX}{uuid.uuid4().hex}{SUFFIX}"
    try:
        yield temporary
    finally:
        _delete(temporary)


def clear_leftovers(folder: str | os.PathLike[str], age: float = AGE) -> None:
    """Delete what killed processes left unfinished in a folder more than `age` seconds ago."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if entry.name.startswith(PREFIX) and entry.name.endswith(SUFFIX):
                with contextlib.suppress(OSError):
                    if time.time() - entry.stat(follow_symlinks=False).st_mtime >= age:
                        _delete(Path(entry.path))


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` so that a reader sees the old file or the whole new one.

    UTF-8; surrogates, which stand for the bytes of a name that is no UTF-8, become these bytes,
    and those that stand for nothing become escapes.
    """
    try:
        content = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        content = text.encode("utf-8", "backslashreplace")
    write_bytes(path, content)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write `content` to `path` so that a reader sees the old file or the whole new one."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON, atomically."""
    write_text(path, json_text(value) + "\n")


def write_csv(path: Path, rows: Iterable[Iterable[Any]]) -> None:
    """Write a table, atomically."""
    write_text(path, "".join(map(csv_line, rows)))


def find_disk_fault(error: BaseException | None) -> int | None:
    """Return the number of the error if it, or one behind it, is one of the disk.

    Those of safetensors, of SQLite, and of other processes on Ray have it in their text only.

    >>> find_disk_fault(RuntimeError("I/O error (os error 28)")), find_disk_fault(KeyError())
    (28, None)
    """
    while error is not None:
        text = str(error)
        codes = [int(n) for n in re.findall(r"(?:\(os error |\[Errno )(\d+)", text)]
        codes += [errno.ENOSPC] * ("database or disk is full" in text)
        for code in [getattr(error, "errno", None), *codes]:
            if code in _DISK:
                return code
        error = error.__cause__ or error.__context__
    return None
