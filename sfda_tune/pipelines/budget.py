"""How much time there is, and what it must suffice for."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, cast

import numpy as np


class RankingWatch:
    """Passes on the progress of a ranking, and interrupts it at its deadline."""

    def __init__(self, board: Any, is_late: Callable[[], bool]) -> None:
        self.start, self.finish, self._board = board.start, board.finish, board
        self._is_late, self.is_over = is_late, False

    def advance(self, backbone: str, n_images: int) -> None:
        """Pass on that a backbone has seen so many further images."""
        self._board.advance(backbone, n_images)
        if self._is_late():
            self.is_over = True
            raise KeyboardInterrupt


def parse_budget(budget: str | float | None) -> float | None:
    """Return seconds.

    >>> parse_budget("1h30m"), parse_budget("90s"), parse_budget(5)
    (5400.0, 90.0, 5.0)
    """
    seconds = budget
    if isinstance(budget, str):
        found = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s?)?", budget.strip())
        parts = [float(part or 0) for part in found.groups()] if found else [0.0]
        seconds = float(np.dot(parts, [3600, 60, 1][: len(parts)]))
    if seconds is not None and not 0 < float(seconds) < math.inf:
        raise ValueError(f"`budget` must be a time such as '2h', '45m' or 90 but is {budget!r}.")
    return None if seconds is None else float(seconds)


def ends_later(new: str | float | None, old: str | float | None) -> bool:
    """Compare two numbers of trials or two budgets; None has no end."""
    a, b = (math.inf if value is None else parse_budget(value) for value in (new, old))
    return cast(float, a) > cast(float, b)
