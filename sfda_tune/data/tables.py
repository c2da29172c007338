"""CSV and Parquet files of paths (or bytes) and labels."""

from __future__ import annotations

import json
import os
import re
import threading
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from sfda_tune.data.checks import DatasetError, NoPartError, absolute, check_some_exist, need, pick
from sfda_tune.data.dataset import ImageDataset
from sfda_tune.data.groups import name_groups, read_times
from sfda_tune.data.labels import encode
from sfda_tune.data.parts import choose_rows, read_column, read_parts
from sfda_tune.data.several import USUAL, check_labels, find_indicators, read_columns
from sfda_tune.values.files import check, parse_csv, read_text
from sfda_tune.values.text import one_line, printable, read_csv_cell, some

IMAGE_COLUMNS = ("path", "image", "file", "filename", "filepath", "image_path", "file_name")
LARGE = 1 << 30  # bytes of a Parquet column that are not held in memory
LABEL_COLUMNS = ("label", "class", "target", "category", "y")


def find_column(
    argument: str,
    given: str | None,
    columns: Collection[str],
    where: str,
    typed: Sequence[str] = (),
) -> str:
    """Find a column by name, else as the only one of the right type, else by a usual name."""
    usual = {"image_column": IMAGE_COLUMNS, "label_column": LABEL_COLUMNS}.get(argument, ())
    wanted = usual if given is None else (given,)
    if given is None and len(typed) == 1:
        return typed[0]
    for name in wanted:
        for column in (typed if given is None else ()) or columns:
            if column == name or (given is None and column.lower() == name):
                return column
    if not columns:
        raise DatasetError(f"{where} is empty.")
    raise DatasetError(
        f"`{argument}` must be a column of {where}, one of {some(map(repr, columns), 20)}, "
        f"but is {given!r}"
        + (f"; by default it is the first one called {', '.join(usual)}." if usual else ".")
    )


def as_cell(value: Any, base: str) -> str | bytes | None:
    """Turn what an image column holds into an item; Hugging Face: ``{"bytes": …, "path": …}``."""
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, str) and value:
        return os.path.join(base, value)
    return value if isinstance(value, bytes) and value else None


def open_table(
    spec: Any,
    split: str | None,
    image_column: str | None,
    label_column: str | None,
    group_column: str | None,
    split_column: str | None,
    time_column: str | None,
    least: int,
    label_columns: str | Sequence[str] | None = None,
    label_delimiter: str | None = None,
    task: str | None = None,
) -> ImageDataset:
    """Open a CSV or Parquet file."""
    path = absolute(spec)
    where, base = f"Table {path!r}", os.path.dirname(path)
    read = _reader(path)
    columns, cells, labels = read(path, where)
    note = where + " (its first line must name the columns)" * (read is _read_csv)
    image = find_column("image_column", image_column, columns, note)
    name = printable(os.path.splitext(os.path.basename(path))[0])
    more = {"group_column": group_column, "split_column": split_column, "time_column": time_column}
    named_columns = {n: find_column(n, c, columns, note) for n, c in more.items() if c is not None}
    taken = (image, *named_columns.values())
    several = partial(
        read_columns, [c for c in columns if c not in taken], lambda c: _listed(cells(c)), where,
        label_column=label_column, label_columns=label_columns, label_delimiter=label_delimiter,
    )  # fmt: skip
    rows, label = None, None
    if task != "multilabel":
        label = _find_label(label_column, columns, note, taken, lambda c: _listed(cells(c)))
    if split != "all":
        free = [c for c in columns if c not in (label, *taken)]
        if split_column is not None:
            named = pick(read_column, split_column, _listed(cells(split_column)), where)
        else:
            named = pick(read_parts, free, lambda column: _listed(cells(column)), where)
        if named is not None:
            rows, part = pick(choose_rows, named, split, where)
            name += "" if split is None or part == "train" else f"/{split}"
        elif split is not None:
            raise NoPartError(
                "`split` can only be used if a column such as split, fold or is_valid names the "
                f"part of each row, but {where} has only {some(map(repr, columns), 20)}; leave "
                "`split` out."
            )
    if label is None:
        codes, classes = several()
        codes, classes = check_labels(
            (codes if rows is None else codes[rows], classes), least, where
        )
    else:
        found = labels(label) if rows is None else _of_rows(labels(label), rows)
        what = f"{where}, column {label!r},"
        codes, classes = encode(where=what, least=least, task=task, **found)
    items = _Cells(cells(image, lazy=True), base, rows)
    check_some_exist(items, base, f"{where}, column {image!r},")
    origin = np.arange(len(codes)) if rows is None else np.array(rows)
    dataset = ImageDataset(name, items, codes, classes, origin)
    return add_columns(dataset, lambda c: _listed(cells(c)), group_column, time_column, where)


