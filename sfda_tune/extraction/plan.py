"""What is missing, cut into units that can be computed anywhere."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sfda_tune.backbones import loading
from sfda_tune.backbones.preprocessing import Preprocessing
from sfda_tune.data.dataset import ImageDataset
from sfda_tune.data.decoding import get_switches
from sfda_tune.extraction import pixels
from sfda_tune.extraction.store import Entry
from sfda_tune.values.features import Backbone

__all__ = ["SHARD", "Outcome", "Plan", "Unit"]
# Seconds: to open a network, to fetch one again that made room for others, to decode an image
OPENING, FETCHING, DECODING = 0.2, 5.0, 5e-3
SHARD = 512  # images that a backbone is shown before its features are kept


# One unit of work: one backbone on some shards --------------------------------------------------
@dataclass(frozen=True, eq=False)
class Unit:
    """Everything a worker needs; of each shard the rows of `dataset` that the backbone lacks."""

    backbone: Backbone
    preprocessing: Preprocessing
    dataset: ImageDataset
    run: str
    number: int  # units of the same number share the pixels of `dataset`
    preprocessings: tuple[Preprocessing, ...]
    shards: tuple[tuple[int, np.ndarray], ...]  # index in the plan, rows
    images: tuple[tuple[str, ...], ...]  # their content digests, for the store
    weights: str | None
    max_unreadable: float  # images, in the whole data set
    crashing: Mapping[int, str] = field(default_factory=dict)  # row of `dataset` → why not to read
    retry: bool = False  # then a part may be in the store
    switches: Mapping[str, Any] = field(default_factory=dict)  # Pillow's, see `data.decoding`


@dataclass(eq=False)
class Outcome:
    """What came of a unit; an entry that is in the store need not travel."""

    name: str
    entries: dict[int, Entry] = field(default_factory=dict)
    kept: set[int] = field(default_factory=set)  # shards whose entries the store holds now
    unreadable: dict[int, Mapping[int, str]] = field(default_factory=dict)  # of all entries
    error: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    n_images: int = 0
    n_decoded: int = 0
    weights: str | None = None  # their fingerprint, which was unknown if they had to be fetched
    not_kept: str | None = None  # why the store refused them


# The plan and its execution ---------------------------------------------------------------------
@dataclass(eq=False)
class BackboneJob:
    """One backbone's state while the run goes on."""

    description: loading.Description
    weights: str | None
    key: str | None  # in the store, if the weights are known
    stored: np.ndarray  # rows of the data set that are in the store, a mask
    held: list[tuple[np.ndarray, Entry]] = field(default_factory=list)  # rows that are here
    unkept: list[tuple[np.ndarray, Entry]] = field(default_factory=list)  # and nowhere else
    cached: bool = True
    seconds: dict[str, float] = field(default_factory=dict)

    def lacks(self, crashing: Mapping[int, str]) -> np.ndarray:
        """Return the rows of which nothing is known yet, a mask."""
        lacking = ~self.stored
        lacking[list(crashing)] = False
        for rows, entry in self.held:
            lacking[rows[entry.known]] = False
        return lacking


@dataclass(eq=False)
class Plan:
    """What is missing: which backbones on which rows; cut into units by who runs it."""

    run: str  # unique name
    dataset: ImageDataset
    jobs: dict[str, Any]  # by name of the backbone
    images: list[str]  # content digests
    max_unreadable: float  # images, in the whole data set
    lacking: dict[str, np.ndarray] = field(default_factory=dict)  # backbone → rows, a mask
    failed: set[str] = field(default_factory=set)  # backbones that get no further unit
    # Row of the data set → why it must not be read; an executor adds those it found
    crashing: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shards = cut_shards(list(self.lacking.values()))  # rows of the data set
        self.missing = {  # backbone → shards in which it lacks something
            name: frozenset(s for s, rows in enumerate(self.shards) if lacking[rows].any())
            for name, lacking in self.lacking.items()
        }

    def rows(self, name: str, shard: int) -> np.ndarray:
        """Return the rows of a shard that a backbone lacks."""
        rows = self.shards[shard]
        return rows[self.lacking[name][rows]]

    def preprocessing(self, name: str) -> Preprocessing:
        """Return the preprocessing of a backbone; equal keys share their pixels."""
        return self.jobs[name].description.preprocessing

    def backbone(self, name: str) -> Backbone:
        """Return a backbone by its name."""
        return self.jobs[name].description.backbone

    def n_params(self, name: str) -> int:
        """Return the number of parameters of a backbone."""
        return self.jobs[name].description.n_params

    def units(
        self, names: Iterable[str], shards: Sequence[int], number: int, *, retry: bool = False
    ) -> Iterator[Unit]:
        """Yield one unit for each backbone that lacks some of `shards`.

        They share one data set, the rows of these shards, and one `number`, by which a worker
        knows that they share its pixels.
        """
        names = [
            n for n in names if n not in self.failed and not self.missing[n].isdisjoint(shards)
        ]
        starts = np.cumsum([0, *(len(self.shards[s]) for s in shards)])
        rows = np.concatenate([self.shards[s] for s in shards])
        distinct = {self.preprocessing(n).key: self.preprocessing(n) for n in reversed(names)}
        part = self.dataset.subset(rows)
        crashing = {p: self.crashing[r] for p, r in enumerate(rows) if r in self.crashing}
        for name in names:
            if name in self.failed:  # meanwhile
                continue
            mine = [(p, s) for p, s in enumerate(shards) if s in self.missing[name]]
            lacking = self.lacking[name]
            yield Unit(
                self.jobs[name].description.backbone,
                self.preprocessing(name),
                part,
                self.run,
                number,
                tuple(reversed(distinct.values())),
                tuple((s, starts[p] + np.flatnonzero(lacking[self.shards[s]])) for p, s in mine),
                tuple(tuple(self.images[r] for r in self.rows(name, s)) for _, s in mine),
                self.jobs[name].weights,
                self.max_unreadable,
                crashing,
                retry,
                get_switches(),
            )


