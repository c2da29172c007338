"""Scoring: from the features of one backbone to its `Score`, and from all scores to one column.

A metric is a name, a function, or a *combination* of names such as ``"sfda + imagenet"`` or
``"2*sfda + knn"``: the weighted mean of the ranks of its terms over the backbones
(`sfda_tune.metrics.combine`). A term may also be a prior, which knows backbones by name, or a
metric whose parts are scaled over all backbones (`ncti`, `etran`).
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from typing import Any

import numpy as np

from sfda_tune.metrics.combine import combine, combine_hub
from sfda_tune.metrics.multilabel import MULTILABEL
from sfda_tune.metrics.priors import PRIORS
from sfda_tune.metrics.registry import METRICS, describe_metrics, get_metric
from sfda_tune.metrics.regression import ORDINAL, REGRESSION
from sfda_tune.metrics.sfda import VARIANTS, sfda
from sfda_tune.values.features import Features, MetricResult, Score
from sfda_tune.values.ranking import Ranking
from sfda_tune.values.text import DECIMAL, did_you_mean

__all__ = [
    "Metric", "Scorer", "default_metric", "has_fast_float64", "score", "scores_faster",
]  # fmt: skip

logger = logging.getLogger(__name__)

Metric = str | Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Term:
    """One metric of a combination; `function` is None for a prior."""

    name: str
    label: str
    weight: float
    function: Callable[..., Any] | None
    hub: bool = False

    @property
    def knows_groups(self) -> bool:
        """Whether it leaves groups out; in-sample scores have nothing to leave out."""
        function = self.function
        if _bare(function) is sfda and isinstance(function, partial):
            return function.keywords.get("variant", "loo") == "loo"
        with suppress(TypeError, ValueError):  # a builtin may have no signature
            return function is not None and "groups" in signature(function).parameters
        return False


class Scorer:
    """What `metric` and `variant` mean, checked before any work is done.

    Parameters
    ----------
    metric : str or callable
    variant : str, optional
        Of the metric ``sfda``.
    task : {"classification", "regression", "ordinal", "multilabel"}
        For "regression" and "ordinal" the names are those of `sfda_tune.metrics.regression`, for
        "multilabel" those of `sfda_tune.metrics.multilabel`.

    Raises
    ------
    ValueError
        If a name is unknown or has no meaning for the task, a metric needs what images and
        features do not have, or no term is computed from features.
    """

    def __init__(
        self, metric: Metric = "sfda", variant: str | None = None, task: str = "classification"
    ) -> None:
        needs = {info.name: info.needs for info in describe_metrics()}
        self.task, texts = task, [metric]
        if isinstance(metric, str) and metric not in needs:
            texts = [text.strip() for text in metric.split("+")]
        if variant is not None and task == "multilabel":
            raise ValueError(
                f"`variant` must be None for several labels per image, whose SFDA always leaves "
                f"one out, but is {variant!r}; leave it out."
            )
        if task == "classification":
            self.terms = [_term(text, variant, needs) for text in texts]
        else:
            self.terms = [_term_of_task(text, task, needs) for text in texts]
        names = [term.name for term in self.terms]
        if len(set(names)) < len(names):
            raise ValueError(f"`metric` must name each metric once but is {metric!r}.")
        if not any(term.function for term in self.terms):
            raise ValueError(
                f"`metric` must have a term that looks at the images but is {metric!r}; a prior "
                f"is one of several terms: '{default_metric(task)} + {names[0]}'."
            )
        if variant is not None and all(_bare(term.function) is not sfda for term in self.terms):
            raise ValueError(
                f"`variant` belongs to the metric 'sfda' but `metric` is {metric!r} and "
                f"`variant` {variant!r}; leave it out, or pass functools.partial(your_metric, …)."
            )
        self.label = " + ".join(
            term.label if term.weight == 1 else f"{term.weight:g}*{term.label}"
            for term in self.terms
        )

    @property
    def combined(self) -> bool:
        """Whether a value depends on the other backbones."""
        return len(self.terms) > 1 or self.terms[0].hub

    @property
    def is_mean(self) -> bool:
        """Whether the value is a mean over images, by a trial; True where that cannot be told."""
        if self.combined:
            return False
        y = np.arange(24) % 3
        y = y[:, None] == np.arange(3) if self.task == "multilabel" else y
        x = np.random.default_rng(0).normal(size=(len(y), 2))
        trial = self.score(Features(x, y, task=self.task))
        return trial.per_sample is not None or trial.error is not None

    def score(self, features: Features, device: str = "cpu") -> Score:
        """Score the features of one backbone; a metric that fails gives a score with its error.

        SFDA computes on `device` where that is faster, `details["device"]` says where it did.
        Where the features have groups, metrics that know them leave out whole ones;
        `details["value_without_groups"]` is what they say otherwise, `details["note"]` which of
        the terms know none.
        """
        started = time.perf_counter()
        problem = None
        try:
            results = {t.name: _score_term(t, features, device) for t in self.terms if t.function}
            result = next(iter(results.values()))
            if len(self.terms) > 1:
                details = {name: dict(r.details) for name, r in results.items()}
                parts = {name: r.value for name, r in results.items()}
                result = MetricResult(result.value, None, {"parts": parts, **details})
            ignorant = [t.label for t in self.terms if t.function and not t.knows_groups]
            if features.groups is not None and ignorant:
                note = f"{' and '.join(ignorant)} knows no groups"
                result = replace(result, details={**result.details, "note": note})
        except Exception as error:
            logger.debug("%s could not be scored", features.backbone, exc_info=True)
            text = " ".join(str(error).split())
            result, problem = MetricResult(0.0), f"{type(error).__name__}: {text}"
        return Score(
            features.backbone,
            result.value,
            result.per_sample,
            features.n_samples,
            features.n_dims,
            result.details,
            time.perf_counter() - started,
            problem,
        )

    def combine(self, scores: Sequence[Score]) -> list[Score]:
        """Bring the terms of all backbones to one scale; nothing to do for a single metric.

        A backbone that a prior does not know gets the median of those it knows, and a note.
        """
        good = [s for s in scores if s.error is None]
        if not self.combined or not good:
            return list(scores)
        if len(self.terms) == 1:
            values, unknown = combine_hub({s.backbone: s for s in good}), {}
        else:
            columns, unknown = [], {}
            for term in self.terms:
                columns.append(self._column(term, good, unknown))
            values = combine(*columns, weights=[term.weight for term in self.terms])
        return [
            s
            if s.error is not None
            else replace(
                s,
                value=values[s.backbone],
                per_sample=None,
                details=_noted(s.details, unknown.get(s.backbone)),
            )
            for s in scores
        ]

    def _column(
        self, term: Term, scores: Sequence[Score], unknown: dict[str, list[str]]
    ) -> dict[str, float]:
        if term.hub:
            return combine_hub(
                {s.backbone: MetricResult(s.value, details=s.details[term.name]) for s in scores}
            )
        if term.function:
            return {s.backbone: s.details["parts"][term.name] for s in scores}
        known = PRIORS[term.name](Ranking(tuple(scores)))
        missing = [name for name, value in known.items() if not math.isfinite(value)]
        for name in missing:
            unknown.setdefault(name, []).append(term.name)
        median = float(np.median([v for v in known.values() if math.isfinite(v)] or [0.0]))
        return {**known, **dict.fromkeys(missing, median)}


def score(
    features: Features, metric: Metric | None = None, *, variant: str | None = None
) -> Score:
    """Score the features of one backbone.

    Parameters
    ----------
    features : Features
        With ``groups``, where some images belong together.
    metric : str or callable, optional
        Default: "sfda"; "ridge" for numbers to predict and for levels. A name in
        `sfda_tune.metrics.METRICS` (`REGRESSION`, for numbers, `ORDINAL`, for levels,
        `MULTILABEL`, for several labels per image), or any ``f(x, y)`` that returns a
        float or a `MetricResult`, higher being better; with a parameter ``groups`` it is given
        these, too.
        Combinations need all backbones: see `rank`.
    variant : str, optional
        Of the metric ``sfda``.

    Returns
    -------
    Score
        A metric that fails gives a score with its error.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> y = np.arange(60) % 3
    >>> apart = Features(rng.normal(size=(60, 4)) + 3 * y[:, None], y, backbone="apart")
    >>> mixed = Features(rng.normal(size=(60, 4)), y, backbone="mixed")
    >>> score(apart).value > score(mixed).value
    True
    """
    if metric is None:
        metric = default_metric(features.task)
    scorer = Scorer(metric, variant, features.task)
    if len(scorer.terms) > 1:
        raise ValueError(
            f"`metric` must be a single one here but is {metric!r}: ranks need several backbones; "
            "score them one by one and pass the scores to sfda_tune.metrics.combine."
        )
    return scorer.score(features)


def _parse(text: Metric) -> tuple[str, Metric, float]:
    """Return what a term is called, the term, and its weight."""
    weight = 1.0
    if isinstance(text, str) and (match := re.fullmatch(rf"({DECIMAL})\s*\*\s*(.+)", text)):
        weight, text = float(match[1]), match[2]
    name = text if isinstance(text, str) else getattr(text, "__name__", "score")
    return name, text, weight


def default_metric(task: str) -> str:
    """Return the score of frozen features that a task is ranked by."""
    return "ridge" if task in ("regression", "ordinal") else "sfda"


_OF_TASKS = {
    "regression": (
        REGRESSION, "f(features, targets)", "is about classes",
        ", or task='classification' (--task classification), if each number is a class",
    ),
    "ordinal": (
        ORDINAL, "f(features, levels)", "takes classes without an order",
        ", or task='classification' (--task classification), if the order does not count",
    ),
    "multilabel": (MULTILABEL, "f(features, labels)", "takes one class per image", ""),
}  # fmt: skip


def _term_of_task(text: Metric, task: str, needs: Mapping[str, tuple[str, ...]]) -> Term:
    """Return a term for numbers or several labels: few metrics have a meaning for them."""
    known, call, problem, advice = _OF_TASKS[task]
    name, text, weight = _parse(text)
    if callable(text):
        return Term(name, name, weight, text)
    if name in PRIORS:
        return Term(name, name, weight, None)
    if name not in known:
        why = problem if name in needs else "is unknown"
        raise ValueError(
            f"`metric` must be a sum of some of {', '.join([*known, *PRIORS])}, or a "
            f"function {call}, for the task {task!r}, but {text!r} {why}; take "
            f"{default_metric(task)!r}{advice}."
        )
    return Term(name, name, weight, known[name])


def _term(text: Metric, variant: str | None, needs: Mapping[str, tuple[str, ...]]) -> Term:
    name, text, weight = _parse(text)
    usable = [key for key, need in needs.items() if "features" in need or key in PRIORS]
    if not callable(text) and (not isinstance(text, str) or name not in needs):
        raise ValueError(
            f"`metric` must be a sum of some of {', '.join(usable)}, or a function f(features, "
            f"labels), but is {text!r}"
            + (
                "; that one is for numbers to predict: task='regression'; or for levels: "
                "task='ordinal'."
                if isinstance(text, str) and text in REGRESSION
                else did_you_mean(name, usable)
                or "; name your own with sfda_tune.metrics.register_metric."
            )
        )
    function = get_metric(text)
    registered = METRICS.get(name) is function  # else one of the user's own, whatever its name
    if registered and name in PRIORS:
        return Term(name, name, weight, None)
    needed = needs[name] if registered else ("features",)
    if "features" not in needed:
        call = f"{function.__module__}.{function.__name__}(None, labels, {needed[0]}=…)"
        raise ValueError(
            f"`metric` must be computed from features but {name!r} needs {' and '.join(needed)}, "
            f"which `rank` does not have; choose one of {', '.join(usable)}, or call it with your "
            f"own: {call}."
        )
    if function is sfda:
        chosen = variant or signature(sfda).parameters["variant"].default
        if chosen not in VARIANTS:
            raise ValueError(f"`variant` must be one of {', '.join(VARIANTS)} but is {variant!r}.")
        return Term(name, f"sfda ({chosen})", weight, partial(sfda, variant=chosen))
    return Term(name, name, weight, function, hub="hub" in needed)


def _bare(function: Any) -> Any:
    while isinstance(function, partial):
        function = function.func
    return function


def _result(value: Any) -> MetricResult:
    return value if isinstance(value, MetricResult) else MetricResult(float(value))


def _score_term(term: Term, features: Features, device: str) -> MetricResult:
    """Score by one metric, with groups where it knows them; then by what it says without, too."""
    assert term.function is not None
    plain = _result(_compute(term.function, features, device))
    if features.groups is None or not term.knows_groups:
        return plain
    grouped = _result(_compute(partial(term.function, groups=features.groups), features, device))
    return replace(grouped, details={**grouped.details, "value_without_groups": plain.value})


def _compute(function: Callable[..., Any], features: Features, device: str) -> Any:
    x, y = features.x, features.y
    if device != "cpu" and _bare(function) is sfda and scores_faster(x.shape, device):
        import torch

        try:
            return function(torch.tensor(x, device=device), y)
        except RuntimeError as error:  # too little memory, or lost to another's fault
            why = " ".join(str(error).split())[:200]
            logger.warning("%s is scored on the CPU (%s)", features.backbone, why)
    return function(x, y)


def _noted(details: Mapping[str, Any], priors: list[str] | None) -> dict[str, Any]:
    if not priors:
        return dict(details)
    notes = [str(details.get("note", "")), f"unknown to {' and '.join(priors)}"]
    return {**details, "note": "; ".join(filter(None, notes))}


# Multiplications of a score from which a GPU repays the transfer of the features and the start of
# its libraries; below, a CPU takes some hundredths of a second.
WORTH_A_TRANSFER = 2e9


def has_fast_float64(device: Any) -> bool:
    """Whether a CUDA device has more than the token float64 units of cards for games.

    Those of compute capability x.0 up to 10 (P100, V100, A100, H100, B200) compute float64 at half
    the rate of float32, all others at 1/32 or 1/64.
    """
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    return minor == 0 and 6 <= major <= 10


def scores_faster(shape: tuple[int, int], device: Any) -> bool:
    """Whether SFDA of so many samples and dimensions is faster on a device than on the host.

    Goes by the size and the kind of card, not by the clock: the same input is computed in the same
    place each time.
    """
    import torch

    n, d = shape
    if torch.device(device).type != "cuda" or n * d * min(n, d) < WORTH_A_TRANSFER:
        return False
    return torch.cuda.is_available() and has_fast_float64(device)