def _find_label(
    given: str | None,
    columns: Sequence[str],
    where: str,
    taken: Iterable[str],
    cells: Callable[[str], Sequence[Any]],
) -> str:
    """Find the column of labels; where there is none, say so if labels stand in several."""
    try:
        return find_column("label_column", given, columns, where)
    except DatasetError as error:
        found = find_indicators([c for c in columns if c not in taken], cells)
        lists = [c for c in columns if c.lower() in USUAL]
        if given is not None or (len(found) < 2 and not lists):
            raise
        held = f"Its columns {some(map(repr, found), 8)} hold nothing but 0 and 1"
        if len(found) < 2:
            held = f"It has a column {lists[0]!r}"
        raise DatasetError(
            f"{error} {held}: for several labels per image pass task='multilabel' (--task "
            "multilabel)."
        ) from None


def add_columns(
    dataset: ImageDataset,
    cells: Callable[[str], Sequence[Any]],
    group_column: str | None,
    time_column: str | None,
    where: str,
) -> ImageDataset:
    """Add the groups and times of the rows that a data set has of a table."""
    rows = dataset.origin.tolist()
    for column, field, read in (
        (group_column, "groups", partial(name_groups, rows=rows)),
        (time_column, "times", read_times),
    ):
        if column is not None:
            values = cells(column)
            found = read([values[row] for row in rows], f"{where}, column {column!r},")
            dataset = replace(dataset, **{field: found})
    return dataset


def read_paths(path: str, image_column: str | None = None) -> list[str]:
    """Return the paths that a CSV or Parquet file names, relative ones from its folder."""
    path = absolute(path)
    where = f"Table {path!r}"
    read = _reader(path)
    columns, cells, _ = read(path, where)
    column = find_column("image_column", image_column, columns, where)
    found = [as_cell(cell, os.path.dirname(path)) for cell in _listed(cells(column))]
    paths = [item for item in found if isinstance(item, str)]
    if len(paths) < len(found):
        raise DatasetError(
            f"{where}, column {column!r}, must hold a path in each row, but "
            f"{len(found) - len(paths)} of {len(found)} have none."
        )
    return paths


