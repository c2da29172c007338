"""`SearchConfig`: the arguments of `sfda_tune.search`, checked and in one form."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from sfda_tune.data.formats import list_bands
from sfda_tune.data.groups import describe_options
from sfda_tune.data.labels import list_levels
from sfda_tune.data.opening import settle_task
from sfda_tune.finetuning.tasks import Task, find_kind
from sfda_tune.pipelines.budget import parse_budget, parse_weights_disk
from sfda_tune.pipelines.spaces import open_space
from sfda_tune.values.features import Backbone
from sfda_tune.values.files import check_folder
from sfda_tune.values.metrics import LOWER
from sfda_tune.values.redaction import redact
from sfda_tune.values.text import LARGEST_SEED, as_tuple, integer, is_number, positive, require

__all__ = ["SearchConfig"]

KEEP, TRIALS = 3, 12


@dataclass(frozen=True)
class SearchConfig:
    """The arguments of `sfda_tune.search`, which explains them; pickled they go to its workers.

    Raises
    ------
    ValueError
        If one of them cannot be understood.
    """

    dataset: Any
    backbones: Any
    trials: int | None
    budget: str | float | None
    engine: str
    storage: str | None = field(repr=False)  # may hold a password
    workers: int
    keep: Any
    objective: Any  # a tuple of str; None, with `metric`, is what the kind of labels is judged by
    metric: Any
    max_params: float | None
    max_latency: float | None
    space: Any
    epochs: int | None
    samples: int | None
    test: Any
    split: str | None
    image_column: str | None
    label_column: str | None
    max_unreadable: float
    device: str
    precision: str
    plugins: Iterable[str]
    cache: bool | str | os.PathLike[str] | None
    seed: int
    out: Path
    progress: Any
    previous: Any = ()  # folders of searches on other data, as str
    decoders: int | None = None
    groups: Any = None
    split_column: str | None = None
    time_column: str | None = None
    task: str | None = None
    loss: str | None = None
    bit_depth: str | int | None = None
    bands: Any = None  # as text, "4,3,2"
    weights_disk: str | int | None = None
    threads: int | None = None
    label_columns: Any = None  # a text or a list of texts
    label_delimiter: str | None = None
    levels: Any = None  # a text or a list of texts

    def __post_init__(self) -> None:
        columns = self.label_columns
        if columns is not None and not isinstance(columns, str):
            self._set("label_columns", [*columns])
        self._set("levels", list_levels(self.levels))
        told = settle_task(self.task, self.label_columns, self.label_delimiter, self.levels)
        self._set("task", told)
        self._set("metric", self.metric or self.kind.monitors[0])
        objective = self.objective or self.kind.monitors[0]
        self._set("out", Path(self.out).absolute())
        if isinstance(objective, str):
            objective = objective.replace(" ", "").split(",")
        self._set("objective", as_tuple("objective", objective))
        self._set("plugins", as_tuple("plugins", self.plugins))
        self._set("bands", list_bands(self.bands))
        runs = as_tuple("previous", self.previous or ())
        self._set("previous", tuple(str(Path(run).absolute()) for run in runs))
        if self.trials is None and self.budget is None:
            self._set("trials", TRIALS)
        if self.keep is None:
            self._set("keep", KEEP)
        _check_numbers(self)
        for name in ("dataset", "test"):
            _check_apart(getattr(self, name), self.out)
        _check_out(self.out)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def seconds(self) -> float | None:
        """The budget."""
        return parse_budget(self.budget)

    @property
    def kind(self) -> type[Task]:
        """Whether labels are classes, numbers, levels, or several per image."""
        return find_kind(self.dataset, self.task)

    @property
    def weights_limit(self) -> int | None:
        """Bytes that weights may take of the disk which come from the hub."""
        return parse_weights_disk(self.weights_disk)

    @property
    def directions(self) -> tuple[Literal["maximize", "minimize"], ...]:
        """Of the objectives."""
        first: Literal["maximize", "minimize"]
        first = "minimize" if self.metric in LOWER else "maximize"
        return (first, "minimize")[: len(self.objective)]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, without secrets; data and networks in memory by their type."""
        values = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        if isinstance(values["backbones"], str) and not isinstance(self.backbones, Mapping):
            values["backbones"] = [values["backbones"]]  # as the command line has it
        if self.space is not None:
            values["space"] = open_space(self.space).to_dict()
        return values | {"storage": redact(self.storage), **describe_options(self.groups)}


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and all(isinstance(v, (str, Backbone)) for v in value):
        return [_plain(v) for v in value]
    if isinstance(value, Backbone):
        return value.name
    if isinstance(value, str) and "://" in value:
        return redact(value)
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return str(value) if isinstance(value, os.PathLike) else f"<{type(value).__name__}>"


# Checks -----------------------------------------------------------------------------------------
def _check_numbers(c: SearchConfig) -> None:
    g: Mapping[str, Any] = vars(c)
    for name in ("trials", "workers", "keep", "epochs", "samples"):
        if g[name] is not None or name in ("workers", "keep"):
            c._set(name, integer(name, g[name], 1))
    for name, least in (("decoders", 0), ("threads", 1)):
        if g[name] is not None:
            c._set(name, integer(name, g[name], least))
    for name in ("max_params", "max_latency"):
        if g[name] is not None:
            positive(name, g[name])
    c._set("seed", integer("seed", c.seed, 0, LARGEST_SEED))
    first, monitors = c.kind.monitors[0], c.kind.monitors
    allowed = (first, f"{first},latency", f"{first},params")
    require("objective", c.objective, f"one of {allowed}", ",".join(c.objective) in allowed)
    is_free = not c.previous or len(c.objective) == 1
    require("previous", c.previous, "left out where there are several objectives", is_free)
    require("metric", c.metric, f"one of {monitors} for {c.kind.name}", c.metric in monitors)
    losses = c.kind.losses
    require("loss", c.loss, f"one of {losses} for {c.kind.name}", c.loss in (None, *losses))
    if isinstance(c.test, float):
        require("test", c.test, "in (0, 1), or a data set", 0 < c.test < 1)
    limit = c.max_unreadable
    require("max_unreadable", limit, "in 0 … 1", is_number(limit) and 0 <= limit <= 1)
    parse_budget(c.budget)
    parse_weights_disk(c.weights_disk)


def _check_apart(images: Any, out: Path) -> None:
    """Refuse an `out` among the images: the next look at them would find the search there."""
    if isinstance(images, (str, os.PathLike)) and images != "digits":
        folder = Path(os.fspath(images).removeprefix("hf:")).expanduser().resolve()
        if folder.is_dir() and folder in (out.resolve(), *out.resolve().parents):
            raise ValueError(
                f"`out` must not lie in the folder of the images, {str(folder)!r}, but is "
                f"{str(out)!r}; take a folder beside it."
            )


def _check_out(out: Path) -> None:
    if any(0xDC80 <= ord(c) <= 0xDCFF for c in str(out)):  # safetensors cannot read there
        raise ValueError(f"`out` must be a name in UTF-8 but is {str(out)!r}.")
    check_folder("out", out)
