"""How far a ranking can be trusted: intervals of scores and ranks, P(best), and warning signs.

==========  ==========================================================================  ==========
Symbol      Meaning                                                                     Shape
==========  ==========================================================================  ==========
N, n, R     images, backbones, resamples
s_in        contribution of image n to the score of backbone i                          (n, N)
s_i         score, (1/N) Σ_n s_in                                                       (n,)
n_c         images of class c
s*_ri       score of backbone i in resample r                                           (R, n)
Δ_ij        s_i − s_j; Δ*_rij its resamples, σ_ij their root mean square about Δ_ij     (n, n)
t_rij       |Δ*_rij − Δ_ij| / σ_ij                                                      (R, n, n)
θ_i, θ*_ri  what the score would be on ever more images; draws from its posterior       (R, n)
==========  ==========================================================================  ==========

Every backbone has seen the **same images**, so all are resampled together (paired): what makes an
image hard for all of them cancels in Δ. Limit: the resamples are conditional on what the metric
fitted (means, covariances), so the intervals cover the choice of the images that are scored, not
the fit; and they say how sure the *score* is, not how well the score predicts fine-tuning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from scipy.special import ndtr
from scipy.stats import norm, rankdata
from scipy.stats import t as student

from sfda_tune.values.features import Value, read_only
from sfda_tune.values.labels import encode_labels
from sfda_tune.values.ranking import Ranking
from sfda_tune.values.text import integer, is_number, letters, some

__all__ = [
    "Confidence", "bootstrap", "collapse_groups", "confidence", "count_places",
    "draw_true_scores", "find_groups", "find_plausible", "shortlist", "shrink",
]  # fmt: skip

Name: TypeAlias = str | int

CELLS = 1 << 18  # resamples × images at a time: 2 MiB a temporary
ATOMS, EM_STEPS, BLOCKS = 400, 30, 40  # of `shrink`: the grid, the steps, draws of g


@dataclass(frozen=True, eq=False)
class Confidence(Value):
    """What the data say of a ranking; everything in rank order, best first.

    Parameters
    ----------
    names : tuple, length n
        The backbones: names, or row numbers if `bootstrap` was given an array.
    score : array of float64, shape (n,)
    score_interval : array of float64, shape (n, 2)
    rank_interval : array of int64, shape (n, 2)
        First and last rank, 1 is the best.
    in_top : array of float64, shape (n, k)
        ``in_top[i, j - 1]`` is P(backbone i is among the top j).
    plausible : array of float64, shape (n,)
        P-value of "backbone i is the best": below .05 it is ruled out with probability .95.
    separable : array of bool, shape (n, n)
        Whether the data tell two backbones apart.
    groups : tuple of tuples of names
        What the data cannot tell apart; see `bootstrap`.
    resamples : array of float64, shape (n_resamples, n)
        The scores in each resample, the same images for all.
    draws : array of float64, shape (n_resamples, n)
        What the scores would be on ever more images, by `shrink`: what `in_top` counts.
    level : float
        Of all intervals.
    dof : int
        Degrees of freedom: Σ_c (n_c − 1), images minus classes.
    n_fixed : int
        Images that are alone in their class and so never vary.
    """

    names: tuple[Name, ...]
    score: np.ndarray
    score_interval: np.ndarray
    rank_interval: np.ndarray
    in_top: np.ndarray
    plausible: np.ndarray
    separable: np.ndarray
    groups: tuple[tuple[Name, ...], ...]
    resamples: np.ndarray
    draws: np.ndarray
    level: float
    dof: int
    n_fixed: int = 0

    def __post_init__(self) -> None:
        arrays = ("score", "score_interval", "rank_interval", "in_top", "separable")
        for name in (*arrays, "plausible", "resamples", "draws"):
            object.__setattr__(self, name, read_only(np.asarray(getattr(self, name))))

    @property
    def best(self) -> dict[Name, float]:
        """P(best) of each backbone; sums to 1."""
        return self.probability_in_top(1)

    def probability_in_top(self, k: int) -> dict[Name, float]:
        """Return P(among the top `k`) of each backbone, in rank order; sums to `k`.

        Raises
        ------
        ValueError
            If `k` is not one of 1 … ``in_top.shape[1]``.
        """
        column = integer("k", k, 1, self.in_top.shape[1]) - 1
        return dict(zip(self.names, self.in_top[:, column].tolist(), strict=True))

    def difference(self, a: Name, b: Name) -> tuple[float, float]:
        """Return the paired interval of score(a) − score(b), for a pair chosen beforehand.

        Δ ± c σ with c the `level` quantile of |Δ* − Δ| / σ, adjusted as in `bootstrap`. Among many
        pairs some such interval misses 0 by chance; `separable` allows for that.
        """
        unknown = [name for name in (a, b) if name not in self.names]
        if unknown:
            raise ValueError(
                f"`a` and `b` must be backbones of the ranking but {unknown} are not; "
                f"there are {some(self.names)}."
            )
        i, j = self.names.index(a), self.names.index(b)
        delta = self.score[i] - self.score[j]
        spread = np.abs(self.resamples[:, i] - self.resamples[:, j] - delta)
        sigma = np.sqrt(np.square(spread).mean())
        c = np.quantile(spread, self.level) / sigma if sigma else 0.0
        half = sigma * _for_few(c, self.dof, len(self.resamples))
        return float(delta - half), float(delta + half)

    def records(self) -> list[dict[str, Any]]:
        """Return one flat record per backbone, in rank order: what tables and JSON files show."""
        numbers: dict[Name, list[int]] = {name: [] for name in self.names}
        for number, group in enumerate(self.groups, 1):
            for name in group:
                numbers[name].append(number)
        return [
            {
                "backbone": name,
                "score": float(self.score[i]),
                "interval_low": float(self.score_interval[i, 0]),
                "interval_high": float(self.score_interval[i, 1]),
                "rank": i + 1,
                "rank_low": int(self.rank_interval[i, 0]),
                "rank_high": int(self.rank_interval[i, 1]),
                "p_best": float(self.in_top[i, 0]),
                "group": letters(numbers[name]),
            }
            for i, name in enumerate(self.names)
        ]

    def __repr__(self) -> str:
        width = max(len("backbone"), *(len(str(name)) for name in self.names))
        lines = [
            f"Confidence of {len(self.names)} backbones ({self.level:.0%} intervals, "
            f"{len(self.resamples)} resamples)",
            f"{'rank':>9}  {'backbone':<{width}}  {'score':>26}  P(best)  group",
        ]
        for r in self.records():
            rank = f"{r['rank']} [{r['rank_low']}–{r['rank_high']}]"
            score = f"{r['score']:.4f} [{r['interval_low']:.4f}, {r['interval_high']:.4f}]"
            lines.append(
                f"{rank:>9}  {r['backbone']!s:<{width}}  {score:>26}  {r['p_best']:7.3f}  "
                f"{r['group']}"
            )
        return "\n".join(lines)


def bootstrap(
    per_sample: Any,
    labels: Any,
    *,
    n_resamples: int = 1000,
    seed: int = 0,
    k: int | None = None,
    level: float = 0.90,
    groups: Any = None,
) -> Confidence:
    """Resample the images, the same for all backbones, and see what of the ranking remains.

    From each class n_c − 1 images are drawn with replacement and weighted n_c / (n_c − 1)::

        s*_i = (1/N) Σ_c n_c/(n_c − 1) · Σ_{n drawn from c} s_in

    which gives s*_i the unbiased variance Σ_c (n_c/N)² · s_c² / n_c; n_c draws would give
    (n_c − 1)/n_c of it, too little by a fifth with 5 images a class. The only image of a class
    cannot vary: it counts in full in every resample (`Confidence.n_fixed` such images).

    *Score interval*: the (1 ± level)/2 quantiles of s*_i, widened to hold s_i if need be. Measured
    coverage of 90 % intervals: .89 with normal contributions (40 or 5 images in each of 10
    classes), .90 and .87 with exponential ones.

    *Rank interval* (Mogstad, Romano, Shaikh, Wilhelm 2024), for each backbone i::

        surely apart:  |Δ_ij| > c_i σ_ij,  c_i = `level` quantile over r of max_j t_rij
        rank from 1 + #{j surely better} to n − #{j surely worse}

    so that no comparison of i errs, and the interval holds its true rank, with probability
    `level`, however close the others are. The quantiles of the ranks in the resamples are narrower
    but fail among near-ties, and worst at the top, where they matter; so do the same bounds with
    c_ij from each pair alone (``rank_intervals.md`` has what was measured).

    Since σ is estimated, both c are adjusted from the normal to Student's distribution,
    c ← t⁻¹(Φ(c)) with 1/(1/Σ_c (n_c − 1) + 1/R) degrees of freedom.

    *Separable* is the same with one c for all pairs, the quantile of max_ij t_rij: with
    probability `level` no two backbones of equal truth are declared different (measured: some two
    of 20 equal ones in .12 of the data sets, nominally .10). *Groups* are the maximal runs of
    neighbours in rank order of which no two are separable. They may overlap, like the letters of a
    compact letter display; each backbone is in at least one, and two that share one are not
    separable.

    *P(best)*, P(in top j): share of the draws θ* of `shrink`; exact ties in a draw share its
    places equally, so that P(best) sums to 1 and P(in top j) to j.

    Parameters
    ----------
    per_sample : mapping of str to array (n_samples,), or array of shape (n_backbones, n_samples)
        Contribution of each image; a score is their mean.
    labels : sequence of hashable, shape (n_samples,)
        Class of each image.
    n_resamples : int, default 1000
    seed : int, default 0
        The result depends on it, on nothing else that is random, and neither on the order of the
        backbones nor on the names of the classes. Another order of the images is like another
        seed.
    k : int, optional
        Columns of `Confidence.in_top`; default: as many as there are backbones.
    level : float in (0, 1), default 0.90
    groups : sequence of hashable, shape (n_samples,), optional
        Images that are no independent evidence: whole groups are resampled in the place of
        images, see `collapse_groups`.

    Returns
    -------
    Confidence
        In rank order; equal scores in the order of their names.

    Raises
    ------
    ValueError
        If `per_sample` is empty, None for some backbone, of another length than `labels`, or not
        finite; if no class has two images; if an option is out of range.

    Notes
    -----
    *Ties*: contributions are rounded to about 15 − log10 N digits of the backbone's largest one,
    after which all sums are exact in float64. So equal backbones are equal in every resample, and
    the result does not depend on blocks, threads or BLAS. A difference that does not vary is
    certain: separable if it is not 0.

    *Cost*: O(R N) random numbers, one product (R, N) × (N, n), and O(R n²) for the pairs; memory
    about 2 n N + 9 R n + 5 max(N, 2^18) numbers.

    References
    ----------
    J. N. K. Rao, C. F. J. Wu: Resampling Inference with Complex Survey Data. JASA 83, 1988,
    https://doi.org/10.1080/01621459.1988.10478591 (n_c − 1 draws)

    M. Mogstad, J. P. Romano, A. M. Shaikh, D. Wilhelm: Inference for Ranks with Applications to
    Mobility across Neighbourhoods and Academic Achievement across Countries. Review of Economic
    Studies 91, 2024, https://doi.org/10.1093/restud/rdad006

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> labels, hardness = np.arange(200) % 4, rng.normal(size=200)
    >>> scores = {name: mean + hardness + 0.3 * rng.normal(size=200)
    ...           for name, mean in [("vit", 1.0), ("resnet", 1.01), ("alexnet", 0.2)]}
    >>> c = bootstrap(scores, labels)
    >>> c.groups, c.rank_interval.tolist()
    ((('resnet', 'vit'), ('alexnet',)), [[1, 2], [1, 2], [3, 3]])
    >>> c.probability_in_top(2)["alexnet"]
    0.0
    """
    names, X = _rows(per_sample)
    order = sorted(range(len(names)), key=lambda i: (-X[i].mean(), names[i]))
    if groups is not None:
        X, labels = collapse_groups(X, labels, groups)
    return _bootstrap(
        tuple(names[i] for i in order), X[order], labels, n_resamples, seed, k, level
    )


def confidence(
    ranking: Ranking,
    *,
    n_resamples: int = 1000,
    seed: int = 0,
    k: int | None = None,
    level: float = 0.90,
) -> Confidence:
    """Resample the images behind a `Ranking`; see `bootstrap`.

    Parameters
    ----------
    ranking : Ranking
        Its scores must have `per_sample`; backbones that failed or left a race are left out. If
        the values are means
        over the images that are not alone in their class, as those of ``sfda`` with
        ``variant="loo"``, the others are left out too.
    n_resamples, seed, k, level
        See `bootstrap`.

    Returns
    -------
    Confidence
        With the names in the order of the ranking.

    Raises
    ------
    ValueError
        If nothing could be scored, if `labels` or a `per_sample` is missing, or if a value is not
        the mean of its `per_sample`.

    Examples
    --------
    >>> from sfda_tune.values.features import Score
    >>> terms = np.random.default_rng(0).uniform(size=(2, 60)) + [[0.0], [0.4]]
    >>> scores = [Score(name, p.mean(), p) for name, p in zip("ab", terms)]
    >>> confidence(Ranking(scores, labels=np.arange(60) % 3)).best
    {'b': 1.0, 'a': 0.0}
    """
    names, X, labels, n_alone = _contributions(ranking)
    result = _bootstrap(names, X, labels, n_resamples, seed, k, level)
    return replace(result, n_fixed=n_alone)


def draw_true_scores(
    ranking: Ranking, *, n_resamples: int = 1000, seed: int = 0
) -> tuple[tuple[Name, ...], np.ndarray]:
    """Return the names and the draws (n_resamples, n) of `confidence`, without its comparisons."""
    names, X, labels, _ = _contributions(ranking)
    return names, _draw(X, labels, n_resamples, seed).draws


def _contributions(ranking: Ranking) -> tuple[tuple[Name, ...], np.ndarray, np.ndarray, int]:
    """Return names, rows of contributions, their labels, and how many images are left out."""
    scores = [s for s in ranking.scores if s.error is None and "race" not in s.details]
    if not scores:
        raise ValueError(
            f"`ranking` must have a backbone that could be scored but all {len(ranking)} failed; "
            "see ranking.failed."
        )
    if ranking.labels is None:
        raise ValueError(
            "`ranking` must have labels but has none; rank again, or call bootstrap(per_sample, "
            "labels)."
        )
    names, X = _rows({s.backbone: s.per_sample for s in scores})
    labels, values = ranking.labels, np.array([s.value for s in scores])
    if X.shape[1] != len(labels):
        raise ValueError(_lengths(X, labels))
    many = _have_others(labels, ranking.groups)
    rows = np.ones(len(labels), dtype=bool)
    means = X.mean(axis=1)
    wrong = ~np.isclose(means, values, rtol=1e-6, atol=1e-9)
    if wrong.any() and many.any():
        rows = many
        if np.isclose(X[:, many].mean(axis=1), values, rtol=1e-6, atol=1e-9).all():
            wrong[:] = False
    if wrong.any():
        i = int(wrong.argmax())
        raise ValueError(
            f"the values of `ranking` must be the means of their `per_sample` but {names[i]!r} "
            f"has {values[i]:.6g} and the mean {means[i]:.6g}; only scores that are means over "
            "images can be resampled."
        )
    X, labels = X[:, rows], labels[rows]
    if ranking.groups is not None:
        X, labels = collapse_groups(X, labels, ranking.groups[rows])
    return tuple(names), X, labels, int((~many).sum())


def _have_others(labels: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    """Tell which images have others of their class outside their group."""
    _, y, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    g = np.arange(len(y)) if groups is None else groups
    _, inside, own = np.unique(g * len(sizes) + y, return_inverse=True, return_counts=True)
    return sizes[y] > own[inside]


def collapse_groups(X: np.ndarray, labels: Any, groups: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return contributions of groups in the place of images, with the same mean, and their labels.

    With s̄_c the mean of class c, G groups, G_c of them of class c alone, and r_n = s_n − s̄_c::

        each group of one class:     u_g = (n_c/N)(G/G_c) · (s̄_c + G_c/n_c · Σ_{n in g} r_n)
        groups of several classes:   u_g = s̄ + G/N · Σ_{n in g} r_n,  all in one stratum

    so that their resampling has the variance of a cluster sample, to first order, with the shares
    of the classes taken as known; n_c and s̄_c as those of the images.

    Parameters
    ----------
    X : array of shape (n_backbones, n_samples)
    labels, groups : sequence of hashable, shape (n_samples,)

    Returns
    -------
    U : array of shape (n_backbones, n_groups)
    strata : array of int64, shape (n_groups,)

    Examples
    --------
    >>> U, strata = collapse_groups(np.array([[1.0, 3, 5, 7]]), [0, 0, 1, 1], [0, 1, 2, 2])
    >>> U.tolist(), strata.tolist()
    ([[0.75, 2.25, 9.0]], [0, 0, 1])
    """
    (y, classes), (g, names) = encode_labels(labels), encode_labels(groups)
    N, C, G = len(y), len(classes), len(names)
    if len(g) != N or X.shape[1] != N:
        raise ValueError(
            f"`groups` must hold one group per image but there are {len(g)} for {X.shape[1]} "
            f"images with {N} labels."
        )
    n_c = np.bincount(y, minlength=C)
    means = np.stack([np.bincount(y, row, C) for row in X]) / n_c
    R = np.stack([np.bincount(g, row, G) for row in X - means[:, y]])
    first = np.full(G, N)
    np.minimum.at(first, g, np.arange(N))
    stratum = y[first]
    if (stratum[g] != y).any():
        return X.mean(axis=1, keepdims=True) + G / N * R, np.zeros(G, dtype=np.int64)
    G_c = np.bincount(stratum, minlength=C)[stratum]
    n_c = n_c[stratum]
    return n_c / N * (G / G_c) * (means[:, stratum] + G_c / n_c * R), stratum


