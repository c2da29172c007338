"""Which actor does what next: bundles of backbones, and units cut from them while the run goes on.

No Ray and no clock in here: `RayExecutor` and the simulation of ``tests/benchmarks`` drive the
same code.

Backbones with the same geometry form *bundles* that live in one process together, so that an image
is decoded once per bundle. An actor stays with its bundle, and moves on to the one that has most
work left per actor; at first that is the most expensive one (longest processing time first). A
unit is some shards of a bundle: seconds of work, fewer the nearer the end, down to a single shard.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Bundle", "Dispatcher", "Task", "make_bundles"]

UNITS_PER_ACTOR = 16  # at least, where there are as many shards × backbones
ENDING = 2.0  # largest units an actor has left when the order by size becomes strict
STAYING = 3.0  # how much more another bundle must have left: to move is to load other networks
DECODING = 5e6  # what decoding an image costs, in parameters × (pixels / 224²)


@dataclass(eq=False)
class Bundle:
    """Backbones that share pixels and a process."""

    names: tuple[str, ...]
    cost: float  # of one shard, in any unit; a measurement in seconds replaces it
    todo: deque[int]  # shards that nobody has yet
    most: int = 1  # shards whose pixels fit into memory at a time
    seconds: float | None = None  # of one shard, as measured
    actors: int = 0


@dataclass(eq=False)
class Task:
    """A unit: some backbones of a bundle on some shards."""

    number: int
    bundle: Bundle
    names: tuple[str, ...]
    shards: tuple[int, ...]
    attempts: int = 0  # that ended with the process, or with an error outside of any backbone
    isolated: bool = False  # look for an image that ends the process, first
    reason: str = ""
    parts: list[Task] = field(default_factory=list)  # what became of it, one backbone each


def make_bundles(
    sizes: Mapping[str, tuple[Hashable, float, float]],
    missing: Mapping[str, frozenset[int]],
    *,
    memory: float,
    actors: int,
) -> list[Bundle]:
    """Put backbones that share pixels together, as many as one process bears; most work first.

    `sizes` are (key, parameters, pixels of one input) by backbone: those with equal keys share
    pixels. `missing` are the shards that each lacks, `memory` the bytes that the weights of a
    bundle may take; a bundle is kept so small that there are units enough for all `actors`.

    >>> sizes = {"large": (224, 9e7, 224**2), "small": (224, 1e7, 224**2), "wide": (384, 1e7, 9e4)}
    >>> everything = dict.fromkeys(sizes, frozenset(range(100)))
    >>> [b.names for b in make_bundles(sizes, everything, memory=1e9, actors=2)]
    [('large', 'small'), ('wide',)]
    """
    cost = {n: params * pixels / 224**2 for n, (_, params, pixels) in sizes.items()}
    names = sorted((n for n in sizes if missing[n]), key=lambda n: (-cost[n], n))
    work = sum((cost[n] + DECODING) * len(missing[n]) for n in names)
    largest = work / (UNITS_PER_ACTOR * actors)
    groups: list[list[str]] = []
    latest: dict[Hashable, list[str]] = {}  # by key: what the next backbone joins
    for name in names:
        group = latest.get(sizes[name][0])
        if group is None or (
            4 * sum(sizes[n][1] for n in [*group, name]) > memory
            or DECODING + sum(cost[n] for n in [*group, name]) > largest
        ):
            group = latest[sizes[name][0]] = []
            groups.append(group)
        group.append(name)
    bundles = []
    for group in groups:
        todo = deque(sorted(frozenset().union(*(missing[n] for n in group))))
        bundles.append(Bundle(tuple(group), DECODING + sum(cost[n] for n in group), todo))
    return sorted(bundles, key=lambda b: -b.cost * len(b.todo))


@dataclass(eq=False)
class Dispatcher:
    """Hands out tasks, and takes back those that went wrong."""

    bundles: Sequence[Bundle]
    seconds: float = 15.0  # what a unit is to take
    attempts: int = 4  # after so many faults the backbones of a unit have failed
    n_actors: int = 1
    again: deque[Task] = field(default_factory=deque)
    failed: set[str] = field(default_factory=set)
    pending: int = 0  # tasks that somebody has
    _number: int = 0
    _places: dict[Any, Bundle] = field(default_factory=dict)
    _measured: list[float] = field(default_factory=lambda: [0.0, 0.0])  # seconds, their cost

    def __post_init__(self) -> None:
        self._left = [b for b in self.bundles if b.todo]

    @property
    def unfinished(self) -> bool:
        """Whether there is anything left to do or under way."""
        return bool(self.again or self.pending or any(b.todo for b in self._left))

    def cost(self, bundle: Bundle) -> float:
        """Return what one shard takes: in seconds, as soon as anything was measured."""
        if bundle.seconds is not None:
            return bundle.seconds
        seconds, cost = self._measured
        return bundle.cost * (seconds / cost if cost else 1.0)

    def next(self, actor: Any, *, ahead: bool = False) -> Task | None:
        """Return the next task of an actor, or None.

        One that still works on another (`ahead`) gets one only while there is plenty: at the end
        an idle actor would do it sooner.
        """
        if self.again and not ahead:
            task = self.again.popleft()
            task.names = tuple(n for n in task.names if n not in self.failed)
            self.pending += 1
            return task
        best, share = self._choose(actor, ahead=ahead)
        if best is None:
            return None
        old = self._places.get(actor)
        if best is not old:
            if old is not None:
                old.actors -= 1
            best.actors += 1
            self._places[actor] = best
        n = 1
        if self._measured[1]:
            n = int(max(1, min(self.seconds, share) / max(self.cost(best), 1e-9)))
        shards = tuple(best.todo.popleft() for _ in range(min(n, best.most, len(best.todo))))
        self._number += 1
        self.pending += 1
        return Task(self._number, best, best.names, shards)

    def foresee(self, actor: Any) -> tuple[str, ...]:
        """Return the backbones that an actor may get after what it has: a guess."""
        best, _ = self._choose(actor, ahead=True)
        return () if best is None else best.names

    def _choose(self, actor: Any, *, ahead: bool) -> tuple[Bundle | None, float]:
        """Return the bundle that an actor gets next, and an actor's share of all that is left."""
        self._left = [b for b in self._left if b.todo]
        if not self._left:
            return None, 0.0
        costs = [self.cost(b) for b in self._left]
        work = [cost * len(b.todo) for cost, b in zip(costs, self._left, strict=True)]
        share = sum(work) / (UNITS_PER_ACTOR * max(self.n_actors, 1))
        if ahead and share < max(costs):
            return None, share
        old = self._places.get(actor)
        ending = sum(work) < ENDING * max(costs) * self.n_actors  # then the largest first, simply
        best, pull = None, -1.0
        for i, bundle in enumerate(self._left):
            mine = bundle is old
            strength = work[i] / (bundle.actors + (not mine)) * (STAYING if mine else 1.0)
            strength = costs[i] if ending else strength
            if strength > pull:
                best, pull = bundle, strength
        return best, share

    def complete(self, task: Task, seconds: float | None) -> None:
        """Note that a task is done, and the seconds that it computed.

        What it waited for weights, and to open networks, comes once: it says nothing of the next.
        """
        self.pending -= 1
        if seconds is not None and task.names == task.bundle.names and not task.attempts:
            task.bundle.seconds = seconds / len(task.shards)
            self._measured[0] += seconds
            self._measured[1] += task.bundle.cost * len(task.shards)

    def give_back(self, task: Task) -> None:
        """Take back a task that nobody has begun."""
        self.pending -= 1
        self.again.appendleft(task)

    def record_failure(self, task: Task, reason: str, *, died: bool) -> tuple[str, ...]:
        """Take back a task that went wrong; return the backbones that have failed with it.

        A process that died is looked into first, and at once: an image that ends the process is
        found by the next attempt (`Task.isolated`). Dies that one too, the backbones of the bundle
        are parted, so that only the guilty one fails. Other errors wait until the end.
        """
        self.pending -= 1
        task.attempts += 1
        task.reason = reason
        task.isolated = died and task.attempts == 1
        names = tuple(n for n in task.names if n not in self.failed)
        if task.attempts >= self.attempts and len(names) <= 1:
            self.failed.update(names)
            return names
        parts = [task]
        if task.attempts > 1 and len(names) > 1:
            about = task.shards, task.attempts
            numbered = enumerate(names, self._number + 1)
            parts = task.parts = [Task(n, task.bundle, (name,), *about) for n, name in numbered]
            self._number += len(parts)
        if died:
            self.again.extendleft(reversed(parts))
        else:
            self.again.extend(parts)
        return ()

    def reset_attempts(self, task: Task) -> None:
        """Take the last failure back: the machine was lost, which is nobody's fault."""
        for part in (task, *task.parts):
            part.attempts = max(part.attempts - 1, 0)
            part.isolated = False

    def drop(self, name: str) -> None:
        """Give no more work to a backbone that failed."""
        self.failed.add(name)
        for bundle in self._left:
            if name in bundle.names:
                bundle.names = tuple(n for n in bundle.names if n != name)
                if not bundle.names:
                    bundle.todo.clear()

    def on_actor_died(self, actor: Any) -> None:
        """Take an actor off its bundle."""
        bundle = self._places.pop(actor, None)
        if bundle is not None:
            bundle.actors -= 1
