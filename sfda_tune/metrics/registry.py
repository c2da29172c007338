"""The list of metrics: a name for each, what it needs, what it costs and when it misleads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar, overload

from sfda_tune.values.features import MetricResult

__all__ = ["METRICS", "Metric", "MetricInfo", "describe_metrics", "get_metric", "register_metric"]

Metric: TypeAlias = Callable[..., float | MetricResult]
F = TypeVar("F", bound=Callable[..., Any])

METRICS: dict[str, Metric] = {}
NEEDS = ("features", "logits", "hub", "prior")


class MetricInfo(NamedTuple):
    """What `register_metric` was told of a metric.

    ``needs``: ``"features"`` of the target images, ``"logits"`` of the source classifier on them,
    the whole ``"hub"`` to scale by, or a ``"prior"`` known by name. ``cost`` for N samples, D
    dimensions, C classes.
    """

    name: str
    needs: tuple[str, ...] = ("features",)
    cost: str = ""
    source: str = ""
    misleads: str = ""


_INFO: dict[str, MetricInfo] = {}


@overload
def register_metric(
    function: F, *, name: str | None = ..., needs: str | Sequence[str] = ..., **about: Any
) -> F: ...


@overload
def register_metric(
    *, name: str | None = ..., needs: str | Sequence[str] = ..., **about: Any
) -> Callable[[F], F]: ...


def register_metric(
    function: F | None = None,
    *,
    name: str | None = None,
    needs: str | Sequence[str] = "features",
    **about: str,
) -> F | Callable[[F], F]:
    """Give a metric a name, as a decorator with or without arguments.

    Parameters
    ----------
    function : callable
        ``f(features, labels) -> float | MetricResult``.
    name : str, optional
        The function's own name by default.
    needs : str or sequence of str, default "features"
        Of ``"features"``, ``"logits"``, ``"hub"``, ``"prior"``; see `MetricInfo`.
    **about
        ``cost``, ``source``, ``misleads``, texts for `describe_metrics`: flops or order, paper
        and venue, when the value is wrong.

    Returns
    -------
    callable
        The function, unchanged.

    Raises
    ------
    ValueError
        If `function` is not callable, the name is taken by another function, or `needs` holds
        anything else. Defining the same function again, in a notebook for instance, replaces it.

    Examples
    --------
    >>> from sfda_tune.metrics import METRICS, get_metric, register_metric
    >>> @register_metric(name="spread")
    ... def trace(features, labels):
    ...     return float(features.var(axis=0).sum())
    >>> get_metric("spread") is trace
    True
    >>> _ = METRICS.pop("spread")
    """
    needs = (needs,) if isinstance(needs, str) else tuple(needs)
    if not needs or not set(needs) <= set(NEEDS):
        names = ", ".join(map(repr, NEEDS))
        raise ValueError(f"`needs` must be one or more of {names} but is {needs!r}.")

    def register(function: F) -> F:
        if not callable(function):
            raise ValueError(
                f"`function` must be callable as f(features, labels) but is {function!r}; "
                "write `@register_metric` or `@register_metric(name=...)` above a function."
            )
        key = getattr(function, "__name__", None) if name is None else name
        if not isinstance(key, str) or not key:
            raise ValueError(
                f"`name` must be a non-empty str but is {key!r}; pass `name=` for {function!r}."
            )
        holder = METRICS.get(key)
        if holder is not None and _origin(holder) != _origin(function):
            raise ValueError(
                f"`name` must be free but {key!r} belongs to {'.'.join(_origin(holder))}; "
                "choose another one with `name=`."
            )
        METRICS[key] = function
        _INFO[key] = MetricInfo(key, needs, **about)
        return function

    return register if function is None else register(function)


def _origin(function: Any) -> tuple[str, str]:
    module = getattr(function, "__module__", "")
    return str(module), str(getattr(function, "__qualname__", repr(function)))


def get_metric(metric: str | Metric) -> Metric:
    """Look up a metric by name; a callable is returned as it is.

    Parameters
    ----------
    metric : str or callable
        A key of `METRICS`, or ``f(features, labels) -> float | MetricResult``.

    Returns
    -------
    callable

    Raises
    ------
    ValueError
        If `metric` is neither; the message lists the registered names.

    Examples
    --------
    >>> from sfda_tune.metrics import get_metric
    >>> from sfda_tune.metrics.sfda import sfda
    >>> get_metric("sfda") is sfda
    True
    """
    if callable(metric):
        return metric
    if isinstance(metric, str) and metric in METRICS:
        return METRICS[metric]
    names = ", ".join(map(repr, sorted(METRICS)))
    raise ValueError(
        f"`metric` must be one of {names} or a function f(features, labels) but is {metric!r}; "
        "name your own with `@register_metric`."
    )


def describe_metrics() -> list[MetricInfo]:
    """List the registered metrics with what is known of them.

    Returns
    -------
    list of MetricInfo
        Named tuples (name, needs, cost, source, misleads), sorted by name; `MetricInfo._fields`
        is the heading of the table.

    Examples
    --------
    >>> from sfda_tune.metrics import describe_metrics
    >>> [info.name for info in describe_metrics() if "logits" in info.needs]
    ['leep', 'nce']
    """
    return [_INFO.get(name, MetricInfo(name)) for name in sorted(METRICS)]
