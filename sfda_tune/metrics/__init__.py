"""Transferability metrics: functions of the features and labels of one backbone.

A metric is any ``f(features, labels)`` that returns a float or a `MetricResult`, higher meaning
more transferable. A function can be handed over as it is; `register_metric` gives it a name, and
says what it needs, what it costs, where it comes from and when it misleads. `describe_metrics`
lists all that; the docstrings have the formulas. Each metric is in the module of its name::

    from sfda_tune.metrics.sfda import sfda

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
`leep`, `nce`      prediction from outputs of the source classifier, which you pass; not in `rank`
`imagenet_prior`   published ImageNet accuracy, by name: `imagenet` in sums
`params_prior`     number of parameters, by name: `params` in sums
`regression`       `ridge` and forms of `knn`, `linear_probe`, `logme`, for numbers or levels
`multilabel`       forms of `sfda`, `knn`, `linear_probe`, `logme` for several labels per image
`combine`          rank or min–max average of several scores
=================  ===============================================================================
"""

from __future__ import annotations

from sfda_tune.metrics import catalogue as _catalogue  # noqa: F401 - gives each its name
from sfda_tune.metrics.registry import (
    METRICS,
    Metric,
    MetricInfo,
    describe_metrics,
    get_metric,
    register_metric,
)

__all__ = ["METRICS", "Metric", "MetricInfo", "describe_metrics", "get_metric", "register_metric"]
