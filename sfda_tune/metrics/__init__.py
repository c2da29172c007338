"""Transferability metrics: functions of the features and labels of one backbone.

A metric is any ``f(features, labels)`` that returns a float or a `MetricResult`, higher meaning
more transferable. A function can be handed over as it is; `register_metric` gives it a name, and
says what it needs, what it costs, where it comes from and when it misleads. `describe_metrics`
lists all that; the docstrings have the formulas.

=================  ===============================================================================
`sfda`             self-challenging Fisher discriminant analysis
`logme`            evidence of a Bayesian linear model
`hscore`           variance between classes over regularised variance
`transrate`        coding rate saved by the class
`gbc`              overlap of spherical classes
`parc`             rank correlation of feature and label distances
`ncti`             neural collapse in three parts, for `combine_hub`
`nleep`            clusters that predict the classes
`tmi`              variance within classes
`ped`              repulsion between classes, then another metric
`pactran`          PAC-Bayes bound of a linear classifier
`etran`            LDA posterior and energy, for `combine_hub`
`knn`              leave-one-out accuracy of nearest neighbours
`linear_probe`     cross-validated accuracy of a linear classifier
`leep`, `nce`      prediction from the outputs of the source classifier (`logits`)
`imagenet_prior`   published ImageNet accuracy, by name
`params_prior`     number of parameters, by name
`combine`          rank or min–max average of several scores
=================  ===============================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar, overload

from sfda_tune.metrics.combine import combine, combine_hub
from sfda_tune.metrics.etran import etran
from sfda_tune.metrics.gbc import gbc
from sfda_tune.metrics.hscore import hscore
from sfda_tune.metrics.knn import knn
from sfda_tune.metrics.leep import leep
from sfda_tune.metrics.linear_probe import linear_probe
from sfda_tune.metrics.logme import logme
from sfda_tune.metrics.nce import nce
from sfda_tune.metrics.ncti import ncti
from sfda_tune.metrics.nleep import nleep
from sfda_tune.metrics.pactran import pactran
from sfda_tune.metrics.parc import parc
from sfda_tune.metrics.ped import ped
from sfda_tune.metrics.priors import imagenet, imagenet_prior, params, params_prior
from sfda_tune.metrics.sfda import sfda
from sfda_tune.metrics.tmi import tmi
from sfda_tune.metrics.transrate import transrate
from sfda_tune.values.features import MetricResult

__all__ = [
    "METRICS",
    "Metric",
    "MetricInfo",
    "combine",
    "combine_hub",
    "describe_metrics",
    "etran",
    "gbc",
    "get_metric",
    "hscore",
    "imagenet_prior",
    "knn",
    "leep",
    "linear_probe",
    "logme",
    "nce",
    "ncti",
    "nleep",
    "pactran",
    "params_prior",
    "parc",
    "ped",
    "register_metric",
    "sfda",
    "tmi",
    "transrate",
]

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
    function: F,
    *,
    name: str | None = None,
    needs: str | Sequence[str] = "features",
    cost: str = "",
    source: str = "",
    misleads: str = "",
) -> F: ...


@overload
def register_metric(
    *,
    name: str | None = None,
    needs: str | Sequence[str] = "features",
    cost: str = "",
    source: str = "",
    misleads: str = "",
) -> Callable[[F], F]: ...


def register_metric(
    function: F | None = None,
    *,
    name: str | None = None,
    needs: str | Sequence[str] = "features",
    cost: str = "",
    source: str = "",
    misleads: str = "",
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
    cost, source, misleads : str, default ""
        For `describe_metrics`: flops or order, paper and venue, when the value is wrong.

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
        _INFO[key] = MetricInfo(key, needs, cost, source, misleads)
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


register_metric(
    sfda,
    cost="2ND² + ⅔D³; 2N²D + ⅔N³ if N < D",
    source="Shao et al., ECCV 2022, doi:10.1007/978-3-031-19830-4_17",
    misleads="N ≲ D: near 1 for any labels, wide backbones win; depends on the feature scale",
)
register_metric(
    logme,
    cost="ND·min(N, D) + 9 min(N, D)³",
    source="You et al., ICML 2021, arXiv:2102.11005",
    misleads="values of different data sets; backbones that move far in fine-tuning",
)
register_metric(
    hscore,
    cost="ND·min(N, D) + ⅓ min(N, D)³",
    source="Bao et al., ICIP 2019; Ibrahim et al., arXiv:2110.06893",
    misleads="backbones of different widths; N ≲ D",
)
register_metric(
    transrate,
    cost="ND·min(N, D) + Σ_c n_c D·min(n_c, D)",
    source="Huang et al., ICML 2022, arXiv:2106.09627",
    misleads="fewer samples per class than dimensions: rank, not separation",
)
register_metric(
    gbc,
    cost="ND·min(N, D) + C²·64",
    source="Pándy et al., CVPR 2022, arXiv:2111.12780",
    misleads="correlated features; many far-apart classes, where all terms vanish",
)
register_metric(
    parc,
    cost="n²D + n² log n, n = min(N, 2000)",
    source="Bolya et al., NeurIPS 2021, arXiv:2111.06977",
    misleads="values of different data sets; many classes",
)
register_metric(
    ncti,
    needs=("features", "hub"),
    cost="ND·min(N, D) + N(64² + C²)",
    source="Wang et al., ICCV 2023",
    misleads="alone, without combine_hub; medical images; depends on the feature scale",
)
register_metric(
    nleep,
    cost="ND·min(N, D) + EM of 5C Gaussians",
    source="Li et al., CVPR 2021, arXiv:2011.11200",
    misleads="few samples per class: one cluster per handful of samples",
)
register_metric(
    tmi,
    cost="2ND",
    source="Xu & Kang, ICCV 2023, arXiv:2308.05986",
    misleads="backbones of different scale or width; ignores separation altogether",
)
register_metric(
    ped,
    cost="6C²D + ND + the base metric",
    source="Li et al., ICCV 2023, arXiv:2308.15074",
    misleads="uses the labels to part the classes: the more overlap, the more it gains",
)
register_metric(
    pactran,
    cost="4NDC a step, up to hundreds of steps",
    source="Ding et al., ECCV 2022, arXiv:2203.05126",
    misleads="features of different scale; N < D",
)
register_metric(
    etran,
    needs=("features", "hub"),
    cost="ND·min(N, D) + min(N, D)³",
    source="Gholami et al., ICCV 2023, arXiv:2308.02027",
    misleads="N ≲ D; energy between heads that were trained differently",
)
register_metric(
    knn,
    cost="2N²D",
    source="baseline; Puigcerver et al., ICLR 2021, arXiv:2009.13239",
    misleads="near-duplicates; features with a few dominating dimensions",
)
register_metric(
    linear_probe,
    cost="5 folds × 5 strengths × tens of steps of 4NDC",
    source="baseline; Kornblith et al., CVPR 2019, arXiv:1805.08974",
    misleads="predicts a linear head, not fine-tuning",
)
register_metric(
    leep,
    needs="logits",
    cost="N·C_s for C_s source classes",
    source="Nguyen et al., ICML 2020, arXiv:2002.12462",
    misleads="few or unrelated source classes; self-supervised backbones have none",
)
register_metric(
    nce,
    needs="logits",
    cost="N·C_s for C_s source classes",
    source="Tran et al., ICCV 2019, arXiv:1908.08142",
    misleads="more source classes than samples",
)
register_metric(
    imagenet,
    needs="prior",
    cost="0",
    source="Kornblith et al., CVPR 2019; timm's published results",
    misleads="target images unlike ImageNet; the same order for every data set",
)
register_metric(
    params,
    needs="prior",
    cost="0",
    source="baseline",
    misleads="backbones of different families; the same order for every data set",
)
