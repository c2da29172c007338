"""What makes a ranking doubtful, each with its reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.stats import rankdata

from sfda_tune.selection.forecast import find_evidence, is_forecast
from sfda_tune.values.features import Score
from sfda_tune.values.ranking import Ranking
from sfda_tune.values.text import some

__all__ = ["Diagnostic", "diagnose", "find_leak", "tell_copies", "tell_near"]
Severity = Literal["warning", "note"]
_Found = tuple[Severity, str] | None
IN_SAMPLE = ("sfda (official)", "sfda (paper)", "hscore", "transrate")
SATURATED = 1 - 1e-6


@dataclass(frozen=True)
class Diagnostic:
    """A sign that a ranking deserves a second look."""

    kind: str  # see `diagnose`
    severity: Severity  # a warning means that the order itself may be wrong
    message: str  # one sentence: what it is, and what to do

    def __str__(self) -> str:
        return f"{self.severity}: {self.message}"


def diagnose(ranking: Ranking) -> list[Diagnostic]:
    """Look for signs that a ranking means less than it seems to; warnings first.

    =================  ======================================================================
    kind               when
    =================  ======================================================================
    ``task``           a forecast for other labels than classes: it was fitted to classification
    ``failed``         a backbone could not be scored
    ``ties``           two scores are equal, or exceed 1 − 1e-6 where all lie in [0, 1]
    ``few_samples``    N < 5 D for a metric that scores the images it was fitted on
    ``width``          Spearman correlation of score and feature width > 0.6, 5 or more backbones
    ``small_classes``  a class has fewer than 5 images
    ``shrinkage``      λ ≤ 1e-9 or ≥ 0.999
    ``unreadable``     images were left out
    ``channels``       networks were adapted to images of other than three channels
    ``copies``         images are exact copies of others, or stand in several classes
    ``near``           images nearly equal others, or were too many to compare
    ``groups``         how much scores drop where whole groups are left out
    ``lone_classes``   a class lies within one group, so that its images cannot be judged
    ``unjudged``       of several labels, one was left out: too few images have it, or lack it
    =================  ======================================================================

    A metric is taken to score the images it was fitted on if its details say
    ``in_sample: true``, or else if it is ``official`` or ``paper`` SFDA, H-score or TransRate.

    Parameters
    ----------
    ranking : Ranking

    Returns
    -------
    list of Diagnostic
        At most one of each kind.

    Examples
    --------
    >>> for finding in diagnose(Ranking([Score("a", 0.5), Score("b", 0.5)])):
    ...     print(finding)
    warning: 2 backbones have the score 0.5 exactly: a, b; use another metric to tell them apart.
    """
    task, ranking = _task(ranking), find_evidence(ranking)
    scores = [s for s in ranking.scores if s.error is None]
    checks = {
        "task": task,
        "failed": _failed(ranking),
        "ties": _ties(ranking, scores),
        "few_samples": _few_samples(ranking, scores),
        "width": _width(scores),
        "small_classes": _small_classes(ranking),
        "shrinkage": _shrinkage(scores),
        "unreadable": _unreadable(ranking),
        "channels": _channels(ranking),
        "copies": _copies(ranking),
        "near": _near(ranking),
        "groups": _groups(ranking, scores),
        "lone_classes": _lone_classes(ranking),
        "unjudged": _unjudged(ranking, scores),
    }
    diagnostics = (Diagnostic(kind, *found) for kind, found in checks.items() if found)
    return sorted(diagnostics, key=lambda d: d.severity != "warning")


def _count(n: int, singular: str, plural: str) -> str:
    return f"{n} {singular if n == 1 else plural}"


_KINDS = {
    "regression": ("numbers", "ridge"), "ordinal": ("levels", "ridge"),
    "multilabel": ("several labels", "sfda"),
}  # fmt: skip


def _has_classes(ranking: Ranking) -> bool:
    """Whether the labels are classes, one per image."""
    return ranking.info.get("task") not in _KINDS


def _task(ranking: Ranking) -> _Found:
    if _has_classes(ranking) or not is_forecast(ranking):
        return None
    what, metric = _KINDS[ranking.info["task"]]
    return (
        "note",
        f"the forecast was fitted to classification only; for {what} it weighs score, ImageNet "
        f"accuracy and size as it does for classes: metric={metric!r} (--metric {metric}) ranks "
        "by these images alone.",
    )


def _unjudged(ranking: Ranking, scores: Sequence[Score]) -> _Found:
    counts: list[dict[str, Any]] = [*(ranking.info.get("label_counts") or ())]
    left_out = next((s.details["left_out"] for s in scores if "left_out" in s.details), ())
    few = [f"{counts[c]['name']} ({counts[c]['positives']})" for c in left_out if c < len(counts)]
    if not few:
        return None
    units = "groups" if "groups" in ranking.info else "images"
    return (
        "warning",
        f"{_count(len(few), 'label was', 'labels were')} left out of the score, for it takes two "
        f"{units} with a label and two without (images with it: {some(few)}); add images.",
    )


def _failed(ranking: Ranking) -> _Found:
    unseen = ranking.info.get("not_looked_at") or ()
    failed = {name: error for name, error in ranking.failed.items() if name not in unseen}
    if not failed:
        return None
    name, error = next(iter(failed.items()))
    return (
        "warning",
        f"{len(failed)} of {_count(len(ranking), 'backbone', 'backbones')} could not be "
        f"scored ({some(failed)}; {name}: {error}); the best may be among them, so fix "
        "or drop them and rank again.",
    )


def _ties(ranking: Ranking, scores: Sequence[Score]) -> _Found:
    values = [s.value for s in scores]
    bounded = all(0 <= value <= 1 + 1e-9 for value in values)  # else 1 is a score like any other
    full = [s.backbone for s in scores if bounded and s.value > SATURATED]
    if len(full) > 1:
        advice = "use variant='loo'" if ranking.metric in IN_SAMPLE[:2] else "use another metric"
        what = f"{len(full)} backbones score more than 1 − 1e-6 and are tied"
        return "warning", f"{what}: {some(full)}; {advice} or more images."
    equal = {v: [s.backbone for s in scores if s.value == v] for v in values}
    tied = [(v, names) for v, names in equal.items() if len(names) > 1]
    if not tied:
        return None
    value, names = tied[0]
    more = f" (and {_count(len(tied) - 1, 'other tie', 'other ties')})" if len(tied) > 1 else ""
    return (
        "warning",
        f"{len(names)} backbones have the score {value:.6g} exactly{more}: {some(names)}; "
        "use another metric to tell them apart.",
    )


def _few_samples(ranking: Ranking, scores: Sequence[Score]) -> _Found:
    fitted = ranking.metric in IN_SAMPLE
    wide = [
        s for s in scores if s.details.get("in_sample", fitted) and 0 < s.n_samples < 5 * s.n_dims
    ]
    if not wide:
        return None
    s = max(wide, key=lambda s: s.n_dims)
    advice = "use variant='loo'" if ranking.metric in IN_SAMPLE[:2] else "use a held-out metric"
    return (
        "warning",
        f"{_count(len(wide), 'backbone has', 'backbones have')} fewer than 5 images per feature "
        f"(widest: {s.backbone}, {s.n_samples} images for width {s.n_dims}) while the metric "
        f"scores the images it was fitted on, which favours wide backbones; {advice}, or at least "
        f"{5 * s.n_dims} images.",
    )


def _width(scores: Sequence[Score]) -> _Found:
    pairs = np.array([(s.value, s.n_dims) for s in scores if s.n_dims > 0])
    if len(pairs) < 5 or (np.ptp(pairs, axis=0) == 0).any():
        return None
    rho = np.corrcoef(rankdata(pairs, axis=0).T)[0, 1]
    if not rho > 0.6:
        return None
    return (
        "note",
        f"the scores follow the feature width (Spearman {rho:.2f} over {len(pairs)} backbones); "
        "compare backbones of one width, or check the order with a held-out metric.",
    )


def _small_classes(ranking: Ranking) -> _Found:
    if ranking.labels is None or not len(ranking.labels) or not _has_classes(ranking):
        return None
    classes = list(ranking.info.get("classes") or ())
    sizes = np.bincount(ranking.labels, minlength=len(classes))
    names = classes if len(classes) == len(sizes) else [f"class {c}" for c in range(len(sizes))]
    small = [(size, names[c]) for c, size in enumerate(sizes.tolist()) if size < 5]
    if not small:
        return None
    small.sort(key=lambda pair: pair[0])
    return (
        "warning" if small[0][0] < 2 else "note",
        f"{_count(len(small), 'class has', 'classes have')} fewer than 5 images "
        f"({some(f'{name}: {size}' for size, name in small)}); add images or leave "
        f"{'it' if len(small) == 1 else 'them'} out.",
    )


def _shrinkage(scores: Sequence[Score]) -> _Found:
    low, high = [], []
    for s in scores:
        lam = s.details.get("lambda")
        if isinstance(lam, int | float):
            (low if lam <= 1e-9 else high if lam >= 0.999 else []).append(s.backbone)
    if not low and not high:
        return None
    parts = []
    if low:
        parts.append(f"at the lower bound (nothing is shrunk: overfits) for {some(low)}")
    if high:
        parts.append(f"at 1 (the covariance is ignored) for {some(high)}")
    return (
        "note",
        f"the shrinkage λ is {' and '.join(parts)}, because its rule depends on the scale of the "
        "features; use variant='loo' or fix `shrinkage`.",
    )


def _unreadable(ranking: Ranking) -> _Found:
    files = ranking.info.get("unreadable")
    if not files:
        return None
    return (
        "note",
        f"{_count(len(files), 'image', 'images')} could not be read and took no part "
        f"({some(files)}); repair or remove {'it' if len(files) == 1 else 'them'}.",
    )


def _channels(ranking: Ranking) -> _Found:
    if (n := ranking.info.get("channels", 3)) == 3:
        return None
    return (
        "note",
        f"images have {n} channels: the first convolution of each network of timm's repeats the "
        "pretrained weights of red, green and blue over them, and one mean and deviation, the "
        "average of the three, normalises all, as timm does both; of three well chosen bands "
        "(--bands 4,3,2) the pretrained weights may know more.",
    )


def _copies(ranking: Ranking) -> _Found:
    said = tell_copies(ranking.info)
    if not said:
        return None
    severity = "warning" if ranking.info.get("several_classes") else "note"
    return severity, "; ".join(said) + "."


def find_leak(scores: Iterable[Score]) -> dict[str, float]:
    """Return by how much the score of each backbone drops where groups are respected."""
    key = "value_without_groups"
    return {
        s.backbone: float(s.details[key]) - s.value
        for s in scores
        if s.error is None and isinstance(s.details.get(key), int | float)
    }


def _groups(ranking: Ranking, scores: Sequence[Score]) -> _Found:
    about, drops = ranking.info.get("groups"), find_leak(scores)
    if not about or not drops:
        return None
    most = max(drops, key=lambda name: drops[name])
    values = {s.backbone: s.value for s in scores}
    before = {name: values[name] + drop for name, drop in drops.items()}
    first = [max(v, key=lambda name: v[name]) for v in (values, before) if v]
    change = f"; without them {first[1]} would score best, not {first[0]}" * (len(set(first)) > 1)
    return (
        "note",
        f"the score drops by {np.median(list(drops.values())):.3f} (median; most for {most}: "
        f"{before[most]:.3f} → {values[most]:.3f}) where whole groups are left out: "
        f"{about['n']} groups, the largest of {_count(about['largest'], 'image', 'images')}"
        f"{change}.",
    )


def _lone_classes(ranking: Ranking) -> _Found:
    if ranking.groups is None or ranking.labels is None or not _has_classes(ranking):
        return None
    pairs = np.unique(np.stack([ranking.labels, ranking.groups]), axis=1)[0]
    alone = np.flatnonzero(np.bincount(pairs) == 1)
    if not len(alone):
        return None
    classes = list(ranking.info.get("classes") or ())
    names = [classes[c] if c < len(classes) else f"class {c}" for c in alone.tolist()]
    one = len(names) == 1
    return (
        "warning",
        f"{_count(len(names), 'class lies', 'classes lie')} within one group each "
        f"({some(names)}): without it nothing of {'it' if one else 'them'} is left, so "
        f"{'its' if one else 'their'} images are not judged; add images of other groups.",
    )


def _near(ranking: Ranking) -> _Found:
    said = tell_near(ranking.info)
    if not said:
        return None
    about = ranking.info.get("near_duplicates") or {}
    return "warning" if about.get("several_classes") else "note", f"{said}."


def tell_near(about: Mapping[str, Any]) -> str:
    """Say in a clause what `describe_near` holds; nothing if there is nothing to say."""
    if "near_duplicates" not in about:
        return ""
    near = about["near_duplicates"]
    if near is None:
        return "near duplicates were not looked for, for the images are too many to compare"
    pairs = some([f"{a} ~ {b}" for a, b in near["pairs"]], 3, "; ")
    text = (
        f"{near['n']} images nearly equal others ({pairs}): they make "
        f"{_count(near['sets'], 'group that is', 'groups that are')} left out together"
    )
    if torn := near["several_classes"]:
        text += f"; {torn} of these {'stands' if torn == 1 else 'stand'} in more than one class: "
        text += "look at the labels"
    return text


def tell_copies(about: Mapping[str, Any]) -> list[str]:
    """Say in clauses what `Twins.describe` holds; nothing if there are no copies."""
    copies, torn = about.get("copies") or [], about.get("several_classes") or []
    said = []
    if copies:
        pairs = [f"{c['image']} = {c['same_as']}" for c in copies]
        one = "is an exact copy of another and was"
        many = "are exact copies of others and were"
        said.append(
            f"{len(copies)} of {about['n_images']} images {one if len(copies) == 1 else many} "
            f"left out: each image takes part once ({some(pairs, 3, '; ')})"
        )
    if torn:
        shown = some([f"{t['image']}: {', '.join(t['classes'])}" for t in torn], 3, "; ")
        stand = "image stands" if len(torn) == 1 else "images stand"
        said.append(
            f"{len(torn)} {stand} in more than one class and counted in one only ({shown}); "
            "remove the wrong ones"
        )
    return said
