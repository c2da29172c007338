"""A benchmark problem over a table of real fine-tuning runs, in the format of OptunaHub."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution

from sfda_tune.values.files import read_rows
from sfda_tune.values.text import as_tuple

try:
    from optunahub.benchmarks import BaseProblem
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "optunahub":
        raise
    raise ModuleNotFoundError(
        "BackboneSelectionProblem needs optunahub: pip install optunahub", name="optunahub"
    ) from error

__all__ = ["BackboneSelectionProblem"]


class BackboneSelectionProblem(BaseProblem):
    """Look up what a backbone reached with given hyper-parameters, instead of fine-tuning it.

    Repeated runs are averaged. A backbone that lacks a run for some combination of `params` is
    dropped, so that every point of the search space has a value.

    Parameters
    ----------
    table : path of a CSV file, or iterable of mappings
        One run per row.
    backbone : str, default "backbone"
        Column with the backbone; also the name of the parameter.
    params : sequence of str, default ("lr",)
        Columns with hyper-parameters; each becomes a categorical parameter.
    value : str, default "accuracy"
        Column with the result, which is maximised.
    seconds : str, optional
        Column with the duration of the run.
    where : mapping, optional
        Use only rows with these values, for instance ``{"dataset": "cifar100"}``.
    proxy_scores : mapping of str to float, optional
        Scores known before any run, for whoever uses the problem.

    Attributes
    ----------
    backbones, dropped : tuple of str
    costs : dict of str to float
        Mean seconds of each backbone; empty without `seconds`.
    best_value : float

    Examples
    --------
    >>> runs = [
    ...     {"backbone": "vit", "lr": 0.1, "accuracy": 0.3},
    ...     {"backbone": "vit", "lr": 0.01, "accuracy": 0.9},
    ...     {"backbone": "resnet", "lr": 0.1, "accuracy": 0.5},
    ...     {"backbone": "resnet", "lr": 0.01, "accuracy": 0.7},
    ... ]
    >>> problem = BackboneSelectionProblem(runs)
    >>> problem.evaluate({"backbone": "vit", "lr": 0.01}), problem.best_value
    (0.9, 0.9)
    """

    def __init__(
        self,
        table: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
        *,
        backbone: str = "backbone",
        params: Sequence[str] = ("lr",),
        value: str = "accuracy",
        seconds: str | None = None,
        where: Mapping[str, Any] | None = None,
        proxy_scores: Mapping[str, float] | None = None,
    ) -> None:
        params = as_tuple("params", params)
        runs: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
        columns = (backbone, *params, value, *([seconds] if seconds else []), *(where or {}))
        for row in read_rows(table, ()) if isinstance(table, (str, os.PathLike)) else table:
            missing = [column for column in columns if column not in row]
            if missing:
                raise ValueError(f"`table` must have the columns {columns} but lacks {missing}.")
            if all(str(row[k]) == str(v) for k, v in (where or {}).items()):
                key = (str(row[backbone]), *(_parse(row[name]) for name in params))
                cost = float(row[seconds]) if seconds else math.nan
                runs.setdefault(key, []).append((float(row[value]), cost))
        means = {
            key: tuple(sum(column) / len(pairs) for column in zip(*pairs, strict=True))
            for key, pairs in runs.items()
        }
        levels = [sorted({key[i + 1] for key in means}) for i in range(len(params))]
        n_points = math.prod(len(level) for level in levels)
        names = sorted({key[0] for key in means})
        counts = {name: sum(key[0] == name for key in means) for name in names}
        self.backbones = tuple(name for name in names if counts[name] == n_points)
        self.dropped = tuple(name for name in names if counts[name] != n_points)
        if not self.backbones:
            raise ValueError(
                f"`table` must hold a backbone with all {n_points} combinations of {params} but "
                f"none of {len(names)} has; name fewer `params` or narrow `where`."
            )
        self._runs = {key: pair for key, pair in means.items() if key[0] in self.backbones}
        self._space = {
            backbone: CategoricalDistribution(self.backbones),
            **{
                name: CategoricalDistribution(level)
                for name, level in zip(params, levels, strict=True)
            },
        }
        self.best_value = max(pair[0] for pair in self._runs.values())
        self.proxy_scores = dict(proxy_scores or {})
        self.costs: dict[str, float] = {}
        if seconds:
            for name in self.backbones:
                costs = [pair[1] for key, pair in self._runs.items() if key[0] == name]
                self.costs[name] = sum(costs) / len(costs)

    def evaluate(self, params: dict[str, Any]) -> float:
        """Return the mean result of the runs with these parameters."""
        return self._look_up(params)[0]

    def read_seconds(self, params: Mapping[str, Any]) -> float:
        """Return the mean duration of the runs with these parameters, NaN if unknown."""
        return self._look_up(params)[1]

    @property
    def search_space(self) -> dict[str, BaseDistribution]:
        """The backbone and the hyper-parameters, all categorical."""
        return dict(self._space)

    @property
    def directions(self) -> list[optuna.study.StudyDirection]:
        """One objective, maximised."""
        return [optuna.study.StudyDirection.MAXIMIZE]

    def _look_up(self, params: Mapping[str, Any]) -> tuple[float, ...]:
        key = tuple(params[name] for name in self._space)
        if key not in self._runs:
            raise ValueError(f"`params` must be a point of `search_space` but is {dict(params)}.")
        return self._runs[key]


def _parse(value: Any) -> Any:
    """Return a number if it is one: CSV knows only text."""
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                pass
    return value
