"""Folders of images: a sub-folder per class, below parts such as ``train/`` and ``val/``."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from sfda_tune.data.checks import DatasetError, NoPartError, absolute, pick
from sfda_tune.data.dataset import ImageDataset
from sfda_tune.data.groups import FOLDERS, name_groups
from sfda_tune.data.labels import encode, natural_key
from sfda_tune.data.parts import choose, hint_at, part_of
from sfda_tune.values.text import printable, some

__all__ = ["image_files"]

# HEIC is listed although Pillow needs the plug-in pillow-heif for it: photos that are reported as
# unreadable are better than photos that silently do not take part.
EXTENSIONS = frozenset(
    {".apng", ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg"}
    | {".jpg", ".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"}
    | {".dcm", ".dicom", ".nii", ".npy"}
)
_JUNK = {"__MACOSX", "@eaDir"}  # archives of macOS, thumbnails of Synology


def _check_folder_names(names: Iterable[str], where: str) -> None:
    """Refuse class folders without a name of their own."""
    count = Counter(name.strip() for name in dict.fromkeys(names))
    if blank := [name for name in dict.fromkeys(names) if not name.strip()]:
        raise DatasetError(
            f"{where} must have class folders whose names are the classes, but "
            f"{some(map(ascii, blank))} consists of white space; rename it."
        )
    if same := [name for name in dict.fromkeys(names) if count[name.strip()] > 1]:
        raise DatasetError(
            f"{where} must have one folder per class, but {some(map(ascii, same))} differ only "
            "in white space; rename or merge them."
        )


def is_image(path: str) -> bool:
    path = path.lower().removesuffix(".gz") if path.lower().endswith(".nii.gz") else path.lower()
    return os.path.splitext(path)[1] in EXTENSIONS


def _is_run(folder: str) -> bool:
    """Tell the folder of a search (`sfda_tune.pipelines.search`)."""
    return all(os.path.isfile(os.path.join(folder, f)) for f in ("search.json", "config.json"))


def _walk(
    folder: str, entered: Iterable[str] = (), *, silent: bool = False
) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` in natural order, without hidden ones; no folder twice, nor those `entered`.

    What is left out and not hidden is said, unless `silent`.
    """

    def leave_out(name: Any, why: str | None) -> None:
        if not silent:
            warnings.warn(f"{str(name)!r} is left out: {why}", stacklevel=3)

    def fail(error: OSError) -> None:
        leave_out(error.filename, error.strerror)

    seen = {os.path.realpath(path) for path in entered}  # a link up would mix the classes
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        for names in folders, files:
            shown = (n for n in names if not n.startswith(".") and n not in _JUNK)
            names[:] = sorted(shown, key=natural_key)
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        for run in [path for n in folders if _is_run(path := os.path.join(parent, n))]:
            folders.remove(os.path.basename(run))
            leave_out(run, "it is the folder of a search, not of images")
        yield parent, folders, files


def _list(folder: str, *, silent: bool = False) -> tuple[list[str], list[str]]:
    """Names of the sub-folders and files of a folder."""
    found = _walk(folder, silent=silent)
    return next(((folders, files) for _, folders, files in found), ([], []))


def image_files(folder: str | os.PathLike[str]) -> Iterator[str]:
    """Yield the images below a folder in the order in which a data set has them."""
    for parent, _, files in _walk(os.fspath(folder)):
        yield from (os.path.join(parent, name) for name in files if is_image(name))


def _hidden_classes(folder: str) -> list[str]:
    """Return hidden sub-folders that hold images, but for those that programs keep there."""
    with suppress(OSError):
        hidden = [e for e in os.scandir(folder) if e.name.startswith(".") and e.is_dir()]
        return sorted(
            entry.name
            for entry in hidden
            if not re.match(
                r"\.(_|ipynb_checkpoints|thumb|trash|cache|git)", entry.name.casefold()
            )
            and any(is_image(name) for name in os.listdir(entry))
        )
    return []


def _unwrap(folder: str) -> str:
    """Go down where a folder holds nothing but one of its own name, as archives have it."""
    folders, files = _list(folder, silent=True)
    if len(folders) == 1 and folders[0].casefold() == os.path.basename(folder).casefold():
        return folder if any(map(is_image, files)) else _unwrap(os.path.join(folder, folders[0]))
    return folder


def _find_parts(root: str, folders: Sequence[str], split: str | None) -> dict[str, str]:
    """Return the part behind each folder that is one; none if the folders are classes.

    Folders are parts if all have names of parts, one of them "train"; beside others, if there is
    more to it than the name, which may be that of a class: class folders inside.
    """

    def classes(folder: str) -> set[str]:
        return set(_list(_unwrap(os.path.join(root, folder)), silent=True)[0])

    def holds_images(folder: str) -> bool:
        tree = _walk(os.path.join(root, folder), {root}, silent=True)
        return any(is_image(name) for _, _, files in tree for name in files)

    exact = {f: part for f in folders if (part := part_of(f))}
    trains = [f for f, part in exact.items() if part == "train"]
    if trains and len(exact) == len(folders):
        return exact
    inside = {f: classes(f) for f in folders if hint_at(f)}
    split_up = [f for f in trains if any(holds_images(os.path.join(f, c)) for c in inside[f])]
    if split_up and (
        len(set(exact.values())) > 1
        or not any(holds_images(f) for f in folders if f not in exact)
        or (split is not None and part_of(split) == "train")
    ):
        return exact
    for named in exact, {f: part for f in folders if (part := hint_at(f))}:
        if any(
            part != other and inside[f] & inside[g]
            for f, part in named.items()
            for g, other in named.items()
        ):
            return named
    return {}