def _of_rows(found: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """Return what `encode` is to know of some rows of a table."""
    found = {**found, "rows": [found["rows"][row] for row in rows] if "rows" in found else rows}
    if "places" not in found:
        return {**found, "given": [found["given"][row] for row in rows]}
    used, places = np.unique(found["places"][rows], return_inverse=True)
    return {**found, "given": [found["given"][k] for k in used], "places": places}


def _listed(column: Any) -> Sequence[Any]:
    return column.to_pylist() if hasattr(column, "to_pylist") else column


def _reader(path: str) -> Callable[[str, str], tuple[Any, ...]]:
    return _read_csv if path.lower().endswith(("csv", "tsv")) else _read_parquet


def _read_csv(path: str, where: str) -> tuple[Any, ...]:
    """Columns, a function that reads one, and one that reads the labels for `encode`."""
    try:
        table = parse_csv(read_text(path, limit=1 << 60), foreign=True)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise DatasetError(f"{where} must be a CSV file in UTF-8: {one_line(error)}.") from None
    columns, rows, lines = table.columns, table.rows, table.lines
    if table.long:
        raise DatasetError(
            f"{where} must have {len(columns)} fields per line, as its header has, but line "
            f"{some(lines[n] for n in table.long)} has more; put names that hold "
            f"{table.delimiter!r} between double quotes."
        )

    def cells(name: str, lazy: bool = False) -> list[str]:
        return [read_csv_cell(row[name]) for row in rows]

    return columns, cells, lambda name: {"given": cells(name), "rows": lines, "unit": "line"}


def _read_parquet(path: str, where: str) -> tuple[Any, ...]:
    parquet = need("pyarrow.parquet", "Reading .parquet")
    try:
        schema = parquet.read_schema(path)
    except (OSError, ValueError) as error:  # pyarrow.ArrowInvalid is a ValueError
        raise DatasetError(f"{where} must be a Parquet file: {one_line(error)}") from None

    # A few kilobytes may stand for millions of rows, so none becomes an object before it is asked
    # for; texts are kept once each.
    def cells(name: str, lazy: bool = False) -> Any:
        if lazy and _size_column(parquet.read_metadata(path), name) > LARGE:
            return _RowGroups(path, name, parquet)
        texts = [name] if re.fullmatch("(large_)?string", str(schema.field(name).type)) else None
        return parquet.ParquetFile(path, read_dictionary=texts).read([name]).column(name)

    def labels(name: str) -> dict[str, Any]:
        found, column = {"names": _declared(schema, name)}, cells(name)
        try:
            coded = column.dictionary_encode().combine_chunks()
        except NotImplementedError:  # lists: `encode` says what it thinks of them
            return found | {"given": column.to_pylist()}
        coded = coded.chunk(0) if hasattr(coded, "chunk") else coded
        given = [*coded.dictionary.to_pylist(), None]  # the last for what is missing
        places = coded.indices.fill_null(len(given) - 1).to_numpy()
        used = np.unique(places)  # a dictionary may hold more than the rows use
        return found | {"given": [given[k] for k in used], "places": np.searchsorted(used, places)}

    return schema.names, cells, labels


def _declared(schema: Any, label: str) -> list[str] | None:
    """Return the class names that Hugging Face wrote into the table."""
    with suppress(KeyError, TypeError, ValueError, RecursionError):
        found = json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]["names"]
        check(found, [str])
        return found
    return None


def _size_column(metadata: Any, name: str) -> int:
    """Return the bytes of a column in memory."""
    groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
    parts = [group.column(c) for group in groups for c in range(group.num_columns)]
    return sum(
        part.total_uncompressed_size
        for part in parts
        if part.path_in_schema.partition(".")[0] == name
    )


class _RowGroups(Sequence[Any]):
    """A column too large to be held: the row group of a cell is read when it is asked for."""

    def __init__(self, path: str, name: str, parquet: Any) -> None:
        self.path, self.name, self._parquet = path, name, parquet
        metadata = parquet.read_metadata(path)
        n_rows = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        self._starts = np.cumsum([0, *n_rows]).tolist()
        self._lock, self._held = threading.Lock(), (-1, None)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "name": self.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state, parquet=need("pyarrow.parquet", "Reading .parquet"))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, row: Any) -> Any:
        group = bisect_right(self._starts, row) - 1
        with self._lock:
            if self._held[0] != group:
                with self._parquet.ParquetFile(self.path) as file:
                    table = file.read_row_group(group, [self.name])
                self._held = group, table.column(self.name)
            column: Any = self._held[1]
        return column[row - self._starts[group]]


class _Cells(Sequence[Any]):
    """The items in an image column, made as they are asked for."""

    def __init__(self, column: Any, base: str, rows: Sequence[int] | None = None) -> None:
        self.column, self.base = column, base
        self.rows = range(len(column)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: Any) -> Any:
        value = self.column[self.rows[int(row)]]
        return as_cell(value.as_py() if hasattr(value, "as_py") else value, self.base)
