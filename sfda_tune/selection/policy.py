"""Which backbone next: pure decisions that the adapters of all hosts share.

`choose` names the backbone of the next trial, `leaves_to_base` says which trials are the host's
own, `find_barred` what none may try for now, `calibrate` tells what the scores have proved to be
worth, `survivors` cuts a ranking. An `Advisor` holds the arguments, checked once.

==========  =================================================================================
Symbol      Meaning
==========  =================================================================================
z_k, δ_k    standardised rank of the score of backbone k (mean 0, sd 1), its standard error
n_k, t_k    trials of k with a value, weighted; all trials of k
b_k         best value of k, in standard deviations of all values; m backbones have one
u_k         what backbone k can reach; y* = max b_k is what has been reached
s, τ²       slope, and what it leaves unexplained: u_k ~ N(a + s z_k, τ² + s² δ_k²)
ν           spread of the values within one backbone, which other parameters cause
==========  =================================================================================

**Model.** The best of n values lies about ν/n below what can be reached: b_k + ν/max(n_k, 1) is
u_k with noise of variance ν²/n_k. A Bayesian regression on z, with weights w ∝ 1/(τ₀² + ν²/n)::

    s  = (ℓ s₀ + Σ w z̃ b̃) / (ℓ + Σ w z̃²)        z̃, b̃ centred; the slope is shrunk towards s₀ > 0
    ω² = (κ ω₀² + Σ w (b̃ − s z̃)² + ℓ (s − s₀)²) / (κ + m),    τ² = ω² − mean w ν²/n
    u_k ~ N(b̄ + s (z_k − z̄),  τ² + s² δ_k² + ω²/m + (z_k − z̄)² ω² / (ℓ + Σ w z̃²))

and for a backbone with values the product of N(b̄ + s (z_k − z̄), τ² + s² δ_k²) and its evidence.

**Choice.** The largest E[(u_k − y*)₊] · 2/((t_k + 1)(t_k + 2)) · P(k does not fail) / cost_k^α.
The second factor is how records become rarer and smaller while one goes on drawing from one
(uniform) distribution. So good scores are followed almost in order; if values contradict them, s
goes to 0 or below, and the order is given up or reversed. Running trials count in t_k alone, so
trials asked for together differ.

**Guarantee.** From trial 8 on every eighth trial is left to the host's own sampler, and every
second one while the trials do not support the scores (s ≤ 0): see `leaves_to_base`.

There is no state and no clock: random numbers come from ``default_rng([seed, number])``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
from scipy.special import ndtr
from scipy.stats import kendalltau, rankdata

from sfda_tune.values.files import LARGEST_NUMBER
from sfda_tune.values.ranking import Ranking, require

__all__ = [
    "Advisor", "Calibration", "Observation", "calibrate", "choose", "estimate_errors",
    "find_barred", "leaves_to_base", "name_arm", "rate", "survivors",
]  # fmt: skip

POLICIES = ("calibrated", "prior", "greedy")
_WEIGHTS = 3  # a random stream beside those of the hosts
STATES = ("complete", "pruned", "failed", "running")

# Fitted on every second table of tests/benchmarks/study_replay.py, which reports the others.
SLOPE, SLOPE_TRIALS = 0.8, 1.5  # s₀ and ℓ, its weight in backbones
REST, REST_TRIALS = 1 - SLOPE**2, 2.0  # ω₀² and κ
WITHIN, WITHIN_TRIALS = 0.6, 2.0  # ν₀² / ω₀² and its weight
RIDGE = 0.5  # of the effects of settings, values having variance 1
RUNS, FAILS = 0.1, 0.02  # Beta prior: a backbone runs or does not, so one failure says much
FREE, EVERY, DOUBT = 8, 8, 2  # `leaves_to_base`


@dataclass(frozen=True)
class Observation:
    """One trial, as evidence.

    Parameters
    ----------
    backbone : str
    state : {"complete", "pruned", "failed", "running"}
        Failed: it gave no value and hardly would another time (out of memory). So does a complete
        trial whose value is missing or not finite.
    value : float, optional
        Higher is better. Of a pruned trial the last one reported: a lower bound of the final one.
    cost : float, optional
        Seconds.
    step : float, optional
        Part of the full budget, in (0, 1], at which a pruned value was seen; else taken as ½.
    feasible : bool, default True
        An infeasible trial counts as if its value were the worst of all.
    settings : mapping of str to object, optional
        The other parameters. If given, values are compared as if all trials had had the best
        settings; and where nothing else varies, a second trial of a backbone is worthless.
    """

    backbone: str
    state: str
    value: float | None = None
    cost: float | None = None
    step: float | None = None
    feasible: bool = True
    settings: Mapping[str, Any] | None = None

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

    def __str__(self) -> str:
        low, high = self.slope_interval
        width = max([8, *(len(row["backbone"]) for row in self.table)])
        lines = [
            f"slope {self.slope:.2f} [{low:.2f}, {high:.2f}], Kendall's tau "
            f"{self.kendall_tau:.2f}; {self.n_trials} trials of {self.n_backbones} backbones",
            f"{'backbone':<{width}}      score  trials       best  expected",
        ]
        for row in sorted(self.table, key=lambda row: -row["mean"]):
            best = "–" if row["best"] is None else f"{row['best']:.4g}"
            lines.append(
                f"{row['backbone']:<{width}}  {row['score']:>9.4g}  {row['n_trials']:>6}  "
                f"{best:>9}  {row['mean']:.4g} ± {row['sd']:.2g}"
            )
        return "\n".join(lines + ([f"warning: {self.warning}"] if self.warning else []))


def choose(
    scores: Mapping[str, float],
    history: Iterable[Observation] = (),
    *,
    candidates: Sequence[str] | None = None,
    seed: int = 0,
    number: int = 0,
    policy: str = "calibrated",
    prior_strength: float = 1.0,
    survivors: Collection[str] | None = None,
    exploration: float = 0.05,
    costs: Mapping[str, float] | None = None,
    cost_exponent: float = 0.0,
    errors: Mapping[str, float] | None = None,
) -> str:
    """Return the backbone of the next trial.

    Parameters
    ----------
    scores : mapping of str to float
        Higher is better; only the order counts. Unknown or not finite: z = 0, the average.
    history : iterable of Observation
        In any order.
    candidates : sequence of str, optional
        What may be chosen; default: all scored ones.
    seed, number : int ≥ 0
        Of the study and of the trial. Chance breaks ties and decides on `exploration`.
    policy : {"calibrated", "prior", "greedy"}
        "calibrated": see the module. "prior": whatever the values, a draw with
        P(k) ∝ exp(4 z_k) · 2/((t_k + 1)(t_k + 2)). "greedy": the highest mean of u_k.
    prior_strength : float ≥ 0, default 1.0
        Multiplies ℓ; 0 ignores the scores.
    survivors : collection of str, optional
        Only these; but a share `exploration` of the trials takes one of the others.
    costs : mapping of str to float, optional
        Default: the mean cost of the backbone's trials. Unknown: the median of the known.
    cost_exponent : float ≥ 0, default 0.0
        α; 1 is improvement per second.
    errors : mapping of str to float, optional
        Standard errors of the scores.

    Raises
    ------
    ValueError
        If an argument is out of range, or there is no candidate or no survivor among them.

    Examples
    --------
    >>> scores = {"vit": 3.0, "resnet": 2.0, "alexnet": 1.0}
    >>> choose(scores), choose(scores, [Observation("vit", "failed")])
    ('vit', 'resnet')
    """
    require("policy", policy, f"one of {', '.join(POLICIES)}", policy in POLICIES)
    require("exploration", exploration, "in [0, 1]", 0 <= exploration <= 1)
    require("cost_exponent", cost_exponent, "a number ≥ 0", 0 <= cost_exponent < math.inf)
    names = sorted(set(scores if candidates is None else candidates))
    require("candidates", names, "the host's choices, at least one", names)
    history = list(history)
    barred = find_barred(history, number)
    fit = _fit(names, scores, history, prior_strength, errors)
    rng = np.random.default_rng([seed, number])
    is_outside, noise = rng.random() < exploration, rng.gumbel(size=len(names))

    if policy == "greedy":
        gain = np.log(fit.mean - fit.mean.min() + 1e-9)
    else:
        gain = _log_improvement(fit) if policy == "calibrated" else 4 * fit.z + noise
        gain = gain - np.log((fit.tried + 1) * (fit.tried + 2) / 2)
    gain = gain + np.log(fit.success) - 1e6 * np.isin(names, list(barred))
    if cost_exponent:
        cost = np.array([(costs or {}).get(n, c) for n, c in zip(names, fit.cost, strict=True)])
        known = np.isfinite(cost)
        require("costs", costs, "numbers > 0", (cost[known] > 0).all())
        cost[~known] = np.median(cost[known]) if known.any() else 1.0
        gain = gain - cost_exponent * np.log(cost)
    if survivors is not None:
        stays = np.array([name in survivors for name in names])
        require("survivors", sorted(survivors), f"some of the candidates {names}", stays.any())
        gain[stays == (is_outside and not stays.all())] = -np.inf
    best = np.flatnonzero(gain >= gain.max() - 1e-12)
    return names[int(best[noise[best].argmax()])]


def calibrate(
    scores: Mapping[str, float], history: Iterable[Observation], *, prior_strength: float = 1.0
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
    fit = _fit(names, scores, history, prior_strength)
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
    n_trials, misleads = int(fit.valued.sum()), m >= 5 and tau < 0
    about = (m, n_trials, tuple(table), fit.scale, warning if misleads else None)
    return Calibration(fit.slope, interval, tau, *about)


def survivors(
    scores_or_ranking: Mapping[str, float],
    keep: int | Collection[str] | None = None,
    *,
    probability: float | None = None,
) -> tuple[str, ...]:
    """Return who may go on, best first; equal scores by name, without a finite score last.

    Parameters
    ----------
    scores_or_ranking : mapping of str to float
    keep : int or collection of str, optional
        How many of those with a finite score, or which. Default: all with a finite score.
    probability : float, optional
        Instead of `keep`: those among which the best by score is with this probability; needs a
        `Ranking` (see `sfda_tune.selection.uncertainty.shortlist`).

    Raises
    ------
    ValueError
        If `keep` is not positive or names unknown backbones, or `probability` cannot be used.

    Examples
    --------
    >>> survivors({"a": 0.1, "b": 0.9, "c": 0.5}, 2)
    ('b', 'c')
    """
    scores = scores_or_ranking
    if probability is not None:
        find = getattr(scores, "shortlist", None)
        usable = find is not None and keep is None
        require("probability", probability, "given with a Ranking and without `keep`", usable)
        return tuple(find(probability=probability))  # type: ignore[misc]
    order = sorted((n for n in scores if math.isfinite(scores[n])), key=lambda n: (-scores[n], n))
    if isinstance(keep, Collection):
        names = set() if isinstance(keep, str) else set(keep)
        require("keep", keep, "names of scored backbones", names and names <= set(scores))
        return tuple(n for n in [*order, *sorted(set(scores) - set(order))] if n in names)
    if keep is not None:
        require("keep", keep, "an integer ≥ 1, or names", keep >= 1 and int(keep) == keep)
        keep = int(keep)
    return tuple(order[:keep])


def leaves_to_base(
    number: int,
    *,
    seed: int,
    history: Iterable[Observation] = (),
    scores: Mapping[str, float] | None = None,
    share: float | None = None,
) -> bool:
    """Tell whether the host's own sampler chooses the backbone of this trial.

    From trial 8 on every eighth, and every second while s ≤ 0. Of N trials at least (N − 15)/8
    are thus the host's, and (N − 9)/2 if the trials never supported the scores: what its sampler
    finds in T trials of its own is found in at most 8 T + 15, or 2 T + 9, whatever the scores.

    Parameters
    ----------
    number, seed : int ≥ 0
        Of the trial and of the study; the seed shifts the count.
    history, scores
        As of `choose`; without them s > 0 is taken for granted.
    share : float in [0, 1], optional
        Another share, fixed, from the first trial on.

    Examples
    --------
    >>> [n for n in range(30) if leaves_to_base(n, seed=0)]
    [8, 16, 24]
    """
    if share is not None:
        require("share", share, "in [0, 1]", 0 <= share <= 1)
        return math.floor((number + 1) * share) > math.floor(number * share)
    place = number + seed
    if number < FREE or place % DOUBT:
        return False
    if place % EVERY == 0 or not scores:
        return place % EVERY == 0
    return _fit(sorted(scores), scores, history, 1.0).slope <= 0


def find_barred(history: Iterable[Observation], number: int) -> frozenset[str]:
    """Return the backbones that trial `number` is not to try, whoever proposes them.

    One that never gave a value and failed f times comes back from trial 4ᶠ on: out of memory it
    would fail again, but a smaller batch may suit it.

    Examples
    --------
    >>> history = [Observation("vit", "failed"), Observation("vit", "failed")]
    >>> find_barred(history, 15), find_barred(history, 16)
    (frozenset({'vit'}), frozenset())
    """
    ended = [o for o in history if o.state != "running"]
    fails = Counter(o.backbone for o in ended if o.state == "failed")
    runs = {o.backbone for o in ended if o.state != "failed"}
    return frozenset(b for b, f in fails.items() if b not in runs and number < 4**f)


@dataclass(frozen=True)
class Advisor:
    """The arguments of `choose`, `leaves_to_base` and `calibrate`, checked once.

    Parameters
    ----------
    scores : Ranking or mapping of object to float
        By name, see `name_arm`.
    policy, prior_strength, exploration, costs, cost_exponent, seed, errors
        See `choose`; default errors: what a `Ranking` says of them.
    survivors : int or collection of str, optional
        Mask: only the best so many of the candidates, or the named ones.

    Raises
    ------
    ValueError
        If an argument is out of range.

    Examples
    --------
    >>> Advisor({"vit": 3.0, "resnet": 2.0}).choose([], 0, ["resnet", "vit"])
    'vit'
    """

    scores: Mapping[str, float]
    _: KW_ONLY
    policy: str = "calibrated"
    prior_strength: float = 1.0
    survivors: int | tuple[str, ...] | Collection[str] | None = None
    exploration: float = 0.05
    costs: Mapping[str, float] | None = None
    cost_exponent: float = 0.0
    seed: int = 0
    errors: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        given: Any = self.scores
        require("scores", given, "a Ranking or a mapping", isinstance(given, Mapping))
        for name, value in given.items():
            require(f"scores[{name!r}]", value, "a number", isinstance(value, Real))
        require("policy", self.policy, f"one of {', '.join(POLICIES)}", self.policy in POLICIES)
        strength, part = self.prior_strength, self.exploration
        mask: Any = self.survivors
        strong = isinstance(strength, Real) and 0 <= strength < math.inf
        require("prior_strength", strength, "a number ≥ 0", strong)
        require("exploration", part, "in [0, 1]", isinstance(part, Real) and 0 <= part <= 1)
        if isinstance(mask, str) or not hasattr(mask, "__len__"):  # else names; an array, too
            count = isinstance(mask, Integral) and not isinstance(mask, bool) and int(mask) >= 1
            require("survivors", mask, "an integer ≥ 1, names or None", mask is None or count)
        else:
            require("survivors", mask, "an integer ≥ 1, names or None", len(mask))
            mask = tuple(sorted(name_arm(name) for name in mask))
        costs, exponent = self.costs, self.cost_exponent
        paid = costs is None or (isinstance(costs, Mapping) and all(v > 0 for v in costs.values()))
        require("costs", costs, "a mapping of names to numbers > 0, or None", paid)
        sound = isinstance(exponent, Real) and 0 <= exponent < math.inf
        require("cost_exponent", exponent, "a number ≥ 0", sound)
        settled = {
            "errors": estimate_errors(given) if self.errors is None else self.errors,
            "scores": {name_arm(name): float(value) for name, value in given.items()},
            "survivors": mask if mask is None or isinstance(mask, tuple) else int(mask),
            "costs": None if costs is None else {name_arm(k): float(costs[k]) for k in costs},
            "prior_strength": float(strength),
            "exploration": float(part),
            "cost_exponent": float(exponent),
        }
        for name, value in settled.items():
            object.__setattr__(self, name, value)

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments that `choose` takes as they are; JSON values."""
        names = ("policy", "prior_strength", "exploration", "costs", "cost_exponent")
        return {name: getattr(self, name) for name in names}

    def choose(
        self,
        history: Iterable[Observation],
        number: int,
        candidates: Sequence[str],
        *,
        strict: bool = False,
    ) -> str:
        """Choose; `strict` refuses survivors that are no candidates."""
        return choose(
            self.scores,
            history,
            candidates=candidates,
            seed=self.seed,
            number=number,
            survivors=self.mask(candidates, strict=strict),
            errors=self.errors,
            **self.options,
        )

    def mask(self, candidates: Sequence[str], *, strict: bool = False) -> Collection[str] | None:
        """Return who of the candidates survives; None: all."""
        if isinstance(self.survivors, int):
            of = {n: s for n, s in self.scores.items() if n in candidates and math.isfinite(s)}
            return survivors(of, self.survivors) if of else None
        if self.survivors is not None and strict:
            missing = sorted(set(self.survivors) - set(candidates))
            if missing:
                raise ValueError(
                    f"`survivors` must be choices of the host's parameter but {missing} are not; "
                    f"they are {sorted(candidates)[:5]}{' …' if len(candidates) > 5 else ''}."
                )
        return self.survivors

    def leaves(self, history: Iterable[Observation], number: int) -> bool:
        """Tell whether a trial is the host's own; never against the user's word."""
        if self.policy != "calibrated" or self.survivors is not None:
            return False  # follow the scores, or stay inside
        return leaves_to_base(number, seed=self.seed, history=history, scores=self.scores)

    def weigh(self, number: int, n_objectives: int) -> list[float] | None:
        """Return random weights of the objectives, so that all of a front is looked for."""
        if n_objectives == 1:
            return None
        rng = np.random.default_rng([self.seed, _WEIGHTS, number])
        return rng.dirichlet(np.ones(n_objectives)).tolist()

    def calibrate(self, history: Iterable[Observation]) -> Calibration:
        """Compare the scores with the values of the trials."""
        return calibrate(self.scores, history, prior_strength=self.prior_strength)


