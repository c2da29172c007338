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
import math
import os
import reprlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from html import escape
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from sfda_tune.values.files import check, parse_json, read_text, write_text
from sfda_tune.values.text import csv_line, json_text, printable

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Backbone", "Features", "MetricResult", "Ranking", "Score", "encode_labels"]

FORMAT = "sfda_tune.ranking/1"


class _Value:
    """Pickles by its fields: a `MappingProxyType` cannot be pickled, a constructor call can."""

    def __reduce__(self) -> tuple[Any, ...]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        for name, value in values.items():
            if isinstance(value, MappingProxyType):
                values[name] = dict(value)
        return _rebuild, (type(self), values)


def _rebuild(cls: type, values: dict[str, Any]) -> Any:
    return cls(**values)


def require(name: str, value: Any, rule: str, holds: Any) -> None:
    """Raise a ValueError that names argument, rule and value, unless the rule `holds`."""
    if not holds:
        raise ValueError(f"`{name}` must be {rule} but is {value!r}.")


def _read_only(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view


def encode_labels(labels: Any) -> tuple[np.ndarray, tuple[Hashable, ...]]:
    """Encode labels of any hashable type as 0 … C−1.

    Parameters
    ----------
    labels : sequence of hashable, shape (n_samples,)
        Class labels; need not be numbers, sorted or contiguous.

    Returns
    -------
    codes : ndarray of int64, shape (n_samples,)
    classes : tuple
        ``classes[codes[n]] == labels[n]``; sorted where the labels can be compared, else in the
        order of their `repr`, so that the result never depends on the order of the rows.

    Raises
    ------
    ValueError
        If `labels` is not one-dimensional, or holds a NaN, None or an unhashable value.

    Examples
    --------
    >>> encode_labels(["dog", "cat", "dog"])
    (array([1, 0, 1]), ('cat', 'dog'))
    """
    if hasattr(labels, "detach"):  # a torch tensor, wherever it is
        labels = labels.detach().cpu().numpy()
    if isinstance(labels, np.ndarray):
        if labels.ndim != 1:
            raise ValueError(
                f"`labels` must be one-dimensional (n_samples,) but has shape {labels.shape}; "
                "pass one label per row, for one-hot rows `labels.argmax(axis=1)`."
            )
        labels = labels.tolist()
    try:
        # Scalars of numpy and torch become Python's own: torch's are hashed by identity.
        labels = [v.item() if getattr(v, "ndim", None) == 0 else v for v in labels]
        distinct = set(labels)
    except TypeError as error:
        raise ValueError(
            f"`labels` must be a sequence of hashable labels, one per row ({error})."
        ) from None
    missing = {label for label in distinct if _is_missing(label)}
    if missing:
        rows = [n for n, label in enumerate(labels) if _is_missing(label)]
        raise ValueError(
            f"`labels` must not hold missing values but row {rows[0]} is {labels[rows[0]]!r} "
            f"({len(rows)} such rows); drop those rows from the features too."
        )
    try:
        classes = sorted(distinct)
    except TypeError:
        classes = sorted(distinct, key=lambda label: (type(label).__name__, repr(label)))
    index = {label: code for code, label in enumerate(classes)}
    codes = np.fromiter((index[label] for label in labels), dtype=np.int64, count=len(labels))
    return codes, tuple(classes)


def _is_missing(label: Any) -> bool:
    """Tell None, NaN and pandas' NA, which is neither equal nor unequal to itself."""
    try:
        return label is None or bool(label != label)
    except (TypeError, ValueError):
        return True


@dataclass(frozen=True)
class Backbone:
    """A candidate network: how it is called and how it is obtained.

    Parameters
    ----------
    name : str
        Key in the ranking; unique among the candidates.
    spec : str, default ""
        What `timm.create_model` opens: ``"resnet50.a1_in1k"``, ``"hf-hub:owner/name"`` or
        ``"local-dir:/path"``. Empty if `load` is given.
    load : callable, optional
        Returns ``(module, transform)``: a `torch.nn.Module` that maps a batch to features
        ``(n, n_dims)`` (or ``(n, n_dims, h, w)``, then averaged over h and w) and a transform from
        an RGB `PIL.Image` to a tensor. A module-level function can travel to worker processes.
    plugins : tuple of str
        Files or module names to import first; they register further timm architectures.

    Examples
    --------
    >>> Backbone("resnet50.a1_in1k").spec
    'resnet50.a1_in1k'
    """

    name: str
    spec: str = ""
    load: Callable[[], tuple[Any, Any]] | None = None
    plugins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"`name` of a Backbone must be a non-empty str but is {self.name!r}.")
        if self.load is not None and not callable(self.load):
            raise ValueError(
                f"`load` of Backbone {self.name!r} must be callable but is {self.load!r}; "
                "pass `load=lambda: (module, transform)`."
            )
        if not self.spec and self.load is None:
            object.__setattr__(self, "spec", self.name)
        object.__setattr__(self, "plugins", tuple(self.plugins))