def cut_shards(lacking: Any) -> list[np.ndarray]:
    """Return the rows that are lacked, in shards; those that the same backbones lack together.

    The rows that most backbones lack come first: who lacks only these has no others decoded.

    >>> [rows.tolist() for rows in cut_shards(np.array([[1, 0, 1], [0, 0, 1]], bool))]
    [[2, 0]]
    """
    if not len(lacking):
        return []
    users = np.sum(lacking, axis=0)
    distinct = {mask.tobytes(): mask for mask in lacking}.values()  # many lack the same
    rows = np.flatnonzero(users)
    rows = rows[np.lexsort((rows, *(mask[rows] for mask in distinct), -users[rows]))]
    return [rows[start : start + SHARD] for start in range(0, len(rows), SHARD)]


def largest_shard(n: int) -> int:
    """Return the images in the largest shard of so many."""
    return min(n, SHARD)


def cut_units(plan: Plan, *, are_fetched: bool = False) -> Iterator[Unit]:
    """Yield the units, lazily, so that a failed backbone is not tried again.

    If weights `are_fetched` to a disk that does not hold all, few are opened twice.
    """
    users = [name for name, absent in plan.missing.items() if absent]
    sizes = {}
    for name in users:
        p = plan.preprocessing(name)
        sizes[name] = p.key, SHARD * pixels.bytes_per_image(p)
    n_shards = len(frozenset().union(*plan.missing.values()))
    numbers, opening = itertools.count(), FETCHING if are_fetched else OPENING
    for names in group_geometries(sizes, n_shards, pixel_memory(), opening):
        needed = sorted(frozenset().union(*(plan.missing[name] for name in names)))
        at_once = shards_at_once(map(plan.preprocessing, names))
        for first in range(0, len(needed), at_once):
            yield from plan.units(names, needed[first : first + at_once], next(numbers))


def group_geometries(
    sizes: Mapping[str, tuple[Hashable, int]],
    n_shards: int,
    memory: int,
    opening: float = OPENING,
) -> list[list[str]]:
    """Return which backbones run together; the groups follow each other over all images.

    `sizes` are (key, bytes of a shard) by backbone: equal keys share pixels. Where not all pixels
    fit into the `memory`, either networks are opened again for each part of the images, or images
    decoded again for each group of geometries: what costs less is done. A shard of every geometry
    of a group fits, unless there is but one. The order is that of the first of each group.

    >>> def make(n):
    ...     return {f"net{k}": (k % 2, 5) for k in range(n)}
    >>> [[len(g) for g in group_geometries(make(n), 2, 10)] for n in (4, 400)]
    [[4], [200, 200]]
    >>> group_geometries(make(4), 1, 5)
    [['net0', 'net2'], ['net1', 'net3']]
    """
    shards = dict(sizes.values())  # bytes by geometry, in the order of their first backbones
    best, least = [list(sizes)], math.inf
    for parts in range(1, n_shards + 1):  # of the images
        room, groups, taken = memory / -(-n_shards // parts), [], math.inf
        for key, size in shards.items():
            if taken + size > room:
                groups.append([])
                taken = 0
            groups[-1].append(key)
            taken += size
        cost = len(sizes) * parts * opening + len(groups) * n_shards * SHARD * DECODING
        if cost < least:
            members = [[name for name, (key, _) in sizes.items() if key in g] for g in groups]
            best, least = members, cost
    return best


def shards_at_once(preprocessings: Iterable[Preprocessing], memory: int | None = None) -> int:
    """Return how many shards of pixels a quarter of the memory holds, in bytes; default: free."""
    distinct = {p.key: p for p in preprocessings}
    per_image = sum(map(pixels.bytes_per_image, distinct.values()))
    return max(1, pixel_memory(memory) // max(SHARD * per_image, 1))


def pixel_memory(memory: int | None = None) -> int:
    """Return the bytes that decoded pixels may take."""
    import psutil

    return min(pixels.PIXEL_BYTES, (memory or psutil.virtual_memory().available) // 4)
