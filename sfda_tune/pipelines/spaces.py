"""What a search may vary of the fine-tuning: a `Space` of fields of `FinetuneConfig`.

As YAML (``--space space.yaml``), a mapping or JSON; a field that is not named keeps its default:

=============================================  ==================================================
``lr: {low: 1e-4, high: 1e-2, log: true}``      a number of that range
``batch_size: {low: 16, high: 64}``            an integer, because both ends are
``freeze: [none, backbone]``                   one of these
``optimizer: adamw``                           always this
=============================================  ==================================================
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sfda_tune.finetuning.config import FinetuneConfig
from sfda_tune.finetuning.tasks import Task
from sfda_tune.values.files import parse_json, read_text

__all__ = ["Dimension", "Space", "default_space", "open_space"]

OURS = ("epochs", "monitor", "precision", "seed", "val_fraction")  # arguments of the search


@dataclass(frozen=True)
class Dimension:
    """One field: a range of numbers (integers if both ends are), or choices."""

    name: str
    low: float = math.nan
    high: float = math.nan
    log: bool = False
    choices: tuple[Any, ...] = ()

    @property
    def is_integer(self) -> bool:
        """Whether the values are integers."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def nearest(self, value: Any) -> Any:
        """Return the allowed value that is nearest to `value`.

        >>> Dimension("lr", 0.001, 0.1, log=True).nearest(0.5)
        0.1
        """
        if self.choices:
            return value if value in self.choices else self.choices[0]
        if not isinstance(value, (int, float)):  # a default of None
            value = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        value = min(max(value, self.low), self.high)
        return round(value) if self.is_integer else float(value)


@dataclass(frozen=True)
class Space:
    """What varies, and what is fixed.

    Parameters
    ----------
    dimensions : tuple of Dimension
    fixed : mapping of str to JSON value
        Fields with another value than the default.

    Examples
    --------
    >>> space = open_space({"lr": {"low": 0.001, "high": 0.1, "log": True}, "mixup": 0.1})
    >>> space.config({"lr": 0.02}, epochs=3).to_dict()["mixup"], space.default()
    (0.1, {'lr': 0.001})
    """

    dimensions: tuple[Dimension, ...]
    fixed: Mapping[str, Any]

    def config(self, params: Mapping[str, Any], **more: Any) -> FinetuneConfig:
        """Return the configuration of a trial."""
        return FinetuneConfig.from_dict({**self.fixed, **params, **more})

    def default(self) -> dict[str, Any]:
        """Return the default of every field that varies, or what the space has nearest to it."""
        values = {f.name: getattr(FinetuneConfig(), f.name) for f in fields(FinetuneConfig)}
        return {d.name: d.nearest(values[d.name]) for d in self.dimensions}

    def check(self, task: Task) -> None:
        """Raise a ValueError if a value has no meaning for the kind of labels."""
        for d in self.dimensions:
            for value in d.choices or (d.low,):
                task.check(self.config({**self.default(), d.name: value}))
        task.check(self.config({}))

    def to_dict(self) -> dict[str, Any]:
        """Return the space as `open_space` reads it."""
        found: dict[str, Any] = dict(self.fixed)
        for d in self.dimensions:
            range_ = {"low": d.low, "high": d.high, "log": d.log}
            found[d.name] = list(d.choices) if d.choices else range_
        return found


def default_space(n_images: int, task: str = "classification") -> Space:
    """Return what is varied by default.

    Learning rate, a decade either side of the default one, and layer decay; with fewer than 1,000
    training images also which statistics normalise (a good network on photos may do better with
    those of its pretraining) and whether the backbone is frozen; with more weight decay, which
    needs many steps to have an influence, and (of classes) how much is mixed up.

    >>> [d.name for d in default_space(500).dimensions]
    ['lr', 'layer_decay', 'batch_norm', 'freeze']
    """
    space: dict[str, Any] = {
        "lr": {"low": 1e-4, "high": 1e-2, "log": True},
        "layer_decay": [None, 0.9, 0.75],
    }
    few = {"batch_norm": ["train", "frozen"], "freeze": ["none", "backbone"]}
    many: dict[str, Any] = {"weight_decay": {"low": 1e-3, "high": 0.1, "log": True}}
    many |= {"mixup": [0.0, 0.2]} if task == "classification" else {}
    return open_space(space | (few if n_images < 1000 else many))


def open_space(source: Any) -> Space:
    """Read and check a space.

    Parameters
    ----------
    source : Space, mapping, str or path
        A path ends in ``.yaml``, ``.yml`` or ``.json``.

    Raises
    ------
    ValueError
        Naming the field, the rule and the value: unknown fields, empty ranges, values that
        `FinetuneConfig` refuses.
    """
    if isinstance(source, Space):
        return source
    if isinstance(source, (str, os.PathLike)):
        source = _read(Path(source))
    known = [f.name for f in fields(FinetuneConfig) if f.name not in OURS]
    if not isinstance(source, Mapping) or not source:
        raise ValueError(f"`space` must be a mapping of fields to values but is {source!r}.")
    dimensions, fixed = [], {}
    for name, given in source.items():
        if name not in known:
            raise ValueError(
                f"`space` must only have the fields {', '.join(known)} but has {name!r}"
                + (", which is an argument of the search." if name in OURS else ".")
            )
        if isinstance(given, Mapping) and "low" in given:  # `augmentation` is a mapping, too
            dimensions.append(_range(name, given))
        elif isinstance(given, (list, tuple)):
            if not given:
                raise ValueError(f"`space`: {name!r} must have at least one choice but has none.")
            dimensions.append(Dimension(name, choices=tuple(given)))
        else:
            fixed[name] = given
    space = Space(tuple(dimensions), fixed)
    space.config({})
    for d in dimensions:  # the ends of the ranges, too, must be values that the field may have
        for value in d.choices or (d.low, d.high):
            try:
                space.config({**space.default(), d.name: value})
            except (ValueError, TypeError) as error:
                raise ValueError(f"`space`: {error}") from None
    return space


def _range(name: str, given: Mapping[str, Any]) -> Dimension:
    low, high, log = _number(given["low"]), _number(given.get("high")), given.get("log", False)
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (low, high))
    unknown = set(given) - {"low", "high", "log"}
    if not numbers or unknown or not low < high or not isinstance(log, bool) or (log and low <= 0):
        raise ValueError(
            f"`space`: {name!r} must be {{low: number, high: larger number, log: true or false}}, "
            f"with log low > 0, but is {dict(given)!r}."
        )
    return Dimension(name, low, high, log)


def _number(value: Any) -> Any:
    """Read the number in a text: YAML takes 1e-3, without a point, for one."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _read(path: Path) -> Any:
    try:
        text = read_text(path, 1 << 20)
        if path.suffix.lower() == ".json":
            return parse_json(text)
        import yaml

        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):  # a few lines may stand for gigabytes
                raise ValueError(f"the alias *{event.anchor} must be written out")
        return yaml.safe_load(text)
    except OSError as error:
        raise ValueError(f"`space` {str(path)!r} cannot be read ({error.strerror}).") from None
    except Exception as error:  # of two parsers
        raise ValueError(
            f"`space` {str(path)!r} must be YAML or JSON ({' '.join(str(error).split())})."
        ) from None
