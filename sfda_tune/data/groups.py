"""Which images belong together, and when they were made.

Frames of one video, slides of one patient, photos of one camera: what was learnt from some of a
group says too much about the others. Whoever leaves images out, or splits them, takes whole
groups.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date, datetime
from typing import Any

import numpy as np

from sfda_tune.data.checks import DatasetError
from sfda_tune.data.decoding import Member
from sfda_tune.data.labels import class_name, is_missing
from sfda_tune.values.text import is_number, one_line, printable, some

__all__ = [
    "FOLDERS",
    "check_classes",
    "check_groups",
    "describe_groups",
    "describe_options",
    "find_groups",
    "merge_codes",
    "name_groups",
    "read_options",
    "read_times",
]

FOLDERS = "folders"  # the groups are the sub-folders of the classes


def find_groups(items: Sequence[Any] | np.ndarray, groups: Any) -> np.ndarray:
    r"""Return the group of each image, as text.

    Parameters
    ----------
    items : sequence
        Of an `ImageDataset`.
    groups : sequence, re.Pattern, or callable
        One group per image; or a pattern that is searched in the name of each file (in the whole
        path, with ``/``, if the pattern has a ``/``), whose groups, or else all that it matched,
        name the group; or a function of the path.

    Examples
    --------
    >>> find_groups(["/a/cat_1.jpg", "/a/cat_2.jpg"], re.compile(r"(.+)_\d+\.jpg")).tolist()
    ['cat', 'cat']
    """
    if isinstance(groups, re.Pattern):
        return _match(_paths(items, "a pattern"), groups)
    if callable(groups):
        found = [groups(path) for path in _paths(items, "a function")]
        return name_groups(found, "The values of `groups`")
    tolist = getattr(groups, "tolist", None)  # arrays, tensors, pandas
    if not tolist and (isinstance(groups, str | bytes) or not isinstance(groups, Iterable)):
        raise DatasetError(
            "`groups` must be one group per image, the name of a column of a table, "
            f"{FOLDERS!r} for the sub-folders of the classes, a compiled pattern or a function of "
            f"the path, but is {one_line(repr(groups), 80)}."
        )
    values: Any = tolist() if tolist else list(groups)
    if len(values) != len(items):
        raise DatasetError(
            f"`groups` must have one group per image, but there are {len(items)} images and "
            f"{len(values)} groups; give them in the order of the images, before `samples` are "
            "drawn, and only for the part that is opened."
        )
    return name_groups(values, "`groups`")


def _paths(items: Sequence[Any] | np.ndarray, what: str) -> list[str]:
    paths = [items[row] for row in range(len(items))]
    files = str | os.PathLike | Member
    if bad := [row for row, path in enumerate(paths) if not isinstance(path, files)]:
        raise DatasetError(
            f"`groups` as {what} needs images that are files, but {len(bad)} of {len(paths)} are "
            f"none, the first in row {bad[0]}; name a column, or pass one group per image."
        )
    return [str(path) for path in paths]


def _match(paths: Sequence[str], pattern: re.Pattern[str]) -> np.ndarray:
    whole = "/" in pattern.pattern
    names = [p.replace(os.sep, "/") if whole else os.path.basename(p) for p in paths]
    found = [pattern.search(name) for name in names]
    if missed := [name for name, match in zip(names, found, strict=True) if match is None]:
        what = "no file" if len(missed) == len(names) else f"not {len(missed)} of {len(names)}"
        hint = "" if whole else "; it is searched in file names, in paths if it has a '/'"
        raise DatasetError(
            f"`groups` (--group-regex) must match every file, but {pattern.pattern!r} matches "
            f"{what}, for instance {printable(missed[0])!r}{hint}. Add what the others look like: "
            "'this|that'."
        )
    groups = [m.groups(default="") or (m.group(),) for m in found if m is not None]
    return name_groups([" ".join(parts) for parts in groups], "What `groups` matches")


def name_groups(
    values: Sequence[Any], where: str, rows: Sequence[int] | None = None
) -> np.ndarray:
    """Return values of any kind as texts; `DatasetError` if one is missing."""
    values = [v.item() if getattr(v, "ndim", None) == 0 else v for v in values]
    if bad := [n for n, value in enumerate(values) if is_missing(value)]:
        told = some(str(n if rows is None else rows[n]) for n in bad)
        raise DatasetError(
            f"{where} must name the group of every image, but {len(bad)} of {len(values)} are "
            f"missing (row {told}); fill them in: an image that belongs to no other gets a name "
            "of its own."
        )
    known: dict[str, str] = {}  # each text once
    names = (known.setdefault(name, name) for name in map(class_name, values))
    out = np.empty(len(values), dtype=object)
    out[:] = list(names)
    return out


def check_groups(groups: np.ndarray) -> None:
    """Refuse a single group; say so where every image is its own."""
    n, of = len(groups), len(set(groups.tolist()))
    if of == 1:
        raise DatasetError(
            f"`groups` must be at least two, but all {n} images are of the group "
            f"{printable(groups[0])!r}: nothing would be left to learn from. Name smaller groups, "
            "or leave groups out."
        )
    if of == n:
        warnings.warn(
            f"every one of the {n} images is a group of its own ({some(groups[:3])}): groups "
            "change nothing; name what several images share.",
            stacklevel=3,
        )


def check_classes(dataset: Any) -> None:
    """Refuse groups that leave no image to judge another of its class by."""
    codes = dataset.group_codes
    if codes is None or dataset.task != "classification":
        return
    pairs = np.unique(np.stack([dataset.labels, codes]), axis=1)
    if np.bincount(pairs[0]).max() == 1:
        raise DatasetError(
            f"`groups` must leave some class in two groups, but each of the "
            f"{len(dataset.classes)} classes lies within one: an image is judged by others of its "
            "class, without its group. Name smaller groups, or leave groups out."
        )


def merge_codes(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return codes of what is connected: rows that share a code of either.

    >>> merge_codes(np.array([0, 0, 1, 2]), np.array([5, 6, 6, 7])).tolist()
    [0, 0, 0, 1]
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    _, a = np.unique(a, return_inverse=True)
    _, b = np.unique(b, return_inverse=True)
    n = int(a.max(initial=-1)) + 1
    size = n + int(b.max(initial=-1)) + 1
    edges = coo_array((np.ones(len(a)), (a, n + b)), shape=(size, size))
    return connected_components(edges, directed=False)[1][a]


def describe_groups(groups: np.ndarray | None, labels: np.ndarray) -> dict[str, Any]:
    """Return how many groups there are, how large, and how many hold several classes."""
    if groups is None:
        return {}
    codes, sizes = np.unique(groups, return_inverse=True, return_counts=True)[1:]
    # neither numbers nor several labels say that images of a group are of several classes
    labels = labels if labels.dtype == np.int64 else np.zeros(len(codes), np.int64)
    pairs = np.unique(codes * (int(labels.max()) + 1) + labels) // (int(labels.max()) + 1)
    return {
        "groups": {
            "n": len(sizes),
            "largest": int(sizes.max()),
            "median": float(np.median(sizes)),
            "alone": int((sizes == 1).sum()),
            "several_classes": int((np.bincount(pairs) > 1).sum()),
        }
    }


def describe_options(groups: Any) -> dict[str, str | None]:
    """Return the options of the command line that stand for `groups`."""
    options: dict[str, str | None] = dict.fromkeys(("groups", "group_column", "group_regex"))
    if isinstance(groups, re.Pattern):
        given = groups.flags & ~re.compile(groups.pattern).flags  # not written in it
        flags = "".join(c for c in "aimsx" if given & getattr(re, c.upper()))
        options["group_regex"] = f"(?{flags}){groups.pattern}" if flags else groups.pattern
    elif isinstance(groups, str):
        options["groups" if groups == FOLDERS else "group_column"] = groups
    elif groups is not None:
        options["groups"] = f"<{type(groups).__name__}>"
    return options


def read_options(options: Mapping[str, Any]) -> Any:
    """Return the `groups` that `describe_options` described; text of an object names no column."""
    if options.get("group_regex") is not None:
        return re.compile(options["group_regex"])
    return options.get("group_column") or options.get("groups")


def read_times(values: Sequence[Any], where: str) -> np.ndarray:
    """Return times as numbers that can be compared: numbers, dates, or texts of ISO 8601."""
    given = [v.item() if getattr(v, "ndim", None) == 0 else v for v in values]
    for convert in (_number, _seconds):
        try:
            return np.array([convert(value) for value in given], dtype=np.float64)
        except (TypeError, ValueError):
            continue
    bad = (
        next(v for v in given if _fails(_number, v) and _fails(_seconds, v))
        if any(_fails(_number, v) and _fails(_seconds, v) for v in given)
        else given[0]
    )
    raise DatasetError(
        f"{where} must hold a time for every image, all numbers or all dates such as 2024-05-31 "
        f"or 2024-05-31T12:00:00, but holds {one_line(repr(bad), 40)}; write them in one form."
    )


def _number(value: Any) -> float:
    if is_number(value):
        return float(value)
    if not isinstance(value, str) or not np.isfinite(number := float(value)):
        raise ValueError("no number")
    return number


def _seconds(value: Any) -> float:
    if isinstance(value, str):
        value = datetime.fromisoformat(value.strip())
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if not isinstance(value, datetime):
        raise TypeError("no date")
    return (value.replace(tzinfo=None) - (value.utcoffset() or _NOTHING) - _EPOCH).total_seconds()


_EPOCH = datetime(1970, 1, 1)
_NOTHING = _EPOCH - _EPOCH


def _fails(convert: Callable[[Any], float], value: Any) -> bool:
    try:
        convert(value)
    except (TypeError, ValueError):
        return True
    return False
