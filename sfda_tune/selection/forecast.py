"""What fine-tuning will reach: what is known of the networks, and what the images say of them.

A score of frozen features says how good they are as they are. Which backbone is best after all of
its weights were trained depends as much on the network itself; on published tables ImageNet
accuracy and size tell more of it than a linear head does, and both together more than either.

==========  ==========================================================================  ==========
Symbol      Meaning                                                                     Shape
==========  ==========================================================================  ==========
n, R        backbones, draws
E, G, A     −log(1 − ImageNet top-1), log GMACs, log activations of the backbones       (n,)
z           normal scores of the backbones' scores: Φ⁻¹((rank − ½)/n)                   (n,)
u           what fine-tuning reaches, as normal scores among these backbones            (n,)
==========  ==========================================================================  ==========

The model, whose few coefficients `tests/benchmarks/forecast.py` fits to public fine-tunings
(``forecast.json``; those of ``train="head"``, where the network stays as it is, to frozen ones)::

    u_k = w_E E'_k + w_G G'_k + w_A A'_k + γ z_k + σ ε_k,         ε_k ~ N(0, 1)
    x'_k = (x_k − x̄)/√(v + s²)       v: variance among the backbones; s: what makes no difference
    x'_k ~ N(ρ t z_k, (1 − ρ²) t²)   where x_k is not known; t² = v/(v + s²)

so that a tenth of a percent of ImageNet accuracy counts for little, and a network that no table
knows is judged by its images. Draws of z (of what the scores would be on ever more images) and of
ε make draws of u, of which all odds are counted: they speak of the error of the score and of that
of the model. For the mean of u, z is shrunk to r z, with r the slope of its mean draw in z: few
images say less.

`rank` orders by it: `order_by_forecast` makes of a `Ranking` by a score one by the mean of u, and
`find_evidence` gives the first one back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import log_ndtr, ndtri
from scipy.stats import rankdata

from sfda_tune.metrics.priors import Facts, look_up_facts
from sfda_tune.selection.calibration import scores_by_name
from sfda_tune.selection.uncertainty import (
    Confidence,
    count_places,
    draw_true_scores,
    find_groups,
    shortlist,
)
from sfda_tune.values.features import Score, read_only
from sfda_tune.values.files import read_text
from sfda_tune.values.ranking import Ranking
from sfda_tune.values.text import as_tuple, integer, is_number, require

__all__ = [
    "MODES", "Forecast", "find_evidence", "find_facts", "find_promise", "forecast", "is_forecast",
    "is_known", "normal_scores", "order_by_forecast", "scale_facts", "simulate_forecast",
    "table_facts",
]  # fmt: skip

MODES = ("full", "head")  # what will be trained: all weights, or a head on what stays as it is
N_DRAWS = 4000
_ODDS = ("interval_low", "interval_high", "rank_low", "rank_high", "p_best", "group")
COLUMNS = {"error": "ImageNet", "gmacs": "GMACs", "macts": "activations"}


@dataclass(frozen=True, eq=False)
class Forecast:
    """What training will reach, relative to the other candidates.

    Parameters
    ----------
    names : tuple of str
        Best first.
    mean, sd : array of float64, shape (n,)
        Of u: 0 is the middle of the candidates, 1 a standard deviation above it.
    error : array of float64, shape (n,)
        The part of `sd` that is owed to the choice of the images and to facts that are not known.
    parts : dict of str to array (n,)
        What ImageNet accuracy, GMACs, activations and the images contribute to `mean`.
    draws : array of float64, shape (n_draws, n)
    level : float
        Of `rank_interval`.
    """

    names: tuple[str, ...]
    mean: np.ndarray
    sd: np.ndarray
    error: np.ndarray
    parts: dict[str, np.ndarray]
    draws: np.ndarray
    level: float

    def __post_init__(self) -> None:
        for name in ("mean", "sd", "error", "draws"):
            object.__setattr__(self, name, read_only(np.asarray(getattr(self, name))))

    @property
    def best(self) -> dict[str, float]:
        """P(best after fine-tuning) of each backbone; sums to 1."""
        return dict(zip(self.names, self.confidence().in_top[:, 0].tolist(), strict=True))

    @property
    def rank_interval(self) -> np.ndarray:
        """First and last rank, of shape (n, 2); 1 is the best."""
        return self.confidence().rank_interval

    def shortlist(self, probability: float = 0.95) -> list[str]:
        """Return the few backbones of which one is the best with this probability.

        The first, and the most probable ones until their P(best) adds up to it.

        >>> f = forecast({"a": 0.1, "b": 0.5, "c": 0.9, "d": 0.91})
        >>> f.shortlist(0.1), len(f.shortlist(1.0))
        (['d'], 4)
        """
        return [*map(str, shortlist(self.confidence(), probability))]

    def confidence(self) -> Confidence:
        """Return the odds in the form of those of a score; `plausible` gives `shortlist`.

        Two are told apart where their means differ by more than Φ⁻¹((1 + level)/2) standard
        deviations of the difference.
        """
        return self._confidence

    @cached_property
    def _confidence(self) -> Confidence:
        n, cov = len(self.names), np.atleast_2d(np.cov(self.draws, rowvar=False))
        var = np.diag(cov)[:, None] + np.diag(cov) - 2 * cov
        apart = np.abs(self.mean[:, None] - self.mean)
        separable = apart > ndtri((1 + self.level) / 2) * np.sqrt(var.clip(0.0))
        in_top, ends = count_places(self.draws), [(1 - self.level) / 2, (1 + self.level) / 2]
        ranks = rankdata(-self.draws, axis=1, method="min")
        order = np.argsort(-in_top[:, 0], kind="stable")
        before = np.empty(n)
        before[order] = np.cumsum(in_top[order, 0]) - in_top[order, 0]
        return Confidence(
            self.names,
            self.mean,
            np.quantile(self.draws, ends, axis=0).T,
            np.quantile(ranks, ends, axis=0, method="nearest").astype(np.int64).T,
            in_top,
            np.clip(1 - before, 0.0, 1.0),
            separable,
            tuple(self.names[a:b] for a, b in find_groups(separable)),
            self.draws,
            self.draws,
            self.level,
            len(self.draws),
        )

    @cached_property
    def _row(self) -> dict[str, int]:
        return {name: k for k, name in enumerate(self.names)}

    def explain(self, name: str) -> str:
        """Say what makes the forecast of a backbone.

        >>> forecast({"a": 0.1, "b": 0.5}).explain("b")
        'images +0.34'
        """
        k = self._row[name]
        return ", ".join(f"{what} {part[k]:+z.2f}" for what, part in self.parts.items())

    def records(self) -> list[dict[str, Any]]:
        """Return one flat record per backbone, best first."""
        return [
            {
                "backbone": r["backbone"],
                "mean": r["score"],
                "sd": float(sd),
                **{key: r[key] for key in _ODDS},
                "why": self.explain(r["backbone"]),
            }
            for r, sd in zip(self.confidence().records(), self.sd, strict=True)
        ]

    def __repr__(self) -> str:
        width = max(map(len, self.names))
        lines = [f"{'backbone':<{width}}  forecast  {self.level:.0%} ranks  P(best)  why"]
        for r in self.records():
            ranks = f"{r['rank_low']}–{r['rank_high']}"
            lines.append(
                f"{r['backbone']:<{width}}  {r['mean']:+8.2f}  {ranks:>9}  {r['p_best']:7.2f}  "
                f"{r['why']}"
            )
        return "\n".join(lines)


def forecast(
    scores: Mapping[str, float],
    *,
    train: str = "full",
    unseen: Collection[str] = (),
    facts: Mapping[str, Facts] | None = None,
    resamples: np.ndarray | None = None,
    n_draws: int = N_DRAWS,
    seed: int = 0,
    level: float = 0.9,
    coefficients: Mapping[str, Any] | None = None,
) -> Forecast:
    """Forecast which backbones are best once they were trained on these images.

    **When it is wrong.** The order of the images counts for a third; where a data set is far from
    photos and the networks are of one age and size, trust the images, or trials, more. It was
    fitted to networks that were pretrained on photos, with hundreds of target images and more.

    Parameters
    ----------
    scores : Ranking or mapping of str to float
        Of the frozen features, higher is better; backbones that failed are left out. The resampled
        images of a `Ranking` make the error of the scores; of one by a forecast, the scores behind
        it are taken.
    train : {"full", "head"}, default "full"
        What will be trained: all weights, or a head on frozen features.
    unseen : collection of str
        Candidates to which no image was shown: what is known of them is all that speaks for them,
        whatever their scores. Those that a `Ranking` has not looked at are among them.
    facts : mapping of str to Facts, optional
        What is known of the networks; by default as `find_facts` finds it.
    resamples : array of shape (R, n), optional
        Draws of the scores, in the order of `scores`.
    n_draws, seed
        The result depends on them, not on the order of the backbones.
    level : float in (0, 1), default 0.9
    coefficients : mapping, optional
        In the form of ``forecast.json``, from fine-tunings of your own; by default that file.

    Raises
    ------
    ValueError
        If `scores` are no mapping to numbers, none is finite, or they are forecasts without the
        scores behind them; if `coefficients` lack one, or another option is out of range.

    Examples
    --------
    >>> scores = {"resnet18.a1_in1k": 0.71, "resnet50.a1_in1k": 0.7, "resnet101.a1_in1k": 0.69}
    >>> forecast(scores).names[-1]
    'resnet18.a1_in1k'
    """
    n_draws, seed = integer("n_draws", n_draws, 2), integer("seed", seed, 0)
    require("level", level, "in (0, 1)", is_number(level) and 0 < level < 1)
    require("train", train, f"one of {', '.join(MODES)}", train in MODES)
    columns, unseen = [*scores] if isinstance(scores, Mapping) else [], as_tuple("unseen", unseen)
    if isinstance(scores, Ranking):
        scores = find_evidence(scores)
        if scores.metric in [f"forecast ({mode})" for mode in MODES]:
            raise ValueError(
                f"`scores` must be scores of images but are a {scores.metric}, without the scores "
                "behind it; pass the ranking that `rank` gave."
            )
        unseen = {*unseen, *scores.info.get("not_looked_at", ())}
    by_name = scores_by_name(scores, "scores")
    scores = scores if isinstance(scores, Ranking) else by_name
    names = sorted(n for n, value in scores.items() if math.isfinite(value) and n not in unseen)
    if not names:
        raise ValueError(
            "`scores` must have a backbone with a finite score but has none of "
            f"{len(scores)}; see ranking.failed."
        )
    of = read_coefficients() if coefficients is None else coefficients
    _check_coefficients(of, train)
    z = normal_scores(np.array([scores[name] for name in names]))
    z, Z, rng = _draw_scores(scores, names, columns, z, resamples, n_draws, seed)
    if unseen:
        names += (new := sorted(set(unseen) - set(names)))
        Z = np.broadcast_to(Z, (n_draws, Z.shape[-1]))
        Z = Z if Z.shape[-1] > 1 else Z[:, :0]  # a score alone says nothing
        Z = np.hstack([Z, rng.standard_normal((n_draws, len(names) - Z.shape[-1]))])
        z = np.append(z, np.zeros(len(new)))
    known = find_facts(scores, names) if facts is None else facts
    x = table_facts([known.get(name, Facts()) for name in names])
    mean, slope, spread, parts = _expect(x, z, of, train)
    shift = slope * (Z - z) + np.zeros((n_draws, 1))
    residual = of[train]["residual"]
    draws = mean + shift + np.hypot(spread, residual) * rng.standard_normal(shift.shape)
    order = sorted(range(len(names)), key=lambda k: (-mean[k], names[k]))
    return Forecast(
        tuple(names[k] for k in order),
        mean[order],
        draws.std(axis=0)[order],
        np.hypot(shift.std(axis=0), spread)[order],
        {what: part[order] for what, part in parts.items() if part.any()},
        draws[:, order],
        float(level),
    )


def _check_coefficients(of: Mapping[str, Any], train: str) -> None:
    parts = {part: set(COLUMNS) for part in ("scales", "correlations")}
    for part, keys in (parts | {train: {*COLUMNS, "images", "residual"}}).items():
        lacking = sorted(keys - {*of.get(part, ())})
        if lacking:
            raise ValueError(
                f"`coefficients` must have {', '.join(sorted(keys))} in {part!r} but lack "
                f"{', '.join(lacking)}; see `sfda_tune.selection.forecast.read_coefficients`."
            )


def find_promise(facts: Mapping[str, Facts], train: str = "full") -> dict[str, float]:
    """Return P(best) of networks of which no image is known yet.

    By quadrature: P_i = ∫ φ_i(u) Π_j≠i Φ_j(u) du, with the mean and the standard deviation of u
    of each.

    >>> pair = look_up_facts(["resnet18.a1_in1k", "resnet152.a1_in1k"])
    >>> {name: round(p, 2) for name, p in find_promise(pair).items()}
    {'resnet18.a1_in1k': 0.09, 'resnet152.a1_in1k': 0.91}
    """
    of = read_coefficients()
    mean, slope, spread, _ = _expect(
        table_facts([*facts.values()]), np.zeros(len(facts)), of, train
    )
    sd = np.sqrt(slope**2 + spread**2 + of[train]["residual"] ** 2)
    u = np.linspace((mean - 8 * sd).min(), (mean + 8 * sd).max(), 2000)
    d = (u[:, None] - mean) / sd
    below = log_ndtr(d)
    p = np.exp(below.sum(axis=1, keepdims=True) - below - d**2 / 2) / sd
    p = p.sum(axis=0)
    return dict(zip(facts, (p / p.sum()).tolist(), strict=True))


def simulate_forecast(
    names: list[str], S: np.ndarray, facts: Mapping[str, Facts], train: str = "full"
) -> np.ndarray:
    """Return the mean of u (R, n) for each row of scores `S` (R, n): what orders a full run."""
    z = normal_scores(S.mean(axis=0))
    x = table_facts([facts.get(name, Facts()) for name in names])
    mean, slope, _, _ = _expect(x, z, read_coefficients(), train)
    return mean + slope * (normal_scores(S) - z)


def _expect(
    x: np.ndarray, z: np.ndarray, of: Mapping[str, Any], train: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Return mean, slope in z, spread by unknown facts, and the parts of the mean, each (n,)."""
    fixed, spread, slope = scale_facts(x, of["scales"], of["correlations"], z)
    w = np.array([of[train][key] for key in COLUMNS])[:, None]
    gamma = of[train]["images"]
    mean = (w * fixed).sum(axis=0) + gamma * z
    parts = dict(zip(COLUMNS.values(), np.where(slope == 0, w * fixed, 0.0), strict=True))
    parts["images"] = mean - sum(parts.values())  # also what they say of facts that are not known
    width = np.sqrt(np.square(w * spread).sum(axis=0))
    return mean, gamma + (w * slope).sum(axis=0), width, parts


