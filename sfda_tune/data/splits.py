"""The images of a search: for training, validation and test; and what it writes about them."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from sfda_tune.data.checks import DatasetError, NoPartError
from sfda_tune.data.copies import group_twins, shared_images
from sfda_tune.data.dataset import ImageDataset
from sfda_tune.data.groups import merge_codes
from sfda_tune.data.huggingface import is_stream
from sfda_tune.data.near import MOST, shared_near
from sfda_tune.data.opening import open_dataset, open_part
from sfda_tune.values.labels import NOUNS, find_varied
from sfda_tune.values.text import some

__all__ = [
    "fingerprint", "hold_out", "join", "match_labels", "open_own_part", "open_parts", "relabel",
    "split_images", "tell_gaps", "tell_shared",
]  # fmt: skip

COLUMNS = (
    "image_column", "label_column", "label_columns", "label_delimiter", "levels", "groups",
    "split_column", "time_column", "bit_depth", "bands",
)  # fmt: skip

FEW = 10  # images, of which one more or less moves an accuracy by 10 points or more
HELD_OUT = 0.2  # of the images for the test, then of the others for validation


def split_images(
    g: Mapping[str, Any],
    look: Callable[[Mapping[str, ImageDataset]], tuple[Mapping[str, np.ndarray], Any]]
    | None = None,
) -> tuple[dict[str, ImageDataset], dict[str, list[int]], dict[str, str]]:
    """Return the parts "train", "val" and "test", their rows, and where each is from.

    The data set's own parts, where it has them; else stratified ones. `g` are arguments of
    `sfda_tune.search`. What is opened goes through `look`, which returns the rows to use, and
    what `group_twins` would of the training images (None: not known).
    """
    with _say_once():
        opened, sources = open_parts(g)
    kept = {name: np.arange(len(part)) for name, part in opened.items()}
    usable, twins = look(opened) if look else ({}, None)
    kept |= usable
    whole, rest = opened["train"], kept["train"]
    parts: dict[str, ImageDataset] = {}
    rows: dict[str, list[int]] = {}
    fraction = g["test"] if isinstance(g["test"], float) else HELD_OUT
    twins = group_twins(whole) if twins is None else twins
    for name, share in (("test", fraction), ("val", HELD_OUT)):
        if name in opened:
            parts[name] = relabel(opened[name].subset(kept[name]), whole)
            rows[name] = kept[name].tolist()
            continue
        rest, out = hold_out(whole, rest, share, g["seed"], twins)
        parts[name], rows[name] = whole.subset(out), out.tolist()
        sources[name] = "held out"
    parts["train"], rows["train"] = whole.subset(rest), rest.tolist()
    empty = [name for name, part in parts.items() if len(part) == 0]
    if empty:
        raise DatasetError(f"`dataset` leaves no images for {empty[0]}; give it more images.")
    for name, part in parts.items():
        if whole.task in ("regression", "ordinal") and part.labels.min() == part.labels.max():
            what = NOUNS.get(whole.task, "numbers")
            raise DatasetError(
                f"`dataset` must have different {what} in each part, but the images for {name}, "
                f"{len(part)}, all have {part.label_name(part.labels[0])}; give it more images."
            )
        least = 2 if name == "train" else 1  # to choose the penalty of the head by
        if whole.task == "multilabel" and not find_varied(part.labels, least).any():
            raise DatasetError(
                f"`dataset` must have a label in each part that {least} or more images have and "
                f"others do not, but among the {len(part)} images for {name} there is none; give "
                "it more images."
            )
    return parts, rows, sources


@contextmanager
def _say_once() -> Iterator[None]:
    """Let a warning through once: each part that is opened says what holds for all of them."""
    said: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            yield
    finally:
        for w in {(str(w.message), w.category): w for w in said}.values():
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)


def open_parts(g: Mapping[str, Any]) -> tuple[dict[str, ImageDataset], dict[str, str]]:
    """Open the images to train on, and those for validation and test that are not held out.

    `g` are arguments of `sfda_tune.search`; no test images are looked for if its ``test`` is a
    share. Return also where each part is from.
    """
    if is_stream(g["dataset"]):
        raise DatasetError(
            "`dataset` must not be a stream for a search, which shows each image many times; draw "
            "images first: search(open_dataset('hf-stream:NAME', samples=2000), …)."
        )
    columns: dict[str, Any] = {name: g.get(name) for name in COLUMNS}
    whole = open_dataset(g["dataset"], split=g["split"], **columns, task=g.get("task"))
    task = whole.task if g.get("task") or whole.task != "classification" else None
    if whole.ordered:  # its own parts may lack some
        columns["levels"] = whole.classes
    share = 1.0 if g["samples"] is None else min(1.0, g["samples"] / len(whole))
    whole = whole if g["samples"] is None else whole.sample(g["samples"], g["seed"])
    parts, sources = {"train": whole}, {"train": "own part" if g["split"] else "all images"}
    if isinstance(columns["groups"], list | tuple | np.ndarray):  # of the images above only
        del columns["groups"]
    own = ["val"] + ["test"] * (g["test"] is None) if g["split"] is None else []
    for name in own:
        part = open_own_part(g["dataset"], name, **columns, task=task)
        if part is not None:
            if share < 1:  # `samples` are of the training images, and the others in proportion
                n = max(len(np.unique(part.strata)), round(share * len(part)))
                part = part.sample(min(n, len(part)), g["seed"])
            parts[name], sources[name] = part, "own part"
            sources["train"] = "own part"
    if g["test"] is not None and not isinstance(g["test"], float):
        parts["test"], sources["test"] = open_part(g["test"], **columns, task=task), "given"
    if g.get("time_column") is not None and {"val", "test"} <= set(parts):
        warnings.warn(
            f"`time_column` {g['time_column']!r} has no effect: the data set has its own "
            "validation and test parts; pass split='train' (--split train) to hold out the latest",
            stacklevel=2,
        )
    return parts, sources


def open_own_part(spec: Any, name: str, **columns: Any) -> ImageDataset | None:
    """Open the part "val" or "test" of a data set; None if it has none.

    A part that is there but cannot be used is a DatasetError: the user meant it to be used.
    """
    try:
        return open_part(spec, name, **columns)
    except NoPartError:
        return None
    except DatasetError as error:
        instead = "test=0.2 (--test 0.2)" if name == "test" else "split='train' (--split train)"
        raise DatasetError(
            f"`dataset` has a part {name!r} that cannot be used: {error} Fix it, or pass "
            f"{instead} to hold out training images instead."
        ) from error


def hold_out(
    whole: ImageDataset, rest: np.ndarray, share: float, seed: int, twins: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return which of the rows `rest` stay and which go; copies of one image go together.

    So do groups. Stratified, as well as groups permit; where the images have times, the latest go.
    """
    if whole.group_codes is not None:
        units = merge_codes(twins, whole.group_codes)
        if whole.times is None:
            return _hold_out_groups(whole, rest, share, seed, units)
        return _hold_out_latest(whole, rest, share, units)
    if whole.times is not None:
        return _hold_out_latest(whole, rest, share, twins)
    first = np.sort(rest[np.unique(twins[rest], return_index=True)[1]])
    units, n = whole.subset(first), round(len(first) * (1 - share))
    if n < len(np.unique(units.strata)):
        if whole.task in ("regression", "ordinal"):
            what = NOUNS.get(whole.task, "numbers")
            raise DatasetError(
                f"`dataset` has too few images for a search: {len(first)} different ones; {what} "
                "need 20 or more, to train, to validate and to test. Add images, or only rank the "
                "backbones (`sfda-tune rank`)."
            )
        if whole.task == "multilabel":
            raise DatasetError(
                f"`dataset` has too few images for a search: {len(first)} different ones for "
                f"{len(whole.classes)} labels; each label needs 3 or more, to train, to validate "
                "and to test, better 20. Add images, leave rare labels out, or only rank the "
                "backbones (`sfda-tune rank`)."
            )
        smallest = whole.classes[int(np.argmin(np.bincount(whole.labels, minlength=1)))]
        raise DatasetError(
            f"`dataset` has too few images for a search: {len(whole)} in {len(whole.classes)} "
            f"classes, {smallest!r} has {np.bincount(whole.labels).min()}; each class needs 3 or "
            "more different ones, to train, to validate and to test, better 20. Add images, leave "
            "small classes out, or only rank the backbones (`sfda-tune rank`)."
        )
    stays = np.isin(twins[rest], twins[first[units.sample_rows(n, seed)]])
    return rest[stays], rest[~stays]


