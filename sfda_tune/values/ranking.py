"""The nouns of `sfda_tune`: immutable, validated, free of torch and of every host.

==============  ==================================================================
`Backbone`      a candidate: its name and how to obtain it
`Features`      what a frozen backbone makes of the images, with their labels
`MetricResult`  what a metric says of one `Features`
`Score`         a backbone with its metric value, or with the error that stopped it
`Ranking`       all scores, best first; a mapping from backbone to value
==============  ==================================================================

Arrays are handed out as read-only *views*: freezing the array itself would freeze the caller's.
"""

from __future__ import annotations

import base64
import importlib
import math
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from html import escape
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from sfda_tune.values.features import Score, Value, read_only
from sfda_tune.values.files import check, parse_json, read_text, write_text
from sfda_tune.values.lazy import import_optional
from sfda_tune.values.text import csv_line, format_count, integer, json_text, printable

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Ranking"]

FORMAT = "sfda_tune.ranking/1"
# What `records` hold, and what people read above them
_COLUMNS = (
    "rank", "backbone", "forecast", "interval_low", "interval_high", "rank_low", "rank_high",
    "p_best", "group", "score", "n_dims", "n_params", "images_per_second", "why", "note",
)  # fmt: skip
HEADINGS: tuple[str, ...] = (
    "rank", "backbone", "forecast", "score", "90% interval", "90% ranks", "P(best)", "group",
    "width", "params", "images/s", "because of", "note",
)  # fmt: skip
_ODDS = ("interval_low", "interval_high", "rank_low", "rank_high", "p_best", "group")
_OF_FORECAST = ("forecast", "because of")
_OF_ODDS = ("90% interval", "90% ranks", "P(best)", "group")