def shortlist(confidence: Confidence, probability: float = 0.95) -> list[Name]:
    """Return the backbones that may be the best: the best is one of them with this probability.

    All but those that `find_plausible` rules out. Of backbones that are equal in every resample,
    and so best together or not at all, one will do: the first is listed.

    Parameters
    ----------
    confidence : Confidence
    probability : float in (0, 1], default 0.95

    Returns
    -------
    list of names
        In rank order.

    Raises
    ------
    ValueError
        If `probability` is out of range.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> terms = rng.normal(size=(3, 100)) + [[0.0], [0.1], [2.0]]
    >>> shortlist(bootstrap(dict(zip("abc", terms)), np.arange(100) % 2))
    ['c']
    """
    if not is_number(probability) or not 0 < probability <= 1:
        raise ValueError(f"`probability` must lie in (0, 1] but is {probability!r}.")
    stays = confidence.plausible > 1 - probability
    chosen: dict[bytes, Name] = {}  # equal columns once
    for i, name in enumerate(confidence.names):
        if stays[i] or i == 0:
            chosen.setdefault(confidence.resamples[:, i].tobytes(), name)
    return list(chosen.values())


def find_plausible(
    score: np.ndarray, resamples: np.ndarray, *, dof: int | None = None
) -> np.ndarray:
    """Return the p-value of "backbone i is the best", for each i, whatever the others are.

    Multiple comparisons with the best (Gupta 1965, Hsu 1981), with resamples in place of tables::

        T_i = max_j Δ_ji / σ_ij,    T*_ri = max_j (Δ*_rji − Δ_ji) / σ_ij
        p_i = (k + 1 + √k)/(R + 1),  k = #{r: T*_ri ≥ T_i}

    (a share of R resamples, and its standard error.) If i is the best, no true difference to it is
    positive, so that T_i is at most a T*: among those with p > .05 is the best with probability
    .95 *for any true scores and any correlation of the backbones*, and exactly so where all are
    equal; ``rank_intervals.md`` has the coverage and the lengths that were measured.

    Where true scores are normal, lists half as long would do; but whoever relies on that fails
    where they are not: the smallest sets with probability .95 held the best in as few as .30
    (by the resamples as they are) or .72 (by the draws of `shrink`) of the data sets.

    `resamples` (R, n) are draws whose deviations from `score` (n,) are as its errors, jointly;
    `dof` are the degrees of freedom behind σ, if it is not known.

    References
    ----------
    S. S. Gupta: On Some Multiple Decision (Selection and Ranking) Rules. Technometrics 7, 1965,
    https://doi.org/10.1080/00401706.1965.10490251

    J. C. Hsu: Simultaneous Confidence Intervals for all Distances from the "Best". Annals of
    Statistics 9, 1981, https://doi.org/10.1214/aos/1176345582

    Examples
    --------
    >>> errors = np.random.default_rng(0).normal(size=(999, 3))
    >>> score = np.array([1.0, 0.5, -9.0])
    >>> find_plausible(score, score + errors).round(1)
    array([0.9, 0.5, 0. ])
    """
    score, resamples = np.asarray(score, np.float64), np.asarray(resamples, np.float64)
    floor = np.full(len(score), np.spacing(np.abs(score).max(initial=1e-300)))
    return _compare(resamples, score, floor, dof).plausible


