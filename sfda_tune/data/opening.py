"""Labelled images in whatever form the user has them: `open_dataset(spec)` → `ImageDataset`.

`sfda_tune.data.decoding` says how an image of any kind becomes RGB. Importing this module needs
numpy and Pillow only; whatever else a form needs is imported by it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from sfda_tune.data.arrays import open_arrays, open_digits
from sfda_tune.data.checks import DatasetError, absolute, close_matches, refuse
from sfda_tune.data.dataset import ImageDataset
from sfda_tune.data.decoding import find_bands, warn_of_dark
from sfda_tune.data.folders import open_folder
from sfda_tune.data.formats import ALL, Reading, parse_reading
from sfda_tune.data.groups import FOLDERS, check_groups, find_groups
from sfda_tune.data.huggingface import STREAM, open_hf, open_hub
from sfda_tune.data.labels import order_levels
from sfda_tune.data.several import open_coco
from sfda_tune.data.shards import is_shards, open_shards
from sfda_tune.data.tables import open_table
from sfda_tune.data.torchvision import open_map
from sfda_tune.values.text import did_you_mean, require

__all__ = ["TASKS", "check_form", "open_dataset", "open_part", "settle_task"]

TASKS = ("auto", "classification", "regression", "ordinal", "multilabel")
_FORMS = (
    "'digits'; a folder with one sub-folder per class (or train/ and val/ with such sub-folders); "
    "a .csv, .tsv or .parquet table of paths and labels; a .json file like COCO's; .tar files "
    "(WebDataset); 'hf:NAME' or 'hf:NAME:CONFIG'; a Hugging Face Dataset; a torchvision-style "
    "data set; arrays or lists (images, labels); an ImageDataset"
)


def open_dataset(
    spec: Any,
    *,
    split: str | None = None,
    samples: int | None = None,
    seed: int = 0,
    image_column: str | None = None,
    label_column: str | None = None,
    labels: Any = None,
    groups: Any = None,
    split_column: str | None = None,
    time_column: str | None = None,
    task: str | None = None,
    label_columns: str | Sequence[str] | None = None,
    label_delimiter: str | None = None,
    levels: str | Sequence[Any] | None = None,
    bit_depth: str | int | None = None,
    bands: str | Sequence[int] | None = None,
) -> ImageDataset:
    """Open labelled images, in whatever form they are.

    Parameters
    ----------
    spec : object
        - ``"digits"``: scikit-learn's 1,797 digits, 8×8, grey levels 0 … 16 as round(255·v/16).
        - Folder ``root/<class>/**/*.jpg``, or ``root/{train,val,test}/<class>/**/*.jpg``, also
          under other names of these (``Training``, ``valid``, ``dev``, ``test_images``, …) and
          beside other folders, which are left out with a warning. Hidden files do not count, nor
          do folders that `sfda_tune.search` wrote.
        - ``.csv``, ``.tsv`` (UTF-8, with a header, separated by comma, semicolon or tab) or
          ``.parquet`` with paths, relative to the table, or encoded images, and labels. A column
          such as ``split``, ``fold``, ``subset`` or ``is_valid`` says which part a row is of.
        - ``.json`` with images, annotations and categories, like COCO's (for "multilabel").
        - ``.tar`` files (WebDataset): a file, a folder of them, ``"train-*.tar"`` or
          ``"train-{000..127}.tar"``, with a ``.cls`` or ``.json`` beside each image, or a folder
          for each class in the tar; see `sfda_tune.data.shards`. They are not unpacked.
        - ``"hf:NAME"``, ``"hf:NAME:CONFIG"``, ``"hf:folder"``, or a Hugging Face `Dataset` or
          `DatasetDict`. Its format or transform is not applied. ``"hf-stream:NAME"``, or an
          `IterableDataset`: `samples` images are drawn from the stream (shuffled within a buffer,
          not stratified), and nothing else is downloaded.
        - Torchvision-style data set: ``spec[i]`` → (image, label); labels from `targets`, `labels`
          or `_labels` and names from `classes`, if there are any. A transform that returns tensors
          is not applied, because each backbone has its own; one that returns images is, and must
          be deterministic. Of ImageFolder the files are read directly.
        - ``(images, labels)`` or ``{"images": …, "labels": …}``: images as array ``(n, h, w)`` or
          ``(n, h, w, c)`` with c = 1, 3, 4 (tensor: ``(n, c, h, w)``) of uint8, uint16, bool, or
          floating point in [0, 1]; or a list of such images, PIL images, paths, encoded bytes.
        - An `ImageDataset`: returned as it is.
    split : str, optional
        "train" (default), "val", "test" or "all" of a folder, table or Hugging Face data set that
        has such parts, or the name of one; for ``"hf:…"`` also a slice such as ``"train[:10%]"``.
        Rank on the training images: the validation images stay unseen then.
    samples, seed : int, optional
        Draw this many images, see `ImageDataset.sample`.
    image_column, label_column : str, optional
        Columns of a table or Hugging Face data set. Default: the only Image and the only
        ClassLabel column, else the first of path, image, file, filename, filepath, image_path,
        file_name, and of label, class, target, category, y.
    labels : sequence, optional
        Labels of the images, if `spec` is an array or list of images only.
    groups : sequence, str, re.Pattern or callable, optional
        Which images belong together (frames of one video, slides of one patient), so that no
        split and no leave-one-out has some of them on either side: one group per image, in the
        order of the images that are opened, before `samples` are drawn; the name of a column;
        ``"folders"``, the sub-folders inside the class folders (one name is one group, whatever
        the class; an image beside them is alone); a compiled pattern, searched in each file name
        (in the path, if it has a ``/``), whose groups name the group; or a function of the path.
    split_column, time_column : str, optional
        Column of a table or Hugging Face data set that says the part of each row, where it has
        an unusual name; that says when each image was made (number or ISO 8601).
    task : {"auto", "classification", "regression", "ordinal", "multilabel"}, optional
        Whether the labels are classes, numbers to predict, levels in an order, or several per
        image. By default
        numbers are classes, too, but are refused where they look like a quantity
        (`sfda_tune.data.labels`): three or more, of which some have a fraction; or more than 20
        whole ones with fewer than 3 images each. Names of folders, and numbers that the data set
        has names for, are classes. So are texts, but those that look like lists (``"cat;dog"``
        beside ``"cat"`` and ``"dog"``) are refused.
        For "ordinal" labels (of folders the names, too) are levels such as grades from 0 to 4:
        numbers, or names with a number each (``"0-9"``, ``"10-19"``, ``"60+"``), by which they
        are ordered; or the `levels`. Only their order counts. An `ImageDataset` of classes may
        become one of levels.
        For "multilabel" labels are rows of 0 and 1 (NaN or -1: not known) or lists of names, in
        arrays, in a table or Hugging Face data set as below. Of ``"digits"``, their four bits.
    label_columns : str or sequence of str, optional
        Columns of 0 and 1 (or true and false; empty or -1: not known), one for each label: names,
        or patterns such as ``"has_*"``, in a list or separated by commas. Default, if there are
        two or more: all that hold nothing else and do not name a part.
    label_delimiter : str, optional
        What separates the labels in the one column that holds all, such as ``";"``; an empty cell
        has none. Not needed for a column of lists. Either of the two means "multilabel".
    levels : str or sequence, optional
        All levels, from the lowest to the highest: ``["small", "medium", "large"]``, or in one
        text with commas. That means "ordinal". A level may be without images.
    bit_depth : int in 9 … 16, or "auto", optional
        Grey (and other integer) pixels of more than 8 bits are white at 2^bit_depth − 1; by
        default at 65535, with a warning where images of 12 bits would be nearly black. DICOM
        files say it themselves.
    bands : sequence of int, or str, optional
        Which bands, counted from 1, are shown as red, green and blue, ``(4, 3, 2)`` or
        ``"4,3,2"``, or a single one as grey. Any other number of them, or ``"all"`` where images
        have as many, stay what they are: the first convolution of each network is adapted to them
        as timm does. Of a TIFF (by tifffile) these are all axes but height and width: samples,
        channels, or the frames of a stack. People are shown the first three.

    Raises
    ------
    DatasetError
        If the form is unknown, nothing is there, labels are missing, or there is a single class.
        A damaged or missing *image* is no error here but an `UnreadableImage` when loaded.

    Examples
    --------
    >>> open_dataset("digits", samples=500)
    ImageDataset('digits', 500 images, 10 classes)
    """
    columns = {"image_column": image_column, "label_column": label_column, "groups": groups}
    columns |= {"split_column": split_column, "time_column": time_column}
    columns |= {"label_columns": label_columns, "label_delimiter": label_delimiter}
    told = settle_task(task, label_columns, label_delimiter, levels)
    reading = _parse_reading(bit_depth, bands)
    dataset = _open(
        spec, 2, split=split, **columns, labels=labels, task=told, reading=reading,
        draw=(samples, seed), levels=levels,
    )  # fmt: skip
    if groups is not None and dataset.groups is not None:
        check_groups(dataset.groups)
    return dataset if samples is None else dataset.sample(samples, seed)


def check_form(spec: Any) -> None:
    """Raise the `DatasetError` of `open_dataset` if `spec` is of no known form, or not there."""
    _form(spec, None)


def settle_task(
    task: str | None, label_columns: Any = None, label_delimiter: Any = None, levels: Any = None
) -> Any:
    """Return the task that is meant, None for "auto"; options of some kinds of labels say it."""
    require("task", task, f"one of {', '.join(TASKS)}", task in (None, *TASKS))
    told = None if task == "auto" else task
    for name, value, kind, what in (
        ("label_columns", label_columns, "multilabel", "several labels per image"),
        ("label_delimiter", label_delimiter, "multilabel", "several labels per image"),
        ("levels", levels, "ordinal", "levels in an order"),
    ):
        if value is None:
            continue
        if told not in (None, kind):
            raise DatasetError(f"`{name}` is for {what}, but `task` is {told!r}; leave one out.")
        require(name, value, "a text that is not empty", isinstance(value, Sized) and len(value))
        told = kind
    return told


def open_part(
    spec: Any,
    split: str | None = None,
    *,
    bit_depth: Any = None,
    bands: Any = None,
    **columns: Any,
) -> ImageDataset:
    """Open images to validate or test with, which may be of a single class.

    `NoPartError` if the data set has no part of that name.
    """
    return _open(spec, 1, split=split, reading=_parse_reading(bit_depth, bands), **columns)


def _parse_reading(bit_depth: Any, bands: Any) -> Reading | None:
    try:
        return parse_reading(bit_depth, bands)
    except ValueError as error:
        raise DatasetError(str(error)) from None


def _open(
    spec: Any,
    least: int,
    *,
    labels: Any = None,
    groups: Any = None,
    task: str | None = None,
    reading: Reading | None = None,
    draw: tuple[int | None, int] = (None, 0),
    levels: Any = None,
    **options: Any,
) -> ImageDataset:
    """Open a data set of at least so many classes."""
    form, opener, usable = _form(spec, labels)
    if opener in (open_hf, open_hub):
        opener = partial(opener, draw=draw)
    if reading is not None:
        if opener in (_open_opened, open_digits, open_map):
            given = {name: v for name, v in vars(reading).items() if v is not None}
            refuse(form, **given)
        if opener is open_arrays:
            opener = partial(open_arrays, reading=reading)
    options |= {"labels": labels, "least": least, "task": task}
    if isinstance(groups, str):
        where = "group_column" if "group_column" in usable else "groups"
        if where not in usable or (where == "groups" and groups != FOLDERS):
            raise DatasetError(
                f"`groups` {groups!r} would be a column, or the sub-folders of the classes "
                f"({FOLDERS!r}), which {form} does not have; pass one group per image, a compiled "
                "pattern (--group-regex) or a function of the path."
            )
        options[where], groups = groups, None
    dataset = _open_form(spec, form, opener, usable, options)
    if task == "ordinal" and not (dataset.ordered and levels is None):
        dataset = _order(dataset, levels)
    if reading is not None:
        if reading.bands == ALL:
            try:
                reading = find_bands(dataset.items, reading)
            except ValueError as error:
                raise DatasetError(str(error)) from None
        dataset = replace(dataset, reading=reading)
    elif not isinstance(spec, ImageDataset):
        warn_of_dark(dataset.items)
    if groups is None:
        return dataset
    return replace(dataset, groups=find_groups(dataset.items, groups))


def _order(dataset: ImageDataset, levels: Any) -> ImageDataset:
    """Make levels of classes."""
    names, of = order_levels(dataset.classes, levels, f"{dataset.name!r}")
    return replace(dataset, labels=of[dataset.labels], classes=names, ordered=True)


def _open_form(
    spec: Any,
    form: str,
    opener: Callable[..., ImageDataset],
    usable: tuple[str, ...],
    options: dict[str, Any],
) -> ImageDataset:
    refused = {name: options[name] for name in options if name not in (*usable, "least", "task")}
    refuse(form, **refused)
    return opener(spec, **{name: options.get(name) for name in usable}, task=options["task"])


def _open_opened(dataset: ImageDataset, task: str | None) -> ImageDataset:
    usable = (None, dataset.task, "ordinal" if dataset.task == "classification" else None)
    require("task", task, f"{dataset.task!r}, as that of {dataset!r}", task in usable)
    return dataset


def _form(spec: Any, labels: Any) -> tuple[str, Callable[..., ImageDataset], tuple[str, ...]]:
    """Name of the form of `spec`, the function that opens it, and the options that it takes."""
    columns = ("image_column", "label_column", "group_column", "split_column", "time_column")
    columns += ("label_columns", "label_delimiter")
    if isinstance(spec, ImageDataset):
        return "an ImageDataset", _open_opened, ()
    if isinstance(spec, str) and spec == "digits":
        return "'digits' (a folder of that name is './digits')", open_digits, ()
    if isinstance(spec, str) and spec.startswith(("hf:", STREAM)):
        return f"'{spec.partition(':')[0]}:…'", open_hub, ("split", *columns, "least")
    if isinstance(spec, str | os.PathLike):
        path = absolute(spec)
        if is_shards(path):
            usable = ("split", "image_column", "label_column", "least")
            return "tar files", open_shards, usable
        if os.path.isdir(path) and os.fspath(spec):  # "" is not the current folder
            return (
                "a folder (the labels are the folder names)",
                open_folder,
                ("split", "least", "groups"),
            )
        suffix = os.path.splitext(path)[1].lower()
        if os.path.exists(path) and not os.path.isdir(path) and not os.path.isfile(path):
            fact = f"{str(spec)!r} is neither a file nor a folder"
        elif not os.path.isfile(path):
            near = close_matches(path) or did_you_mean(str(spec).removeprefix("demo:"), ["digits"])
            fact = f"{str(spec)!r} does not exist{near}"
        elif suffix == ".json":
            return "annotations like COCO's", open_coco, ("least",)
        elif suffix in (".csv", ".tsv", ".parquet", ".pq"):
            return "a table", open_table, ("split", *columns, "least")
        else:
            archive = suffix in (".zip", ".gz", ".tgz", ".7z", ".rar")
            fact = f"It is the file {path!r}" + ("; unpack it first" if archive else "")
        stop = "" if fact.endswith("?") else "."
        raise DatasetError(f"{fact}{stop} A data set is one of: {_FORMS}.")
    if hasattr(spec, "cast_column"):
        return "a Hugging Face data set", open_hf, ("split", *columns, "least")
    arrays = isinstance(spec, list | tuple | Mapping | np.ndarray) or hasattr(spec, "detach")
    if arrays or labels is not None:
        return "arrays", open_arrays, ("labels", "least")
    foreign = isinstance(spec, bytes | bytearray | memoryview | range) or hasattr(spec, "iloc")
    if hasattr(spec, "__getitem__") and hasattr(spec, "__len__") and not foreign:
        return "a torchvision-style data set", open_map, ("least",)
    more = "; pass its `.dataset`" if hasattr(spec, "dataset") else ""  # of a DataLoader
    if hasattr(spec, "iloc"):
        more = "; pass (table['path'].tolist(), table['label'])"
    raise DatasetError(f"It is a {type(spec).__name__}{more}. A data set is one of: {_FORMS}.")
