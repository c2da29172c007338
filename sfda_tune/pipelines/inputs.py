"""`Inputs`: what the arguments of a search stand for, opened: images, backbones, space, engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sfda_tune.backbones.devices import resolve_device
from sfda_tune.backbones.specs import resolve_backbones
from sfda_tune.data.checks import DatasetError
from sfda_tune.data.copies import group_twins
from sfda_tune.data.dataset import ImageDataset
from sfda_tune.data.groups import merge_codes
from sfda_tune.data.near import find_near, near_codes
from sfda_tune.data.splits import fingerprint, split_images
from sfda_tune.extraction.store import open_cache
from sfda_tune.finetuning.images import look_at
from sfda_tune.finetuning.shared import SharedWork
from sfda_tune.finetuning.tasks import make_task
from sfda_tune.pipelines.config import SearchConfig
from sfda_tune.pipelines.engines import Engine, load_engine
from sfda_tune.pipelines.spaces import Space, default_space, open_space
from sfda_tune.values.features import Backbone

__all__ = ["Inputs", "Survey", "open_inputs", "read_usable"]


@dataclass(frozen=True)
class Survey:
    """What the images are like; they are looked at once, when the search begins."""

    unreadable: Mapping[str, Mapping[int, str]]  # part → row → why
    names: Mapping[str, str]  # of these images → why
    pixels: Mapping[str, Sequence[str]]  # part → digest of each image
    twins: np.ndarray  # a code for each training image, see `group_twins`


@dataclass(frozen=True)
class Inputs:
    """What a search works on: its arguments, and what they stand for."""

    config: SearchConfig
    parts: Mapping[str, ImageDataset]  # "train", "val" and "test"
    rows: Mapping[str, Sequence[int]]  # of the data set
    sources: Mapping[str, str]  # where each part is from
    fingerprint: str  # of the parts
    survey: Survey | None  # None if an earlier call has looked at the images
    backbones: Mapping[str, Backbone]  # all candidates
    space: Space
    n_epochs: int  # of a full trial
    engine: Engine
    device: str
    shared: SharedWork = field(default_factory=SharedWork, repr=False)  # of all fine-tunings


def open_inputs(
    config: SearchConfig, splits: Mapping[str, Any] | None, check: Callable[[], None] | None = None
) -> Inputs:
    """Open what a search works on; `splits` is what splits.json holds, None if it begins.

    Then all images are read once; `check` is called before each, and may raise.
    """
    space = None if config.space is None else open_space(config.space)
    found = resolve_backbones(config.backbones, plugins=config.plugins)
    engine = load_engine(config.engine)
    surveys: list[Survey] = []

    def find_usable(opened: Mapping[str, ImageDataset]) -> tuple[dict[str, np.ndarray], Any]:
        """Return the rows that can be read, and the twins among the training images."""
        if splits is not None:
            return read_usable(splits, opened)
        surveys.append(_look(opened, config, check))
        return _leave_out(surveys[0].unreadable, opened), surveys[0].twins

    parts, rows, sources = split_images(vars(config), find_usable)
    n = len(parts["train"])
    space = space or default_space(n, parts["train"].task)
    space.check(make_task(parts["train"]))
    if config.loss is not None and "loss" in space.to_dict():
        raise ValueError(f"`loss` {config.loss!r} stands in `space`, too; leave one of them out.")
    auto = max(5, round(30 * min(1, 200 / n) ** (1 / 3)))
    return Inputs(
        config, parts, rows, sources, fingerprint(parts), surveys[0] if surveys else None,
        backbones={b.name: b.taking(parts["train"].channels) for b in found}, space=space,
        engine=engine,
        n_epochs=config.epochs or max(3, round(auto / 2)), device=resolve_device(config.device),
    )  # fmt: skip


def read_usable(
    splits: Mapping[str, Any], opened: Mapping[str, ImageDataset]
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Return what `split_images` asks for, from what splits.json holds of an earlier look."""
    twins = _read_twins(splits, len(opened["train"]))
    return _leave_out(splits.get("left_out", {}), opened), twins


def _leave_out(
    bad: Mapping[str, Any], opened: Mapping[str, ImageDataset]
) -> dict[str, np.ndarray]:
    return {
        name: np.setdiff1d(np.arange(len(data)), list(bad.get(name, ())))
        for name, data in opened.items()
    }


def _look(
    opened: Mapping[str, ImageDataset], config: SearchConfig, check: Callable[[], None] | None
) -> Survey:
    """Look at all images; refuse the data set if too many cannot be read."""
    seen = {name: look_at(data, check, config.decoders) for name, data in opened.items()}
    bad = {name: unreadable for name, (unreadable, _) in seen.items()}
    pixels = {name: digests for name, (_, digests) in seen.items()}
    names = {opened[name].item_name(row): why for name in bad for row, why in bad[name].items()}
    n, total = sum(map(len, bad.values())), sum(map(len, opened.values()))
    if n > config.max_unreadable * total:
        item, why = next(iter(names.items()))
        raise DatasetError(
            f"{n} of the {total} images cannot be read, more than "
            f"max_unreadable={config.max_unreadable:g} allows; the first is {item} ({why})"
        )
    twins = group_twins(opened["train"], pixels["train"])
    near = find_near(opened["train"], open_cache(config.cache))
    if near is not None and near.pairs:
        twins = merge_codes(twins, near_codes(len(twins), near.pairs))
    return Survey(bad, names, pixels, twins)


def _read_twins(splits: Mapping[str, Any], n: int) -> np.ndarray | None:
    if "copies" not in splits:  # an earlier version compared bytes
        return None
    twins = np.arange(n)
    for rows in splits["copies"]:
        twins[rows] = rows[0]
    return twins
