"""Data sets of the Hugging Face hub and of the library `datasets`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np

from sfda_tune.data.checks import DatasetError, need, pick, refuse
from sfda_tune.data.dataset import ImageDataset
from sfda_tune.data.hub import cache_only_if_unreachable
from sfda_tune.data.labels import encode
from sfda_tune.data.parts import choose, choose_rows, part_of, read_column, read_parts
from sfda_tune.data.several import check_labels, read_columns
from sfda_tune.data.tables import add_columns, as_cell, find_column
from sfda_tune.values.redaction import hide_secrets
from sfda_tune.values.text import one_line, printable, some

BUFFER = 10_000  # rows of a stream that are held to be shuffled


STREAM = "hf-stream:"
_LISTS = ("Sequence", "List", "LargeList")  # features that hold several values


def open_hub(spec: str, split: str | None, **options: Any) -> ImageDataset:
    """Open "hf:NAME", "hf:NAME:CONFIG" or "hf:" and a folder; "hf-stream:" draws from a stream."""
    datasets = need("datasets", "'hf:'")
    from huggingface_hub import constants

    prefix = STREAM if spec.startswith(STREAM) else "hf:"
    text = spec.removeprefix(prefix)
    if not text:
        raise DatasetError(
            f"`spec` must be '{prefix}NAME' or '{prefix}NAME:CONFIG' but is {spec!r}."
        )
    local = os.path.expanduser(text)
    exists = os.path.exists(local)
    name, _, config = (local, "", "") if exists else text.partition(":")
    shown = printable(os.path.basename(os.path.abspath(local)) if exists else text)
    saved = ("dataset_dict.json", "state.json")
    try:
        if any(os.path.exists(os.path.join(local, file)) for file in saved):
            data = datasets.load_from_disk(local)
        else:
            part = split if split and re.search(r"[\[+]", split) else None  # "train[:10%]"
            with nullcontext() if exists else cache_only_if_unreachable():
                streams = {"streaming": True} if prefix == STREAM else {}
                data = datasets.load_dataset(name, config or None, split=part, **streams)
            if part:
                shown, split = f"{shown}/{part}", None
    except Exception as error:  # of network, file system, data set script, …
        raise DatasetError(
            f"`spec` '{prefix}{printable(text)}' cannot be loaded: {type(error).__name__}: "
            f"{one_line(hide_secrets(str(error), constants.ENDPOINT))}"
        ) from error
    return open_hf(data, split, name=shown, **options)


def _hf_item(data: Any, column: str, base: str, row: int) -> str | bytes | None:
    return as_cell(data[row][column], base)


def open_hf(
    data: Any,
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
    name: str = "",
    draw: tuple[int | None, int] = (None, 0),
) -> ImageDataset:
    """Open a `datasets.Dataset`, or one part of a `DatasetDict`; of a stream, what is drawn."""
    import datasets

    first: Any = next(iter(data.values())) if isinstance(data, Mapping) else data
    name = name or first.info.dataset_name or "dataset"
    where = f"Data set {name!r}"
    if isinstance(first, datasets.IterableDataset):
        if isinstance(data, Mapping):
            parts = {c: part_of(c) for c in data}
            chosen = pick(choose, parts, split, where)
            if len(chosen) > 1:
                raise DatasetError(f"{where} is a stream: name one `split` of {some(data)}.")
            name += "" if split is None or parts[chosen[0]] == "train" else f"/{split}"
            data, split = data[chosen[0]], None
        data = _draw(data, *draw, where)
    if isinstance(data, Mapping) and len(data) > 1:
        refuse(f"{where}, which has the splits {some(data)}", split_column=split_column)
        parts = {c: part_of(c) for c in data}
        chosen = pick(choose, parts, split, where)
        name += "" if split is None or parts[chosen[0]] == "train" else f"/{split}"
        data = datasets.concatenate_datasets([data[c] for c in chosen])
        named = None
    else:
        only, data = next(iter(data.items())) if isinstance(data, Mapping) else (None, data)
        taken = (image_column, label_column, group_column, time_column)
        named = _name_parts(data, taken, split, where, split_column)
        if named is None and only is not None:
            chosen = pick(choose, {only: part_of(only)}, split, where)
            name += "" if split is None or chosen == ["train"] else f"/{split}"
        elif named is None and split != "all":
            refuse(f"{where}, which is a single split", split=split)
    features = data.features
    kind = {column: type(feature).__name__ for column, feature in features.items()}
    images = [column for column in kind if kind[column] == "Image"]
    classes = [column for column in kind if kind[column] == "ClassLabel"]
    image = find_column("image_column", image_column, kind, where, images)
    data = data.with_format(None)
    several = None
    if task == "multilabel":
        lists = [column for column in kind if kind[column] in _LISTS]
        if label_column is None and label_columns is None and len(lists) == 1:
            label_column = lists[0]
        taken = (image, group_column, split_column, time_column)
        plain = ("Value", "ClassLabel", *_LISTS)  # an Image would be decoded to be looked at
        free = [c for c in kind if c not in taken and kind[c] in plain]
        several = read_columns(
            free, partial(_cells, data), where, label_column=label_column,
            label_columns=label_columns, label_delimiter=label_delimiter,
        )  # fmt: skip
    label = "" if several else _find_label(label_column, kind, where, classes)
    wanted = np.arange(len(data))
    if named is not None:
        rows, part = pick(choose_rows, named, split, where)
        name += "" if split is None or part == "train" else f"/{split}"
        wanted = np.array(rows)
    if several:
        codes, class_names = check_labels((several[0][wanted], several[1]), least, where)
    else:
        names = getattr(features[label], "names", None)
        labels = data.select_columns([label])[:][label]
        labels = [labels[row] for row in wanted]
        what = f"{where}, column {label!r},"
        codes, class_names = encode(
            labels, what, names=names, rows=wanted.tolist(), least=least, task=task
        )
    rows = data.select_columns([image])
    if kind[image] == "Image":
        rows = rows.cast_column(image, datasets.Image(decode=False))
    elif not re.search("string|binary", str(features[image])):
        raise DatasetError(
            f"`image_column` must hold images, paths or bytes, but {image!r} of {where} is "
            f"{one_line(features[image], 80)}; cast it to datasets.Image()."
        )
    items = [partial(_hf_item, rows, image, os.getcwd(), row) for row in wanted.tolist()]
    for argument, column in (("group_column", group_column), ("time_column", time_column)):
        if column is not None:
            find_column(argument, column, kind, where)
    dataset = ImageDataset(name, items, codes, class_names, wanted)
    return add_columns(dataset, partial(_cells, data), group_column, time_column, where)


def _find_label(
    given: str | None, kind: Mapping[str, str], where: str, classes: Sequence[str]
) -> str:
    """Find the column of labels; where there is none, say so if one holds several."""
    try:
        return find_column("label_column", given, kind, where, classes)
    except DatasetError as error:
        lists = [column for column in kind if kind[column] in _LISTS]
        if given is not None or not lists:
            raise
        raise DatasetError(
            f"{error} Its column {lists[0]!r} holds lists: if these are several labels per image, "
            "pass task='multilabel' (--task multilabel)."
        ) from None


def is_stream(spec: Any) -> bool:
    """Whether a data set is read as a stream."""
    return (isinstance(spec, str) and spec.startswith(STREAM)) or hasattr(spec, "_ex_iterable")


def _draw(stream: Any, n: int | None, seed: int, where: str) -> Any:
    """Return `n` rows of a stream, shuffled as far as a buffer of ten times as many reaches."""
    import datasets

    if n is None:
        raise DatasetError(
            f"{where} is a stream, of which as many images are drawn as `samples` (--samples) "
            "says: pass it; or load the data set without streaming."
        )
    features = stream.features
    for column, feature in (features or {}).items():
        if type(feature).__name__ == "Image":
            stream = stream.cast_column(column, datasets.Image(decode=False))
    drawn = list(stream.shuffle(seed=seed, buffer_size=min(10 * n, BUFFER)).take(n))
    if not drawn:
        raise DatasetError(f"{where} is a stream without a row.")
    return datasets.Dataset.from_list(drawn, features=features)


def _cells(data: Any, column: str) -> list[Any]:
    """Return what a column holds, with the names of classes."""
    feature = data.features[column]
    names = getattr(feature, "names", None)
    values = data.with_format(None).select_columns([column])[:][column]
    inner = getattr(getattr(feature, "feature", None), "names", None)
    if inner:
        return [None if v is None else [inner[k] for k in v] for v in values]
    return [names[v] if names and v is not None and v >= 0 else v for v in values]


def _name_parts(
    data: Any,
    taken: Iterable[str | None],
    split: str | None,
    where: str,
    split_column: str | None = None,
) -> Any:
    """Return what `read_parts` finds in the columns of numbers and text; None for all rows."""
    if split == "all":
        return None
    features = {c: f for c, f in data.features.items() if c not in taken}
    plain = [c for c, f in features.items() if type(f).__name__ in ("Value", "ClassLabel")]
    if split_column is not None:
        find_column("split_column", split_column, list(data.features), where)
        return pick(read_column, split_column, _cells(data, split_column), where)
    return pick(read_parts, plain, partial(_cells, data), where)