@dataclass(frozen=True, eq=False)
class Ranking(Value, Mapping[str, float]):
    """Scores of all candidates, best first; failed ones last, with their error.

    A mapping from backbone name to value, so that anything that takes ``{name: score}`` takes a
    ranking. Ties are broken by name; a failed backbone has the value NaN and is never dropped.

    Parameters
    ----------
    scores : iterable of Score
        In any order.
    metric : str, default ""
        What was scored, for instance ``"sfda (official)"``.
    labels : array of int64, shape (n_samples,), optional
        Class codes of the rows behind `Score.per_sample`; all 0 for numbers to predict
        and several labels.
    info : mapping of str to JSON value
        Data set, classes, skipped images, seed, device, precision, seconds, versions.
    groups : array of int64, shape (n_samples,), optional
        Codes of what these rows belong to, where some were left out together.

    Examples
    --------
    >>> r = Ranking([Score("a", .2), Score("b", .9), Score("c", error="OSError: no weights")])
    >>> list(r), r["b"], r.shortlist(1)
    (['b', 'a', 'c'], 0.9, ['b'])
    >>> Ranking.from_json(r.to_json()).shortlist(5)
    ['b', 'a']
    """

    scores: tuple[Score, ...]
    metric: str = ""
    labels: np.ndarray | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    groups: np.ndarray | None = None

    def __post_init__(self) -> None:
        scores = tuple(
            sorted(
                self.scores,
                key=lambda s: (s.error is not None, 0.0 if s.error else -s.value, s.backbone),
            )
        )
        names = [score.backbone for score in scores]
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"`scores` must name each backbone once but repeats {twice}.")
        object.__setattr__(self, "scores", scores)
        for name in ("labels", "groups"):
            if (codes := getattr(self, name)) is not None:
                object.__setattr__(self, name, read_only(np.asarray(codes, dtype=np.int64)))
        object.__setattr__(self, "info", MappingProxyType(dict(self.info)))

    @cached_property
    def _by_name(self) -> dict[str, Score]:
        return {score.backbone: score for score in self.scores}

    def __getitem__(self, backbone: str) -> float:
        return self._by_name[backbone].value

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self.scores)

    def score(self, backbone: str) -> Score:
        """Return the whole `Score` of one backbone."""
        return self._by_name[backbone]

    @property
    def failed(self) -> dict[str, str]:
        """The backbones that could not be scored, each with its error."""
        return {s.backbone: s.error for s in self.scores if s.error is not None}

    @property
    def costs(self) -> dict[str, float]:
        """Seconds of a forward pass of one image, of every backbone for which they were measured.

        What a trial costs is nearly proportional; see `costs` of the sampler and the searcher.
        """
        speeds = {s.backbone: s.details.get("images_per_second") for s in self.scores}
        return {name: 1 / float(speed) for name, speed in speeds.items() if speed}

    def shortlist(self, k: int | None = None, *, probability: float | None = None) -> list[str]:
        """Return the best backbones: the first `k`, or all that may be the best.

        Parameters
        ----------
        k : int, optional
            So many (fewer if fewer could be scored).
        probability : float in (0, 1], optional
            So many that the best one is among them with this probability: by the forecast the
            best after training, otherwise the best by score, however close they are
            (`sfda_tune.selection.uncertainty.shortlist`; it must be a mean over images).

        Raises
        ------
        ValueError
            If not exactly one of the two is given, or it is out of range.
        """
        if (k is None) == (probability is None):
            raise ValueError(
                f"`k` or `probability` must be given, and one only, but they are {k!r} and "
                f"{probability!r}; shortlist(5), or shortlist(probability=0.95)."
            )
        if probability is not None:
            # by its name, when it is asked for: values import nothing that lies above them
            odds = importlib.import_module("sfda_tune.selection.odds").judge(self)
            list_best = importlib.import_module("sfda_tune.selection.uncertainty").shortlist
            return [str(name) for name in list_best(odds, probability)]
        k = integer("k", k, 1)
        return [s.backbone for s in self.scores if s.error is None][:k]

    # Written and read -----------------------------------------------------------------------
    def records(self) -> list[dict[str, Any]]:
        """Return one flat record per backbone, in rank order: what tables and CSV files show.

        Of what the ranking is ordered by: the 90 % interval, the 90 % ranks, P(best), and as
        letters the groups of those that cannot be told apart; all None where they are not known,
        as of a metric that is no mean over images. `forecast` and `why` are None in a ranking by
        a score alone.
        """
        return [_record(rank, s, self._odds) for rank, s in enumerate(self.scores, 1)]

    @cached_property
    def _odds(self) -> dict[str, dict[str, Any]]:
        """What is known of the place of each backbone: the fields `_ODDS`."""
        good = [s for s in self.scores if s.error is None]
        noted = {s.backbone: s.details.get("forecast") or {} for s in good}
        if noted and all(isinstance(of.get("group"), str) for of in noted.values()):
            return {name: {key: of.get(key) for key in _ODDS} for name, of in noted.items()}
        # by its name, when it is asked for: values import nothing that lies above them
        odds = importlib.import_module("sfda_tune.selection.odds").find_odds(self)
        return (
            {r["backbone"]: {key: r[key] for key in _ODDS} for r in odds.records()} if odds else {}
        )

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the ranking as strict JSON text; if `path` is given, write it there atomically.

        Numbers survive the round trip exactly: values as JSON numbers, per-sample arrays as base64
        of little-endian float64 (int64 for the labels). `odds` are for other readers: whoever
        reads the ranking again counts them anew.
        """
        text = json_text(
            {
                "format": FORMAT,
                "metric": self.metric,
                "info": _plain(self.info),
                "labels": _pack(self.labels, "<i8"),
                **({} if self.groups is None else {"groups": _pack(self.groups, "<i8")}),
                "scores": [
                    {
                        "backbone": s.backbone,
                        "value": None if s.error else s.value,
                        "n_samples": s.n_samples,
                        "n_dims": s.n_dims,
                        "seconds": s.seconds,
                        "error": s.error,
                        "details": _plain(s.details),
                        "odds": self._odds.get(s.backbone),
                        "per_sample": _pack(s.per_sample, "<f8"),
                    }
                    for s in self.scores
                ],
            }
        )
        if path is not None:
            write_text(path, text + "\n")
        return text

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> Ranking:
        """Read a ranking from JSON text or from a file that `to_json` wrote.

        Raises
        ------
        ValueError
            If the text is not a ranking.
        """
        from sfda_tune.values.formats import RANKING

        is_text = isinstance(source, str) and source.lstrip().startswith("{")
        text = str(source) if is_text else None
        try:
            data = parse_json(read_text(source) if text is None else text)
            if not isinstance(data, dict) or data.get("format") != FORMAT:
                found = data.get("format") if isinstance(data, dict) else data
                raise ValueError(f"its format is {reprlib.repr(found)}, not {FORMAT!r}")
            check(data, RANKING)
            scores = [
                Score(
                    **{
                        **{f.name: entry[f.name] for f in fields(Score)},
                        "value": math.nan if entry["value"] is None else entry["value"],
                        "per_sample": _unpack(entry["per_sample"], "<f8"),
                    }
                )
                for entry in data["scores"]
            ]
            labels = _unpack(data["labels"], "<i8")
            groups = _unpack(data.get("groups"), "<i8")
            _check_rows(scores, labels)
            if groups is not None and (labels is None or len(groups) != len(labels)):
                raise ValueError("`groups` must be as many as there are labels")
            return cls(tuple(scores), data["metric"], labels, data["info"], groups)
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:
            where = "the text" if is_text else repr(os.fspath(source))
            why = getattr(error, "strerror", None) or error
            raise ValueError(
                f"`source` must be a ranking written by Ranking.to_json but {where} is not "
                f"({why})."
            ) from error

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return `records` as CSV text and, if `path` is given, write it there atomically.

        Names that a spreadsheet would run begin with an apostrophe, see `sfda_tune.values.text`.
        """
        rows = [_COLUMNS, *(record.values() for record in self.records())]
        text = "".join(map(csv_line, rows))
        if path is not None:
            write_text(path, text)
        return text

    def to_dataframe(self) -> pd.DataFrame:
        """Return `records` as a `pandas.DataFrame` (needs pandas: extra ``data``)."""
        advice = "Ranking.to_dataframe needs pandas: pip install 'sfda-tune[data]'"
        pd = import_optional("pandas", advice)
        return pd.DataFrame.from_records(self.records(), columns=list(_COLUMNS))

    @property
    def headings(self) -> tuple[str, ...]:
        """What people read above `cells`."""
        of_forecast = any("forecast" in s.details for s in self.scores)
        hidden = {*(() if of_forecast else _OF_FORECAST), *(() if self._odds else _OF_ODDS)}
        order = [h for h in HEADINGS if h not in hidden]
        if of_forecast:  # the score stands behind what orders
            order.remove("score")
            order.insert(order.index("width"), "score")
        return tuple(order)

    def cells(self) -> list[tuple[str, ...]]:
        """Return `records` formatted for people: one tuple of printable texts per backbone."""
        rows = [dict(zip(HEADINGS, _cells(r), strict=True)) for r in self.records()]
        return [tuple(row[heading] for heading in self.headings) for row in rows]

    def __repr__(self) -> str:
        rows = [self.headings, *self.cells()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        left = {
            k for k, h in enumerate(rows[0]) if h in ("backbone", "group", "because of", "note")
        }
        lines = [
            "  ".join(
                cell.ljust(width) if k in left else cell.rjust(width)
                for k, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([self._title(), *lines])

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(h)}</th>" for h in self.headings)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self.cells()
        )
        return (
            f"<table><caption>{escape(self._title())}</caption><thead><tr>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table>"
        )

    def _title(self) -> str:
        parts = [f"{len(self)} backbones"]
        if self.failed:
            parts.append(f"{len(self.failed)} failed")
        if "dataset" in self.info:
            parts.append(printable(self.info["dataset"]))
        n_samples = max((s.n_samples for s in self.scores), default=0)
        if n_samples:
            parts.append(f"{n_samples} images")
        return f"Ranking by {printable(self.metric) or 'score'} ({', '.join(parts)})"


def _record(rank: int, s: Score, odds: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    of = {} if s.error else s.details.get("forecast") or {}
    score = s.details.get("evidence") if of else s.value
    return {
        "rank": None if s.error else rank,
        "backbone": s.backbone,
        "forecast": s.value if of else None,
        **(dict.fromkeys(_ODDS) | dict(odds.get(s.backbone, {}))),
        "score": None if s.error else score,
        "n_dims": s.n_dims or None,
        "n_params": s.details.get("n_params"),
        "images_per_second": s.details.get("images_per_second"),
        "why": of.get("why"),
        "note": s.error or str(s.details.get("note", "")),
    }


def _cells(r: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = r["rank_low"], r["rank_high"]
    form = ".4f" if r["forecast"] is None else "+.2f"
    ends = [f"{v:{form}}" for v in (r["interval_low"], r["interval_high"]) if v is not None]
    return (
        "–" if r["rank"] is None else str(r["rank"]),
        printable(r["backbone"]),
        "" if r["forecast"] is None else f"{r['forecast']:+z.2f}",
        _name_failure(r) if r["score"] is None else f"{r['score']:.4f}",
        " to ".join(ends),
        "" if low is None else f"{low}" if low == high else f"{low}–{high}",
        "" if r["p_best"] is None else f"{r['p_best']:.2f}",
        r["group"] or "",
        "" if r["n_dims"] is None else str(r["n_dims"]),
        "" if r["n_params"] is None else format_count(r["n_params"]),
        "" if r["images_per_second"] is None else f"{r['images_per_second']:.0f}",
        printable(r["why"] or ""),
        printable(r["note"]),
    )


def _name_failure(r: Mapping[str, Any]) -> str:
    unseen = r["note"].startswith("not looked at")
    return "" if unseen or r["rank"] is not None else "failed"


def _plain(value: Any) -> Any:
    """Turn details and info into strict JSON: no NaN, no NumPy, names for everything unknown."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _check_rows(scores: Iterable[Score], labels: np.ndarray | None) -> None:
    """See that the contributions of the images are finite numbers, one for each label."""
    n = None if labels is None else len(labels)
    if labels is not None and n and labels.min() < 0:
        raise ValueError("`labels` must be ≥ 0")
    for score in scores:
        if score.per_sample is not None:
            n = len(score.per_sample) if n is None else n
            if len(score.per_sample) != n or not np.isfinite(score.per_sample).all():
                raise ValueError(
                    f"`per_sample` of {score.backbone!r} must be {n} finite numbers, as many as "
                    "there are labels"
                )


def _pack(array: np.ndarray | None, dtype: str) -> str | None:
    if array is None:
        return None
    return base64.b64encode(np.ascontiguousarray(array, dtype=dtype).tobytes()).decode("ascii")


def _unpack(text: str | None, dtype: str) -> np.ndarray | None:
    if text is None:
        return None
    return np.frombuffer(base64.b64decode(text, validate=True), dtype=dtype)
