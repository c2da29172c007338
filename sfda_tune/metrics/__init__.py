"""Transferability metrics: functions of the features and labels of one backbone.

=======  ==========================  ===========================  ================================
Metric   Needs                       Cost (N samples, D dims)     Reference
=======  ==========================  ===========================  ================================
`sfda`   features, ≥ 2 classes       2ND² + ⅔D³; 2N²D + ⅔N³ if    Shao et al., ECCV 2022,
                                     N < D                        doi:10.1007/978-3-031-19830-4_17
=======  ==========================  ===========================  ================================

A metric is any ``f(features, labels)`` that returns a float or a `MetricResult`, higher meaning
more transferable. A function can be handed over as it is; `register_metric` gives it a name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar, overload

from sfda_tune.metrics.sfda import sfda
from sfda_tune.values import MetricResult

__all__ = ["METRICS", "Metric", "get_metric", "register_metric", "sfda"]

Metric: TypeAlias = Callable[..., float | MetricResult]
F = TypeVar("F", bound=Callable[..., Any])

METRICS: dict[str, Metric] = {}


@overload
def register_metric(function: F, *, name: str | None = None) -> F: ...


@overload
def register_metric(*, name: str | None = None) -> Callable[[F], F]: ...


def register_metric(function: F | None = None, *, name: str | None = None) -> F | Callable[[F], F]:
    """Give a metric a name, as a decorator with or without arguments.

    Parameters
    ----------
    function : callable
        ``f(features, labels) -> float | MetricResult``.
    name : str, optional
        The function's own name by default.

    Returns
    -------
    callable
        The function, unchanged.

    Raises
    ------
    ValueError
        If `function` is not callable, or the name is taken by another function. Defining the same
        function again, in a notebook for instance, replaces it.

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
    >>> from sfda_tune.metrics import get_metric, sfda
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


register_metric(sfda)