def shrink(score: np.ndarray, resamples: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Return draws of the true scores θ, given that the observed ones owe something to luck.

    The first of many close scores is the first also because its images suited it; resamples about
    the observed scores know nothing of that. So the true scores are taken to be drawn from an
    unknown distribution g, which all backbones together estimate (nonparametric empirical Bayes:
    Kiefer and Wolfowitz 1956, on a grid of a_j by the EM algorithm, which is stopped early and
    so keeps g smooth), and each draw is from the posterior of its backbone::

        g_j ← (n Σ_i w_i P_ij + 1/J) / (n + 1),   P_ij ∝ g_j N(s_i; a_j, v_i),  Σ_j P_ij = 1
        θ*_ri = the quantile Φ(e_ri / √v_i) of P_i

    e_ri is the deviation of backbone i in resample r from that of all backbones together, and v_i
    its variance, so that errors which backbones share stay shared. Few backbones know little of g:
    hence the weights w with Σ w_i = 1, which 40 times are drawn anew (Bayesian bootstrap), and the
    even distribution with the weight of one backbone.

    Where the best come close to a bound, and where all are equal, P(best) is seldom above .4, and
    too high where it is; elsewhere it is about right (``rank_intervals.md``).

    `resamples` (R, n) are draws whose deviations from `score` (n,) are as its errors, jointly; the
    result is (R, n), too.

    References
    ----------
    J. Kiefer, J. Wolfowitz: Consistency of the Maximum Likelihood Estimator in the Presence of
    Infinitely Many Incidental Parameters. Annals of Mathematical Statistics 27, 1956,
    https://doi.org/10.1214/aoms/1177728066

    B. Efron: Bayes, Oracle Bayes and Empirical Bayes. Statistical Science 34, 2019,
    https://doi.org/10.1214/18-STS674

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> score = rng.normal(size=30)  # of 30 equal ones
    >>> resamples = score + rng.normal(size=(1000, 30))
    >>> first = score.argmax()
    >>> for M in (resamples, shrink(score, resamples)):
    ...     print(f"{(M.argmax(axis=1) == first).mean():.2f}")
    0.22
    0.11
    """
    score, resamples = np.asarray(score, np.float64), np.asarray(resamples, np.float64)
    R, n = resamples.shape
    error = resamples - score
    error = (error - error.mean(axis=1, keepdims=True)) * math.sqrt(n / max(n - 1, 1))
    sd = np.sqrt(np.square(error).mean(axis=0))
    draws = score + error
    low, high = score.min(), score.max()
    noisy = sd > 1e-9 * (high - low)
    if high == low or not noisy.any():  # nothing to learn from the others
        return draws
    low, high = low - sd.max(), high + sd.max()
    a = np.linspace(low, high, min(ATOMS, math.ceil(2 * (high - low) / sd[noisy].min())))
    step = a[1] - a[0]
    noisy &= sd > step / 4  # what is known better than the grid can tell stays
    if not noisy.any():
        return draws
    L = np.exp(-0.5 * ((score[noisy, None] - a) / sd[noisy, None]) ** 2)  # (·, J)
    m, even = len(L), 1 / len(a)
    g = np.full((BLOCKS, len(a)), even)
    w = np.random.default_rng([seed, m]).dirichlet(np.ones(m), BLOCKS)
    for _ in range(EM_STEPS):
        g = (m * g * ((w / (g @ L.T)) @ L) + even) / (m + 1)
    u = ndtr(error[:, noisy] / sd[noisy])
    edges = np.append(a[0] - step, a)  # the mass of a_j lies between a_j−1 and a_j
    shrunk = np.empty_like(u)
    for rows, g_b in zip(np.array_split(np.arange(R), BLOCKS), g, strict=True):
        F = np.cumsum(L * g_b, axis=1)
        F = np.pad(F / F[:, -1:], ((0, 0), (1, 0)))
        for i, F_i in enumerate(F):
            shrunk[rows, i] = np.interp(u[rows, i], F_i, edges)
    draws[:, noisy] = shrunk + step / 2
    return draws


# Resampling --------------------------------------------------------------------------------------
def _bootstrap(
    names: tuple[Name, ...],
    X: np.ndarray,
    labels: Any,
    n_resamples: int,
    seed: int,
    k: int | None,
    level: float,
) -> Confidence:
    """`bootstrap` of rows that are in rank order."""
    n = len(names)
    if k is not None:
        integer("k", k, 1, n)
    if not is_number(level) or not 0 < level < 1:
        raise ValueError(f"`level` must lie in (0, 1) but is {level!r}; 0.9 means 90 %.")
    score, M, resolution, draws, n_c = _draw(X, labels, n_resamples, seed)
    low, high = np.quantile(M, [(1 - level) / 2, (1 + level) / 2], axis=0)
    dof = int((n_c - 1).sum())
    pairs = _compare(M, score, resolution, dof)
    c, c_all = pairs.critical(level)
    delta, sigma = pairs.delta, pairs.sigma
    sure = np.abs(delta) > c[:, None] * sigma
    separable = np.abs(delta) > c_all * sigma
    rank_interval = [1 + (sure & (delta < 0)).sum(axis=1), n - (sure & (delta > 0)).sum(axis=1)]
    return Confidence(
        names,
        score,
        np.stack([np.minimum(low, score), np.maximum(high, score)], axis=1),
        np.stack(rank_interval, axis=1),
        count_places(draws)[:, :k],
        pairs.plausible,
        separable,
        tuple(names[a:b] for a, b in find_groups(separable)),
        M,
        draws,
        float(level),
        dof,
        int((n_c == 1).sum()),
    )


class _Draws(NamedTuple):
    score: np.ndarray  # s (n,)
    resamples: np.ndarray  # s* (R, n)
    resolution: np.ndarray  # (n,)
    draws: np.ndarray  # θ* (R, n)
    n_c: np.ndarray


def _draw(X: np.ndarray, labels: Any, n_resamples: int, seed: int) -> _Draws:
    n_resamples, seed = integer("n_resamples", n_resamples, 2), integer("seed", seed, 0)
    y, classes = encode_labels(labels)
    if X.shape[1] != len(y):
        raise ValueError(_lengths(X, y))
    n_c = np.bincount(y, minlength=len(classes))
    if n_c.max(initial=0) < 2:
        raise ValueError(
            f"`labels` must give some class two images but all {len(classes)} classes have one; "
            "nothing can be resampled. Pass classes, not names of images."
        )
    M, resolution = _resample(X, y, n_c, n_resamples, seed)
    score = np.ascontiguousarray(X).mean(axis=1)  # any other layout is added up otherwise
    return _Draws(score, M, resolution, shrink(score, M, seed=seed), n_c)


def _resample(
    X: np.ndarray, y: np.ndarray, n_c: np.ndarray, n_resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return s* (R, n) and its resolution (n,), the rounding of each backbone's contributions."""
    n, N = X.shape
    order = np.argsort(y, kind="stable")  # classes side by side: a draw is an offset
    start = np.cumsum(n_c) - n_c
    weight = n_c / np.maximum(n_c - 1, 1)
    V, resolution = np.empty((n, N)), np.empty(n)
    for i in range(n):  # one by one: n N numbers may be all that there is room for
        V[i : i + 1], resolution[i : i + 1] = _on_grid(X[i : i + 1, order] * weight[y[order]])
    alone = V[:, start[n_c == 1]].sum(axis=1)
    # n_c − 1 draws: one for each image but the first of its class. Draws belong to rows and not
    # to classes, so that the names of the classes do not matter.
    slots = np.delete(np.arange(N), order[start])
    size, offset = n_c[y[slots]], start[y[slots]]
    rng, M = np.random.default_rng(seed), np.empty((n_resamples, n))
    step = max(1, CELLS // N)
    for begin in range(0, n_resamples, step):
        block = M[begin : begin + step]
        first = N * np.arange(len(block))[:, None]
        drawn = (rng.random((len(block), len(slots))) * size).astype(np.int64) + (offset + first)
        counts = np.bincount(drawn.ravel(), minlength=len(block) * N).reshape(len(block), N)
        block[:] = counts.astype(np.float64) @ V.T
    M += alone
    M /= N
    return M, resolution


def _on_grid(V: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round each row to multiples of a power of two so that sums of N terms are exact."""
    peak = np.abs(V).max(axis=1)
    exponent = np.frexp(peak)[1] + np.frexp(V.shape[1])[1] - 53  # N · peak < 2^(exponent + 53)
    rounded = np.ldexp(np.rint(np.ldexp(V, -exponent[:, None])), exponent[:, None])
    return rounded, np.ldexp(1.0, exponent)


class _Pairs(NamedTuple):
    """All comparisons of two backbones; where Δ does not vary, σ is 0."""

    delta: np.ndarray  # Δ, (n, n); 0 where it is no more than rounding
    sigma: np.ndarray  # σ, (n, n)
    widest: np.ndarray  # max_j t_rij, (R, n)
    plausible: np.ndarray  # (n,), see `find_plausible`
    dof: int | None

    def critical(self, level: float) -> tuple[np.ndarray, np.ndarray]:
        """Return c (n,), and c of all pairs."""
        c = np.quantile(self.widest, level, axis=0)
        c_all = np.quantile(self.widest.max(axis=1), level)
        return tuple(_for_few(x, self.dof, len(self.widest)) for x in (c, c_all))  # type: ignore


def _compare(M: np.ndarray, score: np.ndarray, resolution: np.ndarray, dof: int | None) -> _Pairs:
    R, n = M.shape
    delta = score[:, None] - score
    sigma = np.zeros((n, n))
    floor = 4 * np.maximum(resolution[:, None], resolution)
    delta[np.abs(delta) <= floor] = 0.0
    widest = np.zeros((R, n))
    plausible = np.zeros(n)
    deviations = np.ascontiguousarray((M - score).T)
    for i in range(n):
        error = deviations - deviations[i]  # Δ*_rji − Δ_ji, (n, R)
        rms = np.sqrt(np.einsum("jr,jr->j", error, error) / R)
        varies = rms > floor[i]
        sigma[i, varies] = rms[varies]
        if (delta[i, ~varies] < 0).any():  # surely not the best
            T = np.inf
        else:
            T = (-delta[i, varies] / rms[varies]).max(initial=-np.inf)
        error = error[varies] if not varies.all() else error
        error /= rms[varies, None]
        most = error.max(axis=0, initial=-np.inf)
        widest[:, i] = np.maximum(most, -error.min(axis=0, initial=0.0)).clip(0.0)
        k = R if T <= 0 and not len(error) else float((most >= _for_many(T, dof, R)).sum())
        plausible[i] = 0.0 if np.inf == T else min((k + 1 + math.sqrt(k)) / (R + 1), 1.0)
    return _Pairs(delta, sigma, widest, plausible, dof)


def _for_few(c: Any, dof: int | None, n_resamples: int) -> Any:
    """Turn a critical value for known σ into one for an estimated σ.

    The images estimate σ² with `dof` degrees of freedom, the resamples that estimate with R.
    """
    nu = 1 / ((1 / dof if dof else 0.0) + 1 / n_resamples)
    return np.maximum(c, student.isf(norm.sf(np.minimum(c, 30.0)), nu))  # norm.sf(39) is 0


def _for_many(t: float, dof: int | None, n_resamples: int) -> float:
    """Undo `_for_few`."""
    nu = 1 / ((1 / dof if dof else 0.0) + 1 / n_resamples)
    return float(norm.isf(student.sf(t, nu))) if 0 < t < 30 else t


def count_places(M: np.ndarray) -> np.ndarray:
    """Return P(in top j) (n, n); t tied ones at places a … b each get 1/t of every place."""
    R, n = M.shape
    first = rankdata(-M, method="min", axis=1).astype(np.int64) - 1  # a
    last = rankdata(-M, method="max", axis=1).astype(np.int64)  # b + 1
    share = 1.0 / (last - first)
    row = np.arange(n) * (n + 1)
    steps = np.bincount((row + first).ravel(), share.ravel(), n * (n + 1))
    steps -= np.bincount((row + last).ravel(), share.ravel(), n * (n + 1))
    places = steps.reshape(n, n + 1).cumsum(axis=1)[:, :n]  # expected number of times at place j
    return np.clip(places.cumsum(axis=1) / R, 0.0, 1.0)


def find_groups(separable: np.ndarray) -> list[tuple[int, int]]:
    """Return the maximal runs [a, b) in which no two are separable."""
    n = len(separable)
    above = np.triu(separable, 1)
    last = np.where(above.any(axis=0), n - above[::-1].argmax(axis=0), 0)  # b's lowest start
    runs: list[tuple[int, int]] = []
    b = 0
    for a in range(n):
        end = max(b, a + 1)  # no run ends before that of its predecessor
        while end < n and last[end] <= a:
            end += 1
        if end > b:
            runs.append((a, end))
        b = end
    return runs


# Input -------------------------------------------------------------------------------------------
def _rows(per_sample: Any) -> tuple[list[Any], np.ndarray]:
    """Return names and a float64 matrix (n_backbones, n_samples)."""
    if isinstance(per_sample, Mapping):
        missing = [name for name, terms in per_sample.items() if terms is None]
        if missing:
            raise ValueError(
                f"`per_sample` must be there for every backbone but is None for {some(missing)}; "
                "leave them out, or use a metric that has one, such as 'sfda'."
            )
        names = list(per_sample)
        rows = [np.asarray(terms, dtype=np.float64) for terms in per_sample.values()]
        shapes = {row.shape for row in rows}
        if len(shapes) > 1 or any(len(shape) != 1 for shape in shapes):
            seen = ", ".join(
                f"{name!r} {row.shape}" for name, row in zip(names, rows, strict=True)
            )
            raise ValueError(
                "`per_sample` must have the shape (n_samples,) for every backbone, the same for "
                f"all, but has {seen}; score all backbones on the same images."
            )
        X = np.stack(rows) if rows else np.empty((0, 0))
    else:
        X = np.ascontiguousarray(per_sample, dtype=np.float64)
        if X.ndim != 2:
            raise ValueError(
                "`per_sample` must be a mapping or have the shape (n_backbones, n_samples) but "
                f"has {X.shape}; pass one row per backbone."
            )
        names = list(range(len(X)))
    if not X.size:
        raise ValueError(
            f"`per_sample` must hold at least one backbone and one image but has {len(X)} "
            f"and {X.shape[1]}."
        )
    finite = np.abs(X) < 1e150  # squares must not overflow; false for NaN
    if not finite.all():
        i, row = np.argwhere(~finite)[0]
        bad = some(names[i] for i in np.flatnonzero(~finite.all(axis=1)))
        raise ValueError(
            f"`per_sample` must be finite but that of {names[i]!r} is {X[i, row]} for image {row} "
            f"(such backbones: {bad}); leave them out or score them again."
        )
    return names, X


def _lengths(X: np.ndarray, labels: Any) -> str:
    return (
        "`per_sample` and `labels` must have the same number of images but have "
        f"{X.shape[1]} and {len(labels)}."
    )
