"""WebDataset shards: tar files of images and labels, read where they lie, never unpacked.

A sample is what shares its name up to the first dot: ``000017.jpg`` and ``000017.cls``, or
``000017.json`` with a field of the label. Without either the labels are the folders in the tar.
Opening reads the headers and the labels; an image is read when it is its turn, so that a sample of
a large data set costs what the sample costs.
"""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sfda_tune.data.checks import DatasetError, NoPartError, absolute, close_matches, pick
from sfda_tune.data.dataset import ImageDataset
from sfda_tune.data.decoding import Member
from sfda_tune.data.folders import is_image
from sfda_tune.data.labels import encode, natural_key
from sfda_tune.data.parts import choose, part_of
from sfda_tune.data.several import check_labels, encode_rows
from sfda_tune.data.tables import LABEL_COLUMNS
from sfda_tune.values.text import one_line, printable, some

__all__ = ["find_shards", "is_shards", "open_shards"]

LARGEST = 1 << 20  # bytes of a label


@dataclass
class _Sample:
    """The members of one sample, by what follows the first dot of their names."""

    key: str
    members: dict[str, Member]


def is_shards(path: str) -> bool:
    """Whether a path is a tar file, a pattern of such, or a folder that holds them and no others.

    >>> is_shards("train-{000..127}.tar"), is_shards("train-*.tar"), is_shards("photos")
    (True, True, False)
    """
    if path.endswith(".tar"):
        return True
    if not os.path.isdir(path):
        return False
    inside = [entry for entry in os.scandir(path) if not entry.name.startswith(".")]
    return any(e.name.endswith(".tar") for e in inside) and not any(e.is_dir() for e in inside)


def find_shards(spec: str) -> list[str]:
    """Return the files that a path, a folder, or a pattern with ``*`` or ``{000..127}`` means."""
    path = absolute(spec)
    if os.path.isdir(path):
        found = [os.path.join(path, name) for name in os.listdir(path) if name.endswith(".tar")]
    else:
        found = []
        for one in expand_braces(path):
            magic = glob.has_magic(one) and not os.path.exists(one)
            found += glob.glob(one, recursive=True) if magic else [one]
    missing = [path for path in found if not os.path.isfile(path)]
    if missing or not found:
        what = missing[0] if missing else path
        raise DatasetError(f"There is no file {what!r}{close_matches(what)}.")
    return sorted(dict.fromkeys(found), key=natural_key)


def expand_braces(text: str) -> list[str]:
    """Expand ``{000..127}`` and ``{a,b}``.

    >>> expand_braces("t-{08..10}.tar"), expand_braces("{train,val}.tar")
    (['t-08.tar', 't-09.tar', 't-10.tar'], ['train.tar', 'val.tar'])
    """
    found = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", text)
    if not found:
        return [text]
    first, last, listed = found.groups()
    if listed is None:
        step = 1 if int(first) <= int(last) else -1
        numbers = range(int(first), int(last) + step, step)
        if len(numbers) > 1_000_000:
            raise DatasetError(f"`spec` must name at most a million shards but is {text!r}.")
        inside = [str(n).zfill(len(first)) for n in numbers]
    else:
        inside = listed.split(",")
    before, after = text[: found.start()], text[found.end() :]
    return [before + one + rest for one in inside for rest in expand_braces(after)]


def open_shards(
    spec: Any,
    split: str | None,
    image_column: str | None,
    label_column: str | None,
    least: int,
    task: str | None = None,
) -> ImageDataset:
    """Open tar files; `image_column` and `label_column` are endings of names, or JSON fields."""
    paths = find_shards(os.fspath(spec))
    name = printable(os.path.basename(os.path.dirname(paths[0]) or "shards"))
    if len(paths) == 1:
        name = printable(os.path.basename(paths[0]).removesuffix(".tar"))
    where = f"{len(paths)} shards, from {paths[0]!r}," if len(paths) > 1 else f"Shard {paths[0]!r}"
    named = {path: _stem(path) for path in paths}
    parts = {stem: part_of(stem) for stem in named.values()}
    if any(parts.values()) and len(parts) > 1:
        chosen = pick(choose, parts, split, where)
        paths = [path for path in paths if named[path] in chosen]
        name += "" if split is None or parts[chosen[0]] == "train" else f"/{split}"
    elif split not in (None, "all") and part_of(str(split)) not in parts.values():
        raise NoPartError(
            f"`split` can only be used if the names of shards say their part, as train-000.tar "
            f"and val-000.tar do, but {where} has {some(map(repr, parts))}; leave `split` out."
        )
    samples = [sample for path in paths for sample in _read_samples(path)]
    endings = list(dict.fromkeys(ending for sample in samples for ending in sample.members))
    image = _find_image(samples, image_column, endings, where)
    if lacking := [sample.key for sample in samples if image(sample) is None]:
        warnings.warn(
            f"{where}: samples without an image are left out: {len(lacking)} ({some(lacking)}).",
            stacklevel=2,
        )
        samples = [sample for sample in samples if image(sample) is not None]
    labels = _read_labels(samples, label_column, endings, where)
    items = [image(sample) for sample in samples]
    what = f"{where} the labels"
    if task == "multilabel":
        codes, classes = check_labels(encode_rows(labels, what), least, what)
    else:
        codes, classes = encode(labels, what, least=least, unit="sample", task=task)
    return ImageDataset(name, items, codes, classes, np.arange(len(items)))


