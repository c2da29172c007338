"""Figures for papers and notebooks, with matplotlib (extra ``report``); the page has its own.

Every function takes values and, as `ax`, the Axes to draw on (default: new ones), and returns the
Axes. Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), which the colour-blind
tell apart; what matters is told by shape or hatching, too.

>>> from sfda_tune.report.plots import plot_pareto
>>> axes = plot_pareto({"vit": 0.9, "resnet": 0.8}, {"vit": 86e6, "resnet": 25e6}, cost="params")
>>> axes.get_xlabel()
'params, logarithmic'
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sfda_tune.report.axes import shorten
from sfda_tune.values.labels import encode_labels
from sfda_tune.values.lazy import import_optional
from sfda_tune.values.ranking import Ranking

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sfda_tune.selection.calibration import Calibration

__all__ = [
    "find_front", "plot_calibration", "plot_confusion", "plot_pareto", "plot_predictions",
    "plot_ranking", "plot_reliability", "plot_trials",
]  # fmt: skip

LISTED = 12  # names in a legend
UNITS = (("hours", 3600), ("minutes", 60), ("seconds", 1))
OKABE_ITO = {
    "black": "#000000", "orange": "#E69F00", "sky": "#56B4E9", "green": "#009E73",
    "yellow": "#F0E442", "blue": "#0072B2", "vermillion": "#D55E00", "purple": "#CC79A7",
}  # fmt: skip
STATES = {  # colour, hatching, marker
    "complete": ("blue", "", "o"),
    "pruned": ("purple", "////", "^"),
    "failed": ("vermillion", "xxxx", "X"),
    "running": ("sky", "....", "D"),
}


def find_front(
    scores: Mapping[str, float], costs: Mapping[str, float | None], *, maximize: bool = False
) -> list[str]:
    """Return the Pareto front, cheapest first: no other has both a higher score and a lower cost.

    Of equal ones the first by name is kept; whoever lacks a finite number is left out.

    With `maximize` more of the "cost" is better, as of images per second.

    >>> find_front({"a": 0.9, "b": 0.8, "c": 0.7}, {"a": 90.0, "b": 20.0, "c": 30.0})
    ['b', 'a']
    """
    sign = -1 if maximize else 1
    points = [(sign * c, -scores[n], n) for n in scores if (c := costs.get(n)) is not None]
    front, best = [], math.inf
    for _, loss, name in sorted(p for p in points if math.isfinite(p[0] + p[1])):
        if loss < best:
            front, best = [*front, name], loss
    return front


def plot_ranking(ranking: Mapping[str, float], *, top: int = 30, ax: Axes | None = None) -> Axes:
    """Draw the `top` scores, with 90 % intervals where the ranking knows them.

    `ranking` is a `Ranking`, or a mapping of str to float, then without intervals.
    """
    from sfda_tune.selection.odds import find_odds

    order = sorted((n for n in ranking if math.isfinite(ranking[n])), key=lambda n: -ranking[n])
    names = order[:top][::-1]
    ax = _axes(ax, 1.2 + 0.28 * len(names))
    values, places = np.array([ranking[name] for name in names]), np.arange(len(names))
    xerr = None
    if isinstance(ranking, Ranking) and (c := find_odds(ranking)):
        between = dict(zip(c.names, c.score_interval, strict=True))
        ends = np.array([between.get(n, (ranking[n],) * 2) for n in names])
        xerr = np.abs(ends - values[:, None]).T
    ax.errorbar(values, places, xerr=xerr, fmt="o", color=OKABE_ITO["blue"], capsize=3)
    ax.set_yticks(places, names, parse_math=False)
    ax.set_ylim(-0.6, max(len(names), 1) - 0.4)
    ax.set_xlabel(name_axis(ranking))
    more = f"the first {top} of {len(order)}" if len(order) > top else f"{len(order)} backbones"
    ends = "" if xerr is None else ", 90 % intervals"
    ax.set_title(f"{more[:1].upper()}{more[1:]}{ends}")
    ax.grid(axis="x", alpha=0.3)
    return ax


def name_axis(ranking: Mapping[str, float]) -> str:
    """Return what a ranking is ordered by, with its unit."""
    metric = getattr(ranking, "metric", "") or "score"
    if metric.startswith("forecast"):
        return f"{metric}, standard deviations"
    return f"{metric}, probability of the label" if metric == "sfda (loo)" else metric


def plot_pareto(
    scores: Mapping[str, float],
    costs: Mapping[str, float | None],
    *,
    cost: str = "cost",
    maximize: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draw scores against costs (logarithmic), and the front; see `find_front` for the arguments.

    `cost` labels the axis.
    """
    ax, front = _axes(ax), find_front(scores, costs, maximize=maximize)
    known = {n: c for n in scores if (c := costs.get(n)) and c > 0 and math.isfinite(scores[n])}
    ax.plot(list(known.values()), [scores[n] for n in known], "o", color=OKABE_ITO["blue"])
    line = [name for name in front if name in known]
    x, y = [known[name] for name in line], [scores[name] for name in line]
    ax.plot(x, y, "D-", color=OKABE_ITO["green"])
    if known:
        ax.set_xscale("log")
        _format_counts(ax)
    ax.margins(0.12)
    best = name_axis(scores)
    ax.set(xlabel=f"{cost}, logarithmic" if known else cost, ylabel=best)
    ax.set_title(f"Pareto front: {best.partition(',')[0]} against {cost}")
    label_points(ax, line, x, y, [(known[n], scores[n]) for n in known])
    return ax


