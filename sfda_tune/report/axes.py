"""Axes of the figures on the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sfda_tune.values.text import format_count


@dataclass(frozen=True)
class Axis:
    """A scale from numbers to per cent of the width or height.

    >>> axis = Axis.over([0.0, 10.0])
    >>> axis.at(5.0), [label for _, label in axis.ticks]
    (50.0, ['0', '2', '4', '6', '8', '10'])
    """

    low: float
    high: float
    log: bool = False

    @classmethod
    def over(cls, values: Iterable[float], log: bool = False) -> Axis:
        """Return an axis that holds all `values`, with a little room."""
        found = [math.log10(v) if log else v for v in values] or [0.0, 1.0]
        room = 0.06 * (max(found) - min(found)) or 0.05 * abs(found[0]) or 0.5
        return cls(min(found) - room, max(found) + room, log)

    def at(self, value: float) -> float:
        """Return where `value` lies, in per cent."""
        place = math.log10(value) if self.log else value
        return round(100 * (place - self.low) / (self.high - self.low), 2)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """A few round numbers, each with its place."""
        low, high = (10**self.low, 10**self.high) if self.log else (self.low, self.high)
        step = 10.0 ** math.floor(math.log10((high - low) / 3))
        step = max(s for s in (step, 2 * step, 5 * step) if s <= (high - low) / 3)
        values = [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
        if high > 8 * low and self.log:
            digits = (1, 2, 5) if high < 200 * low else (1,)
            values = [d * 10.0**e for e in range(-9, 13) for d in digits]
        shown = [v for v in values if low <= v <= high]
        return [(self.at(v), shorten(v)) for v in shown]


def make_lines(points: Sequence[tuple[float, float]], kind: str) -> list[tuple[Any, ...]]:
    """Return segments (x1, y1, x2, y2, kind): unlike a path, lines may be in per cent."""
    return [(*a, *b, kind) for a, b in pairwise(points)]


def shorten(value: float) -> str:
    """Return a number as the ticks of an axis show it."""
    return format_count(value) if value >= 1000 else f"{value:.10g}"


def place_labels(
    points: Sequence[tuple[float, float, str]], width: float = 640, height: float = 264
) -> list[str]:
    """Return the label of each point, or "" where it would be printed over an earlier one.

    Points are in per cent of `width` and `height` (pixels); labels stand to their upper right, in
    figures of 7 × 12 pixels. Of many points only the first keep theirs.

    >>> place_labels([(50, 50, "1"), (51, 50, "2"), (80, 50, "3")])
    ['1', '', '3']
    """
    taken: list[tuple[float, float, float]] = []
    labels = []
    for x, y, label in points:
        left, middle, right = 0.01 * x * width, 0.01 * y * height, 0.01 * x * width
        right += 7.0 * len(label) + 4
        free = all(right < a or left > b or abs(middle - m) > 13 for a, b, m in taken)
        labels.append(label if free else "")
        if free:
            taken.append((left, right, middle))
    return labels