@dataclass(frozen=True, eq=False)
class Features(_Value):
    """Features of one backbone on labelled images.

    Parameters
    ----------
    x : array of float32, shape (n_samples, n_dims)
    y : array of int64, shape (n_samples,)
        Codes into `classes`. Labels of any other kind are encoded if `classes` is not given.
    classes : sequence of hashable, optional
        The label behind each code.
    backbone : str, default ""
        Whose features these are; used in messages.

    Raises
    ------
    ValueError
        Wrong shapes, no rows, NaN or infinite values, codes outside `classes`.

    Examples
    --------
    >>> f = Features(np.eye(3, dtype=np.float32), ["a", "b", "a"], backbone="toy")
    >>> f.classes, f.y
    (('a', 'b'), array([0, 1, 0]))
    """

    x: np.ndarray
    y: np.ndarray
    classes: tuple[Hashable, ...] = ()
    backbone: str = ""

    def __post_init__(self) -> None:
        who = f" of {self.backbone!r}" if self.backbone else ""
        x = np.asarray(self.x)
        if x.ndim != 2 or 0 in x.shape:
            raise ValueError(
                f"`x`{who} must have shape (n_samples, n_dims) with both > 0 but has {x.shape}; "
                "pool or flatten each image's features to one row."
            )
        if x.dtype.kind not in "fiub":
            raise ValueError(f"`x`{who} must be real numbers but has dtype {x.dtype}.")
        x = x.astype(np.float32, copy=False)
        if not np.isfinite(x).all():
            bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
            raise ValueError(
                f"`x`{who} must be finite but {len(bad)} of {len(x)} rows hold NaN or infinity, "
                f"first row {bad[0]}; try precision='float32' or drop the backbone."
            )
        if self.classes:
            y, classes = np.asarray(self.y), tuple(self.classes)
            if y.dtype.kind not in "iu" or y.ndim != 1:
                raise ValueError(
                    f"`y`{who} must be integer codes of shape (n_samples,) when `classes` is "
                    f"given but has dtype {y.dtype}, shape {y.shape}; leave `classes` out to "
                    "have the labels encoded."
                )
            if len(y) and not (y.min() >= 0 and y.max() < len(classes)):
                raise ValueError(
                    f"`y`{who} must lie in 0 … {len(classes) - 1} but spans {y.min()} … {y.max()}."
                )
            y = y.astype(np.int64, copy=False)
        else:
            y, classes = encode_labels(self.y)
        if len(x) != len(y):
            raise ValueError(
                f"`x`{who} and `y` must have the same number of rows but have {len(x)} "
                f"and {len(y)}."
            )
        object.__setattr__(self, "x", _read_only(x))
        object.__setattr__(self, "y", _read_only(y))
        object.__setattr__(self, "classes", classes)

    @property
    def n_samples(self) -> int:
        """Number of rows (images)."""
        return self.x.shape[0]

    @property
    def n_dims(self) -> int:
        """Feature width."""
        return self.x.shape[1]

    def __repr__(self) -> str:
        return (
            f"Features(backbone={self.backbone!r}, n_samples={self.n_samples}, "
            f"n_dims={self.n_dims}, n_classes={len(self.classes)})"
        )


@dataclass(frozen=True, eq=False)
class MetricResult(_Value):
    """What a metric says of one set of features.

    Parameters
    ----------
    value : float
        Higher means more transferable.
    per_sample : array of float64, shape (n_samples,), optional
        The contribution of each image, where the metric has one.
    details : mapping of str to JSON value
        How the value came about, for instance the shrinkage λ.
    """

    value: float
    per_sample: np.ndarray | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", float(self.value))
        if self.per_sample is not None:
            per_sample = np.asarray(self.per_sample, dtype=np.float64)
            object.__setattr__(self, "per_sample", _read_only(per_sample))
        object.__setattr__(self, "details", MappingProxyType(dict(self.details)))

    def __float__(self) -> float:
        return self.value


@dataclass(frozen=True, eq=False)
class Score(_Value):
    """A backbone with its metric value, or with the error that stopped it.

    Parameters
    ----------
    backbone : str
        Name of the backbone.
    value : float
        The metric's value, higher is better; NaN if and only if `error` is set.
    per_sample : array of float64, shape (n_samples,), optional
        Contribution of each image, in the order of the data set's rows.
    n_samples, n_dims : int
        Images scored and feature width; 0 if it failed before.
    details : mapping of str to JSON value
        The metric's details (λ, …) and the measurements of the extraction: ``spec``, ``n_params``,
        ``images_per_second``, ``input_size``, ``peak_memory``, ``peak_batch``, ``cached``.
    seconds : float
        Wall time spent on this backbone: loading, forward passes and scoring.
    error : str or None
        One line, for instance ``"RuntimeError: no weights"``.
    """

    backbone: str
    value: float = math.nan
    per_sample: np.ndarray | None = None
    n_samples: int = 0
    n_dims: int = 0
    details: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    error: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", float(self.value))
        if self.error is None and not math.isfinite(self.value):
            object.__setattr__(self, "error", f"the metric's value is {self.value}")
        if self.error is not None:
            object.__setattr__(self, "value", math.nan)
        if self.per_sample is not None:
            per_sample = np.asarray(self.per_sample, dtype=np.float64)
            object.__setattr__(self, "per_sample", _read_only(per_sample))
        object.__setattr__(self, "details", MappingProxyType(dict(self.details)))


