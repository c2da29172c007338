r"""Text from elsewhere on its way out: names of files, classes and backbones, error messages.

What is shown goes through `printable`, whatever shows it; what is kept stays as it is. A name that
is no UTF-8 is kept with its bytes as surrogates, as `os.fsdecode` gives them: JSON writes these as
``\udc..`` (`json_text`), CSV as the bytes themselves, which ``errors="surrogateescape"`` reads
back (`csv_line`, `files.write_text`).
"""

from __future__ import annotations

import difflib
import json
import math
import numbers
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = [
    "DECIMAL", "LARGEST_SEED", "as_tuple", "capitalize", "csv_line", "describe_images",
    "did_you_mean", "format_count", "format_duration", "integer", "is_integer", "is_number",
    "json_text", "letters", "one_line", "parse_bytes", "positive", "printable", "read_csv_cell",
    "require", "some", "without_nan",
]  # fmt: skip

LARGEST_SEED = 2**32 - 1  # what NumPy's older streams take, so scikit-learn and Optuna
# What makes a spreadsheet run a cell, behind any number of apostrophes, and what does not.
_FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")  # the last four: full width
DECIMAL = r"(?:\d+\.?\d*|\.\d+)"  # a number without a sign
_NUMBER = re.compile(rf"[+-]?{DECIMAL}([eE][+-]?\d+)?")
_LONE = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # surrogates that stand for no byte


def printable(text: object) -> str:
    r"""Escape what would not be shown as it is: line breaks, escape sequences, undecodable bytes.

    Marks that turn the direction of the text, and those without width, are escaped, too.

    >>> printable("a\x1b[31mred\n\u202eb")
    'a\\x1b[31mred\\n\\u202eb'
    """
    text = str(text)
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(c: str) -> str:
    return c if c.isprintable() or unicodedata.category(c) == "Zs" else ascii(c)[1:-1]


def capitalize(sentence: str) -> str:
    """Begin a sentence as one.

    >>> capitalize("all of CIFAR-10.")
    'All of CIFAR-10.'
    """
    return sentence[:1].upper() + sentence[1:]


def one_line(text: object, limit: int = 300) -> str:
    """First line of `text`, printable and not too long."""
    line = (str(text).strip().splitlines() or [""])[0]
    return printable(line if len(line) <= limit else line[:limit] + " …")


def json_text(value: Any, **options: Any) -> str:
    r"""Return strict JSON for people, which UTF-8 can hold whatever the names are.

    >>> json_text("caf\udce9 é") == '"caf\\udce9 é"'
    True
    """
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False, **options)
    return text.encode("utf-8", "backslashreplace").decode()  # in JSON, too, \udce9 is that


