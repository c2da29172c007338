"""What finished trials say of the scores: the model of the policy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
from scipy.special import ndtr
from scipy.stats import kendalltau, rankdata

from sfda_tune.selection.uncertainty import collapse_groups
from sfda_tune.values.files import LARGEST_NUMBER
from sfda_tune.values.ranking import Ranking
from sfda_tune.values.text import require

__all__ = [
    "Calibration", "History", "Observation", "backbone_name", "calibrate", "estimate_errors",
    "estimate_levels", "scores_by_name",
]  # fmt: skip

STATES = ("complete", "pruned", "failed", "stopped", "running")

# Fitted on every second table of tests/benchmarks/study_replay.py, which reports the others. A
# slope that knows the ρ of each study gains nothing there: of .2, .4, .6, .8 and .95 (5 SHiFT
# tables, 10 seeds; 12 CLIP tables, 4 seeds) the trials needed are 2.8, 1.9, 2.0, 2.3, 1.8 and 5.2,
# 4.2, 3.9, 3.4, 3.8 at ρ .9, and differ by less than 15 % at ρ 0. So the reliability of a forecast
# is not asked for.
SLOPE, SLOPE_TRIALS = 0.8, 1.5  # s₀ and ℓ, its weight in backbones
REST, REST_TRIALS = 1 - SLOPE**2, 2.0  # ω₀² and κ
WITHIN, WITHIN_TRIALS = 0.6, 2.0  # ν₀² / ω₀² and its weight
RIDGE = 0.5  # of the effects of parameters, values having variance 1
RUNS, FAILS = 0.1, 0.02  # Beta prior: a backbone runs or does not, so one failure says much
CHANCE = 0.1  # of so low a τ, if the scores were of no use


@dataclass(frozen=True)
class Observation:
    """One trial, as evidence."""

    backbone: str
    # One of STATES. "failed": it gave no value, perhaps for its backbone (out of memory), perhaps
    # not (Ctrl-C, an error, a value that is not finite): the first of a backbone says nothing.
    # "stopped": for its backbone alone, and it would be another time
    state: str
    # Higher is better. Of a pruned trial the last one reported: a lower bound of the final one
    value: float | None = None
    cost: float | None = None  # seconds
    step: float | None = None  # part of the full budget, at which a pruned value was seen; or ½
    feasible: bool = True  # an infeasible trial counts as if its value were the worst of all
    # The others. If given, values are compared as if all trials had had the best ones; and where
    # nothing else varies, a second trial of a backbone is worthless
    params: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        require("state", self.state, f"one of {', '.join(STATES)}", self.state in STATES)


@dataclass(frozen=True)
class Calibration:
    """What the scores have proved to be worth.

    Parameters
    ----------
    slope, slope_interval : float, tuple of float
        s, in `scale` per standard deviation of score, and 90 %; ≤ 0 if the scores mislead.
    kendall_tau : float
        Between z and b_k of the backbones with a value; NaN if undefined.
    n_backbones, n_trials : int
        With a value.
    table : tuple of dict
        ``backbone, score, z, n_trials, best, mean, sd``, by name: the best value (None if there
        is none), and what the backbone is expected to reach.
    scale : float
        One standard deviation of the values.
    warning : str or None
    """

    slope: float
    slope_interval: tuple[float, float]
    kendall_tau: float
    n_backbones: int
    n_trials: int
    table: tuple[dict[str, Any], ...]
    scale: float = 1.0
    warning: str | None = None

    @property
    def reached(self) -> list[dict[str, Any]]:
        """The rows of `table` that have a best value: what figures show."""
        return [row for row in self.table if row["best"] is not None]

    def fit_line(self) -> list[tuple[float, float]]:
        """Return the two ends (z, value) of the fitted line; none with fewer than 3 backbones."""
        rows = self.reached
        if len(rows) < 3:
            return []
        z = [row["z"] for row in rows]
        mean_z, mean = sum(z) / len(z), sum(row["best"] for row in rows) / len(rows)
        slope = self.slope * self.scale
        return [(end, mean + slope * (end - mean_z)) for end in (min(z), max(z))]

    def describe_slope(self) -> str:
        """Return the slope with its interval, and Kendall's tau, for people."""
        low, high = self.slope_interval
        tau = f"Kendall's tau {self.kendall_tau:.2f}"
        return f"slope {self.slope:.2f} [{low:.2f}, {high:.2f}], {tau}"

    def __str__(self) -> str:
        width = max([8, *(len(row["backbone"]) for row in self.table)])
        lines = [
            f"{self.describe_slope()}; {self.n_trials} trials of {self.n_backbones} backbones",
            f"{'backbone':<{width}}      score  trials       best  expected",
        ]
        for row in sorted(self.table, key=lambda row: -row["mean"]):
            best = "–" if row["best"] is None else f"{row['best']:.4g}"
            lines.append(
                f"{row['backbone']:<{width}}  {row['score']:>9.4g}  {row['n_trials']:>6}  "
                f"{best:>9}  {row['mean']:.4g} ± {row['sd']:.2g}"
            )
        return "\n".join(lines + ([f"warning: {self.warning}"] if self.warning else []))


