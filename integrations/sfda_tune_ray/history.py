"""The trials of a Tune experiment as the evidence that the policy decides upon."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sfda_tune.selection.calibration import Observation
from sfda_tune.selection.policy import scalarize

__all__ = ["Record", "observe"]


@dataclass(frozen=True)
class Record:
    """What is known of one trial; JSON values only."""

    backbone: str
    # "running", "complete" (it ended without an error, by itself or early), "failed", or "lost":
    # its end says nothing of the backbone, which was stopped before it began, or lost its machine
    state: str = "running"
    value: float | None = None  # the last metric, higher is better; NaN if it diverged
    others: tuple[float, ...] = ()  # the further metrics, if there are several, likewise
    seconds: float | None = None
    iterations: int = 0  # how often it has reported; 0: never, or nobody said
    params: Mapping[str, Any] = field(default_factory=dict)  # the others that are searched, flat
    key: str | None = None  # of the searcher that was asked for it, see `SFDASearcher`
    told: bool = False  # whether its end was told, to that searcher if there is one
    changed: bool = False  # whether the trial differs from what that searcher proposed
    foreign: bool = False  # not suggested: begun anew by ``Tuner.restore`` under another id

    @property
    def values(self) -> tuple[float, ...]:
        """All metrics; none if there is no value."""
        return () if self.value is None else (self.value, *self.others)

    def pack(self) -> dict[str, Any]:
        """Return JSON values."""
        numbers = {"value": plain(self.value), "others": [plain(v) for v in self.others]}
        fields = asdict(self) | numbers
        fields["settings"] = fields.pop("params")  # what saved states call them
        return fields

    @classmethod
    def unpack(cls, entry: Mapping[str, Any]) -> Record:
        """Read what `pack` returned."""
        fields, value = dict(entry), entry["value"]
        fields["params"] = fields.pop("settings", {})
        fields["others"] = tuple(float(v) for v in entry.get("others", ()))
        fields["value"] = None if value is None else float(value)
        return cls(**fields)


def observe(
    records: Iterable[Record], weights: Sequence[float] | None = None
) -> list[Observation]:
    """Translate trials to observations; `weights` are of the metrics, see `policy.scalarize`.

    A trial with fewer iterations than the longest one ended early: its value is a lower bound. A
    failed one that has reported before does run: a parameter was at fault, not the backbone.
    """
    records = list(records)
    ended = [r for r in records if r.state == "complete" and r.value is not None]
    budget = max((r.iterations for r in ended), default=0)
    full = {id(r): r.values for r in ended if r.iterations in (0, budget)}
    sound = {key: v for key, v in full.items() if not any(map(math.isnan, v))}
    rated = dict(zip(sound, scalarize(list(sound.values()), weights), strict=True))
    history = []
    for r in records:
        if r.state == "running":
            history.append(Observation(r.backbone, "running", params=r.params))
        elif r.state == "failed" and not r.iterations:
            history.append(Observation(r.backbone, "failed", params=r.params))
        elif r.state == "complete" and r.value is not None:
            about: dict[str, Any] = {"cost": r.seconds, "params": r.params}
            if id(r) in full:
                if id(r) in rated or r.iterations <= 1:
                    value = rated.get(id(r), math.nan)
                    history.append(Observation(r.backbone, "complete", value, **about))
            elif math.isfinite(r.value):
                value = None if r.others else r.value  # ranks of less than a trial say nothing
                step = r.iterations / budget
                history.append(Observation(r.backbone, "pruned", value, step=step, **about))
    return history


def plain(value: Any) -> Any:
    """Return a strict JSON value: of numbers their value, of anything else its `repr`."""
    if hasattr(value, "item"):  # a NumPy scalar
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)
