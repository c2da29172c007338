"""How good a ranking was, once the truth (fine-tuned accuracies) is known.

========================================  =======================================================
`weighted_tau` `kendall_tau`              agreement of two orders; the field reports weighted τ
`pearson` `spearman` `fidelity`           agreement of values, of ranks, of differences
`relative_at_k` `regret_at_k` `hit_at_k`  its cost when followed; does it find the best model
`accuracy_interval`                       what an accuracy on few images leaves open
`permutation_p_value` `leave_models_out`  better than a random order? does it hang on few models?
`static_order` `static_order_null`        better than one fixed order for all data sets?
`evaluate` `evaluate_many`                all of it, for one data set and for several
========================================  =======================================================

`scores` and `truth` are mappings {name: number}, matched by name, or two sequences; higher is
better. A model without a finite score or without a truth takes no part; fewer than 2 models, or a
truth that is not finite, raise a ValueError. What is undefined, such as the correlation of scores
that are all equal, is NaN: never 0, which would say «no agreement».
"""

from __future__ import annotations

import json
import math
import warnings
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import combinations, zip_longest
from typing import Any, Literal, TypeAlias

import numpy as np
from scipy.stats import binomtest, kendalltau, norm, pearsonr, rankdata, spearmanr

from sfda_tune.selection.tables import TooFewError, numbers, pair
from sfda_tune.values.text import integer, printable, some, without_nan

Values: TypeAlias = Mapping[Any, Any] | Sequence[Any] | np.ndarray
Truths: TypeAlias = Mapping[str, Mapping[str, float]]

NAN = math.nan
EPS = 1e-12  # statistics that are equal on paper differ by rounding
DIGITS = 12  # mean ranks that are equal on paper stay ties
CELLS = 2**21  # of a (rows, n, n) array at a time: a few MB


# Agreement -------------------------------------------------------------------------------------
def weighted_tau(scores: Values, truth: Values) -> float:
    """Return weighted Kendall τ, in which the models at the top count most.

    τ_w = Σ_{i<j} w_ij s_ij t_ij / √(Σ w_ij s_ij² · Σ w_ij t_ij²) with s_ij = sign(s_i − s_j) and
    w_ij = 1/(1 + r_i) + 1/(1 + r_j); the position r = 0, 1, … is once by truth and once by score,
    and the two values are averaged (Vigna, WWW 2015). Equals ``scipy.stats.weightedtau``.

    >>> round(weighted_tau([1, 2, 3, 4], [1, 2, 4, 3]), 3)  # the best two confused
    0.52
    """
    _, s, t, _ = pair(scores, truth)
    return float(weighted_taus(s[None], t)[0])


