"""Which backbone next: pure decisions that the adapters of all hosts share.

`choose` names the backbone of the next trial, `delegate_to_base_sampler` says which trials are the
host's own, `find_backed_off` what none may try for now, `calibrate` tells what the scores have
proved to be worth, `survivors` cuts a ranking. A `BackbonePolicy` holds the arguments, checked
once.

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

**Hedge.** `BackbonePolicy` makes every third choice as if there were no scores, from the trials
alone. While these agree it costs little; where the scores mislead, it finds what they hide.

**Guarantee.** From trial 8 on every eighth trial is left to the host's own sampler, and every
second one while the trials do not support the scores (s ≤ 0): see `delegate_to_base_sampler`.

There is no state and no clock: random numbers come from ``default_rng([seed, number])``.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

from sfda_tune.selection.calibration import (
    Calibration,
    History,
    Observation,
    backbone_name,
    calibrate,
    estimate_errors,
    estimate_levels,
    fit_model,
    log_improvement,
    scores_by_name,
)
from sfda_tune.values.text import integer, is_integer, is_number, require, some

__all__ = [
    "BackbonePolicy", "choose", "delegate_to_base_sampler", "find_backed_off", "find_kept",
    "make_seed", "scalarize", "survivors",
]  # fmt: skip

POLICIES = ("calibrated", "prior", "greedy")
_WEIGHTS = 3  # a random stream beside those of the hosts
FREE, EVERY, DOUBT = 8, 8, 2  # `delegate_to_base_sampler`
BLIND = 3  # `BackbonePolicy.choose`
KEEP = 5  # `find_kept`


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
    >>> choose(scores), choose(scores, [Observation("vit", "failed")] * 2)
    ('vit', 'resnet')
    """
    _check_options(policy, prior_strength, exploration, cost_exponent)
    names = sorted(set(scores if candidates is None else candidates))
    require("candidates", names, "the host's choices, at least one", names)
    history = History.of(history)
    backed_off = find_backed_off(history, number)
    fit = fit_model(names, scores, history, prior_strength, errors)
    rng = np.random.default_rng([seed, number])
    is_outside, noise = rng.random() < exploration, rng.gumbel(size=len(names))

    if policy == "greedy":
        gain = np.log(fit.mean - fit.mean.min() + 1e-9)
    else:
        gain = log_improvement(fit) if policy == "calibrated" else 4 * fit.z + noise
        gain = gain - np.log((fit.tried + 1) * (fit.tried + 2) / 2)
    gain = gain + np.log(fit.success) - 1e6 * np.isin(names, list(backed_off))
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


def _check_options(policy: Any, prior_strength: Any, exploration: Any, cost_exponent: Any) -> None:
    require("policy", policy, f"one of {', '.join(POLICIES)}", policy in POLICIES)
    for name, value in {"prior_strength": prior_strength, "cost_exponent": cost_exponent}.items():
        require(name, value, "a number ≥ 0", is_number(value) and 0 <= value < math.inf)
    is_share = is_number(exploration) and 0 <= exploration <= 1
    require("exploration", exploration, "in [0, 1]", is_share)


def survivors(scores: Mapping[str, float], keep: int | None = None) -> tuple[str, ...]:
    """Return the best `keep` (default: all) of those with a finite score; equal ones by name.

    Raises
    ------
    ValueError
        If `keep` is no integer ≥ 1.

    Examples
    --------
    >>> survivors({"a": 0.1, "b": 0.9, "c": 0.5}, 2)
    ('b', 'c')
    """
    order = sorted((n for n in scores if math.isfinite(scores[n])), key=lambda n: (-scores[n], n))
    return tuple(order[: None if keep is None else integer("keep", keep, 1)])