def calibrate(
    scores: Mapping[str, float],
    history: Iterable[Observation],
    *,
    prior_strength: float = 1.0,
    errors: Mapping[str, float] | None = None,
) -> Calibration:
    """Compare the scores with the values of the trials.

    Examples
    --------
    >>> scores = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0, "e": 5.0}
    >>> falls = [Observation(name, "complete", -score) for name, score in scores.items()]
    >>> print(calibrate(scores, falls).warning)
    the scores run against the values of 5 backbones (Kendall's tau -1.00); use other scores
    """
    names = sorted(scores)
    fit = fit_model(names, scores, history, prior_strength, errors)
    has = fit.valued > 0
    x, y, m = fit.z[has], fit.level[has], int(has.sum())
    test: Any = kendalltau(x, y) if m > 1 and np.ptp(x) and np.ptp(y) else None
    tau = math.nan if test is None else float(test.statistic)
    warning = (
        f"the scores run against the values of {m} backbones (Kendall's tau {tau:.2f}); "
        "use other scores"
    )
    columns = (fit.z, fit.valued, fit.best, fit.mean * fit.scale, fit.sd * fit.scale)
    table: list[dict[str, Any]] = []
    for name, z, n, best, mean, sd in zip(names, *(c.tolist() for c in columns), strict=True):
        row = {"backbone": name, "score": float(scores[name]), "z": z, "n_trials": int(n)}
        table.append(row | {"best": best if n else None, "mean": mean, "sd": sd})
    interval = (fit.slope - 1.645 * fit.slope_sd, fit.slope + 1.645 * fit.slope_sd)
    n_trials, misleads = (
        int(fit.valued.sum()),
        m >= 5 and test and tau < 0 and test.pvalue < CHANCE,
    )
    about = (m, n_trials, tuple(table), fit.scale, warning if misleads else None)
    return Calibration(fit.slope, interval, tau, *about)