def _stem(path: str) -> str:
    """Return the name of a shard without its number."""
    return re.sub(r"[-_.]*\d*(-of-\d+)?\.tar$", "", os.path.basename(path)) or "shard"


def _read_samples(path: str) -> Iterator[_Sample]:
    """Yield the samples of one tar file, in its order; only headers are read."""
    found: dict[str, _Sample] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                folder, _, base = member.name.removeprefix("./").rpartition("/")
                if not member.isreg() or base.startswith(".") or folder.startswith("__MACOSX"):
                    continue
                key, _, ending = base.partition(".")
                key = f"{folder}/{key}" if folder else key
                sample = found.setdefault(key, _Sample(key, {}))
                sample.members[ending.lower()] = Member(
                    path, member.offset_data, member.size, member.name
                )
    except tarfile.TarError as error:
        hint = "; is it compressed? unpack it to a plain .tar" * (not found)
        raise DatasetError(f"{path!r} is no whole tar file: {one_line(error)}{hint}.") from None
    yield from found.values()


def _find_image(
    samples: list[_Sample], given: str | None, endings: list[str], where: str
) -> Callable[[_Sample], Member | None]:
    """Return what finds the image of a sample, None where it has none."""
    known = [ending for ending in endings if is_image(f"image.{ending}")]
    if given is not None:
        if given.lower() not in endings:
            raise DatasetError(
                f"`image_column` must be one of the endings of {where} "
                f"{some(map(repr, endings))}, but is {given!r}."
            )
        known = [given.lower()]
    if not known:
        raise DatasetError(
            f"{where} must hold images, such as 000017.jpg, but has {some(map(repr, endings))}."
        )
    for sample in samples:
        if len(several := [ending for ending in known if ending in sample.members]) > 1:
            raise DatasetError(
                f"{where} must have one image to a sample, but {sample.key!r} has "
                f"{some(map(repr, several))}; name the one to be used: "
                f"image_column={several[0]!r} (--image-column {several[0]})."
            )
    return lambda sample: next((m for e in known if (m := sample.members.get(e))), None)


def _read_labels(
    samples: list[_Sample], given: str | None, endings: list[str], where: str
) -> list[Any]:
    if given is not None and given.lower() in endings and given.lower() != "json":
        return [_text(sample.members.get(given.lower())) for sample in samples]
    if given is None and "cls" in endings:
        return [_text(sample.members.get("cls")) for sample in samples]
    if "json" in endings:
        fields = [_fields(sample.members.get("json"), where) for sample in samples]
        wanted = LABEL_COLUMNS if given is None else (given,)
        for name in wanted:
            if any(name in field for field in fields):
                return [field.get(name) for field in fields]
        if given is not None:
            known = some(map(repr, dict.fromkeys(k for field in fields[:100] for k in field)))
            raise DatasetError(
                f"`label_column` must be a field of the .json of {where}, one of {known}, or an "
                f"ending, but is {given!r}."
            )
    if given is None and samples and all("/" in sample.key for sample in samples):
        return [sample.key.split("/")[-2] for sample in samples]
    raise DatasetError(
        f"{where} must hold labels: a .cls, or a .json with one of the fields "
        f"{', '.join(LABEL_COLUMNS)}, beside each image, or a folder for each class in the tar, "
        f"but has {some(map(repr, endings))}; pass label_column (--label-column) for another "
        "ending or field."
    )


def _text(member: Member | None) -> str | None:
    if member is None or member.size > LARGEST:
        return None
    return member.read().decode("utf-8", "backslashreplace").strip()


def _fields(member: Member | None, where: str) -> Mapping[str, Any]:
    if member is None or member.size > LARGEST:
        return {}
    try:
        found = json.loads(member.read())
    except (ValueError, RecursionError) as error:
        raise DatasetError(
            f"{member.name!r} of {where} must be JSON: {one_line(error)}."
        ) from None
    return found if isinstance(found, Mapping) else {}
