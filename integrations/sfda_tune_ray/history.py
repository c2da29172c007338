"""The trials of a Tune experiment as the evidence that `sfda_tune.policy` decides upon."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sfda_tune.policy import Observation

__all__ = ["Record", "observe"]


@dataclass(frozen=True)
class Record:
    """What is known of one trial; JSON values only.

    Parameters
    ----------
    backbone : str
    state : {"running", "complete", "failed", "lost"}
        Complete: it ended without an error, by itself or early. Lost: its end says nothing of the
        backbone, for instance stopped before it began, or its machine died.
    value : float, optional
        The last metric, higher is better; NaN if it diverged.
    seconds : float, optional
    iterations : int
        How often it has reported; 0: never, or nobody said.
    settings : mapping of str to JSON value
        The other searched parameters, flat.
    key : str, optional
        Of the searcher that was asked for it, see `SFDASearcher`; None: none was.
    told : bool
        Whether its end was told, to that searcher if there is one.
    changed : bool
        Whether the trial differs from what that searcher proposed.
    foreign : bool
        Whether it was not suggested: begun anew by ``Tuner.restore`` under another id.
    """

    backbone: str
    state: str = "running"
    value: float | None = None
    seconds: float | None = None
    iterations: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    key: str | None = None
    told: bool = False
    changed: bool = False
    foreign: bool = False

    def pack(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self) | {"value": plain(self.value)}

    @classmethod
    def unpack(cls, entry: Mapping[str, Any]) -> Record:
        """Read what `pack` returned."""
        value = entry["value"]
        return cls(**{**entry, "value": None if value is None else float(value)})


def observe(records: Iterable[Record]) -> list[Observation]:
    """Translate trials to observations.

    A trial with fewer iterations than the longest one ended early: its value is a lower bound. A
    failed one that has reported before does run: a setting was at fault, not the backbone.
    """
    records = list(records)
    ended = [r for r in records if r.state == "complete" and r.value is not None]
    budget = max((r.iterations for r in ended), default=0)
    full = [r.value for r in ended if r.iterations in (0, budget)]
    finite = [value for value in full if value is not None and math.isfinite(value)] or [0.0]
    history = []
    for r in records:
        if r.state == "running":
            history.append(Observation(r.backbone, "running", settings=r.settings))
        elif r.state == "failed" and not r.iterations:
            history.append(Observation(r.backbone, "failed", settings=r.settings))
        elif r.state == "complete" and r.value is not None:
            about: dict[str, Any] = {"cost": r.seconds, "settings": r.settings}
            if not r.iterations or r.iterations == budget:
                value = min(max(r.value, min(finite)), max(finite))  # of infinite ones
                value = r.value if math.isnan(r.value) else value
                if not math.isnan(value) or r.iterations <= 1:
                    history.append(Observation(r.backbone, "complete", value, **about))
            elif math.isfinite(r.value):
                step = r.iterations / budget
                history.append(Observation(r.backbone, "pruned", r.value, step=step, **about))
    return history


def plain(value: Any) -> Any:
    """Return a strict JSON value: of numbers their value, of anything else its `repr`."""
    if hasattr(value, "item"):  # a NumPy scalar
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)
