"""LEEP: log expected empirical prediction of the source classifier (Nguyen et al., ICML 2020).

==========  ==========================================================================  ==========
Symbol      Meaning                                                                     Shape
==========  ==========================================================================  ==========
θ_n         softmax of the source classifier's outputs for sample n                     (C_s,)
P(y, z)     (1/N) Σ_{n: y_n = y} θ_nz, joint distribution of target and source class    (C, C_s)
P(y|z)      P(y, z)/Σ_y P(y, z)                                                         (C, C_s)
==========  ==========================================================================  ==========
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sfda_tune.metrics._input import Data, load_logits
from sfda_tune.values.features import MetricResult

__all__ = ["leep"]


def leep(features: Any, labels: Any, *, logits: Any = None) -> MetricResult:
    """Score a source classifier by how well its soft labels predict the target classes.

    ::

        value = (1/N) Σ_n log Σ_z P(y_n|z) θ_nz

    **When it is wrong.** It sees the last layer only: with few or unrelated source classes, or
    for self-supervised backbones, there is nothing to see. P(y|z) is estimated on the samples it
    is applied to, hence too good with many source classes and few samples.

    Parameters
    ----------
    features : ignored
        Present so that all metrics are called alike; may be None.
    labels : sequence of hashable, shape (n_samples,)
        Target class of each row, at least two classes. Names and order do not matter.
    logits : array-like or torch.Tensor of shape (n_samples, n_source_classes)
        Outputs of the source classifier on the target images, before the softmax; logarithms of
        probabilities will do.

    Returns
    -------
    MetricResult
        ``value``: ≤ 0, higher is better. ``per_sample``: its terms. ``details``: sizes; ``n_dims``
        is the number of source classes.

    Raises
    ------
    ValueError
        If `logits` is missing or not a finite real matrix, or `labels` does not fit it or holds
        fewer than two classes.

    Notes
    -----
    Constant logits: P(y|z) is the prior, the value Σ_c q_c log q_c. *Cost*: O(N·C_s).

    References
    ----------
    C. Nguyen, T. Hassner, M. Seeger, C. Archambeau: LEEP: A New Measure to Evaluate
    Transferability of Learned Representations. ICML 2020, https://arxiv.org/abs/2002.12462

    Examples
    --------
    >>> from sfda_tune.metrics.leep import leep
    >>> logits = [[4.0, 0.0], [4.0, 0.0], [0.0, 4.0], [0.0, 4.0]]
    >>> f"{leep(None, ['a', 'a', 'b', 'b'], logits=logits).value:.3f}"
    '-0.036'
    >>> leep([[0.0], [1.0]], ["a", "b"])
    Traceback (most recent call last):
    ValueError: `logits` must be given: leep needs the outputs of the source classifier ...
    """
    data = load_logits(logits, labels, "leep")
    E = data.X
    E -= E.max(axis=1, keepdims=True)
    np.exp(E, out=E)
    terms = log_expected_prediction(data, E)
    return MetricResult(float(terms.mean()), data.unsorted(terms), data.details())


def log_expected_prediction(data: Data, E: np.ndarray) -> np.ndarray:
    """Terms log Σ_z P(y_n|z) θ_nz for θ_n = E_n/Σ_z E_nz, in the order of `data`: (N,)."""
    scale = 1 / E.sum(axis=1)  # applied to the results: E is large
    P = np.stack([scale[c] @ E[c] for c in data.slices()])  # N·P(y, z)
    total = P.sum(axis=0)
    P = np.divide(P, total, out=np.zeros_like(P), where=total > 0)
    rows = [E[c] @ p for p, c in zip(P, data.slices(), strict=True)]
    return np.log(np.concatenate(rows) * scale)