def find_kept(
    scores: Mapping[Any, float] | Collection[Any], keep: int | None = None
) -> frozenset[str]:
    """Return who is kept: the best `keep` of the scores, or the names that are given.

    Parameters
    ----------
    scores : Ranking, mapping of str to float, or collection of str
    keep : int, optional
        Of scores; default: 5. Not allowed with names.

    Raises
    ------
    ValueError

    Examples
    --------
    >>> sorted(find_kept({"vit": 3.0, "resnet": 2.0, "alexnet": 1.0}, 2))
    ['resnet', 'vit']
    """
    is_many = isinstance(scores, Collection) and not isinstance(scores, str) and len(scores) > 0
    require("scores", scores, "scores or a non-empty collection of names", is_many)
    if isinstance(scores, Mapping):
        best = survivors(scores_by_name(scores, "scores"), KEEP if keep is None else keep)
        require("scores", scores, "a mapping with a finite score", best)
        return frozenset(best)
    require("keep", keep, "None when names are given instead of scores", keep is None)
    return frozenset(backbone_name(name) for name in scores)


def delegate_to_base_sampler(
    number: int,
    *,
    seed: int,
    history: Iterable[Observation] = (),
    scores: Mapping[str, float] | None = None,
) -> bool:
    """Tell whether the host's own sampler chooses the backbone of this trial.

    From trial 8 on every eighth, and every second while s ≤ 0. Of N trials at least (N − 15)/8
    are thus the host's, and (N − 9)/2 if the trials never supported the scores: what its sampler
    finds in T trials of its own is found in at most 8 T + 15, or 2 T + 9, whatever the scores.

    `number` is that of the trial; the `seed` of the study shifts the count. Without `scores`,
    s > 0 is taken for granted.

    >>> [n for n in range(30) if delegate_to_base_sampler(n, seed=0)]
    [8, 16, 24]
    """
    place = number + seed
    if number < FREE or place % DOUBT:
        return False
    if place % EVERY == 0 or not scores:
        return place % EVERY == 0
    return fit_model(sorted(scores), scores, history, 1.0).slope <= 0


def find_backed_off(history: Iterable[Observation], number: int) -> frozenset[str]:
    """Return the backbones that trial `number` is not to try, whoever proposes them.

    One that never gave a value and failed f ≥ 2 times, or was stopped for itself alone, comes back
    from trial 4ᶠ on: out of memory it would fail again, but a smaller batch may suit it. A single
    failure may be Ctrl-C, an error of the objective or a value that is not finite.

    Examples
    --------
    >>> history = [Observation("vit", "failed"), Observation("vit", "failed")]
    >>> find_backed_off(history, 15), find_backed_off(history, 16)
    (frozenset({'vit'}), frozenset())
    """
    ended = [o for o in history if o.state != "running"]
    stopped = Counter(o.backbone for o in ended if o.state == "stopped")
    fails = stopped + Counter(o.backbone for o in ended if o.state == "failed")
    runs = {o.backbone for o in ended if o.state not in ("failed", "stopped")}
    return frozenset(
        b for b, f in fails.items() if b not in runs and (stopped[b] or f > 1) and number < 4**f
    )


