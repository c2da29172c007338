"""Which backbones to fine-tune together: strong ones that err on different images.

==========  ==========================================================================  ==========
Symbol      Meaning                                                                     Shape
==========  ==========================================================================  ==========
N, C        samples that are not alone in their class, classes
S, S + m    the members chosen so far, the same with backbone m
p'_m(c|x)   posterior of ``sfda(…, variant="loo", normalize="standardize")``             (N, C)
x̂'          leave-one-out Fisher features: D' = C − 1 dimensions, in C coordinates      (N, C)
F_n(S)      the x̂' of sample n, one row of length 1 for each member of S                (·, C)
‖F‖_*       nuclear norm, the sum of the singular values
==========  ==========================================================================  ==========
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
from scipy.linalg import eigh
from scipy.special import log_softmax

from sfda_tune.metrics._fisher import EPS, Scatter, load
from sfda_tune.metrics.sfda import LAM, TEMPERATURES
from sfda_tune.values.features import Features, Value
from sfda_tune.values.labels import encode_labels
from sfda_tune.values.text import integer, is_number, require

__all__ = ["Ensemble", "select_ensemble"]

TIE = 1e-9  # values that differ by rounding errors are equal, and the name decides


@dataclass(frozen=True)
class Ensemble(Value):
    """Backbones to fine-tune together.

    Parameters
    ----------
    backbones : tuple of str
        In the order of choice: the first j are the ensemble of size j.
    score : tuple of float
        ``"greedy"``: log-probability of the ensemble after each choice, which may fall.
        ``"sfda"``: T_ens of each member when it was chosen, s̃ of the first.
    accuracy : tuple of float
        Of the members' average softened p', after each choice; a tie counts as a hit.
    single : mapping of str to float
        Each candidate's own score by the same method, best first; higher is better.
    method : str
    details : mapping of str to JSON value
        ``temperature`` by backbone, ``n_samples``, ``n_singletons``, ``n_classes``, ``r``.
    """

    backbones: tuple[str, ...]
    score: tuple[float, ...]
    accuracy: tuple[float, ...]
    single: Mapping[str, float] = field(hash=False)
    method: str
    details: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in ("single", "details"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def __str__(self) -> str:
        width = max(map(len, (self.method, *self.backbones)))
        rows = zip(self.backbones, self.score, self.accuracy, strict=True)
        lines = [f"{b:{width}}  {s:7.4f}  {a:8.4f}" for b, s, a in rows]
        return "\n".join([f"{self.method:{width}}  {'score':>7}  accuracy", *lines])


def select_ensemble(
    features_by_backbone: Mapping[str, Any],
    labels: Any,
    k: int,
    *,
    method: str = "sfda",
    r: float = 0.5,
    order: Sequence[str] | None = None,
) -> Ensemble:
    """Choose the k backbones to fine-tune together, from their features alone.

    Both methods judge every sample by the fit without it, begin with the best single backbone and
    add, one by one, what serves those already chosen. ``"greedy"`` averages posteriors, each
    softened by its temperature, that of ``log_probability_scaled`` in `sfda`::

        next = argmax_m mean_n log( 1/|S + m| · Σ_{i in S + m} p'_i(y_n|x_n) )

    ``"sfda"`` is T_ens of the paper, eq. (8) and (9)::

        T_com = mean_n ‖F_n(S + m)‖_* − ‖F_n(S)‖_*         the loss if m were ablated from S + m
        T_ens = r s̃ + (1−r) T̃_com,   next = argmax_m T_ens
        s̃     = mean_n p'_m(y_n|x_n), from that of constant features to the largest as 0 to 1
        T̃_com = T_com, from that of a copy of a member (or less) to the largest as 0 to 1
        x̂'_n  = δ_n √q (√q MS̃⁻¹Mᵀ √q)^(−½),  δ_nc = log p'(c|x_n) − log q_c + ½ μ_cᵀS̃⁻¹μ_c + a_n

    with a_n such that Σ_c q_c δ_nc = 0. The paper ablates m from the whole hub, takes the top k at
    once, and is silent on scales, samples, alignment and held-out data. Here m is ablated from
    S + m, since of two redundant strong backbones each makes the other superfluous; x̂' replaces
    x̂, which lies near the class mean in every backbone if the sample was in the fit; each class
    is an axis, since signs and order of eigenvectors differ between backbones that are alike; rows
    have length 1, so that no backbone's scale counts; and 0 is chance, or a copy, so that the
    worst of the hub does not stretch the scales.

    **When it is wrong.** What averaging adds on frozen features need not survive fine-tuning;
    scores and accuracies are those of the choice itself, hence optimistic. ``"sfda"``: pure noise
    complements everything, and may win against a somewhat weaker copy of a member; raise r then.
    ``"greedy"``: the average is unsure where members disagree, so a complementary backbone must be
    nearly as strong to be taken. Near duplicates of an image are not held out with it.

    Parameters
    ----------
    features_by_backbone : mapping of str to (n_samples, n_dims) array-like or Features
        The same rows for all, of any width; never changed.
    labels : sequence of hashable, shape (n_samples,), or None
        Class of each row. None takes those of the `Features`, which must agree in any case.
    k : int
        From 1 to the number of backbones.
    method : {"sfda", "greedy"}, default "sfda"
    r : float in [0, 1], default 0.5
        For ``"sfda"``: weight of the score; 1 takes the top k by score.
    order : sequence of str, optional
        For ``"sfda"``: all backbones, best first, by something that knows more of them than their
        features, as a forecast of what training makes of them. Then s̃ are given out in this
        order, the largest to the first; `rank` does so where it orders by a forecast.

    Returns
    -------
    Ensemble
        The same for any order of backbones (ties: by name) and rows, and any names of the classes.

    Raises
    ------
    ValueError
        If an argument is not as above, there are fewer than two classes, or none has two samples.

    Notes
    -----
    Validation accuracy (%) of averaged logistic regressions, 16 real backbones × 4 data sets, 500
    images each, k = 2, 3: top k by single score 84.0, 84.2; ``"sfda"`` 83.8, 84.5; ``"greedy"``
    83.6, 85.0 (81.9, 83.8 unsoftened); best possible 84.9, 86.6: a draw. With a copy of each
    backbone in the hub, the top k fall to 81.6, 83.0; the other numbers stay.

    References
    ----------
    W. Shao et al.: Not All Models Are Equal: Predicting Model Transferability in a
    Self-challenging Fisher Space. ECCV 2022, https://doi.org/10.1007/978-3-031-19830-4_17

    R. Caruana et al.: Ensemble Selection from Libraries of Models. ICML 2004,
    https://doi.org/10.1145/1015330.1015432 (greedy selection)

    Examples
    --------
    >>> import numpy as np
    >>> from sfda_tune.selection.ensembles import select_ensemble
    >>> rng = np.random.default_rng(0)
    >>> labels = np.repeat(["ant", "bee", "cat", "dog"], 40)
    >>> centres, noise = 4 * np.repeat(np.eye(4), 40, axis=0), rng.normal(size=(3, 160, 4))
    >>> strong = centres * [1, 1, 0, 0] + noise[0]
    >>> twin = strong + 0.2 * noise[1]
    >>> other = centres * [0, 0, 0.8, 0.8] + noise[2]
    >>> chosen = select_ensemble({"strong": strong, "twin": twin, "other": other}, labels, 2)
    >>> list(chosen.single), chosen.backbones
    (['strong', 'twin', 'other'], ('strong', 'other'))
    """
    names, codes = _checked(features_by_backbone, labels, k, method, r)
    if order is not None:
        rule = "a list of all backbones with method 'sfda', else None"
        listed = isinstance(order, Sequence) and sorted(map(str, order)) == names
        require("order", order, rule, listed and method == "sfda")
    fit = partial(leave_one_out, codes=codes)
    y = np.sort(codes)  # the order of the rows in the fits
    n = np.bincount(y)[y]
    own = np.arange((n > 1).sum()), y[n > 1]  # the element of y_n in each row
    temperatures, log_own, own_p, F = {}, [], [], []
    for name in names:  # of the posteriors only those of y_n are kept: others (m, N, C) would be
        log_p, F_m = fit(name, features_by_backbone[name])
        softened = [log_softmax(t * log_p, axis=1)[own] for t in TEMPERATURES]
        best = int(np.argmax([p.mean() for p in softened]))
        temperatures[name] = TEMPERATURES[best]
        log_own.append(softened[best])
        own_p.append(np.exp(log_p[own]).mean())
        if method == "sfda":
            F.append(F_m)
    if method == "greedy":
        log_own = np.array(log_own)
        single, values_of = log_own.mean(axis=1), partial(_log_probability, log_own=log_own)
    else:
        single = np.array(own_p)
        s = single - (n[n > 1] - 1).mean() / (len(n) - 1)
        if order is not None:
            s[[names.index(name) for name in order]] = np.sort(s)[::-1]
        values_of = partial(t_ens, s=s / (np.abs(s).max() or 1), F=F, r=float(r))
    chosen, score, accuracy = [], [], []
    total = 0.0
    while len(chosen) < k:
        values = values_of(chosen)  # of S + m for every m
        values[chosen] = -np.inf
        m = int(np.argmax(values >= values.max() - TIE))  # the first of the best
        log_p, _ = fit(names[m], features_by_backbone[names[m]])
        total = total + np.exp(log_softmax(temperatures[names[m]] * log_p, axis=1))
        chosen.append(m)
        score.append(float(values[m]))
        accuracy.append(float((total[own] >= total.max(axis=1)).mean()))
    backbones = tuple(names[m] for m in chosen)
    by_single = {names[m]: float(single[m]) for m in np.argsort(-single, kind="stable")}
    details = {"temperature": temperatures, "r": float(r), "n_samples": len(n)}
    details |= {"n_classes": int(y[-1]) + 1, "n_singletons": int((n == 1).sum())}
    return Ensemble(backbones, tuple(score), tuple(accuracy), by_single, method, details)


def _log_probability(S: list[int], log_own: np.ndarray) -> np.ndarray:
    members = np.logaddexp.reduce(log_own[S], axis=0)  # log Σ_i p'_i(y_n|x_n), −∞ if S is empty
    return np.logaddexp(members, log_own).mean(axis=1) - np.log(len(S) + 1)


def t_ens(S: list[int], s: np.ndarray, F: list[np.ndarray], r: float) -> np.ndarray:
    if not S:
        return s.copy()
    members = np.stack([F[m] for m in S], axis=1)  # F_n(S), (N, |S|, C)
    G = np.empty((len(members), len(S) + 1, len(S) + 1))  # F_nF_nᵀ of S + m, for one m at a time
    G[:, :-1, :-1] = members @ members.transpose(0, 2, 1)
    T_com = np.empty(len(s))
    for m, F_m in enumerate(F):
        G[:, -1, :-1] = G[:, :-1, -1] = (members @ F_m[:, :, None])[:, :, 0]
        G[:, -1, -1] = np.square(F_m).sum(axis=1)
        squares = np.linalg.eigvalsh(G)
        T_com[m] = np.sqrt(np.where(squares > 1e-14, squares, 0)).sum(axis=1).mean()
    T_com = np.maximum(T_com - T_com[S].min(), 0)  # ‖F_n(S)‖_*, the same for all m, cancels
    return r * s + (1 - r) * T_com / max(T_com.max(), 1e-6)  # below it, all are copies


def leave_one_out(name: str, features: Any, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return log p' and rows of length 1 along x̂', (N, C) each, sorted by class."""
    try:
        x = load(features.x if isinstance(features, Features) else features, codes)
    except ValueError as error:
        raise ValueError(f"`features_by_backbone[{name!r}]`: {error}") from None
    x.normalize("standardize")
    with np.errstate(under="ignore"):
        fit = Scatter(x).leave_one_out(LAM)
        blocks = [x.ops.to_numpy(log_p) for _, log_p in fit.log_posterior()]
    log_p = np.concatenate(blocks)[np.repeat(x.counts > 1, x.counts)]
    Q, root_q = x.ops.to_numpy(fit.solution.means()), np.sqrt(x.q)  # MS̃⁻¹Mᵀ, √q
    delta = log_p - np.log(x.q) + Q.diagonal() / 2
    delta -= (delta @ x.q)[:, None]
    v, E = eigh(root_q[:, None] * Q * root_q)  # v of S_B u = v S̃ u
    present = v > max(10 * x.C * EPS * v[-1], 0)
    scale = np.where(present, np.where(present, v, 1) ** -0.5, 0)
    F = (delta * root_q) @ (E * scale) @ E.T
    lengths = np.linalg.norm(F, axis=1, keepdims=True)
    return log_p, F / np.where(lengths > 0, lengths, 1)


def _checked(hub: Any, labels: Any, k: Any, method: Any, r: Any) -> tuple[list[str], np.ndarray]:
    """Return the names in order, and the class codes of the rows."""
    if not isinstance(hub, Mapping) or not hub or not all(isinstance(name, str) for name in hub):
        raise ValueError(
            f"`features_by_backbone` must map names to features but is {hub!r:.60}; "
            'pass {"resnet": x_resnet, "vit": x_vit}.'
        )
    integer("k", k, 1, len(hub))
    require("method", method, "'sfda' or 'greedy'", method in ("sfda", "greedy"))
    if not is_number(r) or not 0 <= r <= 1:
        raise ValueError(f"`r` must be a number in [0, 1] but is {r!r}; 0.5 is the paper's.")
    labelled = {name: hub[name].y for name in sorted(hub) if isinstance(hub[name], Features)}
    if labels is None and not labelled:
        raise ValueError("`labels` must be given, unless the features are `Features` values.")
    codes = encode_labels(next(iter(labelled.values())) if labels is None else labels)[0]
    n_classes = len(np.unique(codes))
    for name, y in labelled.items():  # names of classes may differ, but not the classes
        pairs = set(zip(codes, y, strict=True)) if len(y) == len(codes) else ()
        if not len(pairs) == n_classes == len(np.unique(y)):
            raise ValueError(
                f"`labels` must put the same rows into one class as the labels of {name!r} do but "
                f"differs ({len(codes)} and {len(y)} rows); pass None, or extract on one data set."
            )
    if n_classes in (1, len(codes)):
        raise ValueError(
            "`labels` must hold two classes or more, one of them with two samples or more, but "
            f"holds {n_classes} in {len(codes)} samples; add images."
        )
    return sorted(hub), codes