def plot_calibration(calibration: Calibration, *, ax: Axes | None = None) -> Axes:
    """Draw each backbone's best value against its score; see `selection.calibration`."""
    ax = _axes(ax)
    rows = calibration.reached
    ax.plot([r["z"] for r in rows], [r["best"] for r in rows], "o", color=OKABE_ITO["blue"])
    if line := calibration.fit_line():
        ax.plot(*zip(*line, strict=True), "--", color=OKABE_ITO["vermillion"])
    ax.margins(0.15)
    ax.set(xlabel="score, standardised rank", ylabel="best value of the trials")
    ax.set_title(calibration.describe_slope(), wrap=True, size="medium")
    columns = [[r[key] for r in rows] for key in ("backbone", "z", "best")]
    label_points(ax, *columns)
    return ax


def plot_reliability(calibration: Mapping[str, Any], *, ax: Axes | None = None) -> Axes:
    """Draw how often a model is right against how sure it is, before and after its temperature.

    `calibration` is ``best["calibration"]`` of a search, see
    `sfda_tune.finetuning.calibration.calibrate_on_test`. A mark stands for the test images of a
    bin, its area for their number; on the line a model is as often right as it is sure.
    """
    ax = _axes(ax, 5.0)
    ax.plot((0, 1), (0, 1), "--", color=OKABE_ITO["black"], linewidth=1)
    labels = {"before": "as it is", "after": f"temperature {calibration['temperature']:.2f}"}
    for when, state in (("before", "pruned"), ("after", "complete")):
        colour, _, marker = STATES[state]
        bins = np.array([b for b in calibration[f"bins_{when}"] if len(b) == 3]).reshape(-1, 3)
        sure, right, n = bins.T
        area = 20 + 180 * n / max(n.sum(), 1)
        label = f"{labels[when]}: calibration error {calibration[f'ece_{when}']:.4f}"
        how = {"s": area, "c": OKABE_ITO[colour], "marker": marker, "alpha": 0.8, "linewidths": 0}
        ax.scatter(sure, right, label=label, **how)
    ax.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    ax.set(xlabel="probability of the predicted class", ylabel="share that is right")
    ax.set_title("Reliability on the test images")
    ax.figure.legend(loc="outside lower center", frameon=False)
    return ax


