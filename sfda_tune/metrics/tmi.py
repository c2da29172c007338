"""TMI: variance within the classes (Xu & Kang, ICCV 2023).

==========  ==========================================================================  ==========
Symbol      Meaning                                                                     Shape
==========  ==========================================================================  ==========
x_n, y_n    features and class of sample n                                              (D,), ()
μ_c         mean of class c                                                             (D,)
==========  ==========================================================================  ==========
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sfda_tune.metrics._input import load
from sfda_tune.values.features import MetricResult

__all__ = ["tmi"]


def tmi(features: Any, labels: Any) -> MetricResult:
    """Score features by their variance within the classes: more is better, says TMI.

    ::

        value = Σ_c (n_c/N) tr Cov(x | y = c) = (1/N) Σ_n ‖x_n − μ_{y_n}‖²

    The idea: features that keep differences within a class adapt better to a new task than
    features that have already thrown them away.

    **When it is wrong.** It does not look at separation at all: noise scores as well as anything,
    shuffled labels better than true ones, and multiplying the features by 10 multiplies the value
    by 100. Only backbones of one family and one normalisation can be compared (mean τ_w .304 on
    the TMLR benchmark).

    Parameters
    ----------
    features : array-like or torch.Tensor of shape (n_samples, n_dims)
        Finite real numbers; never changed. All arithmetic is in float64, on the CPU.
    labels : sequence of hashable, shape (n_samples,)
        Class of each row, at least two classes. Names and order do not matter.

    Returns
    -------
    MetricResult
        ``value``: ≥ 0. ``per_sample``: ‖x_n − μ_{y_n}‖². ``details``: sizes.

    Raises
    ------
    ValueError
        If `features` is not a finite real matrix, or `labels` does not fit it or holds fewer than
        two classes.

    Notes
    -----
    The authors published no code; the form above is the one in use elsewhere. A class of one
    sample contributes 0.

    References
    ----------
    H. Xu, U. Kang: Fast and Accurate Transferability Measurement by Evaluating Intra-class Feature
    Variance. ICCV 2023, https://arxiv.org/abs/2308.05986

    Examples
    --------
    >>> from sfda_tune.metrics.tmi import tmi
    >>> tmi([[0.0, 0.0], [2.0, 0.0], [5.0, 1.0], [5.0, 3.0]], ["a", "a", "b", "b"]).value
    1.0
    """
    data = load(features, labels)
    Z = data.X - data.means(data.X)[data.y]
    terms = np.einsum("nd,nd->n", Z, Z)
    return MetricResult(float(terms.mean()), data.unsorted(terms), data.details())