def _hold_out_groups(
    whole: ImageDataset, rest: np.ndarray, share: float, seed: int, units: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Hold out one of several folds of whole groups: the one most like all images.

    Best is a fold that takes no class as a whole, then one that lacks no class, then the one with
    the smallest χ² of its classes. Of numbers, their tenths are such classes, but may be taken;
    so may the rarest labels of images that have several.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    # numbered by their first rows: another numbering would be another seed
    _, first, of = np.unique(units[rest], return_index=True, return_inverse=True)
    y, of = whole.strata[rest], np.argsort(np.argsort(first))[of]
    n_c = np.bincount(y, minlength=max(len(whole.classes), int(whole.strata.max()) + 1))
    k = min(max(2, round(1 / share)), len(np.unique(of)), int(n_c.max()))
    best: tuple[Any, ...] | None = None
    for i in range(10 if k > 1 else 0):
        folds = StratifiedGroupKFold(k, shuffle=True, random_state=seed + i)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # classes smaller than the number of folds
            parts = [out for _, out in folds.split(y, y, of)]
        for out in parts:
            out_c = np.bincount(y[out], minlength=len(n_c))
            lost, missing = (n_c > 0) & (out_c == n_c), (n_c > 0) & (out_c == 0)
            square = float(((out_c - share * n_c) ** 2 / np.maximum(n_c, 1)).sum())
            key = (int(lost.sum()), int(missing.sum()), square)
            if len(out) and (best is None or key < best[0]):
                best = key, out, lost
    if best is None or (best[0][0] and whole.task == "classification"):
        alone = "all images" if best is None else some(np.array(whole.classes)[best[2]])
        raise DatasetError(
            f"`groups` are too few for a split: {len(np.unique(of))} groups hold {len(rest)} "
            f"images, and {alone} would be in one part only. Each class needs images in 3 or more "
            "groups, to train, to validate and to test; add some, name smaller groups, leave the "
            "class out, or only rank the backbones (`sfda-tune rank`)."
        )
    goes = np.isin(np.arange(len(rest)), best[1])
    return rest[~goes], rest[goes]


def _hold_out_latest(
    whole: ImageDataset, rest: np.ndarray, share: float, units: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Hold out the latest images; a group is as late as its last one."""
    assert whole.times is not None
    _, of = np.unique(units[rest], return_inverse=True)
    last = np.full(of.max() + 1, -np.inf)
    np.maximum.at(last, of, whole.times[rest])
    late = np.sort(last[of])[round(len(rest) * (1 - share)) :]
    goes = last[of] >= (late[0] if len(late) else np.inf)
    new: Any = []
    if whole.task == "classification":
        new = np.setdiff1d(whole.labels[rest[goes]], whole.labels[rest[~goes]])
    if goes.all() or not goes.any() or len(new):
        what = some(whole.classes[c] for c in new) if len(new) else "the images"
        of_every, or_class = (" of every class", ", or the class") if len(new) else ("", "")
        raise DatasetError(
            f"`time_column` (--time-column) must leave earlier images{of_every} to train on, but "
            f"of {what} there are none before the last {share:.0%}; leave the column out"
            f"{or_class}."
        )
    return rest[~goes], rest[goes]


def tell_shared(
    parts: Mapping[str, ImageDataset],
    pixels: Mapping[str, Sequence[str]] | None = None,
    store: Any = None,
) -> list[str]:
    """Say which validation images are training images as well, and which test images either.

    For the winner is chosen by the former, and trained on both at the end. Where they are known,
    by the digests of their `pixels`; what they show in the small is taken from the `store`, or
    noted there.
    """
    said = []
    names = {"train": "training", "val": "validation", "test": "test"}
    few = sum(map(len, parts.values())) <= MOST
    alike = shared_near([parts[key] for key in names], store) if few else []
    for k, (key, name) in enumerate(names.items()):
        images, before = parts[key], [*names][:k]
        found: dict[str, set[Any]] = {}
        for other in before:
            both = None if pixels is None else (pixels[other], pixels[key])
            found[names[other]] = set(shared_images(parts[other], images, both))
        shared, where = _gather(found)
        if shared:
            said.append(
                f"{len(shared)} of {len(images)} {name} images "
                f"{'is' if len(shared) == 1 else 'are'} among the {where} images, too "
                f"({images.item_name(shared[0])}{', …' * (len(shared) > 1)}): numbers on them are "
                "too good; remove them from one side"
            )
        near, where = _gather(
            {names[o]: alike[k][i] - {*shared} for i, o in enumerate(before) if few}
        )
        if near:
            said.append(
                f"{len(near)} of {len(images)} {name} images nearly equal {where} images "
                f"({some(map(images.item_name, near))}): numbers on them are too good; remove "
                "them from one side, or name groups"
            )
        groups, where = _gather({names[o]: _shared_groups(parts[o], images) for o in before})
        if groups:
            assert images.groups is not None
            n = int(np.isin(images.groups, groups).sum())
            said.append(
                f"{n} of {len(images)} {name} images {'is' if n == 1 else 'are'} of groups that "
                f"the {where} images have, too ({some(groups)}): numbers on them are too good; "
                "keep each group on one side"
            )
    return said


def _shared_groups(a: ImageDataset, b: ImageDataset) -> set[Any]:
    return set() if a.groups is None or b.groups is None else {*a.groups} & {*b.groups}


def _gather(found: Mapping[str, set[Any]]) -> tuple[list[Any], str]:
    """Return all that is found, and the names of the parts where something is."""
    return sorted(set().union(*found.values())), " or ".join(o for o in found if found[o])


def tell_gaps(parts: Mapping[str, ImageDataset]) -> list[str]:
    """Say where the validation or the test images are few, or lack a class.

    Of numbers, how many are beyond all that are trained on. Of several labels, which cannot be
    judged there, or have no image to be learned from.
    """
    said = []
    if parts["train"].task == "multilabel":
        return _tell_label_gaps(parts)
    known = parts["train"].labels
    for name, images in (("validation", parts["val"]), ("test", parts["test"])):
        n, present = len(images), np.unique(images.labels)
        beyond = int(((images.labels < known.min()) | (images.labels > known.max())).sum())
        if not images.classes and beyond:
            said.append(
                f"of {n} {name} images, {beyond} with numbers beyond those that are trained on, "
                f"{known.min():g} to {known.max():g}: nothing tells the network of such"
            )
        missing = (
            []
            if not images.classes
            else [images.classes[c] for c in np.setdiff1d(parts["train"].labels, present)]
        )
        if missing:
            names = some(missing)
            all_of = f"all {n} are of {images.classes[present[0]]}: " * (len(present) == 1)
            said.append(
                f"there is no {name} image of {names}: {all_of}{name} numbers say nothing of "
                f"{'it' if len(missing) == 1 else 'them'}"
            )
        said += _tell_few(name, n)
    return said


def _tell_label_gaps(parts: Mapping[str, ImageDataset]) -> list[str]:
    train, said = parts["train"], []
    learned = (train.labels == 1).any(axis=0)
    if not learned.all():
        names = some(np.array(train.classes)[~learned])
        said.append(f"no training image is known to have {names}: it cannot be learned")
    for name, images in (("validation", parts["val"]), ("test", parts["test"])):
        lost = learned & ~find_varied(images.labels)
        if lost.any():
            names = some(np.array(train.classes)[lost])
            said.append(
                f"no two {name} images are known of which one has and one lacks {names}: {name} "
                f"numbers say nothing of {'it' if lost.sum() == 1 else 'them'}"
            )
        said += _tell_few(name, len(images))
    return said


def _tell_few(name: str, n: int) -> list[str]:
    if n >= FEW:
        return []
    few = "is only one" if n == 1 else f"are only {n}"
    return [f"there {few} {name} image{'s' * (n > 1)}: numbers on so few are rough"]


def fingerprint(parts: Mapping[str, ImageDataset]) -> str:
    """Return a digest of all labels, and of at most 1,000 images of each part."""
    found: list[list[Any]] = []
    for name, part in parts.items():
        rows = np.unique(np.linspace(0, len(part) - 1, 1000).astype(int))
        found.append([name, part.labels.tolist(), list(part.classes), part.digests(rows)])
        found[-1] += [] if part.groups is None else [part.groups.tolist()]
        found[-1] += [] if part.times is None else [part.times.tolist()]
    return hashlib.blake2b(json.dumps(found).encode(), digest_size=16).hexdigest()


def relabel(data: ImageDataset, like: ImageDataset) -> ImageDataset:
    """Give images of a part the codes, or the columns, that their classes have in another part.

    Of several labels, those that the part lacks are not known there; those that none of its
    images has are left out.
    """
    if data.task != like.task:
        raise DatasetError(
            f"{data.name!r} must have labels for {like.task}, as the training images, but is "
            f"{data!r}; open it with task={like.task!r}."
        )
    if not like.classes or data.classes == like.classes:
        return data
    code = {name: c for c, name in enumerate(like.classes)}
    unknown = [name for name in data.classes if name not in code]
    if data.task == "multilabel":
        has = dict(zip(data.classes, (data.labels == 1).any(axis=0), strict=True))
        unknown = [name for name in unknown if has[name]]
    if unknown:
        raise DatasetError(
            f"{data.name!r} has classes that the training images lack: {some(unknown)}; "
            "remove them, or add training images."
        )
    if data.task == "multilabel":
        labels = match_labels(data, like.classes)
    else:
        labels = np.array([code[data.classes[c]] for c in data.labels])
    return replace(data, labels=labels, classes=like.classes)


def match_labels(data: ImageDataset, classes: Sequence[str]) -> np.ndarray:
    """Return the columns of several labels under other names; −1 for those that are lacking."""
    columns = dict(zip(data.classes, data.labels.T, strict=True))
    unknown = np.full(len(data), -1, np.int8)
    return np.stack([columns.get(name, unknown) for name in classes], axis=1)


def join(a: ImageDataset, b: ImageDataset) -> ImageDataset:
    """Return the images of both; `b` has the classes of `a`."""
    labels = np.concatenate([a.labels, b.labels])
    origin = np.concatenate([a.origin, b.origin])
    groups = None
    if a.groups is not None and b.groups is not None:
        groups = np.concatenate([a.groups, b.groups])
    return replace(
        a, items=[*a.items, *b.items], labels=labels, origin=origin, groups=groups, times=None
    )