def plot_trials(trials: Iterable[Mapping[str, Any]], *, ax: Axes | None = None) -> Axes:
    """Draw when each trial ran: a row per backbone, colour and hatching by state.

    `trials` are those of a `search.json`: ``backbone``, ``state``, ``started`` and ``seconds``.
    """
    shown = [t for t in trials if t["started"] is not None]
    shown.sort(key=lambda t: t["started"])
    names = list(dict.fromkeys(t["backbone"] for t in shown))
    ax, seen = _axes(ax, 1.4 + 0.35 * len(names)), set()
    begun = shown[0]["started"] if shown else 0.0
    last = max((t["started"] - begun + (t["seconds"] or 0.0) for t in shown), default=0.0)
    unit, size = next(u for u in UNITS if last >= 3 * u[1] or u[1] == 1)
    for t in shown:
        colour, hatch, _ = STATES[t["state"]]
        left, width = (t["started"] - begun) / size, (t["seconds"] or 1e-3) / size
        label = "_" if t["state"] in seen else t["state"]  # matplotlib leaves out "_"
        seen.add(t["state"])
        ax.barh(
            names.index(t["backbone"]), width, left=left, height=0.6, label=label, hatch=hatch,
            facecolor=OKABE_ITO[colour], edgecolor="white", linewidth=0.8,
        )  # fmt: skip
    ax.set_yticks(range(len(names)), names, parse_math=False)
    ax.invert_yaxis()
    ax.set_xlabel(f"{unit} since the first trial began")
    ax.set_title("Trials by backbone")
    if seen:
        ax.figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return ax


