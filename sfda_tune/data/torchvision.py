"""Map-style data sets, as torchvision and torch have them."""

from __future__ import annotations

import copy
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from sfda_tune.data.arrays import as_item
from sfda_tune.data.checks import DatasetError
from sfda_tune.data.dataset import ImageDataset
from sfda_tune.data.folders import is_image
from sfda_tune.data.labels import class_name, encode
from sfda_tune.data.several import check_labels, encode_rows
from sfda_tune.values.text import one_line

logger = logging.getLogger(__name__)


def _map_item(dataset: Any, row: int) -> Any:
    return as_item(dataset[row][0], "the image")


def _bare(dataset: Any, rows: Sequence[int], name: str) -> Any:
    """Check the first image that can be read; drop a transform that returns tensors.

    A data set of the wrong form is reported now, not once per image. Each backbone has a
    preprocessing of its own, to which the user's would be added; a transform from image to image
    (a crop to the region of interest) is kept.
    """
    problem = None
    for row in rows:
        try:
            image, _ = dataset[row]
        except Exception as error:  # perhaps this one image is damaged
            problem = f"raises {type(error).__name__}: {one_line(error)}"
            continue
        what = f"`spec[{row}]`, an image of {name},"
        if getattr(dataset, "transform", None) and not isinstance(image, Image.Image):
            with suppress(Exception):  # its images may be none without the transform
                copied = copy.copy(dataset)
                copied.transform = copied.transforms = None
                image, dataset = as_item(copied[row][0], what), copied
                logger.info("%s: its transform is not applied", name)
        as_item(image, what)
        return dataset
    if problem:
        raise DatasetError(f"`spec[row]` must be a pair (image, label), but {name} {problem}")
    return dataset


def _map_labels(dataset: Any, name: str) -> Sequence[Any]:
    """All labels: of an attribute, else by reading every image."""
    for attribute in ("targets", "labels", "_labels"):
        labels: Any = getattr(dataset, attribute, None)
        labels = labels.tolist() if hasattr(labels, "tolist") else labels  # arrays and tensors
        if isinstance(labels, list | tuple) and len(labels) == len(dataset):
            return labels
    logger.info("%s has no `targets`: every image is read once for its label", name)
    try:
        return [dataset[row][1] for row in range(len(dataset))]
    except Exception as error:
        raise DatasetError(
            f"{name} must have an attribute `targets` with all labels, because reading them image "
            f"by image fails with {type(error).__name__}: {one_line(error)}"
        ) from error


def open_map(dataset: Any, least: int, task: str | None = None) -> ImageDataset:
    """Open anything with a length whose items are pairs of image and label."""
    rows = list(range(len(dataset)))
    torch = sys.modules.get("torch")  # whoever has a Subset has imported it
    while torch is not None and type(dataset) is torch.utils.data.Subset:
        rows = [int(dataset.indices[row]) for row in rows]
        dataset = dataset.dataset
    name = type(dataset).__name__
    pairs: Any = getattr(dataset, "samples", None)  # of ImageFolder and its like
    if (
        isinstance(pairs, list)
        and pairs
        and isinstance(pairs[0], tuple)
        and is_image(str(pairs[0][0]))
    ):
        labels = [label for _, label in pairs]
        items: Any = [os.path.abspath(pairs[row][0]) for row in rows]
    else:
        bare = _bare(dataset, rows, name)
        labels = _map_labels(bare, name)
        items = [partial(_map_item, bare, row) for row in rows]
    names: Any = getattr(dataset, "classes", None)
    labels = [labels[row] for row in rows]
    if convert := getattr(dataset, "target_transform", None):
        names, labels = None, [convert(label) for label in labels]
    names = names if isinstance(names, list | tuple) else None
    where = f"The labels of {name}"
    if task == "multilabel":
        y, found = check_labels(encode_rows(labels, where), least, where)
        named = names is not None and len(names) == len(found) and found[0] == "label 0"
        found = tuple(map(class_name, names)) if named and names else found
        return ImageDataset(name, items, y, found, np.array(rows))
    codes, classes = encode(labels, where, names=names, rows=rows, least=least, task=task)
    return ImageDataset(name, items, codes, classes, np.array(rows))