def name_arm(choice: Any) -> str:
    """Return the name of a choice: 1, True and "x" become "1", "True" and "x"."""
    return str(choice) if isinstance(choice, str) else repr(choice)  # never an `np.str_`


def rate(values: Sequence[Sequence[float]], weights: Sequence[float] | None = None) -> list[float]:
    """Return one finite number per trial, higher is better.

    Parameters
    ----------
    values : sequence of sequences of float, (n_trials, n_objectives)
        Higher is better; not NaN.
    weights : sequence of float, (n_objectives,), optional
        The number is the weighted mean of the ranks, in (0, 1]. Default: it is the first
        objective, infinite ones cut to the range of the others.

    Examples
    --------
    >>> rate([[0.9, -30.0], [0.8, -10.0], [0.7, -20.0]], weights=[0.5, 0.5])
    [0.6666666666666666, 0.8333333333333334, 0.5]
    """
    if weights is None or not values:
        first = [value for value, *_ in values]
        finite = [value for value in first if math.isfinite(value)] or [0.0]
        low, high = min(finite), max(finite)
        return [min(max(value, low), high) for value in first]
    ranks = np.apply_along_axis(rankdata, 0, np.asarray(values, dtype=float))
    return (ranks @ np.asarray(weights) / len(values)).tolist()