def plot_confusion(
    labels: Sequence[Any],
    predicted: Sequence[Any],
    *,
    classes: Sequence[Any] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the confusion matrix; the shade is the share of the label, counts up to 20 classes.

    `classes` is their order (default: sorted). ValueError if a label is none of them, or if
    `labels` and `predicted` differ in length.
    """
    classes = tuple(classes or encode_labels([*labels, *predicted])[1])
    counts = count_confusions(labels, predicted, classes)
    ax, n = _axes(ax, 5.0), len(classes)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    if n <= 20:
        names = [str(c) for c in classes]
        ax.set_xticks(range(n), names, rotation=90, parse_math=False)
        ax.set_yticks(range(n), names, parse_math=False)
        for i, j in np.argwhere(counts):
            colour = "white" if share[i, j] > 0.5 else "black"
            ax.text(j, i, str(counts[i, j]), ha="center", va="center", color=colour, size="small")
    ax.set(xlabel="predicted class", ylabel="label", title="Confusion matrix, in test images")
    return ax


def plot_predictions(
    labels: Sequence[float], predicted: Sequence[float], *, ax: Axes | None = None
) -> Axes:
    """Draw predicted numbers against true ones; on the dashed line they would be equal.

    ValueError if `labels` and `predicted` differ in length.
    """
    if len(labels) != len(predicted):
        raise ValueError(
            f"`predicted` must be as long as `labels`, {len(labels)}, but has {len(predicted)}."
        )
    ax = _axes(ax, 5.0)
    ax.plot(labels, predicted, "o", color=OKABE_ITO["blue"], alpha=0.6)
    if len(labels):
        ends = [f([*labels, *predicted]) for f in (min, max)]
        ax.plot(ends, ends, "--", color=OKABE_ITO["vermillion"])
    ax.set(
        xlabel="true number",
        ylabel="predicted number",
        title="Predicted against true, test images",
    )
    return ax


# What the page needs, too ------------------------------------------------------------------------
def count_confusions(
    labels: Sequence[Any], predicted: Sequence[Any], classes: Sequence[Any]
) -> np.ndarray:
    """Return how often class i was taken for class j, int64 (n_classes, n_classes)."""
    code = {c: k for k, c in enumerate(classes)}
    unknown = sorted({str(v) for v in [*labels, *predicted] if v not in code})
    if unknown or len(labels) != len(predicted):
        what = f"{unknown[:5]} are none of them" if unknown else "the lengths differ"
        raise ValueError(f"`labels` and `predicted` must be `classes`, one per image, but {what}.")
    counts = np.zeros((len(code), len(code)), np.int64)
    np.add.at(counts, ([code[v] for v in labels], [code[v] for v in predicted]), 1)
    return counts


def label_points(
    ax: Axes,
    names: Sequence[str],
    x: Sequence[float],
    y: Sequence[float],
    others: Sequence[tuple[float, float]] = (),
) -> None:
    """Write names beside points; where they would overprint, numbers, with a legend of the names.

    Each stands above its point, or below, or where else beside it there is room; not over the
    marks of `others`.
    """
    figure: Any = ax.figure
    figure.draw_without_rendering()  # where everything lies is known then only
    labels = list(map(str, names))
    texts = _place(ax, labels, x, y, others)
    if texts is not None or not labels:
        return
    first = sorted(range(len(labels)), key=lambda i: -y[i])[:LISTED]
    numbers = [str(k) for k in range(1, len(first) + 1)]
    lines = [f"{k}  {_shorten_name(labels[i])}" for k, i in zip(numbers, first, strict=True)]
    if len(labels) > LISTED:
        lines.append(f"and {len(labels) - LISTED} more, without a number")
    handles = [ax.plot([], [], linestyle="", label=line)[0] for line in lines]
    legend = figure.legend(
        handles=handles, loc="outside lower center", ncols=1, labelspacing=0.1, handlelength=0,
        handletextpad=0, frameon=False, fontsize="small",
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)
    figure.draw_without_rendering()  # the legend takes room from the axes
    _place(ax, numbers, [x[i] for i in first], [y[i] for i in first], others, force=True)


def _shorten_name(name: str, most: int = 60) -> str:
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[:half]}…{name[-half:]}"


def _place(
    ax: Axes,
    labels: Sequence[str],
    x: Sequence[float],
    y: Sequence[float],
    others: Sequence[tuple[float, float]] = (),
    force: bool = False,
) -> list[Any] | None:
    """Write labels where there is room; None, and nothing, if one has none (unless `force`)."""
    from matplotlib.transforms import Bbox

    spots = ((0, 7, "center", "bottom"), (0, -7, "center", "top"), (7, 0, "left", "center"),
             (-7, 0, "right", "center"), (6, 6, "left", "bottom"), (-6, 6, "right", "bottom"),
             (6, -6, "left", "top"), (-6, -6, "right", "top"))  # fmt: skip
    inside = ax.get_window_extent()
    points = [*zip(x, y, strict=True), *others]
    places = ax.transData.transform(points) if points else ()
    marks = [Bbox.from_bounds(px - 4, py - 4, 8, 8) for px, py in places]
    taken, texts = [], []
    for label, a, b in zip(labels, x, y, strict=True):
        for dx, dy, ha, va in spots:
            style: Any = {"textcoords": "offset points", "ha": ha, "va": va, "parse_math": False}
            text = ax.annotate(label, (a, b), (dx, dy), **style)
            text.set_in_layout(False)  # what is around stays where it is
            box = text.get_window_extent()
            free = not any(box.overlaps(other) for other in (*taken, *marks))
            if free and inside.x0 <= box.x0 and box.x1 <= inside.x1 and box.y1 <= inside.y1:
                break
            text.remove()
        else:
            if not force:
                for text in texts:
                    text.remove()
                return None
            continue  # of points upon each other the first keeps its number; the legend has all
        taken.append(box)
        texts.append(text)
    return texts


def _format_counts(ax: Axes) -> None:
    """Show 25M instead of 2.5 × 10⁷, and a few ticks within a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = ax.get_xlim()
    digits = (1.0, 2.0, 5.0) if high < 200 * low else (1.0,)
    ax.xaxis.set_major_locator(LogLocator(subs=digits))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: shorten(float(f"{v:.6g}"))))
    ax.xaxis.set_minor_formatter(NullFormatter())


def _axes(ax: Axes | None, height: float = 4.0) -> Axes:
    if ax is not None:
        return ax
    import_figure()
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(6.4, min(height, 20.0)), layout="constrained")[1]


def import_figure() -> Any:
    """Return matplotlib's `Figure`; ImportError says what to install."""
    advice = "sfda_tune.report.plots needs matplotlib: pip install 'sfda-tune[report]'."
    return import_optional("matplotlib.figure", advice).Figure