@dataclass(frozen=True)
class BackbonePolicy:
    """The arguments of `choose`, `delegate_to_base_sampler` and `calibrate`, checked once.

    Parameters
    ----------
    scores : Ranking or mapping of object to float
        By name, see `backbone_name`.
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
    >>> BackbonePolicy({"vit": 3.0, "resnet": 2.0}).choose([], 0, ["resnet", "vit"])
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
        scores = scores_by_name(given, "scores")
        _check_options(self.policy, self.prior_strength, self.exploration, self.cost_exponent)
        mask: Any = self.survivors
        if isinstance(mask, str) or not hasattr(mask, "__len__"):  # else names; an array, too
            count = mask is None or is_integer(mask, 1)
            require("survivors", mask, "an integer ≥ 1, names or None", count)
        else:
            require("survivors", mask, "an integer ≥ 1, names or None", len(mask))
            mask = tuple(sorted(backbone_name(name) for name in mask))
        costs = self.costs
        paid = costs is None or (isinstance(costs, Mapping) and all(v > 0 for v in costs.values()))
        require("costs", costs, "a mapping of names to numbers > 0, or None", paid)
        settled = {
            "errors": estimate_errors(given) if self.errors is None else self.errors,
            "scores": scores,
            "survivors": mask if mask is None or isinstance(mask, tuple) else int(mask),
            "costs": None if costs is None else {backbone_name(k): float(costs[k]) for k in costs},
            "prior_strength": float(self.prior_strength),
            "exploration": float(self.exploration),
            "cost_exponent": float(self.cost_exponent),
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
        of: Sequence[str] | None = None,
    ) -> str:
        """Choose; survivors are the best, or the named ones, `of` these (default: candidates).

        If none of them is a candidate any more, one of them is chosen again. Under "calibrated"
        every third trial, from the third on, goes by the trials alone.
        """
        options, mask = self.options, self.mask(candidates if of is None else of)
        if of is not None and mask is not None and not {*mask} & {*candidates}:
            candidates = sorted({*mask} & {*of}) or candidates
            mask = None
        if self.policy == "calibrated" and number % BLIND == BLIND - 1:
            options["prior_strength"] = 0.0
        return choose(
            self.scores,
            history,
            candidates=candidates,
            seed=self.seed,
            number=number,
            survivors=mask,
            errors=self.errors,
            **options,
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
                    f"they are {some(sorted(candidates))}."
                )
        return self.survivors

    def compare_names(
        self, param_name: str, params: Collection[str], choices: Collection[Any] | None
    ) -> str | None:
        """Say how the names of a trial differ from ours so that the scores are of no use.

        `params` are the names of its parameters, `choices` what `param_name` offers, if it does.
        Names with a score that are no choices are a shortlist's, unless choices lack a score.
        """
        if param_name not in params:
            return (
                f"`param_name` must be a parameter of the trials, but is {param_name!r} and they "
                f"have {some(sorted(map(str, params)))}: the scores are not used."
            )
        scored = {name for name, score in self.scores.items() if math.isfinite(score)}
        offered = set(map(backbone_name, choices or ()))
        unused, unknown = sorted(scored - offered), sorted(offered - scored)
        if not scored or not unused or (not unknown and offered):
            return None
        return (
            f"`scores` must be for the choices of {param_name!r}, but {some(unused)} are no "
            f"choices, and {some(unknown) or 'none'} have no score and count as average."
        )

    def delegates(self, history: Iterable[Observation], number: int) -> bool:
        """Tell whether a trial is the host's own; never against the user's word."""
        if self.policy != "calibrated" or self.survivors is not None:
            return False  # follow the scores, or stay inside
        return delegate_to_base_sampler(
            number, seed=self.seed, history=history, scores=self.scores
        )

    def sample_weights(self, number: int, n_objectives: int) -> list[float] | None:
        """Return random weights of the objectives, so that all of a front is looked for."""
        if n_objectives == 1:
            return None
        rng = np.random.default_rng([self.seed, _WEIGHTS, number])
        return rng.dirichlet(np.ones(n_objectives)).tolist()

    def estimate_levels(
        self, history: Iterable[Observation], *, follows_scores: bool = True
    ) -> dict[str, float]:
        """Return what each backbone is expected to reach, by the scores and trials, or these."""
        return estimate_levels(
            self.scores,
            history,
            prior_strength=self.prior_strength if follows_scores else 0.0,
            errors=self.errors,
        )

    def calibrate(self, history: Iterable[Observation]) -> Calibration:
        """Compare the scores with the values of the trials."""
        return calibrate(
            self.scores, history, prior_strength=self.prior_strength, errors=self.errors
        )


def make_seed(seed: int | None) -> int:
    """Check a seed; None: a random one."""
    return secrets.randbits(63) if seed is None else integer("seed", seed, 0)


def scalarize(
    values: Sequence[Sequence[float]], weights: Sequence[float] | None = None
) -> list[float]:
    """Return one finite number per trial, higher is better, from values (n_trials, n_objectives).

    With `weights` (n_objectives,) it is the weighted mean of the ranks, in (0, 1]; else the first
    objective, infinite ones cut to the range of the others.

    >>> scalarize([[0.9, -30.0], [0.8, -10.0], [0.7, -20.0]], weights=[0.5, 0.5])
    [0.6666666666666666, 0.8333333333333334, 0.5]
    """
    if weights is None or not values:
        first = [value for value, *_ in values]
        finite = [value for value in first if math.isfinite(value)] or [0.0]
        low, high = min(finite), max(finite)
        return [min(max(value, low), high) for value in first]
    ranks = np.apply_along_axis(rankdata, 0, np.asarray(values, dtype=float))
    return (ranks @ np.asarray(weights) / len(values)).tolist()
