"""Several labels per image: from columns of 0 and 1, lists of names, or COCO's annotations.

They become a matrix of int8, a row per image and a column per label: 1 where it applies, 0 where
not, −1 where it is not known. A row of zeros is an image without a label.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from sfda_tune.data.checks import DatasetError, absolute, check_some_exist
from sfda_tune.data.dataset import ImageDataset
from sfda_tune.data.labels import class_name, is_missing, sort_classes
from sfda_tune.data.parts import FALSE, TRUE, is_about_parts
from sfda_tune.values.files import parse_json, read_text
from sfda_tune.values.labels import as_indicators, find_varied
from sfda_tune.values.text import one_line, printable, some

__all__ = [
    "USUAL", "check_labels", "encode_rows", "encode_sets", "find_indicators", "open_coco",
    "read_columns",
]  # fmt: skip

# Columns of several labels that are found by themselves, beside those of one label
USUAL = ("labels", "classes", "targets", "categories", "tags", "attributes")
UNKNOWN = ("-1", "-1.0")

Labels = tuple[np.ndarray, tuple[str, ...]]
Cells = Callable[[str], Sequence[Any]]


def encode_rows(given: Any, where: str) -> Labels:
    """Return the labels that rows of numbers, or of names, stand for.

    >>> encode_rows([["cat", "dog"], [], ["dog"]], "`labels`")
    (array([[1, 1],
           [0, 0],
           [0, 1]], dtype=int8), ('cat', 'dog'))
    """
    columns = getattr(given, "columns", None)  # of a data frame
    if not hasattr(given, "dtype") and columns is None:
        rows = [row.tolist() if hasattr(row, "tolist") else row for row in given]
        if any(isinstance(row, str) or not isinstance(row, Iterable) for row in rows):
            raise DatasetError(
                f"{where} must hold a row for each image for the task 'multilabel', of 0 and 1 or "
                f"of names, but the first is {one_line(repr(rows[0]), 60)}; leave the task out if "
                "there is one label per image."
            )
        if all(isinstance(name, str) for row in rows for name in row):
            return encode_sets(rows, where)
        given = rows
    try:
        matrix = as_indicators(given)
    except ValueError as error:
        raise DatasetError(str(error).replace("`labels`", where, 1)) from None
    names = range(matrix.shape[1]) if columns is None else columns
    return matrix, tuple(f"label {n}" if columns is None else class_name(n) for n in names)


def encode_sets(rows: Sequence[Iterable[Any] | None], where: str) -> Labels:
    """Return the labels of lists of names; None: nothing is known of the image."""
    known = [None if row is None else {class_name(v) for v in row} - {""} for row in rows]
    classes = tuple(sort_classes({name for row in known if row for name in row}))
    if not classes:
        raise DatasetError(f"{where} must hold labels, but no image has any.")
    code = {name: c for c, name in enumerate(classes)}
    matrix = np.zeros((len(rows), len(classes)), np.int8)
    for n, row in enumerate(known):
        if row is None:
            matrix[n] = -1
        else:
            matrix[n, [code[name] for name in row]] = 1
    return matrix, classes


def _read_indicator(value: Any) -> int | None:
    """Return 1, 0, −1 for what is not known; None for anything else."""
    if is_missing(value):
        return -1
    text = str(value).strip().casefold()
    return 1 if text in TRUE else 0 if text in FALSE else -1 if text in UNKNOWN else None


def find_indicators(columns: Iterable[str], cells: Cells) -> list[str]:
    """Return the columns that hold nothing but 0 and 1 (true and false), and are about no part."""
    found = []
    for column in columns:
        if not is_about_parts(column):
            kinds = {_read_indicator(v) for v in _distinct(cells(column))}
            if None not in kinds and kinds != {-1}:
                found.append(column)
    return found


def _distinct(values: Sequence[Any]) -> list[Any]:
    try:
        return list(dict.fromkeys(values))
    except TypeError:  # lists
        return list(values)


def read_columns(
    columns: Sequence[str],
    cells: Cells,
    where: str,
    *,
    label_column: str | None = None,
    label_columns: str | Sequence[str] | None = None,
    label_delimiter: str | None = None,
) -> Labels:
    """Return the labels that a table holds, in several `columns` or in one."""
    if label_columns is not None and (label_column is not None or label_delimiter is not None):
        raise DatasetError(
            "`label_columns` (--label-columns) names one column per label, `label_column` and "
            "`label_delimiter` the one column of all; leave one of them out."
        )
    if label_columns is not None:
        return _read_indicators(_match(label_columns, columns, where), cells, where)
    if label_column is None and label_delimiter is None:
        found = find_indicators(columns, cells)
        if len(found) > 1:
            return _read_indicators(found, cells, where)
    given = label_column
    if label_column is None:
        usual = (*USUAL, "label", "class", "target", "category", "y")
        label_column = next((c for c in columns if c.lower() in usual), None)
    if label_column is None or label_column not in columns:
        raise DatasetError(
            f"{where} must have a column of 0 and 1 for each label (`label_columns`, "
            "--label-columns 'a,b,c'; by default all that hold nothing else) or one column of all "
            "labels (`label_column`, with `label_delimiter`, --label-delimiter ';'), but among "
            f"{some(map(repr, columns), 20)} there is none"
            + ("." if given is None else f" called {given!r}.")
        )
    what, values = f"{where}, column {label_column!r},", cells(label_column)
    if label_delimiter is not None:
        return encode_sets([_split(value, label_delimiter) for value in values], what)
    if all(v is None or (isinstance(v, list | tuple)) for v in values):
        return encode_sets(values, what)
    first = next(v for v in values if not isinstance(v, list | tuple) and v is not None)
    raise DatasetError(
        f"{what} must hold a list of labels in each row, or a text and `label_delimiter` "
        f"(--label-delimiter ';') say what is between them, but holds {one_line(repr(first), 60)}."
    )


def _split(value: Any, delimiter: str) -> list[str]:
    """Return the names in a text; of an empty one none, for it has no label."""
    return (
        [] if is_missing(value) else [n for p in str(value).split(delimiter) if (n := p.strip())]
    )


def _match(given: str | Sequence[str], columns: Sequence[str], where: str) -> list[str]:
    """Return the columns that names and patterns such as ``has_*`` stand for, in their order."""
    wanted = [p.strip() for p in given.split(",")] if isinstance(given, str) else list(given)
    found: dict[str, None] = {}
    for pattern in wanted:
        same = [c for c in columns if c == pattern] or [
            c for c in columns if fnmatchcase(c, pattern)
        ]
        if not same:
            raise DatasetError(
                f"`label_columns` must name columns of {where}, one of "
                f"{some(map(repr, columns), 20)}, or patterns such as 'has_*', but {pattern!r} "
                "fits none."
            )
        found |= dict.fromkeys(same)
    return list(found)


def _read_indicators(names: Sequence[str], cells: Cells, where: str) -> Labels:
    read = []
    for name in names:
        values = cells(name)
        known = {value: _read_indicator(value) for value in _distinct(values)}
        if bad := [value for value, one in known.items() if one is None]:
            held = some([one_line(repr(value), 40) for value in bad])
            raise DatasetError(
                f"{where}, column {name!r}, must hold 0 and 1 (or true and false; empty: not "
                f"known), but holds {held}; name the columns of labels: `label_columns` "
                "(--label-columns 'a,b,c')."
            )
        read.append([known[value] for value in values])
    return np.array(read, np.int8).T, tuple(map(class_name, names))


def check_labels(labels: Labels, least: int, where: str) -> Labels:
    """Raise a DatasetError if no label tells images apart, where some are to be ranked on."""
    matrix, classes = labels
    if least > 1 and not find_varied(matrix).any():
        raise DatasetError(
            f"{where} must have a label that some images have and others do not, but none of the "
            f"{len(classes)} is such ({some(classes)})."
        )
    return labels


# COCO --------------------------------------------------------------------------------------------
_COCO = {
    "images": [{"id": (int, str), "file_name": str}],
    "annotations": [{"image_id": (int, str), "category_id": (int, str)}],
    "categories": [{"id": (int, str), "name": str}],
}


def open_coco(spec: Any, least: int, task: str | None = None) -> ImageDataset:
    """Open a file of annotations like COCO's: an image has the categories annotated in it."""
    path = absolute(spec)
    where = f"The annotations {path!r}"
    try:
        data = parse_json(read_text(path, limit=1 << 60), _COCO)
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"{where} must be JSON like COCO's, with images, annotations and categories: "
            f"{one_line(error)}. A table of paths and labels is a .csv, .tsv or .parquet file."
        ) from None
    if task != "multilabel":
        raise DatasetError(
            f"{where} may give several labels to an image: pass task='multilabel' (--task "
            "multilabel)."
        )
    images, position = data["images"], {image["id"]: n for n, image in enumerate(data["images"])}
    categories = sorted(data["categories"], key=lambda c: (isinstance(c["id"], str), c["id"]))
    code = {category["id"]: c for c, category in enumerate(categories)}
    if len(position) < len(images) or len(code) < len(categories) or not images or not code:
        raise DatasetError(f"{where} must have images and categories, each with an id of its own.")
    matrix = np.zeros((len(images), len(categories)), np.int8)
    for n, entry in enumerate(data["annotations"]):
        row, column = position.get(entry["image_id"]), code.get(entry["category_id"])
        if row is None or column is None:
            what = "image" if row is None else "category"
            raise DatasetError(
                f"{where} must annotate its own images and categories, but annotation {n} is of "
                f"the {what} {entry[f'{what}_id']!r}, which it does not list."
            )
        matrix[row, column] = 1
    name = printable(os.path.splitext(os.path.basename(path))[0])
    base = _find_base(path, [image["file_name"] for image in images[:100]])
    items = [os.path.join(base, image["file_name"]) for image in images]
    check_some_exist(items, base, f"{where}, `file_name`,")
    names = tuple(class_name(category["name"]) for category in categories)
    return ImageDataset(name, items, *check_labels((matrix, names), least, where))


def _find_base(path: str, files: Sequence[str]) -> str:
    """Return the folder from which the files are named.

    That of the annotations; else one beside it called images, or as the last word of their name,
    as in ``annotations/instances_train2017.json`` and ``train2017/``.
    """
    folder = os.path.dirname(path)
    word = os.path.splitext(os.path.basename(path))[0].rpartition("_")[2]
    for top in (folder, os.path.dirname(folder)):
        for base in (top, os.path.join(top, "images"), os.path.join(top, word)):
            if any(os.path.lexists(os.path.join(base, file)) for file in files):
                return base
    return folder