def without_nan(value: Any) -> Any:
    """Return JSON values, with null for numbers that are none.

    >>> without_nan({"a": (1.0, float("nan"))})
    {'a': [1.0, None]}
    """
    if isinstance(value, Mapping):
        return {str(key): without_nan(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [without_nan(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def csv_line(cells: Iterable[Any]) -> str:
    r"""Return a line of a CSV file, of which no spreadsheet runs anything.

    Text that would be a formula gets an apostrophe in front, which `read_csv_cell` takes away;
    numbers stay as they are, also those written as text.

    >>> csv_line(["=1+1", "-2.5", -2.5, "a, b", None])
    '\'=1+1,-2.5,-2.5,"a, b",\n'
    """
    return ",".join(map(_csv_cell, cells)) + "\n"


def _csv_cell(value: Any) -> str:
    text = _LONE.sub(lambda c: ascii(c[0])[1:-1], "" if value is None else str(value))
    is_number = isinstance(value, numbers.Number) or _NUMBER.fullmatch(text)
    if _FORMULA.match(text) and not is_number:
        text = f"'{text}"
    # also where others separate: a semicolon would begin a new cell
    return '"' + text.replace('"', '""') + '"' if re.search('[",;\t\r\n]', text) else text


def read_csv_cell(text: str) -> str:
    """Return what `csv_line` was given.

    >>> read_csv_cell("'=1+1"), read_csv_cell("'tis")
    ('=1+1', "'tis")
    """
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def require(name: str, value: Any, rule: str, holds: Any) -> None:
    """Raise a ValueError that names argument, rule and value, unless the rule `holds`."""
    if not holds:
        raise ValueError(f"`{name}` must be {rule} but is {value!r}.")


def as_tuple(name: str, values: Any) -> tuple[Any, ...]:
    """Return the values of an argument that takes several; one text or path is one of them.

    >>> as_tuple("plugins", "models.py"), as_tuple("plugins", ["a", "b"])
    (('models.py',), ('a', 'b'))
    """
    if isinstance(values, (str, os.PathLike)):
        return (values,)
    require(name, values, "a list, or one of its values,", isinstance(values, Iterable))
    return tuple(values)


def did_you_mean(value: Any, known: Iterable[str]) -> str:
    """Return what is to be added to an error: the known name that is close, if one is.

    >>> did_you_mean("sfdaa", ["knn", "sfda"]), did_you_mean("x", ["knn", "sfda"])
    ("; did you mean 'sfda'?", '')
    """
    near = difflib.get_close_matches(str(value), [*known], 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def is_integer(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    """Tell whether a value is an integer in [least, most], of Python or NumPy, but no bool.

    >>> is_integer(3, 1), is_integer(True), is_integer(2.0), is_integer(0, 1)
    (True, False, False, False)
    """
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return whole and least <= int(value) <= most


def integer(name: str, value: Any, least: int, most: float = math.inf) -> int:
    """Return an integer in [least, most] as one of Python, which JSON can hold; else ValueError.

    >>> integer("k", 3, 1), integer("k", 3, 1, 5)
    (3, 3)
    """
    rule = f"an integer ≥ {least}" if most == math.inf else f"an integer in {least} … {most}"
    require(name, value, rule, is_integer(value, least, most))
    return int(value)


def is_number(value: Any) -> bool:
    """Tell whether a value is a real number, but no bool; NaN and infinity are.

    >>> is_number(2), is_number(math.nan), is_number(False), is_number("2")
    (True, True, False, False)
    """
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def positive(name: str, value: Any, most: float = math.inf) -> float:
    """Check an option that must be a finite number in (0, most]."""
    rule = "a number > 0" if most == math.inf else f"a number in (0, {most:g}]"
    require(name, value, rule, is_number(value) and 0 < value <= most and value < math.inf)
    return float(value)


def parse_bytes(name: str, text: str) -> int:
    """Return the bytes of a size that people write; of what has this `name`, for messages.

    >>> parse_bytes("size", "20GB"), parse_bytes("size", "1.5 MiB"), parse_bytes("size", "0")
    (20000000000, 1572864, 0)
    """
    found = re.fullmatch(rf"({DECIMAL})\s*(?:([kmgt]?)(i?)b?)", text.strip().lower())
    if found is None or (found[3] and not found[2]):
        raise ValueError(f"{name} must be a size such as 500MB or 20GB but is {text!r}.")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index(found[2] or " "))


def format_bytes(n: float) -> str:
    """Format bytes for people.

    >>> format_bytes(12_345_678), format_bytes(2e10)
    ('12.3 MB', '20.0 GB')
    """
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def format_count(n: float) -> str:
    """Format a count for people.

    >>> [format_count(n) for n in (950, 25_557_032, 1_840_000_000)]
    ['950', '25.6M', '1.84B']
    """
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.0f}"


def describe_images(search: Mapping[str, Any]) -> str:
    """Say which images trained, validated and tested, from what ``search.json`` holds."""
    n, sources = search["n_images"], search.get("sources", {})
    words = {
        "own part": " (the data set's own part)",
        "held out": " (held out of the training images)",
        "given": " (given for it)",
    }
    did = {"train": "trained on", "val": "validated on", "test": "tested on"}
    said = [f"{did[part]} {n[part]}{words.get(sources.get(part), '')}" for part in did]
    bad = len(search.get("unreadable", {}))
    return f"Images: {', '.join(said)}" + f"; left out as unreadable: {bad}" * bool(bad)


def letters(groups: Iterable[int]) -> str:
    """Write the numbers of neighbouring groups, from 1, as letters.

    As statisticians do: two backbones that share a letter are not told apart.

    >>> letters([1, 2]), letters([3, 4, 5, 6]), letters([26, 27])
    ('ab', 'c–f', 'z aa')
    """
    found = [_letters(k) for k in groups]
    if len(found) > 3:
        return f"{found[0]}–{found[-1]}"
    return ("" if all(len(one) == 1 for one in found) else " ").join(found)


def _letters(number: int) -> str:
    before, last = divmod(number - 1, 26)
    return (_letters(before) if before else "") + chr(ord("a") + last)


def some(values: Iterable[object], limit: int = 5, between: str = ", ") -> str:
    """Name the first few.

    >>> some(range(1, 13))
    '1, 2, 3, 4, 5 and 7 more'
    """
    values = list(values)
    more = f" and {len(values) - limit} more" if len(values) > limit else ""
    return between.join(map(str, values[:limit])) + more


def format_duration(seconds: float | None) -> str:
    """Format seconds for people.

    >>> [format_duration(s) for s in (0.42, 75, 7321, None)]
    ['0.42 s', '1 min 15 s', '2 h 2 min', '–']
    """
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