def is_forecast(ranking: Ranking) -> bool:
    """Whether a ranking was ordered by `order_by_forecast`."""
    train = ranking.info.get("train")
    return (
        train in MODES
        and ranking.metric == f"forecast ({train})"
        and all("forecast" in s.details for s in ranking.scores if s.error is None)
    )


def order_by_forecast(ranking: Ranking, train: str = "full") -> Ranking:
    """Return a ranking by the mean of u, of one by a score.

    Backbones in ``info["not_looked_at"]`` are among them, by what is known of them. Each score
    keeps ``details["evidence"]``, its value so far (if it has one), and ``details["forecast"]``:
    sd, ranks, P(best) and why; ``info["evidence"]`` and ``info["train"]`` say of what it was made.

    >>> from sfda_tune.values.features import Score
    >>> pair = [Score("resnet18.a1_in1k", 0.72), Score("resnet152.a1_in1k", 0.71)]
    >>> found = order_by_forecast(Ranking(pair, "sfda (loo)"))
    >>> found.shortlist(1), find_evidence(found).shortlist(1)
    (['resnet152.a1_in1k'], ['resnet18.a1_in1k'])
    """
    if is_forecast(ranking):
        ranking = find_evidence(ranking)
    info = {**ranking.info, "evidence": ranking.metric, "train": train}
    scores, metric = ranking.scores, f"forecast ({train})"
    if any(s.error is None for s in scores):
        f = forecast(ranking, train=train)
        of = {
            r.pop("backbone"): (r.pop("mean"), {**r, "error": float(error)})
            for r, error in zip(f.records(), f.error, strict=True)
        }
        scores = tuple(
            _with_forecast(s, *of[s.backbone]) if s.backbone in of else s for s in scores
        )
    return replace(ranking, scores=scores, metric=metric, info=info)


