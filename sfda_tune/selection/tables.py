"""Tables of scores and truth: read from JSON and CSV, checked, matched by model name."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from sfda_tune.values.files import parse_csv, read_text, say_kind
from sfda_tune.values.ranking import FORMAT, Ranking
from sfda_tune.values.text import printable, read_csv_cell, some

__all__ = ["read_scores", "read_truth"]

_NAMES = ("backbone", "model", "name")
_MISSING = ("", "nan", "none", "null", "na", "n/a", "failed")


def read_scores(path: str | os.PathLike[str], *, column: str | None = None) -> Mapping[str, Any]:
    r"""Read scores, ``{name: number}`` or ``{data set: {name: number}}``, from JSON or CSV.

    JSON is one of these, or what `Ranking.to_json` wrote. CSV (comma, semicolon or tab) begins
    with column names: models in ``backbone``, ``model``, ``name``, else the first column of text,
    numbers in `column`, ``score``, ``accuracy``, ``value``, else the only column of numbers; a
    column ``dataset`` makes it several data sets. An empty cell, null or NaN is a backbone that
    failed. ValueError, with file and row or model, for any other content.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "scores.csv"
    >>> _ = path.write_text("model,score\nresnet50,0.71\nvit_small,\n")
    >>> read_scores(path)
    {'resnet50': 0.71, 'vit_small': nan}
    """
    return _read(path, column, ("score", "accuracy", "value"), finite=False)


def read_truth(path: str | os.PathLike[str], *, column: str | None = None) -> Mapping[str, Any]:
    """Read fine-tuned accuracies as `read_scores`; none is missing, ``accuracy`` goes first."""
    return _read(path, column, ("accuracy", "value", "score"), finite=True)


def _read(path: Any, column: str | None, preferred: Sequence[str], finite: bool) -> Any:
    where = os.fspath(path)
    try:
        text = read_text(path, errors="surrogateescape").strip("\r\n ")
    except ValueError as error:
        raise ValueError(f"{where}: must be text in UTF-8 ({error}).") from None
    except OSError as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        why = f"cannot be read ({error.strerror})" if os.path.isfile(where) else say_kind(where)
        raise kind(f"{where}: must be a file of scores but {why}.") from None
    if not text:
        raise ValueError(f"{where}: must hold scores or accuracies but is empty.")
    if text[0] not in "{[":
        tables = _from_csv(text, where, column, preferred)
    else:
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: must be valid JSON ({error}).") from None
        if isinstance(data, dict) and data.get("format") == FORMAT:
            return Ranking.from_json(text)
        nested = isinstance(data, dict) and any(isinstance(one, dict) for one in data.values())
        tables = data if nested else {"": data}
    if not all(isinstance(table, dict) and table for table in tables.values()):
        raise ValueError(
            f"{where}: must hold a ranking, {{name: number}} or {{data set: {{name: number}}}}."
        )
    tables = {d: numbers(f"{where} {d}".strip(), t, finite) for d, t in tables.items()}
    return tables.get("", tables)


def _from_csv(text: str, where: str, column: str | None, preferred: Sequence[str]) -> Any:
    try:
        table = parse_csv(text, foreign=True, strict=False)
    except ValueError as error:
        raise ValueError(f"{where}: must be CSV ({error}).") from None
    header, rows = table.columns, list(enumerate(table.rows, 2))
    if not rows or any(cell and _is_number(cell) for cell in header):
        raise ValueError(
            f"{where}: must hold column names, such as name,score, and rows below: {header}."
        )
    if uneven := sorted(table.short + table.long):
        raise ValueError(
            f"{where}, row {uneven[0] + 2}: must have {len(header)} fields like the header."
        )
    lower = {cell.lower(): cell for cell in header}
    dataset = lower.get("dataset")
    texts = [c for c in header if c != dataset and not all(_is_number(r[c]) for _, r in rows)]
    who = next((lower[name] for name in _NAMES if name in lower), texts[0] if texts else None)
    if who is None:
        raise ValueError(f"{where}: must have a column backbone, model or name but has {header}.")
    if column is not None and column not in header:
        raise ValueError(f"`column` must be one of {header} ({where}) but is {column!r}.")
    found = [column] if column else [lower[name] for name in preferred if name in lower][:1]
    # An unnamed column is the row counter of pandas.
    found = found or [c for c in header if c and c not in (who, dataset, *texts)]
    if len(found) != 1:
        # The first of several would be a guess: in timm's tables it is the image size.
        raise ValueError(
            f"{where}: must have one column of numbers, or one named {preferred[0]!r}, but has "
            f"{len(found)}: {listed(found)}; pass `column`."
        )
    tables: dict[str, dict[str, str]] = {}
    for i, row in rows:
        table, name = (
            tables.setdefault(row[dataset] if dataset else "", {}),
            read_csv_cell(row[who]).strip(),
        )
        if not name or name in table:
            raise ValueError(f"{where}, row {i}: must name each model once but has {name!r}.")
        table[name] = row[found[0]]
    return tables


def _number(value: Any) -> float:
    return math.nan if str(value).strip().lower() in _MISSING else float(value)


def _is_number(text: str) -> bool:
    with suppress(ValueError):
        _number(text)
        return True
    return False


# Checked and matched ---------------------------------------------------------------------------
class TooFewError(ValueError):
    """Not 2 models left to compare."""


def numbers(where: str, values: Any, finite: bool = False) -> dict[Any, float]:
    """Return {name: number}; a sequence is named by position."""
    if not hasattr(values, "items"):
        values = {str(i): value for i, value in enumerate(values)}
    table = {}
    for name, value in values.items():
        try:
            table[name] = _number(value)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{where} must hold numbers but {name!r} is {value!r}.") from None
        if finite and not math.isfinite(table[name]):
            raise ValueError(f"{where} must be finite but {name!r} is {value!r}; leave it out.")
    return table


def listed(names: Iterable[Any], limit: int = 4) -> str:
    """Return the first names as text."""
    return some(map(printable, names), limit) or "none"


def pair(scores: Any, truth: Any) -> tuple[list[Any], np.ndarray, np.ndarray, dict[Any, str]]:
    """Match models: their names, scores and truths; and those left out, with the reason."""
    named = hasattr(scores, "items")  # mappings, and pandas.Series
    if named != hasattr(truth, "items") or not (named or len(scores) == len(truth)):
        raise ValueError(
            "`scores` and `truth` must both be mappings {name: number}, or sequences of equal "
            f"length, but are {type(scores).__name__} and {type(truth).__name__}."
        )
    s, t = numbers("`scores`", scores), numbers("`truth`", truth, finite=True)
    failed = scores.failed if isinstance(scores, Ranking) else {}
    left_out = {name: "no truth" for name in s if name not in t}
    left_out |= {n: failed.get(n, f"its score is {x}") for n, x in s.items() if not np.isfinite(x)}
    left_out |= {name: "no score" for name in t if name not in s}
    names = [name for name in s if name not in left_out]
    if len(names) < 2:
        raise TooFewError(
            "`scores` and `truth` must share at least 2 models with a finite score but share "
            f"{len(names)}: `scores` has {listed(s)}, `truth` has {listed(t)}; check that both "
            "sides spell the names alike."
        )
    return names, np.array([s[n] for n in names]), np.array([t[n] for n in names]), left_out
