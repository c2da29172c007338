"""Successive halving: few images for all backbones, more only for those that may be the best.

==========  ==========================================================================  ==========
Symbol      Meaning                                                                     Shape
==========  ==========================================================================  ==========
N, m        all images; images seen so far, m = N/16, N/8, N/4, N/2, N
n, k        backbones that are left; size of the top that is wanted
s_i(m)      score of backbone i on the first m images                                   (n,)
θ_ri        draw r of what its score would be on ever more images                       (R, n)
e_ri        deviation of bootstrap resample r of its m images from s_i(m)               (R, n)
g_i         s_i(m) − s_i(m/2), what the last doubling has brought                       (n,)
τ           standard deviation of g_i over the backbones
z_ri        standard normal                                                             (R, n)
==========  ==========================================================================  ==========

The images are put into one stratified order, so that every rung holds the one before. After each
rung but the first the final score of a backbone is simulated: m of its N images are known, the
others are still to come. θ is from `sfda_tune.selection.uncertainty.shrink`, e from other
resamples::

    f_ri = m/N s_i(m) + (1 − m/N) (θ_ri + √(m/(N−m)) e_ri) + τ √(log₂(N/m)) z_ri

In the order of P_i = (1/R) #{r: f_ri among the k best of f_r} as many leave as are possible while
in a share of less than (1 − p)/4 of the simulations *any* of those that leave at this rung is
among the k best: a quarter, since there are several rungs. The images alone are not enough: with
further images the metric is fitted anew, and wide or well-trained backbones gain more by it than
others. How unequal the gains of the last doubling were is measured, and every doubling ahead adds
its square. Extrapolating each backbone's own gain instead errs far more often: the gains are
mostly noise.

*Measured*: eight demo backbones on 1,797 images (``python tests/benchmarks/racing.py``), k = 1,
3, 5, p = .95, 10 seeds each: the top k was that of the full run in all 30 races, with .35, .66
and .78 of the forward passes. 600 simulated races of 10 and 100 backbones, k = 1, 3, 5, true
scores with a sd of 0 to 10 standard errors of a difference: in all of them, with .81 … 1.00 of the
forward passes where all are equal and .16 … .57 where they are furthest apart. Where each with
P_i < (1 − p)/4 left by itself, the top of 100 close backbones was lost in .05 … .40 of the races.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from sfda_tune.selection.uncertainty import bootstrap
from sfda_tune.values.text import integer

if TYPE_CHECKING:
    from sfda_tune.data.dataset import ImageDataset

__all__ = ["RaceConfig", "RaceResult", "make_rungs", "run", "simulate"]

FIRST = 16  # the first rung is 1/16 of the images,
PER_CLASS = 3  # or so many images for each class


Judge: TypeAlias = Callable[[list[str], np.ndarray], np.ndarray]


@dataclass(frozen=True)
class RaceConfig:
    """The parameters of successive halving; a ValueError names one that is out of range."""

    top: int = 5  # of the best backbones are to be found; the others are ranked roughly
    probability: float = 0.95  # with which these are those of the full run
    seed: int = 0  # of the order of the images and of the resamples

    def __post_init__(self) -> None:
        object.__setattr__(self, "top", integer("top", self.top, 1))
        if not 0 < self.probability < 1:
            raise ValueError(f"`probability` must lie in (0, 1) but is {self.probability!r}.")

    @property
    def threshold(self) -> float:
        """Those may leave a rung together of whom any is in the top with a smaller chance."""
        return (1 - self.probability) / 4  # of several rungs


@dataclass(frozen=True)
class RaceResult:
    """Who was left at each rung, and what it took."""

    rungs: tuple[dict[str, Any], ...]  # images, backbones that saw them, dropped after them
    # Who left: images seen, p_top, value on these images, and gain, the median of what the
    # backbones that finished have won since
    dropped: dict[str, dict[str, Any]]
    n_forward: int  # images × backbones of this run,
    n_full: int  # and of the full one
    interrupted: bool = False  # while it was simulated who may leave


def make_rungs(images: ImageDataset, seed: int = 0) -> list[np.ndarray]:
    """Return the rows of each rung, sorted; each holds the one before, the last holds all."""
    N, C = len(images), len(images.classes) or len(np.unique(images.strata))
    m = max(-(-N // FIRST), PER_CLASS * C)
    rungs = []
    while m < N:
        rungs.append(images.sample_rows(m, seed=seed))
        m *= 2
    return [*rungs, np.arange(N)]


def run(
    names: Sequence[str],
    rungs: Sequence[np.ndarray],
    labels: np.ndarray,
    measure: Callable[[list[str], np.ndarray], tuple[np.ndarray, Mapping[str, np.ndarray | None]]],
    config: RaceConfig,
    judge: Judge | None = None,
    groups: np.ndarray | None = None,
    skip: Callable[[list[str], np.ndarray], bool] | None = None,
) -> RaceResult:
    """Score `names` on the rungs of `make_rungs`, fewer of them on each.

    ``measure(names, rows)`` scores backbones on rows; it returns the rows that could be read and,
    for each backbone that could be scored, their contributions; None where there was no time for
    it: such a one leaves, and the race ends where nobody had any. ``judge(names, scores)`` makes
    of scores (R, n) what the top is a top of; by default they are it. ``skip(names, rows)`` says
    whether a rung but the last is left out; by default where nobody can leave any more.

    >>> rng = np.random.default_rng(0)
    >>> terms = dict(zip("abcd", rng.normal(size=(4, 800)) + [[1.0], [0.9], [0.1], [0.0]]))
    >>> rungs = [np.arange(m) for m in (50, 100, 200, 400, 800)]
    >>> result = run(
    ...     "abcd", rungs, np.arange(800) % 4,
    ...     lambda names, rows: (rows, {name: terms[name][rows] for name in names}),
    ...     RaceConfig(top=2),
    ... )
    >>> sorted(result.dropped), result.n_forward / result.n_full
    (['c', 'd'], 0.5625)
    """
    N, active, n_forward, interrupted = len(labels), list(names), 0, False
    skip = skip or (lambda names, rows: len(names) <= config.top)
    seen = dict.fromkeys(active, 0)
    values: list[dict[str, float]] = []
    log: list[dict[str, Any]] = []
    dropped: dict[str, dict[str, Any]] = {}
    for rows in rungs:
        if interrupted or (len(rows) < N and skip(active, rows)):
            continue
        terms: dict[str, np.ndarray] = {}
        readable, late = rows, []
        while active and not late:
            readable, new = measure(active, rows)
            late = [name for name, term in new.items() if term is None]
            for name in set(active) - set(late):
                n_forward += len(rows) - seen[name]
                seen[name] = len(rows)
                dropped.pop(name, None)
            terms |= {name: term for name, term in new.items() if term is not None}
            # Where somebody failed, the best of those that left take the places.
            free = config.top - len(terms)
            active = sorted(dropped, key=lambda name: -dropped[name]["p_top"])[: max(free, 0)]
        if late and not terms:  # what was before is the end
            active = [name for name in values[-1] if name not in dropped] if values else []
            break
        for name in late:
            if seen[name] and name not in dropped:
                stay = {"images": seen[name], "p_top": 0.0, "value": values[-1][name]}
                dropped[name] = {**stay, "rung": len(log) - 1, "late": True}
        values.append({name: float(np.mean(term)) for name, term in terms.items()})
        out: dict[str, float] = {}
        if len(values) > 1 and len(rows) < N and len(terms) > config.top:
            gains = {name: v - values[-2].get(name, v) for name, v in values[-1].items()}
            gone = {name: left["value"] for name, left in dropped.items()}
            of = None if groups is None else groups[readable]
            try:
                known, in_top = simulate(
                    terms, gains, labels[readable], N, config, judge, gone, of
                )
                out = _losers(known, in_top, config.threshold)
            except KeyboardInterrupt:  # nobody leaves, and nobody goes on
                interrupted = True
        for name, p in out.items():
            stay = {"images": len(rows), "p_top": p, "value": values[-1][name]}
            dropped[name] = {**stay, "rung": len(log)}
        log.append({"images": len(rows), "backbones": len(terms), "dropped": sorted(out)})
        active = [name for name in terms if name not in out]
    for left in dropped.values():
        then = values[left.pop("rung")]
        gains = [values[-1][name] - then[name] for name in active if name in then]
        left["gain"] = float(np.median(gains or [0.0]))
    return RaceResult(tuple(log), dropped, n_forward, len(names) * N, interrupted)


def simulate(
    per_sample: Mapping[str, np.ndarray],
    gains: Mapping[str, float],
    labels: np.ndarray,
    N: int,
    config: RaceConfig,
    judge: Judge | None = None,
    gone: Mapping[str, float] | None = None,
    groups: np.ndarray | None = None,
) -> tuple[list[str], np.ndarray]:
    """Return names, and who is among the final k best in each simulation, (R, n).

    From the contributions of the images so far, (m,) for each backbone, and from the `gains` that
    the last doubling of the images has brought; see the module for the formula, `run` for `judge`.
    `gone` are the last scores of those that left; `groups`, if any, what the images belong to.
    """
    terms = {name: per_sample[name] for name in gains}
    c = bootstrap(terms, labels, seed=config.seed, groups=groups)
    m, names = len(labels), list(map(str, c.names))
    rng = np.random.default_rng([config.seed, m])
    error = rng.permutation(c.resamples - c.score)
    tau = float(np.std([gains[name] for name in names], ddof=1))
    final = m / N * c.score + (1 - m / N) * (c.draws + math.sqrt(m / (N - m)) * error)
    final += tau * math.sqrt(math.log2(N / m)) * rng.standard_normal(error.shape)
    if judge is not None:
        left = np.tile(np.array(list((gone or {}).values()), np.float64), (len(final), 1))
        final = judge([*names, *(gone or {})], np.hstack([final, left]))[:, : len(names)]
    kth_best = np.partition(final, -config.top, axis=1)[:, -config.top, None]
    return names, final >= kth_best


def _losers(names: list[str], in_top: np.ndarray, threshold: float) -> dict[str, float]:
    """Return who may leave together, each with P(in the top)."""
    P, out = in_top.mean(axis=0), {}
    wronged = np.zeros(len(in_top), dtype=bool)  # simulations in which one of them is in the top
    for i in np.argsort(P, kind="stable"):
        wronged |= in_top[:, i]
        k = wronged.sum()
        if (k + math.sqrt(k)) / len(wronged) >= threshold:  # a share, and its standard error
            break
        out[names[i]] = float(P[i])
    return out