def open_folder(
    spec: Any, split: str | None, least: int, groups: str | None = None, task: str | None = None
) -> ImageDataset:
    root = absolute(spec)
    name, where = printable(os.path.basename(root) or root), f"Folder {root!r}"
    if _is_run(root):
        raise DatasetError(f"{where} must hold labelled images but is the folder of a search.")
    folders, files = _list(root)
    tops = [root]
    if parts := _find_parts(root, folders, split):
        chosen = pick(choose, parts, split, where)
        if split is not None and parts[chosen[0]] != "train":
            name = f"{name}/{split}"
        elif split == "all":
            name = f"{name}/all"
        tops = [_unwrap(os.path.join(root, c)) for c in chosen]
        beside = [f for f in folders if f not in parts]
        loose = sum(map(is_image, files))
        if beside or loose:
            what = [some(map(repr, beside))] * bool(beside)
            what += [f"{loose} images directly in it"] * bool(loose)
            warnings.warn(
                f"{where} has the parts {some(map(repr, parts))}; left out is what lies beside "
                f"them: {' and '.join(what)}.",
                stacklevel=2,
            )
    elif split not in (None, "all"):
        raise NoPartError(
            f"`split` can only be used if the sub-folders are parts (train, val, test, …) with "
            f"class folders inside, but {where} has {some(map(repr, folders))}; "
            "leave `split` out."
        )
    paths: list[str] = []
    labels: list[str] = []
    empty: list[str] = []
    inside: dict[str, list[str]] = {}
    inner_folders: list[str | None] = []  # the sub-folder of the class in which an image lies
    for top in tops:
        if top != root:
            folders, files = _list(top)
        loose = sum(map(is_image, files))
        if not folders:
            raise DatasetError(
                f"Folder {top!r} must have one sub-folder per class, like "
                f"{os.path.join(top, 'cat', '1.jpg')!r}, but has {loose} images "
                "and no sub-folders; move the images into class folders, or pass a .csv table "
                "with the columns path and label."
            )
        if hidden := _hidden_classes(top):
            text = (
                f"{some(map(repr, hidden))} in {top!r} are left out: hidden folders with images."
            )
            warnings.warn(text, stacklevel=2)
        if loose:
            text = f"{loose} images directly in {top!r} are left out: they are in no class folder."
            warnings.warn(text, stacklevel=2)
        for label in folders:
            found: list[str] = []
            folder = os.path.join(top, label)
            for at, within, names in _walk(folder, {root, top}):
                n_before = len(found)
                found += [os.path.join(at, n) for n in names if is_image(n)]
                below = None if at == folder else os.path.relpath(at, folder).split(os.sep)[0]
                inner_folders += [below] * (len(found) - n_before)
                if at == folder:
                    inside[label] = list(within)
            empty += [] if found else [label]
            if not found:
                inside.pop(label, None)
            paths += found
            labels += [label] * len(found)
    if not paths:
        raise DatasetError(
            f"{where} must hold image files, but its sub-folders ({some(map(repr, empty))}) have "
            f"none; known are {' '.join(sorted(EXTENSIONS))}."
        )
    if empty:
        text = f"class folders without images are left out ({some(map(repr, empty))})"
        warnings.warn(f"{where}: {len(empty)} {text}.", stacklevel=2)
    if groups is None and (doubt := _doubt_classes(inside)):
        warnings.warn(f"{where}: {doubt}", stacklevel=2)
    _check_folder_names(labels, where)
    hint = " Put the images of each class into a sub-folder of their own."
    inner = os.path.join(tops[0], labels[0])
    if len(_list(inner, silent=True)[0]) > 1:
        hint = f" Its sub-folders look like classes: try {inner!r}."
    dataset = ImageDataset(
        name, paths, *encode(labels, where, hint=hint, least=least, folders=True, task=task)
    )
    if groups is None:
        return dataset
    if all(above is None for above in inner_folders):
        raise DatasetError(
            f"`groups` {FOLDERS!r} needs sub-folders inside the classes, such as "
            f"{os.path.join(inner, 'video 1', '1.jpg')!r}, but {where} has none; name the groups "
            "by a pattern (--group-regex) or a table (--group-column)."
        )
    values = [above or path for above, path in zip(inner_folders, paths, strict=True)]
    return replace(dataset, groups=name_groups(values, where))


def _doubt_classes(inside: Mapping[str, Sequence[str]]) -> str:
    """Say if the class folders may be something else, for what they have `inside`."""
    count = Counter(name for names in inside.values() for name in names)
    shared = [name for name, n in count.items() if n > 1]
    if shared:
        these = [label for label, names in inside.items() if set(names) & set(shared)]
    else:
        these = [f for f, names in inside.items() if part_of(f) and len(names) > 1]
        shared = [name for f in these for name in inside[f]]
    if not these:
        return ""
    return (
        f"{some(map(repr, these))} are taken to be classes, but hold sub-folders "
        f"{some(map(repr, shared))}; if those are the classes, pass one of the folders, "
        "`split` if they are parts, or a .csv table of paths and labels."
    )