def weighted_taus(S: np.ndarray, T: np.ndarray) -> np.ndarray:
    """Return τ_w of each row, (rows, n): nulls need thousands, SciPy takes 0.25 ms for one."""
    T = np.broadcast_to(T, S.shape)
    step = max(1, CELLS // S.shape[1] ** 2)
    starts = range(0, len(S), step)
    return np.concatenate([_weighted_taus(S[i : i + step], T[i : i + step]) for i in starts])


def _weighted_taus(S: np.ndarray, T: np.ndarray) -> np.ndarray:
    s, t = (np.sign(X[:, :, None] - X[:, None, :]).astype(np.int8) for X in (S, T))  # (rows, n, n)
    agree = (s * t).sum(-1)  # per model: concordant − discordant partners
    s_untied, t_untied = (s != 0).sum(-1), (t != 0).sum(-1)
    taus = []
    for keys in ((S, T), (T, S)):  # positions by truth, then by score; ties by the other side
        w = 1 / (S.shape[1] - np.argsort(np.lexsort(keys)))
        norm = np.sqrt((w * s_untied).sum(-1) * (w * t_untied).sum(-1))
        with np.errstate(invalid="ignore"):  # 0/0: undefined
            taus.append(np.clip((w * agree).sum(-1) / norm, -1, 1))
    return np.mean(taus, axis=0)


def _by_scipy(statistic: Callable[..., Any], s: np.ndarray, t: np.ndarray) -> float:
    with warnings.catch_warnings(action="ignore"):  # values all equal: NaN says it
        return float(statistic(s, t).statistic)


def kendall_tau(scores: Values, truth: Values) -> float:
    """Return Kendall τ_b: (concordant − discordant pairs) / √(untied by score · by truth)."""
    return _by_scipy(kendalltau, *pair(scores, truth)[1:3])


def pearson(scores: Values, truth: Values) -> float:
    """Return Pearson's correlation."""
    return _by_scipy(pearsonr, *pair(scores, truth)[1:3])


def spearman(scores: Values, truth: Values) -> float:
    """Return Spearman's ρ: Pearson's correlation of the ranks, ties averaged."""
    return _by_scipy(spearmanr, *pair(scores, truth)[1:3])


def fidelity(scores: Values, truth: Values) -> float:
    """Return Pearson's correlation of Δtruth and Δscore over all pairs (arXiv 2510.06448).

    Each pair is taken from the truly worse to the truly better model: do models that are further
    apart also score further apart? Pairs of equal truth count half in each direction.

    >>> round(fidelity([1, 2, 3], [1, 2, 9]), 3)  # pairs: Δtruth 1, 7, 8 against Δscore 1, 1, 2
    0.61
    """
    _, s, t, _ = pair(scores, truth)
    i, j = np.nonzero((t[:, None] >= t) & ~np.eye(len(t), dtype=bool))
    whole = t[i] > t[j]
    i, j = np.r_[i, i[whole]], np.r_[j, j[whole]]
    return _by_scipy(pearsonr, s[i] - s[j], t[i] - t[j])


# The top ---------------------------------------------------------------------------------------
def _best_pick(scores: Values, truth: Values, k: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the possible truths of the best of the top-k picks, their chances, the best truth.

    Equal scores at the border of the top k leave open which r of m models are picked. In a random
    order the i-th best of them (0-based) leads the r with chance C(m−1−i, r−1) / C(m, r).
    """
    _, s, t, _ = pair(scores, truth)
    k = min(integer("k", k, 1), len(s))
    border = np.sort(s)[-k]
    sure, open_ = t[s > border], np.sort(t[s == border])[::-1]
    m, r = len(open_), k - len(sure)
    chance = np.array([math.comb(m - 1 - i, r - 1) / math.comb(m, r) for i in range(m)])
    return np.maximum(open_, sure.max(initial=-np.inf)), chance, t.max()


def relative_at_k(scores: Values, truth: Values, k: int = 1) -> float:
    """Return Rel@k: the best accuracy among the top-k picks ÷ the best accuracy in the hub.

    Where equal scores leave open which models are picked, it is the mean over all their orders: no
    luck, no dependence on names. NaN unless the best truth is positive.

    >>> relative_at_k([1, 1, 0], [60, 80, 70], 1)  # (60 + 80) / 2 of 80
    0.875
    """
    values, chance, best = _best_pick(scores, truth, k)
    return float(values @ chance / best) if best > 0 else NAN


def regret_at_k(scores: Values, truth: Values, k: int = 1) -> float:
    """Return the best accuracy in the hub − that among the top-k picks; ties as `relative_at_k`.

    >>> regret_at_k({"a": 3, "b": 2, "c": 1}, {"a": 60, "b": 80, "c": 70}, 1)
    20.0
    """
    values, chance, best = _best_pick(scores, truth, k)
    return float((best - values) @ chance)


def hit_at_k(scores: Values, truth: Values, k: int = 1, *, of: Literal["pick", "best"]) -> float:
    """Return whether the ranking hits the top k: 1 or 0, between them for tied scores.

    With ``of="pick"``: is the metric's first choice among the truly best k (fewer than k strictly
    better)? With ``of="best"``: is a truly best model among the metric's first k choices?

    >>> hit_at_k([3, 2, 1], [6, 8, 7], 2, of="pick"), hit_at_k([3, 2, 1], [6, 8, 7], 2, of="best")
    (0.0, 1.0)
    """
    if of not in ("pick", "best"):
        raise ValueError(f"`of` must be 'pick' or 'best' but is {of!r}.")
    values, chance, best = _best_pick(scores, truth, k)
    if of == "best":
        return float(chance[values == best].sum())
    _, s, t, _ = pair(scores, truth)
    first = t[s == s.max()]
    return float(((t > first[:, None]).sum(1) < k).mean())


# How far to trust it ---------------------------------------------------------------------------
def permutation_p_value(scores: Values, truth: Values, *, n: int = 1000, seed: int = 0) -> float:
    """Return the chance that a random assignment of the scores has as high a weighted τ.

    p = (1 + #{permuted ≥ observed}) / (1 + n), one-sided; NaN if τ is undefined. Neither names nor
    the order of the models matter.

    >>> permutation_p_value([1, 2, 3, 4, 5, 6], [10, 20, 30, 40, 50, 60], n=999) < 0.01
    True
    """
    _, s, t, _ = pair(scores, truth)
    s, t = np.array([s, t])[:, np.lexsort((s, t))]
    S = np.random.default_rng(seed).permuted(np.tile(s, (integer("n", n, 1), 1)), axis=1)
    return _p_value(weighted_taus(s[None], t)[0], weighted_taus(S, t))


def _p_value(observed: float, null: np.ndarray) -> float:
    p = (1 + np.sum(null >= observed - EPS)) / (1 + len(null))
    return NAN if math.isnan(observed) or np.isnan(null).all() else float(p)


LeaveOut = namedtuple("LeaveOut", "low high low_without high_without")


def leave_models_out(scores: Values, truth: Values, m: int = 1) -> LeaveOut:
    """Return the range of the weighted τ over all ways to drop `m` models, and those at its ends.

    A figure that hangs on one outlier (in the supervised benchmark of SFDA: mnasnet) shows here.
    Subsets for which it is undefined do not count; at least 2 models must remain.

    >>> leave_models_out({"a": 9, "b": 2, "c": 3}, {"a": 1, "b": 2, "c": 3})
    LeaveOut(low=-1.0, high=1.0, low_without=('b',), high_without=('a',))
    """
    names, s, t, _ = pair(scores, truth)
    n, m = len(names), integer("m", m, 1, len(names) - 2)
    kept = np.array(list(combinations(range(n), n - m))[::-1])  # (C(n, m), n − m)
    values = weighted_taus(s[kept], t[kept])
    if np.isnan(values).all():
        return LeaveOut(NAN, NAN, (), ())
    ends = [np.nanargmin(values), np.nanargmax(values)]
    without = [tuple(names[i] for i in range(n) if i not in kept[end]) for end in ends]
    return LeaveOut(*values[ends].tolist(), *without)


def design_effect(right: np.ndarray, groups: np.ndarray | None) -> float:
    """Return how many times as uncertain an accuracy is as of as many independent images; ≥ 1.

    The variance of the mean of a cluster sample, G/(G−1) Σ_g (Σ_{n in g} (r_n − r̄))²/n², over
    r̄(1−r̄)/n; the mean size of the groups, where all images are right, or all wrong.

    >>> right = np.repeat([1, 0, 1, 1], 5)
    >>> design_effect(right, None), round(design_effect(right, np.arange(20) // 5), 2)
    (1.0, 6.67)
    """
    if groups is None:
        return 1.0
    n, p = len(right), float(np.mean(right))
    _, codes = np.unique(groups, return_inverse=True)
    G = int(codes.max()) + 1
    if G == 1 or p in (0.0, 1.0):
        return n / G
    sums = np.bincount(codes, right - p)
    return max(1.0, float(G / (G - 1) * (sums**2).sum() / (n * p * (1 - p))))


def accuracy_interval(n_right: int, n: int, effect: float = 1.0) -> tuple[float, float]:
    """Return Wilson's 95 % interval of an accuracy that was measured on n images.

    With a `design_effect`, of an accuracy measured on n/effect independent ones.

    >>> low, high = accuracy_interval(2, 2)
    >>> f"{low:.2f}–{high:.2f}"  # all of two
    '0.34–1.00'
    """
    if effect == 1:
        interval = binomtest(int(n_right), int(n)).proportion_ci(0.95, "wilson")
        return float(interval.low), float(interval.high)
    p, m, z = n_right / n, n / effect, float(norm.ppf(0.975))
    middle, half = p + z**2 / (2 * m), z * np.sqrt(p * (1 - p) / m + z**2 / (4 * m**2))
    scale = 1 + z**2 / m
    return max(0.0, float((middle - half) / scale)), min(1.0, float((middle + half) / scale))


# Baselines -------------------------------------------------------------------------------------
def static_order(truths: Truths) -> dict[str, dict[str, float]]:
    """Score each model by its mean rank on the *other* data sets: the baseline to beat.

    Ranks are relative (0 worst … 1 best); NaN for a model that no other data set knows. On the
    supervised benchmark of SFDA this reaches a mean τ_w of .837, above every published metric.

    >>> static_order({"x": {"a": 1, "b": 2}, "y": {"a": 5, "b": 9}, "z": {"a": 8, "b": 3}})["z"]
    {'a': 0.25, 'b': 0.75}
    """
    ranks = {}
    for name, truth in _checked(truths).items():
        r = (rankdata(list(truth.values())) - 0.5) / len(truth)
        ranks[name] = dict(zip(truth, r, strict=True))
    if len(ranks) < 2:
        raise ValueError("`truths` must hold at least 2 data sets: one is judged by the others.")

    def mean(model: str, dataset: str) -> float:
        others = [r[model] for name, r in ranks.items() if name != dataset and model in r]
        return round(math.fsum(others) / len(others), DIGITS) if others else NAN

    return {name: {model: mean(model, name) for model in r} for name, r in ranks.items()}


def _checked(truths: Truths) -> dict[str, dict[str, float]]:
    if not truths or not all(hasattr(truth, "items") for truth in truths.values()):
        raise ValueError(f"`truths` must map data sets to {{model: accuracy}}: {truths!r:.60}")
    return {d: numbers(f"`truths[{d!r}]`", truth, finite=True) for d, truth in truths.items()}


@dataclass(frozen=True)
class StaticNull:
    """The mean τ_w over data sets of random orders, each the same on all data sets."""

    mean: float
    sd: float
    quantiles: Mapping[float, float]
    observed: float
    p_value: float


def static_order_null(
    truths: Truths, *, observed: float = NAN, n: int = 10_000, seed: int = 0
) -> StaticNull:
    """Return how well one random order of the models does on several data sets at once.

    Data sets that share models are not independent: an order that suits one suits most. The mean
    τ_w of *one* random order spreads far more widely (3 times, on 11 data sets) than that of an
    order for each: only this null is honest about an `observed` mean.

    >>> static_order_null({"x": {"a": 1, "b": 2}, "y": {"a": 5, "b": 9}}, n=99).quantiles[0.975]
    1.0
    """
    truths = _checked(truths)
    models = sorted({model for truth in truths.values() for model in truth}, key=str)
    orders = np.tile(np.arange(len(models)), (integer("n", n, 1), 1))
    column = dict(zip(models, np.random.default_rng(seed).permuted(orders, axis=1).T, strict=True))
    taus = [
        weighted_taus(np.transpose([column[m] for m in truth]), np.array([*truth.values()]))
        for truth in truths.values()
        if len(set(truth.values())) > 1
    ]
    means, at = np.mean(taus or [np.full(n, NAN)], axis=0), (0.025, 0.5, 0.95, 0.975)
    quantiles = dict(zip(at, np.quantile(means, at).tolist(), strict=True))
    p = _p_value(observed, means)
    return StaticNull(float(means.mean()), float(means.std()), quantiles, observed, p)


# Reports ---------------------------------------------------------------------------------------
@dataclass(frozen=True, repr=False)
class _Report:
    def to_json(self) -> str:
        """Return the report as strict JSON text; undefined is null."""
        return json.dumps(without_nan(asdict(self)), indent=1, ensure_ascii=False)

    def __repr__(self) -> str:
        return _table(_flat("", {k: x for k, x in asdict(self).items() if k != "datasets"}))


def _flat(name: str, value: Any) -> list[tuple[Any, ...]]:
    if isinstance(value, Mapping):
        return [row for key, x in value.items() for row in _flat(f"{name} {key}".strip(), x)]
    return [(name, *value) if isinstance(value, tuple) else (name, value)]


def _table(rows: Sequence[Sequence[Any]]) -> str:
    texts = [[f"{x:.4f}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    widths = [max(map(len, column)) for column in zip_longest(*texts, fillvalue="")]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in texts)


@dataclass(frozen=True, repr=False)
class Evaluation(_Report):
    """How good a ranking was on one data set; made by `evaluate`.

    `figures`: by name of the function, and ``relative_at_1``, ``regret_at_1``, ``pick_in_top_1``,
    ``best_in_top_1``, … (NaN if k is not below `n_models`: no order can fail). `p_value`: of the
    weighted τ; `without_one`, `without_two`: its range when any are dropped (not for > 1000, 100).
    """

    n_models: int
    n_ties: int
    figures: Mapping[str, float]
    p_value: float
    without_one: tuple[float, float]
    without_two: tuple[float, float]
    picks: tuple[str, ...]
    left_out: Mapping[str, str]

    def describe(self) -> str:
        """Say in sentences what it would have meant to follow the ranking.

        >>> print(evaluate({"a": 0.2, "b": 0.9, "c": 0.5}, {"a": 70, "b": 78, "c": 80}).describe())
        Taking the first of these 3, b, loses 2 against the best, in units of the truth.
        67 % of the pairs are in the right order (by chance 50 %); weighted tau 0.18, which a \
random order reaches with probability 0.48.
        """
        lines = []
        for k, who in ((1, some([printable(name) for name in self.picks], 3)), (3, "")):
            lost = self.figures.get(f"regret_at_{k}", NAN)
            if lost == lost:
                what = (
                    f"Taking the first of these {self.n_models}, {who}," if who else
                    "Taking the best of its first three"
                )  # fmt: skip
                loses = f"loses {lost:.3g} against the best, in units of the truth"
                lines.append(f"{what} {loses if lost else 'loses nothing'}.")
        kendall, tau = self.figures["kendall_tau"], self.figures["weighted_tau"]
        if tau == tau:
            lines.append(
                f"{50 * (1 + kendall):.0f} % of the pairs are in the right order (by chance 50 "
                f"%); weighted tau {tau:.2f}, which a random order reaches with probability "
                f"{self.p_value:.2g}."
            )
        if self.left_out:
            lines.append(f"Left out: {some([printable(str(n)) for n in self.left_out], 3)}.")
        return "\n".join(lines)


def evaluate(
    scores: Values, truth: Values, *, k: Any = (1, 3), n_permutations: int = 1000, seed: int = 0
) -> Evaluation:
    """Compare a ranking with the truth on one data set, for short lists of each size `k`.

    >>> report = evaluate({"a": 0.2, "b": 0.9, "c": None}, {"a": 70, "b": 80, "c": 75}, k=1)
    >>> report.figures["weighted_tau"], report.figures["regret_at_1"], report.left_out
    (1.0, 0.0, {'c': 'its score is nan'})
    """
    names, s, t, left_out = pair(scores, truth)
    n, counts = len(names), np.unique(s, return_counts=True)[1]
    agreement = (weighted_tau, kendall_tau, pearson, spearman, fidelity)
    figures = {statistic.__name__: statistic(s, t) for statistic in agreement}
    for one in np.atleast_1d(k):
        top = {
            "relative_at": relative_at_k(s, t, one),
            "regret_at": regret_at_k(s, t, one),
            "pick_in_top": hit_at_k(s, t, one, of="pick"),
            "best_in_top": hit_at_k(s, t, one, of="best"),
        }
        figures |= {f"{name}_{one}": x if one < n else NAN for name, x in top.items()}
    return Evaluation(
        n_models=n,
        n_ties=int(counts[counts > 1].sum()),
        figures=figures,
        p_value=permutation_p_value(s, t, n=n_permutations, seed=seed),
        without_one=leave_models_out(s, t, 1)[:2] if 3 <= n <= 1000 else (NAN, NAN),
        without_two=leave_models_out(s, t, 2)[:2] if 4 <= n <= 100 else (NAN, NAN),
        picks=tuple(sorted(str(names[i]) for i in np.flatnonzero(s == s.max()))),
        left_out=left_out,
    )


@dataclass(frozen=True, repr=False)
class EvaluationSet(_Report):
    """How good rankings were on several data sets; made by `evaluate_many`.

    `means` of `Evaluation.figures` and of the weighted τ of the baseline `static_order`;
    `undefined` says how many values a mean leaves out. `interval`: 95 % percentile bootstrap over
    data sets of the mean weighted τ, which `null` compares with one random order for all of them.
    """

    datasets: Mapping[str, Evaluation]
    means: Mapping[str, float]
    undefined: Mapping[str, int]
    interval: tuple[float, float]
    static_order: Mapping[str, float]
    null: StaticNull
    left_out: Mapping[str, str]

    def __repr__(self) -> str:
        rows: list[Any] = [
            ("dataset", "models", "left out", "weighted_tau", "static_order", "first pick")
        ]
        for d, e in self.datasets.items():
            taus = (e.figures["weighted_tau"], self.static_order[d])
            rows.append((d, e.n_models, len(e.left_out), *taus, *e.picks))
        return f"{_table(rows)}\n\n{super().__repr__()}"


def evaluate_many(
    scores: Mapping, truth: Truths, *, n_draws: int = 10_000, seed: int = 0, **options: Any
) -> EvaluationSet:
    """Compare rankings with the truth on several data sets, and with a static order.

    `scores` maps data sets to what `evaluate` takes, or is one mapping {model: number}: a prior
    for all. Data sets without 2 models on both sides are left out and listed. `n_draws` bootstrap
    samples, and random orders; `options` (k, n_permutations) go to `evaluate`.

    >>> truth = {"x": {"a": 1, "b": 2, "c": 3}, "y": {"a": 5, "b": 6, "c": 7}}
    >>> evaluate_many({"a": 10, "b": 20, "c": 30}, truth, k=1, n_draws=99).static_order
    {'x': 1.0, 'y': 1.0}
    """
    truths = _checked(truth)
    if not any(hasattr(one, "items") for one in scores.values()):
        scores = dict.fromkeys(truths, scores)
    left_out = {d: "no truth" for d in scores if d not in truths}
    datasets: dict[str, Evaluation] = {}
    for d in list(truths):
        try:
            e = datasets[d] = evaluate(scores.get(d, {}), truths[d], seed=seed, **options)
            # The baselines rank the same models.
            truths[d] = {model: x for model, x in truths[d].items() if model not in e.left_out}
        except TooFewError as error:
            left_out[d] = str(error) if d in scores else "no scores"
            del truths[d]
        except ValueError as error:
            raise ValueError(f"data set {d!r}: {error}") from None
    if not datasets:
        raise ValueError(f"`scores` and `truth` must share a data set: {left_out}")
    baseline = dict.fromkeys(datasets, NAN)
    for d, order in (static_order(truths) if len(truths) > 1 else {}).items():
        with suppress(TooFewError):
            baseline[d] = weighted_tau(order, truths[d])
    rows = [{**e.figures, "static_order": baseline[d]} for d, e in datasets.items()]
    defined = {name: [row[name] for row in rows if row[name] == row[name]] for name in rows[0]}
    means = {name: float(np.mean(values or [NAN])) for name, values in defined.items()}
    taus, interval = np.sort(defined["weighted_tau"]), (NAN, NAN)
    if len(taus) > 1:
        size = integer("n_draws", n_draws, 1), len(taus)
        draws = np.random.default_rng(seed).choice(taus, size)
        interval = tuple(np.quantile(draws.mean(1), (0.025, 0.975)).tolist())
    return EvaluationSet(
        datasets=datasets,
        means=means,
        undefined={d: len(rows) - len(x) for d, x in defined.items() if len(x) < len(rows)},
        interval=interval,
        static_order=baseline,
        null=static_order_null(truths, observed=means["weighted_tau"], n=n_draws, seed=seed),
        left_out=left_out,
    )