def estimate_errors(scores: Mapping[Any, float]) -> dict[str, float] | None:
    """Return the standard error of each score, where a `Ranking` has what it takes."""
    errors = {}
    for score in scores.scores if isinstance(scores, Ranking) else ():
        if "standard_error" in score.details:
            errors[score.backbone] = float(score.details["standard_error"])
        elif score.per_sample is not None and len(score.per_sample) > 1 and score.error is None:
            spread = np.std(score.per_sample, ddof=1)
            errors[score.backbone] = float(spread / math.sqrt(len(score.per_sample)))
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


def _fit(
    candidates: Sequence[str],
    scores: Mapping[str, float],
    history: Iterable[Observation],
    prior_strength: float,
    errors: Mapping[str, float] | None = None,
) -> _Fit:
    """Fit the model of the module's docstring, in its notation."""
    require("prior_strength", prior_strength, "a number ≥ 0", 0 <= prior_strength < math.inf)
    # In one order always, so that even the rounding of sums does not depend on the caller's.
    trials = sorted(history, key=lambda o: (o.backbone, o.state, repr(o.value), repr(o.settings)))
    names = [*candidates, *sorted({o.backbone for o in trials} - set(candidates))]
    index, K = {name: k for k, name in enumerate(names)}, len(names)
    z, dz = _standardise(names, scores, errors or {})
    if prior_strength == 0:
        z, dz = np.zeros((2, K))
    tried, failed, seconds, paid = np.zeros((4, K))
    seen: list[Observation] = []
    for o in trials:
        k, has_value = index[o.backbone], o.value is not None and math.isfinite(o.value)
        tried[k] += 1
        failed[k] += o.state == "failed" or (o.state == "complete" and not has_value)
        if o.state in ("complete", "pruned") and has_value:
            seen.append(o)
        if o.cost is not None and o.state == "complete":
            seconds[k], paid[k] = seconds[k] + min(o.cost, LARGEST_NUMBER), paid[k] + 1
    arm = np.array([index[o.backbone] for o in seen], dtype=int)
    raw = np.array([o.value for o in seen], dtype=float)
    raw = raw.clip(-LARGEST_NUMBER, LARGEST_NUMBER)  # squares of a diverged loss overflow
    full = np.array([o.state == "complete" for o in seen], dtype=bool)
    y, weight, is_alone = _comparable(seen, raw, arm, full)
    valued, n = np.bincount(arm, None, K), np.bincount(arm, weight, K)
    tried = tried - np.bincount(arm[full], 1 - weight[full], K)

    # The scale, b_k and ν²
    scale = float(y.std(ddof=1)) if len(y) > 1 else 0.0
    scale = scale if scale > 0 else 1.0
    best, level = np.full((2, K), -np.inf)
    np.maximum.at(best, arm, raw)
    np.maximum.at(level, arm, y / scale)
    size = np.bincount(arm[full], None, K)
    centre = np.bincount(arm[full], y[full], K) / np.maximum(size, 1)
    squares = float(np.square(y - centre[arm])[full].sum()) / scale**2
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
    seen: Sequence[Observation], raw: np.ndarray, arm: np.ndarray, full: np.ndarray
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Return values as if with the best settings, their weights, and if settings never vary.

    Ridge regression on the settings; of each backbone's mean the part 1 − √(λ/(λ + n_k)) is
    subtracted first (λ the ridge), as for random effects. A value that is moved by x standard
    deviations counts 1/(1 + x²). Before, diverged values are moved up to three times the distance
    from the best to the median, lest they hide all other differences.
    """
    steps = [o.step if o.step is not None and 0 < o.step <= 1 else 0.5 for o in seen]
    weight = np.where(full, 1.0, np.array(steps, dtype=float))
    if not seen:
        return raw, weight, False
    y = np.where([o.feasible for o in seen], raw, raw.min())
    middle = np.median(y)
    if y.max() > middle:
        y = np.maximum(y, middle - 3 * (y.max() - middle))
    settings = [o.settings for o in seen if o.settings is not None]
    if len(settings) < len(seen):
        return y, weight, False
    X = _encode(settings)
    if not (X.size and np.ptp(X, axis=0).any()):
        return y, weight, len(y) > 1 or not settings[0]
    spread = y[full].std() if full.sum() > 3 else 0.0
    if spread > 0:
        k, n = arm[full], np.bincount(arm[full])
        A = np.column_stack([X[full], y[full] / spread])
        A = A - A.mean(axis=0)
        part = (1 - np.sqrt(RIDGE / (RIDGE + n))) / np.maximum(n, 1)
        A_ = A - np.column_stack([(part * np.bincount(k, column))[k] for column in A.T])
        X_, y_ = A_[:, :-1], A_[:, -1]
        effect = A[:, :-1] @ np.linalg.solve(X_.T @ X_ + RIDGE * np.eye(X_.shape[1]), X_.T @ y_)
        y[full] += spread * (effect.max() - effect)
        weight[full] = 1 / (1 + (effect.max() - effect) ** 2)
    return y, weight, False


def _encode(settings: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Return rank and rank² for numbers of more than 4 values, else a column per value."""
    columns = []
    for name in sorted({name for chosen in settings for name in chosen}):
        values = [chosen.get(name) for chosen in settings]
        kinds = sorted({repr(v) for v in values if v is not None})
        if len(kinds) > 4 and all(v is None or isinstance(v, (int, float)) for v in values):
            x = np.array([math.nan if v is None else float(v) for v in values])
            t = 2 * rankdata(x, nan_policy="omit") / len(x) - 1  # so logarithms need no care
            columns += [np.nan_to_num(t), np.nan_to_num(t**2)]
        else:
            columns += [np.array([repr(v) == kind for v in values], float) for kind in kinds[:20]]
    return np.column_stack(columns) if columns else np.zeros((len(settings), 0))


def _log_improvement(fit: _Fit) -> np.ndarray:
    """Return log E[(u − y*)₊] = log σ + log(φ(d) + d Φ(d)), d = (μ − y*)/σ, for any d."""
    d = (fit.mean - fit.top) / fit.sd
    near = np.maximum(d, -8.0)
    exact = np.log(np.exp(-(near**2) / 2) / math.sqrt(2 * math.pi) + near * ndtr(near))
    tail = -(d**2) / 2 - math.log(math.sqrt(2 * math.pi)) - 2 * np.log(np.maximum(-d, 1))
    return np.log(fit.sd) + np.where(d > -8, exact, tail)
