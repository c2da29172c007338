"""How much time and disk there is, and what it must suffice for."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from sfda_tune.data.dataset import ImageDataset
from sfda_tune.data.decoding import UnreadableImage
from sfda_tune.pipelines.engines import Trial
from sfda_tune.pipelines.trials import best_epoch, find_best, of_backbone
from sfda_tune.values.text import DECIMAL, is_number, parse_bytes, require

__all__ = [
    "Budget", "Pace", "RankingWatch", "Workload", "ends_later", "parse_budget",
    "parse_weights_disk", "time_decoding",
]  # fmt: skip

RANK_SHARE, RETRAIN_SHARE = 0.5, 0.3  # at most so much of a budget


@dataclass(frozen=True)
class Workload:
    """What there is to do after the trials, and how fast it goes."""

    metric: str  # that tells which trial is the best
    n_images: Mapping[str, int]  # of "train", "val" and "test"
    seconds_per_image: float  # to decode one
    speeds: Mapping[str, float | None]  # images per second of a forward pass, by backbone
    seconds_to_end: float = 0.0  # that the engine takes


@dataclass(frozen=True)
class Budget:
    """The time of a search, by the clock of its folder."""

    seconds: float | None  # for everything; None is without end
    now: Callable[[], float]  # the seconds so far, see `Clock`
    begun: float = 0.0  # when this process came in

    @property
    def deadline(self) -> float:
        """When all must be done."""
        return self.seconds or math.inf

    @property
    def hint(self) -> str:
        """What to do if the time did not suffice, for the end of a message."""
        return "" if self.seconds is None else f"; `budget` was {self.seconds:g} s: give more"

    def end_of_share(self, share: float, since: float) -> float:
        """Return when a share of the time that was left then is spent."""
        return since + share * (self.deadline - since)

    def end_of_trials(self, work: Workload, trials: Sequence[Trial]) -> float:
        """Return when trials must stop, so that training and testing the best fits in."""
        if self.seconds is None:
            return math.inf
        to_test = self.seconds_to_test(work, trials)
        to_train = self.seconds_to_train(work, trials)
        slack = 0.2 * to_train + 0.01 * self.seconds  # no trial stops at once
        needed = to_test + to_train + slack
        if to_train > RETRAIN_SHARE * self.seconds:
            needed = to_test  # its checkpoint will do
        return self.deadline - needed - work.seconds_to_end

    def seconds_to_test(self, work: Workload, trials: Sequence[Trial]) -> float:
        """Return how long the test of the best trial takes."""
        best, n = find_best(trials, work.metric, work.n_images["val"]), work.n_images["test"]
        decoding = n * work.seconds_per_image
        if best is None:
            return 0.05 * (self.seconds or 0.0) + 0.5 + decoding
        speed = work.speeds.get(best.backbone) or 100.0
        return 0.02 * (self.seconds or 0.0) + 1.0 + 2 * n / speed + decoding

    def seconds_to_train(self, work: Workload, trials: Sequence[Trial]) -> float:
        """Return how long the best takes on training and validation images."""
        best = find_best(trials, work.metric, work.n_images["val"])
        if best is None:
            return 0.0
        last, probe = best_epoch(best, work.metric)["number"], 0.0
        spent = sum(e["seconds"] for e in best.epochs if 0 < e["number"] <= last)
        for trial in of_backbone(trials, best.backbone):  # the first started the head for all
            probe = max([probe, *(e["seconds"] for e in trial.epochs if e["number"] == 0)])
        n, more = work.n_images["train"], work.n_images["val"]
        reading = (n + more) * work.seconds_per_image  # to know them again
        return 0.5 + reading + (probe + spent) * (1 + more / n)

    def time_decoding(self, images: ImageDataset) -> float:
        """Return how long an image takes to be decoded: the mean of a few; 0 without a budget."""
        if self.seconds is None:  # nobody asks
            return 0.0
        return time_decoding(images, 0.005 * self.deadline, self.now)


def time_decoding(
    images: ImageDataset, most: float, now: Callable[[], float] = time.perf_counter
) -> float:
    """Return the seconds to decode an image: the mean of 8, or of fewer in `most` seconds."""
    begun, n = now(), 0
    for row in np.linspace(0, len(images) - 1, 8).astype(int):
        with suppress(UnreadableImage):
            images.load(row)
        n += 1
        if now() - begun > most:
            break
    return (now() - begun) / n


class Pace:
    """What networks will take, by what others took: so long to open, and so long for an image.

    The second in proportion to `price`, until it has been seen.

    >>> pace = Pace(60, {"small": 1.0, "large": 4.0})
    >>> pace.note(["small"], 100, seconds=3.0, opening=0.5)
    >>> pace.cost("large", 100), pace.cost("large", 200)
    (10.5, 20.5)
    >>> pace.note(["large"], 100, seconds=20.5, opening=0.5, speeds={"large": 5.0})
    >>> pace.cost("large", 100)
    20.5
    """

    def __init__(self, seconds: float, price: Mapping[str, float]) -> None:
        self._begun, self._seconds, self._price = time.perf_counter(), seconds, price
        self._opening = self._computing = self._work = 0.0
        self._n = 0
        self._seen: dict[str, float] = {}  # seconds for an image

    @property
    def room(self) -> float:
        """Return the seconds that are left."""
        return self._seconds - (time.perf_counter() - self._begun)

    @property
    def is_known(self) -> bool:
        """Whether anything has been measured."""
        return self._n > 0

    def note(
        self,
        names: Sequence[str],
        n_images: int,
        seconds: float,
        opening: float,
        speeds: Mapping[str, float] | None = None,
    ) -> None:
        """Take down what networks took for so many images each, and how much of that to open.

        The rest is shared out by their `speeds`, images per second of the forward passes alone.
        """
        self._n += len(names)
        self._opening += opening
        self._computing += seconds - opening
        self._work += n_images * sum(self._price[name] for name in names)
        if speeds and speeds.keys() >= set(names):
            unit = (seconds - opening) / n_images / sum(1 / speeds[name] for name in names)
            self._seen |= {name: unit / speeds[name] for name in names}

    def open(self, names: Sequence[str]) -> float:
        """Return the seconds to open networks."""
        return len(names) * self._opening / self._n if self._n else 0.0

    def compute(self, names: Sequence[str], n_images: int) -> float:
        """Return the seconds that opened networks take for so many images each."""
        rate = self._computing / self._work if self._work else 0.0
        return n_images * sum(self._seen.get(name, rate * self._price[name]) for name in names)

    def cost(self, name: str, n_images: int) -> float:
        """Return the seconds for a network and so many images."""
        return self.open([name]) + self.compute([name], n_images)


class RankingWatch:
    """Passes on the progress of a ranking, and interrupts it at its deadline."""

    def __init__(self, progress: Any, is_late: Callable[[], bool]) -> None:
        self.start, self.finish, self._progress = progress.start, progress.finish, progress
        self.plan = getattr(progress, "plan", lambda work: None)
        self._is_late, self.is_over = is_late, False

    def advance(self, backbone: str, n_images: int) -> None:
        """Pass on that a backbone has seen so many further images."""
        self._progress.advance(backbone, n_images)
        if self._is_late():
            self.is_over = True
            raise KeyboardInterrupt


def parse_budget(budget: str | float | None) -> float | None:
    """Return seconds.

    >>> parse_budget("1h30m"), parse_budget("90s"), parse_budget(5)
    (5400.0, 90.0, 5.0)
    """
    if budget is None:
        return None
    seconds: Any = budget
    if isinstance(budget, str):
        one = f"({DECIMAL})"
        found = re.fullmatch(rf"(?:{one}h)?(?:{one}m)?(?:{one}s?)?", budget.strip())
        parts = [float(part or 0) for part in found.groups()] if found else [0.0]
        seconds = float(np.dot(parts, [3600, 60, 1][: len(parts)]))
    is_time = is_number(seconds) and 0 < seconds < math.inf
    require("budget", budget, "a time such as '2h', '45m' or 90", is_time)
    return float(seconds)


def parse_weights_disk(text: str | int | None) -> int | None:
    """Return the bytes that downloaded weights may take; None for any."""
    return None if text is None else parse_bytes("`weights_disk`", str(text))


def ends_later(new: str | float | None, old: str | float | None) -> bool:
    """Compare two numbers of trials or two budgets; None has no end."""
    a, b = (math.inf if value is None else parse_budget(value) for value in (new, old))
    return cast(float, a) > cast(float, b)
