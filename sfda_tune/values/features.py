"""A candidate, its features, and what a metric says of them: immutable and validated."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, fields, replace
from html import escape
from types import MappingProxyType
from typing import Any

import numpy as np

from sfda_tune.values.files import LARGEST_NUMBER
from sfda_tune.values.labels import NOUNS, as_indicators, encode_labels
from sfda_tune.values.text import as_tuple, format_count, integer, one_line, printable

__all__ = ["Backbone", "Features", "MetricResult", "Score"]


class Value:
    """Pickles by its fields: a `MappingProxyType` cannot be pickled, a constructor call can."""

    def __reduce__(self) -> tuple[Any, ...]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        for name, value in values.items():
            if isinstance(value, MappingProxyType):
                values[name] = dict(value)
        return _rebuild, (type(self), values)


def _rebuild(cls: type, values: dict[str, Any]) -> Any:
    return cls(**values)


def read_only(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view


def _freeze(result: MetricResult | Score) -> None:
    object.__setattr__(result, "value", float(result.value))
    if result.per_sample is not None:
        per_sample = np.asarray(result.per_sample, dtype=np.float64)
        object.__setattr__(result, "per_sample", read_only(per_sample))
    object.__setattr__(result, "details", MappingProxyType(dict(result.details)))


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
    channels : int, default 3
        Of the images; the first convolution of a network of timm's is adapted to any other number
        as ``timm.create_model(…, in_chans=channels)`` does. A transform of your own is given an
        array of uint8 (h, w, channels) then.

    Examples
    --------
    >>> Backbone("resnet50.a1_in1k").spec
    'resnet50.a1_in1k'
    """

    name: str
    spec: str = ""
    load: Callable[[], tuple[Any, Any]] | None = None
    plugins: tuple[str, ...] = ()
    channels: int = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", integer("channels", self.channels, 1))
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"`name` of a Backbone must be a non-empty str but is {self.name!r}.")
        if self.load is not None and not callable(self.load):
            raise ValueError(
                f"`load` of Backbone {self.name!r} must be callable but is {self.load!r}; "
                "pass `load=lambda: (module, transform)`."
            )
        if not self.spec and self.load is None:
            object.__setattr__(self, "spec", self.name)
        object.__setattr__(self, "plugins", as_tuple("plugins", self.plugins))

    def taking(self, channels: int) -> Backbone:
        """Return the same candidate for images of so many channels.

        >>> Backbone("resnet50.a1_in1k").taking(13).channels
        13
        """
        return self if channels == self.channels else replace(self, channels=channels)


@dataclass(frozen=True, eq=False)
class Features(Value):
    """Features of one backbone on labelled images.

    Parameters
    ----------
    x : array of float32, shape (n_samples, n_dims)
    y : array of int64, shape (n_samples,)
        Codes into `classes`. Labels of any other kind are encoded if `classes` is not given.
    classes : sequence of hashable, optional
        The label behind each code (for "multilabel" of each column).
    backbone : str, default ""
        Whose features these are; used in messages.
    groups : sequence of hashable, shape (n_samples,), optional
        Images that belong together, which metrics leave out together.
    task : {"classification", "regression", "ordinal", "multilabel"}
        For "regression" `y` are the numbers to predict, float64, and there are no classes. For
        "ordinal" `classes` are levels, from the lowest to the highest. For
        "multilabel" `y` is int8, (n_samples, n_labels): 1 where a label applies, 0 where not, −1
        where it is not known.

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
    groups: np.ndarray | None = None
    task: str = "classification"

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
        if self.task == "regression":
            y, classes = np.asarray(self.y, np.float64), ()
            if y.ndim != 1 or not np.isfinite(y).all():
                raise ValueError(f"`y`{who} must be finite numbers, one per row, for regression.")
        elif self.task == "multilabel":
            y = as_indicators(self.y)
            classes = tuple(self.classes) or tuple(range(y.shape[1]))
            if len(classes) != y.shape[1]:
                raise ValueError(
                    f"`classes`{who} must name the {y.shape[1]} columns of `y` but are "
                    f"{len(classes)}."
                )
        elif self.classes:
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
        if self.groups is not None:
            groups, _ = encode_labels(self.groups)
            if len(groups) != len(x):
                raise ValueError(
                    f"`groups`{who} must have one group per row but has {len(groups)} for "
                    f"{len(x)} rows."
                )
            object.__setattr__(self, "groups", read_only(groups))
        object.__setattr__(self, "x", read_only(x))
        object.__setattr__(self, "y", read_only(y))
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
            f"n_dims={self.n_dims}, "
            + (
                "task='regression')"
                if self.task == "regression"
                else f"n_{NOUNS.get(self.task, 'classes')}={len(self.classes)})"
            )
        )


@dataclass(frozen=True, eq=False)
class MetricResult(Value):
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
        _freeze(self)

    def __float__(self) -> float:
        return self.value


@dataclass(frozen=True, eq=False, repr=False)
class Score(Value):
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
        ``images_per_second``, ``batch``, ``input_size``, ``peak_memory``, ``peak_batch``,
        ``cached``.
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
        _freeze(self)
        if self.error is None and not abs(self.value) < LARGEST_NUMBER:  # or NaN
            object.__setattr__(self, "error", f"the metric's value is {self.value}")
        if self.error is not None:
            object.__setattr__(self, "value", math.nan)

    def __repr__(self) -> str:
        return f"Score({printable(self.backbone)!r}, {self._say()})"

    def _repr_html_(self) -> str:
        return f"<p><strong>{escape(printable(self.backbone))}</strong>: {escape(self._say())}</p>"

    def _say(self) -> str:
        if self.error is not None:
            return f"failed: {one_line(self.error, 120)}"
        params = self.details.get("n_params")
        parts = [
            f"{self.n_samples} images" * bool(self.n_samples),
            f"width {self.n_dims}" * bool(self.n_dims),
            f"{format_count(params)} parameters" if params else "",
        ]
        return ", ".join([f"{self.value:.4f}", *filter(None, parts)])