def estimate_levels(
    scores: Mapping[str, float],
    history: Iterable[Observation],
    *,
    prior_strength: float = 1.0,
    errors: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Return E[u_k], what each scored or tried backbone is expected to reach, like its values.

    Values minus these compare trials of different backbones: what is left is due to the other
    parameters. With few trials of a backbone it is mostly the prior's, so that a single trial
    still says something of its own parameters.

    Examples
    --------
    >>> history = [Observation("vit", "complete", 0.9), Observation("resnet", "complete", 0.5)]
    >>> levels = estimate_levels({"vit": 1.0, "resnet": 0.0}, history)
    >>> 0 < levels["vit"] - levels["resnet"]
    True
    """
    history = History.of(history)
    names = sorted({*scores, *history.evidence.names})
    fit = fit_model(names, scores, history, prior_strength, errors)
    return dict(zip(names, (fit.mean * fit.scale).tolist(), strict=True))


def backbone_name(choice: Any) -> str:
    """Return the name of a choice: 1, True and "x" become "1", "True" and "x"."""
    return str(choice) if isinstance(choice, str) else repr(choice)  # never an `np.str_`


def scores_by_name(scores: Any, argument: str = "ranking") -> dict[str, float]:
    """Return the scores of a Ranking or a mapping by `backbone_name`; else raise a ValueError."""
    require(argument, scores, "a Ranking or a mapping", isinstance(scores, Mapping))
    for name, value in scores.items():
        require(f"{argument}[{name!r}]", value, "a number", isinstance(value, Real))
    return {backbone_name(name): float(value) for name, value in scores.items()}


def estimate_errors(scores: Mapping[Any, float]) -> dict[str, float] | None:
    """Return the standard error of each score, where a `Ranking` has what it takes."""
    errors = {}
    groups = scores.groups if isinstance(scores, Ranking) else None
    for score in scores.scores if isinstance(scores, Ranking) else ():
        if "error" in (score.details.get("forecast") or {}):
            errors[score.backbone] = float(score.details["forecast"]["error"])
        elif "standard_error" in score.details:
            errors[score.backbone] = float(score.details["standard_error"])
        elif score.per_sample is not None and len(score.per_sample) > 1 and score.error is None:
            terms = score.per_sample
            if groups is not None:  # all in one stratum, as the images are
                terms = collapse_groups(terms[None], np.zeros(len(terms), int), groups)[0][0]
            errors[score.backbone] = float(np.std(terms, ddof=1) / math.sqrt(len(terms)))
    return {name: error for name, error in errors.items() if math.isfinite(error)} or None


# The model --------------------------------------------------------------------------------------
class _Fit(NamedTuple):
    """What is known of each candidate; `level`, `mean`, `sd` and `top` in units of `scale`."""

    z: np.ndarray
    tried: np.ndarray  # t_k
    valued: np.ndarray  # trials with a value
    success: np.ndarray
    cost: np.ndarray  # NaN if unknown
    best: np.ndarray
    level: np.ndarray  # b_k
    mean: np.ndarray  # of u_k
    sd: np.ndarray
    top: float
    slope: float
    slope_sd: float
    scale: float


class _Evidence(NamedTuple):
    """The trials as arrays; per backbone, or per trial with a value."""

    names: list[str]
    counts: np.ndarray  # trials, failures, seconds, trials with seconds: of each backbone
    backbone: np.ndarray  # position in `names`
    raw: np.ndarray
    full: np.ndarray  # whether it ran to its end
    y: np.ndarray  # comparable
    weight: np.ndarray
    is_alone: bool  # nothing but the backbone varies


class History(tuple[Observation, ...]):
    """Trials, as evidence that is read once and asked several times."""

    @classmethod
    def of(cls, history: Iterable[Observation]) -> History:
        """Return a history as it is, or one of the observations."""
        return history if isinstance(history, History) else cls(history)

    @cached_property
    def evidence(self) -> _Evidence:
        """The trials as arrays, in an order that does not depend on the given one."""
        names = sorted({o.backbone for o in self})
        index = {name: k for k, name in enumerate(names)}
        tried, failed, seconds, paid = counts = np.zeros((4, len(names)))
        stopped = np.zeros(len(names))
        seen: list[Observation] = []
        for o in self:
            k, has_value = index[o.backbone], o.value is not None and math.isfinite(o.value)
            tried[k] += 1
            failed[k] += o.state == "failed" or (o.state == "complete" and not has_value)
            stopped[k] += o.state == "stopped"
            if o.state in ("complete", "pruned") and has_value:
                seen.append(o)
            if o.cost is not None and o.state == "complete":
                seconds[k], paid[k] = seconds[k] + min(o.cost, LARGEST_NUMBER), paid[k] + 1
        failed += np.where(failed > 0, stopped - 1, stopped)  # the first failure says nothing
        backbone = np.array([index[o.backbone] for o in seen], dtype=int)
        raw = np.array([o.value for o in seen], dtype=float)
        raw = raw.clip(-LARGEST_NUMBER, LARGEST_NUMBER)  # squares of a diverged loss overflow
        full = np.array([o.state == "complete" for o in seen], dtype=bool)
        feasible = np.array([o.feasible for o in seen], dtype=bool)
        steps = [o.step if o.step is not None and 0 < o.step <= 1 else 0.5 for o in seen]
        weight = np.where(full, 1.0, np.array(steps, dtype=float))
        params = [o.params for o in seen if o.params is not None]
        X = _encode(params) if len(params) == len(seen) else None
        # Sums are rounded in one order, whatever the caller's.
        columns = () if X is None else X.T
        order = np.lexsort((*columns, weight, feasible, raw, full, backbone))
        arrays = (a[order] for a in (backbone, raw, full, feasible, weight))
        backbone, raw, full, feasible, weight = arrays
        X = None if X is None else X[order]
        y, weight, is_alone = _comparable(raw, backbone, full, feasible, weight, X, params)
        return _Evidence(names, counts, backbone, raw, full, y, weight, is_alone)


def fit_model(
    candidates: Sequence[str],
    scores: Mapping[str, float],
    history: Iterable[Observation],
    prior_strength: float,
    errors: Mapping[str, float] | None = None,
) -> _Fit:
    """Fit the model of the module's docstring, in its notation."""
    require("prior_strength", prior_strength, "a number ≥ 0", 0 <= prior_strength < math.inf)
    seen = History.of(history).evidence
    names = [*candidates, *sorted({*seen.names} - {*candidates})]
    index, K = {name: k for k, name in enumerate(names)}, len(names)
    z, dz = _standardise(names, scores, errors or {})
    if prior_strength == 0:
        z, dz = np.zeros((2, K))
    at = np.array([index[name] for name in seen.names], dtype=int)
    tried, failed, seconds, paid = np.zeros((4, K))
    tried[at], failed[at], seconds[at], paid[at] = seen.counts
    backbone, raw, full, y, weight, is_alone = at[seen.backbone], *seen[3:]
    valued, n = np.bincount(backbone, None, K), np.bincount(backbone, weight, K)
    tried = tried - np.bincount(backbone[full], 1 - weight[full], K)

    # The scale, b_k and ν²
    scale = float(y.std(ddof=1)) if len(y) > 1 else 0.0
    scale = scale if scale > 0 else 1.0
    best, level = np.full((2, K), -np.inf)
    np.maximum.at(best, backbone, raw)
    np.maximum.at(level, backbone, y / scale)
    size = np.bincount(backbone[full], None, K)
    centre = np.bincount(backbone[full], y[full], K) / np.maximum(size, 1)
    squares = float(np.square(y - centre[backbone])[full].sum()) / scale**2
    within = (1e-4 if is_alone else WITHIN) * REST
    nu2 = (WITHIN_TRIALS * within + squares) / (WITHIN_TRIALS + full.sum() - (size > 0).sum())

    has = n > 0
    m, n = int(has.sum()), n[has]
    b = level[has] + math.sqrt(nu2) / np.maximum(n, 1)
    w = 1 / (REST - within + nu2 / n)
    w = w / w.max(initial=1e-9)
    total = w.sum() if m else 1.0
    z_mean, b_mean = w @ z[has] / total, w @ b / total
    zc, bc = z[has] - z_mean, b - b_mean
    pull = SLOPE_TRIALS * prior_strength
    precision = pull + w @ zc**2 or 1.0
    s = (pull * SLOPE + w @ (zc * bc)) / precision
    rest = w @ (bc - s * zc) ** 2 + pull * (s - SLOPE) ** 2
    omega2 = (REST_TRIALS * REST + rest) / (REST_TRIALS + m)
    tau2 = max(omega2 - (w * nu2 / n).sum() / max(m, 1), 0.1 * omega2)
    own = tau2 + s**2 * dz**2
    mean = b_mean + s * (z - z_mean)
    var = own + omega2 / max(m, 1) + (z - z_mean) ** 2 * omega2 / precision
    var[has] = 1 / (1 / own[has] + n / nu2)
    mean[has] = var[has] * (mean[has] / own[has] + b * n / nu2)

    success = (valued + RUNS) / (valued + failed + RUNS + FAILS)
    cost = np.where(paid > 0, seconds / np.maximum(paid, 1), math.nan)
    top = float(np.max(level if m else mean, initial=-math.inf))
    sd, s_sd, c = np.sqrt(var), math.sqrt(omega2 / precision), slice(len(candidates))
    counts = (z[c], tried[c], valued[c], success[c], cost[c])
    return _Fit(*counts, best[c], level[c], mean[c], sd[c], top, float(s), s_sd, scale)


def _standardise(
    names: Sequence[str], scores: Mapping[str, float], errors: Mapping[str, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Return z_k and δ_k: the ranks, and by how many a score moves with its error."""
    value = np.array([float(scores.get(name, math.nan)) for name in names])
    error = np.nan_to_num([float(errors.get(name, 0.0)) for name in names], posinf=0.0)
    z, dz = np.zeros((2, len(names)))
    at = np.isfinite(value)
    v, e = value[at], error[at]
    if len(set(v)) > 1:
        ranks, order = rankdata(v), np.sort(v)
        up = order.searchsorted(v + e, "right") - order.searchsorted(v, "right")
        down = order.searchsorted(v) - order.searchsorted(v - e)
        z[at] = (ranks - ranks.mean()) / ranks.std()
        dz[at] = (up + down) / 2 / ranks.std()
    return z, dz


def _comparable(
    raw: np.ndarray,
    backbone: np.ndarray,
    full: np.ndarray,
    feasible: np.ndarray,
    weight: np.ndarray,
    X: np.ndarray | None,
    params: Sequence[Mapping[str, Any]],
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Return values as if with the best parameters, their weights, and if these never vary.

    Ridge regression on the parameters; of each backbone's mean the part 1 − √(λ/(λ + n_k)) is
    subtracted first (λ the ridge), as for random effects. A value that is moved by x standard
    deviations counts 1/(1 + x²). Before, diverged values are moved up to three times the distance
    from the best to the median (of the trials or of the backbones' best, whichever is lower): so
    they do not hide all other differences, and many trials of one good backbone do not, either.
    """
    if not len(raw):
        return raw, weight, False
    y = np.where(feasible, raw, raw.min())
    middle = min(np.median(y), np.median([y[backbone == k].max() for k in np.unique(backbone)]))
    if y.max() > middle:
        y = np.maximum(y, middle - 3 * (y.max() - middle))
    if X is None:
        return y, weight, False
    if not (X.size and np.ptp(X, axis=0).any()):
        return y, weight, len(y) > 1 or not params[0]
    spread = y[full].std() if full.sum() > 3 else 0.0
    if spread > 0:
        k, n = backbone[full], np.bincount(backbone[full])
        A = np.column_stack([X[full], y[full] / spread])
        A = A - A.mean(axis=0)
        part = (1 - np.sqrt(RIDGE / (RIDGE + n))) / np.maximum(n, 1)
        A_ = A - np.column_stack([(part * np.bincount(k, column))[k] for column in A.T])
        X_, y_ = A_[:, :-1], A_[:, -1]
        effect = A[:, :-1] @ np.linalg.solve(X_.T @ X_ + RIDGE * np.eye(X_.shape[1]), X_.T @ y_)
        y[full] += spread * (effect.max() - effect)
        weight[full] = 1 / (1 + (effect.max() - effect) ** 2)
    return y, weight, False


def _encode(params: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Return rank and rank² for numbers of more than 4 values, else a column per value."""
    columns = []
    for name in sorted({name for chosen in params for name in chosen}):
        values = [chosen.get(name) for chosen in params]
        kinds = sorted({repr(v) for v in values if v is not None})
        if len(kinds) > 4 and all(v is None or isinstance(v, (int, float)) for v in values):
            x = np.array([math.nan if v is None else float(v) for v in values])
            t = 2 * rankdata(x, nan_policy="omit") / len(x) - 1  # so logarithms need no care
            columns += [np.nan_to_num(t), np.nan_to_num(t**2)]
        else:
            columns += [np.array([repr(v) == kind for v in values], float) for kind in kinds[:20]]
    return np.column_stack(columns) if columns else np.zeros((len(params), 0))


def log_improvement(fit: _Fit) -> np.ndarray:
    """Return log E[(u − y*)₊] = log σ + log(φ(d) + d Φ(d)), d = (μ − y*)/σ, for any d."""
    d = (fit.mean - fit.top) / fit.sd
    near = np.maximum(d, -8.0)
    exact = np.log(np.exp(-(near**2) / 2) / math.sqrt(2 * math.pi) + near * ndtr(near))
    tail = -(d**2) / 2 - math.log(math.sqrt(2 * math.pi)) - 2 * np.log(np.maximum(-d, 1))
    return np.log(fit.sd) + np.where(d > -8, exact, tail)
