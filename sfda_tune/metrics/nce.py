"""NCE: negative conditional entropy given the source labels (Tran et al., ICCV 2019).

==========  ==========================================================================  ==========
Symbol      Meaning                                                                     Shape
==========  ==========================================================================  ==========
z_n         source class of sample n, the largest output of the source classifier
P(y, z)     relative frequency of target class y and source class z                     (C, C_s)
P(z)        Σ_y P(y, z)                                                                 (C_s,)
==========  ==========================================================================  ==========
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sfda_tune.metrics._input import load_logits
from sfda_tune.values.features import MetricResult

__all__ = ["nce"]


def nce(features: Any, labels: Any, *, logits: Any = None) -> MetricResult:
    """Score a source classifier by how much its hard labels tell about the target classes.

    ::

        value = −H(Y|Z) = Σ_{y,z} P(y, z) log( P(y, z)/P(z) )

    **When it is wrong.** As `leep`, and coarser: each image counts by its top source class only.
    With more source classes than samples every image has its own and the value is 0, the best.

    Parameters
    ----------
    features : ignored
        Present so that all metrics are called alike; may be None.
    labels : sequence of hashable, shape (n_samples,)
        Target class of each row, at least two classes. Names and order do not matter.
    logits : array-like or torch.Tensor of shape (n_samples, n_source_classes)
        Outputs of the source classifier on the target images; for hard labels, one-hot rows.

    Returns
    -------
    MetricResult
        ``value``: in [−log C, 0], higher is better. ``per_sample``: log P(y_n|z_n).
        ``details``: sizes; ``n_dims`` is the number of source classes.

    Raises
    ------
    ValueError
        If `logits` is missing or not a finite real matrix, or `labels` does not fit it or holds
        fewer than two classes.

    Notes
    -----
    Constant logits: all images have one source class, the value is Σ_c q_c log q_c. Equal largest
    outputs count as the first of them. *Cost*: O(N·C_s).

    References
    ----------
    A. Tran, C. Nguyen, T. Hassner: Transferability and Hardness of Supervised Classification
    Tasks. ICCV 2019, https://arxiv.org/abs/1908.08142

    Examples
    --------
    >>> from sfda_tune.metrics.nce import nce
    >>> nce(None, ["a", "a", "b", "b"], logits=[[4, 0], [4, 0], [0, 4], [0, 4]]).value
    0.0
    """
    data = load_logits(logits, labels, "nce")
    z = data.X.argmax(axis=1)
    joint = np.zeros((data.C, data.D))
    np.add.at(joint, (data.y, z), 1.0)
    terms = np.log(joint[data.y, z] / joint.sum(axis=0)[z])
    return MetricResult(float(terms.mean()), data.unsorted(terms), data.details())