_COLUMNS: tuple[str, ...] = (
    "rank",
    "backbone",
    "score",
    "n_dims",
    "n_params",
    "images_per_second",
    "note",
)
HEADINGS: tuple[str, ...] = ("rank", "backbone", "score", "width", "params", "images/s", "note")


@dataclass(frozen=True, eq=False)
class Ranking(_Value, Mapping[str, float]):
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
        Class codes of the rows behind `Score.per_sample`.
    info : mapping of str to JSON value
        Data set, classes, skipped images, seed, device, precision, seconds, versions.

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
        if self.labels is not None:
            labels = np.asarray(self.labels, dtype=np.int64)
            object.__setattr__(self, "labels", _read_only(labels))
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
            All but those that the images rule out: the best one is among them with this
            probability, however close they are (`sfda_tune.selection.uncertainty.shortlist`); the metric
            must be a mean over images.

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
            from sfda_tune.selection.uncertainty import confidence, shortlist

            return [str(name) for name in shortlist(confidence(self), probability)]
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
            raise ValueError(f"`k` must be an integer ≥ 1 but is {k!r}.")
        return [s.backbone for s in self.scores if s.error is None][: int(k)]

    # Written and read -----------------------------------------------------------------------
    def records(self) -> list[dict[str, Any]]:
        """Return one flat record per backbone, in rank order: what tables and CSV files show."""
        records = []
        for rank, s in enumerate(self.scores, 1):
            note = s.error or str(s.details.get("note", ""))
            records.append(
                dict(
                    zip(
                        _COLUMNS,
                        (
                            None if s.error else rank,
                            s.backbone,
                            None if s.error else s.value,
                            s.n_dims or None,
                            s.details.get("n_params"),
                            s.details.get("images_per_second"),
                            note,
                        ),
                        strict=True,
                    )
                )
            )
        return records

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the ranking as strict JSON text; if `path` is given, write it there atomically.

        Numbers survive the round trip exactly: values as JSON numbers, per-sample arrays as base64
        of little-endian float64 (int64 for the labels).
        """
        text = json_text(
            {
                "format": FORMAT,
                "metric": self.metric,
                "info": _plain(self.info),
                "labels": _pack(self.labels, "<i8"),
                "scores": [
                    {
                        "backbone": s.backbone,
                        "value": None if s.error else s.value,
                        "n_samples": s.n_samples,
                        "n_dims": s.n_dims,
                        "seconds": s.seconds,
                        "error": s.error,
                        "details": _plain(s.details),
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
            _check_rows(scores, labels)
            return cls(tuple(scores), data["metric"], labels, data["info"])
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
        try:
            import pandas as pd
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "Ranking.to_dataframe needs pandas: pip install 'sfda-tune[data]'"
            ) from error
        return pd.DataFrame.from_records(self.records(), columns=list(_COLUMNS))

    def cells(self) -> list[tuple[str, ...]]:
        """Return `records` formatted for people: one tuple of printable texts per backbone."""
        return [
            (
                "–" if r["rank"] is None else str(r["rank"]),
                printable(r["backbone"]),
                "failed" if r["score"] is None else f"{r['score']:.4f}",
                "" if r["n_dims"] is None else str(r["n_dims"]),
                "" if r["n_params"] is None else format_count(r["n_params"]),
                "" if r["images_per_second"] is None else f"{r['images_per_second']:.0f}",
                printable(r["note"]),
            )
            for r in self.records()
        ]

    def __repr__(self) -> str:
        rows = [HEADINGS, *self.cells()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        left = {1, 6}  # names and notes; numbers are aligned to the right
        lines = [
            "  ".join(
                cell.ljust(width) if k in left else cell.rjust(width)
                for k, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        metric = printable(self.metric) or "score"
        return "\n".join([f"Ranking by {metric} ({self._summary()})", *lines])

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(h)}</th>" for h in HEADINGS)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self.cells()
        )
        metric = printable(self.metric) or "score"
        caption = escape(f"Ranking by {metric} ({self._summary()})")
        return (
            f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table>"
        )

    def _summary(self) -> str:
        parts = [f"{len(self)} backbones"]
        if self.failed:
            parts.append(f"{len(self.failed)} failed")
        if "dataset" in self.info:
            parts.append(printable(self.info["dataset"]))
        n_samples = max((s.n_samples for s in self.scores), default=0)
        if n_samples:
            parts.append(f"{n_samples} images")
        return ", ".join(parts)


def format_count(n: float) -> str:
    """Format a count for people.

    >>> [format_count(n) for n in (950, 25_557_032, 1_840_000_000)]
    ['950', '25.6M', '1.84B']
    """
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.0f}"


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
