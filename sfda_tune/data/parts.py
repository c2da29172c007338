"""The parts of a data set (training, validation, test) by the names that people give them.

Folders and splits of the Hugging Face hub have a name each; of a table a column may say it row by
row: ``split``, ``fold``, ``set``, ``subset``, ``partition``, … with names of parts, or
``is_valid``, ``is_test``, … with truth values.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sfda_tune.values.text import printable, some

__all__ = [
    "FALSE", "TRUE", "choose", "choose_rows", "hint_at", "is_about_parts", "part_of",
    "read_column", "read_parts",
]  # fmt: skip

_WORDS = {
    "train": "train|training|trn",
    "val": "val|valid|validation|validate|dev",
    "test": "test|testing|tst|eval|evaluation|holdout",
}
_NAMES = {
    part: re.compile(f"({words})(set|split|part|data|images?|imgs?)*")
    for part, words in _WORDS.items()
}
_BOTH = re.compile(f"({_WORDS['train']})(and)?({_WORDS['val']})(set|data|images?)*")  # "trainval"
_SHORT = {"tr": "train", "va": "val", "te": "test"}  # in a column, where it is clear what is meant
_COLUMNS = ("split", "fold", "set", "subset", "partition")
_MORE_COLUMNS = ("splits", "datasplit", "dataset", "phase", "usage", "part", "traintest")
_VAGUE = ("group", "groups", "mode", "role", "stage", "purpose", "type", "kind")  # names only
_DOUBTFUL = ("valid", "validity")  # of the validation, or good
TRUE, FALSE = {"true", "1", "1.0", "yes", "y", "t"}, {"false", "0", "0.0", "no", "n", "f"}
_NAMELESS = "name no training, validation or test part"
_EMPTY = {"", "nan", "none"}
_CODES = {*TRUE, *FALSE, *_SHORT, "2", "2.0", "3", "3.0"}  # what three parts may be numbered


def part_of(name: str) -> str | None:
    """Return the part that a name means: "train", "val", "test", or None.

    >>> [part_of(n) for n in ("Training", "valid", "test_images", "train2017", "bus", "trains")]
    ['train', 'val', 'test', 'train', None, None]
    """
    letters = _letters(name)
    if _BOTH.fullmatch(letters):
        return "train"
    return next((part for part, known in _NAMES.items() if known.fullmatch(letters)), None)


def hint_at(name: str) -> str | None:
    """Return the part that a word of a name means, if that of only one.

    >>> [hint_at(n) for n in ("seg_train", "PublicTest", "train_or_test", "contest")]
    ['train', 'test', None, None]
    """
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+|[^\W\d_]+", name)
    found = {part for word in words if (part := part_of(word))}
    return part_of(name) or (found.pop() if len(found) == 1 else None)


def _letters(name: str) -> str:
    return re.sub(r"[\s\d_.-]", "", name.casefold())


def choose(parts: Mapping[str, str | None], split: str | None, where: str) -> list[str]:
    """Return the names meant by `split`; default the training part, or the only one there is.

    `parts` has the part behind each name. LookupError if there is none, ValueError if several.
    """
    names = list(parts)
    if split == "all" or (split is None and len(names) == 1):
        return names
    wanted = "train" if split is None else split
    same = [name for name, part in parts.items() if part and part == part_of(wanted)]
    found = [name for name in names if name.casefold() == wanted.casefold()] or same
    if not found:
        raise LookupError(
            f"`split` must be one of {_quoted(names)} or 'all' for {where} but is {split!r}"
            + ("." if split else ", and there is no training part.")
        )
    if len(found) > 1:
        raise ValueError(f"`split` must be one of {_quoted(found)} for {where} but is {split!r}.")
    others = [name for name in same if name not in found]
    if others and wanted in _WORDS:  # else it is exactly what was asked for
        text = f"{where}: its part {found[0]!r} is used, {_quoted(others)} is left out."
        warnings.warn(text, UserWarning, stacklevel=2)
    return found


# Columns -----------------------------------------------------------------------------------------
def read_parts(
    columns: Iterable[str], cells: Callable[[str], Sequence[Any]], where: str
) -> tuple[str, list[str], list[str]] | None:
    """Return the column of a table that names parts, what it says of each row, and the part.

    None if there is none; a column that is called like one but names no part is a warning.
    ValueError if it leaves rows out, or two columns contradict each other.
    """
    found: dict[str, tuple[list[str], list[str]]] = {}
    flags: dict[str, tuple[str, list[bool]]] = {}
    for column in columns:
        word, flag = _letters(column), _flag_of(column)
        if flag is None and word not in (*_COLUMNS, *_MORE_COLUMNS, *_VAGUE):
            continue
        said = ["" if value is None else str(value).strip() for value in cells(column)]
        distinct = Counter(said)
        may_be_codes = len(distinct) > 1 and {v.casefold() for v in distinct} <= _CODES | _EMPTY
        truths = {v.casefold() for v in distinct} & (TRUE | FALSE)
        if flag and truths and word not in _DOUBTFUL:
            _check_full(distinct, column, where)
        if flag and {v.casefold() for v in distinct} <= TRUE | FALSE:
            flags[column] = flag, [v.casefold() in TRUE for v in said]
        elif word in _VAGUE:
            known = {v: _SHORT.get(v.casefold()) or part_of(v) for v in distinct}
            if all(known.values()) and "train" in known.values():
                found[column] = said, [str(known[v]) for v in said]
            elif any(map(part_of, distinct)) or all(map(hint_at, distinct)):
                _leave(column, distinct, "not all name a training, validation or test part", where)
            elif may_be_codes:
                _leave(column, distinct, _NAMELESS, where)
        elif flag and (truths or any(map(part_of, distinct))):
            _leave(column, distinct, "are not all true or false", where)
        elif not flag:
            known = {v: _SHORT.get(v.casefold()) or hint_at(v) for v in distinct}
            if any(known.values()):
                _check_full(distinct, column, where)
                found[column] = said, [known[v] or v for v in said]
            elif may_be_codes or (word in _COLUMNS and len(distinct) > 1):
                _leave(column, distinct, _NAMELESS, where)
    doubtful = [column for column in flags if _letters(column) in _DOUBTFUL]
    if doubtful and len({part for part, _ in flags.values()}) == 1:
        for column in doubtful:
            values = list(dict.fromkeys(map(str, flags.pop(column)[1])))
            if len(values) > 1:  # else it leaves nothing out, whatever it means
                why = "may say which rows are good; call it is_valid if it is the validation part"
                _leave(column, values, why, where)
    if flags:
        parts = _from_flags(flags)
        found[" and ".join(flags)] = parts, parts
    if not found:
        return None
    column, (said, parts) = next(iter(found.items()))
    for other, (_, others) in found.items():
        if others != parts:
            raise ValueError(
                f"{where} must name one part per row, but its columns {column!r} and {other!r} "
                "contradict each other; remove one, or pass split='all' to use all rows."
            )
    return column, said, parts


def _flag_of(column: str) -> str | None:
    """Return the part of which a column of truth values says whether a row is in it."""
    word = _letters(column)
    flag = part_of(word.removeprefix("is")) if word.startswith("is") else None
    bare = re.fullmatch("(?!invalid)(in)?([a-z]+?)(set|split)?", word)
    return flag or (part_of(bare[2]) if bare else None)


def is_about_parts(column: str) -> bool:
    """Whether a column is called like one that says which part a row is of.

    >>> [c for c in ("is_valid", "fold", "cat", "test") if is_about_parts(c)]
    ['is_valid', 'fold', 'test']
    """
    return _flag_of(column) is not None or _letters(column) in (*_COLUMNS, *_MORE_COLUMNS)


def read_column(
    column: str, values: Sequence[Any], where: str
) -> tuple[str, list[str], list[str]]:
    """Return the same for the column that the user names: it must name parts."""
    said = ["" if value is None else str(value) for value in values]
    distinct = Counter(said)
    _check_full(distinct, column, where)
    known = {v: _SHORT.get(v.casefold()) or hint_at(v) for v in distinct}
    if not any(known.values()):
        raise ValueError(
            f"`split_column` (--split-column) must name a column with the parts train, val or "
            f"test, but {column!r} of {where} has {_quoted(distinct)}; rename its values."
        )
    return column, said, [known[v] or v for v in said]


def _leave(column: str, values: Iterable[str], why: str, where: str) -> None:
    warnings.warn(
        f"{where}: the column {column!r} is not used, for its values ({_quoted(values)}) {why}.",
        UserWarning,
        stacklevel=3,
    )


def _check_full(distinct: Mapping[str, int], column: str, where: str) -> None:
    empty = sum(n for value, n in distinct.items() if value.casefold() in _EMPTY)
    if empty:
        raise ValueError(
            f"{where}, column {column!r}, must name the part of every row, but {empty} of "
            f"{sum(distinct.values())} are empty; fill them in, or pass split='all'."
        )


def _from_flags(flags: Mapping[str, tuple[str, list[bool]]]) -> list[str]:
    """Return the part of each row; what no flag claims is for training, or else for the test."""
    by_part = dict(flags.values())
    rest = "test" if "train" in by_part and "test" not in by_part else "train"
    order = [part for part in ("test", "val", "train") if part in by_part]
    return [
        next((part for part, on in zip(order, row, strict=True) if on), rest)
        for row in zip(*(by_part[part] for part in order), strict=True)
    ]


def choose_rows(
    named: tuple[str, list[str], list[str]], split: str | None, where: str
) -> tuple[list[int], str]:
    """Return the rows meant by `split`, and the part; as `choose`, but of all names of a part."""
    column, said, parts = named
    count = Counter(parts)
    if split is None and len(count) == 1:
        return list(range(len(parts))), next(iter(count))
    wanted = "train" if split is None else split
    part = part_of(wanted)
    rows = [r for r, value in enumerate(said) if value.casefold() == wanted.casefold()]
    if not rows or wanted in _WORDS:
        rows = [r for r, p in enumerate(parts) if p == (part or wanted)]
    if not rows:
        raise LookupError(
            f"`split` must be one of {_quoted(dict.fromkeys(said))} or 'all' for {where}, as its "
            f"column {column!r} says, but is {split!r}"
            + ("." if split else ", and there is no training part.")
        )
    if others := [p for p in count if p not in _WORDS and split is None]:
        warnings.warn(
            f"{where}: {sum(count[p] for p in others)} rows are left out, of which the column "
            f"{column!r} says {_quoted(others)}.",
            UserWarning,
            stacklevel=2,
        )
    return rows, part or wanted


def _quoted(names: Iterable[str]) -> str:
    return some(repr(printable(name)) for name in names)