def _with_forecast(score: Score, mean: float, about: Mapping[str, Any]) -> Score:
    details = {**score.details, "forecast": about}
    if score.error is None:
        details["evidence"] = score.value
    else:
        details["note"] = score.error
    return replace(score, value=mean, error=None, details=details)


def find_evidence(ranking: Ranking) -> Ranking:
    """Return the ranking by the score that is behind one by a forecast; any other as it is."""
    if not is_forecast(ranking):
        return ranking
    info = dict(ranking.info)
    metric, _ = str(info.pop("evidence", "score")), info.pop("train")
    scores = tuple(_without_forecast(s) if "forecast" in s.details else s for s in ranking.scores)
    return replace(ranking, scores=scores, metric=metric, info=info)


def _without_forecast(score: Score) -> Score:
    details = dict(score.details)
    del details["forecast"]
    if "evidence" in details:
        return replace(score, value=details.pop("evidence"), details=details)
    note = details.pop("note", "no score")
    return replace(score, value=math.nan, error=str(note), details=details)


def normal_scores(values: np.ndarray) -> np.ndarray:
    """Return Φ⁻¹((rank − ½)/n) along the last axis; ties share the mean of their ranks.

    >>> normal_scores(np.array([3.0, 1.0, 2.0])).round(2).tolist()
    [0.97, -0.97, 0.0]
    """
    values = np.asarray(values, np.float64)
    return ndtri((rankdata(values, axis=-1) - 0.5) / values.shape[-1])


def scale_facts(
    x: np.ndarray, scales: Mapping[str, float], correlations: Mapping[str, float], z: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return x' (3, n), centred, and the spread and slope in z (3, n) of what is not known of it.

    `x` is NaN there; a fact that one backbone alone has is none.
    """
    fixed, spread, slope = (np.zeros(x.shape) for _ in range(3))
    for j, (key, row) in enumerate(zip(COLUMNS, x, strict=True)):
        known = np.isfinite(row)
        if known.sum() < 2:
            known = np.zeros_like(known)
        rho, t = correlations[key], 1.0
        if known.any():
            width = math.hypot(row[known].std(), scales[key]) or 1.0
            t = row[known].std() / width
            # The known ones have their mean where their images put it, seen from all backbones.
            middle = rho * t * z[known].mean() if not known.all() else 0.0
            fixed[j, known] = (row[known] - row[known].mean()) / width + middle
        fixed[j, ~known] = rho * t * z[~known]
        fixed[j] -= fixed[j].mean()
        spread[j, ~known], slope[j, ~known] = t * math.sqrt(1 - rho**2), rho * t
    return fixed, spread, slope


def find_facts(scores: Mapping[str, float], names: Iterable[str] = ()) -> dict[str, Facts]:
    """Return what is known of `names`, by default of the backbones that have a score.

    The table that ships knows timm's own networks, in a `Ranking` by what was loaded: whatever
    somebody calls a network, it is another one. Their size may have been measured.
    """
    names = list(names) or [name for name, value in scores.items() if math.isfinite(value)]
    if not isinstance(scores, Ranking):
        return look_up_facts(names)
    found = {}
    for name in names:
        details = scores.score(name).details if name in scores else {}
        spec = str(details.get("spec", name))
        fact = look_up_facts([spec])[spec]
        size = {key: details.get(key) for key in ("gmacs", "macts")}
        if not math.isfinite(fact.gmacs) and all(map(is_number, size.values())):
            fact = replace(fact, **size)
        found[name] = fact
    return found


def is_known(facts: Mapping[str, Facts]) -> bool:
    """Whether a forecast has something to go by: the ImageNet accuracy of half of the backbones.

    >>> is_known(look_up_facts(["resnet18.a1_in1k", "resnet50.a1_in1k", "mine"]))
    True
    """
    known = sum(math.isfinite(fact.top1) for fact in facts.values())
    return known > 1 and 2 * known >= len(facts)


def table_facts(facts: list[Facts]) -> np.ndarray:
    """Return E, G and A (3, n)."""
    rows = [[f.top1, f.gmacs, f.macts] for f in facts]
    top1, gmacs, macts = np.array(rows, np.float64).T
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.stack([-np.log1p(-top1 / 100), np.log(gmacs), np.log(macts)])


def _draw_scores(
    scores: Mapping[str, float],
    names: list[str],
    columns: Sequence[str],
    z: np.ndarray,
    resamples: np.ndarray | None,
    n_draws: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
    """Return r z, draws of z (n_draws, n) or itself, and the generator of the other draws."""
    rng = np.random.default_rng([seed, len(names)])
    if resamples is None:
        if not isinstance(scores, Ranking):
            return z, z, rng
        try:
            drawn, draws = draw_true_scores(scores)
        except ValueError:  # no means over images
            return z, z, rng
        # Those that left a race keep the score with which they left.
        of = dict(zip(map(str, drawn), draws.T, strict=True))
        M = np.stack([of.get(n, np.full(len(draws), scores[n])) for n in names], axis=1)
    else:
        M = np.asarray(resamples, np.float64)
        shape = M.ndim == 2 and len(M) and M.shape[1] == len(columns)
        M = M[:, [columns.index(name) for name in names]] if shape else M
        if not shape or not np.isfinite(M).all():
            raise ValueError(
                f"`resamples` must be finite, of the shape (R, {len(columns)}), but has the shape "
                f"{np.shape(resamples)}{' and other numbers' if shape else ''}."
            )
    Z = normal_scores(M)
    r = max(Z.mean(axis=0) @ z / (z @ z or 1.0), 0.0)
    return r * z, Z[rng.integers(len(Z), size=n_draws)], rng


@cache
def read_coefficients() -> dict[str, Any]:
    """Return the coefficients that ship, with where they come from."""
    return json.loads(read_text(Path(__file__).with_name("forecast.json")))
